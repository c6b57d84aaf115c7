//! `fednano ask`: a question about a picture, answered token by token.

use crate::datasets::read_picture;
use crate::device::{ComputeDtype, DeviceChoice};
use crate::edge_download::download_edge;
use crate::fetch::resolve_model;
use crate::native::{Invite, SocketConnector};
use crate::store::AdapterFile;
use burn::tensor::Device;
use fednano_shared::ask::Asking;
use fednano_shared::client::Connector;
use fednano_shared::data::picture::Picture;
use fednano_shared::edge::NanoEdge;
use fednano_shared::generate::{AnswerOptions, InProcessTokens, Sampling, TokenSource, answer};
use fednano_shared::ledger::Traffic;
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::model::checkpoint::load_llm;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::step::FrozenLlm;
use fednano_shared::wire::agreement::Offer;
use fednano_shared::wire::{ClientKind, Hello, Purpose};
use std::io::Write;
use std::path::{Path, PathBuf};
use tokio_util::sync::CancellationToken;

/// Ask a model about a picture: a server's by invite link, or one on this machine.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The question.
    question: String,
    /// File of the picture.
    #[arg(long)]
    picture: PathBuf,
    /// Invite link of a federation whose server holds the LLM.
    #[arg(long, conflicts_with = "model", required_unless_present = "model")]
    url: Option<String>,
    /// Model directory (or a hub id fetched earlier), all on this machine.
    #[arg(long)]
    model: Option<String>,
    /// Adapters to answer with: a file of `fednano export` or `fednano join --save`.
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Where to compute.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceChoice,
    /// Type of the LLM's weights and of what is computed with them, with --model.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: ComputeDtype,
    /// Tokens at most.
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// 0: always the likeliest token; higher is more varied.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Sample from the likeliest tokens that together reach this probability.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Seed of sampling.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Args {
    fn sampling(&self) -> Sampling {
        Sampling { temperature: self.temperature, top_p: self.top_p, seed: self.seed }
    }
}

/// Run it.
///
/// # Errors
/// A picture, model, adapter or server that cannot be used.
pub async fn main(args: &Args) -> anyhow::Result<()> {
    run(args, None, &mut std::io::stdout()).await
}

/// The same with the answer written to `out`; downloads are kept in `cache_dir` (none: the user's cache).
///
/// # Errors
/// As [`main`].
pub async fn run<W: Write>(args: &Args, cache_dir: Option<PathBuf>, out: &mut W) -> anyhow::Result<()> {
    args.sampling().check().map_err(anyhow::Error::msg)?;
    let path = args.picture.display();
    let picture = read_picture(&args.picture).map_err(|cause| {
        anyhow::anyhow!(
            "{path} cannot be used as a picture: {cause}; name a PNG, JPEG, WebP, BMP or GIF with --picture"
        )
    })?;
    let (device, device_name) = args.device.open()?;
    if let Some(link) = &args.url {
        let invite = Invite::parse(link)?;
        let (at, place) = (invite.clone(), device.clone());
        let downloading = tokio::task::spawn_blocking(move || download_edge(&at, &place, cache_dir));
        let (edge, downloaded) = downloading.await??;
        let edge_bytes = downloaded.bytes();
        let hello = Hello {
            federation: invite.federation,
            name: "a question".into(),
            kind: ClientKind::Native,
            device: String::new(),
            samples: 0,
            edge_bytes,
            purpose: Purpose::Ask,
            resume: None,
            offer: Offer { table: edge.table_form(), ..Offer::default() },
            download: Some(downloaded.id),
        };
        let socket = SocketConnector::new(invite.socket, CancellationToken::new()).connect().await?;
        let mut source = Asking::open(socket, hello).await?;
        let said = say(args, &picture, &edge, &mut source, &device, out).await;
        let Traffic { up, down } = source.traffic();
        eprintln!("bytes: {} sent, {} received, {edge_bytes} downloaded before", up.total(), down.total());
        return said;
    }
    let Some(model) = &args.model else { anyhow::bail!("give --url LINK or --model DIR") };
    let model = resolve_model(model)?;
    let dtype = args.dtype.choose(&model, &device, &device_name)?;
    let files = ModelFiles::open(&model)?;
    let edge = NanoEdge::load(&files, &device)?;
    let autodiff = device.clone().autodiff();
    let llm = load_llm(&files.config, &files.weights, (&autodiff, dtype))?;
    let llm = FrozenLlm::new(llm, &files.config.text, &autodiff);
    drop(files);
    say(args, &picture, &edge, &mut InProcessTokens::new(&llm), &device, out).await
}

/// Print the answer as it grows.
async fn say<S: TokenSource, W: Write>(
    args: &Args,
    picture: &Picture,
    edge: &NanoEdge,
    source: &mut S,
    device: &Device,
    out: &mut W,
) -> anyhow::Result<()> {
    let features = edge.image_features(&[picture]).await?.concat();
    let prompt = edge.text.encode(&args.question, None)?;
    let adapters = args.adapter.as_deref().map(|path| open_adapter(path, edge, device)).transpose()?;
    let options = AnswerOptions { max_tokens: args.max_tokens, sampling: args.sampling() };
    let mut shown = 0;
    let text = answer(edge, adapters.as_ref(), (&prompt, &features), options, source, device, |text| {
        // A token may end in mid-character; what is shown must only grow.
        let Some(new) = text.get(shown..).filter(|_| !text.ends_with('\u{fffd}')) else { return true };
        shown = text.len();
        // Nobody reads on: the answer ends.
        write!(out, "{new}").and_then(|()| out.flush()).is_ok()
    })
    .await?;
    writeln!(out, "{}", text.get(shown..).unwrap_or_default())?;
    Ok(())
}

fn open_adapter(path: &Path, edge: &NanoEdge, device: &Device) -> anyhow::Result<NanoAdapters> {
    let file = AdapterFile::open(path, edge.config.text.hidden)?;
    Ok(NanoAdapters::from_state(&file.adapter, device))
}
