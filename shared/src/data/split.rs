//! Label skew between clients by Dirichlet draws, as in Hsu et al. 2019 (arXiv 1909.06335).
//!
//! Drawn per answer over the clients (Yurochkin et al. 2019, arXiv 1905.12022) instead of per client over the answers, so that
//! every sample is dealt exactly once. Small `alpha`: each answer sits with few clients; large: all clients look alike.

use super::dataset::Sample;
use crate::model::adapter::standard_normal;
use rand::{Rng, seq::SliceRandom};
use std::collections::BTreeMap;

/// Why samples cannot be split.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SplitError {
    /// The concentration.
    #[error("alpha is {0}, it must be a finite number above 0; 0.1 is strong skew, 100 almost none")]
    Alpha(f64),
    /// Nobody to deal to.
    #[error("samples cannot be split over 0 clients; name at least 1")]
    NoClients,
}

/// Deal samples to clients: the rows of each client, ascending. A client is left empty only if there are fewer samples than
/// clients.
///
/// # Errors
/// [`SplitError`] for a concentration or a number of clients that means nothing.
pub fn dirichlet<R: Rng>(
    samples: &[Sample],
    clients: usize,
    alpha: f64,
    rng: &mut R,
) -> Result<Vec<Vec<usize>>, SplitError> {
    if !alpha.is_finite() || alpha <= 0.0 {
        return Err(SplitError::Alpha(alpha));
    }
    if clients == 0 {
        return Err(SplitError::NoClients);
    }
    let mut answers: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (row, sample) in samples.iter().enumerate() {
        answers.entry(sample.answer.as_str()).or_default().push(row);
    }
    let mut dealt: Vec<Vec<usize>> = vec![Vec::new(); clients];
    for rows in answers.values_mut() {
        rows.shuffle(rng);
        let mut rest = rows.as_slice();
        let counts = apportion(rows.len(), &proportions(clients, alpha, rng));
        for (client, count) in dealt.iter_mut().zip(counts) {
            let (mine, others) = rest.split_at(count);
            client.extend_from_slice(mine);
            rest = others;
        }
    }
    if samples.len() >= clients {
        feed_empty(&mut dealt);
    }
    dealt.iter_mut().for_each(|rows| rows.sort_unstable());
    Ok(dealt)
}

/// Every client gets a sample; there are at least as many samples as clients.
fn feed_empty(dealt: &mut [Vec<usize>]) {
    while let Some(empty) = dealt.iter().position(Vec::is_empty) {
        let Some(moved) = dealt.iter_mut().max_by_key(|rows| rows.len()).and_then(Vec::pop) else {
            return;
        };
        dealt[empty].push(moved);
    }
}

/// A draw from the symmetric Dirichlet distribution: gamma draws, divided by their sum.
fn proportions<R: Rng>(parts: usize, alpha: f64, rng: &mut R) -> Vec<f64> {
    // In logarithms: for small alpha all gamma draws would underflow to 0.
    let logs: Vec<f64> = (0..parts).map(|_| ln_gamma_draw(alpha, rng)).collect();
    let top = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logs.iter().map(|l| (l - top).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

/// Logarithm of a Gamma(shape, 1) draw: Marsaglia and Tsang 2000, "A simple method for generating gamma variables".
fn ln_gamma_draw<R: Rng>(shape: f64, rng: &mut R) -> f64 {
    if shape < 1.0 {
        // Their boost: Gamma(a) = Gamma(a + 1) * U^(1/a).
        let boost = (ln_uniform(rng) / shape).max(f64::MIN);
        return (ln_gamma_draw(shape + 1.0, rng) + boost).max(f64::MIN);
    }
    let d = shape - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        let x = f64::from(standard_normal(rng));
        let t = 1.0 + c * x;
        if t <= 0.0 {
            continue;
        }
        let ln_v = 3.0 * t.ln();
        if ln_uniform(rng) < 0.5 * x * x + d * (1.0 - ln_v.exp() + ln_v) {
            return d.ln() + ln_v;
        }
    }
}

/// Logarithm of a uniform draw from (0, 1].
fn ln_uniform<R: Rng>(rng: &mut R) -> f64 {
    (1.0 - rng.random::<f64>()).ln()
}

/// Whole counts that add up to `total`: shares rounded down, what is left to the largest remainders.
fn apportion(total: usize, shares: &[f64]) -> Vec<usize> {
    let exact: Vec<f64> = shares.iter().map(|share| share * total as f64).collect();
    let mut counts: Vec<usize> = exact.iter().map(|e| e.floor() as usize).collect();
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
    let left = total - counts.iter().sum::<usize>();
    for &client in order.iter().take(left) {
        counts[client] += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn samples(n: usize, answers: usize) -> Vec<Sample> {
        (0..n).map(|i| Sample { picture: Some(i), question: "q".into(), answer: format!("a{}", i % answers) }).collect()
    }

    fn split(samples: &[Sample], clients: usize, alpha: f64, seed: u64) -> Vec<Vec<usize>> {
        dirichlet(samples, clients, alpha, &mut ChaCha8Rng::seed_from_u64(seed)).unwrap()
    }

    /// The largest share that one client has of an answer, averaged over answers and seeds.
    fn skew(alpha: f64) -> f64 {
        let (all, answers) = (samples(800, 4), 4);
        let mut sum = 0.0;
        for seed in 0..10 {
            let clients = split(&all, 5, alpha, seed);
            for answer in 0..answers {
                let held = clients.iter().map(|rows| rows.iter().filter(|r| **r % answers == answer).count());
                sum += held.max().unwrap() as f64 / 200.0;
            }
        }
        sum / (10 * answers) as f64
    }

    #[test]
    fn every_sample_lands_exactly_once() {
        for (n, answers, clients, alpha) in
            [(203, 7, 5, 0.1), (203, 7, 5, 1e-12), (203, 7, 5, 1e9), (9, 9, 4, 1.0), (3, 1, 8, 0.5), (40, 3, 1, 0.3)]
        {
            let mut rows = split(&samples(n, answers), clients, alpha, 3).concat();
            rows.sort_unstable();
            assert_eq!(rows, (0..n).collect::<Vec<_>>(), "alpha {alpha}");
        }
        assert_eq!(split(&[], 3, 1.0, 0), vec![Vec::<usize>::new(); 3]);
    }

    #[test]
    fn samples_without_picture_or_question_are_dealt_by_their_answers_too() {
        let mut mixed = samples(60, 3);
        for (i, sample) in mixed.iter_mut().enumerate() {
            match i % 3 {
                0 => sample.picture = None,
                1 => sample.question.clear(),
                _ => {}
            }
        }
        assert_eq!(split(&mixed, 4, 0.5, 1), split(&samples(60, 3), 4, 0.5, 1));
    }

    #[test]
    fn the_seed_decides() {
        let all = samples(200, 5);
        assert_eq!(split(&all, 4, 0.5, 1), split(&all, 4, 0.5, 1));
        assert_ne!(split(&all, 4, 0.5, 1), split(&all, 4, 0.5, 2));
    }

    #[test]
    fn small_alpha_skews_more() {
        let (small, middle, large) = (skew(0.05), skew(1.0), skew(100.0));
        assert!(small > 0.7 && large < 0.35 && large < middle && middle < small, "{small} {middle} {large}");
    }

    #[test]
    fn no_client_is_left_empty() {
        for seed in 0..20 {
            assert!(split(&samples(10, 2), 10, 0.01, seed).iter().all(|rows| rows.len() == 1));
            assert!(split(&samples(300, 3), 20, 0.01, seed).iter().all(|rows| !rows.is_empty()));
        }
    }

    #[test]
    fn gamma_draws_have_their_mean() {
        for shape in [0.5, 1.0, 2.5] {
            let mut rng = ChaCha8Rng::seed_from_u64(1);
            let mean = (0..4000).map(|_| ln_gamma_draw(shape, &mut rng).exp()).sum::<f64>() / 4000.0;
            assert!((mean - shape).abs() < 0.15, "{shape}: {mean}");
        }
    }

    #[test]
    fn remainders_go_to_the_largest() {
        assert_eq!(apportion(10, &[0.55, 0.18, 0.27]), [5, 2, 3]);
        assert_eq!(apportion(1, &[0.2, 0.5, 0.3]), [0, 1, 0]);
        assert_eq!(apportion(4, &[0.0, 1.0]), [0, 4]);
    }

    #[test]
    fn meaningless_settings_are_errors() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        for alpha in [0.0, -1.0, f64::INFINITY, f64::NAN] {
            let text = dirichlet(&samples(4, 2), 2, alpha, &mut rng).unwrap_err().to_string();
            assert!(text.contains("above 0"), "{text}");
        }
        assert_eq!(dirichlet(&samples(4, 2), 0, 1.0, &mut rng), Err(SplitError::NoClients));
    }
}
