//! One fixed training step whose every result is kept: the same function runs on each device and in each place (native flex,
//! native wgpu, wasm flex, WebGPU; in-process, over the wire), and tests compare what comes out.

use crate::boundary::Gradient;
use crate::data::dataset::{Dataset, Sample};
use crate::data::scene::{DemoTheme, demo_shard};
use crate::edge::{EdgeError, NanoEdge};
use crate::model::adapter::{NanoAdapters, standard_normal};
use crate::plain::{AdapterState, TensorBlob};
use crate::settings::AdapterChoice;
use crate::step::{self, LlmBoundary, StepError};
use burn::tensor::Device;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Everything that the step computes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProbeResult {
    /// `[pictures, P * D]`, in the boundary's format.
    pub features: TensorBlob,
    /// `h`: `[T, D]`
    pub hidden: TensorBlob,
    /// Mean over targets, nats.
    pub loss: f32,
    /// For each row.
    pub row_loss: Vec<f32>,
    /// `g`: `[T, D]`; in mode `low-rank` `u`: `[T, R]`, image positions first.
    pub gradient: TensorBlob,
    /// Of the adapters.
    pub adapter_gradients: AdapterState,
    /// Diagonal Fisher of the batch.
    pub fisher: AdapterState,
}

/// Why the probe failed.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Encoding.
    #[error(transparent)]
    Edge(#[from] EdgeError),
    /// The step.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// The probe's samples: a few of a demo shard, of different lengths.
pub fn samples() -> Dataset {
    shard(DemoTheme::Garden, 11, 2, 2)
}

/// A generated demo shard as a data set.
pub fn shard(theme: DemoTheme, seed: u64, pictures: usize, questions: usize) -> Dataset {
    let mut data = Dataset::default();
    for (picture, asked) in demo_shard(theme, seed, pictures, questions) {
        for qa in asked {
            let picture = Some(data.pictures.len());
            data.samples.push(Sample { picture, question: qa.question, answer: qa.answer });
        }
        data.pictures.push(picture);
    }
    data
}

/// Both adapters, with `up` away from 0, so that every gradient is.
pub fn adapters(rank: usize, dim: usize) -> AdapterState {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut state = NanoAdapters::initial(AdapterChoice::Both, rank, dim, &mut rng);
    for (name, blob) in &mut state.0 {
        if name.ends_with("up") {
            blob.data.iter_mut().for_each(|v| *v = 0.2 * standard_normal(&mut rng));
        }
    }
    state
}

/// Rank of [`run`]'s adapters; a federation of a lower one takes no such requests.
pub const RANK: usize = 8;

/// Run the step.
///
/// # Errors
/// [`ProbeError`].
pub async fn run<B: LlmBoundary>(
    edge: &NanoEdge,
    boundary: &mut B,
    device: &Device,
) -> Result<ProbeResult, ProbeError> {
    let width = edge.config.text.hidden;
    let exact = edge.encode(&samples(), |_, _| {}).await?;
    let cache = exact.in_format(boundary.features(), width).map_err(EdgeError::from)?;
    let state = adapters(RANK, width);
    let adapters = NanoAdapters::from_state(&state, device);
    let rows: Vec<usize> = (0..cache.samples.len()).collect();
    let batch = edge.batch(&cache, &rows)?;
    let hidden = step::adapted(Some(&adapters), &batch, device).await.map_err(StepError::from)?;
    let (reply, adapter_gradients) = step::gradients(&adapters, &batch, boundary, device).await?;
    let mut fisher = state.zeros_like();
    step::fisher_group(&adapters, std::slice::from_ref(&batch), boundary, device, &mut fisher).await?;
    fisher.0.values_mut().flat_map(|b| &mut b.data).for_each(|v| *v /= rows.len() as f32);
    let each = cache.pictures.first().map_or(0, |picture| picture.count());
    let mut features = TensorBlob::zeros(&[cache.pictures.len(), each]);
    for (picture, out) in cache.pictures.iter().zip(features.data.chunks_mut(each.max(1))) {
        picture.values(width, out).map_err(EdgeError::from)?;
    }
    Ok(ProbeResult {
        features,
        hidden,
        loss: reply.loss,
        row_loss: reply.row_loss,
        gradient: one_below_the_other(reply.gradient),
        adapter_gradients,
        fisher,
    })
}

fn one_below_the_other(gradient: Gradient) -> TensorBlob {
    match gradient {
        Gradient::Hidden(g) => g,
        Gradient::Codes(codes) => {
            let width = codes.codes.iter().find_map(|(_, u)| u.shape.get(1).copied()).unwrap_or(1);
            let data: Vec<f32> = codes.codes.iter().flat_map(|(_, u)| u.data.iter().copied()).collect();
            TensorBlob { shape: vec![data.len() / width.max(1), width], data }
        }
    }
}
