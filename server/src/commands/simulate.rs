//! `fednano simulate`: server and clients in one process, over channels, seeded.

use super::SettingFlags;
use crate::device::{ComputeDtype, DeviceChoice};
use crate::experiment::config::{Config, FEDERATION, Places, SIMULATION, Task};
use crate::experiment::figures::Tested;
use crate::experiment::run::{Done, RoundLine, Run, Watch, run};
use crate::experiment::stage::{Exam, Stage};
use crate::experiment::statistics::Spread;
use crate::fetch::resolve_model;
use crate::store::{Store, TemporaryFolder};
use anyhow::Context;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::ledger::{self, Traffic};
use fednano_shared::settings::{FederationSettings, put_over};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::cell::RefCell;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::Instant;

/// Run whole federations in one process, seeded: on the CPU the same seed gives the same adapters bit for bit.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File with the tables [simulation] and [federation] (server/simulation.toml explains the keys); flags go over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    simulation: SimulationFlags,
    /// File for the results.
    #[arg(long)]
    json: Option<PathBuf>,
    /// File for a line of JSON after each round.
    #[arg(long)]
    jsonl: Option<PathBuf>,
    /// Folder for adapters and state (a temporary one otherwise); each run is a federation there, named by its seed.
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// File for a timeline of every step, as a Chrome trace (open it in ui.perfetto.dev or chrome://tracing).
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    #[command(flatten)]
    settings: SettingFlags,
}

/// Each flag is the key of [simulation] of the same name and goes over the file's.
#[derive(Debug, Clone, Default, clap::Args, Serialize)]
struct SimulationFlags {
    /// Model directory in Hugging Face's layout, or a model of the hub as owner/name after `fednano fetch owner/name`.
    #[arg(long)]
    model: Option<String>,
    /// Folder with train/ and test/ (easy-VQA, LLaVA JSON or CSV in each), or ScienceQA or IconQA as published.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Where everything is computed.
    #[arg(long, value_enum)]
    device: Option<DeviceChoice>,
    /// Type of the LLM's weights and of what is computed with them.
    #[arg(long, value_enum)]
    dtype: Option<ComputeDtype>,
    /// How clients get the weights of their half of the model: f16, or smaller and coarser int8 or int4.
    #[arg(long)]
    edge_dtype: Option<EdgeDtype>,
    /// Clients.
    #[arg(long)]
    clients: Option<usize>,
    /// Dirichlet concentration of the split by answer; smaller is more uneven.
    #[arg(long)]
    alpha: Option<f64>,
    /// Training samples in all, drawn before the split (0: all).
    #[arg(long)]
    samples: Option<usize>,
    /// Training samples a client at most (0: all).
    #[arg(long)]
    limit: Option<usize>,
    /// Test samples used after each round (0: all).
    #[arg(long)]
    evaluation_limit: Option<usize>,
    /// Test samples used before the first and after the last round (0: all).
    #[arg(long)]
    test_limit: Option<usize>,
    /// One run for each.
    #[arg(long, value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    seeds: Vec<u64>,
    /// Families of samples: data, scenes (generated), or both, which share the clients.
    #[arg(long, value_enum, value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tasks: Vec<Task>,
    /// Share of the clients that have no pictures.
    #[arg(long)]
    text_only: Option<f64>,
    /// Share of the clients whose questions are lost.
    #[arg(long)]
    picture_only: Option<f64>,
    /// Beside each run, one in which a single client holds all samples.
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    centralised: bool,
}

/// Run it.
///
/// # Errors
/// Unusable data, model or settings.
pub async fn main(args: &Args) -> anyhow::Result<()> {
    let started = Instant::now();
    let config = config(args)?;
    let simulation = &config.simulation;
    let model = resolve_model(&simulation.model)?;
    let temporary = TemporaryFolder::create("simulate")?;
    remove_on_ctrl_c(temporary.path().to_owned());
    let folder = args.data_dir.clone().unwrap_or_else(|| temporary.path().to_owned());
    let runs = config.runs();
    unused(&folder, &runs)?;
    let mut lines = Lines::open(args.jsonl.as_ref())?;
    let tasks = simulation.tasks.iter().copied().collect();
    let stage = Stage::open(simulation, &model, &tasks, &folder, 1)?;
    let host = stage.hosts.first().context("there is no LLM")?;
    let exam = stage.exam(simulation).await?;
    let zero_shot = exam.zero_shot(host).await?;
    println!("{} test samples on {}", exam.samples(), stage.device_name);
    println!("untouched model: {}", percent(&zero_shot));

    let bar = ProgressBar::new(runs.iter().map(|(_, s)| u64::from(s.rounds) * s.min_participants as u64).sum());
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} updates, {elapsed} spent, {eta} left")?);
    let mut done = Vec::new();
    for (name, settings) in &runs {
        let (update, told) = (|| bar.inc(1), RefCell::new(&mut lines));
        let round = |line: &RoundLine<'_>| {
            told.borrow_mut().add(line);
            bar.suspend(|| say(line));
        };
        let watch = Watch { update: &update, round: &round };
        let what = Run { name, simulation, settings, rules: &[], folder: &folder };
        let result = run(&stage, host, &what, &watch).await?;
        bar.suspend(|| println!("{name}: {} at the end", percent(result.figures.used())));
        done.push((name.as_str(), settings, result));
    }
    bar.finish_and_clear();
    lines.close()?;
    print!("{}", table(&exam, &zero_shot, &done));
    print!("{}", bytes(&done));
    if let Some(path) = &args.json {
        let runs: Vec<serde_json::Value> = done.iter().map(report).collect();
        let (constant, question_only) = exam.baselines;
        let report = serde_json::json!({
            "simulation": simulation, "zero_shot": zero_shot.together,
            "baselines": {"constant": constant, "question_only": question_only},
            "runs": runs, "seconds": started.elapsed().as_secs_f64(),
        });
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("results in {}", path.display());
    }
    Ok(())
}

/// The file, the flags over it, everything checked at once.
fn config(args: &Args) -> anyhow::Result<Config> {
    let (mut config, mut places, mut faults) = (Config::default(), Places::default(), Vec::new());
    if let Some(path) = &args.config {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the configuration {}", path.display()))?;
        faults.extend(config.put_file(&path.display().to_string(), &text, &mut places));
    }
    places.flags(SIMULATION, &args.simulation);
    places.flags(FEDERATION, &args.settings);
    let (simulation, wrong) = put_over(&config.simulation, &args.simulation);
    config.simulation = simulation;
    faults.extend(wrong.iter().map(|fault| places.say(SIMULATION, fault)));
    let (federation, wrong) = args.settings.gather(config.federation)?;
    config.federation = federation;
    faults.extend(wrong.iter().map(|fault| places.say(FEDERATION, fault)));
    // A seed by flag is meant, whatever seeds the file names.
    if places.by_flag(FEDERATION, "seed") && args.simulation.seeds.is_empty() {
        config.simulation.seeds.clear();
    }
    faults.extend(config.faults(&places));
    anyhow::ensure!(faults.is_empty(), "this simulation cannot be run:\n  {}", faults.join("\n  "));
    Ok(config)
}

/// A federation that is there already would be gone on with, by clients that nobody knows.
fn unused(folder: &std::path::Path, runs: &[(String, FederationSettings)]) -> anyhow::Result<()> {
    let there = Store::federations(folder)?;
    for (name, _) in runs {
        anyhow::ensure!(
            there.iter().all(|federation| federation.name != *name),
            "{} holds a federation '{name}' already; choose another --data-dir, or other seeds",
            folder.display()
        );
    }
    Ok(())
}

/// Ctrl-C ends a simulation at once, but leaves nothing behind.
pub(super) fn remove_on_ctrl_c(folder: PathBuf) {
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            drop(std::fs::remove_dir_all(folder));
            std::process::exit(130);
        }
    });
}

/// The file of `--jsonl`, if there is one.
struct Lines {
    file: Option<BufWriter<File>>,
    failed: Option<std::io::Error>,
}

impl Lines {
    fn open(path: Option<&PathBuf>) -> anyhow::Result<Self> {
        let file = path
            .map(|path| File::create(path).with_context(|| format!("cannot write {}", path.display())))
            .transpose()?
            .map(BufWriter::new);
        Ok(Self { file, failed: None })
    }

    /// Each line is there as soon as its round is.
    fn add(&mut self, line: &RoundLine<'_>) {
        let Some(file) = &mut self.file else { return };
        let mut write = || -> std::io::Result<()> {
            serde_json::to_writer(&mut *file, line)?;
            file.write_all(b"\n")?;
            file.flush()
        };
        self.failed = self.failed.take().or(write().err());
    }

    fn close(self) -> anyhow::Result<()> {
        match self.failed {
            Some(cause) => Err(cause).context("the lines of --jsonl could not be written; is the disk full?"),
            None => Ok(()),
        }
    }
}

/// A round on the terminal.
fn say(line: &RoundLine<'_>) {
    let own = line.local.map(|l| format!(", own test samples {:.1} %", l.own.accuracy * 100.0)).unwrap_or_default();
    println!(
        "{} round {:>2}: {:.1} % of {} (loss {:.3}){own}",
        line.run,
        line.round,
        line.accuracy * 100.0,
        line.samples,
        line.loss
    );
}

/// Accuracy, and that of each task where there are several.
fn percent(tested: &Tested) -> String {
    let mut text = format!("{:.1} %", tested.together.accuracy * 100.0);
    for (task, e) in &tested.tasks {
        text += &format!(", {task} {:.1} %", e.accuracy * 100.0);
    }
    text
}

type Finished<'a> = (&'a str, &'a FederationSettings, Done);

/// The final table, and mean and spread over seeds for each strategy.
fn table(exam: &Exam, zero_shot: &Tested, done: &[Finished<'_>]) -> String {
    let mut text = format!(
        "\n{:<22} {:<13} {:>9} {:>12} {:>10} {:>10} {:>9}\n",
        "run", "strategy", "test", "own tests", "MB up", "MB down", "seconds"
    );
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    for (name, settings, run) in done {
        let clients = run.traffic.len().max(1) as f64 * 1e6;
        let all = Traffic::sum(&run.traffic);
        let (up, down) = (all.up.total() as f64 / clients, all.down.total() as f64 / clients);
        text += &format!(
            "{name:<22} {:<13} {:>9} {:>12} {up:>10.2} {down:>10.2} {:>9.1}\n",
            settings.strategy,
            percent(run.figures.used().together.accuracy),
            run.figures.local().map_or_else(|| "-".to_owned(), percent),
            run.seconds
        );
    }
    let mut strategies: Vec<_> = done.iter().map(|(_, settings, _)| settings.strategy).collect();
    strategies.dedup();
    strategies.truncate(2); // a run, and the centralised one beside it
    for strategy in strategies {
        let own = done.iter().filter(|(_, settings, _)| settings.strategy == strategy);
        let values: Vec<f64> = own.map(|(_, _, run)| run.figures.used().together.accuracy * 100.0).collect();
        if let Some(Spread { mean, sd, n }) = Spread::of(&values).filter(|s| s.n > 1) {
            text += &format!("{strategy}: {mean:.1} ± {sd:.1} % over {n} seeds\n");
        }
    }
    let (constant, question_only) = exam.baselines;
    text += &format!(
        "untouched model {}, best constant answer {}, best question-only answer {} (bytes are of one client)\n",
        percent(zero_shot.together.accuracy),
        percent(constant),
        percent(question_only)
    );
    text
}

/// The ledger of each run by kind.
fn bytes(done: &[Finished<'_>]) -> String {
    let of = |(name, _, run): &Finished<'_>| {
        let clients = run.traffic.len();
        format!(
            "\n{name}, all of {clients} client{}:\n{}",
            if clients == 1 { "" } else { "s" },
            ledger::table(&run.ledger.total)
        )
    };
    done.iter().map(of).collect()
}

/// A run for `--json`.
fn report((name, settings, run): &Finished<'_>) -> serde_json::Value {
    let samples: Vec<usize> = run.figures.clients.iter().map(|c| c.samples).collect();
    let traffic: &[Traffic] = &run.traffic;
    serde_json::json!({
        "name": name, "settings": settings, "samples": samples, "rounds": run.history, "final": run.figures.used().together,
        "figures": run.figures, "traffic": traffic, "ledger": run.ledger, "seconds": run.seconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn read(words: &[&str]) -> anyhow::Result<Config> {
        let words = std::iter::once("fednano").chain(words.iter().copied());
        config(&Cli::try_parse_from(words).unwrap().args)
    }

    #[test]
    fn flags_go_over_the_file() {
        let folder = TemporaryFolder::create("config").unwrap();
        let file = folder.path().join("mine.toml");
        std::fs::write(
            &file,
            "[simulation]\nmodel = \"m\"\ndata = \"d\"\nclients = 7\nseeds = [1, 2]\n[federation]\nrank = 4\nrounds = 9\n",
        )
        .unwrap();
        let file = file.display().to_string();
        let config = read(&["--config", &file, "--rounds", "3", "--alpha", "0.5", "--tasks", "data,scenes"]).unwrap();
        assert_eq!((config.simulation.clients, config.simulation.alpha, config.simulation.tasks.len()), (7, 0.5, 2));
        assert_eq!((config.federation.rank, config.federation.rounds), (4, 3));
        assert_eq!(config.runs().len(), 2);
        let seeded = read(&["--config", &file, "--seed", "5"]).unwrap();
        assert_eq!(seeded.runs().iter().map(|(name, s)| (name.as_str(), s.seed)).collect::<Vec<_>>(), [("seed-5", 5)]);
        let cause = read(&["--config", &file, "--clients", "0", "--learning-rate", "9"]).unwrap_err().to_string();
        assert!(
            cause.contains("--clients: clients is 0") && cause.contains("--learning-rate: learning_rate is 9"),
            "{cause}"
        );
    }

    #[test]
    fn every_flag_is_a_key() {
        let keys = serde_json::to_value(crate::experiment::config::Simulation::default()).unwrap();
        let all =
            SimulationFlags { seeds: vec![1], tasks: vec![Task::Scenes], centralised: true, ..Default::default() };
        let flags = serde_json::to_value(all).unwrap();
        let (flags, keys) = (flags.as_object().unwrap(), keys.as_object().unwrap());
        assert_eq!(flags.keys().collect::<Vec<_>>(), keys.keys().collect::<Vec<_>>());
    }
}
