//! One connection: handshake, then requests, updates and messages until it ends. Generic over the socket, so that tests and
//! the simulator run it over channels.

use crate::coordinator::{AFTER_ROUNDS, Federation, only_asks};
use crate::llm_host::LlmHandle;
use fednano_shared::generate::NextToken;
use fednano_shared::plain::{BoundaryReply, EvaluationReply};
use fednano_shared::wire::{self, ClientMessage, Fault, FaultCode, Hello, ParticipantId, ServerMessage, Traffic};
use futures_util::stream::{FuturesUnordered, StreamExt};
use futures_util::{Sink, SinkExt, Stream};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// A connection must introduce itself within this time.
const HANDSHAKE: Duration = Duration::from_secs(20);
/// Requests of one session under way; one more is refused.
const IN_FLIGHT: usize = 4;
/// A peer that takes nothing for so long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes are reported, and silent peers looked for, this often (more often where they have less time).
const TICK: Duration = Duration::from_secs(1);

/// When a silent peer is asked for a sign of life, and when it counts as gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignsOfLife {
    /// After so long without a word from a side, a sign of life is asked for, or given.
    pub beat: Duration,
    /// A peer that has given signs of life and gives none for so long is gone (a closed lid sends no goodbye).
    pub silence: Duration,
}

impl Default for SignsOfLife {
    fn default() -> Self {
        Self { beat: Duration::from_secs(15), silence: Duration::from_secs(90) }
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

/// What all sessions share.
#[derive(Clone)]
pub struct Shared {
    /// By id.
    pub federations: BTreeMap<String, Federation>,
    /// The LLM.
    pub llm: LlmHandle,
    /// Cancelled at shutdown.
    pub shutdown: CancellationToken,
}

enum Computed {
    Trained(u64, Result<BoundaryReply, Fault>),
    Evaluated(u64, Result<EvaluationReply, Fault>),
    Generated(u64, Result<NextToken, Fault>),
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
    match handshake(&mut socket, &shared).await {
        Ok(Some(mut session)) => {
            let (id, connection) = (session.id, session.connection);
            let end = session.serve(&mut socket, &shared, signs).await;
            session.report().await;
            session.end_text(&shared).await;
            if let Some(id) = id {
                match end {
                    End::Left => session.federation.left(id, connection).await,
                    // Nobody is given up because the server stops.
                    End::Lost if shared.shutdown.is_cancelled() => {}
                    End::Lost => session.federation.lost(id, connection).await,
                }
            }
        }
        Ok(None) => {}
        // Its federation has stopped already: it should come back, not give up.
        Err(_) if shared.shutdown.is_cancelled() => {
            drop(socket.send(wire::encode(&ServerMessage::Closing(closing()))).await);
        }
        Err(fault) => refuse(&mut socket, fault).await,
    }
    drop(tokio::time::timeout(WRITE_TIMEOUT, socket.close()).await);
}

/// Send one frame; an empty one asks for a sign of life.
async fn write<S: Sink<Vec<u8>> + Unpin>(socket: &mut S, frame: Vec<u8>) -> Result<(), ()> {
    match tokio::time::timeout(WRITE_TIMEOUT, socket.send(frame)).await {
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

async fn refuse<S: Sink<Vec<u8>> + Unpin>(socket: &mut S, fault: Fault) {
    tracing::info!(code = ?fault.code, "refused: {}", fault.cause);
    // The peer may be gone already; the session ends either way.
    let _ = write(socket, wire::encode(&ServerMessage::Refused(fault))).await;
}

fn out_of_order(cause: &str) -> Fault {
    Fault {
        code: FaultCode::OutOfOrder,
        cause: cause.into(),
        remedy: "the first message must be one Hello; use a FedNano client of the server's version".into(),
    }
}

/// Read one frame as a message; `None` when the connection is over.
fn message(frame: Option<Result<Vec<u8>, SocketFault>>) -> Result<Option<(ClientMessage, usize)>, Fault> {
    match frame {
        Some(Ok(frame)) => wire::decode(&frame).map(|m| Some((m, frame.len()))).map_err(|e| e.fault()),
        Some(Err(SocketFault::TooLarge)) => Err(wire::WireError::TooLarge(wire::MAX_FRAME + 1).fault()),
        Some(Err(SocketFault::NotBinary)) => Err(wire::WireError::NotAFrame(0).fault()),
        // No close frame, no fault: tabs vanish.
        Some(Err(SocketFault::Closed | SocketFault::Alive)) | None => Ok(None),
    }
}

async fn handshake<S>(socket: &mut S, shared: &Shared) -> Result<Option<Session>, Fault>
where
    S: Stream<Item = Result<Vec<u8>, SocketFault>> + Sink<Vec<u8>> + Unpin,
{
    let Ok(frame) = tokio::time::timeout(HANDSHAKE, socket.next()).await else {
        return Err(out_of_order("no Hello arrived in time"));
    };
    let (mut hello, length) = match message(frame)? {
        Some((ClientMessage::Hello(hello), length)) => (hello, length),
        Some(_) => return Err(out_of_order("the first message is not a Hello")),
        None => return Ok(None),
    };
    check(&hello)?;
    hello.device.truncate(hello.device.floor_char_boundary(wire::MAX_DEVICE));
    let Some(federation) = shared.federations.get(&hello.federation).cloned() else {
        let known: Vec<&str> = shared.federations.keys().map(String::as_str).collect();
        return Err(Fault {
            code: FaultCode::UnknownFederation,
            cause: format!("there is no federation '{}' here", hello.federation),
            remedy: format!("check the invite link; this server has: {}", known.join(", ")),
        });
    };
    if shared.llm.is_gone() {
        return Err(Fault {
            code: FaultCode::Server,
            cause: "the LLM's thread has ended".into(),
            remedy: "ask the operator to start the server again; nothing is lost".into(),
        });
    }
    let asks = only_asks(&hello);
    let mut session = Session::new(federation.clone());
    session.traffic.control_up += length as u64;
    let welcome = if asks {
        let status = federation.status();
        ServerMessage::Welcome {
            participant: ParticipantId(0),
            token: wire::SessionToken(String::new()),
            returning: false,
            settings: fednano_shared::settings::FederationSettings::default(),
            status,
        }
    } else {
        let joined = federation.join(hello).await?;
        session.id = Some(joined.id);
        session.connection = joined.connection;
        session.patience = joined.settings.max_staleness;
        session.outbox = Some(joined.outbox);
        ServerMessage::Welcome {
            participant: joined.id,
            token: joined.token,
            returning: joined.returning,
            settings: joined.settings,
            status: joined.status,
        }
    };
    if session.send(socket, welcome).await.is_err() {
        if !shared.shutdown.is_cancelled() {
            session.abandon().await;
        }
        return Ok(None);
    }
    Ok(Some(session))
}

fn check(hello: &Hello) -> Result<(), Fault> {
    let fault = |cause: String, remedy: &str| Err(Fault { code: FaultCode::Invalid, cause, remedy: remedy.into() });
    for (what, text) in [("name", &hello.name), ("federation", &hello.federation)] {
        if text.len() > wire::MAX_NAME {
            return fault(
                format!("the {what} has {} bytes, at most {} are allowed", text.len(), wire::MAX_NAME),
                "shorten it; letters beyond plain ASCII take 2 to 4 bytes",
            );
        }
    }
    if hello.samples == 0 && !only_asks(hello) {
        return fault(
            "a participant without samples cannot train".into(),
            "choose pictures with questions and answers first",
        );
    }
    Ok(())
}

enum End {
    Left,
    Lost,
}

struct Session {
    federation: Federation,
    id: Option<ParticipantId>, // none: only asks
    connection: u64,
    outbox: Option<mpsc::Receiver<ServerMessage>>,
    round: u32,    // the federation's, as last told; AFTER_ROUNDS once all are done
    patience: u32, // rounds that an update may be late
    in_flight: InFlight,
    traffic: Traffic,  // not yet reported
    text: Option<u64>, // key of the text that this connection generates
}

/// A key that no other text has.
fn new_text() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Session {
    fn new(federation: Federation) -> Self {
        Self {
            federation,
            id: None,
            connection: 0,
            outbox: None,
            round: 0,
            patience: 0,
            in_flight: FuturesUnordered::new(),
            traffic: Traffic::default(),
            text: None,
        }
    }

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
            let outgoing = tokio::select! {
                frame = socket.next() => {
                    heard = Instant::now();
                    if matches!(frame, Some(Err(SocketFault::Alive))) {
                        answers = true;
                        continue;
                    }
                    let taken = match message(frame) {
                        Ok(Some((ClientMessage::Leave, _))) => return End::Left,
                        Ok(Some((message, length))) => self.take(message, length, shared).await,
                        Ok(None) => return End::Lost,
                        Err(fault) => Err(fault),
                    };
                    match taken {
                        Ok(reply) => reply,
                        Err(fault) => {
                            refuse(socket, fault).await;
                            return End::Lost;
                        }
                    }
                }
                message = next(&mut self.outbox) => match message {
                    Some(message) => Some(message),
                    None => return End::Lost, // a newer connection took its place, or this one was too slow
                },
                Some(computed) = self.in_flight.next() => Some(match computed {
                    Computed::Trained(id, Ok(reply)) => ServerMessage::Trained { id, reply },
                    Computed::Evaluated(id, Ok(reply)) => ServerMessage::Evaluated { id, reply },
                    Computed::Generated(id, Ok(next)) => ServerMessage::Generated { id, next },
                    Computed::Trained(id, Err(fault))
                    | Computed::Evaluated(id, Err(fault))
                    | Computed::Generated(id, Err(fault)) => ServerMessage::RequestRefused { id, fault },
                }),
                _ = ticks.tick() => {
                    self.report().await;
                    // Whoever was held up itself (a slow write, a busy machine) has not listened and gives nobody up.
                    if ticked.elapsed() > signs.beat.saturating_mul(2) {
                        heard = Instant::now();
                    }
                    ticked = Instant::now();
                    if answers && heard.elapsed() > signs.silence {
                        tracing::info!(participant = self.id.map(|id| id.0), "no sign of life, so it counts as away");
                        return End::Lost;
                    }
                    if asked.elapsed().min(heard.elapsed()) > signs.beat {
                        asked = Instant::now();
                        if write(socket, Vec::new()).await.is_err() {
                            return End::Lost;
                        }
                    }
                    // Browsers do not show their program the server's pings: something must be said.
                    (spoke.elapsed() > signs.beat).then(|| ServerMessage::Status(self.federation.status()))
                }
                () = shared.shutdown.cancelled() => {
                    // The peer may be gone already; the session ends either way.
                    let _ = self.send(socket, ServerMessage::Closing(closing())).await;
                    return End::Lost;
                }
            };
            if let Some(message) = outgoing {
                spoke = Instant::now();
                if self.send(socket, message).await.is_err() {
                    return End::Lost;
                }
            }
        }
    }

    /// Act on a message; a fault ends the session.
    async fn take(
        &mut self,
        message: ClientMessage,
        length: usize,
        shared: &Shared,
    ) -> Result<Option<ServerMessage>, Fault> {
        let length = length as u64;
        match message {
            ClientMessage::Hello(_) => return Err(out_of_order("a second Hello")),
            ClientMessage::Train { id, round, request } => {
                self.traffic.activations_up += length;
                if self.id.is_some() && !self.takes(round) {
                    let fault = Fault {
                        code: FaultCode::StaleRound,
                        cause: format!("the request is for round {round}, this participant is in round {}", self.round),
                        remedy: "go on with the current round".into(),
                    };
                    return Ok(Some(ServerMessage::RequestRefused { id, fault }));
                }
                if let Some(refusal) = self.too_many(id) {
                    return Ok(Some(refusal));
                }
                let llm = shared.llm.of(self.id, if self.round == AFTER_ROUNDS { AFTER_ROUNDS } else { round });
                self.in_flight.push(Box::pin(async move { Computed::Trained(id, llm.train(request).await) }));
            }
            ClientMessage::Evaluate { id, request } => {
                self.traffic.activations_up += length;
                if let Some(refusal) = self.too_many(id) {
                    return Ok(Some(refusal));
                }
                let llm = shared.llm.of(self.id, self.round);
                self.in_flight.push(Box::pin(async move { Computed::Evaluated(id, llm.evaluate(request).await) }));
            }
            ClientMessage::Progress { round, step, steps, loss } => {
                self.traffic.control_up += length;
                let Some(id) = self.id else {
                    return Err(out_of_order("progress on a connection that only asks"));
                };
                self.federation.progress(id, round, (step, steps), loss).await;
            }
            ClientMessage::Update(update) => {
                self.traffic.updates_up += length;
                let Some(id) = self.id else {
                    return Err(out_of_order("an update on a connection that only asks"));
                };
                self.federation.update(id, update).await;
            }
            ClientMessage::Personal { local, .. } => {
                self.traffic.control_up += length;
                let Some(id) = self.id else {
                    return Err(out_of_order("a personal evaluation on a connection that only asks"));
                };
                self.federation.personal(id, local).await;
            }
            ClientMessage::Generate { id, request } => {
                self.traffic.activations_up += length;
                if let Some(refusal) = self.too_many(id) {
                    return Ok(Some(refusal));
                }
                let (llm, text) = (shared.llm.clone(), *self.text.get_or_insert_with(new_text));
                self.in_flight
                    .push(Box::pin(async move { Computed::Generated(id, llm.generate(text, request).await) }));
            }
            ClientMessage::StopGenerating => {
                self.traffic.control_up += length;
                self.end_text(shared).await;
            }
            ClientMessage::Leave => {}
        }
        Ok(None)
    }

    /// Is there any use in training for this round? Somebody who is late may still be merged later.
    fn takes(&self, round: u32) -> bool {
        self.round == AFTER_ROUNDS || (round <= self.round && self.round - round <= self.patience)
    }

    fn too_many(&self, id: u64) -> Option<ServerMessage> {
        (self.in_flight.len() >= IN_FLIGHT).then(|| ServerMessage::RequestRefused {
            id,
            fault: Fault {
                code: FaultCode::OutOfOrder,
                cause: format!("{IN_FLIGHT} requests of this session are under way already"),
                remedy: "wait for a reply before sending the next request".into(),
            },
        })
    }

    async fn send<S: Sink<Vec<u8>> + Unpin>(&mut self, socket: &mut S, message: ServerMessage) -> Result<(), ()> {
        let frame = wire::encode(&message);
        let bytes = frame.len() as u64;
        match message {
            ServerMessage::Trained { .. } | ServerMessage::Evaluated { .. } | ServerMessage::Generated { .. } => {
                self.traffic.gradients_down += bytes;
            }
            ServerMessage::Round { round, .. } => {
                self.round = round;
                self.traffic.adapters_down += bytes;
            }
            ServerMessage::Wait { round, .. } => {
                self.round = round;
                self.traffic.control_down += bytes;
            }
            ServerMessage::Finished { .. } => {
                self.round = AFTER_ROUNDS;
                self.traffic.adapters_down += bytes;
            }
            _ => self.traffic.control_down += bytes,
        }
        write(socket, frame).await
    }

    /// Hand the bytes counted so far to the federation.
    async fn report(&mut self) {
        let traffic = std::mem::take(&mut self.traffic);
        if let Some(id) = self.id.filter(|_| traffic != Traffic::default()) {
            self.federation.traffic(id, traffic).await;
        }
    }

    /// Let the host forget this connection's text.
    async fn end_text(&mut self, shared: &Shared) {
        if let Some(text) = self.text.take() {
            shared.llm.forget(text).await;
        }
    }

    async fn abandon(&mut self) {
        if let Some(id) = self.id {
            self.federation.lost(id, self.connection).await;
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
    use fednano_shared::wire::{ClientKind, Purpose};

    fn hello(name: &str, federation: &str) -> Hello {
        Hello {
            federation: federation.into(),
            name: name.into(),
            kind: ClientKind::Tab,
            device: String::new(),
            samples: 1,
            edge_bytes: 0,
            purpose: Purpose::Train,
            resume: None,
        }
    }

    #[test]
    fn a_name_is_measured_in_bytes() {
        let two_bytes = "\u{e9}";
        assert!(check(&hello(&two_bytes.repeat(wire::MAX_NAME / 2), "f")).is_ok());
        let fault = check(&hello(&two_bytes.repeat(wire::MAX_NAME / 2 + 1), "f")).unwrap_err();
        assert_eq!(fault.code, FaultCode::Invalid);
        assert!(fault.cause.contains("the name has 122 bytes, at most 120") && !fault.remedy.is_empty(), "{fault}");
        assert!(check(&hello("a", &"f".repeat(wire::MAX_NAME + 1))).unwrap_err().cause.contains("the federation has"));
        // What the page's input takes, in the widest letters, is not refused here.
        let widest = "\u{6f22}".repeat(40);
        assert_eq!(widest.encode_utf16().count(), 40);
        assert!(check(&hello(&widest, "f")).is_ok());
    }

    #[test]
    fn somebody_without_samples_only_asks() {
        let nothing = Hello { samples: 0, ..hello("a", "f") };
        assert!(check(&nothing).unwrap_err().cause.contains("without samples"));
        assert!(check(&Hello { purpose: Purpose::Ask, ..nothing }).is_ok());
    }
}
