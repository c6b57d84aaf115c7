//! `fednano bench-wire`: what every mode and number format of the boundary costs in bytes, accuracy and time.

use super::paper::easy_vqa;
use super::simulate::remove_on_ctrl_c;
use crate::device::{ComputeDtype, DeviceChoice};
use crate::experiment::grid::Size;
use crate::fetch::resolve_model;
use crate::store::TemporaryFolder;
use crate::wire_bench::{Bench, Part};
use std::path::PathBuf;

/// Measure the boundary between participant and LLM: bytes at LLaVA-1.5-7B's shape, accuracy and bytes on easy-VQA, seconds a step
/// over slow lines; write wire.md.
///
/// Each finished run is kept at once, and not made again: the command can be stopped at any time and goes on where it was. About two
/// hours on two cores; `--quick` makes every part of it as small as can be. It fails, after writing the page, where measurements
/// contradict each other.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Every part as small as can be, on generated scenes, one seed, nothing kept from before: a test of the benchmark.
    #[arg(long)]
    quick: bool,
    /// These parts alone; the page shows what is kept of the others.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// easy-VQA's folder; without it, the one that the variable FEDNANO_EASY_VQA names, or data/easy-vqa. Not needed for --quick.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Model directory of nano-llava, or a fetched model of the hub.
    #[arg(long, default_value = "server/models/nano-llava")]
    model: String,
    /// Folder of wire.md and of the finished runs; without it docs, or target/bench-wire-quick for --quick (wire-quick.md there).
    #[arg(long)]
    out: Option<PathBuf>,
    /// Seeds of each accuracy run; without it 1,2,3, or 1 for --quick.
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    seeds: Vec<u64>,
    /// Samples of the participant at the large shape; without it 32, or 8 for --quick. The default's variant runs with 136 (34), too.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    samples: Option<u64>,
    /// Where to compute.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceChoice,
    /// Type of nano-llava's LLM.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: ComputeDtype,
}

/// Run it.
///
/// # Errors
/// A model or a data set that cannot be used, a run that fails, a disk that cannot be written.
pub async fn main(args: &Args) -> anyhow::Result<()> {
    let temporary = TemporaryFolder::create("bench-wire")?;
    remove_on_ctrl_c(temporary.path().to_owned());
    let bench = bench(args)?;
    tokio::task::spawn_blocking(move || bench.run(temporary.path())).await?
}

fn bench(args: &Args) -> anyhow::Result<Bench> {
    let (size, out, seeds, samples) = if args.quick {
        (Size::Quick, "target/bench-wire-quick", &[1][..], 8)
    } else {
        (Size::Full, "docs", &[1, 2, 3][..], 32)
    };
    let accuracy = args.only.is_empty() || args.only.contains(&Part::Accuracy);
    let data = match (&args.data, size) {
        (Some(data), _) => Some(data.clone()),
        (None, Size::Quick) => None,
        (None, Size::Full) if accuracy => Some(easy_vqa()?),
        // The page shows what is kept of easy-VQA, wherever that lies.
        (None, Size::Full) => Some(easy_vqa().unwrap_or_default()),
    };
    Ok(Bench {
        model: resolve_model(&args.model)?,
        data,
        size,
        parts: args.only.clone(),
        seeds: if args.seeds.is_empty() { seeds.to_vec() } else { args.seeds.clone() },
        samples: args.samples.unwrap_or(samples),
        device: args.device,
        dtype: args.dtype,
        out: args.out.clone().unwrap_or_else(|| PathBuf::from(out)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn quick_needs_no_data_and_has_a_place_of_its_own() {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/nano-llava");
        let read = |words: &[&str]| {
            let words = ["bench-wire", "--model", model].into_iter().chain(words.iter().copied());
            bench(&Cli::try_parse_from(words).unwrap().args).unwrap()
        };
        let quick = read(&["--quick", "--only", "shapes,links"]);
        assert_eq!((quick.data, quick.seeds, quick.samples), (None, vec![1], 8));
        assert_eq!((quick.parts, quick.out), (vec![Part::Shapes, Part::Links], "target/bench-wire-quick".into()));
        let full = read(&["--only", "shapes", "--seeds", "4,5"]);
        assert_eq!((full.seeds, full.samples, full.out), (vec![4, 5], 32, "docs".into()));
        assert!(full.data.is_some());
    }
}
