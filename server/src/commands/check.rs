//! `fednano check`: is a checkpoint computed here as PyTorch computes it?

use crate::check;
use crate::device::{ComputeDtype, DeviceChoice};
use anyhow::Context;
use fednano_shared::check::EXPECTED;
use fednano_shared::model::files::ModelFiles;
use std::path::{Path, PathBuf};

/// Load a checkpoint and compare it, tensor by tensor, with reference values of PyTorch and transformers.
///
/// With Torch at hand, tests/fixtures/make_fixture.py makes checkpoints with reference values for any settings (its --help lists
/// them): pictures, token ids, every layer, logits, loss, gradients, Fisher values, decoded tokens. The limits are in
/// shared/src/check/limits.rs. The exit status is 1 when a tensor is past its limit.
///
/// Without reference values the checkpoint is loaded and one training step is run on built-in pictures, which shows that it
/// runs, not that it is right.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory in Hugging Face's layout.
    dir: PathBuf,
    /// Reference values, with meta.json and images/ in the same folder. Default: expected.safetensors in DIR, if it is there.
    #[arg(long, value_name = "FILE")]
    reference: Option<PathBuf>,
    /// Where to compute.
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,
    /// Type of the LLM's weights and of what is computed with them. The limits are those of f32: in f16 and bf16 the table shows how
    /// far they are off, and most rows of the LLM fail.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: ComputeDtype,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Run it.
///
/// # Errors
/// A checkpoint or reference that cannot be used, or, after the table, tensors past their limits.
pub fn main(args: &Args) -> anyhow::Result<()> {
    let (device, device_name) = args.device.open()?;
    let dtype = args.dtype.choose(&args.dir, &device, &device_name)?;
    let files = ModelFiles::open(&args.dir)?;
    let beside = args.dir.join(EXPECTED);
    let reference = args.reference.clone().or_else(|| beside.is_file().then_some(beside));
    let report = match &reference {
        Some(file) => {
            let expected = std::fs::read(file).with_context(|| {
                format!(
                    "the reference values cannot be read from {}; make them with tests/fixtures/make_fixture.py, or leave out --reference",
                    file.display()
                )
            })?;
            check::compare(&files, file.parent().unwrap_or(Path::new("")), &expected, (&device, dtype))?
        }
        None => check::finite(&files, (&device, dtype))?,
    };
    if args.json {
        let json = serde_json::json!({
            "checkpoint": args.dir.display().to_string(),
            "device": device_name,
            "dtype": dtype.name(),
            "reference": reference.as_ref().map(|file| file.display().to_string()),
            "rows": report.rows,
            "summary": report.summary,
        });
        println!("{}", serde_json::to_string_pretty(&json)?);
    } else {
        println!("{} on {device_name}, the LLM in {}", args.dir.display(), dtype.name());
        print!("{report}");
        if reference.is_none() {
            println!(
                "No reference values were found ({} is missing): the checkpoint loads and a training step on built-in pictures \
                 runs, but nothing was compared. Make reference values with tests/fixtures/make_fixture.py.",
                args.dir.join(EXPECTED).display()
            );
        }
    }
    Ok(report.result()?)
}
