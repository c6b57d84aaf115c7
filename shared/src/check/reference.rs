//! Reference values (`expected.safetensors`), and the inputs among them that every comparison starts from.

use super::CheckError;
use crate::boundary::{BoundaryReply, BoundaryRequest, Gradient, Input, Positions, Target, Want};
use crate::config::ModelConfig;
use crate::data::text::Encoded;
use crate::edge::{Batch, BatchRow};
use crate::plain::{AdapterState, TensorBlob};
use crate::settings::AdapterChoice;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

enum Values {
    Floats(TensorBlob),
    Whole(Vec<usize>, Vec<i64>),
}

/// All tensors of a reference file, by name.
pub struct Reference {
    tensors: BTreeMap<String, Values>,
}

impl Reference {
    /// Parse a safetensors file of f32, i64 and u8 tensors.
    ///
    /// # Errors
    /// A damaged file, another number format, or values that are not finite.
    pub fn parse(bytes: &[u8]) -> Result<Self, CheckError> {
        let file = SafeTensors::deserialize(bytes)
            .map_err(|e| CheckError::Reference(format!("the reference values are damaged ({e})")))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.iter() {
            tensors.insert(name.to_owned(), values(name, &view)?);
        }
        Ok(Self { tensors })
    }

    /// Names and shapes of all tensors.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors.iter().map(|(name, values)| match values {
            Values::Floats(blob) => (name.as_str(), blob.shape.as_slice()),
            Values::Whole(shape, _) => (name.as_str(), shape.as_slice()),
        })
    }

    /// A tensor of numbers.
    pub fn floats(&self, name: &str) -> Option<&TensorBlob> {
        match self.tensors.get(name) {
            Some(Values::Floats(blob)) => Some(blob),
            _ => None,
        }
    }

    /// Shape and values of a tensor of whole numbers.
    pub fn whole(&self, name: &str) -> Option<(&[usize], &[i64])> {
        match self.tensors.get(name) {
            Some(Values::Whole(shape, data)) => Some((shape, data)),
            _ => None,
        }
    }

    /// The adapter weights that `adapter.*` was computed with, if there are any.
    ///
    /// # Errors
    /// Weights that do not fit each other or the model's width.
    pub fn adapter(&self, dim: usize) -> Result<Option<AdapterState>, CheckError> {
        let found = AdapterState::NAMES
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), self.floats(&format!("adapter.{name}"))?.clone())));
        let state = AdapterState(found.collect());
        let Some(down) = state.0.get("image.down") else {
            return Ok(None);
        };
        let rank = down.shape.first().copied().unwrap_or(0);
        if rank == 0 {
            return fault("the reference adapter has rank 0");
        }
        match state.check_like(&AdapterState::zeros(AdapterChoice::Both, rank, dim)) {
            Ok(()) => Ok(Some(state)),
            Err(e) => fault(format!("the reference adapter cannot be used: {e}")),
        }
    }

    /// The server's reply to the adapted embeddings: what the client's half goes on from where there is no server.
    ///
    /// # Errors
    /// A part of it that is missing or misshapen.
    pub fn adapter_reply(&self, inputs: &Inputs) -> Result<BoundaryReply, CheckError> {
        let loss = self.need("adapter.loss", &[1])?.data;
        let gradient = self.need("adapter.grad.inputs_embeds", &[inputs.rows, inputs.seq, inputs.dim])?;
        Ok(BoundaryReply {
            loss: loss.first().copied().unwrap_or(f32::NAN),
            row_loss: self.need("adapter.per_sample_loss", &[inputs.rows])?.data,
            gradient: Gradient::Hidden(inputs.packed(&gradient)),
        })
    }

    fn need(&self, name: &str, shape: &[usize]) -> Result<TensorBlob, CheckError> {
        let found = self.floats(name).ok_or_else(|| missing(name))?;
        if found.shape == shape { Ok(found.clone()) } else { misfit(name, &found.shape, shape) }
    }

    fn need_whole(&self, name: &str, shape: &[usize]) -> Result<&[i64], CheckError> {
        let (found, data) = self.whole(name).ok_or_else(|| missing(name))?;
        if found == shape { Ok(data) } else { misfit(name, found, shape) }
    }
}

fn missing(name: &str) -> CheckError {
    CheckError::Reference(format!("the reference values lack '{name}'"))
}

fn misfit<T>(name: &str, found: &[usize], shape: &[usize]) -> Result<T, CheckError> {
    fault(format!("'{name}' of the reference values has shape {found:?}, this checkpoint needs {shape:?}"))
}

fn fault<T>(cause: impl Into<String>) -> Result<T, CheckError> {
    Err(CheckError::Reference(cause.into()))
}

fn values(name: &str, view: &TensorView<'_>) -> Result<Values, CheckError> {
    let shape = view.shape().to_vec();
    Ok(match view.dtype() {
        Dtype::F32 => {
            let data: Vec<f32> = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let blob = TensorBlob { shape, data };
            match blob.check(name, view.shape()) {
                Ok(()) => Values::Floats(blob),
                Err(e) => return fault(format!("the reference values cannot be used: {e}")),
            }
        }
        Dtype::I64 => {
            Values::Whole(shape, view.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect())
        }
        Dtype::U8 => Values::Whole(shape, view.data().iter().map(|b| i64::from(*b)).collect()),
        other => {
            return fault(format!("'{name}' of the reference values is stored as {other}, known are F32, I64 and U8"));
        }
    })
}

/// What every comparison starts from, checked against the model once.
pub struct Inputs {
    /// B
    pub rows: usize,
    /// S
    pub seq: usize,
    /// D
    pub dim: usize,
    /// `[B, S]`, each below the vocabulary's size.
    pub ids: Vec<u32>,
    /// Unpadded positions of each row.
    pub lengths: Vec<usize>,
    /// Positions of each row's prompt.
    pub prompt_lengths: Vec<usize>,
    /// `[B, S]`, true at image tokens.
    pub image: Vec<bool>,
    /// Answer tokens of all rows, sorted by row; every row has some.
    pub targets: Vec<Target>,
    /// `[B, 3, H, W]`
    pub pixels: TensorBlob,
    /// `[B, S, D]`
    pub embeds: TensorBlob,
}

impl Inputs {
    /// Take the inputs out of reference values.
    ///
    /// # Errors
    /// The first tensor that is missing or does not belong to a model of this configuration.
    pub fn of(reference: &Reference, config: &ModelConfig) -> Result<Self, CheckError> {
        let (text, size) = (&config.text, config.vision.image_size);
        let (shape, ids) = reference.whole("input_ids").ok_or_else(|| missing("input_ids"))?;
        let [rows, seq] = shape[..] else {
            return misfit("input_ids", shape, &[2, text.max_positions]);
        };
        if rows == 0 || !(1..=text.max_positions).contains(&seq) {
            return misfit("input_ids", shape, &[2, text.max_positions]);
        }
        let known = |id: i64| u32::try_from(id).ok().filter(|id| (*id as usize) < text.vocab);
        let ids: Option<Vec<u32>> = ids.iter().map(|id| known(*id)).collect();
        let Some(ids) = ids else {
            return fault(format!("'input_ids' exceeds the vocabulary of {}", text.vocab));
        };
        let mut lengths = Vec::with_capacity(rows);
        for row in reference.need_whole("attention_mask", &[rows, seq])?.chunks_exact(seq) {
            let length = row.iter().take_while(|m| **m == 1).count();
            if length == 0 || row[length..].iter().any(|m| *m != 0) {
                return fault("'attention_mask' of the reference values is not that of right-padded rows");
            }
            lengths.push(length);
        }
        let mut prompt_lengths = Vec::with_capacity(rows);
        for (length, prompt) in lengths.iter().zip(reference.need_whole("prompt_lengths", &[rows])?) {
            match usize::try_from(*prompt).ok().filter(|p| (1..=*length).contains(p)) {
                Some(prompt) => prompt_lengths.push(prompt),
                None => return fault("'prompt_lengths' of the reference values is outside the rows"),
            }
        }
        let mut targets = Vec::new();
        for (row, labels) in reference.need_whole("labels", &[rows, seq])?.chunks_exact(seq).enumerate() {
            let before = targets.len();
            for (t, label) in labels.iter().enumerate().filter(|(_, l)| **l >= 0) {
                let Some(token) = known(*label).filter(|_| t > 0 && t < lengths[row]) else {
                    return fault(format!("'labels' of the reference values has {label} at [{row}, {t}]"));
                };
                targets.push(Target { row: row as u32, position: t as u32 - 1, token });
            }
            if targets.len() == before {
                return fault(format!("'labels' of the reference values has no target in row {row}"));
            }
        }
        let inputs = Self {
            rows,
            seq,
            dim: text.hidden,
            ids,
            lengths,
            prompt_lengths,
            image: reference.need_whole("image_mask", &[rows, seq])?.iter().map(|m| *m != 0).collect(),
            targets,
            pixels: reference.need("pixel_values", &[rows, 3, size, size])?,
            embeds: reference.need("inputs_embeds", &[rows, seq, text.hidden])?,
        };
        let whole = |row: &usize| {
            let run = inputs.image_run(*row);
            inputs.image[row * seq..][run].iter().all(|i| *i)
        };
        match (0..rows).find(|row| !whole(row)) {
            Some(row) => fault(format!("'image_mask' of the reference values has gaps in row {row}")),
            None => Ok(inputs),
        }
    }

    /// Whether a position of `[B, S]`, counted flat, is no padding.
    pub fn is_real(&self, position: usize) -> bool {
        self.lengths.get(position / self.seq).is_some_and(|length| position % self.seq < *length)
    }

    /// The request that the reference answers, of padded `h` `[B, S, D]`.
    pub fn request(&self, hidden: &TensorBlob) -> BoundaryRequest {
        BoundaryRequest {
            input: Input::Hidden(self.packed(hidden)),
            positions: self.positions(),
            targets: self.targets.clone(),
            want: Want::Gradient,
        }
    }

    /// The batch that the reference adapters are applied to.
    pub fn batch(&self) -> Batch {
        let row = |(ids, length): (&[u32], &usize)| BatchRow { ids: ids[..*length].to_vec(), picture: None };
        Batch {
            x: Arc::new(self.packed(&self.embeds)),
            positions: self.positions(),
            targets: self.targets.clone(),
            rows: self.ids.chunks_exact(self.seq).zip(&self.lengths).map(row).collect(),
        }
    }

    /// Where rows and image tokens lie once the padding is left out.
    fn positions(&self) -> Positions {
        let image = |row: usize| {
            let run = self.image_run(row);
            run.start as u32..run.end as u32
        };
        Positions {
            lengths: self.lengths.iter().map(|l| *l as u32).collect(),
            images: (0..self.rows).map(image).collect(),
        }
    }

    /// From the first image token of a row to behind the last; empty where there is none.
    fn image_run(&self, row: usize) -> Range<usize> {
        let at = row * self.seq..row * self.seq + self.lengths[row];
        let image = &self.image[at];
        match (image.iter().position(|i| *i), image.iter().rposition(|i| *i)) {
            (Some(first), Some(last)) => first..last + 1,
            _ => 0..0,
        }
    }

    /// `[B, S, D]` without its padding: `[T, D]`.
    pub fn packed(&self, padded: &TensorBlob) -> TensorBlob {
        let rows = padded.data.chunks_exact(self.seq * self.dim).zip(&self.lengths);
        let data: Vec<f32> = rows.flat_map(|(row, length)| &row[..length * self.dim]).copied().collect();
        TensorBlob { shape: vec![data.len() / self.dim, self.dim], data }
    }

    /// `[T, D]` as the reference has it, `[B, S, D]`, with zeros for padding.
    pub fn padded(&self, packed: &TensorBlob) -> TensorBlob {
        let mut padded = TensorBlob::zeros(&[self.rows, self.seq, self.dim]);
        let mut left = packed.data.as_slice();
        for (row, length) in padded.data.chunks_exact_mut(self.seq * self.dim).zip(&self.lengths) {
            let (own, rest) = left.split_at((length * self.dim).min(left.len()));
            row[..own.len()].copy_from_slice(own);
            left = rest;
        }
        padded
    }

    /// A row as the tokenizer would give it; none unless its image tokens are one run of the model's length.
    pub fn encoded(&self, row: usize, image_tokens: usize) -> Option<Encoded> {
        let at = row * self.seq..row * self.seq + self.lengths[row];
        let image = &self.image[at.clone()];
        let image_start = image.iter().position(|i| *i)?;
        let run = image[image_start..].iter().take_while(|i| **i).count();
        let all = image.iter().filter(|i| **i).count();
        let fits = run == image_tokens && all == image_tokens;
        let (ids, prompt_length) = (self.ids[at].to_vec(), self.prompt_lengths[row]);
        fits.then_some(Encoded { ids, image_start: Some(image_start), prompt_length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::serialize;

    fn file(dtype: Dtype, bytes: &[u8]) -> Vec<u8> {
        let view = TensorView::new(dtype, vec![2], bytes).unwrap();
        serialize([("t", view)], None).unwrap()
    }

    #[test]
    fn reads_the_three_formats() {
        let floats: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        let reference = Reference::parse(&file(Dtype::F32, &floats)).unwrap();
        assert_eq!(reference.floats("t").unwrap().data, [1.5, -2.0]);
        assert_eq!(reference.whole("t"), None);
        let whole: Vec<u8> = [-100i64, 7].iter().flat_map(|v| v.to_le_bytes()).collect();
        let reference = Reference::parse(&file(Dtype::I64, &whole)).unwrap();
        assert_eq!(reference.whole("t"), Some((&[2usize][..], &[-100i64, 7][..])));
        let reference = Reference::parse(&file(Dtype::U8, &[0, 255])).unwrap();
        assert_eq!(reference.whole("t"), Some((&[2usize][..], &[0i64, 255][..])));
    }

    #[test]
    fn faults_name_cause_and_remedy() {
        let fault = |bytes: &[u8]| Reference::parse(bytes).err().unwrap().to_string();
        let nan: Vec<u8> = [1.0f32, f32::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
        for (bytes, word) in [
            (b"nonsense".to_vec(), "damaged"),
            (file(Dtype::F32, &nan), "NaN at index 1"),
            (file(Dtype::F16, &[0; 4]), "stored as F16"),
        ] {
            let words = fault(&bytes);
            assert!(words.contains(word) && words.contains("make_fixture.py"), "{words}");
        }
    }
}
