//! One thin file for each subcommand.

pub mod account;
pub mod ask;
pub mod bench;
pub mod check;
pub mod demo;
pub mod fetch;
pub mod join;
pub mod pretrain;
pub mod random_model;
pub mod serve;
pub mod simulate;

use fednano_shared::settings::{FederationSettings, Strategy};

/// Settings of a federation as flags; absent ones take the defaults.
#[derive(Debug, Clone, clap::Args)]
pub struct SettingFlags {
    /// Rank of the adapters.
    #[arg(long)]
    rank: Option<usize>,
    /// Rounds until the federation is finished.
    #[arg(long)]
    rounds: Option<u32>,
    /// Passes over the own data in each round.
    #[arg(long)]
    local_epochs: Option<u32>,
    /// Samples of an optimiser step.
    #[arg(long)]
    batch_size: Option<usize>,
    /// AdamW's peak rate in round 1.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// The last round's peak rate as a share of the first's.
    #[arg(long)]
    final_rate: Option<f64>,
    /// Share of a round's steps over which the rate rises to its peak.
    #[arg(long)]
    warmup: Option<f64>,
    /// Rate at a round's end as a share of its peak (1: constant).
    #[arg(long)]
    round_end_rate: Option<f64>,
    /// Merging: fisher or fedavg.
    #[arg(long, value_parser = strategy)]
    strategy: Option<Strategy>,
    /// Samples of the Fisher pass (0: all).
    #[arg(long)]
    fisher_samples: Option<usize>,
    /// Seed of adapters, orders and splits.
    #[arg(long)]
    seed: Option<u64>,
    /// Participants needed before the first round.
    #[arg(long)]
    min_participants: Option<usize>,
    /// A round ends after so many seconds.
    #[arg(long)]
    round_deadline_s: Option<u64>,
    /// A lost participant is waited for so many seconds.
    #[arg(long)]
    grace_s: Option<u64>,
}

fn strategy(name: &str) -> Result<Strategy, String> {
    match name {
        "fisher" => Ok(Strategy::Fisher),
        "fedavg" => Ok(Strategy::FedAvg),
        _ => Err("known strategies: fisher, fedavg".into()),
    }
}

impl SettingFlags {
    /// Fill in the defaults and check everything at once.
    ///
    /// # Errors
    /// All faults together.
    pub fn settings(&self, defaults: FederationSettings) -> anyhow::Result<FederationSettings> {
        let d = defaults;
        let settings = FederationSettings {
            rank: self.rank.unwrap_or(d.rank),
            rounds: self.rounds.unwrap_or(d.rounds),
            local_epochs: self.local_epochs.unwrap_or(d.local_epochs),
            batch_size: self.batch_size.unwrap_or(d.batch_size),
            learning_rate: self.learning_rate.unwrap_or(d.learning_rate),
            final_rate: self.final_rate.unwrap_or(d.final_rate),
            warmup: self.warmup.unwrap_or(d.warmup),
            round_end_rate: self.round_end_rate.unwrap_or(d.round_end_rate),
            strategy: self.strategy.unwrap_or(d.strategy),
            fisher_samples: self.fisher_samples.unwrap_or(d.fisher_samples),
            seed: self.seed.unwrap_or(d.seed),
            min_participants: self.min_participants.unwrap_or(d.min_participants),
            round_deadline_s: self.round_deadline_s.unwrap_or(d.round_deadline_s),
            grace_s: self.grace_s.unwrap_or(d.grace_s),
        };
        settings
            .validate()
            .map_err(|faults| anyhow::anyhow!("these settings are not usable: {}", faults.join("; ")))?;
        Ok(settings)
    }
}
