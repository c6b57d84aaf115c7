//! NanoAdapters: the only trainable part. `h = x + up(gelu(down(x)))` without bias (Houlsby et al. 2019, arXiv 1902.00751,
//! as placed by FedNano, arXiv 2506.14824); `up` starts at 0, so a fresh adapter leaves the model unchanged.

use super::gelu;
use crate::plain::{AdapterState, TensorBlob};
use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use rand::Rng;

/// One low-rank residual adapter.
#[derive(Module, Debug)]
pub struct NanoAdapter {
    /// `[R, D]`
    pub down: Param<Tensor<2>>,
    /// `[D, R]`
    pub up: Param<Tensor<2>>,
}

/// The pair that a client trains.
#[derive(Module, Debug)]
pub struct NanoAdapters {
    /// For image positions.
    pub image: NanoAdapter,
    /// For every other position, padding included.
    pub text: NanoAdapter,
}

/// Number of trainable tensors; every step must yield as many gradients.
pub const TRAINABLE_TENSORS: usize = 4;

impl NanoAdapter {
    /// # Shapes
    /// - x: `[B, S, D]`, output: `[B, S, D]`, the residual's branch only
    fn branch(&self, x: Tensor<3>) -> Tensor<3> {
        let z = gelu(x.matmul(self.down.val().transpose().unsqueeze())); // [B,S,R]
        z.matmul(self.up.val().transpose().unsqueeze()) // [B,S,D]
    }
}

impl NanoAdapters {
    /// Initial weights of a federation: `down` ~ N(0, 1/D), `up` = 0.
    pub fn initial<R: Rng>(rank: usize, dim: usize, rng: &mut R) -> AdapterState {
        let mut state = AdapterState::zeros(rank, dim);
        let std = (dim as f32).powf(-0.5);
        for (name, blob) in &mut state.0 {
            if name.ends_with("down") {
                blob.data.iter_mut().for_each(|v| *v = std * standard_normal(rng));
            }
        }
        state
    }

    /// Build trainable modules from plain data that has been checked with [`AdapterState::check_like`].
    pub fn from_state(state: &AdapterState, device: &Device) -> Self {
        let param = |name: &str| {
            let blob = &state.0[name];
            let data = TensorData::new(blob.data.clone(), blob.shape.clone());
            Param::from_tensor(Tensor::from_data(data, device))
        };
        let adapter =
            |part: &str| NanoAdapter { down: param(&format!("{part}.down")), up: param(&format!("{part}.up")) };
        Self { image: adapter("image"), text: adapter("text") }
    }

    /// Read the weights back.
    ///
    /// # Errors
    /// When the device fails (a lost GPU).
    pub async fn to_state(&self) -> Result<AdapterState, DeviceError> {
        let mut state = std::collections::BTreeMap::new();
        for (name, param) in self.named() {
            state.insert(name.to_owned(), read(param.val()).await?);
        }
        Ok(AdapterState(state))
    }

    /// The four tensors under the names of [`AdapterState::NAMES`], in that order.
    pub fn named(&self) -> [(&'static str, &Param<Tensor<2>>); TRAINABLE_TENSORS] {
        let [a, b, c, d] = AdapterState::NAMES;
        [(a, &self.image.down), (b, &self.image.up), (c, &self.text.down), (d, &self.text.up)]
    }

    /// # Shapes
    /// - x: `[B, S, D]`, image_mask: `[B, S, 1]` (1 at image positions, else 0), output: `[B, S, D]`
    pub fn forward(&self, x: Tensor<3>, image_mask: Tensor<3>) -> Tensor<3> {
        let image = self.image.branch(x.clone()) * image_mask.clone();
        let text = self.text.branch(x.clone()) * (image_mask.neg() + 1.0);
        x + image + text
    }

    /// Gradients of each sample alone, in closed form: with `a = down x`, `z = gelu(a)`, summed over a part's positions,
    /// `d up = g zᵀ` and `d down = (upᵀ g * gelu'(a)) xᵀ`. One batched product instead of B backward passes.
    ///
    /// # Shapes
    /// - x, g: `[B, S, D]`, image_mask: `[B, S, 1]`; output: four `[B, ..]` in the order of [`AdapterState::NAMES`]
    pub fn per_sample_gradients(
        &self,
        x: Tensor<3>,
        g: Tensor<3>,
        image_mask: Tensor<3>,
    ) -> [Tensor<3>; TRAINABLE_TENSORS] {
        let part = |adapter: &NanoAdapter, mask: Tensor<3>| {
            let (down, up) = (adapter.down.val().inner_plain(), adapter.up.val().inner_plain());
            let g = g.clone() * mask;
            let a = x.clone().matmul(down.transpose().unsqueeze()); // [B,S,R]
            let d_up = g.clone().swap_dims(1, 2).matmul(gelu(a.clone())); // [B,D,R]
            let d_a = g.matmul(up.unsqueeze()) * gelu_derivative(a); // [B,S,R]
            let d_down = d_a.swap_dims(1, 2).matmul(x.clone()); // [B,R,D]
            (d_down, d_up)
        };
        let (image_down, image_up) = part(&self.image, image_mask.clone());
        let (text_down, text_up) = part(&self.text, image_mask.neg() + 1.0);
        [image_down, image_up, text_down, text_up]
    }
}

/// The same values off the autodiff graph.
trait InnerPlain {
    fn inner_plain(self) -> Self;
}

impl InnerPlain for Tensor<2> {
    fn inner_plain(self) -> Self {
        if self.is_autodiff() { self.inner() } else { self }
    }
}

/// Derivative of the exact GELU: `Phi(a) + a phi(a)`.
fn gelu_derivative(a: Tensor<3>) -> Tensor<3> {
    let cdf = (a.clone() * std::f64::consts::FRAC_1_SQRT_2).erf() * 0.5 + 0.5;
    let pdf = (a.clone().powi_scalar(2) * -0.5).exp()
        * (0.5 * std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2);
    cdf + a * pdf
}

/// The device stopped working in mid-computation.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the compute device failed: {0}; reload, or choose the CPU")]
pub struct DeviceError(pub String);

/// Copy a tensor to the host; the only way results leave a device (a browser cannot wait, so it is async).
///
/// # Errors
/// [`DeviceError`] when the device fails.
pub async fn read<const N: usize>(tensor: Tensor<N>) -> Result<TensorBlob, DeviceError> {
    let shape = tensor.dims().to_vec();
    let data = tensor.into_data_async().await.map_err(|e| DeviceError(e.to_string()))?;
    let data = data.convert::<f32>().try_into_vec::<f32>().map_err(|e| DeviceError(format!("{e:?}")))?;
    Ok(TensorBlob { shape, data })
}

/// A draw from N(0, 1), Box and Muller 1958.
pub fn standard_normal<R: Rng>(rng: &mut R) -> f32 {
    let u: f64 = 1.0 - rng.random::<f64>(); // (0, 1]
    let v: f64 = rng.random();
    ((-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()) as f32
}
