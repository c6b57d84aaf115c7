//! What the tests share: the demo model, servers with their own ports, one timeout for every await.

pub mod hand;
pub mod tap;

use anyhow::Context;
use burn::tensor::Device;
use fednano_server::app::{App, FEATURE_CACHE, HeldOutSource, ServerSettings};
use fednano_server::llm_host::Order;
use fednano_server::native::{SocketConnector, TokioClock};
use fednano_shared::ask::Asking;
use fednano_shared::boundary::Gradient;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::client::{
    ClientEvent, Clock, Connector, Forgetful, Keeper, Observer, Outcome, Participant, participate,
};
use fednano_shared::data::dataset::Dataset;
use fednano_shared::edge::{FeatureCache, NanoEdge};
use fednano_shared::model::checkpoint::load_llm;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::plain::{AdapterState, TensorBlob};
use fednano_shared::settings::{BoundaryChoice, FederationSettings};
use fednano_shared::step::FrozenLlm;
use fednano_shared::wire::agreement::{BoundaryMode, Offer, TableForm};
use fednano_shared::wire::{ClientKind, Hello, Purpose};
use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// What a test cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Runs anywhere.
    Nothing,
    /// The demo model in the repository.
    NanoLlava,
    /// The public data set easy-VQA.
    EasyVqa,
    /// Chromium, ChromeDriver and the built page.
    Chromium,
    /// A Vulkan driver (a software one will do).
    Vulkan,
}

impl Needs {
    /// Why it is not there, if it is not.
    pub fn missing(self) -> Option<&'static str> {
        let there = match self {
            Self::Nothing => true,
            Self::NanoLlava => nano_llava().join("model.safetensors").exists(),
            Self::EasyVqa => easy_vqa().is_some(),
            Self::Chromium => {
                fednano_server::commands::demo::chromium().is_ok()
                    && on_path("chromedriver").is_some()
                    && repository().join("www/pkg/fednano_web.js").exists()
            }
            Self::Vulkan => ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"]
                .iter()
                .any(|d| std::fs::read_dir(d).is_ok_and(|mut files| files.next().is_some())),
        };
        let cause = match self {
            Self::Nothing => "nothing",
            Self::NanoLlava => "server/models/nano-llava is missing (`just pretrain` makes it)",
            Self::EasyVqa => "easy-VQA is missing (`just easy-vqa` fetches it, or name its folder in FEDNANO_EASY_VQA)",
            Self::Chromium => "Chromium, chromedriver or the built page is missing (`just setup web`)",
            Self::Vulkan => "no Vulkan driver (mesa-vulkan-drivers is a software one)",
        };
        (!there).then_some(cause)
    }
}

/// A program on the path.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|d| d.join(name)).find(|p| p.is_file())
}

/// The repository's root.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The demo model.
pub fn nano_llava() -> PathBuf {
    repository().join("server/models/nano-llava")
}

/// The reference checkpoint.
pub fn fixture() -> PathBuf {
    repository().join("tests/fixtures/tiny-llava")
}

/// easy-VQA, where somebody has put it.
pub fn easy_vqa() -> Option<PathBuf> {
    let named = std::env::var_os("FEDNANO_EASY_VQA").map(PathBuf::from);
    let places =
        named.into_iter().chain([repository().join("data/easy-vqa"), repository().join("../shared/data/easy-vqa")]);
    places.into_iter().find(|p| p.join("test/questions.json").exists())
}

/// Run to the end, within one time limit for everything.
///
/// # Errors
/// The test's, or the limit.
pub fn block<F: Future<Output = anyhow::Result<()>>>(limit: Duration, test: F) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    // Tests hold several participants in one future: hundreds of kilobytes, which are not to be moved about a thread's stack.
    let test = Box::pin(test);
    let result = runtime.block_on(local.run_until(async { tokio::time::timeout(limit, test).await }));
    runtime.shutdown_background();
    result.unwrap_or_else(|_| anyhow::bail!("not finished within {} s", limit.as_secs()))
}

/// The usual limit.
pub const LIMIT: Duration = Duration::from_secs(240);

/// The model's both halves in this process.
pub struct Halves {
    /// Files.
    pub files: ModelFiles,
    /// Client's half.
    pub edge: NanoEdge,
    /// Server's half.
    pub llm: FrozenLlm,
    /// Where they are.
    pub device: Device,
}

/// Load a model directory on a device.
///
/// # Errors
/// The loader's.
pub fn halves(dir: &Path, device: &Device) -> anyhow::Result<Halves> {
    let files = ModelFiles::open(dir)?;
    let edge = NanoEdge::load(&files, device)?;
    let autodiff = device.clone().autodiff();
    let llm = FrozenLlm::new(load_llm(&files.config, &files.weights, &autodiff)?, &files.config.text, &autodiff);
    Ok(Halves { files, edge, llm, device: device.clone() })
}

/// Those of a server with federation `test`, whose clients' requests share batches as they come.
pub fn server_settings(
    model: PathBuf,
    held_out: HeldOutSource,
    settings: FederationSettings,
    data_dir: &Path,
) -> ServerSettings {
    ServerSettings {
        model,
        www: repository().join("www"),
        data_dir: data_dir.to_owned(),
        edge_dtype: EdgeDtype::F16,
        federations: BTreeMap::from([("test".to_owned(), settings)]),
        held_out,
        evaluation_limit: 90,
        order: Order::Arrival { merge: true },
        feature_cache: FEATURE_CACHE,
    }
}

/// A server on a free port, stopped when dropped.
pub struct Server {
    /// `http://127.0.0.1:PORT`
    pub base: String,
    /// `ws://127.0.0.1:PORT/ws`
    pub socket: String,
    /// Its inside.
    pub app: std::sync::Arc<App>,
    /// Cancel to stop.
    pub shutdown: CancellationToken,
    task: Option<tokio::task::JoinHandle<anyhow::Result<()>>>,
}

impl Server {
    /// Start one with federation `test`.
    ///
    /// # Errors
    /// The server's.
    pub async fn start(settings: FederationSettings, data_dir: &Path) -> anyhow::Result<Self> {
        Self::start_on("127.0.0.1:0", settings, data_dir).await
    }

    /// The same on a given address.
    ///
    /// # Errors
    /// The server's.
    pub async fn start_on(address: &str, settings: FederationSettings, data_dir: &Path) -> anyhow::Result<Self> {
        Self::launch(address, nano_llava(), HeldOutSource::Demo(0), settings, data_dir).await
    }

    /// One with another model, and hardly anything to evaluate.
    ///
    /// # Errors
    /// The server's.
    pub async fn start_model(model: &Path, settings: FederationSettings, data_dir: &Path) -> anyhow::Result<Self> {
        let held_out = HeldOutSource::Data(fednano_shared::probe::samples());
        Self::launch("127.0.0.1:0", model.to_owned(), held_out, settings, data_dir).await
    }

    async fn launch(
        address: &str,
        model: PathBuf,
        held_out: HeldOutSource,
        settings: FederationSettings,
        data_dir: &Path,
    ) -> anyhow::Result<Self> {
        Self::launch_with(address, server_settings(model, held_out, settings, data_dir)).await
    }

    /// One with all settings given, on a free port.
    ///
    /// # Errors
    /// The server's.
    pub async fn start_with(settings: ServerSettings) -> anyhow::Result<Self> {
        Self::launch_with("127.0.0.1:0", settings).await
    }

    async fn launch_with(address: &str, server: ServerSettings) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
        let shutdown = CancellationToken::new();
        let app = std::sync::Arc::new(App::start(server, &Device::flex(), shutdown.clone()).await?);
        let address = listener.local_addr()?;
        let serving = app.clone();
        let task = tokio::spawn(async move { serving.serve(listener).await });
        Ok(Self {
            base: format!("http://{address}"),
            socket: format!("ws://{address}/ws"),
            app,
            shutdown,
            task: Some(task),
        })
    }

    /// Stop and wait.
    ///
    /// # Errors
    /// The server's.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        if let Some(task) = self.task.take() {
            task.await??;
        }
        Ok(())
    }

    /// Host and port.
    pub fn address(&self) -> &str {
        self.base.trim_start_matches("http://")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// An introduction.
pub fn hello(name: &str, samples: usize, purpose: Purpose) -> Hello {
    Hello {
        federation: "test".into(),
        name: name.into(),
        kind: ClientKind::Native,
        device: "test".into(),
        samples: samples as u32,
        edge_bytes: 0,
        purpose,
        resume: None,
        offer: offer(samples),
        download: None,
    }
}

/// Both modes of the boundary, as they are asked for and as they are spoken.
pub const MODES: [(BoundaryChoice, BoundaryMode); 2] =
    [(BoundaryChoice::Activations, BoundaryMode::Activations), (BoundaryChoice::LowRank, BoundaryMode::LowRank)];

/// Everything that a client can do, whose half of the model is one of [`server_settings`]; the samples have pictures of their own.
pub fn offer(samples: usize) -> Offer {
    let samples = samples as u64;
    Offer {
        table: TableForm::F16,
        samples: samples as u32,
        positions: 30 * samples,
        image_positions: 16 * samples,
        pictures: samples as u32,
        picture_positions: 16 * samples,
        ..Offer::default()
    }
}

/// A connection that only asks, with this offer.
///
/// # Errors
/// No connection, or a refusal.
pub async fn asking(socket: &str, offer: Offer) -> anyhow::Result<Asking<fednano_server::native::Socket>> {
    let transport = SocketConnector::new(socket, CancellationToken::new()).connect().await?;
    Ok(Asking::open(transport, Hello { offer, ..hello("asker", 0, Purpose::Ask) }).await?)
}

/// Take part over a real socket.
///
/// # Errors
/// The client's.
pub async fn take_part<O: Observer>(
    edge: &NanoEdge,
    cache: &FeatureCache,
    socket: &str,
    name: &str,
    observer: &mut O,
) -> anyhow::Result<Outcome> {
    let device = Device::flex();
    let hello = introduction(name, edge, cache);
    let cache = &mut cache.clone();
    let me = Participant { hello, edge, cache, device: &device, max_tries: 40, keep_every: KEEP_EVERY };
    let mut connector = SocketConnector::new(socket, CancellationToken::new());
    Ok(participate(me, &mut connector, &TokioClock, &mut Forgetful, observer).await?)
}

/// An introduction with what the client really has.
pub fn introduction(name: &str, edge: &NanoEdge, cache: &FeatureCache) -> Hello {
    Hello { offer: Offer::of(cache, edge), ..hello(name, cache.samples.len(), Purpose::Train) }
}

/// The same over any connection, back in no time after a loss, and as often as it takes.
///
/// # Errors
/// The client's.
pub async fn take_part_over<C: Connector, O: Observer>(
    edge: &NanoEdge,
    cache: &FeatureCache,
    hello: Hello,
    connector: &mut C,
    observer: &mut O,
) -> anyhow::Result<Outcome> {
    let device = Device::flex();
    let hello = Hello { offer: Offer::of(cache, edge), ..hello };
    let cache = &mut cache.clone();
    let me = Participant { hello, edge, cache, device: &device, max_tries: 100_000, keep_every: KEEP_EVERY };
    Ok(participate(me, connector, &Hurried, &mut Forgetful, observer).await?)
}

/// The same, gone for good at the first loss; a keeper keeps the work of each step.
///
/// # Errors
/// The client's.
pub async fn take_part_once<C: Connector, S: Keeper, O: Observer>(
    edge: &NanoEdge,
    cache: &FeatureCache,
    hello: Hello,
    connector: &mut C,
    keeper: &mut S,
    observer: &mut O,
) -> anyhow::Result<Outcome> {
    let device = Device::flex();
    let hello = Hello { offer: Offer::of(cache, edge), ..hello };
    let cache = &mut cache.clone();
    let me = Participant { hello, edge, cache, device: &device, max_tries: 1, keep_every: Duration::ZERO };
    Ok(participate(me, connector, &Hurried, keeper, observer).await?)
}

/// What a server answers at an address, as text; anything but success is an error.
///
/// # Errors
/// No connection, or an answer that is no success.
pub async fn get(server: &str, path: &str) -> anyhow::Result<String> {
    let mut stream = tokio::net::TcpStream::connect(server).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {server}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("{path}: {answer}"))?;
    anyhow::ensure!(head.starts_with("HTTP/1.1 200"), "{path}: {head}");
    anyhow::ensure!(!head.to_ascii_lowercase().contains("chunked"), "{path} comes in chunks: {head}");
    Ok(body.to_owned())
}

/// A keeper in memory.
#[derive(Default)]
pub struct Notes(pub Option<Vec<u8>>);

impl Keeper for Notes {
    async fn keep(&mut self, snapshot: &[u8]) {
        self.0 = Some(snapshot.to_vec());
    }

    async fn kept(&mut self) -> Option<Vec<u8>> {
        self.0.clone()
    }
}

/// How often a client's work is kept, where something keeps it.
const KEEP_EVERY: Duration = Duration::from_secs(1);

/// A clock by which waits are short.
struct Hurried;

impl Clock for Hurried {
    async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time.min(Duration::from_millis(50))).await;
    }

    fn now(&self) -> Duration {
        TokioClock.now()
    }
}

/// Encode a data set on the CPU.
///
/// # Errors
/// The encoder's.
pub async fn encode(edge: &NanoEdge, data: &Dataset) -> anyhow::Result<FeatureCache> {
    Ok(edge.encode(data, |_, _| {}).await?)
}

/// Keeps what it hears, as words.
#[derive(Default)]
pub struct Heard(pub Vec<String>);

impl Observer for Heard {
    fn event(&mut self, event: ClientEvent<'_>) {
        let words = match event {
            ClientEvent::Joined { resumed, .. } => format!("joined resumed={resumed}"),
            ClientEvent::Round { round, from_step, .. } => format!("round {round} from {from_step}"),
            ClientEvent::Step { round, step, .. } => format!("step {round}.{step}"),
            ClientEvent::Uploaded { round, .. } => format!("uploaded {round}"),
            ClientEvent::NotCounted { round, .. } => format!("not counted {round}"),
            ClientEvent::Lost { cause, .. } => format!("lost: {cause}"),
            ClientEvent::Waiting { round, .. } => format!("waiting {round}"),
            ClientEvent::Local { round, .. } => format!("local {round}"),
            ClientEvent::Fisher { .. } | ClientEvent::Status(_) | ClientEvent::Traffic { .. } => return,
        };
        self.0.push(words);
    }
}

/// Largest deviation over the largest reference value.
pub fn deviation(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len(), "lengths differ");
    let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(want).fold(0f32, |m, (g, w)| m.max((g - w).abs()));
    if got.iter().any(|v| !v.is_finite()) { f64::INFINITY } else { f64::from(worst) / f64::from(largest).max(1e-30) }
}

/// Fail when a deviation is above its limit; the message has both.
///
/// # Errors
/// Above the limit.
pub fn close(what: &str, got: &TensorBlob, want: &TensorBlob, limit: f64) -> anyhow::Result<()> {
    anyhow::ensure!(got.shape == want.shape, "{what}: shape {:?}, expected {:?}", got.shape, want.shape);
    let d = deviation(&got.data, &want.data);
    println!("{what}: deviation {d:.1e}, limit {limit:.1e}");
    anyhow::ensure!(d <= limit, "{what}: deviation {d:.2e} is above {limit:.1e}");
    Ok(())
}

/// [`close`] for each part of what the boundary answers.
///
/// # Errors
/// Above the limit, or an answer of another kind.
pub fn gradients_close(got: &Gradient, want: &Gradient, limit: f64) -> anyhow::Result<()> {
    match (got, want) {
        (Gradient::Hidden(got), Gradient::Hidden(want)) => close("gradient", got, want, limit),
        (Gradient::Codes(got), Gradient::Codes(want)) => {
            let codes = ("u", &got.codes, &want.codes);
            let squares = ("squares", &got.up_squares, &want.up_squares);
            for (what, got, want) in [codes, ("d_up", &got.up, &want.up), squares] {
                anyhow::ensure!(got.parts() == want.parts(), "{what}: {:?} and {:?}", got.parts(), want.parts());
                for ((part, got), (_, want)) in got.iter().zip(want.iter()) {
                    close(&format!("{what} {}", part.name()), got, want, limit)?;
                }
            }
            Ok(())
        }
        _ => anyhow::bail!("an answer in the other mode"),
    }
}

/// [`close`] for each tensor of an adapter.
///
/// # Errors
/// Above the limit.
pub fn adapters_close(what: &str, got: &AdapterState, want: &AdapterState, limit: f64) -> anyhow::Result<()> {
    for (name, w) in &want.0 {
        let g = got.0.get(name).with_context(|| format!("{what} lacks {name}"))?;
        close(&format!("{what} {name}"), g, w, limit)?;
    }
    Ok(())
}
