//! `fednano serve`: page, edge weights and federations on one address.

use super::SettingFlags;
use crate::app::{App, ServerSettings, bind, held_out_from};
use crate::device::DeviceChoice;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::settings::FederationSettings;
use std::path::PathBuf;
use tokio_util::sync::CancellationToken;

/// Serve a model to participants: page, edge weights, websocket, rounds.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory in Hugging Face layout.
    #[arg(long)]
    model: PathBuf,
    /// Where the LLM runs.
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1:8080")]
    listen: String,
    /// Folder for results; a restart goes on from it.
    #[arg(long, default_value = "fednano-data")]
    data_dir: PathBuf,
    /// Folder of the page.
    #[arg(long, default_value = "www")]
    www: PathBuf,
    /// How clients get the weights of their half of the model: f16, or smaller and coarser int8 or int4.
    #[arg(long, default_value_t = EdgeDtype::F16)]
    edge_dtype: EdgeDtype,
    /// Name of a federation; may be given several times.
    #[arg(long = "federation", default_value = "demo")]
    federations: Vec<String>,
    /// Held-out set (question file or folder); without it, generated demo scenes.
    #[arg(long)]
    held_out: Option<PathBuf>,
    /// Held-out samples used after each round (0: all).
    #[arg(long, default_value_t = 600)]
    evaluation_limit: usize,
    #[command(flatten)]
    settings: SettingFlags,
}

/// Run it.
///
/// # Errors
/// Anything that keeps the server from starting.
pub async fn main(args: &Args) -> anyhow::Result<()> {
    let settings = args.settings.settings(FederationSettings::default())?;
    let listener = bind(&args.listen).await?;
    let (device, name) = args.device.open()?;
    println!("loading {} on {name}", args.model.display());
    let server = ServerSettings {
        model: args.model.clone(),
        www: args.www.clone(),
        data_dir: args.data_dir.clone(),
        edge_dtype: args.edge_dtype,
        federations: args.federations.iter().map(|n| (n.clone(), settings.clone())).collect(),
        held_out: held_out_from(args.held_out.as_deref())?,
        evaluation_limit: args.evaluation_limit,
        merge_requests: true,
    };
    let shutdown = CancellationToken::new();
    let app = App::start(server, &device, shutdown.clone()).await?;
    let address = listener.local_addr()?;
    for federation in &args.federations {
        println!("invite link: http://{address}/?federation={federation}");
    }
    cancel_on_signal(shutdown);
    app.serve(listener).await?;
    println!("stopped; results are in {}", args.data_dir.display());
    Ok(())
}

/// Ctrl-C, or the system's polite request to end.
pub fn cancel_on_signal(shutdown: CancellationToken) {
    tokio::spawn(async move {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let Ok(mut terminate) = signal(SignalKind::terminate()) else {
                return;
            };
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
        }
        #[cfg(not(unix))]
        drop(tokio::signal::ctrl_c().await);
        println!("shutting down; participants are told");
        shutdown.cancel();
    });
}
