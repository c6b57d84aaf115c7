//! Merging updates. One validation for all strategies, one file for each strategy; no clock, no I/O, no sampling.

pub mod fedavg;
pub mod fisher;

use crate::plain::{AdapterState, PlainError};
use crate::settings::Strategy;
use crate::wire::ParticipantId;

/// A participant's update, ready to merge.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientUpdate {
    /// From whom.
    pub client: ParticipantId,
    /// Trained adapters.
    pub adapter: AdapterState,
    /// Diagonal Fisher, where the strategy wants it.
    pub fisher: Option<AdapterState>,
    /// Samples trained on; the update's weight.
    pub samples: u32,
}

/// Why updates cannot be merged.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AggregateError {
    /// Nothing to merge.
    #[error("there is no update to merge")]
    Empty,
    /// An update that must not be counted.
    #[error("the update of participant {} cannot be merged: {cause}", client.0)]
    Update {
        /// From whom.
        client: ParticipantId,
        /// What is wrong.
        cause: UpdateFault,
    },
}

/// What is wrong with one update.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum UpdateFault {
    /// Names, shapes or values.
    #[error(transparent)]
    Plain(#[from] PlainError),
    /// No weight.
    #[error("it was trained on 0 samples")]
    NoSamples,
    /// Fisher is missing.
    #[error("it carries no Fisher values, which strategy 'fisher' needs; update the client")]
    NoFisher,
    /// Squares cannot be negative.
    #[error("its Fisher values for '{0}' are negative; they are means of squares")]
    NegativeFisher(String),
}

/// A way of merging.
pub trait Aggregator {
    /// The next global adapters. Updates are validated and sorted by participant.
    ///
    /// # Errors
    /// [`AggregateError`].
    fn aggregate(&mut self, global: &AdapterState, updates: &[ClientUpdate]) -> Result<AdapterState, AggregateError>;
}

/// Validate one update against the global adapters: the one check, made when an update arrives and again before merging.
///
/// # Errors
/// [`UpdateFault`].
pub fn validate(strategy: Strategy, global: &AdapterState, update: &ClientUpdate) -> Result<(), UpdateFault> {
    if update.samples == 0 {
        return Err(UpdateFault::NoSamples);
    }
    update.adapter.check_like(global)?;
    match (&update.fisher, strategy) {
        (None, Strategy::Fisher) => return Err(UpdateFault::NoFisher),
        (Some(fisher), _) => {
            fisher.check_like(global)?;
            if let Some((name, _)) = fisher.0.iter().find(|(_, b)| b.data.iter().any(|v| *v < 0.0)) {
                return Err(UpdateFault::NegativeFisher(name.clone()));
            }
        }
        (None, Strategy::FedAvg) => {}
    }
    Ok(())
}

/// Validate, sort by participant, merge.
///
/// # Errors
/// [`AggregateError`].
pub fn merge(
    strategy: Strategy,
    global: &AdapterState,
    mut updates: Vec<ClientUpdate>,
) -> Result<AdapterState, AggregateError> {
    if updates.is_empty() {
        return Err(AggregateError::Empty);
    }
    for update in &updates {
        validate(strategy, global, update).map_err(|cause| AggregateError::Update { client: update.client, cause })?;
    }
    updates.sort_by_key(|u| u.client);
    match strategy {
        Strategy::FedAvg => fedavg::FedAvg.aggregate(global, &updates),
        Strategy::Fisher => fisher::FisherMerge::default().aggregate(global, &updates),
    }
}

/// `sum_k w_k theta_k / sum_k w_k`, element by element in f64; `weights(k, name, i)` of one update, tensor and element.
/// The one weighted mean that every strategy uses. Where all weights are 0 the global value stays.
pub(crate) fn weighted_mean(
    global: &AdapterState,
    updates: &[ClientUpdate],
    weights: impl Fn(usize, &str, usize) -> f64,
) -> AdapterState {
    let mut merged = global.clone();
    for (name, blob) in &mut merged.0 {
        for (i, value) in blob.data.iter_mut().enumerate() {
            let (mut sum, mut total) = (0f64, 0f64);
            for (k, update) in updates.iter().enumerate() {
                let weight = weights(k, name, i);
                sum += weight * f64::from(update.adapter.0[name].data[i]);
                total += weight;
            }
            if total > 0.0 {
                *value = (sum / total) as f32;
            }
        }
    }
    merged
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Rank 1 on width 1: four tensors of one value.
    pub(crate) fn scalars(values: [f32; 4]) -> AdapterState {
        let mut state = AdapterState::zeros(1, 1);
        state.0.values_mut().zip(values).for_each(|(b, v)| b.data[0] = v);
        state
    }

    pub(crate) fn update(client: u32, samples: u32, adapter: [f32; 4], fisher: [f32; 4]) -> ClientUpdate {
        ClientUpdate {
            client: ParticipantId(client),
            adapter: scalars(adapter),
            fisher: Some(scalars(fisher)),
            samples,
        }
    }

    #[test]
    fn faulty_updates_are_named_with_their_sender() {
        let global = scalars([0.0; 4]);
        let fault = |strategy, u: ClientUpdate| merge(strategy, &global, vec![u]).unwrap_err().to_string();
        let good = update(3, 1, [1.0; 4], [1.0; 4]);
        assert!(fault(Strategy::Fisher, ClientUpdate { samples: 0, ..good.clone() }).contains("participant 3"));
        assert!(fault(Strategy::Fisher, ClientUpdate { fisher: None, ..good.clone() }).contains("no Fisher"));
        assert!(fault(Strategy::Fisher, update(3, 1, [1.0; 4], [1.0, -1.0, 1.0, 1.0])).contains("negative"));
        assert!(fault(Strategy::FedAvg, update(3, 1, [f32::NAN; 4], [1.0; 4])).contains("NaN"));
        assert!(
            fault(Strategy::FedAvg, ClientUpdate { adapter: AdapterState::zeros(2, 1), ..good }).contains("[2, 1]")
        );
        assert_eq!(merge(Strategy::FedAvg, &global, vec![]), Err(AggregateError::Empty));
    }

    #[test]
    fn the_order_of_arrival_does_not_matter() {
        let global = scalars([0.0; 4]);
        let (a, b) = (update(1, 3, [0.1, 0.2, 0.3, 0.4], [1.0; 4]), update(2, 5, [0.7, 0.6, 0.5, 0.1], [0.3; 4]));
        for strategy in [Strategy::FedAvg, Strategy::Fisher] {
            let forward = merge(strategy, &global, vec![a.clone(), b.clone()]).unwrap();
            assert_eq!(forward, merge(strategy, &global, vec![b.clone(), a.clone()]).unwrap());
        }
    }
}
