//! The study: every run of the grid that is not on disk yet, then tables, plots and reading from all that is.

use super::config::Simulation;
use super::grid::{self, Cell, Group, Plan, Size};
use super::records::{self, Record, Records};
use super::run::{Run, Watch, run};
use super::stage::Stage;
use super::{plots, reading, tables};
use crate::device::{ComputeDtype, DeviceChoice};
use crate::llm_host::LlmHandle;
use anyhow::{Context, ensure};
use fednano_shared::settings::FederationSettings;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What is to be done.
#[derive(Debug, Clone)]
pub struct Study {
    /// Model directory.
    pub model: PathBuf,
    /// Data set of the task `data`; none where the size needs none.
    pub data: Option<PathBuf>,
    /// How much.
    pub size: Size,
    /// These groups alone; none: all.
    pub groups: Vec<Group>,
    /// Seeds of each cell.
    pub seeds: Vec<u64>,
    /// Runs side by side.
    pub jobs: usize,
    /// Where to compute.
    pub device: DeviceChoice,
    /// Type of the LLM.
    pub dtype: ComputeDtype,
    /// Where results go.
    pub out: PathBuf,
}

/// Name of the file of finished runs.
pub const RUNS: &str = "runs.jsonl";

/// A run that is not on disk.
struct Wanted {
    key: String,
    cell: String,
    name: String,
    seed: u64,
    plan: Plan,
}

/// A cell of a table, and the runs that fill it.
pub(super) struct Filled<'a> {
    pub(super) cell: &'a Cell,
    pub(super) records: Vec<&'a Record>,
}

impl Study {
    /// Run what is missing, write the results. `cache` is a folder for this process alone.
    ///
    /// # Errors
    /// A model or a data set that cannot be used, a run that fails, a disk that cannot be written.
    pub fn run(&self, cache: &Path) -> anyhow::Result<()> {
        let cells = self.cells();
        let chosen: Vec<&Cell> =
            cells.iter().filter(|c| self.groups.is_empty() || self.groups.contains(&c.group)).collect();
        ensure!(!chosen.is_empty(), "there is no run in {:?} of this size; leave --quick or --only away", self.groups);
        let tasks = grid::tasks(cells.iter());
        let first = cells.first().context("the study has no runs")?;
        let stage = Stage::open(&first.plan.simulation, &self.model, &tasks, cache, self.jobs)?;
        let mut records = Records::open(&self.out.join(RUNS))?;
        let wanted = self.wanted(&chosen, &stage, &records)?;
        println!("{} runs on {}, the others are in {}", wanted.len(), stage.device_name, self.out.join(RUNS).display());
        work(&stage, wanted, &mut records, cache)?;
        self.write(&cells, &stage, &records)
    }

    /// All cells, with model, data and device.
    fn cells(&self) -> Vec<Cell> {
        let mut cells = grid::cells(self.size);
        for cell in &mut cells {
            let simulation = &mut cell.plan.simulation;
            *simulation = Simulation {
                model: self.model.display().to_string(),
                data: self.data.clone().unwrap_or_default(),
                device: self.device,
                dtype: self.dtype,
                ..simulation.clone()
            };
        }
        cells
    }

    /// The runs that are not there yet, in the order of the groups, seed by seed: so that the first seed's tables are whole soon.
    fn wanted(&self, chosen: &[&Cell], stage: &Stage, records: &Records) -> anyhow::Result<VecDeque<Wanted>> {
        let mut wanted = VecDeque::new();
        let mut known = BTreeSet::new();
        for (number, seed) in self.seeds.iter().enumerate() {
            for cell in chosen.iter().filter(|cell| !cell.once || number == 0) {
                let samples = stage.hash(&cell.plan.simulation.tasks);
                let key = records::key(&cell.plan, Some(*seed), &samples)?;
                if records.get(&key).is_none() && known.insert(key.clone()) {
                    let name = format!("{} {} {}", cell.group, cell.row, cell.column);
                    let id = records::key(&cell.plan, None, &samples)?;
                    wanted.push_back(Wanted { key, cell: id, name, seed: *seed, plan: cell.plan.clone() });
                }
            }
        }
        Ok(wanted)
    }

    /// Tables, plots and reading from all runs that there are.
    fn write(&self, cells: &[Cell], stage: &Stage, records: &Records) -> anyhow::Result<()> {
        let mut filled = Vec::new();
        for cell in cells {
            let id = records::key(&cell.plan, None, &stage.hash(&cell.plan.simulation.tasks))?;
            filled.push(Filled { cell, records: records.of_cell(&id) });
        }
        let mut files: BTreeMap<String, String> = plots::all(&filled)?;
        let drawn: Vec<String> = files.keys().cloned().collect();
        files.insert("README.md".into(), tables::page(self.size, &filled, &drawn));
        files.insert("reading.md".into(), reading::page(self.size, &filled));
        files.insert("times.md".into(), tables::times(&filled));
        for (name, text) in files {
            let path = self.out.join(name);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        println!("results are in {}", self.out.display());
        Ok(())
    }
}

/// What the workers share.
struct Shop<'a> {
    stage: &'a Stage,
    wanted: Mutex<VecDeque<Wanted>>,
    records: Mutex<&'a mut Records>,
    failed: Mutex<Option<anyhow::Error>>,
    bar: ProgressBar,
    cache: &'a Path,
}

/// No panic can leave these half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All runs, a thread for each of the stage's hosts. The first failure ends them after the runs under way.
fn work(stage: &Stage, wanted: VecDeque<Wanted>, records: &mut Records, cache: &Path) -> anyhow::Result<()> {
    let bar = ProgressBar::new(wanted.len() as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} runs, {elapsed} spent, {eta} left")?);
    let shop =
        Shop { stage, wanted: Mutex::new(wanted), records: Mutex::new(records), failed: Mutex::new(None), bar, cache };
    std::thread::scope(|scope| {
        for host in &stage.hosts {
            let shop = &shop;
            scope.spawn(move || {
                if let Err(cause) = worker(shop, host) {
                    lock(&shop.failed).get_or_insert(cause);
                }
            });
        }
    });
    shop.bar.finish_and_clear();
    match lock(&shop.failed).take() {
        Some(cause) => Err(cause),
        None => Ok(()),
    }
}

fn worker(shop: &Shop<'_>, host: &LlmHandle) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    loop {
        if lock(&shop.failed).is_some() {
            return Ok(());
        }
        let Some(next) = lock(&shop.wanted).pop_front() else { return Ok(()) };
        let Wanted { key, cell, name, seed, plan } = next;
        let folder = shop.cache.join(&key);
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let settings = FederationSettings { seed, ..plan.settings };
        let what = Run {
            name: "study",
            simulation: &plan.simulation,
            settings: &settings,
            rules: &plan.rules,
            folder: &folder,
        };
        let watch = Watch { update: &|| {}, round: &|_| {} };
        let done = runtime
            .block_on(run(shop.stage, host, &what, &watch))
            .with_context(|| format!("the run '{name}' with seed {seed} failed"))?;
        drop(std::fs::remove_dir_all(&folder));
        let accuracy = done.figures.used().together.accuracy * 100.0;
        shop.bar.suspend(|| println!("{name}, seed {seed}: {accuracy:.1} % ({:.0} s)", done.seconds));
        let device = shop.stage.device_name.clone();
        let figures = done.figures;
        lock(&shop.records).add(Record { key, cell, name, seed, figures, seconds: done.seconds, device })?;
        shop.bar.inc(1);
    }
}
