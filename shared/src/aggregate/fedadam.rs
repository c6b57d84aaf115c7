//! FedAdam: Adam on the server with the mean change as pseudo-gradient. Reddi et al. 2021, arXiv 2003.00295, Algorithm 2:
//!
//! ```text
//! delta   = sum_k n_k (theta_k - theta) / sum_k n_k
//! m       = beta1 m + (1 - beta1) delta                 m starts at 0
//! v       = beta2 v + (1 - beta2) delta^2               v starts at tau^2
//! theta   = theta + rate m / (sqrt(v) + tau)            no bias correction
//! ```
//!
//! The paper writes the mean over clients plainly; here it is weighted by sample count as in FedAvg, so that the two differ in
//! the server's step only. With the default betas no value moves by more than `rate` in the first round and 2.4 times that in
//! any, whatever was sent: `|m| / sqrt(v) <= (1 - beta1) / sqrt(1 - beta2) / sqrt(1 - beta1^2 / beta2)`, by Cauchy and Schwarz.

use super::mean::Weighing;
use super::{AggregateError, Aggregator, ClientUpdate, StrategyState};
use crate::plain::AdapterState;
use crate::settings::FederationSettings;

/// Names of the moments in [`StrategyState`].
const FIRST: &str = "m";
const SECOND: &str = "v";

/// Adam on the server.
#[derive(Debug, Clone, Copy)]
pub struct FedAdam {
    weighing: Weighing,
    rate: f64,
    beta1: f64,
    beta2: f64,
    tau: f64,
}

impl FedAdam {
    /// As the federation agreed.
    pub fn of(settings: &FederationSettings) -> Self {
        Self {
            weighing: Weighing::of(settings),
            rate: settings.server_rate,
            beta1: settings.server_beta1,
            beta2: settings.server_beta2,
            tau: settings.server_tau,
        }
    }
}

impl Aggregator for FedAdam {
    fn aggregate(
        &self,
        global: &AdapterState,
        updates: &[ClientUpdate],
        state: &mut StrategyState,
    ) -> Result<AdapterState, AggregateError> {
        let mut merged = self.weighing.mean_of_updates(global, updates);
        let mut first = moment(state, FIRST, global, 0.0)?;
        let mut second = moment(state, SECOND, global, self.tau.powi(2))?;
        let tensors = merged.0.values_mut().zip(global.0.values());
        let moments = first.0.values_mut().zip(second.0.values_mut());
        for ((mean, old), (m, v)) in tensors.zip(moments) {
            let values = mean.data.iter_mut().zip(&old.data);
            for ((value, old), (m, v)) in values.zip(m.data.iter_mut().zip(&mut v.data)) {
                let old = f64::from(*old);
                let delta = f64::from(*value) - old;
                let mean = self.beta1 * f64::from(*m) + (1.0 - self.beta1) * delta;
                // Never negative, unless the store was tampered with.
                let square = (self.beta2 * f64::from(*v) + (1.0 - self.beta2) * delta.powi(2)).max(0.0);
                (*m, *v) = (mean as f32, square as f32);
                *value = (old + self.rate * mean / (square.sqrt() + self.tau)) as f32;
            }
        }
        state.0.insert(FIRST.into(), first);
        state.0.insert(SECOND.into(), second);
        Ok(merged)
    }
}

/// What is remembered, or its beginning.
fn moment(
    state: &StrategyState,
    name: &str,
    global: &AdapterState,
    start: f64,
) -> Result<AdapterState, AggregateError> {
    if let Some(moment) = state.0.get(name) {
        moment.check_like(global).map_err(|cause| AggregateError::State { name: name.into(), cause })?;
        return Ok(moment.clone());
    }
    let mut moment = global.clone();
    moment.0.values_mut().for_each(|b| b.data.fill(start as f32));
    Ok(moment)
}

#[cfg(test)]
mod tests {
    use super::super::merge;
    use super::super::tests::{adapters, scalars, settings, update};
    use super::*;
    use crate::settings::Strategy;

    fn example() -> FederationSettings {
        FederationSettings { server_rate: 0.1, max_delta_norm: 0.0, ..settings(Strategy::FedAdam) }
    }

    #[test]
    fn two_rounds_by_hand() {
        let mut state = StrategyState::default();
        let mut global = scalars([1.0; 4]);
        let (mut theta, mut m, mut v) = (1f64, 0f64, 1e-6f64);
        for sent in [[2.0, 4.0], [0.5, 0.0]] {
            let updates = vec![update(1, 1, [sent[0]; 4], [0.0; 4]), update(2, 3, [sent[1]; 4], [0.0; 4])];
            global = merge(&example(), &global, updates, &mut state).unwrap().adapter;
            let delta = f64::from(sent[0] + 3.0 * sent[1]) / 4.0 - theta;
            m = 0.9 * m + 0.1 * delta;
            v = 0.99 * v + 0.01 * delta * delta;
            theta += 0.1 * m / (v.sqrt() + 1e-3);
            for blob in global.0.values() {
                assert!((f64::from(blob.data[0]) - theta).abs() < 1e-6, "{} {theta}", blob.data[0]);
            }
        }
        assert_eq!(state.0.keys().collect::<Vec<_>>(), ["m", "v"]);
    }

    #[test]
    fn no_change_moves_nothing_and_huge_changes_move_by_the_rate() {
        let global = scalars([1.0; 4]);
        let stay = merge(&example(), &global, vec![update(1, 1, [1.0; 4], [0.0; 4])], &mut StrategyState::default());
        assert_eq!(stay.unwrap().adapter, global);
        let far = merge(&example(), &global, vec![update(1, 1, [9e3; 4], [0.0; 4])], &mut StrategyState::default());
        assert!(far.unwrap().adapter.0.values().all(|b| (b.data[0] - 1.1).abs() < 1e-5));
    }

    #[test]
    fn moments_of_other_adapters_are_refused_and_kept() {
        let mut state = StrategyState(std::iter::once(("m".to_owned(), adapters(2, 1, |_| 0.0))).collect());
        let before = state.clone();
        let result = merge(&example(), &scalars([0.0; 4]), vec![update(1, 1, [1.0; 4], [0.0; 4])], &mut state);
        assert!(result.unwrap_err().to_string().contains("'m'"));
        assert_eq!(state, before);
    }
}
