//! The page: everything that is kept, in Markdown. What differs from run to run (times) has a section of its own at the end.

mod goals;
mod shape;
mod task;
mod times;

use super::kept::Kept;
use super::{Bench, DEFAULT, MIXED, Way, codec};
use crate::experiment::statistics::Spread;
use fednano_shared::ledger::{Kind, Traffic};
use fednano_shared::settings::Format;

/// Nothing has been run.
const NOTHING: &str = "-";
/// Samples of the client that shares are given for.
const TYPICAL: u64 = 1000;
/// The same, as people write it.
const TYPICAL_WORDS: &str = "1,000";

/// All of it.
///
/// # Errors
/// A preset that is not there, a shape out of range, a key that cannot be made.
pub(super) fn page(bench: &Bench, kept: &Kept) -> anyhow::Result<String> {
    let mut page = Page(String::from("# The wire, measured\n\n"));
    let runs = bench.runs_name();
    let command = if bench.quick() { "just bench-wire --quick" } else { "just bench-wire" };
    page.say(&format!(
        "Made by `{command}` from [{runs}]({runs}), which has every finished run; no number here is typed by hand. What the modes \
         and formats are, and what each lets the server learn: [boundary.md](boundary.md)."
    ));
    if bench.quick() {
        page.say("**A quick run, to see that everything works: its figures say nothing.**");
    }
    page.say(&format!(
        "MB and GB are 10^6 and 10^9 bytes. Bytes are those of the byte ledger: whole frames, counted by the same code at both ends. \
         **{DEFAULT} is the default**: features, codes, gradients and matrices in int8. {MIXED} has matrices in f16 instead. Rounding is to the \
         nearest and a step waits for its answer, unless the name says otherwise."
    ));
    goals::say(bench, kept, &mut page)?;
    shape::say(bench, kept, &mut page)?;
    task::say(bench, kept, &mut page)?;
    packing(bench, kept, &mut page)?;
    times::say(bench, kept, &mut page)?;
    let mut text = page.0;
    text.truncate(text.trim_end().len());
    text.push('\n');
    Ok(text)
}

// ---------------------------------------------------------------------------------------------- packing

fn packing(bench: &Bench, kept: &Kept, page: &mut Page) -> anyhow::Result<()> {
    page.say("## What deflating takes off");
    let Some(outcome) = codec::result(bench, kept)? else {
        page.say("**Not run yet.**");
        return Ok(());
    };
    page.say(&format!(
        "One step of nano-llava, {} samples, after {} steps of training, tensor by tensor: kB in each format, and deflated (level fast, bytes of \
         equal significance side by side; kept only where it is smaller).",
        outcome.samples, outcome.steps
    ));
    let mut head = vec!["".to_owned(), "values".to_owned()];
    head.extend(Format::ALL.iter().flat_map(|format| [format.to_string(), "deflated".to_owned()]));
    let mut table = Table::new(&head);
    for sizes in &outcome.sizes {
        let mut row = vec![sizes.what.clone(), sizes.values.to_string()];
        for (plain, deflated) in &sizes.bytes {
            let share = *deflated as f64 / (*plain).max(1) as f64 - 1.0;
            row.extend([format!("{:.1}", *plain as f64 / 1e3), format!("{:+.1} %", share * 100.0)]);
        }
        table.row(row);
    }
    page.say(&table.text());
    Ok(())
}

// ---------------------------------------------------------------------------------------------- Markdown

struct Page(String);

impl Page {
    /// A paragraph and an empty line.
    fn say(&mut self, paragraph: &str) {
        if !paragraph.is_empty() {
            self.0.push_str(paragraph.trim_end());
            self.0.push_str("\n\n");
        }
    }
}

struct Table(Vec<String>);

impl Table {
    fn new<T: AsRef<str>>(head: &[T]) -> Self {
        let line = |cells: Vec<&str>| format!("| {} |", cells.join(" | "));
        Self(vec![line(head.iter().map(AsRef::as_ref).collect()), line(vec!["---"; head.len()])])
    }

    fn row(&mut self, cells: Vec<String>) {
        self.0.push(format!("| {} |", cells.join(" | ")));
    }

    fn text(&self) -> String {
        self.0.join("\n")
    }
}

/// A row each, a column for each direction and kind of which there is any; in MB.
fn by_kind(rows: &[(&str, Traffic)]) -> String {
    if rows.is_empty() {
        return NOTHING.to_owned();
    }
    let used = |way: Way, kind: Kind| rows.iter().any(|(_, traffic)| way.get(traffic, kind) > 0);
    let columns: Vec<(Way, Kind)> =
        Way::BOTH.into_iter().flat_map(|way| Kind::ALL.map(|kind| (way, kind))).filter(|(w, k)| used(*w, *k)).collect();
    let mut head = vec![String::new()];
    head.extend(columns.iter().map(|(way, kind)| format!("{}: {}", way.name(), kind.words())));
    head.push("total".into());
    let mut table = Table::new(&head);
    for (name, traffic) in rows {
        let figure = |bytes: u64| format!("{:.2}", bytes as f64 / 1e6);
        let mut cells = vec![(*name).to_owned()];
        cells.extend(columns.iter().map(|(way, kind)| figure(way.get(traffic, *kind))));
        cells.push(figure(traffic.total()));
        table.row(cells);
    }
    table.text()
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

/// In MB or GB.
fn amount(bytes: u64) -> String {
    match bytes {
        1_000_000_000.. => format!("{:.2} GB", bytes as f64 / 1e9),
        _ => format!("{:.1} MB", bytes as f64 / 1e6),
    }
}

/// Seconds, minutes or hours.
fn duration(seconds: f64) -> String {
    match seconds {
        3600.0.. => format!("{:.1} h", seconds / 3600.0),
        60.0.. => format!("{:.1} min", seconds / 60.0),
        _ => format!("{seconds:.1} s"),
    }
}

/// A deviation, also one that is next to nothing.
fn off(share: f64) -> String {
    if share == 0.0 { "none".to_owned() } else { format!("{:+.1e} %", share * 100.0) }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// How many times less.
fn times_less(theirs: u64, ours: u64) -> String {
    format!("{:.2}", theirs as f64 / ours.max(1) as f64)
}

/// By how much less.
fn less(ours: u64, theirs: u64) -> String {
    format!("{:.1} %", (1.0 - ours as f64 / theirs.max(1) as f64) * 100.0)
}

/// Mean ± standard deviation (n) of percentages or points.
fn spread(values: &[f64], signed: bool) -> String {
    match Spread::of(values) {
        None => NOTHING.to_owned(),
        Some(Spread { mean, sd, n }) => {
            let mean = if signed { format!("{mean:+.2}") } else { format!("{mean:.2}") };
            if n > 1 { format!("{mean} ± {sd:.2} ({n})") } else { format!("{mean} (1)") }
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::device::{ComputeDtype, DeviceChoice};
    use crate::experiment::grid::Size;
    use crate::store::TemporaryFolder;

    /// A quick one.
    pub(in crate::wire_bench) fn bench() -> Bench {
        Bench {
            model: "some/model".into(),
            data: None,
            size: Size::Quick,
            parts: Vec::new(),
            seeds: vec![1, 2],
            samples: 8,
            device: DeviceChoice::Cpu,
            dtype: ComputeDtype::Auto,
            out: "nowhere".into(),
        }
    }

    #[test]
    fn a_page_of_nothing_says_so() {
        let folder = TemporaryFolder::create("report").unwrap();
        let kept = Kept::open(&folder.path().join("wire.jsonl")).unwrap();
        for size in [Size::Quick, Size::Full] {
            let page = page(&Bench { size, ..bench() }, &kept).unwrap();
            assert_eq!(page.to_lowercase().matches("not run yet").count(), 4, "{page}");
            assert!(page.contains("boundary.md") && page.ends_with('\n') && !page.ends_with("\n\n"));
        }
    }

    #[test]
    fn tables_have_the_columns_that_they_need() {
        let mut traffic = Traffic::default();
        traffic.up.count(Kind::Codes, 1_500_000);
        traffic.down.count(Kind::Gradients, 500_000);
        let table = by_kind(&[("a", traffic), ("b", Traffic::default())]);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "|  | up: codes | down: gradients | total |");
        assert_eq!((lines[2], lines[3]), ("| a | 1.50 | 0.50 | 2.00 |", "| b | 0.00 | 0.00 | 0.00 |"));
        assert_eq!(by_kind(&[]), NOTHING);
    }

    #[test]
    fn figures_as_people_read_them() {
        assert_eq!([amount(2_360_448_000), amount(1_048_576)], ["2.36 GB", "1.0 MB"]);
        assert_eq!((times_less(100, 4), less(5, 100)), ("25.00".into(), "95.0 %".into()));
        assert_eq!([spread(&[1.0, 3.0], false), spread(&[0.5], true)], ["2.00 ± 1.41 (2)", "+0.50 (1)"]);
        assert_eq!(spread(&[], true), NOTHING);
        assert_eq!([59.94, 90.0, 12_600.0].map(duration), ["59.9 s", "1.5 min", "3.5 h"]);
        assert_eq!([0.0, -1e-9].map(off), ["none", "-1.0e-7 %"]);
    }
}
