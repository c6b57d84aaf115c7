//! What the program writes about itself: lines on standard error, and with `--trace FILE` a timeline of every step.
//!
//! The timeline is a Chrome trace (ui.perfetto.dev and chrome://tracing open it). Spans are drawn as asynchronous ones, each on a
//! line of its own: a client waits for an answer and computes the next codes at the same time, on one thread.

use anyhow::Context;
use std::fs::File;
use std::io;
use std::path::Path;
use tracing_chrome::{ChromeLayerBuilder, FlushGuard, TraceStyle};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, fmt};

/// What the spans of a timeline have their targets begin with.
const OWN: &str = "fednano";

/// Completes the timeline's file when it is dropped.
#[must_use = "the timeline ends where this is dropped"]
pub struct Trace(Option<FlushGuard>);

impl std::fmt::Debug for Trace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Trace").field(&self.0.is_some()).finish()
    }
}

/// Begin to write: lines as RUST_LOG has it (else `usual`), and a timeline into `trace`. Once in a program.
///
/// # Errors
/// A file that cannot be written.
pub fn start(usual: &str, trace: Option<&Path>) -> anyhow::Result<Trace> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| usual.into());
    let lines = fmt::layer().with_writer(io::stderr).with_target(false).with_filter(filter);
    let Some(path) = trace else {
        tracing_subscriber::registry().with(lines).init();
        return Ok(Trace(None));
    };
    let file = File::create(path)
        .with_context(|| format!("cannot write {}; name another file with --trace", path.display()))?;
    let (chrome, guard) = ChromeLayerBuilder::new()
        .writer(file)
        .include_args(true)
        .include_locations(false)
        .trace_style(TraceStyle::Async)
        .build();
    let timeline = chrome.with_filter(filter_fn(|what| what.is_span() && what.target().starts_with(OWN)));
    tracing_subscriber::registry().with(lines).with(timeline).init();
    Ok(Trace(Some(guard)))
}
