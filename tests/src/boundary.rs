//! The boundary over real connections: both modes train alike, number formats, features sent once, overlap, what is agreed on, and
//! that nothing is sent which the other side has or which is padding.

mod agreed;
mod formats;
mod lean;
mod refused;
mod timeline;

pub use agreed::{asking_in_every_setting, auto_by_shapes, only_what_is_offered};
pub use formats::{deflated_is_the_same, formats_train};
pub use lean::{every_table_form, padding_costs_nothing, text_goes_as_ids};
pub use refused::out_of_range;
pub use timeline::{timeline, trace_if_asked};

use anyhow::{Context, ensure};
use fednano_server::app::{HeldOutSource, ServerSettings};
use fednano_server::coordinator::{Federation, Ledger};
use fednano_server::llm_host::Order;
use fednano_server::native::SocketConnector;
use fednano_shared::client::keep::token_of;
use fednano_shared::client::{ClientEvent, Observer, Outcome};
use fednano_shared::data::dataset::Dataset;
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::edge::{FeatureCache, NanoEdge};
use fednano_shared::ledger::Traffic;
use fednano_shared::plain::{AdapterState, TensorBlob};
use fednano_shared::probe::{samples, shard};
use fednano_shared::settings::{AdapterChoice, BoundaryChoice, FederationSettings, OptimizerKind, Overlap, Strategy};
use fednano_shared::wire::agreement::Agreement;
use fednano_shared::wire::numbers::PictureKey;
use fednano_shared::wire::{ClientMessage, ServerMessage, Update};
use fednano_tests::tap::{Frames, Said, Tap};
use fednano_tests::{
    LIMIT, MODES, Notes, Server, adapters_close, block, encode, fixture, introduction, server_settings, take_part_once,
    take_part_over,
};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

// ------------------------------------------------------------------------------------ a participation

/// A federation of one participant on the reference checkpoint: what goes over its connection, and what comes of it.
pub(crate) struct Ran {
    pub(crate) update: Update,
    pub(crate) losses: Vec<f32>,
    pub(crate) frames: Frames,
    pub(crate) agreement: Agreement,
    /// The federation's adapters at the beginning.
    pub(crate) start: AdapterState,
    /// As the server counted it.
    pub(crate) traffic: Traffic,
}

/// Losses of all steps.
#[derive(Default)]
struct Losses(Vec<f32>);

impl Observer for Losses {
    fn event(&mut self, event: ClientEvent<'_>) {
        if let ClientEvent::Step { loss, .. } = event {
            self.0.push(loss);
        }
    }
}

/// Twelve questions to four pictures, four without: batches of 6 in parts of 4 and 2.
pub(crate) fn mixed() -> Dataset {
    let mut data = shard(DemoTheme::Garden, 3, 4, 3);
    data.append(words_only(shard(DemoTheme::Workshop, 5, 2, 2)));
    data
}

/// The same questions without their pictures.
pub(crate) fn words_only(mut data: Dataset) -> Dataset {
    data.pictures.clear();
    data.samples.iter_mut().for_each(|s| s.picture = None);
    data
}

pub(crate) fn settings(boundary: BoundaryChoice) -> FederationSettings {
    FederationSettings {
        boundary,
        rounds: 1,
        rank: 4,
        local_steps: 50,
        batch_size: 6,
        micro_batch: 4,
        learning_rate: 0.01,
        fisher_samples: 0,
        ..FederationSettings::exact()
    }
}

/// A server of the reference checkpoint that computes each request by itself, so that nothing depends on what waits beside it.
pub(crate) struct Scene {
    pub(crate) server: Server,
    pub(crate) edge: Arc<NanoEdge>,
    pub(crate) cache: FeatureCache,
    _folder: tempfile::TempDir,
}

impl Scene {
    pub(crate) async fn open(data: &Dataset, settings: FederationSettings) -> anyhow::Result<Self> {
        Self::with(data, settings, |_| {}).await
    }

    async fn with(
        data: &Dataset,
        settings: FederationSettings,
        change: impl FnOnce(&mut ServerSettings),
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut server = server_settings(fixture(), HeldOutSource::Data(samples()), settings, folder.path());
        server.order = Order::Arrival { merge: false };
        change(&mut server);
        let server = Server::start_with(server).await?;
        let edge = server.app.held_out.edge.clone();
        let cache = encode(&edge, data).await?;
        Ok(Self { server, edge, cache, _folder: folder })
    }

    fn tap(&self) -> Tap<SocketConnector> {
        Tap::new(SocketConnector::new(&self.server.socket, CancellationToken::new()))
    }

    /// Take part to the end over connections that break where `tap` says.
    async fn run(self, mut tap: Tap<SocketConnector>) -> anyhow::Result<Ran> {
        let start = self.adapter()?;
        let (hello, mut losses) = (introduction("one", &self.edge, &self.cache), Losses::default());
        let outcome = take_part_over(&self.edge, &self.cache, hello, &mut tap, &mut losses).await?;
        ensure!(matches!(outcome, Outcome::Finished { .. }), "it did not finish");
        let ledger = self.settled(&tap.frames).await?;
        self.ran(start, tap.frames, losses.0, &ledger).await
    }

    fn federation(&self) -> anyhow::Result<Federation> {
        self.server.app.federation("test").context("no federation")
    }

    fn adapter(&self) -> anyhow::Result<AdapterState> {
        Ok(self.federation()?.adapter())
    }

    /// The server's count once it has everything that the participant sent; sessions hand it over once a second, and at their end. Of
    /// connections that broke it may never have all.
    async fn settled(&self, frames: &Frames) -> anyhow::Result<Ledger> {
        let sent: usize = frames.raw_up().iter().map(Vec::len).sum();
        let end = Instant::now() + Duration::from_secs(if frames.connections() == 1 { 30 } else { 2 });
        loop {
            let ledger = self.federation()?.ledger().await.context("the federation has ended")?;
            if ledger.total.up.total() == sent as u64 || Instant::now() > end {
                return Ok(ledger);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn ran(self, start: AdapterState, frames: Frames, losses: Vec<f32>, ledger: &Ledger) -> anyhow::Result<Ran> {
        let [me] = &ledger.participants[..] else { anyhow::bail!("{:?}", ledger.participants) };
        let traffic = me.total;
        self.server.stop().await?;
        let update = frames.up().into_iter().find_map(|message| match message {
            ClientMessage::Update(update) => Some(update),
            _ => None,
        });
        let agreement = frames.down().into_iter().find_map(|message| match message {
            ServerMessage::Welcome { agreement, .. } => Some(agreement),
            _ => None,
        });
        let (update, agreement) = (update.context("no update")?, agreement.context("no welcome")?);
        Ok(Ran { update, losses, frames, agreement, start, traffic })
    }
}

/// Take part to the end.
pub(crate) async fn run(data: &Dataset, settings: FederationSettings) -> anyhow::Result<Ran> {
    let scene = Scene::open(data, settings).await?;
    let tap = scene.tap();
    scene.run(tap).await
}

/// Every value as it is stored.
fn bits(state: &AdapterState) -> Vec<u32> {
    state.0.values().flat_map(|blob| &blob.data).map(|v| v.to_bits()).collect()
}

/// `after - before`.
fn way(after: &AdapterState, before: &AdapterState) -> AdapterState {
    let mut way = before.clone();
    way.scale(-1.0);
    way.add(after);
    way
}

/// Root of the summed squares.
fn length(state: &AdapterState) -> f64 {
    state.0.values().flat_map(|b| &b.data).map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

/// How far off two ways from the same start end, over the way's own length.
fn apart(got: &Ran, want: &Ran) -> f64 {
    length(&way(&got.update.adapter, &want.update.adapter)) / length(&way(&want.update.adapter, &want.start))
}

/// Pictures whose features were sent, each as often as it was.
fn pictures_sent(frames: &Frames) -> Vec<PictureKey> {
    let of = |message| match message {
        ClientMessage::Features { pictures, .. } => pictures.into_iter().map(|(key, _)| key).collect(),
        _ => Vec::new(),
    };
    frames.up().into_iter().flat_map(of).collect()
}

fn different(keys: &[PictureKey]) -> usize {
    keys.iter().collect::<BTreeSet<_>>().len()
}

// ------------------------------------------------------------------------------------ both modes

/// Optimisers with their rates, and how far apart the two modes may end after 50 steps, over the longest way that a value has gone. The
/// two compute the same sums in another order, which is off by 1e-6 or so at each step. SGD hands that on as it is. AdamW divides each
/// gradient by its own size, so that the same noise weighs a thousand times as much where a gradient is a thousandth of the largest.
const ALIKE: [(OptimizerKind, f64, f64); 2] = [(OptimizerKind::Sgd, 0.1, 1e-4), (OptimizerKind::AdamW, 0.005, 5e-3)];
/// Of a value itself: each of 50 steps rounds it to 24 bits, in either mode to another neighbour perhaps.
const ROUNDED: f64 = 50.0 / 16_777_216.0;

/// 50 steps from the same seed in each mode, in f32 over sockets: with pictures and without in a batch, with both adapters, in
/// parts; and with text alone. Losses, Fisher values and adapters are the same.
pub fn both_modes_train_alike() -> anyhow::Result<()> {
    block(LIMIT * 2, async {
        let words = words_only(shard(DemoTheme::Garden, 3, 4, 3));
        for (data, what) in [(mixed(), "with pictures"), (words, "text alone")] {
            for (optimizer, rate, limit) in ALIKE {
                for strategy in [Strategy::Fisher, Strategy::FisherEf] {
                    let mut ran = Vec::new();
                    for (boundary, mode) in MODES {
                        let settings = FederationSettings {
                            optimizer,
                            learning_rate: rate,
                            strategy,
                            adapters: AdapterChoice::Both,
                            ..settings(boundary)
                        };
                        let one = run(&data, settings).await?;
                        ensure!(one.agreement.mode == mode, "{:?} was agreed on", one.agreement);
                        ensure!(one.losses.len() == 50, "{} steps", one.losses.len());
                        ran.push(one);
                    }
                    let [whole, short] = &ran[..] else { anyhow::bail!("{} modes", ran.len()) };
                    alike(&format!("{what}, {optimizer}, {strategy}"), short, whole, limit)?;
                }
            }
        }
        Ok(())
    })
}

fn alike(what: &str, short: &Ran, whole: &Ran, limit: f64) -> anyhow::Result<()> {
    ensure!(short.start == whole.start, "{what}: they begin with different adapters");
    let (got, want) = (way(&short.update.adapter, &short.start), way(&whole.update.adapter, &whole.start));
    let text = want.0["text.up"].data.iter().all(|v| *v == 0.0);
    ensure!(!text && length(&want) > 0.0, "{what}: nothing was learned");
    for (name, want) in &want.0 {
        let largest = |blob: &TensorBlob| blob.data.iter().fold(0f32, |m, v| m.max(v.abs()));
        let worst = got.0[name].data.iter().zip(&want.data).fold(0f32, |m, (g, w)| m.max((g - w).abs()));
        let (way, value) = (f64::from(largest(want)), f64::from(largest(&whole.update.adapter.0[name])));
        let most = limit * way + ROUNDED * value;
        println!("{what}: {name} is {worst:.1e} off after a way of {way:.1e}, limit {most:.1e}");
        ensure!(f64::from(worst) <= most, "{what}: {name} is {worst:.2e} off, the limit is {most:.1e}");
    }
    let fisher = |ran: &Ran| ran.update.fisher.clone().context("no Fisher values");
    // Squares double what is relative.
    adapters_close(&format!("{what}: Fisher"), &fisher(short)?, &fisher(whole)?, 2.0 * limit)?;
    for (step, (got, want)) in short.losses.iter().zip(&whole.losses).enumerate() {
        ensure!((got - want).abs() < 1e-3 * want.abs(), "{what}: step {step}: loss {got} and {want}");
    }
    Ok(())
}

/// The last steps' losses are lower than the first's.
fn falls(what: &str, ran: &Ran) -> anyhow::Result<f32> {
    ensure!(ran.losses.iter().all(|l| l.is_finite()), "{what}: {:?}", ran.losses);
    let mean = |losses: &[f32]| losses.iter().sum::<f32>() / losses.len() as f32;
    let (first, last) = (mean(&ran.losses[..5]), mean(&ran.losses[ran.losses.len() - 5..]));
    println!("{what}: loss {first:.3} -> {last:.3}");
    ensure!(last < first - 0.02, "{what}: loss {first} -> {last}");
    Ok(last)
}

// ------------------------------------------------------------------------------------ features once

/// A store that cannot hold one batch's pictures asks for them again and again: no step fails, and nothing is another number.
pub fn small_store() -> anyhow::Result<()> {
    block(LIMIT, async {
        let data = mixed();
        let settings = FederationSettings { local_steps: 12, ..settings(BoundaryChoice::LowRank) };
        let large = run(&data, settings.clone()).await?;
        let sent = pictures_sent(&large.frames);
        ensure!(sent.len() == 4 && different(&sent) == 4, "with room for all, pictures were sent as {sent:?}");
        let picture = large.traffic.up.features / 4;
        for bytes in [0, picture as usize, 2 * picture as usize] {
            let scene = Scene::with(&data, settings.clone(), |server| server.feature_cache = bytes).await?;
            let tap = scene.tap();
            let small = scene.run(tap).await?;
            let again = pictures_sent(&small.frames);
            let missing = small.frames.down().iter().filter(|m| matches!(m, ServerMessage::Missing { .. })).count();
            println!("room for {bytes} bytes: {} pictures sent, {missing} calls for some", again.len());
            ensure!(again.len() > 4 && missing > 0, "nothing was asked for again: nothing is tested");
            ensure!(different(&again) == 4, "other pictures than there are: {again:?}");
            ensure!(small.losses == large.losses, "other losses: {:?} and {:?}", small.losses, large.losses);
            ensure!(bits(&small.update.adapter) == bits(&large.update.adapter), "other adapters");
            ensure!(small.update == large.update, "another update");
            let refused = small.frames.down().iter().any(|m| matches!(m, ServerMessage::RequestRefused { .. }));
            ensure!(!refused, "a request was refused");
        }
        Ok(())
    })
}

/// Whoever comes back, after a break or with another program's run, sends no features that the server still has.
pub fn features_once() -> anyhow::Result<()> {
    block(LIMIT, async {
        let data = mixed();
        let settings = FederationSettings { local_steps: 12, ..settings(BoundaryChoice::LowRank) };
        let calm = run(&data, settings.clone()).await?;

        // Connections that break.
        let scene = Scene::open(&data, settings.clone()).await?;
        let mut tap = scene.tap();
        // A pass over the samples, and so all pictures, is in the first 40 frames.
        tap.breaks = [40, 9, 14].into();
        let ran = scene.run(tap).await?;
        ensure!(ran.frames.connections() == 4, "{} connections", ran.frames.connections());
        let sent = pictures_sent(&ran.frames);
        ensure!(sent.len() == 4 && different(&sent) == 4, "over four connections pictures were sent as {sent:?}");
        ensure!(ran.update == calm.update, "the breaks change the update");

        // A program that ends and is started again, with nothing but its snapshot.
        let scene = Scene::open(&data, settings).await?;
        let (start, mut notes, mut losses) = (scene.adapter()?, Notes::default(), Losses::default());
        let mut first = scene.tap();
        first.breaks = [40].into();
        let hello = introduction("one", &scene.edge, &scene.cache);
        let ended = take_part_once(&scene.edge, &scene.cache, hello, &mut first, &mut notes, &mut losses).await;
        ensure!(ended.is_err() && !losses.0.is_empty(), "it was not interrupted in its steps: {:?}", losses.0);
        let mut hello = introduction("one", &scene.edge, &scene.cache);
        hello.resume = notes.0.as_deref().and_then(token_of);
        ensure!(hello.resume.is_some(), "nothing was kept");
        let mut second = scene.tap();
        let outcome = take_part_once(&scene.edge, &scene.cache, hello, &mut second, &mut notes, &mut losses).await?;
        ensure!(matches!(outcome, Outcome::Finished { .. }), "it did not finish");
        let all = [pictures_sent(&first.frames), pictures_sent(&second.frames)].concat();
        ensure!(all.len() == 4 && different(&all) == 4, "over a reload pictures were sent as {all:?}");
        let ledger = scene.federation()?.ledger().await.context("the federation has ended")?;
        let ran = scene.ran(start, second.frames, losses.0, &ledger).await?;
        ensure!(ran.update == calm.update, "the reload changes the update");
        Ok(())
    })
}

// ------------------------------------------------------------------------------------ overlap

/// The next part is computed and sent while the server works on this one: the result is the same, bit for bit.
pub fn overlap_changes_nothing() -> anyhow::Result<()> {
    block(LIMIT, async {
        let data = mixed();
        for (boundary, _) in MODES {
            for strategy in [Strategy::Fisher, Strategy::FisherEf] {
                let mut ran = Vec::new();
                for overlap in [Overlap::Off, Overlap::Parts] {
                    let settings =
                        FederationSettings { overlap, strategy, local_steps: 12, micro_batch: 2, ..settings(boundary) };
                    let one = run(&data, settings).await?;
                    ensure!(one.agreement.overlap == overlap, "{:?} was agreed on", one.agreement);
                    ran.push(one);
                }
                let [off, parts] = &ran[..] else { anyhow::bail!("{} runs", ran.len()) };
                let what = format!("{boundary}, {strategy}");
                ensure!(off.losses == parts.losses, "{what}: other losses: {:?} and {:?}", off.losses, parts.losses);
                ensure!(off.update == parts.update, "{what}: another update");
                ensure!(bits(&off.update.adapter) == bits(&parts.update.adapter), "{what}: other adapters");
                // Nothing else goes over the line, but two requests are under way at times.
                let most = (unanswered(&off.frames), unanswered(&parts.frames));
                ensure!(most == (1, 2), "{what}: {most:?} requests under way");
                ensure!(off.traffic.up.codes == parts.traffic.up.codes, "{what}: other bytes");
            }
        }
        Ok(())
    })
}

/// Most training requests under way at once, as the order of the frames tells.
fn unanswered(frames: &Frames) -> usize {
    let (mut now, mut most) = (0usize, 0);
    for said in frames.said() {
        match said {
            Said::Up(ClientMessage::Train { .. }) => now += 1,
            Said::Down(ServerMessage::Trained { .. }) => now -= 1,
            _ => {}
        }
        most = most.max(now);
    }
    most
}

/// One step behind: another result, which is learned all the same, and an end.
pub fn stale_trains() -> anyhow::Result<()> {
    block(LIMIT, async {
        let data = mixed();
        for (boundary, _) in MODES {
            let settings = FederationSettings { local_steps: 30, micro_batch: 0, rounds: 2, ..settings(boundary) };
            let prompt = run(&data, settings.clone()).await?;
            let stale = run(&data, FederationSettings { overlap: Overlap::Stale, ..settings }).await?;
            ensure!(stale.agreement.overlap == Overlap::Stale, "{:?} was agreed on", stale.agreement);
            ensure!(stale.losses.len() == 60, "{boundary}: {} steps", stale.losses.len());
            falls(&format!("{boundary}, stale"), &stale)?;
            let off = apart(&stale, &prompt);
            println!("{boundary}: {off:.1e} from where prompt steps end");
            ensure!(off > 1e-3, "{boundary}: as prompt steps: nothing was stale");
            ensure!(off < 1.0, "{boundary}: {off} from where prompt steps end, which is farther than their whole way");
            ensure!(unanswered(&stale.frames) == 2, "{boundary}: {} requests under way", unanswered(&stale.frames));
        }
        Ok(())
    })
}
