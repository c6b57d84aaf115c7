//! Plain data that crosses the wire and the disk: no tensors of any framework here. What crosses the boundary is in `boundary`.

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
    #[serde(deserialize_with = "axes")]
    pub shape: Vec<usize>,
    /// Values, row-major; on the wire little-endian bytes.
    #[serde(serialize_with = "to_bytes", deserialize_with = "from_bytes")]
    pub data: Vec<f32>,
}

/// Only a few: a frame has room for a hundred million, each of which takes 8 bytes in memory.
fn axes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    const MOST: usize = 8;
    struct Axes;
    impl<'de> serde::de::Visitor<'de> for Axes {
        type Value = Vec<usize>;
        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            write!(f, "at most {MOST} axes")
        }
        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
            let mut all = Vec::new();
            while let Some(axis) = list.next_element()? {
                if all.len() == MOST {
                    return Err(serde::de::Error::custom(format!("a tensor has more than {MOST} axes")));
                }
                all.push(axis);
            }
            Ok(all)
        }
    }
    deserializer.deserialize_seq(Axes)
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

#[cfg(test)]
mod tests {
    use super::*;

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
    fn more_axes_than_a_tensor_can_have_are_refused_while_they_are_read() {
        for (axes, fits) in [(0, true), (8, true), (9, false), (100_000, false)] {
            let blob = TensorBlob { shape: vec![1; axes], data: vec![1.0] };
            let read = postcard::from_bytes::<TensorBlob>(&postcard::to_stdvec(&blob).unwrap());
            assert_eq!(read.ok(), fits.then(|| blob.clone()), "{axes}");
        }
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
