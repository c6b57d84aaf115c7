//! The server's half and the adapters: decoder, loss, gradients, Fisher. Everything starts from the reference's embeddings, so that
//! a fault of the client's half does not show here.

use super::table::{Part, Table};
use super::tensor;
use burn::tensor::Device;
use fednano_shared::model::adapter::{NanoAdapters, read};
use fednano_shared::model::checkpoint::load_llm;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::model::llama::Llama;
use fednano_shared::plain::{AdapterState, BoundaryReply, TensorBlob};
use fednano_shared::step::{self, FrozenLlm, InProcess, LlmBoundary};

/// The decoder twice: as its layers, and as the server holds it. The weights are shared.
pub(super) struct Decoder {
    pub(super) llm: Llama,
    pub(super) frozen: FrozenLlm,
    /// With autodiff.
    pub(super) device: Device,
}

impl Decoder {
    pub(super) fn load(files: &ModelFiles, device: &Device) -> anyhow::Result<Self> {
        let device = device.clone().autodiff();
        let llm = load_llm(&files.config, &files.weights, &device)?;
        let frozen = FrozenLlm::new(llm.clone(), &files.config.text, &device);
        Ok(Self { llm, frozen, device })
    }

    /// Outputs of the layers and of the final norm `[B, S, D]`, logits `[B, S, V]`.
    async fn forward(&self, h: &TensorBlob) -> anyhow::Result<(Vec<TensorBlob>, TensorBlob, TensorBlob)> {
        let h = tensor::<3>(h, &self.device);
        let [b, s, d] = h.dims();
        let (layers, last) = self.llm.layer_outputs(h, &self.llm.causal_layout(s, &self.device));
        let mut outputs = Vec::with_capacity(layers.len());
        for layer in layers {
            outputs.push(read(layer.inner()).await?);
        }
        let mut logits = read(self.llm.logits(last.clone().reshape([b * s, d])).inner()).await?; // [B*S,V]
        logits.shape = vec![b, s, logits.data.len() / (b * s)];
        Ok((outputs, read(last.inner()).await?, logits))
    }
}

/// Compare decoder, loss and boundary gradient.
pub(super) async fn compare(table: &mut Table<'_>, decoder: &Decoder) -> anyhow::Result<()> {
    let inputs = table.inputs;
    let (layers, last, logits) = decoder.forward(&inputs.embeds).await?;
    for (i, layer) in layers.iter().enumerate() {
        table.add(&format!("llm.layer_output.{i}"), layer, Part::Real);
    }
    table.add("llm.final_hidden", &last, Part::Real);
    table.add("logits", &logits, Part::Real);

    let request = inputs.request(inputs.embeds.clone());
    let evaluated = InProcess(&decoder.frozen).evaluate(request.clone()).await?;
    let mut nll = TensorBlob::zeros(&[inputs.rows, inputs.seq]);
    for (t, value) in request.targets.iter().zip(&evaluated.nll) {
        nll.data[t.row as usize * inputs.seq + t.position as usize] = *value;
    }
    table.add("token_nll", &nll, Part::Real);
    let reply = InProcess(&decoder.frozen).train(request).await?;
    losses(table, "", &reply);
    table.add_gradient("grad.inputs_embeds", &reply.gradient);
    Ok(())
}

/// Mean over the batch's targets, and over each row's.
fn losses(table: &mut Table<'_>, prefix: &str, reply: &BoundaryReply) {
    table.add(&format!("{prefix}loss"), &TensorBlob { shape: vec![1], data: vec![reply.loss] }, Part::All);
    let rows = TensorBlob { shape: vec![reply.row_loss.len()], data: reply.row_loss.clone() };
    table.add(&format!("{prefix}per_sample_loss"), &rows, Part::All);
}

/// Compare everything about the adapters except decoding; the adapted embeddings are given back for that.
pub(super) async fn adapters(
    table: &mut Table<'_>,
    decoder: &Decoder,
    state: &AdapterState,
    device: &Device,
) -> anyhow::Result<TensorBlob> {
    let batch = table.inputs.batch();
    let adapters = NanoAdapters::from_state(state, &decoder.device);
    let hidden = step::adapted(Some(&adapters), &batch, device).await?;
    table.add("adapter.inputs_embeds", &hidden, Part::Real);
    let (_, _, logits) = decoder.forward(&hidden).await?;
    table.add("adapter.logits", &logits, Part::Real);

    let mut boundary = InProcess(&decoder.frozen);
    let (reply, gradients) = step::gradients(&adapters, &batch, &mut boundary, device).await?;
    losses(table, "adapter.", &reply);
    table.add_gradient("adapter.grad.inputs_embeds", &reply.gradient);
    for (name, gradient) in &gradients.0 {
        table.add(&format!("adapter.grad.{name}"), gradient, Part::All);
    }

    // The reply's loss is a mean over the batch's targets; a sample's own loss is one over its own.
    let mut g = reply.gradient;
    for (row, values) in g.data.chunks_exact_mut(table.inputs.seq * table.inputs.dim).enumerate() {
        let own = batch.targets.iter().filter(|t| t.row as usize == row).count().max(1);
        let scale = batch.targets.len() as f32 / own as f32;
        values.iter_mut().for_each(|v| *v *= scale);
    }
    let (x, mask) = (tensor(&batch.x, device), tensor(&batch.image_mask, device));
    let each = adapters.per_sample_gradients(x, tensor(&g, device), mask);
    for (name, gradient) in each {
        table.add(&format!("adapter.per_sample_grad.{name}"), &read(gradient).await?, Part::All);
    }

    let mut fisher = state.zeros_like();
    step::fisher_batch(&adapters, &batch, &mut boundary, device, &mut fisher).await?;
    for (name, sum) in &mut fisher.0 {
        sum.data.iter_mut().for_each(|v| *v /= table.inputs.rows as f32);
        table.add(&format!("adapter.fisher.{name}"), sum, Part::All);
    }
    Ok(hidden)
}
