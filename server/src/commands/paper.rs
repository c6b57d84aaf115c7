//! `fednano paper`: the study of strategies, skew and merging, from its runs to its tables, plots and reading.

use super::simulate::remove_on_ctrl_c;
use crate::device::{ComputeDtype, DeviceChoice};
use crate::experiment::grid::{Group, Size};
use crate::experiment::study::Study;
use crate::fetch::resolve_model;
use crate::store::TemporaryFolder;
use std::path::{Path, PathBuf};

/// Run the study: every strategy, one factor varied at a time, several seeds; write tables, plots and a reading of them.
///
/// Each finished run is kept at once, and not made again: the command can be stopped at any time and goes on where it was. Hours on two
/// cores; `--quick` makes every part of it as small as can be.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// easy-VQA's folder; without it, the one that the variable FEDNANO_EASY_VQA names, or data/easy-vqa. Not needed for --quick.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Model directory, or a fetched model of the hub.
    #[arg(long, default_value = "server/models/nano-llava")]
    model: String,
    /// Every part as small as can be, on generated scenes, one seed: a test of the study.
    #[arg(long)]
    quick: bool,
    /// Folder for the results; without it docs/results, or target/paper-quick for --quick.
    #[arg(long)]
    out: Option<PathBuf>,
    /// These groups of runs alone; the tables show what there is of the others.
    #[arg(long, value_enum, ignore_case = true, value_delimiter = ',')]
    only: Vec<Group>,
    /// Seeds of each run; without it 1,2,3, or 1 for --quick.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    seeds: Vec<u64>,
    /// Runs side by side; worth it only with many cores.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    jobs: u32,
    /// Where to compute; only the CPU gives the same results each time.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceChoice,
    /// Type of the LLM.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: ComputeDtype,
}

/// Run it.
///
/// # Errors
/// A model or a data set that cannot be used, a run that fails, a disk that cannot be written.
pub async fn main(args: &Args) -> anyhow::Result<()> {
    let temporary = TemporaryFolder::create("paper")?;
    remove_on_ctrl_c(temporary.path().to_owned());
    let study = study(args)?;
    tokio::task::spawn_blocking(move || study.run(temporary.path())).await?
}

fn study(args: &Args) -> anyhow::Result<Study> {
    let (size, out, seeds) = if args.quick {
        (Size::Quick, "target/paper-quick", &[1][..])
    } else {
        (Size::Full, "docs/results", &[1, 2, 3][..])
    };
    let data = match (&args.data, size) {
        (Some(data), _) => Some(data.clone()),
        (None, Size::Quick) => None,
        (None, Size::Full) => Some(easy_vqa()?),
    };
    Ok(Study {
        model: resolve_model(&args.model)?,
        data,
        size,
        groups: args.only.clone(),
        seeds: if args.seeds.is_empty() { seeds.to_vec() } else { args.seeds.clone() },
        jobs: args.jobs as usize,
        device: args.device,
        dtype: args.dtype,
        out: args.out.clone().unwrap_or_else(|| PathBuf::from(out)),
    })
}

/// Where easy-VQA usually is.
///
/// # Errors
/// It is in none of those places.
pub(super) fn easy_vqa() -> anyhow::Result<PathBuf> {
    let named = std::env::var_os("FEDNANO_EASY_VQA").map(PathBuf::from);
    let usual = ["data/easy-vqa", "../shared/data/easy-vqa"].map(PathBuf::from);
    let there = |path: &PathBuf| Path::new(path).join("test/questions.json").exists();
    named.into_iter().chain(usual).find(there).ok_or_else(|| {
        anyhow::anyhow!("easy-VQA is not there; fetch it with `just easy-vqa`, or name its folder with --data")
    })
}
