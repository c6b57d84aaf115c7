//! The split training step against the whole, against burn's autodiff, against finite differences, and over the wire; in both modes
//! of the boundary.

use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use fednano_server::app::demo_held_out;
use fednano_shared::boundary::{
    BoundaryReply, BoundaryRequest, CodesGradient, CodesInput, EvaluationReply, Gradient, Input, Part, Place,
    Positions, Target,
};
use fednano_shared::edge::Batch;
use fednano_shared::model::adapter::{NanoAdapters, read};
use fednano_shared::model::checkpoint::load_llm;
use fednano_shared::model::gelu;
use fednano_shared::plain::{AdapterState, TensorBlob};
use fednano_shared::probe;
use fednano_shared::settings::{AdapterChoice, FederationSettings};
use fednano_shared::step::{self, BoundaryError, InProcess, LlmBoundary, StepError};
use fednano_shared::wire::agreement::{BoundaryMode, Offer};
use fednano_tests::{
    Halves, LIMIT, MODES, Server, adapters_close, asking, block, close, gradients_close, halves, nano_llava,
};
use std::collections::{BTreeMap, VecDeque};

/// The same numbers in another order of summation: float noise of the reference is 6e-5 for gradients.
const NOISE: f64 = 1e-4;

async fn batch(h: &Halves, rows: usize) -> anyhow::Result<Batch> {
    let cache = h.edge.encode(&probe::samples(), |_, _| {}).await?;
    Ok(h.edge.batch(&cache, &(0..rows.min(cache.samples.len())).collect::<Vec<_>>())?)
}

fn tensor<const N: usize>(blob: &TensorBlob, device: &Device) -> Tensor<N> {
    Tensor::from_data(TensorData::new(blob.data.clone(), blob.shape.clone()), device)
}

fn index(values: Vec<usize>, device: &Device) -> Tensor<1, Int> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values.into_iter().map(|v| v as i64).collect::<Vec<_>>(), [count]), device)
}

// ------------------------------------------------------------------------------------ adapters on burn's graph

/// The adapters written down once more, every tensor of them on burn's autodiff graph.
struct Traced(BTreeMap<String, Tensor<2>>);

impl Traced {
    /// `device` has autodiff.
    fn new(state: &AdapterState, device: &Device) -> Self {
        let one = |blob: &TensorBlob| tensor::<2>(blob, device).require_grad();
        Self(state.0.iter().map(|(name, blob)| (name.clone(), one(blob))).collect())
    }

    /// `h`: `[T, D]`, by masks over all positions.
    fn hidden(&self, batch: &Batch, device: &Device) -> Tensor<2> {
        let x: Tensor<2> = tensor(&batch.x, device);
        let mut h = x.clone();
        for part in Part::ALL {
            let (Some(down), Some(up)) = (self.0.get(part.down_name()), self.0.get(part.up_name())) else { continue };
            let mut mask = TensorBlob::zeros(&[batch.positions.total(), 1]);
            batch.positions.of(part).into_iter().for_each(|at| mask.data[at] = 1.0);
            let z = gelu(x.clone().matmul(down.clone().transpose())); // [T,R]
            h = h + z.matmul(up.clone().transpose()) * tensor::<2>(&mask, device);
        }
        h
    }

    /// The gradient of a sum.
    async fn backward(&self, loss: Tensor<1>) -> anyhow::Result<AdapterState> {
        let gradients = loss.backward();
        let mut whole = AdapterState::default();
        for (name, value) in &self.0 {
            let gradient = value.grad(&gradients).ok_or_else(|| anyhow::anyhow!("{name} has no gradient"))?;
            whole.0.insert(name.clone(), read(gradient).await?);
        }
        Ok(whole)
    }
}

/// `[B, S, D]`: each row from its beginning; what is behind its end is never looked at.
fn padded(h: Tensor<2>, positions: &Positions, device: &Device) -> Tensor<3> {
    let (rows, seq, dim) = (positions.rows(), positions.longest(), h.dims()[1]);
    let row = |(start, length): (usize, u32)| (0..seq).map(move |at| start + at.min(length as usize - 1));
    let places = positions.starts().into_iter().zip(positions.lengths.iter().copied()).flat_map(row).collect();
    h.select(0, index(places, device)).reshape([rows, seq, dim])
}

/// The whole: adapters, LLM and loss on one autodiff graph, no boundary, rows padded to one length.
pub fn split_equals_whole() -> anyhow::Result<()> {
    block(LIMIT, async {
        let h = halves(&nano_llava(), &Device::flex())?;
        let autodiff = h.device.clone().autodiff();
        let llm = load_llm(&h.files.config, &h.files.weights, &autodiff)?;
        let batch = batch(&h, 4).await?;
        let different = batch.positions.lengths.iter().any(|l| *l != batch.positions.lengths[0]);
        anyhow::ensure!(different, "rows of one length: nothing is packed");
        let state = probe::adapters(8, h.edge.config.text.hidden);
        let traced = Traced::new(&state, &autodiff);

        let hidden = padded(traced.hidden(&batch, &autodiff), &batch.positions, &autodiff);
        let [b, s, d] = hidden.dims();
        let states = llm.forward(hidden, &llm.causal_layout(s, &autodiff)).reshape([b * s, d]);
        let at = batch.targets.iter().map(|t| t.row as usize * s + t.position as usize).collect();
        let tokens = batch.targets.iter().map(|t| t.token as usize).collect();
        let logits = llm.logits(states.select(0, index(at, &autodiff)));
        let tokens = index(tokens, &autodiff).reshape([batch.targets.len(), 1]);
        let loss = activation::log_softmax(logits, 1).gather(1, tokens).mean().neg();
        let whole = traced.backward(loss.clone()).await?;

        for mode in BoundaryMode::ALL {
            let adapters = NanoAdapters::from_state(&state, &h.device);
            let mut boundary = InProcess::new(&h.llm, mode);
            let (reply, split) = step::gradients(&adapters, &batch, &mut boundary, &h.device).await?;
            let scalar = |v: f32| TensorBlob { shape: vec![1], data: vec![v] };
            close("loss", &scalar(reply.loss), &scalar(loss.clone().inner().into_scalar::<f32>()), 1e-5)?;
            adapters_close(&format!("{mode}: gradient"), &split, &whole, NOISE)?;

            // Fisher from one reply equals Fisher from one whole backward pass for each sample.
            let mut fisher = AdapterState::zeros(AdapterChoice::Both, 8, d);
            let group = std::slice::from_ref(&batch);
            step::fisher_group(&adapters, group, &mut boundary, &h.device, &mut fisher).await?;
            let mut single = AdapterState::zeros(AdapterChoice::Both, 8, d);
            for row in 0..b {
                let one = only(&batch, row);
                let (_, gradient) = step::gradients(&adapters, &one, &mut boundary, &h.device).await?;
                add_squares(&mut single, &gradient);
            }
            adapters_close(&format!("{mode}: Fisher"), &fisher, &single, 3e-4)?;

            // The same from several requests under way, and one after the other.
            let mut grouped = AdapterState::zeros(AdapterChoice::Both, 8, d);
            let each: Vec<Batch> = (0..b).map(|row| only(&batch, row)).collect();
            step::fisher_group(&adapters, &each, &mut boundary, &h.device, &mut grouped).await?;
            adapters_close(&format!("{mode}: Fisher of a group"), &grouped, &single, 3e-4)?;
        }
        Ok(())
    })
}

fn add_squares(sums: &mut AdapterState, gradient: &AdapterState) {
    for (name, sum) in &mut sums.0 {
        sum.data.iter_mut().zip(&gradient.0[name].data).for_each(|(s, g)| *s += g * g);
    }
}

/// One row of a batch.
fn only(batch: &Batch, row: usize) -> Batch {
    let (start, length) = (batch.positions.starts()[row], batch.positions.lengths[row]);
    Batch {
        x: std::sync::Arc::new(rows_of(&batch.x, start, length as usize)),
        positions: Positions { lengths: vec![length], images: vec![batch.positions.images[row].clone()] },
        targets: batch.targets.iter().filter(|t| t.row as usize == row).map(|t| Target { row: 0, ..*t }).collect(),
        rows: vec![batch.rows[row].clone()],
    }
}

/// So many rows of a matrix.
fn rows_of(blob: &TensorBlob, start: usize, count: usize) -> TensorBlob {
    let width = blob.shape[1];
    TensorBlob { shape: vec![count, width], data: blob.data[start * width..(start + count) * width].to_vec() }
}

// ------------------------------------------------------------------------------------ the closed form

/// A boundary whose `g` is known, worked out for either mode in f64, without burn.
struct Known {
    mode: BoundaryMode,
    g: TensorBlob,
    replies: VecDeque<BoundaryReply>,
}

impl Known {
    fn codes(&self, request: &BoundaryRequest, input: &CodesInput) -> CodesGradient {
        let mut gradient = CodesGradient::default();
        let (counts, all) = (request.target_counts(), request.targets.len() as f64);
        for part in Part::ALL {
            let (Some(z), Some(up)) = (input.codes.get(part), input.up.get(part)) else { continue };
            let [dim, rank] = up.shape[..] else { continue };
            let at = |blob: &TensorBlob, row: usize, column: usize| f64::from(blob.data[row * blob.shape[1] + column]);
            let mut u = TensorBlob::zeros(&z.shape);
            let (mut sum, mut squares) = (TensorBlob::zeros(&up.shape), TensorBlob::zeros(&up.shape));
            for (n, place) in request.positions.of(part).into_iter().enumerate() {
                for r in 0..rank {
                    u.data[n * rank + r] = (0..dim).map(|d| at(up, d, r) * at(&self.g, place, d)).sum::<f64>() as f32;
                }
            }
            for d in 0..dim {
                for r in 0..rank {
                    let (mut n, mut whole, mut of_rows) = (0, 0.0, 0.0);
                    let places = request.positions.of(part);
                    for (row, count) in request.positions.counts(part).into_iter().enumerate() {
                        let own: f64 = (n..n + count).map(|n| at(&self.g, places[n], d) * at(z, n, r)).sum();
                        n += count;
                        whole += own;
                        of_rows += (own * all / f64::from(counts[row]).max(1.0)).powi(2);
                    }
                    (sum.data[d * rank + r], squares.data[d * rank + r]) = (whole as f32, of_rows as f32);
                }
            }
            *gradient.codes.slot(part) = Some(u);
            if request.want.gradient() {
                *gradient.up.slot(part) = Some(sum);
            }
            if request.want.squares() {
                *gradient.up_squares.slot(part) = Some(squares);
            }
        }
        gradient
    }
}

impl LlmBoundary for Known {
    fn mode(&self) -> BoundaryMode {
        self.mode
    }

    async fn send(&mut self, request: BoundaryRequest, _: &Batch, _: Place) -> Result<(), BoundaryError> {
        let gradient = match &request.input {
            Input::Hidden(_) => Gradient::Hidden(self.g.clone()),
            Input::Codes(input) => Gradient::Codes(self.codes(&request, input)),
        };
        self.replies.push_back(BoundaryReply { loss: 1.0, row_loss: vec![1.0; request.positions.rows()], gradient });
        Ok(())
    }

    async fn reply(&mut self) -> Result<BoundaryReply, BoundaryError> {
        self.replies.pop_front().ok_or_else(|| BoundaryError::Failed("nothing was sent".into()))
    }

    async fn evaluate(&mut self, _: BoundaryRequest, _: &Batch) -> Result<EvaluationReply, BoundaryError> {
        Err(BoundaryError::Failed("nothing to evaluate".into()))
    }
}

/// The backward pass written down by hand is the one that burn's autodiff finds in `sum(h * g)`; so are the squares of each row's own
/// gradient. With both adapters and with one, with pictures and without.
pub fn closed_form() -> anyhow::Result<()> {
    block(LIMIT, async {
        let h = halves(&nano_llava(), &Device::flex())?;
        let autodiff = h.device.clone().autodiff();
        let dim = h.edge.config.text.hidden;
        let whole = batch(&h, 4).await?;
        let words = {
            let mut data = probe::samples();
            data.pictures.clear();
            data.samples.iter_mut().for_each(|s| s.picture = None);
            let cache = h.edge.encode(&data, |_, _| {}).await?;
            h.edge.batch(&cache, &[0, 1, 2])?
        };
        anyhow::ensure!(words.positions.of(Part::Image).is_empty(), "there are image positions without a picture");
        for (batch, pictures) in [(&whole, true), (&words, false)] {
            let g = TensorBlob {
                shape: batch.x.shape.clone(),
                data: (0..batch.x.data.len()).map(|i| ((i * 37 + i / 13) % 97) as f32 * 1e-3 - 0.048).collect(),
            };
            for choice in AdapterChoice::ALL {
                let mut state = probe::adapters(8, dim);
                state.0.retain(|name, _| AdapterState::names(choice).contains(&name.as_str()));
                let traced = Traced::new(&state, &autodiff);
                let loss = (traced.hidden(batch, &autodiff) * tensor::<2>(&g, &autodiff)).sum();
                let expected = traced.backward(loss).await?;
                let mut squares = state.zeros_like();
                let counts = Positions::starts(&batch.positions);
                for (row, start) in counts.into_iter().enumerate() {
                    let (one, length) = (only(batch, row), batch.positions.lengths[row] as usize);
                    // The boundary's loss is a mean over all targets, a row's own one over its own.
                    let scale = batch.targets.len() as f32 / one.targets.len() as f32;
                    let mut own = rows_of(&g, start, length);
                    own.data.iter_mut().for_each(|v| *v *= scale);
                    let traced = Traced::new(&state, &autodiff);
                    let loss = (traced.hidden(&one, &autodiff) * tensor::<2>(&own, &autodiff)).sum();
                    add_squares(&mut squares, &traced.backward(loss).await?);
                }
                for mode in BoundaryMode::ALL {
                    let what = format!("{mode}, {choice}, pictures: {pictures}");
                    let adapters = NanoAdapters::from_state(&state, &h.device);
                    let mut known = Known { mode, g: g.clone(), replies: VecDeque::new() };
                    let (_, found) = step::gradients(&adapters, batch, &mut known, &h.device).await?;
                    adapters_close(&format!("{what}: gradient"), &found, &expected, 1e-5)?;
                    let mut fisher = state.zeros_like();
                    let group = std::slice::from_ref(batch);
                    step::fisher_group(&adapters, group, &mut known, &h.device, &mut fisher).await?;
                    adapters_close(&format!("{what}: squares"), &fisher, &squares, 1e-5)?;
                    let image = found.0.iter().filter(|(name, _)| name.starts_with("image"));
                    let zero = image.flat_map(|(_, blob)| &blob.data).all(|v| *v == 0.0);
                    anyhow::ensure!(zero == (!pictures || choice == AdapterChoice::Text), "{what}: {zero}");
                }
            }
        }
        Ok(())
    })
}

// ------------------------------------------------------------------------------------ finite differences

/// Central differences of the loss along the gradient and along a fixed direction, for each tensor.
pub fn finite_differences() -> anyhow::Result<()> {
    block(LIMIT, async {
        let h = halves(&nano_llava(), &Device::flex())?;
        let batch = batch(&h, 4).await?;
        let state = probe::adapters(8, h.edge.config.text.hidden);
        for mode in BoundaryMode::ALL {
            finite_differences_in(&h, &batch, &state, mode).await?;
        }
        Ok(())
    })
}

async fn finite_differences_in(
    h: &Halves,
    batch: &Batch,
    state: &AdapterState,
    mode: BoundaryMode,
) -> anyhow::Result<()> {
    let adapters = NanoAdapters::from_state(state, &h.device);
    let (_, gradients) = step::gradients(&adapters, batch, &mut InProcess::new(&h.llm, mode), &h.device).await?;
    for name in AdapterState::NAMES {
        let g = &gradients.0[name].data;
        let norm = g.iter().map(|v| v * v).sum::<f32>().sqrt();
        anyhow::ensure!(norm > 1e-4, "{mode}: {name}: the gradient is {norm}, nothing is tested");
        // Along the gradient every entry must be there; along a direction of fixed signs every entry must be right.
        let along: Vec<f32> = g.iter().map(|v| v / norm).collect();
        let unit = (g.len() as f32).sqrt().recip();
        let fixed: Vec<f32> = (0..g.len()).map(|i| if (i * 7) % 3 == 0 { -unit } else { unit }).collect();
        for (what, direction) in [("along the gradient", along), ("in a fixed direction", fixed)] {
            let expected = f64::from(g.iter().zip(&direction).map(|(a, b)| a * b).sum::<f32>());
            let at = |step_size: f32| {
                let mut moved = state.clone();
                if let Some(blob) = moved.0.get_mut(name) {
                    blob.data.iter_mut().zip(&direction).for_each(|(v, d)| *v += step_size * d);
                }
                let adapters = NanoAdapters::from_state(&moved, &h.device);
                async move {
                    let mut boundary = InProcess::new(&h.llm, mode);
                    let reply = step::gradients(&adapters, batch, &mut boundary, &h.device).await?.0;
                    anyhow::Ok(f64::from(reply.loss))
                }
            };
            // Small enough for curvature, large enough for f32; two sizes show which one dominates.
            let mut best = f64::INFINITY;
            for size in [0.02f32, 0.005] {
                let slope = (at(size).await? - at(-size).await?) / (2.0 * f64::from(size));
                println!("{mode}: {name} {what}: slope {slope:.5}, expected {expected:.5}, gradient norm {norm:.5}");
                best = best.min((slope - expected).abs() / f64::from(norm));
            }
            anyhow::ensure!(best < 0.02, "{mode}: {name} {what}: slope and gradient differ by {:.1} %", best * 100.0);
        }
    }
    Ok(())
}

// ------------------------------------------------------------------------------------ the server's half

/// What the LLM host merges comes back unmixed, requests of one mode beside those of the other.
pub fn merged_requests() -> anyhow::Result<()> {
    block(LIMIT, async {
        let h = halves(&nano_llava(), &Device::flex())?;
        let batch = batch(&h, 4).await?;
        let state = probe::adapters(8, h.edge.config.text.hidden);
        let adapters = NanoAdapters::from_state(&state, &h.device);
        for modes in [
            [BoundaryMode::Activations; 3],
            [BoundaryMode::LowRank; 3],
            [BoundaryMode::LowRank, BoundaryMode::Activations, BoundaryMode::LowRank],
        ] {
            let mut requests = Vec::new();
            for (rows, mode) in [vec![0, 2], vec![1], vec![3]].iter().zip(modes) {
                requests.push(request_of(&h, &adapters, &several(&batch, rows), mode).await?);
            }
            let together = h.llm.train(&requests.iter().collect::<Vec<_>>()).await?;
            anyhow::ensure!(together.len() == requests.len(), "{} replies", together.len());
            for (request, merged) in requests.iter().zip(together) {
                let alone = h.llm.train(&[request]).await?.remove(0);
                gradients_close(&merged.gradient, &alone.gradient, NOISE)?;
                anyhow::ensure!((merged.loss - alone.loss).abs() < 1e-4, "loss {} and {}", merged.loss, alone.loss);
                anyhow::ensure!(merged.row_loss.len() == request.positions.rows(), "rows are mixed up");
            }
        }
        Ok(())
    })
}

/// Some rows of a batch, in this order.
fn several(batch: &Batch, rows: &[usize]) -> Batch {
    let mut all = Batch { x: batch.x.clone(), positions: Positions::default(), targets: Vec::new(), rows: Vec::new() };
    let mut data = Vec::new();
    for (row, part) in rows.iter().map(|r| only(batch, *r)).enumerate() {
        data.extend_from_slice(&part.x.data);
        all.positions.lengths.extend(part.positions.lengths);
        all.positions.images.extend(part.positions.images);
        all.targets.extend(part.targets.into_iter().map(|t| Target { row: row as u32, ..t }));
        all.rows.extend(part.rows);
    }
    let width = batch.x.shape[1];
    all.x = std::sync::Arc::new(TensorBlob { shape: vec![data.len() / width, width], data });
    all
}

/// Keeps what it is asked, and answers nothing.
struct Taken(BoundaryMode, Option<BoundaryRequest>);

impl LlmBoundary for Taken {
    fn mode(&self) -> BoundaryMode {
        self.0
    }

    async fn send(&mut self, request: BoundaryRequest, _: &Batch, _: Place) -> Result<(), BoundaryError> {
        self.1 = Some(request);
        Ok(())
    }

    async fn reply(&mut self) -> Result<BoundaryReply, BoundaryError> {
        Err(BoundaryError::Cancelled("taken".into()))
    }

    async fn evaluate(&mut self, _: BoundaryRequest, _: &Batch) -> Result<EvaluationReply, BoundaryError> {
        Err(BoundaryError::Cancelled("taken".into()))
    }
}

/// What a client would send for a batch.
async fn request_of(
    h: &Halves,
    adapters: &NanoAdapters,
    batch: &Batch,
    mode: BoundaryMode,
) -> anyhow::Result<BoundaryRequest> {
    let mut taken = Taken(mode, None);
    match step::gradients(adapters, batch, &mut taken, &h.device).await {
        Err(StepError::Boundary(BoundaryError::Cancelled(_))) => {}
        other => anyhow::bail!("{:?} of a boundary that does not answer", other.map(|(r, _)| r.loss)),
    }
    taken.1.ok_or_else(|| anyhow::anyhow!("nothing was sent"))
}

/// A reply that lacks a parameter's gradient, or has one that does not fit, must not leave the parameter at its start in silence.
pub fn count_check() -> anyhow::Result<()> {
    block(LIMIT, async {
        let h = halves(&nano_llava(), &Device::flex())?;
        let batch = batch(&h, 2).await?;
        let state = probe::adapters(8, h.edge.config.text.hidden);
        let adapters = NanoAdapters::from_state(&state, &h.device);
        type Change = fn(&mut BoundaryReply);
        let faults: [(&str, BoundaryMode, Change); 6] = [
            ("no d_up of text", BoundaryMode::LowRank, |r| codes(r, |c| c.up.text = None)),
            ("no u of text", BoundaryMode::LowRank, |r| codes(r, |c| c.codes.text = None)),
            ("another d_up", BoundaryMode::LowRank, |r| codes(r, |c| c.up.text = Some(TensorBlob::zeros(&[3, 8])))),
            ("another u", BoundaryMode::LowRank, |r| codes(r, |c| c.codes.image = Some(TensorBlob::zeros(&[1, 8])))),
            ("another g", BoundaryMode::Activations, |r| r.gradient = Gradient::Hidden(TensorBlob::zeros(&[1, 192]))),
            ("a row too few", BoundaryMode::Activations, |r| r.row_loss.truncate(1)),
        ];
        for (what, mode, change) in faults {
            let mut boundary = Faulty { inner: InProcess::new(&h.llm, mode), change };
            match step::gradients(&adapters, &batch, &mut boundary, &h.device).await {
                Err(StepError::Reply(cause)) => println!("{what}: {cause}"),
                other => anyhow::bail!("{what}: expected an error, got {:?}", other.map(|(r, _)| r.loss)),
            }
        }
        Ok(())
    })
}

fn codes(reply: &mut BoundaryReply, change: impl FnOnce(&mut CodesGradient)) {
    if let Gradient::Codes(codes) = &mut reply.gradient {
        change(codes);
    }
}

/// Changes each answer.
struct Faulty<B> {
    inner: B,
    change: fn(&mut BoundaryReply),
}

impl<B: LlmBoundary> LlmBoundary for Faulty<B> {
    fn mode(&self) -> BoundaryMode {
        self.inner.mode()
    }

    async fn send(&mut self, request: BoundaryRequest, batch: &Batch, place: Place) -> Result<(), BoundaryError> {
        self.inner.send(request, batch, place).await
    }

    async fn reply(&mut self) -> Result<BoundaryReply, BoundaryError> {
        let mut reply = self.inner.reply().await?;
        (self.change)(&mut reply);
        Ok(reply)
    }

    async fn evaluate(&mut self, request: BoundaryRequest, batch: &Batch) -> Result<EvaluationReply, BoundaryError> {
        self.inner.evaluate(request, batch).await
    }
}

pub fn over_the_wire() -> anyhow::Result<()> {
    block(LIMIT, async {
        anyhow::ensure!(!demo_held_out(0).samples.is_empty());
        let h = halves(&nano_llava(), &Device::flex())?;
        let cache = h.edge.encode(&probe::samples(), |_, _| {}).await?;
        for (boundary, mode) in MODES {
            let folder = tempfile::tempdir()?;
            let server =
                Server::start(FederationSettings { boundary, ..FederationSettings::exact() }, folder.path()).await?;
            // With the token table as the model has it, and as clients get it.
            let bundled = &server.app.held_out.edge;
            for (what, edge) in [("the model's own table", &h.edge), ("the bundle's table", &**bundled)] {
                let local = probe::run(edge, &mut InProcess::new(&h.llm, mode), &h.device).await?;
                let mut asker = asking(&server.socket, Offer::of(&cache, edge)).await?;
                let remote = probe::run(edge, &mut asker, &h.device).await?;
                // The wire carries f32 as they are: not one bit may differ.
                anyhow::ensure!(local == remote, "{mode}, {what}: the step over the wire differs from that in process");
            }
            server.stop().await?;
        }
        Ok(())
    })
}
