//! A participant's loop, against a server that the test plays.

use super::stage::{Notes, Stage, take_part};
use super::{Bench, RANK, length, settings};
use anyhow::{Context, ensure};
use fednano_shared::boundary::{BoundaryRequest, Input, Part};
use fednano_shared::client::{Forgetful, Outcome};
use fednano_shared::edge::Batch;
use fednano_shared::plain::{AdapterState, TensorBlob};
use fednano_shared::settings::{AdapterChoice, BoundaryChoice, FederationSettings, OptimizerKind, Overlap, Strategy};
use fednano_shared::step;
use fednano_tests::{LIMIT, MODES, adapters_close, block};
use std::collections::BTreeSet;

/// The samples of a request, by what is at their text positions: the image adapter leaves those as they are.
fn samples_of(bench: &Bench, request: &BoundaryRequest) -> anyhow::Result<Vec<usize>> {
    let values = match &request.input {
        Input::Hidden(hidden) => hidden,
        Input::Codes(input) => &*input.x,
    };
    let dim = values.shape[1];
    let at = |blob: &TensorBlob, position: usize| blob.data[position * dim..][..dim].to_vec();
    let same = |start: usize, length: u32, sample: &Batch| {
        sample.positions.lengths == [length]
            && sample.positions.of(Part::Text).into_iter().all(|p| at(values, start + p) == at(&sample.x, p))
    };
    let singles: Vec<Batch> = (0..bench.cache.samples.len()).map(|i| bench.batch(&[i])).collect();
    let rows = request.positions.starts().into_iter().zip(&request.positions.lengths);
    rows.map(|(start, length)| singles.iter().position(|s| same(start, *length, s)).context("a row that is no sample"))
        .collect()
}

/// Nothing is added to the features.
fn untouched(bench: &Bench, request: &BoundaryRequest) -> bool {
    match &request.input {
        Input::Hidden(hidden) => {
            let known: BTreeSet<u32> = bench.all().x.data.iter().map(|v| v.to_bits()).collect();
            hidden.data.iter().all(|v| known.contains(&v.to_bits()))
        }
        Input::Codes(input) => input.up.iter().flat_map(|(_, up)| &up.data).all(|v| *v == 0.0),
    }
}

pub fn local_test() -> anyhow::Result<()> {
    block(LIMIT, async {
        for (boundary, _) in MODES {
            local_test_in(boundary).await?;
        }
        Ok(())
    })
}

async fn local_test_in(boundary: BoundaryChoice) -> anyhow::Result<()> {
    let bench = Bench::of(10).await?;
    let choice = FederationSettings { adapters: AdapterChoice::Image, local_test: 0.3, boundary, ..settings() };
    let settings = FederationSettings { rounds: 2, local_epochs: 2, strategy: Strategy::Fisher, ..choice };
    let stage = Stage::new(&bench, &settings);
    take_part(&bench, &stage, &mut Forgetful).await?;
    let mut trained = BTreeSet::new();
    for (_, request) in stage.trained.borrow().iter() {
        trained.extend(samples_of(&bench, request)?);
    }
    let mut judged = Vec::new();
    for request in stage.evaluated.borrow().iter() {
        judged.push(samples_of(&bench, request)?.into_iter().collect::<BTreeSet<_>>());
    }
    println!("trained on {trained:?}, judged by {judged:?}");
    ensure!(judged.len() == 4 && judged.iter().all(|rows| *rows == judged[0]), "twice a round, always the same");
    ensure!(trained.len() == 7 && judged[0].len() == 3 && trained.is_disjoint(&judged[0]), "{trained:?}");
    let updates = stage.updates.borrow();
    let locals = updates.iter().map(|u| u.local.context("no judgement")).collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(updates.iter().all(|u| u.samples == 7), "samples are counted that nobody trained on");
    ensure!(locals.iter().all(|l| (l.global.samples, l.own.samples) == (3, 3)), "{locals:?}");
    ensure!(locals[0].global == locals[1].global && locals[0].own.loss != locals[0].global.loss, "{locals:?}");
    Ok(())
}

pub fn local_steps() -> anyhow::Result<()> {
    block(LIMIT, async {
        let bench = Bench::of(6).await?;
        for (micro_batch, sizes) in [(0, vec![4]), (3, vec![3, 1])] {
            let settings = FederationSettings { rounds: 2, local_steps: 5, micro_batch, ..settings() };
            let settings = FederationSettings { strategy: Strategy::FedAvg, ..settings };
            let stage = Stage::new(&bench, &settings);
            let (_, steps) = take_part(&bench, &stage, &mut Forgetful).await?;
            let expected: Vec<_> = (1..=2).flat_map(|round| (1..=5).map(move |step| (round, step))).collect();
            ensure!(steps == expected, "{steps:?}");
            let found: Vec<usize> = stage.trained.borrow().iter().map(|(_, r)| r.positions.rows()).collect();
            ensure!(found == sizes.repeat(10), "requests of {found:?} samples");
        }
        Ok(())
    })
}

/// Stopped before each training request in turn, and gone on with from what was kept; in both modes, with one request under way and
/// with two.
pub fn reload() -> anyhow::Result<()> {
    block(LIMIT, async {
        let bench = Bench::of(10).await?;
        let cases = [
            (Strategy::Fisher, OptimizerKind::AdamW),
            (Strategy::FisherEf, OptimizerKind::Sgd),
            (Strategy::FisherAdam, OptimizerKind::AdamW),
            (Strategy::FedProx, OptimizerKind::Sgd),
            (Strategy::Local, OptimizerKind::AdamW),
            (Strategy::FedDpaF, OptimizerKind::AdamW),
        ];
        for (strategy, optimizer) in cases {
            for (boundary, overlap) in
                [(BoundaryChoice::Activations, Overlap::Off), (BoundaryChoice::LowRank, Overlap::Parts)]
            {
                let settings = FederationSettings { strategy, optimizer, boundary, overlap, ..settings() };
                let settings = FederationSettings { rounds: 2, micro_batch: 3, ..settings };
                reload_at_every_request(&bench, &FederationSettings { local_test: 0.2, clip_norm: 0.5, ..settings })
                    .await
                    .with_context(|| format!("{strategy}, {boundary}"))?;
            }
        }
        Ok(())
    })
}

async fn reload_at_every_request(bench: &Bench, settings: &FederationSettings) -> anyhow::Result<()> {
    let whole = Stage::new(bench, settings);
    let (expected, steps) = take_part(bench, &whole, &mut Forgetful).await?;
    let requests = whole.trained.borrow().len();
    for cut in 0..requests {
        let (stage, mut notes) = (Stage::new(bench, settings), Notes::default());
        stage.leave_after.set(Some(cut));
        let (left, before) = take_part(bench, &stage, &mut notes).await?;
        ensure!(left == Outcome::Left && notes.0.is_some(), "{cut}: {left:?}");
        stage.leave_after.set(None);
        let (outcome, after) = take_part(bench, &stage, &mut notes).await?;
        ensure!(outcome == expected, "it ends otherwise after a break at request {cut}");
        ensure!(*stage.updates.borrow() == *whole.updates.borrow(), "{cut}: other updates");
        ensure!(stage.personal.get() == whole.personal.get(), "{cut}: another judgement");
        // A step of which a part was answered is asked for again, and nothing else: it has two parts. So is the Fisher pass, whose
        // eight samples make one group of three requests.
        let again = stage.trained.borrow().len() - requests;
        let most = if settings.strategy == Strategy::Fisher { 2 } else { 1 };
        ensure!(again <= most, "{cut}: {again} requests were made twice");
        ensure!([before, after].concat() == steps, "{cut}: a step was done twice");
    }
    println!("{}, {}: {requests} breaks", settings.strategy, settings.boundary);
    Ok(())
}

/// A server that does not know who comes back has another federation, be its settings the same: the round begins at its beginning.
pub fn unknown() -> anyhow::Result<()> {
    block(LIMIT, async {
        let bench = Bench::of(8).await?;
        let settings = FederationSettings { strategy: Strategy::FedAvg, rounds: 1, local_steps: 3, ..settings() };
        for strange in [false, true] {
            let (stage, mut notes) = (Stage::new(&bench, &settings), Notes::default());
            stage.leave_after.set(Some(1));
            let (left, before) = take_part(&bench, &stage, &mut notes).await?;
            ensure!(left == Outcome::Left && before == [(1, 1)], "{left:?} after {before:?}");
            stage.leave_after.set(None);
            stage.strange.set(strange);
            let (outcome, after) = take_part(&bench, &stage, &mut notes).await?;
            let first = if strange { 1 } else { 2 };
            let expected: Vec<_> = (first..=3).map(|step| (1, step)).collect();
            ensure!(outcome != Outcome::Left && after == expected, "unknown: {strange}, then {after:?}");
        }
        Ok(())
    })
}

/// A federation that goes on in mid-round: the round is left, or ended late where late updates are merged.
pub fn late() -> anyhow::Result<()> {
    block(LIMIT, async {
        let bench = Bench::of(8).await?;
        for (max_staleness, expected) in [(0, vec![2, 3]), (1, vec![1, 2, 3])] {
            let settings = FederationSettings { strategy: Strategy::FedAvg, rounds: 3, max_staleness, ..settings() };
            let stage = Stage::new(&bench, &settings);
            stage.hurry_at.set(Some(0));
            let (outcome, _) = take_part(&bench, &stage, &mut Forgetful).await?;
            let rounds: Vec<u32> = stage.updates.borrow().iter().map(|u| u.round).collect();
            ensure!(rounds == expected && outcome != Outcome::Left, "updates of rounds {rounds:?}");
        }
        Ok(())
    })
}

/// What each strategy uploads, and what the participant ends with.
pub fn strategies() -> anyhow::Result<()> {
    block(LIMIT, async {
        let bench = Bench::of(5).await?;
        for strategy in Strategy::ALL {
            let settings = FederationSettings { strategy, rounds: 2, local_test: 0.2, ..settings() };
            let stage = Stage::new(&bench, &settings);
            let (outcome, _) = take_part(&bench, &stage, &mut Forgetful).await?;
            let Outcome::Finished { adapter, own, local } = outcome else {
                anyhow::bail!("{strategy}: it left");
            };
            ensure!(adapter == stage.adapter && local.is_some(), "{strategy}: another end");
            for update in stage.updates.borrow().iter() {
                let like = if strategy.uploads() { stage.adapter.clone() } else { AdapterState::default() };
                update.adapter.check_like(&like).with_context(|| strategy.to_string())?;
                ensure!(update.fisher.is_some() == strategy.fisher(), "{strategy}: Fisher values");
                if let Some(fisher) = &update.fisher {
                    fisher.check_like(&like)?;
                    let sound = fisher.0.values().flat_map(|b| &b.data).all(|v| *v >= 0.0);
                    ensure!(sound && length(fisher) > 0.0, "{strategy}: Fisher values are no squares");
                }
            }
            // The played server always sends adapters that do nothing; alone, one goes on from one's own.
            let trained = stage.trained.borrow();
            let (_, first) = trained.iter().find(|(round, _)| *round == 2).context("no second round")?;
            ensure!(untouched(&bench, first) == (strategy != Strategy::Local), "{strategy}: round 2 begins elsewhere");
            ensure!(own.is_some() == strategy.personal(), "{strategy}: own adapters");
            let rank = own.and_then(|own| own.rank());
            let expected = match strategy {
                Strategy::Local => Some(RANK),
                Strategy::FedDpaF => Some(2 * RANK),
                _ => None,
            };
            ensure!(rank == expected, "{strategy}: own adapters of rank {rank:?}");
            ensure!(stage.personal.get().is_some() == (strategy == Strategy::FedDpaF), "{strategy}: what is told");
        }
        Ok(())
    })
}

/// One step over everything: the second moment is the square of the batch's gradient, the mean of squares each sample's.
pub fn fisher_without_a_pass() -> anyhow::Result<()> {
    block(LIMIT, async {
        let bench = Bench::of(4).await?;
        for strategy in [Strategy::FisherEf, Strategy::FisherAdam] {
            let settings = FederationSettings { strategy, rounds: 1, ..settings() };
            let stage = Stage::new(&bench, &settings);
            take_part(&bench, &stage, &mut Forgetful).await?;
            ensure!(stage.trained.borrow().len() == 1, "{strategy}: extra requests");
            let (start, device) = (bench.adapters(&stage.adapter), &bench.halves.device);
            let mut expected = stage.adapter.zeros_like();
            if strategy == Strategy::FisherEf {
                step::fisher_group(&start, &[bench.all()], &mut bench.llm(), device, &mut expected).await?;
                expected.scale(0.25);
            } else {
                expected = step::gradients(&start, &bench.all(), &mut bench.llm(), device).await?.1;
                expected.0.values_mut().flat_map(|b| &mut b.data).for_each(|v| *v *= *v);
            }
            let updates = stage.updates.borrow();
            let found = updates.first().and_then(|u| u.fisher.as_ref()).context("no Fisher values")?;
            adapters_close(strategy.name(), found, &expected, 1e-3)?;
        }
        Ok(())
    })
}
