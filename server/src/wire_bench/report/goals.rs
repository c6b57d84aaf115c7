//! What the boundary was to reach, and which of its forms do, at the head of the page.

use super::super::accuracy::REFERENCE;
use super::super::kept::Kept;
use super::super::{Bench, accuracy, scaling, shapes};
use super::{NOTHING, Page, TYPICAL, TYPICAL_WORDS, Table, differences, largest, spread, times_less};
use crate::experiment::statistics::Spread;
use fednano_shared::settings::{BoundaryChoice, Strategy};

/// The plain split's bytes must be at least so many times those of a short form.
const TIMES_LESS: f64 = 20.0;
/// Its accuracy may be so many points off the reference's.
const POINTS: f64 = 0.5;

/// A line for each short form that was measured.
///
/// # Errors
/// As the page.
pub(super) fn say(bench: &Bench, kept: &Kept, page: &mut Page) -> anyhow::Result<()> {
    let (shape, to) = (shapes::shape(bench)?, shapes::load(bench, Strategy::FedAvg, TYPICAL));
    let others = scaling::others(&shape, &to)?;
    let results = accuracy::results(bench, kept)?;
    let trained: Vec<&accuracy::Row> = results.iter().filter(|row| row.cell.strategy == Strategy::FedAvg).collect();
    let short = |c: &shapes::Cell| c.strategy == Strategy::FedAvg && c.variant.mode == BoundaryChoice::LowRank;
    let mut table = Table::new(&["", "plain split / this", "LoRA / this", "accuracy, points off", "reached"]);
    let mut any = false;
    for row in shapes::results(bench, kept)?.iter().filter(|row| short(&row.cell)) {
        let (Some((from, traffic)), name) = (largest(row, bench), row.cell.variant.name) else { continue };
        let total = scaling::scaled(&traffic, &from, &to, shapes::matrices(&row.cell, &shape)).total();
        let off = differences(&trained, name);
        let few = others.plain() as f64 >= TIMES_LESS * total as f64 && total < others.lora();
        let reached = match Spread::of(&off) {
            None => NOTHING,
            Some(Spread { mean, n, .. }) if few && mean.abs() <= POINTS && n >= bench.seeds.len() => "yes",
            Some(_) => "no",
        };
        let cells = [times_less(others.plain(), total), times_less(others.lora(), total), spread(&off, true)];
        table.row([vec![name.to_owned()], cells.to_vec(), vec![reached.to_owned()]].concat());
        any = true;
    }
    if any {
        page.say(&format!(
            "**What was to be reached**: over {} rounds with {TYPICAL_WORDS} samples at least {TIMES_LESS} times fewer bytes than the plain split, and \
             fewer than LoRA; accuracy within {POINTS} points of {REFERENCE}, mean over {} seed{}. With {}:",
            to.rounds,
            bench.seeds.len(),
            if bench.seeds.len() == 1 { "" } else { "s" },
            Strategy::FedAvg,
        ));
        page.say(&table.text());
    }
    Ok(())
}
