//! What a federation's owner would know and have on disk, kept beside the machine by carrying out its actions, and the rules of
//! rounds as assertions on what the machine does next. It shares no code with the machine.

use anyhow::ensure;
use fednano_server::coordinator::round::{Action, Event, Limits, Machine, Millis, Open, Refusal, Saved};
use fednano_shared::wire::{ParticipantId, Phase};
use std::collections::{BTreeMap, BTreeSet};

/// Numbers of participants go from 1 to this.
pub const PEOPLE: u32 = 6;

/// Where the federation is, as far as its owner was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The untouched model is evaluated.
    Judging,
    /// Between rounds.
    Lobby,
    /// In a round, paused or not.
    Open,
    /// A merge was ordered and is not evaluated yet.
    Closed,
    /// All rounds are done.
    Finished,
}

/// The last thing that a connected participant was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Train(u32),
    Wait(u32),
    Finished,
}

enum Line {
    Step(Millis, Event, Vec<Action>, Phase, u32),
    Restart(Millis, String),
}

pub struct Model {
    pub limits: Limits,
    pub machine: Machine,
    pub now: Millis,
    pub stage: Stage,
    pub saved: Saved,
    pub connected: BTreeSet<ParticipantId>,
    /// Of the last merge that was ordered.
    pub merging: Vec<(ParticipantId, u32)>,
    /// How often what happened.
    pub seen: BTreeMap<&'static str, u64>,
    booted: Millis,
    since: Millis, // the deadline runs from here
    paused: bool,
    fresh: bool,                           // no step since the restart
    away: BTreeMap<ParticipantId, Millis>, // lost, or not back after a restart
    expected: BTreeSet<ParticipantId>,     // not back after a restart, no round begun since
    told: BTreeMap<ParticipantId, Told>,
    assigned: BTreeMap<u32, BTreeSet<ParticipantId>>, // by round, ever
    accepted: BTreeSet<(ParticipantId, u32)>,         // ever
    merged: BTreeMap<(ParticipantId, u32), u32>,      // ever; with the round of the merge
    in_time: BTreeSet<ParticipantId>,                 // counted in this round
    late: Vec<(ParticipantId, u32, u32)>,             // accepted late; with the round whose merge is due
    log: Vec<Line>,
}

impl Model {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            machine: Machine::new(limits, &Saved::default()),
            now: 0,
            stage: Stage::Judging,
            saved: Saved::default(),
            connected: BTreeSet::new(),
            merging: Vec::new(),
            seen: BTreeMap::new(),
            booted: 0,
            since: 0,
            paused: false,
            fresh: true,
            away: BTreeMap::new(),
            expected: BTreeSet::new(),
            told: BTreeMap::new(),
            assigned: BTreeMap::new(),
            accepted: BTreeSet::new(),
            merged: BTreeMap::new(),
            in_time: BTreeSet::new(),
            late: Vec::new(),
            log: Vec::new(),
        }
    }

    /// All that happened, for a person.
    pub fn story(&self) -> String {
        let mut story = format!("{:?}\n", self.limits);
        for line in &self.log {
            story += &match line {
                Line::Step(now, event, actions, phase, round) => {
                    format!("{now:>6} {event:?} -> {actions:?} ({phase:?}, round {round})\n")
                }
                Line::Restart(now, what) => format!("{now:>6} {what}\n"),
            };
        }
        story
    }

    fn saw(&mut self, what: &'static str) {
        *self.seen.entry(what).or_default() += 1;
    }

    /// The round under way, or the last one that was merged.
    pub fn round(&self) -> u32 {
        self.saved.done + u32::from(matches!(self.stage, Stage::Open | Stage::Closed))
    }

    /// Connected, told to train and not done.
    pub fn trainers(&self) -> Vec<ParticipantId> {
        let open = self.stage == Stage::Open;
        self.connected
            .iter()
            .copied()
            .filter(|id| open && self.is_assigned(*id) && !self.in_time.contains(id))
            .collect()
    }

    /// Updates of closed rounds that could still come.
    pub fn missing(&self) -> Vec<(ParticipantId, u32)> {
        let closed = self.assigned.iter().filter(|(round, _)| self.stage != Stage::Open || **round < self.round());
        let told = closed.flat_map(|(round, ids)| ids.iter().map(move |id| (*id, *round)));
        told.filter(|update| !self.accepted.contains(update)).collect()
    }

    /// A merge of the round was ordered with fewer updates than it was meant to have.
    fn was_closed(&self) -> bool {
        self.saved.open.as_ref().is_some_and(|o| o.closed.is_some())
    }

    fn quorum(&self) -> usize {
        self.limits.min_updates.max(1)
    }

    fn is_assigned(&self, id: ParticipantId) -> bool {
        self.assigned.get(&self.round()).is_some_and(|ids| ids.contains(&id))
    }

    /// Updates that complete the round.
    fn target(&self) -> usize {
        match &self.saved.open {
            Some(open) if self.limits.fraction >= 1.0 => open.assigned.len(),
            Some(open) => open.target,
            None => 0,
        }
    }

    fn in_grace(&self, id: ParticipantId) -> bool {
        self.away.get(&id).is_some_and(|since| self.now - since < self.limits.grace)
    }

    fn waited_for(&self) -> usize {
        let told = self.assigned.get(&self.round()).into_iter().flatten();
        let open = told.filter(|id| !self.in_time.contains(*id));
        open.filter(|id| self.connected.contains(*id) || self.in_grace(**id)).count()
    }

    fn overdue(&self) -> bool {
        !self.paused && self.now - self.since >= self.limits.deadline
    }

    /// Those who may be hoped to finish the round, or have.
    fn hoped_for(&self) -> usize {
        self.in_time.len() + if self.overdue() { 0 } else { self.waited_for() }
    }

    /// Updated or connected.
    fn people(&self) -> usize {
        self.in_time.union(&self.connected).count()
    }

    /// Updates needed and participants asked of so many, in whole numbers.
    fn sizes(&self, connected: usize) -> (usize, usize) {
        let thousandths = |x: f64| (x * 1000.0).round() as usize;
        let needed = (thousandths(self.limits.fraction) * connected).div_ceil(1000);
        let needed = needed.max(self.quorum()).min(connected);
        let asked = (needed * (1000 + thousandths(self.limits.over_selection))).div_ceil(1000);
        (needed, asked.min(connected))
    }

    /// The server is killed and started again.
    fn restart(&mut self, when: &str) -> anyhow::Result<Vec<Action>> {
        self.log.push(Line::Restart(self.now, format!("killed {when}; restart from {:?}", self.saved)));
        self.saw(match self.stage {
            Stage::Open => "restart in a round",
            Stage::Closed => "restart in an evaluation",
            _ => "restart elsewhere",
        });
        let saved = self.saved.clone();
        self.machine = Machine::new(self.limits, &saved);
        (self.booted, self.since, self.paused, self.fresh) = (self.now, self.now, false, true);
        self.connected.clear();
        self.told.clear();
        self.away = saved.known.iter().filter(|(_, left)| !left).map(|(id, _)| (*id, self.now)).collect();
        self.expected = self.away.keys().copied().collect();
        self.stage = match saved.open {
            Some(_) => Stage::Open,
            None if saved.done >= self.limits.rounds => Stage::Finished,
            None if !saved.evaluated_start => Stage::Judging,
            None => Stage::Lobby,
        };
        self.in_time.clear();
        self.late.clear();
        let closed = saved.open.as_ref().and_then(|o| o.closed);
        for (n, (id, round)) in saved.accepted.into_iter().enumerate() {
            let full = closed.map_or(self.in_time.len() >= self.target(), |first| n >= first);
            let full = self.stage == Stage::Open && full;
            if self.stage == Stage::Open && !full && round == self.round() {
                self.in_time.insert(id);
            } else {
                self.late.push((id, round, self.saved.done + 1 + u32::from(full)));
            }
        }
        self.stands()?;
        Ok(Vec::new())
    }

    /// Let this happen and check what follows. `kill`: the server dies before the step (0) or before its `kill`-th action.
    pub fn step(&mut self, event: Event, kill: Option<usize>) -> anyhow::Result<Vec<Action>> {
        let evaluated = event == Event::Evaluated && matches!(self.stage, Stage::Judging | Stage::Closed);
        self.save_first(event, evaluated)?;
        if kill == Some(0) {
            return self.restart(&format!("before {event:?}"));
        }
        let actions = self.machine.step(self.now - self.booted, event);
        let (phase, round) = (self.machine.phase(), self.machine.round());
        self.log.push(Line::Step(self.now, event, actions.clone(), phase, round));
        let mut done = 0;
        if std::mem::take(&mut self.fresh) {
            // What follows from the saved state alone comes before the event.
            let now = std::mem::replace(&mut self.now, self.booted);
            if let Some(owed) = self.owed() {
                let first = actions.first();
                let fits = matches!(
                    (owed, first),
                    ("merge", Some(Action::Merge { .. })) | ("pause", Some(Action::Pause { .. }))
                );
                ensure!(fits, "after the restart the machine owes a {owed} and says {first:?}");
                if kill != Some(1) {
                    first.map_or(Ok(()), |action| self.carry_out(Event::Tick, action))?;
                    done = 1;
                }
            }
            self.now = now;
        }
        self.happen(event);
        self.check_answer(event, &actions, kill)?;
        for (n, action) in actions.iter().enumerate().skip(done) {
            if kill == Some(n + 1) {
                return self.restart(&format!("before {action:?}"));
            }
            self.carry_out(event, action)?;
        }
        if kill.is_some() {
            return self.restart("after all of it");
        }
        self.stands()?;
        self.check_rest()?;
        Ok(actions)
    }

    /// What the owner writes before the machine hears of the event.
    fn save_first(&mut self, event: Event, evaluated: bool) -> anyhow::Result<()> {
        match event {
            Event::Connected(id) => {
                self.saved.known.retain(|(known, _)| *known != id);
                self.saved.known.push((id, false));
            }
            Event::Left(id) => {
                for (_, left) in self.saved.known.iter_mut().filter(|(known, _)| *known == id) {
                    *left = true;
                }
            }
            Event::Evaluated if evaluated => {
                if self.stage == Stage::Closed {
                    self.save_merge()?;
                }
                self.saved.evaluated_start = true;
                self.stage = if self.saved.done >= self.limits.rounds { Stage::Finished } else { Stage::Lobby };
            }
            _ => {}
        }
        Ok(())
    }

    /// RULE: an update is merged at most once, within `max_staleness` rounds, and none that was not accepted.
    fn save_merge(&mut self) -> anyhow::Result<()> {
        let round = self.round();
        for update in std::mem::take(&mut self.merging) {
            ensure!(self.accepted.contains(&update), "{update:?} was merged and never accepted");
            let before = self.merged.insert(update, round);
            ensure!(before.is_none(), "{update:?} was merged in round {before:?} and in round {round}");
            let late = round.checked_sub(update.1);
            ensure!(late.is_some_and(|l| l <= self.limits.max_staleness), "{update:?} was merged in round {round}");
            self.saved.accepted.retain(|kept| *kept != update);
        }
        self.saved.done = round;
        self.saved.open = None;
        let kept = self.assigned.iter().filter(|(r, _)| **r + self.limits.max_staleness > round);
        let past = kept.flat_map(|(r, ids)| ids.iter().map(move |id| (*id, *r)));
        self.saved.past = past.map(|(id, r)| (id, r, self.accepted.contains(&(id, r)))).collect();
        Ok(())
    }

    /// What a restored round needs at once.
    fn owed(&self) -> Option<&'static str> {
        let updates = self.in_time.len();
        match (self.stage, self.waited_for()) {
            (Stage::Open, _) if updates >= self.target() || self.was_closed() => Some("merge"),
            (Stage::Open, 0) if updates >= self.quorum() => Some("merge"),
            (Stage::Open, 0) => Some("pause"),
            _ => None,
        }
    }

    /// The event as the world sees it.
    fn happen(&mut self, event: Event) {
        match event {
            Event::Connected(id) => {
                self.connected.insert(id);
                self.away.remove(&id);
                self.expected.remove(&id);
                self.told.remove(&id);
            }
            Event::Lost(id) => {
                let was_there = self.connected.remove(&id);
                if was_there {
                    self.away.insert(id, self.now);
                }
            }
            Event::Left(id) => {
                self.connected.remove(&id);
                self.away.remove(&id);
                self.expected.remove(&id);
            }
            _ => {}
        }
    }

    /// RULE: every update is answered by exactly one of accept, accept late and refuse, and by the right one.
    fn check_answer(&self, event: Event, actions: &[Action], kill: Option<usize>) -> anyhow::Result<()> {
        let is_answer =
            |a: &&Action| matches!(a, Action::Accept { .. } | Action::AcceptLate { .. } | Action::Refuse { .. });
        let answers: Vec<&Action> = actions.iter().filter(is_answer).collect();
        let Event::Updated { from, round } = event else {
            ensure!(answers.is_empty(), "an answer without an update: {answers:?}");
            return Ok(());
        };
        ensure!(answers.len() == 1, "an update was answered by {answers:?}");
        // Where the first of the actions was not carried out, the rules of what follows it cannot be told from here.
        let right = self.answer(from, round);
        ensure!(kill == Some(1) || answers == [&right], "the answer was {answers:?}, right is {right:?}");
        Ok(())
    }

    /// The right answer.
    fn answer(&self, from: ParticipantId, round: u32) -> Action {
        let refuse = |why| Action::Refuse { from, round, why };
        let (current, done, staleness) = (self.round(), self.saved.done, self.limits.max_staleness);
        // What was accepted is remembered while it could be merged late.
        let counted = self.accepted.contains(&(from, round)) && (round > done || round + staleness > done);
        let selected = self.assigned.get(&round).is_some_and(|ids| ids.contains(&from));
        let due = done + 1 + u32::from(self.stage == Stage::Closed);
        if self.stage == Stage::Finished {
            refuse(if counted { Refusal::Counted } else { Refusal::Finished })
        } else if round == 0 || round > current {
            refuse(Refusal::NotTraining)
        } else if counted {
            refuse(Refusal::Counted)
        } else if due - round > staleness {
            refuse(Refusal::Stale { current })
        } else if !selected {
            refuse(Refusal::NotSelected)
        } else if due > self.limits.rounds {
            refuse(Refusal::Finished)
        } else if due == round {
            Action::Accept { from, round }
        } else {
            Action::AcceptLate { from, round }
        }
    }

    /// Do as the owner does, and check that it may.
    fn carry_out(&mut self, event: Event, action: &Action) -> anyhow::Result<()> {
        match action {
            Action::Start { round, to } => self.start(event, *round, to)?,
            Action::Wait { round, to } => {
                ensure!(self.stage == Stage::Open && *round == self.round(), "told to wait in no round");
                for id in to {
                    ensure!(self.connected.contains(id) && !self.is_assigned(*id), "{id:?} need not be told to wait");
                    self.told.insert(*id, Told::Wait(*round));
                }
                self.saw("wait");
            }
            Action::Accept { from, round } | Action::AcceptLate { from, round } => {
                // RULE: an update counts at most once.
                ensure!(self.accepted.insert((*from, *round)), "an update counts twice");
                self.saved.accepted.push((*from, *round));
                if matches!(action, Action::Accept { .. }) {
                    self.in_time.insert(*from);
                    self.saw("accept");
                } else {
                    let due = self.saved.done + 1 + u32::from(self.stage == Stage::Closed);
                    self.late.push((*from, *round, due));
                    self.saw("accept late");
                }
            }
            Action::Refuse { why, .. } => {
                // RULE: every refusal carries a cause and what to do.
                ensure!(!why.cause().is_empty() && !why.remedy().is_empty(), "a refusal without words");
                self.saw(match why {
                    Refusal::Stale { .. } => "refuse: stale",
                    Refusal::Counted => "refuse: counted",
                    Refusal::NotSelected => "refuse: not selected",
                    Refusal::Finished => "refuse: finished",
                    Refusal::NotTraining => "refuse: not training",
                });
            }
            Action::Merge { round, from } => self.merge(*round, from)?,
            Action::Pause { round } => {
                ensure!(self.stage == Stage::Open && *round == self.round() && !self.paused, "paused out of turn");
                self.paused = true;
                self.saw("pause");
            }
            Action::Finish => {
                ensure!(self.stage == Stage::Finished, "finished too early");
                // RULE: what was accepted is merged, whoever has left since.
                let lost: Vec<_> = self.accepted.iter().filter(|u| !self.merged.contains_key(u)).collect();
                ensure!(lost.is_empty(), "accepted and never merged: {lost:?}");
                for id in &self.connected {
                    self.told.insert(*id, Told::Finished);
                }
            }
            Action::TellFinished(id) => {
                ensure!(self.stage == Stage::Finished, "told the end too early");
                self.told.insert(*id, Told::Finished);
            }
        }
        Ok(())
    }

    fn start(&mut self, event: Event, round: u32, to: &[ParticipantId]) -> anyhow::Result<()> {
        ensure!(!to.is_empty() && to.is_sorted_by(|a, b| a < b), "{to:?} are not in order");
        ensure!(to.iter().all(|id| self.connected.contains(id)), "a round starts for somebody who is away");
        ensure!(round == self.saved.done + 1, "RULE: rounds are in order: {round} follows {}", self.saved.done);
        match self.stage {
            Stage::Lobby => {
                let n = self.connected.len();
                let least = if round == 1 { self.limits.min_participants } else { 0 };
                ensure!(n >= self.quorum().max(least), "RULE: a round begins with {n}, too few");
                ensure!(
                    !self.expected.iter().any(|id| self.in_grace(*id)),
                    "a round begins without one who may be back"
                );
                let (needed, asked) = self.sizes(n);
                ensure!(to.len() == asked, "RULE: {} of {n} asked instead of {asked}", to.len());
                ensure!(self.machine.target() == needed, "RULE: {} needed instead of {needed}", self.machine.target());
                self.saved.open = Some(Open { round, target: needed, assigned: Vec::new(), closed: None });
                (self.stage, self.since, self.paused) = (Stage::Open, self.now, false);
                self.in_time.clear();
                self.expected.clear();
                self.saw(if asked > needed { "begin, over-selected" } else { "begin" });
            }
            Stage::Open => {
                ensure!(!to.iter().any(|id| self.in_time.contains(id)), "RULE: whose update is in is not asked again");
                let came = |id: &ParticipantId| event == Event::Connected(*id);
                let new: Vec<_> = to.iter().filter(|id| !self.is_assigned(**id)).collect();
                if new.is_empty() {
                    ensure!(to.iter().all(came), "the start is repeated for no reason");
                    self.saw("back in its round");
                } else if !self.paused && self.limits.fraction >= 1.0 && self.in_time.is_empty() && to.iter().all(came)
                {
                    self.saw("newcomer");
                } else {
                    let (hoped_for, quorum) = (self.hoped_for(), self.quorum());
                    ensure!(new.len() == to.len(), "new ones and others together");
                    ensure!(hoped_for < quorum, "RULE: others were asked though {hoped_for} may finish");
                    ensure!(self.people() >= quorum, "RULE: too few people to go on with");
                    let wanted = self.target().max(quorum) - hoped_for;
                    ensure!(to.len() <= wanted, "{} take the place of {wanted}", to.len());
                    self.since = self.now;
                    self.saw("others asked");
                }
            }
            _ => anyhow::bail!("a start outside of a round"),
        }
        self.assigned.entry(round).or_default().extend(to);
        if let Some(open) = &mut self.saved.open {
            let new: Vec<_> = to.iter().filter(|id| !open.assigned.contains(id)).copied().collect();
            open.assigned.extend(new);
        }
        self.told.extend(to.iter().map(|id| (*id, Told::Train(round))));
        Ok(())
    }

    /// RULES: rounds are merged in order, not before their time, and with exactly what was accepted for them.
    fn merge(&mut self, round: u32, from: &[(ParticipantId, u32)]) -> anyhow::Result<()> {
        ensure!(self.stage == Stage::Open && round == self.round(), "round {round} is merged out of order");
        let updates = self.in_time.len();
        let ended = updates >= self.target() || self.overdue() || self.waited_for() == 0 || self.was_closed();
        ensure!(ended, "round {round} is merged while somebody is waited for");
        ensure!(updates >= self.quorum(), "round {round} is merged from {updates}");
        let in_time = self.in_time.iter().map(|id| (*id, round));
        let late = self.late.iter().filter(|l| l.2 <= round).map(|l| (l.0, l.1));
        let mut accepted: Vec<_> = in_time.chain(late).collect();
        accepted.sort_unstable();
        ensure!(from == accepted, "merged {from:?}, accepted {accepted:?}");
        self.late.retain(|l| l.2 > round);
        self.merging = accepted;
        self.stage = Stage::Closed;
        let short = self.in_time.len() < self.target();
        if let Some(open) = self.saved.open.as_mut().filter(|_| short) {
            open.closed = Some(self.merging.len());
        }
        self.saw(if short { "merge, short" } else { "merge" });
        Ok(())
    }

    /// The machine says the same of itself.
    fn stands(&self) -> anyhow::Result<()> {
        let (phase, round) = (self.machine.phase(), self.machine.round());
        let fits = match phase {
            Phase::Lobby => self.stage == Stage::Lobby,
            Phase::Training | Phase::Paused => self.stage == Stage::Open,
            Phase::Evaluating => matches!(self.stage, Stage::Judging | Stage::Closed),
            Phase::Finished => self.stage == Stage::Finished,
        };
        ensure!(
            fits && round == self.round(),
            "{phase:?} in round {round}, should be {:?} in {}",
            self.stage,
            self.round()
        );
        for id in (1..=PEOPLE).map(ParticipantId) {
            ensure!(self.machine.connected(id) == self.connected.contains(&id), "connected({id:?})");
            if self.stage == Stage::Open {
                ensure!(self.machine.updated(id) == self.in_time.contains(&id), "updated({id:?})");
                ensure!(self.machine.selected(id) == self.is_assigned(id), "selected({id:?})");
            }
        }
        Ok(())
    }

    /// RULES: nobody waits for ever or without being told.
    fn check_rest(&mut self) -> anyhow::Result<()> {
        let (round, n, quorum) = (self.round(), self.connected.len(), self.quorum());
        match self.stage {
            Stage::Lobby => {
                let few = n < quorum || round == 0 && n < self.limits.min_participants;
                ensure!(few || self.expected.iter().any(|id| self.in_grace(*id)), "RULE: no round begins, with {n}");
            }
            Stage::Open => {
                let (updates, waited_for) = (self.in_time.len(), self.waited_for());
                let training = self.machine.phase() == Phase::Training;
                ensure!(training == (waited_for > 0), "{waited_for} are waited for, training is {training}");
                if self.paused && training {
                    (self.paused, self.since) = (false, self.now);
                }
                ensure!(self.paused != training, "paused and not told so");
                ensure!(updates < self.target(), "RULE: all updates needed are in, and no merge");
                ensure!(updates < quorum || training && !self.overdue(), "RULE: the round could be merged and is not");
                let others = self.connected.iter().any(|id| !self.is_assigned(*id));
                let stuck = self.hoped_for() < quorum && others && self.people() >= quorum;
                ensure!(!stuck, "RULE: others could take the place of those who will not finish");
                for id in &self.connected {
                    let told = self.told.get(id);
                    let right = match (self.is_assigned(*id), self.in_time.contains(id)) {
                        (true, true) => true,
                        (true, false) => told == Some(&Told::Train(round)),
                        (false, _) => told == Some(&Told::Wait(round)),
                    };
                    ensure!(right, "RULE: {id:?} does not know what to do; it was told {told:?}");
                }
            }
            Stage::Finished => {
                let told = self.connected.iter().all(|id| self.told.get(id) == Some(&Told::Finished));
                ensure!(told, "RULE: somebody was not told the end");
            }
            Stage::Judging | Stage::Closed => {}
        }
        Ok(())
    }
}
