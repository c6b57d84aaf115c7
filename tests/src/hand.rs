//! A connection on which the test says what it wants, sound or not.

use crate::hello;
use fednano_server::native::{Socket, SocketConnector};
use fednano_shared::boundary::{Place, Target, Want};
use fednano_shared::client::{Connector, Transport};
use fednano_shared::settings::Format;
use fednano_shared::wire::agreement::{Agreement, Offer};
use fednano_shared::wire::numbers::Packed;
use fednano_shared::wire::{
    self, ClientMessage, Fault, Hello, Purpose, ServerMessage, WireInput, WireReply, WireRequest,
};
use tokio_util::sync::CancellationToken;

/// A connection that only asks, by hand.
pub struct Hand<T = Socket> {
    socket: T,
    /// What is spoken.
    pub agreement: Agreement,
    next: u64,
}

impl Hand {
    /// Connect and shake hands.
    ///
    /// # Errors
    /// No connection, or no welcome.
    pub async fn open(url: &str, offer: Offer) -> anyhow::Result<Self> {
        Self::over(SocketConnector::new(url, CancellationToken::new()).connect().await?, offer).await
    }
}

impl<T: Transport> Hand<T> {
    /// Shake hands.
    ///
    /// # Errors
    /// No welcome.
    pub async fn over(mut socket: T, offer: Offer) -> anyhow::Result<Self> {
        let hello = Hello { offer, ..hello("by hand", 0, Purpose::Ask) };
        socket.send(wire::encode(&ClientMessage::Hello(hello))).await?;
        match wire::decode(&socket.receive().await?)? {
            ServerMessage::Welcome { agreement, .. } => Ok(Self { socket, agreement, next: 0 }),
            other => anyhow::bail!("{other:?} instead of a welcome"),
        }
    }

    /// Say something.
    ///
    /// # Errors
    /// A lost connection.
    pub async fn say(&mut self, message: &ClientMessage) -> anyhow::Result<()> {
        Ok(self.socket.send(wire::encode(message)).await?)
    }

    /// The next message that is no status.
    ///
    /// # Errors
    /// A lost connection, or a frame that cannot be read.
    pub async fn hear(&mut self) -> anyhow::Result<ServerMessage> {
        loop {
            match wire::decode(&self.socket.receive().await?)? {
                ServerMessage::Status(_) => {}
                other => return Ok(other),
            }
        }
    }

    /// Ask for a gradient: it, or why there is none.
    ///
    /// # Errors
    /// Anything but an answer.
    pub async fn train(&mut self, request: WireRequest) -> anyhow::Result<Result<WireReply, Fault>> {
        self.next += 1;
        let id = self.next;
        self.say(&ClientMessage::Train { id, round: 0, request }).await?;
        match self.hear().await? {
            ServerMessage::Trained { id: theirs, reply } if theirs == id => Ok(Ok(reply)),
            ServerMessage::RequestRefused { id: theirs, fault } if theirs == id => Ok(Err(fault)),
            other => anyhow::bail!("{other:?} in answer to request {id}"),
        }
    }
}

/// Values as they are, be they what they may.
pub fn exact(values: &[f32]) -> Packed {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Packed { format: Format::F32, deflated: false, bytes }
}

/// Rows of five positions, the answer at the fourth.
pub fn request(rows: usize, input: WireInput) -> WireRequest {
    WireRequest {
        input,
        lengths: vec![5; rows],
        targets: (0..rows as u32).map(|row| Target { row, position: 3, token: 9 }).collect(),
        want: Want::Gradient,
        place: Place::ALONE,
    }
}

/// Some numbers.
pub fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i % 7) as f32 * 0.1).collect()
}
