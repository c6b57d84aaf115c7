//! The tables, in Markdown. What depends on the machine (times) has a page of its own, so that the others can be compared byte for
//! byte with those of a rerun.

use super::compare::{accuracy, columns, local, names, on_same_updates, row, rows};
use super::figures::Bytes;
use super::grid::{Group, Size, base};
use super::records::Record;
use super::statistics::{Spread, sign_test};
use super::study::Filled;
use std::fmt::Write;

/// Nothing has been run.
const NOTHING: &str = "-";

/// `docs/results/README.md`.
pub(super) fn page(size: Size, filled: &[Filled<'_>], plots: &[String]) -> String {
    let mut page = String::from("# Results\n\n");
    let command = match size {
        Size::Full => "just paper",
        Size::Quick => "just paper --quick",
    };
    push(
        &mut page,
        &format!(
            "Made by `{command}` from [runs.jsonl](runs.jsonl), which has every run; no number here is typed by hand. What to make \
             of them: [reading.md](reading.md). How long they took: [times.md](times.md)."
        ),
    );
    if size == Size::Quick {
        push(&mut page, "**A quick run, to see that everything works: its figures say nothing.**");
    }
    push(&mut page, &common(size));
    push(&mut page, &floor(filled));
    push(
        &mut page,
        "Cells are mean ± standard deviation over seeds, and the number of runs in brackets. A rerun on the same kind of machine with \
         the same seeds gives the same tables; on another one the last bits of sums differ, and with them some answers.",
    );
    for plot in plots {
        push(&mut page, &format!("![{}]({plot})", plot.trim_end_matches(".svg").replace('-', " ")));
    }
    for group in Group::ALL {
        push(&mut page, &format!("## {group}. {}", group.title()));
        push(&mut page, group.about());
        match group {
            Group::H => push(&mut page, &same_updates(filled)),
            Group::F => push(&mut page, &tasks(filled)),
            _ => push(&mut page, &table(filled, group, accuracy, 1)),
        }
        if matches!(group, Group::A | Group::B | Group::F | Group::G) {
            push(&mut page, "The same on the clients' own test questions, mean over clients:");
            push(&mut page, &table(filled, group, local, 1));
        }
        if group == Group::A {
            push(
                &mut page,
                "Strategies `local` and `feddpa-f` leave each client with adapters of its own: their figures are means over clients. \
                 A client's bytes in a whole run, MB, mean over all columns (control messages left out):",
            );
            push(&mut page, &bytes(filled));
        } else if group != Group::H {
            push(&mut page, "A client's bytes in a whole run, up and down together, MB:");
            push(&mut page, &table(filled, group, megabytes, 2));
        }
    }
    page
}

/// A paragraph and an empty line.
fn push(page: &mut String, paragraph: &str) {
    if !paragraph.is_empty() {
        page.push_str(paragraph.trim_end());
        page.push_str("\n\n");
    }
}

/// What all runs have in common, but for what a table varies.
fn common(size: Size) -> String {
    let (s, f) = base(size);
    format!(
        "Unless a table says otherwise: {} clients; {} training questions in all, dealt by a Dirichlet split by answer with alpha {}; \
         each client keeps {} % of its questions to test itself; adapters of rank {}: {}; {} rounds of {} local pass{}; batches of {}, \
         {} at a rate of {}, falling to {} of it in the last round; Fisher values from at most {} questions. Judged with {} test \
         questions after each round and {} after the last; right is an answer that greedy decoding gives word for word.",
        s.clients,
        s.samples,
        s.alpha,
        f.local_test * 100.0,
        f.rank,
        f.adapters,
        f.rounds,
        f.local_epochs,
        if f.local_epochs == 1 { "" } else { "es" },
        f.batch_size,
        f.optimizer,
        f.learning_rate,
        f.final_rate,
        f.fisher_samples,
        s.evaluation_limit,
        s.test_limit,
    )
}

/// What is reached without training.
fn floor(filled: &[Filled<'_>]) -> String {
    let mut text = String::new();
    for group in [Group::A, Group::F] {
        let Some(record) = filled.iter().filter(|f| f.cell.group == group).find_map(|f| f.records.first()) else {
            continue;
        };
        let figures = &record.figures;
        let percent = |share: f64| format!("{:.1} %", share * 100.0);
        let questions = if group == Group::F { "Both tasks together: untouched" } else { "The untouched" };
        let (constant, question) = figures.baselines;
        // A String takes whatever is written.
        let _ = write!(
            text,
            "{questions} model {} of {} test questions; always the most frequent answer {}, always the most frequent one to the \
             question {}. ",
            percent(figures.zero_shot.together.accuracy),
            figures.zero_shot.together.samples,
            percent(constant),
            percent(question)
        );
    }
    text
}

/// Mean, spread and count.
fn cell(values: &[f64], digits: usize) -> String {
    match Spread::of(values) {
        None => NOTHING.into(),
        Some(Spread { mean, n: 1, .. }) => format!("{mean:.digits$} (1)"),
        Some(Spread { mean, sd, n }) => format!("{mean:.digits$} ± {sd:.digits$} ({n})"),
    }
}

/// Lines of a table: its head, then its rows.
fn lines(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&head.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>());
    text += &line(&vec!["---".to_owned(); head.len()]);
    rows.for_each(|cells| text += &line(&cells));
    text
}

/// Rows and columns of a group, one value of each run.
fn table(filled: &[Filled<'_>], group: Group, value: fn(&Record) -> Option<f64>, digits: usize) -> String {
    let columns = columns(filled, group);
    let head: Vec<&str> = std::iter::once("").chain(columns.iter().copied()).collect();
    let rows = rows(filled, group);
    let of_row = |name: &&str| {
        let values = |column: &&str| {
            let found = row(filled, group, name).find(|f| f.cell.column == **column);
            let values: Vec<f64> = found.iter().flat_map(|f| &f.records).filter_map(|record| value(record)).collect();
            cell(&values, digits)
        };
        std::iter::once((*name).to_owned()).chain(columns.iter().map(values)).collect()
    };
    if rows.is_empty() { NOTHING.into() } else { lines(&head, rows.iter().map(of_row)) }
}

/// Group F: together, and each task.
fn tasks(filled: &[Filled<'_>]) -> String {
    let all = filled.iter().filter(|f| f.cell.group == Group::F);
    let tasks: Vec<String> =
        all.flat_map(|f| &f.cell.plan.simulation.tasks).map(std::string::ToString::to_string).collect();
    let tasks = names(tasks.iter().map(String::as_str));
    if tasks.is_empty() {
        return "Needs two tasks: not run here.".into();
    }
    let head: Vec<&str> = ["", "together"].into_iter().chain(tasks.iter().copied()).collect();
    let of_row = |name: &&str| {
        let records: Vec<&Record> = row(filled, Group::F, name).flat_map(|f| f.records.iter().copied()).collect();
        let together: Vec<f64> = records.iter().filter_map(|record| accuracy(record)).collect();
        let of_task = |wanted: &&str| {
            let shares = records.iter().flat_map(|r| &r.figures.used().tasks);
            let own = shares.filter(|(task, _)| task.to_string() == **wanted).map(|(_, e)| e.accuracy * 100.0);
            cell(&own.collect::<Vec<_>>(), 1)
        };
        let start = [(*name).to_owned(), cell(&together, 1)];
        start.into_iter().chain(tasks.iter().map(of_task)).collect()
    };
    lines(&head, rows(filled, Group::F).iter().map(of_row))
}

fn megabytes(record: &Record) -> Option<f64> {
    let bytes = record.figures.bytes;
    Some((bytes.up() + bytes.down()) as f64 / 1e6)
}

/// Bytes by kind, over all cells of a row of group A.
fn bytes(filled: &[Filled<'_>]) -> String {
    let head =
        ["", "activations up", "adapters and Fisher up", "gradients down", "adapters down", "all up", "all down"];
    let of_row = |name: &&str| {
        let all: Vec<Bytes> =
            row(filled, Group::A, name).flat_map(|f| &f.records).map(|record| record.figures.bytes).collect();
        let mean = |of: fn(&Bytes) -> u64| {
            let values: Vec<f64> = all.iter().map(|b| of(b) as f64 / 1e6).collect();
            Spread::of(&values).map_or_else(|| NOTHING.to_owned(), |s| format!("{:.2}", s.mean))
        };
        let kinds: [fn(&Bytes) -> u64; 6] =
            [|b| b.activations_up, |b| b.updates_up, |b| b.gradients_down, |b| b.adapters_down, Bytes::up, Bytes::down];
        std::iter::once((*name).to_owned()).chain(kinds.map(mean)).collect()
    };
    lines(&head, rows(filled, Group::A).iter().map(of_row))
}

/// A signed difference with its interval, and over how many runs.
pub(super) fn difference(values: &[f64]) -> String {
    match Spread::of(values) {
        None => NOTHING.into(),
        Some(spread) => match spread.half_width() {
            Some(half) => format!("{:+.2} ± {half:.2} ({})", spread.mean, spread.n),
            None => format!("{:+.2} (1)", spread.mean),
        },
    }
}

/// Group H: a table for each path.
fn same_updates(filled: &[Filled<'_>]) -> String {
    let mut text = String::new();
    for name in rows(filled, Group::H) {
        let cells: Vec<&Filled<'_>> = row(filled, Group::H, name).collect();
        let rules = names(cells.iter().flat_map(|f| &f.cell.plan.rules).map(|rule| rule.name.as_str()));
        let columns: Vec<String> = cells.iter().map(|f| format!("alpha {}", f.cell.column)).collect();
        let tail = ["all", "rounds better / worse / equal", "sign test"];
        let head: Vec<&str> = std::iter::once("").chain(columns.iter().map(String::as_str)).chain(tail).collect();
        let of_rule = |rule: &&str| {
            let of = |column: Option<&str>| on_same_updates(filled, name, rule, column);
            let all = of(None);
            let mut line = vec![(*rule).to_owned()];
            line.extend(cells.iter().map(|f| difference(&of(Some(&f.cell.column)).runs)));
            line.push(difference(&all.runs));
            line.push(format!("{} / {} / {}", all.above, all.below, all.equal));
            line.push(format!("p = {:.3}", sign_test(all.above, all.below)));
            line
        };
        // FedAvg is what the others are compared with.
        let others: Vec<&str> = rules.into_iter().filter(|rule| *rule != super::compare::FEDAVG).collect();
        push(&mut text, &format!("### Fisher measured by `{name}`"));
        push(&mut text, &lines(&head, others.iter().map(of_rule)));
    }
    if !text.is_empty() {
        text.push_str(
            "Rounds of one run follow each other and are not independent, so the sign test is too sure of itself; the intervals are \
             over runs.",
        );
    }
    text
}

/// `docs/results/times.md`.
pub(super) fn times(filled: &[Filled<'_>]) -> String {
    let mut page = String::from("# Times\n\nOf the runs behind [the results](README.md); not the same in a rerun.\n\n");
    // A run that stands in several tables took its time once.
    let mut all: Vec<&Record> = filled.iter().flat_map(|f| f.records.iter().copied()).collect();
    all.sort_by(|a, b| a.key.cmp(&b.key));
    all.dedup_by(|a, b| a.key == b.key);
    let hours = all.iter().map(|record| record.seconds).sum::<f64>() / 3600.0;
    let devices = names(all.iter().map(|record| record.device.as_str())).join(", ");
    push(&mut page, &format!("{} runs, {hours:.2} hours together, on {devices}.", all.len()));
    push(&mut page, "Seconds of a run, merges and judgements included, as the tables' cells:");
    for group in Group::ALL {
        push(&mut page, &format!("## {group}. {}", group.title()));
        push(&mut page, &table(filled, group, |record| Some(record.seconds), 1));
    }
    page
}

#[cfg(test)]
mod tests {
    use super::super::compare::tests::{cell as planned, record};
    use super::*;

    #[test]
    fn cells_say_how_many_runs_there_were() {
        assert_eq!(cell(&[], 1), "-");
        assert_eq!(cell(&[50.0], 1), "50.0 (1)");
        assert_eq!(cell(&[50.0, 52.0], 1), "51.0 ± 1.4 (2)");
        assert_eq!(difference(&[1.0, 1.5]), "+1.25 ± 3.18 (2)");
        assert_eq!((difference(&[-1.0]), difference(&[])), ("-1.00 (1)".to_owned(), "-".to_owned()));
    }

    #[test]
    fn a_table_has_a_place_for_what_is_missing() {
        let (one, other) = (planned(Group::A, "fedavg", "0.1"), planned(Group::A, "fedavg", "1"));
        let runs = [record(1, 0.5, vec![]), record(2, 0.52, vec![])];
        let filled =
            [Filled { cell: &one, records: runs.iter().collect() }, Filled { cell: &other, records: Vec::new() }];
        let expected = "|  | 0.1 | 1 |\n| --- | --- | --- |\n| fedavg | 51.0 ± 1.4 (2) | - |\n";
        assert_eq!(table(&filled, Group::A, accuracy, 1), expected);
        let page = page(Size::Quick, &filled, &["some-plot.svg".into()]);
        assert!(page.contains(expected) && page.contains("![some plot](some-plot.svg)"), "{page}");
        assert!(page.contains("say nothing") && page.contains("## H."), "{page}");
        // Both runs have the same key here: one took its time once, wherever it stands.
        assert!(times(&filled).contains("1 runs"));
    }
}
