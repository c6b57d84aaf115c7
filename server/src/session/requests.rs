//! A request from its arrival to its answer: it may wait for pictures, then for room in memory, then for the LLM. Text features are
//! looked up and numbers unpacked only when there is room, so what waits is as small as it came.

use super::groups::Slot;
use super::{IN_FLIGHT, Session, Shared};
use crate::coordinator::AFTER_ROUNDS;
use crate::llm_host::{LlmHandle, POSITIONS};
use crate::text_table::TextTable;
use fednano_shared::boundary::{BoundaryReply, BoundaryRequest, EvaluationReply, Gradient, Pair};
use fednano_shared::generate::{GenerateRequest, NextToken, Sampling};
use fednano_shared::plain::TensorBlob;
use fednano_shared::settings::{FederationSettings, Strategy};
use fednano_shared::wire::agreement::{Agreement, BoundaryMode, TableForm};
use fednano_shared::wire::convert::{Shapes, Sources, check_features, measure_hidden, unpack_hidden};
use fednano_shared::wire::numbers::{Packed, PictureKey};
use fednano_shared::wire::{Fault, FaultCode, ServerMessage, WireInput, WireReply, WireRequest};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of unpacked requests that all sessions may have together; another one waits. A few bytes on the wire stand for many here
/// (a token id for a row of the table), so frames do not bound it.
const ROOM: usize = 8 << 30;
/// Room is given out in pieces of so many bytes.
const PIECE: usize = 1 << 20;
/// Work on more bytes than these holds up a thread of the runtime for too long.
const HEAVY: usize = 1 << 20;
/// Features that come let a request wait anew for the others, until it has waited so many times as long as it may without any, and once
/// more for each picture that was called for: over a slow line each may take that long.
const WAITS: u32 = 5;

/// Memory for unpacked requests.
#[derive(Clone)]
pub struct Room(Option<(Arc<Semaphore>, usize)>); // and the pieces that there are in all

impl Room {
    /// So many bytes for all sessions.
    pub fn new(bytes: usize) -> Self {
        let pieces = (bytes / PIECE).clamp(1, Semaphore::MAX_PERMITS);
        Self(Some((Arc::new(Semaphore::new(pieces)), pieces)))
    }

    /// No bound. In lockstep requests wait for one another: whoever had no room would be waited for by those that have it.
    pub const fn unlimited() -> Self {
        Self(None)
    }

    /// In lockstep, a connection's requests reach the LLM in the order in which they came, whichever of them lacks pictures: what is
    /// still held of these depends on other connections.
    const fn in_order(&self) -> bool {
        self.0.is_none()
    }

    /// Wait for room; a request larger than all of it gets all. It is given back when the result is dropped.
    async fn take(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let (room, all) = self.0.as_ref()?;
        let pieces = u32::try_from(bytes.div_ceil(PIECE).clamp(1, *all)).unwrap_or(u32::MAX);
        room.clone().acquire_many_owned(pieces).await.ok() // nobody closes it
    }
}

impl Default for Room {
    fn default() -> Self {
        Self::new(ROOM)
    }
}

/// Do some work on so many bytes. Where that takes long, the runtime's other tasks go on elsewhere, if it has other threads.
pub(super) fn heavy<R>(bytes: usize, work: impl FnOnce() -> R) -> R {
    let threads = Handle::try_current().is_ok_and(|runtime| runtime.runtime_flavor() == RuntimeFlavor::MultiThread);
    if threads && bytes > HEAVY { tokio::task::block_in_place(work) } else { work() }
}

/// What a connection's requests need beside themselves.
#[derive(Clone)]
pub(super) struct Means {
    pub(super) agreement: Agreement,
    pub(super) shape: Shapes,
    pub(super) table: Arc<TextTable>,
    /// How the client holds its table.
    pub(super) form: TableForm,
    pub(super) room: Room,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Asked {
    /// A gradient; with a place among others, where matrices are summed.
    Gradient(Option<Slot>),
    /// Likelihoods.
    Judgement,
}

/// A request that has arrived, and what has been gathered for it.
pub(super) struct Arrived {
    pub(super) id: u64,
    pub(super) round: u32,
    pub(super) asked: Asked,
    pub(super) request: WireRequest,
    /// The `up` matrices that it means: those that were last sent when it arrived.
    pub(super) up: Option<Arc<Pair<TensorBlob>>>,
    /// Features that are here, held so that nobody can drop them.
    pub(super) pictures: BTreeMap<PictureKey, Arc<Packed>>,
    /// Those that it waits for.
    pub(super) missing: BTreeSet<PictureKey>,
    /// When features came last over its connection, or itself.
    pub(super) since: Instant,
    /// When it came itself.
    pub(super) begun: Instant,
    /// Pictures that it lacked then.
    pub(super) called_for: u32,
}

/// What has become of a request.
#[allow(clippy::large_enum_variant)] // few at a time
pub(super) enum Computed {
    Trained(u64, Option<Slot>, Result<BoundaryReply, Fault>),
    Evaluated(u64, Result<EvaluationReply, Fault>),
    Generated(u64, Result<NextToken, Fault>),
}

impl Arrived {
    /// Features have come, of which some may be for this request.
    pub(super) fn fill(&mut self, key: PictureKey, packed: &Arc<Packed>) {
        if self.missing.remove(&key) {
            self.pictures.insert(key, packed.clone());
        }
    }

    /// How long it may wait in all.
    fn most(&self, limit: Duration) -> Duration {
        limit.saturating_mul(WAITS.saturating_add(self.called_for))
    }

    /// Compute it; nothing must be missing.
    pub(super) async fn compute(self, means: Means, llm: LlmHandle) -> Computed {
        let Self { id, asked, request, up, pictures, .. } = self;
        // The room is taken until there is an answer.
        let unpacked = means.unpack(request, up, &pictures).await;
        let (_room, request) = match (unpacked, asked) {
            (Ok(unpacked), _) => unpacked,
            (Err(fault), Asked::Gradient(slot)) => return Computed::Trained(id, slot, Err(fault)),
            (Err(fault), Asked::Judgement) => return Computed::Evaluated(id, Err(fault)),
        };
        match asked {
            Asked::Gradient(slot) => Computed::Trained(id, slot, llm.train(request).await),
            Asked::Judgement => Computed::Evaluated(id, llm.evaluate(request).await),
        }
    }
}

impl Means {
    async fn unpack(
        &self,
        request: WireRequest,
        up: Option<Arc<Pair<TensorBlob>>>,
        pictures: &BTreeMap<PictureKey, Arc<Packed>>,
    ) -> Result<(Option<OwnedSemaphorePermit>, BoundaryRequest), Fault> {
        let bytes = unpacked_bytes(request.measure(self.shape)?, self.agreement.deflate);
        let room = self.room.take(bytes).await;
        let unpack = || {
            let token = |id: u32, out: &mut [f32]| self.table.row_into(self.form, id, out);
            request.unpack(&self.agreement, self.shape, &Sources { up, pictures, token: &token })
        };
        Ok((room, heavy(bytes, unpack)?))
    }

    /// Go on with a text by its new embeddings.
    pub(super) async fn generate(
        self,
        (id, text): (u64, u64),
        (past, hidden, positions): (u32, Packed, u32),
        sampling: Sampling,
        llm: LlmHandle,
    ) -> Computed {
        let dim = self.shape.dim;
        // Whoever only claims to send much must not take all room.
        let bytes = match measure_hidden(positions, dim) {
            Ok(values) => unpacked_bytes(values, self.agreement.deflate),
            Err(fault) => return Computed::Generated(id, Err(fault)),
        };
        let _room = self.room.take(bytes).await;
        let next = match heavy(bytes, || unpack_hidden(&hidden, positions, &self.agreement, dim)) {
            Ok(hidden) => llm.generate(text, GenerateRequest { past, hidden, sampling }).await,
            Err(fault) => Err(fault),
        };
        Computed::Generated(id, next)
    }
}

/// Bytes that so many values take while they are unpacked: what came deflated is there twice.
fn unpacked_bytes(values: usize, deflate: bool) -> usize {
    values.saturating_mul(size_of::<f32>()).saturating_mul(1 + usize::from(deflate))
}

impl Session {
    /// A request has arrived: compute it, or ask for what it lacks.
    pub(super) fn request(&mut self, trains: bool, (id, round): (u64, u32), request: WireRequest, shared: &Shared) {
        match self.enter(trains, round, &request) {
            Ok(asked) => {
                let (mut pictures, mut missing) = (BTreeMap::new(), BTreeSet::new());
                for key in request.pictures() {
                    // What was kept of an earlier connection may be in another form.
                    let fits =
                        |packed: &Arc<Packed>| check_features(packed, &self.means.agreement, self.means.shape).is_ok();
                    match shared.features.get(&self.owner, key).filter(fits) {
                        Some(packed) => {
                            pictures.insert(key, packed);
                        }
                        None => {
                            missing.insert(key);
                        }
                    }
                }
                if !missing.is_empty() {
                    let pictures = missing.iter().copied().collect();
                    self.outgoing.push_back(ServerMessage::Missing { id, pictures });
                }
                let (up, since) = (self.up.clone(), Instant::now());
                let called_for = u32::try_from(missing.len()).unwrap_or(u32::MAX);
                let arrived =
                    Arrived { id, round, asked, request, up, pictures, missing, since, begun: since, called_for };
                self.waiting.push(arrived);
                self.go_on(shared);
            }
            Err(fault) => {
                if trains {
                    self.groups.give_up(); // the step will not be complete
                }
                self.refuse(id, fault);
            }
        }
    }

    /// Take note of what following requests build upon, and see whether this one can be taken.
    fn enter(&mut self, trains: bool, round: u32, request: &WireRequest) -> Result<Asked, Fault> {
        let (agreement, shape) = (&self.means.agreement, self.means.shape);
        // First of all: matrices are those last sent, whatever became of the request that brought them.
        let settings = self.federation.settings();
        match within_rank(request, settings, trains).and_then(|()| request.matrices(agreement, shape)) {
            Ok(Some(up)) => self.up = Some(Arc::new(up)),
            Ok(None) => {}
            Err(fault) => {
                self.up = None;
                return Err(fault);
            }
        }
        if self.id.is_none() {
            within_positions(request)?;
        }
        if trains && self.id.is_some() && !self.takes(round) {
            return Err(self.stale(round));
        }
        if let Some(fault) = self.too_many() {
            return Err(fault);
        }
        request.fits(&self.means.agreement)?;
        request.measure(shape)?;
        Ok(match (trains, &request.input) {
            (false, _) => Asked::Judgement,
            (true, WireInput::Hidden(_)) => Asked::Gradient(None),
            (true, WireInput::Codes { rank, .. }) => {
                Asked::Gradient(Some(self.groups.enter(request.place, *rank, request.want)?))
            }
        })
    }

    fn launch(&mut self, arrived: Arrived, shared: &Shared) {
        let round = if self.round == AFTER_ROUNDS { AFTER_ROUNDS } else { arrived.round };
        let llm = shared.llm.of(self.id, round);
        self.in_flight.push(Box::pin(arrived.compute(self.means.clone(), llm)));
    }

    /// Features have come: keep them, and go on with what waits for them.
    pub(super) fn fill(&mut self, pictures: Vec<(PictureKey, Packed)>, shared: &Shared) -> Result<(), Fault> {
        if self.means.agreement.mode != BoundaryMode::LowRank {
            return Err(Fault {
                code: FaultCode::OutOfOrder,
                cause: format!("features came, agreed was the mode '{}'", self.means.agreement.mode),
                remedy: "send what was agreed; reload the page or update the older program".into(),
            });
        }
        let any = !pictures.is_empty();
        for (key, packed) in pictures {
            check_features(&packed, &self.means.agreement, self.means.shape)?;
            let packed = Arc::new(packed);
            self.waiting.iter_mut().for_each(|arrived| arrived.fill(key, &packed));
            shared.features.insert(&self.owner, key, packed);
        }
        if any {
            self.wait_anew();
        }
        self.go_on(shared);
        Ok(())
    }

    /// Compute what waits for nothing any more.
    pub(super) fn go_on(&mut self, shared: &Shared) {
        let ready = complete(&mut self.waiting, self.means.room.in_order());
        ready.into_iter().for_each(|arrived| self.launch(arrived, shared));
    }

    /// A request is computed, or has failed.
    pub(super) fn answer(&mut self, computed: Computed) {
        match computed {
            Computed::Trained(id, slot, Ok(mut reply)) => {
                if let Some(slot) = &slot {
                    self.groups.add(slot, &mut reply);
                }
                // What decides roundings is the reply's own: the same step is rounded in the same way, whatever broke off before.
                let seed = u64::from(reply.loss.to_bits()) | u64::from(self.id.map_or(0, |id| id.0)) << 32;
                let agreement = &self.means.agreement;
                match heavy(size(&reply), || WireReply::pack(&reply, agreement, seed)) {
                    Ok(reply) => self.outgoing.push_back(ServerMessage::Trained { id, reply }),
                    Err(e) => {
                        let fault = Fault {
                            code: FaultCode::Invalid,
                            cause: format!("the answer cannot be sent: {e}"),
                            remedy: "lower the learning rate if training diverged; reload and join again".into(),
                        };
                        self.fail(id, slot, fault);
                    }
                }
            }
            Computed::Trained(id, slot, Err(fault)) => self.fail(id, slot, fault),
            Computed::Evaluated(id, Ok(reply)) => self.outgoing.push_back(ServerMessage::Evaluated { id, reply }),
            Computed::Generated(id, Ok(next)) => self.outgoing.push_back(ServerMessage::Generated { id, next }),
            Computed::Evaluated(id, Err(fault)) | Computed::Generated(id, Err(fault)) => self.refuse(id, fault),
        }
    }

    /// A request cannot be answered, so its step cannot be either.
    fn fail(&mut self, id: u64, slot: Option<Slot>, fault: Fault) {
        if let Some(slot) = &slot {
            self.groups.fail(slot);
        }
        self.refuse(id, fault);
    }

    pub(super) fn refuse(&mut self, id: u64, fault: Fault) {
        self.outgoing.push_back(ServerMessage::RequestRefused { id, fault });
    }

    /// Is there any use in training for this round? Somebody who is late may still be merged later.
    fn takes(&self, round: u32) -> bool {
        self.round == AFTER_ROUNDS || (round <= self.round && self.round - round <= self.patience)
    }

    fn stale(&self, round: u32) -> Fault {
        let cause = match self.round {
            AFTER_ROUNDS => format!("the request is for round {round}, and all rounds are done"),
            now => format!("the request is for round {round}, this participant is in round {now}"),
        };
        Fault { code: FaultCode::StaleRound, cause, remedy: "go on with the current round".into() }
    }

    /// Another request is one too many. Those that still wait for pictures are given up first: nobody sends them any more, or they
    /// would not be so many.
    pub(super) fn too_many(&mut self) -> Option<Fault> {
        let fault = |cause: String, remedy: &str| Fault { code: FaultCode::OutOfOrder, cause, remedy: remedy.into() };
        if self.in_flight.len() + self.waiting.len() < IN_FLIGHT {
            return None;
        }
        if self.waiting.is_empty() {
            let cause = format!("{IN_FLIGHT} requests of this session are under way already");
            return Some(fault(cause, "wait for a reply before sending the next request"));
        }
        let oldest = self.waiting.remove(0);
        let cause = "the features of its pictures did not come, and other requests did".to_owned();
        self.withdraw(oldest, fault(cause, "send what is called for with 'Missing'"));
        None
    }

    /// Those that wait have their whole time again. Any features count: a client sends what its next request needs first, and what
    /// another one lacks. Not for ever: what waits holds features that no bound counts ([`overdue`]).
    pub(super) fn wait_anew(&mut self) {
        let now = Instant::now();
        self.waiting.iter_mut().for_each(|arrived| arrived.since = now);
    }

    /// Refuse what has waited for pictures for too long.
    pub(super) fn give_up_overdue(&mut self, limit: Duration) {
        for arrived in overdue(&mut self.waiting, limit) {
            let lacking = arrived.missing.len();
            let came = match arrived.since.elapsed() >= limit {
                true => format!("none came within {limit:?}"),
                false => format!("did not come within {:?}", arrived.most(limit)),
            };
            let fault = Fault {
                code: FaultCode::OutOfOrder,
                cause: format!("features of {lacking} pictures were called for, and {came}"),
                remedy: "send what is called for with 'Missing'; over a slow line the operator should set a coarser feature_format"
                    .into(),
            };
            self.withdraw(arrived, fault);
        }
    }

    /// A waiting request will not be computed.
    fn withdraw(&mut self, arrived: Arrived, fault: Fault) {
        match arrived.asked {
            Asked::Gradient(slot) => self.fail(arrived.id, slot, fault),
            Asked::Judgement => self.refuse(arrived.id, fault),
        }
    }

    /// A round was announced. Clients give up what they can no longer use, and send no pictures for it.
    pub(super) fn announced(&mut self, round: u32) {
        self.round = round;
        let all = std::mem::take(&mut self.waiting);
        for arrived in all {
            if round != AFTER_ROUNDS && self.takes(arrived.round) {
                self.waiting.push(arrived);
            } else {
                let fault = self.stale(arrived.round);
                self.withdraw(arrived, fault);
            }
        }
    }
}

/// Take out those that lack nothing; with `in_order` only up to the first that lacks something.
fn complete(waiting: &mut Vec<Arrived>, in_order: bool) -> Vec<Arrived> {
    let mut held_up = false;
    let (ready, lacking) = std::mem::take(waiting).into_iter().partition(|arrived| {
        let lacks = !arrived.missing.is_empty();
        held_up |= in_order && lacks;
        !lacks && !held_up
    });
    *waiting = lacking;
    ready
}

/// Take out those that lack something and have waited for it for so long, or for too long in all.
fn overdue(waiting: &mut Vec<Arrived>, limit: Duration) -> Vec<Arrived> {
    let long = |arrived: &Arrived| arrived.since.elapsed() >= limit || arrived.begun.elapsed() >= arrived.most(limit);
    let late = |arrived: &Arrived| !arrived.missing.is_empty() && long(arrived);
    let (late, rest) = std::mem::take(waiting).into_iter().partition(late);
    *waiting = rest;
    late
}

/// Rank of the largest matrices that a request may have: the federation's, or that of two such adapters side by side, which are judged
/// at last with FedDPA-F. It bounds what a connection can make the server keep.
fn most_rank(settings: &FederationSettings, trains: bool) -> usize {
    let mix = !trains && settings.strategy == Strategy::FedDpaF;
    settings.rank.saturating_mul(if mix { 2 } else { 1 })
}

/// Check that the request's matrices are no larger than that.
///
/// # Errors
/// A [`Fault`] for the client.
fn within_rank(request: &WireRequest, settings: &FederationSettings, trains: bool) -> Result<(), Fault> {
    let rank = match &request.input {
        WireInput::Hidden(_) => 0,
        WireInput::Codes { rank, .. } => usize::try_from(*rank).unwrap_or(usize::MAX),
    };
    let most = most_rank(settings, trains);
    if rank <= most {
        return Ok(());
    }
    Err(Fault {
        code: FaultCode::Invalid,
        cause: format!("the request's adapters have rank {rank}, this federation takes {most} at most"),
        remedy: "use adapters of the federation's rank or a lower one; the operator sets it with `rank`".into(),
    })
}

/// Check that a request of a connection that only asks has no more positions than go through the layers at once. Anybody may open such
/// a connection, and token ids are so short that a small frame could occupy the LLM for hours.
///
/// # Errors
/// A [`Fault`] for the client.
fn within_positions(request: &WireRequest) -> Result<(), Fault> {
    let positions: u64 = request.lengths.iter().map(|length| u64::from(*length)).sum();
    if positions <= POSITIONS as u64 {
        return Ok(());
    }
    Err(Fault {
        code: FaultCode::TooLarge,
        cause: format!(
            "the request has {positions} positions, a connection that only asks may send {POSITIONS} at once"
        ),
        remedy: "ask for fewer or shorter rows at a time, or join as a participant".into(),
    })
}

/// About the bytes of a reply's own tensors, unpacked; the sums of its group are smaller.
fn size(reply: &BoundaryReply) -> usize {
    let values = match &reply.gradient {
        Gradient::Hidden(g) => g.data.len(),
        Gradient::Codes(g) => g.codes.iter().chain(g.up.iter()).map(|(_, blob)| blob.data.len()).sum(),
    };
    values.saturating_mul(size_of::<f32>())
}

#[cfg(test)]
mod tests;
