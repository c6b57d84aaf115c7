//! What the host's thread does next. In order of arrival that is a queue; in lockstep the members of a round go side by side:
//! nothing of theirs is computed until each has a request waiting, and then the order of members decides, not who was faster.

use super::{Job, Order, Queued, Room, TrainJob, take_alike};
use fednano_shared::wire::ParticipantId;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

/// Whose request it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) id: ParticipantId,
    pub(super) round: u32,
}

/// Members that will send requests, and of which round. What a straggler still sends of an earlier one does not count.
pub(super) type Expected = BTreeMap<ParticipantId, u32>;

/// One thing to compute.
pub(super) enum Work {
    /// Training requests that share a batch.
    Train(Vec<TrainJob>),
    /// Anything else.
    Other(Job),
}

/// Requests that wait, and their order.
pub(super) struct Schedule {
    order: Order,
    room: Room,
    expected: Arc<Mutex<Expected>>,
    waiting: VecDeque<Queued>,
    begun: VecDeque<Work>, // the rest of a lockstep
}

impl Schedule {
    pub(super) fn new(order: Order, expected: Arc<Mutex<Expected>>, room: Room) -> Self {
        Self { order, room, expected, waiting: VecDeque::new(), begun: VecDeque::new() }
    }

    pub(super) fn add(&mut self, queued: Queued) {
        self.waiting.push_back(queued);
    }

    /// What to compute now; none: wait for more.
    pub(super) fn next(&mut self) -> Option<Work> {
        self.waiting.retain(|q| !abandoned(&q.job));
        match self.order {
            Order::Arrival { merge } => match self.waiting.pop_front()?.job {
                Job::Train(request, reply) if merge => {
                    let mut group = vec![(request, reply)];
                    take_alike(&mut group, &mut self.waiting, self.room);
                    Some(Work::Train(group))
                }
                job => Some(Work::Other(job)),
            },
            Order::Lockstep => {
                if let Some(work) = self.begun.pop_front() {
                    return Some(work);
                }
                let expected = self.expected.lock().unwrap_or_else(PoisonError::into_inner).clone();
                let in_step = |q: &Queued| q.member.is_some_and(|m| expected.get(&m.id) == Some(&m.round));
                if let Some(at) = self.waiting.iter().position(|q| !in_step(q)) {
                    return self.waiting.remove(at).map(|q| Work::Other(q.job));
                }
                self.begun = step(&expected, &mut self.waiting, self.room);
                self.begun.pop_front()
            }
        }
    }
}

/// The first request of each member, in the order of members; nothing as long as one is missing. All that wait are members'.
fn step(expected: &Expected, waiting: &mut VecDeque<Queued>, room: Room) -> VecDeque<Work> {
    if expected.keys().any(|id| first(*id, waiting).is_none()) {
        return VecDeque::new();
    }
    let (mut training, mut others) = (VecDeque::new(), Vec::new());
    for id in expected.keys() {
        let Some(queued) = first(*id, waiting).and_then(|at| waiting.remove(at)) else { continue };
        if matches!(queued.job, Job::Train(..)) {
            training.push_back(queued);
        } else {
            others.push(Work::Other(queued.job));
        }
    }
    let mut work = VecDeque::new();
    while let Some(queued) = training.pop_front() {
        if let Job::Train(request, reply) = queued.job {
            let mut group = vec![(request, reply)];
            take_alike(&mut group, &mut training, room);
            work.push_back(Work::Train(group));
        }
    }
    work.extend(others);
    work
}

/// Where a member's first request waits.
fn first(id: ParticipantId, waiting: &VecDeque<Queued>) -> Option<usize> {
    waiting.iter().position(|q| q.member.is_some_and(|m| m.id == id))
}

/// Its client is gone.
fn abandoned(job: &Job) -> bool {
    match job {
        Job::Train(_, reply) => reply.is_closed(),
        Job::Evaluate(_, reply) => reply.is_closed(),
        Job::Generate(_, _, reply) => reply.is_closed(),
        Job::Forget(_) | Job::Look => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::Bounds;
    use super::*;
    use fednano_shared::boundary::{BoundaryReply, BoundaryRequest, Input, Positions, Want};
    use fednano_shared::plain::TensorBlob;
    use fednano_shared::wire::Fault;
    use tokio::sync::oneshot;

    type Answer = oneshot::Receiver<Result<BoundaryReply, Fault>>;

    /// A training request of one row of this length.
    fn request(member: Option<(u32, u32)>, length: usize) -> (Queued, Answer) {
        let (reply, answer) = oneshot::channel();
        let request = BoundaryRequest {
            input: Input::Hidden(TensorBlob::zeros(&[length, 1])),
            positions: Positions::plain(vec![length as u32]),
            targets: Vec::new(),
            want: Want::Gradient,
        };
        let member = member.map(|(id, round)| Member { id: ParticipantId(id), round });
        (Queued { member, ..Queued::unasked(Job::Train(request, reply)) }, answer)
    }

    fn schedule(expected: &[(u32, u32)]) -> Schedule {
        let expected = expected.iter().map(|(id, round)| (ParticipantId(*id), *round)).collect();
        let room = Room { bounds: Bounds::default(), vocab: 1 };
        Schedule::new(Order::Lockstep, Arc::new(Mutex::new(expected)), room)
    }

    /// Lengths of the requests of each batch that is computed now.
    fn batches(schedule: &mut Schedule) -> Vec<Vec<u32>> {
        let length = |r: &BoundaryRequest| r.positions.lengths[0];
        std::iter::from_fn(|| schedule.next())
            .map(|work| match work {
                Work::Train(group) => group.iter().map(|(r, _)| length(r)).collect(),
                Work::Other(Job::Train(r, _)) => vec![length(&r)],
                Work::Other(_) => vec![0],
            })
            .collect()
    }

    #[test]
    fn nothing_is_computed_until_all_are_there_and_then_in_their_order() {
        let mut schedule = schedule(&[(1, 5), (2, 5), (3, 5)]);
        let mut answers = Vec::new();
        let mut add = |schedule: &mut Schedule, member, length| {
            let (queued, answer) = request(member, length);
            schedule.add(queued);
            answers.push(answer);
        };
        add(&mut schedule, Some((3, 5)), 33);
        add(&mut schedule, Some((1, 5)), 31);
        assert!(batches(&mut schedule).is_empty());
        // Nobody's, and a straggler's, are computed at once and alone.
        add(&mut schedule, None, 7);
        add(&mut schedule, Some((2, 4)), 8);
        assert_eq!(batches(&mut schedule), [[7], [8]]);
        // A second one of the same member waits for its turn.
        add(&mut schedule, Some((1, 5)), 32);
        add(&mut schedule, Some((2, 5)), 90);
        assert_eq!(batches(&mut schedule), [vec![31, 33], vec![90]]);
    }

    #[test]
    fn one_that_is_released_or_gone_holds_up_nobody() {
        let mut schedule = schedule(&[(1, 1), (2, 1)]);
        let (first, _answer) = request(Some((1, 1)), 3);
        let (second, gone) = request(Some((2, 1)), 3);
        schedule.add(first);
        schedule.add(second);
        drop(gone);
        assert!(batches(&mut schedule).is_empty());
        schedule.expected.lock().unwrap().remove(&ParticipantId(2));
        assert_eq!(batches(&mut schedule), [[3]]);
    }
}
