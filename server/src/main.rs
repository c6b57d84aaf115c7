//! The `fednano` binary: parse, then run one subcommand.

use clap::Parser;
use fednano_server::{commands, tracing_setup};
use std::path::Path;

/// Tensor work allocates and frees megabytes all the time; glibc gives such blocks back to the system each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Federated tuning of multimodal LLMs that people join from a web page.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Serve(commands::serve::Args),
    Join(commands::join::Args),
    Simulate(commands::simulate::Args),
    Paper(commands::paper::Args),
    Demo(commands::demo::Args),
    Pretrain(commands::pretrain::Args),
    Ask(commands::ask::Args),
    Check(commands::check::Args),
    Bench(commands::bench::Args),
    BenchWire(commands::bench_wire::Args),
    Fetch(commands::fetch::Args),
    Account(commands::account::Args),
    RandomModel(commands::random_model::Args),
    Resume(commands::resume::Args),
    Export(commands::export::Args),
    Eval(commands::eval::Args),
}

impl Command {
    /// File for a timeline of every step.
    fn trace(&self) -> Option<&Path> {
        match self {
            Self::Serve(args) => args.trace.as_deref(),
            Self::Join(args) => args.trace.as_deref(),
            Self::Simulate(args) => args.trace.as_deref(),
            _ => None,
        }
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let command = Cli::parse().command;
    // Hundreds of federations have much to say.
    let quiet = matches!(command, Command::Simulate(_) | Command::Paper(_) | Command::BenchWire(_));
    let usual = if quiet { "fednano_server=warn" } else { "fednano_server=info" };
    let _trace = tracing_setup::start(usual, command.trace())?; // the timeline's file is complete when it is dropped
    match command {
        Command::Serve(args) => commands::serve::main(&args).await,
        Command::Join(args) => commands::join::main(&args).await,
        Command::Simulate(args) => commands::simulate::main(&args).await,
        Command::Paper(args) => commands::paper::main(&args).await,
        Command::Demo(args) => commands::demo::main(&args).await,
        Command::Ask(args) => commands::ask::main(&args).await,
        Command::Check(args) => tokio::task::spawn_blocking(move || commands::check::main(&args)).await?,
        Command::Bench(args) => tokio::task::spawn_blocking(move || commands::bench::main(&args)).await?,
        Command::BenchWire(args) => commands::bench_wire::main(&args).await,
        Command::Fetch(args) => tokio::task::spawn_blocking(move || commands::fetch::main(&args)).await?,
        Command::Account(args) => commands::account::main(&args),
        Command::RandomModel(args) => tokio::task::spawn_blocking(move || commands::random_model::main(&args)).await?,
        Command::Resume(args) => commands::resume::main(&args).await,
        Command::Export(args) => commands::export::main(&args),
        Command::Eval(args) => commands::eval::main(&args).await,
        Command::Pretrain(args) => tokio::task::spawn_blocking(move || commands::pretrain::main(&args)).await?,
    }
}
