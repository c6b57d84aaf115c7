//! Seconds a step takes over slow lines: a real server, a native participant, and a proxy with a delay and a rate between them.

use super::kept::{Kept, key};
use super::link::{Shape, proxy};
use super::{Bench, Variant, Work};
use crate::app::{App, FEATURE_CACHE, HeldOutSource, ServerSettings, bind};
use crate::edge_bundle;
use crate::llm_host::Order;
use crate::native::{SocketConnector, TokioClock};
use anyhow::Context;
use burn::tensor::{DType, Device};
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::client::{ClientEvent, Forgetful, Observer, Outcome as Ended, Participant, participate};
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::edge::{FeatureCache, NanoEdge};
use fednano_shared::ledger::Traffic;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::probe::{samples, shard};
use fednano_shared::settings::{FederationSettings, Format, Overlap, Strategy};
use fednano_shared::wire::agreement::Offer;
use fednano_shared::wire::{ClientKind, Hello, Purpose};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// nano-llava, as both ends have it.
pub(super) struct Nano {
    pub(super) files: ModelFiles,
    pub(super) edge: NanoEdge,
    pub(super) device: Device,
    dtype: DType,
}

/// The form of the participant's half of the model.
const EDGE: EdgeDtype = EdgeDtype::F16;

/// Load it.
///
/// # Errors
/// A model that cannot be used.
pub(super) fn nano(work: &Work<'_>) -> anyhow::Result<Nano> {
    let (device, name) = work.bench.device.open()?;
    let dtype = work.bench.dtype.choose(&work.bench.model, &device, &name)?;
    let files = ModelFiles::open(&work.bench.model)?;
    let bundle = edge_bundle::prepare(&work.bench.model, &files, EDGE, work.cache, |_, _| {})?;
    let edge = bundle.edge(&device)?;
    Ok(Nano { files, edge, device, dtype })
}

/// A variant, whole or in parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Case {
    pub(super) variant: Variant,
    /// A step's batch goes through the boundary in 4 parts.
    pub(super) parts: bool,
}

/// A line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Line {
    /// Round trip, ms.
    pub(super) milliseconds: u64,
    /// Mbit/s each way; 0: no limit.
    pub(super) megabits: u64,
}

/// What is measured of a participation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// Seconds a step while features are sent: the first pass over the samples.
    pub(super) first: f64,
    /// Seconds a step after that.
    pub(super) later: f64,
    /// Bytes that the line carried: up, down.
    pub(super) line: (u64, u64),
    /// Bytes of all frames, as the participant counted them: up, down.
    pub(super) frames: (u64, u64),
}

/// How much is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Amount {
    pub(super) samples: usize,
    pub(super) batch: usize,
    pub(super) passes: u32,
}

impl Amount {
    pub(super) fn of(bench: &Bench) -> Self {
        match bench.quick() {
            true => Self { samples: 8, batch: 4, passes: 2 },
            false => Self { samples: 32, batch: 16, passes: 3 },
        }
    }

    fn steps_of_a_pass(self) -> usize {
        self.samples / self.batch.max(1)
    }
}

/// The variants alone.
#[cfg(test)]
pub(super) fn variants() -> Vec<Variant> {
    cases().into_iter().map(|case| case.variant).collect()
}

/// All cases, in the order of the table.
pub(super) fn cases() -> Vec<Case> {
    let whole = |variant| Case { variant, parts: false };
    let mixed = Variant::mixed("low-rank mixed");
    let named = |name, overlap| Variant { name, overlap, ..mixed };
    vec![
        whole(Variant::activations("activations f32", Format::F32)),
        whole(Variant::activations("activations f16", Format::F16)),
        whole(Variant::low_rank("low-rank f32", Format::F32)),
        whole(Variant::low_rank("low-rank f16", Format::F16)),
        whole(Variant::low_rank("low-rank int8", Format::Int8)),
        whole(mixed),
        whole(Variant { name: "low-rank mixed, deflated", compress: true, ..mixed }),
        Case { variant: named("low-rank mixed, 4 parts", Overlap::Off), parts: true },
        Case { variant: named("low-rank mixed, 4 parts overlapped", Overlap::Parts), parts: true },
        whole(named("low-rank mixed, stale", Overlap::Stale)),
    ]
}

/// All lines, in the order of the table.
pub(super) fn lines(bench: &Bench) -> Vec<Line> {
    if bench.quick() {
        return vec![Line { milliseconds: 10, megabits: 20 }];
    }
    let mut lines = vec![Line { milliseconds: 0, megabits: 0 }];
    for megabits in [200, 20, 2] {
        lines.extend([10, 50, 200].map(|milliseconds| Line { milliseconds, megabits }));
    }
    lines
}

impl Line {
    fn shape(self) -> Shape {
        Shape::round_trip(Duration::from_millis(self.milliseconds), self.megabits)
    }

    /// In words.
    pub(super) fn words(self) -> String {
        match self.megabits {
            0 => "no limit".to_owned(),
            megabits => format!("{megabits} Mbit/s, {} ms", self.milliseconds),
        }
    }
}

fn settings(case: Case, amount: Amount) -> FederationSettings {
    let base = FederationSettings {
        strategy: Strategy::FedAvg,
        rounds: 1,
        local_epochs: amount.passes,
        batch_size: amount.batch,
        micro_batch: if case.parts { amount.batch.div_ceil(4) } else { 0 },
        round_deadline_s: 86_400,
        ..Default::default()
    };
    case.variant.of(&base)
}

fn case_key(bench: &Bench, case: Case, line: Line) -> anyhow::Result<String> {
    let amount = Amount::of(bench);
    key("links", &(settings(case, amount), line, amount, bench.model.display().to_string()))
}

/// A case and what is kept of it, line by line.
pub(super) struct Row {
    pub(super) case: Case,
    pub(super) outcomes: Vec<Option<Outcome>>,
}

/// Every case, whether there is anything of it or not.
pub(super) fn results(bench: &Bench, kept: &Kept) -> anyhow::Result<Vec<Row>> {
    let mut results = Vec::new();
    for case in cases() {
        let mut outcomes = Vec::new();
        for line in lines(bench) {
            outcomes.push(kept.get(&case_key(bench, case, line)?));
        }
        results.push(Row { case, outcomes });
    }
    Ok(results)
}

/// Run what is missing, one after the other: they would share the processor otherwise.
///
/// # Errors
/// A server that does not start, a participation that fails.
pub(super) fn measure(work: &mut Work<'_>) -> anyhow::Result<()> {
    let (bench, amount) = (work.bench, Amount::of(work.bench));
    let mut wanted = Vec::new();
    for line in lines(bench) {
        for case in cases() {
            let key = case_key(bench, case, line)?;
            if work.kept.get::<Outcome>(&key).is_none() {
                wanted.push((format!("case-{}", wanted.len()), key, case, line));
            }
        }
    }
    println!("lines: {} participations, the others are kept", wanted.len());
    if wanted.is_empty() {
        return Ok(());
    }
    let nano = nano(work)?;
    let federations =
        wanted.iter().map(|(name, _, case, _)| (name.clone(), settings(*case, amount))).collect::<BTreeMap<_, _>>();
    let shutdown = CancellationToken::new();
    let runtime = work.runtime;
    let (app, address, cache) = runtime.block_on(async {
        let cache = nano.edge.encode(&shard(DemoTheme::ALL[0], 1, amount.samples, 1), |_, _| {}).await?;
        let listener = bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let server = server(work, federations);
        let app = App::start(server, (&nano.device, nano.dtype), shutdown.clone()).await?;
        let app = std::sync::Arc::new(app);
        let serving = app.clone();
        anyhow::Ok((tokio::spawn(async move { serving.serve(listener).await }), address, cache))
    })?;
    let bar = ProgressBar::new(wanted.len() as u64);
    bar.set_style(ProgressStyle::with_template("{wide_bar} {pos}/{len} participations, {elapsed} spent, {eta} left")?);
    for (federation, key, case, line) in wanted {
        let name = format!("{}, {}", case.variant.name, line.words());
        let took = runtime.block_on(take_part(&nano, &cache, address, &federation, line, amount));
        let outcome = took.with_context(|| format!("'{name}' failed"))?;
        bar.suspend(|| println!("{name}: {:.2} s a step, later {:.2} s", outcome.first, outcome.later));
        work.kept.add(&key, &name, &outcome)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    shutdown.cancel();
    runtime.block_on(app)?
}

fn server(work: &Work<'_>, federations: BTreeMap<String, FederationSettings>) -> ServerSettings {
    ServerSettings {
        model: work.bench.model.clone(),
        www: PathBuf::from("www"),
        data_dir: work.cache.to_owned(),
        edge_dtype: EDGE,
        federations,
        held_out: HeldOutSource::Data(samples()),
        evaluation_limit: 0,
        order: Order::Arrival { merge: false },
        feature_cache: FEATURE_CACHE,
    }
}

async fn take_part(
    nano: &Nano,
    cache: &FeatureCache,
    to: SocketAddr,
    federation: &str,
    line: Line,
    amount: Amount,
) -> anyhow::Result<Outcome> {
    let proxy = proxy(to, line.shape()).await?;
    let me = Participant {
        hello: Hello {
            federation: federation.to_owned(),
            name: "bench".into(),
            kind: ClientKind::Native,
            device: "benchmark".into(),
            samples: cache.samples.len() as u32,
            edge_bytes: 0,
            purpose: Purpose::Train,
            resume: None,
            offer: Offer::of(cache, &nano.edge),
            download: None,
        },
        edge: &nano.edge,
        cache,
        device: &nano.device,
        max_tries: 1,
        keep_every: Duration::MAX,
    };
    let mut connector = SocketConnector::new(format!("ws://{}/ws", proxy.address()), CancellationToken::new());
    let mut watch = Watch::default();
    match participate(me, &mut connector, &TokioClock, &mut Forgetful, &mut watch).await? {
        Ended::Finished { .. } => {}
        Ended::Left => anyhow::bail!("the participant left"),
    }
    let (pass, all) = (amount.steps_of_a_pass(), watch.steps.len());
    let begun = watch.begun.context("no round began")?;
    let at = |step: usize| watch.steps.get(step).copied().with_context(|| format!("there were only {all} steps"));
    let (first, last) = (at(pass.saturating_sub(1))?, at(all.saturating_sub(1))?);
    let each = |time: Duration, steps: usize| time.as_secs_f64() / steps.max(1) as f64;
    Ok(Outcome {
        first: each(first.duration_since(begun), pass),
        later: each(last.duration_since(first), all - pass),
        line: proxy.bytes(),
        frames: (watch.traffic.up.total(), watch.traffic.down.total()),
    })
}

/// When steps are done.
#[derive(Default)]
struct Watch {
    begun: Option<Instant>,
    steps: Vec<Instant>,
    traffic: Traffic,
}

impl Observer for Watch {
    fn event(&mut self, event: ClientEvent<'_>) {
        match event {
            ClientEvent::Round { .. } => self.begun = Some(Instant::now()),
            ClientEvent::Step { .. } => self.steps.push(Instant::now()),
            ClientEvent::Traffic { rounds } => self.traffic = Traffic::sum(rounds.values()),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::bench;
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn cases_and_lines_are_told_apart() {
        let mut bench = bench();
        bench.size = crate::experiment::grid::Size::Full;
        let mut keys = BTreeSet::new();
        for line in lines(&bench) {
            for case in cases() {
                settings(case, Amount::of(&bench)).validate_for_server().unwrap();
                keys.insert(case_key(&bench, case, line).unwrap());
            }
        }
        assert_eq!(keys.len(), 100);
        let names: BTreeSet<&str> = cases().iter().map(|case| case.variant.name).collect();
        assert_eq!(names.len(), cases().len());
        let amount = Amount::of(&bench);
        assert_eq!(amount.samples % amount.batch, 0);
        assert_eq!(settings(cases()[8], amount).micro_batch, 4);
    }
}
