//! The reading: sentences chosen by what the results say, with their numbers in them. It claims no more than the intervals do.

use super::compare::{accuracy, local, on_same_updates, paired, row, rows, weights};
use super::grid::{Group, NORMALISED, PRINTED, ROOT, Size, UNIT, base};
use super::statistics::{Spread, Verdict, sign_test};
use super::study::Filled;
use super::tables::difference;
use std::fmt::Write;

/// The row of group H whose runs went on with FedAvg's merge, with Fisher measured in a pass of its own.
const ON_FEDAVG: &str = "fisher, path fedavg";
/// Rows of group H, and what is particular about their runs.
const PATHS: [(&str, &str); 4] = [
    (ON_FEDAVG, "in runs that went on with FedAvg's merge"),
    ("fisher, path fisher", "in runs that went on with Fisher's own merge"),
    ("fisher-ef, path fedavg", "with Fisher taken from the gradients of training"),
    ("fisher-adam, path fedavg", "with Adam's second moment in place of Fisher"),
];
/// A correlation below this is not worth a word.
const WEAK: f64 = 0.3;

/// `docs/results/reading.md`.
pub(super) fn page(size: Size, filled: &[Filled<'_>]) -> String {
    let mut page = String::from(
        "# What the results say\n\nEvery number and every verdict here is computed from [runs.jsonl](runs.jsonl), by `fednano paper`. \
         *Better* and *worse* mean that the 95 % t interval of the mean difference lies on one side of 0; otherwise two ways are *not \
         distinguishable* by these runs, which is not the same as equal.\n\n",
    );
    if size == Size::Quick {
        page += "**Written from a quick run: only its form means anything.**\n\n";
    }
    let parts: [(&str, String); 6] = [
        ("Does Fisher merging beat plain averaging?", fisher_or_not(filled)),
        ("Where the weights come from", causes(filled)),
        ("Do the variants help?", remedies(filled)),
        ("The other strategies", strategies(filled)),
        ("The other factors", factors(filled)),
        ("What this cannot say", limits(size, filled)),
    ];
    for (title, text) in parts {
        // A String takes whatever is written.
        let _ = write!(page, "## {title}\n\n{}\n\n", if text.is_empty() { "Not run." } else { text.trim_end() });
    }
    page
}

/// A list item.
fn item(text: &mut String, sentence: &str) {
    let _ = writeln!(text, "- {sentence}");
}

/// "A is better than B: +1.20 ± 0.50 points (9 pairs)"
fn verdict(name: &str, against: &str, values: &[f64], of: &str) -> Option<String> {
    let spread = Spread::of(values)?;
    let words = spread.verdict().words();
    let figures = match spread.half_width() {
        Some(half) => format!("{:+.2} ± {half:.2} points over {} {of}", spread.mean, spread.n),
        None => format!("{:+.2} points in a single pair, which decides nothing", spread.mean),
    };
    Some(format!("`{name}` is {words} `{against}`: {figures}"))
}

fn fisher_or_not(filled: &[Filled<'_>]) -> String {
    let mut text = String::new();
    for (path, how) in PATHS {
        for rule in ["fisher", PRINTED] {
            let found = on_same_updates(filled, path, rule, None);
            if let Some(sentence) = verdict(rule, "fedavg", &found.runs, "runs") {
                item(
                    &mut text,
                    &format!(
                        "On the same updates, {how}, {sentence} (rounds better {}, worse {}, equal {}; sign test p = {:.3}).",
                        found.above,
                        found.below,
                        found.equal,
                        sign_test(found.above, found.below)
                    ),
                );
            }
        }
    }
    for name in ["fisher", PRINTED, "fisher-ef", "fisher-adam"] {
        let pairs = paired(filled, Group::A, (name, "fedavg"), None, accuracy);
        if let Some(sentence) = verdict(name, "fedavg", &pairs, "pairs of runs of one seed and alpha") {
            item(&mut text, &format!("At the end of whole runs {sentence}; by alpha: {}.", by_column(filled, name)));
        }
    }
    let own = paired(filled, Group::A, ("fisher", "fedavg"), None, local);
    if let Some(sentence) = verdict("fisher", "fedavg", &own, "pairs") {
        item(&mut text, &format!("On the clients' own test questions {sentence}."));
    }
    text
}

/// A row less FedAvg in each column of group A.
fn by_column(filled: &[Filled<'_>], name: &str) -> String {
    let of = |column: &str| {
        let pairs = paired(filled, Group::A, (name, "fedavg"), Some(column), accuracy);
        format!("{column}: {}", difference(&pairs))
    };
    super::compare::columns(filled, Group::A).into_iter().map(of).collect::<Vec<_>>().join(", ")
}

fn causes(filled: &[Filled<'_>]) -> String {
    let weights = weights(filled, ON_FEDAVG);
    let (Some(first), Some(last)) = (weights.first(), weights.last()) else { return String::new() };
    let mut text = String::from(
        "`up` starts at 0, so in the first step of round 1 `down` has no gradient. Fisher is measured after local training, where `up` \
         is not 0 any more (`shared/src/aggregate/fisher.rs` has the derivation). Measured, in runs that went on with FedAvg's merge, by \
         the formula as printed:\n\n\
         | round | share of `down` in an update's Fisher mass | largest client's share: by samples, in `down`, in `up` | weight beyond \
         samples against training loss (`down`, `up`) | against samples (`down`, `up`) |\n| --- | --- | --- | --- | --- |\n",
    );
    let r = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |r| format!("{r:+.2}"));
    for w in &weights {
        let (plain, down, up) = w.largest;
        let _ = writeln!(
            text,
            "| {} | {:.1} % | {:.0} %, {:.0} %, {:.0} % | {}, {} | {}, {} |",
            w.round,
            w.down_mass * 100.0,
            plain * 100.0,
            down * 100.0,
            up * 100.0,
            r(w.with_loss.0),
            r(w.with_loss.1),
            r(w.with_samples.0),
            r(w.with_samples.1)
        );
    }
    let updates = || weights.iter().map(|w| w.updates);
    let updates = match (updates().min().unwrap_or(0), updates().max().unwrap_or(0)) {
        (fewest, most) if fewest == most => most.to_string(),
        (fewest, most) => format!("{fewest} to {most}"),
    };
    let _ = writeln!(
        text,
        "\nThe last two columns are correlations over {updates} updates a round: of the logarithm of a client's share over its share of the \
         samples, with its training loss less the round's mean, and with the logarithm of its samples.\n"
    );
    if first.round != last.round {
        let times = last.down_mass / first.down_mass;
        let change = if times > 1.25 {
            "so `down` does begin with little Fisher, and gains"
        } else if times < 0.8 {
            "so `down` does not begin with little Fisher: it loses"
        } else {
            "so the start at 0 leaves no mark on it by the time that Fisher is measured"
        };
        item(
            &mut text,
            &format!(
                "`down` has {:.1} % of the Fisher mass in round {} and {:.1} % in round {}: {change}. What is small for all clients \
                 alike cancels in the merge, which divides by the clients' sum at the same value.",
                first.down_mass * 100.0,
                first.round,
                last.down_mass * 100.0,
                last.round
            ),
        );
    }
    let (plain, down, up) = first.largest;
    item(
        &mut text,
        &format!(
            "In round {} the largest client has {:.0} % of the weight by samples, {:.0} % in `down` and {:.0} % in `up` by Fisher.",
            first.round,
            plain * 100.0,
            down * 100.0,
            up * 100.0
        ),
    );
    type Pair = (Option<f64>, Option<f64>);
    let correlations = |of: &dyn Fn(&super::compare::Weights) -> Pair| {
        let all = weights.iter().flat_map(|w| [of(w).0, of(w).1]).flatten().collect::<Vec<f64>>();
        Spread::of(&all).map(|s| s.mean)
    };
    if let Some(mean) = correlations(&|w| w.with_loss) {
        let sense = if mean > WEAK {
            "clients that have fitted their samples least weigh most beyond their samples: the level of the loss is a weight that nobody asked for"
        } else if mean < -WEAK {
            "clients with a low loss weigh most beyond their samples"
        } else {
            "the level of the loss explains little of what clients weigh beyond their samples"
        };
        item(
            &mut text,
            &format!(
                "With the training loss the weights correlate by {mean:+.2} on the mean of rounds and sides: {sense}."
            ),
        );
    }
    if let Some(mean) = correlations(&|w| w.with_samples) {
        let sense = if mean > WEAK {
            "who has more samples, and so takes more steps, weighs more than by its samples"
        } else if mean < -WEAK {
            "who has more samples weighs less than by its samples"
        } else {
            "the number of samples explains little of it"
        };
        item(&mut text, &format!("With the number of samples they correlate by {mean:+.2}: {sense}."));
    }
    text
}

fn remedies(filled: &[Filled<'_>]) -> String {
    let mut text = String::new();
    let mut better = Vec::new();
    for rule in [NORMALISED, ROOT, UNIT] {
        let found = on_same_updates(filled, ON_FEDAVG, rule, None);
        let plain = on_same_updates(filled, ON_FEDAVG, "fisher", None);
        // Both are less FedAvg on the same updates, run by run.
        let gain: Vec<f64> = found.runs.iter().zip(&plain.runs).map(|(a, b)| a - b).collect();
        let sentences = [verdict(rule, "fedavg", &found.runs, "runs"), verdict(rule, "fisher", &gain, "runs")]
            .into_iter()
            .flatten();
        let sentences: Vec<String> = sentences.collect();
        if !sentences.is_empty() {
            item(&mut text, &format!("On the same updates {}.", sentences.join("; ")));
        }
        let whole: Vec<String> = ["fisher", "fedavg"]
            .into_iter()
            .filter_map(|against| {
                let pairs = paired(filled, Group::A, (rule, against), None, accuracy);
                verdict(rule, against, &pairs, "pairs")
            })
            .collect();
        if !whole.is_empty() {
            item(&mut text, &format!("At the end of whole runs {}.", whole.join("; ")));
        }
        let pairs = paired(filled, Group::A, (rule, "fedavg"), None, accuracy);
        if Spread::of(&pairs).is_some_and(|s| s.verdict() == Verdict::Better) {
            better.push(format!("`{rule}`"));
        }
    }
    if !text.is_empty() {
        let end = if better.is_empty() {
            "No variant of Fisher merging beats `fedavg` at the end of whole runs beyond doubt.".to_owned()
        } else {
            format!("Beyond doubt better than `fedavg` at the end of whole runs: {}.", better.join(", "))
        };
        let _ = write!(text, "\n{end}");
    }
    text
}

fn strategies(filled: &[Filled<'_>]) -> String {
    let mut text = String::new();
    let special = ["fedavg", "fisher", "fisher-ef", "fisher-adam", PRINTED, NORMALISED, ROOT, UNIT];
    for name in rows(filled, Group::A).into_iter().filter(|name| !special.contains(name)) {
        let pairs = paired(filled, Group::A, (name, "fedavg"), None, accuracy);
        let Some(sentence) = verdict(name, "fedavg", &pairs, "pairs") else { continue };
        let own = paired(filled, Group::A, (name, "fedavg"), None, local);
        let own = match Spread::of(&own) {
            Some(_) => format!("; on the clients' own test questions {}", difference(&own)),
            None => String::new(),
        };
        item(&mut text, &format!("{sentence}; by alpha: {}{own}.", by_column(filled, name)));
    }
    text
}

/// Fisher less FedAvg in each column, and how far the columns are apart.
fn factors(filled: &[Filled<'_>]) -> String {
    let mut text = String::new();
    for group in [Group::B, Group::C, Group::D, Group::E, Group::F, Group::G] {
        let mut parts = Vec::new();
        for cell in row(filled, group, "fedavg") {
            let column = cell.cell.column.as_str();
            let values: Vec<f64> = cell.records.iter().filter_map(|record| accuracy(record)).collect();
            let Some(plain) = Spread::of(&values) else { continue };
            let fisher = difference(&paired(filled, group, ("fisher", "fedavg"), Some(column), accuracy));
            parts.push(format!("{column}: {:.1} %, {fisher}", plain.mean));
        }
        if !parts.is_empty() {
            let title = group.title();
            item(
                &mut text,
                &format!("{title} (`fedavg`, then `fisher` less `fedavg` in points): {}.", parts.join("; ")),
            );
        }
    }
    text
}

fn limits(size: Size, filled: &[Filled<'_>]) -> String {
    let (simulation, settings) = base(size);
    let mut text = String::new();
    let mut seeds: Vec<u64> = filled.iter().flat_map(|f| &f.records).map(|record| record.seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    let shown = seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    item(
        &mut text,
        &format!(
            "{} seeds ({shown}): a seed deals the samples, and sets the adapters' start and the order.",
            seeds.len()
        ),
    );
    // The standard error of a share near one half, at its largest.
    let error = 50.0 / (simulation.test_limit.max(1) as f64).sqrt();
    item(
        &mut text,
        &format!(
            "{} test questions: a single accuracy is uncertain by up to {error:.1} points (standard error). All runs are judged with the \
             same questions, so differences between runs are surer than that, but what holds for these questions may not hold for others.",
            simulation.test_limit
        ),
    );
    item(
        &mut text,
        &format!(
            "One small model (nano-llava), one learning rate for all strategies ({}), not tuned for each; {} rounds. Many comparisons are \
             made here: were nothing different at all, one in twenty intervals would miss 0 all the same.",
            settings.learning_rate, settings.rounds
        ),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::super::compare::tests::{cell, record};
    use super::super::figures::{Contribution, MergedRound};
    use super::*;

    #[test]
    fn verdicts_follow_the_intervals() {
        let said = |values: &[f64]| verdict("a", "b", values, "runs").unwrap();
        assert_eq!(said(&[1.0, 1.1, 0.9]), "`a` is better than `b`: +1.00 ± 0.25 points over 3 runs");
        assert!(said(&[-1.0, -1.1, -0.9]).contains("worse than"));
        assert!(said(&[1.0, -1.1, 0.9]).contains("not distinguishable from"));
        assert!(said(&[5.0]).contains("decides nothing"));
        assert!(verdict("a", "b", &[], "runs").is_none());
    }

    #[test]
    fn nothing_is_read_into_nothing() {
        let page = page(Size::Full, &[]);
        assert!(page.contains("Not run.") && !page.contains("NaN"), "{page}");
    }

    #[test]
    fn the_reading_has_the_runs_numbers() {
        let (fisher, fedavg) = (cell(Group::A, "fisher", "1"), cell(Group::A, "fedavg", "1"));
        let h = cell(Group::H, ON_FEDAVG, "1");
        let merged = |round, down| MergedRound {
            round,
            rules: [("fedavg".to_owned(), (0.5, 1.0)), ("fisher".to_owned(), (0.51, 1.0))].into(),
            clients: vec![
                Contribution { samples: 10, loss: 1.0, down, up: 1.0, share_down: 0.7, share_up: 0.6 },
                Contribution { samples: 20, loss: 0.2, down, up: 1.0, share_down: 0.3, share_up: 0.4 },
            ],
        };
        let merges = || vec![merged(1, 0.001), merged(2, 1.0)];
        let mine = [record(1, 0.6, vec![]), record(2, 0.61, vec![]), record(3, 0.62, vec![])];
        let theirs = [record(1, 0.5, vec![]), record(2, 0.51, vec![]), record(3, 0.52, vec![])];
        let same = [record(1, 0.5, merges()), record(2, 0.5, merges())];
        let filled = [
            Filled { cell: &fisher, records: mine.iter().collect() },
            Filled { cell: &fedavg, records: theirs.iter().collect() },
            Filled { cell: &h, records: same.iter().collect() },
        ];
        let page = page(Size::Full, &filled);
        for part in [
            "At the end of whole runs `fisher` is better than `fedavg`: +10.00",
            "by alpha: 1: +10.00",
            "On the same updates, in runs that went on with FedAvg's merge, `fisher` is better than `fedavg`: +1.00",
            "| 1 | 0.1 % | 67 %, 70 %, 60 % |",
            "gains",
            "nobody asked for",
            "3 seeds (1, 2, 3)",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
    }
}
