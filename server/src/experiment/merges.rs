//! The same updates merged by several rules, each result judged: what a way of merging is worth, with everything else equal.

use super::figures::{Contribution, MergedRound, short};
use super::stage::{Exam, judge};
use super::tap::Heard;
use crate::llm_host::LlmHandle;
use anyhow::Context;
use fednano_shared::aggregate::{self, ClientUpdate, StrategyState};
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::FederationSettings;
use fednano_shared::step::Evaluation;
use fednano_shared::wire::ParticipantId;
use std::collections::BTreeMap;

/// A way of merging, by its name.
#[derive(Debug, Clone, PartialEq)]
pub struct Rule {
    /// As shown in tables.
    pub name: String,
    /// Its strategy and what belongs to it.
    pub settings: FederationSettings,
}

/// Merge each round's updates by each rule, starting from what the round began with, and judge with the samples that are used
/// after each round. What a rule remembers from round to round, it remembers of these updates. `known` has the judgements of the
/// adapters that the run itself went on with, `last` those after the last round.
///
/// # Errors
/// Updates that a rule cannot merge; a lost device.
pub(super) async fn compare(
    rules: &[Rule],
    heard: &Heard,
    last: &AdapterState,
    known: &BTreeMap<u32, Evaluation>,
    exam: &Exam,
    llm: &LlmHandle,
) -> anyhow::Result<Vec<MergedRound>> {
    let mut memories: Vec<StrategyState> = vec![StrategyState::default(); rules.len()];
    let mut rounds = Vec::new();
    for (round, global) in &heard.rounds {
        let updates: Vec<(ClientUpdate, f64)> = heard
            .updates
            .range((*round, 0)..=(*round, usize::MAX))
            .map(|((_, number), update)| {
                let client = ParticipantId(*number as u32 + 1);
                let (adapter, fisher) = (update.adapter.clone(), update.fisher.clone());
                let update_of = ClientUpdate { client, staleness: 0, adapter, fisher, samples: update.samples };
                (update_of, f64::from(update.loss))
            })
            .collect();
        let next = heard.rounds.get(&(round + 1)).unwrap_or(last);
        // The run's own result has been judged; and some rules agree.
        let mut judged: Vec<(AdapterState, Evaluation)> = Vec::new();
        judged.extend(known.get(round).map(|evaluation| (next.clone(), *evaluation)));
        let mut results = BTreeMap::new();
        for (rule, memory) in rules.iter().zip(&mut memories) {
            let own = updates.iter().map(|(update, _)| update.clone()).collect();
            let merged = aggregate::merge(&rule.settings, global, own, memory)
                .with_context(|| format!("the updates of round {round} cannot be merged by '{}'", rule.name))?
                .adapter;
            let same = judged.iter().find(|(adapter, _)| *adapter == merged).map(|(_, evaluation)| *evaluation);
            let evaluation = match same {
                Some(evaluation) => evaluation,
                None => {
                    let evaluation = judge(&exam.held_out, Some(&merged), &exam.held_out.rows, llm).await?;
                    judged.push((merged, evaluation));
                    evaluation
                }
            };
            results.insert(rule.name.clone(), (short(evaluation.accuracy), short(evaluation.loss)));
        }
        rounds.push(MergedRound { round: *round, rules: results, clients: contributions(&updates) });
    }
    Ok(rounds)
}

/// What each update weighs by the formula as printed, `n_k F_k / sum_j n_j F_j`, and what may be the cause. Nothing where updates
/// carry no Fisher values.
fn contributions(updates: &[(ClientUpdate, f64)]) -> Vec<Contribution> {
    if updates.iter().any(|(update, _)| update.fisher.is_none()) {
        return Vec::new();
    }
    let (down, up) = (side(updates, ".down"), side(updates, ".up"));
    let each = updates.iter().zip(down.into_iter().zip(up));
    each.map(|((update, loss), (down, up))| Contribution {
        samples: update.samples,
        loss: short(*loss),
        down: digits(down.0),
        up: digits(up.0),
        share_down: short(down.1),
        share_up: short(up.1),
    })
    .collect()
}

/// Of each update: the mean Fisher value over the tensors of one side, and the mean over their values of its share. Values of
/// which nobody has any Fisher are nobody's.
fn side(updates: &[(ClientUpdate, f64)], ending: &str) -> Vec<(f64, f64)> {
    let values = |update: &ClientUpdate| -> Vec<f64> {
        let tensors = update.fisher.iter().flat_map(|f| &f.0).filter(|(name, _)| name.ends_with(ending));
        tensors.flat_map(|(_, blob)| &blob.data).map(|v| f64::from(*v)).collect()
    };
    let all: Vec<Vec<f64>> = updates.iter().map(|(update, _)| values(update)).collect();
    let weight = |k: usize, i: usize| {
        let samples = updates.get(k).map_or(0.0, |(update, _)| f64::from(update.samples));
        samples * all.get(k).and_then(|own| own.get(i)).copied().unwrap_or(0.0)
    };
    let count = all.first().map_or(0, Vec::len);
    let mut shares = vec![0.0; updates.len()];
    let mut owned = 0usize;
    for i in 0..count {
        let total: f64 = (0..updates.len()).map(|k| weight(k, i)).sum();
        if total > 0.0 {
            owned += 1;
            for (k, share) in shares.iter_mut().enumerate() {
                *share += weight(k, i) / total;
            }
        }
    }
    let mean = |own: &Vec<f64>| own.iter().sum::<f64>() / own.len().max(1) as f64;
    all.iter().zip(shares).map(|(own, share)| (mean(own), share / owned.max(1) as f64)).collect()
}

/// Six significant digits: Fisher values are small.
fn digits(value: f64) -> f64 {
    format!("{value:.5e}").parse().ok().filter(|v: &f64| v.is_finite()).unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fednano_shared::plain::TensorBlob;

    fn update(client: u32, samples: u32, down: [f32; 2], up: f32) -> (ClientUpdate, f64) {
        let blob = |values: &[f32]| TensorBlob { shape: vec![1, values.len()], data: values.to_vec() };
        let fisher = AdapterState([("text.down".to_owned(), blob(&down)), ("text.up".to_owned(), blob(&[up]))].into());
        let client = ParticipantId(client);
        (ClientUpdate { client, staleness: 0, adapter: fisher.clone(), fisher: Some(fisher), samples }, 0.5)
    }

    #[test]
    fn shares_by_hand() {
        // down: 1*1 : 3*1 and 1*0 : 3*0 (nobody's); up: 1*6 : 3*1.
        let updates = [update(1, 1, [1.0, 0.0], 6.0), update(2, 3, [1.0, 0.0], 1.0)];
        let found = contributions(&updates);
        assert_eq!((found[0].share_down, found[1].share_down), (0.25, 0.75));
        assert_eq!((found[0].share_up, found[1].share_up), (0.666667, 0.333333));
        assert_eq!((found[0].down, found[0].up, found[1].samples), (0.5, 6.0, 3));
        let mut without = updates.to_vec();
        without[0].0.fisher = None;
        assert!(contributions(&without).is_empty());
    }

    #[test]
    fn small_values_keep_their_digits() {
        assert_eq!([digits(1.23456789e-9), digits(0.0), digits(f64::INFINITY)], [1.23457e-9, 0.0, 0.0]);
    }
}
