//! Settings of a federation, sent to every participant at the handshake; validated once, all faults named together.

use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// How updates become the next model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Mean weighted by sample count (McMahan et al. 2017, arXiv 1602.05629).
    FedAvg,
    /// Mean weighted by sample count and diagonal Fisher (FedNano, arXiv 2506.14824).
    Fisher,
}

/// What all participants of a federation agree on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FederationSettings {
    /// Rank of the adapters.
    pub rank: usize,
    /// Rounds until the federation is finished.
    pub rounds: u32,
    /// Passes over the own data in each round.
    pub local_epochs: u32,
    /// Samples of an optimiser step.
    pub batch_size: usize,
    /// AdamW's peak rate in round 1.
    pub learning_rate: f64,
    /// The last round's peak rate as a share of the first's; linear in between.
    pub final_rate: f64,
    /// Share of a round's steps over which the rate rises linearly to its peak (AdamW starts each round without moments).
    pub warmup: f64,
    /// Rate at a round's end as a share of its peak, a cosine in between; 1: constant.
    pub round_end_rate: f64,
    /// Merging.
    pub strategy: Strategy,
    /// Samples of the Fisher pass at the end of a round (0: all).
    pub fisher_samples: usize,
    /// Seed of the initial adapters and of each client's order of samples.
    pub seed: u64,
    /// Participants needed before a round starts.
    pub min_participants: usize,
    /// After so long a round ends with the updates that are there, seconds.
    pub round_deadline_s: u64,
    /// How long a round waits for a participant whose connection was lost, seconds.
    pub grace_s: u64,
}

impl Default for FederationSettings {
    fn default() -> Self {
        Self {
            rank: 8,
            rounds: 5,
            local_epochs: 1,
            batch_size: 8,
            learning_rate: 5e-3,
            final_rate: 0.3,
            warmup: 0.0,
            round_end_rate: 1.0,
            strategy: Strategy::Fisher,
            fisher_samples: 200,
            seed: 1,
            min_participants: 1,
            round_deadline_s: 1800,
            grace_s: 20,
        }
    }
}

impl FederationSettings {
    /// Check every value.
    ///
    /// # Errors
    /// All faults, one sentence each.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let mut faults = Vec::new();
        let mut need = |holds: bool, fault: String| {
            if !holds {
                faults.push(fault);
            }
        };
        need((1..=1024).contains(&self.rank), format!("rank is {}, it must be 1 to 1024", self.rank));
        need((1..=100_000).contains(&self.rounds), format!("rounds is {}, it must be 1 to 100000", self.rounds));
        need(self.local_epochs >= 1, "local_epochs is 0, it must be at least 1".into());
        need((1..=1024).contains(&self.batch_size), format!("batch_size is {}, it must be 1 to 1024", self.batch_size));
        let rate = self.learning_rate;
        need(rate > 0.0 && rate <= 1.0, format!("learning_rate is {rate}, it must be above 0 and at most 1"));
        let last = self.final_rate;
        need(last > 0.0 && last <= 1.0, format!("final_rate is {last}, it must be above 0 and at most 1"));
        let (warmup, end) = (self.warmup, self.round_end_rate);
        need((0.0..=1.0).contains(&warmup), format!("warmup is {warmup}, it must be 0 to 1"));
        need((0.0..=1.0).contains(&end), format!("round_end_rate is {end}, it must be 0 to 1"));
        need(self.min_participants >= 1, "min_participants is 0, it must be at least 1".into());
        need(self.round_deadline_s >= 1, "round_deadline_s is 0, it must be at least 1".into());
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    /// Learning rate of a step (0 to `steps` - 1) of a round (1 to `rounds`).
    pub fn rate(&self, round: u32, step: usize, steps: usize) -> f64 {
        let part = f64::from(round.saturating_sub(1)) / f64::from(self.rounds.saturating_sub(1).max(1));
        let peak = self.learning_rate * (1.0 - (1.0 - self.final_rate) * part.min(1.0));
        let (step, steps) = (step as f64, steps as f64);
        let warm = (self.warmup * steps).round();
        if step < warm {
            return peak * (step + 1.0) / (warm + 1.0);
        }
        let part = (step - warm) / (steps - warm).max(1.0);
        peak * (self.round_end_rate + (1.0 - self.round_end_rate) * 0.5 * (1.0 + (PI * part).cos()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_sound_and_all_faults_are_named_at_once() {
        FederationSettings::default().validate().unwrap();
        let bad = FederationSettings { rank: 0, learning_rate: f64::NAN, rounds: 0, ..Default::default() };
        let faults = bad.validate().unwrap_err();
        assert_eq!(faults.len(), 3, "{faults:?}");
    }

    #[test]
    fn the_rate_falls_linearly_over_rounds() {
        let s =
            FederationSettings { rounds: 3, learning_rate: 1.0, final_rate: 0.5, warmup: 0.0, ..Default::default() };
        assert_eq!([s.rate(1, 0, 10), s.rate(2, 0, 10), s.rate(3, 0, 10)], [1.0, 0.75, 0.5]);
    }

    #[test]
    fn the_rate_warms_up_and_falls_within_a_round() {
        let s = FederationSettings { learning_rate: 1.0, warmup: 0.3, round_end_rate: 0.1, ..Default::default() };
        let rates: Vec<f64> = (0..10).map(|step| s.rate(1, step, 10)).collect();
        assert_eq!(rates[..4], [0.25, 0.5, 0.75, 1.0]);
        assert!(rates[3..].is_sorted_by(|a, b| a > b), "{rates:?}");
        assert!(rates[9] > 0.1 && rates[9] < 0.2, "{rates:?}");
        let constant = FederationSettings { learning_rate: 1.0, warmup: 0.0, round_end_rate: 1.0, ..s };
        assert!((0..10).all(|step| (constant.rate(1, step, 10) - 1.0).abs() < 1e-12));
    }
}
