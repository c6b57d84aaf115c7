//! One thin file for each subcommand.

pub mod account;
pub mod ask;
pub mod bench;
pub mod bench_wire;
pub mod check;
pub mod demo;
pub mod eval;
pub mod export;
pub mod fetch;
pub mod join;
pub mod paper;
pub mod pretrain;
pub mod random_model;
pub mod resume;
pub mod serve;
pub mod settings;
pub mod simulate;

pub use settings::SettingFlags;
