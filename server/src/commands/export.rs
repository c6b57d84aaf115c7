//! `fednano export`: a federation's adapters as a file.

use crate::edge_bundle;
use crate::store::{AdapterFile, Store, write_adapter};
use anyhow::Context;
use fednano_shared::wire::RoundResult;
use std::path::{Path, PathBuf};

/// Write a federation's adapters as a safetensors file that says where they come from, for `eval`, `ask` and other programs.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folder of a server's results; the server may be running.
    #[arg(long, default_value = "fednano-data")]
    data_dir: PathBuf,
    /// Name of the federation; may be left out where there is one only.
    #[arg(long)]
    federation: Option<String>,
    /// Round after which the adapters were kept (0: untouched); without it, the last one that is done.
    #[arg(long)]
    round: Option<u32>,
    /// File to write.
    #[arg(long)]
    out: PathBuf,
}

/// Run it.
///
/// # Errors
/// A store that cannot be used, a round that is not done, a file that cannot be written.
pub fn main(args: &Args) -> anyhow::Result<()> {
    let chosen = Store::choose(&args.data_dir, args.federation.as_deref())?;
    let store = Store::open(&args.data_dir, &chosen.name)?;
    let result = done(&chosen.name, store.rounds()?, args.round)?;
    let settings = &chosen.settings;
    let mut metadata = vec![
        (AdapterFile::MODEL, chosen.model.clone()),
        (AdapterFile::FEDERATION, chosen.name.clone()),
        (AdapterFile::ROUND, result.round.to_string()),
        (AdapterFile::RANK, settings.rank.to_string()),
        (AdapterFile::ADAPTERS, settings.adapters.to_string()),
        (AdapterFile::STRATEGY, settings.strategy.to_string()),
        (AdapterFile::SETTINGS, serde_json::to_string(settings)?),
        (AdapterFile::ACCURACY, result.held_out.accuracy.to_string()),
        (AdapterFile::LOSS, result.held_out.loss.to_string()),
        (AdapterFile::SAMPLES, result.held_out.samples.to_string()),
    ];
    if let Some(dtype) = edge_bundle::dtype_of(&args.data_dir, &chosen.model) {
        metadata.push((AdapterFile::EDGE_DTYPE, dtype.to_string()));
    }
    keep(&args.out, &write_adapter(&store.adapter(result.round)?, &metadata)?)?;
    println!(
        "{}: round {} of {} of '{}', {} of rank {}, {:.1} % of {} held-out samples",
        args.out.display(),
        result.round,
        settings.rounds,
        chosen.name,
        settings.strategy,
        settings.rank,
        result.held_out.accuracy * 100.0,
        result.held_out.samples
    );
    Ok(())
}

/// The result of a round, or of the last one.
fn done(name: &str, mut results: Vec<RoundResult>, round: Option<u32>) -> anyhow::Result<RoundResult> {
    let last = results.last().map(|r| r.round);
    let last = last.with_context(|| format!("federation '{name}' has no result yet; wait until round 0 is judged"))?;
    if let Some(round) = round {
        results.retain(|r| r.round == round);
    }
    results.pop().with_context(|| {
        format!("round {} of federation '{name}' is not done; give --round 0 to {last}", round.unwrap_or_default())
    })
}

/// Written beside its place and renamed, so that a kill leaves no half of a file.
fn keep(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    std::fs::write(&part, bytes)
        .and_then(|()| std::fs::rename(&part, path))
        .with_context(|| format!("cannot write {}; is its folder there, and not full?", path.display()))
}
