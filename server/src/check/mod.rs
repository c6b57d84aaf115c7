//! Is a checkpoint computed here as PyTorch and transformers compute it? Tensor by tensor, from picture files to Fisher values and
//! decoded tokens, against reference values that `tests/fixtures/make_fixture.py` makes.
//!
//! | module | what |
//! | --- | --- |
//! | `limits` | the one table of limits |
//! | `reference` | reference values, and the inputs among them |
//! | `table` | rows under construction |
//! | `report` | what came out, for people and as JSON |
//! | `edge` | the client's half: pictures, texts, vision tower, embeddings |
//! | `llm` | the server's half and the adapters: decoder, loss, gradients, Fisher |
//! | `generation` | greedy decoding, with the cache and without |

mod edge;
mod generation;
pub mod limits;
mod llm;
pub mod reference;
pub mod report;
mod table;

pub use report::Report;

use anyhow::Context;
use burn::tensor::{Device, Tensor, TensorData};
use fednano_shared::edge::NanoEdge;
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::plain::TensorBlob;
use fednano_shared::probe;
use fednano_shared::step::InProcess;
use futures_executor::block_on;
use reference::{Inputs, Reference};
use report::{Row, Verdict};
use std::path::Path;
use table::Table;

/// Compare a checkpoint on a device with the reference values in `expected` (a safetensors file's bytes). `dir` holds what they
/// were made from: `images/image_N.png` and `meta.json`.
///
/// Each stage starts from the reference's own inputs, so the first rows that fail are where the fault is.
///
/// # Errors
/// A checkpoint that cannot be loaded, reference values of another checkpoint, a lost device. Values that are off are rows of the
/// report, not errors.
pub fn compare(files: &ModelFiles, dir: &Path, expected: &[u8], device: &Device) -> anyhow::Result<Report> {
    let reference = Reference::parse(expected)?;
    let inputs = Inputs::of(&reference, &files.config)?;
    block_on(all(Table::new(&reference, &inputs), files, dir, device))
}

async fn all(mut table: Table<'_>, files: &ModelFiles, dir: &Path, device: &Device) -> anyhow::Result<Report> {
    let inputs = table.inputs;
    let token_table = edge::compare(&mut table, files, dir, device).await?;
    let decoder = llm::Decoder::load(files, device)?;
    llm::compare(&mut table, &decoder).await?;
    let plain = generation::Embedder { table: &token_table, adapters: None, device };
    generation::compare(&mut table, "", &decoder, &plain, &inputs.embeds).await?;
    if let Some(state) = table.reference.adapter(inputs.dim)? {
        let hidden = llm::adapters(&mut table, &decoder, &state, device).await?;
        let adapters = NanoAdapters::from_state(&state, &decoder.device);
        let adapted = generation::Embedder { table: &token_table, adapters: Some(&adapters), device };
        generation::compare(&mut table, "adapter.", &decoder, &adapted, &hidden).await?;
    }
    Ok(table.finish())
}

/// Without reference values: load everything, run the training step forward and backward on built-in pictures, and see that every
/// result is finite. This proves that the model runs, not that it is right.
///
/// # Errors
/// A checkpoint that cannot be loaded, a lost device, or activations and gradients that the step itself refuses.
pub fn finite(files: &ModelFiles, device: &Device) -> anyhow::Result<Report> {
    let edge = NanoEdge::load(files, device)?;
    let decoder = llm::Decoder::load(files, device)?;
    let got = block_on(probe::run(&edge, &mut InProcess(&decoder.frozen), device))
        .context("the training step does not run on this checkpoint")?;
    let row = |name: &str, shape: &[usize], data: &[f32]| match data.iter().position(|v| !v.is_finite()) {
        None => Row::plain(name, shape, Verdict::Ok, "finite"),
        Some(at) => Row::plain(name, shape, Verdict::Failed, format!("{} at {at}", data[at])),
    };
    let blob = |name: &str, values: &TensorBlob| row(name, &values.shape, &values.data);
    let mut rows = vec![
        blob("image_features", &got.features),
        blob("adapter.inputs_embeds", &got.hidden),
        row("adapter.loss", &[1], &[got.loss]),
        row("adapter.per_sample_loss", &[got.row_loss.len()], &got.row_loss),
        blob("adapter.grad.inputs_embeds", &got.gradient),
    ];
    rows.extend(got.adapter_gradients.0.iter().map(|(name, b)| blob(&format!("adapter.grad.{name}"), b)));
    rows.extend(got.fisher.0.iter().map(|(name, b)| blob(&format!("adapter.fisher.{name}"), b)));
    Ok(Report::new(rows))
}

fn tensor<const N: usize>(blob: &TensorBlob, device: &Device) -> Tensor<N> {
    Tensor::from_data(TensorData::new(blob.data.clone(), blob.shape.clone()), device)
}
