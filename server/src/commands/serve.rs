//! `fednano serve`: page, edge weights and federations on one address.

use super::SettingFlags;
use crate::app::{App, HALF_OF_MEMORY, ServerSettings, bind, held_out_from};
use crate::device::{ComputeDtype, DeviceChoice};
use crate::fetch::resolve_model;
use crate::llm_host::Order;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::settings::FederationSettings;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use tokio_util::sync::CancellationToken;

/// Serve a model to participants: page, edge weights, websocket, rounds.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory in Hugging Face's layout, or a model of the hub as owner/name after `fednano fetch owner/name`.
    #[arg(long)]
    model: String,
    /// Name of a federation; may be given several times.
    #[arg(long = "federation", default_value = "demo")]
    federations: Vec<String>,
    #[command(flatten)]
    flags: ServeFlags,
    /// File for a timeline of every step, as a Chrome trace (open it in ui.perfetto.dev or chrome://tracing).
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    #[command(flatten)]
    settings: SettingFlags,
}

/// Where and how a server runs, whatever it serves: for `serve` and `resume`.
#[derive(Debug, Clone, clap::Args)]
pub struct ServeFlags {
    /// Where the LLM runs.
    #[arg(long, value_enum, default_value = "auto")]
    pub device: DeviceChoice,
    /// Type of the LLM's weights and of what is computed with them.
    #[arg(long, value_enum, default_value = "auto")]
    pub dtype: ComputeDtype,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub listen: String,
    /// Folder for results; a restart goes on from it.
    #[arg(long, default_value = "fednano-data")]
    pub data_dir: PathBuf,
    /// Folder of the page.
    #[arg(long, default_value = "www")]
    pub www: PathBuf,
    /// How clients get the weights of their half of the model: f16, or smaller and coarser int8 or int4.
    #[arg(long, default_value_t = EdgeDtype::F16)]
    pub edge_dtype: EdgeDtype,
    /// Held-out set (question file or folder); without it, generated demo scenes.
    #[arg(long)]
    pub held_out: Option<PathBuf>,
    /// Held-out samples used after each round (0: all).
    #[arg(long, default_value_t = 600)]
    pub evaluation_limit: usize,
    /// Compute each participant's requests alone: slower, but on the CPU the same seed gives the same adapters bit for bit,
    /// whoever else is waiting, and whatever was interrupted.
    #[arg(long)]
    pub reproducible: bool,
    /// Mebibytes (2^20 bytes) of participants' picture features that are kept in memory (mode low-rank), shared fairly; what is dropped
    /// for want of room is asked for again. Without it, half of the memory that is available once the model is loaded, 1024 or more
    /// (4096 where the system does not say).
    #[arg(long, value_name = "MIB")]
    pub feature_cache: Option<usize>,
}

/// Everything that [`run`] needs.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Model directory in Hugging Face layout.
    pub model: PathBuf,
    /// Federations by name.
    pub federations: BTreeMap<String, FederationSettings>,
    /// The rest.
    pub flags: ServeFlags,
}

/// Run it.
///
/// # Errors
/// Anything that keeps the server from starting, or ends it early.
pub async fn main(args: &Args) -> anyhow::Result<()> {
    let settings = args.settings.settings(FederationSettings::default())?;
    let federations = args.federations.iter().map(|name| (name.clone(), settings.clone())).collect();
    run(ServeOptions { model: resolve_model(&args.model)?, federations, flags: args.flags.clone() }).await
}

/// Serve until Ctrl-C, or until a federation fails for good.
///
/// # Errors
/// Anything that keeps the server from starting, or ends it early.
pub async fn run(options: ServeOptions) -> anyhow::Result<()> {
    let ServeOptions { model, federations, flags } = options;
    for (name, settings) in &federations {
        settings
            .validate_for_server()
            .map_err(|faults| anyhow::anyhow!("federation '{name}' cannot be served: {}", faults.join("; ")))?;
    }
    let names: Vec<String> = federations.keys().cloned().collect();
    let listener = bind(&flags.listen).await?;
    let (device, device_name) = flags.device.open()?;
    let dtype = flags.dtype.choose(&model, &device, &device_name)?;
    println!("loading {} on {device_name}, the LLM in {}", model.display(), dtype.name());
    let held_out = held_out_from(flags.held_out.as_deref(), &model)?;
    let server = ServerSettings {
        model,
        www: flags.www.clone(),
        data_dir: flags.data_dir.clone(),
        edge_dtype: flags.edge_dtype,
        federations,
        held_out,
        evaluation_limit: flags.evaluation_limit,
        order: Order::Arrival { merge: !flags.reproducible },
        feature_cache: flags.feature_cache.map_or(HALF_OF_MEMORY, |mib| mib.saturating_mul(1 << 20)),
    };
    let shutdown = CancellationToken::new();
    let app = App::start(server, (&device, dtype), shutdown.clone()).await?;
    let address = listener.local_addr()?;
    for federation in names {
        println!("invite link: {}/?federation={federation}", base_url(address));
    }
    if address.ip().is_unspecified() {
        println!("on other machines, put this machine's address or name in place of localhost");
    }
    if !has_page(&flags.www) {
        tracing::warn!(
            "{} holds no built page, so browsers cannot join; run `just web`, or name the page's folder with --www",
            flags.www.display()
        );
    }
    cancel_on_signal(shutdown);
    app.serve(listener).await?;
    println!("stopped; results are in {}", flags.data_dir.display());
    Ok(())
}

/// Is the page there, with its WebAssembly?
pub fn has_page(www: &Path) -> bool {
    www.join("pkg/fednano_web.js").exists()
}

/// A link's beginning that a browser on this machine can open: a server that listens on every address names none.
pub fn base_url(address: SocketAddr) -> String {
    if address.ip().is_unspecified() {
        format!("http://localhost:{}", address.port())
    } else {
        format!("http://{address}")
    }
}

/// Ctrl-C, or the system's polite request to end; a second one ends the program at once.
pub fn cancel_on_signal(shutdown: CancellationToken) {
    tokio::spawn(async move {
        if signalled().await {
            println!("shutting down; participants are told (once more to end at once)");
            shutdown.cancel();
            if signalled().await {
                std::process::exit(130);
            }
        }
    });
}

/// Wait for such a signal; false where none can be heard.
#[cfg(unix)]
async fn signalled() -> bool {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return false;
    };
    tokio::select! {
        heard = tokio::signal::ctrl_c() => heard.is_ok(),
        heard = terminate.recv() => heard.is_some(),
    }
}

/// Wait for such a signal; false where none can be heard.
#[cfg(not(unix))]
async fn signalled() -> bool {
    tokio::signal::ctrl_c().await.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invite_link_can_be_opened() {
        let base = |address: &str| base_url(address.parse().unwrap());
        assert_eq!(base("0.0.0.0:8080"), "http://localhost:8080");
        assert_eq!(base("[::]:81"), "http://localhost:81");
        assert_eq!(base("127.0.0.1:8080"), "http://127.0.0.1:8080");
        assert_eq!(base("[::1]:8080"), "http://[::1]:8080");
    }
}
