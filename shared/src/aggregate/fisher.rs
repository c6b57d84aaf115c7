//! FedNano's merge: `theta = sum_k n_k F_k theta_k / sum_k n_k F_k`, element by element, with n_k the sample count and F_k the
//! diagonal empirical Fisher (arXiv 2506.14824; Matena and Raffel 2022, arXiv 2111.09832).
//!
//! F_k is floored at `floor` times its tensor's mean, so that a value nobody learned about is averaged plainly instead of
//! divided by nearly 0, and capped at `cap` times the lower median of the participants' values there (of two, the smaller),
//! so that no single one owns an element. Honest values hardly feel it: of two participants, the default cap of 100 concerns
//! one that has over 99 % of an element's Fisher, and leaves it 99 %.

use super::{AggregateError, Aggregator, ClientUpdate, weighted_mean};
use crate::plain::AdapterState;

/// Mean weighted by sample count and Fisher.
pub struct FisherMerge {
    /// Least value, as a share of the tensor's mean.
    pub floor: f64,
    /// Largest value, as a multiple of the participants' lower median.
    pub cap: f64,
}

impl Default for FisherMerge {
    fn default() -> Self {
        Self { floor: 0.05, cap: 100.0 }
    }
}

/// Below this a whole tensor counts as without gradient.
const TINY: f64 = 1e-30;

impl Aggregator for FisherMerge {
    fn aggregate(&mut self, global: &AdapterState, updates: &[ClientUpdate]) -> Result<AdapterState, AggregateError> {
        let means: Vec<Vec<f64>> = updates
            .iter()
            .map(|u| {
                u.fisher
                    .iter()
                    .flat_map(|f| f.0.values())
                    .map(|b| b.data.iter().map(|v| f64::from(*v)).sum::<f64>() / b.data.len().max(1) as f64)
                    .collect()
            })
            .collect();
        let names: Vec<&String> = global.0.keys().collect();
        let floored = |k: usize, name: &str, i: usize| {
            let tensor = names.iter().position(|n| *n == name).unwrap_or(0);
            let value = updates[k].fisher.as_ref().map_or(0.0, |f| f64::from(f.0[name].data[i]));
            value.max(self.floor * means[k].get(tensor).copied().unwrap_or(0.0)).max(TINY)
        };
        Ok(weighted_mean(global, updates, |k, name, i| {
            let mut all: Vec<f64> = (0..updates.len()).map(|k| floored(k, name, i)).collect();
            all.sort_by(f64::total_cmp);
            // The lower median: of two, the upper one is the larger value itself. A single one is its own median.
            let median = all[(all.len() - 1) / 2];
            f64::from(updates[k].samples) * floored(k, name, i).min(self.cap * median)
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{scalars, update};
    use super::*;

    #[test]
    fn by_hand() {
        // Element 0: (1*1*1 + 1*3*5) / (1*1 + 1*3) = 4; element 1: (2*0 + 1*8) / 3; equal Fisher: plain mean.
        let updates = [
            update(1, 1, [1.0, 0.0, 4.0, 8.0], [1.0, 2.0, 5.0, 0.0]),
            update(2, 1, [5.0, 8.0, 0.0, 4.0], [3.0, 1.0, 5.0, 0.0]),
        ];
        let merged = FisherMerge::default().aggregate(&scalars([0.0; 4]), &updates).unwrap();
        let expected = [4.0, 8.0 / 3.0, 2.0, 6.0];
        for ((name, blob), e) in merged.0.iter().zip(expected) {
            assert!((blob.data[0] - e).abs() < 1e-6, "{name}: {} {e}", blob.data[0]);
        }
    }

    #[test]
    fn sample_counts_weigh_too() {
        let updates = [update(1, 3, [1.0; 4], [1.0; 4]), update(2, 1, [5.0; 4], [3.0; 4])];
        let merged = FisherMerge::default().aggregate(&scalars([0.0; 4]), &updates).unwrap();
        assert_eq!(merged, scalars([3.0; 4])); // (3*1 + 3*5) / 6
    }

    #[test]
    fn the_floor_keeps_an_unlearned_element_in_the_mean() {
        let mut one = update(1, 1, [0.0; 4], [0.0; 4]);
        let mut two = one.clone();
        let wide = |values: [f32; 2]| {
            let mut s = AdapterState::zeros(1, 2);
            s.0.values_mut().for_each(|b| b.data.copy_from_slice(&values));
            s
        };
        (one.adapter, one.fisher) = (wide([1.0, 1.0]), Some(wide([2.0, 0.0])));
        (two.adapter, two.fisher) = (wide([3.0, 3.0]), Some(wide([2.0, 0.0])));
        let merged = FisherMerge::default().aggregate(&wide([0.0, 0.0]), &[one, two]).unwrap();
        assert_eq!(merged, wide([2.0, 2.0]));
    }

    #[test]
    fn a_huge_fisher_cannot_own_an_element() {
        let updates =
            [update(1, 1, [0.0; 4], [1.0; 4]), update(2, 1, [0.0; 4], [1.0; 4]), update(3, 1, [102.0; 4], [1e30; 4])];
        let merged = FisherMerge::default().aggregate(&scalars([0.0; 4]), &updates).unwrap();
        assert!(merged.0.values().all(|b| (b.data[0] - 100.0).abs() < 1e-3)); // weight 100 of 102
        // Of two: 1e30 counts as 100 * 1, so (1*1*0 + 1*100*101) / (1 + 100) = 100.
        let updates = [update(1, 1, [0.0; 4], [1.0; 4]), update(2, 1, [101.0; 4], [1e30; 4])];
        let merged = FisherMerge::default().aggregate(&scalars([0.0; 4]), &updates).unwrap();
        assert_eq!(merged, scalars([100.0; 4]));
        // Of four: the lower median of 1, 1, 1e30, 1e30 is 1, so (2*100*101) / (2*1 + 2*100) = 100.
        let four = [(1, 0.0, 1.0), (2, 0.0, 1.0), (3, 101.0, 1e30), (4, 101.0, 1e30)];
        let updates = four.map(|(client, value, fisher)| update(client, 1, [value; 4], [fisher; 4]));
        let merged = FisherMerge::default().aggregate(&scalars([0.0; 4]), &updates).unwrap();
        assert_eq!(merged, scalars([100.0; 4]));
    }

    #[test]
    fn two_honest_participants_are_not_distorted() {
        // Fisher 63 times apart is below the cap: (1*1*0 + 1*63*64) / (1 + 63) = 63, exactly.
        let updates = [update(1, 1, [0.0; 4], [1.0; 4]), update(2, 1, [64.0; 4], [63.0; 4])];
        let merged = FisherMerge::default().aggregate(&scalars([0.0; 4]), &updates).unwrap();
        assert_eq!(merged, scalars([63.0; 4]));
    }

    #[test]
    fn a_single_update_is_taken_as_it_is() {
        let updates = [update(1, 3, [0.5, -2.0, 4.0, 8.0], [0.0, 2.0, 1e-3, 1e30])];
        let merged = FisherMerge::default().aggregate(&scalars([0.0; 4]), &updates).unwrap();
        assert_eq!(merged, scalars([0.5, -2.0, 4.0, 8.0]));
    }
}
