//! Coordinate median: of each value the middle one, of an even number the mean of the two in the middle. Yin et al. 2018,
//! arXiv 1803.01498, applied to trained adapters.
//!
//! **Without weights**: neither samples nor lateness count, since a weight that a participant announces would be another way
//! to own the model. As long as fewer than half are hostile, every merged value lies between honest ones.

use super::mean::element_by_element;
use super::{AggregateError, Aggregator, ClientUpdate, StrategyState};
use crate::plain::AdapterState;

/// Median of each value.
#[derive(Debug, Clone, Copy)]
pub struct Median;

impl Aggregator for Median {
    fn aggregate(
        &self,
        global: &AdapterState,
        updates: &[ClientUpdate],
        _state: &mut StrategyState,
    ) -> Result<AdapterState, AggregateError> {
        Ok(element_by_element(global, updates, |sorted| {
            let middle = sorted.len() / 2;
            match sorted.len() % 2 {
                1 => sorted[middle],
                _ => 0.5 * (sorted[middle - 1] + sorted[middle]),
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{merged, scalars, settings, update};
    use crate::settings::{FederationSettings, Strategy};

    #[test]
    fn by_hand_odd_even_and_single() {
        let settings = FederationSettings { max_delta_norm: 0.0, ..settings(Strategy::Median) };
        let updates = [
            update(1, 1, [1.0, 9.0, -4.0, 0.0], [0.0; 4]),
            update(2, 1000, [500.0, 8.0, 4.0, 0.0], [0.0; 4]),
            update(3, 1, [3.0, 7.0, 0.0, 1.0], [0.0; 4]),
            update(4, 1, [2.0, 7.0, 1.0, 1.0], [0.0; 4]),
        ];
        let of = |count: usize| merged(&settings, &scalars([0.0; 4]), &updates[..count]).unwrap().adapter;
        assert_eq!(of(1), scalars([1.0, 9.0, -4.0, 0.0]));
        assert_eq!(of(3), scalars([3.0, 8.0, 0.0, 0.0]));
        assert_eq!(of(4), scalars([2.5, 7.5, 0.5, 0.5]));
    }
}
