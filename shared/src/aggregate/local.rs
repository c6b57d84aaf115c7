//! Local only: everybody keeps what it trained, the federation's adapters stay as they began. The line that every
//! federation should be above.

use super::{AggregateError, Aggregator, ClientUpdate, StrategyState};
use crate::plain::AdapterState;

/// No merge.
#[derive(Debug, Clone, Copy)]
pub struct Local;

impl Aggregator for Local {
    fn aggregate(
        &self,
        global: &AdapterState,
        _updates: &[ClientUpdate],
        _state: &mut StrategyState,
    ) -> Result<AdapterState, AggregateError> {
        Ok(global.clone())
    }
}
