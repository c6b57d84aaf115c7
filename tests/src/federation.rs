//! Federations over real sockets and in one process.

use anyhow::Context;
use burn::tensor::Device;
use fednano_server::app::{App, HeldOutSource, ServerSettings, bind};
use fednano_server::native::{Socket, SocketConnector};
use fednano_server::store::{SavedFederation, Store};
use fednano_shared::aggregate::StrategyState;
use fednano_shared::client::{Connector, Outcome, Transport};
use fednano_shared::data::dataset::Dataset;
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::plain::AdapterState;
use fednano_shared::probe::shard;
use fednano_shared::settings::{FederationSettings, Strategy};
use fednano_shared::step::Evaluation;
use fednano_shared::wire::{
    self, ClientMessage, FaultCode, Hello, ParticipantId, Phase, Purpose, RoundResult, ServerMessage, SessionToken,
    Status, Update,
};
use fednano_tests::{Heard, LIMIT, Server, block, encode, hello, nano_llava, server_settings, take_part};
use std::path::Path;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

fn settings() -> FederationSettings {
    FederationSettings { rounds: 2, min_participants: 2, local_epochs: 2, batch_size: 4, ..Default::default() }
}

async fn two_clients(server: &Server) -> anyhow::Result<[(Outcome, Heard); 2]> {
    let edge = server.app.held_out.edge.clone();
    let data = [shard(DemoTheme::Workshop, 1, 40, 4), shard(DemoTheme::Garden, 2, 40, 4)];
    let caches = [encode(&edge, &data[0]).await?, encode(&edge, &data[1]).await?];
    let (mut a, mut b) = (Heard::default(), Heard::default());
    let (first, second) = tokio::join!(take_part(&edge, &caches[0], &server.socket, "a", &mut a), async {
        // Numbers follow the order of joining.
        while server.app.federation("test").is_some_and(|f| f.status().participants.is_empty()) {
            tokio::task::yield_now().await;
        }
        take_part(&edge, &caches[1], &server.socket, "b", &mut b).await
    },);
    Ok([(first?, a), (second?, b)])
}

pub fn two_native_clients() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(settings(), folder.path()).await?;
        let clients = two_clients(&server).await?;
        let federation = server.app.federation("test").ok_or_else(|| anyhow::anyhow!("no federation"))?;
        let status = federation.finished().await;
        anyhow::ensure!(
            status.history.len() == 3,
            "{} results, expected zero-shot and two rounds",
            status.history.len()
        );
        // So few steps show in the loss; accuracy wavers by a few of the 90 questions.
        let (before, after) = (status.history[0].held_out, status.history[2].held_out);
        println!("held out {before:?} -> {after:?}");
        anyhow::ensure!(after.loss < 0.75 * before.loss, "it did not learn: {before:?} -> {after:?}");
        for r in &status.history[1..] {
            anyhow::ensure!(r.participants.len() == 2, "round {} merged {:?}", r.round, r.participants);
        }
        for (outcome, heard) in &clients {
            let same = matches!(outcome, Outcome::Finished { adapter, .. } if *adapter == federation.adapter());
            anyhow::ensure!(same, "a client has other adapters than the server");
            anyhow::ensure!(heard.0.iter().filter(|e| e.starts_with("uploaded")).count() == 2, "{:?}", heard.0);
        }
        for p in &status.participants {
            let t = p.traffic;
            let up = t.up.features + t.up.codes + t.up.activations;
            anyhow::ensure!(
                up > 0 && t.down.gradients > 0 && t.up.adapters > 0 && t.up.fisher > 0 && t.down.adapters > 0,
                "{t:?}"
            );
        }
        server.stop().await
    })
}

pub fn reproducible() -> anyhow::Result<()> {
    block(LIMIT, async {
        let mut results = Vec::new();
        for strategy in [Strategy::Fisher, Strategy::Fisher, Strategy::FedAvg] {
            let folder = tempfile::tempdir()?;
            let settings = FederationSettings { strategy, rounds: 1, local_epochs: 1, ..settings() };
            let server = Server::start(settings, folder.path()).await?;
            two_clients(&server).await?;
            results.push(server.app.federation("test").map(|f| f.adapter()));
            server.stop().await?;
        }
        // Batches of several clients may be merged, which moves the last bits; the strategy moves far more.
        let values = |i: usize| {
            results[i].iter().flat_map(|a| a.0.values()).flat_map(|b| b.data.iter().copied()).collect::<Vec<f32>>()
        };
        let (same, other) =
            (fednano_tests::deviation(&values(1), &values(0)), fednano_tests::deviation(&values(2), &values(0)));
        println!("same strategy {same:.1e}, other strategy {other:.1e}");
        anyhow::ensure!(same < 1e-2, "the same seed gave adapters that differ by {same}");
        anyhow::ensure!(other > 10.0 * same, "the strategy makes no difference: {other} against {same}");
        Ok(())
    })
}

/// Kill the server in mid-round; the client waits, comes back as itself and the federation ends as it should.
pub fn restart() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let settings = FederationSettings { rounds: 3, min_participants: 1, local_epochs: 4, ..Default::default() };
        let server = Server::start(settings.clone(), folder.path()).await?;
        let address = server.address().to_owned();
        let edge = server.app.held_out.edge.clone();
        let cache = encode(&edge, &shard(DemoTheme::Harbour, 3, 16, 4)).await?;
        let socket = server.socket.clone();
        let mut heard = Heard::default();
        let (outcome, restarted) = tokio::join!(take_part(&edge, &cache, &socket, "a", &mut heard), async {
            let federation = server.app.federation("test").ok_or_else(|| anyhow::anyhow!("no federation"))?;
            // In the middle of round 2.
            while federation.status().round < 2 || federation.status().participants[0].progress.0 < 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            server.stop().await?;
            Server::start_on(&address, settings, folder.path()).await
        });
        let restarted = restarted?;
        anyhow::ensure!(matches!(outcome?, Outcome::Finished { .. }), "the client did not finish");
        let status = restarted.app.federation("test").context("no federation")?.finished().await;
        anyhow::ensure!(status.phase == Phase::Finished && status.history.len() == 4, "{status:?}");
        anyhow::ensure!(status.participants.len() == 1, "it came back as somebody else: {:?}", status.participants);
        anyhow::ensure!(
            heard.0.iter().any(|e| e.starts_with("lost")) && heard.0.contains(&"joined resumed=true".to_owned()),
            "{:?}",
            heard.0
        );
        // What was trained before the loss is not trained again.
        let steps: Vec<_> = heard.0.iter().filter(|e| e.starts_with("step 2.")).collect();
        let mut unique = steps.clone();
        unique.dedup();
        anyhow::ensure!(
            steps == unique && heard.0.iter().any(|e| e.starts_with("round 2 from") && e != "round 2 from 0"),
            "{:?}",
            heard.0
        );
        restarted.stop().await
    })
}

/// The same with two: whoever is back first waits for the other, so that no round is merged from one alone.
pub fn restart_with_two() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let settings = FederationSettings { rounds: 3, min_participants: 2, local_epochs: 4, ..Default::default() };
        let server = Server::start(settings.clone(), folder.path()).await?;
        let (address, socket) = (server.address().to_owned(), server.socket.clone());
        let edge = server.app.held_out.edge.clone();
        // The first has less to do: it would be done before a late second one is back.
        let data = [shard(DemoTheme::Workshop, 1, 8, 4), shard(DemoTheme::Garden, 2, 16, 4)];
        let caches = [encode(&edge, &data[0]).await?, encode(&edge, &data[1]).await?];
        let (mut a, mut b) = (Heard::default(), Heard::default());
        let (first, second, restarted) = tokio::join!(
            take_part(&edge, &caches[0], &socket, "a", &mut a),
            take_part(&edge, &caches[1], &socket, "b", &mut b),
            async {
                let federation = server.app.federation("test").context("no federation")?;
                // In the middle of round 2.
                let midway = |s: &Status| s.round >= 2 && s.participants.iter().any(|p| p.progress.0 >= 2);
                while !midway(&federation.status()) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                server.stop().await?;
                Server::start_on(&address, settings, folder.path()).await
            }
        );
        let restarted = restarted?;
        for (outcome, heard) in [(first?, a), (second?, b)] {
            anyhow::ensure!(matches!(outcome, Outcome::Finished { .. }), "a client did not finish");
            anyhow::ensure!(heard.0.contains(&"joined resumed=true".to_owned()), "{:?}", heard.0);
        }
        let status = restarted.app.federation("test").context("no federation")?.finished().await;
        anyhow::ensure!(status.participants.len() == 2, "somebody came back as another: {:?}", status.participants);
        anyhow::ensure!(status.history.len() == 4, "{:?}", status.history);
        for r in &status.history[1..] {
            anyhow::ensure!(r.participants.len() == 2, "round {} was merged from {:?} alone", r.round, r.participants);
        }
        restarted.stop().await
    })
}

/// A participant that says what the test wants.
struct ByHand {
    socket: Socket,
    token: SessionToken,
    status: Status,
}

impl ByHand {
    async fn join(server: &Server, hello: Hello) -> anyhow::Result<Self> {
        let mut socket = SocketConnector::new(&server.socket, CancellationToken::new()).connect().await?;
        socket.send(wire::encode(&ClientMessage::Hello(hello))).await?;
        match wire::decode(&socket.receive().await?)? {
            ServerMessage::Welcome { token, status, .. } => Ok(Self { socket, token, status }),
            other => anyhow::bail!("{other:?} instead of a welcome"),
        }
    }

    /// The next message that is no status.
    async fn next(&mut self) -> anyhow::Result<ServerMessage> {
        loop {
            match wire::decode(&self.socket.receive().await?)? {
                ServerMessage::Status(_) => {}
                other => return Ok(other),
            }
        }
    }

    /// A round's beginning, which must come next; its adapters.
    async fn round(&mut self, expected: u32) -> anyhow::Result<AdapterState> {
        match self.next().await? {
            ServerMessage::Round { round, adapter } if round == expected => Ok(adapter),
            other => anyhow::bail!("{other:?} instead of round {expected}"),
        }
    }

    /// Send an update, hear what becomes of it: the fault's code, if it is refused.
    async fn update(&mut self, round: u32, adapter: AdapterState, samples: u32) -> anyhow::Result<Option<FaultCode>> {
        let update = Update { round, adapter, fisher: None, samples, loss: 1.0, local: None };
        self.socket.send(wire::encode(&ClientMessage::Update(update))).await?;
        match self.next().await? {
            ServerMessage::UpdateAccepted { round: r } if r == round => Ok(None),
            ServerMessage::UpdateRefused { round: r, fault } if r == round => Ok(Some(fault.code)),
            other => anyhow::bail!("{other:?} in answer to an update of round {round}"),
        }
    }

    /// The end, which must come next; the federation's adapters.
    async fn finished(&mut self) -> anyhow::Result<AdapterState> {
        match self.next().await? {
            ServerMessage::Finished { adapter } => Ok(adapter),
            other => anyhow::bail!("{other:?} instead of the end"),
        }
    }
}

fn filled(like: &AdapterState, value: f32) -> AdapterState {
    let mut state = like.clone();
    state.0.values_mut().for_each(|b| b.data.fill(value));
    state
}

/// Every value is this one, but for rounding.
fn all(state: &AdapterState, value: f32) -> bool {
    state.0.values().all(|b| b.data.iter().all(|v| (v - value).abs() < 1e-6))
}

/// The adapters that a server's folder holds for a round.
fn on_disk(folder: &Path, round: u32) -> anyhow::Result<AdapterState> {
    Store::open(folder, "test")?.adapter(round)
}

fn by_hand(rounds: u32, min_participants: usize) -> FederationSettings {
    FederationSettings { rounds, min_participants, strategy: Strategy::FedAvg, ..Default::default() }
}

/// A second update takes nobody's place: of the same round, it is told that the first one counts; of another one, it is refused. The
/// first one is merged, with no more weight than the samples that its sender announced.
pub fn second_update() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(by_hand(1, 2), folder.path()).await?;
        let mut a = ByHand::join(&server, hello("a", 1, Purpose::Train)).await?;
        let mut b = ByHand::join(&server, hello("b", 3, Purpose::Train)).await?;
        let start = a.round(1).await?;
        anyhow::ensure!(b.round(1).await? == start, "two participants begin with different adapters");
        anyhow::ensure!(a.update(1, filled(&start, 0.01), 1000).await?.is_none(), "a sound update is refused");
        for (round, value, expected) in [(1, 0.5, None), (2, 0.7, Some(FaultCode::StaleRound))] {
            let answer = a.update(round, filled(&start, value), 1).await?;
            anyhow::ensure!(answer == expected, "a second update, of round {round}: {answer:?}");
        }
        anyhow::ensure!(b.update(1, filled(&start, 0.03), 3).await?.is_none(), "a sound update is refused");
        // (1 * 0.01 + 3 * 0.03) / 4
        let merged = a.finished().await?;
        anyhow::ensure!(all(&merged, 0.025), "merged {:?}", merged.0["image.down"].data[0]);
        anyhow::ensure!(b.finished().await? == merged, "two participants end with different adapters");
        server.stop().await
    })
}

/// Finite but huge: it is refused, its sender is out of the round, and the next one goes on as if it had not been.
pub fn huge_update() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(by_hand(2, 1), folder.path()).await?;
        let mut a = ByHand::join(&server, hello("a", 3, Purpose::Train)).await?;
        let start = a.round(1).await?;
        let answer = a.update(1, filled(&start, 1e30), 3).await?;
        anyhow::ensure!(answer == Some(FaultCode::Invalid), "a huge update: {answer:?}");
        let mut b = ByHand::join(&server, hello("b", 3, Purpose::Train)).await?;
        anyhow::ensure!(b.round(1).await? == start, "something of the huge update is left");
        anyhow::ensure!(b.update(1, filled(&start, 0.01), 3).await?.is_none(), "a sound update is refused");
        let next = b.round(2).await?;
        anyhow::ensure!(all(&next, 0.01) && on_disk(folder.path(), 1)? == next, "round 1 was not merged");
        anyhow::ensure!(b.update(2, filled(&start, 0.02), 3).await?.is_none(), "a sound update is refused");
        anyhow::ensure!(all(&b.finished().await?, 0.02), "round 2 was not merged");
        let status = server.app.federation("test").context("no federation")?.finished().await;
        let merged: Vec<_> = status.history[1..].iter().map(|r| r.participants.as_slice()).collect();
        anyhow::ensure!(merged == [[ParticipantId(2)], [ParticipantId(2)]], "{merged:?}");
        server.stop().await
    })
}

/// Somebody joins while a merge is being evaluated, which saves the participants: each round keeps its own adapters.
pub fn newcomer_during_evaluation() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(by_hand(2, 1), folder.path()).await?;
        let mut a = ByHand::join(&server, hello("a", 3, Purpose::Train)).await?;
        let start = a.round(1).await?;
        anyhow::ensure!(a.update(1, filled(&start, 0.01), 3).await?.is_none(), "a sound update is refused");
        let mut b = ByHand::join(&server, hello("b", 3, Purpose::Train)).await?;
        anyhow::ensure!(on_disk(folder.path(), 0)? == start, "round 0 has another round's adapters");
        let next = a.round(2).await?;
        anyhow::ensure!(all(&next, 0.01) && b.round(2).await? == next, "round 2 begins with something else");
        anyhow::ensure!(on_disk(folder.path(), 0)? == start, "round 0 has another round's adapters");
        anyhow::ensure!(on_disk(folder.path(), 1)? == next, "round 1 has another round's adapters");
        server.stop().await
    })
}

/// A server that is told to stop while it evaluates a merge loses nothing: the next one merges the same, with nobody there.
pub fn stop_during_evaluation() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(by_hand(2, 1), folder.path()).await?;
        let mut a = ByHand::join(&server, hello("a", 3, Purpose::Train)).await?;
        let start = a.round(1).await?;
        anyhow::ensure!(a.update(1, filled(&start, 0.01), 3).await?.is_none(), "a sound update is refused");
        server.stop().await?;
        let saved = Store::open(folder.path(), "test")?.load()?.context("nothing is saved")?;
        let rounds = saved.history.len() - 1;
        anyhow::ensure!(saved.updates.len() + rounds == 1, "{} updates, {rounds} rounds", saved.updates.len());
        let server = Server::start(by_hand(2, 1), folder.path()).await?;
        merged_from_the_first(&server).await?;
        server.stop().await
    })
}

/// Round 1 is merged from participant 1's update alone, which put 0.01 everywhere.
async fn merged_from_the_first(server: &Server) -> anyhow::Result<Status> {
    let federation = server.app.federation("test").context("no federation")?;
    while federation.status().history.len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let status = federation.status();
    anyhow::ensure!(status.history[1].participants == [ParticipantId(1)], "{:?}", status.history[1]);
    anyhow::ensure!(all(&federation.adapter(), 0.01), "the merge is another one");
    Ok(status)
}

/// A round is closed with one update of two, and then nothing can be judged any more: the server stops, the update is not used up,
/// and the next server merges it, at once and alone.
pub fn nothing_to_judge_a_merge() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let settings = FederationSettings { grace_s: 0, ..by_hand(2, 2) };
        let server = Server::start(settings.clone(), folder.path()).await?;
        let mut a = ByHand::join(&server, hello("a", 3, Purpose::Train)).await?;
        let mut b = ByHand::join(&server, hello("b", 3, Purpose::Train)).await?;
        let start = a.round(1).await?;
        b.round(1).await?;
        anyhow::ensure!(a.update(1, filled(&start, 0.01), 3).await?.is_none(), "a sound update is refused");
        server.stop().await?;
        let saved = || -> anyhow::Result<SavedFederation> {
            Store::open(folder.path(), "test")?.load()?.context("nothing is saved")
        };
        // Nobody was given up because the server stopped.
        anyhow::ensure!(saved()?.history.len() == 1, "{:?}", saved()?.history);

        // After the restart nobody is waited for.
        let nothing = HeldOutSource::Data(Dataset::default());
        let broken = server_settings(nano_llava(), nothing, settings.clone(), folder.path());
        let app = App::start(broken, &Device::flex(), CancellationToken::new()).await?;
        let words = app.serve(bind("127.0.0.1:0").await?).await.err().context("it was served all the same")?;
        anyhow::ensure!(words.to_string().contains("no held-out samples"), "{words}");
        drop(app);
        let kept = saved()?;
        anyhow::ensure!(kept.history.len() == 1 && kept.updates.len() == 1, "{:?}", kept.history);
        anyhow::ensure!(kept.open.as_ref().and_then(|o| o.closed) == Some(1), "{:?}", kept.open);
        anyhow::ensure!(kept.metrics.contains_key(&ParticipantId(1)), "the bytes of the first run are forgotten");

        let server = Server::start(settings, folder.path()).await?;
        let status = merged_from_the_first(&server).await?;
        anyhow::ensure!(status.participants[0].traffic.up.adapters > 0, "{:?}", status.participants[0]);
        server.stop().await
    })
}

/// Somebody else writes into the same federation, so that a round cannot be begun on disk: nobody is told that it has, everybody is
/// told to come back later, and the server ends with cause and remedy.
pub fn write_that_fails() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(by_hand(2, 2), folder.path()).await?;
        let federation = server.app.federation("test").context("no federation")?;
        while federation.status().history.is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut a = ByHand::join(&server, hello("a", 3, Purpose::Train)).await?;
        let (other, me) = (Store::open(folder.path(), "test")?, ParticipantId(1));
        let adapter = other.adapter(0)?;
        let update = Update { round: 1, adapter: adapter.clone(), fisher: None, samples: 3, loss: 1.0, local: None };
        let result = RoundResult {
            round: 1,
            held_out: Evaluation::default(),
            participants: vec![me],
            late: Vec::new(),
            local: None,
            training_loss: None,
            seconds: 0.0,
        };
        other.begin_round(1, 1, &[me])?;
        other.accept(me, &update)?;
        other.merged(&result, &adapter, &StrategyState::default(), &[(me, 1)])?;
        let _b = ByHand::join(&server, hello("b", 3, Purpose::Train)).await?;
        match a.next().await? {
            ServerMessage::Closing(fault) => anyhow::ensure!(!fault.remedy.is_empty(), "{fault}"),
            other => anyhow::bail!("{other:?}, though it is not on disk"),
        }
        let cause = federation.failed().await;
        let words = server.stop().await.err().context("the server ended as if all were well")?.to_string();
        println!("{words}");
        anyhow::ensure!(cause.contains("two servers") && words.contains(&cause) && words.contains("'test'"), "{words}");
        anyhow::ensure!(federation.status().history.len() == 1, "{:?}", federation.status().history);
        Ok(())
    })
}

/// The same participation from a second place: the first is told, once, and does not fight for it; its download counts once.
pub fn taken_over() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(by_hand(1, 2), folder.path()).await?;
        let introduction = Hello { edge_bytes: 1000, ..hello("a", 3, Purpose::Train) };
        let mut old = ByHand::join(&server, introduction.clone()).await?;
        let again = Hello { resume: Some(old.token.clone()), ..introduction };
        let new = ByHand::join(&server, again).await?;
        match old.next().await? {
            ServerMessage::Refused(fault) => {
                anyhow::ensure!(fault.code == FaultCode::OutOfOrder && fault.cause.contains("another tab"), "{fault}");
            }
            other => anyhow::bail!("{other:?} instead of a refusal"),
        }
        anyhow::ensure!(old.next().await.is_err(), "the older connection stays open");
        anyhow::ensure!(new.token == old.token, "it came back as somebody else");
        let [me] = &new.status.participants[..] else {
            anyhow::bail!("{:?}", new.status.participants);
        };
        let counted = me.traffic.down.edge_bundle;
        anyhow::ensure!(counted == 1000, "{counted} bytes of 1000 are counted");
        server.stop().await
    })
}

/// Where not even the untouched model can be judged, the server says so and ends, instead of reporting 0 %.
pub fn nothing_to_judge() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let listener = bind("127.0.0.1:0").await?;
        let nothing = HeldOutSource::Data(Dataset::default());
        let server = server_settings(nano_llava(), nothing, settings(), folder.path());
        let server = ServerSettings { evaluation_limit: 0, ..server };
        let app = App::start(server, &Device::flex(), CancellationToken::new()).await?;
        let words = app.serve(listener).await.err().context("it was served all the same")?.to_string();
        println!("{words}");
        anyhow::ensure!(words.contains("'test'") && words.contains("no held-out samples"), "{words}");
        let federation = app.federation("test").context("no federation")?;
        let fault = federation.join(hello("late", 1, Purpose::Train)).await.err().context("somebody was let in")?;
        anyhow::ensure!(fault.cause.contains("no held-out samples") && !fault.remedy.is_empty(), "{fault}");
        anyhow::ensure!(federation.status().history.is_empty(), "{:?}", federation.status().history);
        Ok(())
    })
}
