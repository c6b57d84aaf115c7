//! What the boundary was to reach, and which of its forms do, at the head of the page.

use super::super::accuracy::REFERENCE;
use super::super::kept::Kept;
use super::super::{Bench, DEFAULT, accuracy, scaling, shapes};
use super::task::differences;
use super::{NOTHING, Page, TYPICAL, TYPICAL_WORDS, Table, spread, times_less};
use crate::experiment::statistics::Spread;
use fednano_shared::settings::{BoundaryChoice, Strategy};

/// The plain split's bytes must be at least so many times those of a short form.
const TIMES_LESS: f64 = 20.0;
/// Its accuracy may be so many points off the reference's.
const POINTS: f64 = 0.5;
/// On the mean of so many seeds.
const SEEDS: usize = 3;

/// A line for each short form that was measured.
///
/// # Errors
/// As the page.
pub(super) fn say(bench: &Bench, kept: &Kept, page: &mut Page) -> anyhow::Result<()> {
    let (shape, to) = (shapes::shape(bench)?, shapes::load(bench, Strategy::FedAvg, TYPICAL));
    let others = scaling::others(&shape, &to)?;
    let results = accuracy::results(bench, kept)?;
    let trained: Vec<&accuracy::Row> = results.iter().filter(|row| row.cell.strategy == Strategy::FedAvg).collect();
    let short =
        |c: &shapes::Cell| c.strategy == Strategy::FedAvg && c.variant.mode == BoundaryChoice::LowRank && !c.half;
    let mut table = Table::new(&["", "plain split / this", "LoRA / this", "accuracy, points off", "reached"]);
    let mut any = false;
    for row in shapes::results(bench, kept)?.iter().filter(|row| short(&row.cell)) {
        let (Some(traffic), name) = (row.scaled(bench, &shape, TYPICAL), row.cell.variant.name) else { continue };
        let (total, off) = (traffic.total(), differences(&trained, name));
        let (plain, lora) = (others.plain.total(), others.lora.total());
        let few = plain as f64 >= TIMES_LESS * total as f64 && total < lora;
        let shown = if name == DEFAULT { format!("**{name}** (default)") } else { name.to_owned() };
        let cells =
            [times_less(plain, total), times_less(lora, total), spread(&off, true), reached(few, &off).to_owned()];
        table.row([vec![shown], cells.to_vec()].concat());
        any = true;
    }
    if any {
        page.say(&format!(
            "**What was to be reached**: over {} rounds with {TYPICAL_WORDS} samples at least {TIMES_LESS} times fewer bytes than the plain split, and \
             fewer than LoRA, both in f16; accuracy within {POINTS} points of {REFERENCE}, mean over {SEEDS} seeds or more. With {}:",
            to.rounds,
            Strategy::FedAvg,
        ));
        page.say(&table.text());
    }
    Ok(())
}

/// In a word; `few`: bytes are few enough.
fn reached(few: bool, off: &[f64]) -> &'static str {
    match Spread::of(off) {
        None => NOTHING,
        Some(spread) if !few || spread.mean.abs() > POINTS => "no",
        Some(spread) if spread.n < SEEDS => "too few seeds",
        Some(_) => "yes",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_takes_three_seeds_to_be_reached() {
        let near = [-0.4, 0.1, -0.9];
        assert_eq!(
            [reached(true, &near), reached(true, &near[..2]), reached(false, &near)],
            ["yes", "too few seeds", "no"]
        );
        assert_eq!([reached(true, &[]), reached(true, &[-0.7, -0.6, -0.5])], [NOTHING, "no"]);
    }
}
