//! The server's half of a training step: `h` as a leaf, frozen LLM, loss, gradient of the leaf.
//!
//! All rows of all requests lie one after the other, without padding. Where a request came in short (`x`, codes, `up`), `h` is put
//! together on the device, and its gradient is shortened there again: `g` itself never leaves it.

use super::{BoundaryError, BoundaryMode, LlmBoundary};
use crate::boundary::{
    BoundaryReply, BoundaryRequest, CodesGradient, CodesInput, EvaluationReply, Gradient, Input, Pair, Place,
    RequestError,
};
use crate::edge::Batch;
use crate::generate::GenerateRequest;
use crate::model::adapter::{DeviceError, read, read_all};
use crate::model::llama::{KvCache, Llama};
use crate::plain::TensorBlob;
use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData, activation};
use std::collections::VecDeque;

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
    /// request can see or move another's result; rows are given back where they came from. A request without targets has the
    /// loss 0 and no gradient.
    ///
    /// Requests must have passed [`Self::check`].
    ///
    /// # Errors
    /// A lost device.
    pub async fn train(&self, requests: &[&BoundaryRequest]) -> Result<Vec<BoundaryReply>, DeviceError> {
        let merged = Merged::new(requests);
        if merged.tokens.is_empty() {
            return Ok(requests.iter().map(|request| nothing(request, self.dim)).collect());
        }
        let (h, branches) = self.hidden(requests, &merged);
        let h = h.detach().require_grad(); // [T,D], the leaf
        let nll = self.nll(h.clone(), &merged).0; // [targets]
        let scale = if self.llm.dtype() == DType::F16 { F16_LOSS_SCALE } else { 1.0 };
        let weights: Vec<f32> = merged.weights.iter().map(|w| w * scale).collect();
        let weights = TensorData::new(weights, [merged.weights.len()]);
        let loss = (nll.clone() * Tensor::from_data(weights, &self.device)).sum();
        let gradients = loss.backward();
        let Some(g) = h.grad(&gradients) else {
            return Err(DeviceError("the loss has no gradient at the boundary".into()));
        };
        let g = if scale == 1.0 { g } else { g.div_scalar(scale) }; // [T,D]
        let mut reading = Reading::default();
        let nll = reading.add(nll.inner().reshape([merged.tokens.len(), 1]));
        let places = requests.iter().zip(&branches).zip(&merged.starts);
        let asked: Vec<Asked> = places.map(|((r, own), start)| ask(r, own, &g, *start, &mut reading)).collect();
        let mut found = reading.read().await?;
        let nll = found.take(nll)?.data;
        let (mut first, mut replies) = (0, Vec::with_capacity(requests.len()));
        for (request, asked) in requests.iter().zip(asked) {
            let own = nll.get(first..first + request.targets.len()).unwrap_or_default();
            first += request.targets.len();
            let (loss, row_loss) = losses(request, own);
            replies.push(BoundaryReply { loss, row_loss, gradient: asked.gradient(&mut found)? });
        }
        Ok(replies)
    }

    /// Forward only.
    ///
    /// # Errors
    /// A lost device.
    pub async fn evaluate(&self, request: &BoundaryRequest) -> Result<EvaluationReply, DeviceError> {
        let merged = Merged::new(&[request]);
        if merged.tokens.is_empty() {
            return Ok(EvaluationReply { nll: Vec::new(), predicted: Vec::new() });
        }
        let (h, _) = self.hidden(&[request], &merged);
        let (nll, logits) = self.nll(h, &merged);
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

    /// Logits `[V]` of what follows new positions behind those in the cache: `D` values each, at least one.
    ///
    /// # Errors
    /// A lost device.
    pub async fn next_logits(&self, cache: &mut KvCache, hidden: &TensorBlob) -> Result<Vec<f32>, DeviceError> {
        let new = hidden.data.len() / self.dim.max(1);
        let h = Tensor::<3>::from_data(TensorData::new(hidden.data.clone(), [1, new, self.dim]), &self.device);
        let states = self.llm.forward_cached(h, cache); // [1,S,D]
        let last = states.narrow(1, new.saturating_sub(1), 1).reshape([1, self.dim]);
        Ok(read(self.llm.logits(last).inner()).await?.data)
    }

    /// `h` of all requests, `[T, D]`, and what the way back needs of those that came in short.
    fn hidden(&self, requests: &[&BoundaryRequest], merged: &Merged) -> (Tensor<2>, Vec<Pair<Branch>>) {
        let mut data = Vec::with_capacity(merged.total * self.dim);
        for request in requests {
            data.extend_from_slice(match &request.input {
                Input::Hidden(h) => &h.data,
                Input::Codes(input) => &input.x.data,
            });
        }
        let x = Tensor::<2>::from_data(TensorData::new(data, [merged.total, self.dim]), &self.device);
        let own = |(request, start): (&&BoundaryRequest, &usize)| match &request.input {
            Input::Hidden(_) => Pair::default(),
            Input::Codes(input) => self.branches(request, input, *start),
        };
        let branches: Vec<Pair<Branch>> = requests.iter().zip(&merged.starts).map(own).collect();
        let (mut places, mut products) = (Vec::new(), Vec::new());
        for (_, branch) in branches.iter().flat_map(|pair| pair.iter()) {
            places.extend_from_slice(&branch.places);
            products.push(branch.codes.clone().matmul(branch.up.clone().transpose())); // [positions,D]
        }
        if places.is_empty() {
            return (x, branches);
        }
        // All at once, each position once: the scatter is parallel and its sums have one order.
        let count = places.len();
        let places = Tensor::<2, Int>::from_data(TensorData::new(places, [count, 1]), &self.device);
        let h = x.scatter_nd(places, Tensor::cat(products, 0), IndexingUpdateOp::Add);
        (h, branches)
    }

    /// The codes of a request that begins at a packed position; of parts that have positions.
    fn branches(&self, request: &BoundaryRequest, input: &CodesInput, start: usize) -> Pair<Branch> {
        let tensor = |blob: &TensorBlob| {
            Tensor::<2>::from_data(TensorData::new(blob.data.clone(), blob.shape.clone()), &self.device)
        };
        let mut branches = Pair::default();
        for (part, codes) in input.codes.iter() {
            let places: Vec<i64> = request.positions.of(part).into_iter().map(|p| (start + p) as i64).collect();
            let Some(up) = input.up.get(part).filter(|_| !places.is_empty()) else { continue };
            let counts = request.positions.counts(part);
            *branches.slot(part) = Some(Branch { places, counts, codes: tensor(codes), up: tensor(up) });
        }
        branches
    }

    /// Negative log-likelihood `[targets]`, and logits `[targets, V]`: other positions never meet the head.
    fn nll(&self, h: Tensor<2>, merged: &Merged) -> (Tensor<1>, Tensor<2>) {
        let [total, dim] = h.dims();
        let count = merged.tokens.len();
        let index =
            |values: &[i64]| Tensor::<1, Int>::from_data(TensorData::new(values.to_vec(), [count]), &self.device);
        let layout = self.llm.rows_layout(&merged.lengths, &self.device);
        let states = self.llm.forward(h.reshape([1, total, dim]), &layout); // [1,T,D]
        let states = states.reshape([total, dim]).select(0, index(&merged.at)); // [targets,D]
        let logits = self.llm.logits(states); // [targets,V]
        let tokens = index(&merged.tokens).reshape([count, 1]);
        let nll = activation::log_softmax(logits.clone(), 1).gather(1, tokens).reshape([count]).neg();
        (nll, logits)
    }
}

/// Requests one after the other.
struct Merged {
    lengths: Vec<usize>, // of all rows
    starts: Vec<usize>,  // first packed position of each request
    total: usize,        // T
    at: Vec<i64>,        // packed position of each target
    tokens: Vec<i64>,    // of each target
    weights: Vec<f32>,   // of each target: 1 / targets of the own request
}

impl Merged {
    fn new(requests: &[&BoundaryRequest]) -> Self {
        let mut merged = Self {
            lengths: Vec::new(),
            starts: Vec::new(),
            total: 0,
            at: Vec::new(),
            tokens: Vec::new(),
            weights: Vec::new(),
        };
        for request in requests {
            let rows = request.positions.starts();
            for target in &request.targets {
                merged.at.push((merged.total + rows[target.row as usize] + target.position as usize) as i64);
                merged.tokens.push(i64::from(target.token));
                merged.weights.push(1.0 / request.targets.len() as f32);
            }
            merged.starts.push(merged.total);
            merged.lengths.extend(request.positions.lengths.iter().map(|length| *length as usize));
            merged.total += request.positions.total();
        }
        merged
    }
}

/// What came in short of one part of a request.
struct Branch {
    places: Vec<i64>,   // packed positions
    counts: Vec<usize>, // of each row
    codes: Tensor<2>,   // z, [positions,R]
    up: Tensor<2>,      // [D,R]
}

/// Mean loss of a request and of each of its rows.
fn losses(request: &BoundaryRequest, nll: &[f32]) -> (f32, Vec<f32>) {
    let counts = request.target_counts();
    let mut rows = vec![0f32; counts.len()];
    for (target, value) in request.targets.iter().zip(nll) {
        let row = target.row as usize;
        rows[row] += value / counts[row] as f32;
    }
    (nll.iter().sum::<f32>() / nll.len().max(1) as f32, rows)
}

/// The reply to a request that asks nothing of the LLM.
fn nothing(request: &BoundaryRequest, dim: usize) -> BoundaryReply {
    let gradient = match &request.input {
        Input::Hidden(h) => Gradient::Hidden(TensorBlob::zeros(&h.shape)),
        Input::Codes(input) => {
            let rank = input.rank().unwrap_or_default();
            let up = |wanted: bool| match wanted {
                true => (*input.up).as_ref().map(|_, _| TensorBlob::zeros(&[dim, rank])),
                false => Pair::default(),
            };
            Gradient::Codes(CodesGradient {
                codes: input.codes.as_ref().map(|_, codes| TensorBlob::zeros(&codes.shape)),
                up: up(request.want.gradient()),
                up_squares: up(request.want.squares()),
            })
        }
    };
    BoundaryReply { loss: 0.0, row_loss: vec![0.0; request.positions.rows()], gradient }
}

// ---------------------------------------------------------------------------------------------- the way back

/// A reply's gradient, not read from the device yet.
enum Asked {
    Hidden(Slot),
    Codes { codes: Pair<Slot>, up: Pair<Slot>, up_squares: Pair<Slot> },
}

impl Asked {
    fn gradient(self, found: &mut Found) -> Result<Gradient, DeviceError> {
        Ok(match self {
            Self::Hidden(g) => Gradient::Hidden(found.take(g)?),
            Self::Codes { codes, up, up_squares } => Gradient::Codes(CodesGradient {
                codes: codes.try_map(|_, slot| found.take(slot))?,
                up: up.try_map(|_, slot| found.take(slot))?,
                up_squares: up_squares.try_map(|_, slot| found.take(slot))?,
            }),
        })
    }
}

/// What a request gets of `g` `[T, D]`, of which it begins at `start`.
fn ask(request: &BoundaryRequest, own: &Pair<Branch>, g: &Tensor<2>, start: usize, reading: &mut Reading) -> Asked {
    let Input::Codes(input) = &request.input else {
        return Asked::Hidden(reading.add(g.clone().narrow(0, start, request.positions.total())));
    };
    let (mut codes, mut up, mut up_squares) = (Pair::default(), Pair::default(), Pair::default());
    for (part, z) in input.codes.iter() {
        let matrix = input.up.get(part).map(|up| up.shape.clone()).unwrap_or_default();
        let answer = match own.get(part) {
            Some(branch) => shortened(request, branch, g, reading),
            // No position of this part, so nothing came of its matrix.
            None => Short { u: Slot::zeros(&z.shape), d_up: Slot::zeros(&matrix), squares: Slot::zeros(&matrix) },
        };
        *codes.slot(part) = Some(answer.u);
        if request.want.gradient() {
            *up.slot(part) = Some(answer.d_up);
        }
        if request.want.squares() {
            *up_squares.slot(part) = Some(answer.squares);
        }
    }
    Asked::Codes { codes, up, up_squares }
}

/// `g` of one part in short; zeros for what is not wanted.
struct Short {
    u: Slot,       // [positions,R]
    d_up: Slot,    // [D,R]
    squares: Slot, // [D,R]
}

fn shortened(request: &BoundaryRequest, branch: &Branch, g: &Tensor<2>, reading: &mut Reading) -> Short {
    let count = branch.places.len();
    let places = Tensor::<1, Int>::from_data(TensorData::new(branch.places.clone(), [count]), &g.device());
    let g = g.clone().select(0, places); // [positions,D]
    let (z, up) = (branch.codes.clone().inner(), branch.up.clone().inner());
    let matrix = up.dims();
    let zeros = || Slot::zeros(&matrix);
    let u = reading.add(g.clone().matmul(up));
    let d_up = match request.want.gradient() {
        true => reading.add(g.clone().transpose().matmul(z.clone())),
        false => zeros(),
    };
    let squares = match request.want.squares() {
        true => row_squares(request, branch, g, z).map_or_else(zeros, |sum| reading.add(sum)),
        false => zeros(),
    };
    Short { u, d_up, squares }
}

/// Sums over rows of `(dL_row/d up)^2`, `[D, R]`. The loss is a mean over the request's targets: a row's share of its gradient times
/// (targets of the request / targets of the row) is the gradient of the row's own mean.
fn row_squares(request: &BoundaryRequest, branch: &Branch, g: Tensor<2>, z: Tensor<2>) -> Option<Tensor<2>> {
    let (mut sum, mut first): (Option<Tensor<2>>, usize) = (None, 0);
    for (count, targets) in branch.counts.iter().zip(request.target_counts()) {
        if *count > 0 && targets > 0 {
            let own = |all: &Tensor<2>| all.clone().narrow(0, first, *count);
            let scale = request.targets.len() as f32 / targets as f32;
            let squares = own(&g).transpose().matmul(own(&z)).mul_scalar(scale).square(); // [D,R]
            sum = Some(match sum {
                Some(sum) => sum + squares,
                None => squares,
            });
        }
        first += count;
    }
    sum
}

/// Where a result will be found.
enum Slot {
    Zeros(Vec<usize>),
    Read(usize),
}

impl Slot {
    fn zeros(shape: &[usize]) -> Self {
        Self::Zeros(shape.to_vec())
    }
}

/// Results on their way from the device, all in one go.
#[derive(Default)]
struct Reading(Vec<Tensor<2>>);

impl Reading {
    fn add(&mut self, tensor: Tensor<2>) -> Slot {
        self.0.push(tensor);
        Slot::Read(self.0.len() - 1)
    }

    async fn read(self) -> Result<Found, DeviceError> {
        Ok(Found(read_all(self.0).await?.into_iter().map(Some).collect()))
    }
}

/// Results that have been read; each is taken once.
struct Found(Vec<Option<TensorBlob>>);

impl Found {
    fn take(&mut self, slot: Slot) -> Result<TensorBlob, DeviceError> {
        match slot {
            Slot::Zeros(shape) => Ok(TensorBlob::zeros(&shape)),
            Slot::Read(at) => {
                let blob = self.0.get_mut(at).and_then(Option::take);
                blob.ok_or_else(|| DeviceError("a result did not come back from the device".into()))
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------- without a wire

/// The boundary without a wire: tests, simulation, the server's own evaluation.
pub struct InProcess<'a> {
    llm: &'a FrozenLlm,
    mode: BoundaryMode,
    replies: VecDeque<BoundaryReply>,
    /// Of the group under way: what its matrices have got so far.
    sums: CodesGradient,
}

impl<'a> InProcess<'a> {
    /// One that asks for its input in this mode.
    pub fn new(llm: &'a FrozenLlm, mode: BoundaryMode) -> Self {
        Self { llm, mode, replies: VecDeque::new(), sums: CodesGradient::default() }
    }

    /// Matrices of a group are summed here, as a server does, and go with the last reply.
    fn summed(&mut self, mut reply: BoundaryReply, place: Place) -> BoundaryReply {
        let Gradient::Codes(own) = &mut reply.gradient else { return reply };
        if place.index == 0 {
            self.sums = CodesGradient::default();
        }
        self.sums.up.add_scaled(&std::mem::take(&mut own.up), place.share);
        self.sums.up_squares.add_scaled(&std::mem::take(&mut own.up_squares), 1.0);
        if u32::from(place.index) + 1 >= u32::from(place.of) {
            let sums = std::mem::take(&mut self.sums);
            (own.up, own.up_squares) = (sums.up, sums.up_squares);
        }
        reply
    }
}

impl LlmBoundary for InProcess<'_> {
    fn mode(&self) -> BoundaryMode {
        self.mode
    }

    async fn send(&mut self, request: BoundaryRequest, _: &Batch, place: Place) -> Result<(), BoundaryError> {
        self.llm.check(&request).map_err(|e| BoundaryError::Refused(e.to_string()))?;
        let replies = self.llm.train(&[&request]).await.map_err(|e| BoundaryError::Lost(e.to_string()))?;
        for reply in replies {
            let reply = self.summed(reply, place);
            self.replies.push_back(reply);
        }
        Ok(())
    }

    async fn reply(&mut self) -> Result<BoundaryReply, BoundaryError> {
        self.replies.pop_front().ok_or_else(|| BoundaryError::Failed("no request is under way".into()))
    }

    async fn evaluate(&mut self, request: BoundaryRequest, _: &Batch) -> Result<EvaluationReply, BoundaryError> {
        self.llm.check(&request).map_err(|e| BoundaryError::Refused(e.to_string()))?;
        self.llm.evaluate(&request).await.map_err(|e| BoundaryError::Lost(e.to_string()))
    }
}

#[cfg(test)]
mod tests;
