//! The owner task of a federation and the cheap handle to it. All state lives in the task; the rules are in [`round`], who takes
//! part in `members`, merging and judging in `evaluation`, bytes in `ledger`, going on after a restart in `restore`.
//!
//! What is told is on disk already: a round before its `Round`, an update before its `UpdateAccepted`, a participant before its
//! `Welcome`, a merge before the next round. So a server that is killed anywhere goes on as if nothing had happened: whoever was
//! not answered sends again. Where the disk fails, the federation stops and nothing is acknowledged. A write blocks the task, and a
//! thread of the runtime, which must have several: nothing could be said before it is done anyway.

mod evaluation;
mod ledger;
mod members;
mod restore;
pub mod round;

use crate::held_out::HeldOut;
use crate::llm_host::LlmHandle;
use crate::store::{Metrics, Store};
use evaluation::{Judged, Pending};
use fednano_shared::aggregate::{self, StrategyState};
use fednano_shared::ledger::{AFTER, Traffic};
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::FederationSettings;
use fednano_shared::wire::{
    Fault, FaultCode, Hello, LocalEvaluation, ParticipantId, Phase, Purpose, RoundResult, ServerMessage, SessionToken,
    Status, Update,
};
use ledger::{Account, Detail};
pub use ledger::{Claim, Ledger, ParticipantLedger, Sums};
use members::Participant;
pub use restore::{Founding, start};
use round::{Action, Event, Machine, Refusal};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::block_in_place;

/// Commands waiting; when full, sessions wait.
const COMMANDS: usize = 256;
/// Messages waiting for one participant; when full, it is too slow: status lines are skipped, anything else ends its session.
const OUTBOX: usize = 32;
/// The machine is given time this often, and changes are shown at most this often.
const TICK: Duration = Duration::from_millis(200);
/// Participants are told of changes at most this often; of another phase or round with the next tick. A status has figures of
/// everybody: told at each tick, it would outweigh what a small model's training sends.
const TELL: Duration = Duration::from_secs(1);
/// A status of so many participants and past rounds, a hundred bytes or so each, is told as often as that; a longer one more rarely.
const LINES: usize = 40;
/// However long it is, news are told after so long.
const TELL_AT_LAST: Duration = Duration::from_secs(15);
/// What a participant sends after `Finished` belongs to this round: its personal adapters, which nobody merges.
pub const AFTER_ROUNDS: u32 = AFTER;

/// What a session gets when it is let in.
pub struct Joined {
    /// Its number.
    pub id: ParticipantId,
    /// Its secret.
    pub token: SessionToken,
    /// It was known: an earlier session goes on.
    pub returning: bool,
    /// What was agreed.
    pub settings: FederationSettings,
    /// The federation now.
    pub status: Status,
    /// Messages for it; closed when a newer connection takes its place.
    pub outbox: mpsc::Receiver<ServerMessage>,
    /// Which connection of this participant it is.
    pub connection: u64,
}

enum Command {
    Join(Box<Hello>, oneshot::Sender<Result<Joined, Fault>>),
    Update(ParticipantId, Box<Update>),
    Personal(ParticipantId, LocalEvaluation),
    Progress(ParticipantId, u32, (u32, u32), f32),
    Traffic(Option<ParticipantId>, BTreeMap<u32, Traffic>),
    Ledger(Detail, oneshot::Sender<Ledger>),
    Sums(oneshot::Sender<Sums>),
    Lost(ParticipantId, u64),
    Left(ParticipantId, u64),
    Judged(Box<Judged>),
    Stop(oneshot::Sender<()>),
}

/// A cheap handle to a federation. The federation ends with its last handle.
#[derive(Clone)]
pub struct Federation {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Status>,
    adapter: watch::Receiver<AdapterState>,
    failure: watch::Receiver<Option<Fault>>,
    downloads: Arc<OnceLock<Claim>>,
    settings: Arc<FederationSettings>,
}

impl Federation {
    /// Let a participant in.
    ///
    /// # Errors
    /// A [`Fault`] for it.
    pub async fn join(&self, hello: Hello) -> Result<Joined, Fault> {
        let (reply, answer) = oneshot::channel();
        let gone = || {
            self.failure.borrow().clone().unwrap_or_else(|| Fault {
                code: FaultCode::Server,
                cause: "the federation has stopped".into(),
                remedy: "ask the operator, or try again after a restart".into(),
            })
        };
        self.commands.send(Command::Join(Box::new(hello), reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Hand over an update; the answer comes through the outbox.
    pub async fn update(&self, from: ParticipantId, update: Update) {
        drop(self.commands.send(Command::Update(from, Box::new(update))).await);
    }

    /// What a participant's personal adapters are worth to it.
    pub async fn personal(&self, of: ParticipantId, local: LocalEvaluation) {
        drop(self.commands.send(Command::Personal(of, local)).await);
    }

    /// Show progress: round, (steps done, steps), loss.
    pub async fn progress(&self, from: ParticipantId, round: u32, progress: (u32, u32), loss: f32) {
        drop(self.commands.send(Command::Progress(from, round, progress, loss)).await);
    }

    /// Add bytes by round: what a session has counted since it did this last. None: its connection only asks.
    pub async fn traffic(&self, of: impl Into<Option<ParticipantId>>, rounds: BTreeMap<u32, Traffic>) {
        drop(self.commands.send(Command::Traffic(of.into(), rounds)).await);
    }

    /// All bytes so far, as sessions have handed them over: they do it once a second, and at their end. None: it has ended.
    pub async fn ledger(&self) -> Option<Ledger> {
        self.ask(|reply| Command::Ledger(Detail::All, reply)).await
    }

    /// The same for whoever asks from outside: of the newest rounds, and of each participant its sums; those rounds of each too, if it
    /// is asked for `rounds`.
    pub async fn recent_ledger(&self, rounds: bool) -> Option<Ledger> {
        let detail = if rounds { Detail::Rounds } else { Detail::Sums };
        self.ask(|reply| Command::Ledger(detail, reply)).await
    }

    /// The same of everybody together: all, and the newest rounds.
    pub async fn sums(&self) -> Option<Sums> {
        self.ask(Command::Sums).await
    }

    async fn ask<R>(&self, command: impl FnOnce(oneshot::Sender<R>) -> Command) -> Option<R> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }

    /// Who counts downloads of the edge bundle; a participant whose introduction names one is asked for there. Said once.
    pub fn count_downloads(&self, claim: Claim) {
        if self.downloads.set(claim).is_err() {
            tracing::warn!("a federation is served twice: downloads are counted where it was first");
        }
    }

    /// A connection is gone.
    pub async fn lost(&self, id: ParticipantId, connection: u64) {
        drop(self.commands.send(Command::Lost(id, connection)).await);
    }

    /// A participant left for good, over this connection.
    pub async fn left(&self, id: ParticipantId, connection: u64) {
        drop(self.commands.send(Command::Left(id, connection)).await);
    }

    /// What was agreed.
    pub fn settings(&self) -> &FederationSettings {
        &self.settings
    }

    /// The federation now.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Wait until all rounds are done.
    pub async fn finished(&self) -> Status {
        let mut status = self.status.clone();
        let done = status.wait_for(|s| s.phase == Phase::Finished).await.map(|s| s.clone());
        done.unwrap_or_else(|_| self.status())
    }

    /// Wait until the federation has failed for good (it may never); cause and remedy.
    pub async fn failed(&self) -> String {
        let mut failure = self.failure.clone();
        drop(failure.wait_for(Option::is_some).await);
        match self.failure() {
            Some(cause) => cause,
            None => std::future::pending().await,
        }
    }

    /// Why the federation has failed for good, if it has; cause and remedy.
    pub fn failure(&self) -> Option<String> {
        self.failure.borrow().as_ref().map(ToString::to_string)
    }

    /// End it, behind every update that a session has handed over; then its store is closed and another server may open it.
    /// A merge that is being judged is not lost: its updates are on disk, and it is made again after a restart.
    pub async fn stop(&self) {
        let (reply, answer) = oneshot::channel();
        if self.commands.send(Command::Stop(reply)).await.is_ok() {
            drop(answer.await);
        }
    }

    /// The federation's adapters now.
    pub fn adapter(&self) -> AdapterState {
        self.adapter.borrow().clone()
    }
}

/// A round that has begun, as it is on disk.
struct Opened {
    round: u32,
    assigned: BTreeSet<ParticipantId>,
}

struct Coordinator {
    name: String,
    settings: FederationSettings,
    machine: Machine,
    participants: BTreeMap<ParticipantId, Participant>,
    updates: BTreeMap<(ParticipantId, u32), Update>, // accepted, not merged; by the round they were trained in
    open: Option<Opened>,
    history: Vec<RoundResult>,
    global: AdapterState,
    strategy: StrategyState,
    questions: Account, // of connections that only ask
    downloads: Arc<OnceLock<Claim>>,
    pending: Option<Pending>, // a merge that is being judged
    round_started: Instant,
    clock: Instant,
    llm: LlmHandle,
    held_out: Arc<HeldOut>,
    store: Store,
    commands: mpsc::WeakSender<Command>, // weak, or it would keep itself alive
    shown: watch::Sender<Status>,
    shown_adapter: watch::Sender<AdapterState>,
    failure: watch::Sender<Option<Fault>>,
    changed: bool,              // since it was shown
    news: bool,                 // there is something that participants have not been told
    told: Option<(Phase, u32)>, // phase and round, as participants were told last
    told_at: Instant,
}

impl Coordinator {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut ticks = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(Command::Stop(reply)) => {
                        block_in_place(|| self.end());
                        let _ = reply.send(());
                        return;
                    }
                    // Also of a federation that has failed.
                    Some(Command::Ledger(detail, reply)) => drop(reply.send(self.ledger(detail))),
                    Some(Command::Sums(reply)) => drop(reply.send(self.sums())),
                    // Often, and never written down at once.
                    Some(command @ (Command::Progress(..) | Command::Traffic(..))) => self.handle(command),
                    // The disk may take its time: the runtime's other tasks go on elsewhere.
                    Some(command) => block_in_place(|| self.handle(command)),
                    None => return,
                },
                _ = ticks.tick() => block_in_place(|| self.tick()),
            }
        }
    }

    fn tick(&mut self) {
        if self.failed().is_some() {
            return;
        }
        if self.llm.is_gone() {
            return self.fail(members::not_computed());
        }
        let done = self.event(Event::Tick);
        self.check(done);
        if self.changed || self.is_due() {
            self.show();
        }
    }

    /// Close the store.
    fn end(mut self) {
        if self.failed().is_none()
            && let Err(cause) = self.keep_metrics()
        {
            tracing::warn!(federation = self.name, "the newest figures of the participants are lost: {cause:#}");
        }
    }

    /// Cause and remedy, once it has failed.
    fn failed(&self) -> Option<Fault> {
        self.failure.borrow().clone()
    }

    fn handle(&mut self, command: Command) {
        self.changed = true;
        // A status makes traffic itself: that alone is no reason for the next one.
        self.news |= !matches!(&command, Command::Traffic(_, rounds) if ledger::only_control(rounds));
        match (command, self.failed()) {
            (Command::Join(_, reply), Some(fault)) => drop(reply.send(Err(fault))),
            (_, Some(_)) => {}
            (command, None) => {
                let done = self.take(command);
                self.check(done);
            }
        }
    }

    /// A disk that fails ends the federation: going on would promise what a restart could not keep.
    fn check(&mut self, done: anyhow::Result<()>) {
        if let Err(cause) = done {
            self.fail(members::unwritable(&cause));
        }
    }

    /// # Errors
    /// A write that failed.
    fn take(&mut self, command: Command) -> anyhow::Result<()> {
        match command {
            Command::Join(hello, reply) => match self.join(*hello) {
                Ok(joined) => {
                    let id = joined.id;
                    if reply.send(Ok(joined)).is_ok() {
                        self.event(Event::Connected(id))?;
                    }
                }
                Err(members::Refused::Disk(cause)) => {
                    let _ = reply.send(Err(members::unwritable(&cause)));
                    return Err(cause);
                }
                Err(members::Refused::Fault(fault)) => drop(reply.send(Err(fault))),
            },
            Command::Update(from, update) => self.update(from, *update)?,
            Command::Personal(id, local) => {
                let asked = self.settings.local_test > 0.0;
                if let Some(p) = self.participants.get_mut(&id) {
                    p.local = Some(local).filter(|_| asked).and_then(|l| evaluation::plausible(l, p.saved.samples));
                    self.store.metrics(&[(id, Metrics { traffic: p.account.unsaved(), local: p.local })])?;
                    p.account.saved();
                }
                self.llm.release(id);
            }
            Command::Progress(id, round, progress, loss) => {
                if let Some(p) = self.participants.get_mut(&id).filter(|_| round == self.machine.round()) {
                    p.progress = progress;
                    p.loss = Some(loss);
                }
            }
            Command::Traffic(of, rounds) => self.count(of, &rounds),
            Command::Lost(id, connection) => {
                if let Some(p) = self.participants.get_mut(&id).filter(|p| p.connection == connection) {
                    p.outbox = None;
                    self.llm.release(id);
                    self.event(Event::Lost(id))?;
                }
            }
            Command::Left(id, connection) => {
                // Not that of one who is back already.
                if let Some(p) = self.participants.get_mut(&id).filter(|p| p.connection == connection) {
                    p.outbox = None;
                    self.leave(id)?;
                }
            }
            Command::Judged(judged) => self.judged(*judged)?,
            // `run` has taken these.
            Command::Ledger(_, reply) => drop(reply),
            Command::Sums(reply) => drop(reply),
            Command::Stop(reply) => drop(reply),
        }
        Ok(())
    }

    fn update(&mut self, from: ParticipantId, mut update: Update) -> anyhow::Result<()> {
        let round = update.round;
        let announced = self.participants.get(&from).map_or(0, |p| p.saved.samples);
        // Nobody raises its weight above the samples it announced.
        update.samples = update.samples.min(announced);
        // Where nothing is held back, nobody has anything to judge by.
        update.local = update.local.filter(|_| self.settings.local_test > 0.0);
        update.local = update.local.and_then(|local| evaluation::plausible(local, announced));
        let candidate = evaluation::client_update(from, update.clone(), 0);
        if let Err(cause) = aggregate::validate(&self.settings, &self.global, &candidate) {
            let fault = Fault {
                code: FaultCode::Invalid,
                cause: format!("the update was not counted: {cause}"),
                remedy: "reload and join again; if training diverged, ask the operator for a lower learning rate"
                    .into(),
            };
            // It cannot send a better one: the round must not wait for it.
            self.leave(from)?;
            self.tell(from, ServerMessage::UpdateRefused { round, fault });
            return Ok(());
        }
        let actions = self.step(Event::Updated { from, round });
        // Only what counts is kept, so that a refused update cannot take the place of a counted one; and it is kept before
        // the merge that it may complete.
        let counts = |a: &Action| *a == Action::Accept { from, round } || *a == Action::AcceptLate { from, round };
        if actions.iter().any(counts) {
            self.store.accept(from, &update)?;
            if let Some(p) = self.participants.get_mut(&from).filter(|_| update.local.is_some()) {
                p.local = update.local;
            }
            self.updates.insert((from, round), update);
        }
        self.carry_out(actions)
    }

    /// One that takes no further part: its update counts if it is in, and nobody waits for it.
    fn leave(&mut self, id: ParticipantId) -> anyhow::Result<()> {
        if let Some(p) = self.participants.get_mut(&id).filter(|p| !p.saved.left) {
            p.saved.left = true;
            self.store.left(id)?;
        }
        self.llm.release(id);
        self.event(Event::Left(id))
    }

    fn event(&mut self, event: Event) -> anyhow::Result<()> {
        let actions = self.step(event);
        self.carry_out(actions)
    }

    fn step(&mut self, event: Event) -> Vec<Action> {
        let now = self.clock.elapsed().as_millis() as u64;
        self.machine.step(now, event)
    }

    fn carry_out(&mut self, actions: Vec<Action>) -> anyhow::Result<()> {
        for action in actions {
            (self.changed, self.news) = (true, true);
            self.act(action)?;
        }
        Ok(())
    }

    fn act(&mut self, action: Action) -> anyhow::Result<()> {
        match action {
            Action::Start { round, to } => {
                self.open(round, &to)?;
                self.llm.expect(round, &to);
                for id in to {
                    if let Some(p) = self.participants.get_mut(&id) {
                        (p.progress, p.loss) = ((0, 0), None);
                    }
                    self.tell(id, ServerMessage::Round { round, adapter: self.global.clone() });
                }
            }
            Action::Wait { round, to } => {
                for id in to {
                    // Who takes part is drawn anew each round, so nobody knows for how long.
                    self.tell(id, ServerMessage::Wait { round, rounds_until: None });
                }
            }
            Action::Accept { from, round } => {
                self.llm.release(from);
                self.tell(from, ServerMessage::UpdateAccepted { round });
            }
            // It may train in the current round as well, so it is not released.
            Action::AcceptLate { from, round } => self.tell(from, ServerMessage::UpdateAccepted { round }),
            Action::Refuse { from, round, why } => self.refuse(from, round, why),
            Action::Merge { round, from } => {
                // Another run would wait for more.
                if self.machine.closed_short() {
                    self.store.close(round, from.len())?;
                }
                self.merge(round, from);
            }
            Action::Pause { round } => {
                tracing::info!(
                    federation = self.name,
                    round,
                    "nobody is left who could finish the round: paused until people are there; nothing is lost"
                );
                self.llm.release_all();
                self.show();
            }
            Action::Finish => {
                self.finish(self.participants.keys().copied().collect());
                self.show();
            }
            Action::TellFinished(id) => self.finish(vec![id]),
        }
        Ok(())
    }

    /// Put on disk that a round has begun for these, or that they have joined it.
    fn open(&mut self, round: u32, to: &[ParticipantId]) -> anyhow::Result<()> {
        match &mut self.open {
            Some(open) if open.round == round => {
                for id in to {
                    if open.assigned.insert(*id) {
                        self.store.assign(round, *id)?;
                    }
                }
            }
            _ => {
                self.store.begin_round(round, self.machine.target(), to)?;
                self.open = Some(Opened { round, assigned: to.iter().copied().collect() });
                self.round_started = Instant::now();
            }
        }
        Ok(())
    }

    fn refuse(&mut self, from: ParticipantId, round: u32, why: Refusal) {
        // Its sender did not hear the first answer.
        if why == Refusal::Counted {
            return self.tell(from, ServerMessage::UpdateAccepted { round });
        }
        // For a program the others all mean that this update is done with, and to wait for what comes next.
        let fault = Fault {
            code: if why == Refusal::Finished { FaultCode::Finished } else { FaultCode::StaleRound },
            cause: format!("the update was not counted: {}", why.cause()),
            remedy: why.remedy().into(),
        };
        self.tell(from, ServerMessage::UpdateRefused { round, fault });
    }

    /// All rounds are done. Whoever goes on with adapters of its own needs the LLM still.
    fn finish(&mut self, to: Vec<ParticipantId>) {
        let connected: Vec<_> = to.into_iter().filter(|id| self.machine.connected(*id)).collect();
        if self.settings.strategy.personal() {
            self.llm.expect(AFTER_ROUNDS, &connected);
        }
        for id in connected {
            self.tell(id, ServerMessage::Finished { adapter: self.global.clone() });
        }
    }

    /// It cannot go on. Participants come back when the server does.
    fn fail(&mut self, fault: Fault) {
        tracing::error!(federation = self.name, "the federation has stopped: {fault}");
        self.llm.release_all();
        for p in self.participants.values_mut() {
            if let Some(outbox) = p.outbox.take() {
                // Where it does not listen any more, nothing needs to be said.
                drop(outbox.try_send(ServerMessage::Closing(fault.clone())));
            }
        }
        self.failure.send_replace(Some(fault));
    }
}

/// Is this connection one that only asks? Then it is no participant.
pub fn only_asks(hello: &Hello) -> bool {
    hello.purpose == Purpose::Ask
}
