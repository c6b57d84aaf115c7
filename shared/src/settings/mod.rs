//! Settings of a federation, sent to every participant at the handshake; validated once, all faults named together.
//!
//! One flat table for server, page and simulator: `server/federation.toml` shows every key with its default.

mod file;
mod names;

pub use file::put_over;
pub(crate) use names::named;
pub use names::{AdapterChoice, BoundaryChoice, Format, OptimizerKind, Overlap, Rounding, Strategy, UnknownName};

use serde::{Deserialize, Serialize};
use std::f64::consts::PI;

/// What all participants of a federation agree on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FederationSettings {
    /// Rank of the adapters.
    pub rank: usize,
    /// Which adapters exist and are trained.
    pub adapters: AdapterChoice,
    /// Rounds until the federation is finished.
    pub rounds: u32,
    /// Passes over the own data in each round.
    pub local_epochs: u32,
    /// Optimiser steps of a round, whatever the number of samples (0: as many as `local_epochs` makes).
    pub local_steps: u32,
    /// Samples of an optimiser step.
    pub batch_size: usize,
    /// Samples of one request to the LLM (0: the whole batch); the step stays the same, the memory is less.
    pub micro_batch: usize,
    /// What turns gradients into steps.
    pub optimizer: OptimizerKind,
    /// Peak rate in round 1.
    pub learning_rate: f64,
    /// Share of the last step's direction that is kept (SGD only).
    pub momentum: f64,
    /// Share of each value, times the rate, that a step takes away.
    pub weight_decay: f64,
    /// Longest gradient over all adapter tensors together; a longer one is shortened to it (0: off).
    pub clip_norm: f64,
    /// The last round's peak rate as a share of the first's; linear in between.
    pub final_rate: f64,
    /// Share of a round's steps over which the rate rises linearly to its peak (AdamW starts each round without moments).
    pub warmup: f64,
    /// Rate at a round's end as a share of its peak, a cosine in between; 1: constant.
    pub round_end_rate: f64,
    /// Local training and merging.
    pub strategy: Strategy,
    /// FedProx: pull towards the round's start, the mu of `mu/2 |theta - theta_start|^2`.
    pub prox_mu: f64,
    /// FedAdam: the server's rate; about as far as one round moves a value at most.
    pub server_rate: f64,
    /// FedAdam: decay of the mean change.
    pub server_beta1: f64,
    /// FedAdam: decay of the mean squared change.
    pub server_beta2: f64,
    /// FedAdam: the divisor's floor; changes well below it are followed in proportion to their size.
    pub server_tau: f64,
    /// Trimmed mean: share of the participants cut at each end of every value, rounded up.
    pub trim: f64,
    /// Samples of the Fisher pass at the end of a round (0: all).
    pub fisher_samples: usize,
    /// Fisher values count at least so much of their tensor's mean.
    pub fisher_floor: f64,
    /// Fisher weights count at most so many times the participants' lower median for that value (0: off).
    pub fisher_cap: f64,
    /// Fisher values are raised to this power: 1 as in the paper, 0 weighs by sample count alone, as FedAvg.
    pub fisher_power: f64,
    /// Each participant's Fisher values are divided by their tensor's mean first, so that only their pattern counts: without it, as in
    /// the paper, who has fitted its samples least weighs most.
    pub fisher_normalise: bool,
    /// One Fisher weight for each hidden unit of an adapter, row of `down` and column of `up`, instead of one a value.
    pub fisher_unit: bool,
    /// An update further from the federation's adapters than so many times the round's (lower) median is shortened to that (0: off).
    pub max_delta_norm: f64,
    /// A participant's samples count at most so many times the round's (lower) median (0: off).
    pub max_weight: f64,
    /// Largest share that one of three or more participants has in any merged value (0.5: never more than all others together; 1: off).
    pub max_share: f64,
    /// FedDPA-F: passes over the own data for the personal adapter.
    pub personal_epochs: u32,
    /// FedDPA-F: the personal adapter's share in the mix.
    pub personal_share: f64,
    /// Share of the own samples never trained on, for the participant's own evaluation.
    pub local_test: f64,
    /// Seed of the initial adapters, of who is selected and of each client's order of samples.
    pub seed: u64,
    /// Participants needed before round 1 starts.
    pub min_participants: usize,
    /// Updates needed to merge a round.
    pub min_updates: usize,
    /// Share of the connected participants whose updates a round needs.
    pub fraction: f64,
    /// So much more of them are selected than needed; the round ends with the first who are done.
    pub over_selection: f64,
    /// Rounds that an update may be late and still be merged (0: late ones are refused).
    pub max_staleness: u32,
    /// An update `s` rounds late weighs `1 / (1 + s)^power` of its samples (Xie et al. 2019, arXiv 1903.03934).
    pub staleness_power: f64,
    /// After so long a round ends with the updates that are there, seconds.
    pub round_deadline_s: u64,
    /// How long a round waits for a participant whose connection was lost, seconds.
    pub grace_s: u64,
    /// What goes over the boundary; `auto` is settled for each participant at the handshake.
    pub boundary: BoundaryChoice,
    /// Number format of picture features, sent once (`low-rank`); always to the nearest.
    pub feature_format: Format,
    /// Number format of what goes up at each position: hidden states (`activations`) or codes (`low-rank`). A text that the model
    /// goes on with is sent in it too, in `f16` instead of `int8`.
    pub code_format: Format,
    /// Number format of their gradients, downward.
    pub gradient_format: Format,
    /// Number format of the `up` matrices, of their gradients and of these gradients' squares (`low-rank`); the squares go in `f16`
    /// instead of `int8`.
    pub matrix_format: Format,
    /// How numbers are rounded to `f16` and `int8` in training; evaluations and questions always go to the nearest.
    pub rounding: Rounding,
    /// What is sent in those formats is deflated where that is smaller.
    pub compress: bool,
    /// What a client does while the server computes.
    pub overlap: Overlap,
}

impl Default for FederationSettings {
    fn default() -> Self {
        Self {
            rank: 8,
            adapters: AdapterChoice::Both,
            rounds: 5,
            local_epochs: 1,
            local_steps: 0,
            batch_size: 8,
            micro_batch: 0,
            optimizer: OptimizerKind::AdamW,
            learning_rate: 5e-3,
            momentum: 0.9,
            weight_decay: 0.0,
            clip_norm: 0.0,
            final_rate: 0.3,
            warmup: 0.0,
            round_end_rate: 1.0,
            strategy: Strategy::Fisher,
            prox_mu: 0.01,
            server_rate: 0.03,
            server_beta1: 0.9,
            server_beta2: 0.99,
            server_tau: 1e-3,
            trim: 0.2,
            fisher_samples: 200,
            fisher_floor: 0.05,
            fisher_cap: 100.0,
            fisher_power: 1.0,
            fisher_normalise: true,
            fisher_unit: false,
            max_delta_norm: 10.0,
            max_weight: 10.0,
            max_share: 0.5,
            personal_epochs: 1,
            personal_share: 0.5,
            local_test: 0.0,
            seed: 1,
            min_participants: 1,
            min_updates: 1,
            fraction: 1.0,
            over_selection: 0.0,
            max_staleness: 0,
            staleness_power: 0.5,
            round_deadline_s: 1800,
            grace_s: 20,
            boundary: BoundaryChoice::Auto,
            feature_format: Format::Int8,
            code_format: Format::Int8,
            gradient_format: Format::Int8,
            matrix_format: Format::Int8,
            rounding: Rounding::Nearest,
            compress: false,
            overlap: Overlap::Parts,
        }
    }
}

/// A year, in seconds: longer waits are mistakes.
const YEAR: u64 = 365 * 24 * 3600;

impl FederationSettings {
    /// The defaults, but every number is sent as it is, so that both modes and both ends agree up to the rounding of sums.
    pub fn exact() -> Self {
        let exact = Format::F32;
        Self {
            feature_format: exact,
            code_format: exact,
            gradient_format: exact,
            matrix_format: exact,
            rounding: Rounding::Nearest,
            ..Self::default()
        }
    }

    /// Check every value.
    ///
    /// # Errors
    /// All faults, one sentence each.
    pub fn validate(&self) -> Result<(), Vec<String>> {
        let mut faults = Faults(Vec::new());
        self.check_training(&mut faults);
        self.check_merging(&mut faults);
        self.check_rounds(&mut faults);
        self.check_boundary(&mut faults);
        if faults.0.is_empty() { Ok(()) } else { Err(faults.0) }
    }

    /// [`Self::validate`], and what only a simulation can do is refused.
    ///
    /// # Errors
    /// All faults, one sentence each.
    pub fn validate_for_server(&self) -> Result<(), Vec<String>> {
        let mut faults = self.validate().err().unwrap_or_default();
        if self.strategy == Strategy::Centralised {
            faults.push(
                "strategy is 'centralised', which puts all data in one place and is for `fednano simulate` only; choose another, such as 'fedavg'"
                    .into(),
            );
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    fn check_training(&self, faults: &mut Faults) {
        faults.whole("rank", self.rank, 1, 1024);
        faults.whole("local_epochs", self.local_epochs, 1, 1000);
        faults.whole("local_steps", self.local_steps, 0, 1_000_000);
        faults.whole("batch_size", self.batch_size, 1, 1024);
        faults.need(self.micro_batch <= self.batch_size, || {
            format!("micro_batch is {}, it must be at most batch_size, {}", self.micro_batch, self.batch_size)
        });
        faults.above_0("learning_rate", self.learning_rate, 1.0);
        faults.need((0.0..1.0).contains(&self.momentum), || below_1("momentum", self.momentum));
        faults.within("weight_decay", self.weight_decay, 0.0, 1.0);
        faults.within("clip_norm", self.clip_norm, 0.0, 1e9);
        faults.above_0("final_rate", self.final_rate, 1.0);
        faults.within("warmup", self.warmup, 0.0, 1.0);
        faults.within("round_end_rate", self.round_end_rate, 0.0, 1.0);
        faults.within("prox_mu", self.prox_mu, 0.0, 1000.0);
        faults.whole("personal_epochs", self.personal_epochs, 1, 1000);
        faults.within("personal_share", self.personal_share, 0.0, 1.0);
        faults.within("local_test", self.local_test, 0.0, 0.9);
        // TOML has no larger whole numbers.
        let largest = i64::MAX.unsigned_abs();
        faults.need(self.seed <= largest, || format!("seed is {}, it must be at most {largest}", self.seed));
    }

    fn check_merging(&self, faults: &mut Faults) {
        faults.need(self.strategy != Strategy::FisherAdam || self.optimizer == OptimizerKind::AdamW, || {
            format!(
                "strategy is '{}', which merges by AdamW's second moment, but optimizer is '{}'; choose 'adamw' or another strategy, such as 'fisher-ef'",
                self.strategy, self.optimizer
            )
        });
        faults.above_0("server_rate", self.server_rate, 10.0);
        faults.need((0.0..1.0).contains(&self.server_beta1), || below_1("server_beta1", self.server_beta1));
        faults.need((0.0..1.0).contains(&self.server_beta2), || below_1("server_beta2", self.server_beta2));
        faults.above_0("server_tau", self.server_tau, 1.0);
        faults.need((0.0..0.5).contains(&self.trim), || {
            format!("trim is {}, it must be at least 0 and below 0.5: both ends are cut", self.trim)
        });
        // A tab's numbers have 32 bits.
        faults.whole("fisher_samples", self.fisher_samples, 0, u32::MAX as usize);
        faults.within("fisher_floor", self.fisher_floor, 0.0, 1.0);
        faults.within("fisher_power", self.fisher_power, 0.0, 1.0);
        faults.off_or_from_1("fisher_cap", self.fisher_cap);
        faults.off_or_from_1("max_delta_norm", self.max_delta_norm);
        faults.off_or_from_1("max_weight", self.max_weight);
        faults.within("max_share", self.max_share, 0.5, 1.0);
        faults.within("staleness_power", self.staleness_power, 0.0, 10.0);
    }

    fn check_rounds(&self, faults: &mut Faults) {
        faults.whole("rounds", self.rounds, 1, 100_000);
        faults.whole("min_participants", self.min_participants, 1, 1_000_000);
        faults.need(self.min_updates >= 1, || "min_updates is 0, it must be at least 1".into());
        faults.need(self.min_updates <= self.min_participants.max(1), || {
            format!(
                "min_updates is {}, it must be at most min_participants, {}: round 1 may start with no more than those",
                self.min_updates, self.min_participants
            )
        });
        faults.above_0("fraction", self.fraction, 1.0);
        faults.within("over_selection", self.over_selection, 0.0, 10.0);
        faults.whole("max_staleness", self.max_staleness, 0, 1000);
        faults.whole("round_deadline_s", self.round_deadline_s, 1, YEAR);
        faults.whole("grace_s", self.grace_s, 0, YEAR);
    }

    fn check_boundary(&self, faults: &mut Faults) {
        let whole = self.micro_batch == 0 || self.micro_batch == self.batch_size;
        faults.need(self.overlap != Overlap::Stale || whole, || {
            format!(
                "overlap is 'stale', which sends the next step's batch before this step's is answered, and micro_batch is {}; set micro_batch to 0, or overlap to 'parts'",
                self.micro_batch
            )
        });
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

/// Collects sentences. Comparisons are written so that NaN fails them.
struct Faults(Vec<String>);

impl Faults {
    fn need(&mut self, holds: bool, fault: impl FnOnce() -> String) {
        if !holds {
            self.0.push(fault());
        }
    }

    fn whole<N: PartialOrd + std::fmt::Display>(&mut self, name: &str, value: N, least: N, most: N) {
        self.need(value >= least && value <= most, || format!("{name} is {value}, it must be {least} to {most}"));
    }

    fn within(&mut self, name: &str, value: f64, least: f64, most: f64) {
        self.need(value >= least && value <= most, || format!("{name} is {value}, it must be {least} to {most}"));
    }

    fn above_0(&mut self, name: &str, value: f64, most: f64) {
        self.need(value > 0.0 && value <= most, || format!("{name} is {value}, it must be above 0 and at most {most}"));
    }

    fn off_or_from_1(&mut self, name: &str, value: f64) {
        self.need(value == 0.0 || (1.0..=1e9).contains(&value), || {
            format!("{name} is {value}, it must be 0 (off) or 1 to 1000000000")
        });
    }
}

fn below_1(name: &str, value: f64) -> String {
    format!("{name} is {value}, it must be at least 0 and below 1")
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
    fn each_value_out_of_range_is_named() {
        type Change = fn(&mut FederationSettings);
        let cases: [(&str, Change); 19] = [
            ("local_epochs", |s| s.local_epochs = 0),
            ("micro_batch", |s| s.micro_batch = 9),
            ("momentum", |s| s.momentum = 1.0),
            ("strategy", |s| (s.strategy, s.optimizer) = (Strategy::FisherAdam, OptimizerKind::Sgd)),
            ("server_beta2", |s| s.server_beta2 = f64::NAN),
            ("server_tau", |s| s.server_tau = 0.0),
            ("trim", |s| s.trim = 0.5),
            ("fisher_samples", |s| s.fisher_samples = usize::MAX),
            ("fisher_power", |s| s.fisher_power = 1.5),
            ("fisher_cap", |s| s.fisher_cap = 0.5),
            ("max_delta_norm", |s| s.max_delta_norm = f64::INFINITY),
            ("max_share", |s| s.max_share = 0.4),
            ("local_test", |s| s.local_test = 1.0),
            ("seed", |s| s.seed = u64::MAX),
            ("min_updates", |s| s.min_updates = 2),
            ("fraction", |s| s.fraction = 0.0),
            ("staleness_power", |s| s.staleness_power = -1.0),
            ("round_deadline_s", |s| s.round_deadline_s = u64::MAX),
            ("overlap", |s| (s.overlap, s.micro_batch) = (Overlap::Stale, 4)),
        ];
        for (name, change) in cases {
            let mut settings = FederationSettings::default();
            change(&mut settings);
            let faults = settings.validate().unwrap_err();
            assert!(faults.len() == 1 && faults[0].starts_with(name), "{name}: {faults:?}");
        }
    }

    #[test]
    fn stale_steps_take_whole_batches() {
        for micro_batch in [0, 8] {
            FederationSettings { overlap: Overlap::Stale, micro_batch, ..Default::default() }.validate().unwrap();
        }
        FederationSettings { overlap: Overlap::Parts, micro_batch: 4, ..Default::default() }.validate().unwrap();
    }

    #[test]
    fn only_a_simulation_centralises() {
        let settings = FederationSettings { strategy: Strategy::Centralised, ..Default::default() };
        settings.validate().unwrap();
        assert!(settings.validate_for_server().unwrap_err()[0].contains("'centralised'"));
        FederationSettings::default().validate_for_server().unwrap();
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

    #[test]
    fn settings_go_through_the_handshake() {
        let settings = FederationSettings {
            strategy: Strategy::FisherAdam,
            fisher_unit: true,
            boundary: BoundaryChoice::LowRank,
            code_format: Format::Int8,
            rounding: Rounding::Stochastic,
            compress: true,
            overlap: Overlap::Stale,
            ..Default::default()
        };
        let bytes = postcard::to_stdvec(&settings).unwrap();
        assert_eq!(postcard::from_bytes::<FederationSettings>(&bytes).unwrap(), settings);
        let json = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<FederationSettings>(&json).unwrap(), settings);
    }
}
