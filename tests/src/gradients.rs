//! The split training step against the whole, against finite differences, and over the wire.

use burn::module::Param;
use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use fednano_server::app::demo_held_out;
use fednano_shared::edge::Batch;
use fednano_shared::model::adapter::{NanoAdapters, read};
use fednano_shared::model::checkpoint::load_llm;
use fednano_shared::plain::{AdapterState, BoundaryRequest, TensorBlob};
use fednano_shared::probe;
use fednano_shared::settings::{AdapterChoice, FederationSettings};
use fednano_shared::step::{self, InProcess, StepError};
use fednano_tests::{Halves, LIMIT, Server, adapters_close, asking, block, close, halves, nano_llava};
use std::collections::BTreeMap;

/// The same numbers in another order of summation: float noise of the reference is 6e-5 for gradients.
const NOISE: f64 = 1e-4;

async fn batch(h: &Halves, rows: usize) -> anyhow::Result<Batch> {
    let cache = h.edge.encode(&probe::samples(), |_, _| {}).await?;
    Ok(h.edge.batch(&cache, &(0..rows.min(cache.samples.len())).collect::<Vec<_>>()))
}

fn tensor<const N: usize>(blob: &TensorBlob, device: &Device) -> Tensor<N> {
    Tensor::from_data(TensorData::new(blob.data.clone(), blob.shape.clone()), device)
}

/// The whole: adapters, LLM and loss on one autodiff graph, no boundary.
pub fn split_equals_whole() -> anyhow::Result<()> {
    block(LIMIT, async {
        let h = halves(&nano_llava(), &Device::flex())?;
        let autodiff = h.device.clone().autodiff();
        let llm = load_llm(&h.files.config, &h.files.weights, &autodiff)?;
        let batch = batch(&h, 4).await?;
        let adapters = NanoAdapters::from_state(&probe::adapters(8, h.edge.config.text.hidden), &autodiff);

        let hidden = adapters.forward(tensor(&batch.x, &autodiff), tensor(&batch.image_mask, &autodiff));
        let [b, s, d] = hidden.dims();
        let states = llm.forward(hidden, &llm.causal_layout(s, &autodiff)).reshape([b * s, d]);
        let at: Vec<i64> = batch.targets.iter().map(|t| i64::from(t.row) * s as i64 + i64::from(t.position)).collect();
        let tokens: Vec<i64> = batch.targets.iter().map(|t| i64::from(t.token)).collect();
        let count = at.len();
        let index = |v: Vec<i64>| Tensor::<1, Int>::from_data(TensorData::new(v, [count]), &autodiff);
        let logits = llm.logits(states.select(0, index(at)));
        let loss = activation::log_softmax(logits, 1).gather(1, index(tokens).reshape([count, 1])).mean().neg();
        let gradients = loss.backward();
        let mut whole = BTreeMap::new();
        for (name, param) in adapters.named() {
            let gradient = param.val().grad(&gradients).ok_or_else(|| anyhow::anyhow!("{name} has no gradient"))?;
            whole.insert(name.to_owned(), read(gradient).await?);
        }

        let (reply, split) = step::gradients(&adapters, &batch, &mut InProcess(&h.llm), &h.device).await?;
        let scalar = |v: f32| TensorBlob { shape: vec![1], data: vec![v] };
        close("loss", &scalar(reply.loss), &scalar(loss.inner().into_scalar::<f32>()), 1e-5)?;
        adapters_close("gradient", &split, &AdapterState(whole), NOISE)?;

        // Fisher from one reply equals Fisher from one whole backward pass for each sample.
        let mut fisher = AdapterState::zeros(AdapterChoice::Both, 8, d);
        step::fisher_batch(&adapters, &batch, &mut InProcess(&h.llm), &h.device, &mut fisher).await?;
        let mut single = AdapterState::zeros(AdapterChoice::Both, 8, d);
        for row in 0..b {
            let one = only(&batch, row);
            let (_, gradient) = step::gradients(&adapters, &one, &mut InProcess(&h.llm), &h.device).await?;
            for (sum, g) in single.0.values_mut().zip(gradient.0.values()) {
                sum.data.iter_mut().zip(&g.data).for_each(|(s, g)| *s += g * g);
            }
        }
        adapters_close("Fisher", &fisher, &single, 3e-4)
    })
}

/// One row of a batch, without its padding.
fn only(batch: &Batch, row: usize) -> Batch {
    let (seq, d) = (batch.x.shape[1], batch.x.shape[2]);
    let length = batch.lengths[row] as usize;
    Batch {
        x: TensorBlob {
            shape: vec![1, length, d],
            data: batch.x.data[row * seq * d..(row * seq + length) * d].to_vec(),
        },
        image_mask: TensorBlob {
            shape: vec![1, length, 1],
            data: batch.image_mask.data[row * seq..row * seq + length].to_vec(),
        },
        lengths: vec![length as u32],
        targets: batch
            .targets
            .iter()
            .filter(|t| t.row as usize == row)
            .map(|t| fednano_shared::plain::Target { row: 0, ..*t })
            .collect(),
    }
}

/// Central differences of the loss along the gradient and along a fixed direction, for each tensor.
pub fn finite_differences() -> anyhow::Result<()> {
    block(LIMIT, async {
        let h = halves(&nano_llava(), &Device::flex())?;
        let batch = batch(&h, 4).await?;
        let state = probe::adapters(8, h.edge.config.text.hidden);
        let autodiff = h.device.clone().autodiff();
        let adapters = NanoAdapters::from_state(&state, &autodiff);
        let (_, gradients) = step::gradients(&adapters, &batch, &mut InProcess(&h.llm), &h.device).await?;
        for name in AdapterState::NAMES {
            let g = &gradients.0[name].data;
            let norm = g.iter().map(|v| v * v).sum::<f32>().sqrt();
            anyhow::ensure!(norm > 1e-4, "{name}: the gradient is {norm}, nothing is tested");
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
                    let adapters = NanoAdapters::from_state(&moved, &autodiff);
                    let (batch, h) = (&batch, &h);
                    async move {
                        let reply = step::gradients(&adapters, batch, &mut InProcess(&h.llm), &h.device).await?.0;
                        anyhow::Ok(f64::from(reply.loss))
                    }
                };
                // Small enough for curvature, large enough for f32; two sizes show which one dominates.
                let mut best = f64::INFINITY;
                for size in [0.02f32, 0.005] {
                    let slope = (at(size).await? - at(-size).await?) / (2.0 * f64::from(size));
                    println!("{name} {what}: slope {slope:.5}, expected {expected:.5}, gradient norm {norm:.5}");
                    best = best.min((slope - expected).abs() / f64::from(norm));
                }
                anyhow::ensure!(best < 0.02, "{name} {what}: slope and gradient differ by {:.1} %", best * 100.0);
            }
        }
        Ok(())
    })
}

/// What the LLM host merges comes back unmixed.
pub fn merged_requests() -> anyhow::Result<()> {
    block(LIMIT, async {
        let h = halves(&nano_llava(), &Device::flex())?;
        let batch = batch(&h, 4).await?;
        let requests: Vec<BoundaryRequest> = [vec![0, 2], vec![1], vec![3]]
            .iter()
            .map(|rows: &Vec<usize>| {
                let mut parts = rows.iter().map(|r| only(&batch, *r));
                let first = parts.next().unwrap_or_else(|| only(&batch, 0));
                let mut request = BoundaryRequest { hidden: first.x, lengths: first.lengths, targets: first.targets };
                for part in parts {
                    append(&mut request, part);
                }
                request
            })
            .collect();
        let together = h.llm.train(&requests.iter().collect::<Vec<_>>()).await?;
        for (request, merged) in requests.iter().zip(together) {
            let alone = h.llm.train(&[request]).await?.remove(0);
            close("gradient", &merged.gradient, &alone.gradient, NOISE)?;
            anyhow::ensure!((merged.loss - alone.loss).abs() < 1e-4, "loss {} and {}", merged.loss, alone.loss);
            anyhow::ensure!(merged.row_loss.len() == request.lengths.len(), "rows are mixed up");
        }
        Ok(())
    })
}

fn append(request: &mut BoundaryRequest, part: Batch) {
    let d = request.hidden.shape[2];
    let seq = request.hidden.shape[1].max(part.x.shape[1]);
    let pad = |data: &[f32], from: usize| {
        data.chunks(from * d)
            .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, seq * d - row.len())))
            .collect::<Vec<_>>()
    };
    let rows = request.hidden.shape[0];
    let mut data = pad(&request.hidden.data, request.hidden.shape[1]);
    data.extend(pad(&part.x.data, part.x.shape[1]));
    request.hidden = TensorBlob { shape: vec![rows + 1, seq, d], data };
    request.lengths.extend(part.lengths);
    request.targets.extend(part.targets.into_iter().map(|t| fednano_shared::plain::Target { row: rows as u32, ..t }));
}

/// burn skips parameters without gradient in silence; the step must not.
pub fn count_check() -> anyhow::Result<()> {
    block(LIMIT, async {
        let h = halves(&nano_llava(), &Device::flex())?;
        let batch = batch(&h, 2).await?;
        let state = probe::adapters(8, h.edge.config.text.hidden);
        let mut adapters = NanoAdapters::from_state(&state, &h.device.clone().autodiff());
        if let Some(text) = &mut adapters.text {
            text.up = Param::initialized(text.up.id, text.up.val().detach()).set_require_grad(false);
        }
        match step::gradients(&adapters, &batch, &mut InProcess(&h.llm), &h.device).await {
            Err(StepError::GradientCount { found: 3, .. }) => Ok(()),
            other => anyhow::bail!("expected a gradient-count error, got {:?}", other.map(|(r, _)| r.loss)),
        }
    })
}

pub fn over_the_wire() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        anyhow::ensure!(!demo_held_out(0).samples.is_empty());
        let server = Server::start(FederationSettings::default(), folder.path()).await?;
        let h = halves(&nano_llava(), &Device::flex())?;
        let local = probe::run(&h.edge, &mut InProcess(&h.llm), &h.device).await?;
        let remote = probe::run(&h.edge, &mut asking(&server.socket).await?, &h.device).await?;
        // The wire carries f32 as they are: not one bit may differ.
        anyhow::ensure!(local == remote, "the step over the wire differs from the step in process");
        server.stop().await
    })
}
