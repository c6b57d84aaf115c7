//! One connection: handshake, then requests, updates and messages until it ends. Generic over the socket, so that tests and
//! the simulator run it over channels.
//!
//! | module | what |
//! | --- | --- |
//! | `handshake` | who it is, and what is spoken |
//! | `requests` | from a request's arrival to its answer |
//! | `features` | pictures that clients have sent |
//! | `groups` | sums over the requests of an optimiser step |

pub mod features;
mod groups;
mod handshake;
mod requests;

pub use requests::Room;

use crate::coordinator::{AFTER_ROUNDS, Federation};
use crate::llm_host::LlmHandle;
use crate::text_table::TextTable;
use features::{FeatureStore, Owner};
use fednano_shared::boundary::Pair;
use fednano_shared::ledger::Meter;
use fednano_shared::plain::TensorBlob;
use fednano_shared::settings::Strategy;
use fednano_shared::wire::convert::Shapes;
use fednano_shared::wire::{self, ClientMessage, Fault, FaultCode, ParticipantId, ServerMessage};
use futures_util::stream::{FuturesUnordered, StreamExt};
use futures_util::{Sink, SinkExt, Stream};
use groups::Groups;
use requests::{Arrived, Computed, Means, heavy};
use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Requests of one session that wait or are under way; one more is refused. Clients have two at most.
const IN_FLIGHT: usize = 4;
/// A peer that takes nothing for so long is gone. A large frame may take longer: [`time_for`].
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// After its goodbye a peer has so long to close its end too.
const FAREWELL: Duration = Duration::from_secs(2);
/// Features that were called for come within this time. A frame of them may take that long over a slow line; a peer that sends so
/// slowly gives no sign of life either.
const PICTURES: Duration = Duration::from_secs(120);
/// Bytes are reported, and silent peers looked for, this often (more often where they have less time).
const TICK: Duration = Duration::from_secs(1);

/// When a silent peer is asked for a sign of life, when it counts as gone, and how long it may keep a request waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignsOfLife {
    /// After so long without a word from a side, a sign of life is asked for, or given.
    pub beat: Duration,
    /// A peer that has given signs of life and gives none for so long is gone (a closed lid sends no goodbye).
    pub silence: Duration,
    /// A request that waits for pictures is refused when for so long no features have come over its connection.
    pub pictures: Duration,
}

impl Default for SignsOfLife {
    fn default() -> Self {
        Self { beat: Duration::from_secs(15), silence: Duration::from_secs(90), pictures: PICTURES }
    }
}

/// What a socket yields instead of a frame.
#[derive(Debug)]
pub enum SocketFault {
    /// Larger than allowed.
    TooLarge,
    /// Text where binary frames are spoken.
    NotBinary,
    /// Closed or broken, in the normal course of life.
    Closed,
    /// Nothing but a sign of life: the answer to an empty frame, which asks for one.
    Alive,
}

/// What sessions need to know of the model beside the LLM, and how much they may keep.
#[derive(Clone)]
pub struct ModelSide {
    /// Its token table.
    pub table: Arc<TextTable>,
    /// Its sizes.
    pub shape: Shapes,
    /// Bytes of features that are kept, of all participants together.
    pub feature_cache: usize,
    /// Requests wait for one another, so none may be kept waiting for room.
    pub lockstep: bool,
}

/// What all sessions share.
#[derive(Clone)]
pub struct Shared {
    /// By id.
    pub federations: BTreeMap<String, Federation>,
    /// The LLM.
    pub llm: LlmHandle,
    /// Cancelled at shutdown.
    pub shutdown: CancellationToken,
    /// Features of pictures that clients have sent.
    pub features: Arc<FeatureStore>,
    /// The model's token table.
    pub table: Arc<TextTable>,
    /// The model's sizes.
    pub shape: Shapes,
    /// Memory for requests under way.
    pub room: Room,
}

impl Shared {
    /// With a store of features that is empty.
    pub fn new(
        federations: BTreeMap<String, Federation>,
        llm: LlmHandle,
        shutdown: CancellationToken,
        model: &ModelSide,
    ) -> Self {
        Self {
            federations,
            llm,
            shutdown,
            features: Arc::new(FeatureStore::new(model.feature_cache)),
            table: model.table.clone(),
            shape: model.shape,
            room: if model.lockstep { Room::unlimited() } else { Room::default() },
        }
    }
}

type InFlight = FuturesUnordered<Pin<Box<dyn Future<Output = Computed> + Send>>>;

/// Serve one connection to its end.
pub async fn run<S>(socket: S, shared: Shared)
where
    S: Stream<Item = Result<Vec<u8>, SocketFault>> + Sink<Vec<u8>> + Unpin + Send,
{
    run_with(socket, shared, SignsOfLife::default()).await;
}

/// The same with another patience with a silent peer.
pub async fn run_with<S>(mut socket: S, shared: Shared, signs: SignsOfLife)
where
    S: Stream<Item = Result<Vec<u8>, SocketFault>> + Sink<Vec<u8>> + Unpin + Send,
{
    match handshake::handshake(&mut socket, &shared).await {
        Ok(Some(mut session)) => {
            let end = session.serve(&mut socket, &shared, signs).await;
            session.finish(end, &shared).await;
        }
        Ok(None) => {}
        // The peer may be gone already; the session ends either way. Where its federation has stopped already it should come back, not
        // give up.
        Err(_) if shared.shutdown.is_cancelled() => {
            let _ = write(&mut socket, wire::encode(&ServerMessage::Closing(closing()))).await;
        }
        Err(fault) => {
            let _ = write(&mut socket, refusal(fault).1).await;
        }
    }
    drop(tokio::time::timeout(WRITE_TIMEOUT, socket.close()).await);
    // Dropped before the peer has closed its end, a socket may take with it what the peer has not read yet, a refusal above all. One
    // that is broken says so at once.
    let closed = async {
        use SocketFault::{Closed, TooLarge};
        while !matches!(socket.next().await, None | Some(Err(Closed | TooLarge))) {}
    };
    drop(tokio::time::timeout(FAREWELL, closed).await);
}

/// How long a frame may take: what it takes over a line of half a megabit a second, and [`WRITE_TIMEOUT`].
fn time_for(bytes: usize) -> Duration {
    WRITE_TIMEOUT + Duration::from_secs((bytes >> 16) as u64)
}

/// Send one frame; an empty one asks for a sign of life.
async fn write<S: Sink<Vec<u8>> + Unpin>(socket: &mut S, frame: Vec<u8>) -> Result<(), ()> {
    match tokio::time::timeout(time_for(frame.len()), socket.send(frame)).await {
        Ok(Ok(())) => Ok(()),
        _ => Err(()),
    }
}

fn closing() -> Fault {
    Fault {
        code: FaultCode::Server,
        cause: "the server is shutting down".into(),
        remedy: "nothing is lost; this participant goes on when the server is back".into(),
    }
}

/// The last message to a peer that broke the rules, and its frame.
fn refusal(fault: Fault) -> (ServerMessage, Vec<u8>) {
    tracing::info!(code = ?fault.code, "refused: {}", fault.cause);
    let message = ServerMessage::Refused(fault);
    let frame = wire::encode(&message);
    (message, frame)
}

fn out_of_order(cause: &str) -> Fault {
    Fault {
        code: FaultCode::OutOfOrder,
        cause: cause.into(),
        remedy: "the first message must be one Hello; use a FedNano client of the server's version".into(),
    }
}

/// Read one frame as a message, and count it; `None` when the connection is over.
fn message(frame: Option<Result<Vec<u8>, SocketFault>>, meter: &mut Meter) -> Result<Option<ClientMessage>, Fault> {
    match frame {
        Some(Ok(frame)) => match heavy(frame.len(), || wire::decode(&frame)) {
            Ok(message) => {
                meter.up(&message, frame.len());
                Ok(Some(message))
            }
            Err(e) => {
                meter.up_unread(frame.len());
                Err(e.fault())
            }
        },
        Some(Err(SocketFault::TooLarge)) => Err(wire::WireError::TooLarge(wire::MAX_FRAME + 1).fault()),
        Some(Err(SocketFault::NotBinary)) => Err(wire::WireError::NotAFrame(0).fault()),
        // No close frame, no fault: tabs vanish.
        Some(Err(SocketFault::Closed | SocketFault::Alive)) | None => Ok(None),
    }
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The participant left for good.
    Left,
    /// In order, but the participation goes on, or is over already.
    Parted,
    /// Somehow.
    Lost,
}

impl End {
    /// Nobody comes back to train: the participant has left, or all rounds are done. Then who ends with adapters of its own may still
    /// come back for these.
    fn is_for_good(self, round: u32, strategy: Strategy) -> bool {
        let over = round == AFTER_ROUNDS;
        match self {
            Self::Left => true,
            Self::Parted => over,
            Self::Lost => over && !strategy.personal(),
        }
    }
}

struct Session {
    federation: Federation,
    means: Means,
    meter: Meter,              // what is not reported yet
    id: Option<ParticipantId>, // none: only asks
    connection: u64,
    owner: Owner, // of its pictures
    outbox: Option<mpsc::Receiver<ServerMessage>>,
    outgoing: VecDeque<ServerMessage>, // to be sent now
    round: u32,                        // the federation's, as last told; AFTER_ROUNDS once all are done
    patience: u32,                     // rounds that an update may be late
    in_flight: InFlight,
    waiting: Vec<Arrived>,             // for pictures, oldest first
    up: Option<Arc<Pair<TensorBlob>>>, // matrices as last sent
    groups: Groups,
    text: Option<u64>, // key of this connection's texts, of which there is one at a time
}

/// A number that nothing else in this process has.
fn new_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Session {
    async fn serve<S>(&mut self, socket: &mut S, shared: &Shared, signs: SignsOfLife) -> End
    where
        S: Stream<Item = Result<Vec<u8>, SocketFault>> + Sink<Vec<u8>> + Unpin,
    {
        // An interval of 0 would panic.
        let mut ticks = tokio::time::interval(TICK.min(signs.beat).max(Duration::from_millis(1)));
        // Peers that never give a sign of life (channels) are not watched for one.
        let (mut heard, mut spoke, mut asked, mut answers) = (Instant::now(), Instant::now(), Instant::now(), false);
        let mut ticked = Instant::now();
        loop {
            tokio::select! {
                frame = socket.next() => {
                    heard = Instant::now();
                    if matches!(frame, Some(Err(SocketFault::Alive))) {
                        answers = true;
                        continue;
                    }
                    let taken = match message(frame, &mut self.meter) {
                        Ok(Some(ClientMessage::Leave)) => return End::Left,
                        Ok(Some(ClientMessage::Bye)) => return End::Parted,
                        Ok(Some(message)) => self.take(message, shared).await,
                        Ok(None) => return End::Lost,
                        Err(fault) => Err(fault),
                    };
                    if let Err(fault) = taken {
                        let (message, frame) = refusal(fault);
                        let bytes = frame.len();
                        if self.write(socket, frame).await.is_ok() {
                            self.meter.down(&message, bytes);
                        }
                        return End::Lost;
                    }
                }
                message = next(&mut self.outbox) => match message {
                    Some(message) => self.outgoing.push_back(message),
                    None => return End::Lost, // a newer connection took its place, or this one was too slow
                },
                Some(computed) = self.in_flight.next() => self.answer(computed),
                _ = ticks.tick() => {
                    self.report().await;
                    // Whoever was held up itself (a slow write, a busy machine) has not listened and gives nobody up.
                    if ticked.elapsed() > signs.beat.saturating_mul(2) {
                        heard = Instant::now();
                        self.wait_anew();
                    }
                    ticked = Instant::now();
                    self.give_up_overdue(signs.pictures);
                    if answers && heard.elapsed() > signs.silence {
                        tracing::info!(participant = self.id.map(|id| id.0), "no sign of life, so it counts as away");
                        return End::Lost;
                    }
                    if asked.elapsed().min(heard.elapsed()) > signs.beat {
                        asked = Instant::now();
                        if self.write(socket, Vec::new()).await.is_err() {
                            return End::Lost;
                        }
                    }
                    // Browsers do not show their program the server's pings: something must be said.
                    if spoke.elapsed() > signs.beat {
                        self.outgoing.push_back(ServerMessage::Status(self.federation.status()));
                    }
                }
                () = shared.shutdown.cancelled() => {
                    // The peer may be gone already; the session ends either way.
                    let _ = self.send(socket, ServerMessage::Closing(closing())).await;
                    return End::Lost;
                }
            }
            while let Some(message) = self.outgoing.pop_front() {
                spoke = Instant::now();
                if self.send(socket, message).await.is_err() {
                    return End::Lost;
                }
            }
            self.go_on(shared); // what stood behind a request that was given up
        }
    }

    /// Act on a message; a fault ends the session.
    async fn take(&mut self, message: ClientMessage, shared: &Shared) -> Result<(), Fault> {
        match message {
            ClientMessage::Hello(_) => return Err(out_of_order("a second Hello")),
            ClientMessage::Train { id, round, request } => self.request(true, (id, round), request, shared),
            ClientMessage::Evaluate { id, round, request } => self.request(false, (id, round), request, shared),
            ClientMessage::Features { pictures, .. } => self.fill(pictures, shared)?,
            ClientMessage::Progress { round, step, steps, loss } => {
                let Some(id) = self.id else {
                    return Err(out_of_order("progress on a connection that only asks"));
                };
                self.federation.progress(id, round, (step, steps), loss).await;
            }
            ClientMessage::Update(update) => {
                let Some(id) = self.id else {
                    return Err(out_of_order("an update on a connection that only asks"));
                };
                self.federation.update(id, update).await;
            }
            ClientMessage::Personal { local, .. } => {
                let Some(id) = self.id else {
                    return Err(out_of_order("a personal evaluation on a connection that only asks"));
                };
                self.federation.personal(id, local).await;
            }
            ClientMessage::Generate { id, past, hidden, positions, sampling } => {
                if let Some(fault) = self.too_many() {
                    self.refuse(id, fault);
                    return Ok(());
                }
                let text = *self.text.get_or_insert_with(new_number);
                let (means, llm) = (self.means.clone(), shared.llm.clone());
                let generated = means.generate((id, text), (past, hidden, positions), sampling, llm);
                self.in_flight.push(Box::pin(generated));
            }
            ClientMessage::StopGenerating => self.forget_text(shared).await,
            ClientMessage::Leave | ClientMessage::Bye => {} // `serve` has taken them
        }
        Ok(())
    }

    async fn send<S: Sink<Vec<u8>> + Unpin>(&mut self, socket: &mut S, mut message: ServerMessage) -> Result<(), ()> {
        let size = match &message {
            ServerMessage::Trained { reply, .. } => reply.bytes(),
            _ => 0,
        };
        let mut frame = heavy(size, || wire::encode(&message));
        if let ServerMessage::Trained { id, .. } = message
            && frame.len() > wire::MAX_FRAME
        {
            let fault = Fault {
                code: FaultCode::TooLarge,
                cause: format!("the answer has {} bytes, a frame takes {}", frame.len(), wire::MAX_FRAME),
                remedy: "use a smaller batch_size, or set micro_batch; or the operator sets a coarser gradient_format"
                    .into(),
            };
            message = ServerMessage::RequestRefused { id, fault };
            frame = wire::encode(&message);
        }
        let bytes = frame.len();
        self.write(socket, frame).await?;
        self.meter.down(&message, bytes);
        match message {
            ServerMessage::Round { round, .. } | ServerMessage::Wait { round, .. } => self.announced(round),
            ServerMessage::Finished { .. } => self.announced(AFTER_ROUNDS),
            _ => {}
        }
        Ok(())
    }

    /// Send one frame. Requests under way go on meanwhile, and give back their room when they are computed: a peer that does not read
    /// would keep it from all others. Their answers wait to be sent; as nothing is read meanwhile, they are few.
    async fn write<S: Sink<Vec<u8>> + Unpin>(&mut self, socket: &mut S, frame: Vec<u8>) -> Result<(), ()> {
        let mut writing = std::pin::pin!(write(socket, frame));
        loop {
            tokio::select! {
                biased;
                written = &mut writing => return written,
                Some(computed) = self.in_flight.next() => self.answer(computed),
            }
        }
    }

    /// Hand the bytes counted so far to the federation.
    async fn report(&mut self) {
        let rounds = self.meter.take();
        if !rounds.is_empty() {
            self.federation.traffic(self.id, rounds).await;
        }
    }

    /// The connection is over: leave nothing behind that nobody needs, and say so.
    async fn finish(&mut self, end: End, shared: &Shared) {
        // Nobody waits for these any more, and they take room.
        self.in_flight = FuturesUnordered::new();
        self.waiting.clear();
        self.report().await;
        self.forget_text(shared).await;
        shared.features.depart(&self.owner);
        if self.id.is_none() || end.is_for_good(self.round, self.federation.settings().strategy) {
            shared.features.forget(&self.owner);
        }
        if let Some(id) = self.id {
            match end {
                End::Left => self.federation.left(id, self.connection).await,
                // Nobody is given up because the server stops.
                End::Lost | End::Parted if shared.shutdown.is_cancelled() => {}
                End::Lost | End::Parted => self.federation.lost(id, self.connection).await,
            }
        }
    }

    /// Let the host forget this connection's text. Its key stays: a request for it may reach the host only after this, and what that
    /// leaves there is gone on with, or forgotten at the end.
    async fn forget_text(&mut self, shared: &Shared) {
        if let Some(text) = self.text {
            shared.llm.forget(text).await;
        }
    }
}

/// The next message for a participant; never for a connection that only asks.
async fn next(outbox: &mut Option<mpsc::Receiver<ServerMessage>>) -> Option<ServerMessage> {
    match outbox {
        Some(outbox) => outbox.recv().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_come_back_to_train_keeps_its_pictures() {
        let of = |end: End| {
            let rounds = [3, AFTER_ROUNDS].map(|round| end.is_for_good(round, Strategy::FedAvg));
            (rounds, end.is_for_good(AFTER_ROUNDS, Strategy::FedDpaF))
        };
        assert_eq!(of(End::Left), ([true, true], true));
        assert_eq!(of(End::Parted), ([false, true], true));
        // A tab that is closed says no goodbye.
        assert_eq!(of(End::Lost), ([false, true], false));
    }

    #[test]
    fn a_frame_has_time_for_its_length() {
        assert_eq!(time_for(0), WRITE_TIMEOUT);
        assert_eq!(time_for(65_535), WRITE_TIMEOUT);
        // The largest, over a line of 1 Mbit/s.
        assert!(time_for(wire::MAX_FRAME) > Duration::from_secs(wire::MAX_FRAME as u64 * 8 / 1_000_000));
    }
}
