//! `fednano pretrain`: make nano-llava from a seed.

use crate::device::DeviceChoice;
use crate::pretrain::card;
use crate::pretrain::run::{Schedule, run};
use anyhow::Context;
use fednano_shared::model::files::ModelFiles;
use std::path::PathBuf;

/// Make the demo model nano-llava from a seed, on generated scenes.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory to write.
    #[arg(long, default_value = "server/models/nano-llava")]
    out: PathBuf,
    /// Seed of start values and corpus.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where to train.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceChoice,
    /// Steps of the vision tower alone.
    #[arg(long, default_value_t = 1200)]
    eyes_steps: u64,
    /// Steps of projector and token table alone.
    #[arg(long, default_value_t = 150)]
    align_steps: u64,
    /// Joint steps.
    #[arg(long, default_value_t = 4000)]
    joint_steps: u64,
    /// Joint steps with the emphasis on what is learned last.
    #[arg(long, default_value_t = 2500)]
    hard_steps: u64,
    /// Pictures a joint step.
    #[arg(long, default_value_t = 12)]
    pictures: usize,
    /// Decoder layers.
    #[arg(long, default_value_t = 4)]
    layers: usize,
    /// Forget an unfinished run.
    #[arg(long)]
    restart: bool,
}

/// Run it.
///
/// # Errors
/// See [`run`].
pub fn main(args: &Args) -> anyhow::Result<()> {
    let (device, name) = args.device.open()?;
    println!("pretraining on {name} into {}", args.out.display());
    let schedule = Schedule {
        seed: args.seed,
        eyes_steps: args.eyes_steps,
        align_steps: args.align_steps,
        joint_steps: args.joint_steps,
        eyes_pictures: 32,
        joint_pictures: args.pictures,
        eyes_rate: 1.5e-3,
        align_rate: 3e-3,
        joint_rate: 1e-3,
        hard_steps: args.hard_steps,
        hard_rate: if args.hard_steps > 0 { 7e-4 } else { 0.0 },
        text_layers: args.layers,
    };
    let seconds = run(schedule.clone(), &args.out, &device, args.restart)?;
    println!("trained for {seconds:.0} s; measuring the finished files on held-out scenes");
    let scores = card::measure(&args.out, args.seed, &device)?;
    let parameters = ModelFiles::open(&args.out)?.weights.parameters();
    let text = card::card(&schedule, seconds, &name, parameters, &scores);
    let path = args.out.join("README.md");
    std::fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{text}");
    Ok(())
}
