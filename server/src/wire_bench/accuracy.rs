//! Whole federations on a real task, one for each mode, format, strategy and seed: what they cost and what they give.

use super::kept::{Kept, key};
use super::{Bench, Variant, Work};
use crate::experiment::config::{Simulation, Task};
use crate::experiment::grid::Plan;
use crate::experiment::records;
use crate::experiment::run::{Run, Watch, run};
use crate::experiment::stage::Stage;
use anyhow::Context;
use fednano_shared::ledger::Traffic;
use fednano_shared::settings::{FederationSettings, Format, Overlap, Rounding, Strategy};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};

/// What a run gives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// Share of right answers at the end.
    pub(super) accuracy: f64,
    /// The same of the untouched model.
    pub(super) zero_shot: f64,
    /// Questions that were asked.
    pub(super) questions: usize,
    /// Bytes of all clients together.
    pub(super) traffic: Traffic,
    /// Clients.
    pub(super) clients: usize,
    /// How long it took.
    pub(super) seconds: f64,
}

/// Runs of a variant and a strategy, one a seed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cell {
    pub(super) variant: Variant,
    pub(super) strategy: Strategy,
    /// With the first seed alone: the result is another cell's, bit by bit, and only the bytes are of interest.
    pub(super) once: bool,
}

/// Both ways to merge that differ in what goes over the boundary.
pub(super) const STRATEGIES: [Strategy; 2] = [Strategy::FedAvg, Strategy::Fisher];
/// What all others are compared with.
pub(super) const REFERENCE: &str = "activations f32";
/// The plain split.
pub(super) const PLAIN: &str = "activations f16";

/// The form that is recommended.
const MIXED: &str = "low-rank mixed";
/// What is run where merging needs Fisher values, too.
const WITH_FISHER: [&str; 2] = [REFERENCE, MIXED];

/// All cells, strategy by strategy.
pub(super) fn cells() -> Vec<Cell> {
    let int8 = Variant::low_rank("low-rank int8", Format::Int8);
    let variants = [
        (Variant::activations(REFERENCE, Format::F32), false),
        (Variant::activations(PLAIN, Format::F16), false),
        (Variant::activations("activations int8", Format::Int8), false),
        (Variant::low_rank("low-rank f32", Format::F32), false),
        (Variant::low_rank("low-rank f16", Format::F16), false),
        (int8, false),
        (Variant { name: "low-rank int8, stochastic", rounding: Rounding::Stochastic, ..int8 }, false),
        (Variant { name: "low-rank int8, deflated", compress: true, ..int8 }, true),
        (Variant::mixed(MIXED), false),
        (Variant { overlap: Overlap::Stale, ..Variant::mixed("low-rank mixed, stale") }, false),
    ];
    let of = |strategy| variants.map(|(variant, once)| Cell { variant, strategy, once });
    let wanted = |c: &Cell| c.strategy == Strategy::FedAvg || WITH_FISHER.contains(&c.variant.name);
    STRATEGIES.into_iter().flat_map(of).filter(wanted).collect()
}

/// Who holds what, and what is agreed but for the variant. So much that all of it takes two cores half an hour: few questions a
/// client, which are learned all the same, and hardly any after each round, which nobody looks at; but many at the end, since half a
/// point must show.
pub(super) fn base(bench: &Bench) -> (Simulation, FederationSettings) {
    let simulation = Simulation {
        model: bench.model.display().to_string(),
        data: bench.data.clone().unwrap_or_default(),
        device: bench.device,
        dtype: bench.dtype,
        clients: 5,
        alpha: 1.0,
        limit: 100,
        evaluation_limit: 50,
        test_limit: 2000,
        tasks: vec![if bench.data.is_some() { Task::Data } else { Task::Scenes }],
        ..Default::default()
    };
    // A deadline would make the result depend on the machine.
    let settings = FederationSettings { rounds: 10, batch_size: 16, round_deadline_s: 86_400, ..Default::default() };
    if !bench.quick() {
        return (simulation, settings);
    }
    (
        Simulation { clients: 2, samples: 24, limit: 0, evaluation_limit: 8, test_limit: 16, ..simulation },
        FederationSettings { rank: 4, rounds: 2, batch_size: 4, fisher_samples: 4, ..settings },
    )
}

impl Cell {
    fn plan(&self, bench: &Bench) -> Plan {
        let (simulation, settings) = base(bench);
        let min_participants = simulation.clients;
        let settings = FederationSettings { strategy: self.strategy, min_participants, ..self.variant.of(&settings) };
        Plan { simulation, settings, rules: Vec::new() }
    }

    /// `samples`: hash of model and samples.
    fn key(&self, bench: &Bench, seed: u64, samples: &str) -> anyhow::Result<String> {
        key("accuracy", &records::key(&self.plan(bench), Some(seed), samples)?)
    }
}

/// Where it is kept which model and samples were used last.
fn samples_key(bench: &Bench) -> anyhow::Result<String> {
    key("samples", &bench.quick())
}

/// Run what is missing, seed by seed, so that the first seed's figures are whole soon.
///
/// # Errors
/// A model or a data set that cannot be used, a run that fails.
pub(super) fn measure(work: &mut Work<'_>) -> anyhow::Result<()> {
    let bench = work.bench;
    let (simulation, _) = base(bench);
    let tasks = simulation.tasks.iter().copied().collect();
    let stage = Stage::open(&simulation, &bench.model, &tasks, work.cache, 1)?;
    let host = stage.hosts.first().context("there is no LLM")?;
    let samples = stage.hash(&simulation.tasks);
    let place = samples_key(bench)?;
    if work.kept.get::<String>(&place).as_ref() != Some(&samples) {
        work.kept.add(&place, "model and samples of the accuracy part", &samples)?;
    }
    let mut wanted = Vec::new();
    for (number, seed) in bench.seeds.iter().enumerate() {
        for cell in cells().into_iter().filter(|cell| !cell.once || number == 0) {
            let key = cell.key(bench, *seed, &samples)?;
            if work.kept.get::<Outcome>(&key).is_none() {
                wanted.push((key, cell, *seed));
            }
        }
    }
    println!("accuracy: {} runs on {}, the others are kept", wanted.len(), stage.device_name);
    let bar = ProgressBar::new(wanted.len() as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} runs, {elapsed} spent, {eta} left")?);
    for (key, cell, seed) in wanted {
        let plan = cell.plan(bench);
        let settings = FederationSettings { seed, ..plan.settings };
        let folder = work.cache.join(&key);
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let name = format!("{}, {}, seed {seed}", cell.strategy, cell.variant.name);
        let what = Run { name: "wire", simulation: &plan.simulation, settings: &settings, rules: &[], folder: &folder };
        let watch = Watch { update: &|| {}, round: &|_| {} };
        let done = work
            .runtime
            .block_on(run(&stage, host, &what, &watch))
            .with_context(|| format!("the run '{name}' failed"))?;
        drop(std::fs::remove_dir_all(&folder)); // what is left goes with the process's own folder
        let tested = done.figures.used().together;
        let outcome = Outcome {
            accuracy: tested.accuracy,
            zero_shot: done.figures.zero_shot.together.accuracy,
            questions: tested.samples,
            traffic: Traffic::sum(&done.traffic),
            clients: done.traffic.len(),
            seconds: done.seconds,
        };
        let megabytes = outcome.traffic.total() as f64 / 1e6 / outcome.clients.max(1) as f64;
        bar.suspend(|| println!("{name}: {:.1} %, {megabytes:.1} MB a client", outcome.accuracy * 100.0));
        work.kept.add(&key, &name, &outcome)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// A cell and what is kept of it, by seed.
pub(super) struct Row {
    pub(super) cell: Cell,
    pub(super) runs: Vec<(u64, Outcome)>,
}

/// Every cell, whether there are runs of it or not.
pub(super) fn results(bench: &Bench, kept: &Kept) -> anyhow::Result<Vec<Row>> {
    let samples: Option<String> = kept.get(&samples_key(bench)?);
    let mut results = Vec::new();
    for cell in cells() {
        let mut runs = Vec::new();
        for seed in &bench.seeds {
            if let Some(samples) = &samples
                && let Some(outcome) = kept.get(&cell.key(bench, *seed, samples)?)
            {
                runs.push((*seed, outcome));
            }
        }
        results.push(Row { cell, runs });
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_has_a_key_of_its_own() {
        let bench = super::super::report::tests::bench();
        let cells = cells();
        let keys: std::collections::BTreeSet<String> =
            cells.iter().map(|cell| cell.key(&bench, 1, "samples").unwrap()).collect();
        assert_eq!((cells.len(), keys.len()), (12, 12));
        for cell in &cells {
            let plan = cell.plan(&bench);
            plan.settings.validate().unwrap();
            assert_eq!(plan.settings.min_participants, plan.simulation.clients);
            assert!(plan.simulation.faults().is_empty(), "{:?}", plan.simulation.faults());
        }
        let of = |strategy, name: &str| cells.iter().any(|c| c.strategy == strategy && c.variant.name == name);
        assert!(of(Strategy::FedAvg, REFERENCE) && of(Strategy::FedAvg, PLAIN) && of(Strategy::FedAvg, MIXED));
        assert!(of(Strategy::Fisher, REFERENCE) && of(Strategy::Fisher, MIXED));
    }
}
