//! The thread that owns the frozen LLM and its device. Tensor work blocks for long and a device wants one owner, so it runs
//! on an OS thread of its own behind a bounded queue, never on the runtime's workers.
//!
//! Requests of several clients that wait at the same time are computed as one batch where their lengths are alike; who waits
//! for whom says the [`Order`]. One that is too large at once is computed in parts, by rows, with the same result.

mod lockstep;

use fednano_shared::generate::{GenerateError, GenerateRequest, Generations, NextToken};
use fednano_shared::plain::{BoundaryReply, BoundaryRequest, EvaluationReply, Target, TensorBlob};
use fednano_shared::step::{BoundaryError, FrozenLlm, LlmBoundary};
use fednano_shared::wire::{Fault, FaultCode, ParticipantId};
use lockstep::{Expected, Member, Schedule, Work};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot};

/// Requests waiting; when full, senders wait too (each session has few under way, so this bounds memory).
const QUEUE: usize = 64;
/// Rows that are merged into one batch at most.
const MERGED_ROWS: usize = 32;
/// Texts under way whose keys and values are kept.
const TEXTS: usize = 32;
/// Bytes of keys and values of all texts under way: eight of 1,024 positions of a 7B model in f16.
const TEXTS_BYTES: usize = 4 << 30;

/// How much is computed at once. Scores and logits are far larger than what came over the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Rows times squared positions: the scores of one head.
    pub attention: usize,
    /// Targets times vocabulary: the logits.
    pub logits: usize,
}

impl Default for Bounds {
    /// In f32 64 MiB of scores a head and 1 GiB of logits.
    fn default() -> Self {
        Self { attention: 1 << 24, logits: 1 << 28 }
    }
}

impl Bounds {
    fn hold(self, rows: usize, positions: usize, targets: usize, vocab: usize) -> bool {
        rows.saturating_mul(positions).saturating_mul(positions) <= self.attention
            && targets.saturating_mul(vocab) <= self.logits
    }
}

enum Job {
    Train(BoundaryRequest, oneshot::Sender<Result<BoundaryReply, Fault>>),
    Evaluate(BoundaryRequest, oneshot::Sender<Result<EvaluationReply, Fault>>),
    Generate(u64, GenerateRequest, oneshot::Sender<Result<NextToken, Fault>>),
    Forget(u64),
    Look, // other members are expected than before
}

struct Queued {
    member: Option<Member>,
    job: Job,
}

/// Which requests are computed when, and which share a batch. Float sums depend on the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As they come.
    Arrival {
        /// Requests of like length that wait at the same time share a batch: faster, but the last bits of a result depend on who
        /// else is waiting. Off: each is computed alone, and so independently of all others.
        merge: bool,
    },
    /// Once every expected member has a request waiting, those are computed in the order of members, in shared batches:
    /// deterministic and fast, for one federation whose members never wait for anything else (simulation).
    Lockstep,
}

/// A cheap handle to the host.
#[derive(Clone)]
pub struct LlmHandle {
    jobs: mpsc::Sender<Queued>,
    order: Order,
    expected: Arc<Mutex<Expected>>,
    member: Option<Member>,
}

/// Start the thread; it ends when the last handle is gone.
///
/// # Errors
/// When the system refuses a thread.
pub fn start(llm: FrozenLlm, order: Order) -> std::io::Result<LlmHandle> {
    start_with(llm, order, Bounds::default())
}

/// The same with other bounds.
///
/// # Errors
/// When the system refuses a thread.
pub fn start_with(llm: FrozenLlm, order: Order, bounds: Bounds) -> std::io::Result<LlmHandle> {
    let (jobs, queue) = mpsc::channel(QUEUE);
    let expected = Arc::new(Mutex::new(Expected::new()));
    let room = Room { bounds, vocab: llm.vocab() };
    let schedule = Schedule::new(order, expected.clone(), room);
    let host = Host { llm, room };
    std::thread::Builder::new().name("llm".into()).spawn(move || host.serve(queue, schedule))?;
    Ok(LlmHandle { jobs, order, expected, member: None })
}

impl LlmHandle {
    /// A handle whose requests are this member's, of this round. Those of the plain handle are nobody's: they wait for nobody.
    pub fn of(&self, member: Option<ParticipantId>, round: u32) -> Self {
        Self { member: member.map(|id| Member { id, round }), ..self.clone() }
    }

    /// In lockstep: these will send requests of this round until they are released. Say it before they can.
    pub fn expect(&self, round: u32, members: &[ParticipantId]) {
        self.change(|expected| expected.extend(members.iter().map(|id| (*id, round))));
    }

    /// In lockstep: do not wait for this one any more.
    pub fn release(&self, member: ParticipantId) {
        self.change(|expected| {
            expected.remove(&member);
        });
    }

    /// In lockstep: wait for nobody.
    pub fn release_all(&self) {
        self.change(Expected::clear);
    }

    fn change(&self, change: impl FnOnce(&mut Expected)) {
        if self.order == Order::Lockstep {
            // No panic can leave this map half changed.
            change(&mut self.expected.lock().unwrap_or_else(PoisonError::into_inner));
            // Where the queue is full, the thread looks all the same: it takes all of it before it decides.
            drop(self.jobs.try_send(Queued { member: None, job: Job::Look }));
        }
    }

    /// Loss and gradient of a batch.
    ///
    /// # Errors
    /// A [`Fault`] for the client.
    pub async fn train(&self, request: BoundaryRequest) -> Result<BoundaryReply, Fault> {
        self.ask(|reply| Job::Train(request, reply)).await
    }

    /// Forward only.
    ///
    /// # Errors
    /// A [`Fault`] for the client.
    pub async fn evaluate(&self, request: BoundaryRequest) -> Result<EvaluationReply, Fault> {
        self.ask(|reply| Job::Evaluate(request, reply)).await
    }

    /// The thread has ended: nobody can train until the server is started again.
    pub fn is_gone(&self) -> bool {
        self.jobs.is_closed()
    }

    /// The next token of a session's text.
    ///
    /// # Errors
    /// A [`Fault`] for the client.
    pub async fn generate(&self, session: u64, request: GenerateRequest) -> Result<NextToken, Fault> {
        self.ask(|reply| Job::Generate(session, request, reply)).await
    }

    /// A session's text is over.
    pub async fn forget(&self, session: u64) {
        // A host that has ended holds nothing.
        drop(self.jobs.send(Queued { member: None, job: Job::Forget(session) }).await);
    }

    async fn ask<R>(&self, job: impl FnOnce(oneshot::Sender<Result<R, Fault>>) -> Job) -> Result<R, Fault> {
        let (sender, receiver) = oneshot::channel();
        let gone = || server_fault("the LLM's thread has ended");
        self.jobs.send(Queued { member: self.member, job: job(sender) }).await.map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())?
    }
}

/// The server's own evaluation goes through the same door as its clients.
impl LlmBoundary for LlmHandle {
    async fn train(&mut self, request: BoundaryRequest) -> Result<BoundaryReply, BoundaryError> {
        LlmHandle::train(self, request).await.map_err(|f| BoundaryError::Refused(f.to_string()))
    }

    async fn evaluate(&mut self, request: BoundaryRequest) -> Result<EvaluationReply, BoundaryError> {
        LlmHandle::evaluate(self, request).await.map_err(|f| BoundaryError::Refused(f.to_string()))
    }
}

fn server_fault(cause: &str) -> Fault {
    Fault {
        code: FaultCode::Server,
        cause: cause.into(),
        remedy: "try again in a moment; if it stays, restart the server".into(),
    }
}

fn invalid(cause: String) -> Fault {
    Fault {
        code: FaultCode::Invalid,
        cause,
        remedy: "send finite activations of the model's shape; reload the page if training diverged".into(),
    }
}

type TrainJob = (BoundaryRequest, oneshot::Sender<Result<BoundaryReply, Fault>>);

/// How much this model's host computes at once.
#[derive(Debug, Clone, Copy)]
struct Room {
    bounds: Bounds,
    vocab: usize,
}

impl Room {
    fn holds(self, rows: usize, positions: usize, targets: usize) -> bool {
        self.bounds.hold(rows, positions, targets, self.vocab)
    }
}

/// Move waiting training requests of like length into the group, as long as all of it can be computed at once. None of
/// them has been checked yet.
fn take_alike(group: &mut Vec<TrainJob>, waiting: &mut VecDeque<Queued>, room: Room) {
    let seq = |r: &BoundaryRequest| r.hidden.shape.get(1).copied().unwrap_or(0);
    let first = &group[0].0;
    let (mut rows, mut targets, mut longest) = (first.lengths.len(), first.targets.len(), seq(first));
    let (low, high) = (longest.saturating_mul(4) / 5, longest.saturating_mul(5) / 4);
    let mut rest = VecDeque::new();
    while let Some(queued) = waiting.pop_front() {
        match queued.job {
            Job::Train(r, reply)
                if (low..=high).contains(&seq(&r))
                    && rows + r.lengths.len() <= MERGED_ROWS
                    && room.holds(rows + r.lengths.len(), longest.max(seq(&r)), targets + r.targets.len())
                    && !reply.is_closed() =>
            {
                rows += r.lengths.len();
                targets += r.targets.len();
                longest = longest.max(seq(&r));
                group.push((r, reply));
            }
            job => rest.push_back(Queued { member: queued.member, job }),
        }
    }
    *waiting = rest;
}

/// What the thread owns.
struct Host {
    llm: FrozenLlm,
    room: Room,
}

impl Host {
    fn serve(&self, mut queue: mpsc::Receiver<Queued>, mut schedule: Schedule) {
        let mut texts = Generations::new(TEXTS, TEXTS_BYTES);
        loop {
            while let Ok(queued) = queue.try_recv() {
                schedule.add(queued);
            }
            let Some(work) = schedule.next() else {
                match queue.blocking_recv() {
                    Some(queued) => schedule.add(queued),
                    None => return,
                }
                continue;
            };
            match work {
                Work::Train(group) => self.train(group),
                Work::Other(Job::Train(request, reply)) => self.train(vec![(request, reply)]),
                Work::Other(Job::Evaluate(request, reply)) => {
                    let result = self.evaluate(&request, || !reply.is_closed());
                    drop(reply.send(result));
                }
                Work::Other(Job::Generate(session, request, reply)) => {
                    let result = block_on(texts.next(&self.llm, session, &request)).map_err(|e| match e {
                        GenerateError::Device(e) => server_fault(&e.to_string()),
                        GenerateError::Request(e) => invalid(e.to_string()),
                        GenerateError::Forgotten { .. } => Fault {
                            code: FaultCode::OutOfOrder,
                            cause: e.to_string(),
                            remedy: "ask the question again".into(),
                        },
                    });
                    drop(reply.send(result));
                }
                Work::Other(Job::Forget(session)) => texts.forget(session),
                Work::Other(Job::Look) => {}
            }
        }
    }

    fn train(&self, group: Vec<TrainJob>) {
        let (mut sound, mut replies) = (Vec::new(), Vec::new());
        for (request, reply) in group {
            let fault = match self.llm.check(&request) {
                Err(e) => Some(invalid(e.to_string())),
                Ok(()) if request.targets.is_empty() => Some(invalid("a training batch has no target token".into())),
                Ok(()) => None,
            };
            match fault {
                Some(fault) => drop(reply.send(Err(fault))),
                None => {
                    sound.push(request);
                    replies.push(reply);
                }
            }
        }
        let results = match &sound[..] {
            [] => return,
            // Nothing is merged with a request that is too large by itself.
            [one] => self.parts(one).and_then(|parts| match parts.len() {
                1 => self.train_at_once(&[one]),
                _ => self.train_parts(one, parts, || !replies[0].is_closed()).map(|reply| vec![reply]),
            }),
            several => self.train_at_once(&several.iter().collect::<Vec<_>>()),
        };
        match results {
            Ok(results) => replies.into_iter().zip(results).for_each(|(reply, r)| drop(reply.send(Ok(r)))),
            Err(fault) => replies.into_iter().for_each(|reply| drop(reply.send(Err(fault.clone())))),
        }
    }

    fn train_at_once(&self, requests: &[&BoundaryRequest]) -> Result<Vec<BoundaryReply>, Fault> {
        block_on(self.llm.train(requests)).map_err(|e| server_fault(&e.to_string()))
    }

    /// A request in parts, put together as if it had been computed at once: the loss is the mean over all targets, so each
    /// part counts by its share of them. Ends early when nobody waits for it any more.
    fn train_parts(
        &self,
        request: &BoundaryRequest,
        parts: Vec<Range<usize>>,
        awaited: impl Fn() -> bool,
    ) -> Result<BoundaryReply, Fault> {
        let gradient = Vec::with_capacity(request.hidden.data.len());
        let mut whole = BoundaryReply {
            loss: 0.0,
            row_loss: Vec::with_capacity(request.lengths.len()),
            gradient: TensorBlob { shape: request.hidden.shape.clone(), data: gradient },
        };
        let mut loss = 0.0;
        for rows in parts {
            let part = cut(request, &rows);
            if part.targets.is_empty() {
                // Nothing is asked of these rows: they have neither loss nor gradient.
                whole.row_loss.resize(rows.end, 0.0);
                whole.gradient.data.resize(whole.gradient.data.len() + part.hidden.data.len(), 0.0);
                continue;
            }
            if !awaited() {
                return Err(nobody_waits());
            }
            let share = part.targets.len() as f32 / request.targets.len() as f32;
            for reply in self.train_at_once(&[&part])? {
                loss += f64::from(reply.loss) * f64::from(share);
                whole.row_loss.extend(reply.row_loss);
                whole.gradient.data.extend(reply.gradient.data.iter().map(|g| g * share));
            }
        }
        whole.loss = loss as f32;
        Ok(whole)
    }

    /// Forward only, in as many parts as it takes.
    fn evaluate(&self, request: &BoundaryRequest, awaited: impl Fn() -> bool) -> Result<EvaluationReply, Fault> {
        self.llm.check(request).map_err(|e| invalid(e.to_string()))?;
        let at_once = |r: &BoundaryRequest| block_on(self.llm.evaluate(r)).map_err(|e| server_fault(&e.to_string()));
        let parts = self.parts(request)?;
        if parts.len() == 1 {
            return at_once(request);
        }
        let mut whole = EvaluationReply { nll: Vec::new(), predicted: Vec::new() };
        for rows in parts {
            if !awaited() {
                return Err(nobody_waits());
            }
            // Targets are sorted by row, so those of the parts follow one another.
            let reply = at_once(&cut(request, &rows))?;
            whole.nll.extend(reply.nll);
            whole.predicted.extend(reply.predicted);
        }
        Ok(whole)
    }

    fn parts(&self, request: &BoundaryRequest) -> Result<Vec<Range<usize>>, Fault> {
        parts(request, self.room.vocab, self.room.bounds)
    }
}

fn nobody_waits() -> Fault {
    server_fault("nobody waits for this request any more")
}

/// The rows of a sound request as few ranges, each small enough to be computed at once.
fn parts(request: &BoundaryRequest, vocab: usize, bounds: Bounds) -> Result<Vec<Range<usize>>, Fault> {
    let positions = request.hidden.shape.get(1).copied().unwrap_or(0);
    let (mut parts, mut first, mut held) = (Vec::new(), 0, 0);
    for (row, targets) in request.target_counts().into_iter().enumerate() {
        let targets = targets as usize;
        if !bounds.hold(1, positions, targets, vocab) {
            return Err(Fault {
                code: FaultCode::Invalid,
                cause: format!("row {row} of {positions} positions and {targets} targets is too large for this server"),
                remedy: "shorten the question or the answer".into(),
            });
        }
        if row > first && !bounds.hold(row + 1 - first, positions, held + targets, vocab) {
            parts.push(first..row);
            (first, held) = (row, 0);
        }
        held += targets;
    }
    parts.push(first..request.lengths.len());
    Ok(parts)
}

/// Some rows of a sound request as one of their own.
fn cut(request: &BoundaryRequest, rows: &Range<usize>) -> BoundaryRequest {
    let mut shape = request.hidden.shape.clone();
    let values = request.hidden.data.len() / request.lengths.len().max(1); // of a row
    if let Some(batch) = shape.first_mut() {
        *batch = rows.len();
    }
    let own = request.targets.iter().filter(|t| rows.contains(&(t.row as usize)));
    BoundaryRequest {
        hidden: TensorBlob { shape, data: request.hidden.data[rows.start * values..rows.end * values].to_vec() },
        lengths: request.lengths[rows.clone()].to_vec(),
        targets: own.map(|t| Target { row: t.row - rows.start as u32, ..*t }).collect(),
    }
}

/// Native device reads are ready at once; nothing here needs a reactor.
fn block_on<F: std::future::Future>(future: F) -> F::Output {
    futures_executor::block_on(future)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of 3 positions, 2 wide, with so many targets each.
    fn request(targets: &[u32]) -> BoundaryRequest {
        let rows = targets.len();
        let of = |row: usize| (0..targets[row]).map(move |position| Target { row: row as u32, position, token: 5 });
        BoundaryRequest {
            hidden: TensorBlob { shape: vec![rows, 3, 2], data: (0..rows * 6).map(|i| i as f32).collect() },
            lengths: vec![3; rows],
            targets: (0..rows).flat_map(of).collect(),
        }
    }

    fn bounds(rows: usize, targets: usize) -> Bounds {
        Bounds { attention: rows * 9, logits: targets * 10 }
    }

    #[test]
    fn parts_are_as_large_as_the_bounds_allow() {
        let ranges = |targets: &[u32], b: Bounds| parts(&request(targets), 10, b).unwrap();
        let whole = ranges(&[1, 2, 3], Bounds::default());
        assert!(whole.len() == 1 && whole[0] == (0..3), "{whole:?}");
        assert_eq!(ranges(&[1, 1, 1, 1, 1], bounds(2, 9)), [0..2, 2..4, 4..5]);
        assert_eq!(ranges(&[2, 0, 1, 3, 1, 2], bounds(9, 3)), [0..3, 3..4, 4..6]);
        assert_eq!(ranges(&[2, 0, 1, 3, 1, 2], bounds(2, 3)), [0..2, 2..3, 3..4, 4..6]);
    }

    #[test]
    fn a_row_that_is_too_large_is_named() {
        let fault = |targets: &[u32], b: Bounds| parts(&request(targets), 10, b).unwrap_err().to_string();
        assert!(fault(&[1, 3], bounds(1, 2)).contains("row 1 of 3 positions and 3 targets"));
        assert!(fault(&[1], Bounds { attention: 8, ..bounds(1, 1) }).contains("shorten"));
    }

    #[test]
    fn a_part_is_a_sound_request() {
        let part = cut(&request(&[1, 2, 3]), &(1..3));
        part.check(2, 10, 3).unwrap();
        assert_eq!(part.hidden.data[0], 6.0);
        assert_eq!(part.target_counts(), [2, 3]);
        // Shapes that nobody has checked yet, as the merging of requests sees them.
        assert!(!Bounds::default().hold(usize::MAX, usize::MAX, usize::MAX, usize::MAX));
    }
}
