//! The rules of rounds; their words are in [`super`].

use super::{Action, Event, Limits, Millis, Refusal, Saved, select};
use fednano_shared::wire::{ParticipantId, Phase};
use std::collections::BTreeMap;

#[derive(Debug, Clone, Default)]
struct Member {
    connected: bool,
    lost_at: Option<Millis>,
    expected: bool, // known from before a restart and not back yet
    assigned: bool, // told to train in the current round
    updated: bool,  // its update of the current round came in time
}

/// An update that came after its round was closed.
#[derive(Debug, Clone)]
struct Late {
    from: ParticipantId,
    round: u32,
    due: u32, // the round with which it is merged
}

/// The state.
///
/// A round begins with `needed` = `fraction` of the connected participants, rounded up, at least the quorum and at most all of
/// them; `needed` times 1 + `over_selection` of them are drawn and told to train. It is merged
/// - as soon as `needed` updates are in (whoever is slower may send a late one), or
/// - when at least the quorum is in and nobody is waited for: those told to train who are connected or lost for less than the grace, or
/// - at its deadline, when at least the quorum is in.
///
/// When those waited for, without those overdue, cannot make up the quorum any more, others who are connected are drawn in their place
/// and the deadline begins anew. Where that cannot be, the round is extended while somebody who was told to train still does: it
/// is merged as soon as the quorum is in. With nobody waited for it is paused; it goes on when one of them comes back, or when there
/// are people enough (updated or connected) for the quorum, of whom some are then told to train.
///
/// Without sampling (`fraction` 1) a newcomer joins the round under way while nobody has finished, so that it delays nobody, and
/// the round needs its update too.
#[derive(Debug, Clone)]
pub struct Machine {
    limits: Limits,
    phase: Phase,
    round: u32,
    needed: usize,
    members: BTreeMap<ParticipantId, Member>,
    started_at: Millis,
    late: Vec<Late>,
    past: BTreeMap<(ParticipantId, u32), bool>, // told to train in an earlier round -> the update was accepted
    restored: bool,                             // what follows from the saved state has not been done yet
    closed: bool,                               // the round was closed with less than it needs, before a restart
}

impl Machine {
    /// Go on from what is on disk ([`Saved::default`]: nothing). With the untouched model not evaluated yet the phase is
    /// `Evaluating` and [`Event::Evaluated`] is expected. Known participants who have not left count as lost at time 0: a round
    /// under way waits for those it has told to train, the next one for all, until they are back or their grace is over. A
    /// deadline begins anew.
    ///
    /// A round that had all it needed is merged at the first step, from the same updates as before; so is one that was closed with
    /// fewer (deadline, people gone), if [`Open::closed`] says so. What came after the closing came late.
    pub fn new(limits: Limits, saved: &Saved) -> Self {
        let done = saved.done;
        let open = saved.open.as_ref().filter(|o| done < limits.rounds && o.round == done + 1);
        let phase = match open {
            Some(_) => Phase::Training,
            None if done >= limits.rounds => Phase::Finished,
            None if done == 0 && !saved.evaluated_start => Phase::Evaluating,
            None => Phase::Lobby,
        };
        let away = |left: bool| Member { lost_at: (!left).then_some(0), expected: !left, ..Member::default() };
        let mut machine = Self {
            limits,
            phase,
            round: open.map_or(done, |o| o.round),
            needed: open.map_or(0, |o| o.target),
            members: saved.known.iter().map(|(id, left)| (*id, away(*left))).collect(),
            started_at: 0,
            late: Vec::new(),
            past: saved.past.iter().map(|(id, round, counted)| ((*id, *round), *counted)).collect(),
            restored: true,
            closed: false,
        };
        machine.forget(done);
        if let Some(open) = open {
            for id in &open.assigned {
                machine.members.entry(*id).or_default().assigned = true;
            }
        }
        let closed = open.and_then(|o| o.closed);
        for (n, (from, round)) in saved.accepted.iter().enumerate() {
            let before = closed.map_or_else(|| !machine.complete(), |first| n < first);
            machine.count_again(*from, *round, before);
        }
        machine.closed = closed.is_some() && machine.updates() >= limits.quorum();
        machine
    }

    /// An accepted update, in the order of acceptance: what came after the closing of the round under way came late.
    fn count_again(&mut self, from: ParticipantId, round: u32, before_closing: bool) {
        let open = self.phase == Phase::Training && before_closing;
        if open && round == self.round {
            let member = self.members.entry(from).or_default();
            (member.assigned, member.updated) = (true, true);
        } else if (1..=self.round).contains(&round) {
            self.past.insert((from, round), true);
            self.late.push(Late { from, round, due: self.round.saturating_add(u32::from(!open)) });
        }
    }

    /// Phase.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Current round, or the last merged one outside a round.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// So many updates complete the current round (outside a round: the last one). Without sampling it grows with each newcomer.
    pub fn target(&self) -> usize {
        if self.limits.everybody() { self.members.values().filter(|m| m.assigned).count() } else { self.needed }
    }

    /// Are fewer updates in than complete the round? Where it is merged all the same, a restart must be told ([`Open::closed`]).
    pub fn closed_short(&self) -> bool {
        self.updates() < self.target()
    }

    /// Has this participant's update been counted in the current round (outside a round: in the last one)?
    pub fn updated(&self, id: ParticipantId) -> bool {
        self.members.get(&id).is_some_and(|m| m.updated)
    }

    /// Was it told to train in the current round (outside a round: in the last one)?
    pub fn selected(&self, id: ParticipantId) -> bool {
        self.members.get(&id).is_some_and(|m| m.assigned)
    }

    /// Is it connected?
    pub fn connected(&self, id: ParticipantId) -> bool {
        self.members.get(&id).is_some_and(|m| m.connected)
    }

    /// Take an event, say what to do. `now` never falls.
    pub fn step(&mut self, now: Millis, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        // An evaluation that is reported belongs to a merge of an earlier step.
        let evaluating = self.phase == Phase::Evaluating;
        if std::mem::take(&mut self.restored) {
            self.settle(0, &mut actions);
        }
        let under_way = self.under_way();
        match event {
            Event::Connected(id) => self.connect(id, &mut actions),
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
                }
            }
            Event::Updated { from, round } => actions.push(self.answer(from, round)),
            Event::Evaluated if evaluating => self.next(&mut actions),
            Event::Evaluated | Event::Tick => {}
        }
        self.settle(now, &mut actions);
        if let Event::Connected(id) = event
            && under_way
            && self.under_way()
            && !self.selected(id)
        {
            actions.push(Action::Wait { round: self.round, to: vec![id] });
        }
        actions
    }

    fn connect(&mut self, id: ParticipantId, actions: &mut Vec<Action>) {
        let nobody_finished = self.updates() == 0;
        let member = self.members.entry(id).or_default();
        member.connected = true;
        member.lost_at = None;
        member.expected = false;
        match self.phase {
            Phase::Finished => actions.push(Action::TellFinished(id)),
            Phase::Training | Phase::Paused => {
                let newcomer =
                    !member.assigned && self.phase == Phase::Training && self.limits.everybody() && nobody_finished;
                member.assigned |= newcomer;
                if member.assigned && !member.updated {
                    actions.push(Action::Start { round: self.round, to: vec![id] });
                }
            }
            Phase::Lobby | Phase::Evaluating => {}
        }
    }

    /// The answer to an update.
    fn answer(&mut self, from: ParticipantId, round: u32) -> Action {
        let refuse = |why| Action::Refuse { from, round, why };
        let accepted = self.assignment(from, round);
        if self.phase == Phase::Finished {
            return refuse(if accepted == Some(true) { Refusal::Counted } else { Refusal::Finished });
        }
        if round == 0 || round > self.round {
            return refuse(Refusal::NotTraining);
        }
        if accepted == Some(true) {
            return refuse(Refusal::Counted);
        }
        let due = if self.under_way() { self.round } else { self.round.saturating_add(1) };
        if due.saturating_sub(round) > self.limits.max_staleness {
            return refuse(Refusal::Stale { current: self.round });
        }
        if accepted.is_none() {
            return refuse(Refusal::NotSelected);
        }
        if due > self.limits.rounds {
            return refuse(Refusal::Finished);
        }
        if due == round {
            self.members.entry(from).or_default().updated = true;
            return Action::Accept { from, round };
        }
        self.past.insert((from, round), true);
        self.late.push(Late { from, round, due });
        Action::AcceptLate { from, round }
    }

    /// Was it told to train in that round, and then: was its update accepted?
    fn assignment(&self, from: ParticipantId, round: u32) -> Option<bool> {
        let current = round == self.round && (self.under_way() || self.phase == Phase::Evaluating);
        let here = self.members.get(&from).filter(|m| current && m.assigned).map(|m| m.updated);
        self.past.get(&(from, round)).copied().or(here)
    }

    /// The round is merged, evaluated and on disk.
    fn next(&mut self, actions: &mut Vec<Action>) {
        if self.round > 0 {
            for (id, member) in self.members.iter().filter(|(_, m)| m.assigned) {
                // One that was accepted late meanwhile is there already.
                self.past.entry((*id, self.round)).or_insert(member.updated);
            }
        }
        self.forget(self.round);
        self.phase = Phase::Lobby;
        if self.round >= self.limits.rounds {
            self.phase = Phase::Finished;
            actions.push(Action::Finish);
        }
    }

    /// Keep only the rounds whose updates could still be merged after so many rounds.
    fn forget(&mut self, done: u32) {
        let staleness = self.limits.max_staleness;
        self.past.retain(|(_, round), _| *round <= done && round.saturating_add(staleness) > done);
    }

    fn under_way(&self) -> bool {
        matches!(self.phase, Phase::Training | Phase::Paused)
    }

    fn updates(&self) -> usize {
        self.members.values().filter(|m| m.updated).count()
    }

    fn complete(&self) -> bool {
        self.closed || self.updates() >= self.target().max(1)
    }

    fn in_grace(&self, member: &Member, now: Millis) -> bool {
        member.lost_at.is_some_and(|t| now.saturating_sub(t) < self.limits.grace)
    }

    /// Begin and end rounds where their conditions hold.
    fn settle(&mut self, now: Millis, actions: &mut Vec<Action>) {
        if self.under_way() {
            self.settle_round(now, actions);
        } else if self.phase == Phase::Lobby {
            self.begin(now, actions);
        }
    }

    fn settle_round(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let (updates, quorum) = (self.updates(), self.limits.quorum());
        let waited_for = |m: &&Member| m.assigned && !m.updated && (m.connected || self.in_grace(m, now));
        let waited_for = self.members.values().filter(waited_for).count();
        let overdue = self.phase == Phase::Training && now.saturating_sub(self.started_at) >= self.limits.deadline;
        if self.complete() || (updates >= quorum && (overdue || waited_for == 0)) {
            self.merge(actions);
            return;
        }
        let hoped_for = if overdue { updates } else { updates + waited_for };
        if hoped_for < quorum && self.replace(hoped_for, actions) {
            self.phase = Phase::Training;
            self.started_at = now;
        } else if waited_for == 0 {
            if self.phase == Phase::Training {
                self.phase = Phase::Paused;
                actions.push(Action::Pause { round: self.round });
            }
        } else if self.phase == Phase::Paused {
            self.phase = Phase::Training;
            self.started_at = now;
        }
    }

    fn merge(&mut self, actions: &mut Vec<Action>) {
        let round = self.round;
        let in_time = self.members.iter().filter(|(_, m)| m.updated).map(|(id, _)| (*id, round));
        let late = self.late.iter().filter(|l| l.due <= round).map(|l| (l.from, l.round));
        let mut from: Vec<_> = in_time.chain(late).collect();
        from.sort_unstable();
        self.late.retain(|l| l.due > round);
        self.phase = Phase::Evaluating;
        actions.push(Action::Merge { round, from });
    }

    /// Draw others for those who will not make it. False: there is nobody else, or there are too few people for the quorum.
    fn replace(&mut self, hoped_for: usize, actions: &mut Vec<Action>) -> bool {
        let people = self.members.values().filter(|m| m.updated || m.connected).count();
        let free = self.members.iter().filter(|(_, m)| m.connected && !m.assigned).map(|(id, _)| *id);
        let mut to = select::drawn(self.limits.seed, self.round, free);
        if to.is_empty() || people < self.limits.quorum() {
            return false;
        }
        to.truncate(self.target().max(self.limits.quorum()).saturating_sub(hoped_for));
        to.sort_unstable();
        for id in &to {
            self.members.entry(*id).or_default().assigned = true;
        }
        actions.push(Action::Start { round: self.round, to });
        true
    }

    fn begin(&mut self, now: Millis, actions: &mut Vec<Action>) {
        let connected: Vec<_> = self.members.iter().filter(|(_, m)| m.connected).map(|(id, _)| *id).collect();
        let at_start = if self.round == 0 { self.limits.min_participants } else { 0 };
        // Whoever is back first after a restart must not train and merge alone.
        let expected = self.members.values().any(|m| m.expected && self.in_grace(m, now));
        if connected.len() < self.limits.quorum().max(at_start) || expected {
            return;
        }
        self.round = self.round.saturating_add(1);
        self.phase = Phase::Training;
        self.closed = false;
        self.started_at = now;
        let (needed, asked) = select::sizes(&self.limits, connected.len());
        let mut to = select::drawn(self.limits.seed, self.round, connected.iter().copied());
        let mut wait = to.split_off(asked.min(to.len()));
        to.sort_unstable();
        wait.sort_unstable();
        self.needed = needed;
        for (id, member) in &mut self.members {
            member.assigned = to.binary_search(id).is_ok();
            member.updated = false;
            member.expected = false;
        }
        actions.push(Action::Start { round: self.round, to });
        if !wait.is_empty() {
            actions.push(Action::Wait { round: self.round, to: wait });
        }
    }
}
