//! A checkpoint's weight files and the tensors in them, found by canonical name.
//!
//! Natively the files are mapped, not read: a tensor is converted straight from the map into the type that it is computed in, so loading
//! takes the model in that type and one tensor more. Pages of a map belong to the system's file cache. They count as shared memory of
//! the process while they are warm, and the system takes them back when anybody needs the room.

use super::checkpoint::{CheckpointError, LANGUAGE_MODEL, canonical};
#[cfg(not(target_arch = "wasm32"))]
use super::files::{WEIGHTS, WeightIndex, unusable};
use crate::plain::TensorBlob;
use burn::tensor::{DType, TensorData};
use half::{bf16, f16};
#[cfg(not(target_arch = "wasm32"))]
use rayon::prelude::*;
use safetensors::tensor::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::ops::Range;
#[cfg(not(target_arch = "wasm32"))]
use std::path::Path;

/// Weight files of a checkpoint. Only their headers are read before a tensor is asked for.
pub struct Weights {
    files: Vec<File>,
    tensors: BTreeMap<String, Stored>,
    /// Tensors with what is wrong about them in the files themselves, for the list of all faults.
    faults: Vec<(String, String)>,
}

/// A weight file.
struct File {
    name: String,
    content: Content,
}

/// Where a file's bytes are.
enum Content {
    /// In memory.
    Held(Vec<u8>),
    /// On disk.
    #[cfg(not(target_arch = "wasm32"))]
    Mapped(memmap2::Mmap),
}

/// A tensor in a file.
struct Stored {
    /// Into [`Weights::files`].
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Into the file.
    bytes: Range<usize>,
}

/// Bytes of a safetensors file before its header: the header's length.
const LENGTH: usize = 8;

impl Content {
    /// Map a file.
    #[cfg(not(target_arch = "wasm32"))]
    fn map(path: &Path) -> std::io::Result<Self> {
        let file = std::fs::File::open(path)?;
        // SAFETY: the map is only read, as bytes that may have any value. Nobody may shorten the file meanwhile (the system would end
        // this process): every command here writes weights under another name and renames them.
        #[allow(unsafe_code, reason = "mapping a file is unsafe, because another program may shorten it")]
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Self::Mapped(map))
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Held(bytes) => bytes,
            #[cfg(not(target_arch = "wasm32"))]
            Self::Mapped(map) => map,
        }
    }
}

impl Stored {
    fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// The type to compute in without loss, where values of the stored type are weights.
    fn float(&self) -> Option<DType> {
        match self.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::F16 => Some(DType::F16),
            Dtype::BF16 => Some(DType::BF16),
            _ => None,
        }
    }

    fn unsupported(&self, name: &str) -> String {
        format!("{name}: stored as {:?}, supported are F32, F16, BF16", self.dtype)
    }
}

impl Weights {
    fn empty() -> Self {
        Self { files: Vec::new(), tensors: BTreeMap::new(), faults: Vec::new() }
    }

    /// Take over the bytes of one or several safetensors files, by name.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] for a file whose header or length is wrong.
    pub fn from_files(files: Vec<(String, Vec<u8>)>) -> Result<Self, CheckpointError> {
        let mut weights = Self::empty();
        for (name, bytes) in files {
            weights.add(name, Content::Held(bytes))?;
        }
        Ok(weights)
    }

    /// Map the weight files of a model directory: those that its index names, else `model.safetensors`; no other file is looked at.
    ///
    /// # Errors
    /// [`CheckpointError`] names a file that is missing or damaged.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let index = WeightIndex::open(dir)?;
        let mut weights = Self::empty();
        let mut lacking = index.as_ref().map(|i| i.tensors().clone()).unwrap_or_default();
        let names = index.map_or_else(|| vec![WEIGHTS.to_owned()], |i| i.files());
        let absent: Vec<&str> = names.iter().filter(|n| !dir.join(n).is_file()).map(String::as_str).collect();
        if !absent.is_empty() {
            return Err(unusable(&absent.join(", "), format!("not in {}", dir.display())));
        }
        for name in names {
            let path = dir.join(&name);
            let content = Content::map(&path).map_err(|e| unusable(&path.display().to_string(), e.to_string()))?;
            for tensor in weights.add(name.clone(), content)? {
                if lacking.get(&tensor) == Some(&name) {
                    lacking.remove(&tensor);
                }
            }
        }
        let fault = |(tensor, file): (String, String)| {
            (canonical(&tensor), format!("missing in {file}, where the index puts it"))
        };
        weights.faults.extend(lacking.into_iter().map(fault));
        Ok(weights)
    }

    /// Take over a file; the names of its tensors, as they are in it.
    fn add(&mut self, name: String, content: Content) -> Result<Vec<String>, CheckpointError> {
        let (header, metadata) = SafeTensors::read_metadata(content.bytes())
            .map_err(|e| CheckpointError::Damaged { file: name.clone(), cause: e.to_string() })?;
        let (file, data) = (self.files.len(), LENGTH + header);
        let tensors = metadata.offset_keys();
        for tensor in &tensors {
            let Some(info) = metadata.info(tensor) else { continue };
            let (start, end) = info.data_offsets;
            let stored = Stored { file, dtype: info.dtype, shape: info.shape.clone(), bytes: data + start..data + end };
            let key = canonical(tensor);
            if let Some(other) = self.tensors.insert(key.clone(), stored) {
                let other = self.files.get(other.file).map_or(&name, |f| &f.name);
                self.faults.push((key, format!("there twice, in {other} and in {name}")));
            }
        }
        self.files.push(File { name, content });
        Ok(tensors)
    }

    /// Canonical names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Number of values in all tensors.
    pub fn parameters(&self) -> usize {
        self.tensors.values().map(Stored::values).sum()
    }

    /// The type that most of the language model's values are stored in, f32 where that is none to compute in.
    pub fn stored_dtype(&self) -> DType {
        let mut counts = [(DType::F32, 0), (DType::F16, 0), (DType::BF16, 0)];
        for stored in self.tensors.iter().filter(|(name, _)| name.starts_with(LANGUAGE_MODEL)).map(|(_, s)| s) {
            if let Some((_, count)) = counts.iter_mut().find(|(dtype, _)| Some(*dtype) == stored.float()) {
                *count += stored.values();
            }
        }
        counts
            .into_iter()
            .max_by_key(|(_, count)| *count)
            .filter(|(_, count)| *count > 0)
            .map_or(DType::F32, |(d, _)| d)
    }

    /// A tensor widened to f32, in the file's own layout.
    ///
    /// # Errors
    /// A sentence for the list in [`CheckpointError::Tensors`].
    pub fn read(&self, name: &str) -> Result<TensorBlob, String> {
        let (stored, bytes) = self.find(name)?;
        let data = convert(stored.dtype, bytes, Layout::AsStored, |v| v).ok_or_else(|| stored.unsupported(name))?;
        Ok(TensorBlob { shape: stored.shape.clone(), data })
    }

    /// A tensor in the type to compute in (f16, bf16, else f32), in the file's own layout or, where it is a matrix, `transposed`. No
    /// other copy is made.
    ///
    /// # Errors
    /// A sentence for the list in [`CheckpointError::Tensors`].
    pub fn tensor(&self, name: &str, dtype: DType, transposed: bool) -> Result<TensorData, String> {
        let (stored, bytes) = self.find(name)?;
        let layout = Layout::of(&stored.shape, transposed);
        let mut shape = stored.shape.clone();
        if let Layout::Transposed(..) = layout {
            shape.reverse();
        }
        let data = match dtype {
            DType::F16 => convert(stored.dtype, bytes, layout, f16::from_f32).map(|v| TensorData::new(v, shape)),
            DType::BF16 => convert(stored.dtype, bytes, layout, bf16::from_f32).map(|v| TensorData::new(v, shape)),
            _ => convert(stored.dtype, bytes, layout, |v| v).map(|v| TensorData::new(v, shape)),
        };
        data.ok_or_else(|| stored.unsupported(name))
    }

    /// Everything that is wrong with the files and their tensors, where those `expected` must be there in these shapes and those
    /// `accepted` may be there beside. No values are read.
    pub(super) fn faults(
        &self,
        expected: &BTreeMap<String, Vec<usize>>,
        accepted: impl Fn(&str) -> bool,
    ) -> Vec<String> {
        let mut faults: Vec<String> = self.faults.iter().map(|(name, fault)| format!("{name}: {fault}")).collect();
        let told = |name: &str| self.faults.iter().any(|(told, _)| told == name);
        for (name, shape) in expected {
            match self.tensors.get(name) {
                None if told(name) => {}
                None => faults.push(format!("{name}: missing")),
                Some(stored) if stored.shape != *shape => {
                    faults.push(format!("{name}: shape {:?}, expected {shape:?}", stored.shape));
                }
                Some(stored) if stored.float().is_none() => faults.push(stored.unsupported(name)),
                Some(_) => {}
            }
        }
        let unknown = self.tensors.iter().filter(|(name, _)| !expected.contains_key(*name) && !accepted(name.as_str()));
        faults.extend(unknown.map(|(name, stored)| {
            let file = self.files.get(stored.file).map_or("the checkpoint", |f| f.name.as_str());
            format!("{name}: in {file}, but not part of the model that config.json describes")
        }));
        faults
    }

    fn find(&self, name: &str) -> Result<(&Stored, &[u8]), String> {
        let missing = || format!("{name}: missing");
        let stored = self.tensors.get(name).ok_or_else(missing)?;
        let bytes = self.files.get(stored.file).and_then(|f| f.content.bytes().get(stored.bytes.clone()));
        Ok((stored, bytes.ok_or_else(missing)?))
    }
}

/// The order in which stored values are wanted.
#[derive(Clone, Copy)]
pub(super) enum Layout {
    /// As they come.
    AsStored,
    /// Of so many rows and columns, exchanged.
    Transposed(usize, usize),
}

impl Layout {
    /// `transposed`, where `shape` is a matrix.
    pub(super) fn of(shape: &[usize], transposed: bool) -> Self {
        match shape {
            [rows, columns] if transposed => Self::Transposed(*rows, *columns),
            _ => Self::AsStored,
        }
    }

    /// The `count` values that `get` yields by their place in the file.
    pub(super) fn arrange<T: Copy + Default + Send>(self, count: usize, get: impl Fn(usize) -> T + Sync) -> Vec<T> {
        /// Rows and columns of a square that stays in the cache on both sides.
        const SIDE: usize = 32;
        let mut values = vec![T::default(); count];
        let fill = |(band, out): (usize, &mut [T])| match self {
            Self::AsStored => out.iter_mut().enumerate().for_each(|(i, value)| *value = get(band * BAND + i)),
            Self::Transposed(rows, columns) => {
                for top in (0..rows).step_by(SIDE) {
                    for (i, row) in out.chunks_exact_mut(rows).enumerate() {
                        let (end, column) = (rows.min(top + SIDE), band * SIDE + i);
                        let squares = row.iter_mut().enumerate().take(end).skip(top);
                        squares.for_each(|(r, value)| *value = get(r * columns + column));
                    }
                }
            }
        };
        /// Values of a part that one thread fills.
        const BAND: usize = 1 << 16;
        let part = match self {
            Self::AsStored => BAND,
            Self::Transposed(rows, _) => (SIDE * rows).max(1),
        };
        #[cfg(not(target_arch = "wasm32"))]
        values.par_chunks_mut(part).enumerate().for_each(fill);
        #[cfg(target_arch = "wasm32")]
        values.chunks_mut(part).enumerate().for_each(fill);
        values
    }
}

/// Stored values, each passed through `of`; none where the stored type is no supported one.
fn convert<T: Copy + Default + Send>(
    dtype: Dtype,
    bytes: &[u8],
    layout: Layout,
    of: impl Fn(f32) -> T + Sync,
) -> Option<Vec<T>> {
    let pair = |i: usize| [bytes[2 * i], bytes[2 * i + 1]];
    let four = |i: usize| [bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]];
    match dtype {
        Dtype::F32 => Some(layout.arrange(bytes.len() / 4, |i| of(f32::from_le_bytes(four(i))))),
        Dtype::F16 => Some(layout.arrange(bytes.len() / 2, |i| of(f16::from_le_bytes(pair(i)).to_f32()))),
        Dtype::BF16 => Some(layout.arrange(bytes.len() / 2, |i| of(bf16::from_le_bytes(pair(i)).to_f32()))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::checkpoint::{Storage, write};

    const NAME: &str = "language_model.norm.weight";

    fn stored(blob: &TensorBlob, storage: Storage) -> Weights {
        let bytes = write(&[(NAME.to_owned(), blob.clone())], storage, &[]).unwrap();
        Weights::from_files(vec![("made up".into(), bytes)]).unwrap()
    }

    #[test]
    fn a_tensor_comes_in_the_type_to_compute_in() {
        let blob = TensorBlob { shape: vec![3], data: vec![1.0, -0.333_333_34, 70_000.0] };
        let weights = stored(&blob, Storage::F32);
        assert_eq!(weights.read(NAME).unwrap(), blob);
        let data = |dtype: DType| weights.tensor(NAME, dtype, false).unwrap();
        assert_eq!(data(DType::F32).as_slice::<f32>().unwrap(), blob.data);
        let halves: Vec<f32> = data(DType::F16).as_slice::<f16>().unwrap().iter().map(|v| v.to_f32()).collect();
        assert_eq!(halves, [1.0, -0.333_251_95, f32::INFINITY]);
        let halves: Vec<f32> = data(DType::BF16).as_slice::<bf16>().unwrap().iter().map(|v| v.to_f32()).collect();
        assert_eq!(halves, [1.0, -0.333_984_38, 70_144.0]);
        assert!(weights.tensor("lm_head.weight", DType::F32, true).unwrap_err().contains("missing"));
    }

    #[test]
    fn a_matrix_comes_transposed() {
        let (rows, columns) = (67, 41);
        let data: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
        let blob = TensorBlob { shape: vec![rows, columns], data };
        let got = stored(&blob, Storage::F32).tensor(NAME, DType::F32, true).unwrap();
        assert_eq!(got.shape().as_slice(), [columns, rows]);
        let got = got.as_slice::<f32>().unwrap();
        for (row, column) in [(0, 0), (66, 40), (33, 31), (31, 33), (64, 32)] {
            assert_eq!(got[column * rows + row], blob.data[row * columns + column]);
        }
        assert_eq!(got.iter().sum::<f32>(), blob.data.iter().sum::<f32>());
    }

    #[test]
    fn the_stored_type_is_the_language_models() {
        let blob = TensorBlob::zeros(&[2, 2]);
        assert_eq!(stored(&blob, Storage::F32).stored_dtype(), DType::F32);
        assert_eq!(stored(&blob, Storage::F16).stored_dtype(), DType::F16);
        assert_eq!(Weights::empty().stored_dtype(), DType::F32);
    }
}
