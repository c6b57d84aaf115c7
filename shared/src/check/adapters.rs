//! The adapters on the client: `h` from `x`, then from a server's reply their gradients, those of each sample alone, and Fisher
//! values. They start from the reference's embeddings, so that a fault of the vision tower does not show here.

use super::table::{Part, Table};
use super::{CheckError, tensor};
use crate::boundary::{BoundaryReply, BoundaryRequest, EvaluationReply, Gradient, Place};
use crate::edge::Batch;
use crate::model::adapter::{NanoAdapters, OfRows, read};
use crate::plain::{AdapterState, TensorBlob};
use crate::step::{self, BoundaryError, LlmBoundary, StepError};
use crate::wire::agreement::BoundaryMode;
use burn::tensor::Device;

/// Gives the one reply that is there, whoever has computed it.
struct Answered<'a>(&'a BoundaryReply);

impl LlmBoundary for Answered<'_> {
    fn mode(&self) -> BoundaryMode {
        BoundaryMode::Activations
    }

    async fn send(&mut self, _: BoundaryRequest, _: &Batch, _: Place) -> Result<(), BoundaryError> {
        Ok(())
    }

    async fn reply(&mut self) -> Result<BoundaryReply, BoundaryError> {
        Ok(self.0.clone())
    }

    async fn evaluate(&mut self, _: BoundaryRequest, _: &Batch) -> Result<EvaluationReply, BoundaryError> {
        Err(BoundaryError::Refused("there is a reply to training only".into()))
    }
}

/// Compare the adapted embeddings `h` `[B, S, D]` and give them back. `adapters` are on `device`, without autodiff.
///
/// # Errors
/// A lost device.
pub async fn forward(
    table: &mut Table<'_>,
    adapters: &NanoAdapters,
    device: &Device,
) -> Result<TensorBlob, CheckError> {
    let hidden = table.inputs.padded(&step::adapted(Some(adapters), &table.inputs.batch(), device).await?);
    table.add("adapter.inputs_embeds", &hidden, Part::Real);
    Ok(hidden)
}

/// Compare all that a client computes from the server's `reply` to `h`, which is in mode `activations`.
///
/// # Errors
/// A reply that does not fit, a lost device.
pub async fn backward(
    table: &mut Table<'_>,
    adapters: &NanoAdapters,
    reply: &BoundaryReply,
    device: &Device,
) -> Result<(), CheckError> {
    let batch = table.inputs.batch();
    through(table, "", adapters, &batch, &mut Answered(reply), device).await?;
    let Gradient::Hidden(g) = &reply.gradient else {
        return Err(StepError::Reply("it is not of mode activations".into()).into());
    };
    let (x, g) = (tensor::<2>(&batch.x, device), tensor::<2>(g, device)); // [T,D]
    let encoded = adapters.encode(&x, &batch.positions);
    let (u, _) = adapters.backward_hidden(&encoded, &g, false);
    let down = adapters.backward_rows(&encoded, &u);
    let up = adapters.backward_hidden_rows(&encoded, &g);
    for (part, rows) in down.iter() {
        add_rows(table, part.down_name(), rows, &batch).await?;
    }
    for (part, rows) in up.iter() {
        add_rows(table, part.up_name(), rows, &batch).await?;
    }
    Ok(())
}

/// Compare gradients and Fisher values that come of a boundary; `way` is put behind the rows' names.
///
/// # Errors
/// What goes wrong in a step.
pub async fn through<B: LlmBoundary>(
    table: &mut Table<'_>,
    way: &str,
    adapters: &NanoAdapters,
    batch: &Batch,
    boundary: &mut B,
    device: &Device,
) -> Result<(), CheckError> {
    let (_, gradients) = step::gradients(adapters, batch, boundary, device).await?;
    add_all(table, "adapter.grad.", way, &gradients);
    let mut fisher = gradients.zeros_like();
    step::fisher_group(adapters, std::slice::from_ref(batch), boundary, device, &mut fisher).await?;
    fisher.0.values_mut().flat_map(|sum| &mut sum.data).for_each(|v| *v /= batch.positions.rows() as f32);
    add_all(table, "adapter.fisher.", way, &fisher);
    Ok(())
}

fn add_all(table: &mut Table<'_>, before: &str, behind: &str, tensors: &AdapterState) {
    for (name, blob) in &tensors.0 {
        table.add(&format!("{before}{name}{behind}"), blob, Part::All);
    }
}

/// Compare the gradients of each sample's own loss, `[B, ..]`. The reply's loss is a mean over the batch's targets, a sample's own one
/// over its own.
async fn add_rows(table: &mut Table<'_>, name: &str, rows: &OfRows, batch: &Batch) -> Result<(), CheckError> {
    let mut all = TensorBlob { shape: vec![batch.positions.rows()], data: Vec::new() };
    for (row, gradient) in rows {
        let own = batch.targets.iter().filter(|t| t.row as usize == *row).count().max(1);
        let scale = batch.targets.len() as f32 / own as f32;
        let TensorBlob { shape, data } = read(gradient.clone()).await?;
        // Rows without a position of this adapter have no gradient: 0.
        all.data.resize(row * data.len(), 0.0);
        all.data.extend(data.iter().map(|v| v * scale));
        all.shape = [vec![batch.positions.rows()], shape].concat();
    }
    let count = all.shape.iter().product();
    all.data.resize(count, 0.0);
    table.add(&format!("adapter.per_sample_grad.{name}"), &all, Part::All);
    Ok(())
}
