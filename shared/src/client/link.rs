//! Messages over a transport, counted; what is spoken on it; the goodbye.

use super::{ClientError, ClientEvent, Clock, Observer, Transport, TransportError};
use crate::boundary::Pair;
use crate::edge::FeatureCache;
use crate::ledger::{Meter, Traffic};
use crate::model::adapter::DeviceError;
use crate::plain::TensorBlob;
use crate::settings::{Overlap, Rounding};
use crate::step;
use crate::wire::agreement::Agreement;
use crate::wire::numbers::PictureKey;
use crate::wire::{self, ClientMessage, ParticipantId, ServerMessage, WireError};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

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

impl From<ClientError> for Interruption {
    fn from(e: ClientError) -> Self {
        Self::Failed(e)
    }
}

impl From<DeviceError> for Interruption {
    fn from(e: DeviceError) -> Self {
        Self::Failed(e.into())
    }
}

pub(crate) const LEFT: &str = "left on request";

/// After the goodbye, the server's last frames are waited for so long.
const FAREWELL: Duration = Duration::from_secs(5);
/// Bytes are told at most so often.
const TELL: Duration = Duration::from_secs(1);

/// What outlasts a connection.
#[derive(Default)]
pub(crate) struct Lasting {
    /// Pictures whose features the server has had. It may have dropped some since; then it asks.
    pub(super) sent: HashSet<PictureKey>,
    /// Seeds of roundings so far.
    drawn: u64,
    /// Bytes of earlier connections, by round.
    earlier: BTreeMap<u32, Traffic>,
    told: Option<Duration>,
}

/// A transport that speaks messages.
pub(crate) struct Link<'a, T, O> {
    transport: T,
    next_id: u64,
    pub(crate) observer: &'a mut O,
    /// What to do next; it arrived while something else was awaited. The newest counts.
    pub(super) order: Option<ServerMessage>,
    /// Something was done over this connection: the server is worth as many tries again.
    pub(super) progressed: bool,
    /// What is spoken.
    pub(crate) agreement: Agreement,
    seed: u64,
    pub(super) lasting: Lasting,
    meter: Meter,
    /// `up` matrices as sent last over this connection, and how they were rounded.
    pub(super) up: Option<(Arc<Pair<TensorBlob>>, Rounding)>,
    /// Requests under way, oldest first.
    pub(super) requests: VecDeque<super::remote::Waiting>,
}

impl<'a, T: Transport, O: Observer> Link<'a, T, O> {
    /// A new connection: the plain form is spoken until something else is agreed on.
    pub(crate) fn new(transport: T, observer: &'a mut O) -> Self {
        Self {
            transport,
            next_id: 0,
            observer,
            order: None,
            progressed: false,
            agreement: Agreement::PLAIN,
            seed: 0,
            lasting: Lasting::default(),
            meter: Meter::default(),
            up: None,
            requests: VecDeque::new(),
        }
    }

    /// The same, of a participation that has had connections before.
    pub(super) fn going_on(transport: T, observer: &'a mut O, lasting: Lasting) -> Self {
        Self { lasting, ..Self::new(transport, observer) }
    }

    /// What outlasts this connection.
    pub(super) fn end(mut self) -> Lasting {
        self.lasting.earlier = self.rounds();
        self.lasting
    }

    /// From now on this is spoken. `seed` is that of roundings that are drawn.
    pub(crate) fn agree(&mut self, agreement: Agreement, seed: u64) {
        (self.agreement, self.seed) = (agreement, seed);
    }

    pub(crate) async fn send(&mut self, message: &ClientMessage) -> Result<(), Interruption> {
        let frame = wire::encode_to_send(message).map_err(ClientError::Unsent)?;
        let bytes = frame.len();
        self.transport.send(frame).await?;
        self.meter.up(message, bytes);
        Ok(())
    }

    /// The next message from the wire.
    pub(crate) async fn receive(&mut self) -> Result<ServerMessage, Interruption> {
        let frame = self.transport.receive().await?;
        self.read(&frame)
    }

    fn read(&mut self, frame: &[u8]) -> Result<ServerMessage, Interruption> {
        match wire::decode(frame) {
            Ok(message) => {
                self.meter.down(&message, frame.len());
                Ok(message)
            }
            Err(e) => {
                self.meter.down_unread(frame.len());
                Err(match e {
                    // They have remedies of their own.
                    WireError::Version { .. } | WireError::TooLarge(_) => ClientError::Unread(e).into(),
                    _ => protocol(&e.to_string()),
                })
            }
        }
    }

    /// The next message that is neither a status, which is passed on, nor the server's goodbye, which is an interruption.
    pub(super) async fn listen(&mut self) -> Result<ServerMessage, Interruption> {
        loop {
            if let Some(message) = self.hear().await? {
                return Ok(message);
            }
        }
    }

    /// One message; none: it was a status.
    async fn hear(&mut self) -> Result<Option<ServerMessage>, Interruption> {
        match self.receive().await? {
            ServerMessage::Status(status) => {
                self.observer.event(ClientEvent::Status(&status));
                Ok(None)
            }
            ServerMessage::Closing(fault) => Err(Interruption::Lost(fault.to_string())),
            other => Ok(Some(other)),
        }
    }

    /// What to do next: what arrived earlier, or the next message. It may be long in coming; bytes are told meanwhile.
    pub(super) async fn next(&mut self, now: impl Fn() -> Duration) -> Result<ServerMessage, Interruption> {
        if let Some(order) = self.order.take() {
            return Ok(order);
        }
        loop {
            self.tell(now());
            if let Some(message) = self.hear().await? {
                return Ok(message);
            }
        }
    }

    /// Say goodbye, and hear what is still on its way: so both ends have counted the same bytes. Faults are no matter any more.
    pub(super) async fn part<K: Clock>(&mut self, goodbye: &ClientMessage, clock: &K) {
        if self.send(goodbye).await.is_err() {
            return;
        }
        let start = clock.now();
        loop {
            let left = FAREWELL.saturating_sub(clock.now().saturating_sub(start));
            if left.is_zero() {
                return;
            }
            let Ok(frame) = self.transport.last(left).await else { return };
            match self.read(&frame) {
                Ok(ServerMessage::Status(status)) => self.observer.event(ClientEvent::Status(&status)),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    /// This is somebody new to the server.
    pub(super) fn forget(&mut self) {
        self.lasting = Lasting { told: self.lasting.told, ..Lasting::default() };
    }

    /// The server has had the features of all these pictures.
    pub(super) fn assume_sent(&mut self, cache: &FeatureCache) {
        self.lasting.sent.extend(cache.pictures.iter().map(|picture| picture.key));
    }

    /// The part of the model that was downloaded before the first connection.
    pub(super) fn count_download(&mut self, bytes: u64) {
        self.meter.download(bytes);
    }

    /// Tell of the bytes so far, if that is not too soon after the last time.
    pub(super) fn tell(&mut self, now: Duration) {
        if self.lasting.told.is_none_or(|at| now.saturating_sub(at) >= TELL) {
            self.lasting.told = Some(now);
            let rounds = self.rounds();
            self.observer.event(ClientEvent::Traffic { rounds: &rounds });
        }
    }

    /// Bytes of all connections.
    pub(crate) fn traffic(&self) -> Traffic {
        Traffic::sum(self.rounds().values())
    }

    /// The same by round.
    fn rounds(&self) -> BTreeMap<u32, Traffic> {
        let mut rounds = self.lasting.earlier.clone();
        for (round, traffic) in self.meter.by_round() {
            rounds.entry(*round).or_default().add(traffic);
        }
        rounds
    }

    pub(super) fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// The seed of what is rounded for the next request: numbers of requests begin anew with each connection, lots must not.
    pub(super) fn new_seed(&mut self) -> u64 {
        self.lasting.drawn += 1;
        scattered(self.seed ^ scattered(self.lasting.drawn))
    }

    /// Training requests that may be under way.
    pub(crate) fn window(&self) -> usize {
        match self.agreement.overlap {
            Overlap::Off => 1,
            Overlap::Parts | Overlap::Stale => step::WINDOW,
        }
    }

    /// Nobody waits for answers any more. What the server made of the requests is not known, its `up` matrices neither.
    pub(super) fn abandon(&mut self) {
        self.requests.clear();
        self.up = None;
    }
}

impl Lasting {
    /// Bytes of all connections that have ended, by round.
    pub(super) fn rounds(&self) -> &BTreeMap<u32, Traffic> {
        &self.earlier
    }
}

/// The seed of a participant's roundings.
pub(super) fn rounding_seed(seed: u64, id: ParticipantId) -> u64 {
    scattered(seed ^ scattered(u64::from(id.0)))
}

/// SplitMix64's finaliser (Steele et al. 2014): neighbours become unlike.
fn scattered(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub(super) fn protocol(cause: &str) -> Interruption {
    ClientError::Protocol(cause.to_owned()).into()
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
        ServerMessage::Wait { .. } => "a round of others",
        ServerMessage::Missing { .. } => "a call for features",
    }
}
