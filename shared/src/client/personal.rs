//! What a participant ends with beside the federation's adapters: its own ones (strategy `local`), or a mix of both.
//!
//! FedDPA-F (Yang et al. 2024, arXiv 2403.19211): after the federated training a personal adapter starts from the federation's
//! and is tuned on the own samples alone; both are used side by side, `(1 - share) * federation's + share * personal`. With the
//! same hidden form the two are one adapter of twice the rank, so nothing downstream needs to know.

use super::keep::Desk;
use super::link::{Interruption, Link};
use super::round::{self, LocalRound};
use super::{Agreed, ClientEvent, Clock, Keeper, Observer, Outcome, Transport, Work};
use crate::model::adapter::NanoAdapters;
use crate::plain::{AdapterState, TensorBlob};
use crate::settings::Strategy;
use crate::wire::ClientMessage;

/// The federation is finished: whatever is still to be done for the own good, then the outcome; none: cancelled.
///
/// # Errors
/// [`Interruption`]; it goes on from `work` later.
pub(super) async fn finish<T: Transport, O: Observer, K: Clock, S: Keeper>(
    agreed: &Agreed<'_>,
    work: &mut Work,
    adapter: AdapterState,
    link: &mut Link<'_, T, O>,
    desk: &mut Desk<'_, K, S>,
) -> Result<Option<Outcome>, Interruption> {
    let settings = &agreed.settings;
    if settings.strategy != Strategy::FedDpaF {
        let own = if settings.strategy == Strategy::Local { work.own().await? } else { None };
        return Ok(Some(Outcome::Finished { adapter, own, local: work.local }));
    }
    // One round more, that nobody merges.
    let state = work.open(agreed, settings.rounds + 1, &adapter).await?;
    let (round, from_step, steps) = (state.round, state.step, state.steps());
    link.observer.event(ClientEvent::Round { round, from_step, steps, adapter: &adapter });
    if !round::train(agreed, state, link, desk).await? {
        return Ok(None);
    }
    let mixed = mix(&adapter, &state.adapters.to_state().await?, settings.personal_share as f32);
    if state.judges() && !judge_mix(agreed, state, &mixed, link).await? {
        return Ok(None);
    }
    if desk.keeps() {
        desk.keep(state.snapshot().await?).await;
    }
    let local = state.local();
    if let Some(local) = local {
        link.observer.event(ClientEvent::Local { round, local: &local });
        link.send(&ClientMessage::Personal { round: settings.rounds, local }).await?;
    }
    Ok(Some(Outcome::Finished { adapter, own: Some(mixed), local }))
}

/// The federation's adapters and the mix on the own test samples; false: cancelled.
async fn judge_mix<T: Transport, O: Observer>(
    agreed: &Agreed<'_>,
    state: &mut LocalRound,
    mixed: &AdapterState,
    link: &mut Link<'_, T, O>,
) -> Result<bool, Interruption> {
    let device = agreed.me.device;
    if state.global.is_none() {
        let received = NanoAdapters::from_state(&state.start, device);
        state.global = round::judge(agreed, state, &received, link).await?;
    }
    if state.global.is_some() && state.own.is_none() {
        let mixed = NanoAdapters::from_state(mixed, device);
        state.own = round::judge(agreed, state, &mixed, link).await?;
    }
    Ok(state.local().is_some())
}

/// `(1 - share) * federation + share * own` as one adapter of both ranks together: `down` one below the other, `up` side by side
/// and weighted. Both must have the same names and width.
pub fn mix(federation: &AdapterState, own: &AdapterState, share: f32) -> AdapterState {
    let mixed = federation.0.iter().filter_map(|(name, blob)| {
        let other = own.0.get(name)?;
        let join = if name.ends_with("down") { below(blob, other) } else { beside(blob, other, share) };
        Some((name.clone(), join))
    });
    AdapterState(mixed.collect())
}

/// `[r, D]` and `[q, D]` as `[r + q, D]`.
fn below(a: &TensorBlob, b: &TensorBlob) -> TensorBlob {
    let rows = |blob: &TensorBlob| blob.shape.first().copied().unwrap_or(0);
    let width = a.shape.last().copied().unwrap_or(0);
    TensorBlob { shape: vec![rows(a) + rows(b), width], data: [a.data.as_slice(), b.data.as_slice()].concat() }
}

/// `(1 - share) * [D, r]` and `share * [D, q]` as `[D, r + q]`.
fn beside(a: &TensorBlob, b: &TensorBlob, share: f32) -> TensorBlob {
    let columns = |blob: &TensorBlob| blob.shape.last().copied().unwrap_or(0);
    let (r, q) = (columns(a), columns(b));
    let mut data = Vec::with_capacity(a.data.len() + b.data.len());
    for (left, right) in a.data.chunks(r.max(1)).zip(b.data.chunks(q.max(1))) {
        data.extend(left.iter().map(|v| v * (1.0 - share)));
        data.extend(right.iter().map(|v| v * share));
    }
    TensorBlob { shape: vec![a.shape.first().copied().unwrap_or(0), r + q], data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_by_hand() {
        let adapter = |down: [f32; 2], up: [f32; 2]| {
            let down = TensorBlob { shape: vec![1, 2], data: down.to_vec() };
            let up = TensorBlob { shape: vec![2, 1], data: up.to_vec() };
            AdapterState([("text.down".to_owned(), down), ("text.up".to_owned(), up)].into())
        };
        let mixed = mix(&adapter([1.0, 2.0], [3.0, 4.0]), &adapter([5.0, 6.0], [8.0, 16.0]), 0.25);
        assert_eq!(mixed.0["text.down"], TensorBlob { shape: vec![2, 2], data: vec![1.0, 2.0, 5.0, 6.0] });
        assert_eq!(mixed.0["text.up"], TensorBlob { shape: vec![2, 2], data: vec![2.25, 2.0, 3.0, 4.0] });
        assert_eq!(mixed.rank(), Some(2));
    }
}
