use super::Action::*;
use super::Event::*;
use super::*;
use fednano_shared::wire::Phase;

const A: ParticipantId = ParticipantId(1);
const B: ParticipantId = ParticipantId(2);
const C: ParticipantId = ParticipantId(3);
const D: ParticipantId = ParticipantId(4);

const LIMITS: Limits = Limits {
    rounds: 2,
    min_participants: 2,
    min_updates: 1,
    fraction: 1.0,
    over_selection: 0.0,
    max_staleness: 0,
    deadline: 1000,
    grace: 100,
    seed: 1,
};

/// Judged, nobody there.
fn lobby(limits: Limits) -> Machine {
    let mut m = Machine::new(limits, &Saved::default());
    assert_eq!(m.phase(), Phase::Evaluating);
    assert!(m.step(0, Evaluated).is_empty());
    m
}

/// In round 1 with so many, at time 0.
fn training(limits: Limits, people: u32) -> Machine {
    let mut m = lobby(Limits { min_participants: people as usize, ..limits });
    for id in 1..=people {
        m.step(0, Connected(ParticipantId(id)));
    }
    assert_eq!((m.phase(), m.round()), (Phase::Training, 1));
    m
}

fn two() -> Machine {
    training(LIMITS, 2)
}

/// Those told to train, and the others, of so many.
fn sides(m: &Machine, people: u32) -> (Vec<ParticipantId>, Vec<ParticipantId>) {
    (1..=people).map(ParticipantId).partition(|id| m.selected(*id))
}

fn up(from: ParticipantId, round: u32) -> Event {
    Updated { from, round }
}

fn start(round: u32, to: &[ParticipantId]) -> Action {
    Start { round, to: to.to_vec() }
}

fn wait(round: u32, to: &[ParticipantId]) -> Action {
    Wait { round, to: to.to_vec() }
}

fn accept(from: ParticipantId, round: u32) -> Action {
    Accept { from, round }
}

fn refuse(from: ParticipantId, round: u32, why: Refusal) -> Action {
    Refuse { from, round, why }
}

fn merge(round: u32, from: &[(ParticipantId, u32)]) -> Action {
    Merge { round, from: from.to_vec() }
}

#[test]
fn two_rounds_then_finished() {
    let mut m = two();
    assert_eq!(m.target(), 2);
    assert_eq!(m.step(1, up(A, 1)), [accept(A, 1)]);
    assert_eq!(m.step(2, up(B, 1)), [accept(B, 1), merge(1, &[(A, 1), (B, 1)])]);
    assert_eq!(m.step(3, Evaluated), [start(2, &[A, B])]);
    m.step(4, up(B, 2));
    m.step(4, up(A, 2));
    assert_eq!(m.step(5, Evaluated), [Finish]);
    assert_eq!(m.step(6, Connected(A)), [TellFinished(A)]);
    assert_eq!(m.step(6, up(A, 2)), [refuse(A, 2, Refusal::Finished)]);
}

#[test]
fn an_update_counts_once_and_only_for_its_round() {
    let mut m = two();
    m.step(1, up(A, 1));
    assert_eq!(m.step(1, up(A, 1)), [refuse(A, 1, Refusal::Counted)]);
    assert_eq!(m.step(1, up(B, 2)), [refuse(B, 2, Refusal::NotTraining)]);
    assert_eq!(m.step(1, up(B, 0)), [refuse(B, 0, Refusal::NotTraining)]);
    assert_eq!(m.step(1, up(D, 1)), [refuse(D, 1, Refusal::NotSelected)]);
    m.step(2, up(B, 1));
    assert_eq!(m.step(3, up(B, 1)), [refuse(B, 1, Refusal::Counted)]);
    m.step(4, Evaluated);
    assert_eq!(m.step(5, up(A, 1)), [refuse(A, 1, Refusal::Stale { current: 2 })]);
}

#[test]
fn every_refusal_has_cause_and_remedy() {
    let all = [
        Refusal::Stale { current: 7 },
        Refusal::Counted,
        Refusal::NotSelected,
        Refusal::Finished,
        Refusal::NotTraining,
    ];
    for why in all {
        assert!(!why.cause().is_empty() && !why.remedy().is_empty());
    }
    assert!(all[0].cause().contains("round 7"));
}

#[test]
fn a_lost_participant_is_waited_for_and_goes_on() {
    let mut m = two();
    m.step(1, up(A, 1));
    assert!(m.step(10, Lost(B)).is_empty());
    assert!(m.step(109, Tick).is_empty());
    assert_eq!(m.step(109, Connected(B)), [start(1, &[B])]);
    assert!(m.step(500, Tick).is_empty());
}

#[test]
fn grace_and_leaving_end_the_wait() {
    let mut m = two();
    m.step(1, up(A, 1));
    m.step(10, Lost(B));
    m.step(60, Lost(B)); // it is away already
    assert_eq!(m.step(110, Tick), [merge(1, &[(A, 1)])]);
    let mut m = two();
    m.step(1, up(A, 1));
    assert_eq!(m.step(2, Left(B)), [merge(1, &[(A, 1)])]);
}

#[test]
fn a_departed_participants_update_still_counts_once() {
    let mut m = two();
    m.step(1, up(A, 1));
    m.step(2, Left(A));
    assert_eq!(m.step(3, up(B, 1)), [accept(B, 1), merge(1, &[(A, 1), (B, 1)])]);
}

#[test]
fn one_who_left_and_comes_back_goes_on_in_its_round() {
    let mut m = training(LIMITS, 3);
    assert!(m.step(1, Left(A)).is_empty());
    assert_eq!(m.step(2, Connected(A)), [start(1, &[A])]);
    m.step(3, up(B, 1));
    assert_eq!(m.step(4, up(C, 1)), [accept(C, 1)]); // waits for A
    assert_eq!(m.step(5, up(A, 1)), [accept(A, 1), merge(1, &[(A, 1), (B, 1), (C, 1)])]);
    // One whose update is in comes back without being asked again.
    let mut m = training(LIMITS, 3);
    m.step(1, up(A, 1));
    m.step(2, Left(A));
    assert!(m.step(3, Connected(A)).is_empty());
}

#[test]
fn one_who_returns_after_its_round_was_merged_waits_for_the_next() {
    let mut m = two();
    m.step(1, Left(B));
    m.step(2, up(A, 1));
    m.step(3, Evaluated);
    m.step(4, Connected(B)); // nobody has finished round 2: it joins
    assert_eq!(m.step(5, up(B, 1)), [refuse(B, 1, Refusal::Stale { current: 2 })]);
    assert_eq!(m.step(6, up(B, 2)), [accept(B, 2)]);
}

#[test]
fn the_deadline_ends_a_round() {
    let mut m = two();
    m.step(1, up(A, 1));
    assert_eq!(m.step(1000, Tick), [merge(1, &[(A, 1)])]);
}

#[test]
fn below_the_quorum_the_deadline_is_extended_while_somebody_trains() {
    let mut m = training(Limits { min_updates: 2, ..LIMITS }, 3);
    m.step(1, up(A, 1));
    assert!(m.step(5000, Tick).is_empty());
    assert_eq!(m.step(6000, up(B, 1)), [accept(B, 1), merge(1, &[(A, 1), (B, 1)])]);
    let mut m = training(LIMITS, 2);
    assert!(m.step(5000, Tick).is_empty());
    assert!(m.step(5001, Left(A)).is_empty());
    assert_eq!(m.step(5002, Left(B)), [Pause { round: 1 }]);
}

#[test]
fn a_late_joiner_takes_part_only_while_nobody_has_finished() {
    let mut m = two();
    assert_eq!(m.step(1, Connected(C)), [start(1, &[C])]);
    assert_eq!(m.target(), 3);
    m.step(2, up(A, 1));
    assert_eq!(m.step(2, up(B, 1)), [accept(B, 1)]); // C is waited for
    let mut m = two();
    m.step(1, up(A, 1));
    assert_eq!(m.step(2, Connected(C)), [wait(1, &[C])]);
    m.step(3, up(B, 1));
    assert_eq!(m.step(4, Evaluated), [start(2, &[A, B, C])]);
}

#[test]
fn somebody_lost_does_not_hold_up_the_next_round() {
    let mut m = two();
    m.step(1, up(A, 1));
    m.step(1, up(B, 1));
    m.step(2, Lost(B));
    assert_eq!(m.step(3, Evaluated), [start(2, &[A])]);
}

#[test]
fn with_nobody_left_it_pauses_and_goes_on() {
    let mut m = two();
    m.step(1, Left(A));
    assert_eq!(m.step(2, Left(B)), [Pause { round: 1 }]);
    assert_eq!((m.phase(), m.round()), (Phase::Paused, 1));
    assert!(m.step(5000, Tick).is_empty());
    // Somebody new takes their place, with a whole deadline before it.
    assert_eq!(m.step(6000, Connected(C)), [start(1, &[C])]);
    assert!(m.step(6999, Tick).is_empty());
    assert_eq!(m.step(6999, up(C, 1)), [accept(C, 1), merge(1, &[(C, 1)])]);
    // Or one of them comes back.
    let mut m = two();
    m.step(1, Left(A));
    m.step(2, Left(B));
    assert_eq!(m.step(5000, Connected(B)), [start(1, &[B])]);
    assert_eq!(m.phase(), Phase::Training);
}

#[test]
fn a_paused_round_keeps_its_updates_and_waits_for_the_quorum() {
    let mut m = training(Limits { min_updates: 3, ..LIMITS }, 3);
    m.step(1, up(A, 1));
    m.step(2, Left(A));
    m.step(2, Left(B));
    assert_eq!(m.step(2, Left(C)), [Pause { round: 1 }]);
    let (e, f) = (ParticipantId(5), ParticipantId(6));
    assert_eq!(m.step(3, Connected(e)), [wait(1, &[e])]); // with A's update two of three
    assert_eq!(m.phase(), Phase::Paused);
    assert_eq!(m.step(4, Connected(f)), [start(1, &[e, f])]);
    m.step(5, up(f, 1));
    assert_eq!(m.step(6, up(e, 1)), [accept(e, 1), merge(1, &[(A, 1), (e, 1), (f, 1)])]);
}

#[test]
fn a_quorum_larger_than_those_left_pauses_between_rounds_too() {
    let mut m = training(Limits { min_updates: 2, ..LIMITS }, 2);
    m.step(1, up(A, 1));
    m.step(1, up(B, 1));
    m.step(2, Left(B));
    assert!(m.step(3, Evaluated).is_empty());
    assert_eq!((m.phase(), m.round()), (Phase::Lobby, 1));
    assert_eq!(m.step(4, Connected(C)), [start(2, &[A, C])]);
}

#[test]
fn a_sample_trains_and_the_others_wait() {
    let limits = Limits { fraction: 0.5, ..LIMITS };
    let mut m = training(limits, 4);
    let (asked, others) = sides(&m, 4);
    assert_eq!((asked.len(), others.len(), m.target()), (2, 2, 2));
    assert_eq!(m.step(1, up(others[0], 1)), [refuse(others[0], 1, Refusal::NotSelected)]);
    assert_eq!(m.step(1, Connected(others[0])), [wait(1, &others[..1])]); // it came back
    let new = ParticipantId(9);
    assert_eq!(m.step(1, Connected(new)), [wait(1, &[new])]); // no newcomer in a sampled round
    m.step(2, up(asked[0], 1));
    assert_eq!(m.step(2, up(asked[1], 1))[1], merge(1, &[(asked[0], 1), (asked[1], 1)]));
    let next = m.step(3, Evaluated);
    assert!(
        matches!(&next[..], [Start { round: 2, to }, Wait { round: 2, to: rest }] if to.len() == 3 && rest.len() == 2)
    );
}

#[test]
fn others_take_the_place_of_all_who_left() {
    let mut m = training(Limits { fraction: 0.5, ..LIMITS }, 4);
    let (asked, others) = sides(&m, 4);
    assert!(m.step(1, Left(asked[0])).is_empty()); // the other one still trains
    assert_eq!(m.step(2, Left(asked[1])), [start(1, &others)]);
    m.step(3, up(others[1], 1));
    assert_eq!(m.step(4, up(others[0], 1))[1], merge(1, &[(others[0], 1), (others[1], 1)]));
}

#[test]
fn others_take_the_place_of_those_overdue() {
    let mut m = training(Limits { fraction: 0.25, ..LIMITS }, 4);
    let (asked, others) = sides(&m, 4);
    assert!(m.step(999, Tick).is_empty());
    let second = m.step(1000, Tick);
    let [Start { round: 1, to }] = &second[..] else { panic!("{second:?}") };
    assert!(to.len() == 1 && others.contains(&to[0]));
    assert!(m.step(1999, Tick).is_empty()); // it has a deadline of its own
    // The first one's update still counts, and is enough.
    assert_eq!(m.step(1999, up(asked[0], 1)), [accept(asked[0], 1), merge(1, &[(asked[0], 1)])]);
}

#[test]
fn more_are_asked_than_needed_and_the_slow_are_cut_off() {
    let limits = Limits { fraction: 0.5, over_selection: 0.5, ..LIMITS };
    let mut m = training(limits, 4);
    let (asked, _) = sides(&m, 4);
    assert_eq!((asked.len(), m.target()), (3, 2));
    m.step(1, up(asked[0], 1));
    assert_eq!(m.step(1, up(asked[1], 1))[1], merge(1, &[(asked[0], 1), (asked[1], 1)]));
    assert_eq!(m.step(2, up(asked[2], 1)), [refuse(asked[2], 1, Refusal::Stale { current: 1 })]);
    // All are told how it goes on.
    let told: usize = m
        .step(3, Evaluated)
        .iter()
        .map(|a| if let Start { to, .. } | Wait { to, .. } = a { to.len() } else { 0 })
        .sum();
    assert_eq!(told, 4);
}

#[test]
fn late_updates_are_merged_with_the_next_merge() {
    let limits = Limits { rounds: 4, fraction: 0.5, over_selection: 0.5, max_staleness: 1, ..LIMITS };
    let mut m = training(limits, 4);
    let (asked, others) = sides(&m, 4);
    let slow = asked[2];
    m.step(1, up(asked[0], 1));
    m.step(1, up(asked[1], 1));
    assert_eq!(m.step(2, up(others[0], 1)), [refuse(others[0], 1, Refusal::NotSelected)]);
    assert_eq!(m.step(2, up(slow, 1)), [AcceptLate { from: slow, round: 1 }]); // while evaluating
    assert_eq!(m.step(2, up(slow, 1)), [refuse(slow, 1, Refusal::Counted)]);
    m.step(3, Evaluated);
    assert_eq!(m.step(3, up(slow, 1)), [refuse(slow, 1, Refusal::Counted)]);
    let (asked, _) = sides(&m, 4);
    m.step(4, up(asked[0], 2));
    let mut expected = vec![(slow, 1), (asked[0], 2), (asked[1], 2)];
    expected.sort_unstable();
    assert_eq!(m.step(4, up(asked[1], 2))[1], merge(2, &expected));
    m.step(5, Evaluated);
    let slow = asked[2];
    assert_eq!(m.step(6, up(slow, 2)), [AcceptLate { from: slow, round: 2 }]); // in the next round
    assert_eq!(m.step(6, up(slow, 1)), [refuse(slow, 1, Refusal::Stale { current: 3 })]);
}

#[test]
fn what_is_too_late_for_the_last_merge_is_refused() {
    let mut m = training(Limits { rounds: 1, max_staleness: 3, ..LIMITS }, 2);
    m.step(1, up(A, 1));
    m.step(1000, Tick);
    assert_eq!(m.step(1001, up(B, 1)), [refuse(B, 1, Refusal::Finished)]);
    assert_eq!(m.step(1002, Evaluated), [Finish]);
    assert_eq!(m.step(1003, up(B, 1)), [refuse(B, 1, Refusal::Finished)]);
    assert_eq!(m.step(1003, up(A, 1)), [refuse(A, 1, Refusal::Counted)]);
}

fn saved(done: u32, known: &[ParticipantId]) -> Saved {
    Saved { done, evaluated_start: true, known: known.iter().map(|id| (*id, false)).collect(), ..Saved::default() }
}

#[test]
fn a_restart_goes_on_after_the_last_merged_round() {
    let mut m = Machine::new(LIMITS, &saved(1, &[A]));
    assert_eq!(m.step(0, Connected(A)), [start(2, &[A])]);
    assert_eq!(Machine::new(LIMITS, &saved(2, &[A, B])).phase(), Phase::Finished);
    assert_eq!(Machine::new(LIMITS, &Saved { evaluated_start: false, ..saved(0, &[A]) }).phase(), Phase::Evaluating);
}

#[test]
fn after_a_restart_those_known_are_waited_for() {
    let mut m = Machine::new(LIMITS, &saved(1, &[A, B]));
    assert!(m.step(5, Connected(A)).is_empty());
    assert!(m.step(99, Tick).is_empty());
    assert_eq!(m.step(99, Connected(B)), [start(2, &[A, B])]);
    // Also before the first round, whatever its least number.
    let mut m = Machine::new(Limits { min_participants: 1, ..LIMITS }, &saved(0, &[A, B]));
    assert!(m.step(5, Connected(A)).is_empty());
    assert_eq!(m.step(6, Connected(B)), [start(1, &[A, B])]);
}

#[test]
fn after_a_restart_the_wait_ends_with_the_grace_or_a_goodbye() {
    let mut m = Machine::new(LIMITS, &saved(1, &[A, B]));
    assert!(m.step(5, Connected(A)).is_empty());
    assert!(m.step(50, Lost(B)).is_empty()); // it is away already
    assert_eq!(m.step(100, Tick), [start(2, &[A])]);
    // Late, but nobody has finished: it joins in.
    assert_eq!(m.step(101, Connected(B)), [start(2, &[B])]);
    let mut m = Machine::new(LIMITS, &saved(1, &[A, B]));
    assert!(m.step(5, Connected(A)).is_empty());
    assert_eq!(m.step(6, Left(B)), [start(2, &[A])]);
    // Who had left before is not waited for.
    let mut m = Machine::new(LIMITS, &Saved { known: vec![(A, false), (B, true)], ..saved(1, &[]) });
    assert_eq!(m.step(5, Connected(A)), [start(2, &[A])]);
}

/// Round 1 of three, A's update accepted.
fn half_done() -> Saved {
    Saved {
        open: Some(Open { round: 1, target: 3, assigned: vec![A, B, C], closed: None }),
        accepted: vec![(A, 1)],
        ..saved(0, &[A, B, C])
    }
}

#[test]
fn a_restart_in_a_round_goes_on_with_it() {
    let mut m = Machine::new(LIMITS, &half_done());
    assert_eq!((m.phase(), m.round(), m.target()), (Phase::Training, 1, 3));
    assert!(m.updated(A) && m.selected(B) && !m.updated(B));
    assert!(m.step(1, Connected(A)).is_empty()); // its update is in
    assert_eq!(m.step(1, up(A, 1)), [refuse(A, 1, Refusal::Counted)]);
    assert_eq!(m.step(2, Connected(B)), [start(1, &[B])]);
    assert_eq!(m.step(2, Connected(D)), [wait(1, &[D])]); // somebody has finished
    assert_eq!(m.step(3, up(B, 1)), [accept(B, 1)]); // C may still come
    assert_eq!(m.step(100, Tick), [merge(1, &[(A, 1), (B, 1)])]);
}

#[test]
fn a_restart_of_a_complete_round_merges_the_same_updates_first() {
    let limits = Limits { rounds: 3, fraction: 0.5, over_selection: 0.5, max_staleness: 2, ..LIMITS };
    // C's update came when A's and B's had closed the round.
    let complete = Saved {
        open: Some(Open { round: 1, target: 2, assigned: vec![A, B, C], closed: None }),
        accepted: vec![(B, 1), (A, 1), (C, 1)],
        ..saved(0, &[A, B, C, D])
    };
    let mut m = Machine::new(limits, &complete);
    assert_eq!(m.step(0, up(C, 1)), [merge(1, &[(A, 1), (B, 1)]), refuse(C, 1, Refusal::Counted)]);
    // The evaluation that is reported can only be that of this merge.
    let mut m = Machine::new(limits, &complete);
    assert_eq!(m.step(0, Evaluated), [merge(1, &[(A, 1), (B, 1)])]);
    for id in [A, B, C, D] {
        m.step(1, Connected(id));
    }
    m.step(2, Evaluated);
    let (asked, _) = sides(&m, 4);
    m.step(3, up(asked[0], 2));
    let merged = m.step(3, up(asked[1], 2));
    assert!(matches!(&merged[1], Merge { round: 2, from } if from.contains(&(C, 1)) && from.len() == 3), "{merged:?}");
}

#[test]
fn a_restart_of_a_round_that_was_closed_short_merges_the_same_updates_first() {
    let limits = Limits { rounds: 3, max_staleness: 1, ..LIMITS };
    // At the deadline there were A's update and B's late one of round 1; C's came when they were being evaluated.
    let short = Saved {
        open: Some(Open { round: 2, target: 3, assigned: vec![A, B, C], closed: Some(2) }),
        accepted: vec![(A, 2), (B, 1), (C, 2)],
        past: vec![(B, 1, true)],
        ..saved(1, &[A, B, C])
    };
    let mut m = Machine::new(limits, &short);
    assert_eq!(m.step(0, Tick), [merge(2, &[(A, 2), (B, 1)])]);
    assert!(m.closed_short());
    assert_eq!(m.step(1, up(C, 2)), [refuse(C, 2, Refusal::Counted)]);
    assert_eq!(m.step(1, up(B, 2)), [AcceptLate { from: B, round: 2 }]);
    for id in [A, B, C] {
        m.step(2, Connected(id));
    }
    assert_eq!(m.step(3, Evaluated), [start(3, &[A, B, C])]);
    m.step(4, up(A, 3));
    assert_eq!(m.step(1004, Tick), [merge(3, &[(A, 3), (B, 2), (C, 2)])]);
}

#[test]
fn a_restart_knows_what_came_late_and_what_may_still() {
    let limits = Limits { rounds: 4, max_staleness: 2, ..LIMITS };
    let saved = Saved {
        accepted: vec![(A, 1)],
        past: vec![(A, 1, false), (B, 1, false), (A, 2, true), (B, 2, false)],
        ..saved(2, &[A, B])
    };
    let mut m = Machine::new(limits, &saved);
    assert_eq!(m.step(0, up(A, 1)), [refuse(A, 1, Refusal::Counted)]);
    assert_eq!(m.step(0, up(A, 2)), [refuse(A, 2, Refusal::Counted)]);
    assert_eq!(m.step(0, up(B, 2)), [AcceptLate { from: B, round: 2 }]);
    assert_eq!(m.step(0, up(C, 2)), [refuse(C, 2, Refusal::NotSelected)]);
    m.step(1, Connected(A));
    m.step(1, Connected(B));
    m.step(2, up(A, 3));
    let last = m.step(2, up(B, 3));
    assert_eq!(last[1], merge(3, &[(A, 1), (A, 3), (B, 2), (B, 3)]));
}

#[test]
fn a_restart_while_paused_goes_on_when_people_are_there() {
    let limits = Limits { min_updates: 2, ..LIMITS };
    let all_left = Saved { known: vec![(A, true), (B, true), (C, true)], ..half_done() };
    let mut m = Machine::new(limits, &all_left);
    assert_eq!(m.step(0, Connected(D)), [Pause { round: 1 }, start(1, &[D])]);
    assert_eq!(m.step(1, up(D, 1)), [accept(D, 1), merge(1, &[(A, 1), (D, 1)])]);
    let mut m = Machine::new(limits, &all_left);
    assert_eq!(m.step(0, Tick), [Pause { round: 1 }]);
    assert_eq!(m.step(9000, Connected(C)), [start(1, &[C])]);
    assert_eq!(m.step(9001, up(C, 1)), [accept(C, 1), merge(1, &[(A, 1), (C, 1)])]);
}

#[test]
fn nonsense_on_disk_does_no_harm() {
    let odd = Saved {
        open: Some(Open { round: 7, target: 0, assigned: vec![D], closed: None }),
        accepted: vec![(D, 9), (C, 0)],
        past: vec![(A, 9, true)],
        ..saved(0, &[A])
    };
    let mut m = Machine::new(LIMITS, &odd);
    assert_eq!((m.phase(), m.round()), (Phase::Lobby, 0));
    m.step(0, Connected(A));
    assert_eq!(m.step(0, Connected(B)), [start(1, &[A, B])]);
}
