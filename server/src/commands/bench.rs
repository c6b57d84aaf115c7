//! `fednano bench`: what a checkpoint costs on this machine.

use crate::device::{ComputeDtype, DeviceChoice};
use crate::fetch::resolve_model;
use anyhow::Context;
use fednano_shared::boundary::{BoundaryRequest, CodesInput, Input, Pair, Part, Positions, Target, Want};
use fednano_shared::generate::{GenerateRequest, InProcessTokens, Sampling, TokenSource};
use fednano_shared::model::adapter::standard_normal;
use fednano_shared::model::checkpoint::load_llm;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::plain::TensorBlob;
use fednano_shared::step::FrozenLlm;
use futures_executor::block_on;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Measure a checkpoint's LLM: loading, a training step (forward, loss, backward to the boundary), decoding, and memory.
///
/// The step is what a server does for a participant's batch. Machines are noisy: compare only figures of runs side by side.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory (or a hub id fetched earlier); `fednano random-model` makes one of any shape.
    #[arg(long)]
    model: String,
    /// Where to compute.
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceChoice,
    /// Type of the LLM's weights and of what is computed with them.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: ComputeDtype,
    /// Rows of a training batch.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Positions of each row (0: the picture's and 32 of text).
    #[arg(long, default_value_t = 0)]
    positions: usize,
    /// Rank of the codes that the step gets, as in mode `low-rank` (0: whole embeddings, as in mode `activations`).
    #[arg(long, default_value_t = 0)]
    rank: usize,
    /// Steps that are timed, after one that is not.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    steps: u32,
    /// Tokens decoded after a prompt of the same length.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=100_000))]
    tokens: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What came out.
#[derive(Debug, Serialize)]
struct Figures {
    device: String,
    dtype: String,
    parameters: usize,
    batch: u32,
    positions: usize,
    rank: usize,
    load_s: f64,
    /// Median of the timed steps.
    step_s: f64,
    /// Positions of all rows over `step_s`: forward and backward.
    step_tokens_per_s: f64,
    prompt_s: f64,
    /// Tokens after the first, one at a time.
    decoded_tokens_per_s: f64,
    /// The LLM's weights in their compute type.
    weights_mb: f64,
    /// The process's own (anonymous) memory at its highest while loading, and over all; Linux only. The mapped files are cache.
    load_peak_mb: Option<f64>,
    peak_mb: Option<f64>,
}

/// Run it.
///
/// # Errors
/// A checkpoint or device that cannot be used, or a step that fails.
pub fn main(args: &Args) -> anyhow::Result<()> {
    let (device, name) = args.device.open()?;
    let model = resolve_model(&args.model)?;
    let dtype = args.dtype.choose(&model, &device, &name)?;
    let memory = Memory::watch();
    let started = Instant::now();
    let files = ModelFiles::open(&model)?;
    let autodiff = device.clone().autodiff();
    let llm = load_llm(&files.config, &files.weights, (&autodiff, dtype))?;
    device.sync().map_err(|e| anyhow::anyhow!("{name} does not finish loading: {e}; try another --device"))?;
    let load_s = started.elapsed().as_secs_f64();
    let load_peak_mb = memory.peak();
    let parameters = burn::module::Module::num_params(&llm);
    let llm = FrozenLlm::new(llm, &files.config.text, &autodiff);
    let text = &files.config.text;
    let positions = match args.positions {
        0 => (files.config.image_tokens() + 32).min(text.max_positions),
        asked => asked,
    };
    let (batch, dim) = (args.batch as usize, text.hidden);
    let request = request(args, positions, files.config.image_tokens(), dim)?;
    llm.check(&request)?;
    let mut seconds = Vec::new();
    for step in 0..=args.steps {
        let started = Instant::now();
        block_on(llm.train(&[&request]))?;
        if step > 0 {
            seconds.push(started.elapsed().as_secs_f64());
        }
    }
    seconds.sort_by(f64::total_cmp);
    let step_s = seconds.get(seconds.len() / 2).copied().unwrap_or_default();

    let prompt = positions.min(text.max_positions.saturating_sub(args.tokens as usize)).max(1);
    let mut source = InProcessTokens::new(&llm);
    let mut ask = |past: usize, new: usize| {
        let hidden = noise(&[1, new, dim]);
        block_on(source.next(GenerateRequest { past: past as u32, hidden, sampling: Sampling::GREEDY }))
    };
    let started = Instant::now();
    ask(0, prompt)?;
    let prompt_s = started.elapsed().as_secs_f64();
    let started = Instant::now();
    for token in 1..args.tokens as usize {
        ask(prompt + token - 1, 1)?;
    }
    let decoded = started.elapsed().as_secs_f64();

    let figures = Figures {
        device: name,
        dtype: dtype.name().to_owned(),
        parameters,
        batch: args.batch,
        positions,
        rank: args.rank,
        load_s,
        step_s,
        step_tokens_per_s: (batch * positions) as f64 / step_s,
        prompt_s,
        decoded_tokens_per_s: f64::from(args.tokens - 1) / decoded,
        weights_mb: (parameters * dtype.size()) as f64 / 1e6,
        load_peak_mb,
        peak_mb: memory.peak(),
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&figures)?);
    } else {
        let mb = |value: Option<f64>| value.map_or("unknown".to_owned(), |v| format!("{v:.0} MB"));
        println!("{} parameters of the LLM in {} on {}", figures.parameters, figures.dtype, figures.device);
        println!("loaded in {:.1} s", figures.load_s);
        println!(
            "step of {batch} x {positions} positions{}, forward and backward: {:.2} s, {:.0} tokens/s",
            if args.rank > 0 { format!(" in codes of rank {}", args.rank) } else { String::new() },
            figures.step_s,
            figures.step_tokens_per_s
        );
        println!("prompt of {prompt}: {:.2} s, then {:.1} tokens/s", figures.prompt_s, figures.decoded_tokens_per_s);
        println!(
            "own memory: {} at most while loading, {} in all (weights: {:.0} MB; a GPU's memory is not counted)",
            mb(figures.load_peak_mb),
            mb(figures.peak_mb),
            figures.weights_mb
        );
    }
    Ok(())
}

/// A batch of equally long rows, each with a picture if there is room for one.
fn request(args: &Args, positions: usize, picture: usize, dim: usize) -> anyhow::Result<BoundaryRequest> {
    let length = u32::try_from(positions)?;
    let image = if positions > picture { 1..1 + u32::try_from(picture)? } else { 0..0 };
    let rows = args.batch as usize;
    let places = Positions { lengths: vec![length; rows], images: vec![image; rows] };
    let total = rows.checked_mul(positions).context("this batch is too large; lower --batch or --positions")?;
    let codes = |part: Part| Some(noise(&[places.counts(part).iter().sum(), args.rank]));
    let up = || Some(noise(&[dim, args.rank]));
    let input = match args.rank {
        0 => Input::Hidden(noise(&[total, dim])),
        _ => Input::Codes(CodesInput {
            x: Arc::new(noise(&[total, dim])),
            codes: Pair { image: codes(Part::Image), text: codes(Part::Text) },
            up: Arc::new(Pair { image: up(), text: up() }),
        }),
    };
    let position = length.saturating_sub(1);
    let targets = (0..args.batch).map(|row| Target { row, position, token: 1 }).collect();
    Ok(BoundaryRequest { input, positions: places, targets, want: Want::Gradient })
}

/// Embeddings of the size that real ones have, from a fixed seed.
fn noise(shape: &[usize]) -> TensorBlob {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let count = shape.iter().product();
    TensorBlob { shape: shape.to_vec(), data: (0..count).map(|_| 0.02 * standard_normal(&mut rng)).collect() }
}

/// Samples the process's anonymous memory, since the system keeps only the peak of the sum with mapped files.
struct Memory {
    peak_kb: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Memory {
    fn watch() -> Self {
        let (peak_kb, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (peak, stopped) = (peak_kb.clone(), stop.clone());
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                peak.fetch_max(anonymous_kb().unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { peak_kb, stop }
    }

    fn peak(&self) -> Option<f64> {
        let kb = self.peak_kb.load(Ordering::Relaxed);
        (kb > 0).then(|| kb as f64 * 1024.0 / 1e6)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// `RssAnon` of Linux's `/proc/self/status`.
fn anonymous_kb() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("RssAnon:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
