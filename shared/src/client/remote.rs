//! The boundary over the wire: what a request needs goes before it, answers are put to the requests that wait for them.
//!
//! In mode `low-rank` the server keeps a picture's features once it has had them. What it lacks all the same (it has been restarted,
//! or needed the room) it asks for while a request waits; that request is not sent again.

use super::link::{Interruption, LEFT, Link, name};
use super::{ClientError, Observer, Transport};
use crate::boundary::{BoundaryReply, BoundaryRequest, EvaluationReply, Input, Place};
use crate::edge::{Batch, PictureFeatures};
use crate::generate::{GenerateRequest, NextToken, TokenSource};
use crate::settings::Format;
use crate::step::{BoundaryError, LlmBoundary, StepError};
use crate::wire::agreement::BoundaryMode;
use crate::wire::convert::{SentShape, pack_hidden};
use crate::wire::numbers::PictureKey;
use crate::wire::{ClientMessage, FaultCode, ServerMessage, WireRequest};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Bytes of features in one frame; a larger picture has one of its own. Few: the server hears of a frame when all of it is there, and
/// whoever is silent for long is gone to it. At 100 kbit/s these take 84 s.
const FEATURES_AT_ONCE: usize = 1 << 20;

/// The boundary over a connection.
pub(crate) struct Remote<'l, 'a, T, O> {
    link: &'l mut Link<'a, T, O>,
    round: u32,
    patience: u32,
}

/// A request that is not answered, or whose answer nobody has taken yet.
pub(super) struct Waiting {
    id: u64,
    /// What the answer must fit.
    shape: Option<SentShape>,
    /// What the server may ask for.
    pictures: BTreeMap<PictureKey, Arc<PictureFeatures>>,
    /// Features that went since it was sent: the server has put them into it, whether it had asked for them by then or not.
    had: BTreeSet<PictureKey>,
    answer: Option<Result<Answer, BoundaryError>>,
}

impl Waiting {
    /// Nothing is known of what it needs.
    fn new(id: u64) -> Self {
        Self { id, shape: None, pictures: BTreeMap::new(), had: BTreeSet::new(), answer: None }
    }
}

#[allow(clippy::large_enum_variant)] // two at a time
enum Answer {
    Trained(BoundaryReply),
    Evaluated(EvaluationReply),
    Generated(NextToken),
}

impl<'l, 'a, T, O> Remote<'l, 'a, T, O> {
    /// Requests of `round`. They are cancelled when the federation is more than `patience` rounds further: until then a late
    /// update would still be merged.
    pub(crate) fn new(link: &'l mut Link<'a, T, O>, round: u32, patience: u32) -> Self {
        Self { link, round, patience }
    }
}

fn mismatched() -> BoundaryError {
    BoundaryError::Failed(
        "the server's reply answers another kind of request; reload the page or update the older program".into(),
    )
}

fn lost(interruption: Interruption) -> BoundaryError {
    match interruption {
        Interruption::Lost(cause) => BoundaryError::Lost(cause),
        Interruption::Left => BoundaryError::Lost(LEFT.into()),
        Interruption::Failed(e) => BoundaryError::Failed(e.to_string()),
    }
}

/// Why a request was refused, for whom waits for its answer.
fn refused(fault: &crate::wire::Fault) -> BoundaryError {
    match fault.code {
        FaultCode::StaleRound => BoundaryError::Cancelled(fault.to_string()),
        FaultCode::Server => BoundaryError::Lost(fault.to_string()),
        _ => BoundaryError::Refused(fault.to_string()),
    }
}

/// Pictures in frames of at most `limit` bytes, each at least one.
fn in_frames(pictures: Vec<Arc<PictureFeatures>>, limit: usize) -> Vec<Vec<Arc<PictureFeatures>>> {
    let (mut frames, mut bytes) = (Vec::<Vec<_>>::new(), 0usize);
    for picture in pictures {
        let own = picture.packed.bytes.len();
        match frames.last_mut() {
            Some(frame) if bytes.saturating_add(own) <= limit => {
                bytes += own;
                frame.push(picture);
            }
            _ => {
                bytes = own;
                frames.push(vec![picture]);
            }
        }
    }
    frames
}

impl<T: Transport, O: Observer> Remote<'_, '_, T, O> {
    /// Send a request, and before it the features that the server has not had.
    async fn post(
        &mut self,
        request: BoundaryRequest,
        batch: &Batch,
        place: Option<Place>,
    ) -> Result<u64, BoundaryError> {
        let id = self.link.new_id();
        let (mut pictures, mut up) = (BTreeMap::new(), None);
        if let Input::Codes(input) = &request.input {
            let of_rows = batch.rows.iter().filter_map(|row| row.picture.as_ref());
            pictures = of_rows.map(|picture| (picture.key, Arc::clone(picture))).collect();
            up = Some(Arc::clone(&input.up));
        }
        let sent = &self.link.lasting.sent;
        let unsent: Vec<_> = pictures.values().filter(|picture| !sent.contains(&picture.key)).cloned().collect();
        self.send_features(unsent).await?;
        let (seed, shape, round) = (self.link.new_seed(), SentShape::of(&request), self.round);
        let agreement = match place {
            Some(_) => self.link.agreement,
            None => self.link.agreement.to_the_nearest(),
        };
        let same = match (&up, &self.link.up) {
            (Some(now), Some((last, rounding))) => {
                let alike = *rounding == agreement.rounding || agreement.matrices == Format::F32;
                alike && (Arc::ptr_eq(now, last) || now == last)
            }
            _ => false,
        };
        let packed = WireRequest::pack(&request, &batch.rows, place.unwrap_or(Place::ALONE), same, &agreement, seed);
        drop(request); // it may be large, and sending takes long
        let request = packed.map_err(|e| BoundaryError::Failed(e.to_string()))?;
        let message = match place {
            Some(_) => ClientMessage::Train { id, round, request },
            None => ClientMessage::Evaluate { id, round, request },
        };
        self.link.send(&message).await.map_err(lost)?;
        if let Some(up) = up {
            let rounding = match &self.link.up {
                Some((_, last)) if same => *last,
                _ => agreement.rounding,
            };
            self.link.up = Some((up, rounding));
        }
        self.link.requests.push_back(Waiting { shape: Some(shape), pictures, ..Waiting::new(id) });
        Ok(id)
    }

    async fn send_features(&mut self, pictures: Vec<Arc<PictureFeatures>>) -> Result<(), BoundaryError> {
        let agreement = self.link.agreement;
        if let Some(other) = pictures.iter().find(|picture| picture.packed.format != agreement.features) {
            let (found, agreed) = (other.packed.format, agreement.features);
            let cause = format!("features of a picture are in {found}, agreed was {agreed}");
            return Err(BoundaryError::Failed(format!("{cause}; this is a bug in this program, please report it")));
        }
        // Only here: a picture's key is that of its bytes before.
        let packed = |picture: &PictureFeatures| {
            let smaller = if agreement.deflate { picture.packed.smaller() } else { None };
            smaller.unwrap_or_else(|| picture.packed.clone())
        };
        for frame in in_frames(pictures, FEATURES_AT_ONCE) {
            let keys: Vec<PictureKey> = frame.iter().map(|picture| picture.key).collect();
            let pictures = frame.iter().map(|picture| (picture.key, packed(picture))).collect();
            let message = ClientMessage::Features { round: self.round, pictures };
            self.link.send(&message).await.map_err(lost)?;
            self.link.requests.iter_mut().for_each(|waiting| waiting.had.extend(&keys));
            self.link.lasting.sent.extend(keys);
        }
        Ok(())
    }

    /// The answer to a request, whatever comes before it.
    async fn answer_to(&mut self, id: u64) -> Result<Answer, BoundaryError> {
        loop {
            let Some(at) = self.link.requests.iter().position(|waiting| waiting.id == id) else {
                return Err(BoundaryError::Failed("nothing was asked that could be answered".into()));
            };
            if self.link.requests[at].answer.is_none() {
                self.hear().await?;
                continue;
            }
            let waiting = self.link.requests.remove(at);
            return waiting.and_then(|waiting| waiting.answer).unwrap_or_else(|| Err(mismatched()));
        }
    }

    /// Hear one message and put it where it belongs.
    async fn hear(&mut self) -> Result<(), BoundaryError> {
        let agreement = self.link.agreement;
        match self.link.listen().await.map_err(lost)? {
            ServerMessage::Trained { id, reply } => self.put(id, |waiting| {
                let Some(shape) = &waiting.shape else { return Err(mismatched()) };
                let reply = reply.unpack(shape, &agreement);
                reply.map(Answer::Trained).map_err(|cause| {
                    let cause = format!("the server's answer cannot be used: {cause}");
                    BoundaryError::Failed(format!("{cause}; reload the page or update the older program"))
                })
            }),
            ServerMessage::Evaluated { id, reply } => self.put(id, |_| Ok(Answer::Evaluated(reply))),
            ServerMessage::Generated { id, next } => self.put(id, |_| Ok(Answer::Generated(next))),
            ServerMessage::RequestRefused { id, fault } => self.put(id, |_| Err(refused(&fault))),
            ServerMessage::Missing { id, pictures } => self.send_again(id, &pictures).await?,
            // The second answer to an update that went over two connections.
            ServerMessage::UpdateAccepted { .. } | ServerMessage::UpdateRefused { .. } => {}
            order => {
                let cause = format!("the server went on with {}", name(&order));
                let goes_on = self.may_be_late(&order);
                self.link.order = Some(order);
                if !goes_on {
                    return Err(BoundaryError::Cancelled(cause));
                }
            }
        }
        Ok(())
    }

    /// An answer for whom it is meant. Others are to requests that were cancelled.
    fn put(&mut self, id: u64, answer: impl FnOnce(&Waiting) -> Result<Answer, BoundaryError>) {
        if let Some(waiting) = self.link.requests.iter_mut().find(|waiting| waiting.id == id) {
            waiting.answer = Some(answer(waiting));
        }
    }

    /// The server lacks features that a request needs. Those that another request has brought meanwhile need not go again.
    async fn send_again(&mut self, id: u64, keys: &[PictureKey]) -> Result<(), BoundaryError> {
        let Some(waiting) = self.link.requests.iter().find(|waiting| waiting.id == id) else { return Ok(()) };
        let mut pictures = Vec::new();
        for key in keys {
            let Some(picture) = waiting.pictures.get(key) else {
                let cause = "the server asks for a picture that the request does not have";
                return Err(BoundaryError::Failed(format!("{cause}; reload the page or update the older program")));
            };
            if !waiting.had.contains(key) {
                pictures.push(Arc::clone(picture));
            }
        }
        self.send_features(pictures).await
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

    /// After a fault nothing is waited for any more.
    fn settled<R>(&mut self, result: Result<R, BoundaryError>) -> Result<R, BoundaryError> {
        result.inspect_err(|_| self.link.abandon())
    }

    /// Send and wait.
    async fn ask(&mut self, request: BoundaryRequest, batch: &Batch) -> Result<Answer, BoundaryError> {
        let id = self.post(request, batch, None).await?;
        self.answer_to(id).await
    }

    async fn generate(&mut self, request: GenerateRequest) -> Result<Answer, BoundaryError> {
        let id = self.link.new_id();
        let GenerateRequest { past, hidden, sampling } = request;
        let width = hidden.shape.last().copied().unwrap_or(0);
        let positions = u32::try_from(hidden.data.len() / width.max(1)).unwrap_or(u32::MAX); // too many for any model
        let hidden = pack_hidden(&hidden, &self.link.agreement.to_the_nearest(), 0); // no lots, so no seed
        let hidden = hidden.map_err(|e| BoundaryError::Failed(e.to_string()))?;
        let message = ClientMessage::Generate { id, past, hidden, positions, sampling };
        self.link.send(&message).await.map_err(lost)?;
        self.link.requests.push_back(Waiting::new(id));
        self.answer_to(id).await
    }
}

impl<T: Transport, O: Observer> LlmBoundary for Remote<'_, '_, T, O> {
    fn mode(&self) -> BoundaryMode {
        self.link.agreement.mode
    }

    fn features(&self) -> Format {
        self.link.agreement.features
    }

    async fn send(&mut self, request: BoundaryRequest, batch: &Batch, place: Place) -> Result<(), BoundaryError> {
        let sent = self.post(request, batch, Some(place)).await;
        self.settled(sent).map(|_| ())
    }

    async fn reply(&mut self) -> Result<BoundaryReply, BoundaryError> {
        let oldest = self.link.requests.front().map_or(0, |waiting| waiting.id); // ids begin with 1
        let answer = self.answer_to(oldest).await;
        match self.settled(answer)? {
            Answer::Trained(reply) => Ok(reply),
            _ => Err(mismatched()),
        }
    }

    async fn evaluate(&mut self, request: BoundaryRequest, batch: &Batch) -> Result<EvaluationReply, BoundaryError> {
        let answer = self.ask(request, batch).await;
        match self.settled(answer)? {
            Answer::Evaluated(reply) => Ok(reply),
            _ => Err(mismatched()),
        }
    }

    fn window(&self) -> usize {
        self.link.window()
    }
}

impl<T: Transport, O: Observer> TokenSource for Remote<'_, '_, T, O> {
    async fn next(&mut self, request: GenerateRequest) -> Result<NextToken, BoundaryError> {
        let answer = self.generate(request).await;
        match self.settled(answer)? {
            Answer::Generated(next) => Ok(next),
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

#[cfg(test)]
#[path = "remote_tests.rs"]
mod tests;
