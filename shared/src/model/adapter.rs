//! NanoAdapters: the only trainable part. `h = x + up(gelu(down(x)))` without bias (Houlsby et al. 2019, arXiv 1902.00751,
//! as placed by FedNano, arXiv 2506.14824); `up` starts at 0, so a fresh adapter leaves the model unchanged.
//!
//! Rows of a batch are packed (see `boundary`). Each adapter works on the positions of its part alone: Tp of all T. The backward pass
//! is written out: with `a = down x`, `z = gelu(a)` and `g = dL/dh`, summed over a part's positions,
//!
//! ```text
//! u = upT g,   dL/d up = g zT,   dL/d down = (u * gelu'(a)) xT
//! ```

use super::gelu;
use crate::boundary::{Pair, Part, Positions};
use crate::plain::{AdapterState, TensorBlob};
use crate::settings::AdapterChoice;
use burn::module::{Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData, Transaction};
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
    /// For every other position.
    pub text: Option<NanoAdapter>,
}

/// What became of a batch in its adapters: what `h` is made of, and what the backward pass needs. Parts without an adapter, or
/// without a position in the batch, are absent.
#[derive(Debug, Clone)]
pub struct Encoded {
    parts: Pair<EncodedPart>,
    positions: Positions,
}

/// The positions of one part.
#[derive(Debug, Clone)]
struct EncodedPart {
    /// Which of the packed positions they are, `[Tp]`; none: all.
    places: Option<Tensor<1, Int>>,
    /// How many of them each row has.
    counts: Vec<usize>,
    x: Tensor<2>, // [Tp,D]
    a: Tensor<2>, // [Tp,R]
    z: Tensor<2>, // [Tp,R]
}

impl Encoded {
    /// `z = gelu(down x)`: `[Tp, R]` each.
    pub fn codes(&self) -> Pair<Tensor<2>> {
        self.parts.as_ref().map(|_, own| own.z.clone())
    }

    /// The part has an adapter, and positions in this batch.
    pub fn has(&self, part: Part) -> bool {
        self.parts.get(part).is_some()
    }

    /// What belongs to each part, `[Tp, D]`, of something of all positions.
    ///
    /// # Shapes
    /// - all: `[T, D]`
    fn split(&self, all: &Tensor<2>) -> Pair<Tensor<2>> {
        self.parts.as_ref().map(|_, own| match &own.places {
            Some(places) => all.clone().select(0, places.clone()),
            None => all.clone(),
        })
    }
}

/// A gradient of some rows of a batch, each alone: (row, gradient). Rows without a position of the part have none.
pub type OfRows = Vec<(usize, Tensor<2>)>;

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

    /// Neither: the untouched model.
    pub const fn identity() -> Self {
        Self { image: None, text: None }
    }

    /// The adapter of a part.
    pub fn get(&self, part: Part) -> Option<&NanoAdapter> {
        match part {
            Part::Image => self.image.as_ref(),
            Part::Text => self.text.as_ref(),
        }
    }

    /// Build modules from plain data that has been checked with [`AdapterState::check_like`]: those that its names tell of. The
    /// device needs no autodiff.
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

    /// The same tensors with other values: `new(name, value)`, both off the graph.
    pub fn with_values(&self, mut new: impl FnMut(&'static str, Tensor<2>) -> Tensor<2>) -> Self {
        let [a, b, c, d] = AdapterState::NAMES;
        let mut param = |name: &'static str, old: &Param<Tensor<2>>| Param::from_tensor(new(name, old.val().inner()));
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

    /// Codes of a batch, on the device of `x` (without autodiff), which has as many positions as `positions` tell of.
    ///
    /// # Shapes
    /// - x: `[T, D]`
    pub fn encode(&self, x: &Tensor<2>, positions: &Positions) -> Encoded {
        let part = |part: Part| {
            let adapter = self.get(part)?;
            let at = positions.of(part);
            if at.is_empty() {
                return None; // tensors without rows are not for every backend
            }
            let places = (at.len() < positions.total()).then(|| index(at, &x.device()));
            let x = match &places {
                Some(places) => x.clone().select(0, places.clone()), // [Tp,D]
                None => x.clone(),
            };
            let a = x.clone().matmul(adapter.down.val().inner().transpose()); // [Tp,R]
            Some(EncodedPart { places, counts: positions.counts(part), x, z: gelu(a.clone()), a })
        };
        Encoded { parts: Pair { image: part(Part::Image), text: part(Part::Text) }, positions: positions.clone() }
    }

    /// `h = x + up z`, with the codes of this very `x`.
    ///
    /// # Shapes
    /// - x and output: `[T, D]`
    pub fn hidden(&self, x: &Tensor<2>, encoded: &Encoded) -> Tensor<2> {
        let [total, dim] = x.dims();
        let mut places = vec![0; total];
        let (mut branches, mut next, mut changed) = (Vec::new(), 0, false);
        for part in Part::ALL {
            let at = encoded.positions.of(part);
            if at.is_empty() {
                continue;
            }
            branches.push(match (self.get(part), encoded.parts.get(part)) {
                (Some(adapter), Some(own)) => {
                    changed = true;
                    own.z.clone().matmul(adapter.up.val().inner().transpose()) // [Tp,D]
                }
                _ => Tensor::zeros([at.len(), dim], &x.device()),
            });
            for position in at {
                if let Some(place) = places.get_mut(position) {
                    *place = next;
                }
                next += 1;
            }
        }
        match (changed, branches.len()) {
            (false, _) => x.clone(),
            (true, 1) => x.clone() + branches.remove(0),
            // The parts one below the other, then each position from its place there.
            (true, _) => x.clone() + Tensor::cat(branches, 0).select(0, index(places, &x.device())),
        }
    }

    /// `u = upT g` and, where `up` says so, `dL/d up`; in mode `low-rank` the server works them out.
    ///
    /// # Shapes
    /// - g: `[T, D]`; output: `[Tp, R]` and `[D, R]`
    pub fn backward_hidden(&self, encoded: &Encoded, g: &Tensor<2>, up: bool) -> (Pair<Tensor<2>>, Pair<Tensor<2>>) {
        let own = encoded.split(g);
        let (mut u, mut d_up) = (Pair::default(), Pair::default());
        for (part, g) in own.iter() {
            let (Some(adapter), Some(own)) = (self.get(part), encoded.parts.get(part)) else { continue };
            *u.slot(part) = Some(g.clone().matmul(adapter.up.val().inner()));
            if up {
                *d_up.slot(part) = Some(g.clone().transpose().matmul(own.z.clone()));
            }
        }
        (u, d_up)
    }

    /// `dL/d down` from `u`, as far as there is one of a part.
    ///
    /// # Shapes
    /// - u: `[Tp, R]`; output: `[R, D]`
    pub fn backward(&self, encoded: &Encoded, u: Pair<Tensor<2>>) -> Pair<Tensor<2>> {
        let mut d_down = Pair::default();
        for (part, d_a) in through_gelu(encoded, &u).iter() {
            let Some(own) = encoded.parts.get(part) else { continue };
            *d_down.slot(part) = Some(d_a.clone().transpose().matmul(own.x.clone()));
        }
        d_down
    }

    /// The same, of each row's positions alone.
    ///
    /// # Shapes
    /// - u: `[Tp, R]`; output: `[R, D]` each
    pub fn backward_rows(&self, encoded: &Encoded, u: &Pair<Tensor<2>>) -> Pair<OfRows> {
        of_rows(encoded, &through_gelu(encoded, u), |own| &own.x)
    }

    /// `dL/d up` of each row's positions alone.
    ///
    /// # Shapes
    /// - g: `[T, D]`; output: `[D, R]` each
    pub fn backward_hidden_rows(&self, encoded: &Encoded, g: &Tensor<2>) -> Pair<OfRows> {
        of_rows(encoded, &encoded.split(g), |own| &own.z)
    }
}

/// `dL/da = u * gelu'(a)`: `[Tp, R]` each.
fn through_gelu(encoded: &Encoded, u: &Pair<Tensor<2>>) -> Pair<Tensor<2>> {
    let mut d_a = Pair::default();
    for (part, u) in u.iter() {
        let Some(own) = encoded.parts.get(part) else { continue };
        *d_a.slot(part) = Some(u.clone() * gelu_derivative(own.a.clone()));
    }
    d_a
}

/// `leftT right` of each row's positions: `[Tp, M]` and `[Tp, N]` to `[M, N]` each.
fn of_rows(encoded: &Encoded, left: &Pair<Tensor<2>>, right: fn(&EncodedPart) -> &Tensor<2>) -> Pair<OfRows> {
    let mut all = Pair::default();
    for (part, left) in left.iter() {
        let Some(own) = encoded.parts.get(part) else { continue };
        let (mut products, mut start) = (Vec::new(), 0);
        for (row, &count) in own.counts.iter().enumerate() {
            if count > 0 {
                let of = |all: &Tensor<2>| all.clone().narrow(0, start, count);
                products.push((row, of(left).transpose().matmul(of(right(own)))));
            }
            start += count;
        }
        *all.slot(part) = Some(products);
    }
    all
}

/// Onto a device, to select with.
fn index(places: Vec<usize>, device: &Device) -> Tensor<1, Int> {
    let places: Vec<i64> = places.into_iter().map(|place| place as i64).collect();
    let count = places.len();
    Tensor::from_data(TensorData::new(places, [count]), device)
}

/// Derivative of the exact GELU: `Phi(a) + a phi(a)`.
fn gelu_derivative(a: Tensor<2>) -> Tensor<2> {
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

/// Copy several tensors to the host in one go: read one by one, each waits for everything before it.
///
/// # Errors
/// [`DeviceError`] when the device fails.
pub async fn read_all<const N: usize>(tensors: Vec<Tensor<N>>) -> Result<Vec<TensorBlob>, DeviceError> {
    if tensors.is_empty() {
        return Ok(Vec::new());
    }
    let shapes: Vec<Vec<usize>> = tensors.iter().map(|tensor| tensor.dims().to_vec()).collect();
    let all = tensors.into_iter().fold(Transaction::default(), Transaction::register);
    let all = all.execute_async().await.map_err(|e| DeviceError(e.to_string()))?;
    if all.len() != shapes.len() {
        return Err(DeviceError(format!("{} of {} results came back", all.len(), shapes.len())));
    }
    let blob = |(data, shape): (TensorData, Vec<usize>)| -> Result<TensorBlob, DeviceError> {
        let data = data.convert::<f32>().try_into_vec::<f32>().map_err(|e| DeviceError(format!("{e:?}")))?;
        Ok(TensorBlob { shape, data })
    };
    all.into_iter().zip(shapes).map(blob).collect()
}

/// A draw from N(0, 1), Box and Muller 1958.
pub fn standard_normal<R: Rng>(rng: &mut R) -> f32 {
    let u: f64 = 1.0 - rng.random::<f64>(); // (0, 1]
    let v: f64 = rng.random();
    ((-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIM: usize = 3;

    fn values(count: usize, step: f32) -> Vec<f32> {
        (0..count).map(|i| ((i * 37 + 11) % 19) as f32 * step - 9.0 * step).collect()
    }

    fn matrix(rows: usize, cols: usize, step: f32, device: &Device) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values(rows * cols, step), [rows, cols]), device)
    }

    fn plain<const N: usize>(tensor: Tensor<N>) -> Vec<f32> {
        tensor.inner().into_data().try_into_vec::<f32>().unwrap()
    }

    fn close(got: &[f32], want: &[f32]) {
        assert_eq!(got.len(), want.len());
        got.iter().zip(want).for_each(|(g, w)| assert!((g - w).abs() < 1e-5, "{got:?} {want:?}"));
    }

    /// Two rows, the first with a picture.
    fn positions() -> Positions {
        Positions { lengths: vec![4, 3], images: vec![1..3, 0..0] }
    }

    fn adapters(choice: AdapterChoice) -> AdapterState {
        let mut state = AdapterState::zeros(choice, 2, DIM);
        state.0.values_mut().zip(1..).for_each(|(blob, n)| blob.data = values(6, 0.03 * n as f32));
        state
    }

    #[test]
    fn the_backward_pass_is_what_autodiff_finds() {
        let device = Device::flex();
        let autodiff = device.clone().autodiff();
        let (x, g) = (matrix(7, DIM, 0.1, &device), matrix(7, DIM, 0.07, &device));
        for (choice, positions) in [
            (AdapterChoice::Both, positions()),
            (AdapterChoice::Both, Positions::plain(vec![4, 3])),
            (AdapterChoice::Image, positions()),
            (AdapterChoice::Text, positions()),
        ] {
            let state = adapters(choice);
            let module = NanoAdapters::from_state(&state, &device);
            let encoded = module.encode(&x, &positions);
            let (u, d_up) = module.backward_hidden(&encoded, &g, true);
            let d_down = module.backward(&encoded, u.clone());

            // h by masks over all positions, on burn's graph.
            let traced = NanoAdapters::from_state(&state, &autodiff);
            let graph = |t: &Tensor<2>| Tensor::<2>::from_inner(t.clone());
            let mut h = graph(&x);
            for part in Part::ALL {
                let Some(adapter) = traced.get(part) else { continue };
                let mut mask = vec![0f32; 7];
                positions.of(part).into_iter().for_each(|at| mask[at] = 1.0);
                let mask = Tensor::<2>::from_data(TensorData::new(mask, [7, 1]), &autodiff);
                let z = gelu(graph(&x).matmul(adapter.down.val().transpose()));
                h = h + z.matmul(adapter.up.val().transpose()) * mask;
            }
            close(&plain(module.hidden(&x, &encoded)), &plain(h.clone()));
            let all = (h * graph(&g)).sum().backward();
            for part in Part::ALL {
                let Some(adapter) = traced.get(part) else { continue };
                let gradient = |p: &Param<Tensor<2>>| p.val().grad(&all).map_or(vec![0.0; 6], plain);
                let found = |pair: &Pair<Tensor<2>>| pair.get(part).cloned().map_or(vec![0.0; 6], plain);
                close(&found(&d_up), &gradient(&adapter.up));
                close(&found(&d_down), &gradient(&adapter.down));
                assert_eq!(encoded.has(part), !positions.of(part).is_empty());
            }

            // Rows alone add up to the whole.
            let sum = |rows: &OfRows| {
                let all = rows.iter().map(|(_, gradient)| plain(gradient.clone()));
                all.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect()).unwrap()
            };
            for (rows, whole) in
                [(module.backward_rows(&encoded, &u), &d_down), (module.backward_hidden_rows(&encoded, &g), &d_up)]
            {
                assert_eq!(rows.parts(), whole.parts());
                for (part, rows) in rows.iter() {
                    close(&sum(rows), &plain(whole.get(part).unwrap().clone()));
                    let having: Vec<usize> = positions
                        .counts(part)
                        .iter()
                        .enumerate()
                        .filter(|(_, n)| **n > 0)
                        .map(|(row, _)| row)
                        .collect();
                    assert_eq!(rows.iter().map(|(row, _)| *row).collect::<Vec<_>>(), having);
                }
            }
        }
    }

    #[test]
    fn what_has_no_adapter_stays_as_it_is() {
        let device = Device::flex();
        let x = matrix(7, DIM, 0.1, &device);
        let module = NanoAdapters::from_state(&adapters(AdapterChoice::Image), &device);
        let h = plain(module.hidden(&x, &module.encode(&x, &positions())));
        let before = plain(x.clone());
        let changed: Vec<usize> =
            (0..7).filter(|p| h[p * DIM..(p + 1) * DIM] != before[p * DIM..(p + 1) * DIM]).collect();
        assert_eq!(changed, [1, 2]);
        // No picture, no adapter, `up` at 0: not one bit differs.
        let words = Positions::plain(vec![4, 3]);
        let encoded = module.encode(&x, &words);
        assert!(encoded.codes().is_empty());
        assert_eq!(plain(module.hidden(&x, &encoded)), before);
        let none = NanoAdapters::identity();
        assert_eq!(plain(none.hidden(&x, &none.encode(&x, &positions()))), before);
        let mut state = adapters(AdapterChoice::Both);
        state.0.iter_mut().filter(|(name, _)| name.ends_with("up")).for_each(|(_, blob)| blob.data.fill(0.0));
        let fresh = NanoAdapters::from_state(&state, &device);
        assert_eq!(plain(fresh.hidden(&x, &fresh.encode(&x, &positions()))), before);
    }
}
