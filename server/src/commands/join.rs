//! `fednano join`: take part from a terminal.

use crate::datasets;
use crate::device::DeviceChoice;
use crate::edge_download::fetch_edge;
use crate::native::{Invite, Lines, SocketConnector, TokioClock};
use crate::store::write_adapter;
use anyhow::Context;
use fednano_shared::client::{Outcome, Participant, participate};
use fednano_shared::data::dataset::Dataset;
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::probe::shard;
use fednano_shared::wire::{ClientKind, Hello, Purpose};
use std::path::PathBuf;
use tokio_util::sync::CancellationToken;

/// Join a federation from a terminal, with own pictures and questions.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Invite link.
    url: String,
    /// Question file (LLaVA JSON, CSV, easy-VQA) or a folder that holds one; or `demo:workshop`, `demo:garden`, `demo:harbour`.
    #[arg(long)]
    data: String,
    /// Name shown to others.
    #[arg(long, default_value = "native")]
    name: String,
    /// Where the own part runs.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceChoice,
    /// File for the federation's adapters at the end.
    #[arg(long)]
    save: Option<PathBuf>,
    /// Tries to reach a server in a row.
    #[arg(long, default_value_t = 60)]
    max_tries: u32,
}

/// Run it.
///
/// # Errors
/// Anything that ends the participation early.
pub async fn main(args: &Args) -> anyhow::Result<()> {
    let data = open(&args.data)?;
    println!("[{}] {} samples of {} pictures", args.name, data.samples.len(), data.pictures.len());
    let leave = CancellationToken::new();
    let (signal, name) = (leave.clone(), args.name.clone());
    tokio::spawn(async move {
        drop(tokio::signal::ctrl_c().await);
        println!("[{name}] leaving; Ctrl-C once more stops at once");
        signal.cancel();
        drop(tokio::signal::ctrl_c().await);
        std::process::exit(130);
    });
    match take_part(&args.url, &args.name, &data, args.device, args.max_tries, leave).await? {
        Outcome::Left => println!("[{}] left; the same command joins again, as somebody new", args.name),
        Outcome::Finished(adapter) => {
            println!("[{}] the federation is finished", args.name);
            if let Some(path) = &args.save {
                let bytes = write_adapter(&adapter, None)?;
                std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
    }
    Ok(())
}

fn open(data: &str) -> anyhow::Result<Dataset> {
    match data.strip_prefix("demo:") {
        Some(theme) => {
            let theme = DemoTheme::ALL.into_iter().find(|t| t.name() == theme);
            let theme = theme.context("the demo shards are demo:workshop, demo:garden and demo:harbour")?;
            Ok(shard(theme, 1, 24, 4))
        }
        None => datasets::open(&PathBuf::from(data)),
    }
}

/// Fetch the client part, encode, take part; `leave` is cancelled when the person wants to leave.
///
/// # Errors
/// Anything that ends the participation early.
pub async fn take_part(
    url: &str,
    name: &str,
    data: &Dataset,
    device: DeviceChoice,
    max_tries: u32,
    leave: CancellationToken,
) -> anyhow::Result<Outcome> {
    let invite = Invite::parse(url)?;
    let (device, words) = device.open()?;
    let (link, place) = (invite.clone(), device.clone());
    let (edge, edge_bytes) = tokio::task::spawn_blocking(move || fetch_edge(&link, &place, None)).await??;
    let cache = edge.encode(data, |_, _| {}).await?;
    let me = Participant {
        hello: Hello {
            federation: invite.federation.clone(),
            name: name.to_owned(),
            kind: ClientKind::Native,
            device: words,
            samples: cache.samples.len() as u32,
            edge_bytes,
            purpose: Purpose::Train,
            resume: None,
        },
        edge: &edge,
        cache: &cache,
        device: &device,
        max_tries,
    };
    Ok(participate(me, &mut SocketConnector::new(invite.socket, leave), &TokioClock, &mut Lines(name.to_owned()))
        .await?)
}
