//! The rounds of a federation as a pure state machine: `(state, time, event) -> (state, actions)`. No clock, no sockets, no
//! tensors; the owner task ([`super`]) gives it time and carries out what it says. `machine` has the rules, `select` the draw;
//! this file has the words that both sides speak.
//!
//! The rules, which hold in every sequence of events (tests/src/rounds.rs):
//! - An update counts at most once, and only for the round it was trained in. Every one is answered at once by
//!   [`Action::Accept`], [`Action::AcceptLate`] or [`Action::Refuse`]; one that was accepted is merged, even if its participant has left.
//! - Rounds are merged in order, each with at least [`Limits::quorum`] updates that came in time.
//! - Nobody waits for ever: a round ends when enough updates are in, when nobody is waited for, or at its deadline. Below the quorum
//!   others take the place of those who left or are overdue; where there are none, the round is extended while somebody trains, else paused.
//! - Whoever is connected in a round has been told to train or to wait; when all rounds are done, that they are.
//! - What [`Saved`] holds is enough to go on: the same round, the same participants, the same answers.

mod machine;
mod select;
#[cfg(test)]
mod tests;

pub use machine::Machine;

use fednano_shared::settings::FederationSettings;
use fednano_shared::wire::ParticipantId;

/// Milliseconds on the owner's monotonic clock; 0 is when the machine was made.
pub type Millis = u64;

/// What can happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A participant connected, for the first time or again.
    Connected(ParticipantId),
    /// Its connection is gone; it may come back.
    Lost(ParticipantId),
    /// It left for good: nobody waits for it. Should it come back all the same, it goes on in the round it was selected in.
    Left(ParticipantId),
    /// A sound update arrived.
    Updated {
        /// From whom.
        from: ParticipantId,
        /// The round it was trained in.
        round: u32,
    },
    /// The merged model (in round 0: the untouched one) has been evaluated, and is on disk.
    Evaluated,
    /// Time passed.
    Tick,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send the round's start to these. They may train already: then it is a repetition for one that came back.
    Start {
        /// Round.
        round: u32,
        /// To whom, in order.
        to: Vec<ParticipantId>,
    },
    /// Tell these that the round goes on without them.
    Wait {
        /// Round.
        round: u32,
        /// To whom, in order.
        to: Vec<ParticipantId>,
    },
    /// Keep this update, count it in the current round, and say so.
    Accept {
        /// From whom.
        from: ParticipantId,
        /// Round.
        round: u32,
    },
    /// Keep this update of a round that is closed, and say so; it is merged with the next merge.
    AcceptLate {
        /// From whom.
        from: ParticipantId,
        /// The round it was trained in.
        round: u32,
    },
    /// Do not count it, and say why.
    Refuse {
        /// From whom.
        from: ParticipantId,
        /// The round it was trained in.
        round: u32,
        /// Cause and remedy.
        why: Refusal,
    },
    /// Merge these updates, then evaluate.
    Merge {
        /// Round.
        round: u32,
        /// Whose updates, with the round each was trained in (an earlier one: it came late), in order.
        from: Vec<(ParticipantId, u32)>,
    },
    /// Nobody can finish the round now. Its accepted updates stay; it goes on when people are there.
    Pause {
        /// Round.
        round: u32,
    },
    /// All rounds are done: tell everybody.
    Finish,
    /// All rounds are done already: tell this one.
    TellFinished(ParticipantId),
}

/// Why an update is not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its round was closed before it came, too long ago for a late merge.
    Stale {
        /// The federation's round now.
        current: u32,
    },
    /// It is counted already.
    Counted,
    /// The participant was not selected in that round.
    NotSelected,
    /// The last round is closed.
    Finished,
    /// That round has not begun.
    NotTraining,
}

impl Refusal {
    /// What is wrong, in words for a person.
    pub fn cause(&self) -> String {
        match self {
            Self::Stale { current } => {
                format!("it came after its round was closed; the federation is in round {current} now")
            }
            Self::Counted => "this participant's update of that round is counted already".into(),
            Self::NotSelected => "this participant was not selected in that round".into(),
            Self::Finished => "the federation's last round is closed".into(),
            Self::NotTraining => "that round has not begun".into(),
        }
    }

    /// What to do.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Stale { .. } => {
                "nothing needs to be done: this participant goes on when the server calls it to a round"
            }
            Self::Counted => "nothing needs to be done: wait for the next round",
            Self::NotSelected => "nothing needs to be done: the server says when it is this participant's turn",
            Self::Finished => "nothing needs to be done: the server sends the final adapters",
            Self::NotTraining => "wait until the server starts that round; if this happens again, update the program",
        }
    }
}

/// Limits that the machine keeps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Rounds in all.
    pub rounds: u32,
    /// Participants connected before round 1 begins.
    pub min_participants: usize,
    /// Updates needed to merge, and people (their update is in, or they are connected) needed to begin a later round or to
    /// take somebody new into one.
    pub min_updates: usize,
    /// Share of the connected participants whose updates a round needs, above 0 to 1.
    pub fraction: f64,
    /// So much more of them are asked than needed.
    pub over_selection: f64,
    /// Rounds that an update may be late.
    pub max_staleness: u32,
    /// A round ends after this. Below the quorum it is extended while somebody trains.
    pub deadline: Millis,
    /// A lost participant is waited for this long; after a restart, every known one.
    pub grace: Millis,
    /// Of the draw.
    pub seed: u64,
}

impl Limits {
    /// Those of a federation.
    pub fn of(settings: &FederationSettings) -> Self {
        Self {
            rounds: settings.rounds,
            min_participants: settings.min_participants,
            min_updates: settings.min_updates,
            fraction: settings.fraction,
            over_selection: settings.over_selection,
            max_staleness: settings.max_staleness,
            deadline: settings.round_deadline_s.saturating_mul(1000),
            grace: settings.grace_s.saturating_mul(1000),
            seed: settings.seed,
        }
    }

    /// Updates without which nothing is merged: never less than one.
    pub fn quorum(&self) -> usize {
        self.min_updates.max(1)
    }

    /// Everybody is asked: no sampling.
    pub fn everybody(&self) -> bool {
        self.fraction >= 1.0
    }
}

/// A round that has begun and is not merged, as it is on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// Its number.
    pub round: u32,
    /// [`Machine::target`] when it began.
    pub target: usize,
    /// Everybody who was told to train in it.
    pub assigned: Vec<ParticipantId>,
    /// It was closed with fewer updates than that: so many of [`Saved::accepted`], the first, are merged with it.
    pub closed: Option<usize>,
}

/// What is on disk of the rounds: from this a machine goes on after a restart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Saved {
    /// Rounds merged, evaluated and saved.
    pub done: u32,
    /// The untouched model has been evaluated.
    pub evaluated_start: bool,
    /// The round under way.
    pub open: Option<Open>,
    /// Accepted and not merged yet, with the round each was trained in, in the order of acceptance.
    pub accepted: Vec<(ParticipantId, u32)>,
    /// Everybody who has ever joined, and whether they left.
    pub known: Vec<(ParticipantId, bool)>,
    /// Who was told to train in the last `max_staleness` merged rounds, and whether the update was ever accepted.
    pub past: Vec<(ParticipantId, u32, bool)>,
}
