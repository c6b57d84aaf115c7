//! What crosses the boundary between a client and the frozen LLM: plain data with its checks, no tensors of any framework.
//!
//! Rows of a batch lie one after the other, without padding ("packed"): `T` positions in all. Each position belongs to one adapter
//! (its [`Part`]): image positions to the image adapter, all others to the text adapter. Letters: T positions, D width, R rank.

use crate::plain::{PlainError, TensorBlob};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

/// An adapter, and the positions that it covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Part {
    /// Image positions.
    Image,
    /// All others.
    Text,
}

impl Part {
    /// Both, in the order that is used everywhere.
    pub const ALL: [Self; 2] = [Self::Image, Self::Text];

    /// In plain words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Image => "image",
            Self::Text => "text",
        }
    }

    /// The adapter's `down` in an [`AdapterState`](crate::plain::AdapterState).
    pub const fn down_name(self) -> &'static str {
        match self {
            Self::Image => "image.down",
            Self::Text => "text.down",
        }
    }

    /// The adapter's `up` in an [`AdapterState`](crate::plain::AdapterState).
    pub const fn up_name(self) -> &'static str {
        match self {
            Self::Image => "image.up",
            Self::Text => "text.up",
        }
    }
}

/// Something for each adapter; absent where that adapter does not exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair<T> {
    /// Of the image adapter.
    pub image: Option<T>,
    /// Of the text adapter.
    pub text: Option<T>,
}

// By hand: derived, it would ask for a default of what is in it.
impl<T> Default for Pair<T> {
    fn default() -> Self {
        Self { image: None, text: None }
    }
}

impl<T> Pair<T> {
    /// What there is, image first.
    pub fn iter(&self) -> impl Iterator<Item = (Part, &T)> {
        let image = self.image.iter().map(|value| (Part::Image, value));
        image.chain(self.text.iter().map(|value| (Part::Text, value)))
    }

    /// Of one adapter.
    pub fn get(&self, part: Part) -> Option<&T> {
        match part {
            Part::Image => self.image.as_ref(),
            Part::Text => self.text.as_ref(),
        }
    }

    /// The place of one adapter.
    pub fn slot(&mut self, part: Part) -> &mut Option<T> {
        match part {
            Part::Image => &mut self.image,
            Part::Text => &mut self.text,
        }
    }

    /// Something else for each, image first.
    pub fn map<U>(self, mut f: impl FnMut(Part, T) -> U) -> Pair<U> {
        let image = self.image.map(|value| f(Part::Image, value));
        Pair { image, text: self.text.map(|value| f(Part::Text, value)) }
    }

    /// The same with a function that can fail.
    ///
    /// # Errors
    /// The function's first.
    pub fn try_map<U, E>(self, mut f: impl FnMut(Part, T) -> Result<U, E>) -> Result<Pair<U>, E> {
        let image = self.image.map(|value| f(Part::Image, value)).transpose()?;
        Ok(Pair { image, text: self.text.map(|value| f(Part::Text, value)).transpose()? })
    }

    /// References to both.
    pub fn as_ref(&self) -> Pair<&T> {
        Pair { image: self.image.as_ref(), text: self.text.as_ref() }
    }

    /// There is nothing.
    pub fn is_empty(&self) -> bool {
        self.image.is_none() && self.text.is_none()
    }

    /// Which parts there are: image, text.
    pub fn parts(&self) -> [bool; 2] {
        [self.image.is_some(), self.text.is_some()]
    }
}

impl Pair<TensorBlob> {
    /// Add `factor` times blobs of the same shapes. A part that is not here yet begins at 0; one of another shape is left out.
    pub fn add_scaled(&mut self, other: &Self, factor: f32) {
        for (part, blob) in other.iter() {
            let sum = self.slot(part).get_or_insert_with(|| TensorBlob::zeros(&blob.shape));
            if sum.shape == blob.shape {
                sum.data.iter_mut().zip(&blob.data).for_each(|(sum, v)| *sum += v * factor);
            }
        }
    }
}

/// Where rows and pictures lie in a packed batch.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Positions {
    /// Positions of each row.
    pub lengths: Vec<u32>,
    /// Image positions of each row, within the row; empty: no picture, or one that is of no concern (`h` has it in it).
    pub images: Vec<Range<u32>>,
}

impl Positions {
    /// Rows without pictures.
    pub fn plain(lengths: Vec<u32>) -> Self {
        let images = vec![0..0; lengths.len()];
        Self { lengths, images }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.lengths.len()
    }

    /// Positions of all rows, T.
    pub fn total(&self) -> usize {
        self.lengths.iter().fold(0, |sum, length| sum.saturating_add(*length as usize))
    }

    /// The first packed position of each row.
    pub fn starts(&self) -> Vec<usize> {
        let mut next = 0usize;
        let start = |length: &u32| {
            let start = next;
            next = next.saturating_add(*length as usize);
            start
        };
        self.lengths.iter().map(start).collect()
    }

    /// Packed positions of a part, ascending. Call it for positions that have been checked: the list is as long as these say.
    pub fn of(&self, part: Part) -> Vec<usize> {
        let mut all = Vec::with_capacity(self.counts(part).iter().sum());
        for (row, start) in self.starts().into_iter().enumerate() {
            let (length, image) = (self.lengths[row] as usize, self.image(row));
            match part {
                Part::Image => all.extend(start + image.start..start + image.end),
                Part::Text => {
                    all.extend(start..start + image.start);
                    all.extend(start + image.end..start + length);
                }
            }
        }
        all
    }

    /// Positions of a part in each row.
    pub fn counts(&self, part: Part) -> Vec<usize> {
        let count = |row: usize| match part {
            Part::Image => self.image(row).len(),
            Part::Text => self.lengths[row] as usize - self.image(row).len(),
        };
        (0..self.rows()).map(count).collect()
    }

    /// Positions of the longest row.
    pub fn longest(&self) -> usize {
        self.lengths.iter().copied().max().unwrap_or(0) as usize
    }

    /// Some rows alone.
    pub fn cut(&self, rows: Range<usize>) -> Self {
        let rows = rows.start.min(self.rows())..rows.end.min(self.rows());
        let images = rows.clone().map(|row| self.images.get(row).cloned().unwrap_or(0..0)).collect();
        Self { lengths: self.lengths.get(rows).unwrap_or_default().to_vec(), images }
    }

    /// Check that there are rows, none of them empty or too long, and that pictures lie within them.
    ///
    /// # Errors
    /// [`RequestError`] says which value is wrong.
    pub fn check(&self, max_positions: usize) -> Result<(), RequestError> {
        if self.lengths.is_empty() {
            return invalid("the batch is empty".into());
        }
        if self.images.len() != self.lengths.len() {
            return invalid(format!("{} places of pictures for {} rows", self.images.len(), self.lengths.len()));
        }
        for (row, (length, image)) in self.lengths.iter().zip(&self.images).enumerate() {
            if *length == 0 {
                return invalid(format!("row {row} is empty"));
            }
            if *length as usize > max_positions {
                return invalid(format!(
                    "row {row} has {length} positions, the model takes {max_positions}; shorten the question"
                ));
            }
            if image.start > image.end || image.end > *length {
                return invalid(format!(
                    "the picture of row {row} is at {} to {} of {length} positions",
                    image.start, image.end
                ));
            }
        }
        Ok(())
    }

    /// Image positions of a row, within the row whatever is claimed.
    fn image(&self, row: usize) -> Range<usize> {
        let image = self.images.get(row).cloned().unwrap_or(0..0);
        let end = image.end.min(self.lengths[row]);
        image.start.min(end) as usize..end as usize
    }
}

/// One answer token: the logits at `position` of sample `row` should favour `token`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Sample in the batch.
    pub row: u32,
    /// Position within the row whose logits are read (one before the token itself).
    pub position: u32,
    /// Token id.
    pub token: u32,
}

/// What a client wants to know. In mode `activations` it does not matter: `g` tells everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Want {
    /// The gradient.
    #[default]
    Gradient,
    /// The gradient, and sums over rows of squared gradients of each row alone.
    Both,
    /// Those sums, without the gradient at `up`.
    Squares,
}

impl Want {
    /// The gradient at `up` is asked for.
    pub const fn gradient(self) -> bool {
        matches!(self, Self::Gradient | Self::Both)
    }

    /// Squares are asked for.
    pub const fn squares(self) -> bool {
        matches!(self, Self::Both | Self::Squares)
    }
}

/// A request among those of one optimiser step (a group).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Place {
    /// Which of them, from 0.
    pub index: u16,
    /// How many they are.
    pub of: u16,
    /// This one's targets over those of the group, 0 to 1.
    pub share: f32,
}

impl Place {
    /// A group of one.
    pub const ALONE: Self = Self { index: 0, of: 1, share: 1.0 };

    /// Check that it is a place in a group.
    ///
    /// # Errors
    /// [`RequestError`] says which value is wrong.
    pub fn check(&self) -> Result<(), RequestError> {
        if self.index >= self.of {
            return invalid(format!("request {} of a group of {}", self.index, self.of));
        }
        if !(0.0..=1.0).contains(&self.share) {
            return invalid(format!("a request's share of its group is {}, it must be 0 to 1", self.share));
        }
        Ok(())
    }
}

/// What a client sends through the boundary: what the LLM reads and, in mode `labels = server`, the targets.
#[derive(Debug, Clone, PartialEq)]
pub struct BoundaryRequest {
    /// What the LLM reads.
    pub input: Input,
    /// Rows, and for [`Input::Codes`] pictures.
    pub positions: Positions,
    /// Answer tokens of all rows, sorted by row and position.
    pub targets: Vec<Target>,
    /// What is wanted.
    pub want: Want,
}

/// What the LLM reads, whole or in short.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// Adapted embeddings `h`: `[T, D]`.
    Hidden(TensorBlob),
    /// `h = x + up z`, to be put together on the server.
    Codes(CodesInput),
}

/// `h` in short. A part that is absent has the identity for an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct CodesInput {
    /// Features: `[T, D]`.
    pub x: Arc<TensorBlob>,
    /// `z = gelu(down x)`: `[positions of the part, R]`, in the order of [`Positions::of`]. A part without positions has 0 rows.
    pub codes: Pair<TensorBlob>,
    /// The adapters' `up`: `[D, R]`; the same parts as the codes.
    pub up: Arc<Pair<TensorBlob>>,
}

impl CodesInput {
    /// R, if there is an adapter.
    pub fn rank(&self) -> Option<usize> {
        self.up.iter().next().and_then(|(_, up)| up.shape.get(1).copied())
    }
}

/// Why a boundary request cannot be computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// Some values are misshapen or not finite.
    #[error(transparent)]
    Values(#[from] PlainError),
    /// Anything else about the request.
    #[error("{0}")]
    Invalid(String),
}

fn invalid<T>(cause: String) -> Result<T, RequestError> {
    Err(RequestError::Invalid(cause))
}

impl BoundaryRequest {
    /// Check everything that the server relies on, against the model's width and vocabulary. How much is computed at once is
    /// the LLM host's concern.
    ///
    /// # Errors
    /// [`RequestError`] says which value is wrong.
    pub fn check(&self, dim: usize, vocab: usize, max_positions: usize) -> Result<(), RequestError> {
        self.positions.check(max_positions)?;
        let total = self.positions.total();
        match &self.input {
            Input::Hidden(hidden) => check_blob(hidden, "activations", total, dim)?,
            Input::Codes(input) => {
                check_blob(&input.x, "features", total, dim)?;
                check_codes(input, &self.positions, dim)?;
            }
        }
        for t in &self.targets {
            let Some(length) = self.positions.lengths.get(t.row as usize) else {
                return invalid(format!("a target names row {}, there are {}", t.row, self.positions.rows()));
            };
            if t.position >= *length {
                return invalid(format!("a target names position {} of a row of {length}", t.position));
            }
            if t.token as usize >= vocab {
                return invalid(format!("a target names token {}, the vocabulary has {vocab}", t.token));
            }
        }
        if !self.targets.is_sorted_by(|a, b| (a.row, a.position) < (b.row, b.position)) {
            return invalid("targets are not sorted by row and position, each position once".into());
        }
        Ok(())
    }

    /// Targets of each row.
    pub fn target_counts(&self) -> Vec<u32> {
        let mut counts = vec![0; self.positions.rows()];
        for t in &self.targets {
            // A target of a row that does not exist is the check's concern.
            if let Some(count) = counts.get_mut(t.row as usize) {
                *count += 1;
            }
        }
        counts
    }
}

fn check_blob(blob: &TensorBlob, name: &str, rows: usize, width: usize) -> Result<(), RequestError> {
    if rows.checked_mul(width).is_none() {
        return invalid(format!("the shape [{rows}, {width}] of '{name}' overflows"));
    }
    Ok(blob.check(name, &[rows, width])?)
}

fn check_codes(input: &CodesInput, positions: &Positions, dim: usize) -> Result<(), RequestError> {
    if input.codes.parts() != input.up.parts() {
        let names = |parts: [bool; 2]| match parts {
            [true, true] => "both adapters",
            [true, false] => "the image adapter",
            [false, true] => "the text adapter",
            [false, false] => "no adapter",
        };
        let (codes, up) = (names(input.codes.parts()), names(input.up.parts()));
        return invalid(format!("codes of {codes} with matrices of {up}; send both for the same adapters"));
    }
    let Some(rank) = input.rank() else {
        return match input.up.is_empty() {
            true => Ok(()),
            false => invalid("a matrix has no second axis; it must be [width, rank]".into()),
        };
    };
    if rank == 0 {
        return invalid("the rank of the codes is 0, it must be at least 1".into());
    }
    for (part, up) in input.up.iter() {
        check_blob(up, part.up_name(), dim, rank)?;
    }
    for (part, codes) in input.codes.iter() {
        let count = positions.counts(part).iter().sum();
        check_blob(codes, &format!("{} codes", part.name()), count, rank)?;
    }
    Ok(())
}

/// The server's answer to a training request. Gradients are those of the mean loss over the request's targets.
#[derive(Debug, Clone, PartialEq)]
pub struct BoundaryReply {
    /// Mean negative log-likelihood over the request's targets, nats.
    pub loss: f32,
    /// The same mean for each row alone.
    pub row_loss: Vec<f32>,
    /// In the form of the request's input.
    pub gradient: Gradient,
}

/// What the client's backward pass needs.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant)] // few at a time, and each holds megabytes elsewhere
pub enum Gradient {
    /// `g = dL/dh`: `[T, D]`.
    Hidden(TensorBlob),
    /// `g` in short.
    Codes(CodesGradient),
}

/// `g` in short.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CodesGradient {
    /// `u = upT g` of each position, in the shape of the codes.
    pub codes: Pair<TensorBlob>,
    /// `dL/d up`: `[D, R]`; empty for [`Want::Squares`], or where it comes with another reply of the group.
    pub up: Pair<TensorBlob>,
    /// Sums over rows of the squares of `dL_row/d up`, where `L_row` is the mean over the row's own targets: `[D, R]`; empty for
    /// [`Want::Gradient`], or where it comes with another reply of the group.
    pub up_squares: Pair<TensorBlob>,
}

/// The server's answer to an evaluation request: forward only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluationReply {
    /// Negative log-likelihood of each target, nats.
    pub nll: Vec<f32>,
    /// Most likely token at each target's position.
    pub predicted: Vec<u32>,
}

#[cfg(test)]
mod tests;
