//! CLIP's vision tower, up to the hidden state that LLaVA reads. Field names are Hugging Face's, so that a parameter's
//! path is its key in the checkpoint.

use super::{activate, attend, split_heads};
use crate::config::{Activation, FeatureSelect, ModelConfig, VisionConfig};
use burn::module::{Module, Param};
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::{Device, Distribution, Tensor};

/// Pixels to token features.
#[derive(Module, Debug)]
pub struct VisionTower {
    /// Patch, class and position embeddings.
    pub embeddings: Embeddings,
    /// Spelt as in the published files.
    pub pre_layrnorm: LayerNorm,
    /// Transformer layers up to the feature layer.
    pub encoder: Encoder,
    #[module(skip)]
    keep_cls: bool,
}

/// Patch, class and position embeddings.
#[derive(Module, Debug)]
pub struct Embeddings {
    /// `[D]`
    pub class_embedding: Param<Tensor<1>>,
    /// Convolution whose stride is its kernel, without bias.
    pub patch_embedding: PatchEmbedding,
    /// Learned positions, row 0 is CLS.
    pub position_embedding: PositionEmbedding,
}

/// A convolution with stride = kernel, which is a matrix product over flattened patches.
#[derive(Module, Debug)]
pub struct PatchEmbedding {
    /// `[D, 3, patch, patch]`
    pub weight: Param<Tensor<4>>,
}

/// Learned position table.
#[derive(Module, Debug)]
pub struct PositionEmbedding {
    /// `[N, D]`
    pub weight: Param<Tensor<2>>,
}

/// The stack of layers.
#[derive(Module, Debug)]
pub struct Encoder {
    /// Pre-norm transformer layers.
    pub layers: Vec<EncoderLayer>,
}

/// `h += attn(LN1 h); h += mlp(LN2 h)`
#[derive(Module, Debug)]
pub struct EncoderLayer {
    /// Attention.
    pub self_attn: Attention,
    /// Norm before attention.
    pub layer_norm1: LayerNorm,
    /// MLP.
    pub mlp: Mlp,
    /// Norm before the MLP.
    pub layer_norm2: LayerNorm,
}

/// Multi-head self-attention with biases.
#[derive(Module, Debug)]
pub struct Attention {
    /// Query projection.
    pub q_proj: Linear,
    /// Key projection.
    pub k_proj: Linear,
    /// Value projection.
    pub v_proj: Linear,
    /// Output projection.
    pub out_proj: Linear,
    #[module(skip)]
    heads: usize,
}

/// Two linear layers.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[D, intermediate]`
    pub fc1: Linear,
    /// `[intermediate, D]`
    pub fc2: Linear,
    #[module(skip)]
    activation: Activation,
}

impl VisionTower {
    /// Fresh weights; only the layers up to the feature layer exist.
    pub fn init(config: &ModelConfig, device: &Device) -> Self {
        let v = &config.vision;
        let norm = || LayerNormConfig::new(v.hidden).with_epsilon(v.eps).init(device);
        Self {
            embeddings: Embeddings::init(v, device),
            pre_layrnorm: norm(),
            encoder: Encoder {
                layers: (0..config.feature_layer)
                    .map(|_| EncoderLayer {
                        self_attn: Attention::init(v, device),
                        layer_norm1: norm(),
                        mlp: Mlp {
                            fc1: LinearConfig::new(v.hidden, v.intermediate).init(device),
                            fc2: LinearConfig::new(v.intermediate, v.hidden).init(device),
                            activation: v.activation,
                        },
                        layer_norm2: norm(),
                    })
                    .collect(),
            },
            keep_cls: config.feature_select == FeatureSelect::Full,
        }
    }

    /// Hidden states: index 0 before the first layer, then after each layer.
    ///
    /// # Shapes
    /// - pixels: `[B, 3, size, size]`, each state: `[B, N, D]`
    pub fn hidden_states(&self, pixels: Tensor<4>) -> Vec<Tensor<3>> {
        let mut h = self.pre_layrnorm.forward(self.embeddings.forward(pixels)); // [B,N,D]
        let mut states = vec![h.clone()];
        for layer in &self.encoder.layers {
            h = layer.forward(h);
            states.push(h.clone());
        }
        states
    }

    /// The state that LLaVA reads, CLS dropped unless the config keeps it.
    ///
    /// # Shapes
    /// - pixels: `[B, 3, size, size]`, output: `[B, P, D]`
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        let mut h = self.pre_layrnorm.forward(self.embeddings.forward(pixels)); // [B,N,D]
        for layer in &self.encoder.layers {
            h = layer.forward(h);
        }
        if self.keep_cls {
            return h;
        }
        let n = h.dims()[1];
        h.narrow(1, 1, n - 1) // [B,N,D] -> [B,P,D]
    }
}

impl Embeddings {
    fn init(v: &VisionConfig, device: &Device) -> Self {
        let normal = Distribution::Normal(0.0, 0.02);
        Self {
            class_embedding: Param::from_tensor(Tensor::random([v.hidden], normal, device)),
            patch_embedding: PatchEmbedding {
                weight: Param::from_tensor(Tensor::random(
                    [v.hidden, v.channels, v.patch_size, v.patch_size],
                    normal,
                    device,
                )),
            },
            position_embedding: PositionEmbedding {
                weight: Param::from_tensor(Tensor::random([v.patches() + 1, v.hidden], normal, device)),
            },
        }
    }

    fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        let weight = self.patch_embedding.weight.val();
        let [d, c, p, _] = weight.dims();
        let [b, _, height, width] = pixels.dims();
        let (rows, cols) = (height / p, width / p);
        let patches = pixels
            .reshape([b, c, rows, p, cols, p])
            .permute([0, 2, 4, 1, 3, 5]) // [B,rows,cols,3,p,p]
            .reshape([b, rows * cols, c * p * p]);
        let patches = patches.matmul(weight.reshape([1, d, c * p * p]).swap_dims(1, 2)); // [B,P,D]
        let class = self.class_embedding.val().reshape([1, 1, d]).expand([b, 1, d]);
        Tensor::cat(vec![class, patches], 1) + self.position_embedding.weight.val().unsqueeze::<3>() // [B,N,D]
    }
}

impl Attention {
    fn init(v: &VisionConfig, device: &Device) -> Self {
        let linear = || LinearConfig::new(v.hidden, v.hidden).init(device);
        Self { q_proj: linear(), k_proj: linear(), v_proj: linear(), out_proj: linear(), heads: v.heads }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let q = split_heads(self.q_proj.forward(x.clone()), self.heads);
        let k = split_heads(self.k_proj.forward(x.clone()), self.heads);
        let v = split_heads(self.v_proj.forward(x), self.heads);
        self.out_proj.forward(attend(q, k, v, None))
    }
}

impl EncoderLayer {
    fn forward(&self, h: Tensor<3>) -> Tensor<3> {
        let h = h.clone() + self.self_attn.forward(self.layer_norm1.forward(h));
        let m = self.mlp.fc1.forward(self.layer_norm2.forward(h.clone()));
        h + self.mlp.fc2.forward(activate(self.mlp.activation, m))
    }
}
