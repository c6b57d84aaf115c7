//! `fednano resume`: serve what a data folder holds, with its own settings and model.

use super::serve::{self, ServeFlags, ServeOptions};
use crate::edge_bundle;
use crate::store::{Store, Summary};
use anyhow::Context;
use std::path::PathBuf;

/// Go on with the federations of a data folder: settings, model and the form of the client's half are those that they began with.
/// The held-out set is not kept there: name the same one again.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of a federation, may be given several times; without it, all of the folder.
    #[arg(long = "federation")]
    federations: Vec<String>,
    /// Model directory, where it has moved.
    #[arg(long)]
    model: Option<PathBuf>,
    #[command(flatten)]
    flags: ServeFlags,
}

/// Run it.
///
/// # Errors
/// As [`options`] and [`serve::run`].
pub async fn main(args: &Args) -> anyhow::Result<()> {
    serve::run(options(args)?).await
}

/// What `serve` is to be started with.
///
/// # Errors
/// A store that cannot be used or holds no such federation, federations of different models, a model that is not there.
pub fn options(args: &Args) -> anyhow::Result<ServeOptions> {
    let folder = &args.flags.data_dir;
    let chosen: Vec<Summary> = if args.federations.is_empty() {
        Store::federations(folder)?
    } else {
        args.federations.iter().map(|name| Store::choose(folder, Some(name))).collect::<anyhow::Result<_>>()?
    };
    let first = chosen.first().with_context(|| {
        format!("{} holds no federation to go on with; name the --data-dir of a server", folder.display())
    })?;
    if let Some(other) = chosen.iter().find(|s| s.model != first.model) {
        anyhow::bail!(
            "'{}' and '{}' were begun with different models, or different forms of one ({} and {}); go on with one of them by --federation",
            first.name,
            other.name,
            first.model_dir,
            other.model_dir
        );
    }
    let model = args.model.clone().unwrap_or_else(|| PathBuf::from(&first.model_dir));
    anyhow::ensure!(
        model.is_dir(),
        "the model of federation '{}' is not at {}; name its directory with --model",
        first.name,
        model.display()
    );
    let mut flags = args.flags.clone();
    // Any other form would be another model to the participants.
    flags.edge_dtype = edge_bundle::dtype_of(folder, &first.model).unwrap_or(flags.edge_dtype);
    let federations = chosen.into_iter().map(|s| (s.name, s.settings)).collect();
    Ok(ServeOptions { model, federations, flags })
}
