//! FedAvg: `theta = sum_k n_k theta_k / sum_k n_k` with n_k the sample count. McMahan et al. 2017, arXiv 1602.05629.
//!
//! FedProx, FedDPA-F and centralised training merge likewise; what makes them different happens on the client.

use super::mean::Weighing;
use super::{AggregateError, Aggregator, ClientUpdate, StrategyState};
use crate::plain::AdapterState;
use crate::settings::FederationSettings;

/// Mean weighted by sample count.
#[derive(Debug, Clone, Copy)]
pub struct FedAvg {
    weighing: Weighing,
}

impl FedAvg {
    /// As the federation agreed.
    pub fn of(settings: &FederationSettings) -> Self {
        Self { weighing: Weighing::of(settings) }
    }
}

impl Aggregator for FedAvg {
    fn aggregate(
        &self,
        global: &AdapterState,
        updates: &[ClientUpdate],
        _state: &mut StrategyState,
    ) -> Result<AdapterState, AggregateError> {
        Ok(self.weighing.mean_of_updates(global, updates))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{merged, scalars, settings, update};
    use super::*;
    use crate::settings::Strategy;

    #[test]
    fn by_hand() {
        let updates = [update(1, 1, [1.0, 0.0, 4.0, 8.0], [1.0; 4]), update(2, 3, [5.0, 4.0, 0.0, 8.0], [9.0; 4])];
        let settings = FederationSettings { max_delta_norm: 0.0, ..settings(Strategy::FedAvg) };
        let merged = merged(&settings, &scalars([0.0; 4]), &updates).unwrap();
        assert_eq!(merged.adapter, scalars([4.0, 3.0, 1.0, 8.0]));
        assert!(merged.shortened.is_empty());
    }

    #[test]
    fn a_late_update_weighs_less() {
        let mut updates = [update(1, 2, [0.0; 4], [1.0; 4]), update(2, 2, [4.0; 4], [1.0; 4])];
        updates[1].staleness = 3; // 2 / (1 + 3)^0.5 = 1
        let settings = FederationSettings { max_delta_norm: 0.0, ..settings(Strategy::FedAvg) };
        let merged = merged(&settings, &scalars([0.0; 4]), &updates).unwrap();
        assert_eq!(merged.adapter, scalars([4.0 / 3.0; 4]));
    }
}
