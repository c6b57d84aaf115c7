//! The training step, from features to gradient, in order of execution.
//!
//! ```text
//! client   a = x downT, z = gelu(a)
//!   mode activations   h = x + z upT                    h goes up
//!   mode low-rank      (x went up once)                 z and up go up
//! server   low-rank    h = x + z upT
//!          loss = mean over targets of -log p(target | h),  g = dL/dh
//!   mode activations                                    g comes down
//!   mode low-rank      u = g up,  d_up = gT z           u and d_up come down
//! client   activations u = g up,  d_up = gT z
//!          d_down = (u * gelu'(a))T x  -->  clip --> optimiser
//! ```
//!
//! Rows of a batch are packed, without padding: T positions, of which each adapter has its own (see `boundary`). Everything above is
//! one matrix product a line, so the client needs no autodiff; the server needs it for `g` alone. Both modes are the same
//! mathematics: they differ in who computes `u` and `d_up`, and so in what travels.
//!
//! A step's batch may go through the boundary in parts, one request each; these are a *group*. Where the boundary has a window,
//! the next part's codes are computed and sent while the server works on the one before. [`begin_step`] and [`finish_step`] are
//! the two halves of a step, so that one can be begun before the other is finished.
//!
//! The client's half is this file: the step first, then the way up and the way down. The server's half is `server.rs`, what needs
//! no step `evaluation.rs`.

mod evaluation;
mod server;
mod sums;

pub use evaluation::{Evaluation, adapted, evaluate, fisher_group, fisher_parts, gradients};
pub use server::{FrozenLlm, InProcess};

use crate::boundary::{
    BoundaryReply, BoundaryRequest, CodesGradient, CodesInput, EvaluationReply, Gradient, Input, Pair, Part, Place,
    Want,
};
use crate::edge::{Batch, EdgeError};
use crate::model::adapter::{DeviceError, Encoded, NanoAdapters, read, read_all};
use crate::optimizer::AdapterOptimizer;
use crate::plain::{AdapterState, TensorBlob};
use crate::settings::Format;
use crate::wire::agreement::BoundaryMode;
use burn::tensor::{Device, Tensor, TensorData};
use std::collections::VecDeque;
use std::sync::Arc;
use sums::{Sums, squares};
use tracing::{Instrument, info_span};

/// Requests that may be unanswered at most, over any boundary: one that is worked on, and one that waits its turn.
pub const WINDOW: usize = 2;

/// The place where the batch goes to the frozen LLM and its gradient comes back: in-process, or over the wire.
#[allow(async_fn_in_trait)] // futures need not be Send: a tab has one thread, native clients block on theirs
pub trait LlmBoundary {
    /// How this boundary wants its input.
    fn mode(&self) -> BoundaryMode;
    /// The format that features of pictures must have in batches whose `x` is sent in short
    /// ([`FeatureCache::in_format`](crate::edge::FeatureCache::in_format)).
    fn features(&self) -> Format {
        Format::F32
    }
    /// Hand over one request of a group; it may be answered later. `batch` is what it was made of. At most [`Self::window`] may be
    /// unanswered. After an error, here or in [`Self::reply`], none of them is answered any more.
    async fn send(&mut self, request: BoundaryRequest, batch: &Batch, place: Place) -> Result<(), BoundaryError>;
    /// The answer to the oldest unanswered request: its loss and its gradient. In mode `low-rank` the gradients at `up`, and their
    /// squares, are sums over the group and come with one of its answers.
    async fn reply(&mut self) -> Result<BoundaryReply, BoundaryError>;
    /// Likelihood of the targets and the model's own choice there; no gradient.
    async fn evaluate(&mut self, request: BoundaryRequest, batch: &Batch) -> Result<EvaluationReply, BoundaryError>;
    /// Unanswered requests that may be under way, at most [`WINDOW`]. 1: the next one is made and sent after the answer.
    fn window(&self) -> usize {
        1
    }
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
    /// The samples.
    #[error(transparent)]
    Samples(#[from] EdgeError),
    /// The reply does not fit the request.
    #[error("the server's reply does not fit the request: {0}; use a client and a server of one version")]
    Reply(String),
    /// Training diverged.
    #[error("the loss is {0}; training has diverged, begin again with a lower learning_rate")]
    Loss(f32),
    /// A parameter was lost; training on would silently leave it at its start.
    #[error(
        "{found} of {expected} adapter tensors got a gradient; this is a bug in the training step, please report it"
    )]
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
    /// FedProx: `mu`, and the adapters that the round started from (Li et al. 2020, arXiv 1812.06127).
    pub prox: Option<(f64, &'a NanoAdapters)>,
    /// Longest gradient over all adapter tensors together; 0: any.
    pub clip_norm: f64,
}

/// What a step tells.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Mean loss over the batch's targets, nats.
    pub loss: f32,
    /// Samples in the batch.
    pub samples: usize,
    /// Sums over the samples of squared gradients, where asked for: of each sample's own mean loss, at the adapters that the step
    /// was begun with, and so neither clipped nor with FedProx's pull.
    pub squares: Option<AdapterState>,
}

// ---------------------------------------------------------------------------------------------- the step

/// One optimiser step over a batch that goes through the boundary in parts, one request each: the step is that of the whole
/// batch, but for the order of its sums. On an error nothing is changed, so the step can be tried again. `device` has no autodiff.
///
/// # Errors
/// [`StepError`].
pub async fn train_step<B: LlmBoundary>(
    adapters: &mut NanoAdapters,
    optimizer: &mut AdapterOptimizer,
    rules: &StepRules<'_>,
    (parts, want): (&[Batch], Want),
    boundary: &mut B,
    device: &Device,
) -> Result<StepReport, StepError> {
    let begun = begin_step(adapters, parts, want, boundary, device).await?;
    finish_step(begun, adapters, optimizer, rules, boundary, device).await
}

/// The first half of a step: the parts are on their way, as many as the boundary's window allows. The rest is kept, together with
/// the adapters of this moment, for [`finish_step`].
///
/// Answers come in the order of requests, so steps are finished in the order in which they were begun; and while one is under way,
/// another may be begun only if that one [has sent everything](Begun::all_sent) and both together fit into [`WINDOW`].
///
/// # Errors
/// [`StepError`].
pub async fn begin_step<B: LlmBoundary>(
    adapters: &NanoAdapters,
    parts: &[Batch],
    want: Want,
    boundary: &mut B,
    device: &Device,
) -> Result<Begun, StepError> {
    let mut begun = Begun::new(adapters, parts.len(), want, boundary).await?;
    begun.targets = parts.iter().map(|part| part.targets.len()).sum();
    begun.unsent = parts.iter().cloned().collect();
    begun.send(boundary, device).await?;
    Ok(begun)
}

/// The second half: the answers, the gradient, the optimiser. `adapters` may have gone on since the step was begun; the gradient is
/// that at the adapters which it was begun with, and is applied to these.
///
/// # Errors
/// [`StepError`].
pub async fn finish_step<B: LlmBoundary>(
    begun: Begun,
    adapters: &mut NanoAdapters,
    optimizer: &mut AdapterOptimizer,
    rules: &StepRules<'_>,
    boundary: &mut B,
    device: &Device,
) -> Result<StepReport, StepError> {
    let squares = begun.want.squares().then(|| adapters.zeros());
    if begun.of == 0 {
        return Ok(StepReport { loss: 0.0, samples: 0, squares });
    }
    // 1. From answers to gradients, part by part.
    let Answers { loss, samples, gradients, squares: found } = begun.answers(boundary, device).await?;
    // 2. All tensors, or none.
    let mut gradients = gradients.in_order(adapters)?;
    let squares = match squares {
        Some(mut sums) => {
            found.add_to(&mut sums).await?;
            Some(sums)
        }
        None => None,
    };
    // 3. The pull towards the start, the gradient of mu/2 |theta - theta_start|^2; then the limit.
    info_span!(target: "fednano::step", "optimiser").in_scope(|| {
        if let Some((mu, start)) = rules.prox {
            let away = adapters.values().into_iter().zip(start.values()).map(|(theta, from)| theta - from);
            gradients = gradients.drain(..).zip(away).map(|(g, away)| g + away.mul_scalar(mu)).collect();
        }
        if rules.clip_norm > 0.0 {
            gradients = clipped(std::mem::take(&mut gradients), rules.clip_norm);
        }
        // 4. The optimiser.
        let mut gradients = gradients.drain(..);
        *adapters = adapters.with_values(|name, theta| match gradients.next() {
            Some(g) => optimizer.step(rules.rate, name, theta, g),
            None => theta, // they have been counted
        });
    });
    Ok(StepReport { loss: loss as f32, samples, squares })
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

// ---------------------------------------------------------------------------------------------- upward

/// A step that is under way: what its answers need.
pub struct Begun {
    /// At which the gradient is taken.
    adapters: NanoAdapters,
    up: Arc<Pair<TensorBlob>>,
    mode: BoundaryMode,
    want: Want,
    /// Requests in all, and those sent.
    of: u16,
    sent: u16,
    /// Of all parts together; 0: not known, and of no matter to squares.
    targets: usize,
    unsent: VecDeque<Batch>,
    /// Unanswered, oldest first.
    under_way: VecDeque<UnderWay>,
    /// Adapters that had a position in some part: image, text.
    touched: [bool; 2],
}

/// A part whose answer is awaited.
struct UnderWay {
    encoded: Encoded,
    /// Of `x`: `[T, D]`.
    shape: Vec<usize>,
    /// Of each row: the part's targets over its own, by which a row of the gradient becomes that of the row's own mean loss.
    scales: Vec<f64>,
    /// The part's targets over those of all parts: what its mean loss weighs in the mean over all.
    share: f64,
}

impl Begun {
    /// A group of so many parts, of which none is here yet.
    async fn new<B: LlmBoundary>(
        adapters: &NanoAdapters,
        parts: usize,
        want: Want,
        boundary: &B,
    ) -> Result<Self, StepError> {
        let of = u16::try_from(parts).map_err(|_| {
            BoundaryError::Failed(format!("a step of {parts} requests; raise micro_batch, or lower batch_size"))
        })?;
        let mode = boundary.mode();
        Ok(Self {
            adapters: adapters.clone(),
            up: up_matrices(adapters, mode).await?,
            mode,
            want,
            of,
            sent: 0,
            targets: 0,
            unsent: VecDeque::new(),
            under_way: VecDeque::new(),
            touched: [false; 2],
        })
    }

    /// Every request is on its way.
    pub fn all_sent(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Make and send requests until the window is full.
    async fn send<B: LlmBoundary>(&mut self, boundary: &mut B, device: &Device) -> Result<(), StepError> {
        while self.under_way.len() < boundary.window().clamp(1, WINDOW) {
            let Some(batch) = self.unsent.pop_front() else { break };
            let made = make_request(&self.adapters, &self.up, &batch, self.want, self.mode, device);
            let (encoded, request) = made.instrument(info_span!(target: "fednano::step", "codes")).await?;
            let share = match self.targets {
                0 => 1.0 / f64::from(self.of.max(1)),
                all => batch.targets.len() as f64 / all as f64,
            };
            let scales = scales(&request);
            let place = Place { index: self.sent, of: self.of, share: share as f32 };
            let sent = boundary.send(request, &batch, place);
            sent.instrument(info_span!(target: "fednano::step", "send")).await?;
            self.sent += 1;
            for (touched, part) in self.touched.iter_mut().zip(Part::ALL) {
                *touched |= encoded.has(part);
            }
            self.under_way.push_back(UnderWay { encoded, shape: batch.x.shape.clone(), scales, share });
        }
        Ok(())
    }

    /// The answer to the oldest request, and what it was; none: all are answered.
    async fn answer<B: LlmBoundary>(
        &mut self,
        boundary: &mut B,
        device: &Device,
    ) -> Result<Option<(UnderWay, BoundaryReply)>, StepError> {
        self.send(boundary, device).await?;
        let Some(part) = self.under_way.pop_front() else { return Ok(None) };
        let reply = boundary.reply().instrument(info_span!(target: "fednano::step", "wait")).await?;
        if boundary.window() > 1 {
            self.send(boundary, device).await?; // before the backward pass of this one
        }
        Ok(Some((part, reply)))
    }

    /// All answers, and what they add up to.
    async fn answers<B: LlmBoundary>(mut self, boundary: &mut B, device: &Device) -> Result<Answers, StepError> {
        let mut all = Answers::default();
        while let Some((part, reply)) = self.answer(boundary, device).await? {
            let backward = info_span!(target: "fednano::step", "backward");
            backward.in_scope(|| self.backward(&part, reply, device, &mut all))?;
        }
        self.complete(&mut all, device)?;
        Ok(all)
    }
}

/// The adapters' `up` as they are sent, read once for all requests of a group; in mode `activations` they are not.
async fn up_matrices(adapters: &NanoAdapters, mode: BoundaryMode) -> Result<Arc<Pair<TensorBlob>>, DeviceError> {
    let of =
        |part| adapters.get(part).map(|adapter| adapter.up.val().inner()).filter(|_| mode == BoundaryMode::LowRank);
    Ok(Arc::new(read_pair(Pair { image: of(Part::Image), text: of(Part::Text) }).await?))
}

/// `x` through the adapters: what is kept of it, and what is sent.
async fn make_request(
    adapters: &NanoAdapters,
    up: &Arc<Pair<TensorBlob>>,
    batch: &Batch,
    want: Want,
    mode: BoundaryMode,
    device: &Device,
) -> Result<(Encoded, BoundaryRequest), DeviceError> {
    let x = tensor((*batch.x).clone(), device); // [T,D]
    let encoded = adapters.encode(&x, &batch.positions);
    let input = match mode {
        BoundaryMode::Activations => Input::Hidden(read(adapters.hidden(&x, &encoded)).await?),
        BoundaryMode::LowRank => {
            let mut codes = read_pair(encoded.codes()).await?;
            for (part, up) in up.iter() {
                // An adapter that has nothing to do in this batch has no rows.
                codes.slot(part).get_or_insert_with(|| TensorBlob::zeros(&[0, columns(up)]));
            }
            Input::Codes(CodesInput { x: batch.x.clone(), codes, up: up.clone() })
        }
    };
    let (positions, targets) = (batch.positions.clone(), batch.targets.clone());
    Ok((encoded, BoundaryRequest { input, positions, targets, want }))
}

/// Both in one go.
async fn read_pair(pair: Pair<Tensor<2>>) -> Result<Pair<TensorBlob>, DeviceError> {
    let parts: Vec<Part> = pair.iter().map(|(part, _)| part).collect();
    let tensors = pair.iter().map(|(_, tensor)| tensor.clone()).collect();
    let mut read = Pair::default();
    for (part, blob) in parts.into_iter().zip(read_all(tensors).await?) {
        *read.slot(part) = Some(blob);
    }
    Ok(read)
}

/// Of each row: targets of the request over its own. A row without targets has no gradient either.
fn scales(request: &BoundaryRequest) -> Vec<f64> {
    let all = request.targets.len() as f64;
    request.target_counts().into_iter().map(|own| all / f64::from(own.max(1))).collect()
}

fn columns(blob: &TensorBlob) -> usize {
    blob.shape.get(1).copied().unwrap_or(0)
}

fn tensor(blob: TensorBlob, device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(blob.data, blob.shape), device)
}

// ---------------------------------------------------------------------------------------------- downward

/// What the answers of a group add up to.
#[derive(Default)]
struct Answers {
    /// Mean over all targets.
    loss: f64,
    samples: usize,
    /// Of that mean.
    gradients: Sums,
    /// Sums over rows.
    squares: Sums,
}

impl Begun {
    /// One answer: the chain rule through the adapters, by hand.
    fn backward(
        &self,
        part: &UnderWay,
        reply: BoundaryReply,
        device: &Device,
        all: &mut Answers,
    ) -> Result<(), StepError> {
        let UnderWay { encoded, shape, scales, share } = part;
        if !reply.loss.is_finite() {
            return Err(StepError::Loss(reply.loss));
        }
        if reply.row_loss.len() != scales.len() {
            let rows = reply.row_loss.len();
            return Err(StepError::Reply(format!("losses for {rows} rows, {} were sent", scales.len())));
        }
        let u = match (reply.gradient, self.mode) {
            (Gradient::Hidden(g), BoundaryMode::Activations) => {
                fits(&g, "gradient", shape)?;
                let g = tensor(g, device); // [T,D]
                if self.want.squares() {
                    let of_rows = self.adapters.backward_hidden_rows(encoded, &g);
                    of_rows.map(|part, rows| all.squares.add(part.up_name(), squares(rows, scales)));
                }
                let (u, d_up) = self.adapters.backward_hidden(encoded, &g, self.want.gradient());
                d_up.map(|part, d_up| all.gradients.add(part.up_name(), Some(d_up.mul_scalar(*share))));
                u
            }
            (Gradient::Codes(codes), BoundaryMode::LowRank) => {
                let CodesGradient { codes, up, up_squares } = codes;
                // Of the whole group already, and weighed.
                for (sums, mut found, wanted) in [
                    (&mut all.gradients, up, self.want.gradient()),
                    (&mut all.squares, up_squares, self.want.squares()),
                ] {
                    for part in Part::ALL {
                        let Some(blob) = found.slot(part).take().filter(|_| wanted) else { continue };
                        let Some(own) = self.up.get(part) else {
                            return Err(StepError::Reply(format!("'{}' is not trained", part.up_name())));
                        };
                        fits(&blob, part.up_name(), &own.shape)?;
                        sums.add(part.up_name(), Some(tensor(blob, device)));
                    }
                }
                u_of(encoded, codes, device)?
            }
            (Gradient::Hidden(_), BoundaryMode::LowRank) | (Gradient::Codes(_), BoundaryMode::Activations) => {
                return Err(StepError::Reply(format!("it is not of mode {}", self.mode)));
            }
        };
        if self.want.squares() {
            let of_rows = self.adapters.backward_rows(encoded, &u);
            of_rows.map(|part, rows| all.squares.add(part.down_name(), squares(rows, scales)));
        }
        if self.want.gradient() {
            let d_down = self.adapters.backward(encoded, u);
            d_down.map(|part, d_down| all.gradients.add(part.down_name(), Some(d_down.mul_scalar(*share))));
        }
        all.loss += share * f64::from(reply.loss);
        all.samples += scales.len();
        Ok(())
    }

    /// Nothing may be missing. An adapter without a position in any part has a gradient too: 0.
    fn complete(&self, all: &mut Answers, device: &Device) -> Result<(), StepError> {
        for (touched, part) in self.touched.into_iter().zip(Part::ALL) {
            let Some(adapter) = self.adapters.get(part) else { continue };
            for (name, param) in [(part.down_name(), &adapter.down), (part.up_name(), &adapter.up)] {
                let sums = [
                    (&mut all.gradients, self.want.gradient(), "gradient"),
                    (&mut all.squares, self.want.squares(), "squares"),
                ];
                for (sums, wanted, what) in sums {
                    if !wanted || sums.has(name) {
                        continue;
                    }
                    if touched {
                        return Err(StepError::Reply(format!("it lacks the {what} of '{name}'")));
                    }
                    sums.add(name, Some(Tensor::zeros(param.val().dims(), device)));
                }
            }
        }
        Ok(())
    }
}

/// `u` of the server for every code that was sent.
fn u_of(encoded: &Encoded, mut found: Pair<TensorBlob>, device: &Device) -> Result<Pair<Tensor<2>>, StepError> {
    encoded.codes().try_map(|part, z| {
        let what = format!("{} codes", part.name());
        let Some(u) = found.slot(part).take() else {
            return Err(StepError::Reply(format!("it lacks the gradient of the {what}")));
        };
        fits(&u, &what, &z.dims())?;
        Ok(tensor(u, device))
    })
}

fn fits(blob: &TensorBlob, name: &str, shape: &[usize]) -> Result<(), StepError> {
    blob.check(name, shape).map_err(|e| StepError::Reply(e.to_string()))
}

#[cfg(test)]
mod tests;
