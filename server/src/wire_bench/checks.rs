//! What must hold of all that was measured: where it does not, the command fails, after it has written the page.

use super::kept::Kept;
use super::{Bench, Way, accuracy, shapes};
use fednano_shared::ledger::{Kind, Traffic};

/// What does not hold, a sentence each. Both ends must always count the same; of a quick benchmark, which is a test, forecasts must be
/// exact too, and deflating must leave results alone.
///
/// # Errors
/// A preset that is not there, a key that cannot be made.
pub(super) fn faults(bench: &Bench, kept: &Kept) -> anyhow::Result<Vec<String>> {
    let (shape, rows) = (shapes::shape(bench)?, shapes::results(bench, kept)?);
    let mut faults: Vec<String> = rows.iter().flat_map(|row| counts(bench, row)).collect();
    if bench.quick() {
        faults.extend(rows.iter().filter_map(|row| forecast(row, bench, &shape)));
        faults.extend(accuracy::twins(&accuracy::results(bench, kept)?).iter().filter_map(twins));
    }
    Ok(faults)
}

/// Kinds that the participant and the server have counted differently.
fn counts(bench: &Bench, row: &shapes::Row) -> Vec<String> {
    let of = |(samples, outcome): (u64, &shapes::Outcome)| {
        let kinds = differing(&outcome.client, &outcome.server);
        let name = row.name();
        (!kinds.is_empty()).then(|| {
            format!("{name}, {samples} samples: participant and server have counted differently: {}", kinds.join("; "))
        })
    };
    row.outcomes(bench).filter_map(of).collect()
}

fn differing(client: &Traffic, server: &Traffic) -> Vec<String> {
    let all = Way::BOTH.into_iter().flat_map(|way| Kind::ALL.map(|kind| (way, kind)));
    let words = |(way, kind): (Way, Kind)| {
        let (a, b) = (way.get(client, kind), way.get(server, kind));
        (a != b).then(|| format!("{} {} {a} and {b} bytes", kind.words(), way.name()))
    };
    all.filter_map(words).collect()
}

/// Any kind but control off the forecast.
fn forecast(row: &shapes::Row, bench: &Bench, shape: &super::scaling::Shape) -> Option<String> {
    let off = row.deviation(bench, shape).filter(|off| off.worst != 0.0)?;
    Some(format!(
        "{}: with {} samples '{}' is {:+.1e} % off what the rules say from {} samples",
        row.name(),
        shapes::second(bench),
        off.what,
        off.worst * -100.0,
        bench.samples
    ))
}

fn twins(twins: &accuracy::Twins) -> Option<String> {
    let (deflated, plain) = twins.accuracies;
    (deflated != plain).then(|| {
        let accuracy::Twins { strategy, name, seed, .. } = twins;
        format!("{strategy}, {name}, seed {seed}: the accuracy is {deflated}, but {plain} without deflating")
    })
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::bench;
    use super::super::{DEFAULT, accuracy::tests::rows};
    use super::*;
    use fednano_shared::settings::Strategy;

    /// A row with both runs, of so many bytes of codes.
    fn row(once: u64, twice: u64) -> shapes::Row {
        let cell = shapes::cells().into_iter().find(|cell| cell.twice).unwrap();
        let outcome = |codes: u64| {
            let mut client = Traffic::default();
            client.up.count(Kind::Codes, codes);
            Some(shapes::Outcome { client, server: client, seconds: 1.0 })
        };
        shapes::Row { cell, once: outcome(once), twice: outcome(twice) }
    }

    #[test]
    fn both_ends_must_count_alike() {
        let (bench, mut row) = (bench(), row(8_000, 34_000));
        assert!(counts(&bench, &row).is_empty());
        row.twice.as_mut().unwrap().server.up.count(Kind::Codes, 1);
        let found = counts(&bench, &row);
        assert_eq!(found.len(), 1);
        assert!(found[0].contains("34 samples") && found[0].contains("codes up 34000 and 34001 bytes"), "{found:?}");
    }

    #[test]
    fn forecasts_must_be_exact_but_for_control() {
        let bench = bench();
        let shape = shapes::shape(&bench).unwrap();
        let mut right = row(8_000, 34_000);
        right.twice.as_mut().unwrap().client.up.count(Kind::Control, 77);
        assert_eq!(forecast(&right, &bench, &shape), None);
        let found = forecast(&row(8_000, 34_001), &bench, &shape).unwrap();
        assert!(found.contains("'codes, up'") && found.contains("+2.9e-3 %"), "{found}");
        // Of what was not run nothing is said.
        right.twice = None;
        assert_eq!(forecast(&right, &bench, &shape), None);
    }

    #[test]
    fn deflating_must_change_nothing() {
        let deflated = "low-rank int8, deflated";
        let of = |plain: f64| {
            let found = accuracy::twins(&rows(&[
                (Strategy::FedAvg, DEFAULT, &[(1, plain)]),
                (Strategy::FedAvg, deflated, &[(1, 0.5)]),
            ]));
            found.iter().filter_map(twins).collect::<Vec<_>>()
        };
        assert!(of(0.5).is_empty());
        assert_eq!(
            of(0.75),
            ["fedavg, low-rank int8, deflated, seed 1: the accuracy is 0.5, but 0.75 without deflating"]
        );
    }
}
