//! Against PyTorch and transformers: `tests/fixtures/tiny-llava`, made by `tests/fixtures/make_fixture.py`. The limits are those
//! of the fixture's documentation: ten times the float noise of a second implementation, a tenth of the smallest mistake.

use burn::tensor::{Device, Tensor, TensorData};
use fednano_shared::edge::Batch;
use fednano_shared::model::adapter::{NanoAdapters, read};
use fednano_shared::model::checkpoint::{Weights, load_edge};
use fednano_shared::model::files::ModelFiles;
use fednano_shared::plain::{AdapterState, BoundaryRequest, Target, TensorBlob};
use fednano_shared::step::{self, InProcess, LlmBoundary};
use fednano_tests::{LIMIT, adapters_close, block, close, fixture, halves};
use safetensors::SafeTensors;

struct Expected {
    floats: Weights,
    bytes: Vec<u8>,
}

impl Expected {
    fn open() -> anyhow::Result<Self> {
        let bytes = std::fs::read(fixture().join("expected.safetensors"))?;
        Ok(Self { floats: Weights::from_files(vec![("expected".into(), bytes.clone())])?, bytes })
    }

    fn float(&self, name: &str) -> anyhow::Result<TensorBlob> {
        self.floats.read(name).map_err(anyhow::Error::msg)
    }

    fn int(&self, name: &str) -> anyhow::Result<Vec<i64>> {
        let file = SafeTensors::deserialize(&self.bytes)?;
        let view = file.tensor(name)?;
        Ok(match view.data().len() / view.shape().iter().product::<usize>() {
            1 => view.data().iter().map(|b| i64::from(*b)).collect(),
            _ => view
                .data()
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
                .collect(),
        })
    }

    /// The request that the reference answers: `hidden` with all label positions as targets.
    fn request(&self, hidden: TensorBlob) -> anyhow::Result<BoundaryRequest> {
        let seq = hidden.shape[1];
        let lengths = self.int("attention_mask")?.chunks(seq).map(|r| r.iter().sum::<i64>() as u32).collect();
        let mut targets = Vec::new();
        for (row, labels) in self.int("labels")?.chunks(seq).enumerate() {
            for (t, &label) in labels.iter().enumerate().filter(|(_, l)| **l >= 0) {
                targets.push(Target { row: row as u32, position: t as u32 - 1, token: label as u32 });
            }
        }
        Ok(BoundaryRequest { hidden, lengths, targets })
    }

    fn adapter(&self, prefix: &str) -> anyhow::Result<AdapterState> {
        let tensors = AdapterState::NAMES.iter().map(|n| Ok(((*n).to_owned(), self.float(&format!("{prefix}.{n}"))?)));
        Ok(AdapterState(tensors.collect::<anyhow::Result<_>>()?))
    }
}

pub fn vision_and_projector() -> anyhow::Result<()> {
    block(LIMIT, async {
        let expected = Expected::open()?;
        let files = ModelFiles::open(&fixture())?;
        let device = Device::flex();
        let parts = load_edge(&files.config, &files.weights, &device)?;
        let pixels = expected.float("pixel_values")?;
        let pixels = Tensor::<4>::from_data(TensorData::new(pixels.data, pixels.shape), &device);
        for (i, state) in parts.vision.hidden_states(pixels.clone()).into_iter().enumerate() {
            close("hidden state", &read(state).await?, &expected.float(&format!("vision.hidden_states.{i}"))?, 1e-5)?;
        }
        let selected = parts.vision.forward(pixels);
        close("selected", &read(selected.clone()).await?, &expected.float("vision.selected")?, 1e-5)?;
        close(
            "image features",
            &read(parts.projector.forward(selected)).await?,
            &expected.float("image_features")?,
            1e-5,
        )
    })
}

pub fn preprocessing() -> anyhow::Result<()> {
    let expected = Expected::open()?;
    let files = ModelFiles::open(&fixture())?;
    let want = expected.int("image_u8")?;
    let mut got = Vec::new();
    for i in 0..2 {
        let picture = fednano_server::datasets::read_picture(&fixture().join(format!("images/image_{i}.png")))
            .map_err(anyhow::Error::msg)?;
        got.extend(files.preprocess.resize(&picture)?.rgb.into_iter().map(i64::from));
    }
    anyhow::ensure!(got.len() == want.len(), "{} values, expected {}", got.len(), want.len());
    let worst = got.iter().zip(&want).map(|(g, w)| (g - w).abs()).max().unwrap_or(0);
    anyhow::ensure!(worst <= 1, "a value differs by {worst} levels");
    Ok(())
}

pub fn boundary() -> anyhow::Result<()> {
    block(LIMIT, async {
        let expected = Expected::open()?;
        let h = halves(&fixture(), &Device::flex())?;
        let request = expected.request(expected.float("inputs_embeds")?)?;
        let reply = InProcess(&h.llm).train(request.clone()).await?;
        let loss = TensorBlob { shape: vec![1], data: vec![reply.loss] };
        close("loss", &loss, &expected.float("loss")?, 5e-6)?;
        let rows = TensorBlob { shape: vec![reply.row_loss.len()], data: reply.row_loss };
        close("loss of each sample", &rows, &expected.float("per_sample_loss")?, 5e-6)?;
        close("gradient", &reply.gradient, &expected.float("grad.inputs_embeds")?, 3e-4)?;
        let evaluated = InProcess(&h.llm).evaluate(request.clone()).await?;
        let nll = expected.float("token_nll")?;
        let seq = request.hidden.shape[1];
        let want =
            request.targets.iter().map(|t| nll.data[t.row as usize * seq + t.position as usize]).collect::<Vec<_>>();
        let count = vec![want.len()];
        close(
            "likelihoods",
            &TensorBlob { shape: count.clone(), data: evaluated.nll },
            &TensorBlob { shape: count, data: want },
            1e-4,
        )
    })
}

pub fn adapters() -> anyhow::Result<()> {
    block(LIMIT, async {
        let expected = Expected::open()?;
        let h = halves(&fixture(), &Device::flex())?;
        let x = expected.float("inputs_embeds")?;
        let mask = expected.int("image_mask")?.into_iter().map(|v| v as f32).collect();
        let request = expected.request(x.clone())?;
        let batch = Batch {
            image_mask: TensorBlob { shape: vec![x.shape[0], x.shape[1], 1], data: mask },
            x,
            lengths: request.lengths,
            targets: request.targets,
        };
        let state = expected.adapter("adapter")?;
        let adapters = NanoAdapters::from_state(&state, &h.device.clone().autodiff());
        let hidden = step::adapted(Some(&adapters), &batch, &h.device).await?;
        close("adapted embeddings", &hidden, &expected.float("adapter.inputs_embeds")?, 1e-5)?;
        let (reply, gradients) = step::gradients(&adapters, &batch, &mut InProcess(&h.llm), &h.device).await?;
        let loss = TensorBlob { shape: vec![1], data: vec![reply.loss] };
        close("loss", &loss, &expected.float("adapter.loss")?, 5e-6)?;
        close("gradient", &reply.gradient, &expected.float("adapter.grad.inputs_embeds")?, 3e-4)?;
        adapters_close("gradient", &gradients, &expected.adapter("adapter.grad")?, 3e-4)?;
        let mut fisher = AdapterState::zeros(state.0["image.down"].shape[0], state.0["image.down"].shape[1]);
        step::fisher_batch(&adapters, &batch, &mut InProcess(&h.llm), &h.device, &mut fisher).await?;
        let samples = batch.lengths.len() as f32;
        fisher.0.values_mut().flat_map(|b| &mut b.data).for_each(|v| *v /= samples);
        adapters_close("Fisher", &fisher, &expected.adapter("adapter.fisher")?, 3e-4)
    })
}
