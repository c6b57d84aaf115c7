//! Bytes at a large shape: as they were measured, and by rules with more samples, beside what others would send.

use super::super::accuracy::STRATEGIES;
use super::super::kept::Kept;
use super::super::scaling::{self, Both, Load, Others};
use super::super::{Bench, DEFAULT, links, shapes};
use super::{NOTHING, Page, TYPICAL, TYPICAL_WORDS, Table, amount, by_kind, duration, less, off, percent, times_less};
use fednano_shared::ledger::Traffic;
use fednano_shared::settings::{FederationSettings, Format, Strategy};
use fednano_shared::wire::agreement::FISHER_GROUP;

/// A section.
///
/// # Errors
/// As the page.
pub(super) fn say(bench: &Bench, kept: &Kept, page: &mut Page) -> anyhow::Result<()> {
    let shape = shapes::shape(bench)?;
    let rows = shapes::results(bench, kept)?;
    introduction(bench, &shape, page);
    let all = || rows.iter().flat_map(|row| row.outcomes(bench)).map(|(_, outcome)| outcome);
    let (runs, differing) = (all().count(), all().filter(|o| o.client != o.server).count());
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
        let own: Vec<&shapes::Row> = rows.iter().filter(|r| r.cell.strategy == strategy && !r.cell.half).collect();
        page.say(&format!("### {strategy}: measured, {} samples, MB", bench.samples));
        let measured: Vec<(&str, Traffic)> =
            own.iter().filter_map(|row| Some((row.cell.variant.name, row.once.as_ref()?.client))).collect();
        page.say(&by_kind(&measured));
        page.say(&format!("### {strategy}: {TYPICAL_WORDS} samples, by the rules below"));
        let others = scaling::others(&shape, &shapes::load(bench, strategy, TYPICAL))?;
        page.say(&scaled(&own, bench, &others, &shape));
        page.say(&break_even(&own, bench, &others, &shape));
    }
    let load = shapes::load(bench, Strategy::FedAvg, TYPICAL);
    let others = scaling::others(&shape, &load)?;
    explanations(&shape, &others, page);
    room(&rows, bench, &shape, &others, page);
    split_com(&rows, bench, &shape, page)?;
    line_time(&rows, bench, &shape, &others, page);
    rules(&rows, bench, &shape, page);
    Ok(())
}

fn introduction(bench: &Bench, shape: &scaling::Shape, page: &mut Page) {
    let load = shapes::load(bench, Strategy::FedAvg, bench.samples);
    let name = if bench.quick() { "a tiny shape" } else { "LLaVA-1.5-7B's shape" };
    page.say(&format!("## Bytes at {name}"));
    page.say(&format!(
        "Width {}, rank {}, {} image and {} text positions a sample ({} of them the answer's), {} rounds of one epoch, batches of {}. \
         Measured on the real protocol (sessions, coordinator, store, participants) with random weights: the LLM has one thin decoder layer, since \
         bytes do not depend on depth, and features are random numbers, each sample with a picture of its own. So nothing is deflated \
         here: random numbers would say nothing about that. Answers use ids below {}, which take 2 bytes each, where a larger vocabulary \
         needs a third for some. A second participant with one sample sees to it that merging changes the adapters. With fisher, each round's \
         Fisher pass goes over all samples (`fisher_samples` is 0 here; its default, {}, makes passes shorter for whoever has more).",
        shape.config.text.hidden,
        shape.rank,
        shape.config.image_tokens(),
        shape.question + shape.answer,
        shape.answer,
        load.rounds,
        load.batch,
        shapes::HEAD,
        FederationSettings::default().fisher_samples,
    ));
}

fn scaled(rows: &[&shapes::Row], bench: &Bench, others: &Others, shape: &scaling::Shape) -> String {
    let mut table = Table::new(&[
        "",
        "up",
        "down",
        "total",
        "plain split / this",
        "LoRA / this",
        "up, less than plain",
        "total, less than plain",
        "total with edge bundle in f16 (default)",
        "plain split / this, both with it",
        "the same with it in int8",
    ]);
    let mut add = |name: &str, bytes: Both, with_edge: bool| {
        let total = bytes.total();
        let mut row = vec![name.to_owned()];
        row.extend([bytes.up, bytes.down, total].map(amount));
        row.extend([times_less(others.plain.total(), total), times_less(others.lora.total(), total)]);
        row.extend([less(bytes.up, others.plain.up), less(total, others.plain.total())]);
        if with_edge {
            let with = |edge: u64| times_less(others.plain.total() + edge, total + edge);
            row.extend([amount(total + others.edge), with(others.edge), with(others.edge_int8)]);
        } else {
            row.extend([NOTHING; 3].map(str::to_owned));
        }
        table.row(row);
    };
    add("plain f16 split, by formula", others.plain, true);
    add("plain split in int8, by formula", others.plain_int8, true);
    for row in rows {
        if let Some(ours) = row.scaled(bench, shape, TYPICAL) {
            add(row.cell.variant.name, both(&ours), true);
        }
    }
    add("LoRA and connector in f16, by formula", others.lora, false);
    add("LoRA and connector in int8, by formula", others.lora_int8, false);
    table.text()
}

fn both(traffic: &Traffic) -> Both {
    Both { up: traffic.up.total(), down: traffic.down.total() }
}

/// Up to how many samples the default sends less than LoRA does.
fn break_even(rows: &[&shapes::Row], bench: &Bench, others: &Others, shape: &scaling::Shape) -> String {
    let Some(row) = rows.iter().find(|row| row.cell.variant.name == DEFAULT) else { return String::new() };
    if row.once.is_none() {
        return String::new();
    }
    let total = |samples: u64| row.scaled(bench, shape, samples).map_or(0, |traffic| traffic.total());
    let words = |lora: Both| match scaling::most_samples(lora.total(), total) {
        Some(samples) => format!("with up to {samples} samples"),
        None => "with no number of samples".to_owned(),
    };
    format!(
        "{DEFAULT} sends no more than LoRA in f16 {}, and no more than LoRA in int8 {}: LoRA's bytes do not grow with samples.",
        words(others.lora),
        words(others.lora_int8)
    )
}

fn explanations(shape: &scaling::Shape, others: &Others, page: &mut Page) {
    page.say(&format!(
        "The **plain split** sends hidden states up and their gradients down in f16, as often as ours passes a sample through the boundary \
         (Fisher passes too), and adapters and Fisher values in f16; nothing else is charged to it. **LoRA** is of rank {} on all linear layers \
         of all {} decoder layers, with the whole connector, in f16, up and down in each round; it needs the whole model on the \
         participant's device ({}), which is not counted. **In int8** each position of the plain split's hidden states and gradients has a \
         scale of 2 bytes (D values are D + 2 bytes; adapters and Fisher values stay in f16), and so has each row of LoRA's factors \
         `[out, r]` and `[r, in]` and of the connector's matrices (its biases stay in f16); what that costs in accuracy is measured for the \
         plain split alone, below. All ratios and shares are to those in f16. The **edge bundle** is {} in f16, the default of `--edge-dtype`, and {} in int8, once; \
         ours and the plain split need it alike, and only the last three columns count it.",
        shape.rank,
        shape.config.text.layers,
        amount(others.whole),
        amount(others.edge),
        amount(others.edge_int8),
    ));
}

/// Memory of servers, GiB.
const MEMORY: [u64; 4] = [4, 16, 64, 256];

/// What the server's cache must have room for, and what it costs where it has not.
fn room(rows: &[shapes::Row], bench: &Bench, shape: &scaling::Shape, others: &Others, page: &mut Page) {
    let (image, dim) = (shape.config.image_tokens() as u64, shape.config.text.hidden as u64);
    let of_one = |format: Format| TYPICAL * format.bytes(image, dim);
    page.say(&format!(
        "**These figures hold only where the server's cache (`--feature-cache`) has room for the features of all participants at once**, and \
         grow beyond it: with less room features are asked for again. One participant with {TYPICAL_WORDS} pictures takes {} in int8. Of such \
         participants there is room for:",
        amount(of_one(Format::Int8))
    ));
    let mut head = vec!["features in".to_owned()];
    head.extend(MEMORY.map(|gibibytes| format!("{gibibytes} GiB")));
    let mut table = Table::new(&head);
    for format in Format::ALL {
        let mut row = vec![format.to_string()];
        row.extend(MEMORY.map(|gibibytes| (gibibytes << 30) / of_one(format)).map(|number| number.to_string()));
        table.row(row);
    }
    page.say(&table.text());
    let default = |half: bool| {
        let is = |row: &&shapes::Row| row.cell.variant.name == DEFAULT && row.cell.half == half;
        rows.iter().find(|row| row.cell.strategy == Strategy::FedAvg && is(row))
    };
    let once = |half: bool| default(half).and_then(|row| row.once.as_ref()).map(|outcome| outcome.client);
    if let (Some(whole), Some(half)) = (once(false), once(true)) {
        let mut table = Table::new(&["", "up: features, MB", "total, MB", "features / room for all"]);
        for (name, traffic) in [("room for all features", whole), ("with a cache of half of the features", half)] {
            let megabytes = [traffic.up.features, traffic.total()].map(|bytes| format!("{:.2}", bytes as f64 / 1e6));
            let more = times_less(traffic.up.features, whole.up.features);
            table.row([vec![name.to_owned()], megabytes.to_vec(), vec![more]].concat());
        }
        page.say(&format!(
            "Measured with {}, {DEFAULT} and {} samples, asking again included:",
            Strategy::FedAvg,
            bench.samples
        ));
        page.say(&table.text());
    }
    if let Some(ours) = default(false).and_then(|row| row.scaled(bench, shape, TYPICAL)) {
        let load = shapes::load(bench, Strategy::FedAvg, TYPICAL);
        let none = ours.total() + ours.up.features / TYPICAL * (load.passes() - TYPICAL);
        page.say(&format!(
            "Without any room each pass sends all features again: {} with {TYPICAL_WORDS} samples, by formula, {} times less than the plain split.",
            amount(none),
            times_less(others.plain.total(), none)
        ));
    }
}

/// What SplitCom reports: share less up, share less in total.
const SPLIT_COM: [f64; 2] = [0.986, 0.958];

fn split_com(rows: &[shapes::Row], bench: &Bench, shape: &scaling::Shape, page: &mut Page) -> anyhow::Result<()> {
    let [up, total] = SPLIT_COM.map(percent);
    page.say(&format!(
        "SplitCom (arXiv 2602.10564) reports up to {up} less uplink in its standard configuration and up to {total} less in total in its \
         U-shaped one, against its own uncompressed split, with other models and tasks: figures as published, beside ours, which nobody has run \
         against each other. Ours are meant so: *up* is everything that the participant sends in the whole federation, features, ids, \
         labels, adapters and control included, against everything that the plain f16 split sends up; *total* is the same of both \
         directions. Labels go to the server, as in its standard configuration."
    ));
    for row in rows.iter().filter(|row| row.cell.variant.name == DEFAULT && !row.cell.half) {
        let others = scaling::others(shape, &shapes::load(bench, row.cell.strategy, TYPICAL))?;
        if let Some(ours) = row.scaled(bench, shape, TYPICAL) {
            page.say(&verdict(row.cell.strategy, both(&ours), others.plain));
        }
    }
    Ok(())
}

/// Whether ours are as much less as SplitCom's, in words.
fn verdict(strategy: Strategy, ours: Both, plain: Both) -> String {
    let words = |ours: u64, plain: u64, theirs: f64| {
        let share = 1.0 - ours as f64 / plain.max(1) as f64;
        (percent(share), percent(theirs), if share >= theirs { "is" } else { "is not" })
    };
    let [bound_up, bound_total] = SPLIT_COM;
    let (up, theirs_up, is_up) = words(ours.up, plain.up, bound_up);
    let (total, theirs_total, is_total) = words(ours.total(), plain.total(), bound_total);
    format!(
        "With {strategy}, {DEFAULT} sends {up} less up ({theirs_up} {is_up} reached) and {total} less in total ({theirs_total} {is_total} reached)."
    )
}

/// How long a line is busy, without waiting, computing and connecting.
fn line_time(rows: &[shapes::Row], bench: &Bench, shape: &scaling::Shape, others: &Others, page: &mut Page) {
    let is = |row: &&shapes::Row| row.cell.variant.name == DEFAULT && row.cell.strategy == Strategy::FedAvg;
    let ours = rows.iter().filter(is).find(|row| !row.cell.half).and_then(|row| row.scaled(bench, shape, TYPICAL));
    let Some(ours) = ours else { return };
    let mut head = vec![String::new()];
    let mut megabits = links::MEGABITS;
    megabits.sort_unstable();
    head.extend(megabits.iter().flat_map(|rate| ["up", "down"].map(|way| format!("{way}, {rate} Mbit/s"))));
    let mut table = Table::new(&head);
    for (name, bytes) in
        [("plain f16 split", others.plain), (DEFAULT, both(&ours)), ("LoRA and connector in f16", others.lora)]
    {
        let seconds = |bytes: u64, rate: u64| bytes as f64 * 8.0 / (rate as f64 * 1e6);
        let mut row = vec![name.to_owned()];
        row.extend(megabits.iter().flat_map(|rate| [bytes.up, bytes.down].map(|way| duration(seconds(way, *rate)))));
        table.row(row);
    }
    page.say("### How long the line alone takes, by formula");
    page.say(&format!(
        "The bytes of the whole federation with {} and {TYPICAL_WORDS} samples by the line's rate: no round trips, no computing, no edge bundle. \
         A step waits for its answer, so up and down add up:",
        Strategy::FedAvg
    ));
    page.say(&table.text());
}

fn rules(rows: &[shapes::Row], bench: &Bench, shape: &scaling::Shape, page: &mut Page) {
    let second = shapes::second(bench);
    let Load { batch, .. } = shapes::load(bench, Strategy::FedAvg, second);
    let (requests, group) = (second.div_ceil(batch), FISHER_GROUP as u64);
    page.say("### The rules, and how well they forecast");
    page.say(&format!(
        "Features grow with samples; text, labels, codes and activations, and their gradients, with passes of samples through the boundary; \
         matrices with steps (upward one more a round before a Fisher pass), and so do their gradients, whose size is known; squares of \
         gradients with groups of {group} Fisher requests; adapters and Fisher values with rounds; a byte for each tensor in f16 and the length of each \
         list of labels with requests, and so does control. From a run with {} samples, forecast for {second} ({requests} requests a \
         pass, the last of them of {} samples; {} groups of Fisher requests), against a run with so many:",
        bench.samples,
        second - (requests - 1) * batch,
        requests.div_ceil(group),
    ));
    let mut table = Table::new(&["", "total but control", "the kind furthest off", "control"]);
    for row in rows {
        let Some(found) = row.deviation(bench, shape) else { continue };
        table.row(vec![
            row.name(),
            off(found.total),
            format!("{} ({})", off(found.worst), found.what),
            format!("{:+.1} %", found.control * 100.0),
        ]);
    }
    page.say(&table.text());
    page.say(
        "Numbers of requests and the like have 1 to 5 digits on the wire, and how often the status is sent depends on time: hence control.",
    );
}

#[cfg(test)]
mod tests {
    use super::super::tests::bench;
    use super::*;
    use fednano_shared::ledger::Kind;

    #[test]
    fn the_verdict_compares_each_share_with_its_own() {
        let plain = Both { up: 1000, down: 1000 };
        let words = |up, down| verdict(Strategy::FedAvg, Both { up, down }, plain);
        assert_eq!(
            words(60, 16),
            "With fedavg, low-rank int8 sends 94.0 % less up (98.6 % is not reached) and 96.2 % less in total (95.8 % is reached)."
        );
        assert!(
            words(13, 101)
                .contains("98.7 % less up (98.6 % is reached) and 94.3 % less in total (95.8 % is not reached)")
        );
    }

    /// All rows without runs, but the default's one with fedavg, and that with half a cache.
    fn rows(features: u64, again: u64) -> Vec<shapes::Row> {
        let of = |cell: shapes::Cell| {
            let mut client = Traffic::default();
            client.up.count(Kind::Features, if cell.half { again } else { features });
            client.up.count(Kind::Codes, 8_000);
            let wanted = cell.variant.name == DEFAULT && cell.strategy == Strategy::FedAvg;
            let once = wanted.then_some(shapes::Outcome { client, server: client, seconds: 1.0 });
            shapes::Row { cell, once, twice: None }
        };
        shapes::cells().into_iter().map(of).collect()
    }

    #[test]
    fn a_cache_of_half_of_the_features_is_shown_beside_the_whole() {
        let bench = bench();
        let shape = shapes::shape(&bench).unwrap();
        let others = scaling::others(&shape, &shapes::load(&bench, Strategy::FedAvg, TYPICAL)).unwrap();
        let mut page = Page(String::new());
        room(&rows(8_000_000, 14_000_000), &bench, &shape, &others, &mut page);
        assert!(page.0.contains("| with a cache of half of the features | 14.00 | 14.01 | 1.75 |"), "{}", page.0);
        // A pass more: 1,000 pictures of a megabyte each, and a thousand codes of 1,000 bytes.
        assert!(page.0.contains("again: 2.00 GB with 1,000 samples"), "{}", page.0);
        // Features of 16 positions, 96 wide.
        assert!(page.0.contains(&format!("| f32 | {} |", (4u64 << 30) / 6_144_000)), "{}", page.0);
    }

    #[test]
    fn the_line_is_busy_for_as_long_as_its_rate_says() {
        let bench = bench();
        let shape = shapes::shape(&bench).unwrap();
        let others = scaling::others(&shape, &shapes::load(&bench, Strategy::FedAvg, TYPICAL)).unwrap();
        let mut page = Page(String::new());
        line_time(&rows(8_000_000, 0), &bench, &shape, &others, &mut page);
        // 1,001 MB at 2 Mbit/s are 4,004 seconds.
        assert!(page.0.contains("| low-rank int8 | 1.1 h | 0.0 s |"), "{}", page.0);
        assert!(page.0.contains("up, 2 Mbit/s | down, 2 Mbit/s | up, 20 Mbit/s"), "{}", page.0);
    }

    #[test]
    fn break_even_is_where_totals_meet() {
        let bench = bench();
        let shape = shapes::shape(&bench).unwrap();
        let rows = rows(8_000_000, 0);
        let rows: Vec<&shapes::Row> = rows.iter().filter(|row| !row.cell.half).take(5).collect();
        let others = scaling::others(&shape, &shapes::load(&bench, Strategy::FedAvg, TYPICAL)).unwrap();
        let lora = |bytes| Both { up: bytes, down: 0 };
        let others = Others { lora: lora(20_020_500), lora_int8: lora(1_000_999), ..others };
        let words = break_even(&rows, &bench, &others, &shape);
        assert!(words.contains("LoRA in f16 with up to 20 samples"), "{words}");
        assert!(words.contains("LoRA in int8 with no number of samples"), "{words}");
    }
}
