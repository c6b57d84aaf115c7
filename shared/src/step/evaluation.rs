//! Without a step: embeddings for decoding, held-out quality, Fisher values, gradients alone.

use super::{Answers, Begun, LlmBoundary, StepError, WINDOW, begin_step, make_request, tensor, up_matrices};
use crate::boundary::{BoundaryReply, Want};
use crate::edge::{Batch, EdgeError, FeatureCache, NanoEdge};
use crate::model::adapter::{DeviceError, NanoAdapters, read, read_all};
use crate::plain::{AdapterState, TensorBlob};
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

/// Diagonal empirical Fisher of the adapters: mean over samples of squared per-sample gradients (FedNano, arXiv 2506.14824).
/// Adds the squares of several requests, which go through the boundary as the parts of a step do, to `sums`, which must have the
/// adapters' names and shapes. On an error nothing is added.
///
/// # Errors
/// [`StepError`].
pub async fn fisher_group<B: LlmBoundary>(
    adapters: &NanoAdapters,
    parts: &[Batch],
    boundary: &mut B,
    device: &Device,
    sums: &mut AdapterState,
) -> Result<(), StepError> {
    fisher_parts(adapters, parts.iter().cloned().map(Ok), boundary, device, sums).await
}

/// [`fisher_group`] of batches that are made when it is their turn: the features of a whole group may be gigabytes.
///
/// # Errors
/// [`StepError`], with [`StepError::Samples`] for a batch that cannot be made.
pub async fn fisher_parts<B: LlmBoundary>(
    adapters: &NanoAdapters,
    mut parts: impl ExactSizeIterator<Item = Result<Batch, EdgeError>>,
    boundary: &mut B,
    device: &Device,
    sums: &mut AdapterState,
) -> Result<(), StepError> {
    let mut begun = Begun::new(adapters, parts.len(), Want::Squares, boundary).await?;
    let mut all = Answers::default();
    begun.make(&mut parts, boundary, device).await?;
    while let Some((part, reply)) = begun.answer(boundary, device).await? {
        let backward = info_span!(target: "fednano::step", "backward");
        if boundary.window() > 1 {
            begun.make(&mut parts, boundary, device).await?; // as in a step: before the backward pass of this one
        }
        backward.in_scope(|| begun.backward(&part, reply, device, &mut all))?;
        begun.make(&mut parts, boundary, device).await?;
    }
    begun.complete(&mut all, device)?;
    Ok(all.squares.add_to(sums).await?)
}

impl Begun {
    /// Make and send batches until the window is full.
    async fn make<B: LlmBoundary>(
        &mut self,
        parts: &mut impl Iterator<Item = Result<Batch, EdgeError>>,
        boundary: &mut B,
        device: &Device,
    ) -> Result<(), StepError> {
        while self.under_way.len() < boundary.window().clamp(1, WINDOW) {
            let Some(batch) = parts.next() else { break };
            self.unsent.push_back(batch?);
            self.send(boundary, device).await?;
        }
        Ok(())
    }
}

/// Loss and adapter gradients of a batch without a step, as plain data (tests, comparisons between devices).
///
/// # Errors
/// [`StepError`].
pub async fn gradients<B: LlmBoundary>(
    adapters: &NanoAdapters,
    batch: &Batch,
    boundary: &mut B,
    device: &Device,
) -> Result<(BoundaryReply, AdapterState), StepError> {
    let mut begun = begin_step(adapters, std::slice::from_ref(batch), Want::Gradient, boundary, device).await?;
    let Some((part, reply)) = begun.answer(boundary, device).await? else {
        return Err(StepError::Reply("nothing was asked".into()));
    };
    let mut all = Answers::default();
    begun.backward(&part, reply.clone(), device, &mut all)?;
    begun.complete(&mut all, device)?;
    let all = read_all(all.gradients.in_order(adapters)?).await?;
    let names = adapters.named().into_iter().map(|(name, _)| name.to_owned());
    Ok((reply, AdapterState(names.zip(all).collect())))
}
