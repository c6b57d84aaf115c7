//! The page: everything that is kept, in Markdown. What differs from run to run (times) has a section of its own at the end.

mod goals;

use super::accuracy::{self, Outcome, PLAIN, REFERENCE, STRATEGIES};
use super::kept::Kept;
use super::scaling::{self, Load, Others};
use super::{Bench, Way, codec, links, shapes};
use crate::experiment::statistics::Spread;
use fednano_shared::ledger::{Kind, Traffic};
use fednano_shared::settings::{Format, Strategy};

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
    let command = if bench.quick() { "just bench-wire --quick" } else { "just bench-wire" };
    page.say(&format!(
        "Made by `{command}` from [wire.jsonl](wire.jsonl), which has every finished run; no number here is typed by hand. What the modes \
         and formats are, and what each lets the server learn: [boundary.md](boundary.md)."
    ));
    if bench.quick() {
        page.say("**A quick run, to see that everything works: its figures say nothing.**");
    }
    page.say(
        "MB and GB are 10^6 and 10^9 bytes. Bytes are those of the byte ledger: whole frames, counted by the same code at both ends. In the \
         variants' names `mixed` is int8 for features, codes and gradients and f16 for matrices; rounding is to the nearest and a step \
         waits for its answer, unless the name says otherwise.",
    );
    goals::say(bench, kept, &mut page)?;
    large_shape(bench, kept, &mut page)?;
    task(bench, kept, &mut page)?;
    packing(bench, kept, &mut page)?;
    times(bench, kept, &mut page)?;
    let mut text = page.0;
    text.truncate(text.trim_end().len());
    text.push('\n');
    Ok(text)
}

// ---------------------------------------------------------------------------------------------- a large shape

fn large_shape(bench: &Bench, kept: &Kept, page: &mut Page) -> anyhow::Result<()> {
    let shape = shapes::shape(bench)?;
    let (dim, image) = (shape.config.text.hidden, shape.config.image_tokens());
    let load = shapes::load(bench, Strategy::FedAvg, bench.samples);
    let text = shape.question + shape.answer;
    let name = if bench.quick() { "a tiny shape" } else { "LLaVA-1.5-7B's shape" };
    page.say(&format!("## Bytes at {name}"));
    page.say(&format!(
        "Width {dim}, rank {}, {image} image and {text} text positions a sample ({} of them the answer's), {} rounds of one epoch, batches of {}. \
         Measured on the real protocol (sessions, coordinator, store, participants) with random weights: the LLM has one thin decoder layer, since \
         bytes do not depend on depth, and features are random numbers, each sample with a picture of its own. So nothing is deflated \
         here: random numbers would say nothing about that. Answers use ids below {}, which take 2 bytes each, where a larger vocabulary \
         needs a third for some. A second participant with one sample sees to it that merging changes the adapters.",
        shape.rank,
        shape.answer,
        load.rounds,
        load.batch,
        shapes::HEAD,
    ));
    let rows = shapes::results(bench, kept)?;
    let differing =
        rows.iter().flat_map(|row| [&row.once, &row.twice]).flatten().filter(|o| o.client != o.server).count();
    let runs = rows.iter().flat_map(|row| [&row.once, &row.twice]).flatten().count();
    page.say(&match (runs, differing) {
        (0, _) => "**Not run yet.**".to_owned(),
        (runs, 0) => {
            format!("In all {runs} runs participant and server counted the same, byte for byte, kind by kind.")
        }
        (runs, some) => format!("**In {some} of {runs} runs participant and server counted differently.**"),
    });
    if runs == 0 {
        return Ok(());
    }
    for strategy in STRATEGIES {
        let own: Vec<&shapes::Row> = rows.iter().filter(|row| row.cell.strategy == strategy).collect();
        page.say(&format!("### {strategy}: measured, {} samples, MB", bench.samples));
        let measured: Vec<(&str, Traffic)> =
            own.iter().filter_map(|row| Some((row.cell.variant.name, row.once.as_ref()?.client))).collect();
        page.say(&by_kind(&measured));
        page.say(&format!("### {strategy}: {TYPICAL_WORDS} samples, by the rules below"));
        page.say(&scaled(&own, bench, strategy, &shape)?);
    }
    let typical = Load { samples: TYPICAL, ..load };
    let others = scaling::others(&shape, &typical)?;
    page.say(&format!(
        "The **plain split** sends hidden states up and their gradients down in f16, as often as ours passes a sample through the boundary \
         (Fisher passes too), and adapters and Fisher values in f16; nothing else is charged to it. **LoRA** is of rank {} on all linear layers \
         of all {} decoder layers, with the whole connector, in f16, up and down in each round; it needs the whole model on the \
         participant's device ({}), which is not counted. The **edge bundle** in int8 is {}, once; ours and the plain split need it alike, \
         and only the last two columns count it.",
        shape.rank,
        shape.config.text.layers,
        amount(others.whole),
        amount(others.edge),
    ));
    let features = TYPICAL * Format::Int8.bytes(image as u64, dim as u64);
    page.say(&format!(
        "These figures hold where the server's cache (`--feature-cache`) has room for the features of all participants at once: {} for one with \
         {TYPICAL_WORDS} pictures in int8. With less room features are asked for again.",
        amount(features)
    ));
    page.say(
        "SplitCom (arXiv 2602.10564) reports up to 98.6 % less uplink in its standard configuration and up to 95.8 % less in total in its \
         U-shaped one, against its own uncompressed split, with other models and tasks: figures as published, beside ours, which nobody has run \
         against each other. Ours are meant so: *up* is everything that the participant sends in the whole federation, features, ids, \
         labels, adapters and control included, against everything that the plain f16 split sends up; *total* is the same of both \
         directions. Labels go to the server, as in its standard configuration.",
    );
    page.say("### The rules, and how well they forecast");
    page.say(&format!(
        "Features grow with samples; text, labels, codes and activations, and their gradients, with passes of samples through the boundary; \
         matrices with steps (upward one more a round before a Fisher pass), and so do their gradients, whose size is known; squares of \
         gradients with groups of 8 Fisher requests; adapters and Fisher values with rounds; control with requests. From a run with {} samples, forecast for {}, against a \
         run with so many:",
        bench.samples,
        2 * bench.samples
    ));
    page.say(&forecasts(&rows, bench, &shape));
    Ok(())
}

/// The load and the bytes from which others are worked out: the larger run, if it is there.
fn largest(row: &shapes::Row, bench: &Bench) -> Option<(Load, Traffic)> {
    let of = |samples, outcome: &shapes::Outcome| (shapes::load(bench, row.cell.strategy, samples), outcome.client);
    let twice = row.twice.as_ref().map(|outcome| of(2 * bench.samples, outcome));
    twice.or_else(|| row.once.as_ref().map(|outcome| of(bench.samples, outcome)))
}

fn scaled(rows: &[&shapes::Row], bench: &Bench, strategy: Strategy, shape: &scaling::Shape) -> anyhow::Result<String> {
    let to = shapes::load(bench, strategy, TYPICAL);
    let others = scaling::others(shape, &to)?;
    let mut table = Table::new(&[
        "",
        "up",
        "down",
        "total",
        "plain split / this",
        "LoRA / this",
        "up, less than plain",
        "total, less than plain",
        "total with edge bundle",
        "plain split / this, both with it",
    ]);
    let mut add = |name: &str, up: u64, down: u64, o: &Others| {
        let total = up + down;
        let with_edge = total + o.edge;
        table.row(vec![
            name.to_owned(),
            amount(up),
            amount(down),
            amount(total),
            times_less(o.plain(), total),
            times_less(o.lora(), total),
            less(up, o.plain_up),
            less(total, o.plain()),
            amount(with_edge),
            times_less(o.plain() + o.edge, with_edge),
        ]);
    };
    add("plain f16 split, by formula", others.plain_up, others.plain_down, &others);
    for row in rows {
        if let Some((from, traffic)) = largest(row, bench) {
            let ours = scaling::scaled(&traffic, &from, &to, shapes::matrices(&row.cell, shape));
            add(row.cell.variant.name, ours.up.total(), ours.down.total(), &others);
        }
    }
    let lora = [others.lora_up, others.lora_up, others.lora()].map(amount);
    let mut row = vec!["LoRA and connector, by formula".to_owned()];
    row.extend(lora);
    row.extend([times_less(others.plain(), others.lora()), times_less(1, 1)]);
    row.extend([less(others.lora_up, others.plain_up), less(others.lora(), others.plain())]);
    row.extend([NOTHING.to_owned(), NOTHING.to_owned()]);
    table.row(row);
    Ok(table.text())
}

fn forecasts(rows: &[shapes::Row], bench: &Bench, shape: &scaling::Shape) -> String {
    let mut table = Table::new(&["", "total but control", "the kind furthest off", "control"]);
    for row in rows {
        let (Some(once), Some(twice)) = (&row.once, &row.twice) else { continue };
        let load = |samples| shapes::load(bench, row.cell.strategy, samples);
        let (from, to) = (load(bench.samples), load(2 * bench.samples));
        let forecast = scaling::scaled(&once.client, &from, &to, shapes::matrices(&row.cell, shape));
        let off = scaling::deviation(&forecast, &twice.client);
        let share = |value: f64| format!("{:+.4} %", value * 100.0);
        table.row(vec![
            format!("{}, {}", row.cell.strategy, row.cell.variant.name),
            share(off.total),
            format!("{} ({})", share(off.worst), off.what),
            format!("{:+.1} %", off.control * 100.0),
        ]);
    }
    format!(
        "{}\n\nNumbers of requests and the like have 1 to 5 digits on the wire, and how often the status is sent depends on time: hence \
         control.",
        table.text()
    )
}

// ---------------------------------------------------------------------------------------------- a real task

fn task(bench: &Bench, kept: &Kept, page: &mut Page) -> anyhow::Result<()> {
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
    page.say(&twins(&rows));
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
fn differences(rows: &[&accuracy::Row], name: &str) -> Vec<f64> {
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

/// Deflating changes no value, so it must not change a result.
fn twins(rows: &[accuracy::Row]) -> String {
    let (mut same, mut other) = (0, 0);
    for row in rows.iter().filter(|row| row.cell.variant.compress) {
        let plain = |twin: &&accuracy::Row| {
            let (a, b) = (twin.cell.variant, row.cell.variant);
            twin.cell.strategy == row.cell.strategy
                && super::Variant { compress: true, name: b.name, ..a } == b
                && !a.compress
        };
        for (seed, outcome) in &row.runs {
            let twin = rows.iter().find(plain).and_then(|twin| twin.runs.iter().find(|(other, _)| other == seed));
            match twin {
                Some((_, twin)) if twin.accuracy == outcome.accuracy => same += 1,
                Some(_) => other += 1,
                None => {}
            }
        }
    }
    match (same, other) {
        (0, 0) => String::new(),
        (_, 0) => "Deflating is run with the first seed alone: it changes no value, and the accuracy is the same as without it.".into(),
        _ => "**Deflating should change no value, but an accuracy differs from the one without it.**".into(),
    }
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

// ---------------------------------------------------------------------------------------------- times

fn times(bench: &Bench, kept: &Kept, page: &mut Page) -> anyhow::Result<()> {
    page.say("## Times");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    page.say(&format!(
        "**These differ from run to run and from machine to machine**; this one has {cores} core{}, which both ends share.",
        if cores == 1 { "" } else { "s" }
    ));
    if let Some(outcome) = codec::result(bench, kept)? {
        page.say("Packing and unpacking `g` of the step above, million values a second, one core:");
        let mut table = Table::new(&["", "pack", "unpack"]);
        for speed in &outcome.speeds {
            table.row(vec![speed.how.clone(), format!("{:.0}", speed.pack), format!("{:.0}", speed.unpack)]);
        }
        page.say(&table.text());
    }
    let results = links::results(bench, kept)?;
    if results.iter().all(|row| row.outcomes.iter().all(Option::is_none)) {
        page.say("Slow lines: **not run yet.**");
        return Ok(());
    }
    let done = links::Amount::of(bench);
    page.say(&format!(
        "Seconds a step of nano-llava between a real server and a native participant, through a proxy that delays and limits each direction \
         (its round trip in ms, its rate each way): batches of {}, {} samples, each with a picture of its own, {} passes. First the passes \
         after the first, then the first, in which `low-rank` sends the features too.",
        done.batch, done.samples, done.passes
    ));
    for later in [true, false] {
        let mut head = vec![if later { "later passes" } else { "first pass" }.to_owned()];
        head.extend(links::lines(bench).into_iter().map(links::Line::words));
        let mut table = Table::new(&head);
        for row in &results {
            let mut cells = vec![row.case.variant.name.to_owned()];
            cells.extend(row.outcomes.iter().map(|outcome| match outcome {
                Some(o) => format!("{:.2}", if later { o.later } else { o.first }),
                None => NOTHING.to_owned(),
            }));
            table.row(cells);
        }
        page.say(&table.text());
    }
    let all = || results.iter().flat_map(|row| row.outcomes.iter().flatten());
    let sum = |of: fn(&links::Outcome) -> (u64, u64)| {
        all().map(of).fold((0, 0), |sum, (up, down)| (sum.0 + up, sum.1 + down))
    };
    let ((up, down), (frames_up, frames_down)) = (sum(|o| o.line), sum(|o| o.frames));
    let more =
        |line: u64, frames: u64| format!("{:+.3} %", (line as f64 - frames as f64) / frames.max(1) as f64 * 100.0);
    page.say(&format!(
        "The proxies carried {} up and {} down, the ledgers count {} and {}: {} and {} for the HTTP handshakes and WebSocket's framing.",
        amount(up),
        amount(down),
        amount(frames_up),
        amount(frames_down),
        more(up, frames_up),
        more(down, frames_down),
    ));
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
    }
}
