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
    Pretrain(commands::pretrain::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Pretrain(args) => commands::pretrain::main(&args),
    }
}
