//! The one weighted mean, and how much a participant may weigh in it.

use super::ClientUpdate;
use crate::plain::{AdapterState, TensorBlob};
use crate::settings::FederationSettings;

/// What an update weighs beside the others.
///
/// A participant says itself how many samples it has, so a lie must not buy the model. Two limits, both far from what honest
/// participants feel:
/// - `max_weight`: samples count at most so many times the round's lower median. In a round of many this is the narrow one:
///   4 billion announced samples among 99 equal participants give 10 of 109 parts.
/// - `max_share`: of three or more who weigh anything, none has more than this share of any merged value, whatever the cause (samples, Fisher).
///   At 0.5 nobody outweighs all the others together, so a single one never decides alone. Of two there is no majority to
///   side with, so it does not apply.
///
/// FedAvg's and the paper's plain formulas are `max_weight` 0 and `max_share` 1.
#[derive(Debug, Clone, Copy)]
pub struct Weighing {
    staleness_power: f64,
    max_weight: f64,
    max_share: f64,
}

impl Weighing {
    /// As the federation agreed.
    pub fn of(settings: &FederationSettings) -> Self {
        Self {
            staleness_power: settings.staleness_power,
            max_weight: settings.max_weight,
            max_share: settings.max_share,
        }
    }

    /// Each update's sample count, limited by `max_weight` and discounted by lateness: `n / (1 + s)^power` of an update that
    /// is s rounds late (Xie et al. 2019, arXiv 1903.03934).
    pub fn weights(&self, updates: &[ClientUpdate]) -> Vec<f64> {
        let mut samples: Vec<f64> = updates.iter().map(|u| f64::from(u.samples)).collect();
        let most = limit(self.max_weight, lower_median(&mut samples));
        let late = |u: &ClientUpdate| (1.0 + f64::from(u.staleness)).powf(self.staleness_power);
        updates.iter().map(|u| f64::from(u.samples).min(most) / late(u)).collect()
    }

    /// `sum_k w_k theta_k / sum_k w_k` of one tensor, element by element in f64, into `merged`. `weigh` fills in the weights of
    /// an element's values, in the order of `values`. Where all weights are 0 the old value stays.
    pub fn mean(&self, merged: &mut TensorBlob, values: &[&[f32]], mut weigh: impl FnMut(usize, &mut [f64])) {
        let mut weights = vec![0f64; values.len()];
        for (i, value) in merged.data.iter_mut().enumerate() {
            weigh(i, &mut weights);
            self.limit_share(&mut weights);
            let total: f64 = weights.iter().sum();
            if total > 0.0 {
                let sum: f64 = weights.iter().zip(values).map(|(w, of)| w * f64::from(of[i])).sum();
                *value = (sum / total) as f32;
            }
        }
    }

    /// The mean of whole updates, one weight each.
    pub fn mean_of_updates(&self, global: &AdapterState, updates: &[ClientUpdate]) -> AdapterState {
        let own = self.weights(updates);
        let mut merged = global.clone();
        for (name, blob) in &mut merged.0 {
            self.mean(blob, &values(updates, name), |_, weights| weights.copy_from_slice(&own));
        }
        merged
    }

    /// Only one can have more than half, so one pass is enough.
    fn limit_share(&self, weights: &mut [f64]) {
        if self.max_share >= 1.0 || weights.iter().filter(|w| **w > 0.0).count() < 3 {
            return;
        }
        let Some(largest) = (0..weights.len()).max_by(|a, b| weights[*a].total_cmp(&weights[*b])) else { return };
        // Not the sum less the largest: 1e30 would swallow the others.
        let others: f64 = weights.iter().enumerate().filter(|(k, _)| *k != largest).map(|(_, w)| w).sum();
        weights[largest] = weights[largest].min(others * self.max_share / (1.0 - self.max_share));
    }
}

/// One tensor of all updates, in their order.
pub(super) fn values<'a>(updates: &'a [ClientUpdate], name: &str) -> Vec<&'a [f32]> {
    updates.iter().map(|u| &*u.adapter.0[name].data).collect()
}

/// Merge each element's values to one number, without weights.
pub(super) fn element_by_element(
    global: &AdapterState,
    updates: &[ClientUpdate],
    merge: impl Fn(&[f64]) -> f64,
) -> AdapterState {
    let mut merged = global.clone();
    let mut sorted = vec![0f64; updates.len()];
    for (name, blob) in &mut merged.0 {
        let values = values(updates, name);
        for (i, value) in blob.data.iter_mut().enumerate() {
            sorted.iter_mut().zip(&values).for_each(|(s, of)| *s = f64::from(of[i]));
            sorted.sort_unstable_by(f64::total_cmp);
            *value = merge(&sorted) as f32;
        }
    }
    merged
}

/// The middle value, of an even number the smaller of the two: with fewer than half hostile ones never above all honest ones.
/// 0 of nothing. Reorders.
pub(super) fn lower_median(values: &mut [f64]) -> f64 {
    if values.is_empty() {
        return 0.0;
    }
    let middle = (values.len() - 1) / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
}

/// So many times a median; 0 is off.
pub(super) fn limit(times: f64, median: f64) -> f64 {
    if times == 0.0 { f64::INFINITY } else { times * median }
}

#[cfg(test)]
mod tests {
    use super::super::tests::update;
    use super::*;
    use crate::settings::Strategy;

    fn weights(settings: &FederationSettings, samples: &[(u32, u32)]) -> Vec<f64> {
        let of = |(k, (samples, staleness)): (u32, &(u32, u32))| ClientUpdate {
            staleness: *staleness,
            ..update(k, *samples, [0.0; 4], [0.0; 4])
        };
        Weighing::of(settings).weights(&(1..).zip(samples).map(of).collect::<Vec<_>>())
    }

    fn limited(max_share: f64, mut weights: Vec<f64>) -> Vec<f64> {
        let settings = FederationSettings { max_share, strategy: Strategy::FedAvg, ..Default::default() };
        Weighing::of(&settings).limit_share(&mut weights);
        weights
    }

    #[test]
    fn samples_count_and_lateness_discounts() {
        let settings = FederationSettings { staleness_power: 0.5, max_weight: 0.0, ..Default::default() };
        assert_eq!(weights(&settings, &[(100, 0), (100, 3), (30, 0)]), [100.0, 50.0, 30.0]);
        let settings = FederationSettings { staleness_power: 0.0, ..settings };
        assert_eq!(weights(&settings, &[(100, 0), (100, 3)]), [100.0, 100.0]);
    }

    #[test]
    fn announced_samples_buy_ten_medians_at_most() {
        let settings = FederationSettings::default();
        assert_eq!(weights(&settings, &[(100, 0), (90, 0), (u32::MAX, 0)]), [100.0, 90.0, 1000.0]);
        // Of two the smaller one is the measure.
        assert_eq!(weights(&settings, &[(100, 0), (u32::MAX, 0)]), [100.0, 1000.0]);
        let off = FederationSettings { max_weight: 0.0, ..settings };
        assert_eq!(weights(&off, &[(100, 0), (u32::MAX, 0)]), [100.0, f64::from(u32::MAX)]);
    }

    #[test]
    fn of_three_nobody_outweighs_the_others() {
        assert_eq!(limited(0.5, vec![1.0, 1e30, 2.0]), [1.0, 3.0, 2.0]);
        assert_eq!(limited(0.75, vec![1.0, 1e30, 2.0]), [1.0, 9.0, 2.0]);
        assert_eq!(limited(0.5, vec![4.0, 3.0, 2.0]), [4.0, 3.0, 2.0]);
        assert_eq!(limited(1.0, vec![1.0, 1e30, 2.0]), [1.0, 1e30, 2.0]);
        assert_eq!(limited(0.5, vec![1.0, 1e30]), [1.0, 1e30]);
        assert_eq!(limited(0.5, vec![1.0, 8.0, 0.0]), [1.0, 8.0, 0.0]); // one abstains
    }

    #[test]
    fn the_lower_median_by_hand() {
        let median = |values: &[f64]| lower_median(&mut values.to_vec());
        assert_eq!([median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0, 3.0, 2.0]), median(&[7.0])], [2.0, 2.0, 7.0]);
        assert_eq!(median(&[]), 0.0);
    }
}
