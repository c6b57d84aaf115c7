//! The timeline that `--trace` writes: a Chrome trace, in which one sees that work and transfer overlap.

use super::{Scene, mixed, settings};
use anyhow::{Context, ensure};
use clap::Parser;
use fednano_server::commands::{serve, simulate};
use fednano_server::tracing_setup;
use fednano_shared::client::Outcome;
use fednano_shared::settings::{BoundaryChoice, FederationSettings, Overlap, Strategy};
use fednano_tests::{Heard, LIMIT, block, take_part};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};

/// Set for a process that is to write a timeline, to its file: a program has one timeline, and the tests are one program.
const AS_TRACED: &str = "FEDNANO_TESTS_TRACE";
/// With this overlap.
const OVERLAP: &str = "FEDNANO_TESTS_OVERLAP";
const STEPS: usize = 6;
const PARTS: usize = 4;

/// Train and write a timeline of it, if this process was started for that.
pub fn trace_if_asked() -> Option<ExitCode> {
    let path = std::env::var_os(AS_TRACED)?;
    let traced = || -> anyhow::Result<()> {
        let overlap: Overlap = std::env::var(OVERLAP)?.parse()?;
        let _trace = tracing_setup::start("warn", Some(Path::new(&path)))?;
        block(LIMIT, train(overlap))
    };
    Some(match traced() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    })
}

/// A server and a participant in this process, a socket between them.
async fn train(overlap: Overlap) -> anyhow::Result<()> {
    let settings = FederationSettings {
        overlap,
        strategy: Strategy::FedAvg,
        local_steps: STEPS as u32,
        batch_size: 8 * PARTS,
        micro_batch: 8,
        ..settings(BoundaryChoice::LowRank)
    };
    let scene = Scene::open(&mixed(), settings).await?;
    let outcome = take_part(&scene.edge, &scene.cache, &scene.server.socket, "one", &mut Heard::default()).await?;
    ensure!(matches!(outcome, Outcome::Finished { .. }), "it did not finish");
    scene.server.stop().await
}

/// A stretch of time, microseconds.
#[derive(Debug, Clone, Copy)]
struct Span {
    start: f64,
    end: f64,
}

impl Span {
    fn within(self, other: Self) -> bool {
        other.start <= self.start && self.end <= other.end
    }
}

/// All spans by name; each that was begun was ended.
fn spans(path: &Path) -> anyhow::Result<BTreeMap<String, Vec<Span>>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let events: Vec<Value> = serde_json::from_str(&text).context("no JSON list")?;
    let (mut open, mut all) = (BTreeMap::<(String, String), Vec<f64>>::new(), BTreeMap::<String, Vec<Span>>::new());
    for event in &events {
        let (ph, name) = (event["ph"].as_str().unwrap_or_default(), event["name"].as_str().unwrap_or_default());
        ensure!(event["pid"].is_number() && !name.is_empty(), "an event that no viewer takes: {event}");
        if ph == "M" {
            continue; // a thread's name
        }
        let ts = event["ts"].as_f64().with_context(|| format!("no time in {event}"))?;
        let key = (event["id"].to_string(), name.to_owned());
        match ph {
            "b" | "B" => open.entry(key).or_default().push(ts),
            "e" | "E" => {
                let start = open.get_mut(&key).and_then(Vec::pop).with_context(|| format!("no beginning: {event}"))?;
                all.entry(name.to_owned()).or_default().push(Span { start, end: ts });
            }
            _ => anyhow::bail!("an event of another kind: {event}"),
        }
    }
    let left: Vec<_> = open.iter().filter(|(_, starts)| !starts.is_empty()).collect();
    ensure!(left.is_empty(), "spans without an end: {left:?}");
    all.values_mut().for_each(|spans| spans.sort_by(|a, b| a.start.total_cmp(&b.start)));
    Ok(all)
}

/// Codes of a step that were made while the LLM worked on the same step.
fn overlapping(all: &BTreeMap<String, Vec<Span>>) -> anyhow::Result<usize> {
    let of =
        |name: &str| all.get(name).map(Vec::as_slice).with_context(|| format!("no span '{name}': {:?}", all.keys()));
    let (codes, llm, optimiser) = (of("codes")?, of("llm")?, of("optimiser")?);
    // A step ends with its optimiser.
    let step = |at: f64| optimiser.iter().filter(|o| o.start < at).count();
    let same = |c: &Span, l: &Span| c.within(*l) && step(c.start) == step(l.start);
    Ok(codes.iter().filter(|c| llm.iter().any(|l| same(c, l))).count())
}

/// It is JSON as viewers take it, with every part of every step; where parts overlap, codes are made while the LLM computes, and where
/// they do not, never.
pub fn timeline() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    for overlap in [Overlap::Off, Overlap::Parts] {
        let path = folder.path().join(format!("{overlap}.json"));
        let mut command = Command::new(std::env::current_exe()?);
        let ran = command.env(AS_TRACED, &path).env(OVERLAP, overlap.name()).output()?;
        ensure!(ran.status.success(), "{overlap}: {}", String::from_utf8_lossy(&ran.stderr));
        let all = spans(&path)?;
        let count = |name: &str| all.get(name).map_or(0, Vec::len);
        let requests = STEPS * PARTS;
        for (name, expected) in [("send", requests), ("backward", requests), ("optimiser", STEPS)] {
            ensure!(count(name) == expected, "{overlap}: {} spans '{name}', not {expected}", count(name));
        }
        // The server judges as well.
        for name in ["codes", "wait", "queue", "llm"] {
            ensure!(count(name) > requests, "{overlap}: {} spans '{name}' for {requests} requests", count(name));
        }
        let both = overlapping(&all)?;
        println!("{overlap}: {both} of {} codes were made while the LLM worked on their step", count("codes"));
        ensure!((both > 0) == (overlap == Overlap::Parts), "{overlap}: {both} codes overlap with the LLM's work");
    }
    // The flag itself.
    let serve = parse::<serve::Args>(&["serve", "--model", "m", "--trace", "a.json"])?;
    let simulate = parse::<simulate::Args>(&["simulate", "--trace", "b.json"])?;
    let found = (serve.trace.as_deref(), simulate.trace.as_deref());
    ensure!(found == (Some(Path::new("a.json")), Some(Path::new("b.json"))), "{found:?}");
    Ok(())
}

#[derive(Parser)]
struct Cli<A: clap::Args> {
    #[command(flatten)]
    args: A,
}

fn parse<A: clap::Args>(words: &[&str]) -> anyhow::Result<A> {
    Ok(Cli::<A>::try_parse_from(words.iter().copied())?.args)
}
