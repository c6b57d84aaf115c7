//! The rounds of a federation as a pure state machine: `(state, time, event) -> (state, actions)`. No clock, no sockets, no
//! tensors; the owner task ([`super`]) gives it time and carries out what it says.

use fednano_shared::wire::{ParticipantId, Phase};
use std::collections::BTreeMap;

/// Milliseconds on the owner's monotonic clock.
pub type Millis = u64;

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A participant connected, for the first time or again.
    Connected(ParticipantId),
    /// Its connection is gone; it may come back.
    Lost(ParticipantId),
    /// It left for good.
    Left(ParticipantId),
    /// A sound update arrived.
    Updated {
        /// From whom.
        from: ParticipantId,
        /// For which round.
        round: u32,
    },
    /// The merged model (in round 0: the untouched one) has been evaluated.
    Evaluated,
    /// Time passed.
    Tick,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send the round's start to these.
    Start {
        /// Round.
        round: u32,
        /// To whom.
        to: Vec<ParticipantId>,
    },
    /// Count this update and say so.
    Accept {
        /// From whom.
        from: ParticipantId,
        /// Round.
        round: u32,
    },
    /// Do not count it: it is of another round, or already counted.
    Refuse {
        /// From whom.
        from: ParticipantId,
        /// The round it was for.
        round: u32,
    },
    /// Merge the updates of these, then evaluate.
    Merge {
        /// Round.
        round: u32,
        /// Whose updates, in order.
        from: Vec<ParticipantId>,
    },
    /// No update arrived in time: drop what there is of the round; it starts anew.
    Abandon {
        /// Round.
        round: u32,
    },
    /// All rounds are done: tell everybody.
    Finish,
    /// All rounds are done already: tell this one.
    TellFinished(ParticipantId),
}

/// Limits that the machine keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Rounds in all.
    pub rounds: u32,
    /// Participants connected before the first round starts; later rounds need one.
    pub min_participants: usize,
    /// A round ends after this.
    pub deadline: Millis,
    /// A lost participant is waited for this long; after a restart, every known one.
    pub grace: Millis,
}

#[derive(Debug, Clone, Default)]
struct Member {
    connected: bool,
    lost_at: Option<Millis>,
    expected: bool, // known from before a restart and not back yet
    assigned: bool,
    updated: bool,
}

/// The state.
#[derive(Debug, Clone)]
pub struct Machine {
    limits: Limits,
    phase: Phase,
    round: u32,
    members: BTreeMap<ParticipantId, Member>,
    started_at: Millis,
}

impl Machine {
    /// A federation of which `done` rounds are merged. With none done the untouched model is to be evaluated first
    /// (phase `Evaluating`), then [`Event::Evaluated`] is expected. The `known` participants of an earlier run count as lost
    /// at time 0: the first round waits for them until they are back or their grace is over.
    pub fn new(limits: Limits, done: u32, known: &[ParticipantId]) -> Self {
        let phase = match done {
            0 => Phase::Evaluating,
            d if d >= limits.rounds => Phase::Finished,
            _ => Phase::Lobby,
        };
        let away = Member { lost_at: Some(0), expected: true, ..Member::default() };
        let members = known.iter().map(|id| (*id, away.clone())).collect();
        Self { limits, phase, round: done, members, started_at: 0 }
    }

    /// Phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Current round, or the last merged one outside a round.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// Has this participant's update of the current round been counted?
    pub fn updated(&self, id: ParticipantId) -> bool {
        self.members.get(&id).is_some_and(|m| m.updated)
    }

    /// Is it connected?
    pub fn connected(&self, id: ParticipantId) -> bool {
        self.members.get(&id).is_some_and(|m| m.connected)
    }

    /// Take an event, say what to do.
    pub fn step(&mut self, now: Millis, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Connected(id) => {
                let member = self.members.entry(id).or_default();
                member.connected = true;
                member.lost_at = None;
                member.expected = false;
                if self.phase == Phase::Finished {
                    actions.push(Action::TellFinished(id));
                } else if self.phase == Phase::Training && !member.updated {
                    // Back in its round; or new while nobody has finished, so that it delays nobody.
                    let fresh = !member.assigned;
                    if !fresh || !self.members.values().any(|m| m.updated) {
                        self.members.entry(id).or_default().assigned = true;
                        actions.push(Action::Start { round: self.round, to: vec![id] });
                    }
                }
            }
            Event::Lost(id) => {
                // One that is away already is not lost anew: its grace would never end.
                if let Some(member) = self.members.get_mut(&id).filter(|m| m.connected) {
                    member.connected = false;
                    member.lost_at = Some(now);
                }
            }
            Event::Left(id) => {
                if let Some(member) = self.members.get_mut(&id) {
                    member.connected = false;
                    member.lost_at = None;
                    member.expected = false;
                    // An update that is in counts; otherwise the round no longer waits for it.
                    member.assigned &= member.updated;
                }
            }
            Event::Updated { from, round } => {
                let current = self.phase == Phase::Training && round == self.round;
                match self.members.get_mut(&from).filter(|m| current && m.assigned && !m.updated) {
                    Some(member) => {
                        member.updated = true;
                        actions.push(Action::Accept { from, round });
                    }
                    None => actions.push(Action::Refuse { from, round }),
                }
            }
            Event::Evaluated => {
                if self.phase == Phase::Evaluating {
                    self.phase = Phase::Lobby;
                    if self.round >= self.limits.rounds {
                        self.phase = Phase::Finished;
                        actions.push(Action::Finish);
                    }
                }
            }
            Event::Tick => {}
        }
        self.settle(now, &mut actions);
        actions
    }

    /// Start and end rounds where their conditions hold.
    fn settle(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let grace = self.limits.grace;
        let in_grace = |m: &Member| m.lost_at.is_some_and(|t| now.saturating_sub(t) < grace);
        if self.phase == Phase::Training {
            let waited_for = |m: &Member| m.assigned && !m.updated && (m.connected || in_grace(m));
            let late = now.saturating_sub(self.started_at) >= self.limits.deadline;
            if late || !self.members.values().any(waited_for) {
                let from: Vec<_> = self.members.iter().filter(|(_, m)| m.updated).map(|(id, _)| *id).collect();
                if from.is_empty() {
                    actions.push(Action::Abandon { round: self.round });
                    self.round -= 1;
                    self.phase = Phase::Lobby;
                } else {
                    actions.push(Action::Merge { round: self.round, from });
                    self.phase = Phase::Evaluating;
                }
            }
        }
        let connected: Vec<_> = self.members.iter().filter(|(_, m)| m.connected).map(|(id, _)| *id).collect();
        let needed = if self.round == 0 { self.limits.min_participants } else { 1 };
        // Whoever is back first after a restart must not train and merge alone.
        let expected = self.members.values().any(|m| m.expected && in_grace(m));
        if self.phase == Phase::Lobby && connected.len() >= needed.max(1) && !expected {
            self.round += 1;
            self.phase = Phase::Training;
            self.started_at = now;
            for member in self.members.values_mut() {
                member.assigned = member.connected;
                member.updated = false;
                member.expected = false;
            }
            actions.push(Action::Start { round: self.round, to: connected });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Action::*;
    use Event::*;

    const A: ParticipantId = ParticipantId(1);
    const B: ParticipantId = ParticipantId(2);

    const LIMITS: Limits = Limits { rounds: 2, min_participants: 2, deadline: 1000, grace: 100 };

    fn machine() -> Machine {
        let mut m = Machine::new(LIMITS, 0, &[]);
        assert!(m.step(0, Evaluated).is_empty());
        m
    }

    fn in_round_one() -> Machine {
        let mut m = machine();
        assert!(m.step(0, Connected(A)).is_empty());
        assert_eq!(m.step(0, Connected(B)), [Start { round: 1, to: vec![A, B] }]);
        m
    }

    #[test]
    fn two_rounds_then_finished() {
        let mut m = in_round_one();
        assert_eq!(m.step(1, Updated { from: A, round: 1 }), [Accept { from: A, round: 1 }]);
        assert_eq!(
            m.step(2, Updated { from: B, round: 1 }),
            [Accept { from: B, round: 1 }, Merge { round: 1, from: vec![A, B] }]
        );
        assert_eq!(m.step(3, Evaluated), [Start { round: 2, to: vec![A, B] }]);
        m.step(4, Updated { from: B, round: 2 });
        m.step(4, Updated { from: A, round: 2 });
        assert_eq!(m.step(5, Evaluated), [Finish]);
        assert_eq!(m.step(6, Connected(A)), [TellFinished(A)]);
    }

    #[test]
    fn an_update_counts_once_and_only_for_its_round() {
        let mut m = in_round_one();
        m.step(1, Updated { from: A, round: 1 });
        assert_eq!(m.step(1, Updated { from: A, round: 1 }), [Refuse { from: A, round: 1 }]);
        assert_eq!(m.step(1, Updated { from: B, round: 2 }), [Refuse { from: B, round: 2 }]);
        assert_eq!(
            m.step(1, Updated { from: ParticipantId(9), round: 1 }),
            [Refuse { from: ParticipantId(9), round: 1 }]
        );
    }

    #[test]
    fn a_lost_participant_is_waited_for_and_goes_on() {
        let mut m = in_round_one();
        m.step(1, Updated { from: A, round: 1 });
        assert!(m.step(10, Lost(B)).is_empty());
        assert!(m.step(109, Tick).is_empty());
        assert_eq!(m.step(109, Connected(B)), [Start { round: 1, to: vec![B] }]);
        assert!(m.step(500, Tick).is_empty());
    }

    #[test]
    fn grace_and_leaving_end_the_wait() {
        let mut m = in_round_one();
        m.step(1, Updated { from: A, round: 1 });
        m.step(10, Lost(B));
        assert_eq!(m.step(110, Tick), [Merge { round: 1, from: vec![A] }]);
        let mut m = in_round_one();
        m.step(1, Updated { from: A, round: 1 });
        assert_eq!(m.step(2, Left(B)), [Merge { round: 1, from: vec![A] }]);
    }

    #[test]
    fn a_departed_participants_update_still_counts_once() {
        let mut m = in_round_one();
        m.step(1, Updated { from: A, round: 1 });
        m.step(2, Left(A));
        assert_eq!(m.step(3, Updated { from: B, round: 1 })[1], Merge { round: 1, from: vec![A, B] });
    }

    #[test]
    fn the_deadline_ends_a_round_and_nobody_left_pauses_it() {
        let mut m = in_round_one();
        m.step(1, Updated { from: A, round: 1 });
        assert_eq!(m.step(1000, Tick), [Merge { round: 1, from: vec![A] }]);
        let mut m = in_round_one();
        m.step(1, Left(A));
        assert_eq!(m.step(2, Left(B)), [Abandon { round: 1 }]);
        assert_eq!((m.phase(), m.round()), (Phase::Lobby, 0));
        m.step(3, Connected(A));
        assert_eq!(m.step(4, Connected(B)), [Start { round: 1, to: vec![A, B] }]);
    }

    #[test]
    fn a_late_joiner_takes_part_only_while_nobody_has_finished() {
        let c = ParticipantId(3);
        let mut m = in_round_one();
        assert_eq!(m.step(1, Connected(c)), [Start { round: 1, to: vec![c] }]);
        let mut m = in_round_one();
        m.step(1, Updated { from: A, round: 1 });
        assert!(m.step(2, Connected(c)).is_empty());
        m.step(3, Updated { from: B, round: 1 });
        assert_eq!(m.step(4, Evaluated), [Start { round: 2, to: vec![A, B, c] }]);
    }

    #[test]
    fn a_restart_goes_on_after_the_last_merged_round() {
        let mut m = Machine::new(LIMITS, 1, &[A]);
        assert_eq!(m.step(0, Connected(A)), [Start { round: 2, to: vec![A] }]);
        assert_eq!(Machine::new(LIMITS, 2, &[A, B]).phase(), Phase::Finished);
    }

    #[test]
    fn after_a_restart_those_known_are_waited_for() {
        let mut m = Machine::new(LIMITS, 1, &[A, B]);
        assert!(m.step(5, Connected(A)).is_empty());
        assert!(m.step(99, Tick).is_empty());
        assert_eq!(m.step(99, Connected(B)), [Start { round: 2, to: vec![A, B] }]);
        // Also before the first round, whatever its least number.
        let mut m = Machine::new(Limits { min_participants: 1, ..LIMITS }, 0, &[A, B]);
        m.step(0, Evaluated);
        assert!(m.step(5, Connected(A)).is_empty());
        assert_eq!(m.step(6, Connected(B)), [Start { round: 1, to: vec![A, B] }]);
    }

    #[test]
    fn after_a_restart_the_wait_ends_with_the_grace_or_a_goodbye() {
        let mut m = Machine::new(LIMITS, 1, &[A, B]);
        assert!(m.step(5, Connected(A)).is_empty());
        assert!(m.step(50, Lost(B)).is_empty()); // it is away already
        assert_eq!(m.step(100, Tick), [Start { round: 2, to: vec![A] }]);
        // Late, but nobody has finished: it joins in.
        assert_eq!(m.step(101, Connected(B)), [Start { round: 2, to: vec![B] }]);
        let mut m = Machine::new(LIMITS, 1, &[A, B]);
        assert!(m.step(5, Connected(A)).is_empty());
        assert_eq!(m.step(6, Left(B)), [Start { round: 2, to: vec![A] }]);
    }

    #[test]
    fn somebody_lost_later_does_not_hold_up_the_next_round() {
        let mut m = in_round_one();
        m.step(1, Updated { from: A, round: 1 });
        m.step(1, Updated { from: B, round: 1 });
        m.step(2, Lost(B));
        assert_eq!(m.step(3, Evaluated), [Start { round: 2, to: vec![A] }]);
    }
}
