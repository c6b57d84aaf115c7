//! Accuracy and bytes on a real task, strategy by strategy.

use super::super::accuracy::{self, Outcome, PLAIN, REFERENCE, STRATEGIES};
use super::super::kept::Kept;
use super::super::{Bench, Way};
use super::{NOTHING, Page, Table, by_kind, megabytes, percent, spread, times_less};
use fednano_shared::ledger::{Kind, Traffic};

/// A section.
///
/// # Errors
/// As the page.
pub(super) fn say(bench: &Bench, kept: &Kept, page: &mut Page) -> anyhow::Result<()> {
    let (simulation, settings) = accuracy::base(bench);
    let data = if bench.data.is_some() { "easy-VQA" } else { "generated scenes" };
    page.say(&format!("## Accuracy on {data}, with nano-llava"));
    let rows = accuracy::results(bench, kept)?;
    let Some(first) = rows.iter().find_map(|row| row.runs.first()) else {
        page.say("**Not run yet.**");
        return Ok(());
    };
    page.say(&format!(
        "{} clients, a Dirichlet split by answer with alpha {}, at most {} questions each (0: all), adapters of rank {}, {} rounds of {} epoch, batches of {}, \
         {} at {}; Fisher values from at most {} questions a round. Judged with {} test questions; the untouched model has {}. Right is an \
         answer that greedy decoding gives word for word. Figures are mean ± standard deviation over seeds (runs in brackets); differences are \
         to {REFERENCE} with the same seed, in points. Bytes are of one client, mean over clients and seeds.",
        simulation.clients,
        simulation.alpha,
        if simulation.limit == 0 { simulation.samples } else { simulation.limit },
        settings.rank,
        settings.rounds,
        settings.local_epochs,
        settings.batch_size,
        settings.optimizer,
        settings.learning_rate,
        settings.fisher_samples,
        first.1.questions,
        percent(first.1.zero_shot),
    ));
    for strategy in STRATEGIES {
        let own: Vec<&accuracy::Row> = rows.iter().filter(|row| row.cell.strategy == strategy).collect();
        page.say(&format!("### {strategy}"));
        page.say(&accuracies(&own));
        let means: Vec<(&str, Traffic)> =
            own.iter().filter_map(|row| Some((row.cell.variant.name, mean(&row.runs)?))).collect();
        page.say("The same by kind, MB:");
        page.say(&by_kind(&means));
    }
    page.say(twins(&rows));
    Ok(())
}

fn accuracies(rows: &[&accuracy::Row]) -> String {
    let plain = mean(runs_of(rows, PLAIN));
    let mut table =
        Table::new(&["", "accuracy", "difference", "MB up", "MB down", "MB total", "plain f16 split / this"]);
    for row in rows {
        let values: Vec<f64> = row.runs.iter().map(|(_, outcome)| outcome.accuracy * 100.0).collect();
        let differences = differences(rows, row.cell.variant.name);
        let mut cells = vec![row.cell.variant.name.to_owned(), spread(&values, false), spread(&differences, true)];
        match mean(&row.runs) {
            Some(traffic) => {
                cells.extend([traffic.up.total(), traffic.down.total(), traffic.total()].map(megabytes));
                cells.push(plain.map_or(NOTHING.to_owned(), |plain| times_less(plain.total(), traffic.total())));
            }
            None => cells.extend([NOTHING; 4].map(str::to_owned)),
        }
        table.row(cells);
    }
    table.text()
}

fn runs_of<'a>(rows: &[&'a accuracy::Row], name: &str) -> &'a [(u64, Outcome)] {
    rows.iter().find(|row| row.cell.variant.name == name).map(|row| row.runs.as_slice()).unwrap_or_default()
}

/// A variant's accuracy less the reference's with the same seed, points.
pub(super) fn differences(rows: &[&accuracy::Row], name: &str) -> Vec<f64> {
    let reference = runs_of(rows, REFERENCE);
    let paired = |(seed, outcome): &(u64, Outcome)| {
        let (_, same) = reference.iter().find(|(other, _)| other == seed)?;
        Some((outcome.accuracy - same.accuracy) * 100.0)
    };
    runs_of(rows, name).iter().filter_map(paired).collect()
}

/// What one client sends and receives, mean over clients and runs.
fn mean(runs: &[(u64, Outcome)]) -> Option<Traffic> {
    let clients: u64 = runs.iter().map(|(_, outcome)| outcome.clients as u64).sum();
    let sum = Traffic::sum(runs.iter().map(|(_, outcome)| &outcome.traffic));
    (clients > 0).then(|| {
        let mut mean = Traffic::default();
        for way in Way::BOTH {
            Kind::ALL.into_iter().for_each(|kind| way.count(&mut mean, kind, way.get(&sum, kind) / clients));
        }
        mean
    })
}

fn twins(rows: &[accuracy::Row]) -> &'static str {
    let twins = accuracy::twins(rows);
    if twins.is_empty() {
        ""
    } else if twins.iter().all(|twins| twins.accuracies.0 == twins.accuracies.1) {
        "Deflating is run with the first seed alone: it changes no value, and the accuracy is the same as without it."
    } else {
        "**Deflating should change no value, but an accuracy differs from the one without it.**"
    }
}
