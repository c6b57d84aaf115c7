//! Llama decoder that starts from embeddings (the boundary) and ends at logits. Field names are Hugging Face's.
//!
//! Embeddings and logits are f32. What is between them has the type of the weights (f32, f16 or bf16), except where transformers
//! computes in f32 too: statistics of the norms, attention scores and their softmax.

use super::{activate, attend, split_heads};
use crate::config::{Activation, TextConfig};
use burn::module::{Module, Param};
use burn::nn::{Initializer, Linear, LinearConfig};
use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};

/// The frozen language model without its token table.
#[derive(Module, Debug)]
pub struct Llama {
    /// Decoder layers.
    pub layers: Vec<DecoderLayer>,
    /// Final norm.
    pub norm: RmsNorm,
    /// `[D, V]`; a copy of the token table when the checkpoint ties them.
    pub lm_head: Linear,
    #[module(skip)]
    head_dim: usize,
    #[module(skip)]
    rope_theta: f64,
}

/// `h += attn(norm h); h += mlp(norm h)`
#[derive(Module, Debug)]
pub struct DecoderLayer {
    /// Attention.
    pub self_attn: Attention,
    /// Gated MLP.
    pub mlp: Mlp,
    /// Norm before attention.
    pub input_layernorm: RmsNorm,
    /// Norm before the MLP.
    pub post_attention_layernorm: RmsNorm,
}

/// Grouped-query attention without biases.
#[derive(Module, Debug)]
pub struct Attention {
    /// `[D, H*E]`
    pub q_proj: Linear,
    /// `[D, KV*E]`
    pub k_proj: Linear,
    /// `[D, KV*E]`
    pub v_proj: Linear,
    /// `[H*E, D]`
    pub o_proj: Linear,
    #[module(skip)]
    heads: usize,
    #[module(skip)]
    kv_heads: usize,
}

/// `down(act(gate x) * up x)`
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[D, intermediate]`
    pub gate_proj: Linear,
    /// `[D, intermediate]`
    pub up_proj: Linear,
    /// `[intermediate, D]`
    pub down_proj: Linear,
    #[module(skip)]
    activation: Activation,
}

/// `w * x / sqrt(mean(x^2) + eps)`, Zhang and Sennrich 2019 (arXiv 1910.07467).
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[D]`
    pub weight: Param<Tensor<1>>,
    #[module(skip)]
    eps: f64,
}

/// Which positions see which, and at what rotary angle.
#[derive(Debug, Clone)]
pub struct AttentionLayout {
    cos: Tensor<4>,  // [B or 1, 1, S, E/2], of the weights' type
    sin: Tensor<4>,  // [B or 1, 1, S, E/2], of the weights' type
    bias: Tensor<4>, // [B or 1, 1, S, S], f32, 0 where allowed
    packed: Option<PackedRows>,
}

/// Rows that lie one after the other, `T` positions in all. Attention alone has to tell them apart: it sees them padded to one
/// length, everything else sees no padding.
#[derive(Debug, Clone)]
struct PackedRows {
    rows: usize,
    longest: usize,
    /// Where each position lies among `rows * longest`, `[T, 1]`; none: all rows are equally long, so there is no padding.
    places: Option<Tensor<2, Int>>,
}

impl PackedRows {
    /// `[1, T, W]` -> `[B, S, W]`, zeros where a row is shorter. Each place is written once, so both ways run in parallel and sums
    /// have one order (`select` would go through the positions one by one on its way back).
    fn apart(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, total, width] = x.dims();
        let padded: Tensor<2> = match &self.places {
            None => x.reshape([self.rows * self.longest, width]),
            Some(places) => {
                let zeros = Tensor::<2>::zeros([self.rows * self.longest, width], (&x.device(), x.dtype()));
                let values: Tensor<2> = x.reshape([total, width]);
                zeros.scatter_nd(places.clone(), values, IndexingUpdateOp::Add)
            }
        };
        padded.reshape([self.rows, self.longest, width])
    }

    /// `[B, S, W]` -> `[1, T, W]`
    fn together(&self, x: Tensor<3>) -> Tensor<3> {
        let width = x.dims()[2];
        let padded: Tensor<2> = x.reshape([self.rows * self.longest, width]);
        let packed: Tensor<2> = match &self.places {
            None => padded,
            Some(places) => padded.gather_nd(places.clone()),
        };
        let total = packed.dims()[0];
        packed.reshape([1, total, width])
    }
}

/// Rotated keys and values of all positions so far, in the weights' type, for decoding token by token.
#[derive(Debug, Clone)]
pub struct KvCache {
    layers: Vec<Option<KeysValues>>,
    length: usize,
}

/// `[B, KV, S, E]` each.
type KeysValues = (Tensor<4>, Tensor<4>);

impl KvCache {
    /// Positions held.
    pub fn positions(&self) -> usize {
        self.length
    }

    /// Bytes of keys and values.
    pub fn bytes(&self) -> usize {
        let of = |t: &Tensor<4>| t.dims().iter().product::<usize>() * t.dtype().size();
        self.layers.iter().flatten().map(|(k, v)| of(k) + of(v)).sum()
    }
}

/// Added to forbidden scores: exp of it is 0 in f32 and it is finite in f16.
const FORBIDDEN: f32 = -30000.0;

impl RmsNorm {
    fn init(width: usize, eps: f64, device: &Device) -> Self {
        Self { weight: Initializer::Ones.init([width], device), eps }
    }

    /// # Shapes
    /// - input and output: `[B, S, D]`, of the weight's type; normalised in f32
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let dtype = x.dtype();
        let x = x.cast(DType::F32);
        let scale = (x.clone().powi_scalar(2).mean_dim(2) + self.eps).sqrt().recip(); // [B,S,1]
        (x * scale).cast(dtype) * self.weight.val().unsqueeze::<3>()
    }
}

impl Llama {
    /// Fresh weights (lazily made, so loading replaces them at no cost).
    pub fn init(config: &TextConfig, device: &Device) -> Self {
        let (d, e) = (config.hidden, config.head_dim);
        let linear = |i: usize, o: usize| LinearConfig::new(i, o).with_bias(false).init(device);
        let norm = || RmsNorm::init(d, config.eps, device);
        Self {
            layers: (0..config.layers)
                .map(|_| DecoderLayer {
                    self_attn: Attention {
                        q_proj: linear(d, config.heads * e),
                        k_proj: linear(d, config.kv_heads * e),
                        v_proj: linear(d, config.kv_heads * e),
                        o_proj: linear(config.heads * e, d),
                        heads: config.heads,
                        kv_heads: config.kv_heads,
                    },
                    mlp: Mlp {
                        gate_proj: linear(d, config.intermediate),
                        up_proj: linear(d, config.intermediate),
                        down_proj: linear(config.intermediate, d),
                        activation: config.activation,
                    },
                    input_layernorm: norm(),
                    post_attention_layernorm: norm(),
                })
                .collect(),
            norm: norm(),
            lm_head: linear(d, config.vocab),
            head_dim: e,
            rope_theta: config.rope_theta,
        }
    }

    /// The type of the weights, and of everything that is computed with them.
    pub fn dtype(&self) -> DType {
        self.norm.weight.dtype()
    }

    /// Residual stream after the final norm, i.e. what the head reads.
    ///
    /// # Shapes
    /// - h: `[B, S, D]` (`[1, T, D]` with [`Self::rows_layout`]), output: the same, of the weights' type
    pub fn forward(&self, h: Tensor<3>, layout: &AttentionLayout) -> Tensor<3> {
        let mut h = h.cast(self.dtype());
        for layer in &self.layers {
            h = layer.forward(h, layout, &mut None);
        }
        self.norm.forward(h)
    }

    /// Residual stream after each decoder layer, and after the final norm.
    ///
    /// # Shapes
    /// - h and all outputs: `[B, S, D]`, the outputs of the weights' type
    pub fn layer_outputs(&self, h: Tensor<3>, layout: &AttentionLayout) -> (Vec<Tensor<3>>, Tensor<3>) {
        let mut outputs = Vec::with_capacity(self.layers.len());
        let mut h = h.cast(self.dtype());
        for layer in &self.layers {
            h = layer.forward(h, layout, &mut None);
            outputs.push(h.clone());
        }
        (outputs, self.norm.forward(h))
    }

    /// A cache without positions.
    pub fn new_cache(&self) -> KvCache {
        KvCache { layers: vec![None; self.layers.len()], length: 0 }
    }

    /// As [`Self::forward`] for positions that follow those in the cache, whose keys and values are not computed again.
    ///
    /// # Shapes
    /// - h: `[B, S, D]`, only the new positions; output: `[B, S, D]`, of the weights' type
    pub fn forward_cached(&self, h: Tensor<3>, cache: &mut KvCache) -> Tensor<3> {
        let layout = self.layout_behind(cache.length, h.dims()[1], &h.device());
        cache.length += h.dims()[1];
        let mut h = h.cast(self.dtype());
        for (layer, kept) in self.layers.iter().zip(&mut cache.layers) {
            h = layer.forward(h, &layout, &mut Some(kept));
        }
        self.norm.forward(h)
    }

    /// Logits of chosen positions only, in f32 for the loss.
    ///
    /// # Shapes
    /// - hidden: `[targets, D]`, of the weights' type; output: `[targets, V]`
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        self.lm_head.forward(hidden).cast(DType::F32)
    }

    /// Causal attention within each of several rows that lie one after the other, for an input of `[1, T, D]`, `T` the sum of the
    /// lengths. No length may be 0.
    pub fn rows_layout(&self, lengths: &[usize], device: &Device) -> AttentionLayout {
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let place = |(row, length): (usize, &usize)| (row * longest..row * longest + length).map(|at| at as i64);
        let places: Vec<i64> = lengths.iter().enumerate().flat_map(place).collect();
        let count = places.len();
        let places = match count == lengths.len() * longest {
            true => None,
            false => Some(Tensor::from_data(TensorData::new(places, [count, 1]), device)),
        };
        let packed = Some(PackedRows { rows: lengths.len(), longest, places });
        AttentionLayout { packed, ..self.causal_layout(longest, device) }
    }

    /// Plain causal attention over positions 0..S. Right padding needs no mask: real positions never see it.
    pub fn causal_layout(&self, seq: usize, device: &Device) -> AttentionLayout {
        let positions: Vec<u32> = (0..seq as u32).collect();
        self.packed_layout(&[positions], &[vec![0; seq]], device)
    }

    /// Causal attention of `new` positions that follow `past` ones.
    fn layout_behind(&self, past: usize, new: usize, device: &Device) -> AttentionLayout {
        let positions: Vec<u32> = (past as u32..(past + new) as u32).collect();
        let (cos, sin) = self.rotary_tables(&[positions], device);
        let seen = |i: usize, j: usize| if j <= past + i { 0.0 } else { FORBIDDEN };
        let bias: Vec<f32> = (0..new).flat_map(|i| (0..past + new).map(move |j| seen(i, j))).collect();
        let bias = Tensor::from_data(TensorData::new(bias, [1, 1, new, past + new]), device);
        AttentionLayout { cos, sin, bias, packed: None }
    }

    /// Cosines and sines, `[B, 1, S, E/2]` each and rounded to the weights' type, of B rows of S positions.
    fn rotary_tables(&self, positions: &[Vec<u32>], device: &Device) -> (Tensor<4>, Tensor<4>) {
        let (b, s, half) = (positions.len(), positions.first().map_or(0, Vec::len), self.head_dim / 2);
        let inverse: Vec<f64> =
            (0..half).map(|i| self.rope_theta.powf(-2.0 * i as f64 / self.head_dim as f64)).collect();
        let angles = positions.iter().flatten().flat_map(|&p| inverse.iter().map(move |f| f64::from(p) * f));
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(|a| (a.sin() as f32, a.cos() as f32)).unzip();
        let place = (device, self.dtype());
        let tensor = |data: Vec<f32>| Tensor::from_data(TensorData::new(data, [b, 1, s, half]), place);
        (tensor(cos), tensor(sin))
    }

    /// Several texts behind one shared prefix: a position sees earlier positions of segment 0 (the prefix) and of its own
    /// segment. With rotary positions counted on from the prefix for each segment this equals separate sequences.
    ///
    /// # Shapes
    /// - positions, segments: B rows of S
    pub fn packed_layout(&self, positions: &[Vec<u32>], segments: &[Vec<u32>], device: &Device) -> AttentionLayout {
        let (b, s) = (positions.len(), positions.first().map_or(0, Vec::len));
        let (cos, sin) = self.rotary_tables(positions, device);
        let mut bias = Vec::with_capacity(b * s * s);
        for row in segments {
            for i in 0..s {
                bias.extend((0..s).map(|j| if j <= i && (row[j] == 0 || row[j] == row[i]) { 0.0 } else { FORBIDDEN }));
            }
        }
        let bias = Tensor::from_data(TensorData::new(bias, [b, 1, s, s]), device);
        AttentionLayout { cos, sin, bias, packed: None }
    }
}

impl DecoderLayer {
    fn forward(&self, h: Tensor<3>, layout: &AttentionLayout, kept: &mut Option<&mut Option<KeysValues>>) -> Tensor<3> {
        let h = h.clone() + self.self_attn.forward(self.input_layernorm.forward(h), layout, kept);
        h.clone() + self.mlp.forward(self.post_attention_layernorm.forward(h))
    }
}

impl Attention {
    /// `kept`: keys and values of earlier positions; the new ones are added.
    fn forward(&self, x: Tensor<3>, layout: &AttentionLayout, kept: &mut Option<&mut Option<KeysValues>>) -> Tensor<3> {
        let apart = |x: Tensor<3>| match &layout.packed {
            None => x,
            Some(rows) => rows.apart(x),
        };
        let q = rotate(split_heads(apart(self.q_proj.forward(x.clone())), self.heads), layout);
        let k = rotate(split_heads(apart(self.k_proj.forward(x.clone())), self.kv_heads), layout);
        let v = split_heads(apart(self.v_proj.forward(x)), self.kv_heads);
        let (k, v) = match kept {
            None => (k, v),
            Some(kept) => {
                let (k, v) = match kept.take() {
                    None => (k, v),
                    Some((past_k, past_v)) => (Tensor::cat(vec![past_k, k], 2), Tensor::cat(vec![past_v, v], 2)),
                };
                **kept = Some((k.clone(), v.clone()));
                (k, v)
            }
        };
        let groups = self.heads / self.kv_heads;
        let (k, v) = (repeat_heads(k, groups), repeat_heads(v, groups));
        let attended = attend(q, k, v, Some(layout.bias.clone())); // [B,S,H*E]
        self.o_proj.forward(match &layout.packed {
            None => attended,
            Some(rows) => rows.together(attended),
        })
    }
}

impl Mlp {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let gate = activate(self.activation, self.gate_proj.forward(x.clone()));
        self.down_proj.forward(gate * self.up_proj.forward(x))
    }
}

/// Rotary positions, "half" convention: dimension i pairs with i + E/2 (RoFormer, arXiv 2104.09864).
///
/// # Shapes
/// - input and output: `[B, H, S, E]`
fn rotate(x: Tensor<4>, layout: &AttentionLayout) -> Tensor<4> {
    let half = x.dims()[3] / 2;
    let (a, b) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    let (cos, sin) = (layout.cos.clone(), layout.sin.clone());
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    let second = b * cos + a * sin;
    Tensor::cat(vec![first, second], 3)
}

/// Each key-value head serves `groups` consecutive query heads: `[B, KV, S, E]` -> `[B, KV*groups, S, E]`
fn repeat_heads(x: Tensor<4>, groups: usize) -> Tensor<4> {
    if groups == 1 {
        return x;
    }
    let [b, kv, s, e] = x.dims();
    x.reshape([b, kv, 1, s, e]).expand([b, kv, groups, s, e]).reshape([b, kv * groups, s, e])
}
