//! NanoAdapters: the only trainable part. `h = x + up(gelu(down(x)))` without bias (Houlsby et al. 2019, arXiv 1902.00751,
//! as placed by FedNano, arXiv 2506.14824); `up` starts at 0, so a fresh adapter leaves the model unchanged.

use super::gelu;
use crate::plain::{AdapterState, TensorBlob};
use crate::settings::AdapterChoice;
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

/// What a client trains: one adapter or the pair. An absent one is the identity.
#[derive(Module, Debug)]
pub struct NanoAdapters {
    /// For image positions.
    pub image: Option<NanoAdapter>,
    /// For every other position, padding included.
    pub text: Option<NanoAdapter>,
}

impl NanoAdapter {
    /// # Shapes
    /// - x: `[B, S, D]`, output: `[B, S, D]`, the residual's branch only
    fn branch(&self, x: Tensor<3>) -> Tensor<3> {
        let z = gelu(x.matmul(self.down.val().transpose().unsqueeze())); // [B,S,R]
        z.matmul(self.up.val().transpose().unsqueeze()) // [B,S,D]
    }
}

impl NanoAdapters {
    /// Initial weights of a federation: `down` ~ N(0, 1/D), `up` = 0. Both are drawn whatever is trained, so that the image
    /// adapter alone starts as it does beside the text adapter.
    pub fn initial<R: Rng>(choice: AdapterChoice, rank: usize, dim: usize, rng: &mut R) -> AdapterState {
        let mut state = AdapterState::zeros(AdapterChoice::Both, rank, dim);
        let std = (dim as f32).powf(-0.5);
        for (name, blob) in &mut state.0 {
            if name.ends_with("down") {
                blob.data.iter_mut().for_each(|v| *v = std * standard_normal(rng));
            }
        }
        state.0.retain(|name, _| AdapterState::names(choice).contains(&name.as_str()));
        state
    }

    /// Build trainable modules from plain data that has been checked with [`AdapterState::check_like`]: those that its names
    /// tell of.
    pub fn from_state(state: &AdapterState, device: &Device) -> Self {
        let param = |name: String| {
            let blob = state.0.get(&name)?;
            let data = TensorData::new(blob.data.clone(), blob.shape.clone());
            Some(Param::from_tensor(Tensor::from_data(data, device)))
        };
        let adapter =
            |part: &str| Some(NanoAdapter { down: param(format!("{part}.down"))?, up: param(format!("{part}.up"))? });
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

    /// The trained tensors by name, in the order of [`AdapterState::NAMES`].
    pub fn named(&self) -> Vec<(&'static str, &Param<Tensor<2>>)> {
        let [a, b, c, d] = AdapterState::NAMES;
        let image = self.image.iter().flat_map(|p| [(a, &p.down), (b, &p.up)]);
        image.chain(self.text.iter().flat_map(|p| [(c, &p.down), (d, &p.up)])).collect()
    }

    /// Number of trained tensors; every step must yield as many gradients.
    pub fn tensors(&self) -> usize {
        2 * (usize::from(self.image.is_some()) + usize::from(self.text.is_some()))
    }

    /// The values off the autodiff graph, in the order of [`Self::named`].
    pub fn values(&self) -> Vec<Tensor<2>> {
        self.named().into_iter().map(|(_, param)| param.val().inner()).collect()
    }

    /// The same tensors with other values: `new(name, value)`, both off the graph. They can be trained again.
    pub fn with_values(&self, mut new: impl FnMut(&'static str, Tensor<2>) -> Tensor<2>) -> Self {
        let [a, b, c, d] = AdapterState::NAMES;
        let mut param = |name: &'static str, old: &Param<Tensor<2>>| {
            Param::from_tensor(Tensor::<2>::from_inner(new(name, old.val().inner())))
        };
        let mut adapter = |down: &'static str, up: &'static str, old: &NanoAdapter| NanoAdapter {
            down: param(down, &old.down),
            up: param(up, &old.up),
        };
        let image = self.image.as_ref().map(|old| adapter(a, b, old));
        Self { image, text: self.text.as_ref().map(|old| adapter(c, d, old)) }
    }

    /// Zeros of the trained tensors' shapes.
    pub fn zeros(&self) -> AdapterState {
        let blob = |param: &Param<Tensor<2>>| TensorBlob::zeros(&param.val().dims());
        AdapterState(self.named().into_iter().map(|(name, param)| (name.to_owned(), blob(param))).collect())
    }

    /// # Shapes
    /// - x: `[B, S, D]`, image_mask: `[B, S, 1]` (1 at image positions, else 0), output: `[B, S, D]`
    pub fn forward(&self, x: Tensor<3>, image_mask: Tensor<3>) -> Tensor<3> {
        let mut h = x.clone();
        if let Some(image) = &self.image {
            h = h + image.branch(x.clone()) * image_mask.clone();
        }
        if let Some(text) = &self.text {
            h = h + text.branch(x) * (image_mask.neg() + 1.0);
        }
        h
    }

    /// Gradients of each sample alone, in closed form: with `a = down x`, `z = gelu(a)`, summed over a part's positions,
    /// `d up = g zᵀ` and `d down = (upᵀ g * gelu'(a)) xᵀ`. One batched product instead of B backward passes.
    ///
    /// # Shapes
    /// - x, g: `[B, S, D]`, image_mask: `[B, S, 1]`; output: `[B, ..]` for each trained tensor, in the order of [`Self::named`]
    pub fn per_sample_gradients(
        &self,
        x: Tensor<3>,
        g: Tensor<3>,
        image_mask: Tensor<3>,
    ) -> Vec<(&'static str, Tensor<3>)> {
        let part = |adapter: &NanoAdapter, mask: Tensor<3>| {
            let (down, up) = (adapter.down.val().inner(), adapter.up.val().inner());
            let g = g.clone() * mask;
            let a = x.clone().matmul(down.transpose().unsqueeze()); // [B,S,R]
            let d_up = g.clone().swap_dims(1, 2).matmul(gelu(a.clone())); // [B,D,R]
            let d_a = g.matmul(up.unsqueeze()) * gelu_derivative(a); // [B,S,R]
            let d_down = d_a.swap_dims(1, 2).matmul(x.clone()); // [B,R,D]
            [d_down, d_up]
        };
        let image = self.image.iter().flat_map(|adapter| part(adapter, image_mask.clone()));
        let text = self.text.iter().flat_map(|adapter| part(adapter, image_mask.clone().neg() + 1.0));
        self.named().into_iter().map(|(name, _)| name).zip(image.chain(text)).collect()
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
