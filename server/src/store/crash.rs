//! A testing aid: end the process at a chosen write, as `kill -9` would.
//!
//! Every transaction of the store passes two points: before it begins, and before it is committed. The process counts them from 1.
//!
//! | variable of the environment | effect |
//! | --- | --- |
//! | `FEDNANO_CRASH_AT=N` | the process is aborted at its N-th point |
//! | `FEDNANO_CRASH_LOG=FILE` | each point's number and name is appended to FILE |
//!
//! A test lets a run write the log, then kills the same run at each line of it in turn. Unset, a point costs one atomic addition.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// What the environment asks for.
struct Plan {
    at: Option<u64>,
    log: Option<PathBuf>,
}

impl Plan {
    fn of_the_environment() -> Self {
        let at = std::env::var("FEDNANO_CRASH_AT").ok().and_then(|word| {
            let number = word.parse().ok();
            if number.is_none() {
                tracing::error!("FEDNANO_CRASH_AT is '{word}', which is no number: it has no effect");
            }
            number
        });
        Self { at, log: std::env::var_os("FEDNANO_CRASH_LOG").map(PathBuf::from) }
    }
}

/// A point at which the process may be ended; `what` is done, `place` is where in it.
pub(super) fn point(what: &str, place: &str) {
    static POINTS: AtomicU64 = AtomicU64::new(0);
    static PLAN: OnceLock<Plan> = OnceLock::new();
    let number = POINTS.fetch_add(1, Ordering::Relaxed) + 1;
    let plan = PLAN.get_or_init(Plan::of_the_environment);
    if let Some(path) = &plan.log {
        let file = OpenOptions::new().create(true).append(true).open(path);
        if let Err(e) = file.and_then(|mut file| writeln!(file, "{number} {what}: {place}")) {
            tracing::error!("cannot write {}: {e}", path.display());
        }
    }
    if plan.at == Some(number) {
        std::process::abort();
    }
}
