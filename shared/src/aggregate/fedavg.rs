//! FedAvg: `theta = sum_k n_k theta_k / sum_k n_k` with n_k the sample count. McMahan et al. 2017, arXiv 1602.05629.

use super::{AggregateError, Aggregator, ClientUpdate, weighted_mean};
use crate::plain::AdapterState;

/// Mean weighted by sample count.
pub struct FedAvg;

impl Aggregator for FedAvg {
    fn aggregate(&mut self, global: &AdapterState, updates: &[ClientUpdate]) -> Result<AdapterState, AggregateError> {
        Ok(weighted_mean(global, updates, |k, _, _| f64::from(updates[k].samples)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{scalars, update};
    use super::*;

    #[test]
    fn by_hand() {
        let updates = [update(1, 1, [1.0, 0.0, 4.0, 8.0], [1.0; 4]), update(2, 3, [5.0, 4.0, 0.0, 8.0], [9.0; 4])];
        let merged = FedAvg.aggregate(&scalars([0.0; 4]), &updates).unwrap();
        assert_eq!(merged, scalars([4.0, 3.0, 1.0, 8.0]));
    }
}
