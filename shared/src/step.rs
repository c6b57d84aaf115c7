//! The training step, from features to gradient, in order of execution.
//!
//! ```text
//! x --NanoAdapters--> h --boundary--> frozen LLM --> loss                  (client, then server)
//! g = dL/dh --boundary--> sum(h * g) --backward--> clip --> optimiser      (server, then client)
//! ```
//!
//! The client's half comes first, the server's half below it, Fisher at the end.

use crate::edge::{Batch, FeatureCache, NanoEdge};
use crate::generate::GenerateRequest;
use crate::model::adapter::{DeviceError, NanoAdapters, read};
use crate::model::llama::{KvCache, Llama};
use crate::optimizer::AdapterOptimizer;
use crate::plain::{AdapterState, BoundaryReply, BoundaryRequest, EvaluationReply, RequestError, TensorBlob};
use burn::tensor::{DType, Device, Int, Tensor, TensorData, activation};

/// The place where `h` goes to the frozen LLM and `g` comes back: in-process, or over the wire.
#[allow(async_fn_in_trait)] // futures need not be Send: a tab has one thread, native clients block on theirs
pub trait LlmBoundary {
    /// Loss of a batch and its gradient at `h`.
    async fn train(&mut self, request: BoundaryRequest) -> Result<BoundaryReply, BoundaryError>;
    /// Likelihood of the targets and the model's own choice there; no gradient.
    async fn evaluate(&mut self, request: BoundaryRequest) -> Result<EvaluationReply, BoundaryError>;
}

/// Why the other side did not answer.
#[derive(Debug, thiserror::Error)]
pub enum BoundaryError {
    /// The request was refused; sending it again will not help.
    #[error("the server refused a batch: {0}")]
    Refused(String),
    /// The own side cannot send the request, or cannot read what came; sending it again will not help.
    #[error("{0}")]
    Failed(String),
    /// The connection or the server is gone; the step can be tried again.
    #[error("{0}")]
    Lost(String),
    /// The round ended or the participant was asked to stop while the step was under way.
    #[error("the step was cancelled: {0}")]
    Cancelled(String),
}

/// Why a step failed; the adapters are as they were before it.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The other side.
    #[error(transparent)]
    Boundary(#[from] BoundaryError),
    /// The own device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The reply does not fit the request.
    #[error("the server's reply does not fit the request: {0}")]
    Reply(String),
    /// Autodiff lost a parameter; training on would silently leave it at its start.
    #[error("{found} of {expected} adapter tensors got a gradient; this is a bug in the model code, please report it")]
    GradientCount {
        /// Gradients found.
        found: usize,
        /// Trained tensors.
        expected: usize,
    },
}

/// What a step does with its gradient.
pub struct StepRules<'a> {
    /// Of the optimiser.
    pub rate: f64,
    /// FedProx: `mu`, and the adapters that the round started from, without autodiff (Li et al. 2020, arXiv 1812.06127).
    pub prox: Option<(f64, &'a NanoAdapters)>,
    /// Longest gradient over all adapter tensors together; 0: any.
    pub clip_norm: f64,
    /// Give the squares of each sample's own gradients too.
    pub squares: bool,
}

/// What a step tells.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Mean loss over the batch's targets, nats.
    pub loss: f32,
    /// Samples in the batch.
    pub samples: usize,
    /// Sums over the samples of squared gradients, where asked for: of each sample's own mean loss, at the adapters before the
    /// step, and so neither clipped nor with FedProx's pull.
    pub squares: Option<AdapterState>,
}

// ---------------------------------------------------------------------------------------------- client

/// One optimiser step over a batch that goes through the boundary in parts, one request each: the step is that of the whole
/// batch, but for the order of its sums. On an error nothing is changed, so the step can be tried again.
///
/// # Errors
/// [`StepError`].
pub async fn train_step<B: LlmBoundary>(
    adapters: &mut NanoAdapters,
    optimizer: &mut AdapterOptimizer,
    rules: &StepRules<'_>,
    parts: &[Batch],
    boundary: &mut B,
    device: &Device,
) -> Result<StepReport, StepError> {
    let targets: usize = parts.iter().map(|part| part.targets.len()).sum();
    let mut gradients: Vec<Tensor<2>> = Vec::new(); // in the order of `NanoAdapters::named`
    let (mut loss, mut samples) = (0f64, 0);
    let mut squares = rules.squares.then(|| adapters.zeros());
    for part in parts {
        // The boundary's loss is a mean over the part's targets: in the mean over all it weighs as its share of them.
        let share = part.targets.len() as f64 / targets.max(1) as f64;
        let (h, reply) = forward_through_boundary(adapters, part, boundary, device).await?;
        let own = surrogate_gradients(adapters, h, &reply.gradient)?.into_iter().map(|g| g.mul_scalar(share));
        gradients = if gradients.is_empty() {
            own.collect()
        } else {
            gradients.into_iter().zip(own).map(|(sum, g)| sum + g).collect()
        };
        loss += share * f64::from(reply.loss);
        samples += part.lengths.len();
        if let Some(sums) = &mut squares {
            add_squares(adapters, part, reply.gradient, device, sums).await?;
        }
    }
    if let Some((mu, start)) = rules.prox {
        // The gradient of mu/2 |theta - theta_start|^2.
        let away = adapters.values().into_iter().zip(start.values()).map(|(theta, from)| theta - from);
        gradients = gradients.into_iter().zip(away).map(|(g, away)| g + away.mul_scalar(mu)).collect();
    }
    if rules.clip_norm > 0.0 {
        gradients = clipped(gradients, rules.clip_norm);
    }
    let mut gradients = gradients.into_iter();
    *adapters = adapters.with_values(|name, theta| match gradients.next() {
        Some(g) => optimizer.step(rules.rate, name, theta, g),
        None => theta, // there are no parts, or the count would have been wrong
    });
    Ok(StepReport { loss: loss as f32, samples, squares })
}

/// `x` through the adapters, `h` up, `g` down. Returns `h` on the autodiff graph and the checked reply.
async fn forward_through_boundary<B: LlmBoundary>(
    adapters: &NanoAdapters,
    batch: &Batch,
    boundary: &mut B,
    device: &Device,
) -> Result<(Tensor<3>, BoundaryReply), StepError> {
    let autodiff = device.clone().autodiff();
    let h = adapters.forward(tensor(&batch.x, &autodiff), tensor(&batch.image_mask, &autodiff)); // [B,S,D]
    let request = BoundaryRequest {
        hidden: read(h.clone().inner()).await?,
        lengths: batch.lengths.clone(),
        targets: batch.targets.clone(),
    };
    let reply = boundary.train(request).await?;
    reply.gradient.check("gradient", &batch.x.shape).map_err(|e| StepError::Reply(e.to_string()))?;
    if reply.row_loss.len() != batch.lengths.len() || !reply.loss.is_finite() {
        return Err(StepError::Reply(format!("loss {} for {} rows", reply.loss, reply.row_loss.len())));
    }
    Ok((h, reply))
}

/// Backward through the adapters only: the gradient of `sum(h * g)` with `g` constant is that of the loss. Off the autodiff
/// graph, in the order of [`NanoAdapters::named`].
fn surrogate_gradients(adapters: &NanoAdapters, h: Tensor<3>, g: &TensorBlob) -> Result<Vec<Tensor<2>>, StepError> {
    let expected = adapters.tensors();
    if !h.is_tracked() {
        return Err(StepError::GradientCount { found: 0, expected });
    }
    let g = tensor(g, &h.device());
    let mut all = (h * g).sum().backward();
    let found = adapters.named().into_iter().filter_map(|(_, param)| param.val().grad_remove(&mut all));
    let gradients: Vec<Tensor<2>> = found.collect();
    if gradients.len() != expected {
        return Err(StepError::GradientCount { found: gradients.len(), expected });
    }
    Ok(gradients)
}

/// Added to the norm, so that 0 can be divided by.
const NEARLY_ZERO: f64 = 1e-12;

/// All of them shortened by the same factor where their common Euclidean norm is above the limit (Pascanu et al. 2013,
/// arXiv 1211.5063). Stays on the device.
fn clipped(gradients: Vec<Tensor<2>>, limit: f64) -> Vec<Tensor<2>> {
    let squares = gradients.iter().map(|g| g.clone().square().sum()).reduce(|sum, s| sum + s); // [1]
    let Some(squares) = squares else {
        return gradients;
    };
    let factor = squares.sqrt().add_scalar(NEARLY_ZERO).recip().mul_scalar(limit).clamp_max(1.0);
    gradients.into_iter().map(|g| g.mul(factor.clone().unsqueeze::<2>())).collect()
}

/// Add the squares of each sample's own gradient to `sums`.
///
/// The boundary's loss is a mean over the batch's targets; row i of `g` times (targets in the batch / targets of sample i)
/// is the gradient of sample i's own loss, so one reply serves the whole batch.
async fn add_squares(
    adapters: &NanoAdapters,
    batch: &Batch,
    mut g: TensorBlob,
    device: &Device,
    sums: &mut AdapterState,
) -> Result<(), StepError> {
    let [rows, seq, dim] = batch.x.shape[..] else {
        return Err(StepError::Reply("the batch is misshapen".into()));
    };
    let mut counts = vec![0f32; rows];
    batch.targets.iter().for_each(|t| counts[t.row as usize] += 1.0);
    for (row, chunk) in g.data.chunks_exact_mut(seq * dim).enumerate() {
        let scale = batch.targets.len() as f32 / counts[row].max(1.0);
        chunk.iter_mut().for_each(|v| *v *= scale);
    }
    let (x, mask) = (tensor(&batch.x, device), tensor(&batch.image_mask, device));
    for (name, gradient) in adapters.per_sample_gradients(x, tensor(&g, device), mask) {
        let squares = read(gradient.powi_scalar(2).sum_dim(0)).await?; // [B,..] -> [1,..]
        if let Some(sum) = sums.0.get_mut(name) {
            sum.data.iter_mut().zip(&squares.data).for_each(|(s, v)| *s += v);
        }
    }
    Ok(())
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
    let (h, reply) = forward_through_boundary(adapters, batch, boundary, device).await?;
    let gradients = surrogate_gradients(adapters, h, &reply.gradient)?;
    let mut state = AdapterState::default();
    for ((name, _), gradient) in adapters.named().into_iter().zip(gradients) {
        state.0.insert(name.to_owned(), read(gradient).await?);
    }
    Ok((reply, state))
}

/// `h` of a batch for evaluation or decoding: adapters applied, nothing recorded.
///
/// # Errors
/// A lost device.
pub async fn adapted(
    adapters: Option<&NanoAdapters>,
    batch: &Batch,
    device: &Device,
) -> Result<TensorBlob, DeviceError> {
    let Some(adapters) = adapters else {
        return Ok(batch.x.clone());
    };
    let autodiff = device.clone().autodiff();
    read(adapters.forward(tensor(&batch.x, &autodiff), tensor(&batch.image_mask, &autodiff)).inner()).await
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
    let (mut correct, mut nll, mut tokens) = (0usize, 0f64, 0usize);
    // Rows of like length share a batch, so that little is padding.
    let mut rows = rows.to_vec();
    rows.sort_by_key(|&r| (cache.samples[r].encoded.ids.len(), r));
    for group in rows.chunks(batch_size.max(1)) {
        let batch = edge.batch(cache, group);
        let request = BoundaryRequest {
            hidden: adapted(adapters, &batch, device).await?,
            lengths: batch.lengths.clone(),
            targets: batch.targets.clone(),
        };
        let reply = boundary.evaluate(request).await?;
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

// ---------------------------------------------------------------------------------------------- server

/// f16 has no number below 6e-8, and gradients on their way back to `h` are often smaller. So with f16 weights the backward pass
/// begins at so many times the loss, and `g` is divided by it once it is f32 again: a power of two, which rounds nothing. Nothing is
/// trained here that could adapt the factor; it leaves room for gradients up to 64, and what overflows is refused as not finite.
const F16_LOSS_SCALE: f32 = 1024.0;

/// The frozen LLM: no weight of it ever requires a gradient; only its input does. `h`, `g`, logits and loss are f32 whatever the type
/// of the weights, in which its layers are computed.
pub struct FrozenLlm {
    llm: Llama,
    device: Device,
    dim: usize,
    vocab: usize,
    max_positions: usize,
}

impl FrozenLlm {
    /// `llm` must have been loaded on `device` with autodiff.
    pub fn new(llm: Llama, config: &crate::config::TextConfig, device: &Device) -> Self {
        Self {
            llm,
            device: device.clone(),
            dim: config.hidden,
            vocab: config.vocab,
            max_positions: config.max_positions,
        }
    }

    /// The check that every request passes before any tensor is made of it.
    ///
    /// # Errors
    /// [`RequestError`] names the fault.
    pub fn check(&self, request: &BoundaryRequest) -> Result<(), RequestError> {
        request.check(self.dim, self.vocab, self.max_positions)
    }

    /// Ids that a target may name: the width of the logits.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Several clients' batches in one forward and backward. Each loss is the mean over its own request's targets, so no
    /// request can see or move another's result; rows are given back where they came from.
    ///
    /// Requests must have passed [`Self::check`].
    ///
    /// # Errors
    /// A lost device.
    pub async fn train(&self, requests: &[&BoundaryRequest]) -> Result<Vec<BoundaryReply>, DeviceError> {
        let merged = Merged::new(requests, self.dim);
        let h: Tensor<3> = tensor(&merged.hidden, &self.device).require_grad(); // [B,S,D], the leaf
        let nll = self.nll(h.clone(), &merged).0; // [T]
        let scale = if self.llm.dtype() == DType::F16 { F16_LOSS_SCALE } else { 1.0 };
        let weights: Vec<f32> = merged.weights.iter().map(|w| w * scale).collect();
        let weights = TensorData::new(weights, [merged.weights.len()]);
        let loss = (nll.clone() * Tensor::from_data(weights, &self.device)).sum();
        let gradients = loss.backward();
        let Some(g) = h.grad(&gradients) else {
            return Err(DeviceError("the loss has no gradient at the boundary".into()));
        };
        let (mut g, nll) = (read(g).await?, read(nll.inner()).await?);
        g.data.iter_mut().for_each(|v| *v /= scale);
        Ok(merged.split(requests, &g, &nll.data))
    }

    /// Forward only.
    ///
    /// # Errors
    /// A lost device.
    pub async fn evaluate(&self, request: &BoundaryRequest) -> Result<EvaluationReply, DeviceError> {
        let merged = Merged::new(&[request], self.dim);
        if merged.positions.is_empty() {
            return Ok(EvaluationReply { nll: Vec::new(), predicted: Vec::new() });
        }
        let (nll, logits) = self.nll(tensor(&merged.hidden, &self.device), &merged);
        let best = logits.inner().argmax(1).into_data_async().await.map_err(|e| DeviceError(e.to_string()))?;
        let predicted = best.convert::<i64>().try_into_vec::<i64>().map_err(|e| DeviceError(format!("{e:?}")))?;
        Ok(EvaluationReply {
            nll: read(nll.inner()).await?.data,
            predicted: predicted.into_iter().map(|id| id as u32).collect(),
        })
    }

    /// The check that every [`GenerateRequest`] passes.
    ///
    /// # Errors
    /// [`RequestError`] names the fault.
    pub fn check_generation(&self, request: &GenerateRequest) -> Result<(), RequestError> {
        request.check(self.dim, self.max_positions)
    }

    /// A cache without positions.
    pub fn new_cache(&self) -> KvCache {
        self.llm.new_cache()
    }

    /// Logits `[V]` of what follows new positions `[1, S, D]` behind those in the cache.
    ///
    /// # Errors
    /// A lost device.
    pub async fn next_logits(&self, cache: &mut KvCache, hidden: &TensorBlob) -> Result<Vec<f32>, DeviceError> {
        let new = hidden.shape[1];
        let states = self.llm.forward_cached(tensor(hidden, &self.device), cache); // [1,S,D]
        let last = states.narrow(1, new - 1, 1).reshape([1, self.dim]);
        Ok(read(self.llm.logits(last).inner()).await?.data)
    }

    /// Negative log-likelihood `[T]` of all targets, and their logits `[T, V]`: other positions never meet the head.
    fn nll(&self, h: Tensor<3>, merged: &Merged) -> (Tensor<1>, Tensor<2>) {
        let [b, s, d] = h.dims();
        let count = merged.positions.len();
        let index =
            |values: &[i64]| Tensor::<1, Int>::from_data(TensorData::new(values.to_vec(), [count]), &self.device);
        let hidden = self.llm.forward(h, &self.llm.causal_layout(s, &self.device)); // [B,S,D]
        let hidden = hidden.reshape([b * s, d]).select(0, index(&merged.positions)); // [T,D]
        let logits = self.llm.logits(hidden); // [T,V]
        let tokens = index(&merged.tokens).reshape([count, 1]);
        let nll = activation::log_softmax(logits.clone(), 1).gather(1, tokens).reshape([count]).neg();
        (nll, logits)
    }
}

/// Requests side by side, padded to one length.
struct Merged {
    hidden: TensorBlob,
    positions: Vec<i64>, // [T], into B*S
    tokens: Vec<i64>,    // [T]
    weights: Vec<f32>,   // [T], 1 / targets of the own request
}

impl Merged {
    fn new(requests: &[&BoundaryRequest], dim: usize) -> Self {
        let seq = requests.iter().map(|r| r.hidden.shape[1]).max().unwrap_or(0);
        let rows: usize = requests.iter().map(|r| r.hidden.shape[0]).sum();
        let mut hidden = Vec::with_capacity(rows * seq * dim);
        let (mut positions, mut tokens, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        let mut first_row = 0;
        for request in requests {
            for row in request.hidden.data.chunks_exact(request.hidden.shape[1] * dim) {
                hidden.extend_from_slice(row);
                hidden.resize(hidden.len() + seq * dim - row.len(), 0.0);
            }
            for t in &request.targets {
                positions.push(((first_row + t.row as usize) * seq + t.position as usize) as i64);
                tokens.push(i64::from(t.token));
                weights.push(1.0 / request.targets.len() as f32);
            }
            first_row += request.hidden.shape[0];
        }
        Self { hidden: TensorBlob { shape: vec![rows, seq, dim], data: hidden }, positions, tokens, weights }
    }

    fn split(&self, requests: &[&BoundaryRequest], g: &TensorBlob, nll: &[f32]) -> Vec<BoundaryReply> {
        let (seq, dim) = (self.hidden.shape[1], self.hidden.shape[2]);
        let (mut row, mut target) = (0, 0);
        let mut replies = Vec::with_capacity(requests.len());
        for request in requests {
            let own = &request.hidden.shape;
            let rows = g.data[row * seq * dim..(row + own[0]) * seq * dim].chunks_exact(seq * dim);
            let data = rows.flat_map(|r| &r[..own[1] * dim]).copied().collect();
            let own_nll = &nll[target..target + request.targets.len()];
            let mut row_loss = vec![0f32; own[0]];
            let counts = request.target_counts();
            for (t, value) in request.targets.iter().zip(own_nll) {
                row_loss[t.row as usize] += value / counts[t.row as usize] as f32;
            }
            replies.push(BoundaryReply {
                loss: own_nll.iter().sum::<f32>() / own_nll.len().max(1) as f32,
                row_loss,
                gradient: TensorBlob { shape: own.clone(), data },
            });
            row += own[0];
            target += request.targets.len();
        }
        replies
    }
}

/// The boundary without a wire: tests, simulation, the server's own evaluation.
pub struct InProcess<'a>(pub &'a FrozenLlm);

impl LlmBoundary for InProcess<'_> {
    async fn train(&mut self, request: BoundaryRequest) -> Result<BoundaryReply, BoundaryError> {
        self.0.check(&request).map_err(|e| BoundaryError::Refused(e.to_string()))?;
        let mut replies = self.0.train(&[&request]).await.map_err(|e| BoundaryError::Lost(e.to_string()))?;
        replies.pop().ok_or_else(|| BoundaryError::Lost("no reply".into()))
    }

    async fn evaluate(&mut self, request: BoundaryRequest) -> Result<EvaluationReply, BoundaryError> {
        self.0.check(&request).map_err(|e| BoundaryError::Refused(e.to_string()))?;
        self.0.evaluate(&request).await.map_err(|e| BoundaryError::Lost(e.to_string()))
    }
}

// ---------------------------------------------------------------------------------------------- Fisher

/// Diagonal empirical Fisher of the adapters: mean over samples of squared per-sample gradients (FedNano, arXiv 2506.14824).
/// Adds a batch's squares to `sums`, which must have the adapters' names and shapes.
///
/// # Errors
/// [`StepError`].
pub async fn fisher_batch<B: LlmBoundary>(
    adapters: &NanoAdapters,
    batch: &Batch,
    boundary: &mut B,
    device: &Device,
    sums: &mut AdapterState,
) -> Result<(), StepError> {
    let (_, reply) = forward_through_boundary(adapters, batch, boundary, device).await?;
    add_squares(adapters, batch, reply.gradient, device, sums).await
}

fn tensor<const N: usize>(blob: &TensorBlob, device: &Device) -> Tensor<N> {
    Tensor::from_data(TensorData::new(blob.data.clone(), blob.shape.clone()), device)
}
