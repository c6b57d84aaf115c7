//! Bytes at a large model's shape, on the real protocol: coordinator, store, sessions and participants in this process, over channels.
//!
//! What travels depends on the shape alone, so what costs time and says nothing about bytes is left away: the LLM has the true
//! width, but one decoder layer with one narrow head, random weights and a small head; the vision tower is never run, features
//! are random numbers of the true shape, each sample with a picture of its own, and texts are random ids of the true length. Ids of
//! answers are below [`HEAD`]: 2 bytes each, where those of the true vocabulary have up to 3.

use super::kept::{Kept, key};
use super::scaling::{self, Deviation, Fixed, Load, Shape};
use super::{Bench, DEFAULT, MIXED, PLENTY, Variant, Work};
use crate::coordinator::{self, Founding};
use crate::experiment::run::settled;
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
use fednano_shared::wire::agreement::{FISHER_GROUP, Offer};
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

/// One more whenever the program sends other bytes for the same settings. 2: features in frames of about 1 MiB.
const FORMAT: u32 = 2;

/// A federation that is measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cell {
    pub(super) variant: Variant,
    pub(super) strategy: Strategy,
    /// It is run once more with [`second`] samples.
    pub(super) twice: bool,
    /// The server's cache has room for half of the participant's features alone.
    pub(super) half: bool,
}

/// All cells, strategy by strategy.
pub(super) fn cells() -> Vec<Cell> {
    let default = Variant::low_rank(DEFAULT, Format::Int8);
    let variants = [
        Variant::activations("activations f16", Format::F16),
        Variant::low_rank("low-rank f32", Format::F32),
        Variant::low_rank("low-rank f16", Format::F16),
        Variant::mixed(MIXED),
        default,
    ];
    let of = |strategy| variants.map(|variant| Cell { variant, strategy, twice: variant == default, half: false });
    let mut cells: Vec<Cell> = [Strategy::FedAvg, Strategy::Fisher].into_iter().flat_map(of).collect();
    cells.push(Cell { variant: default, strategy: Strategy::FedAvg, twice: false, half: true });
    cells
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

/// Samples of the second run, which checks the rules: more requests than a Fisher group has, the last of them half full.
pub(super) fn second(bench: &Bench) -> u64 {
    let batch = load(bench, Strategy::FedAvg, bench.samples).batch;
    let samples = FISHER_GROUP as u64 * batch + batch / 2;
    if samples == bench.samples { samples + batch } else { samples }
}

/// What of a cell's bytes does not grow with values.
pub(super) fn fixed(cell: &Cell, shape: &Shape) -> Fixed {
    let variant = &cell.variant;
    let (tensors, matrices) = match variant.mode {
        // Codes of image and of text positions; both matrices.
        BoundaryChoice::LowRank => (2, 2 * variant.matrices.bytes(shape.config.text.hidden as u64, shape.rank)),
        BoundaryChoice::Activations | BoundaryChoice::Auto => (1, 0),
    };
    let head = |format: Format| tensors * format.bytes(0, 1);
    Fixed { matrices, heads_up: head(variant.codes), heads_down: head(variant.gradients), labels: shape.answer }
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
    let texts = (shape.question, shape.answer);
    key("shapes", &(FORMAT, settings(cell, &shape, &load)?, load, shape.config.to_json(), texts, cell.half))
}

/// A cell and what is kept of it.
pub(super) struct Row {
    pub(super) cell: Cell,
    /// With the samples asked for.
    pub(super) once: Option<Outcome>,
    /// With [`second`] samples.
    pub(super) twice: Option<Outcome>,
}

impl Row {
    /// All that is kept, by samples.
    pub(super) fn outcomes(&self, bench: &Bench) -> impl Iterator<Item = (u64, &Outcome)> {
        let all = [(bench.samples, &self.once), (second(bench), &self.twice)];
        all.into_iter().filter_map(|(samples, outcome)| Some((samples, outcome.as_ref()?)))
    }

    /// The load and the bytes from which others are worked out: the larger run.
    fn largest(&self, bench: &Bench) -> Option<(Load, Traffic)> {
        let (samples, outcome) = self.outcomes(bench).max_by_key(|(samples, _)| *samples)?;
        Some((load(bench, self.cell.strategy, samples), outcome.client))
    }

    /// Bytes with so many samples, by the rules; none without any run.
    pub(super) fn scaled(&self, bench: &Bench, shape: &Shape, samples: u64) -> Option<Traffic> {
        let (from, traffic) = self.largest(bench)?;
        let to = load(bench, self.cell.strategy, samples);
        Some(scaling::scaled(&traffic, &from, &to, &fixed(&self.cell, shape)))
    }

    /// How far the second run is from what the first one and the rules say; none where one of them is missing.
    pub(super) fn deviation(&self, bench: &Bench, shape: &Shape) -> Option<Deviation> {
        let load = |samples| load(bench, self.cell.strategy, samples);
        let (from, to) = (load(bench.samples), load(second(bench)));
        let forecast = scaling::scaled(&self.once.as_ref()?.client, &from, &to, &fixed(&self.cell, shape));
        Some(scaling::deviation(&forecast, &self.twice.as_ref()?.client))
    }

    /// In words.
    pub(super) fn name(&self) -> String {
        self.cell.name()
    }
}

impl Cell {
    /// In words.
    fn name(&self) -> String {
        let half = if self.half { ", a cache of half of the features" } else { "" };
        format!("{}, {}{half}", self.strategy, self.variant.name)
    }
}

/// Every cell, whether there are runs of it or not.
pub(super) fn results(bench: &Bench, kept: &Kept) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for cell in cells() {
        let once = kept.get(&cell_key(bench, &cell, bench.samples)?);
        let twice = if cell.twice { kept.get(&cell_key(bench, &cell, second(bench))?) } else { None };
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
    for samples in [bench.samples, second(bench)] {
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
        let name = format!("{}, {samples} samples", cell.name());
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
            feature_cache: PLENTY,
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

/// Bytes of features that the server keeps: those of half of the pictures and of the other participant's one, or all.
fn room(shape: &Shape, cell: &Cell, load: &Load) -> anyhow::Result<usize> {
    if !cell.half {
        return Ok(PLENTY);
    }
    let (positions, dim) = (shape.config.image_tokens() as u64, shape.config.text.hidden as u64);
    let pictures = load.samples.div_ceil(2) + 1;
    Ok(usize::try_from(pictures * cell.variant.features.bytes(positions, dim))?)
}

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
    let side = ModelSide { feature_cache: room(shape, cell, load)?, ..model.side.clone() };
    let shared = Shared::new(federations, model.host.clone(), CancellationToken::new(), &side);
    // In the format agreed from the start, so that nothing has to be converted.
    let format = cell.variant.features;
    let (measured, other) = (samples(shape, format, load.samples, 1)?, samples(shape, format, 1, 2)?);
    let (measured, other) = tokio::select! {
        both = async { tokio::join!(take_part(model, &shared, &measured), take_part(model, &shared, &other)) } => both,
        cause = federation.failed() => anyhow::bail!("the federation has stopped: {cause}"),
    };
    other.context("the other participant did not get to the end")?;
    let (id, client) = measured.context("the participant did not get to the end")?;
    settled(&federation).await;
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
        cache: &mut cache.clone(),
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

#[cfg(test)]
mod tests {
    use super::super::report::tests::bench;
    use super::*;
    use fednano_shared::ledger::Kind;
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
            for samples in [bench.samples, second(&bench)] {
                let load = load(&bench, cell.strategy, samples);
                settings(&cell, &shape, &load).unwrap().validate_for_server().unwrap();
                keys.insert(cell_key(&bench, &cell, samples).unwrap());
            }
        }
        assert_eq!((cells().len(), keys.len()), (11, 22));
        let of = |name: &str| fixed(cells().iter().find(|c| c.variant.name == name).unwrap(), &shape);
        let (d, r, labels) = (shape.config.text.hidden as u64, shape.rank, shape.answer);
        let f16 = Fixed { matrices: 0, heads_up: 1, heads_down: 1, labels };
        assert_eq!(of("activations f16"), f16);
        assert_eq!(of("low-rank f16"), Fixed { matrices: 2 * (2 * d * r + 1), heads_up: 2, heads_down: 2, labels });
        let none = Fixed { labels, ..Fixed::default() };
        assert_eq!(of("low-rank f32"), Fixed { matrices: 8 * d * r, ..none });
        assert_eq!(of(MIXED), Fixed { matrices: 2 * (2 * d * r + 1), ..none });
        assert_eq!(of(DEFAULT), Fixed { matrices: 2 * d * (r + 2), ..none });
    }

    #[test]
    fn the_second_run_has_several_groups_and_a_request_that_is_not_full() {
        let quick = bench();
        let full = Bench { size: crate::experiment::grid::Size::Full, samples: 32, ..quick.clone() };
        assert_eq!((second(&quick), second(&full)), (34, 136));
        // The same number would check nothing.
        assert_eq!(second(&Bench { samples: 136, ..full }), 152);
        let checked: Vec<Cell> = cells().into_iter().filter(|cell| cell.twice).collect();
        assert!(checked.iter().all(|cell| cell.variant.name == DEFAULT && !cell.half));
        assert_eq!(checked.len(), 2);
    }

    #[test]
    fn the_larger_run_is_scaled_and_a_wrong_rule_shows() {
        let bench = bench();
        let shape = shape(&bench).unwrap();
        let cell = cells().into_iter().find(|cell| cell.twice).unwrap();
        let outcome = |codes: u64| {
            let mut client = Traffic::default();
            client.up.count(Kind::Codes, codes);
            Some(Outcome { client, server: client, seconds: 1.0 })
        };
        let mut row = Row { cell, once: outcome(8_000), twice: None };
        assert_eq!((row.deviation(&bench, &shape), row.outcomes(&bench).count()), (None, 1));
        assert_eq!(row.scaled(&bench, &shape, 1000).map(|t| t.up.codes), Some(1_000_000));
        row.twice = outcome(34_000);
        assert_eq!(row.deviation(&bench, &shape).map(|d| d.worst), Some(0.0));
        row.twice = outcome(68_000);
        assert_eq!(row.deviation(&bench, &shape).map(|d| d.worst), Some(-0.5));
        assert_eq!(row.scaled(&bench, &shape, 1000).map(|t| t.up.codes), Some(2_000_000));
    }

    #[test]
    fn half_a_cache_has_room_for_half_of_the_pictures() {
        let bench = bench();
        let shape = shape(&bench).unwrap();
        let load = load(&bench, Strategy::FedAvg, 8);
        let cells = cells();
        let half = cells.iter().find(|cell| cell.half).unwrap();
        let picture = shape.config.image_tokens() * (shape.config.text.hidden + 2);
        assert_eq!(room(&shape, half, &load).unwrap(), 5 * picture);
        assert_eq!(room(&shape, &cells[0], &load).unwrap(), PLENTY);
    }
}
