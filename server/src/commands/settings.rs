//! Settings of a federation on the command line: a file, and flags over it.

use anyhow::Context;
use fednano_shared::settings::{
    AdapterChoice, BoundaryChoice, FederationSettings, Format, OptimizerKind, Overlap, Rounding, Strategy,
};
use serde::Serialize;
use std::path::PathBuf;

/// Settings of a federation. Each flag is the file's key of the same name and goes over it; what neither gives keeps its
/// default. `server/federation.toml` explains every key, those without a flag included.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
pub struct SettingFlags {
    /// Settings file (TOML); flags go over it.
    #[arg(long = "settings", value_name = "FILE")]
    #[serde(skip)]
    settings_file: Option<PathBuf>,
    /// Rank of the adapters.
    #[arg(long)]
    rank: Option<usize>,
    /// Which adapters exist and are trained: image, text or both.
    #[arg(long)]
    adapters: Option<AdapterChoice>,
    /// Rounds until the federation is finished.
    #[arg(long)]
    rounds: Option<u32>,
    /// Passes over the own data in each round.
    #[arg(long)]
    local_epochs: Option<u32>,
    /// Optimiser steps of a round, whatever the number of samples (0: by epochs).
    #[arg(long)]
    local_steps: Option<u32>,
    /// Samples of an optimiser step.
    #[arg(long)]
    batch_size: Option<usize>,
    /// Samples of one request to the LLM (0: the whole batch).
    #[arg(long)]
    micro_batch: Option<usize>,
    /// What turns gradients into steps: adamw or sgd.
    #[arg(long)]
    optimizer: Option<OptimizerKind>,
    /// Peak rate in round 1.
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Longest gradient over all adapters together (0: off).
    #[arg(long)]
    clip_norm: Option<f64>,
    /// The last round's peak rate as a share of the first's.
    #[arg(long)]
    final_rate: Option<f64>,
    /// Share of a round's steps over which the rate rises to its peak.
    #[arg(long)]
    warmup: Option<f64>,
    /// Rate at a round's end as a share of its peak (1: constant).
    #[arg(long)]
    round_end_rate: Option<f64>,
    /// Local training and merging: local, centralised (simulation only), fedavg, fedprox, fedadam, median, trimmed-mean,
    /// feddpa-f, fisher, fisher-ef or fisher-adam.
    #[arg(long)]
    strategy: Option<Strategy>,
    /// FedProx: pull towards the round's start.
    #[arg(long)]
    prox_mu: Option<f64>,
    /// FedAdam: the server's rate.
    #[arg(long)]
    server_rate: Option<f64>,
    /// Trimmed mean: share cut at each end.
    #[arg(long)]
    trim: Option<f64>,
    /// Samples of the Fisher pass (0: all).
    #[arg(long)]
    fisher_samples: Option<usize>,
    /// Power of the Fisher values: 1 as in the paper, 0 as FedAvg.
    #[arg(long)]
    fisher_power: Option<f64>,
    /// Share of the own samples kept for the participant's own evaluation.
    #[arg(long)]
    local_test: Option<f64>,
    /// Seed of adapters, selections, orders and splits.
    #[arg(long, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    seed: Option<u64>,
    /// Participants needed before the first round.
    #[arg(long)]
    min_participants: Option<usize>,
    /// Updates needed to merge a round.
    #[arg(long)]
    min_updates: Option<usize>,
    /// Share of the connected participants whose updates a round needs.
    #[arg(long)]
    fraction: Option<f64>,
    /// So much more of them are selected than needed.
    #[arg(long)]
    over_selection: Option<f64>,
    /// Rounds that an update may be late (0: late ones are refused).
    #[arg(long)]
    max_staleness: Option<u32>,
    /// A round ends after so many seconds.
    #[arg(long)]
    round_deadline_s: Option<u64>,
    /// A lost participant is waited for so many seconds.
    #[arg(long)]
    grace_s: Option<u64>,
    /// What goes over the boundary: activations, low-rank, or auto: whichever is fewer bytes.
    #[arg(long)]
    boundary: Option<BoundaryChoice>,
    /// How picture features are sent: f32, f16 or int8 (low-rank).
    #[arg(long)]
    feature_format: Option<Format>,
    /// How hidden states or codes are sent: f32, f16 or int8.
    #[arg(long)]
    code_format: Option<Format>,
    /// How their gradients come back: f32, f16 or int8.
    #[arg(long)]
    gradient_format: Option<Format>,
    /// How the up matrices and their gradients are sent: f32, f16 or int8 (low-rank).
    #[arg(long)]
    matrix_format: Option<Format>,
    /// How numbers are rounded to those formats: nearest or stochastic.
    #[arg(long)]
    rounding: Option<Rounding>,
    /// Deflate what is sent where that is smaller: true or false.
    #[arg(long)]
    compress: Option<bool>,
    /// While the server computes: off, parts (send the next part of the step) or stale (the next step's batch too).
    #[arg(long)]
    overlap: Option<Overlap>,
}

impl SettingFlags {
    /// The file over the defaults, the flags over both, everything checked at once.
    ///
    /// # Errors
    /// A file that cannot be read; all faults together.
    pub fn settings(&self, defaults: FederationSettings) -> anyhow::Result<FederationSettings> {
        self.over(self.file()?, defaults)
    }

    /// The file over what is there already, the flags over both, and what is wrong with them; values are not checked, since
    /// others may be put over them in turn.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn gather(&self, settings: FederationSettings) -> anyhow::Result<(FederationSettings, Vec<String>)> {
        Ok(self.put(self.file()?, settings))
    }

    /// The settings file's name and text.
    fn file(&self) -> anyhow::Result<Option<(String, String)>> {
        let Some(path) = &self.settings_file else { return Ok(None) };
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the settings file {}", path.display()))?;
        Ok(Some((path.display().to_string(), text)))
    }

    fn put(
        &self,
        file: Option<(String, String)>,
        mut settings: FederationSettings,
    ) -> (FederationSettings, Vec<String>) {
        let mut faults = Vec::new();
        if let Some((name, text)) = file {
            let (read, in_file) = settings.with_toml(&text);
            settings = read;
            faults.extend(in_file.into_iter().map(|fault| format!("in {name}: {fault}")));
        }
        let (settings, in_flags) = settings.with(self);
        faults.extend(in_flags);
        (settings, faults)
    }

    /// [`Self::settings`] with a file's name and text.
    fn over(&self, file: Option<(String, String)>, defaults: FederationSettings) -> anyhow::Result<FederationSettings> {
        let (settings, mut faults) = self.put(file, defaults);
        faults.extend(settings.validate().err().into_iter().flatten());
        anyhow::ensure!(faults.is_empty(), "these settings are not usable:\n  {}", faults.join("\n  "));
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    const EXAMPLE: &str = include_str!("../../federation.toml");

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        flags: SettingFlags,
    }

    fn flags(words: &[&str]) -> SettingFlags {
        Cli::try_parse_from(std::iter::once("fednano").chain(words.iter().copied())).unwrap().flags
    }

    fn file(text: &str) -> Option<(String, String)> {
        Some(("mine.toml".into(), text.into()))
    }

    #[test]
    fn the_example_file_holds_every_key_with_its_default_and_a_comment() {
        assert_eq!(FederationSettings::from_toml(EXAMPLE), Ok(FederationSettings::default()));
        let lines: Vec<&str> = EXAMPLE.lines().collect();
        let keys = serde_json::to_value(FederationSettings::default()).unwrap();
        for key in keys.as_object().unwrap().keys() {
            let at = lines.iter().position(|line| line.starts_with(&format!("{key} = ")));
            let at = at.unwrap_or_else(|| panic!("server/federation.toml does not name '{key}'"));
            assert!(at > 0 && lines[at - 1].starts_with("# "), "'{key}' has no comment");
        }
    }

    #[test]
    fn every_flag_is_a_key_and_goes_over_the_file() {
        let file = file("rank = 4\nrounds = 9\nstrategy = \"median\"\nmin_updates = 2\n");
        let flags = flags(&["--rounds", "3", "--adapters", "text", "--min-participants", "2", "--compress", "true"]);
        let settings = flags.over(file, FederationSettings { seed: 7, ..Default::default() }).unwrap();
        let expected = FederationSettings {
            rank: 4,
            rounds: 3,
            strategy: Strategy::Median,
            adapters: AdapterChoice::Text,
            min_updates: 2,
            min_participants: 2,
            compress: true,
            seed: 7,
            ..Default::default()
        };
        assert_eq!(settings, expected);
        // A flag without a key of its name would be a fault at each start.
        let all = serde_json::to_value(SettingFlags::default()).unwrap();
        let keys = serde_json::to_value(FederationSettings::default()).unwrap();
        for flag in all.as_object().unwrap().keys() {
            assert!(keys.get(flag).is_some(), "there is no setting '{flag}'");
        }
    }

    #[test]
    fn faults_of_file_and_flags_come_together() {
        let flags_given = flags(&["--learning-rate", "7", "--trim", "0.6"]);
        let faulty = file("ranks = 4\nrounds = true\n");
        let cause = flags_given.over(faulty, FederationSettings::default()).unwrap_err().to_string();
        let parts = [
            "in mine.toml: there is no setting 'ranks'; is 'rank' meant?",
            "rounds",
            "learning_rate is 7",
            "trim is 0.6",
        ];
        for part in parts {
            assert!(cause.contains(part), "{part}: {cause}");
        }
        let missing = flags(&["--settings", "no/such.toml"]).settings(FederationSettings::default()).unwrap_err();
        assert!(missing.to_string().contains("no/such.toml"));
        let unknown = Cli::try_parse_from(["fednano", "--strategy", "fedvag"]).err().unwrap().to_string();
        assert!(unknown.contains("'fedvag' is no strategy"), "{unknown}");
    }
}
