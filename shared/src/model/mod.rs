//! The model's parts. Each is Config -> `init(&device)` -> Module -> `forward`.
//!
//! Letters in shape comments: B batch, S sequence, D width of the residual stream, H heads, E width of a head,
//! P image tokens, N vision positions (CLS and patches), V vocabulary, R adapter rank, T packed positions of all rows.

pub mod adapter;
pub mod checkpoint;
pub mod clip;
pub mod files;
pub mod llama;
pub mod projector;
mod weights;

use crate::config::Activation;
use burn::tensor::{DType, Tensor, activation};

/// Apply a configured activation elementwise.
pub fn activate<const N: usize>(kind: Activation, x: Tensor<N>) -> Tensor<N> {
    match kind {
        Activation::QuickGelu => x.clone() * activation::sigmoid(x * 1.702),
        Activation::Gelu => gelu(x),
        Activation::GeluTanh => activation::gelu_approximate(x),
        Activation::Silu => activation::silu(x),
    }
}

/// Exact GELU, `x * Phi(x)`, from `erf`. burn's own has, on wgpu, the derivative of the tanh approximation, which is off by 2e-4
/// and NaN for large inputs (seen on SwiftShader with burn 0.22.1); the derivative of `erf` is exact everywhere.
pub fn gelu<const N: usize>(x: Tensor<N>) -> Tensor<N> {
    x.clone() * ((x * std::f64::consts::FRAC_1_SQRT_2).erf() * 0.5 + 0.5)
}

/// Scaled dot-product attention; `bias` is added to the scores (0 or a large negative number). Products are computed in the inputs'
/// type, the scale and the softmax in f32.
///
/// # Shapes
/// - q: `[B, H, S, E]`; k, v: `[B, H, K, E]`; bias: broadcastable to `[B, H, S, K]`, f32
/// - output: `[B, S, H*E]`
pub(crate) fn attend(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, bias: Option<Tensor<4>>) -> Tensor<3> {
    let [b, h, s, e] = q.dims();
    let dtype = q.dtype();
    // Scaled before the product, so that no score leaves f16's range; in f32, because burn rounds a factor to the tensor's type.
    let q = (q.cast(DType::F32) * (e as f64).powf(-0.5)).cast(dtype);
    let mut scores = q.matmul(k.swap_dims(2, 3)).cast(DType::F32); // [B,H,S,K]
    if let Some(bias) = bias {
        scores = scores + bias;
    }
    let weights = activation::softmax(scores, 3).cast(dtype);
    weights.matmul(v).swap_dims(1, 2).reshape([b, s, h * e]) // [B,H,S,E] -> [B,S,H*E]
}

/// `[B, S, H*E]` -> `[B, H, S, E]`
pub(crate) fn split_heads(x: Tensor<3>, heads: usize) -> Tensor<4> {
    let [b, s, d] = x.dims();
    x.reshape([b, s, heads, d / heads]).swap_dims(1, 2)
}
