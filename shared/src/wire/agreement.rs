//! What a connection speaks: a participant offers what it can do and tells how much data it has, the server chooses by the
//! federation's settings. What both modes reveal to the server is said in docs/boundary.md.

use super::numbers::{Coder, Format, PictureKey, Rounding};
use super::{Fault, FaultCode};
use crate::edge::{FeatureCache, NanoEdge};
use crate::settings::{AdapterChoice, BoundaryChoice, FederationSettings, Overlap, Strategy, UnknownName, named};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt::Display;

named! {
    /// What goes over the boundary.
    BoundaryMode, "mode of the boundary" {
        /// Hidden states up, their gradients down.
        Activations = "activations",
        /// Features of each picture once; then the adapters' codes and `up` matrices up, and the gradients of both down.
        LowRank = "low-rank",
    }
}

named! {
    /// Who computes the loss. There is room here for answers that stay on the client.
    Labels, "place of the labels" {
        /// The server, from the answers' token ids.
        Server = "server",
    }
}

named! {
    /// How a client holds its token table: the server embeds ids from the same numbers.
    TableForm, "form of the token table" {
        /// As a checkpoint's is read.
        F32 = "f32",
        /// Halves.
        F16 = "f16",
        /// 8 bits, and a scale for each row.
        Int8 = "int8",
        /// 4 bits, and a scale for each group of a row.
        Int4 = "int4",
    }
}

/// What a participant can do, and how much it has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// What it can send over the boundary.
    pub modes: Vec<BoundaryMode>,
    /// Number formats that it writes and reads.
    pub formats: Vec<Format>,
    /// It inflates and deflates.
    pub deflate: bool,
    /// Where its labels may be.
    pub labels: Vec<Labels>,
    /// Its token table.
    pub table: TableForm,
    /// Its samples, own test samples included.
    pub samples: u32,
    /// Positions of all samples together.
    pub positions: u64,
    /// Those of them that are of pictures.
    pub image_positions: u64,
    /// Different pictures among its samples.
    pub pictures: u32,
    /// Positions of those, each counted once.
    pub picture_positions: u64,
}

impl Default for Offer {
    /// Everything this program can do, and no data; the token table is a checkpoint's.
    fn default() -> Self {
        Self {
            modes: BoundaryMode::ALL.to_vec(),
            formats: Format::ALL.to_vec(),
            deflate: true,
            labels: Labels::ALL.to_vec(),
            table: TableForm::F32,
            samples: 0,
            positions: 0,
            image_positions: 0,
            pictures: 0,
            picture_positions: 0,
        }
    }
}

impl Offer {
    /// Everything this program can do, with these data.
    pub fn of(cache: &FeatureCache, edge: &NanoEdge) -> Self {
        let each = edge.config.image_tokens() as u64;
        let with_picture = cache.samples.iter().filter(|s| s.encoded.image_start.is_some()).count() as u64;
        let used = cache.samples.iter().filter_map(|s| cache.pictures.get(s.picture?));
        let pictures = used.map(|p| p.key).collect::<BTreeSet<PictureKey>>().len() as u64;
        Self {
            table: edge.table_form(),
            samples: u32::try_from(cache.samples.len()).unwrap_or(u32::MAX),
            positions: cache.samples.iter().map(|s| s.encoded.ids.len() as u64).sum(),
            image_positions: with_picture * each,
            pictures: u32::try_from(pictures).unwrap_or(u32::MAX),
            picture_positions: pictures * each,
            ..Self::default()
        }
    }
}

/// What is spoken on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreement {
    /// What goes over the boundary.
    pub mode: BoundaryMode,
    /// Features of pictures, upward, once; always to the nearest. The client trains on what it sent.
    pub features: Format,
    /// Hidden states or codes of a batch, upward.
    pub codes: Format,
    /// Their gradients, downward.
    pub gradients: Format,
    /// `up` matrices upward, their gradients downward.
    pub matrices: Format,
    /// How numbers are rounded in training; what is only judged or answered goes to the nearest ([`Self::to_the_nearest`]).
    pub rounding: Rounding,
    /// What gets smaller by it is deflated.
    pub deflate: bool,
    /// Who computes the loss.
    pub labels: Labels,
    /// What the client does while the server computes.
    pub overlap: Overlap,
}

impl Agreement {
    /// Hidden states up and their gradients down, exact, one request after the other.
    pub const PLAIN: Self = Self {
        mode: BoundaryMode::Activations,
        features: Format::F32,
        codes: Format::F32,
        gradients: Format::F32,
        matrices: Format::F32,
        rounding: Rounding::Nearest,
        deflate: false,
        labels: Labels::Server,
        overlap: Overlap::Off,
    };

    /// Choose for a participant; `dim` is the width of the hidden states. `auto` takes the mode that [`Estimate`] finds smaller, of
    /// those that the participant offers. Deflating is left away where it is not offered, since it changes no value.
    ///
    /// # Errors
    /// A [`Fault`] with cause and remedy: the settings ask for what is not offered.
    pub fn choose(settings: &FederationSettings, offer: &Offer, dim: usize) -> Result<Self, Fault> {
        let mode = choose_mode(settings, offer, dim)?;
        let labels = Labels::Server;
        offered(&offer.labels, labels, "answers go to", "labels", "use a client of the server's version")?;
        let mut agreement = Self {
            mode,
            features: settings.feature_format,
            codes: settings.code_format,
            gradients: settings.gradient_format,
            matrices: settings.matrix_format,
            rounding: settings.rounding,
            deflate: settings.compress && offer.deflate,
            labels,
            overlap: settings.overlap,
        };
        if mode == BoundaryMode::Activations {
            // They stay on the client: nothing is gained by rounding them.
            (agreement.features, agreement.matrices) = (Format::F32, Format::F32);
        }
        for (format, key) in [
            (agreement.features, "feature_format"),
            (agreement.codes, "code_format"),
            (agreement.gradients, "gradient_format"),
            (agreement.matrices, "matrix_format"),
            (agreement.embeddings(), "code_format"),
            (agreement.squares(), "matrix_format"),
        ] {
            let remedy = format!("use a client of the server's version, or let the operator set {key} to f32");
            offered(&offer.formats, format, "numbers are sent as", "formats", &remedy)?;
        }
        Ok(agreement)
    }

    /// The same without lots. Errors that have no direction help only where they are summed over steps; a judgement, or an answer,
    /// should come out the same each time.
    pub fn to_the_nearest(self) -> Self {
        Self { rounding: Rounding::Nearest, ..self }
    }

    /// For one of the agreed formats, but features, which are rounded once; `seed` is another one for each message.
    pub fn coder(&self, format: Format, seed: u64) -> Coder {
        Coder { format, rounding: self.rounding, deflate: self.deflate, seed }
    }

    /// Format of sums of squares: they span too much for one scale a row.
    pub fn squares(&self) -> Format {
        never_int8(self.matrices)
    }

    /// Format of the embeddings of a text that the model writes. They are hidden states, whatever was trained with: in mode `low-rank`
    /// no training has seen any in 8 bits.
    pub fn embeddings(&self) -> Format {
        never_int8(self.codes)
    }
}

fn never_int8(format: Format) -> Format {
    if format == Format::F32 { Format::F32 } else { Format::F16 }
}

fn choose_mode(settings: &FederationSettings, offer: &Offer, dim: usize) -> Result<BoundaryMode, Fault> {
    let named = match settings.boundary {
        BoundaryChoice::Activations => BoundaryMode::Activations,
        BoundaryChoice::LowRank => BoundaryMode::LowRank,
        BoundaryChoice::Auto => {
            let estimate = Estimate::of(settings, offer, dim);
            let known = BoundaryMode::ALL.into_iter().filter(|mode| offer.modes.contains(mode));
            // Of equal ones the first: without data, activations.
            known.min_by_key(|mode| estimate.of_mode(*mode)).unwrap_or(BoundaryMode::Activations)
        }
    };
    let remedy = "use a client of the server's version, or let the operator set boundary to 'auto'";
    offered(&offer.modes, named, "the boundary is", "modes", remedy)?;
    Ok(named)
}

fn offered<T: PartialEq + Display>(offer: &[T], wanted: T, here: &str, what: &str, remedy: &str) -> Result<(), Fault> {
    if offer.contains(&wanted) {
        return Ok(());
    }
    // A hostile list may be as long as a frame.
    let list: Vec<String> = offer.iter().take(8).map(T::to_string).collect();
    let cause = match &list[..] {
        [] => format!("in this federation {here} '{wanted}', and this client offers no {what}"),
        _ => format!("in this federation {here} '{wanted}', and this client offers the {what} {}", list.join(", ")),
    };
    Err(Fault { code: FaultCode::Invalid, cause, remedy: remedy.to_owned() })
}

/// Bytes over the boundary in each mode, for one participant over a whole federation; from shapes alone, before deflating, without
/// what both modes share (targets, replies to evaluations, adapters, texts that the model writes, frames), without a personal round
/// after the last, and as if `up` matrices that are drawn by lot in training served for evaluations too.
///
/// With `n` samples of `P` positions on average, of which `C` have an adapter and `W` are text; `D` the width, `R` the rank, `A` adapters;
/// `r` rounds in which the participant trains; in each of them `k` samples in `s` steps, `f` samples in the Fisher pass in `q` groups
/// of 8 requests, `e` samples evaluated (the own test samples, twice). `row(w)` is [`Format::row_bytes`] of the format that applies:
///
/// - activations: `r (k + f + e) P row(D)` up and `r (k + f) P row(D)` down;
/// - low-rank: each picture's positions times `row(D)` once; `3 r (k + f + e) W` for token ids; codes: `r (k + f + e) C row(R)` up and
///   `r (k + f) C row(R)` down; `up` matrices: `r s A D row(R)` up, once more in each round for what is done with the trained adapters
///   (Fisher pass, own test), their gradients `r s A D row(R)` down; squares: `r q A D row(R)` down, with `fisher-ef` for each step of
///   a pass over the samples instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Estimate {
    /// Bytes in mode `activations`.
    pub activations: u64,
    /// Bytes in mode `low-rank`.
    pub low_rank: u64,
}

/// Bytes of a token id as postcard writes it, in a vocabulary of 2^14 to 2^21.
const ID_BYTES: u64 = 3;
/// Requests of a Fisher pass whose squares are summed into one reply: enough of them that transfer and work overlap.
pub const FISHER_GROUP: usize = 8;

impl Estimate {
    /// For a participant's data.
    pub fn of(settings: &FederationSettings, offer: &Offer, dim: usize) -> Self {
        let s = settings;
        let (d, rank) = (dim as u64, s.rank as u64);
        let text = offer.positions.saturating_sub(offer.image_positions);
        let (adapters, coded) = match s.adapters {
            AdapterChoice::Both => (2, offer.positions),
            AdapterChoice::Image => (1, offer.image_positions),
            AdapterChoice::Text => (1, text),
        };
        let Passes { rounds, train, steps, fisher, squares, evaluated } = Passes::of(s, u64::from(offer.samples));
        let (both, all) = (train + fisher, train + fisher + evaluated);
        // Positions of so many samples a round, in all rounds.
        let of =
            |samples: u64, positions: u64| product(&[rounds, samples, positions]) / u128::from(offer.samples.max(1));
        let rows = |rows: u128, format: Format, width: u64| rows.saturating_mul(format.row_bytes(width).into());
        let matrices = |times: u64, format: Format| rows(product(&[rounds, times, adapters, d]), format, rank);

        let sum = |parts: &[u128]| {
            let all = parts.iter().fold(0u128, |sum, part| sum.saturating_add(*part));
            u64::try_from(all).unwrap_or(u64::MAX)
        };
        Self {
            activations: sum(&[
                rows(of(all, offer.positions), s.code_format, d),
                rows(of(both, offer.positions), s.gradient_format, d),
            ]),
            low_rank: sum(&[
                rows(offer.picture_positions.into(), s.feature_format, d),
                of(all, text).saturating_mul(ID_BYTES.into()),
                rows(of(all, coded), s.code_format, rank),
                rows(of(both, coded), s.gradient_format, rank),
                matrices(steps + u64::from(fisher + evaluated > 0), s.matrix_format),
                matrices(steps, s.matrix_format),
                matrices(squares, never_int8(s.matrix_format)),
            ]),
        }
    }

    /// Of one mode.
    pub fn of_mode(&self, mode: BoundaryMode) -> u64 {
        match mode {
            BoundaryMode::Activations => self.activations,
            BoundaryMode::LowRank => self.low_rank,
        }
    }
}

fn product(factors: &[u64]) -> u128 {
    factors.iter().fold(1, |product, factor| product.saturating_mul((*factor).into()))
}

/// How often a participant's samples pass the boundary.
struct Passes {
    /// Rounds in which it trains, on average.
    rounds: u64,
    /// Samples of all steps of a round.
    train: u64,
    /// Steps of a round.
    steps: u64,
    /// Samples of a round's Fisher pass.
    fisher: u64,
    /// Replies of a round that carry squares.
    squares: u64,
    /// Samples evaluated in a round.
    evaluated: u64,
}

impl Passes {
    fn of(s: &FederationSettings, samples: u64) -> Self {
        // As the client keeps its own test samples back.
        let kept = (s.local_test * samples as f64).round() as u64;
        let test = kept.max(u64::from(s.local_test > 0.0)).min(samples.saturating_sub(1));
        let training = samples - test;
        let batch = (s.batch_size as u64).max(1);
        let at_once = if s.micro_batch == 0 { batch } else { s.micro_batch as u64 };
        let train = match u64::from(s.local_steps) {
            0 => training * u64::from(s.local_epochs),
            steps => {
                if training == 0 {
                    0
                } else {
                    steps * batch
                }
            }
        };
        let steps = train.div_ceil(batch);
        let fisher = match (s.strategy, s.fisher_samples as u64) {
            (Strategy::Fisher, 0) => training,
            (Strategy::Fisher, wanted) => wanted.min(training),
            _ => 0,
        };
        let squares = match s.strategy {
            Strategy::FisherEf => training.div_ceil(batch).min(steps),
            _ => fisher.div_ceil(at_once).div_ceil(FISHER_GROUP as u64),
        };
        let share = (s.fraction * (1.0 + s.over_selection)).clamp(0.0, 1.0);
        let rounds = (f64::from(s.rounds) * share).ceil() as u64;
        Self { rounds, train, steps, fisher, squares, evaluated: 2 * test }
    }
}

#[cfg(test)]
mod tests;
