//! One federation from its beginning to its end: a coordinator with its store, and all clients in this process over channels. The
//! host computes in lockstep, so the same seed gives the same adapters bit for bit on the CPU.

use super::config::Simulation;
use super::figures::{Bytes, ClientFigures, Figures, RoundFigures, Tested, short};
use super::merges::{self, Rule};
use super::stage::{Exam, Stage, judge};
use super::tap::{Heard, Tapped};
use crate::coordinator::{self, Federation, Founding, Ledger};
use crate::held_out::HeldOut;
use crate::llm_host::LlmHandle;
use crate::native::{ChannelConnector, TokioClock};
use crate::session::Shared;
use crate::store::Store;
use anyhow::Context;
use fednano_shared::client::{ClientEvent, Forgetful, Observer, Outcome, Participant, participate, test_samples};
use fednano_shared::edge::FeatureCache;
use fednano_shared::ledger::Traffic;
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::{FederationSettings, Strategy};
use fednano_shared::step::Evaluation;
use fednano_shared::wire::agreement::Offer;
use fednano_shared::wire::{ClientKind, Hello, LocalEvaluation, ParticipantId, Purpose, RoundResult, Status};
use futures_util::stream::{FuturesUnordered, StreamExt};
use serde::Serialize;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// What is to be run.
pub struct Run<'a> {
    /// Name of the federation: letters, digits, `-` and `_`.
    pub name: &'a str,
    /// Who holds what.
    pub simulation: &'a Simulation,
    /// What is agreed; its seed deals the samples too.
    pub settings: &'a FederationSettings,
    /// Rules by which each round's updates are merged beside.
    pub rules: &'a [Rule],
    /// Folder of the store.
    pub folder: &'a Path,
}

/// Hears how a run goes on.
pub struct Watch<'a> {
    /// An update was accepted.
    pub update: &'a dyn Fn(),
    /// A round is done.
    pub round: &'a dyn Fn(&RoundLine<'_>),
}

/// A round, as it is written down while a run goes on.
#[derive(Debug, Clone, Serialize)]
pub struct RoundLine<'a> {
    /// Name of the run.
    pub run: &'a str,
    /// Its strategy.
    pub strategy: Strategy,
    /// Its seed.
    pub seed: u64,
    /// Number of the round; 0 is the untouched model.
    pub round: u32,
    /// With the samples used after each round.
    pub accuracy: f64,
    /// The same, nats.
    pub loss: f64,
    /// How many those are.
    pub samples: usize,
    /// Mean loss of the participants' training.
    pub training_loss: Option<f32>,
    /// Means of the participants' judgements on their own test samples.
    pub local: Option<LocalEvaluation>,
    /// Whose updates were merged.
    pub participants: &'a [ParticipantId],
    /// Whose late ones.
    pub late: &'a [ParticipantId],
    /// Bytes of all participants since the beginning, by direction and kind, as reported so far: sessions do it once a second.
    pub bytes: Traffic,
    /// From broadcast to evaluated.
    pub seconds: f64,
}

/// What came of it.
pub struct Done {
    /// What is the same each time.
    pub figures: Figures,
    /// The federation's adapters.
    pub adapter: AdapterState,
    /// Round by round, with times.
    pub history: Vec<RoundResult>,
    /// Bytes by client, control messages included.
    pub traffic: Vec<Traffic>,
    /// The same by round.
    pub ledger: Ledger,
    /// Seconds in all.
    pub seconds: f64,
}

/// Sessions have so long to end once their clients are done.
const SETTLE: Duration = Duration::from_secs(60);
/// Finished rounds are looked for this often.
const LOOK: Duration = Duration::from_millis(100);

/// Run it. One run at a time on a host.
///
/// # Errors
/// Samples that cannot be dealt or encoded; a federation that fails; a client that does not get to the end.
pub async fn run(stage: &Stage, host: &LlmHandle, run: &Run<'_>, watch: &Watch<'_>) -> anyhow::Result<Done> {
    let started = Instant::now();
    let settings = run.settings;
    let exam = stage.exam(run.simulation).await?;
    let zero_shot = exam.zero_shot(host).await?;
    let sets = sets(stage, run).await?;

    let founding = Founding {
        name: run.name.to_owned(),
        settings: settings.clone(),
        model: stage.model.clone(),
        model_dir: stage.model_dir.clone(),
        dim: stage.dim,
    };
    let store = Store::open(run.folder, run.name)?;
    let federation = coordinator::start(founding, host.clone(), exam.held_out.clone(), store)?;
    let federations = BTreeMap::from([(run.name.to_owned(), federation.clone())]);
    let shared = Shared::new(federations, host.clone(), CancellationToken::new(), &stage.side);
    let heard = (!run.rules.is_empty()).then(Rc::<RefCell<Heard>>::default);
    let rounds = Rounds { run, watch, told: Cell::new(0) };
    let outcomes = tokio::select! {
        outcomes = clients(run, &sets, &shared, heard.as_ref(), watch) => outcomes,
        cause = federation.failed() => Err(anyhow::anyhow!("the federation has stopped: {cause}")),
        () = rounds.follow(&federation) => Err(anyhow::anyhow!("nobody follows the rounds any more")), // it does not end
    };
    let outcomes = outcomes.with_context(|| format!("the run '{}' broke off", run.name))?;
    let status = settled(&federation).await;
    rounds.tell(&status);
    let ledger = federation.ledger().await.context("the federation has ended before its bytes were added up")?;
    let adapter = federation.adapter();
    federation.stop().await;
    host.release_all(); // whatever is still expected of this federation, nobody will send

    let own: Vec<Option<AdapterState>> = outcomes.into_iter().map(own_adapter).collect::<anyhow::Result<_>>()?;
    let traffic: Vec<Traffic> = ledger.participants.iter().map(|p| p.total).collect();
    let merges = match heard {
        Some(heard) => {
            let known: BTreeMap<u32, Evaluation> = status.history.iter().map(|r| (r.round, r.held_out)).collect();
            merges::compare(run.rules, &heard.take(), &adapter, &known, &exam, host).await?
        }
        None => Vec::new(),
    };
    // Alone, nobody changes the federation's adapters.
    let alone = settings.strategy == Strategy::Local;
    let figures = Figures {
        baselines: (short(exam.baselines.0), short(exam.baselines.1)),
        global: if alone { zero_shot.clone() } else { exam.judge(Some(&adapter), host).await? },
        zero_shot,
        rounds: status.history.iter().map(RoundFigures::of).collect(),
        own: judge_own(&own, &exam, host).await?,
        clients: judge_locally(&sets, &own, &adapter, host).await?,
        bytes: Bytes::mean(&traffic),
        merges,
    };
    let seconds = started.elapsed().as_secs_f64();
    Ok(Done { figures, adapter, history: status.history, traffic, ledger, seconds })
}

/// Each client's samples; `rows` are those that it never trains on.
async fn sets(stage: &Stage, run: &Run<'_>) -> anyhow::Result<Vec<Arc<HeldOut>>> {
    let settings = run.settings;
    let caches = stage.clients(run.simulation, settings.strategy, settings.seed).await?;
    let set = |(id, cache): (u32, FeatureCache)| {
        let rows = test_samples(settings, ParticipantId(id), cache.samples.len());
        Arc::new(HeldOut { edge: stage.edge.clone(), cache, rows, device: stage.device.clone() })
    };
    Ok((1..).zip(caches).map(set).collect())
}

/// All clients to their end; none may leave.
async fn clients(
    run: &Run<'_>,
    sets: &[Arc<HeldOut>],
    shared: &Shared,
    heard: Option<&Rc<RefCell<Heard>>>,
    watch: &Watch<'_>,
) -> anyhow::Result<Vec<Outcome>> {
    let mut running = FuturesUnordered::new();
    for (number, set) in sets.iter().enumerate() {
        let (joined, seen) = oneshot::channel();
        let connector = Tapped { inner: ChannelConnector(shared.clone()), number, heard: heard.cloned() };
        let observer = Seen { joined: Some(joined), update: watch.update };
        running.push(client(run.name, number, set, connector, observer));
        // One after the other, so that numbers follow the split.
        tokio::select! {
            biased;
            Some((number, outcome)) = running.next() => {
                outcome?;
                anyhow::bail!("client {} ended before the others were there", number + 1);
            }
            joined = seen => joined.context("a client could not join")?,
        }
    }
    let mut outcomes = BTreeMap::new();
    while let Some((number, outcome)) = running.next().await {
        outcomes.insert(number, outcome?);
    }
    Ok(outcomes.into_values().collect())
}

async fn client(
    federation: &str,
    number: usize,
    set: &HeldOut,
    mut connector: Tapped,
    mut observer: Seen<'_>,
) -> (usize, anyhow::Result<Outcome>) {
    let name = format!("client-{}", number + 1);
    let mut cache = set.cache.clone(); // what it judges with at last stays exact
    let me = Participant {
        hello: Hello {
            federation: federation.to_owned(),
            name: name.clone(),
            kind: ClientKind::Simulated,
            device: "simulated".into(),
            samples: set.cache.samples.len() as u32,
            edge_bytes: 0,
            purpose: Purpose::Train,
            resume: None,
            offer: Offer::of(&set.cache, &set.edge),
            download: None,
        },
        edge: &set.edge,
        cache: &mut cache,
        device: &set.device,
        max_tries: 3,
        keep_every: Duration::MAX,
    };
    let outcome = participate(me, &mut connector, &TokioClock, &mut Forgetful, &mut observer).await;
    (number, outcome.with_context(|| format!("{name} did not get to the end")))
}

/// Says when a client is in, and counts updates.
struct Seen<'a> {
    joined: Option<oneshot::Sender<()>>,
    update: &'a dyn Fn(),
}

impl Observer for Seen<'_> {
    fn event(&mut self, event: ClientEvent<'_>) {
        match event {
            ClientEvent::Joined { .. } => drop(self.joined.take().map(|joined| joined.send(()))),
            ClientEvent::Uploaded { .. } => (self.update)(),
            _ => {}
        }
    }
}

/// Tells of each round once.
struct Rounds<'a> {
    run: &'a Run<'a>,
    watch: &'a Watch<'a>,
    told: Cell<usize>,
}

impl Rounds<'_> {
    async fn follow(&self, federation: &Federation) {
        loop {
            tokio::time::sleep(LOOK).await;
            self.tell(&federation.status());
        }
    }

    fn tell(&self, status: &Status) {
        for r in status.history.iter().skip(self.told.get()) {
            (self.watch.round)(&RoundLine {
                run: self.run.name,
                strategy: self.run.settings.strategy,
                seed: self.run.settings.seed,
                round: r.round,
                accuracy: r.held_out.accuracy,
                loss: r.held_out.loss,
                samples: r.held_out.samples,
                training_loss: r.training_loss,
                local: r.local,
                participants: &r.participants,
                late: &r.late,
                bytes: Traffic::sum(status.participants.iter().map(|p| &p.traffic)),
                seconds: r.seconds,
            });
        }
        self.told.set(status.history.len().max(self.told.get()));
    }
}

/// A federation's status once it is finished and all sessions have ended: only then are all bytes reported.
pub async fn settled(federation: &Federation) -> Status {
    let mut status = federation.finished().await;
    let since = Instant::now();
    while status.participants.iter().any(|p| p.connected) && since.elapsed() < SETTLE {
        tokio::time::sleep(Duration::from_millis(20)).await;
        status = federation.status();
    }
    status
}

fn own_adapter(outcome: Outcome) -> anyhow::Result<Option<AdapterState>> {
    match outcome {
        Outcome::Finished { own, .. } => Ok(own),
        Outcome::Left => anyhow::bail!("a client left"),
    }
}

/// Each client's own adapters with the whole exam, mean over clients; none where they have none.
async fn judge_own(own: &[Option<AdapterState>], exam: &Exam, host: &LlmHandle) -> anyhow::Result<Option<Tested>> {
    let mut judged = Vec::new();
    for adapter in own.iter().flatten() {
        judged.push(exam.judge(Some(adapter), host).await?);
    }
    Ok(Tested::mean(&judged))
}

/// With its own adapters, or else the federation's, each client on its own test samples.
async fn judge_locally(
    sets: &[Arc<HeldOut>],
    own: &[Option<AdapterState>],
    global: &AdapterState,
    host: &LlmHandle,
) -> anyhow::Result<Vec<ClientFigures>> {
    let mut figures = Vec::new();
    for (set, own) in sets.iter().zip(own) {
        let local = if set.rows.is_empty() {
            None
        } else {
            Some(judge(set, Some(own.as_ref().unwrap_or(global)), &set.rows, host).await?)
        };
        let local = local.map(|e| Evaluation { accuracy: short(e.accuracy), loss: short(e.loss), ..e });
        figures.push(ClientFigures { samples: set.cache.samples.len(), local });
    }
    Ok(figures)
}
