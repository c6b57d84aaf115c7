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
mod tests {
    use super::*;

    fn positions() -> Positions {
        Positions { lengths: vec![3, 2, 4], images: vec![1..3, 0..0, 0..2] }
    }

    fn request(input: Input) -> BoundaryRequest {
        let target = |row, position, token| Target { row, position, token };
        let targets = vec![target(0, 1, 5), target(1, 1, 2), target(2, 0, 9), target(2, 3, 0)];
        BoundaryRequest { input, positions: positions(), targets, want: Want::Gradient }
    }

    fn hidden() -> BoundaryRequest {
        request(Input::Hidden(TensorBlob::zeros(&[9, 4])))
    }

    /// Four image positions, five others, rank 2.
    fn codes() -> BoundaryRequest {
        let zeros = |shape: [usize; 2]| Some(TensorBlob::zeros(&shape));
        request(Input::Codes(CodesInput {
            x: Arc::new(TensorBlob::zeros(&[9, 4])),
            codes: Pair { image: zeros([4, 2]), text: zeros([5, 2]) },
            up: Arc::new(Pair { image: zeros([4, 2]), text: zeros([4, 2]) }),
        }))
    }

    fn fault(mut request: BoundaryRequest, change: impl FnOnce(&mut BoundaryRequest)) -> String {
        change(&mut request);
        request.check(4, 10, 4).unwrap_err().to_string()
    }

    fn blob(request: &mut BoundaryRequest) -> &mut TensorBlob {
        match &mut request.input {
            Input::Hidden(blob) => blob,
            Input::Codes(_) => panic!("codes"),
        }
    }

    fn short(request: &mut BoundaryRequest) -> &mut CodesInput {
        match &mut request.input {
            Input::Codes(input) => input,
            Input::Hidden(_) => panic!("whole"),
        }
    }

    #[test]
    fn positions_are_found_again() {
        let p = positions();
        assert_eq!((p.rows(), p.total(), p.longest(), p.starts()), (3, 9, 4, vec![0, 3, 5]));
        assert_eq!(p.of(Part::Image), [1, 2, 5, 6]);
        assert_eq!(p.of(Part::Text), [0, 3, 4, 7, 8]);
        assert_eq!((p.counts(Part::Image), p.counts(Part::Text)), (vec![2, 0, 2], vec![1, 2, 2]));
        assert_eq!(p.cut(1..3), Positions { lengths: vec![2, 4], images: vec![0..0, 0..2] });
        assert_eq!(Positions::plain(vec![1, 2]), Positions { lengths: vec![1, 2], images: vec![0..0; 2] });
        assert_eq!(Positions::default().longest(), 0);
        // What a stranger may claim breaks nothing.
        let wild = Positions { lengths: vec![2, 3, u32::MAX], images: vec![5..9, Range { start: 2, end: 1 }] };
        assert_eq!(wild.counts(Part::Image), [0, 0, 0]);
        assert!(wild.total() >= u32::MAX as usize && wild.cut(2..9).rows() == 1);
        assert_eq!(wild.cut(0..2).of(Part::Text), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn sound_requests_pass() {
        for mut request in [hidden(), codes()] {
            request.check(4, 10, 4).unwrap();
            assert_eq!(request.target_counts(), [1, 1, 2]);
            // Without pictures the image adapter has nothing to do.
            request.positions = Positions::plain(vec![3, 2, 4]);
            if let Input::Codes(input) = &mut request.input {
                input.codes = Pair { image: Some(TensorBlob::zeros(&[0, 2])), text: Some(TensorBlob::zeros(&[9, 2])) };
            }
            request.check(4, 10, 4).unwrap();
        }
        // No adapter at all: the untouched model.
        let mut bare = codes();
        short(&mut bare).codes = Pair::default();
        short(&mut bare).up = Arc::default();
        bare.check(4, 10, 4).unwrap();
    }

    #[test]
    fn each_fault_of_a_request_is_named() {
        assert!(fault(hidden(), |r| blob(r).data[7] = f32::NAN).contains("NaN at index 7"));
        assert!(fault(hidden(), |r| blob(r).data[0] = f32::INFINITY).contains("inf"));
        assert!(fault(hidden(), |r| blob(r).shape = vec![9, 2, 2]).contains("[9, 2, 2]"));
        assert!(fault(hidden(), |r| *blob(r) = TensorBlob::zeros(&[9, 5])).contains("[9, 5]"));
        assert!(fault(hidden(), |r| blob(r).data.truncate(35)).contains("35 values"));
        assert!(fault(hidden(), |r| r.positions.lengths[1] = 5).contains("shorten"));
        assert!(fault(hidden(), |r| r.positions.lengths[1] = 0).contains("row 1 is empty"));
        assert!(fault(hidden(), |r| r.positions = Positions::default()).contains("empty"));
        assert!(fault(hidden(), |r| r.positions.images.truncate(2)).contains("2 places"));
        assert!(fault(hidden(), |r| r.positions.images[0] = 1..4).contains("1 to 4 of 3"));
        assert!(fault(hidden(), |r| r.positions.images[0] = Range { start: 2, end: 1 }).contains("2 to 1"));
        assert!(fault(hidden(), |r| r.targets[1].row = 7).contains("row 7"));
        assert!(fault(hidden(), |r| r.targets[1].position = 2).contains("position 2"));
        assert!(fault(hidden(), |r| r.targets[0].token = 10).contains("token 10"));
        assert!(fault(hidden(), |r| r.targets.reverse()).contains("sorted"));
    }

    #[test]
    fn each_fault_of_codes_is_named() {
        let up = |r: &mut BoundaryRequest, change: fn(&mut Pair<TensorBlob>)| change(Arc::make_mut(&mut short(r).up));
        let of = |pair: &mut Pair<TensorBlob>, shape: &[usize]| pair.text = Some(TensorBlob::zeros(shape));
        assert!(fault(codes(), |r| short(r).x = Arc::new(TensorBlob::zeros(&[9, 5]))).contains("features"));
        assert!(fault(codes(), |r| short(r).codes.image = None).contains("the text adapter with matrices of both"));
        assert!(fault(codes(), |r| of(&mut short(r).codes, &[4, 2])).contains("text codes"));
        assert!(fault(codes(), |r| of(&mut short(r).codes, &[5, 3])).contains("text codes"));
        assert!(fault(codes(), |r| r.positions.images[0] = 1..2).contains("image codes"));
        assert!(fault(codes(), |r| up(r, |up| up.text = Some(TensorBlob::zeros(&[4, 3])))).contains("text.up"));
        assert!(fault(codes(), |r| up(r, |up| up.image = Some(TensorBlob::zeros(&[8])))).contains("second axis"));
        let none = |r: &mut BoundaryRequest| {
            let empty = Pair { image: Some(TensorBlob::zeros(&[4, 0])), text: Some(TensorBlob::zeros(&[4, 0])) };
            short(r).up = Arc::new(empty);
        };
        assert!(fault(codes(), none).contains("rank"));
        let vast = |r: &mut BoundaryRequest| {
            let shape = [4, usize::MAX / 2];
            up(r, |up| up.image = Some(TensorBlob { shape: vec![4, usize::MAX / 2], data: Vec::new() }));
            assert_eq!(short(r).rank(), Some(shape[1]));
        };
        assert!(fault(codes(), vast).contains("overflows"));
        let not_finite = |r: &mut BoundaryRequest| {
            if let Some(codes) = &mut short(r).codes.image {
                codes.data[3] = f32::NAN;
            }
        };
        assert!(fault(codes(), not_finite).contains("'image codes' has the value NaN at index 3"));
    }

    #[test]
    fn sums_begin_where_there_is_nothing() {
        let pair = |v: f32| Pair { image: None, text: Some(TensorBlob { shape: vec![1, 2], data: vec![v, -v] }) };
        let mut sum = Pair::default();
        sum.add_scaled(&pair(2.0), 0.5);
        sum.add_scaled(&pair(3.0), 1.0);
        assert_eq!(sum, pair(4.0));
        sum.add_scaled(&Pair { image: None, text: Some(TensorBlob::zeros(&[3, 1])) }, 1.0);
        assert_eq!(sum, pair(4.0));
    }

    #[test]
    fn a_place_is_one_in_a_group() {
        Place::ALONE.check().unwrap();
        let fault = |index, of, share| Place { index, of, share }.check().unwrap_err().to_string();
        assert!(fault(2, 2, 0.5).contains("request 2 of a group of 2"));
        assert!(fault(0, 0, 0.5).contains("group of 0"));
        assert!(fault(0, 1, f32::NAN).contains("NaN"));
        assert!(fault(0, 1, 1.5).contains("1.5"));
    }
}
