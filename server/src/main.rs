//! The `fednano` binary: parse, then run one subcommand.

use clap::Parser;
use fednano_server::commands;

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
    Fetch(commands::fetch::Args),
    Account(commands::account::Args),
    RandomModel(commands::random_model::Args),
    Resume(commands::resume::Args),
    Export(commands::export::Args),
    Eval(commands::eval::Args),
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let command = Cli::parse().command;
    // Hundreds of federations have much to say.
    let quiet = matches!(command, Command::Simulate(_) | Command::Paper(_));
    let usual = if quiet { "fednano_server=warn" } else { "fednano_server=info" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| usual.into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    match command {
        Command::Serve(args) => commands::serve::main(&args).await,
        Command::Join(args) => commands::join::main(&args).await,
        Command::Simulate(args) => commands::simulate::main(&args).await,
        Command::Paper(args) => commands::paper::main(&args).await,
        Command::Demo(args) => commands::demo::main(&args).await,
        Command::Ask(args) => commands::ask::main(&args).await,
        Command::Check(args) => tokio::task::spawn_blocking(move || commands::check::main(&args)).await?,
        Command::Bench(args) => tokio::task::spawn_blocking(move || commands::bench::main(&args)).await?,
        Command::Fetch(args) => tokio::task::spawn_blocking(move || commands::fetch::main(&args)).await?,
        Command::Account(args) => commands::account::main(&args),
        Command::RandomModel(args) => tokio::task::spawn_blocking(move || commands::random_model::main(&args)).await?,
        Command::Resume(args) => commands::resume::main(&args).await,
        Command::Export(args) => commands::export::main(&args),
        Command::Eval(args) => commands::eval::main(&args).await,
        Command::Pretrain(args) => tokio::task::spawn_blocking(move || commands::pretrain::main(&args)).await?,
    }
}
