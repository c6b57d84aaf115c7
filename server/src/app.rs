//! The server as one function: `run(listener, settings, shutdown)`. Tests own port and lifetime.

use crate::coordinator::{self, Federation, Founding};
use crate::datasets;
use crate::edge_bundle;
use crate::held_out::HeldOut;
use crate::http::{self, Site};
use crate::llm_host::{self, LlmHandle, Order};
use crate::session::{ModelSide, Shared};
use crate::store::Store;
use crate::text_table::TextTable;
use anyhow::Context;
use burn::tensor::TensorCreationOptions;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::data::dataset::Dataset;
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::model::checkpoint::load_llm;
use fednano_shared::model::files::{ModelFiles, preprocess};
use fednano_shared::probe::shard;
use fednano_shared::settings::FederationSettings;
use fednano_shared::step::FrozenLlm;
use fednano_shared::wire::convert::Shapes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Where the held-out samples come from.
#[derive(Debug, Clone)]
pub enum HeldOutSource {
    /// Generated demo scenes of all themes that no participant is given, from a seed.
    Demo(u64),
    /// A data set.
    Data(Dataset),
}

/// Validated settings of a server.
pub struct ServerSettings {
    /// Model directory.
    pub model: PathBuf,
    /// Folder of the page.
    pub www: PathBuf,
    /// Results, and the prepared client half of the model.
    pub data_dir: PathBuf,
    /// How clients get the weights of their half.
    pub edge_dtype: EdgeDtype,
    /// Federations by name.
    pub federations: BTreeMap<String, FederationSettings>,
    /// Evaluation set.
    pub held_out: HeldOutSource,
    /// Samples of it that are used after each round (0: all).
    pub evaluation_limit: usize,
    /// Which requests are computed when, and which share a batch.
    pub order: Order,
    /// Bytes of participants' features that are kept for mode `low-rank`, of all together; what is dropped is asked for again.
    /// [`HALF_OF_MEMORY`]: as this machine allows.
    pub feature_cache: usize,
}

/// A [`ServerSettings::feature_cache`] that is the same on every machine: pictures of LLaVA-1.5-7B, 455 in f32 or 1,819 in int8.
pub const FEATURE_CACHE: usize = 4 << 30;
/// As [`ServerSettings::feature_cache`]: half of the memory that is available once the model is loaded, a gibibyte or more;
/// [`FEATURE_CACHE`] where nobody says how much that is.
pub const HALF_OF_MEMORY: usize = usize::MAX;
/// With less, a model's features would be sent in every round.
const LEAST_CACHE: usize = 1 << 30;

/// First seed of demo scenes kept for evaluation; shards of participants use smaller ones.
pub const HELD_OUT_SEED: u64 = 1 << 40;
/// Downloads under way are given this long at the end.
const DOWNLOADS: Duration = Duration::from_secs(10);
/// Sessions are given this long to say goodbye.
const GOODBYE: Duration = Duration::from_secs(5);
/// Federations are given this long to write down what they have been handed.
const STOP: Duration = Duration::from_secs(30);

/// A server that is ready to listen.
pub struct App {
    site: Arc<Site>,
    /// The evaluation set, for callers that want more than the rounds' figures.
    pub held_out: Arc<HeldOut>,
}

impl App {
    /// Load the model, encode the held-out set, start the federations. `place` says where everything is computed and the type of the
    /// LLM, as for [`load_llm`].
    ///
    /// # Errors
    /// A model or a data directory that cannot be used.
    pub async fn start(
        settings: ServerSettings,
        place: impl Into<TensorCreationOptions>,
        shutdown: CancellationToken,
    ) -> anyhow::Result<Self> {
        anyhow::ensure!(
            settings.order != Order::Lockstep || settings.federations.len() == 1,
            "in lockstep there can be one federation, here are {}; members of different ones would wait for each other",
            settings.federations.len()
        );
        let place: TensorCreationOptions = place.into();
        let device = &place.device;
        let files = ModelFiles::open(&settings.model)
            .with_context(|| format!("the model directory {} cannot be used", settings.model.display()))?;
        let bundle =
            edge_bundle::prepare(&settings.model, &files, settings.edge_dtype, &settings.data_dir, tell_each_tenth())?;
        // From the bundle, so that the server judges with the very features that clients compute.
        let edge = Arc::new(bundle.edge(device)?);
        let table = Arc::new(TextTable::read(&files)?);
        let autodiff = device.clone().autodiff();
        let llm = load_llm(&files.config, &files.weights, place.clone().with_device(autodiff.clone()))?;
        let llm = FrozenLlm::new(llm, &files.config.text, &autodiff);
        let llm = llm_host::start(llm, settings.order)?;
        let data = match settings.held_out {
            HeldOutSource::Data(data) => data,
            HeldOutSource::Demo(seed) => demo_held_out(seed),
        };
        let cache = edge.encode(&data, |_, _| {}).await.context("the held-out set cannot be used")?;
        let mut rows: Vec<usize> = (0..cache.samples.len()).collect();
        rows.shuffle(&mut ChaCha8Rng::seed_from_u64(0));
        if settings.evaluation_limit > 0 {
            rows.truncate(settings.evaluation_limit);
        }
        let held_out = Arc::new(HeldOut { edge, cache, rows, device: device.clone() });
        // So that it is found from wherever a later run is started.
        let model_dir = settings.model.canonicalize().unwrap_or_else(|_| settings.model.clone());
        let mut federations = BTreeMap::new();
        for (name, federation) in settings.federations {
            check_name(&name)?;
            let store = Store::open(&settings.data_dir, &name)?;
            let founding = Founding {
                name: name.clone(),
                settings: federation,
                model: bundle.model_hash.clone(),
                model_dir: model_dir.display().to_string(),
                dim: files.config.text.hidden,
            };
            federations.insert(name, coordinator::start(founding, llm.clone(), held_out.clone(), store)?);
        }
        // Only now: the model has taken its memory.
        let feature_cache = feature_cache(settings.feature_cache, available_memory);
        tracing::info!("features of participants' pictures have room in {} MiB", feature_cache >> 20);
        let model = ModelSide {
            table,
            shape: Shapes { dim: files.config.text.hidden, image_positions: files.config.image_tokens() },
            feature_cache,
            lockstep: settings.order == Order::Lockstep,
        };
        let shared = Shared::new(federations, llm, shutdown, &model);
        let site = Site { shared, bundle, www: settings.www, sessions: TaskTracker::new() };
        Ok(Self { site: Arc::new(site), held_out })
    }

    /// What sessions share; a channel can be served with it as well as a socket.
    pub fn shared(&self) -> Shared {
        self.site.shared.clone()
    }

    /// A federation by name.
    pub fn federation(&self, name: &str) -> Option<Federation> {
        self.site.shared.federations.get(name).cloned()
    }

    /// The LLM.
    pub fn llm(&self) -> LlmHandle {
        self.site.shared.llm.clone()
    }

    /// Serve until the shutdown token is cancelled; sessions are told and waited for, then the federations end and close their
    /// stores. Each wait is bounded.
    ///
    /// # Errors
    /// The listener's, or a federation that failed for good.
    pub async fn serve(&self, listener: TcpListener) -> anyhow::Result<()> {
        let shutdown = self.site.shared.shutdown.clone();
        let serving = http::serve(listener, self.site.clone(), shutdown.clone().cancelled_owned());
        let patience = async {
            shutdown.cancelled().await;
            tokio::time::sleep(DOWNLOADS).await;
        };
        let result = tokio::select! {
            () = self.failed() => Ok(()),
            served = serving => served.map_err(anyhow::Error::from),
            () = patience => {
                tracing::warn!("some downloads did not end in time");
                Ok(())
            }
        };
        shutdown.cancel(); // sessions end, whatever ended the serving
        self.site.sessions.close();
        if tokio::time::timeout(GOODBYE, self.site.sessions.wait()).await.is_err() {
            tracing::warn!("some sessions did not end in time");
        }
        if tokio::time::timeout(STOP, self.stop()).await.is_err() {
            tracing::warn!("a federation did not end in time; what it has acknowledged is on disk");
        }
        self.failure().map_or(result, Err) // told whatever ended the serving, also where it failed while stopping
    }

    /// End the federations and close their stores, so that another server may go on with them.
    pub async fn stop(&self) {
        for federation in self.site.shared.federations.values() {
            federation.stop().await;
        }
    }

    /// Wait until a federation has failed for good (none may).
    async fn failed(&self) {
        let mut waits: FuturesUnordered<_> = self.site.shared.federations.values().map(Federation::failed).collect();
        if waits.next().await.is_none() {
            std::future::pending::<()>().await; // no federation, no failure
        }
    }

    /// The first federation that has failed for good, as an error.
    fn failure(&self) -> Option<anyhow::Error> {
        let mut federations = self.site.shared.federations.iter();
        federations.find_map(|(name, federation)| {
            federation.failure().map(|cause| anyhow::anyhow!("federation '{name}' has stopped: {cause}"))
        })
    }
}

/// Bytes for features, asked for as in [`ServerSettings::feature_cache`]; the other half is for requests under way.
fn feature_cache(asked: usize, available: impl FnOnce() -> Option<usize>) -> usize {
    match asked {
        HALF_OF_MEMORY => available().map_or(FEATURE_CACHE, |bytes| (bytes / 2).max(LEAST_CACHE)),
        bytes => bytes,
    }
}

/// Bytes that this program can still take without swapping; none: the system does not say. A container may have less than its machine.
fn available_memory() -> Option<usize> {
    let available = available_of(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let limit = limit.and_then(|words| words.trim().parse::<usize>().ok()); // else "max"
    Some(limit.map_or(available, |limit| limit.min(available)))
}

/// `MemAvailable` of Linux's `/proc/meminfo`, bytes.
fn available_of(meminfo: &str) -> Option<usize> {
    let kib = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"))?;
    kib.trim().parse::<usize>().ok()?.checked_mul(1 << 10)
}

/// Bind, with an error that names the remedy.
///
/// # Errors
/// A port in use, an address that is not this machine's.
pub async fn bind(listen: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(listen).await.map_err(|e| match e.kind() {
        std::io::ErrorKind::AddrInUse => {
            anyhow::anyhow!("the address {listen} is in use, perhaps by another fednano; stop it or choose another port with --listen")
        }
        _ => anyhow::anyhow!("cannot listen on {listen}: {e}; give --listen ADDRESS:PORT of this machine"),
    })
}

fn check_name(name: &str) -> anyhow::Result<()> {
    let fine =
        !name.is_empty() && name.len() <= 40 && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c));
    anyhow::ensure!(fine, "'{name}' is no federation name; use 1 to 40 letters, digits, '-' or '_'");
    Ok(())
}

/// Scenes of every theme, from seeds that no shard uses.
pub fn demo_held_out(seed: u64) -> Dataset {
    let mut all = Dataset::default();
    for theme in DemoTheme::ALL {
        all.append(shard(theme, HELD_OUT_SEED + seed, 40, 5));
    }
    all
}

/// Logs how far the preparation is: minutes, for a large model.
fn tell_each_tenth() -> impl FnMut(u64, u64) {
    let mut told = 0;
    move |done: u64, all: u64| {
        let tenths = done * 10 / all.max(1);
        if tenths > told {
            told = tenths;
            tracing::info!("the model is being prepared for clients: {} %", tenths * 10);
        }
    }
}

/// Read a data set for evaluation.
///
/// # Errors
/// As [`datasets::open`].
pub fn held_out_from(path: Option<&Path>, model: &Path) -> anyhow::Result<HeldOutSource> {
    Ok(match path {
        Some(path) => HeldOutSource::Data(datasets::open(path, &preprocess(model)?)?),
        None => HeldOutSource::Demo(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_have_half_of_the_memory() {
        let meminfo =
            "MemTotal:       65536000 kB\nMemFree:         1024 kB\nMemAvailable:   33554432 kB\nBuffers:  7 kB\n";
        assert_eq!(available_of(meminfo), Some(32 << 30));
        for strange in ["", "MemTotal: 7 kB\n", "MemAvailable: many kB\n", "MemAvailable: 7 MB\n"] {
            assert_eq!(available_of(strange), None, "{strange}");
        }
        let half = |available: Option<usize>| feature_cache(HALF_OF_MEMORY, || available);
        assert_eq!(half(Some(32 << 30)), 16 << 30);
        assert_eq!(half(Some(100 << 20)), 1 << 30);
        assert_eq!(half(None), FEATURE_CACHE);
        for asked in [0, 7, FEATURE_CACHE] {
            assert_eq!(feature_cache(asked, || None), asked);
        }
    }
}
