//! The thread that owns the frozen LLM and its device. Tensor work blocks for long and a device wants one owner, so it runs
//! on an OS thread of its own behind a bounded queue, never on the runtime's workers.
//!
//! Requests of several clients that wait at the same time are computed as one batch where their lengths are alike; who waits
//! for whom says the [`Order`].

mod lockstep;

use fednano_shared::generate::{GenerateError, GenerateRequest, Generations, NextToken};
use fednano_shared::plain::{BoundaryReply, BoundaryRequest, EvaluationReply};
use fednano_shared::step::{BoundaryError, FrozenLlm, LlmBoundary};
use fednano_shared::wire::{Fault, FaultCode, ParticipantId};
use lockstep::{Expected, Member, Schedule, Work};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot};

/// Requests waiting; when full, senders wait too (each session has few under way, so this bounds memory).
const QUEUE: usize = 64;
/// Rows that are merged into one batch at most.
const MERGED_ROWS: usize = 32;
/// Texts under way whose keys and values are kept.
const TEXTS: usize = 32;

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
    let (jobs, queue) = mpsc::channel(QUEUE);
    let expected = Arc::new(Mutex::new(Expected::new()));
    let schedule = Schedule::new(order, expected.clone());
    std::thread::Builder::new().name("llm".into()).spawn(move || serve(&llm, queue, schedule))?;
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

fn serve(llm: &FrozenLlm, mut queue: mpsc::Receiver<Queued>, mut schedule: Schedule) {
    let mut texts = Generations::new(TEXTS);
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
            Work::Train(group) => train(llm, group),
            Work::Other(Job::Train(request, reply)) => train(llm, vec![(request, reply)]),
            Work::Other(Job::Evaluate(request, reply)) => {
                let result = match llm.check(&request) {
                    Ok(()) => block_on(llm.evaluate(&request)).map_err(|e| server_fault(&e.to_string())),
                    Err(e) => Err(invalid(e.to_string())),
                };
                drop(reply.send(result));
            }
            Work::Other(Job::Generate(session, request, reply)) => {
                let result = block_on(texts.next(llm, session, &request)).map_err(|e| match e {
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

type TrainJob = (BoundaryRequest, oneshot::Sender<Result<BoundaryReply, Fault>>);

/// Move waiting training requests of like length into the group.
fn take_alike(group: &mut Vec<TrainJob>, waiting: &mut std::collections::VecDeque<Queued>) {
    let seq = |r: &BoundaryRequest| r.hidden.shape.get(1).copied().unwrap_or(0);
    let mut rows = group[0].0.lengths.len();
    let (low, high) = (seq(&group[0].0) * 4 / 5, seq(&group[0].0) * 5 / 4);
    let mut rest = std::collections::VecDeque::new();
    while let Some(queued) = waiting.pop_front() {
        match queued.job {
            Job::Train(r, reply)
                if (low..=high).contains(&seq(&r)) && rows + r.lengths.len() <= MERGED_ROWS && !reply.is_closed() =>
            {
                rows += r.lengths.len();
                group.push((r, reply));
            }
            job => rest.push_back(Queued { member: queued.member, job }),
        }
    }
    *waiting = rest;
}

fn train(llm: &FrozenLlm, group: Vec<TrainJob>) {
    let (mut sound, mut replies) = (Vec::new(), Vec::new());
    for (request, reply) in group {
        let fault = match llm.check(&request) {
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
    if sound.is_empty() {
        return;
    }
    match block_on(llm.train(&sound.iter().collect::<Vec<_>>())) {
        Ok(results) => replies.into_iter().zip(results).for_each(|(reply, r)| drop(reply.send(Ok(r)))),
        Err(e) => replies.into_iter().for_each(|reply| drop(reply.send(Err(server_fault(&e.to_string()))))),
    }
}

/// Native device reads are ready at once; nothing here needs a reactor.
fn block_on<F: std::future::Future>(future: F) -> F::Output {
    futures_executor::block_on(future)
}
