//! `fednano simulate`: server and clients in one process, over channels, seeded.

use super::SettingFlags;
use crate::app::{App, HeldOutSource, ServerSettings};
use crate::datasets;
use crate::device::{ComputeDtype, DeviceChoice};
use crate::fetch::resolve_model;
use crate::native::{ChannelConnector, TokioClock};
use crate::store::TemporaryFolder;
use anyhow::Context;
use burn::tensor::Device;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::client::{ClientEvent, Observer, Outcome, Participant, participate};
use fednano_shared::data::dataset::Dataset;
use fednano_shared::data::split::dirichlet;
use fednano_shared::edge::{FeatureCache, NanoEdge};
use fednano_shared::settings::FederationSettings;
use fednano_shared::wire::{ClientKind, Hello, Purpose};
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Run a whole federation in one process, seeded.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory in Hugging Face's layout, or a model of the hub as owner/name after `fednano fetch owner/name`.
    #[arg(long)]
    model: String,
    /// Folder with train/ and test/ (easy-VQA, LLaVA JSON or CSV in each).
    #[arg(long)]
    data: PathBuf,
    /// Clients.
    #[arg(long, default_value_t = 5)]
    clients: usize,
    /// Dirichlet concentration of the split by answer; smaller is more uneven.
    #[arg(long, default_value_t = 1.0)]
    alpha: f64,
    /// Training samples a client at most (0: all).
    #[arg(long, default_value_t = 500)]
    limit: usize,
    /// Held-out samples used after each round (0: all); first and final figures always use all.
    #[arg(long, default_value_t = 2000)]
    evaluation_limit: usize,
    /// Where everything runs.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceChoice,
    /// Type of the LLM's weights and of what is computed with them.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: ComputeDtype,
    /// How clients get the weights of their half of the model: f16, or smaller and coarser int8 or int4.
    #[arg(long, default_value_t = EdgeDtype::F16)]
    edge_dtype: EdgeDtype,
    /// File for the results.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Folder for adapters and state (a temporary one otherwise).
    #[arg(long)]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    settings: SettingFlags,
}

/// Run it.
///
/// # Errors
/// Unusable data, model or settings.
pub async fn main(args: &Args) -> anyhow::Result<()> {
    let started = Instant::now();
    let defaults =
        FederationSettings { min_participants: args.clients, round_deadline_s: 86_400, ..Default::default() };
    let settings = args.settings.settings(defaults)?;
    let model = resolve_model(&args.model)?;
    let (device, device_name) = args.device.open()?;
    let dtype = args.dtype.choose(&model, &device, &device_name)?;
    let splits = datasets::open_splits(&args.data)?;
    println!("{} training and {} test samples on {device_name}", splits.train.samples.len(), splits.test.samples.len());
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    let shares = dirichlet(&splits.train.samples, args.clients, args.alpha, &mut rng)?;
    let limit = if args.limit == 0 { usize::MAX } else { args.limit };
    let shards: Vec<Dataset> = shares.iter().map(|rows| splits.train.subset(rows).limit(limit, &mut rng)).collect();
    let baselines = (
        Dataset::constant_baseline(&splits.train, &splits.test),
        Dataset::question_only_baseline(&splits.train, &splits.test),
    );

    let (folder, temporary) = match &args.data_dir {
        Some(folder) => (folder.clone(), None),
        None => {
            let temporary = TemporaryFolder::create("simulate")?;
            remove_on_ctrl_c(temporary.path().to_owned());
            (temporary.path().to_owned(), Some(temporary))
        }
    };
    let server = ServerSettings {
        model,
        www: PathBuf::from("www"),
        data_dir: folder,
        edge_dtype: args.edge_dtype,
        federations: BTreeMap::from([("simulation".to_owned(), settings.clone())]),
        held_out: HeldOutSource::Data(splits.test),
        evaluation_limit: args.evaluation_limit,
        order: crate::llm_host::Order::Lockstep,
    };
    let app = App::start(server, (&device, dtype), CancellationToken::new()).await?;
    let mut report = federate(&app, args, &settings, shards, &device).await?;
    drop(temporary);
    let (constant, question_only) = baselines;
    println!(
        "best constant answer {:.1} %, best question-only answer {:.1} %",
        constant * 100.0,
        question_only * 100.0
    );
    report["baselines"] = serde_json::json!({"constant": constant, "question_only": question_only});
    report["seconds"] = serde_json::json!(started.elapsed().as_secs_f64());
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("results in {}", path.display());
    }
    Ok(())
}

/// Ctrl-C ends a simulation at once, as ever, but leaves nothing behind.
fn remove_on_ctrl_c(folder: PathBuf) {
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            drop(std::fs::remove_dir_all(folder));
            std::process::exit(130);
        }
    });
}

/// Evaluate, let all clients take part, evaluate again.
async fn federate(
    app: &App,
    args: &Args,
    settings: &FederationSettings,
    shards: Vec<Dataset>,
    device: &Device,
) -> anyhow::Result<serde_json::Value> {
    let federation = app.federation("simulation").context("the federation did not start")?;
    let full = |adapter: Option<fednano_shared::plain::AdapterState>| {
        let (held_out, llm) = (app.held_out.clone(), app.llm());
        async move {
            let rows: Vec<usize> = (0..held_out.cache.samples.len()).collect();
            let run = move || held_out.evaluate(adapter.as_ref(), &rows, &llm);
            tokio::task::spawn_blocking(run).await?.map_err(anyhow::Error::msg)
        }
    };
    let zero_shot = full(None).await?;
    println!("zero-shot: {:.1} % of {} test samples", zero_shot.accuracy * 100.0, zero_shot.samples);
    let samples: Vec<usize> = shards.iter().map(|s| s.samples.len()).collect();
    let bar = ProgressBar::new(u64::from(settings.rounds) * samples.len() as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} updates, {elapsed} spent, {eta} left")?);

    let clients = tokio::task::LocalSet::new();
    let mut tasks = Vec::new();
    let edge = app.held_out.edge.clone();
    let shared = app.shared();
    let outcomes = clients
        .run_until(async {
            for (number, shard) in shards.into_iter().enumerate() {
                let cache = edge.encode(&shard, |_, _| {}).await?;
                let (joined, seen) = oneshot::channel();
                let observer = Seen { joined: Some(joined), bar: bar.clone() };
                let task =
                    client(number, cache, edge.clone(), device.clone(), ChannelConnector(shared.clone()), observer);
                tasks.push(tokio::task::spawn_local(task));
                // One after the other, so that numbers follow the split.
                seen.await.context("a simulated client could not join")?;
            }
            let mut outcomes = Vec::new();
            for task in tasks {
                outcomes.push(task.await??);
            }
            anyhow::Ok(outcomes)
        })
        .await?;
    bar.finish_and_clear();
    anyhow::ensure!(outcomes.iter().all(|o| matches!(o, Outcome::Finished { .. })), "a simulated client ended early");
    let status = federation.finished().await;
    let last = full(Some(federation.adapter())).await?;
    for r in &status.history {
        println!(
            "round {:>2}: {:.1} % of {} (loss {:.3})",
            r.round,
            r.held_out.accuracy * 100.0,
            r.held_out.samples,
            r.held_out.loss
        );
    }
    println!("final: {:.1} % of {} test samples", last.accuracy * 100.0, last.samples);
    let traffic: BTreeMap<String, _> = status.participants.iter().map(|p| (p.name.clone(), p.traffic)).collect();
    Ok(serde_json::json!({
        "settings": settings, "clients": args.clients, "alpha": args.alpha, "samples": samples,
        "zero_shot": zero_shot, "rounds": status.history, "final": last, "traffic": traffic,
    }))
}

async fn client(
    number: usize,
    cache: FeatureCache,
    edge: Arc<NanoEdge>,
    device: Device,
    mut connector: ChannelConnector,
    mut observer: Seen,
) -> anyhow::Result<Outcome> {
    let me = Participant {
        hello: Hello {
            federation: "simulation".into(),
            name: format!("client-{}", number + 1),
            kind: ClientKind::Simulated,
            device: "simulated".into(),
            samples: cache.samples.len() as u32,
            edge_bytes: 0,
            purpose: Purpose::Train,
            resume: None,
        },
        edge: &edge,
        cache: &cache,
        device: &device,
        max_tries: 3,
        keep_every: std::time::Duration::MAX,
    };
    Ok(participate(me, &mut connector, &TokioClock, &mut fednano_shared::client::Forgetful, &mut observer).await?)
}

/// Says when a client is in, and counts updates.
struct Seen {
    joined: Option<oneshot::Sender<()>>,
    bar: ProgressBar,
}

impl Observer for Seen {
    fn event(&mut self, event: ClientEvent<'_>) {
        match event {
            ClientEvent::Joined { .. } => drop(self.joined.take().map(|j| j.send(()))),
            ClientEvent::Uploaded { .. } => self.bar.inc(1),
            _ => {}
        }
    }
}
