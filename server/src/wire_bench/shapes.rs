//! Bytes at a large model's shape, on the real protocol: coordinator, store, sessions and participants in this process, over channels.
//!
//! What travels depends on the shape alone, so what costs time and says nothing about bytes is left away: the LLM has the true
//! width, but one decoder layer with one narrow head, random weights and a small head; the vision tower is never run, features
//! are random numbers of the true shape, each sample with a picture of its own, and texts are random ids of the true length. Ids of
//! answers are below [`HEAD`]: 2 bytes each, where those of the true vocabulary have up to 3.

use super::kept::{Kept, key};
use super::scaling::{Load, Shape};
use super::{Bench, Variant, Work};
use crate::coordinator::{self, Federation, Founding};
use crate::held_out::HeldOut;
use crate::llm_host::{self, LlmHandle, Order};
use crate::native::{ChannelConnector, TokioClock};
use crate::presets::find;
use crate::pretrain::{run::small_files, tokenizer};
use crate::session::{ModelSide, Shared};
use crate::store::{Store, TemporaryFolder};
use crate::text_table::TextTable;
use anyhow::Context;
use burn::module::Module;
use burn::tensor::Device;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::bundle::table::{Rows, TokenTable};
use fednano_shared::client::{ClientEvent, Forgetful, Observer, Outcome as Ended, Participant, participate};
use fednano_shared::config::{ModelConfig, TextConfig};
use fednano_shared::data::text::Encoded;
use fednano_shared::edge::{CachedSample, FeatureCache, NanoEdge, PictureFeatures};
use fednano_shared::ledger::Traffic;
use fednano_shared::model::checkpoint::EdgeParts;
use fednano_shared::model::files::SmallFiles;
use fednano_shared::model::{clip::VisionTower, llama::Llama, projector::Projector};
use fednano_shared::plain::TensorBlob;
use fednano_shared::settings::{BoundaryChoice, FederationSettings, Format, Strategy};
use fednano_shared::step::FrozenLlm;
use fednano_shared::wire::agreement::Offer;
use fednano_shared::wire::convert::Shapes;
use fednano_shared::wire::numbers::Coder;
use fednano_shared::wire::{ClientKind, Hello, ParticipantId, Purpose};
use half::f16;
use indicatif::{ProgressBar, ProgressStyle};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// What a federation gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// Bytes of the participant, as it counted them.
    pub(super) client: Traffic,
    /// The same, as the server counted them.
    pub(super) server: Traffic,
    /// How long it took.
    pub(super) seconds: f64,
}

/// A federation that is measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cell {
    pub(super) variant: Variant,
    pub(super) strategy: Strategy,
    /// It is run once more with twice the samples.
    pub(super) twice: bool,
}

/// All cells, strategy by strategy.
pub(super) fn cells() -> Vec<Cell> {
    let variants = [
        (Variant::activations("activations f16", Format::F16), false),
        (Variant::low_rank("low-rank f32", Format::F32), false),
        (Variant::low_rank("low-rank f16", Format::F16), false),
        (Variant::mixed("low-rank mixed"), true),
        (Variant::low_rank("low-rank int8", Format::Int8), false),
    ];
    let of = |strategy| variants.map(|(variant, twice)| Cell { variant, strategy, twice });
    [Strategy::FedAvg, Strategy::Fisher].into_iter().flat_map(of).collect()
}

/// The variants alone.
#[cfg(test)]
pub(super) fn variants() -> Vec<Variant> {
    cells().into_iter().map(|cell| cell.variant).collect()
}

/// The shape: LLaVA-1.5-7B's with 64 positions of text, or a tiny one.
///
/// # Errors
/// A preset that is not there.
pub(super) fn shape(bench: &Bench) -> anyhow::Result<Shape> {
    let (name, rank, question, answer) = if bench.quick() { ("tiny", 8, 12, 4) } else { ("llava-1.5-7b", 64, 48, 16) };
    Ok(Shape { config: find(name).with_context(|| format!("there is no preset '{name}'"))?, rank, question, answer })
}

/// What the measured participant does.
pub(super) fn load(bench: &Bench, strategy: Strategy, samples: u64) -> Load {
    let (batch, rounds) = if bench.quick() { (4, 2) } else { (16, 10) };
    Load { samples, batch, rounds, epochs: 1, fisher: strategy == Strategy::Fisher }
}

/// Bytes of the gradients of both `up` matrices in one reply.
pub(super) fn matrices(cell: &Cell, shape: &Shape) -> u64 {
    match cell.variant.mode {
        BoundaryChoice::LowRank => 2 * cell.variant.matrices.bytes(shape.config.text.hidden as u64, shape.rank),
        BoundaryChoice::Activations | BoundaryChoice::Auto => 0,
    }
}

fn settings(cell: &Cell, shape: &Shape, load: &Load) -> anyhow::Result<FederationSettings> {
    let base = FederationSettings {
        rank: usize::try_from(shape.rank)?,
        rounds: u32::try_from(load.rounds)?,
        local_epochs: u32::try_from(load.epochs)?,
        batch_size: usize::try_from(load.batch)?,
        fisher_samples: 0,
        strategy: cell.strategy,
        min_participants: 2,
        min_updates: 2,
        round_deadline_s: 86_400,
        learning_rate: 1e-4,
        ..Default::default()
    };
    Ok(cell.variant.of(&base))
}

fn cell_key(bench: &Bench, cell: &Cell, samples: u64) -> anyhow::Result<String> {
    let (shape, load) = (shape(bench)?, load(bench, cell.strategy, samples));
    key("shapes", &(settings(cell, &shape, &load)?, load, shape.config.to_json(), shape.question, shape.answer))
}

/// A cell and what is kept of it, with the samples asked for and with twice as many.
pub(super) struct Row {
    pub(super) cell: Cell,
    pub(super) once: Option<Outcome>,
    pub(super) twice: Option<Outcome>,
}

/// Every cell, whether there are runs of it or not.
pub(super) fn results(bench: &Bench, kept: &Kept) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for cell in cells() {
        let once = kept.get(&cell_key(bench, &cell, bench.samples)?);
        let twice = kept.get(&cell_key(bench, &cell, 2 * bench.samples)?);
        rows.push(Row { cell, once, twice });
    }
    Ok(rows)
}

/// Run what is missing.
///
/// # Errors
/// A device that cannot be used, a federation that fails.
pub(super) fn measure(work: &mut Work<'_>) -> anyhow::Result<()> {
    let bench = work.bench;
    let mut wanted = Vec::new();
    for samples in [bench.samples, 2 * bench.samples] {
        for cell in cells().into_iter().filter(|cell| samples == bench.samples || cell.twice) {
            let key = cell_key(bench, &cell, samples)?;
            if work.kept.get::<Outcome>(&key).is_none() {
                wanted.push((key, cell, samples));
            }
        }
    }
    println!("shapes: {} federations, the others are kept", wanted.len());
    if wanted.is_empty() {
        return Ok(());
    }
    let shape = shape(bench)?;
    let model = Model::random(&shape, bench)?;
    let bar = ProgressBar::new(wanted.len() as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} federations, {elapsed} spent, {eta} left")?);
    for (key, cell, samples) in wanted {
        let name = format!("{}, {}, {samples} samples", cell.strategy, cell.variant.name);
        let load = load(bench, cell.strategy, samples);
        let outcome = work
            .runtime
            .block_on(federation(&model, &shape, &cell, &load))
            .with_context(|| format!("the federation '{name}' failed"))?;
        let megabytes = outcome.client.total() as f64 / 1e6;
        bar.suspend(|| println!("{name}: {megabytes:.1} MB ({:.0} s)", outcome.seconds));
        work.kept.add(&key, &name, &outcome)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

// ---------------------------------------------------------------------------------------------- the model

/// Both halves, random.
struct Model {
    edge: Arc<NanoEdge>,
    host: LlmHandle,
    side: ModelSide,
    device: Device,
    held_out: Arc<HeldOut>,
}

/// `<image>` in the demo's tokenizer. An edge must have some; these texts are made of ids, so nobody asks it.
const PLACEHOLDER: u32 = 3;

impl Model {
    fn random(shape: &Shape, bench: &Bench) -> anyhow::Result<Self> {
        let (device, _) = bench.device.open()?;
        let config = &shape.config;
        let table = table(config);
        let widened = table.iter().map(|v| v.to_f32()).collect();
        let widened = TensorBlob { shape: vec![config.text.vocab, config.text.hidden], data: widened };
        let side = ModelSide {
            table: Arc::new(TextTable::new(widened).map_err(anyhow::Error::msg)?),
            shape: Shapes { dim: config.text.hidden, image_positions: config.image_tokens() },
            feature_cache: FEATURES,
            lockstep: false,
        };
        let edge = Arc::new(edge(config, table, &device)?);
        let autodiff = device.clone().autodiff();
        let text = thin(&config.text);
        // The values do not matter, but they must be some: nothing of it is trained.
        let llm = Llama::init(&text, &autodiff).no_grad();
        let host = llm_host::start(FrozenLlm::new(llm, &text, &autodiff), Order::Arrival { merge: false })?;
        let held_out = HeldOut {
            edge: edge.clone(),
            cache: samples(shape, Format::F32, 1, 0)?,
            rows: vec![0],
            device: device.clone(),
        };
        Ok(Self { edge, host, side, device, held_out: Arc::new(held_out) })
    }
}

/// Rows of the LLM's head: ids that an answer may have.
pub(super) const HEAD: u32 = 2048;

/// The same width, hardly anything behind it.
fn thin(text: &TextConfig) -> TextConfig {
    TextConfig {
        layers: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 32,
        intermediate: 32,
        vocab: HEAD as usize,
        ..text.clone()
    }
}

/// Features that the server keeps: more than all that are sent here.
const FEATURES: usize = 4 << 30;

/// Random rows for all ids.
fn table(config: &ModelConfig) -> Vec<f16> {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    (0..config.text.vocab * config.text.hidden).map(|_| f16::from_f32(rng.random_range(-0.05..0.05))).collect()
}

/// A participant's half. The vision tower's weights are never made: whoever does not use them does not pay for them.
fn edge(config: &ModelConfig, table: Vec<f16>, device: &Device) -> anyhow::Result<NanoEdge> {
    let json =
        tokenizer::build()?.to_string(false).map_err(|e| anyhow::anyhow!("the tokenizer has no JSON form: {e}"))?;
    let fitting = ModelConfig { image_token: PLACEHOLDER, ..config.clone() };
    let small = SmallFiles::from_bytes(&small_files(&fitting, json))?;
    let (rows, cols) = (config.text.vocab, config.text.hidden);
    let mut token_table = TokenTable::with_room(EdgeDtype::F16, rows, cols).map_err(anyhow::Error::msg)?;
    token_table.append(Rows::F16(table)).map_err(anyhow::Error::msg)?;
    let parts = EdgeParts {
        vision: VisionTower::init(config, device),
        projector: Projector::init(config, device),
        token_table,
    };
    Ok(NanoEdge::from_parts(config.clone(), small.text, small.preprocess, parts, device))
}

/// Positions of text before the picture.
const BEFORE_PICTURE: usize = 4;

/// Samples with pictures of their own. All have the same number of positions, and the same ids in another order, so that they have
/// the same number of bytes.
fn samples(shape: &Shape, format: Format, count: u64, seed: u64) -> anyhow::Result<FeatureCache> {
    let config = &shape.config;
    let (dim, image) = (config.text.hidden, config.image_tokens());
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut some = |count: u64, below: u32| (0..count).map(|_| rng.random_range(128..below)).collect::<Vec<u32>>();
    let (mut question, mut answer) = (some(shape.question, config.image_token), some(shape.answer, HEAD));
    let coder = Coder { format, ..Coder::EXACT };
    let mut cache = FeatureCache { pictures: Vec::new(), samples: Vec::new() };
    for number in 0..usize::try_from(count)? {
        let values: Vec<f32> = (0..image * dim).map(|_| rng.random_range(-1.0..1.0)).collect();
        cache.pictures.push(Arc::new(PictureFeatures::new(coder.pack("features", &values, dim)?, dim)));
        question.shuffle(&mut rng);
        answer.shuffle(&mut rng);
        let (before, after) = question.split_at(BEFORE_PICTURE.min(question.len()));
        let mut ids = before.to_vec();
        ids.resize(before.len() + image, config.image_token);
        ids.extend_from_slice(after);
        let prompt_length = ids.len();
        ids.extend_from_slice(&answer);
        let encoded = Encoded { ids, image_start: Some(before.len()), prompt_length };
        cache.samples.push(CachedSample { picture: Some(number), encoded });
    }
    Ok(cache)
}

// ---------------------------------------------------------------------------------------------- a federation

/// Name of the federation.
const NAME: &str = "shapes";
/// Sessions have so long to end once their clients are done.
const SETTLE: Duration = Duration::from_secs(60);

/// The participant that is measured, and another one with a single sample: merging must change the adapters, as it does among people.
async fn federation(model: &Model, shape: &Shape, cell: &Cell, load: &Load) -> anyhow::Result<Outcome> {
    let started = Instant::now();
    let folder = TemporaryFolder::create("wire-shapes")?;
    let founding = Founding {
        name: NAME.to_owned(),
        settings: settings(cell, shape, load)?,
        model: "random".into(),
        model_dir: String::new(),
        dim: shape.config.text.hidden,
    };
    let store = Store::open(folder.path(), NAME)?;
    let federation = coordinator::start(founding, model.host.clone(), model.held_out.clone(), store)?;
    let federations = BTreeMap::from([(NAME.to_owned(), federation.clone())]);
    let shared = Shared::new(federations, model.host.clone(), CancellationToken::new(), &model.side);
    // In the format agreed from the start, so that they are in memory once.
    let format = cell.variant.features;
    let (measured, other) = (samples(shape, format, load.samples, 1)?, samples(shape, format, 1, 2)?);
    let (measured, other) = tokio::select! {
        both = async { tokio::join!(take_part(model, &shared, &measured), take_part(model, &shared, &other)) } => both,
        cause = federation.failed() => anyhow::bail!("the federation has stopped: {cause}"),
    };
    other.context("the other participant did not get to the end")?;
    let (id, client) = measured.context("the participant did not get to the end")?;
    settle(&federation).await;
    let ledger = federation.ledger().await.context("the federation has ended before its bytes were added up")?;
    let server = ledger.participants.iter().find(|p| p.id == id).context("the server does not know the participant")?;
    let server = server.total;
    federation.stop().await;
    Ok(Outcome { client, server, seconds: started.elapsed().as_secs_f64() })
}

/// To the end; its number and its own count.
async fn take_part(model: &Model, shared: &Shared, cache: &FeatureCache) -> anyhow::Result<(ParticipantId, Traffic)> {
    let me = Participant {
        hello: Hello {
            federation: NAME.to_owned(),
            name: format!("{} samples", cache.samples.len()),
            kind: ClientKind::Simulated,
            device: "simulated".into(),
            samples: u32::try_from(cache.samples.len())?,
            edge_bytes: 0,
            purpose: Purpose::Train,
            resume: None,
            offer: Offer::of(cache, &model.edge),
            download: None,
        },
        edge: &model.edge,
        cache,
        device: &model.device,
        max_tries: 1, // a second connection would send more
        keep_every: Duration::MAX,
    };
    let (mut connector, mut watch) = (ChannelConnector(shared.clone()), Watch::default());
    match participate(me, &mut connector, &TokioClock, &mut Forgetful, &mut watch).await? {
        Ended::Finished { .. } => Ok((watch.id.context("it never joined")?, watch.traffic)),
        Ended::Left => anyhow::bail!("it left"),
    }
}

#[derive(Default)]
struct Watch {
    id: Option<ParticipantId>,
    traffic: Traffic,
}

impl Observer for Watch {
    fn event(&mut self, event: ClientEvent<'_>) {
        match event {
            ClientEvent::Joined { participant, .. } => self.id = Some(participant),
            ClientEvent::Traffic { rounds } => self.traffic = Traffic::sum(rounds.values()),
            _ => {}
        }
    }
}

/// Wait until all sessions have ended: only then are all bytes handed over.
async fn settle(federation: &Federation) {
    let mut status = federation.finished().await;
    let since = Instant::now();
    while status.participants.iter().any(|p| p.connected) && since.elapsed() < SETTLE {
        tokio::time::sleep(Duration::from_millis(20)).await;
        status = federation.status();
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::bench;
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn samples_have_as_many_bytes_as_one_another() {
        let shape = shape(&bench()).unwrap();
        let cache = samples(&shape, Format::Int8, 5, 1).unwrap();
        let keys: BTreeSet<_> = cache.pictures.iter().map(|p| p.key).collect();
        assert_eq!((keys.len(), cache.samples.len()), (5, 5));
        let sorted = |range: std::ops::RangeFrom<usize>| {
            let of = |sample: &CachedSample| {
                let mut ids = sample.encoded.ids[range.clone()].to_vec();
                ids.sort_unstable();
                ids
            };
            cache.samples.iter().map(of).collect::<BTreeSet<_>>().len()
        };
        assert_eq!((sorted(0..), sorted(cache.samples[0].encoded.prompt_length..)), (1, 1));
        let encoded = &cache.samples[0].encoded;
        let image = shape.config.image_tokens();
        assert_eq!((encoded.image_start, encoded.ids.len()), (Some(4), image + 16));
        assert!(encoded.ids[4..4 + image].iter().all(|id| *id == shape.config.image_token));
        let dim = shape.config.text.hidden;
        assert!(cache.pictures.iter().all(|p| p.packed.bytes.len() == image * (dim + 2)));
    }

    #[test]
    fn cells_are_told_apart_and_sound() {
        let bench = bench();
        let shape = shape(&bench).unwrap();
        let mut keys = BTreeSet::new();
        for cell in cells() {
            for samples in [8, 16] {
                let load = load(&bench, cell.strategy, samples);
                settings(&cell, &shape, &load).unwrap().validate_for_server().unwrap();
                keys.insert(cell_key(&bench, &cell, samples).unwrap());
            }
        }
        assert_eq!(keys.len(), 20);
        let of = |name: &str| matrices(cells().iter().find(|c| c.variant.name == name).unwrap(), &shape);
        let (d, r) = (shape.config.text.hidden as u64, shape.rank);
        assert_eq!([of("activations f16"), of("low-rank f32")], [0, 8 * d * r]);
        assert_eq!([of("low-rank mixed"), of("low-rank int8")], [2 * (2 * d * r + 1), 2 * d * (r + 2)]);
    }
}
