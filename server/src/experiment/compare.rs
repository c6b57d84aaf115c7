//! What the tables and the reading compare: differences between runs that share everything else, and between merges of the same
//! updates.

use super::figures::Contribution;
use super::grid::Group;
use super::records::Record;
use super::statistics::{Spread, correlation};
use super::study::Filled;
use std::collections::BTreeMap;

/// Percent of a share.
pub(super) const POINTS: f64 = 100.0;

/// The cells of a row, by column, in the order of the grid.
pub(super) fn row<'a>(filled: &'a [Filled<'a>], group: Group, row: &'a str) -> impl Iterator<Item = &'a Filled<'a>> {
    filled.iter().filter(move |f| f.cell.group == group && f.cell.row == row)
}

/// Names in the order in which they come first.
pub(super) fn names<'a>(of: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut names = Vec::new();
    for name in of {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// Rows of a group.
pub(super) fn rows<'a>(filled: &'a [Filled<'_>], group: Group) -> Vec<&'a str> {
    names(filled.iter().filter(|f| f.cell.group == group).map(|f| f.cell.row.as_str()))
}

/// Columns of a group.
pub(super) fn columns<'a>(filled: &'a [Filled<'_>], group: Group) -> Vec<&'a str> {
    names(filled.iter().filter(|f| f.cell.group == group).map(|f| f.cell.column.as_str()))
}

/// The accuracy that a client would have at the end of a run, percent.
pub(super) fn accuracy(record: &Record) -> Option<f64> {
    Some(record.figures.used().together.accuracy * POINTS)
}

/// The same on the clients' own test samples.
pub(super) fn local(record: &Record) -> Option<f64> {
    record.figures.local().map(|share| share * POINTS)
}

/// One row less another, pair by pair: same column, same seed. In the columns named, or in all.
pub(super) fn paired(
    filled: &[Filled<'_>],
    group: Group,
    (name, against): (&str, &str),
    column: Option<&str>,
    value: fn(&Record) -> Option<f64>,
) -> Vec<f64> {
    let mut differences = Vec::new();
    for one in row(filled, group, name).filter(|f| column.is_none_or(|c| f.cell.column == c)) {
        let other = row(filled, group, against).find(|f| f.cell.column == one.cell.column);
        for record in &one.records {
            let twin = other.and_then(|f| f.records.iter().find(|r| r.seed == record.seed));
            if let (Some(a), Some(b)) = (value(record), twin.and_then(|twin| value(twin))) {
                differences.push(a - b);
            }
        }
    }
    differences
}

/// What a rule of group H makes of the same updates, compared with FedAvg.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct OnSameUpdates {
    /// For each run, the mean difference over its rounds, in points.
    pub(super) runs: Vec<f64>,
    /// Rounds in which it is better, worse and equal.
    pub(super) above: usize,
    pub(super) below: usize,
    pub(super) equal: usize,
}

/// The rule that others are compared with.
pub(super) const FEDAVG: &str = "fedavg";

/// Over the runs of a row of group H; in the column named, or in all.
pub(super) fn on_same_updates(filled: &[Filled<'_>], name: &str, rule: &str, column: Option<&str>) -> OnSameUpdates {
    let mut found = OnSameUpdates::default();
    for cell in row(filled, Group::H, name).filter(|f| column.is_none_or(|c| f.cell.column == c)) {
        for record in &cell.records {
            let of = |rules: &BTreeMap<String, (f64, f64)>| {
                let (own, plain) = (rules.get(rule)?, rules.get(FEDAVG)?);
                Some((own.0 - plain.0) * POINTS)
            };
            let rounds: Vec<f64> = record.figures.merges.iter().filter_map(|round| of(&round.rules)).collect();
            // Shares of some hundred samples, kept with six digits: what is less than a thousandth of a point is none.
            found.above += rounds.iter().filter(|d| **d > 1e-3).count();
            found.below += rounds.iter().filter(|d| **d < -1e-3).count();
            found.equal += rounds.iter().filter(|d| d.abs() <= 1e-3).count();
            found.runs.extend(Spread::of(&rounds).map(|s| s.mean));
        }
    }
    found
}

/// What decides the weights of a Fisher merge in a round, over all runs of a row of group H.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Weights {
    pub(super) round: u32,
    /// Updates looked at.
    pub(super) updates: usize,
    /// Share of the `down` tensors in an update's Fisher mass.
    pub(super) down_mass: f64,
    /// The largest client's share in a merge by samples alone, in the `down` and in the `up` tensors; mean over runs.
    pub(super) largest: (f64, f64, f64),
    /// Correlation of a client's weight beyond its samples (logarithm) with its training loss (less the round's mean), in the
    /// `down` and in the `up` tensors.
    pub(super) with_loss: (Option<f64>, Option<f64>),
    /// The same with its number of samples (logarithm).
    pub(super) with_samples: (Option<f64>, Option<f64>),
}

/// Round by round.
pub(super) fn weights(filled: &[Filled<'_>], name: &str) -> Vec<Weights> {
    let mut rounds: BTreeMap<u32, Vec<&[Contribution]>> = BTreeMap::new();
    for record in row(filled, Group::H, name).flat_map(|f| &f.records) {
        for merged in record.figures.merges.iter().filter(|m| !m.clients.is_empty()) {
            rounds.entry(merged.round).or_default().push(&merged.clients);
        }
    }
    rounds.into_iter().filter_map(|(round, runs)| of_round(round, &runs)).collect()
}

fn of_round(round: u32, runs: &[&[Contribution]]) -> Option<Weights> {
    let mut mass = Vec::new();
    let mut largest = [Vec::new(), Vec::new(), Vec::new()];
    let mut pairs: [Vec<(f64, f64)>; 4] = Default::default();
    for clients in runs {
        let samples: f64 = clients.iter().map(|c| f64::from(c.samples)).sum();
        let loss = clients.iter().map(|c| c.loss).sum::<f64>() / clients.len().max(1) as f64;
        let most = |share: &dyn Fn(&Contribution) -> f64| clients.iter().map(share).fold(0.0, f64::max);
        let by_samples = |c: &Contribution| f64::from(c.samples) / samples.max(1.0);
        let [plain, down, up] = &mut largest;
        plain.push(most(&by_samples));
        down.push(most(&|c| c.share_down));
        up.push(most(&|c| c.share_up));
        for c in *clients {
            mass.extend(Some(c.down / (c.down + c.up)).filter(|share| share.is_finite()));
            let [loss_down, loss_up, samples_down, samples_up] = &mut pairs;
            for (share, with_loss, with_samples) in
                [(c.share_down, loss_down, samples_down), (c.share_up, loss_up, samples_up)]
            {
                let beyond = (share / by_samples(c)).ln();
                if beyond.is_finite() {
                    with_loss.push((beyond, c.loss - loss));
                    with_samples.push((beyond, f64::from(c.samples).ln()));
                }
            }
        }
    }
    let mean = |values: &[f64]| Spread::of(values).map_or(0.0, |s| s.mean);
    let [plain, down, up] = &largest;
    let [loss_down, loss_up, samples_down, samples_up] = &pairs;
    Some(Weights {
        round,
        updates: runs.iter().map(|clients| clients.len()).sum(),
        down_mass: Spread::of(&mass)?.mean,
        largest: (mean(plain), mean(down), mean(up)),
        with_loss: (correlation(loss_down), correlation(loss_up)),
        with_samples: (correlation(samples_down), correlation(samples_up)),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::figures::{Figures, MergedRound, Tested};
    use super::super::grid::{Cell, Size, cells};
    use super::super::records;
    use super::*;
    use fednano_shared::step::Evaluation;

    /// A run with this accuracy at its end.
    pub(crate) fn record(seed: u64, accuracy: f64, merges: Vec<MergedRound>) -> Record {
        let together = Evaluation { accuracy, loss: 1.0, samples: 100 };
        let tested = Tested { together, tasks: BTreeMap::new() };
        let mut record = records::tests::record("", "", seed);
        let baselines = (0.1, 0.2);
        record.figures = Figures { baselines, zero_shot: tested.clone(), global: tested, merges, ..record.figures };
        record
    }

    /// A cell of the quick grid.
    pub(crate) fn cell(group: Group, row: &str, column: &str) -> Cell {
        let found = cells(Size::Quick).into_iter().find(|c| c.group == group && c.row == row && c.column == column);
        found.unwrap_or_else(|| panic!("{group} {row} {column}"))
    }

    #[test]
    fn pairs_are_of_one_column_and_seed() {
        let (a, b) = (cell(Group::A, "fisher", "1"), cell(Group::A, "fedavg", "1"));
        let mine = [record(1, 0.5, vec![]), record(2, 0.75, vec![]), record(3, 0.9, vec![])];
        let theirs = [record(2, 0.5, vec![]), record(1, 0.25, vec![])];
        let filled = [
            Filled { cell: &a, records: mine.iter().collect() },
            Filled { cell: &b, records: theirs.iter().collect() },
        ];
        let pair = ("fisher", "fedavg");
        assert_eq!(paired(&filled, Group::A, pair, None, accuracy), [25.0, 25.0]);
        assert_eq!(paired(&filled, Group::A, pair, Some("1"), accuracy), [25.0, 25.0]);
        assert!(paired(&filled, Group::A, pair, Some("0.1"), accuracy).is_empty());
        assert!(paired(&filled, Group::A, ("local", "fedavg"), None, accuracy).is_empty());
        assert_eq!((rows(&filled, Group::A), columns(&filled, Group::A)), (vec!["fisher", "fedavg"], vec!["1"]));
    }

    #[test]
    fn rules_are_compared_round_by_round_and_run_by_run() {
        let h = cell(Group::H, "fisher, path fedavg", "1");
        let round = |round, fisher: f64| MergedRound {
            round,
            rules: [("fedavg".to_owned(), (0.5, 1.0)), ("fisher".to_owned(), (fisher, 1.0))].into(),
            clients: vec![
                Contribution { samples: 1, loss: 1.0, down: 1.0, up: 3.0, share_down: 0.5, share_up: 0.25 },
                Contribution { samples: 3, loss: 0.5, down: 1.0, up: 1.0, share_down: 0.5, share_up: 0.75 },
            ],
        };
        let runs = [record(1, 0.5, vec![round(1, 0.75), round(2, 0.5)]), record(2, 0.5, vec![round(1, 0.25)])];
        let filled = [Filled { cell: &h, records: runs.iter().collect() }];
        let found = on_same_updates(&filled, "fisher, path fedavg", "fisher", None);
        assert_eq!(found, OnSameUpdates { runs: vec![12.5, -25.0], above: 1, below: 1, equal: 1 });
        let weights = weights(&filled, "fisher, path fedavg");
        assert_eq!(weights.len(), 2);
        assert_eq!((weights[0].round, weights[0].updates, weights[0].largest), (1, 4, (0.75, 0.5, 0.75)));
        assert_eq!(weights[0].down_mass, 0.375);
        // Who has the higher loss weighs twice its samples in `down`, and just them in `up`.
        assert!(weights[0].with_loss.0.unwrap() > 0.99 && weights[0].with_loss.1.is_none());
        assert!(weights[0].with_samples.0.unwrap() < -0.99);
    }
}
