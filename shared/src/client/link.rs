//! Messages over a transport, and the boundary over the wire.

use super::{ClientError, ClientEvent, Observer, Transport, TransportError};
use crate::generate::{GenerateRequest, NextToken, TokenSource};
use crate::model::adapter::DeviceError;
use crate::plain::{BoundaryReply, BoundaryRequest, EvaluationReply};
use crate::step::{BoundaryError, LlmBoundary, StepError};
use crate::wire::{self, ClientMessage, FaultCode, ServerMessage};

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

/// A transport that speaks messages.
pub(crate) struct Link<'a, T, O> {
    transport: T,
    next_id: u64,
    pub(crate) observer: &'a mut O,
    /// What to do next; it arrived while something else was awaited. The newest counts.
    pub(super) order: Option<ServerMessage>,
    /// Something was done over this connection: the server is worth as many tries again.
    pub(super) progressed: bool,
}

impl<'a, T: Transport, O: Observer> Link<'a, T, O> {
    pub(crate) fn new(transport: T, observer: &'a mut O) -> Self {
        Self { transport, next_id: 0, observer, order: None, progressed: false }
    }

    pub(crate) async fn send(&mut self, message: &ClientMessage) -> Result<(), Interruption> {
        let frame = wire::encode_to_send(message).map_err(ClientError::Unsent)?;
        Ok(self.transport.send(frame).await?)
    }

    /// The next message from the wire.
    pub(crate) async fn receive(&mut self) -> Result<ServerMessage, Interruption> {
        let frame = self.transport.receive().await?;
        wire::decode(&frame).map_err(|e| protocol(&e.to_string()))
    }

    /// The next message that is neither a status, which is passed on, nor the server's goodbye, which is an interruption.
    pub(super) async fn listen(&mut self) -> Result<ServerMessage, Interruption> {
        loop {
            match self.receive().await? {
                ServerMessage::Status(status) => self.observer.event(ClientEvent::Status(&status)),
                ServerMessage::Closing(fault) => return Err(Interruption::Lost(fault.to_string())),
                other => return Ok(other),
            }
        }
    }

    /// What to do next: what arrived earlier, or the next message.
    pub(super) async fn next(&mut self) -> Result<ServerMessage, Interruption> {
        match self.order.take() {
            Some(order) => Ok(order),
            None => self.listen().await,
        }
    }
}

/// The boundary over the wire: one request under way at a time.
pub(crate) struct Remote<'l, 'a, T, O> {
    link: &'l mut Link<'a, T, O>,
    round: u32,
    patience: u32,
}

impl<'l, 'a, T, O> Remote<'l, 'a, T, O> {
    /// Requests of `round`. They are cancelled when the federation is more than `patience` rounds further: until then a late
    /// update would still be merged.
    pub(crate) fn new(link: &'l mut Link<'a, T, O>, round: u32, patience: u32) -> Self {
        Self { link, round, patience }
    }
}

enum Reply {
    Trained(BoundaryReply),
    Evaluated(EvaluationReply),
    Generated(NextToken),
}

fn mismatched() -> BoundaryError {
    BoundaryError::Failed(
        "the server's reply answers another kind of request; reload the page or update the older program".into(),
    )
}

impl<T: Transport, O: Observer> Remote<'_, '_, T, O> {
    async fn ask(&mut self, message: ClientMessage, id: u64) -> Result<Reply, BoundaryError> {
        let lost = |i: Interruption| match i {
            Interruption::Lost(cause) => BoundaryError::Lost(cause),
            Interruption::Left => BoundaryError::Lost(LEFT.into()),
            Interruption::Failed(e) => BoundaryError::Failed(e.to_string()),
        };
        self.link.send(&message).await.map_err(lost)?;
        loop {
            match self.link.listen().await.map_err(lost)? {
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
                // Replies to requests before a reconnect, or that were cancelled.
                ServerMessage::Trained { .. }
                | ServerMessage::Evaluated { .. }
                | ServerMessage::Generated { .. }
                | ServerMessage::RequestRefused { .. } => {}
                order => {
                    let cause = format!("the server went on with {}", name(&order));
                    let goes_on = self.may_be_late(&order);
                    self.link.order = Some(order);
                    if !goes_on {
                        return Err(BoundaryError::Cancelled(cause));
                    }
                }
            }
        }
    }

    /// The federation is in a later round, but not too late for this one.
    fn may_be_late(&self, order: &ServerMessage) -> bool {
        match order {
            ServerMessage::Round { round, .. } | ServerMessage::Wait { round, .. } => {
                *round > self.round && round - self.round <= self.patience
            }
            _ => false,
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

/// A step's result: done, cancelled because the round moved on (`None`), or an interruption.
pub(super) fn settle<R>(result: Result<R, StepError>) -> Result<Option<R>, Interruption> {
    match result {
        Ok(r) => Ok(Some(r)),
        Err(StepError::Boundary(BoundaryError::Cancelled(_))) => Ok(None),
        Err(StepError::Boundary(BoundaryError::Lost(cause))) if cause == LEFT => Err(Interruption::Left),
        Err(StepError::Boundary(BoundaryError::Lost(cause))) => Err(Interruption::Lost(cause)),
        Err(StepError::Device(e)) => Err(e.into()),
        Err(e) => Err(ClientError::Step(e.to_string()).into()),
    }
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
    }
}
