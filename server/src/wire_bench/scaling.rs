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
//! | heads of tensors in f16, lengths of the labels' lists | each request |
//! | control | each request |

use super::Way;
use crate::account::{Options, account};
use crate::presets::{Part, PublishedTensor, tensors};
use anyhow::Context;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::config::ModelConfig;
use fednano_shared::ledger::{Kind, Traffic};
use fednano_shared::settings::Format;
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

    /// Bytes of the lengths of the labels' lists, one a request, where a sample has so many labels.
    fn list_lengths(&self, labels: u64) -> u64 {
        let batch = self.batch.max(1);
        let of = |samples: u64| {
            let rest = samples % batch;
            let last = if rest > 0 { length_bytes(rest * labels) } else { 0 };
            (samples / batch) * length_bytes(batch * labels) + last
        };
        self.rounds * of(self.epochs * self.samples) + self.fisher_rounds() * of(self.samples)
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

/// Bytes of a list's length as it is written: 7 bits each.
fn length_bytes(length: u64) -> u64 {
    u64::from((u64::BITS - (length | 1).leading_zeros()).div_ceil(7))
}

/// What of a kind does not grow with the rest of it, as each form has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Fixed {
    /// Gradients of the matrices in a step's reply, under the same kind as those of the positions.
    pub(super) matrices: u64,
    /// Heads of the tensors of codes or activations in a request.
    pub(super) heads_up: u64,
    /// Heads of their gradients in its reply.
    pub(super) heads_down: u64,
    /// Labels of a sample; their list begins with its length.
    pub(super) labels: u64,
}

impl Fixed {
    /// In a whole federation.
    fn bytes(&self, way: Way, kind: Kind, load: &Load) -> u64 {
        match (way, kind) {
            (Way::Up, Kind::Activations | Kind::Codes) => self.heads_up * load.requests(),
            (Way::Up, Kind::Labels) => load.list_lengths(self.labels),
            (Way::Down, Kind::Gradients) => self.matrices * load.steps() + self.heads_down * load.requests(),
            _ => 0,
        }
    }
}

/// Bytes of `from`, as they would be with `to`.
pub(super) fn scaled(traffic: &Traffic, from: &Load, to: &Load, fixed: &Fixed) -> Traffic {
    let mut result = Traffic::default();
    for way in Way::BOTH {
        for kind in Kind::ALL {
            let bytes = way.get(traffic, kind);
            if bytes > 0 {
                let rest = bytes.saturating_sub(fixed.bytes(way, kind, from));
                let grown = times(rest, to.times(way, kind), from.times(way, kind));
                way.count(&mut result, kind, fixed.bytes(way, kind, to) + grown);
            }
        }
    }
    result
}

/// The largest number of samples with which no more is sent than `bytes`; none: not even one is.
pub(super) fn most_samples(bytes: u64, total: impl Fn(u64) -> u64) -> Option<u64> {
    /// Nobody has more.
    const MOST: u64 = 10_000_000;
    let (mut fits, mut too_many) = (0, MOST);
    while too_many - fits > 1 {
        let middle = fits + (too_many - fits) / 2;
        if total(middle) <= bytes {
            fits = middle;
        } else {
            too_many = middle;
        }
    }
    (fits > 0).then_some(fits)
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

/// Bytes of each direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Both {
    pub(super) up: u64,
    pub(super) down: u64,
}

impl Both {
    pub(super) fn total(&self) -> u64 {
        self.up + self.down
    }
}

/// What the same tuning costs otherwise, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Others {
    /// Hidden states up and their gradients down in f16, without text and labels; adapters (and Fisher values) in f16.
    pub(super) plain: Both,
    /// The same with hidden states and gradients in int8, a scale for each position.
    pub(super) plain_int8: Both,
    /// LoRA on all linear layers and the whole connector in f16, up in each round; down just as much.
    pub(super) lora: Both,
    /// The same in int8, a scale for each row of each matrix; biases in f16.
    pub(super) lora_int8: Both,
    /// The participant's half of the model in f16, once.
    pub(super) edge: u64,
    /// The same in int8.
    pub(super) edge_int8: u64,
    /// The whole model in f16, which tuning LoRA on the participant's device needs.
    pub(super) whole: u64,
}

/// Load it out.
///
/// # Errors
/// A shape out of range.
pub(super) fn others(shape: &Shape, load: &Load) -> anyhow::Result<Others> {
    let options = |edge_dtype| Options {
        rank: shape.rank,
        edge_dtype,
        batch: load.batch,
        question_tokens: shape.question,
        answer_tokens: shape.answer,
        samples: load.samples,
        local_epochs: load.epochs,
    };
    let (account, account_int8) =
        (account(&shape.config, options(EdgeDtype::F16))?, account(&shape.config, options(EdgeDtype::Int8))?);
    let bytes = |key: &str, form: &str| {
        let line = if (key, form) == ("edge", "int8") { account_int8.line(key) } else { account.line(key) };
        let line = line.with_context(|| format!("the account has no line '{key}'"))?;
        line.bytes.get(form).copied().with_context(|| format!("the account's line '{key}' has no {form}"))
    };
    let (adapters, passes) = (bytes("adapters", "f16")?, load.passes());
    let uploads = if load.fisher { 2 } else { 1 };
    let plain = |hidden: u64| Both {
        up: passes * hidden + load.rounds * uploads * adapters,
        down: passes * hidden + (load.rounds + 1) * adapters,
    };
    let lora = |round: u64| Both { up: load.rounds * round, down: load.rounds * round };
    Ok(Others {
        plain: plain(bytes("activations.up", "f16")?),
        plain_int8: plain(bytes("activations.up", "int8")?),
        lora: lora(bytes("lora.projector", "f16")?),
        lora_int8: lora(tensors(&shape.config).iter().map(|t| tuned_int8(t, shape.rank)).sum()),
        edge: bytes("edge", "f16")?,
        edge_int8: bytes("edge", "int8")?,
        whole: bytes("lora.download", "f16")?,
    })
}

/// What LoRA with the connector sends of a tensor in int8: of a decoder matrix `[out, in]` the factors `[out, r]` and `[r, in]`.
fn tuned_int8(tensor: &PublishedTensor, rank: u64) -> u64 {
    let int8 = |rows: u64, width: u64| Format::Int8.bytes(rows, width);
    let (rows, width) = (tensor.matrix().0 as u64, tensor.matrix().1 as u64);
    match tensor.part {
        Part::DecoderMatrix => int8(rows, rank) + int8(rank, width),
        Part::Projector if tensor.shape.len() == 2 => int8(rows, width),
        Part::Projector => 2 * width,
        _ => 0,
    }
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

    #[test]
    fn lengths_of_lists_by_hand() {
        assert_eq!([0, 1, 127, 128, 16_383, 16_384].map(length_bytes), [1, 1, 1, 2, 2, 3]);
        // Two full requests of 256 labels, and one of 8 samples with 128.
        assert_eq!(load(40, false).list_lengths(16), 10 * (2 + 2 + 2));
        // The last one has 7 samples with 112 labels.
        assert_eq!(load(39, true).list_lengths(16), 20 * (2 + 2 + 1));
    }

    /// Bytes as the rules have them.
    fn made(w: &Load, fixed: &Fixed) -> Traffic {
        let mut traffic = Traffic::default();
        traffic.up.count(Kind::Features, 2_360_448 * w.samples);
        traffic.up.count(Kind::Codes, 42_240 * w.passes() + fixed.heads_up * w.requests());
        traffic.up.count(Kind::Text, 160 * w.passes());
        traffic.up.count(Kind::Labels, 96 * w.passes() + w.list_lengths(fixed.labels));
        traffic.up.count(Kind::Matrices, fixed.matrices * (w.steps() + w.fisher_rounds()));
        traffic.up.count(Kind::Adapters, 4_194_400 * w.rounds);
        traffic.up.count(Kind::Fisher, 4_194_400 * w.fisher_rounds());
        let gradients = 42_240 * w.passes() + fixed.matrices * w.steps() + fixed.heads_down * w.requests();
        traffic.down.count(Kind::Gradients, gradients);
        traffic.down.count(Kind::Fisher, fixed.matrices * w.fisher_groups());
        traffic.down.count(Kind::Adapters, 4_194_400 * (w.rounds + 1));
        traffic.down.count(Kind::Control, 500 * w.requests());
        traffic
    }

    const FIXED: Fixed = Fixed { matrices: 540_672, heads_up: 2, heads_down: 2, labels: 16 };

    #[test]
    fn kinds_grow_by_their_rules_exactly() {
        for fisher in [false, true] {
            for (from, to) in [(64, 1000), (32, 136), (136, 1000), (1000, 64), (8, 9)] {
                let (from, to) = (load(from, fisher), load(to, fisher));
                let forecast = scaled(&made(&from, &FIXED), &from, &to, &FIXED);
                assert_eq!(forecast, made(&to, &FIXED));
                let deviation = deviation(&forecast, &made(&to, &FIXED));
                assert_eq!((deviation.total, deviation.worst, deviation.control), (0.0, 0.0, 0.0));
            }
        }
        // Steps of 1,000 samples are 63 and not 62.5: samples alone would not do.
        let (from, to, fixed) = (load(64, false), load(1000, false), Fixed { matrices: 7, ..FIXED });
        let scaled = scaled(&made(&from, &fixed), &from, &to, &fixed);
        assert_eq!(scaled.up.matrices, 7 * 630);
        assert_eq!(scaled.up.adapters, 41_944_000);
        // Of what is never sent there is nothing fixed either.
        assert_eq!(scaled.up.activations, 0);
    }

    #[test]
    fn samples_up_to_a_bound() {
        assert_eq!(most_samples(100, |samples| 10 + 9 * samples), Some(10));
        assert_eq!(most_samples(99, |samples| 10 + 9 * samples), Some(9));
        assert_eq!(most_samples(18, |samples| 10 + 9 * samples), None);
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
        assert_eq!(o.plain.up, 10_000 * 640 * 4096 * 2 + 10 * adapters);
        assert_eq!(o.plain.down, 10_000 * 640 * 4096 * 2 + 11 * adapters);
        assert_eq!(o.plain_int8.up, 10_000 * 640 * 4098 + 10 * adapters);
        assert_eq!(o.lora.total(), 2 * 10 * 2 * 180_887_552);
        // A byte a value, one more a value of the two biases, and 2 a row: in each of 32 layers 64 + 4096 of q, k, v, o and down,
        // 64 + 11008 of gate and up; 2 * 4096 of the connector.
        let rows = 32 * (5 * (64 + 4096) + 2 * (64 + 11_008)) + 2 * 4096;
        assert_eq!(o.lora_int8.up, 10 * (180_887_552 + 2 * 4096 + 2 * rows));
        assert_eq!(o.edge, 2 * 443_223_040);
        assert!(o.edge_int8 > 443_223_040 && o.edge_int8 < 450_000_000, "{}", o.edge_int8);
        // All in int8: what the boundary was made for.
        let ours = made(&load(1000, false), &FIXED).total();
        assert!(o.plain.total() >= 20 * ours && o.lora.total() > ours, "{ours} of {o:?}");
        let with_fisher = others(&shape, &load(1000, true)).unwrap();
        assert_eq!(with_fisher.plain.up, 20_000 * 640 * 4096 * 2 + 20 * adapters);
    }
}
