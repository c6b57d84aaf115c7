//! Trimmed mean: of each value the share `trim` is cut at both ends, the rest averaged. Yin et al. 2018, arXiv 1803.01498,
//! applied to trained adapters.
//!
//! **Without weights**, for the reason that [`super::median`] gives. The number cut is rounded up, so that one hostile of three or
//! more is always cut, and at least one value stays: of two participants nothing can be cut. While no more are hostile than are cut
//! at an end, every merged value lies between honest ones.

use super::mean::element_by_element;
use super::{AggregateError, Aggregator, ClientUpdate, StrategyState};
use crate::plain::AdapterState;
use crate::settings::FederationSettings;

/// Mean of each value without its extremes.
#[derive(Debug, Clone, Copy)]
pub struct TrimmedMean {
    trim: f64,
}

impl TrimmedMean {
    /// As the federation agreed.
    pub fn of(settings: &FederationSettings) -> Self {
        Self { trim: settings.trim }
    }

    /// Values cut at each end of `count`.
    fn cut(&self, count: usize) -> usize {
        // Not one too many where the product is a whole number but for the last bit.
        let wanted = (self.trim * count as f64 - 1e-9).ceil().max(0.0) as usize;
        wanted.min(count.saturating_sub(1) / 2)
    }
}

impl Aggregator for TrimmedMean {
    fn aggregate(
        &self,
        global: &AdapterState,
        updates: &[ClientUpdate],
        _state: &mut StrategyState,
    ) -> Result<AdapterState, AggregateError> {
        let cut = self.cut(updates.len());
        let kept = updates.len() - 2 * cut;
        Ok(element_by_element(global, updates, |sorted| sorted.iter().skip(cut).take(kept).sum::<f64>() / kept as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{merged, scalars, settings, update};
    use super::*;
    use crate::settings::Strategy;

    #[test]
    fn by_hand() {
        let settings = FederationSettings { max_delta_norm: 0.0, ..settings(Strategy::TrimmedMean) };
        let updates = [
            update(1, 1, [1.0, 9.0, -400.0, 0.0], [0.0; 4]),
            update(2, 1000, [500.0, 8.0, 4.0, 0.0], [0.0; 4]),
            update(3, 1, [3.0, -7.0, 0.0, 1.0], [0.0; 4]),
            update(4, 1, [2.0, 7.0, 1.0, 2.0], [0.0; 4]),
            update(5, 1, [4.0, 6.0, 5.0, 300.0], [0.0; 4]),
        ];
        let merged = merged(&settings, &scalars([0.0; 4]), &updates).unwrap().adapter;
        assert_eq!(merged, scalars([3.0, 7.0, 5.0 / 3.0, 1.0]));
    }

    #[test]
    fn the_number_cut_is_rounded_up_and_leaves_one() {
        let cut = |trim, count| TrimmedMean { trim }.cut(count);
        assert_eq!([1, 2, 3, 4, 5, 6, 10, 15].map(|n| cut(0.2, n)), [0, 0, 1, 1, 1, 2, 2, 3]);
        assert_eq!([1, 2, 3, 4, 5].map(|n| cut(0.49, n)), [0, 0, 1, 1, 2]);
        assert_eq!(cut(0.0, 100), 0);
    }
}
