//! A participant's loop: connect, take part in rounds, come back after a loss. The same in tab, native client and simulator;
//! what differs is behind [`Connector`], [`Clock`], [`Keeper`] and [`Observer`].
//!
//! | module | what |
//! | --- | --- |
//! | `round` | one local round, from its beginning to its update |
//! | `personal` | own adapters at the federation's end |
//! | `keep` | what a participant keeps outside its memory |
//! | `link` | messages over a transport, counted |
//! | `remote` | the boundary over the wire |
//!
//! What was trained in a round survives a lost connection: [`participate`] keeps it and goes on where it was when the server
//! sends the same round again. What a [`Keeper`] has survives the program too.

pub mod keep;
mod link;
pub mod personal;
mod remote;
mod round;

pub use keep::{Forgetful, Keeper};
pub(crate) use link::{Interruption, LEFT, Link, name};
pub(crate) use remote::Remote;
pub use round::test_samples;

use crate::edge::{FeatureCache, NanoEdge};
use crate::ledger::Traffic;
use crate::model::adapter::DeviceError;
use crate::plain::AdapterState;
use crate::settings::{FederationSettings, Strategy};
use crate::wire::agreement::{Agreement, Offer};
use crate::wire::numbers::NumbersError;
use crate::wire::{
    self, ClientMessage, Fault, Hello, LocalEvaluation, ParticipantId, ServerMessage, SessionToken, Status,
};
use burn::tensor::Device;
use keep::{Desk, RoundSnapshot};
use link::{Lasting, protocol, rounding_seed};
use round::LocalRound;
use std::collections::BTreeMap;
use std::time::Duration;

/// Whole frames in order; a WebSocket or a channel.
#[allow(async_fn_in_trait)] // no Send: a tab has one thread
pub trait Transport {
    /// Send one frame.
    async fn send(&mut self, frame: Vec<u8>) -> Result<(), TransportError>;
    /// The next frame.
    async fn receive(&mut self) -> Result<Vec<u8>, TransportError>;
    /// What still comes after the goodbye, also while leaving; nobody waits longer than `limit` for it. A transport whose other
    /// end always closes need not look at the time.
    async fn last(&mut self, limit: Duration) -> Result<Vec<u8>, TransportError> {
        let _ = limit;
        self.receive().await
    }
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
    /// Time since some fixed moment; never goes back.
    fn now(&self) -> Duration;
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
        /// What was agreed about the federation.
        settings: &'a FederationSettings,
        /// What is spoken on this connection.
        agreement: &'a Agreement,
        /// It was an earlier session that went on.
        resumed: bool,
    },
    /// The federation changed.
    Status(&'a Status),
    /// A round begins, with these adapters.
    Round {
        /// Its number; one more than there are rounds where a personal adapter is tuned after the federation's end.
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
    /// Others train in this round; a later one may name this participant.
    Waiting {
        /// Round.
        round: u32,
    },
    /// What the adapters are worth on the own test samples.
    Local {
        /// Round.
        round: u32,
        /// As received, and after the own training.
        local: &'a LocalEvaluation,
    },
    /// Bytes so far, as counted here at the socket: at most once a second, and at the end.
    Traffic {
        /// By round; those before the first one, with the download of the model's part, under 0.
        rounds: &'a BTreeMap<u32, Traffic>,
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
    /// All rounds done.
    Finished {
        /// The federation's adapters.
        adapter: AdapterState,
        /// Own adapters to use instead, where the strategy makes them: with `local` those trained alone, with `feddpa-f` the mix
        /// of federated and personal ones, of twice the rank.
        own: Option<AdapterState>,
        /// The newest judgement on the own test samples, if there are any.
        local: Option<LocalEvaluation>,
    },
    /// The person left.
    Left,
}

/// Why a participation failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server refused.
    #[error("{0}")]
    Refused(Fault),
    /// An own message is one that no server would take.
    #[error(transparent)]
    Unsent(wire::WireError),
    /// The server speaks another version, or sends more than is taken.
    #[error(transparent)]
    Unread(wire::WireError),
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
    /// The own features cannot be put into the form that was agreed on.
    #[error("the features of the own pictures cannot be sent: {0}")]
    Features(#[from] NumbersError),
    /// A step failed for good.
    #[error("training failed: {0}")]
    Step(String),
    /// The server said something that makes no sense.
    #[error("the server broke the protocol: {0}; reload the page or update the older program")]
    Protocol(String),
}

/// Who takes part, with what.
pub struct Participant<'a> {
    /// Introduces itself with this; `resume` is filled in when coming back. The offer is the caller's
    /// ([`Offer::of`](crate::wire::agreement::Offer::of) the edge and the cache).
    pub hello: Hello,
    /// Frozen part.
    pub edge: &'a NanoEdge,
    /// Own samples, encoded. Their pictures are put into the form that is agreed on, and stay so: each is in memory once.
    pub cache: &'a mut FeatureCache,
    /// Where the adapters are trained (without autodiff).
    pub device: &'a Device,
    /// Tries to reach the server in a row before giving up.
    pub max_tries: u32,
    /// The work of a round is kept at most this often, and at its end.
    pub keep_every: Duration,
}

/// Who takes part, and what was agreed with the server. The own samples have pictures as the server has them: both ends compute with
/// the same features.
struct Agreed<'a> {
    me: &'a Participant<'a>,
    settings: FederationSettings,
    agreement: Agreement,
    id: ParticipantId,
}

/// What a participant has done in this federation, while connections come and go.
#[derive(Default)]
struct Work {
    /// The round under way, or the last one.
    round: Option<LocalRound>,
    /// Where an earlier run of this program was, until it is taken up.
    kept: Option<RoundSnapshot>,
    /// The newest judgement on the own test samples.
    local: Option<LocalEvaluation>,
}

/// Take part until the federation is finished, the person leaves, or something cannot be mended.
///
/// # Errors
/// [`ClientError`].
pub async fn participate<C: Connector, K: Clock, S: Keeper, O: Observer>(
    mut me: Participant<'_>,
    connector: &mut C,
    clock: &K,
    keeper: &mut S,
    observer: &mut O,
) -> Result<Outcome, ClientError> {
    if me.hello.resume.is_none() {
        // Its own secret from the start: a server killed before its welcome arrives knows it all the same.
        me.hello.resume = SessionToken::made_up().ok();
    }
    let mut desk = Desk::new(clock, keeper, me.keep_every, me.cache);
    let mut lasting = Lasting::default();
    // Boxed: a whole training lies in it, tens of kilobytes that callers would move about.
    let result = Box::pin(connect_again_and_again(&mut me, connector, clock, &mut desk, observer, &mut lasting)).await;
    observer.event(ClientEvent::Traffic { rounds: lasting.rounds() });
    result
}

/// Connections one after the other, until one of them brings the end.
async fn connect_again_and_again<C: Connector, K: Clock, S: Keeper, O: Observer>(
    me: &mut Participant<'_>,
    connector: &mut C,
    clock: &K,
    desk: &mut Desk<'_, K, S>,
    observer: &mut O,
    lasting: &mut Lasting,
) -> Result<Outcome, ClientError> {
    let mut work = Work::default();
    let mut tries = 0u32;
    loop {
        let result = match connector.connect().await {
            Ok(transport) => {
                let mut link = Link::going_on(transport, &mut *observer, std::mem::take(lasting));
                let result = take_part(me, &mut work, &mut link, desk).await;
                match &result {
                    Ok(_) => link.part(&ClientMessage::Bye, clock).await,
                    Err(Interruption::Left) => link.part(&ClientMessage::Leave, clock).await,
                    Err(_) => {}
                }
                if link.progressed {
                    tries = 0;
                }
                *lasting = link.end();
                result
            }
            Err(e) => Err(e.into()),
        };
        match result {
            Ok(outcome) => return Ok(outcome),
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
async fn take_part<T: Transport, O: Observer, K: Clock, S: Keeper>(
    me: &mut Participant<'_>,
    work: &mut Work,
    link: &mut Link<'_, T, O>,
    desk: &mut Desk<'_, K, S>,
) -> Result<Outcome, Interruption> {
    let agreed = shake_hands(me, work, link, desk).await?;
    let (settings, hidden) = (&agreed.settings, agreed.me.edge.config.text.hidden);
    let like = AdapterState::zeros(settings.adapters, settings.rank, hidden);
    loop {
        let order = link.next(|| desk.now()).await?;
        match order {
            ServerMessage::Round { round, adapter } => {
                adapter.check_like(&like).map_err(|e| protocol(&e.to_string()))?;
                work.hand_in_late(&agreed, round, link).await?;
                let state = work.open(&agreed, round, &adapter).await?;
                let (from_step, steps) = (state.step, state.steps());
                link.observer.event(ClientEvent::Round { round, from_step, steps, adapter: &adapter });
                round::run(&agreed, state, link, desk).await?;
                work.local = state.local().or(work.local);
            }
            ServerMessage::Wait { round, .. } => {
                work.hand_in_late(&agreed, round, link).await?;
                link.progressed = true; // it may be others' turn in every round
                link.observer.event(ClientEvent::Waiting { round });
            }
            ServerMessage::Finished { adapter } => {
                adapter.check_like(&like).map_err(|e| protocol(&e.to_string()))?;
                if let Some(outcome) = personal::finish(&agreed, work, adapter, link, desk).await? {
                    return Ok(outcome);
                }
            }
            ServerMessage::Refused(fault) => return Err(ClientError::Refused(fault).into()),
            // Answers to what was cancelled.
            ServerMessage::Trained { .. }
            | ServerMessage::Evaluated { .. }
            | ServerMessage::Generated { .. }
            | ServerMessage::RequestRefused { .. }
            | ServerMessage::Missing { .. }
            | ServerMessage::UpdateAccepted { .. }
            | ServerMessage::UpdateRefused { .. } => {}
            // The link keeps these for itself.
            ServerMessage::Status(_) | ServerMessage::Closing(_) => {}
            other @ ServerMessage::Welcome { .. } => return Err(protocol(&format!("a second {}", name(&other)))),
        }
    }
}

/// Say who this is; what the server answers decides whether earlier work goes on.
async fn shake_hands<'m, T: Transport, O: Observer, K: Clock, S: Keeper>(
    me: &'m mut Participant<'_>,
    work: &mut Work,
    link: &mut Link<'_, T, O>,
    desk: &mut Desk<'_, K, S>,
) -> Result<Agreed<'m>, Interruption> {
    link.send(&ClientMessage::Hello(me.hello.clone())).await?;
    match link.receive().await? {
        ServerMessage::Welcome { participant: id, token, returning: resumed, settings, agreement, status } => {
            settings
                .validate()
                .map_err(|faults| protocol(&format!("settings that cannot be used ({})", faults.join("; "))))?;
            check_offered(&agreement, &me.hello.offer)?;
            let other = desk.bind(&token, &settings);
            if other || !resumed {
                // Somebody new to this server, or new here: what was trained in memory belongs to another participation.
                let kept = desk.kept(resumed).await;
                let local = kept.as_ref().and_then(RoundSnapshot::local);
                *work = Work { round: None, local, kept };
                link.forget();
            }
            link.count_download(std::mem::take(&mut me.hello.edge_bytes)); // told once
            me.hello.download = None;
            link.agree(agreement, rounding_seed(settings.seed, id));
            let width = me.edge.config.text.hidden;
            me.cache.convert(agreement.features, width).map_err(ClientError::Features)?;
            if other && resumed {
                // A program that comes back: what the server lacks of its pictures it will ask for.
                link.assume_sent(me.cache);
            }
            link.observer.event(ClientEvent::Joined {
                participant: id,
                token: &token,
                settings: &settings,
                agreement: &agreement,
                resumed,
            });
            link.observer.event(ClientEvent::Status(&status));
            me.hello.resume = Some(token);
            Ok(Agreed { me, settings, agreement, id })
        }
        ServerMessage::Refused(fault) => Err(ClientError::Refused(fault).into()),
        ServerMessage::Closing(fault) => Err(Interruption::Lost(fault.to_string())),
        other => Err(protocol(&format!("{} instead of a welcome", name(&other)))),
    }
}

/// The server chooses among what was offered.
fn check_offered(agreement: &Agreement, offer: &Offer) -> Result<(), Interruption> {
    let Agreement { mode, features, codes, gradients, matrices, deflate, labels, .. } = agreement;
    let formats = [features, codes, gradients, matrices].into_iter().all(|format| offer.formats.contains(format));
    let others = offer.modes.contains(mode) && offer.labels.contains(labels) && (offer.deflate || !deflate);
    if formats && others { Ok(()) } else { Err(protocol("it chose what this program did not offer")) }
}

impl Work {
    /// The local round of this number: where it was, in memory or kept, or from its beginning.
    async fn open(
        &mut self,
        agreed: &Agreed<'_>,
        round: u32,
        adapter: &AdapterState,
    ) -> Result<&mut LocalRound, DeviceError> {
        let state = match self.round.take() {
            Some(same) if same.round == round => same,
            other => {
                self.round = other;
                // Alone, nobody starts anew from what the federation sends.
                let own = if agreed.settings.strategy == Strategy::Local { self.own().await? } else { None };
                let kept = self.kept.take();
                let resumed = kept.and_then(|kept| LocalRound::resume(agreed, round, adapter, &kept));
                let own = own.filter(|own| own.check_like(adapter).is_ok());
                resumed.unwrap_or_else(|| LocalRound::begin(agreed, round, adapter.clone(), own.as_ref()))
            }
        };
        Ok(self.round.insert(state))
    }

    /// The own adapters as they were trained last.
    async fn own(&self) -> Result<Option<AdapterState>, DeviceError> {
        match (&self.round, &self.kept) {
            (Some(state), _) => Ok(Some(state.adapters.to_state().await?)),
            (None, Some(kept)) => Ok(Some(kept.adapter.clone())),
            (None, None) => Ok(None),
        }
    }

    /// An update that was ready when the connection broke may still be merged, though the federation is further.
    async fn hand_in_late<T: Transport, O: Observer>(
        &mut self,
        agreed: &Agreed<'_>,
        now: u32,
        link: &mut Link<'_, T, O>,
    ) -> Result<(), Interruption> {
        match &mut self.round {
            Some(last) if last.round < now && now - last.round <= agreed.settings.max_staleness => {
                if last.is_unanswered() { round::hand_in(last, link).await } else { Ok(()) }
            }
            _ => Ok(()),
        }
    }
}
