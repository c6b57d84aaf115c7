//! One thin file for each subcommand.

pub mod pretrain;
