//! Simulations and the study: the same seed gives the same, whatever was run before, and what was interrupted goes on.

use anyhow::{Context, ensure};
use clap::Parser;
use fednano_server::commands::simulate;
use fednano_server::device::{ComputeDtype, DeviceChoice};
use fednano_server::experiment::config::{Config, Simulation, Task};
use fednano_server::experiment::grid::{Group, Size};
use fednano_server::experiment::run::{Done, Run, Watch, run};
use fednano_server::experiment::stage::Stage;
use fednano_server::experiment::study::{RUNS, Study};
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::{FederationSettings, Strategy};
use fednano_tests::{LIMIT, block, fixture, nano_llava};
use std::collections::BTreeMap;
use std::path::Path;

fn simulation() -> Simulation {
    Simulation {
        tasks: vec![Task::Scenes],
        clients: 3,
        samples: 12,
        limit: 0,
        evaluation_limit: 6,
        test_limit: 12,
        ..Default::default()
    }
}

fn settings(strategy: Strategy, clients: usize, seed: u64) -> FederationSettings {
    FederationSettings {
        rank: 2,
        rounds: 2,
        batch_size: 2,
        fisher_samples: 2,
        local_test: 0.3,
        min_participants: clients,
        round_deadline_s: 86_400,
        strategy,
        seed,
        ..Default::default()
    }
}

fn stage(folder: &Path) -> anyhow::Result<Stage> {
    Stage::open(&simulation(), &fixture(), &[Task::Scenes].into(), folder, 1)
}

async fn federate(
    stage: &Stage,
    folder: &Path,
    simulation: &Simulation,
    settings: &FederationSettings,
) -> anyhow::Result<Done> {
    let folder = tempfile::tempdir_in(folder)?;
    let what = Run { name: "test", simulation, settings, rules: &[], folder: folder.path() };
    let host = stage.hosts.first().context("no LLM")?;
    run(stage, host, &what, &Watch { update: &|| {}, round: &|_| {} }).await
}

fn bits(state: &AdapterState) -> Vec<u32> {
    state.0.values().flat_map(|blob| &blob.data).map(|v| v.to_bits()).collect()
}

/// Bit for bit, on a stage of its own and on one that has seen other runs.
pub fn same_seed_same_adapters() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let (simulation, fisher) = (simulation(), |seed| settings(Strategy::Fisher, 3, seed));
        let used = stage(folder.path())?;
        let other = federate(&used, folder.path(), &simulation, &fisher(2)).await?;
        let again = federate(&used, folder.path(), &simulation, &fisher(1)).await?;
        let fresh = federate(&stage(folder.path())?, folder.path(), &simulation, &fisher(1)).await?;
        ensure!(bits(&again.adapter) == bits(&fresh.adapter), "the same seed gave other adapters");
        ensure!(again.figures == fresh.figures, "{:?}\n{:?}", again.figures, fresh.figures);
        ensure!(bits(&again.adapter) != bits(&other.adapter), "the seed makes no difference");
        ensure!(again.history.len() == 3 && again.history[1..].iter().all(|r| r.participants.len() == 3));
        ensure!(again.figures.bytes.activations_up > 0 && again.figures.bytes.updates_up > 0);
        Ok(())
    })
}

/// Each client's own adapters are judged where it has some, and one client holds everything where that is asked for.
pub fn personal_and_centralised() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let (stage, simulation) = (stage(folder.path())?, simulation());
        for strategy in [Strategy::Local, Strategy::FedDpaF, Strategy::FedAvg] {
            let done = federate(&stage, folder.path(), &simulation, &settings(strategy, 3, 1)).await?;
            ensure!(done.figures.own.is_some() == strategy.personal(), "{strategy}: {:?}", done.figures.own);
            ensure!(done.figures.clients.len() == 3 && done.figures.local().is_some(), "{strategy}");
            let samples: usize = done.figures.clients.iter().map(|c| c.samples).sum();
            ensure!(samples == 12, "{strategy}: {samples} samples");
        }
        let one = federate(&stage, folder.path(), &simulation, &settings(Strategy::Centralised, 1, 1)).await?;
        let samples: Vec<usize> = one.figures.clients.iter().map(|c| c.samples).collect();
        ensure!(samples == [12], "{samples:?}");
        Ok(())
    })
}

/// A hundred clients of which most hold a single sample; some lack pictures, some questions.
pub fn a_hundred_with_few_samples() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let stage = stage(folder.path())?;
        let crowd = Simulation { clients: 100, samples: 130, text_only: 0.2, picture_only: 0.1, ..simulation() };
        let done = federate(&stage, folder.path(), &crowd, &settings(Strategy::Fisher, 100, 1)).await?;
        let updates: Vec<usize> = done.figures.rounds.iter().map(|r| r.updates).collect();
        ensure!(updates == [0, 100, 100], "{updates:?}");
        let samples: usize = done.figures.clients.iter().map(|c| c.samples).sum();
        ensure!(samples == 130, "{samples} samples");
        Ok(())
    })
}

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: simulate::Args,
}

/// The command with a file: two tasks, two seeds, a centralised run beside each, a line for each round.
pub fn simulate_with_a_file() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    for part in ["train", "test"] {
        std::fs::create_dir_all(at("data").join(part))?;
        let colours = ["red", "blue", "green"];
        let lines: String =
            (0..9).map(|i| format!("was {} used?,{}\n", colours[i % 3], ["yes", "no"][i % 2])).collect();
        std::fs::write(at("data").join(part).join("questions.csv"), format!("question,answer\n{lines}"))?;
    }
    let text = format!(
        "[simulation]\nmodel = '{}'\ndata = '{}'\nclients = 2\nsamples = 8\nevaluation_limit = 4\ntest_limit = 8\nseeds = [1, 2]\n\
         tasks = [\"data\", \"scenes\"]\ncentralised = true\n[federation]\nrank = 2\nrounds = 1\nbatch_size = 2\n\
         strategy = \"fedavg\"\n",
        fixture().display(),
        at("data").display()
    );
    std::fs::write(at("mine.toml"), text)?;
    let words = |name: &str| at(name).display().to_string();
    let (file, json, lines) = (words("mine.toml"), words("out.json"), words("out.jsonl"));
    let args = Cli::try_parse_from(["simulate", "--config", &file, "--json", &json, "--jsonl", &lines])?.args;
    block(LIMIT, async { simulate::main(&args).await })?;
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&json)?)?;
    let names: Vec<_> = report["runs"].as_array().context("no runs")?.iter().map(|r| r["name"].as_str()).collect();
    ensure!(names == ["seed-1", "seed-1-centralised", "seed-2", "seed-2-centralised"].map(Some), "{names:?}");
    let tasks = &report["runs"][0]["figures"]["global"]["tasks"];
    ensure!(tasks["data"]["samples"] == 4 && tasks["scenes"]["samples"] == 4, "{tasks}");
    let lines = std::fs::read_to_string(&lines)?;
    ensure!(lines.lines().count() == 8, "{lines}"); // round 0 and 1 of four runs
    for line in lines.lines() {
        let line: serde_json::Value = serde_json::from_str(line)?;
        for key in ["run", "seed", "round", "accuracy", "loss", "local", "bytes", "seconds", "participants", "late"] {
            ensure!(line.get(key).is_some(), "{key} is missing in {line}");
        }
    }
    // The defaults of the file are those of the code.
    ensure!(Config::default().simulation.clients == 5);
    Ok(())
}

fn study(out: &Path) -> Study {
    Study {
        model: nano_llava(),
        data: None,
        size: Size::Quick,
        groups: vec![Group::A, Group::H],
        seeds: vec![1],
        jobs: 1,
        device: DeviceChoice::Cpu,
        dtype: ComputeDtype::Auto,
        out: out.to_owned(),
    }
}

fn make(out: &Path) -> anyhow::Result<()> {
    study(out).run(tempfile::tempdir()?.path())
}

/// All pages but that of the times.
fn pages(out: &Path) -> anyhow::Result<BTreeMap<String, String>> {
    let mut pages = BTreeMap::new();
    for entry in std::fs::read_dir(out)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name != RUNS && name != "times.md" {
            pages.insert(name, std::fs::read_to_string(&path)?);
        }
    }
    Ok(pages)
}

/// Twice from nothing, and once from half of the runs and half a line: the same pages byte for byte.
pub fn the_study_reproduces_and_resumes() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let out = |name: &str| folder.path().join(name);
    make(&out("first"))?;
    let first = pages(&out("first"))?;
    for name in ["README.md", "reading.md", "accuracy-by-round.svg", "accuracy-by-alpha.svg", "bytes.svg"] {
        ensure!(first.contains_key(name), "{name} was not made: {:?}", first.keys());
    }
    let readme = &first["README.md"];
    ensure!(readme.contains("| fisher | ") && readme.contains("(1)") && !readme.contains("NaN"), "{readme}");
    make(&out("second"))?;
    ensure!(pages(&out("second"))? == first, "a second study gave other pages");

    let runs = std::fs::read_to_string(out("first").join(RUNS))?;
    let lines: Vec<&str> = runs.lines().collect();
    let half = lines[..lines.len() / 2].join("\n");
    let torn = &lines[lines.len() / 2][..40];
    std::fs::create_dir_all(out("resumed"))?;
    std::fs::write(out("resumed").join(RUNS), format!("{half}\n{torn}"))?;
    make(&out("resumed"))?;
    ensure!(pages(&out("resumed"))? == first, "a resumed study gave other pages");
    let resumed = std::fs::read_to_string(out("resumed").join(RUNS))?;
    ensure!(resumed.starts_with(&half) && resumed.lines().count() == lines.len(), "runs were made again, or lost");

    // With everything there, nothing is run.
    make(&out("resumed"))?;
    ensure!(std::fs::read_to_string(out("resumed").join(RUNS))? == resumed, "a finished study was run again");
    Ok(())
}
