//! One fixed training step whose every result is kept: the same function runs on each device and in each place (native flex,
//! native wgpu, wasm flex, WebGPU; in-process, over the wire), and tests compare what comes out.

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
    /// `[pictures, P * D]`
    pub features: TensorBlob,
    /// `h`: `[B, S, D]`
    pub hidden: TensorBlob,
    /// Mean over targets, nats.
    pub loss: f32,
    /// For each row.
    pub row_loss: Vec<f32>,
    /// `g`: `[B, S, D]`
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

/// Run the step.
///
/// # Errors
/// [`ProbeError`].
pub async fn run<B: LlmBoundary>(
    edge: &NanoEdge,
    boundary: &mut B,
    device: &Device,
) -> Result<ProbeResult, ProbeError> {
    let cache = edge.encode(&samples(), |_, _| {}).await?;
    let state = adapters(8, edge.config.text.hidden);
    let adapters = NanoAdapters::from_state(&state, &device.clone().autodiff());
    let rows: Vec<usize> = (0..cache.samples.len()).collect();
    let batch = edge.batch(&cache, &rows);
    let hidden = step::adapted(Some(&adapters), &batch, device).await.map_err(StepError::from)?;
    let (reply, adapter_gradients) = step::gradients(&adapters, &batch, boundary, device).await?;
    let mut fisher = state.zeros_like();
    step::fisher_batch(&adapters, &batch, boundary, device, &mut fisher).await?;
    fisher.0.values_mut().flat_map(|b| &mut b.data).for_each(|v| *v /= rows.len() as f32);
    let width = cache.pictures.first().map_or(0, |features| features.len());
    let features = cache.pictures.iter().flat_map(|features| features.iter().copied()).collect();
    Ok(ProbeResult {
        features: TensorBlob { shape: vec![cache.pictures.len(), width], data: features },
        hidden,
        loss: reply.loss,
        row_loss: reply.row_loss,
        gradient: reply.gradient,
        adapter_gradients,
        fisher,
    })
}
