//! A participant's loop: connect, take part in rounds, come back after a loss. The same in tab, native client and simulator;
//! what differs is behind [`Connector`], [`Clock`] and [`Observer`].
//!
//! What was trained in a round survives a lost connection: [`participate`] keeps it and goes on where it was when the
//! server sends the same round again.

use crate::edge::{FeatureCache, NanoEdge};
use crate::generate::{GenerateRequest, NextToken, TokenSource};
use crate::model::adapter::{DeviceError, NanoAdapters};
use crate::plain::{AdapterState, BoundaryReply, BoundaryRequest, EvaluationReply};
use crate::settings::{FederationSettings, Strategy};
use crate::step::{self, BoundaryError, LlmBoundary, StepError};
use crate::wire::{
    self, ClientMessage, Fault, FaultCode, Hello, ParticipantId, ServerMessage, SessionToken, Status, Update,
};
use burn::optim::{AdamWConfig, ModuleOptimizer};
use burn::tensor::Device;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use std::time::Duration;

/// Whole frames in order; a WebSocket or a channel.
#[allow(async_fn_in_trait)] // no Send: a tab has one thread
pub trait Transport {
    /// Send one frame.
    async fn send(&mut self, frame: Vec<u8>) -> Result<(), TransportError>;
    /// The next frame.
    async fn receive(&mut self) -> Result<Vec<u8>, TransportError>;
}

/// Makes connections.
#[allow(async_fn_in_trait)]
pub trait Connector {
    /// What it makes.
    type Transport: Transport;
    /// Connect once.
    async fn connect(&mut self) -> Result<Self::Transport, TransportError>;
}

/// Why frames do not flow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// Closed or never there; worth another try.
    #[error("{0}")]
    Lost(String),
    /// The person asked to leave.
    #[error("left on request")]
    Left,
}

/// Time, given from outside: a browser has another clock.
#[allow(async_fn_in_trait)]
pub trait Clock {
    /// Wait.
    async fn sleep(&self, time: Duration);
}

/// Hears what happens.
pub trait Observer {
    /// Called for each event, in order.
    fn event(&mut self, event: ClientEvent<'_>);
}

/// What a participant's screen shows.
#[derive(Debug)]
pub enum ClientEvent<'a> {
    /// Accepted by the server.
    Joined {
        /// Own number.
        participant: ParticipantId,
        /// For coming back after a reload.
        token: &'a SessionToken,
        /// What was agreed.
        settings: &'a FederationSettings,
        /// It was an earlier session that went on.
        resumed: bool,
    },
    /// The federation changed.
    Status(&'a Status),
    /// A round begins, with these adapters.
    Round {
        /// Its number.
        round: u32,
        /// Step it goes on from (0: from its start).
        from_step: usize,
        /// Steps of this round.
        steps: usize,
        /// The federation's adapters.
        adapter: &'a AdapterState,
    },
    /// A step is done.
    Step {
        /// Round.
        round: u32,
        /// Steps done.
        step: usize,
        /// Steps of this round.
        steps: usize,
        /// Its loss, nats.
        loss: f32,
        /// Samples seen in this step.
        samples: usize,
    },
    /// The Fisher pass goes on.
    Fisher {
        /// Round.
        round: u32,
        /// Samples done.
        done: usize,
        /// Samples in all.
        all: usize,
    },
    /// The update is accepted; these are the own adapters.
    Uploaded {
        /// Round.
        round: u32,
        /// Own adapters after training.
        adapter: &'a AdapterState,
    },
    /// The update was not counted.
    NotCounted {
        /// Round.
        round: u32,
        /// Why.
        fault: &'a Fault,
    },
    /// The connection is lost; another try follows.
    Lost {
        /// Why.
        cause: &'a str,
        /// Until then.
        retry_in: Duration,
    },
}

/// Why a participation ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All rounds done; the federation's adapters.
    Finished(AdapterState),
    /// The person left.
    Left,
}

/// Why a participation failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server refused.
    #[error("{0}")]
    Refused(Fault),
    /// The server stayed away.
    #[error("the server could not be reached for {tries} tries: {cause}; check the address and that the server runs")]
    Unreachable {
        /// Tries made.
        tries: u32,
        /// The last cause.
        cause: String,
    },
    /// The own device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A step failed for good.
    #[error("training failed: {0}")]
    Step(String),
    /// The server said something that makes no sense.
    #[error("the server broke the protocol: {0}; reload the page or update the older program")]
    Protocol(String),
}

/// Who takes part, with what.
pub struct Participant<'a> {
    /// Introduces itself with this; `resume` is filled in when coming back.
    pub hello: Hello,
    /// Frozen part.
    pub edge: &'a NanoEdge,
    /// Own samples, encoded.
    pub cache: &'a FeatureCache,
    /// Where the adapters are trained (without autodiff).
    pub device: &'a Device,
    /// Tries to reach the server in a row before giving up.
    pub max_tries: u32,
}

/// What is kept of a round while the connection may come and go.
struct LocalRound {
    round: u32,
    adapters: NanoAdapters,
    optimizer: ModuleOptimizer,
    order: Vec<usize>,
    step: usize,
    loss_sum: f64,
    fisher: AdapterState,
    fisher_done: usize,
    upload: Option<Update>,
}

/// Why a connection's loop ended.
pub(crate) enum Interruption {
    Lost(String),
    Left,
    Failed(ClientError),
}

impl From<TransportError> for Interruption {
    fn from(e: TransportError) -> Self {
        match e {
            TransportError::Lost(cause) => Self::Lost(cause),
            TransportError::Left => Self::Left,
        }
    }
}

/// Take part until the federation is finished, the person leaves, or something cannot be mended.
///
/// # Errors
/// [`ClientError`].
pub async fn participate<C: Connector, K: Clock, O: Observer>(
    mut me: Participant<'_>,
    connector: &mut C,
    clock: &K,
    observer: &mut O,
) -> Result<Outcome, ClientError> {
    let mut local: Option<LocalRound> = None;
    let mut tries = 0;
    loop {
        let result = match connector.connect().await {
            Ok(transport) => {
                let mut link = Link { transport, pending: None, next_id: 0, observer };
                let result = take_part(&mut me, &mut local, &mut link, &mut tries).await;
                if matches!(result, Err(Interruption::Left)) {
                    drop(link.send(&ClientMessage::Leave).await); // a courtesy: the server would notice anyway
                }
                result
            }
            Err(e) => Err(e.into()),
        };
        match result {
            Ok(adapter) => return Ok(Outcome::Finished(adapter)),
            Err(Interruption::Left) => return Ok(Outcome::Left),
            Err(Interruption::Failed(e)) => return Err(e),
            Err(Interruption::Lost(cause)) => {
                tries += 1;
                if tries >= me.max_tries {
                    return Err(ClientError::Unreachable { tries, cause });
                }
                let retry_in = Duration::from_millis(500 << tries.min(5)).min(Duration::from_secs(10));
                observer.event(ClientEvent::Lost { cause: &cause, retry_in });
                clock.sleep(retry_in).await;
            }
        }
    }
}

/// One connection: handshake, then rounds as the server calls them.
async fn take_part<T: Transport, O: Observer>(
    me: &mut Participant<'_>,
    local: &mut Option<LocalRound>,
    link: &mut Link<'_, T, O>,
    tries: &mut u32,
) -> Result<AdapterState, Interruption> {
    link.send(&ClientMessage::Hello(me.hello.clone())).await?;
    let (participant, settings) = match link.receive().await? {
        ServerMessage::Welcome { participant, token, settings, status } => {
            let resumed = me.hello.resume.as_ref() == Some(&token);
            settings
                .validate()
                .map_err(|faults| protocol(&format!("settings that cannot be used ({})", faults.join("; "))))?;
            if !resumed {
                // Somebody new to this server: what was trained belongs to another run of the federation.
                *local = None;
            }
            me.hello.edge_bytes = 0; // reported once
            link.observer.event(ClientEvent::Joined { participant, token: &token, settings: &settings, resumed });
            link.observer.event(ClientEvent::Status(&status));
            me.hello.resume = Some(token);
            (participant, settings)
        }
        ServerMessage::Refused(fault) => return Err(Interruption::Failed(ClientError::Refused(fault))),
        ServerMessage::Closing(fault) => return Err(Interruption::Lost(fault.to_string())),
        other => return Err(protocol(&format!("{} instead of a welcome", name(&other)))),
    };
    loop {
        match link.next().await? {
            ServerMessage::Round { round, adapter } => {
                let like = AdapterState::zeros(settings.rank, me.edge.config.text.hidden);
                adapter.check_like(&like).map_err(|e| protocol(&e.to_string()))?;
                if local.as_ref().is_none_or(|l| l.round != round) {
                    *local = Some(LocalRound::begin(me, &settings, participant, round, &adapter));
                }
                let Some(state) = local.as_mut() else { continue };
                link.observer.event(ClientEvent::Round {
                    round,
                    from_step: state.step,
                    steps: state.steps(&settings),
                    adapter: &adapter,
                });
                run_round(me, &settings, state, link, tries).await?;
            }
            ServerMessage::UpdateAccepted { round } => {
                *tries = 0;
                if let Some(update) = local.as_ref().and_then(|l| l.upload.as_ref()).filter(|u| u.round == round) {
                    link.observer.event(ClientEvent::Uploaded { round, adapter: &update.adapter });
                }
            }
            // Stale: the round went on without this participant; the next `Round` message tells where to go on.
            ServerMessage::UpdateRefused { round, fault } => {
                link.observer.event(ClientEvent::NotCounted { round, fault: &fault });
                if fault.code != FaultCode::StaleRound {
                    return Err(Interruption::Failed(ClientError::Refused(fault)));
                }
            }
            ServerMessage::Finished { adapter } => return Ok(adapter),
            ServerMessage::Refused(fault) => return Err(Interruption::Failed(ClientError::Refused(fault))),
            ServerMessage::Closing(fault) => return Err(Interruption::Lost(fault.to_string())),
            // Replies to requests of a step that was cancelled.
            ServerMessage::Trained { .. }
            | ServerMessage::Evaluated { .. }
            | ServerMessage::Generated { .. }
            | ServerMessage::RequestRefused { .. } => {}
            ServerMessage::Status(status) => link.observer.event(ClientEvent::Status(&status)),
            other @ ServerMessage::Welcome { .. } => return Err(protocol(&format!("a second {}", name(&other)))),
        }
    }
}

impl LocalRound {
    fn begin(
        me: &Participant<'_>,
        settings: &FederationSettings,
        id: ParticipantId,
        round: u32,
        adapter: &AdapterState,
    ) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        rng.set_stream(u64::from(round) << 32 | u64::from(id.0));
        let mut order = Vec::new();
        for _ in 0..settings.local_epochs {
            let mut epoch: Vec<usize> = (0..me.cache.samples.len()).collect();
            epoch.shuffle(&mut rng);
            order.extend(epoch);
        }
        let mut fisher = adapter.clone();
        fisher.0.values_mut().for_each(|b| b.data.fill(0.0));
        Self {
            round,
            adapters: NanoAdapters::from_state(adapter, &me.device.clone().autodiff()),
            optimizer: AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.0).init(),
            order,
            step: 0,
            loss_sum: 0.0,
            fisher,
            fisher_done: 0,
            upload: None,
        }
    }

    fn steps(&self, settings: &FederationSettings) -> usize {
        self.order.len().div_ceil(settings.batch_size)
    }
}

/// Train, measure Fisher, upload. An interruption leaves `state` where it was, so that the round goes on later.
async fn run_round<T: Transport, O: Observer>(
    me: &Participant<'_>,
    settings: &FederationSettings,
    state: &mut LocalRound,
    link: &mut Link<'_, T, O>,
    tries: &mut u32,
) -> Result<(), Interruption> {
    let round = state.round;
    let steps = state.steps(settings);
    while state.step < steps {
        let rows = state.order.chunks(settings.batch_size).nth(state.step).unwrap_or_default();
        let batch = me.edge.batch(me.cache, rows);
        let mut boundary = Remote { link, round };
        let report = step::train_step(
            &mut state.adapters,
            &mut state.optimizer,
            settings.rate(round, state.step, steps),
            &batch,
            &mut boundary,
            me.device,
        )
        .await;
        let Some(report) = settle(report)? else { return Ok(()) };
        *tries = 0; // not at the welcome: a server whose LLM is gone still welcomes
        state.step += 1;
        state.loss_sum += f64::from(report.loss);
        link.observer.event(ClientEvent::Step {
            round,
            step: state.step,
            steps,
            loss: report.loss,
            samples: report.samples,
        });
        let progress =
            ClientMessage::Progress { round, step: state.step as u32, steps: steps as u32, loss: report.loss };
        link.send(&progress).await?;
    }
    if settings.strategy == Strategy::Fisher {
        let all = me.cache.samples.len();
        let wanted = if settings.fisher_samples == 0 { all } else { settings.fisher_samples.min(all) };
        while state.fisher_done < wanted {
            // The last epoch's order is a random one already.
            let last = &state.order[state.order.len() - all..];
            let rows = &last[state.fisher_done..wanted.min(state.fisher_done + settings.batch_size)];
            let batch = me.edge.batch(me.cache, rows);
            let mut boundary = Remote { link, round };
            let done = step::fisher_batch(&state.adapters, &batch, &mut boundary, me.device, &mut state.fisher).await;
            if settle(done)?.is_none() {
                return Ok(());
            }
            state.fisher_done += rows.len();
            link.observer.event(ClientEvent::Fisher { round, done: state.fisher_done, all: wanted });
        }
    }
    if state.upload.is_none() {
        let mut fisher = state.fisher.clone();
        let share = 1.0 / state.fisher_done.max(1) as f32;
        fisher.0.values_mut().flat_map(|b| &mut b.data).for_each(|v| *v *= share);
        let adapter = state.adapters.to_state().await.map_err(|e| Interruption::Failed(e.into()))?;
        state.upload = Some(Update {
            round,
            adapter,
            fisher: (settings.strategy == Strategy::Fisher).then_some(fisher),
            samples: me.cache.samples.len() as u32,
            loss: (state.loss_sum / steps.max(1) as f64) as f32,
        });
    }
    if let Some(update) = &state.upload {
        link.send(&ClientMessage::Update(update.clone())).await?;
    }
    Ok(())
}

/// A step's result: done, cancelled because the round moved on (`None`), or an interruption.
fn settle<R>(result: Result<R, StepError>) -> Result<Option<R>, Interruption> {
    match result {
        Ok(r) => Ok(Some(r)),
        Err(StepError::Boundary(BoundaryError::Cancelled(_))) => Ok(None),
        Err(StepError::Boundary(BoundaryError::Lost(cause))) if cause == LEFT => Err(Interruption::Left),
        Err(StepError::Boundary(BoundaryError::Lost(cause))) => Err(Interruption::Lost(cause)),
        Err(StepError::Device(e)) => Err(Interruption::Failed(e.into())),
        Err(e) => Err(Interruption::Failed(ClientError::Step(e.to_string()))),
    }
}

pub(crate) const LEFT: &str = "left on request";

/// A transport that speaks messages.
pub(crate) struct Link<'a, T, O> {
    pub(crate) transport: T,
    /// Arrived while a reply was awaited, and belongs to the main loop.
    pub(crate) pending: Option<ServerMessage>,
    pub(crate) next_id: u64,
    pub(crate) observer: &'a mut O,
}

impl<T: Transport, O: Observer> Link<'_, T, O> {
    pub(crate) async fn send(&mut self, message: &ClientMessage) -> Result<(), Interruption> {
        let frame = wire::encode(message);
        if frame.len() > wire::MAX_FRAME {
            let fault = wire::WireError::TooLarge(frame.len()).fault();
            return Err(Interruption::Failed(ClientError::Refused(fault)));
        }
        Ok(self.transport.send(frame).await?)
    }

    /// The next message from the wire.
    pub(crate) async fn receive(&mut self) -> Result<ServerMessage, Interruption> {
        let frame = self.transport.receive().await?;
        wire::decode(&frame).map_err(|e| protocol(&e.to_string()))
    }

    /// The next message, pending first.
    async fn next(&mut self) -> Result<ServerMessage, Interruption> {
        match self.pending.take() {
            Some(message) => Ok(message),
            None => self.receive().await,
        }
    }
}

/// The boundary over the wire: one request under way at a time.
pub(crate) struct Remote<'l, 'a, T, O> {
    pub(crate) link: &'l mut Link<'a, T, O>,
    pub(crate) round: u32,
}

enum Reply {
    Trained(BoundaryReply),
    Evaluated(EvaluationReply),
    Generated(NextToken),
}

fn mismatched() -> BoundaryError {
    BoundaryError::Refused("the reply answers another kind of request".into())
}

impl<T: Transport, O: Observer> Remote<'_, '_, T, O> {
    async fn ask(&mut self, message: ClientMessage, id: u64) -> Result<Reply, BoundaryError> {
        let lost = |i: Interruption| match i {
            Interruption::Lost(cause) => BoundaryError::Lost(cause),
            Interruption::Left => BoundaryError::Lost(LEFT.into()),
            Interruption::Failed(e) => BoundaryError::Refused(e.to_string()),
        };
        self.link.send(&message).await.map_err(lost)?;
        loop {
            match self.link.receive().await.map_err(lost)? {
                ServerMessage::Trained { id: theirs, reply } if theirs == id => return Ok(Reply::Trained(reply)),
                ServerMessage::Evaluated { id: theirs, reply } if theirs == id => return Ok(Reply::Evaluated(reply)),
                ServerMessage::Generated { id: theirs, next } if theirs == id => return Ok(Reply::Generated(next)),
                ServerMessage::RequestRefused { id: theirs, fault } if theirs == id => {
                    return Err(match fault.code {
                        FaultCode::StaleRound => BoundaryError::Cancelled(fault.to_string()),
                        FaultCode::Server => BoundaryError::Lost(fault.to_string()),
                        _ => BoundaryError::Refused(fault.to_string()),
                    });
                }
                ServerMessage::Status(status) => self.link.observer.event(ClientEvent::Status(&status)),
                ServerMessage::Closing(fault) => return Err(BoundaryError::Lost(fault.to_string())),
                // Replies to requests before a reconnect.
                ServerMessage::Trained { .. }
                | ServerMessage::Evaluated { .. }
                | ServerMessage::Generated { .. }
                | ServerMessage::RequestRefused { .. } => {}
                other => {
                    let cause = format!("the server went on with {}", name(&other));
                    self.link.pending = Some(other);
                    return Err(BoundaryError::Cancelled(cause));
                }
            }
        }
    }

    fn id(&mut self) -> u64 {
        self.link.next_id += 1;
        self.link.next_id
    }
}

impl<T: Transport, O: Observer> LlmBoundary for Remote<'_, '_, T, O> {
    async fn train(&mut self, request: BoundaryRequest) -> Result<BoundaryReply, BoundaryError> {
        let id = self.id();
        match self.ask(ClientMessage::Train { id, round: self.round, request }, id).await? {
            Reply::Trained(reply) => Ok(reply),
            _ => Err(mismatched()),
        }
    }

    async fn evaluate(&mut self, request: BoundaryRequest) -> Result<EvaluationReply, BoundaryError> {
        let id = self.id();
        match self.ask(ClientMessage::Evaluate { id, request }, id).await? {
            Reply::Evaluated(reply) => Ok(reply),
            _ => Err(mismatched()),
        }
    }
}

impl<T: Transport, O: Observer> TokenSource for Remote<'_, '_, T, O> {
    async fn next(&mut self, request: GenerateRequest) -> Result<NextToken, BoundaryError> {
        let id = self.id();
        match self.ask(ClientMessage::Generate { id, request }, id).await? {
            Reply::Generated(next) => Ok(next),
            _ => Err(mismatched()),
        }
    }
}

fn protocol(cause: &str) -> Interruption {
    Interruption::Failed(ClientError::Protocol(cause.to_owned()))
}

pub(crate) fn name(message: &ServerMessage) -> &'static str {
    match message {
        ServerMessage::Welcome { .. } => "a welcome",
        ServerMessage::Refused(_) => "a refusal",
        ServerMessage::Round { .. } => "a round",
        ServerMessage::Trained { .. } => "a gradient",
        ServerMessage::Evaluated { .. } => "an evaluation",
        ServerMessage::RequestRefused { .. } => "a refused request",
        ServerMessage::UpdateAccepted { .. } => "an accepted update",
        ServerMessage::UpdateRefused { .. } => "a refused update",
        ServerMessage::Status(_) => "a status",
        ServerMessage::Finished { .. } => "the end",
        ServerMessage::Closing(_) => "a shutdown",
        ServerMessage::Generated { .. } => "a token",
    }
}
