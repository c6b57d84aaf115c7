//! Sums of gradients, and of their squares, over the parts of a step.

use super::StepError;
use crate::model::adapter::{DeviceError, NanoAdapters, OfRows, read_all};
use crate::plain::AdapterState;
use burn::tensor::Tensor;
use std::collections::BTreeMap;

/// The sum over rows of the squares of their own gradients; none where no row has one.
///
/// The boundary's loss is a mean over the request's targets: its gradient from one row, times (targets of the request / targets of the
/// row), is the gradient of the row's own loss, so one reply serves all rows.
pub(super) fn squares(rows: OfRows, scales: &[f64]) -> Option<Tensor<2>> {
    let scale = |row: usize| scales.get(row).copied().unwrap_or(1.0);
    rows.into_iter().map(|(row, gradient)| gradient.mul_scalar(scale(row)).square()).reduce(|sum, own| sum + own)
}

/// Sums by the names of the adapters' tensors, on the device.
#[derive(Default)]
pub(super) struct Sums(BTreeMap<&'static str, Tensor<2>>);

impl Sums {
    pub(super) fn add(&mut self, name: &'static str, value: Option<Tensor<2>>) {
        let Some(value) = value else { return };
        let sum = match self.0.remove(name) {
            Some(sum) => sum + value,
            None => value,
        };
        self.0.insert(name, sum);
    }

    /// There is one of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// One for each trained tensor, in the order of [`NanoAdapters::named`].
    pub(super) fn in_order(mut self, adapters: &NanoAdapters) -> Result<Vec<Tensor<2>>, StepError> {
        let found: Vec<Tensor<2>> = adapters.named().iter().filter_map(|(name, _)| self.0.remove(name)).collect();
        let expected = adapters.tensors();
        if found.len() != expected || !self.0.is_empty() {
            return Err(StepError::GradientCount { found: found.len(), expected });
        }
        Ok(found)
    }

    /// Read all of them, then add them: all or none.
    pub(super) async fn add_to(self, sums: &mut AdapterState) -> Result<(), DeviceError> {
        let (names, values): (Vec<&'static str>, Vec<Tensor<2>>) = self.0.into_iter().unzip();
        let all = names.into_iter().map(str::to_owned).zip(read_all(values).await?);
        sums.add(&AdapterState(all.collect()));
        Ok(())
    }
}
