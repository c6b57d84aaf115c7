//! Using a federation's model without taking part in rounds: a connection that only asks.

use crate::boundary::{BoundaryReply, BoundaryRequest, EvaluationReply, Place};
use crate::client::{ClientError, ClientEvent, Interruption, LEFT, Link, Observer, Remote, Transport, name};
use crate::edge::Batch;
use crate::generate::{GenerateRequest, NextToken, TokenSource};
use crate::ledger::Traffic;
use crate::settings::Format;
use crate::step::{BoundaryError, LlmBoundary};
use crate::wire::agreement::{Agreement, BoundaryMode};
use crate::wire::{ClientMessage, Hello, ServerMessage};

/// A connection that only asks: a boundary for questions, tests and comparisons.
pub struct Asking<T: Transport> {
    link: Link<'static, T, Silent>,
}

/// Hears nothing.
pub struct Silent;

impl Observer for Silent {
    fn event(&mut self, _: ClientEvent<'_>) {}
}

impl<T: Transport> Asking<T> {
    /// Shake hands with [`Purpose::Ask`](crate::wire::Purpose::Ask).
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn open(transport: T, hello: Hello) -> Result<Self, ClientError> {
        // A zero-sized observer: leaking it leaks nothing.
        let mut link = Link::new(transport, Box::leak(Box::new(Silent)));
        let failed = |i: Interruption| match i {
            Interruption::Failed(e) => e,
            Interruption::Lost(cause) => ClientError::Unreachable { tries: 1, cause },
            Interruption::Left => ClientError::Unreachable { tries: 1, cause: LEFT.into() },
        };
        link.send(&ClientMessage::Hello(hello)).await.map_err(failed)?;
        match link.receive().await.map_err(failed)? {
            ServerMessage::Welcome { settings, agreement, .. } => {
                link.agree(agreement, settings.seed);
                Ok(Self { link })
            }
            ServerMessage::Refused(fault) | ServerMessage::Closing(fault) => Err(ClientError::Refused(fault)),
            other => Err(ClientError::Protocol(format!("{} instead of a welcome", name(&other)))),
        }
    }

    /// What is spoken.
    pub fn agreement(&self) -> &Agreement {
        &self.link.agreement
    }

    /// Bytes so far, as counted here.
    pub fn traffic(&self) -> Traffic {
        self.link.traffic()
    }

    fn boundary(&mut self) -> Remote<'_, 'static, T, Silent> {
        Remote::new(&mut self.link, 0, 0)
    }
}

impl<T: Transport> LlmBoundary for Asking<T> {
    fn mode(&self) -> BoundaryMode {
        self.link.agreement.mode
    }

    fn features(&self) -> Format {
        self.link.agreement.features
    }

    async fn send(&mut self, request: BoundaryRequest, batch: &Batch, place: Place) -> Result<(), BoundaryError> {
        self.boundary().send(request, batch, place).await
    }

    async fn reply(&mut self) -> Result<BoundaryReply, BoundaryError> {
        self.boundary().reply().await
    }

    async fn evaluate(&mut self, request: BoundaryRequest, batch: &Batch) -> Result<EvaluationReply, BoundaryError> {
        self.boundary().evaluate(request, batch).await
    }

    fn window(&self) -> usize {
        self.link.window()
    }
}

impl<T: Transport> TokenSource for Asking<T> {
    async fn next(&mut self, request: GenerateRequest) -> Result<NextToken, BoundaryError> {
        self.boundary().next(request).await
    }
}

impl<T: Transport> Asking<T> {
    /// The text is over; the server need not keep it. A courtesy: the end of the connection has the same effect.
    pub async fn stop(&mut self) {
        drop(self.link.send(&ClientMessage::StopGenerating).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::TransportError;
    use crate::settings::FederationSettings;
    use crate::wire::agreement::Offer;
    use crate::wire::{self, ClientKind, ParticipantId, Phase, Purpose, SessionToken, Status};
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    /// Says a welcome, whatever it hears.
    struct Polite;

    fn welcome() -> ServerMessage {
        ServerMessage::Welcome {
            participant: ParticipantId(0),
            token: SessionToken(String::new()),
            returning: false,
            settings: FederationSettings::default(),
            status: Status {
                federation: "f".into(),
                phase: Phase::Lobby,
                round: 0,
                rounds: 1,
                participants: Vec::new(),
                history: Vec::new(),
                min_participants: 2,
            },
            agreement: Agreement::PLAIN,
        }
    }

    impl Transport for Polite {
        async fn send(&mut self, _: Vec<u8>) -> Result<(), TransportError> {
            Ok(())
        }

        async fn receive(&mut self) -> Result<Vec<u8>, TransportError> {
            Ok(wire::encode(&welcome()))
        }
    }

    #[test]
    fn every_byte_of_a_question_is_counted() {
        let hello = Hello {
            federation: "f".into(),
            name: "a question".into(),
            kind: ClientKind::Tab,
            device: String::new(),
            samples: 0,
            edge_bytes: 0,
            purpose: Purpose::Ask,
            resume: None,
            offer: Offer::default(),
            download: None,
        };
        let frame = |message: ClientMessage| wire::encode(&message).len() as u64;
        let up = frame(ClientMessage::Hello(hello.clone())) + frame(ClientMessage::StopGenerating);
        let asked = async {
            let mut asking = Asking::open(Polite, hello).await.unwrap();
            asking.stop().await;
            asking.traffic()
        };
        let Poll::Ready(asked) = pin!(asked).poll(&mut Context::from_waker(Waker::noop())) else {
            panic!("it waits");
        };
        assert_eq!((asked.up.total(), asked.down.total()), (up, wire::encode(&welcome()).len() as u64));
    }
}
