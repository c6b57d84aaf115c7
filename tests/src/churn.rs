//! Federations whose people come and go, and large ones: every update counts once, and the counts add up.

use anyhow::Context;
use burn::tensor::Device;
use fednano_server::app::{App, HeldOutSource, ServerSettings};
use fednano_server::llm_host::Order;
use fednano_server::native::{ChannelConnector, Socket, SocketConnector};
use fednano_shared::client::{ClientEvent, Connector, Observer, Outcome, Transport, TransportError};
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::edge::{FeatureCache, NanoEdge};
use fednano_shared::plain::AdapterState;
use fednano_shared::probe::{samples, shard};
use fednano_shared::settings::FederationSettings;
use fednano_shared::wire::{
    self, ClientKind, ClientMessage, Hello, ParticipantId, Purpose, ServerMessage, SessionToken, Status,
};
use fednano_tests::{LIMIT, Server, block, encode, fixture, hello, server_settings, take_part_over};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

const ROUNDS: u32 = 4;
const PEOPLE: usize = 20;
/// 30 % of them.
const RESTLESS: usize = 6;
/// Updates without which no round is merged.
const QUORUM: usize = 3;

// ------------------------------------------------------------------------------------ twenty over sockets

/// Some are selected, some more than needed, late ones are merged; six leave at random, without a word or with one, and return.
pub fn twenty_over_sockets() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let settings = FederationSettings {
            rounds: ROUNDS,
            rank: 2,
            batch_size: 2,
            min_participants: PEOPLE,
            min_updates: QUORUM,
            fraction: 0.6,
            over_selection: 0.2,
            max_staleness: 1,
            grace_s: 2,
            ..Default::default()
        };
        let server = Server::start_model(&fixture(), settings, folder.path()).await?;
        let edge = server.app.held_out.edge.clone();
        let caches = [
            encode(&edge, &shard(DemoTheme::Workshop, 1, 1, 4)).await?,
            encode(&edge, &shard(DemoTheme::Garden, 2, 2, 4)).await?,
        ];
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut numbers: Vec<usize> = (0..PEOPLE).collect();
        numbers.shuffle(&mut rng);
        let mut people: Vec<Person> =
            (0..PEOPLE).map(|n| Person::new(n, numbers[..RESTLESS].contains(&n), &mut rng)).collect();
        let parts = people.iter_mut().map(|p| p.take_part(&edge, &caches[p.number % 2], &server.socket));
        let results = futures_util::future::join_all(parts).await;
        let federation = server.app.federation("test").context("no federation")?;
        let status = federation.finished().await;
        for (person, result) in people.iter().zip(results) {
            let adapter = result.with_context(|| format!("person {}", person.number))?;
            anyhow::ensure!(adapter == federation.adapter(), "person {} ended with other adapters", person.number);
        }
        let gone: usize = people.iter().map(|p| p.log.borrow().departures).sum();
        println!("{gone} departures");
        anyhow::ensure!(gone >= RESTLESS, "only {gone} departures");
        each_counts_once(&people, &status)?;
        server.stop().await
    })
}

/// What was sent, what was said to be accepted, and what the rounds were merged from fit together.
fn each_counts_once(people: &[Person], status: &Status) -> anyhow::Result<()> {
    anyhow::ensure!(status.participants.len() == PEOPLE, "{} participants, not {PEOPLE}", status.participants.len());
    anyhow::ensure!(status.history.len() == ROUNDS as usize + 1, "{} results", status.history.len());
    let mut counted = BTreeSet::new();
    for r in &status.history[1..] {
        println!("round {}: {} in time, {} late", r.round, r.participants.len(), r.late.len());
        anyhow::ensure!(r.participants.len() >= QUORUM, "round {} has too few updates in time: {r:?}", r.round);
        // One round late is the latest that is taken.
        let late = r.late.iter().map(|id| (*id, r.round - 1));
        for (id, round) in r.participants.iter().map(|id| (*id, r.round)).chain(late) {
            anyhow::ensure!(counted.insert((id, round)), "the update of {id:?} for round {round} counts twice");
        }
    }
    let (mut sent, mut accepted) = (BTreeSet::new(), BTreeSet::new());
    for person in people {
        let log = person.log.borrow();
        let id = *log.ids.first().context("somebody never joined")?;
        anyhow::ensure!(log.ids.len() == 1, "person {} was {:?}", person.number, log.ids);
        sent.extend(log.sent.iter().map(|round| (id, *round)));
        // Told twice where one connection had sent it and the next one sent it again.
        accepted.extend(log.accepted.iter().map(|round| (id, *round)));
    }
    // Whoever was away when its update was accepted was not told.
    let unsent: Vec<_> = counted.difference(&sent).collect();
    let dropped: Vec<_> = accepted.difference(&counted).collect();
    anyhow::ensure!(unsent.is_empty(), "merged, but never sent: {unsent:?}");
    anyhow::ensure!(dropped.is_empty(), "accepted, but never merged: {dropped:?}");
    Ok(())
}

/// A participant, and when it goes away.
struct Person {
    number: usize,
    plan: VecDeque<Departure>,
    log: Rc<RefCell<Log>>,
}

#[derive(Clone, Copy)]
struct Departure {
    /// After so many frames of a connection, in both directions.
    after: u32,
    /// Says goodbye, or just vanishes.
    politely: bool,
}

/// What a participant did and heard.
#[derive(Default)]
struct Log {
    ids: BTreeSet<ParticipantId>,
    token: Option<SessionToken>,
    sent: BTreeSet<u32>,
    accepted: Vec<u32>,
    departures: usize,
}

impl Person {
    fn new(number: usize, restless: bool, rng: &mut ChaCha8Rng) -> Self {
        let departures = if restless { rng.random_range(2..6) } else { 0 };
        let plan = (0..departures)
            .map(|_| Departure { after: rng.random_range(3..12), politely: rng.random_bool(0.4) })
            .collect();
        Self { number, plan, log: Rc::default() }
    }

    /// To the end, whatever happens on the way.
    async fn take_part(&mut self, edge: &NanoEdge, cache: &FeatureCache, socket: &str) -> anyhow::Result<AdapterState> {
        let inner = SocketConnector::new(socket, CancellationToken::new());
        let mut connector = Restless { inner, plan: std::mem::take(&mut self.plan), log: self.log.clone() };
        let mut hello = hello(&format!("person-{}", self.number), cache.samples.len(), Purpose::Train);
        loop {
            let mut observer = Keeps(self.log.clone());
            match take_part_over(edge, cache, hello.clone(), &mut connector, &mut observer).await? {
                Outcome::Finished { adapter, .. } => return Ok(adapter),
                Outcome::Left => hello.resume = self.log.borrow().token.clone(),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Keeps number and token.
struct Keeps(Rc<RefCell<Log>>);

impl Observer for Keeps {
    fn event(&mut self, event: ClientEvent<'_>) {
        if let ClientEvent::Joined { participant, token, .. } = event {
            let mut log = self.0.borrow_mut();
            log.ids.insert(participant);
            log.token = Some(token.clone());
        }
    }
}

/// Makes connections that do not last, as long as there is a plan.
struct Restless {
    inner: SocketConnector,
    plan: VecDeque<Departure>,
    log: Rc<RefCell<Log>>,
}

impl Connector for Restless {
    type Transport = Watched;

    async fn connect(&mut self) -> Result<Watched, TransportError> {
        let socket = self.inner.connect().await?;
        Ok(Watched { socket, departure: self.plan.pop_front(), frames: 0, log: self.log.clone() })
    }
}

struct Watched {
    socket: Socket,
    departure: Option<Departure>,
    frames: u32,
    log: Rc<RefCell<Log>>,
}

impl Watched {
    fn go_on(&mut self) -> Result<(), TransportError> {
        self.frames += 1;
        let Some(departure) = self.departure.filter(|d| self.frames > d.after) else { return Ok(()) };
        self.departure = None; // so that a goodbye gets through
        self.log.borrow_mut().departures += 1;
        Err(if departure.politely { TransportError::Left } else { TransportError::Lost("away".into()) })
    }
}

impl Transport for Watched {
    async fn send(&mut self, frame: Vec<u8>) -> Result<(), TransportError> {
        self.go_on()?;
        if let Ok(ClientMessage::Update(update)) = wire::decode(&frame) {
            self.log.borrow_mut().sent.insert(update.round);
        }
        self.socket.send(frame).await
    }

    async fn receive(&mut self) -> Result<Vec<u8>, TransportError> {
        self.go_on()?;
        let frame = self.socket.receive().await?;
        if let Ok(ServerMessage::UpdateAccepted { round }) = wire::decode(&frame) {
            self.log.borrow_mut().accepted.push(round);
        }
        Ok(frame)
    }
}

// ------------------------------------------------------------------------------------ a hundred in one process

const CROWD: usize = 100;
const CROWD_ROUNDS: u32 = 2;

/// A hundred simulated clients side by side: the counts add up, and a second run gives the same adapters bit for bit; then three
/// tenths of them a round.
pub fn hundred_in_lockstep() -> anyhow::Result<()> {
    block(LIMIT, async {
        let first = crowd(1.0).await?;
        anyhow::ensure!(first.of_each_round == [CROWD; CROWD_ROUNDS as usize], "{:?}", first.of_each_round);
        anyhow::ensure!(crowd(1.0).await?.bits == first.bits, "a second run gave other adapters");
        let sampled = crowd(0.3).await?;
        anyhow::ensure!(sampled.of_each_round == [30; CROWD_ROUNDS as usize], "{:?}", sampled.of_each_round);
        anyhow::ensure!(sampled.bits != first.bits, "a sample is as good as all");
        Ok(())
    })
}

struct Crowd {
    of_each_round: Vec<usize>,
    bits: Vec<u32>,
}

async fn crowd(fraction: f64) -> anyhow::Result<Crowd> {
    let folder = tempfile::tempdir()?;
    let settings = FederationSettings {
        rounds: CROWD_ROUNDS,
        rank: 2,
        batch_size: 2,
        min_participants: CROWD,
        fraction,
        round_deadline_s: 86_400,
        ..Default::default()
    };
    let settings = server_settings(fixture(), HeldOutSource::Data(samples()), settings, folder.path());
    let settings = ServerSettings { order: Order::Lockstep, ..settings };
    let app = App::start(settings, &Device::flex(), CancellationToken::new()).await?;
    let edge = app.held_out.edge.clone();
    let mut caches = Vec::new();
    for seed in 0..10 {
        caches.push(Rc::new(encode(&edge, &shard(DemoTheme::Harbour, seed, 1, 2 + seed as usize % 3)).await?));
    }
    let mut tasks = Vec::new();
    for number in 0..CROWD {
        let (joined, seen) = oneshot::channel();
        let (connector, cache) = (ChannelConnector(app.shared()), caches[number % caches.len()].clone());
        tasks.push(tokio::task::spawn_local(simulated(number, edge.clone(), cache, connector, joined)));
        // Numbers follow the order of joining.
        seen.await.context("a simulated client could not join")?;
    }
    let mut told = Vec::new();
    for task in tasks {
        told.push(task.await??);
    }
    let federation = app.federation("test").context("no federation")?;
    let status = federation.finished().await;
    app.stop().await;
    let mut of_each_round = Vec::new();
    for r in &status.history[1..] {
        anyhow::ensure!(r.late.is_empty() && r.participants.is_sorted_by(|a, b| a < b), "round {}: {r:?}", r.round);
        for told in &told {
            // Everybody knows: the own update counts, or it was somebody else's turn.
            let counts = r.participants.contains(&told.id);
            anyhow::ensure!(
                counts == told.uploaded.contains(&r.round) && counts != told.waited.contains(&r.round),
                "round {}: {:?} uploaded in {:?}, waited in {:?}",
                r.round,
                told.id,
                told.uploaded,
                told.waited
            );
        }
        of_each_round.push(r.participants.len());
    }
    let uploads: usize = told.iter().map(|t| t.uploaded.len()).sum();
    anyhow::ensure!(uploads == of_each_round.iter().sum::<usize>(), "{uploads} updates, merged {of_each_round:?}");
    let bits = federation.adapter().0.values().flat_map(|b| &b.data).map(|v| v.to_bits()).collect();
    Ok(Crowd { of_each_round, bits })
}

async fn simulated(
    number: usize,
    edge: Arc<NanoEdge>,
    cache: Rc<FeatureCache>,
    mut connector: ChannelConnector,
    joined: oneshot::Sender<()>,
) -> anyhow::Result<Told> {
    let name = format!("client-{}", number + 1);
    let hello = Hello { kind: ClientKind::Simulated, ..hello(&name, cache.samples.len(), Purpose::Train) };
    let mut told = Told { id: ParticipantId(0), uploaded: Vec::new(), waited: BTreeSet::new(), joined: Some(joined) };
    match take_part_over(&edge, &cache, hello, &mut connector, &mut told).await? {
        Outcome::Finished { .. } => Ok(told),
        Outcome::Left => anyhow::bail!("{name} left"),
    }
}

/// Rounds in which the own update counts, and those that somebody else trained in.
struct Told {
    id: ParticipantId,
    uploaded: Vec<u32>,
    waited: BTreeSet<u32>,
    joined: Option<oneshot::Sender<()>>,
}

impl Observer for Told {
    fn event(&mut self, event: ClientEvent<'_>) {
        match event {
            ClientEvent::Joined { participant, .. } => {
                self.id = participant;
                if let Some(joined) = self.joined.take() {
                    let _ = joined.send(());
                }
            }
            ClientEvent::Uploaded { round, .. } => self.uploaded.push(round),
            ClientEvent::Waiting { round, .. } => drop(self.waited.insert(round)),
            _ => {}
        }
    }
}
