//! What all runs of a process share: the model, the features of the pictures as far as anybody has needed them, the exams.
//! Each is computed once, and alone, so that no run's result depends on which runs there were before.

use super::config::{Simulation, Task};
use super::corpus::{self, Corpus, Held, Part};
use super::figures::Tested;
use crate::app::FEATURE_CACHE;
use crate::edge_bundle;
use crate::held_out::HeldOut;
use crate::llm_host::{self, LlmHandle, Order};
use crate::session::ModelSide;
use crate::text_table::TextTable;
use anyhow::Context;
use burn::tensor::Device;
use fednano_shared::bundle::sha256_hex;
use fednano_shared::edge::{CachedSample, FeatureCache, NanoEdge, PictureFeatures};
use fednano_shared::model::checkpoint::load_llm;
use fednano_shared::model::files::{ModelFiles, weight_files};
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::Strategy;
use fednano_shared::step::{Evaluation, FrozenLlm};
use fednano_shared::wire::convert::Shapes;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::OnceCell;

/// A picture: its task, half and number.
type Place = (Task, Part, usize);
/// Tasks, samples used after each round, samples in all.
type ExamKey = (Vec<Task>, usize, usize);

/// The model and the samples, loaded.
pub struct Stage {
    /// Identity of the client's half of the model and its form.
    pub(super) model: String,
    pub(super) model_dir: String,
    pub(super) dim: usize,
    pub(super) edge: Arc<NanoEdge>,
    pub(super) device: Device,
    /// What sessions need beside an LLM.
    pub(super) side: ModelSide,
    /// The device in words.
    pub device_name: String,
    /// One LLM each, for runs side by side.
    pub hosts: Vec<LlmHandle>,
    corpora: BTreeMap<Task, Corpus>,
    features: Mutex<HashMap<Place, Arc<PictureFeatures>>>,
    exams: Mutex<BTreeMap<ExamKey, Arc<Exam>>>,
    hash: String,
}

/// The samples on which runs are judged.
pub struct Exam {
    /// All of them; `rows` are those used after each round.
    pub(super) held_out: Arc<HeldOut>,
    /// The rows of each task.
    tasks: Vec<(Task, Vec<usize>)>,
    /// Shares that answers without looking reach: always the same one, always the same one to a question.
    pub baselines: (f64, f64),
    zero_shot: OnceCell<Tested>,
}

impl Stage {
    /// Load a simulation's model and list the samples of these tasks. `jobs` runs can go side by side.
    ///
    /// # Errors
    /// A model, a device or a data set that cannot be used.
    pub fn open(
        simulation: &Simulation,
        model: &Path,
        tasks: &BTreeSet<Task>,
        cache: &Path,
        jobs: usize,
    ) -> anyhow::Result<Self> {
        let (device, device_name) = simulation.device.open()?;
        let dtype = simulation.dtype.choose(model, &device, &device_name)?;
        let files = ModelFiles::open(model)
            .with_context(|| format!("the model directory {} cannot be used", model.display()))?;
        let bundle = edge_bundle::prepare(model, &files, simulation.edge_dtype, cache, |_, _| {})?;
        let edge = Arc::new(bundle.edge(&device)?);
        let autodiff = device.clone().autodiff();
        let mut hosts = Vec::new();
        for _ in 0..jobs.max(1) {
            let llm = load_llm(&files.config, &files.weights, (&autodiff, dtype))?;
            let llm = FrozenLlm::new(llm, &files.config.text, &autodiff);
            hosts.push(llm_host::start(llm, Order::Lockstep)?);
        }
        let corpora = tasks
            .iter()
            .map(|task| Ok((*task, Corpus::open(*task, &simulation.data)?)))
            .collect::<anyhow::Result<BTreeMap<_, _>>>()?;
        let hash = hash(model, &bundle.model_hash)?;
        let side = ModelSide {
            table: Arc::new(TextTable::read(&files)?),
            shape: Shapes { dim: files.config.text.hidden, image_positions: files.config.image_tokens() },
            feature_cache: FEATURE_CACHE,
            lockstep: true,
        };
        Ok(Self {
            model: bundle.model_hash,
            model_dir: model.canonicalize().unwrap_or_else(|_| model.to_owned()).display().to_string(),
            dim: files.config.text.hidden,
            edge,
            device,
            side,
            device_name,
            hosts,
            corpora,
            features: Mutex::default(),
            exams: Mutex::default(),
            hash,
        })
    }

    /// Tells the model and the samples of some tasks from others.
    pub fn hash(&self, tasks: &[Task]) -> String {
        let of = |task: &Task| self.corpora.get(task).map_or("", |corpus| corpus.hash.as_str());
        let parts: Vec<&str> = std::iter::once(self.hash.as_str()).chain(tasks.iter().map(of)).collect();
        sha256_hex(parts.join(" ").as_bytes())
    }

    /// The clients' samples, encoded; as [`corpus::deal`].
    ///
    /// # Errors
    /// As that, and a picture that cannot be used.
    pub(super) async fn clients(
        &self,
        simulation: &Simulation,
        strategy: Strategy,
        seed: u64,
    ) -> anyhow::Result<Vec<FeatureCache>> {
        let mut caches = Vec::new();
        for client in corpus::deal(&self.corpora, simulation, strategy, seed)? {
            caches.push(self.encode(&client, Part::Train).await?);
        }
        Ok(caches)
    }

    /// The samples to judge a simulation with.
    ///
    /// # Errors
    /// A picture that cannot be used.
    pub async fn exam(&self, simulation: &Simulation) -> anyhow::Result<Arc<Exam>> {
        let key = (simulation.tasks.clone(), simulation.evaluation_limit, simulation.test_limit);
        if let Some(known) = self.exams.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(known.clone());
        }
        let (samples, rows) = corpus::exam(&self.corpora, simulation)?;
        let cache = self.encode(&samples, Part::Test).await?;
        let rows_of = |task: &Task| {
            let numbered = samples.iter().enumerate().filter(|(_, held)| held.task == *task);
            (*task, numbered.map(|(row, _)| row).collect())
        };
        let tasks = simulation.tasks.iter().map(rows_of).collect();
        let exam = Arc::new(Exam {
            held_out: Arc::new(HeldOut { edge: self.edge.clone(), cache, rows, device: self.device.clone() }),
            tasks,
            baselines: corpus::baselines(&self.corpora, simulation, &samples),
            zero_shot: OnceCell::new(),
        });
        // Should another run have been faster, its own is as good.
        let mut exams = self.exams.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(exams.entry(key).or_insert(exam).clone())
    }

    /// Samples with the features of their pictures. Each picture passes the vision tower alone: in company its last bits would
    /// depend on the company.
    async fn encode(&self, held: &[Held], part: Part) -> anyhow::Result<FeatureCache> {
        let mut numbers: BTreeMap<(Task, usize), usize> = BTreeMap::new();
        let (mut pictures, mut samples) = (Vec::new(), Vec::new());
        for Held { task, sample } in held {
            let answer = Some(sample.answer.as_str());
            let encoded = match sample.picture {
                Some(_) => self.edge.text.encode(&sample.question, answer)?,
                None => self.edge.text.encode_text(&sample.question, answer)?,
            };
            let picture = match sample.picture {
                None => None,
                Some(number) => match numbers.get(&(*task, number)) {
                    Some(known) => Some(*known),
                    None => {
                        pictures.push(self.feature((*task, part, number)).await?);
                        numbers.insert((*task, number), pictures.len() - 1);
                        Some(pictures.len() - 1)
                    }
                },
            };
            samples.push(CachedSample { picture, encoded });
        }
        Ok(FeatureCache { pictures, samples })
    }

    async fn feature(&self, place: Place) -> anyhow::Result<Arc<PictureFeatures>> {
        if let Some(known) = self.features.lock().unwrap_or_else(PoisonError::into_inner).get(&place) {
            return Ok(known.clone());
        }
        let (task, part, number) = place;
        let image = self.corpora.get(&task).and_then(|corpus| corpus.part(part).pictures.get(number));
        let picture = image.with_context(|| format!("the task {task} has no picture {number}"))?.open()?;
        let mut features = self.edge.picture_features(&[&*picture]).await?;
        let features = features.pop().context("a picture has no features")?;
        self.features.lock().unwrap_or_else(PoisonError::into_inner).insert(place, features.clone());
        Ok(features)
    }
}

impl Exam {
    /// Samples in all.
    pub fn samples(&self) -> usize {
        self.held_out.cache.samples.len()
    }

    /// Judge adapters (none: the untouched model) with all samples.
    ///
    /// # Errors
    /// A lost device.
    pub(super) async fn judge(&self, adapter: Option<&AdapterState>, llm: &LlmHandle) -> anyhow::Result<Tested> {
        let mut tasks = BTreeMap::new();
        for (task, rows) in &self.tasks {
            tasks.insert(*task, judge(&self.held_out, adapter, rows, llm).await?);
        }
        Ok(Tested::of(tasks))
    }

    /// The untouched model, judged once.
    ///
    /// # Errors
    /// A lost device.
    pub async fn zero_shot(&self, llm: &LlmHandle) -> anyhow::Result<Tested> {
        self.zero_shot.get_or_try_init(|| self.judge(None, llm)).await.cloned()
    }
}

/// Judge adapters with some rows, on a thread that may block.
///
/// # Errors
/// A lost device.
pub(super) async fn judge(
    on: &Arc<HeldOut>,
    adapter: Option<&AdapterState>,
    rows: &[usize],
    llm: &LlmHandle,
) -> anyhow::Result<Evaluation> {
    let (on, adapter, rows, llm) = (on.clone(), adapter.cloned(), rows.to_vec(), llm.clone());
    let run = move || on.evaluate(adapter.as_ref(), &rows, &llm);
    tokio::task::spawn_blocking(run).await?.map_err(anyhow::Error::msg)
}

/// SHA-256 over the client's half and every weight file: the LLM decides as much as the rest.
fn hash(model: &Path, client_half: &str) -> anyhow::Result<String> {
    let mut hash = Sha256::new();
    hash.update(client_half.as_bytes());
    for name in weight_files(model)? {
        let path: PathBuf = model.join(name);
        let mut file = std::fs::File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut block = vec![0; 1 << 20];
        loop {
            let read = file.read(&mut block).with_context(|| format!("cannot read {}", path.display()))?;
            match block.get(..read) {
                Some(bytes) if read > 0 => hash.update(bytes),
                _ => break,
            }
        }
    }
    Ok(fednano_shared::bundle::hex(&hash.finalize()))
}
