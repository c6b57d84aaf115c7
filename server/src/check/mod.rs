//! Is a checkpoint computed here as PyTorch and transformers compute it? Tensor by tensor, from picture files to Fisher values and
//! decoded tokens, against reference values that `tests/fixtures/make_fixture.py` makes. Limits, rows and the client's half are
//! `fednano_shared::check`, which a tab runs too.
//!
//! | module | what |
//! | --- | --- |
//! | `llm` | the server's half: decoder, loss, gradients, also under the adapters |
//! | `generation` | greedy decoding, with the cache and without |

mod generation;
mod llm;

pub use fednano_shared::check::report::{self, Report};

use crate::datasets::read_picture;
use anyhow::Context;
use burn::tensor::TensorCreationOptions;
use fednano_shared::check::reference::{Inputs, Reference};
use fednano_shared::check::report::{Row, Verdict};
use fednano_shared::check::table::Table;
use fednano_shared::check::{META, Originals, edge};
use fednano_shared::edge::NanoEdge;
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::model::files::{ModelFiles, SmallFiles};
use fednano_shared::plain::TensorBlob;
use fednano_shared::probe;
use fednano_shared::wire::agreement::BoundaryMode;
use futures_executor::block_on;
use std::path::Path;

/// Compare a checkpoint with the reference values in `expected` (a safetensors file's bytes), where and with the LLM in what type
/// `place` says (a device means f32, which the limits are for). `dir` holds what they were made from: `images/image_N.png` and
/// `meta.json`.
///
/// Each stage starts from the reference's own inputs, so the first rows that fail are where the fault is.
///
/// # Errors
/// A checkpoint that cannot be loaded, reference values of another checkpoint, a lost device. Values that are off are rows of the
/// report, not errors.
pub fn compare(
    files: &ModelFiles,
    dir: &Path,
    expected: &[u8],
    place: impl Into<TensorCreationOptions>,
) -> anyhow::Result<Report> {
    let reference = Reference::parse(expected)?;
    let inputs = Inputs::of(&reference, &files.config)?;
    block_on(all(Table::new(&reference, &inputs), files, dir, &place.into()))
}

async fn all(
    mut table: Table<'_>,
    files: &ModelFiles,
    dir: &Path,
    place: &TensorCreationOptions,
) -> anyhow::Result<Report> {
    let (inputs, device) = (table.inputs, &place.device);
    let small =
        SmallFiles { config: files.config.clone(), text: files.text.clone(), preprocess: files.preprocess.clone() };
    let edge = edge::compare(&mut table, small, &files.weights, &originals(dir, inputs.rows), device).await?;
    let decoder = llm::Decoder::load(files, place)?;
    llm::compare(&mut table, &decoder).await?;
    let plain = generation::Embedder { edge: &edge, adapters: None, device };
    generation::compare(&mut table, "", &decoder, &plain, &inputs.embeds).await?;
    if let Some(state) = table.reference.adapter(inputs.dim)? {
        let hidden = llm::adapters(&mut table, &decoder, &state, device).await?;
        let adapters = NanoAdapters::from_state(&state, device);
        let adapted = generation::Embedder { edge: &edge, adapters: Some(&adapters), device };
        generation::compare(&mut table, "adapter.", &decoder, &adapted, &hidden).await?;
    }
    Ok(table.finish("no counterpart in this program"))
}

/// What the reference's folder has besides the values.
fn originals(dir: &Path, rows: usize) -> Originals {
    let named = |path: &Path, cause: String| format!("{}: {cause}", path.display());
    let picture = |row: usize| {
        let path = dir.join(format!("images/image_{row}.png"));
        read_picture(&path).map_err(|cause| named(&path, cause))
    };
    let meta = dir.join(META);
    Originals {
        pictures: (0..rows).map(picture).collect(),
        meta: std::fs::read(&meta).map_err(|e| named(&meta, e.to_string())),
    }
}

/// Without reference values: load everything, run the training step forward and backward on built-in pictures, and see that every
/// result is finite. This proves that the model runs, not that it is right.
///
/// # Errors
/// A checkpoint that cannot be loaded, a lost device, or activations and gradients that the step itself refuses.
pub fn finite(files: &ModelFiles, place: impl Into<TensorCreationOptions>) -> anyhow::Result<Report> {
    let place: TensorCreationOptions = place.into();
    let device = &place.device;
    let edge = NanoEdge::load(files, device)?;
    let decoder = llm::Decoder::load(files, &place)?;
    let got = block_on(probe::run(&edge, &mut decoder.boundary(BoundaryMode::Activations), device))
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
