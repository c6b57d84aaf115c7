//! Bytes of a federation, round by round: of each participant, and of the connections that only ask. Sessions hand over what they
//! have counted; downloads of the edge bundle are counted by whoever serves it.

use super::{Coordinator, Participant};
use crate::store::Metrics;
use fednano_shared::ledger::{AFTER, Bytes, Kind, Traffic};
use fednano_shared::wire::ParticipantId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Connections that only ask, as one participant; the numbers of those who train begin at 1.
pub(super) const ASKERS: ParticipantId = ParticipantId(0);

/// Whoever reads a ledger or figures from outside is told of so many of the newest rounds: of figures, each makes series that the reader
/// keeps.
const NEWEST: usize = 100;

/// Bytes that were sent under the id of a download since it was asked for last; none: the id is not known (any more).
pub type Claim = Arc<dyn Fn(&str) -> Option<u64> + Send + Sync>;

/// Everything that was counted.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ledger {
    /// Name of the federation.
    pub federation: String,
    /// All of it together.
    pub total: Traffic,
    /// The same by round: 0 is what came before the first, each connection's handshake, and questions; [`AFTER`] what came after the
    /// last.
    pub rounds: BTreeMap<u32, Traffic>,
    /// Participant by participant.
    pub participants: Vec<ParticipantLedger>,
    /// Connections that only ask, together, by the round that they name: 0, unless a program names another.
    pub questions: BTreeMap<u32, Traffic>,
}

/// A participant's part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParticipantLedger {
    /// Its number.
    pub id: ParticipantId,
    /// Its name.
    pub name: String,
    /// All of its bytes.
    pub total: Traffic,
    /// The same by round; empty where only sums were asked for.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rounds: BTreeMap<u32, Traffic>,
}

/// What was counted of everybody together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sums {
    /// All of it.
    pub total: Traffic,
    /// The newest rounds.
    pub rounds: BTreeMap<u32, Traffic>,
}

/// How much of a ledger is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Detail {
    /// Everything.
    All,
    /// The newest rounds, of each participant too.
    Rounds,
    /// The newest rounds of everybody together, sums of each participant.
    Sums,
}

/// The newest of these, at most so many.
fn newest(rounds: &BTreeMap<u32, Traffic>, most: usize) -> BTreeMap<u32, Traffic> {
    rounds.iter().rev().take(most).map(|(round, traffic)| (*round, *traffic)).collect()
}

/// Bytes of one participant.
#[derive(Debug, Default)]
pub(super) struct Account {
    rounds: BTreeMap<u32, Traffic>,
    total: Traffic,
    unsaved: BTreeSet<u32>,
}

impl Account {
    /// As it was kept on disk.
    pub(super) fn kept(rounds: BTreeMap<u32, Traffic>) -> Self {
        Self { total: Traffic::sum(rounds.values()), rounds, unsaved: BTreeSet::new() }
    }

    /// All bytes.
    pub(super) const fn total(&self) -> Traffic {
        self.total
    }

    /// More bytes. Nobody has trained in a round after the `current` one, whatever a frame names.
    pub(super) fn add(&mut self, more: &BTreeMap<u32, Traffic>, current: u32) {
        for (round, traffic) in more.iter().filter(|(_, traffic)| **traffic != Traffic::default()) {
            let round = if *round > current { AFTER } else { *round };
            self.rounds.entry(round).or_default().add(traffic);
            self.total.add(traffic);
            self.unsaved.insert(round);
        }
    }

    /// More bytes of the edge bundle, which belongs to the time before the first round.
    pub(super) fn download(&mut self, bytes: u64) {
        let mut more = Traffic::default();
        more.down.count(Kind::EdgeBundle, bytes);
        self.add(&BTreeMap::from([(0, more)]), 0);
    }

    /// Bytes of the edge bundle by a client's own count. A program that comes back may announce the same download again.
    pub(super) fn announced(&mut self, bytes: u64) {
        self.download(bytes.saturating_sub(self.total.down.edge_bundle));
    }

    /// The rounds that have changed since [`Self::saved`].
    pub(super) fn unsaved(&self) -> BTreeMap<u32, Traffic> {
        self.unsaved.iter().filter_map(|round| Some((*round, *self.rounds.get(round)?))).collect()
    }

    /// They are on disk.
    pub(super) fn saved(&mut self) {
        self.unsaved.clear();
    }
}

/// Is there nothing but control in these?
pub(super) fn only_control(rounds: &BTreeMap<u32, Traffic>) -> bool {
    let others = |bytes: &Bytes| bytes.total() > bytes.get(Kind::Control);
    !rounds.values().any(|traffic| others(&traffic.up) || others(&traffic.down))
}

impl Coordinator {
    /// Add what a session has counted.
    pub(super) fn count(&mut self, of: Option<ParticipantId>, more: &BTreeMap<u32, Traffic>) {
        let current = self.machine.round();
        let account = match of {
            Some(id) => self.participants.get_mut(&id).map(|p| &mut p.account),
            None => Some(&mut self.questions),
        };
        if let Some(account) = account {
            account.add(more, current);
        }
    }

    /// What was counted so far.
    pub(super) fn ledger(&self, detail: Detail) -> Ledger {
        let most = if detail == Detail::All { usize::MAX } else { NEWEST };
        let of_each = if detail == Detail::Sums { 0 } else { most };
        let of = |(id, p): (&ParticipantId, &Participant)| ParticipantLedger {
            id: *id,
            name: p.saved.name.clone(),
            total: p.account.total,
            rounds: newest(&p.account.rounds, of_each),
        };
        let Sums { total, rounds } = self.sums_of(most);
        Ledger {
            federation: self.name.clone(),
            total,
            rounds,
            participants: self.participants.iter().map(of).collect(),
            questions: newest(&self.questions.rounds, most),
        }
    }

    /// The same of everybody together.
    pub(super) fn sums(&self) -> Sums {
        self.sums_of(NEWEST)
    }

    fn sums_of(&self, most: usize) -> Sums {
        let accounts = || self.participants.values().map(|p| &p.account).chain([&self.questions]);
        let mut rounds: BTreeMap<u32, Traffic> = BTreeMap::new();
        // Of the newest rounds of all, an account's are among its own newest.
        for (round, traffic) in accounts().flat_map(|account| account.rounds.iter().rev().take(most)) {
            rounds.entry(*round).or_default().add(traffic);
        }
        let total = Traffic::sum(accounts().map(|account| &account.total));
        Sums { total, rounds: newest(&rounds, most) }
    }

    /// Put on disk what the participants' table shows of everybody; what comes in between is lost with a kill.
    ///
    /// # Errors
    /// A write that failed.
    pub(super) fn keep_metrics(&mut self) -> anyhow::Result<()> {
        let of =
            |(id, p): (&ParticipantId, &Participant)| (*id, Metrics { traffic: p.account.unsaved(), local: p.local });
        let mut metrics: Vec<(ParticipantId, Metrics)> = self.participants.iter().map(of).collect();
        metrics.push((ASKERS, Metrics { traffic: self.questions.unsaved(), local: None }));
        self.store.metrics(&metrics)?;
        self.participants.values_mut().for_each(|p| p.account.saved());
        self.questions.saved();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(up: u64, down: u64) -> Traffic {
        let mut traffic = Traffic::default();
        traffic.up.codes = up;
        traffic.down.gradients = down;
        traffic
    }

    #[test]
    fn increments_add_up_by_round_and_in_all() {
        let mut account = Account::kept([(0, codes(1, 0)), (1, codes(2, 3))].into());
        assert_eq!((account.total(), account.unsaved().len()), (codes(3, 3), 0));
        account.add(&[(1, codes(10, 20)), (2, codes(5, 0)), (0, Traffic::default())].into(), 2);
        assert_eq!(account.total(), codes(18, 23));
        assert_eq!(account.unsaved(), [(1, codes(12, 23)), (2, codes(5, 0))].into());
        account.saved();
        assert!(account.unsaved().is_empty());
        // After the end, and rounds that there have not been.
        account.add(&[(3, codes(1, 0)), (4000, codes(1, 0)), (AFTER, codes(1, 1))].into(), 2);
        assert_eq!(account.unsaved(), [(AFTER, codes(3, 1))].into());
        assert_eq!(account.total(), codes(21, 24));
    }

    #[test]
    fn of_many_rounds_the_newest_are_told() {
        let rounds: BTreeMap<u32, Traffic> = (0..300).chain([AFTER]).map(|round| (round, codes(1, 2))).collect();
        let told = newest(&rounds, NEWEST);
        assert_eq!((told.len(), told.keys().next(), told.keys().last()), (100, Some(&201), Some(&AFTER)));
        assert_eq!(newest(&rounds, usize::MAX), rounds);
        assert!(newest(&rounds, 0).is_empty());
        // A participant's sums alone are a line without rounds, and are read as such.
        let sums = ParticipantLedger {
            id: ParticipantId(1),
            name: "a".into(),
            total: codes(1, 2),
            rounds: newest(&rounds, 0),
        };
        let json = serde_json::to_string(&sums).unwrap();
        assert!(!json.contains("rounds"), "{json}");
        assert_eq!(serde_json::from_str::<ParticipantLedger>(&json).unwrap(), sums);
    }

    #[test]
    fn control_alone_is_told_apart() {
        let control = |bytes: u64| {
            let mut traffic = Traffic::default();
            (traffic.up.control, traffic.down.control) = (bytes, bytes);
            traffic
        };
        assert!(only_control(&BTreeMap::new()) && only_control(&[(0, control(7)), (3, control(0))].into()));
        assert!(!only_control(&[(0, control(7)), (3, codes(0, 1))].into()));
        assert!(!only_control(&[(1, codes(1, 0))].into()));
    }

    #[test]
    fn downloads_count_once() {
        let mut account = Account::default();
        account.announced(1000);
        account.announced(1000); // came back
        account.announced(0);
        assert_eq!(account.total().down.edge_bundle, 1000);
        account.download(50);
        account.announced(900);
        assert_eq!(account.rounds, [(0, account.total())].into());
        assert_eq!(account.total().total(), 1050);
    }
}
