//! What stands before every strategy: the one validation of updates, and a limit to how far a single one may reach.

use super::mean::lower_median;
use super::{ClientUpdate, UpdateFault};
use crate::plain::AdapterState;
use crate::settings::FederationSettings;
use crate::wire::ParticipantId;

/// Largest root mean square of a tensor. Trained adapters stay below 10; this only bounds what can be computed with.
const MAX_RMS: f64 = 1e4;

/// Validate one update against the global adapters: the one check, made when an update arrives and again before merging.
///
/// # Errors
/// [`UpdateFault`].
pub fn validate(
    settings: &FederationSettings,
    global: &AdapterState,
    update: &ClientUpdate,
) -> Result<(), UpdateFault> {
    let strategy = settings.strategy;
    if update.samples == 0 {
        return Err(UpdateFault::NoSamples);
    }
    if !strategy.uploads() {
        let nothing = update.adapter.0.is_empty() && update.fisher.is_none();
        return if nothing { Ok(()) } else { Err(UpdateFault::Uninvited(strategy)) };
    }
    update.adapter.check_like(global)?;
    for (name, blob) in &update.adapter.0 {
        let size = (squares(&blob.data) / blob.data.len().max(1) as f64).sqrt();
        if size > MAX_RMS {
            return Err(UpdateFault::Absurd { name: name.clone(), size, most: MAX_RMS });
        }
    }
    match &update.fisher {
        None if strategy.fisher() => Err(UpdateFault::NoFisher(strategy)),
        None => Ok(()),
        Some(fisher) => {
            fisher.check_like(global)?;
            match fisher.0.iter().find(|(_, b)| b.data.iter().any(|v| *v < 0.0)) {
                Some((name, _)) => Err(UpdateFault::NegativeFisher(name.clone())),
                None => Ok(()),
            }
        }
    }
}

fn squares(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v).powi(2)).sum()
}

/// Shorten every update whose way from the global adapters is longer than `max_delta_norm` times the lower median of the
/// round's ways to just that, keeping its direction; says whose. Ways of length 0 do not count into the median, so that
/// participants who send back what they got cannot freeze the others.
///
/// With this, one hostile participant of `n` reaches at most `max_delta_norm` honest lengths, times its share in the merge:
/// [`super::mean::Weighing`] says how large that may be.
pub fn shorten(
    settings: &FederationSettings,
    global: &AdapterState,
    updates: &mut [ClientUpdate],
) -> Vec<ParticipantId> {
    if settings.max_delta_norm == 0.0 || !settings.strategy.uploads() {
        return Vec::new();
    }
    let lengths: Vec<f64> = updates.iter().map(|u| length(global, &u.adapter)).collect();
    let mut moved: Vec<f64> = lengths.iter().copied().filter(|l| *l > 0.0).collect();
    let most = settings.max_delta_norm * lower_median(&mut moved);
    let mut shortened = Vec::new();
    for (update, length) in updates.iter_mut().zip(lengths).filter(|(_, length)| *length > most) {
        let share = most / length;
        for (blob, from) in update.adapter.0.values_mut().zip(global.0.values()) {
            for (value, from) in blob.data.iter_mut().zip(&from.data) {
                let from = f64::from(*from);
                *value = (from + share * (f64::from(*value) - from)) as f32;
            }
        }
        shortened.push(update.client);
    }
    shortened.dedup();
    shortened
}

/// Euclidean length of the way from one to the other, over all tensors.
pub(super) fn length(from: &AdapterState, to: &AdapterState) -> f64 {
    let pairs = from.0.values().zip(to.0.values()).flat_map(|(a, b)| a.data.iter().zip(&b.data));
    pairs.map(|(a, b)| (f64::from(*b) - f64::from(*a)).powi(2)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{scalars, settings, update};
    use super::*;
    use crate::settings::Strategy;

    fn shortened(values: &[f32], max_delta_norm: f64) -> (Vec<f32>, Vec<u32>) {
        let settings = FederationSettings { max_delta_norm, ..settings(Strategy::FedAvg) };
        let mut updates: Vec<ClientUpdate> =
            (1..).zip(values).map(|(k, v)| update(k, 1, [1.0 + v, 1.0, 1.0, 1.0], [1.0; 4])).collect();
        let who = shorten(&settings, &scalars([1.0; 4]), &mut updates);
        (updates.iter().map(|u| u.adapter.0["image.down"].data[0] - 1.0).collect(), who.iter().map(|p| p.0).collect())
    }

    #[test]
    fn an_overlong_update_keeps_only_its_direction() {
        // Lengths 1, 2, 64: the median is 2, twice that 4.
        assert_eq!(shortened(&[1.0, -64.0, 2.0], 2.0), (vec![1.0, -4.0, 2.0], vec![2]));
        assert_eq!(shortened(&[1.0, -64.0, 2.0], 0.0), (vec![1.0, -64.0, 2.0], vec![]));
        // Of two, the shorter one is the measure; a single one is its own.
        assert_eq!(shortened(&[1.0, 64.0], 2.0), (vec![1.0, 2.0], vec![2]));
        assert_eq!(shortened(&[64.0], 1.0), (vec![64.0], vec![]));
    }

    #[test]
    fn participants_who_did_not_move_do_not_hold_the_others() {
        assert_eq!(shortened(&[0.0, 0.0, 0.0, 2.0, 4.0], 2.0), (vec![0.0, 0.0, 0.0, 2.0, 4.0], vec![]));
        assert_eq!(shortened(&[0.0, 0.0], 2.0), (vec![0.0, 0.0], vec![]));
    }
}
