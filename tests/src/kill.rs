//! A server that is killed at each of its writes in turn and started again: nothing is lost, nothing is done twice, and the
//! adapters come out the same, bit for bit.

use anyhow::Context;
use burn::tensor::Device;
use clap::Parser;
use fednano_server::commands::serve;
use fednano_server::native::SocketConnector;
use fednano_server::store::{SavedFederation, Store};
use fednano_shared::client::{ClientEvent, Observer, Outcome};
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::edge::{FeatureCache, NanoEdge};
use fednano_shared::model::files::ModelFiles;
use fednano_shared::plain::AdapterState;
use fednano_shared::probe::shard;
use fednano_shared::wire::{ParticipantId, Purpose};
use fednano_tests::{block, encode, fixture, hello, repository, take_part_over};
use std::collections::BTreeSet;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// Some dozens of runs, of a second or two each.
const LIMIT: Duration = Duration::from_secs(540);
const ROUNDS: u32 = 2;
/// Runs at the same time.
const LANES: usize = 2;

pub fn every_write() -> anyhow::Result<()> {
    kill_at_every_write("fisher")
}

/// FedAdam's moments are carried from round to round.
pub fn every_write_of_a_strategy_with_memory() -> anyhow::Result<()> {
    kill_at_every_write("fedadam")
}

fn kill_at_every_write(strategy: &'static str) -> anyhow::Result<()> {
    block(LIMIT, async {
        let scene = Scene::new(strategy).await?;
        let calm = scene.run(None).await.context("nobody was killed")?;
        calm.is_whole()?;
        let points = &calm.writes;
        // At the least: tables, federation, round 0, two participants, and of each round begin, two updates and merge; each
        // before its transaction and before its commit.
        anyhow::ensure!(points.len() >= 2 * (5 + 4 * ROUNDS as usize), "only {} points: {points:?}", points.len());
        println!("{strategy}: {} points to be killed at", points.len());
        let lane = async |first: usize| {
            for at in (first..=points.len()).step_by(LANES) {
                let what = || format!("killed at point {at} (without a kill: '{}')", points[at - 1]);
                let killed = scene.run(Some(at)).await.with_context(what)?;
                killed.equals(&calm).with_context(what)?;
            }
            anyhow::Ok(())
        };
        let lanes: [_; LANES] = tokio::join!(lane(1), lane(2)).into();
        lanes.into_iter().collect()
    })
}

/// What all runs have in common.
struct Scene {
    edge: NanoEdge,
    caches: [FeatureCache; 2],
    strategy: &'static str,
    held_out: tempfile::TempDir,
}

/// What a run left.
struct Left {
    saved: SavedFederation,
    /// The adapters of every round.
    adapters: Vec<AdapterState>,
    /// What each client ended with.
    outcomes: [AdapterState; 2],
    /// (round, step) of each client's optimiser steps.
    steps: [Vec<(u32, usize)>; 2],
    /// Names of the points passed, where nobody was killed.
    writes: Vec<String>,
}

impl Scene {
    async fn new(strategy: &'static str) -> anyhow::Result<Self> {
        let edge = NanoEdge::load(&ModelFiles::open(&fixture())?, &Device::flex())?;
        // Unequal, so that one has to wait for the other.
        let caches = [
            encode(&edge, &shard(DemoTheme::Workshop, 1, 2, 3)).await?,
            encode(&edge, &shard(DemoTheme::Garden, 2, 3, 3)).await?,
        ];
        let held_out = tempfile::tempdir()?;
        std::fs::copy(fixture().join("images/image_0.png"), held_out.path().join("0.png"))?;
        let questions = "picture,question,answer\n0.png,what is it?,a box\n0.png,which color?,red\n";
        std::fs::write(held_out.path().join("questions.csv"), questions)?;
        Ok(Self { edge, caches, strategy, held_out })
    }

    /// A federation from its beginning to its end, with the server killed at this point of it.
    async fn run(&self, kill_at: Option<usize>) -> anyhow::Result<Left> {
        let folder = tempfile::tempdir()?;
        let mut server = Process::start(self, folder.path(), kill_at)?;
        let socket = format!("ws://127.0.0.1:{}/ws", server.port);
        let (joined, first_is_in) = oneshot::channel();
        let (mut a, mut b) = (Steps { joined: Some(joined), ..Steps::default() }, Steps::default());
        let clients = async {
            let first = self.client(&socket, "a", 0, &mut a);
            let second = async {
                // Numbers follow the order of joining.
                first_is_in.await.context("the first client did not get in")?;
                self.client(&socket, "b", 1, &mut b).await
            };
            tokio::try_join!(first, second)
        };
        let outcomes = tokio::select! {
            outcomes = clients => outcomes?,
            ended = server.keep_running() => return Err(ended),
        };
        anyhow::ensure!(kill_at.is_none() || server.killed, "the server never came to that point");
        let writes = server.writes()?;
        drop(server);
        let store = Store::open(&folder.path().join("data"), "test")?;
        let saved = store.load()?.context("no federation was kept")?;
        let adapters = saved.history.iter().map(|r| store.adapter(r.round)).collect::<anyhow::Result<_>>()?;
        Ok(Left { saved, adapters, outcomes: outcomes.into(), steps: [a.done, b.done], writes })
    }

    async fn client(
        &self,
        socket: &str,
        name: &str,
        which: usize,
        observer: &mut Steps,
    ) -> anyhow::Result<AdapterState> {
        let cache = &self.caches[which];
        let mut connector = SocketConnector::new(socket, CancellationToken::new());
        let hello = hello(name, cache.samples.len(), Purpose::Train);
        match take_part_over(&self.edge, cache, hello, &mut connector, observer).await? {
            Outcome::Finished { adapter, .. } => Ok(adapter),
            Outcome::Left => anyhow::bail!("client {name} left"),
        }
    }
}

impl Left {
    /// Two participants, every round from both, no step twice.
    fn is_whole(&self) -> anyhow::Result<()> {
        let numbers: Vec<u32> = self.saved.participants.iter().map(|p| p.id.0).collect();
        anyhow::ensure!(numbers == [1, 2], "participants {numbers:?}");
        let history = &self.saved.history;
        anyhow::ensure!(history.len() == ROUNDS as usize + 1, "{} results", history.len());
        for r in &history[1..] {
            anyhow::ensure!(r.participants == [1, 2].map(ParticipantId) && r.late.is_empty(), "{r:?}");
        }
        anyhow::ensure!(self.saved.updates.is_empty() && self.saved.open.is_none(), "something is left over");
        for steps in &self.steps {
            let different: BTreeSet<_> = steps.iter().collect();
            anyhow::ensure!(!steps.is_empty() && different.len() == steps.len(), "steps done twice: {steps:?}");
        }
        let last = self.adapters.last().context("no adapters")?;
        anyhow::ensure!(self.outcomes.iter().all(|o| bits(o) == bits(last)), "a client ended with other adapters");
        Ok(())
    }

    fn equals(&self, calm: &Self) -> anyhow::Result<()> {
        self.is_whole()?;
        anyhow::ensure!(self.steps == calm.steps, "steps {:?}, without a kill {:?}", self.steps, calm.steps);
        for (round, (adapter, expected)) in self.adapters.iter().zip(&calm.adapters).enumerate() {
            anyhow::ensure!(bits(adapter) == bits(expected), "the adapters of round {round} are others");
        }
        let state = |left: &Self| left.saved.state.0.values().flat_map(bits).collect::<Vec<u32>>();
        anyhow::ensure!(state(self) == state(calm), "the strategy remembers something else");
        for (result, expected) in self.saved.history.iter().zip(&calm.saved.history) {
            let figures = (result.held_out, result.training_loss) == (expected.held_out, expected.training_loss);
            anyhow::ensure!(figures, "{result:?}, without a kill {expected:?}");
        }
        Ok(())
    }
}

/// Every value as it is stored.
fn bits(adapter: &AdapterState) -> Vec<u32> {
    adapter.0.values().flat_map(|b| &b.data).map(|v| v.to_bits()).collect()
}

/// Counts optimiser steps, and says when its client is in for the first time.
#[derive(Default)]
struct Steps {
    done: Vec<(u32, usize)>,
    joined: Option<oneshot::Sender<()>>,
}

impl Observer for Steps {
    fn event(&mut self, event: ClientEvent<'_>) {
        match event {
            ClientEvent::Joined { .. } => drop(self.joined.take().map(|joined| joined.send(()))),
            ClientEvent::Step { round, step, .. } => self.done.push((round, step)),
            _ => {}
        }
    }
}

// ------------------------------------------------------------------------------------ the server's process

/// Set for a process that is to be `fednano serve`. This program runs itself: a `fednano` that lies about may be of another
/// day, and a test must not depend on it.
const AS_SERVER: &str = "FEDNANO_TESTS_SERVE";

#[derive(Parser)]
struct Serve {
    #[command(flatten)]
    args: serve::Args,
}

/// Be a server, if this process was started as one.
pub fn serve_if_asked() -> Option<ExitCode> {
    std::env::var_os(AS_SERVER)?;
    let served = || -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(serve::main(&Serve::parse().args))
    };
    Some(match served() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    })
}

/// `fednano serve` on a port of its own, ended when dropped.
struct Process {
    child: Child,
    command: Command,
    port: u16,
    folder: PathBuf,
    /// It is to be killed, and was.
    kill: bool,
    killed: bool,
}

impl Process {
    fn start(scene: &Scene, folder: &Path, kill_at: Option<usize>) -> anyhow::Result<Self> {
        // Free now, and again after each end: nobody else listens without being told where.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut command = Command::new(std::env::current_exe()?);
        command.env(AS_SERVER, "1").stdin(Stdio::null()).stdout(Stdio::null());
        command.arg("--model").arg(fixture()).arg("--www").arg(repository().join("www"));
        command.arg("--data-dir").arg(folder.join("data")).arg("--held-out").arg(scene.held_out.path());
        command.args(["--listen", &format!("127.0.0.1:{port}"), "--device", "cpu", "--reproducible"]);
        command.args(["--federation", "test", "--strategy", scene.strategy, "--rounds", &ROUNDS.to_string()]);
        command.args(["--min-participants", "2", "--batch-size", "4", "--rank", "2", "--grace-s", "120"]);
        let mut first = command_with(&command, folder)?;
        match kill_at {
            Some(at) => first.env("FEDNANO_CRASH_AT", at.to_string()),
            None => first.env("FEDNANO_CRASH_LOG", folder.join("writes")),
        };
        let child = first.spawn().context("cannot start the server")?;
        Ok(Self { child, command, port, folder: folder.to_owned(), kill: kill_at.is_some(), killed: false })
    }

    /// Start it again once it was killed as planned; returns when it ends otherwise.
    async fn keep_running(&mut self) -> anyhow::Error {
        loop {
            tokio::time::sleep(Duration::from_millis(5)).await;
            match self.look() {
                Ok(None) => {}
                Ok(Some(cause)) | Err(cause) => return cause,
            }
        }
    }

    fn look(&mut self) -> anyhow::Result<Option<anyhow::Error>> {
        let Some(status) = self.child.try_wait()? else { return Ok(None) };
        // Aborted: ended by a signal, without a code.
        if self.kill && !self.killed && status.code().is_none() {
            self.killed = true;
            self.child = command_with(&self.command, &self.folder)?.spawn().context("cannot start the server again")?;
            return Ok(None);
        }
        let words = std::fs::read_to_string(self.folder.join("words")).unwrap_or_default();
        Ok(Some(anyhow::anyhow!("the server ended ({status}): {words}")))
    }

    /// Names of the points passed.
    fn writes(&self) -> anyhow::Result<Vec<String>> {
        let path = self.folder.join("writes");
        if self.kill {
            return Ok(Vec::new());
        }
        Ok(std::fs::read_to_string(&path).context("no point was passed")?.lines().map(str::to_owned).collect())
    }
}

/// The same command once more; what it says goes to a file.
fn command_with(command: &Command, folder: &Path) -> anyhow::Result<Command> {
    let words = File::options().create(true).append(true).open(folder.join("words"))?;
    let mut copy = Command::new(command.get_program());
    copy.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(words);
    copy.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
    Ok(copy)
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
