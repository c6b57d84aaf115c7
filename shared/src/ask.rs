//! Using a federation's model without taking part in rounds: a connection that only asks, and greedy decoding through it.

use crate::client::{ClientError, ClientEvent, Interruption, LEFT, Link, Observer, Remote, Transport, name};
use crate::edge::NanoEdge;
use crate::model::adapter::NanoAdapters;
use crate::plain::{BoundaryReply, BoundaryRequest, EvaluationReply};
use crate::step::{self, BoundaryError, LlmBoundary, StepError};
use crate::wire::{ClientMessage, Hello, ServerMessage};
use burn::tensor::Device;

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
    /// Shake hands with [`wire::Purpose::Ask`].
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn open(transport: T, hello: Hello) -> Result<Self, ClientError> {
        // A zero-sized observer: leaking it leaks nothing.
        let mut link = Link { transport, pending: None, next_id: 0, observer: Box::leak(Box::new(Silent)) };
        let failed = |i: Interruption| match i {
            Interruption::Failed(e) => e,
            Interruption::Lost(cause) => ClientError::Unreachable { tries: 1, cause },
            Interruption::Left => ClientError::Unreachable { tries: 1, cause: LEFT.into() },
        };
        link.send(&ClientMessage::Hello(hello)).await.map_err(failed)?;
        match link.receive().await.map_err(failed)? {
            ServerMessage::Welcome { .. } => Ok(Self { link }),
            ServerMessage::Refused(fault) | ServerMessage::Closing(fault) => Err(ClientError::Refused(fault)),
            other => Err(ClientError::Protocol(format!("{} instead of a welcome", name(&other)))),
        }
    }
}

impl<T: Transport> LlmBoundary for Asking<T> {
    async fn train(&mut self, request: BoundaryRequest) -> Result<BoundaryReply, BoundaryError> {
        Remote { link: &mut self.link, round: 0 }.train(request).await
    }

    async fn evaluate(&mut self, request: BoundaryRequest) -> Result<EvaluationReply, BoundaryError> {
        Remote { link: &mut self.link, round: 0 }.evaluate(request).await
    }
}

/// Greedy decoding through the boundary: the prompt and what was said so far go up, the next token comes down.
/// The text adapter covers the generated tokens too.
///
/// # Errors
/// [`StepError`].
pub async fn answer<B: LlmBoundary>(
    edge: &NanoEdge,
    adapters: Option<&NanoAdapters>,
    prompt: &crate::data::text::Encoded,
    features: &[f32],
    max_tokens: usize,
    boundary: &mut B,
    device: &Device,
) -> Result<String, StepError> {
    let mut so_far = prompt.clone();
    let limit = (so_far.ids.len() + max_tokens).min(edge.config.text.max_positions);
    while so_far.ids.len() < limit {
        let batch = edge.assemble(&[(&so_far, features)]);
        let last = so_far.ids.len() as u32 - 1;
        let request = BoundaryRequest {
            hidden: step::adapted(adapters, &batch, device).await?,
            lengths: batch.lengths.clone(),
            targets: vec![crate::plain::Target { row: 0, position: last, token: 0 }],
        };
        let reply = boundary.evaluate(request).await?;
        let Some(&next) = reply.predicted.first() else {
            return Err(StepError::Reply("no token".into()));
        };
        if next == edge.text.eos() || next as usize >= edge.vocabulary() {
            break;
        }
        so_far.ids.push(next);
    }
    Ok(edge.text.decode(&so_far.ids[prompt.ids.len()..]))
}
