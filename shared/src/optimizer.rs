//! The optimisers of the adapters, one tensor at a time: burn's AdamW, and SGD with momentum.
//!
//! What they remember is held here, by the tensors' names, so that it can be read, kept and put back bit for bit. burn's own
//! record of a `ModuleOptimizer` reads tensors without waiting, which a browser cannot, and names them by ids that a reload
//! changes; and its SGD hides the velocity, so those two lines are written out.

use crate::model::adapter::{DeviceError, read};
use crate::plain::{AdapterState, PlainError, TensorBlob};
use crate::settings::{FederationSettings, OptimizerKind};
use burn::optim::{AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, Optimizer};
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Share of Adam's second moment that a step leaves.
const BETA_2: f32 = 0.999;

/// An optimiser of [`NanoAdapters`](crate::model::adapter::NanoAdapters).
pub struct AdapterOptimizer {
    rule: Rule,
    memory: BTreeMap<&'static str, Memory>,
}

enum Rule {
    /// Loshchilov and Hutter 2019, arXiv 1711.05101.
    AdamW(AdamW),
    /// `v = momentum * v + g`, `theta = (1 - rate * decay) * theta - rate * v`: decay beside the velocity, as in AdamW.
    Sgd { momentum: f64, weight_decay: f64 },
}

/// What is remembered of one tensor, off the autodiff graph.
struct Memory {
    steps: usize,
    /// AdamW's first moment, SGD's velocity.
    first: Tensor<2>,
    /// AdamW's second moment.
    second: Option<Tensor<2>>,
}

/// Everything that an optimiser remembers, as plain data.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct OptimizerState {
    /// Steps done.
    pub steps: u64,
    /// AdamW's first moments or SGD's velocities; no tensors before the first step.
    pub first: AdapterState,
    /// AdamW's second moments; no tensors with SGD.
    pub second: AdapterState,
}

impl AdapterOptimizer {
    /// As agreed, remembering nothing.
    pub fn new(settings: &FederationSettings) -> Self {
        let rule = match settings.optimizer {
            OptimizerKind::AdamW => {
                let config = AdamWConfig::new().with_beta_2(BETA_2).with_epsilon(1e-8);
                Rule::AdamW(config.with_weight_decay(settings.weight_decay as f32).build())
            }
            OptimizerKind::Sgd => Rule::Sgd { momentum: settings.momentum, weight_decay: settings.weight_decay },
        };
        Self { rule, memory: BTreeMap::new() }
    }

    /// The next value of a tensor. Value and gradient are off the autodiff graph, on one device.
    pub fn step(&mut self, rate: f64, name: &'static str, value: Tensor<2>, gradient: Tensor<2>) -> Tensor<2> {
        let before = self.memory.remove(name);
        let steps = before.as_ref().map_or(0, |m| m.steps) + 1;
        let (value, after) = match &self.rule {
            Rule::AdamW(adam) => {
                let moments = before.and_then(|m| {
                    let (time, moment_1, moment_2) = (m.steps, m.first, m.second?);
                    let momentum = AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2: None };
                    Some(AdamWState { momentum })
                });
                let (value, state) = adam.step(rate, value, gradient, moments);
                let after = state.map(|AdamWState { momentum: m }| Memory {
                    steps: m.time,
                    first: m.moment_1,
                    second: Some(m.moment_2),
                });
                (value, after)
            }
            Rule::Sgd { momentum, weight_decay } => {
                let velocity = match before {
                    Some(m) => m.first.mul_scalar(*momentum) + gradient,
                    None => gradient,
                };
                let decay = rate * *weight_decay;
                let kept = if decay > 0.0 { value.mul_scalar(1.0 - decay) } else { value };
                let after = Memory { steps, first: velocity.clone(), second: None };
                (kept - velocity.mul_scalar(rate), Some(after))
            }
        };
        if let Some(after) = after {
            self.memory.insert(name, after);
        }
        value
    }

    /// Read everything that is remembered.
    ///
    /// # Errors
    /// When the device fails.
    pub async fn to_state(&self) -> Result<OptimizerState, DeviceError> {
        let mut state = OptimizerState::default();
        for (name, memory) in &self.memory {
            state.steps = memory.steps as u64;
            state.first.0.insert((*name).to_owned(), read(memory.first.clone()).await?);
            if let Some(second) = &memory.second {
                state.second.0.insert((*name).to_owned(), read(second.clone()).await?);
            }
        }
        Ok(state)
    }

    /// Go on with what [`Self::to_state`] gave, on `device` (without autodiff). `like`: the adapters that it belongs to.
    ///
    /// # Errors
    /// [`PlainError`] when it belongs to other adapters or another optimiser.
    pub fn restored(
        settings: &FederationSettings,
        state: &OptimizerState,
        like: &AdapterState,
        device: &Device,
    ) -> Result<Self, PlainError> {
        let mut optimizer = Self::new(settings);
        if state.steps == 0 {
            return Ok(optimizer);
        }
        state.first.check_like(like)?;
        if matches!(optimizer.rule, Rule::AdamW(_)) {
            state.second.check_like(like)?;
        }
        let tensor = |blob: &TensorBlob| {
            let data = TensorData::new(blob.data.clone(), blob.shape.clone());
            Tensor::<2>::from_data(data, device)
        };
        for name in AdapterState::NAMES {
            if let Some(first) = state.first.0.get(name) {
                let second = state.second.0.get(name).map(tensor);
                let memory = Memory { steps: state.steps as usize, first: tensor(first), second };
                optimizer.memory.insert(name, memory);
            }
        }
        Ok(optimizer)
    }

    /// Adam's second moment without its bias towards 0: about the mean square of the latest thousand steps' gradients, after
    /// clipping. None with SGD, and before the first step.
    ///
    /// # Errors
    /// When the device fails.
    pub async fn second_moment(&self) -> Result<Option<AdapterState>, DeviceError> {
        let mut state = AdapterState::default();
        for (name, memory) in &self.memory {
            let Some(second) = &memory.second else { return Ok(None) };
            let unbiased = second.clone().div_scalar(1.0 - BETA_2.powi(memory.steps as i32));
            state.0.insert((*name).to_owned(), read(unbiased).await?);
        }
        Ok((!state.0.is_empty()).then_some(state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().try_into_vec::<f32>().unwrap()
    }

    fn row(values: [f32; 2]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values.to_vec(), [1, 2]), &Device::flex())
    }

    #[test]
    fn sgd_by_hand() {
        let settings =
            FederationSettings { optimizer: OptimizerKind::Sgd, momentum: 0.5, ..FederationSettings::default() };
        let mut sgd = AdapterOptimizer::new(&settings);
        // v = [2, -4], then 0.5 * [2, -4] + [2, 0] = [3, -2].
        let first = sgd.step(0.5, "text.up", row([1.0, 1.0]), row([2.0, -4.0]));
        assert_eq!(values(first.clone()), [0.0, 3.0]);
        assert_eq!(values(sgd.step(0.5, "text.up", first, row([2.0, 0.0]))), [-1.5, 4.0]);
        // Another tensor has its own velocity; decay pulls towards 0.
        let settings = FederationSettings { weight_decay: 1.0, ..settings };
        let mut sgd = AdapterOptimizer::new(&settings);
        assert_eq!(values(sgd.step(0.5, "text.down", row([4.0, -4.0]), row([0.0, 0.0]))), [2.0, -2.0]);
    }

    #[test]
    fn adam_goes_by_the_rate_whatever_the_gradient() {
        let settings = FederationSettings { optimizer: OptimizerKind::AdamW, ..FederationSettings::default() };
        let mut adam = AdapterOptimizer::new(&settings);
        let after = values(adam.step(0.1, "text.up", row([1.0, 1.0]), row([3e-3, -50.0])));
        assert!((after[0] - 0.9).abs() < 1e-5 && (after[1] - 1.1).abs() < 1e-5, "{after:?}");
    }

    #[test]
    fn what_belongs_to_other_adapters_is_refused() {
        use crate::settings::AdapterChoice;
        let settings = FederationSettings { optimizer: OptimizerKind::AdamW, ..FederationSettings::default() };
        let like = AdapterState::zeros(AdapterChoice::Text, 1, 2);
        let moments = |first: &AdapterState, second: &AdapterState| {
            let state = OptimizerState { steps: 3, first: first.clone(), second: second.clone() };
            AdapterOptimizer::restored(&settings, &state, &like, &Device::flex()).map(|o| o.memory.len())
        };
        assert_eq!(moments(&like, &like), Ok(2));
        assert!(moments(&AdapterState::zeros(AdapterChoice::Both, 1, 2), &like).is_err());
        assert!(moments(&like, &AdapterState::default()).is_err(), "AdamW without second moments");
        let none = OptimizerState::default();
        assert!(AdapterOptimizer::restored(&settings, &none, &like, &Device::flex()).is_ok());
    }
}
