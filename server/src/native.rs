//! A participant outside the browser: invite link, socket, clock, lines on a terminal; and a channel that stands in for a socket
//! in simulation and tests.

use crate::session::SocketFault;
use anyhow::Context;
use fednano_shared::client::{ClientEvent, Clock, Connector, Observer, Transport, TransportError};
use fednano_shared::wire::{MAX_FRAME, check_outgoing};
use futures_channel::mpsc;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{Sink, SinkExt, Stream, StreamExt};
use std::collections::VecDeque;
use std::pin::{Pin, pin};
use std::sync::OnceLock;
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{self, Message, protocol::WebSocketConfig};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};
use tokio_util::sync::CancellationToken;
use url::Url;

/// An invite link, taken apart.
#[derive(Debug, Clone)]
pub struct Invite {
    /// Base of the server, ends in '/'.
    pub base: Url,
    /// WebSocket address.
    pub socket: String,
    /// Federation.
    pub federation: String,
}

impl Invite {
    /// Parse `http://host:port/?federation=NAME`.
    ///
    /// # Errors
    /// What is missing.
    pub fn parse(link: &str) -> anyhow::Result<Self> {
        let url = Url::parse(link).with_context(|| format!("'{link}' is no address; copy the whole invite link"))?;
        let scheme = match url.scheme() {
            "http" => "ws",
            "https" => "wss",
            other => anyhow::bail!("'{link}' begins with {other}:, an invite link begins with http: or https:"),
        };
        let federation = url.query_pairs().find(|(k, _)| k == "federation").map(|(_, v)| v.into_owned());
        let federation =
            federation.with_context(|| format!("'{link}' names no federation; it should end in /?federation=NAME"))?;
        let base = url.join("./")?;
        let mut socket = base.join("ws")?;
        socket
            .set_scheme(scheme)
            .map_err(|()| anyhow::anyhow!("'{link}' cannot be turned into a WebSocket address"))?;
        Ok(Self { base, socket: socket.to_string(), federation })
    }
}

/// Connects to a server's WebSocket.
pub struct SocketConnector {
    url: String,
    leave: CancellationToken,
    silence: Duration,
}

impl SocketConnector {
    /// `leave`: cancelled when the person wants to leave.
    pub fn new(url: impl Into<String>, leave: CancellationToken) -> Self {
        Self { url: url.into(), leave, silence: SILENCE }
    }

    /// A server that says nothing for so long, not even a ping, is gone (otherwise 90 s).
    pub fn with_silence(self, silence: Duration) -> Self {
        Self { silence, ..self }
    }
}

type Whole = WebSocketStream<MaybeTlsStream<TcpStream>>;
/// What a socket brings; none: its end.
type Brought = Option<Result<Message, tungstenite::Error>>;

/// A native WebSocket.
pub struct Socket {
    sink: SplitSink<Whole, Message>,
    stream: SplitStream<Whole>,
    /// What came while something was sent.
    held: VecDeque<Brought>,
    leave: CancellationToken,
    silence: Duration,
}

/// A server says something every 15 s; one that is silent for so long is gone.
const SILENCE: Duration = Duration::from_secs(90);
/// A server that takes no connection for so long counts as away.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);
/// A frame must be gone after this: a server that is busy takes no more for a while, one that is gone never does.
const SEND_LIMIT: Duration = Duration::from_secs(600);
/// Frames that are held while one is sent; when there are so many, the other side waits until they are asked for.
const HELD: usize = 64;

impl Connector for SocketConnector {
    type Transport = Socket;

    async fn connect(&mut self) -> Result<Socket, TransportError> {
        let config = WebSocketConfig::default().max_message_size(Some(MAX_FRAME)).max_frame_size(Some(MAX_FRAME));
        if self.leave.is_cancelled() {
            return Err(TransportError::Left);
        }
        let connecting = tokio_tungstenite::connect_async_with_config(&self.url, Some(config), true);
        let connected = tokio::select! {
            () = self.leave.cancelled() => return Err(TransportError::Left),
            connected = tokio::time::timeout(CONNECT_LIMIT, connecting) => connected,
        };
        let cause = match connected {
            Ok(Ok((whole, _))) => {
                let (sink, stream) = whole.split();
                let (held, leave) = (VecDeque::new(), self.leave.clone());
                return Ok(Socket { sink, stream, held, leave, silence: self.silence });
            }
            Ok(Err(e)) => e.to_string(),
            Err(_) => format!("the server took none within {} s", CONNECT_LIMIT.as_secs()),
        };
        Err(TransportError::Lost(format!("no connection to {}: {cause}", self.url)))
    }
}

impl Socket {
    /// The next frame; `limit` is for each word from the server, a sign of life included.
    async fn frame(&mut self, limit: Duration) -> Result<Vec<u8>, TransportError> {
        loop {
            let next = match self.held.pop_front() {
                Some(next) => next,
                None => match tokio::time::timeout(limit, self.stream.next()).await {
                    Ok(next) => next,
                    Err(_) => {
                        let seconds = limit.as_secs_f64();
                        return Err(TransportError::Lost(format!("the server has been silent for {seconds} s")));
                    }
                },
            };
            match next {
                Some(Ok(Message::Binary(bytes))) => return Ok(bytes.into()),
                Some(Ok(Message::Close(_))) | None => {
                    return Err(TransportError::Lost("the server closed the connection".into()));
                }
                Some(Ok(_)) => {}
                Some(Err(e)) => return Err(TransportError::Lost(format!("the connection broke: {e}"))),
            }
        }
    }
}

/// Nothing comes after it.
fn is_last(brought: &Brought) -> bool {
    matches!(brought, None | Some(Err(_) | Ok(Message::Close(_))))
}

impl Transport for Socket {
    /// Listens meanwhile: of two sides that send large frames to each other and do not listen, each would wait for the other.
    async fn send(&mut self, frame: Vec<u8>) -> Result<(), TransportError> {
        // The server would close the connection, which says less.
        check_outgoing(&frame).map_err(|e| TransportError::Lost(e.to_string()))?;
        let Self { sink, stream, held, .. } = self;
        let mut sending = pin!(tokio::time::timeout(SEND_LIMIT, sink.send(Message::Binary(frame.into()))));
        loop {
            let listens = held.len() < HELD && !held.back().is_some_and(is_last);
            tokio::select! {
                biased;
                sent = &mut sending => return match sent {
                    Ok(sent) => sent.map_err(|e| TransportError::Lost(format!("the connection broke: {e}"))),
                    Err(_) => Err(TransportError::Lost("the server has taken nothing for ten minutes".into())),
                },
                next = stream.next(), if listens => held.push_back(next),
            }
        }
    }

    async fn receive(&mut self) -> Result<Vec<u8>, TransportError> {
        let (leave, silence) = (self.leave.clone(), self.silence);
        tokio::select! {
            biased;
            () = leave.cancelled() => Err(TransportError::Left),
            frame = self.frame(silence) => frame,
        }
    }

    async fn last(&mut self, limit: Duration) -> Result<Vec<u8>, TransportError> {
        self.frame(limit).await
    }
}

/// Frames that wait in a channel; when full, the sender waits.
const CHANNEL: usize = 8;

/// The server's end of a channel, in place of a socket.
pub struct ServerEnd {
    incoming: mpsc::Receiver<Vec<u8>>,
    outgoing: mpsc::Sender<Vec<u8>>,
}

/// The client's end.
pub struct ClientEnd {
    incoming: mpsc::Receiver<Vec<u8>>,
    outgoing: mpsc::Sender<Vec<u8>>,
    /// What came while something was sent.
    held: VecDeque<Vec<u8>>,
}

/// A pair of connected ends.
pub fn channel() -> (ServerEnd, ClientEnd) {
    let ((up, server_in), (down, client_in)) = (mpsc::channel(CHANNEL), mpsc::channel(CHANNEL));
    let client = ClientEnd { incoming: client_in, outgoing: up, held: VecDeque::new() };
    (ServerEnd { incoming: server_in, outgoing: down }, client)
}

impl Stream for ServerEnd {
    type Item = Result<Vec<u8>, SocketFault>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<Option<Self::Item>> {
        self.incoming.poll_next_unpin(cx).map(|frame| frame.map(Ok))
    }
}

impl Sink<Vec<u8>> for ServerEnd {
    type Error = mpsc::SendError;

    fn poll_ready(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.outgoing.poll_ready_unpin(cx)
    }
    fn start_send(mut self: Pin<&mut Self>, frame: Vec<u8>) -> Result<(), Self::Error> {
        // Within a process nobody needs signs of life.
        if frame.is_empty() { Ok(()) } else { self.outgoing.start_send_unpin(frame) }
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.outgoing.poll_flush_unpin(cx)
    }
    fn poll_close(mut self: Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.outgoing.poll_close_unpin(cx)
    }
}

impl Transport for ClientEnd {
    /// Listens meanwhile, as [`Socket`] does.
    async fn send(&mut self, frame: Vec<u8>) -> Result<(), TransportError> {
        let Self { incoming, outgoing, held } = self;
        let mut sending = pin!(outgoing.send(frame));
        loop {
            tokio::select! {
                biased;
                sent = &mut sending => return sent.map_err(|_| TransportError::Lost("the session ended".into())),
                Some(next) = incoming.next(), if held.len() < HELD => held.push_back(next),
            }
        }
    }

    async fn receive(&mut self) -> Result<Vec<u8>, TransportError> {
        if let Some(frame) = self.held.pop_front() {
            return Ok(frame);
        }
        self.incoming.next().await.ok_or_else(|| TransportError::Lost("the session ended".into()))
    }
}

/// Connects to a server in the same process.
pub struct ChannelConnector(pub crate::session::Shared);

impl Connector for ChannelConnector {
    type Transport = ClientEnd;

    async fn connect(&mut self) -> Result<ClientEnd, TransportError> {
        let (server, client) = channel();
        tokio::spawn(crate::session::run(server, self.0.clone()));
        Ok(client)
    }
}

/// tokio's clock.
pub struct TokioClock;

impl Clock for TokioClock {
    async fn sleep(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    fn now(&self) -> Duration {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed()
    }
}

/// Tells of a participation in lines.
pub struct Lines(pub String);

impl Observer for Lines {
    fn event(&mut self, event: ClientEvent<'_>) {
        let who = &self.0;
        match event {
            ClientEvent::Joined { participant, resumed, agreement, .. } => {
                let (how, mode) = (if resumed { "back" } else { "joined" }, agreement.mode);
                println!("[{who}] {how} as participant {}, boundary: {mode}", participant.0);
            }
            ClientEvent::Round { round, from_step, steps, .. } => {
                println!("[{who}] round {round}: {steps} steps, from step {from_step}")
            }
            ClientEvent::Step { round, step, steps, loss, .. } if step == steps || step % 10 == 0 => {
                println!("[{who}] round {round}: step {step}/{steps}, loss {loss:.3}");
            }
            ClientEvent::Uploaded { round, .. } => println!("[{who}] round {round}: update accepted"),
            ClientEvent::Waiting { round, .. } => {
                println!("[{who}] round {round}: not drawn this time, waiting for the next")
            }
            ClientEvent::Local { round, local, .. } => println!(
                "[{who}] round {round}: own test questions {:.1} % as received, {:.1} % with the own adapters",
                local.global.accuracy * 100.0,
                local.own.accuracy * 100.0
            ),
            ClientEvent::NotCounted { round, fault } => println!("[{who}] round {round}: {fault}"),
            ClientEvent::Lost { cause, retry_in } => {
                println!("[{who}] {cause}; trying again in {:.1} s", retry_in.as_secs_f64())
            }
            ClientEvent::Step { .. }
            | ClientEvent::Fisher { .. }
            | ClientEvent::Status(_)
            | ClientEvent::Traffic { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whoever_sends_listens_too() {
        let (mut server, mut client) = channel();
        let frame = |i: usize| vec![i as u8];
        const MANY: usize = 3 * CHANNEL;
        let up = async {
            for i in 0..MANY {
                client.send(frame(i)).await.unwrap();
            }
            for i in 0..MANY {
                assert_eq!(client.receive().await, Ok(frame(i)));
            }
        };
        let down = async {
            for i in 0..MANY {
                server.send(frame(i)).await.unwrap();
            }
            for i in 0..MANY {
                assert_eq!(server.next().await.unwrap().unwrap(), frame(i));
            }
        };
        let both = async { tokio::join!(up, down) };
        tokio::time::timeout(Duration::from_secs(60), both).await.expect("each waits for the other");
        drop(server);
        assert!(matches!(client.last(Duration::from_secs(1)).await, Err(TransportError::Lost(_))));
    }
}
