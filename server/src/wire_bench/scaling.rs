//! From the bytes of one number of samples to those of another, by rules that follow from the protocol; and what other ways of
//! tuning would have sent.
//!
//! | what | how often it is sent |
//! | --- | --- |
//! | features | once a sample (each has a picture of its own) |
//! | text, labels, activations, codes and their gradients | each time a sample passes the boundary: training and Fisher passes |
//! | matrices, upward | each step, and once a round before a Fisher pass |
//! | their gradients, downward | each step |
//! | squares of gradients, downward | once a group of Fisher requests |
//! | adapters and Fisher values | each round |
//! | control | each request |

use super::Way;
use crate::account::{Options, account};
use anyhow::Context;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::config::ModelConfig;
use fednano_shared::ledger::{Kind, Traffic};
use fednano_shared::wire::agreement;
use serde::{Deserialize, Serialize};

/// What a participant does in a whole federation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Load {
    /// Its samples.
    pub(super) samples: u64,
    /// Samples of an optimiser step, and of a request.
    pub(super) batch: u64,
    /// Rounds.
    pub(super) rounds: u64,
    /// Passes over the samples in each round.
    pub(super) epochs: u64,
    /// Each round ends with a Fisher pass over all samples.
    pub(super) fisher: bool,
}

/// Requests of a Fisher pass that share one answer about the matrices.
const FISHER_GROUP: u64 = agreement::FISHER_GROUP as u64;

impl Load {
    fn fisher_rounds(&self) -> u64 {
        if self.fisher { self.rounds } else { 0 }
    }

    fn requests_of_a_pass(&self) -> u64 {
        self.samples.div_ceil(self.batch.max(1))
    }

    /// How often a sample passes the boundary, summed over samples.
    pub(super) fn passes(&self) -> u64 {
        self.samples * (self.rounds * self.epochs + self.fisher_rounds())
    }

    /// Optimiser steps. An epoch does not begin a new step: only the last step of a round may be smaller.
    pub(super) fn steps(&self) -> u64 {
        self.rounds * (self.epochs * self.samples).div_ceil(self.batch.max(1))
    }

    fn requests(&self) -> u64 {
        self.steps() + self.fisher_rounds() * self.requests_of_a_pass()
    }

    fn fisher_groups(&self) -> u64 {
        self.fisher_rounds() * self.requests_of_a_pass().div_ceil(FISHER_GROUP)
    }

    /// How often what is counted under a kind is sent.
    fn times(&self, way: Way, kind: Kind) -> u64 {
        match (way, kind) {
            (Way::Up, Kind::Features) => self.samples,
            (Way::Up, Kind::Text | Kind::Labels | Kind::Activations | Kind::Codes) => self.passes(),
            (Way::Down, Kind::Gradients) => self.passes(),
            (Way::Up, Kind::Matrices) => self.steps() + self.fisher_rounds(),
            (Way::Down, Kind::Fisher) => self.fisher_groups(),
            (Way::Up, Kind::Adapters | Kind::Fisher) => self.rounds,
            (Way::Down, Kind::Adapters) => self.rounds + 1, // each round's beginning, and the end
            (_, Kind::Control) => self.requests(),
            _ => 1,
        }
    }
}

/// Bytes of `from`, as they would be with `to`. `matrices`: bytes of the matrices' gradients, which come with each step's reply under
/// the same kind as those of the positions (0 where there are none).
pub(super) fn scaled(traffic: &Traffic, from: &Load, to: &Load, matrices: u64) -> Traffic {
    let mut result = Traffic::default();
    for way in Way::BOTH {
        for kind in Kind::ALL {
            let mixed = (way, kind) == (Way::Down, Kind::Gradients);
            let (had, has) = if mixed { (matrices * from.steps(), matrices * to.steps()) } else { (0, 0) };
            let rest = way.get(traffic, kind).saturating_sub(had);
            way.count(&mut result, kind, has + times(rest, to.times(way, kind), from.times(way, kind)));
        }
    }
    result
}

/// `bytes * to / from`, rounded to the nearest.
fn times(bytes: u64, to: u64, from: u64) -> u64 {
    let from = u128::from(from.max(1));
    let exact = (u128::from(bytes) * u128::from(to) + from / 2) / from;
    u64::try_from(exact).unwrap_or(u64::MAX)
}

/// Where a forecast is furthest from what was measured.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Deviation {
    /// Of the sum of all kinds but control, as a share.
    pub(super) total: f64,
    /// Of the kind that is furthest off, and which that is; control left out.
    pub(super) worst: f64,
    /// Its direction and name.
    pub(super) what: String,
    /// Of the control messages alone: how often the status is sent depends on time.
    pub(super) control: f64,
}

/// Compare a forecast with a measurement.
pub(super) fn deviation(forecast: &Traffic, measured: &Traffic) -> Deviation {
    let share = |a: u64, b: u64| (a as f64 - b as f64) / b.max(1) as f64;
    let mut result = Deviation { total: 0.0, worst: 0.0, what: String::from("none"), control: 0.0 };
    let (mut sums, mut controls) = ((0, 0), (0, 0));
    for way in Way::BOTH {
        for kind in Kind::ALL {
            let (a, b) = (way.get(forecast, kind), way.get(measured, kind));
            if kind == Kind::Control {
                controls = (controls.0 + a, controls.1 + b);
                continue;
            }
            sums = (sums.0 + a, sums.1 + b);
            let off = share(a, b);
            if (a, b) != (0, 0) && off.abs() > result.worst.abs() {
                (result.worst, result.what) = (off, format!("{}, {}", kind.words(), way.name()));
            }
        }
    }
    result.total = share(sums.0, sums.1);
    result.control = share(controls.0, controls.1);
    result
}

/// The shape that others' bytes are loaded out for.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    /// The whole model, all its layers.
    pub(super) config: ModelConfig,
    /// Of the adapters, and of LoRA.
    pub(super) rank: u64,
    /// Positions of a sample: tokens of the prompt without the picture's.
    pub(super) question: u64,
    /// Tokens of the answer.
    pub(super) answer: u64,
}

/// What the same tuning costs otherwise, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Others {
    /// Hidden states in f16, without text and labels; adapters (and Fisher values) in f16.
    pub(super) plain_up: u64,
    /// Their gradients in f16; merged adapters in f16.
    pub(super) plain_down: u64,
    /// LoRA on all linear layers and the whole connector in f16, up in each round; down just as much.
    pub(super) lora_up: u64,
    /// The participant's half of the model in int8, once.
    pub(super) edge: u64,
    /// The whole model in f16, which tuning LoRA on the participant's device needs.
    pub(super) whole: u64,
}

impl Others {
    /// Both directions.
    pub(super) fn plain(&self) -> u64 {
        self.plain_up + self.plain_down
    }

    /// Both directions.
    pub(super) fn lora(&self) -> u64 {
        2 * self.lora_up
    }
}

/// Load it out.
///
/// # Errors
/// A shape out of range.
pub(super) fn others(shape: &Shape, load: &Load) -> anyhow::Result<Others> {
    let options = Options {
        rank: shape.rank,
        edge_dtype: EdgeDtype::Int8,
        batch: load.batch,
        question_tokens: shape.question,
        answer_tokens: shape.answer,
        samples: load.samples,
        local_epochs: load.epochs,
    };
    let account = account(&shape.config, options)?;
    let bytes = |key: &str, form: &str| {
        let line = account.line(key).with_context(|| format!("the account has no line '{key}'"))?;
        line.bytes.get(form).copied().with_context(|| format!("the account's line '{key}' has no {form}"))
    };
    let (hidden, adapters) = (bytes("activations.up", "f16")?, bytes("adapters", "f16")?);
    let uploads = if load.fisher { 2 } else { 1 };
    Ok(Others {
        plain_up: load.passes() * hidden + load.rounds * uploads * adapters,
        plain_down: load.passes() * hidden + (load.rounds + 1) * adapters,
        lora_up: load.rounds * bytes("lora.projector", "f16")?,
        edge: bytes("edge", "int8")?,
        whole: bytes("lora.download", "f16")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets::find;

    fn load(samples: u64, fisher: bool) -> Load {
        Load { samples, batch: 16, rounds: 10, epochs: 1, fisher }
    }

    #[test]
    fn what_happens_how_often() {
        let w = load(1000, true);
        assert_eq!((w.passes(), w.steps(), w.requests(), w.fisher_groups()), (20_000, 630, 1260, 80));
        let w = load(1000, false);
        assert_eq!((w.passes(), w.steps(), w.requests(), w.fisher_groups()), (10_000, 630, 630, 0));
        // Two epochs of 24 samples are 3 steps of 16, not 4.
        assert_eq!(Load { epochs: 2, ..load(24, false) }.steps(), 30);
        assert_eq!(load(64, true).fisher_groups(), 10);
    }

    /// Bytes as the rules have them.
    fn made(w: &Load, matrices: u64) -> Traffic {
        let mut traffic = Traffic::default();
        traffic.up.count(Kind::Features, 2_360_448 * w.samples);
        traffic.up.count(Kind::Codes, 42_240 * w.passes());
        traffic.up.count(Kind::Text, 160 * w.passes());
        traffic.up.count(Kind::Matrices, matrices * (w.steps() + w.fisher_rounds()));
        traffic.up.count(Kind::Adapters, 4_194_400 * w.rounds);
        traffic.up.count(Kind::Fisher, 4_194_400 * w.fisher_rounds());
        traffic.down.count(Kind::Gradients, 42_240 * w.passes() + matrices * w.steps());
        traffic.down.count(Kind::Fisher, matrices * w.fisher_groups());
        traffic.down.count(Kind::Adapters, 4_194_400 * (w.rounds + 1));
        traffic.down.count(Kind::Control, 500 * w.requests());
        traffic
    }

    #[test]
    fn kinds_grow_by_their_rules_exactly() {
        for fisher in [false, true] {
            for (from, to) in [(64, 1000), (64, 128), (128, 1000), (1000, 64), (8, 9)] {
                let (from, to) = (load(from, fisher), load(to, fisher));
                let forecast = scaled(&made(&from, 1_048_576), &from, &to, 1_048_576);
                assert_eq!(forecast, made(&to, 1_048_576));
                let deviation = deviation(&forecast, &made(&to, 1_048_576));
                assert_eq!((deviation.total, deviation.worst, deviation.control), (0.0, 0.0, 0.0));
            }
        }
        // Steps of 1,000 samples are 63 and not 62.5: samples alone would not do.
        let (from, to) = (load(64, false), load(1000, false));
        let scaled = scaled(&made(&from, 7), &from, &to, 7);
        assert_eq!(scaled.up.matrices, 7 * 630);
        assert_eq!(scaled.up.adapters, 41_944_000);
    }

    #[test]
    fn deviations_name_the_worst() {
        let (mut forecast, mut measured) = (Traffic::default(), Traffic::default());
        for (kind, a, b) in [(Kind::Codes, 100, 100), (Kind::Text, 90, 100), (Kind::Control, 5, 10)] {
            forecast.up.count(kind, a);
            measured.up.count(kind, b);
        }
        let deviation = deviation(&forecast, &measured);
        assert_eq!((deviation.total, deviation.worst, deviation.control), (-0.05, -0.1, -0.5));
        assert_eq!(deviation.what, format!("{}, up", Kind::Text.words()));
        assert_eq!(times(u64::MAX, 2, 1), u64::MAX);
        assert_eq!((times(5, 1, 2), times(5, 3, 0)), (3, 15));
    }

    #[test]
    fn others_are_those_of_the_account() {
        let config = find("llava-1.5-7b").unwrap();
        let shape = Shape { config, rank: 64, question: 48, answer: 16 };
        let o = others(&shape, &load(1000, false)).unwrap();
        let adapters = 2 * 1_048_576;
        assert_eq!(o.plain_up, 10_000 * 640 * 4096 * 2 + 10 * adapters);
        assert_eq!(o.plain_down, 10_000 * 640 * 4096 * 2 + 11 * adapters);
        assert_eq!(o.lora(), 2 * 10 * 2 * 180_887_552);
        assert!(o.edge > 443_223_040 && o.edge < 450_000_000, "{}", o.edge);
        // Codes in int8, matrices in f16: what the boundary was made for.
        let ours = made(&load(1000, false), 1_048_576).total();
        assert!(o.plain() >= 20 * ours && o.lora() > ours, "{ours} of {} and {}", o.plain(), o.lora());
        let with_fisher = others(&shape, &load(1000, true)).unwrap();
        assert_eq!(with_fisher.plain_up, 20_000 * 640 * 4096 * 2 + 20 * adapters);
    }
}
