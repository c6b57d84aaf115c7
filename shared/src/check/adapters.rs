//! The adapters on the client: `h` from `x`, then from a server's reply their gradients, those of each sample alone, and Fisher
//! values. They start from the reference's embeddings, so that a fault of the vision tower does not show here.

use super::table::{Part, Table};
use super::{CheckError, tensor};
use crate::model::adapter::{NanoAdapters, read};
use crate::plain::{BoundaryReply, BoundaryRequest, EvaluationReply, TensorBlob};
use crate::step::{self, BoundaryError, LlmBoundary};
use burn::tensor::Device;

/// Gives the one reply that is there, whoever has computed it.
struct Answered<'a>(&'a BoundaryReply);

impl LlmBoundary for Answered<'_> {
    async fn train(&mut self, _: BoundaryRequest) -> Result<BoundaryReply, BoundaryError> {
        Ok(self.0.clone())
    }

    async fn evaluate(&mut self, _: BoundaryRequest) -> Result<EvaluationReply, BoundaryError> {
        Err(BoundaryError::Refused("there is a reply to training only".into()))
    }
}

/// Compare the adapted embeddings `h` `[B, S, D]` and give them back. `adapters` are on `device` with autodiff.
///
/// # Errors
/// A lost device.
pub async fn forward(
    table: &mut Table<'_>,
    adapters: &NanoAdapters,
    device: &Device,
) -> Result<TensorBlob, CheckError> {
    let hidden = step::adapted(Some(adapters), &table.inputs.batch(), device).await?;
    table.add("adapter.inputs_embeds", &hidden, Part::Real);
    Ok(hidden)
}

/// Compare all that a client computes from the server's `reply` to `h`.
///
/// # Errors
/// A reply that does not fit, a lost device.
pub async fn backward(
    table: &mut Table<'_>,
    adapters: &NanoAdapters,
    reply: &BoundaryReply,
    device: &Device,
) -> Result<(), CheckError> {
    let inputs = table.inputs;
    let batch = inputs.batch();
    let (_, gradients) = step::gradients(adapters, &batch, &mut Answered(reply), device).await?;
    for (name, gradient) in &gradients.0 {
        table.add(&format!("adapter.grad.{name}"), gradient, Part::All);
    }

    // The reply's loss is a mean over the batch's targets; a sample's own loss is one over its own.
    let mut g = reply.gradient.clone();
    for (row, values) in g.data.chunks_exact_mut(inputs.seq * inputs.dim).enumerate() {
        let own = batch.targets.iter().filter(|t| t.row as usize == row).count().max(1);
        let scale = batch.targets.len() as f32 / own as f32;
        values.iter_mut().for_each(|v| *v *= scale);
    }
    let (x, mask) = (tensor(&batch.x, device), tensor(&batch.image_mask, device));
    for (name, gradient) in adapters.per_sample_gradients(x, tensor(&g, device), mask) {
        table.add(&format!("adapter.per_sample_grad.{name}"), &read(gradient).await?, Part::All);
    }

    let mut fisher = gradients.zeros_like();
    step::fisher_batch(adapters, &batch, &mut Answered(reply), device, &mut fisher).await?;
    for (name, sum) in &mut fisher.0 {
        sum.data.iter_mut().for_each(|v| *v /= inputs.rows as f32);
        table.add(&format!("adapter.fisher.{name}"), sum, Part::All);
    }
    Ok(())
}
