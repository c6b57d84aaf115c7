//! The model as it is trained: NanoEdge, LLM and a head for dense picture labels that is thrown away afterwards.

use burn::module::{Module, ModuleMapper, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Int, Tensor, TensorData};
use fednano_shared::config::ModelConfig;
use fednano_shared::data::scene::{Colour, Shape};
use fednano_shared::model::{checkpoint, clip::VisionTower, llama::Llama, projector::Projector};
use fednano_shared::plain::TensorBlob;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::corpus::PackedBatch;

/// Classes of the dense labels: shapes and "none", colours and "none", then one for an object's centre and one for its radius.
pub const SHAPE_CLASSES: usize = Shape::ALL.len() + 1;
/// See [`SHAPE_CLASSES`].
pub const COLOUR_CLASSES: usize = Colour::ALL.len() + 1;
/// All outputs of the dense head.
const DENSE_OUTPUTS: usize = SHAPE_CLASSES + COLOUR_CLASSES + 2;

/// What sees.
#[derive(Module, Debug)]
pub struct Eyes {
    /// Vision tower.
    pub vision_tower: VisionTower,
    /// Dense labels, training only: `[vision D, SHAPE_CLASSES + COLOUR_CLASSES + 2]`
    pub dense: Linear,
}

/// What connects and speaks.
#[derive(Module, Debug)]
pub struct Speech {
    /// Connector.
    pub projector: Projector,
    /// Token table `[V, D]`.
    pub table: Param<Tensor<2>>,
    /// Decoder and head.
    pub llm: Llama,
}

impl Eyes {
    /// Start values from `rng`.
    pub fn init(config: &ModelConfig, rng: &mut ChaCha8Rng, device: &Device) -> Self {
        let eyes = Self {
            vision_tower: VisionTower::init(config, device),
            dense: LinearConfig::new(config.vision.hidden, DENSE_OUTPUTS).init(device),
        };
        eyes.map(&mut StartValues { rng, path: Vec::new() })
    }

    /// `[B, 3, size, size]` -> `[B, P, vision D]`
    pub fn forward(&self, batch: &PackedBatch, size: usize, device: &Device) -> Tensor<3> {
        let pixels = TensorData::new(batch.pixels.clone(), [batch.rows, 3, size, size]);
        self.vision_tower.forward(Tensor::from_data(pixels, device))
    }
}

impl Speech {
    /// Start values from `rng`. Keys start close to queries ("mimetic", Trockman and Kolter 2023, arXiv 2305.09828), so that
    /// equal tokens attend to each other from the first step.
    pub fn init(config: &ModelConfig, rng: &mut ChaCha8Rng, device: &Device) -> Self {
        let table = Tensor::zeros([config.text.vocab, config.text.hidden], device);
        let speech = Self {
            projector: Projector::init(config, device),
            table: Param::from_tensor(table),
            llm: Llama::init(&config.text, device),
        };
        let mut speech = speech.map(&mut StartValues { rng, path: Vec::new() });
        if config.text.kv_heads == config.text.heads {
            for layer in &mut speech.llm.layers {
                let (q, k) =
                    (layer.self_attn.q_proj.weight.val().detach(), layer.self_attn.k_proj.weight.val().detach());
                let k = (q.clone() * 0.9 + k * 0.3) * 1.2;
                layer.self_attn.q_proj.weight = Param::from_tensor((q * 1.2).detach());
                layer.self_attn.k_proj.weight = Param::from_tensor(k.detach());
            }
        }
        speech
    }

    /// Hidden states of packed rows, `[B, S, D]`, from projected picture features `[B, P, D]`.
    pub fn forward(&self, batch: &PackedBatch, image: Tensor<3>, bos: u32) -> Tensor<3> {
        let device = image.device();
        let (b, d) = (batch.rows, self.table.dims()[1]);
        let ids: Vec<i64> = batch.text_ids.iter().map(|&id| i64::from(id)).collect();
        let text = self.embed(&ids, &device).reshape([b, ids.len() / b, d]);
        let start = self.embed(&[i64::from(bos)], &device).reshape([1, 1, d]).expand([b, 1, d]);
        let x = Tensor::cat(vec![start, image, text], 1); // [B,S,D]
        let layout = self.llm.packed_layout(&batch.positions, &batch.segments, &device);
        self.llm.forward(x, &layout)
    }

    /// Rows of the token table, `[N, D]`.
    pub fn embed(&self, ids: &[i64], device: &Device) -> Tensor<2> {
        let ids = Tensor::<1, Int>::from_data(TensorData::new(ids.to_vec(), [ids.len()]), device);
        self.table.val().select(0, ids)
    }
}

/// All weights that ship, by canonical name.
pub fn weights(eyes: &Eyes, speech: &Speech) -> Vec<(String, TensorBlob)> {
    let mut all = checkpoint::collect(&eyes.vision_tower, "vision_tower.");
    all.extend(checkpoint::collect(&speech.projector, "multi_modal_projector."));
    let table = speech.table.val();
    let shape = table.dims().to_vec();
    let data = table.into_data().convert::<f32>().try_into_vec().unwrap_or_default();
    all.push(("language_model.embed_tokens.weight".to_owned(), TensorBlob { shape, data }));
    all.extend(checkpoint::collect(&speech.llm, "language_model."));
    all
}

/// Scaled normal start values; norms keep 1, biases 0.
struct StartValues<'a> {
    rng: &'a mut ChaCha8Rng,
    path: Vec<String>,
}

impl ModuleMapper for StartValues<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const N: usize>(&mut self, param: Param<Tensor<N>>) -> Param<Tensor<N>> {
        let shape = param.lazy_shape().to_vec();
        let path = self.path.join(".");
        let ends = |names: &[&str]| names.iter().any(|n| path.contains(n));
        let fan_in: usize = if N == 4 { shape[1..].iter().product() } else { shape[0] };
        let deviation = match N {
            1 if ends(&["class_embedding"]) => 0.3,
            1 if ends(&["bias"]) => 0.0,
            1 => return param, // norms
            _ if ends(&["table", "position_embedding"]) => 0.3,
            _ if ends(&["lm_head"]) => 0.02,
            // What is added to the residual stream starts small.
            _ if ends(&["out_proj", "fc2", "o_proj", "down_proj"]) => 0.3 / (fan_in as f32).sqrt(),
            _ => 0.8 / (fan_in as f32).sqrt(),
        };
        let rng = &mut *self.rng;
        let count: usize = shape.iter().product();
        let data: Vec<f32> = (0..count).map(|_| deviation * normal(rng)).collect();
        let device = param.lazy_device();
        Param::from_tensor(Tensor::from_data(TensorData::new(data, shape), &device))
    }
}

fn normal<R: Rng>(rng: &mut R) -> f32 {
    fednano_shared::model::adapter::standard_normal(rng)
}
