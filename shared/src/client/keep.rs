//! What a participant keeps outside its own memory, so that a reload or a kill trains nothing twice: its secret, and where it is
//! in a round. Going on from it gives bit for bit what would have come without the interruption, but where rounding is drawn
//! (`rounding = stochastic`) or gradients are one step old (`overlap = stale`): there it gives what could have come as well.

use super::Clock;
use crate::edge::FeatureCache;
use crate::optimizer::OptimizerState;
use crate::plain::AdapterState;
use crate::settings::FederationSettings;
use crate::step::Evaluation;
use crate::wire::{LocalEvaluation, SessionToken};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::time::Duration;

/// Keeps one snapshot: a file, or a browser's private storage. One keeper belongs to one participation: where several tabs or
/// programs share a place, each needs a name of its own there.
#[allow(async_fn_in_trait)] // no Send: a tab has one thread
pub trait Keeper {
    /// Replace what is kept, whole or not at all. A fault of the storage is the keeper's to report: training goes on without.
    async fn keep(&mut self, snapshot: &[u8]);
    /// What is kept, if anything.
    async fn kept(&mut self) -> Option<Vec<u8>>;
    /// Whether snapshots are worth making.
    fn keeps(&self) -> bool {
        true
    }
}

/// Keeps nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Forgetful;

impl Keeper for Forgetful {
    async fn keep(&mut self, _: &[u8]) {}
    async fn kept(&mut self) -> Option<Vec<u8>> {
        None
    }
    fn keeps(&self) -> bool {
        false
    }
}

/// The secret in a snapshot, for [`Hello::resume`](crate::wire::Hello::resume) of a program that comes back; none in what is no
/// snapshot of this version.
pub fn token_of(snapshot: &[u8]) -> Option<SessionToken> {
    decode(snapshot).map(|s| s.binding.token)
}

const MAGIC: [u8; 4] = *b"FNKS";
/// Changes with every change of [`Snapshot`]; others are ignored.
const VERSION: u16 = 1;

type Hash = [u8; 32];

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Snapshot {
    binding: Binding,
    round: Option<RoundSnapshot>,
}

/// What a snapshot is of; in any other participation it means nothing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Binding {
    token: SessionToken,
    settings: Hash,
    data: Hash,
}

/// Where a participant is in a round. The order of its samples is drawn again from the seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct RoundSnapshot {
    pub(super) round: u32,
    /// Of the adapters that the round began with.
    pub(super) start: Hash,
    /// Optimiser steps done.
    pub(super) step: u64,
    pub(super) loss_sum: f64,
    pub(super) adapter: AdapterState,
    pub(super) optimizer: OptimizerState,
    pub(super) fisher: AdapterState,
    pub(super) fisher_done: u64,
    pub(super) global: Option<Evaluation>,
    pub(super) own: Option<Evaluation>,
}

impl RoundSnapshot {
    pub(super) fn local(&self) -> Option<LocalEvaluation> {
        Some(LocalEvaluation { global: self.global?, own: self.own? })
    }
}

fn encode(snapshot: &Snapshot) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    // Writing plain data into memory cannot fail.
    postcard::to_extend(snapshot, bytes).unwrap_or_default()
}

fn decode(bytes: &[u8]) -> Option<Snapshot> {
    let body = bytes.strip_prefix(&MAGIC)?.strip_prefix(&VERSION.to_le_bytes())?;
    match postcard::take_from_bytes(body) {
        Ok((snapshot, [])) => Some(snapshot),
        _ => None,
    }
}

/// SHA-256 of a value's serialized form.
pub(super) fn hash_of<V: Serialize>(value: &V) -> Hash {
    Sha256::digest(postcard::to_extend(value, Vec::new()).unwrap_or_default()).into()
}

/// SHA-256 of what tells one set of samples from another, in whichever format its pictures are.
fn hash_of_data(cache: &FeatureCache) -> Hash {
    let mut hash = Sha256::new();
    for sample in &cache.samples {
        hash.update((sample.encoded.ids.len() as u64).to_le_bytes());
        sample.encoded.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
    }
    cache.pictures.iter().for_each(|picture| hash.update(picture.origin.0.to_le_bytes()));
    hash.finalize().into()
}

/// A keeper with a clock: what belongs to this participation, not too often.
pub(super) struct Desk<'a, K, S> {
    clock: &'a K,
    keeper: &'a mut S,
    every: Duration,
    data: Hash,
    binding: Option<Binding>,
    kept_at: Option<Duration>,
}

impl<'a, K: Clock, S: Keeper> Desk<'a, K, S> {
    pub(super) fn new(clock: &'a K, keeper: &'a mut S, every: Duration, cache: &FeatureCache) -> Self {
        Self { clock, keeper, every, data: hash_of_data(cache), binding: None, kept_at: None }
    }

    /// From now on it is about this participation; whether it was about another one, or none, until now.
    pub(super) fn bind(&mut self, token: &SessionToken, settings: &FederationSettings) -> bool {
        let binding = Binding { token: token.clone(), settings: hash_of(settings), data: self.data };
        let other = self.binding.as_ref() != Some(&binding);
        self.binding = Some(binding);
        other
    }

    /// Where this participation was when it was kept. If nothing is kept of it, its secret is, from now on. One that the server does
    /// not know (`resumed` is false) is new, whatever was kept: it may be another federation, of the same name and settings.
    pub(super) async fn kept(&mut self, resumed: bool) -> Option<RoundSnapshot> {
        let bytes = self.keeper.kept().await;
        let own = |s: &Snapshot| resumed && self.binding.as_ref() == Some(&s.binding);
        let snapshot = bytes.as_deref().and_then(decode).filter(own);
        if snapshot.is_none() {
            self.write(None).await;
        }
        snapshot?.round
    }

    /// Long enough ago that something was kept.
    pub(super) fn is_due(&self) -> bool {
        let long_ago = |at: Duration| self.clock.now().saturating_sub(at) >= self.every;
        self.keeps() && self.kept_at.is_none_or(long_ago)
    }

    pub(super) fn keeps(&self) -> bool {
        self.keeper.keeps()
    }

    /// The clock's time.
    pub(super) fn now(&self) -> Duration {
        self.clock.now()
    }

    pub(super) async fn keep(&mut self, round: RoundSnapshot) {
        self.write(Some(round)).await;
        self.kept_at = Some(self.clock.now());
    }

    async fn write(&mut self, round: Option<RoundSnapshot>) {
        if let Some(binding) = self.binding.clone().filter(|_| self.keeper.keeps()) {
            self.keeper.keep(&encode(&Snapshot { binding, round })).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge::PictureFeatures;
    use crate::settings::{AdapterChoice, Format};
    use crate::wire::numbers::Coder;
    use std::sync::Arc;

    fn snapshot() -> Snapshot {
        let adapter = AdapterState::zeros(AdapterChoice::Text, 1, 2);
        let round = RoundSnapshot {
            round: 3,
            start: hash_of(&adapter),
            step: 7,
            loss_sum: 0.1 + 0.2,
            adapter: adapter.clone(),
            optimizer: OptimizerState { steps: 7, first: adapter.clone(), second: adapter.clone() },
            fisher: adapter,
            fisher_done: 0,
            global: Some(Evaluation::default()),
            own: None,
        };
        let binding = Binding { token: SessionToken("secret".into()), settings: [1; 32], data: [2; 32] };
        Snapshot { binding, round: Some(round) }
    }

    #[test]
    fn a_snapshot_comes_back_as_it_was() {
        let bytes = encode(&snapshot());
        assert_eq!(decode(&bytes), Some(snapshot()));
        assert_eq!(token_of(&bytes), Some(SessionToken("secret".into())));
    }

    #[test]
    fn what_is_damaged_or_of_another_version_is_ignored() {
        let bytes = encode(&snapshot());
        let mut other = bytes.clone();
        other[4] ^= 1;
        assert_eq!(decode(&other), None);
        assert_eq!(token_of(b"hello"), None);
        for length in 0..bytes.len() {
            assert_eq!(decode(&bytes[..length]), None, "of {length} bytes");
        }
        assert_eq!(decode(&[bytes, vec![0]].concat()), None);
    }

    #[test]
    fn data_are_the_same_in_another_format() {
        let cache = |value: f32| {
            let packed = Coder::EXACT.pack("features", &[value, 0.3, 0.7, 0.1], 4).unwrap();
            FeatureCache { pictures: vec![Arc::new(PictureFeatures::new(packed, 4))], samples: Vec::new() }
        };
        let mut converted = cache(1.0);
        converted.convert(Format::Int8, 4).unwrap();
        assert_eq!(hash_of_data(&converted), hash_of_data(&cache(1.0)));
        assert_ne!(hash_of_data(&converted), hash_of_data(&cache(2.0)));
    }

    #[test]
    fn other_settings_are_another_participation() {
        let settings = FederationSettings::default();
        let changed = FederationSettings { learning_rate: 1e-3, ..settings.clone() };
        assert_eq!(hash_of(&settings), hash_of(&settings.clone()));
        assert_ne!(hash_of(&settings), hash_of(&changed));
    }
}
