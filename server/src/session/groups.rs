//! What the requests of an optimiser step have in common: gradients of the `up` matrices, and their squares, are the same tensors for
//! all of them, so they are added up here and sent once, with the reply that is computed last. The sums are made in the order of the
//! requests, whatever the order of their answers: float sums depend on it.
//!
//! What is kept is bounded, whatever a client sends: a matrix has the federation's rank at most; of all groups but the one that is
//! arriving a request is under way, of which there are [`IN_FLIGHT`] at most; and a request so many ahead of an unanswered one is refused.

use super::IN_FLIGHT;
use fednano_shared::boundary::{BoundaryReply, CodesGradient, Gradient, Pair, Place, Want};
use fednano_shared::plain::TensorBlob;
use fednano_shared::wire::{Fault, FaultCode};
use std::collections::BTreeMap;

/// A request's place in a group of this connection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Slot {
    group: u64,
    place: Place,
}

/// The groups of a connection that are under way: the one whose requests are arriving, and those whose answers are still being
/// computed.
#[derive(Default)]
pub(super) struct Groups {
    last: u64,
    arriving: Option<Arriving>,
    sums: BTreeMap<u64, Sums>,
}

/// A group of which requests are still to come, and what they must have in common.
struct Arriving {
    group: u64,
    of: u16,
    next: u16,
    rank: u32,
    want: Want,
}

/// What is known of a group's matrices.
struct Sums {
    of: u16,
    /// Requests whose gradients are in `up` and `up_squares`: the first so many.
    added: u16,
    up: Pair<TensorBlob>,
    up_squares: Pair<TensorBlob>,
    /// Those of later requests that were answered before an earlier one: fewer than [`IN_FLIGHT`].
    ahead: BTreeMap<u16, (f32, CodesGradient)>,
}

fn none() -> Pair<TensorBlob> {
    Pair { image: None, text: None }
}

impl Groups {
    /// A training request has arrived. The first of a group ends one that is not complete: its client has given it up.
    ///
    /// # Errors
    /// A [`Fault`] for the client: it does not follow the request before, or is too far ahead of one that is not answered. Then the
    /// whole group is given up.
    pub(super) fn enter(&mut self, place: Place, rank: u32, want: Want) -> Result<Slot, Fault> {
        if let Err(e) = place.check() {
            self.give_up();
            return Err(fault(FaultCode::Invalid, e.to_string()));
        }
        if place.index == 0 {
            self.give_up();
            self.last += 1;
            self.arriving = Some(Arriving { group: self.last, of: place.of, next: 0, rank, want });
            let sums = Sums { of: place.of, added: 0, up: none(), up_squares: none(), ahead: BTreeMap::new() };
            self.sums.insert(self.last, sums);
        }
        let follows = |a: &Arriving| (a.of, a.next, a.rank, a.want) == (place.of, place.index, rank, want);
        let Some(arriving) = self.arriving.as_mut().filter(|arriving| follows(arriving)) else {
            self.give_up();
            let cause = format!("request {} of a step's {} does not follow the one before it", place.index, place.of);
            return Err(fault(FaultCode::OutOfOrder, cause));
        };
        let first = self.sums.get(&arriving.group).map_or(place.index, |sums| sums.added);
        if usize::from(place.index.saturating_sub(first)) >= IN_FLIGHT {
            self.give_up();
            let cause = format!("request {} of a step came while its request {first} is not answered", place.index);
            return Err(fault(FaultCode::OutOfOrder, format!("{cause}; {IN_FLIGHT} may be under way")));
        }
        arriving.next += 1; // at most `of`
        let slot = Slot { group: arriving.group, place };
        if arriving.next == arriving.of {
            self.arriving = None;
        }
        Ok(slot)
    }

    /// The group that is arriving will not be complete: one of its requests was refused.
    pub(super) fn give_up(&mut self) {
        if let Some(arriving) = self.arriving.take() {
            self.sums.remove(&arriving.group);
        }
    }

    /// A request of the group failed, so its sums are of no use: what else is answered of it comes without them.
    pub(super) fn fail(&mut self, slot: &Slot) {
        self.sums.remove(&slot.group);
        if self.arriving.as_ref().is_some_and(|arriving| arriving.group == slot.group) {
            self.arriving = None;
        }
    }

    /// A request is answered: take its matrices' gradients out of the reply or, of the group's last answer, put the sums in.
    pub(super) fn add(&mut self, slot: &Slot, reply: &mut BoundaryReply) {
        let Gradient::Codes(own) = &mut reply.gradient else { return };
        let (up, up_squares) = (std::mem::replace(&mut own.up, none()), std::mem::replace(&mut own.up_squares, none()));
        let Some(sums) = self.sums.get_mut(&slot.group) else { return };
        sums.ahead.insert(slot.place.index, (slot.place.share, CodesGradient { codes: none(), up, up_squares }));
        while let Some((share, next)) = sums.ahead.remove(&sums.added) {
            sums.up.add_scaled(&next.up, share);
            sums.up_squares.add_scaled(&next.up_squares, 1.0);
            sums.added += 1;
        }
        if sums.added == sums.of
            && let Some(sums) = self.sums.remove(&slot.group)
        {
            (own.up, own.up_squares) = (sums.up, sums.up_squares);
        }
    }
}

fn fault(code: FaultCode, cause: String) -> Fault {
    Fault { code, cause, remedy: "send the requests of a step one after the other, all of one kind".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANT: Want = Want::Both;

    fn place(index: u16, of: u16) -> Place {
        // Shares that do not add up exactly: the order of sums shows.
        Place { index, of, share: 0.1 * f32::from(index + 1) }
    }

    fn blob(v: f32) -> TensorBlob {
        TensorBlob { shape: vec![1, 2], data: vec![v, v / 3.0] }
    }

    fn reply(v: f32) -> BoundaryReply {
        let pair = |v: f32| Pair { image: Some(blob(v)), text: Some(blob(-v)) };
        let gradient = Gradient::Codes(CodesGradient { codes: pair(v), up: pair(v + 0.1), up_squares: pair(v * v) });
        BoundaryReply { loss: v, row_loss: vec![v], gradient }
    }

    fn codes(reply: &BoundaryReply) -> &CodesGradient {
        match &reply.gradient {
            Gradient::Codes(codes) => codes,
            Gradient::Hidden(_) => panic!("a gradient of activations"),
        }
    }

    /// Answers in this order; the sums, which come with the last.
    fn sums(order: &[u16]) -> CodesGradient {
        let mut groups = Groups::default();
        let of = order.len() as u16;
        let slots: Vec<Slot> = (0..of).map(|index| groups.enter(place(index, of), 2, WANT).unwrap()).collect();
        let mut last = None;
        for (answered, index) in order.iter().enumerate() {
            let mut reply = reply(0.7 + f32::from(*index) * 1.3);
            let own = codes(&reply).codes.clone();
            groups.add(&slots[usize::from(*index)], &mut reply);
            let got = codes(&reply).clone();
            assert_eq!(got.codes, own, "what is a request's own stays with it");
            assert_eq!(got.up.is_empty() && got.up_squares.is_empty(), answered + 1 < order.len());
            last = Some(got);
        }
        assert!(groups.sums.is_empty() && groups.arriving.is_none());
        CodesGradient { codes: none(), ..last.unwrap() }
    }

    #[test]
    fn sums_do_not_depend_on_the_order_of_answers() {
        let straight = sums(&[0, 1, 2, 3]);
        for order in [[3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1], [0, 3, 1, 2]] {
            assert_eq!(sums(&order), straight, "{order:?}");
        }
        // By hand: gradients by share, squares as they are.
        let (mut up, mut squares) = (none(), none());
        for index in 0..4u16 {
            let one = reply(0.7 + f32::from(index) * 1.3);
            up.add_scaled(&codes(&one).up, place(index, 4).share);
            squares.add_scaled(&codes(&one).up_squares, 1.0);
        }
        assert_eq!((straight.up, straight.up_squares), (up, squares));
    }

    #[test]
    fn one_alone_keeps_what_it_has() {
        let mut groups = Groups::default();
        let slot = groups.enter(Place::ALONE, 2, WANT).unwrap();
        let mut answered = reply(2.5);
        groups.add(&slot, &mut answered);
        assert_eq!(answered, reply(2.5));
    }

    #[test]
    fn the_next_group_may_arrive_before_the_last_answer() {
        let mut groups = Groups::default();
        let first: Vec<Slot> = (0..2).map(|i| groups.enter(place(i, 2), 2, WANT).unwrap()).collect();
        let second: Vec<Slot> = (0..2).map(|i| groups.enter(place(i, 2), 2, WANT).unwrap()).collect();
        let mut answers = [reply(1.0), reply(2.0), reply(3.0), reply(4.0)];
        groups.add(&second[1], &mut answers[3]);
        groups.add(&first[0], &mut answers[0]);
        groups.add(&second[0], &mut answers[2]);
        groups.add(&first[1], &mut answers[1]);
        let whole = |n: usize| !codes(&answers[n]).up.is_empty();
        assert_eq!([0, 1, 2, 3].map(whole), [false, true, true, false]);
        assert_ne!(codes(&answers[1]).up, codes(&answers[2]).up);
        assert!(groups.sums.is_empty());
    }

    #[test]
    fn little_is_kept_while_a_request_is_not_answered() {
        let mut groups = Groups::default();
        let enter = |groups: &mut Groups, index: u16| groups.enter(Place { index, of: 99, share: 0.01 }, 2, WANT);
        let first = enter(&mut groups, 0).unwrap();
        // It waits for pictures, say, and the others are answered one by one.
        for index in 1..IN_FLIGHT as u16 {
            let slot = enter(&mut groups, index).unwrap();
            groups.add(&slot, &mut reply(1.0));
        }
        let fault = enter(&mut groups, IN_FLIGHT as u16).unwrap_err();
        assert_eq!(fault.code, FaultCode::OutOfOrder);
        assert!(fault.cause.contains("request 4 of a step came while its request 0 is not answered"), "{fault}");
        assert!(groups.sums.is_empty() && groups.arriving.is_none(), "the group goes on after a fault");
        groups.add(&first, &mut reply(1.0));
        assert!(groups.sums.is_empty());
        // However long a group is, nothing is in the way of one that is answered in time.
        for index in 0..99 {
            let slot = enter(&mut groups, index).unwrap();
            groups.add(&slot, &mut reply(1.0));
        }
        assert!(groups.sums.is_empty() && groups.arriving.is_none());
    }

    #[test]
    fn a_failure_ends_its_group_alone() {
        let mut groups = Groups::default();
        let first: Vec<Slot> = (0..2).map(|i| groups.enter(place(i, 3), 2, WANT).unwrap()).collect();
        groups.fail(&first[0]);
        // What is still computed of it has no sums, and no request continues it.
        let mut rest = reply(1.0);
        groups.add(&first[1], &mut rest);
        assert!(codes(&rest).up.is_empty() && groups.sums.is_empty());
        assert_eq!(groups.enter(place(2, 3), 2, WANT).unwrap_err().code, FaultCode::OutOfOrder);
        // The step is tried again.
        let again = groups.enter(place(0, 3), 2, WANT).unwrap();
        groups.fail(&first[1]);
        let mut answered = reply(1.0);
        groups.add(&again, &mut answered);
        assert_eq!(groups.sums.len(), 1);
        // A new one in the middle: the client has given the old one up.
        groups.enter(Place::ALONE, 2, WANT).unwrap();
        assert_eq!(groups.sums.len(), 1);
        groups.give_up(); // nothing is arriving
        assert_eq!(groups.sums.len(), 1);
    }

    #[test]
    fn requests_must_follow_one_another() {
        let refused = |second: (Place, u32, Want)| {
            let mut groups = Groups::default();
            groups.enter(place(0, 4), 2, WANT).unwrap();
            let fault = groups.enter(second.0, second.1, second.2).unwrap_err();
            assert!(groups.sums.is_empty() && groups.arriving.is_none(), "the group goes on after a fault");
            fault
        };
        for second in
            [(place(2, 4), 2, WANT), (place(1, 5), 2, WANT), (place(1, 4), 3, WANT), (place(1, 4), 2, Want::Squares)]
        {
            let fault = refused(second);
            assert_eq!(fault.code, FaultCode::OutOfOrder);
            assert!(fault.cause.contains("does not follow") && !fault.remedy.is_empty(), "{fault}");
        }
        let wild = Place { index: 4, of: 4, share: 0.5 };
        assert_eq!(refused((wild, 2, WANT)).code, FaultCode::Invalid);
        assert_eq!(refused((Place { share: f32::NAN, ..place(1, 4) }, 2, WANT)).code, FaultCode::Invalid);
    }
}
