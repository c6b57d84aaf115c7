//! Merging updates: one guard for all strategies, one weighted mean, one file for each way of merging. No clock, no I/O,
//! no sampling, no order of arrival.
//!
//! | strategy | merged by |
//! | --- | --- |
//! | local | [`local`]: not at all |
//! | fedavg, centralised, fedprox, feddpa-f | [`fedavg`]; they differ in what clients do |
//! | fedadam | [`fedadam`] |
//! | median | [`median`] |
//! | trimmed-mean | [`trimmed_mean`] |
//! | fisher, fisher-ef, fisher-adam | [`fisher`]; they differ in what clients send |

#[cfg(test)]
mod attackers;
pub mod fedadam;
pub mod fedavg;
pub mod fisher;
pub mod guard;
pub mod local;
pub mod mean;
pub mod median;
pub mod trimmed_mean;

pub use guard::validate;

use crate::plain::{AdapterState, PlainError};
use crate::settings::{FederationSettings, Strategy};
use crate::wire::ParticipantId;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A participant's update, ready to merge.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientUpdate {
    /// From whom.
    pub client: ParticipantId,
    /// Rounds late; 0: in time.
    pub staleness: u32,
    /// Trained adapters; without tensors where the strategy uploads none.
    pub adapter: AdapterState,
    /// Diagonal Fisher, where the strategy wants it.
    pub fisher: Option<AdapterState>,
    /// Samples trained on; the update's weight.
    pub samples: u32,
}

/// What a strategy remembers from round to round: FedAdam's moments "m" and "v", nothing for the others.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct StrategyState(pub BTreeMap<String, AdapterState>);

/// The outcome of a merge.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    /// The next global adapters.
    pub adapter: AdapterState,
    /// Whose updates were so long that they were shortened (`max_delta_norm`).
    pub shortened: Vec<ParticipantId>,
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
    /// What the strategy remembered belongs to other adapters.
    #[error("what the strategy remembers as '{name}' does not fit the adapters: {cause}; begin a new federation")]
    State {
        /// Which part.
        name: String,
        /// What is wrong.
        cause: PlainError,
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
    /// Values that no training yields.
    #[error(
        "its values for '{name}' are {size:.1e} on the root mean square, at most {most:.0} are accepted; lower the learning rate if training diverged"
    )]
    Absurd {
        /// Which tensor.
        name: String,
        /// Root mean square found.
        size: f64,
        /// Root mean square allowed.
        most: f64,
    },
    /// Fisher is missing.
    #[error("it carries no Fisher values, which strategy '{0}' needs; update the client")]
    NoFisher(Strategy),
    /// Squares cannot be negative.
    #[error("its Fisher values for '{0}' are negative; they are means of squares")]
    NegativeFisher(String),
    /// Private adapters.
    #[error("it carries adapters, which strategy '{0}' keeps with the participant; update the client")]
    Uninvited(Strategy),
}

/// A way of merging.
pub trait Aggregator {
    /// The next global adapters. Updates are validated, at least one, sorted by participant and lateness; the state is
    /// changed only where the merge succeeds.
    ///
    /// # Errors
    /// [`AggregateError`].
    fn aggregate(
        &self,
        global: &AdapterState,
        updates: &[ClientUpdate],
        state: &mut StrategyState,
    ) -> Result<AdapterState, AggregateError>;
}

/// Validate, sort, one of each participant, shorten, merge. The state belongs to the merge: who drops the merge must drop the new state too.
///
/// # Errors
/// [`AggregateError`].
pub fn merge(
    settings: &FederationSettings,
    global: &AdapterState,
    mut updates: Vec<ClientUpdate>,
    state: &mut StrategyState,
) -> Result<Merged, AggregateError> {
    if updates.is_empty() {
        return Err(AggregateError::Empty);
    }
    for update in &updates {
        validate(settings, global, update).map_err(|cause| AggregateError::Update { client: update.client, cause })?;
    }
    updates.sort_by_key(|u| (u.client, u.staleness));
    let mut updates = one_each(settings, updates);
    let shortened = guard::shorten(settings, global, &mut updates);
    let adapter = aggregator(settings).aggregate(global, &updates, state)?;
    Ok(Merged { adapter, shortened })
}

/// One update a participant: who has several (late ones besides) has one say all the same, their mean, each weighted by its lateness,
/// `1 / (1 + s)^power`. It counts as late as the least late of them. Sorted by participant and lateness, before and after.
fn one_each(settings: &FederationSettings, updates: Vec<ClientUpdate>) -> Vec<ClientUpdate> {
    let mut each: Vec<ClientUpdate> = Vec::with_capacity(updates.len());
    let mut total = 0.0; // weight of the last one's updates so far
    for update in updates {
        let weight = (1.0 + f64::from(update.staleness)).powf(-settings.staleness_power);
        match each.last_mut() {
            Some(own) if own.client == update.client => {
                total += weight;
                let share = weight / total;
                blend(&mut own.adapter, &update.adapter, share);
                if let (Some(own), Some(other)) = (&mut own.fisher, &update.fisher) {
                    blend(own, other, share);
                }
                own.samples = own.samples.max(update.samples);
            }
            _ => {
                total = weight;
                each.push(update);
            }
        }
    }
    each
}

/// Go from the one to the other by this share of the way.
fn blend(own: &mut AdapterState, other: &AdapterState, share: f64) {
    for (blob, other) in own.0.values_mut().zip(other.0.values()) {
        for (value, other) in blob.data.iter_mut().zip(&other.data) {
            let from = f64::from(*value);
            *value = (from + share * (f64::from(*other) - from)) as f32;
        }
    }
}

fn aggregator(settings: &FederationSettings) -> Box<dyn Aggregator> {
    match settings.strategy {
        Strategy::Local => Box::new(local::Local),
        Strategy::Centralised | Strategy::FedAvg | Strategy::FedProx | Strategy::FedDpaF => {
            Box::new(fedavg::FedAvg::of(settings))
        }
        Strategy::FedAdam => Box::new(fedadam::FedAdam::of(settings)),
        Strategy::Median => Box::new(median::Median),
        Strategy::TrimmedMean => Box::new(trimmed_mean::TrimmedMean::of(settings)),
        Strategy::Fisher | Strategy::FisherEf | Strategy::FisherAdam => Box::new(fisher::FisherMerge::of(settings)),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::plain::TensorBlob;

    /// Adapters of a rank on a width, each value by its running number.
    pub(crate) fn adapters(rank: usize, dim: usize, mut value: impl FnMut(usize) -> f32) -> AdapterState {
        let blob = |(tensor, name): (usize, &str)| {
            let shape = if name.ends_with("down") { vec![rank, dim] } else { vec![dim, rank] };
            let data = (0..rank * dim).map(|i| value(tensor * rank * dim + i)).collect();
            (name.to_owned(), TensorBlob { shape, data })
        };
        AdapterState(AdapterState::NAMES.into_iter().enumerate().map(blob).collect())
    }

    /// Rank 1 on width 1: four tensors of one value.
    pub(crate) fn scalars(values: [f32; 4]) -> AdapterState {
        adapters(1, 1, |i| values[i])
    }

    pub(crate) fn update(client: u32, samples: u32, adapter: [f32; 4], fisher: [f32; 4]) -> ClientUpdate {
        ClientUpdate {
            client: ParticipantId(client),
            staleness: 0,
            adapter: scalars(adapter),
            fisher: Some(scalars(fisher)),
            samples,
        }
    }

    pub(crate) fn settings(strategy: Strategy) -> FederationSettings {
        FederationSettings { strategy, fisher_normalise: false, ..Default::default() }
    }

    /// Merge with no memory.
    pub(crate) fn merged(
        settings: &FederationSettings,
        global: &AdapterState,
        updates: &[ClientUpdate],
    ) -> Result<Merged, AggregateError> {
        merge(settings, global, updates.to_vec(), &mut StrategyState::default())
    }

    fn updates_of(strategy: Strategy) -> [ClientUpdate; 3] {
        let all = [
            update(1, 3, [0.1, 0.2, 0.3, 0.4], [1.0; 4]),
            update(2, 5, [0.7, 0.6, 0.5, 0.1], [0.3; 4]),
            update(2, 5, [0.6, 0.6, 0.1, 0.1], [0.7, 0.1, 0.2, 0.3]),
        ];
        let mut staleness = 0..;
        all.map(|u| {
            let adapter = if strategy.uploads() { u.adapter } else { AdapterState(BTreeMap::new()) };
            let fisher = u.fisher.filter(|_| strategy.fisher());
            ClientUpdate { adapter, fisher, staleness: staleness.next().unwrap(), ..u }
        })
    }

    #[test]
    fn faulty_updates_are_named_with_their_sender() {
        let global = scalars([0.0; 4]);
        let fault = |strategy, u: ClientUpdate| merged(&settings(strategy), &global, &[u]).unwrap_err().to_string();
        let good = update(3, 1, [1.0; 4], [1.0; 4]);
        let with = |change: fn(&mut ClientUpdate)| {
            let mut u = good.clone();
            change(&mut u);
            u
        };
        assert!(fault(Strategy::Fisher, with(|u| u.samples = 0)).contains("participant 3"));
        assert!(fault(Strategy::FisherEf, with(|u| u.fisher = None)).contains("'fisher-ef'"));
        assert!(fault(Strategy::Fisher, update(3, 1, [1.0; 4], [1.0, -1.0, 1.0, 1.0])).contains("negative"));
        assert!(fault(Strategy::Fisher, update(3, 1, [1.0; 4], [1.0, f32::NAN, 1.0, 1.0])).contains("NaN"));
        assert!(fault(Strategy::FedAvg, update(3, 1, [f32::NAN; 4], [1.0; 4])).contains("NaN"));
        assert!(fault(Strategy::Median, update(3, 1, [f32::INFINITY; 4], [1.0; 4])).contains("inf"));
        assert!(fault(Strategy::FedAvg, update(3, 1, [1e8; 4], [1.0; 4])).contains("root mean square"));
        assert!(fault(Strategy::FedAvg, with(|u| u.adapter = adapters(2, 1, |_| 0.0))).contains("[2, 1]"));
        assert!(fault(Strategy::Local, good.clone()).contains("'local'"));
        assert_eq!(merged(&settings(Strategy::FedAvg), &global, &[]), Err(AggregateError::Empty));
    }

    #[test]
    fn several_late_updates_are_one_say() {
        let (global, settings) =
            (scalars([0.0; 4]), FederationSettings { max_delta_norm: 0.0, ..settings(Strategy::Median) });
        let near = |client| update(client, 1, [0.0; 4], [1.0; 4]);
        let far = |staleness| ClientUpdate { staleness, ..update(3, 1, [100.0; 4], [1.0; 4]) };
        let updates = [far(2), near(1), far(0), near(2), far(1)];
        assert_eq!(merged(&settings, &global, &updates).unwrap().adapter, global);
        // Weights 1 and 1/2 of values 3 and 0, and of Fisher values 0 and 3; as many samples as the largest of them.
        let settings = FederationSettings { staleness_power: 1.0, ..settings };
        let one = update(3, 5, [3.0; 4], [0.0; 4]);
        let other = ClientUpdate { staleness: 1, ..update(3, 9, [0.0; 4], [3.0; 4]) };
        assert_eq!(one_each(&settings, vec![one, other]), [update(3, 9, [2.0; 4], [1.0; 4])]);
    }

    #[test]
    fn the_order_of_arrival_does_not_matter() {
        let global = scalars([0.0; 4]);
        for strategy in Strategy::ALL {
            let mut updates = updates_of(strategy);
            let forward = merged(&settings(strategy), &global, &updates).unwrap();
            updates.reverse();
            assert_eq!(forward, merged(&settings(strategy), &global, &updates).unwrap(), "{strategy}");
            assert!(forward.adapter.check_like(&global).is_ok());
        }
    }

    #[test]
    fn strategies_that_differ_only_on_the_client_merge_alike() {
        let global = scalars([0.0; 4]);
        let result = |strategy: Strategy, like: Strategy| {
            merged(&settings(strategy), &global, &updates_of(like)).unwrap().adapter
        };
        let mean = result(Strategy::FedAvg, Strategy::FedAvg);
        for strategy in [Strategy::Centralised, Strategy::FedProx, Strategy::FedDpaF] {
            assert_eq!(result(strategy, Strategy::FedAvg), mean);
        }
        let fisher = result(Strategy::Fisher, Strategy::Fisher);
        for strategy in [Strategy::FisherEf, Strategy::FisherAdam] {
            assert_eq!(result(strategy, Strategy::Fisher), fisher);
        }
        assert_ne!(mean, fisher);
        assert_eq!(result(Strategy::Local, Strategy::Local), global);
    }
}
