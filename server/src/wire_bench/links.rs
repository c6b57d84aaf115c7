//! Seconds a step takes over slow lines: a real server, a native participant, and a proxy with a delay and a rate between them.

use super::kept::{Kept, key};
use super::link::{Shape, proxy};
use super::setup::{Machine, Setup};
use super::{Bench, DEFAULT, MIXED, PLENTY, Variant, Work};
use crate::app::{App, HeldOutSource, ServerSettings, bind};
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
    pub(super) machine: Machine,
    dtype: DType,
}

/// The form of the participant's half of the model.
pub(super) const EDGE: EdgeDtype = EdgeDtype::F16;

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
    Ok(Nano { files, edge, device, machine: Machine::here(&name), dtype })
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
    /// Where both ends were.
    pub(super) machine: Machine,
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

    /// Steps after the first pass.
    pub(super) fn later_steps(self) -> usize {
        self.steps_of_a_pass() * (self.passes as usize).saturating_sub(1)
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
    let default = Variant::low_rank(DEFAULT, Format::Int8);
    let named = |name, overlap| Variant { name, overlap, ..default };
    vec![
        whole(Variant::activations("activations f32", Format::F32)),
        whole(Variant::activations("activations f16", Format::F16)),
        whole(Variant::low_rank("low-rank f32", Format::F32)),
        whole(Variant::low_rank("low-rank f16", Format::F16)),
        whole(Variant::mixed(MIXED)),
        whole(default),
        whole(Variant { name: "low-rank int8, deflated", compress: true, ..default }),
        Case { variant: named("low-rank int8, 4 parts", Overlap::Off), parts: true },
        Case { variant: named("low-rank int8, 4 parts overlapped", Overlap::Parts), parts: true },
        whole(named("low-rank int8, stale", Overlap::Stale)),
    ]
}

/// Rates of the lines, Mbit/s.
pub(super) const MEGABITS: [u64; 3] = [200, 20, 2];

/// All lines, in the order of the table.
pub(super) fn lines(bench: &Bench) -> Vec<Line> {
    if bench.quick() {
        return vec![Line { milliseconds: 10, megabits: 20 }];
    }
    let mut lines = vec![Line::OPEN];
    for megabits in MEGABITS {
        lines.extend([10, 50, 200].map(|milliseconds| Line { milliseconds, megabits }));
    }
    lines
}

impl Line {
    const OPEN: Self = Self { milliseconds: 0, megabits: 0 };

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

fn case_key(bench: &Bench, setup: &Setup, case: Case, line: Line) -> anyhow::Result<String> {
    let amount = Amount::of(bench);
    key("links", &(setup, settings(case, amount), line, amount))
}

/// A case and what is kept of it, line by line.
pub(super) struct Row {
    pub(super) case: Case,
    pub(super) outcomes: Vec<Option<Outcome>>,
}

/// Every case, whether there is anything of it or not.
pub(super) fn results(bench: &Bench, kept: &Kept) -> anyhow::Result<Vec<Row>> {
    let setup = Setup::last(bench, kept)?;
    let mut results = Vec::new();
    for case in cases() {
        let mut outcomes = Vec::new();
        for line in lines(bench) {
            outcomes.push(match &setup {
                Some(setup) => kept.get(&case_key(bench, setup, case, line)?),
                None => None,
            });
        }
        results.push(Row { case, outcomes });
    }
    Ok(results)
}

/// The federation of which nothing is kept.
const WARM_UP: &str = "warm-up";

/// Run what is missing, one after the other: they would share the processor otherwise. Before them one that does not count: what comes
/// first pays for memory and caches.
///
/// # Errors
/// A server that does not start, a participation that fails.
pub(super) fn measure(work: &mut Work<'_>) -> anyhow::Result<()> {
    let (bench, amount) = (work.bench, Amount::of(work.bench));
    let setup = Setup::now(work)?;
    let mut wanted = Vec::new();
    for line in lines(bench) {
        for case in cases() {
            let key = case_key(bench, &setup, case, line)?;
            if work.kept.get::<Outcome>(&key).is_none() {
                wanted.push((format!("case-{}", wanted.len()), key, case, line));
            }
        }
    }
    println!("lines: {} participations, the others are kept", wanted.len());
    let Some((_, _, first, _)) = wanted.first() else { return Ok(()) };
    let nano = nano(work)?;
    let mut federations = BTreeMap::from([(WARM_UP.to_owned(), settings(*first, amount))]);
    federations.extend(wanted.iter().map(|(name, _, case, _)| (name.clone(), settings(*case, amount))));
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
    let warm_up = take_part(&nano, &cache, address, WARM_UP, Line::OPEN, amount);
    runtime.block_on(warm_up).context("the participation before those that count failed")?;
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
        feature_cache: PLENTY,
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
        cache: &mut cache.clone(), // it is put into the case's format
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
        machine: nano.machine.clone(),
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
    use super::super::setup::tests::setup;
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn cases_and_lines_are_told_apart() {
        let mut bench = bench();
        bench.size = crate::experiment::grid::Size::Full;
        let (mut keys, one) = (BTreeSet::new(), setup(&bench, "abc"));
        for line in lines(&bench) {
            for case in cases() {
                settings(case, Amount::of(&bench)).validate_for_server().unwrap();
                keys.insert(case_key(&bench, &one, case, line).unwrap());
            }
        }
        assert_eq!(keys.len(), 100);
        let (case, line) = (cases()[0], lines(&bench)[0]);
        assert!(keys.insert(case_key(&bench, &setup(&bench, "abd"), case, line).unwrap()));
        let names: BTreeSet<&str> = cases().iter().map(|case| case.variant.name).collect();
        assert_eq!(names.len(), cases().len());
        let amount = Amount::of(&bench);
        assert_eq!((amount.samples % amount.batch, amount.later_steps()), (0, 4));
        assert!(cases().iter().any(|case| case.variant == Variant::low_rank(DEFAULT, Format::Int8) && !case.parts));
        assert_eq!(settings(cases()[8], amount).micro_batch, 4);
    }
}
