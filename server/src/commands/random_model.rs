//! `fednano random-model`: a checkpoint of a model's real shape with random weights.

use crate::presets;
use crate::random_model::{Options, Storage, write};
use anyhow::Context;
use clap::builder::PossibleValuesParser;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;

/// Write a model directory of a real model's shape with random weights, to measure size, memory and speed.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Shape.
    #[arg(long, value_parser = PossibleValuesParser::new(presets::NAMES))]
    like: String,
    /// Model directory to write; must not exist or be empty.
    #[arg(long)]
    out: PathBuf,
    /// Seed of the weights.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How the weights are stored.
    #[arg(long, value_enum, default_value = "f16")]
    storage: Storage,
    /// Largest weight file, bytes of weights.
    #[arg(long, default_value_t = 1 << 30)]
    shard_bytes: u64,
}

/// Run it.
///
/// # Errors
/// See [`write`].
pub fn main(args: &Args) -> anyhow::Result<()> {
    let config = presets::find(&args.like)
        .with_context(|| format!("no shape '{}'; known are {}", args.like, presets::NAMES.join(", ")))?;
    let options = Options { seed: args.seed, storage: args.storage, shard_bytes: args.shard_bytes };
    let bar = ProgressBar::new(0);
    let style = "{wide_bar} {decimal_bytes}/{decimal_total_bytes}, {elapsed} spent, {eta} left";
    bar.set_style(ProgressStyle::with_template(style)?);
    let written = write(&config, &options, &args.out, &bar)?;
    bar.finish_and_clear();
    println!(
        "{}: {:.1} M random parameters in the shape of {}, {:.1} MB of weights in {} file(s)",
        args.out.display(),
        written.parameters as f64 / 1e6,
        args.like,
        written.bytes as f64 / 1e6,
        written.shards
    );
    Ok(())
}
