//! The owner task of a federation and the cheap handle to it. All state lives in the task; the rules are in [`round`],
//! merging and judging in `evaluation`.

mod evaluation;
pub mod round;

use crate::held_out::HeldOut;
use crate::llm_host::LlmHandle;
use crate::store::{SavedParticipant, SavedState, Store};
use fednano_shared::aggregate;
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::FederationSettings;
use fednano_shared::step::Evaluation;
use fednano_shared::wire::{
    ClientKind, Fault, FaultCode, Hello, ParticipantId, ParticipantStatus, Phase, Purpose, RoundResult, ServerMessage,
    SessionToken, Status, Traffic, Update,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use round::{Action, Event, Limits, Machine};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};

/// Commands waiting; when full, sessions wait.
const COMMANDS: usize = 256;
/// Messages waiting for one participant; when full, it is too slow: status lines are skipped, anything else ends its session.
const OUTBOX: usize = 32;
/// The machine is given time this often, and changes are shown at most this often.
const TICK: Duration = Duration::from_millis(200);

/// What a session gets when it is let in.
pub struct Joined {
    /// Its number.
    pub id: ParticipantId,
    /// Its secret.
    pub token: SessionToken,
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
    Join(Hello, oneshot::Sender<Result<Joined, Fault>>),
    Update(ParticipantId, Box<Update>),
    Progress(ParticipantId, u32, (u32, u32), f32),
    Traffic(ParticipantId, Box<Traffic>),
    Lost(ParticipantId, u64),
    Left(ParticipantId),
    Evaluated(Result<Evaluation, String>),
    Settle(oneshot::Sender<()>),
}

/// A cheap handle to a federation.
#[derive(Clone)]
pub struct Federation {
    commands: mpsc::Sender<Command>,
    status: watch::Receiver<Status>,
    adapter: watch::Receiver<AdapterState>,
    failure: watch::Receiver<Option<String>>,
}

impl Federation {
    /// Let a participant in.
    ///
    /// # Errors
    /// A [`Fault`] for it.
    pub async fn join(&self, hello: Hello) -> Result<Joined, Fault> {
        let (reply, answer) = oneshot::channel();
        let gone = || Fault {
            code: FaultCode::Server,
            cause: "the federation has stopped".into(),
            remedy: "ask the operator, or try again after a restart".into(),
        };
        self.commands.send(Command::Join(hello, reply)).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Hand over an update; the answer comes through the outbox.
    pub async fn update(&self, from: ParticipantId, update: Update) {
        drop(self.commands.send(Command::Update(from, Box::new(update))).await);
    }

    /// Show progress: round, (steps done, steps), loss.
    pub async fn progress(&self, from: ParticipantId, round: u32, progress: (u32, u32), loss: f32) {
        drop(self.commands.send(Command::Progress(from, round, progress, loss)).await);
    }

    /// Add bytes.
    pub async fn traffic(&self, of: ParticipantId, traffic: Traffic) {
        drop(self.commands.send(Command::Traffic(of, Box::new(traffic))).await);
    }

    /// A connection is gone.
    pub async fn lost(&self, id: ParticipantId, connection: u64) {
        drop(self.commands.send(Command::Lost(id, connection)).await);
    }

    /// A participant left for good.
    pub async fn left(&self, id: ParticipantId) {
        drop(self.commands.send(Command::Left(id)).await);
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

    /// Wait until the federation has failed for good (it may never); the cause.
    pub async fn failed(&self) -> String {
        let mut failure = self.failure.clone();
        let cause = failure.wait_for(Option::is_some).await.ok().and_then(|cause| cause.clone());
        match cause {
            Some(cause) => cause,
            None => std::future::pending().await,
        }
    }

    /// Wait until no merged round is being evaluated: until then it is not on disk.
    pub async fn settled(&self) {
        let (reply, answer) = oneshot::channel();
        // In line behind every update that a session has handed over.
        if self.commands.send(Command::Settle(reply)).await.is_ok() {
            drop(answer.await);
        }
    }

    /// The federation's adapters now.
    pub fn adapter(&self) -> AdapterState {
        self.adapter.borrow().clone()
    }
}

struct Participant {
    token: SessionToken,
    name: String,
    kind: ClientKind,
    device: String,
    samples: u32,
    progress: (u32, u32),
    loss: Option<f32>,
    traffic: Traffic,
    outbox: Option<mpsc::Sender<ServerMessage>>,
    connection: u64,
}

struct Coordinator {
    name: String,
    settings: FederationSettings,
    model: String,
    machine: Machine,
    participants: BTreeMap<ParticipantId, Participant>,
    updates: BTreeMap<ParticipantId, Update>,
    history: Vec<RoundResult>,
    global: AdapterState,
    merged: Option<AdapterState>, // becomes `global` once it has been evaluated
    merged_from: Vec<ParticipantId>,
    round_started: Instant,
    clock: Instant,
    llm: LlmHandle,
    held_out: Arc<HeldOut>,
    store: Store,
    commands: mpsc::Sender<Command>,
    shown: watch::Sender<Status>,
    shown_adapter: watch::Sender<AdapterState>,
    failure: watch::Sender<Option<String>>,
    settling: Vec<oneshot::Sender<()>>,
    changed: bool,
}

/// Start (or go on with) a federation. `model` is the hash of the client part.
///
/// # Errors
/// Invalid settings; a store of other settings or another model.
pub fn start(
    name: &str,
    settings: FederationSettings,
    model: &str,
    dim: usize,
    llm: LlmHandle,
    held_out: Arc<HeldOut>,
    store: Store,
) -> anyhow::Result<Federation> {
    settings.validate().map_err(|faults| anyhow::anyhow!("the settings are not usable: {}", faults.join("; ")))?;
    let saved = store.load()?;
    if let Some((state, _)) = &saved {
        anyhow::ensure!(
            state.settings == settings && state.model == model,
            "federation '{name}' was begun with other settings or another model; use the same ones, another name, or another --data-dir"
        );
    }
    let initial = NanoAdapters::initial(settings.rank, dim, &mut ChaCha8Rng::seed_from_u64(settings.seed));
    let (history, global, known) = match saved {
        Some((state, adapter)) => (state.history, adapter, state.participants),
        None => (Vec::new(), initial, Vec::new()),
    };
    let done = history.last().map_or(0, |r| r.round);
    let first_evaluation = history.is_empty();
    let limits = Limits {
        rounds: settings.rounds,
        min_participants: settings.min_participants,
        deadline: settings.round_deadline_s * 1000,
        grace: settings.grace_s * 1000,
    };
    let ids: Vec<_> = known.iter().map(|p| ParticipantId(p.id)).collect();
    let mut machine = Machine::new(limits, done, &ids);
    if done == 0 && !first_evaluation {
        machine.step(0, Event::Evaluated);
    }
    let participants = known.into_iter().map(|p| {
        (
            ParticipantId(p.id),
            Participant {
                token: SessionToken(p.token),
                name: p.name,
                kind: p.kind,
                device: p.device,
                samples: p.samples,
                progress: (0, 0),
                loss: None,
                traffic: Traffic::default(),
                outbox: None,
                connection: 0,
            },
        )
    });
    let (commands, inbox) = mpsc::channel(COMMANDS);
    let mut coordinator = Coordinator {
        name: name.to_owned(),
        machine,
        participants: participants.collect(),
        updates: BTreeMap::new(),
        history,
        merged: None,
        merged_from: Vec::new(),
        round_started: Instant::now(),
        clock: Instant::now(),
        llm,
        held_out,
        store,
        commands: commands.clone(),
        model: model.to_owned(),
        shown: watch::Sender::new(Status {
            federation: name.to_owned(),
            phase: Phase::Lobby,
            round: 0,
            rounds: settings.rounds,
            participants: Vec::new(),
            history: Vec::new(),
            min_participants: settings.min_participants,
        }),
        shown_adapter: watch::Sender::new(global.clone()),
        failure: watch::Sender::new(None),
        settling: Vec::new(),
        global,
        settings,
        changed: true,
    };
    coordinator.show();
    let handle = Federation {
        commands,
        status: coordinator.shown.subscribe(),
        adapter: coordinator.shown_adapter.subscribe(),
        failure: coordinator.failure.subscribe(),
    };
    if first_evaluation {
        coordinator.evaluate(coordinator.global.clone());
    }
    tokio::spawn(coordinator.run(inbox));
    Ok(handle)
}

impl Coordinator {
    async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        let mut ticks = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                command = inbox.recv() => match command {
                    Some(command) => self.handle(command),
                    None => return,
                },
                _ = ticks.tick() => {
                    self.event(Event::Tick);
                    if self.changed {
                        self.show();
                    }
                }
            }
        }
    }

    fn handle(&mut self, command: Command) {
        self.changed = true;
        match command {
            Command::Join(hello, reply) => {
                let joined = self.join(hello);
                let connected = joined.as_ref().ok().map(|j| j.id);
                let let_in = reply.send(joined).is_ok();
                if let Some(id) = connected.filter(|_| let_in) {
                    self.event(Event::Connected(id));
                }
            }
            Command::Update(from, update) => self.update(from, *update),
            Command::Progress(id, round, progress, loss) => {
                if let Some(p) = self.participants.get_mut(&id).filter(|_| round == self.machine.round()) {
                    p.progress = progress;
                    p.loss = Some(loss);
                }
            }
            Command::Traffic(id, t) => {
                if let Some(p) = self.participants.get_mut(&id) {
                    add(&mut p.traffic, &t);
                }
            }
            Command::Lost(id, connection) => {
                if let Some(p) = self.participants.get_mut(&id).filter(|p| p.connection == connection) {
                    p.outbox = None;
                    self.event(Event::Lost(id));
                }
            }
            Command::Left(id) => {
                if let Some(p) = self.participants.get_mut(&id) {
                    p.outbox = None;
                    self.event(Event::Left(id));
                }
            }
            Command::Evaluated(result) => self.evaluated(result),
            Command::Settle(reply) => self.settle(reply),
        }
    }

    fn join(&mut self, hello: Hello) -> Result<Joined, Fault> {
        if let Some(cause) = self.failure.borrow().as_ref() {
            return Err(evaluation::not_judged(cause));
        }
        let known = hello
            .resume
            .as_ref()
            .and_then(|t| self.participants.iter().find(|(_, p)| p.token == *t))
            .map(|(id, _)| *id);
        let id = known.unwrap_or_else(|| ParticipantId(self.participants.keys().last().map_or(1, |id| id.0 + 1)));
        let token = match known.and_then(|id| self.participants.get(&id)) {
            Some(p) => p.token.clone(),
            None => new_token().map_err(|cause| Fault {
                code: FaultCode::Server,
                cause,
                remedy: "ask the operator to look at the server".into(),
            })?,
        };
        if let Some(old) = self.participants.get_mut(&id).and_then(|p| p.outbox.take()) {
            // Told nothing, the older tab would come back and throw the newer one out, without end. Where it does not
            // listen any more, nothing needs to be said.
            drop(old.try_send(ServerMessage::Refused(taken_over())));
        }
        let (sender, outbox) = mpsc::channel(OUTBOX);
        let connection = self.participants.get(&id).map_or(0, |p| p.connection) + 1;
        let mut traffic = self.participants.get(&id).map(|p| p.traffic).unwrap_or_default();
        // The same download is announced again by a program that comes back.
        traffic.edge_down = traffic.edge_down.max(hello.edge_bytes);
        self.participants.insert(
            id,
            Participant {
                token: token.clone(),
                name: hello.name,
                kind: hello.kind,
                device: hello.device,
                samples: hello.samples,
                progress: (0, 0),
                loss: None,
                traffic,
                outbox: Some(sender),
                connection,
            },
        );
        tracing::info!(federation = self.name, participant = id.0, again = known.is_some(), "joined");
        if known.is_none() {
            self.save(); // so that it is known again after a restart of the server
        }
        Ok(Joined { id, token, settings: self.settings.clone(), status: self.status(), outbox, connection })
    }

    fn update(&mut self, from: ParticipantId, mut update: Update) {
        let round = update.round;
        // Nobody raises its weight above the samples it announced.
        update.samples = update.samples.min(self.participants.get(&from).map_or(0, |p| p.samples));
        let candidate = evaluation::client_update(from, &update);
        if let Err(cause) = aggregate::validate(self.settings.strategy, &self.global, &candidate) {
            let fault = Fault {
                code: FaultCode::Invalid,
                cause: format!("the update was not counted: {cause}"),
                remedy: "reload and join again; if training diverged, ask the operator for a lower learning rate"
                    .into(),
            };
            self.tell(from, ServerMessage::UpdateRefused { round, fault });
            // It cannot send a better one: the round must not wait for it.
            self.event(Event::Left(from));
            return;
        }
        let actions = self.step(Event::Updated { from, round });
        // Only what counts is kept, so that a refused update cannot take the place of a counted one; and it is kept before
        // the merge that it may complete.
        if actions.contains(&Action::Accept { from, round }) {
            self.updates.insert(from, update);
        }
        self.carry_out(actions);
    }

    fn event(&mut self, event: Event) {
        let actions = self.step(event);
        self.carry_out(actions);
    }

    fn step(&mut self, event: Event) -> Vec<Action> {
        let now = self.clock.elapsed().as_millis() as u64;
        self.machine.step(now, event)
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.changed = true;
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Start { round, to } => {
                if to.len() == self.participants.values().filter(|p| p.outbox.is_some()).count() {
                    self.round_started = Instant::now();
                }
                for id in to {
                    if let Some(p) = self.participants.get_mut(&id) {
                        (p.progress, p.loss) = ((0, 0), None);
                    }
                    self.tell(id, ServerMessage::Round { round, adapter: self.global.clone() });
                }
            }
            Action::Accept { from, round } => self.tell(from, ServerMessage::UpdateAccepted { round }),
            Action::Refuse { from, round } => {
                let current = self.machine.round();
                let fault = Fault {
                    code: FaultCode::StaleRound,
                    cause: format!(
                        "the update is for round {round}, the federation is in round {current}, or it was counted already"
                    ),
                    remedy: "wait for the next round; nothing needs to be done".into(),
                };
                self.tell(from, ServerMessage::UpdateRefused { round, fault });
            }
            Action::Merge { round, from } => self.merge(round, &from),
            Action::Abandon { round } => {
                tracing::info!(
                    federation = self.name,
                    round,
                    "no update arrived; the round begins anew when somebody is there"
                );
                self.updates.clear();
            }
            Action::Finish => {
                for id in self.participants.keys().copied().collect::<Vec<_>>() {
                    self.tell(id, ServerMessage::Finished { adapter: self.global.clone() });
                }
                self.show();
            }
            Action::TellFinished(id) => self.tell(id, ServerMessage::Finished { adapter: self.global.clone() }),
        }
    }

    fn save(&self) {
        let participants = self.participants.iter().map(|(id, p)| SavedParticipant {
            id: id.0,
            token: p.token.0.clone(),
            name: p.name.clone(),
            kind: p.kind,
            device: p.device.clone(),
            samples: p.samples,
        });
        let state = SavedState {
            settings: self.settings.clone(),
            model: self.model.clone(),
            history: self.history.clone(),
            participants: participants.collect(),
        };
        if let Err(e) = self.store.save(&state, &self.global) {
            tracing::error!(federation = self.name, "the round is not on disk: {e:#}");
        }
    }

    fn tell(&mut self, id: ParticipantId, message: ServerMessage) {
        let Some(p) = self.participants.get_mut(&id) else {
            return;
        };
        let status = matches!(message, ServerMessage::Status(_));
        if let Some(outbox) = &p.outbox
            && outbox.try_send(message).is_err()
            && !status
        {
            p.outbox = None; // too slow, or gone: its session ends and it may come back
        }
    }

    fn status(&self) -> Status {
        let participants = self.participants.iter().map(|(id, p)| ParticipantStatus {
            id: *id,
            name: p.name.clone(),
            kind: p.kind,
            device: p.device.clone(),
            samples: p.samples,
            connected: self.machine.connected(*id),
            progress: p.progress,
            loss: p.loss,
            updated: self.machine.updated(*id),
            traffic: p.traffic,
        });
        Status {
            federation: self.name.clone(),
            phase: self.machine.phase(),
            round: self.machine.round(),
            rounds: self.settings.rounds,
            participants: participants.collect(),
            history: self.history.clone(),
            min_participants: self.settings.min_participants,
        }
    }

    fn show(&mut self) {
        self.changed = false;
        let status = self.status();
        for id in self.participants.keys().copied().collect::<Vec<_>>() {
            self.tell(id, ServerMessage::Status(status.clone()));
        }
        self.shown.send_replace(status);
    }
}

fn taken_over() -> Fault {
    Fault {
        code: FaultCode::OutOfOrder,
        cause: "another tab or program goes on with this participation".into(),
        remedy: "use that one, or open the invite link in a new tab".into(),
    }
}

fn add(sum: &mut Traffic, t: &Traffic) {
    sum.activations_up += t.activations_up;
    sum.updates_up += t.updates_up;
    sum.control_up += t.control_up;
    sum.gradients_down += t.gradients_down;
    sum.adapters_down += t.adapters_down;
    sum.control_down += t.control_down;
    sum.edge_down += t.edge_down;
}

/// 128 random bits from the system.
fn new_token() -> Result<SessionToken, String> {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).map_err(|e| format!("the system gives no random numbers: {e}"))?;
    Ok(SessionToken(bytes.iter().map(|b| format!("{b:02x}")).collect()))
}

/// Is this connection one that only asks? Then it is no participant.
pub fn only_asks(hello: &Hello) -> bool {
    hello.purpose == Purpose::Ask
}
