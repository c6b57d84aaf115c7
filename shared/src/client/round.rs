//! One local round, from its beginning to its update: [`run`] first, then what it does, in order.

use super::keep::{Desk, RoundSnapshot, hash_of};
use super::link::{Interruption, Link};
use super::remote::{Remote, settle};
use super::{Agreed, ClientError, ClientEvent, Clock, Keeper, Observer, Transport};
use crate::boundary::Want;
use crate::edge::Batch;
use crate::model::adapter::{DeviceError, NanoAdapters};
use crate::optimizer::AdapterOptimizer;
use crate::plain::AdapterState;
use crate::settings::{FederationSettings, Overlap, Strategy};
use crate::step::{self, Evaluation, StepRules};
use crate::wire::agreement::FISHER_GROUP;
use crate::wire::{ClientMessage, FaultCode, LocalEvaluation, ParticipantId, ServerMessage, Update};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// Train, measure, upload. Ends early where the federation went on without; what was done stays in `state`, so that the same
/// round goes on where it was.
///
/// # Errors
/// [`Interruption`]; `state` stays sound then too.
pub(super) async fn run<T: Transport, O: Observer, K: Clock, S: Keeper>(
    agreed: &Agreed<'_>,
    state: &mut LocalRound,
    link: &mut Link<'_, T, O>,
    desk: &mut Desk<'_, K, S>,
) -> Result<(), Interruption> {
    let strategy = agreed.settings.strategy;
    // 1. The federation's adapters on the own test samples.
    if state.judges() && state.global.is_none() {
        let received = NanoAdapters::from_state(&state.start, agreed.me.device);
        let Some(judged) = judge(agreed, state, &received, link).await? else { return Ok(()) };
        state.global = Some(judged);
    }
    // 2. Training.
    if !train(agreed, state, link, desk).await? {
        return Ok(());
    }
    // 3. Fisher, where it needs a pass of its own.
    if strategy == Strategy::Fisher && !fisher_pass(agreed, state, link, desk).await? {
        return Ok(());
    }
    // 4. The own adapters on the own test samples.
    if state.judges() && state.own.is_none() {
        let Some(judged) = judge(agreed, state, &state.adapters, link).await? else { return Ok(()) };
        state.own = Some(judged);
    }
    // 5. The update.
    if state.result.is_none() {
        state.result = Some(state.finish(agreed).await?);
        if desk.keeps() {
            desk.keep(state.snapshot().await?).await;
        }
        if let Some(local) = state.local() {
            link.observer.event(ClientEvent::Local { round: state.round, local: &local });
        }
    }
    hand_in(state, link).await
}

/// Evaluate adapters on the own test samples; none: cancelled.
pub(super) async fn judge<T: Transport, O: Observer>(
    agreed: &Agreed<'_>,
    state: &LocalRound,
    adapters: &NanoAdapters,
    link: &mut Link<'_, T, O>,
) -> Result<Option<Evaluation>, Interruption> {
    let Agreed { me, settings, .. } = agreed;
    let mut boundary = Remote::new(link, state.round, settings.max_staleness);
    let (rows, size) = (&state.plan.test, at_once(settings)); // what training sends at once fits
    let judged = step::evaluate(me.edge, Some(adapters), me.cache, rows, size, &mut boundary, me.device).await;
    settle(judged)
}

/// All optimiser steps that are left; false: cancelled.
///
/// With overlap `stale` the next step's codes are on their way before the answer to this step has come: they are made with adapters that
/// lack one step. Nothing of such a step is kept: whoever comes back begins it anew. A round's last step leaves none behind.
pub(super) async fn train<T: Transport, O: Observer, K: Clock, S: Keeper>(
    agreed: &Agreed<'_>,
    state: &mut LocalRound,
    link: &mut Link<'_, T, O>,
    desk: &mut Desk<'_, K, S>,
) -> Result<bool, Interruption> {
    let Agreed { me, settings, agreement, .. } = agreed;
    let (round, steps) = (state.round, state.steps());
    // Two steps of one request each: as many as may be under way.
    let ahead = agreement.overlap == Overlap::Stale && at_once(settings) >= settings.batch_size;
    let near = settings.strategy == Strategy::FedProx && !state.personal;
    let start = near.then(|| NanoAdapters::from_state(&state.start, me.device));
    let mut next = None; // the step after this one, where it has begun
    while state.step < steps {
        let now = match next.take() {
            Some(begun) => begun,
            None => {
                let Some(begun) = begin(agreed, state, state.step, link).await? else { return Ok(false) };
                begun
            }
        };
        if ahead && now.all_sent() && state.step + 1 < steps {
            next = begin(agreed, state, state.step + 1, link).await?;
            if next.is_none() {
                return Ok(false);
            }
        }
        let rules = StepRules {
            rate: settings.rate(round, state.step, steps),
            prox: start.as_ref().map(|start| (settings.prox_mu, start)),
            clip_norm: settings.clip_norm,
        };
        let mut boundary = Remote::new(link, round, settings.max_staleness);
        let (adapters, optimizer) = (&mut state.adapters, &mut state.optimizer);
        let report = step::finish_step(now, adapters, optimizer, &rules, &mut boundary, me.device).await;
        let Some(report) = settle(report)? else { return Ok(false) };
        link.progressed = true; // not at the welcome: a server whose LLM is gone still welcomes
        state.step += 1;
        state.loss_sum += f64::from(report.loss);
        if let Some(squares) = &report.squares {
            state.fisher.add(squares);
            state.fisher_done += report.samples;
        }
        if desk.is_due() {
            desk.keep(state.snapshot().await?).await;
        }
        let (step, loss) = (state.step, report.loss);
        link.observer.event(ClientEvent::Step { round, step, steps, loss, samples: report.samples });
        if !state.personal {
            let (step, steps) = (step as u32, steps as u32);
            link.send(&ClientMessage::Progress { round, step, steps, loss }).await?;
        }
        link.tell(desk.now());
    }
    Ok(true)
}

/// Make and send the codes of a step, as many as may be under way; none: cancelled.
async fn begin<T: Transport, O: Observer>(
    agreed: &Agreed<'_>,
    state: &LocalRound,
    step: usize,
    link: &mut Link<'_, T, O>,
) -> Result<Option<step::Begun>, Interruption> {
    let Agreed { me, settings, .. } = agreed;
    let parts = batches(agreed, state.plan.rows_of(step))?;
    let want = if state.wants_squares(settings, step) { Want::Both } else { Want::Gradient };
    let mut boundary = Remote::new(link, state.round, settings.max_staleness);
    settle(step::begin_step(&state.adapters, &parts, want, &mut boundary, me.device).await)
}

/// Samples as batches of one request each.
fn batches(agreed: &Agreed<'_>, rows: &[usize]) -> Result<Vec<Batch>, ClientError> {
    let Agreed { me, settings, .. } = agreed;
    let requests = rows.chunks(at_once(settings));
    let batches = requests.map(|rows| me.edge.batch(me.cache, rows)).collect::<Result<Vec<Batch>, _>>();
    batches.map_err(|e| ClientError::Step(e.to_string()))
}

/// Squares of each sample's gradients with the trained adapters; false: cancelled.
async fn fisher_pass<T: Transport, O: Observer, K: Clock, S: Keeper>(
    agreed: &Agreed<'_>,
    state: &mut LocalRound,
    link: &mut Link<'_, T, O>,
    desk: &mut Desk<'_, K, S>,
) -> Result<bool, Interruption> {
    let Agreed { me, settings, .. } = agreed;
    let round = state.round;
    let all = state.plan.pass.len();
    let wanted = if settings.fisher_samples == 0 { all } else { settings.fisher_samples.min(all) };
    while state.fisher_done < wanted {
        let left = state.plan.pass.get(state.fisher_done..wanted).unwrap_or_default();
        let rows = left.chunks(at_once(settings).saturating_mul(FISHER_GROUP)).next().unwrap_or_default();
        let (parts, samples) = (rows.chunks(at_once(settings)).map(|rows| me.edge.batch(me.cache, rows)), rows.len());
        let mut boundary = Remote::new(link, round, settings.max_staleness);
        let fisher = &mut state.fisher;
        let done = step::fisher_parts(&state.adapters, parts, &mut boundary, me.device, fisher).await;
        if settle(done)?.is_none() {
            return Ok(false);
        }
        state.fisher_done += samples;
        link.progressed = true;
        if desk.is_due() {
            desk.keep(state.snapshot().await?).await;
        }
        link.observer.event(ClientEvent::Fisher { round, done: state.fisher_done, all: wanted });
        link.tell(desk.now());
    }
    Ok(true)
}

/// Samples of one request.
fn at_once(settings: &FederationSettings) -> usize {
    let size = if settings.micro_batch == 0 { settings.batch_size } else { settings.micro_batch };
    size.max(1)
}

/// Send the update and hear what becomes of it; orders that come meanwhile are left for later.
pub(super) async fn hand_in<T: Transport, O: Observer>(
    state: &mut LocalRound,
    link: &mut Link<'_, T, O>,
) -> Result<(), Interruption> {
    let Some(result) = &state.result else { return Ok(()) };
    link.send(&ClientMessage::Update(result.update.clone())).await?;
    loop {
        match link.listen().await? {
            ServerMessage::UpdateAccepted { round } if round == state.round => {
                link.progressed = true;
                link.observer.event(ClientEvent::Uploaded { round, adapter: &result.trained });
                break;
            }
            ServerMessage::UpdateRefused { round, fault } if round == state.round => {
                link.observer.event(ClientEvent::NotCounted { round, fault: &fault });
                if !matches!(fault.code, FaultCode::StaleRound | FaultCode::OutOfOrder | FaultCode::Finished) {
                    return Err(ClientError::Refused(fault).into());
                }
                break;
            }
            ServerMessage::Refused(fault) => return Err(ClientError::Refused(fault).into()),
            order @ (ServerMessage::Round { .. } | ServerMessage::Wait { .. } | ServerMessage::Finished { .. }) => {
                link.order = Some(order);
            }
            // Answers to what was cancelled.
            _ => {}
        }
    }
    state.answered = true;
    Ok(())
}

/// What is kept of a round while connections come and go.
pub(super) struct LocalRound {
    pub(super) round: u32,
    /// After the federation's end, for the own good alone: nothing is measured for a merge, nothing uploaded.
    personal: bool,
    /// The federation's adapters at its beginning.
    pub(super) start: AdapterState,
    pub(super) adapters: NanoAdapters,
    optimizer: AdapterOptimizer,
    plan: Plan,
    pub(super) step: usize,
    loss_sum: f64,
    fisher: AdapterState,
    fisher_done: usize, // samples in `fisher`
    pub(super) global: Option<Evaluation>,
    pub(super) own: Option<Evaluation>,
    result: Option<LocalResult>,
    answered: bool,
}

/// What a finished round gives.
struct LocalResult {
    trained: AdapterState,
    update: Update,
}

impl LocalRound {
    /// From the beginning. Training starts from the federation's adapters `start`, or from `own` instead.
    pub(super) fn begin(agreed: &Agreed<'_>, round: u32, start: AdapterState, own: Option<&AdapterState>) -> Self {
        let Agreed { me, settings, id, .. } = agreed;
        let personal = round > settings.rounds;
        let epochs = if personal { settings.personal_epochs } else { settings.local_epochs };
        let steps = if personal { 0 } else { settings.local_steps as usize };
        Self {
            round,
            personal,
            adapters: NanoAdapters::from_state(own.unwrap_or(&start), me.device),
            optimizer: AdapterOptimizer::new(settings),
            plan: Plan::draw(settings, *id, me.cache.samples.len(), round, epochs, steps),
            step: 0,
            loss_sum: 0.0,
            fisher: start.zeros_like(),
            fisher_done: 0,
            global: None,
            own: None,
            result: None,
            answered: false,
            start,
        }
    }

    /// From where it was kept; none, if that is another round, or one that began with other adapters.
    pub(super) fn resume(agreed: &Agreed<'_>, round: u32, start: &AdapterState, kept: &RoundSnapshot) -> Option<Self> {
        if kept.round != round || kept.start != hash_of(start) {
            return None;
        }
        // What the hash of the settings does not rule out: a damaged snapshot must not harm.
        kept.adapter.check_like(start).ok()?;
        kept.fisher.check_like(start).ok()?;
        let device = agreed.me.device;
        let optimizer = AdapterOptimizer::restored(&agreed.settings, &kept.optimizer, start, device).ok()?;
        let mut state = Self::begin(agreed, round, start.clone(), Some(&kept.adapter));
        state.optimizer = optimizer;
        state.step = kept.step as usize;
        state.loss_sum = kept.loss_sum;
        state.fisher = kept.fisher.clone();
        state.fisher_done = kept.fisher_done as usize;
        (state.global, state.own) = (kept.global, kept.own);
        (state.step <= state.steps()).then_some(state)
    }

    pub(super) async fn snapshot(&self) -> Result<RoundSnapshot, DeviceError> {
        Ok(RoundSnapshot {
            round: self.round,
            start: hash_of(&self.start),
            step: self.step as u64,
            loss_sum: self.loss_sum,
            adapter: self.adapters.to_state().await?,
            optimizer: self.optimizer.to_state().await?,
            fisher: self.fisher.clone(),
            fisher_done: self.fisher_done as u64,
            global: self.global,
            own: self.own,
        })
    }

    pub(super) fn steps(&self) -> usize {
        self.plan.steps()
    }

    /// The step's squared gradients are part of the Fisher values.
    fn wants_squares(&self, settings: &FederationSettings, step: usize) -> bool {
        settings.strategy == Strategy::FisherEf && !self.personal && self.plan.in_last_pass(step)
    }

    /// There are own test samples.
    pub(super) fn judges(&self) -> bool {
        !self.plan.test.is_empty()
    }

    /// The own judgement, once both halves of it are made.
    pub(super) fn local(&self) -> Option<LocalEvaluation> {
        Some(LocalEvaluation { global: self.global?, own: self.own? })
    }

    /// Its update is made, but nobody has said what became of it.
    pub(super) fn is_unanswered(&self) -> bool {
        self.result.is_some() && !self.answered
    }

    async fn finish(&self, agreed: &Agreed<'_>) -> Result<LocalResult, DeviceError> {
        let strategy = agreed.settings.strategy;
        let trained = self.adapters.to_state().await?;
        let fisher = match strategy {
            Strategy::FisherAdam => self.optimizer.second_moment().await?,
            _ if strategy.fisher() => {
                let mut mean = self.fisher.clone();
                mean.scale(1.0 / self.fisher_done.max(1) as f32);
                Some(mean)
            }
            _ => None,
        };
        let update = Update {
            round: self.round,
            adapter: if strategy.uploads() { trained.clone() } else { AdapterState::default() },
            fisher,
            samples: self.plan.pass.len() as u32,
            loss: (self.loss_sum / self.steps().max(1) as f64) as f32,
            local: self.local(),
        };
        Ok(LocalResult { trained, update })
    }
}

/// Which samples a round trains on, in which order, and which it never does.
struct Plan {
    batch_size: usize,
    /// All steps' samples, one after the other.
    order: Vec<usize>,
    /// The last pass over all training samples; the Fisher pass takes them in this order.
    pass: Vec<usize>,
    test: Vec<usize>,
}

impl Plan {
    /// `samples` of participant `id`: `epochs` passes, or so many passes that they make `steps` (0: all of `epochs`).
    fn draw(
        settings: &FederationSettings,
        id: ParticipantId,
        samples: usize,
        round: u32,
        epochs: u32,
        steps: usize,
    ) -> Self {
        let test = test_samples(settings, id, samples);
        let training: Vec<usize> = (0..samples).filter(|row| test.binary_search(row).is_err()).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        rng.set_stream(u64::from(round) << 32 | u64::from(id.0));
        let batch_size = settings.batch_size.max(1);
        let passes = match steps {
            0 => epochs as usize,
            _ => (steps * batch_size).div_ceil(training.len().max(1)),
        };
        let (mut order, mut pass) = (Vec::new(), training.clone());
        for _ in 0..passes {
            pass.clone_from(&training); // each pass is shuffled from the same beginning
            pass.shuffle(&mut rng);
            order.extend_from_slice(&pass);
        }
        if steps > 0 {
            order.truncate(steps * batch_size);
        }
        Self { batch_size, order, pass, test }
    }

    fn steps(&self) -> usize {
        self.order.len().div_ceil(self.batch_size)
    }

    fn rows_of(&self, step: usize) -> &[usize] {
        self.order.chunks(self.batch_size).nth(step).unwrap_or_default()
    }

    /// The step has samples of the last pass; where passes end in mid-step, the step that the last one begins in is one.
    fn in_last_pass(&self, step: usize) -> bool {
        (step + 1) * self.batch_size > self.order.len().saturating_sub(self.pass.len())
    }
}

/// The test samples of participant `id` among its `samples`, in order: drawn once, the same in every round. At least one where a
/// share is asked for, but one sample at least is left to train on.
pub fn test_samples(settings: &FederationSettings, id: ParticipantId, samples: usize) -> Vec<usize> {
    let wanted = (settings.local_test * samples as f64).round() as usize;
    let least = usize::from(settings.local_test > 0.0);
    let count = wanted.max(least).min(samples.saturating_sub(1));
    let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
    rng.set_stream(u64::from(id.0)); // rounds count from 1: none draws its order from this stream
    let mut rows: Vec<usize> = (0..samples).collect();
    rows.shuffle(&mut rng);
    rows.truncate(count);
    rows.sort_unstable();
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const ME: ParticipantId = ParticipantId(7);

    fn plan(settings: &FederationSettings, samples: usize, round: u32) -> Plan {
        let (epochs, steps) = (settings.local_epochs, settings.local_steps as usize);
        Plan::draw(settings, ME, samples, round, epochs, steps)
    }

    #[test]
    fn epochs_take_every_sample_once_each() {
        let settings = FederationSettings { local_epochs: 3, batch_size: 4, ..Default::default() };
        let plan = plan(&settings, 10, 1);
        assert_eq!(plan.steps(), 8); // 30 samples in fours
        for pass in plan.order.chunks(10) {
            assert_eq!(pass.iter().collect::<BTreeSet<_>>().len(), 10);
        }
        assert_eq!(plan.order[20..], plan.pass[..]);
        let last: Vec<bool> = (0..8).map(|step| plan.in_last_pass(step)).collect();
        assert_eq!(last, [false, false, false, false, false, true, true, true]); // from sample 20 on
    }

    #[test]
    fn steps_are_counted_whatever_the_samples() {
        for samples in [1, 3, 10, 100] {
            let settings = FederationSettings { local_steps: 5, batch_size: 4, ..Default::default() };
            let plan = plan(&settings, samples, 1);
            assert_eq!((plan.steps(), plan.order.len(), plan.pass.len()), (5, 20, samples));
            assert!((0..5).all(|step| plan.rows_of(step).len() == 4));
            assert!(plan.in_last_pass(4));
        }
        let settings = FederationSettings { local_steps: 5, ..Default::default() };
        assert_eq!(plan(&settings, 0, 1).steps(), 0);
    }

    #[test]
    fn test_samples_are_never_trained_on_and_stay_the_same() {
        let settings = FederationSettings { local_test: 0.25, local_epochs: 2, ..Default::default() };
        let first = plan(&settings, 20, 1);
        assert_eq!(first.test.len(), 5);
        for round in 1..5 {
            let plan = plan(&settings, 20, round);
            assert_eq!(plan.test, first.test);
            let seen: BTreeSet<usize> = plan.order.iter().chain(&plan.test).copied().collect();
            assert_eq!(seen.len(), 20);
            assert!(plan.test.iter().all(|row| !plan.order.contains(row) && !plan.pass.contains(row)));
        }
        assert_ne!(test_samples(&settings, ParticipantId(8), 20), first.test);
        // One is left to train on; without a share none is kept back.
        assert_eq!([1, 2, 3].map(|n| test_samples(&settings, ME, n).len()), [0, 1, 1]);
        assert!(test_samples(&FederationSettings::default(), ME, 20).is_empty());
    }

    #[test]
    fn rounds_draw_other_orders_and_seeds_repeat_them() {
        let settings = FederationSettings::default();
        let order = |round, seed| plan(&FederationSettings { seed, ..settings.clone() }, 30, round).order;
        assert_eq!(order(1, 1), order(1, 1));
        assert_ne!(order(1, 1), order(2, 1));
        assert_ne!(order(1, 1), order(1, 2));
    }
}
