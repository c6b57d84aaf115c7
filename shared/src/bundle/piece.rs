//! A piece: a small safetensors file that holds some of a client's tensors under their canonical names.
//!
//! A tensor is stored as F16; or as I8 `[rows, cols]` with `NAME.scale`, F16 `[rows]`; or in 4 bits as U8
//! `[rows, ceil(cols / 32) * 16]` with `NAME.scale`, F16 `[rows, ceil(cols / 32)]`, and the note `cols.NAME`. Only the weights of
//! linear layers and the token table are ever quantised: the rest (biases, norms, embeddings of patches and positions) is small
//! and does more harm when it is coarse. The token table alone is split, by rows, with the note `rows.NAME` = `FIRST-LAST/ALL`.

use super::EdgeDtype;
use super::quantise::{self, Quantised};
use super::table::Rows;
use crate::config::ModelConfig;
use crate::model::checkpoint::{CheckpointError, PROJECTOR, TOKEN_TABLE, TensorSource, VISION_TOWER, Weights, shapes};
use crate::model::{clip::VisionTower, projector::Projector};
use crate::plain::TensorBlob;
use burn::tensor::Device;
use half::f16;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// A good size of pieces: small beside the model, large beside a request.
pub const TARGET_BYTES: usize = 4 << 20;

/// Suffix of scales.
const SCALE: &str = ".scale";
/// Metadata entry that holds all notes as JSON. One entry, because the library writes several in random order, and a piece is
/// known by its hash.
const NOTES: &str = "fednano";
/// Embeddings of patches, class and positions.
const EMBEDDINGS: &str = "vision_tower.embeddings.";

/// Whether a matrix of that name is quantised when the bundle is.
fn is_quantised(name: &str) -> bool {
    !name.starts_with(EMBEDDINGS)
}

/// Bytes of a quantised matrix with its scales.
pub fn stored_bytes(dtype: EdgeDtype, rows: usize, cols: usize) -> usize {
    let row = match dtype {
        EdgeDtype::F16 => cols.saturating_mul(2),
        EdgeDtype::Int8 => cols.saturating_add(2),
        EdgeDtype::Int4 => quantise::int4_bytes(cols) + 2 * quantise::groups(cols),
    };
    rows.saturating_mul(row)
}

/// At most so many bytes of header for a tensor, its scales and notes.
fn header_bytes(name: &str) -> usize {
    4 * name.len() + 400
}

/// Names and shapes of what a client's modules need; the token table is not among them.
fn module_shapes(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    // Linear layers are made when they are first used, which these never are.
    let device = Device::flex();
    let mut all = shapes(&VisionTower::init(config, &device), VISION_TOWER);
    all.extend(shapes(&Projector::init(config, &device), PROJECTOR));
    all
}

/// The client's half of a checkpoint as pieces, always the same ones in the same order, the token table last. Reads one tensor at
/// a time. A piece is longer than `target_bytes` only if its one tensor is.
pub fn pieces(
    config: &ModelConfig,
    weights: &Weights,
    dtype: EdgeDtype,
    target_bytes: usize,
) -> impl Iterator<Item = Result<Vec<u8>, CheckpointError>> {
    let shapes = module_shapes(config);
    let there: BTreeSet<&str> = weights.names().collect();
    let needed = shapes.keys().map(String::as_str).chain([TOKEN_TABLE]);
    let missing = needed.filter(|n| !there.contains(n)).map(|n| format!("{n}: missing")).collect();
    Pieces {
        weights,
        dtype,
        target: target_bytes,
        missing,
        modules: shapes.into_iter(),
        draft: Draft::default(),
        table_shape: [config.text.vocab, config.text.hidden],
        table: None,
        next_row: 0,
        failed: false,
    }
}

fn fault(sentence: String) -> CheckpointError {
    CheckpointError::Tensors(vec![sentence])
}

/// The iterator of [`pieces`].
struct Pieces<'a> {
    weights: &'a Weights,
    dtype: EdgeDtype,
    target: usize,
    missing: Vec<String>,
    modules: std::collections::btree_map::IntoIter<String, Vec<usize>>,
    draft: Draft,
    table_shape: [usize; 2],
    table: Option<TensorBlob>,
    next_row: usize,
    failed: bool,
}

impl Pieces<'_> {
    fn advance(&mut self) -> Result<Option<Vec<u8>>, CheckpointError> {
        if !self.missing.is_empty() {
            return Err(CheckpointError::Tensors(std::mem::take(&mut self.missing)));
        }
        for (name, shape) in self.modules.by_ref() {
            let blob = read(self.weights, &name, &shape)?;
            let entry = encode(&name, &shape, &blob.data, self.dtype).map_err(fault)?;
            if !self.draft.tensors.is_empty() && self.draft.bytes + entry.bytes > self.target {
                let full = std::mem::take(&mut self.draft);
                self.draft.push(entry);
                return full.finish().map(Some);
            }
            self.draft.push(entry);
        }
        if !self.draft.tensors.is_empty() {
            return std::mem::take(&mut self.draft).finish().map(Some);
        }
        self.rows_of_table()
    }

    fn rows_of_table(&mut self) -> Result<Option<Vec<u8>>, CheckpointError> {
        let ([rows, cols], first) = (self.table_shape, self.next_row);
        if first >= rows {
            self.table = None;
            return Ok(None);
        }
        if self.table.is_none() {
            self.table = Some(read(self.weights, TOKEN_TABLE, &self.table_shape)?);
        }
        let Some(table) = &self.table else { return Ok(None) };
        let room = self.target.saturating_sub(header_bytes(TOKEN_TABLE));
        let count = (room / stored_bytes(self.dtype, 1, cols).max(1)).clamp(1, rows - first);
        let next = first + count;
        let values = &table.data[first * cols..next * cols];
        let mut entry = encode(TOKEN_TABLE, &[count, cols], values, self.dtype).map_err(fault)?;
        entry.notes.push((format!("rows.{TOKEN_TABLE}"), format!("{first}-{}/{rows}", next - 1)));
        self.next_row = next;
        let mut draft = Draft::default();
        draft.push(entry);
        draft.finish().map(Some)
    }
}

impl Iterator for Pieces<'_> {
    type Item = Result<Vec<u8>, CheckpointError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let piece = self.advance();
        self.failed = piece.is_err();
        piece.transpose()
    }
}

fn read(weights: &Weights, name: &str, shape: &[usize]) -> Result<TensorBlob, CheckpointError> {
    let blob = weights.read(name).map_err(fault)?;
    if blob.shape != shape {
        return Err(fault(format!("{name}: shape {:?}, expected {shape:?}", blob.shape)));
    }
    Ok(blob)
}

/// What safetensors writes.
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

/// A tensor with its scales and notes.
struct Entry {
    tensors: Vec<Stored>,
    notes: Vec<(String, String)>,
    bytes: usize,
}

/// A tensor in the form that its name and shape get.
fn encode(name: &str, shape: &[usize], values: &[f32], dtype: EdgeDtype) -> Result<Entry, String> {
    let stored = |suffix: &str, dtype, shape: &[usize], data| Stored {
        name: format!("{name}{suffix}"),
        dtype,
        shape: shape.to_vec(),
        data,
    };
    let halves = |values: Vec<f16>| values.into_iter().flat_map(f16::to_le_bytes).collect::<Vec<u8>>();
    let mut notes = Vec::new();
    let tensors = match (dtype, shape) {
        (EdgeDtype::Int8, &[rows, cols]) if is_quantised(name) => {
            let q = quantise::int8(name, values, cols)?;
            vec![stored("", Dtype::I8, shape, q.codes), stored(SCALE, Dtype::F16, &[rows], halves(q.scales))]
        }
        (EdgeDtype::Int4, &[rows, cols]) if is_quantised(name) => {
            let q = quantise::int4(name, values, cols)?;
            notes.push((format!("cols.{name}"), cols.to_string()));
            vec![
                stored("", Dtype::U8, &[rows, quantise::int4_bytes(cols)], q.codes),
                stored(SCALE, Dtype::F16, &[rows, quantise::groups(cols)], halves(q.scales)),
            ]
        }
        _ => vec![stored("", Dtype::F16, shape, halves(quantise::to_f16(name, values)?))],
    };
    let bytes = header_bytes(name) + tensors.iter().map(|t| t.data.len()).sum::<usize>();
    Ok(Entry { tensors, notes, bytes })
}

/// A piece in the making.
#[derive(Default)]
struct Draft {
    tensors: Vec<Stored>,
    notes: BTreeMap<String, String>,
    bytes: usize,
}

impl Draft {
    fn push(&mut self, entry: Entry) {
        self.tensors.extend(entry.tensors);
        self.notes.extend(entry.notes);
        self.bytes += entry.bytes;
    }

    fn finish(self) -> Result<Vec<u8>, CheckpointError> {
        let views = self
            .tensors
            .iter()
            .map(|t| TensorView::new(t.dtype, t.shape.clone(), &t.data).map(|v| (t.name.as_str(), v)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| fault(e.to_string()))?;
        let notes = serde_json::to_string(&self.notes).map_err(|e| fault(e.to_string()))?;
        let metadata = (!self.notes.is_empty()).then(|| HashMap::from([(NOTES.to_owned(), notes)]));
        safetensors::serialize(views, metadata).map_err(|e| fault(e.to_string()))
    }
}

/// A piece that is read. Nothing in it is believed: it comes from another machine.
pub struct Piece<'a> {
    tensors: SafeTensors<'a>,
    notes: BTreeMap<String, String>,
}

impl<'a> Piece<'a> {
    /// Look at a piece's header.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`].
    pub fn parse(bytes: &'a [u8]) -> Result<Self, CheckpointError> {
        let damaged = |cause: String| CheckpointError::Damaged { file: "a piece of the model".into(), cause };
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| damaged(e.to_string()))?;
        let notes = match metadata.metadata().as_ref().and_then(|m| m.get(NOTES)) {
            Some(json) => serde_json::from_str(json).map_err(|e| damaged(format!("its notes: {e}")))?,
            None => BTreeMap::new(),
        };
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| damaged(e.to_string()))?;
        Ok(Self { tensors, notes })
    }

    /// Names of the tensors, in order, without scales that belong to another.
    pub fn names(&self) -> BTreeSet<&str> {
        let all: BTreeSet<&str> = self.tensors.names().into_iter().collect();
        let scales = |n: &str| n.strip_suffix(SCALE).is_some_and(|of| all.contains(of));
        all.iter().copied().filter(|n| !scales(n)).collect()
    }

    /// Rows of the token table and the number of the first, if there are any in here.
    ///
    /// # Errors
    /// A sentence: misshapen, or not rows of such a table.
    pub fn rows_of_table(&self, vocab: usize, hidden: usize) -> Result<Option<(usize, Rows)>, String> {
        if self.tensors.tensor(TOKEN_TABLE).is_err() {
            return Ok(None);
        }
        let note = self.notes.get(&format!("rows.{TOKEN_TABLE}")).map_or("", String::as_str);
        let range = note.split_once('/').and_then(|(rows, all)| {
            let (first, last) = rows.split_once('-')?;
            Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?, all.parse::<usize>().ok()?))
        });
        match range {
            Some((first, last, all)) if first <= last && last < all && all == vocab => {
                Ok(self.rows(TOKEN_TABLE, &[last - first + 1, hidden])?.map(|rows| (first, rows)))
            }
            _ => Err(format!("{TOKEN_TABLE}: its rows are said to be {note:?}, expected FIRST-LAST/{vocab}")),
        }
    }

    /// A tensor as it is stored, after every check.
    fn rows(&self, name: &str, shape: &[usize]) -> Result<Option<Rows>, String> {
        let Ok(view) = self.tensors.tensor(name) else { return Ok(None) };
        let rows = match (view.dtype(), shape) {
            (Dtype::F16, _) => {
                expect(name, &view, shape)?;
                Rows::F16(finite(name, view.data())?)
            }
            (Dtype::I8, &[rows, _]) if is_quantised(name) => {
                expect(name, &view, shape)?;
                Rows::Int8(Quantised { codes: view.data().to_vec(), scales: self.scales(name, &[rows])? })
            }
            (Dtype::U8, &[rows, cols]) if is_quantised(name) => {
                expect(name, &view, &[rows, quantise::int4_bytes(cols)])?;
                let note = self.notes.get(&format!("cols.{name}"));
                if note.is_none_or(|n| *n != cols.to_string()) {
                    return Err(format!("{name}: its columns are said to be {note:?}, expected {cols}"));
                }
                let scales = self.scales(name, &[rows, quantise::groups(cols)])?;
                Rows::Int4(Quantised { codes: view.data().to_vec(), scales })
            }
            (dtype, _) => return Err(format!("{name}: stored as {dtype}, which a bundle does not use for it")),
        };
        Ok(Some(rows))
    }

    fn scales(&self, name: &str, shape: &[usize]) -> Result<Vec<f16>, String> {
        let name = format!("{name}{SCALE}");
        match self.tensors.tensor(&name) {
            Ok(view) if view.dtype() == Dtype::F16 => {
                expect(&name, &view, shape)?;
                finite(&name, view.data())
            }
            Ok(view) => Err(format!("{name}: stored as {}, expected F16", view.dtype())),
            Err(_) => Err(format!("{name}: missing")),
        }
    }
}

impl TensorSource for Piece<'_> {
    fn find(&self, name: &str, shape: &[usize]) -> Result<Option<TensorBlob>, String> {
        let cols = shape.last().copied().unwrap_or(1);
        let rows = self.rows(name, shape)?;
        Ok(rows.map(|rows| TensorBlob { shape: shape.to_vec(), data: rows.widen(cols) }))
    }
}

fn expect(name: &str, view: &TensorView, shape: &[usize]) -> Result<(), String> {
    if view.shape() == shape {
        return Ok(());
    }
    Err(format!("{name}: shape {:?}, expected {shape:?}", view.shape()))
}

/// f16 values, none of which is NaN or infinite.
fn finite(name: &str, bytes: &[u8]) -> Result<Vec<f16>, String> {
    let values: Vec<f16> = bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect();
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(i) => Err(format!("{name}: value {} at index {i}, only finite numbers are accepted", values[i])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::tests::{made_up, tensors, weights};

    const DTYPES: [EdgeDtype; 3] = [EdgeDtype::F16, EdgeDtype::Int8, EdgeDtype::Int4];

    fn all(dtype: EdgeDtype, target: usize) -> Vec<Vec<u8>> {
        let config = made_up();
        pieces(&config, &weights(&tensors(&config)), dtype, target).collect::<Result<_, _>>().unwrap()
    }

    #[test]
    fn every_tensor_is_in_one_piece_and_the_table_in_order() {
        let config = made_up();
        let (vocab, hidden) = (config.text.vocab, config.text.hidden);
        for dtype in DTYPES {
            for target in [1, 700, 3000, TARGET_BYTES] {
                let (mut seen, mut next, mut number) = (BTreeSet::new(), 0, 0);
                for bytes in all(dtype, target) {
                    let piece = Piece::parse(&bytes).unwrap();
                    for name in piece.names() {
                        assert!(name == TOKEN_TABLE || (next == 0 && seen.insert(name.to_owned())), "{name}");
                    }
                    if let Some((first, rows)) = piece.rows_of_table(vocab, hidden).unwrap() {
                        assert_eq!(first, next);
                        next += rows.widen(hidden).len() / hidden;
                    }
                    number += 1;
                }
                assert!(seen.iter().eq(module_shapes(&config).keys()) && next == vocab);
                assert!(target < TARGET_BYTES || number == 2, "{number} pieces");
            }
        }
    }

    #[test]
    fn pieces_are_as_long_as_they_may_be() {
        for dtype in DTYPES {
            for target in [1000, 3000, 20_000] {
                let found = all(dtype, target);
                for bytes in &found {
                    let piece = Piece::parse(bytes).unwrap();
                    let names = piece.names();
                    assert!(bytes.len() <= target || names.len() == 1, "{} bytes: {names:?}", bytes.len());
                    let data = |n: &str| piece.tensors.tensor(n).map_or(0, |v| v.data().len());
                    let largest = names.iter().map(|n| data(n) + data(&format!("{n}{SCALE}")) + header_bytes(n)).max();
                    assert!(bytes.len() <= target.max(largest.unwrap()), "{} bytes", bytes.len());
                }
                // The same checkpoint gives the same hashes.
                assert_eq!(found, all(dtype, target));
            }
        }
    }

    #[test]
    fn only_linear_layers_and_the_table_are_quantised() {
        for (dtype, form) in [(EdgeDtype::F16, Dtype::F16), (EdgeDtype::Int8, Dtype::I8), (EdgeDtype::Int4, Dtype::U8)]
        {
            for bytes in all(dtype, TARGET_BYTES) {
                let piece = Piece::parse(&bytes).unwrap();
                for name in piece.names() {
                    let linear = ["_proj.weight", "fc1.weight", "fc2.weight", "linear_1.weight", "linear_2.weight"];
                    let quantised = name == TOKEN_TABLE || linear.iter().any(|l| name.ends_with(l));
                    let expected = if quantised { form } else { Dtype::F16 };
                    assert_eq!(piece.tensors.tensor(name).unwrap().dtype(), expected, "{name}");
                }
            }
        }
    }

    #[test]
    fn a_faulty_checkpoint_is_named() {
        let config = made_up();
        let words = |change: fn(&mut Vec<(String, TensorBlob)>)| {
            let mut list = tensors(&config);
            change(&mut list);
            let source = weights(&list);
            let mut found = pieces(&config, &source, EdgeDtype::Int8, 2000);
            let words = found.find_map(Result::err).unwrap().to_string();
            assert!(found.next().is_none(), "it goes on after an error");
            words
        };
        let without = words(|list| list.retain(|(n, _)| !n.contains("fc1") && n != TOKEN_TABLE));
        assert!(without.matches("missing").count() == 5 && without.contains(TOKEN_TABLE), "{without}");
        let nan = words(|list| list.iter_mut().for_each(|(_, t)| t.data[3] = f32::NAN));
        assert!(nan.contains("linear_1.bias: value NaN at index 3"), "{nan}");
        let short = words(|list| {
            for (_, t) in list.iter_mut().filter(|(n, _)| n == TOKEN_TABLE) {
                *t = TensorBlob::zeros(&[49, 36]);
            }
        });
        assert!(short.contains("[49, 36], expected [50, 36]"), "{short}");
    }
}
