//! LLaVA-1.5's connector: two linear layers with an activation between them.

use super::activate;
use crate::config::{Activation, ModelConfig};
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor};

/// `linear_2(act(linear_1(x)))`, from vision width to the LLM's width.
#[derive(Module, Debug)]
pub struct Projector {
    /// `[vision D, text D]`
    pub linear_1: Linear,
    /// `[text D, text D]`
    pub linear_2: Linear,
    #[module(skip)]
    activation: Activation,
}

impl Projector {
    /// Fresh weights (lazily made, so loading replaces them at no cost).
    pub fn init(config: &ModelConfig, device: &Device) -> Self {
        Self {
            linear_1: LinearConfig::new(config.vision.hidden, config.text.hidden).init(device),
            linear_2: LinearConfig::new(config.text.hidden, config.text.hidden).init(device),
            activation: config.projector_activation,
        }
    }

    /// # Shapes
    /// - input: `[B, P, vision D]`, output: `[B, P, text D]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        self.linear_2.forward(activate(self.activation, self.linear_1.forward(x)))
    }
}
