//! Plain data that crosses the boundary, the wire and the disk: no tensors of any framework here.

use crate::settings::AdapterChoice;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::BTreeMap;

/// Why a blob or an adapter cannot be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlainError {
    /// The number of values is not the product of the shape.
    #[error("'{name}' has {values} values, its shape {shape:?} needs {expected}")]
    Length {
        /// Which blob.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Values found.
        values: usize,
        /// Values needed.
        expected: usize,
    },
    /// Another shape than agreed.
    #[error("'{name}' has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Which blob.
        name: String,
        /// Shape found.
        found: Vec<usize>,
        /// Shape agreed.
        expected: Vec<usize>,
    },
    /// NaN or infinity.
    #[error(
        "'{name}' has the value {value} at index {index}; only finite numbers are accepted (lower the learning rate if training diverged)"
    )]
    NotFinite {
        /// Which blob.
        name: String,
        /// Flat index of the first such value.
        index: usize,
        /// The value.
        value: f32,
    },
    /// Other tensors than agreed.
    #[error("the adapter has tensors {found:?}, expected {expected:?}")]
    Names {
        /// Names found.
        found: Vec<String>,
        /// Names agreed.
        expected: Vec<String>,
    },
}

/// A dense f32 array, row-major.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorBlob {
    /// Extent of each axis.
    pub shape: Vec<usize>,
    /// Values, row-major; on the wire little-endian bytes.
    #[serde(serialize_with = "to_bytes", deserialize_with = "from_bytes")]
    pub data: Vec<f32>,
}

fn to_bytes<S: Serializer>(data: &[f32], serializer: S) -> Result<S::Ok, S::Error> {
    // Every platform this runs on is little-endian (x86-64, aarch64, wasm32).
    serializer.serialize_bytes(bytemuck::cast_slice(data))
}

fn from_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f32>, D::Error> {
    struct Bytes;
    impl<'de> serde::de::Visitor<'de> for Bytes {
        type Value = Vec<f32>;
        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            f.write_str("a byte string of f32 values")
        }
        fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
            if !bytes.len().is_multiple_of(4) {
                return Err(E::custom("the byte length of f32 values is no multiple of 4"));
            }
            Ok(bytemuck::pod_collect_to_vec(bytes))
        }
        // JSON has no byte strings: there it is a list of numbers.
        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut bytes = Vec::new();
            while let Some(byte) = list.next_element()? {
                bytes.push(byte);
            }
            self.visit_bytes(&bytes)
        }
    }
    deserializer.deserialize_bytes(Bytes)
}

impl TensorBlob {
    /// All zeros.
    pub fn zeros(shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), data: vec![0.0; shape.iter().product()] }
    }

    /// Check length, shape and finiteness; `name` goes into the error.
    ///
    /// # Errors
    /// The first of [`PlainError`] that applies.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<(), PlainError> {
        if self.shape != shape {
            return Err(PlainError::Shape { name: name.into(), found: self.shape.clone(), expected: shape.to_vec() });
        }
        let expected: usize = shape.iter().product();
        if self.data.len() != expected {
            return Err(PlainError::Length {
                name: name.into(),
                shape: self.shape.clone(),
                values: self.data.len(),
                expected,
            });
        }
        match self.data.iter().position(|v| !v.is_finite()) {
            None => Ok(()),
            Some(index) => Err(PlainError::NotFinite { name: name.into(), index, value: self.data[index] }),
        }
    }
}

/// Adapter weights, gradients or Fisher values by name, in a fixed order; only of the tensors that are trained.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AdapterState(#[serde(deserialize_with = "few")] pub BTreeMap<String, TensorBlob>);

/// Tensors by name, no more than there can be: one frame has room for millions of empty ones, each of which takes memory.
fn few<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, TensorBlob>, D::Error> {
    struct Few;
    impl<'de> serde::de::Visitor<'de> for Few {
        type Value = BTreeMap<String, TensorBlob>;
        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            write!(f, "at most {} tensors by name", AdapterState::NAMES.len())
        }
        fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let (mut few, mut count) = (BTreeMap::new(), 0);
            while let Some((name, blob)) = map.next_entry()? {
                count += 1;
                if count > AdapterState::NAMES.len() {
                    return Err(serde::de::Error::custom(format!("more than {} tensors", AdapterState::NAMES.len())));
                }
                few.insert(name, blob);
            }
            Ok(few)
        }
    }
    deserializer.deserialize_map(Few)
}

impl AdapterState {
    /// Names of all tensors that there can be, in order.
    pub const NAMES: [&'static str; 4] = ["image.down", "image.up", "text.down", "text.up"];

    /// Names of the trained tensors, in order.
    pub const fn names(choice: AdapterChoice) -> &'static [&'static str] {
        match choice {
            AdapterChoice::Image => &["image.down", "image.up"],
            AdapterChoice::Text => &["text.down", "text.up"],
            AdapterChoice::Both => &Self::NAMES,
        }
    }

    /// Zeros for adapters of `rank` on width `dim`: down `[rank, dim]`, up `[dim, rank]`.
    pub fn zeros(choice: AdapterChoice, rank: usize, dim: usize) -> Self {
        let shape = |n: &str| if n.ends_with("down") { [rank, dim] } else { [dim, rank] };
        Self(Self::names(choice).iter().map(|n| ((*n).to_owned(), TensorBlob::zeros(&shape(n)))).collect())
    }

    /// Zeros of the same names and shapes.
    pub fn zeros_like(&self) -> Self {
        Self(self.0.iter().map(|(name, blob)| (name.clone(), TensorBlob::zeros(&blob.shape))).collect())
    }

    /// Which adapters these are, if the names are those of a choice.
    pub fn choice(&self) -> Option<AdapterChoice> {
        AdapterChoice::ALL.into_iter().find(|choice| self.0.keys().eq(Self::names(*choice)))
    }

    /// The rank, if there is a `down` with two axes.
    pub fn rank(&self) -> Option<usize> {
        let (_, down) = self.0.iter().find(|(name, _)| name.ends_with("down"))?;
        match down.shape[..] {
            [rank, _] => Some(rank),
            _ => None,
        }
    }

    /// Multiply every value.
    pub fn scale(&mut self, factor: f32) {
        self.0.values_mut().flat_map(|b| &mut b.data).for_each(|v| *v *= factor);
    }

    /// Add values of the same names and shapes; what has no counterpart here is left out.
    pub fn add(&mut self, other: &AdapterState) {
        for (name, blob) in &mut self.0 {
            let Some(other) = other.0.get(name) else { continue };
            blob.data.iter_mut().zip(&other.data).for_each(|(sum, v)| *sum += v);
        }
    }

    /// Check names, shapes and finiteness against `like`.
    ///
    /// # Errors
    /// The first of [`PlainError`] that applies.
    pub fn check_like(&self, like: &AdapterState) -> Result<(), PlainError> {
        if !self.0.keys().eq(like.0.keys()) {
            let names = |s: &AdapterState| s.0.keys().cloned().collect();
            return Err(PlainError::Names { found: names(self), expected: names(like) });
        }
        self.0.iter().zip(like.0.values()).try_for_each(|((name, blob), l)| blob.check(name, &l.shape))
    }

    /// Number of values in all tensors.
    pub fn parameters(&self) -> usize {
        self.0.values().map(|b| b.data.len()).sum()
    }
}

/// One answer token: the logits at `position` of sample `row` should favour `token`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Sample in the batch.
    pub row: u32,
    /// Position whose logits are read (one before the token itself).
    pub position: u32,
    /// Token id.
    pub token: u32,
}

/// What a client sends through the boundary: adapted embeddings and, in mode `labels = server`, the targets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BoundaryRequest {
    /// `h`: `[B, S, D]`, right-padded.
    pub hidden: TensorBlob,
    /// Real length of each row.
    pub lengths: Vec<u32>,
    /// Answer tokens of all rows, sorted by row and position.
    pub targets: Vec<Target>,
}

/// Why a boundary request cannot be computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// The activations are misshapen or not finite.
    #[error(transparent)]
    Hidden(#[from] PlainError),
    /// Anything else about the request.
    #[error("{0}")]
    Invalid(String),
}

impl BoundaryRequest {
    /// Check everything that the server relies on, against the model's width and vocabulary. How much is computed at once is
    /// the LLM host's concern.
    ///
    /// # Errors
    /// [`RequestError`] says which value is wrong.
    pub fn check(&self, dim: usize, vocab: usize, max_positions: usize) -> Result<(), RequestError> {
        let [rows, seq, width] = self.hidden.shape[..] else {
            return Err(RequestError::Invalid(format!(
                "activations have {} axes, expected 3: [batch, sequence, width]",
                self.hidden.shape.len()
            )));
        };
        let invalid = |m: String| Err(RequestError::Invalid(m));
        if rows == 0 || seq == 0 {
            return invalid("the batch is empty".into());
        }
        if seq > max_positions {
            return invalid(format!(
                "the sequence has {seq} positions, the model takes {max_positions}; shorten the question"
            ));
        }
        if rows.checked_mul(seq).and_then(|n| n.checked_mul(width)).is_none() {
            return invalid(format!("the shape {:?} overflows", self.hidden.shape));
        }
        self.hidden.check("activations", &[rows, seq, dim])?;
        if self.lengths.len() != rows {
            return invalid(format!("{} lengths for {rows} rows", self.lengths.len()));
        }
        if let Some(l) = self.lengths.iter().find(|l| **l == 0 || **l as usize > seq) {
            return invalid(format!("a row's length is {l}, it must be 1 to {seq}"));
        }
        for t in &self.targets {
            let Some(length) = self.lengths.get(t.row as usize) else {
                return invalid(format!("a target names row {}, there are {rows}", t.row));
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
        let mut counts = vec![0; self.lengths.len()];
        for t in &self.targets {
            counts[t.row as usize] += 1;
        }
        counts
    }
}

/// The server's answer to a training request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BoundaryReply {
    /// Mean negative log-likelihood over the batch's targets, nats.
    pub loss: f32,
    /// The same mean for each row alone.
    pub row_loss: Vec<f32>,
    /// `g = dL/dh`: `[B, S, D]`.
    pub gradient: TensorBlob,
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

    fn request() -> BoundaryRequest {
        BoundaryRequest {
            hidden: TensorBlob::zeros(&[2, 3, 4]),
            lengths: vec![3, 2],
            targets: vec![Target { row: 0, position: 1, token: 5 }, Target { row: 1, position: 1, token: 2 }],
        }
    }

    #[test]
    fn a_sound_request_passes() {
        request().check(4, 10, 3).unwrap();
        assert_eq!(request().target_counts(), [1, 1]);
    }

    #[test]
    fn each_fault_of_a_request_is_named() {
        let fault = |change: fn(&mut BoundaryRequest)| {
            let mut r = request();
            change(&mut r);
            r.check(4, 10, 3).unwrap_err().to_string()
        };
        assert!(fault(|r| r.hidden.data[7] = f32::NAN).contains("NaN at index 7"));
        assert!(fault(|r| r.hidden.data[0] = f32::INFINITY).contains("inf"));
        assert!(fault(|r| r.hidden.shape = vec![2, 3]).contains("2 axes"));
        assert!(fault(|r| r.hidden = TensorBlob::zeros(&[2, 3, 5])).contains("[2, 3, 5]"));
        assert!(
            fault(|r| {
                r.hidden.data.pop();
            })
            .contains("23 values")
        );
        assert!(fault(|r| r.hidden = TensorBlob::zeros(&[2, 4, 4])).contains("shorten"));
        assert!(fault(|r| r.hidden = TensorBlob::zeros(&[0, 3, 4])).contains("empty"));
        assert!(fault(|r| r.lengths[1] = 9).contains('9'));
        assert!(
            fault(|r| {
                r.lengths.pop();
            })
            .contains("1 lengths")
        );
        assert!(fault(|r| r.targets[1].row = 7).contains("row 7"));
        assert!(fault(|r| r.targets[1].position = 2).contains("position 2"));
        assert!(fault(|r| r.targets[0].token = 10).contains("token 10"));
        assert!(fault(|r| r.targets.reverse()).contains("sorted"));
        assert!(fault(|r| r.hidden.shape = vec![usize::MAX, 3, 4]).contains("overflow"));
    }

    #[test]
    fn adapters_must_match_name_by_name() {
        let like = AdapterState::zeros(AdapterChoice::Both, 2, 4);
        like.check_like(&like).unwrap();
        let wider = AdapterState::zeros(AdapterChoice::Both, 3, 4);
        assert!(wider.check_like(&like).unwrap_err().to_string().contains("[3, 4]"));
        let mut missing = like.clone();
        missing.0.remove("text.up");
        assert!(missing.check_like(&like).unwrap_err().to_string().contains("text.up"));
        assert_eq!(missing.choice(), None);
    }

    #[test]
    fn names_tell_the_choice() {
        for choice in AdapterChoice::ALL {
            let state = AdapterState::zeros(choice, 2, 4);
            assert_eq!((state.choice(), state.rank()), (Some(choice), Some(2)));
            assert_eq!(state.zeros_like(), state);
            assert_eq!(state.parameters(), AdapterState::names(choice).len() * 8);
        }
        assert_eq!((AdapterState::default().choice(), AdapterState::default().rank()), (None, None));
        let image = AdapterState::zeros(AdapterChoice::Image, 2, 4);
        assert!(AdapterState::zeros(AdapterChoice::Both, 2, 4).check_like(&image).is_err());
    }

    #[test]
    fn more_tensors_than_there_can_be_are_refused_while_they_are_read() {
        let named = |count: usize| -> BTreeMap<String, TensorBlob> {
            (0..count).map(|n| (n.to_string(), TensorBlob::zeros(&[1]))).collect()
        };
        for count in [0, 4, 5, 100] {
            let (tensors, fits) = (named(count), count <= AdapterState::NAMES.len());
            let read = postcard::from_bytes::<AdapterState>(&postcard::to_stdvec(&tensors).unwrap());
            assert_eq!(read.ok(), fits.then(|| AdapterState(tensors.clone())), "{count}");
            let read = serde_json::from_str::<AdapterState>(&serde_json::to_string(&tensors).unwrap());
            assert_eq!(read.is_ok(), fits, "{count}");
        }
        let whole = AdapterState::zeros(AdapterChoice::Both, 2, 3);
        assert_eq!(postcard::from_bytes(&postcard::to_stdvec(&whole).unwrap()), Ok(whole));
    }

    #[test]
    fn sums_and_multiples() {
        let mut sum = AdapterState::zeros(AdapterChoice::Text, 1, 2);
        let mut one = sum.clone();
        one.0.values_mut().for_each(|b| b.data.copy_from_slice(&[1.0, -2.0]));
        sum.add(&one);
        sum.add(&one);
        one.scale(2.0);
        assert_eq!(sum, one);
    }
}
