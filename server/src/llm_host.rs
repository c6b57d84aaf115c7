//! The thread that owns the frozen LLM and its device. Tensor work blocks for long and a device wants one owner, so it runs
//! on an OS thread of its own behind a bounded queue, never on the runtime's workers.
//!
//! Requests of several clients that wait at the same time are computed as one batch where their lengths are alike; who waits
//! for whom says the [`Order`]. One that is too large at once is computed in parts, by rows, with the same result.

mod lockstep;
mod parts;

use fednano_shared::boundary::{BoundaryReply, BoundaryRequest, EvaluationReply, Place};
use fednano_shared::edge::Batch;
use fednano_shared::generate::{GenerateError, GenerateRequest, Generations, NextToken};
use fednano_shared::step::{BoundaryError, FrozenLlm, LlmBoundary};
use fednano_shared::wire::agreement::BoundaryMode;
use fednano_shared::wire::{Fault, FaultCode, ParticipantId};
use lockstep::{Expected, Member, Schedule, Work};
use parts::{Whole, cut, parts};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot};
use tracing::Span;

/// Target of the spans that show where a step's time goes.
const STEP: &str = "fednano::step";

/// Requests waiting; when full, senders wait too. They hold their requests meanwhile: memory is bounded by the sessions' room for these.
const QUEUE: usize = 64;
/// Rows that are merged into one batch at most.
const MERGED_ROWS: usize = 32;
/// Positions of all rows that go through the layers at once: twelve samples of LLaVA-1.5. The backward pass of a 7B model keeps
/// megabytes of each, and requests in short may be far longer than a frame of activations.
pub(crate) const POSITIONS: usize = 1 << 13;
/// Texts under way whose keys and values are kept.
const TEXTS: usize = 32;
/// Bytes of keys and values of all texts under way: eight of 1,024 positions of a 7B model in f16.
const TEXTS_BYTES: usize = 4 << 30;

/// How much is computed at once, beside the number of positions. Scores and logits are far larger than what came over the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Rows times squared positions of the longest: the scores of one head.
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
    /// `longest`: positions of the longest row; `positions`: of all rows.
    fn hold(self, rows: usize, longest: usize, positions: usize, targets: usize, vocab: usize) -> bool {
        rows.saturating_mul(longest).saturating_mul(longest) <= self.attention
            && positions <= POSITIONS
            && targets.saturating_mul(vocab) <= self.logits
    }

    /// Check new positions of a text: each sees all before it.
    fn check_text(self, request: &GenerateRequest) -> Result<(), Fault> {
        let (past, new) = (request.past as usize, request.hidden.shape.get(1).copied().unwrap_or(0));
        if new.saturating_mul(past.saturating_add(new)) <= self.attention {
            return Ok(());
        }
        Err(Fault {
            code: FaultCode::Invalid,
            cause: format!("{new} new positions of a text behind {past} others are too many at once for this server"),
            remedy: "shorten the question".into(),
        })
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
    /// Open as long as the job waits.
    _span: Span,
}

impl Queued {
    /// Something that nobody waits for.
    fn unasked(job: Job) -> Self {
        Self { member: None, job, _span: Span::none() }
    }
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
    /// Replies of requests that went through the door of [`LlmBoundary`].
    replies: VecDeque<BoundaryReply>,
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
    Ok(LlmHandle { jobs, order, expected, member: None, replies: VecDeque::new() })
}

impl LlmHandle {
    /// A handle whose requests are this member's, of this round. Those of the plain handle are nobody's: they wait for nobody.
    pub fn of(&self, member: Option<ParticipantId>, round: u32) -> Self {
        Self { member: member.map(|id| Member { id, round }), replies: VecDeque::new(), ..self.clone() }
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
            drop(self.jobs.try_send(Queued::unasked(Job::Look)));
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
        drop(self.jobs.send(Queued::unasked(Job::Forget(session))).await);
    }

    async fn ask<R>(&self, job: impl FnOnce(oneshot::Sender<Result<R, Fault>>) -> Job) -> Result<R, Fault> {
        let (sender, receiver) = oneshot::channel();
        let gone = || server_fault("the LLM's thread has ended");
        let span = tracing::info_span!(target: STEP, "queue");
        self.jobs.send(Queued { member: self.member, job: job(sender), _span: span }).await.map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())?
    }
}

/// The server's own evaluation goes through the same door as its clients. The batch is in this process, so `h` goes whole.
impl LlmBoundary for LlmHandle {
    fn mode(&self) -> BoundaryMode {
        BoundaryMode::Activations
    }

    async fn send(&mut self, request: BoundaryRequest, _: &Batch, _: Place) -> Result<(), BoundaryError> {
        let reply = self.train(request).await.map_err(|f| BoundaryError::Refused(f.to_string()))?;
        self.replies.push_back(reply);
        Ok(())
    }

    async fn reply(&mut self) -> Result<BoundaryReply, BoundaryError> {
        self.replies.pop_front().ok_or_else(|| BoundaryError::Failed("no request is under way".into()))
    }

    async fn evaluate(&mut self, request: BoundaryRequest, _: &Batch) -> Result<EvaluationReply, BoundaryError> {
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
    fn holds(self, rows: usize, longest: usize, positions: usize, targets: usize) -> bool {
        self.bounds.hold(rows, longest, positions, targets, self.vocab)
    }
}

/// Move waiting training requests of like length into the group, as long as all of it can be computed at once. None of
/// them has been checked yet.
fn take_alike(group: &mut Vec<TrainJob>, waiting: &mut VecDeque<Queued>, room: Room) {
    let Some((first, _)) = group.first() else { return };
    let (mut rows, mut targets) = (first.positions.rows(), first.targets.len());
    let (mut longest, mut positions) = (first.positions.longest(), first.positions.total());
    let (low, high) = (longest.saturating_mul(4) / 5, longest.saturating_mul(5) / 4);
    let mut rest = VecDeque::new();
    while let Some(queued) = waiting.pop_front() {
        match queued {
            Queued { job: Job::Train(r, reply), .. }
                if (low..=high).contains(&r.positions.longest())
                    && rows + r.positions.rows() <= MERGED_ROWS
                    && room.holds(
                        rows + r.positions.rows(),
                        longest.max(r.positions.longest()),
                        positions.saturating_add(r.positions.total()),
                        targets + r.targets.len(),
                    )
                    && !reply.is_closed() =>
            {
                rows += r.positions.rows();
                targets += r.targets.len();
                longest = longest.max(r.positions.longest());
                positions = positions.saturating_add(r.positions.total());
                group.push((r, reply));
            }
            other => rest.push_back(other),
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
                    if let Err(fault) = self.room.bounds.check_text(&request) {
                        drop(reply.send(Err(fault)));
                        continue;
                    }
                    let next = tracing::info_span!(target: STEP, "llm", what = "generate")
                        .in_scope(|| block_on(texts.next(&self.llm, session, &request)));
                    let result = next.map_err(|e| match e {
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
        let rows: usize = requests.iter().map(|r| r.positions.rows()).sum();
        let positions: usize = requests.iter().map(|r| r.positions.total()).sum();
        tracing::info_span!(target: STEP, "llm", what = "train", requests = requests.len(), rows, positions)
            .in_scope(|| block_on(self.llm.train(requests)))
            .map_err(|e| server_fault(&e.to_string()))
    }

    fn evaluate_at_once(&self, request: &BoundaryRequest) -> Result<EvaluationReply, Fault> {
        let (rows, positions) = (request.positions.rows(), request.positions.total());
        tracing::info_span!(target: STEP, "llm", what = "evaluate", requests = 1, rows, positions)
            .in_scope(|| block_on(self.llm.evaluate(request)))
            .map_err(|e| server_fault(&e.to_string()))
    }

    /// A request in parts, put together as if it had been computed at once. Ends early when nobody waits for it any more.
    fn train_parts(
        &self,
        request: &BoundaryRequest,
        parts: Vec<Range<usize>>,
        awaited: impl Fn() -> bool,
    ) -> Result<BoundaryReply, Fault> {
        let mut whole = Whole::new(request);
        for rows in parts {
            let part = cut(request, &rows);
            if !part.targets.is_empty() && !awaited() {
                return Err(nobody_waits());
            }
            for reply in self.train_at_once(&[&part])? {
                whole.add(&part, reply);
            }
        }
        Ok(whole.reply())
    }

    /// Forward only, in as many parts as it takes.
    fn evaluate(&self, request: &BoundaryRequest, awaited: impl Fn() -> bool) -> Result<EvaluationReply, Fault> {
        self.llm.check(request).map_err(|e| invalid(e.to_string()))?;
        let parts = self.parts(request)?;
        if parts.len() == 1 {
            return self.evaluate_at_once(request);
        }
        let mut whole = EvaluationReply { nll: Vec::new(), predicted: Vec::new() };
        for rows in parts {
            if !awaited() {
                return Err(nobody_waits());
            }
            // Targets are sorted by row, so those of the parts follow one another.
            let reply = self.evaluate_at_once(&cut(request, &rows))?;
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

/// Native device reads are ready at once; nothing here needs a reactor.
fn block_on<F: std::future::Future>(future: F) -> F::Output {
    futures_executor::block_on(future)
}
