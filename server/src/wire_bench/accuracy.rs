//! Whole federations on a real task, one for each mode, format, strategy and seed: what they cost and what they give.

use super::kept::{Kept, key};
use super::{Bench, DEFAULT, MIXED, Variant, Work};
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

/// What is run where merging needs Fisher values, too.
const WITH_FISHER: [&str; 3] = [REFERENCE, DEFAULT, MIXED];

/// All cells, strategy by strategy.
pub(super) fn cells() -> Vec<Cell> {
    let int8 = Variant::low_rank(DEFAULT, Format::Int8);
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

/// Who holds what, and what is agreed but for the variant. So much that all of it takes two cores an hour: few questions a
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

/// A run with deflating and its like without: that changes no value, so it must not change a result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Twins {
    pub(super) strategy: Strategy,
    /// The one with deflating.
    pub(super) name: &'static str,
    pub(super) seed: u64,
    /// Accuracy with deflating, and without.
    pub(super) accuracies: (f64, f64),
}

/// All there are.
pub(super) fn twins(rows: &[Row]) -> Vec<Twins> {
    let mut twins = Vec::new();
    for Row { cell: Cell { variant, strategy, .. }, runs } in rows.iter().filter(|row| row.cell.variant.compress) {
        let like = |other: &&Row| {
            let Variant { compress, .. } = other.cell.variant;
            let deflated = Variant { compress: true, name: variant.name, ..other.cell.variant };
            other.cell.strategy == *strategy && !compress && deflated == *variant
        };
        let plain = rows.iter().find(like).map(|other| other.runs.as_slice()).unwrap_or_default();
        for (seed, outcome) in runs {
            if let Some((_, other)) = plain.iter().find(|(plain_seed, _)| plain_seed == seed) {
                let accuracies = (outcome.accuracy, other.accuracy);
                twins.push(Twins { strategy: *strategy, name: variant.name, seed: *seed, accuracies });
            }
        }
    }
    twins
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A run with this accuracy.
    pub(in crate::wire_bench) fn outcome(accuracy: f64) -> Outcome {
        let traffic = Traffic::default();
        Outcome { accuracy, zero_shot: 0.5, questions: 1000, traffic, clients: 1, seconds: 1.0 }
    }

    /// Seed and accuracy of a cell's runs.
    type Runs<'a> = &'a [(u64, f64)];

    /// Every cell, without runs but those that are given by strategy and name.
    pub(in crate::wire_bench) fn rows(runs: &[(Strategy, &str, Runs<'_>)]) -> Vec<Row> {
        let of = |cell: &Cell| -> Vec<(u64, Outcome)> {
            let own =
                runs.iter().filter(|(strategy, name, _)| (*strategy, *name) == (cell.strategy, cell.variant.name));
            own.flat_map(|(.., runs)| runs.iter().map(|(seed, accuracy)| (*seed, outcome(*accuracy)))).collect()
        };
        cells().into_iter().map(|cell| Row { cell, runs: of(&cell) }).collect()
    }

    #[test]
    fn twins_are_runs_with_one_seed_that_differ_in_deflating_alone() {
        let deflated = "low-rank int8, deflated";
        let avg = Strategy::FedAvg;
        let found = twins(&rows(&[
            (avg, DEFAULT, &[(1, 0.9), (2, 0.8)]),
            (avg, MIXED, &[(1, 0.7)]),
            (avg, deflated, &[(1, 0.9), (3, 0.5)]),
            (Strategy::Fisher, DEFAULT, &[(3, 0.5)]),
        ]));
        assert_eq!(found, [Twins { strategy: avg, name: deflated, seed: 1, accuracies: (0.9, 0.9) }]);
        let found = twins(&rows(&[(avg, DEFAULT, &[(1, 0.9)]), (avg, deflated, &[(1, 0.901)])]));
        assert_eq!(found.iter().map(|t| t.accuracies).collect::<Vec<_>>(), [(0.901, 0.9)]);
    }

    #[test]
    fn every_variant_has_a_key_of_its_own() {
        let bench = super::super::report::tests::bench();
        let cells = cells();
        let keys: std::collections::BTreeSet<String> =
            cells.iter().map(|cell| cell.key(&bench, 1, "samples").unwrap()).collect();
        assert_eq!((cells.len(), keys.len()), (13, 13));
        for cell in &cells {
            let plan = cell.plan(&bench);
            plan.settings.validate().unwrap();
            assert_eq!(plan.settings.min_participants, plan.simulation.clients);
            assert!(plan.simulation.faults().is_empty(), "{:?}", plan.simulation.faults());
        }
        let of = |strategy, name: &str| cells.iter().any(|c| c.strategy == strategy && c.variant.name == name);
        assert!(of(Strategy::FedAvg, REFERENCE) && of(Strategy::FedAvg, PLAIN) && of(Strategy::FedAvg, MIXED));
        assert!(WITH_FISHER.iter().all(|name| of(Strategy::Fisher, name)));
    }
}
