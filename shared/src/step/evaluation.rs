//! Without a step: embeddings for decoding, and held-out quality.

use super::{LlmBoundary, StepError, make_request, tensor, up_matrices};
use crate::boundary::Want;
use crate::edge::{Batch, FeatureCache, NanoEdge};
use crate::model::adapter::{DeviceError, NanoAdapters, read};
use crate::plain::TensorBlob;
use burn::tensor::Device;
use tracing::{Instrument, info_span};

/// `h` of a batch for decoding, `[T, D]`: adapters applied, nothing kept. `device` has no autodiff.
///
/// # Errors
/// A lost device.
pub async fn adapted(
    adapters: Option<&NanoAdapters>,
    batch: &Batch,
    device: &Device,
) -> Result<TensorBlob, DeviceError> {
    let Some(adapters) = adapters else {
        return Ok((*batch.x).clone());
    };
    let x = tensor((*batch.x).clone(), device);
    read(adapters.hidden(&x, &adapters.encode(&x, &batch.positions))).await
}

/// Held-out quality.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct Evaluation {
    /// Share of samples for which greedy decoding begins with the whole answer (argmax over the whole vocabulary at each
    /// answer token; what follows is not looked at).
    pub accuracy: f64,
    /// Mean loss over all targets, nats.
    pub loss: f64,
    /// Samples counted.
    pub samples: usize,
}

/// Evaluate adapters (none: the untouched model) on cached samples.
///
/// # Errors
/// [`StepError`].
pub async fn evaluate<B: LlmBoundary>(
    edge: &NanoEdge,
    adapters: Option<&NanoAdapters>,
    cache: &FeatureCache,
    rows: &[usize],
    batch_size: usize,
    boundary: &mut B,
    device: &Device,
) -> Result<Evaluation, StepError> {
    let untouched = NanoAdapters::identity();
    let (adapters, mode) = (adapters.unwrap_or(&untouched), boundary.mode());
    let up = up_matrices(adapters, mode).await?;
    let (mut correct, mut nll, mut tokens) = (0usize, 0f64, 0usize);
    // Rows of like length share a batch: attention works on one length.
    let mut rows = rows.to_vec();
    rows.sort_by_key(|&r| (cache.samples[r].encoded.ids.len(), r));
    for group in rows.chunks(batch_size.max(1)) {
        let batch = edge.batch(cache, group)?;
        let made = make_request(adapters, &up, &batch, Want::Gradient, mode, device);
        let (_, request) = made.instrument(info_span!(target: "fednano::step", "codes")).await?;
        let reply = boundary.evaluate(request, &batch);
        let reply = reply.instrument(info_span!(target: "fednano::step", "wait")).await?;
        if reply.predicted.len() != batch.targets.len() || reply.nll.len() != batch.targets.len() {
            return Err(StepError::Reply(format!(
                "{} predictions for {} targets",
                reply.predicted.len(),
                batch.targets.len()
            )));
        }
        let mut right = vec![true; group.len()];
        for (target, predicted) in batch.targets.iter().zip(&reply.predicted) {
            // The end mark is not part of the answer.
            right[target.row as usize] &= target.token == *predicted || target.token == edge.text.eos();
        }
        correct += right.iter().filter(|r| **r).count();
        nll += reply.nll.iter().map(|v| f64::from(*v)).sum::<f64>();
        tokens += reply.nll.len();
    }
    Ok(Evaluation {
        accuracy: correct as f64 / rows.len().max(1) as f64,
        loss: nll / tokens.max(1) as f64,
        samples: rows.len(),
    })
}
