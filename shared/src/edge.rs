//! NanoEdge: what a client holds. Frozen encoders and connector here; the trainable [`NanoAdapters`] are passed to the step.
//!
//! [`NanoAdapters`]: crate::model::adapter::NanoAdapters

use crate::bundle::table::TokenTable;
use crate::config::ModelConfig;
use crate::data::dataset::Dataset;
use crate::data::picture::{Picture, PictureError, Preprocess};
use crate::data::text::{Encoded, TextCodec, TextError};
use crate::model::adapter::{DeviceError, read};
use crate::model::checkpoint::{CheckpointError, EdgeParts, load_edge};
use crate::model::{clip::VisionTower, files::ModelFiles, projector::Projector};
use crate::plain::{Target, TensorBlob};
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
}

/// A data set with frozen features, computed once.
pub struct FeatureCache {
    /// Image features of each picture, `P * D` values; caches of several participants in one process may share them.
    pub pictures: Vec<Arc<[f32]>>,
    /// Tokenized samples.
    pub samples: Vec<CachedSample>,
}

/// One sample: which picture, which tokens.
pub struct CachedSample {
    /// Index into [`FeatureCache::pictures`]; none: text alone.
    pub picture: Option<usize>,
    /// Its tokens.
    pub encoded: Encoded,
}

/// Features of a batch, ready for the adapters; all on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// `x`: `[B, S, D]`, right-padded with zeros.
    pub x: TensorBlob,
    /// `[B, S, 1]`, 1 at image positions; rows of text alone have none.
    pub image_mask: TensorBlob,
    /// Real length of each row.
    pub lengths: Vec<u32>,
    /// Answer tokens (with `</s>`) of all rows.
    pub targets: Vec<Target>,
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
            let features = self.image_features(&group.iter().collect::<Vec<_>>()).await?;
            pictures.extend(features.into_iter().map(Arc::from));
            progress(pictures.len(), data.pictures.len());
        }
        Ok(FeatureCache { pictures, samples })
    }

    /// Assemble `x` for some samples.
    pub fn batch(&self, cache: &FeatureCache, rows: &[usize]) -> Batch {
        let rows: Vec<(&Encoded, &[f32])> = rows
            .iter()
            .map(|&r| {
                let s = &cache.samples[r];
                (&s.encoded, s.picture.map(|p| &*cache.pictures[p]).unwrap_or_default())
            })
            .collect();
        self.assemble(&rows)
    }

    /// Assemble `x` from tokens and image features (`P * D` values; none for a row without picture); targets are whatever follows
    /// each prompt.
    pub fn assemble(&self, rows: &[(&Encoded, &[f32])]) -> Batch {
        let (d, p) = (self.config.text.hidden, self.config.image_tokens());
        let seq = rows.iter().map(|(e, _)| e.ids.len()).max().unwrap_or(0);
        let mut x = TensorBlob::zeros(&[rows.len(), seq, d]);
        let mut image_mask = TensorBlob::zeros(&[rows.len(), seq, 1]);
        let mut targets = Vec::new();
        for (row, (encoded, features)) in rows.iter().enumerate() {
            for (position, &id) in encoded.ids.iter().enumerate() {
                let at = (row * seq + position) * d;
                self.token_table.row_into(id as usize, &mut x.data[at..at + d]);
            }
            if let Some(image_start) = encoded.image_start {
                let start = row * seq + image_start;
                x.data[start * d..(start + p) * d].copy_from_slice(features);
                image_mask.data[start..start + p].fill(1.0);
            }
            for position in encoded.prompt_length..encoded.ids.len() {
                let token = encoded.ids[position];
                targets.push(Target { row: row as u32, position: position as u32 - 1, token });
            }
        }
        let lengths = rows.iter().map(|(e, _)| e.ids.len() as u32).collect();
        Batch { x, image_mask, lengths, targets }
    }

    /// `x` of one generated token.
    pub fn assemble_token(&self, token: u32) -> Batch {
        let mut x = TensorBlob::zeros(&[1, 1, self.config.text.hidden]);
        self.token_table.row_into(token as usize, &mut x.data);
        Batch { x, image_mask: TensorBlob::zeros(&[1, 1, 1]), lengths: vec![1], targets: Vec::new() }
    }

    /// Rows of the token table: how many ids can be embedded.
    pub fn vocabulary(&self) -> usize {
        self.token_table.rows()
    }
}
