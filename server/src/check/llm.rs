//! The server's half: decoder, loss, gradients, also under the adapters. Everything starts from the reference's embeddings, so
//! that a fault of the client's half does not show here.

use burn::tensor::{Device, TensorCreationOptions};
use fednano_shared::boundary::{BoundaryReply, Gradient, Place};
use fednano_shared::check::adapters;
use fednano_shared::check::table::{Part, Table};
use fednano_shared::check::tensor;
use fednano_shared::model::adapter::{NanoAdapters, read};
use fednano_shared::model::checkpoint::load_llm;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::model::llama::Llama;
use fednano_shared::plain::{AdapterState, TensorBlob};
use fednano_shared::step::{FrozenLlm, InProcess, LlmBoundary};
use fednano_shared::wire::agreement::BoundaryMode;

/// The decoder twice: as its layers, and as the server holds it. The weights are shared.
pub(super) struct Decoder {
    pub(super) llm: Llama,
    frozen: FrozenLlm,
    /// With autodiff.
    pub(super) device: Device,
}

impl Decoder {
    pub(super) fn load(files: &ModelFiles, place: &TensorCreationOptions) -> anyhow::Result<Self> {
        let device = place.device.clone().autodiff();
        let llm = load_llm(&files.config, &files.weights, place.clone().with_device(device.clone()))?;
        let frozen = FrozenLlm::new(llm.clone(), &files.config.text, &device);
        Ok(Self { llm, frozen, device })
    }

    /// In this process, in either mode.
    pub(super) fn boundary(&self, mode: BoundaryMode) -> InProcess<'_> {
        InProcess::new(&self.frozen, mode)
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

    let request = inputs.request(&inputs.embeds);
    let targets = request.targets.clone();
    let evaluated = decoder.boundary(BoundaryMode::Activations).evaluate(request, &inputs.batch()).await?;
    let mut nll = TensorBlob::zeros(&[inputs.rows, inputs.seq]);
    for (t, value) in targets.iter().zip(&evaluated.nll) {
        nll.data[t.row as usize * inputs.seq + t.position as usize] = *value;
    }
    table.add("token_nll", &nll, Part::Real);
    answer(table, "", decoder, &inputs.embeds).await?;
    Ok(())
}

/// Loss and gradient at padded `h` `[B, S, D]`, compared.
async fn answer(
    table: &mut Table<'_>,
    prefix: &str,
    decoder: &Decoder,
    hidden: &TensorBlob,
) -> anyhow::Result<BoundaryReply> {
    let inputs = table.inputs;
    let mut boundary = decoder.boundary(BoundaryMode::Activations);
    boundary.send(inputs.request(hidden), &inputs.batch(), Place::ALONE).await?;
    let reply = boundary.reply().await?;
    losses(table, prefix, &reply);
    let Gradient::Hidden(g) = &reply.gradient else { anyhow::bail!("the answer is in another mode") };
    table.add_gradient(&format!("{prefix}grad.inputs_embeds"), &inputs.padded(g));
    Ok(reply)
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
    let module = NanoAdapters::from_state(state, device);
    let hidden = adapters::forward(table, &module, device).await?;
    let (_, _, logits) = decoder.forward(&hidden).await?;
    table.add("adapter.logits", &logits, Part::Real);

    let reply = answer(table, "adapter.", decoder, &hidden).await?;
    adapters::backward(table, &module, &reply, device).await?;
    let (batch, mut low_rank) = (table.inputs.batch(), decoder.boundary(BoundaryMode::LowRank));
    adapters::through(table, "@low-rank", &module, &batch, &mut low_rank, device).await?;
    Ok(hidden)
}
