//! NanoEdge: what a client holds. Frozen encoders and connector here; the trainable [`NanoAdapters`] are passed to the step.
//!
//! [`NanoAdapters`]: crate::model::adapter::NanoAdapters

use crate::boundary::{Positions, Target};
use crate::bundle::table::TokenTable;
use crate::config::ModelConfig;
use crate::data::dataset::Dataset;
use crate::data::picture::{Picture, PictureError, Preprocess};
use crate::data::text::{Encoded, TextCodec, TextError};
use crate::model::adapter::{DeviceError, read};
use crate::model::checkpoint::{CheckpointError, EdgeParts, load_edge};
use crate::model::{clip::VisionTower, files::ModelFiles, projector::Projector};
use crate::plain::TensorBlob;
use crate::wire::agreement::TableForm;
use crate::wire::numbers::{Coder, Format, NumbersError, Packed, PictureKey};
use burn::tensor::{Device, Tensor, TensorData};
use std::sync::Arc;

/// The frozen client part of a model.
pub struct NanoEdge {
    /// Sizes.
    pub config: ModelConfig,
    /// Tokenizer and prompt.
    pub text: TextCodec,
    preprocess: Preprocess,
    vision: VisionTower,
    projector: Projector,
    token_table: TokenTable,
    device: Device,
}

/// Why a sample cannot be encoded.
#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
    /// Its picture.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// Its text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Features that are not finite, or damaged, or too many for the memory.
    #[error("features cannot be used: {0}")]
    Numbers(#[from] NumbersError),
    /// Image tokens without their features.
    #[error("a picture has {found} feature values, the model takes {expected}; encode it with this very model")]
    Features {
        /// Values found.
        found: usize,
        /// Values needed.
        expected: usize,
    },
}

/// A data set with frozen features, computed once.
#[derive(Debug, Clone)]
pub struct FeatureCache {
    /// Image features; caches of several participants in one process may share them.
    pub pictures: Vec<Arc<PictureFeatures>>,
    /// Tokenized samples.
    pub samples: Vec<CachedSample>,
}

/// One sample: which picture, which tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct CachedSample {
    /// Index into [`FeatureCache::pictures`]; none: text alone.
    pub picture: Option<usize>,
    /// Its tokens.
    pub encoded: Encoded,
}

/// Image features of a picture as they are sent: what both ends compute with.
#[derive(Debug, Clone, PartialEq)]
pub struct PictureFeatures {
    /// By which the server knows them.
    pub key: PictureKey,
    /// The key of what they were first: it stays, whatever format they are put into.
    pub origin: PictureKey,
    /// `[P, D]`
    pub packed: Packed,
    values: usize,
}

/// What the features are called in errors.
const FEATURES: &str = "features";

impl PictureFeatures {
    /// Features of `width` values a position, not deflated.
    pub fn new(packed: Packed, width: usize) -> Self {
        let bytes = packed.bytes.len();
        let values = match packed.format {
            Format::F32 => bytes / 4,
            // One byte more is the exponent that all values share.
            Format::F16 => bytes / 2,
            // Each row has a scale of 2 bytes.
            Format::Int8 => bytes / (width + 2) * width,
        };
        let key = PictureKey::of(&packed);
        Self { key, origin: key, packed, values }
    }

    /// How many values there are, `P * D`.
    pub fn count(&self) -> usize {
        self.values
    }

    /// Decode all values, `[P, D]`.
    ///
    /// # Errors
    /// Features of another width or number, or damaged ones.
    pub fn values(&self, dim: usize, out: &mut [f32]) -> Result<(), NumbersError> {
        self.packed.unpack_into(FEATURES, out, dim)
    }
}

impl FeatureCache {
    /// What the server will have: the same samples with their pictures in this format, rounded to the nearest. Cheap where they are
    /// in it already.
    ///
    /// # Errors
    /// Features that are not finite, or damaged.
    pub fn in_format(&self, format: Format, dim: usize) -> Result<FeatureCache, NumbersError> {
        let mut cache = self.clone(); // pictures are shared
        cache.convert(format, dim)?;
        Ok(cache)
    }

    /// The same in place, one picture after the other: of one that nobody else holds only the new form is left. What was rounded
    /// stays rounded, also in a finer format later.
    ///
    /// # Errors
    /// As [`Self::in_format`]; pictures up to the faulty one are converted then.
    pub fn convert(&mut self, format: Format, dim: usize) -> Result<(), NumbersError> {
        let (coder, mut values) = (Coder { format, ..Coder::EXACT }, Vec::new());
        for picture in self.pictures.iter_mut().filter(|picture| picture.packed.format != format) {
            values.resize(picture.count(), 0.0);
            picture.values(dim, &mut values)?;
            let converted = PictureFeatures::new(coder.pack(FEATURES, &values, dim)?, dim);
            *picture = Arc::new(PictureFeatures { origin: picture.origin, ..converted });
        }
        Ok(())
    }
}

/// Features of a batch, ready for the adapters; all on the host. Rows lie one after the other, without padding: T positions in all.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// `x`: `[T, D]`.
    pub x: Arc<TensorBlob>,
    /// Where rows and pictures lie.
    pub positions: Positions,
    /// Answer tokens (with `</s>`) of all rows, sorted by row and position.
    pub targets: Vec<Target>,
    /// From what `x` was put together, row by row: enough to send it in short.
    pub rows: Vec<BatchRow>,
}

/// From what a row of `x` was put together.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchRow {
    /// Ids of all positions, placeholders at image positions.
    pub ids: Vec<u32>,
    /// The picture at the image positions, where it is one that can be sent.
    pub picture: Option<Arc<PictureFeatures>>,
}

/// Zeros in one piece, or an error: a batch may have more values than a tab has memory.
fn zeros(count: usize) -> Result<Vec<f32>, NumbersError> {
    let mut values = Vec::new();
    let room = values.try_reserve_exact(count);
    room.map_err(|_| NumbersError::Memory { name: FEATURES.to_owned(), count })?;
    values.resize(count, 0.0);
    Ok(values)
}

/// Pictures encoded in one pass of the vision tower.
const PICTURES_AT_ONCE: usize = 8;

impl NanoEdge {
    /// Load the client's part onto a device (without autodiff: it never learns).
    ///
    /// # Errors
    /// [`CheckpointError`] lists what does not fit.
    pub fn load(files: &ModelFiles, device: &Device) -> Result<Self, CheckpointError> {
        let parts = load_edge(&files.config, &files.weights, device)?;
        Ok(Self::from_parts(files.config.clone(), files.text.clone(), files.preprocess.clone(), parts, device))
    }

    /// What becomes of pictures before the vision tower.
    pub fn preprocess(&self) -> &Preprocess {
        &self.preprocess
    }

    /// Put together what was loaded onto `device`.
    pub fn from_parts(
        config: ModelConfig,
        text: TextCodec,
        preprocess: Preprocess,
        parts: EdgeParts,
        device: &Device,
    ) -> Self {
        let EdgeParts { vision, projector, token_table } = parts;
        Self { config, text, preprocess, vision, projector, token_table, device: device.clone() }
    }

    /// Image features of pictures, `P * D` values each.
    ///
    /// # Errors
    /// [`EdgeError`] for a picture that is not one, or a lost device.
    pub async fn image_features(&self, pictures: &[&Picture]) -> Result<Vec<Vec<f32>>, EdgeError> {
        let size = self.config.vision.image_size;
        let mut pixels = Vec::with_capacity(pictures.len() * 3 * size * size);
        for picture in pictures {
            pixels.extend(self.preprocess.pixels(picture)?);
        }
        let pixels = TensorData::new(pixels, [pictures.len(), 3, size, size]);
        let states = self.vision.forward(Tensor::from_data(pixels, &self.device)); // [B,P,vision D]
        let features = read(self.projector.forward(states)).await?; // [B,P,D]
        let each = features.data.len() / pictures.len().max(1);
        Ok(features.data.chunks(each.max(1)).map(<[f32]>::to_vec).collect())
    }

    /// Encode a data set once; `progress(done, all)` is called after each group of pictures.
    ///
    /// # Errors
    /// The first sample that cannot be used.
    pub async fn encode(
        &self,
        data: &Dataset,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<FeatureCache, EdgeError> {
        let mut samples = Vec::with_capacity(data.samples.len());
        for s in &data.samples {
            let encoded = match s.picture {
                Some(_) => self.text.encode(&s.question, Some(&s.answer))?,
                None => self.text.encode_text(&s.question, Some(&s.answer))?,
            };
            samples.push(CachedSample { picture: s.picture, encoded });
        }
        let mut pictures = Vec::with_capacity(data.pictures.len());
        for group in data.pictures.chunks(PICTURES_AT_ONCE) {
            pictures.extend(self.picture_features(&group.iter().collect::<Vec<_>>()).await?);
            progress(pictures.len(), data.pictures.len());
        }
        Ok(FeatureCache { pictures, samples })
    }

    /// Image features of pictures as a [`FeatureCache`] holds them, exact.
    ///
    /// # Errors
    /// As [`Self::image_features`], and features that are not finite.
    pub async fn picture_features(&self, pictures: &[&Picture]) -> Result<Vec<Arc<PictureFeatures>>, EdgeError> {
        let width = self.config.text.hidden;
        let pack = |values: Vec<f32>| -> Result<Arc<PictureFeatures>, EdgeError> {
            let packed = Coder::EXACT.pack(FEATURES, &values, width)?;
            Ok(Arc::new(PictureFeatures::new(packed, width)))
        };
        self.image_features(pictures).await?.into_iter().map(pack).collect()
    }

    /// Assemble `x` for some samples of a cache.
    ///
    /// # Errors
    /// Features of another model, or damaged ones; more of them than there is memory for.
    pub fn batch(&self, cache: &FeatureCache, rows: &[usize]) -> Result<Batch, EdgeError> {
        let width = self.config.text.hidden;
        let of = |sample: &CachedSample| sample.picture.map(|picture| cache.pictures[picture].clone());
        let pictures: Vec<Option<Arc<PictureFeatures>>> = rows.iter().map(|&r| of(&cache.samples[r])).collect();
        let encoded = rows.iter().map(|&r| &cache.samples[r].encoded);
        let mut batch = self.pack_rows(encoded, |row, out| {
            let picture = pictures.get(row).and_then(Option::as_ref);
            match picture.filter(|picture| picture.count() == out.len()) {
                Some(picture) => Ok(picture.values(width, out)?),
                None => Err(EdgeError::Features { found: picture.map_or(0, |p| p.count()), expected: out.len() }),
            }
        })?;
        for ((row, image), picture) in batch.rows.iter_mut().zip(&batch.positions.images).zip(pictures) {
            row.picture = picture.filter(|_| !image.is_empty());
        }
        Ok(batch)
    }

    /// Assemble `x` from tokens and image features (`P * D` values; none for a row without picture); targets are whatever follows
    /// each prompt. Its pictures are nobody's: such a batch is for decoding and comparisons, it cannot be sent in short.
    ///
    /// # Errors
    /// Features of another model.
    pub fn assemble(&self, rows: &[(&Encoded, &[f32])]) -> Result<Batch, EdgeError> {
        self.pack_rows(rows.iter().map(|(encoded, _)| *encoded), |row, out| {
            let features = rows.get(row).map(|(_, features)| *features).unwrap_or_default();
            if features.len() != out.len() {
                return Err(EdgeError::Features { found: features.len(), expected: out.len() });
            }
            out.copy_from_slice(features);
            Ok(())
        })
    }

    /// Rows one after the other; `features(row, out)` writes those of a row that has image tokens.
    fn pack_rows<'a>(
        &self,
        rows: impl Iterator<Item = &'a Encoded>,
        mut features: impl FnMut(usize, &mut [f32]) -> Result<(), EdgeError>,
    ) -> Result<Batch, EdgeError> {
        let (d, p) = (self.config.text.hidden, self.config.image_tokens());
        let rows: Vec<&Encoded> = rows.collect();
        let total: usize = rows.iter().map(|encoded| encoded.ids.len()).sum();
        let mut values = zeros(total.saturating_mul(d))?;
        let mut left = values.as_mut_slice();
        let (mut positions, mut targets, mut all) = (Positions::default(), Vec::new(), Vec::new());
        for (row, encoded) in rows.into_iter().enumerate() {
            let length = encoded.ids.len();
            let (x, rest) = std::mem::take(&mut left).split_at_mut(length * d); // [length, D]
            left = rest;
            // A run of image tokens that is cut off is none of this model's.
            let start = encoded.image_start.unwrap_or(length);
            let image = start..start.saturating_add(p).min(length);
            for (position, (&id, out)) in encoded.ids.iter().zip(x.chunks_exact_mut(d.max(1))).enumerate() {
                if !image.contains(&position) {
                    self.token_table.row_into(id as usize, out);
                }
            }
            if encoded.image_start.is_some() {
                match x.get_mut(image.start * d..image.end * d) {
                    Some(out) if image.len() == p => features(row, out)?,
                    _ => return Err(EdgeError::Features { found: image.len() * d, expected: p * d }),
                }
            }
            for position in encoded.prompt_length.max(1)..length {
                let token = encoded.ids[position];
                targets.push(Target { row: row as u32, position: position as u32 - 1, token });
            }
            positions.lengths.push(length as u32);
            positions.images.push(if image.is_empty() { 0..0 } else { image.start as u32..image.end as u32 });
            all.push(BatchRow { ids: encoded.ids.clone(), picture: None });
        }
        let x = TensorBlob { shape: vec![total, d], data: values };
        Ok(Batch { x: Arc::new(x), positions, targets, rows: all })
    }

    /// `x` of one generated token.
    pub fn assemble_token(&self, token: u32) -> Batch {
        let mut x = TensorBlob::zeros(&[1, self.config.text.hidden]);
        self.token_table.row_into(token as usize, &mut x.data);
        Batch {
            x: Arc::new(x),
            positions: Positions::plain(vec![1]),
            targets: Vec::new(),
            rows: vec![BatchRow { ids: vec![token], picture: None }],
        }
    }

    /// The form in which the token table came: the server embeds ids in the same one.
    pub fn table_form(&self) -> TableForm {
        match self.token_table.form() {
            "f16" => TableForm::F16,
            "int8" => TableForm::Int8,
            "int4" => TableForm::Int4,
            _ => TableForm::F32,
        }
    }

    /// Rows of the token table: how many ids can be embedded.
    pub fn vocabulary(&self) -> usize {
        self.token_table.rows()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converted_features_are_in_memory_once_and_of_the_same_origin() {
        let values: Vec<f32> = (0..8).map(|v| v as f32 / 7.0).collect();
        let exact = Arc::new(PictureFeatures::new(Coder::EXACT.pack(FEATURES, &values, 4).unwrap(), 4));
        let (first, origin) = (Arc::downgrade(&exact), exact.key);
        let mut cache = FeatureCache { pictures: vec![exact], samples: Vec::new() };
        assert_eq!(cache.pictures[0].origin, origin);
        let beside = cache.in_format(Format::Int8, 4).unwrap();
        assert!(first.upgrade().is_some());
        cache.convert(Format::Int8, 4).unwrap();
        assert!(first.upgrade().is_none(), "both forms are in memory");
        assert_eq!(cache.pictures, beside.pictures);
        let picture = &cache.pictures[0];
        assert_eq!((picture.packed.format, picture.origin, picture.count()), (Format::Int8, origin, 8));
        assert_ne!(picture.key, origin);
        // Once more, into a finer format.
        cache.convert(Format::F32, 4).unwrap();
        assert_eq!(cache.pictures[0].origin, origin);
        assert_ne!(cache.pictures[0].key, origin);
    }
}
