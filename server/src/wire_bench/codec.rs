//! What crosses the boundary in a real step, packed in every format: bytes, what deflating takes off them, and how fast it goes.

use super::kept::{Kept, key};
use super::links::{Nano, nano};
use super::setup::{Machine, Setup};
use super::{Bench, Work};
use anyhow::Context;
use fednano_shared::boundary::{BoundaryReply, BoundaryRequest, EvaluationReply, Gradient, Input, Pair, Place, Want};
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::edge::{Batch, FeatureCache};
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::model::checkpoint::load_llm;
use fednano_shared::optimizer::AdapterOptimizer;
use fednano_shared::plain::TensorBlob;
use fednano_shared::probe::shard;
use fednano_shared::settings::{FederationSettings, Format, Rounding};
use fednano_shared::step::{self, BoundaryError, FrozenLlm, InProcess, LlmBoundary, StepRules};
use fednano_shared::wire::agreement::BoundaryMode;
use fednano_shared::wire::numbers::Coder;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What is packed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Sizes {
    /// In words.
    pub(super) what: String,
    /// Values.
    pub(super) values: u64,
    /// Bytes in each format of [`Format::ALL`], plain and deflated.
    pub(super) bytes: Vec<(u64, u64)>,
}

/// How fast it goes, million values a second.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Speed {
    /// Format and the like in words.
    pub(super) how: String,
    /// To bytes.
    pub(super) pack: f64,
    /// Back.
    pub(super) unpack: f64,
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// Samples of the step.
    pub(super) samples: usize,
    /// Steps before it, so that the adapters are no fresh ones.
    pub(super) steps: usize,
    /// In the order of a table.
    pub(super) sizes: Vec<Sizes>,
    /// Of `g`, the largest.
    pub(super) speeds: Vec<Speed>,
    /// Whose speeds they are.
    pub(super) machine: Machine,
}

/// A coder is timed for so long at least.
const LONG_ENOUGH: Duration = Duration::from_millis(200);

/// Samples of the step, and steps before it.
fn amount(bench: &Bench) -> (usize, usize) {
    if bench.quick() { (4, 2) } else { (16, 40) }
}

fn settings() -> FederationSettings {
    FederationSettings::default()
}

fn sizes_key(bench: &Bench, setup: &Setup) -> anyhow::Result<String> {
    key("codec", &(setup, settings(), amount(bench)))
}

/// What is kept.
pub(super) fn result(bench: &Bench, kept: &Kept) -> anyhow::Result<Option<Outcome>> {
    let Some(setup) = Setup::last(bench, kept)? else { return Ok(None) };
    Ok(kept.get(&sizes_key(bench, &setup)?))
}

/// Train a little, then take one step apart, if that has not been done.
///
/// # Errors
/// A model that cannot be used.
pub(super) fn measure(work: &mut Work<'_>) -> anyhow::Result<()> {
    let setup = Setup::now(work)?;
    let key = sizes_key(work.bench, &setup)?;
    if work.kept.get::<Outcome>(&key).is_some() {
        return Ok(());
    }
    println!("packing: a step of nano-llava, tensor by tensor");
    let (samples, steps) = amount(work.bench);
    let nano = nano(work)?;
    let tensors = work.runtime.block_on(tensors(&nano, samples, steps))?;
    let mut sizes = Vec::new();
    for (what, tensor) in &tensors {
        sizes.push(packed(what, tensor)?);
    }
    let mut speeds = Vec::new();
    if let Some(g) = tensors.get(GRADIENT) {
        for format in Format::ALL {
            for deflate in [false, true] {
                speeds.push(speed(g, Coder { format, deflate, ..Coder::EXACT })?);
            }
        }
        for format in [Format::F16, Format::Int8] {
            speeds.push(speed(g, Coder { format, rounding: Rounding::Stochastic, ..Coder::EXACT })?);
        }
    }
    work.kept.add(&key, "packing", &Outcome { samples, steps, sizes, speeds, machine: nano.machine })
}

/// Names of the tensors; they are shown in alphabetical order, so each begins with its place.
const FEATURES: &str = "1. features of the pictures";
const HIDDEN: &str = "2. h";
const GRADIENT: &str = "3. g";
const CODES: &str = "4. z";
const CODES_GRADIENT: &str = "5. u";
const MATRICES: &str = "6. up";
const MATRICES_GRADIENT: &str = "7. dL/d up";

/// Rows of one width.
#[derive(Debug, Clone, Default)]
struct Rows {
    values: Vec<f32>,
    width: usize,
}

impl Rows {
    fn of<'a>(blobs: impl IntoIterator<Item = &'a TensorBlob>) -> Self {
        let mut rows = Self::default();
        for blob in blobs {
            rows.width = blob.shape.last().copied().unwrap_or(1).max(1);
            rows.values.extend_from_slice(&blob.data);
        }
        rows
    }

    fn of_pair(pair: &Pair<TensorBlob>) -> Self {
        Self::of(pair.iter().map(|(_, blob)| blob))
    }
}

/// Everything that a step sends in either mode.
async fn tensors(nano: &Nano, samples: usize, steps: usize) -> anyhow::Result<BTreeMap<&'static str, Rows>> {
    let autodiff = nano.device.clone().autodiff();
    let files = &nano.files;
    let llm = load_llm(&files.config, &files.weights, &autodiff)?;
    let llm = FrozenLlm::new(llm, &files.config.text, &autodiff);
    let cache: FeatureCache = nano.edge.encode(&shard(DemoTheme::ALL[0], 1, samples, 1), |_, _| {}).await?;
    let rows: Vec<usize> = (0..cache.samples.len()).collect();
    let parts = [nano.edge.batch(&cache, &rows)?];
    let settings = settings();
    let dim = files.config.text.hidden;
    let start = NanoAdapters::initial(settings.adapters, settings.rank, dim, &mut ChaCha8Rng::seed_from_u64(1));
    let mut adapters = NanoAdapters::from_state(&start, &nano.device);
    let mut optimizer = AdapterOptimizer::new(&settings);
    let rules = StepRules { rate: settings.learning_rate, prox: None, clip_norm: 0.0 };
    let mut spy = Spy::new(&llm, BoundaryMode::LowRank);
    for _ in 0..steps {
        step::train_step(&mut adapters, &mut optimizer, &rules, (&parts, Want::Gradient), &mut spy, &nano.device)
            .await?;
    }
    let mut seen = spy.seen;
    // The same adapters once more, in the other mode.
    let mut spy = Spy::new(&llm, BoundaryMode::Activations);
    step::train_step(&mut adapters, &mut optimizer, &rules, (&parts, Want::Gradient), &mut spy, &nano.device).await?;
    seen.extend(spy.seen);
    let mut features = Rows { values: Vec::new(), width: dim };
    for picture in &cache.pictures {
        let mut values = vec![0.0; picture.count()];
        picture.values(dim, &mut values)?;
        features.values.extend(values);
    }
    seen.insert(FEATURES, features);
    Ok(seen)
}

/// A boundary that remembers what passed it last.
struct Spy<'a> {
    inner: InProcess<'a>,
    seen: BTreeMap<&'static str, Rows>,
}

impl<'a> Spy<'a> {
    fn new(llm: &'a FrozenLlm, mode: BoundaryMode) -> Self {
        Self { inner: InProcess::new(llm, mode), seen: BTreeMap::new() }
    }
}

impl LlmBoundary for Spy<'_> {
    fn mode(&self) -> BoundaryMode {
        self.inner.mode()
    }

    async fn send(&mut self, request: BoundaryRequest, batch: &Batch, place: Place) -> Result<(), BoundaryError> {
        match &request.input {
            Input::Hidden(hidden) => drop(self.seen.insert(HIDDEN, Rows::of([hidden]))),
            Input::Codes(input) => {
                self.seen.insert(CODES, Rows::of_pair(&input.codes));
                self.seen.insert(MATRICES, Rows::of_pair(&input.up));
            }
        }
        self.inner.send(request, batch, place).await
    }

    async fn reply(&mut self) -> Result<BoundaryReply, BoundaryError> {
        let reply = self.inner.reply().await?;
        match &reply.gradient {
            Gradient::Hidden(g) => drop(self.seen.insert(GRADIENT, Rows::of([g]))),
            Gradient::Codes(g) => {
                self.seen.insert(CODES_GRADIENT, Rows::of_pair(&g.codes));
                self.seen.insert(MATRICES_GRADIENT, Rows::of_pair(&g.up));
            }
        }
        Ok(reply)
    }

    async fn evaluate(&mut self, request: BoundaryRequest, batch: &Batch) -> Result<EvaluationReply, BoundaryError> {
        self.inner.evaluate(request, batch).await
    }
}

fn packed(what: &str, rows: &Rows) -> anyhow::Result<Sizes> {
    let length = |format: Format, deflate: bool| -> anyhow::Result<u64> {
        let coder = Coder { format, deflate, ..Coder::EXACT };
        Ok(coder.pack(what, &rows.values, rows.width)?.bytes.len() as u64)
    };
    let mut bytes = Vec::new();
    for format in Format::ALL {
        bytes.push((length(format, false)?, length(format, true)?));
    }
    let what = what.split_once(' ').map_or(what, |(_, name)| name).to_owned();
    Ok(Sizes { what, values: rows.values.len() as u64, bytes })
}

fn speed(rows: &Rows, coder: Coder) -> anyhow::Result<Speed> {
    let (values, width) = (&rows.values, rows.width);
    let packed = coder.pack("g", values, width)?;
    let mut out = vec![0.0; values.len()];
    let pack = rate(values.len(), || coder.pack("g", values, width).map(drop))?;
    let unpack = rate(values.len(), || packed.unpack_into("g", &mut out, width))?;
    let mut how = coder.format.to_string();
    if coder.rounding != Rounding::Nearest {
        how += &format!(", {}", coder.rounding);
    }
    if coder.deflate {
        how += ", deflated";
    }
    Ok(Speed { how, pack, unpack })
}

/// Million values a second.
fn rate<E: std::error::Error + Send + Sync + 'static>(
    values: usize,
    mut once: impl FnMut() -> Result<(), E>,
) -> anyhow::Result<f64> {
    let (begun, mut times) = (Instant::now(), 0u32);
    while begun.elapsed() < LONG_ENOUGH {
        once().context("numbers that were packed before cannot be packed again")?;
        times += 1;
    }
    Ok(f64::from(times) * values as f64 / begun.elapsed().as_secs_f64() / 1e6)
}

#[cfg(test)]
mod tests {
    use super::super::setup;
    use super::*;

    #[test]
    fn sizes_are_those_of_the_formats() {
        let values: Vec<f32> = (0..600).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
        let rows = Rows { values, width: 100 };
        let sizes = packed(MATRICES, &rows).unwrap();
        let plain: Vec<u64> = sizes.bytes.iter().map(|(plain, _)| *plain).collect();
        assert_eq!((sizes.what.as_str(), sizes.values, plain), ("up", 600, vec![2400, 1201, 612]));
        assert!(sizes.bytes.iter().all(|(plain, deflated)| deflated <= plain));
        let speed = speed(&rows, Coder { format: Format::Int8, deflate: true, ..Coder::EXACT }).unwrap();
        assert!(speed.pack > 0.0 && speed.unpack > 0.0 && speed.how == "int8, deflated");
    }

    #[test]
    fn sizes_are_of_a_model_a_device_and_an_amount() {
        let quick = super::super::report::tests::bench();
        let full = Bench { size: crate::experiment::grid::Size::Full, ..quick.clone() };
        let keys = [(&quick, "abc"), (&quick, "abd"), (&full, "abc")]
            .map(|(bench, model)| sizes_key(bench, &setup::tests::setup(bench, model)).unwrap());
        assert!(keys[0] != keys[1] && keys[0] != keys[2]);
    }

    #[test]
    fn rows_of_a_pair_are_put_together() {
        let blob = |rows: usize| TensorBlob::zeros(&[rows, 3]);
        let rows = Rows::of_pair(&Pair { image: Some(blob(2)), text: Some(blob(4)) });
        assert_eq!((rows.values.len(), rows.width), (18, 3));
    }
}
