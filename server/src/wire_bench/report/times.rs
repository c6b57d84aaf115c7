//! What differs from run to run and from machine to machine.

use super::super::kept::Kept;
use super::super::setup::Machine;
use super::super::{Bench, codec, links};
use super::{NOTHING, Page, Table, amount};
use std::collections::BTreeSet;

/// A section.
///
/// # Errors
/// As the page.
pub(super) fn say(bench: &Bench, kept: &Kept, page: &mut Page) -> anyhow::Result<()> {
    page.say("## Times");
    page.say("**These differ from run to run and from machine to machine.**");
    if let Some(outcome) = codec::result(bench, kept)? {
        page.say(&format!(
            "Packing and unpacking `g` of the step above, million values a second, one core ({}):",
            outcome.machine.words()
        ));
        let mut table = Table::new(&["", "pack", "unpack"]);
        for speed in &outcome.speeds {
            table.row(vec![speed.how.clone(), format!("{:.0}", speed.pack), format!("{:.0}", speed.unpack)]);
        }
        page.say(&table.text());
    }
    let results = links::results(bench, kept)?;
    let all: Vec<&links::Outcome> = results.iter().flat_map(|row| row.outcomes.iter().flatten()).collect();
    if all.is_empty() {
        page.say("Slow lines: **not run yet.**");
        return Ok(());
    }
    let done = links::Amount::of(bench);
    page.say(&format!(
        "Seconds a step of nano-llava between a real server and a native participant, both on one machine ({}), through a proxy that delays and \
         limits each direction (its round trip in ms, its rate each way): batches of {}, {} samples, each with a picture of its own, {} passes. \
         First the passes after the first, then the first, in which `low-rank` sends the features too. One run a cell, {} later steps, so differences \
         of some hundredths say nothing; one run before all others is not counted. A step is from codes to optimiser: the transfer of adapters, \
         merging and evaluating are not in it. The line keeps its rate from the first byte on and loses nothing: TCP's slow start and losses, \
         which a real line has, are not emulated.",
        machines(&all),
        done.batch,
        done.samples,
        done.passes,
        done.later_steps()
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
    let sum = |of: fn(&links::Outcome) -> (u64, u64)| {
        all.iter().map(|outcome| of(outcome)).fold((0, 0), |sum, (up, down)| (sum.0 + up, sum.1 + down))
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

/// Whose times they are, in words.
fn machines(all: &[&links::Outcome]) -> String {
    let machines: BTreeSet<&Machine> = all.iter().map(|outcome| &outcome.machine).collect();
    machines.into_iter().map(Machine::words).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_machine_is_named_once() {
        let on = |cores: usize| links::Outcome {
            first: 1.0,
            later: 0.5,
            line: (0, 0),
            frames: (0, 0),
            machine: Machine { device: "CPU".into(), cores },
        };
        let all = [on(2), on(8), on(2)];
        assert_eq!(machines(&all.iter().collect::<Vec<_>>()), "CPU, 2 cores; CPU, 8 cores");
    }
}
