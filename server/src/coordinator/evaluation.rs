//! Merging a round and judging the merge. A merge becomes the federation's adapters only once it has been judged and is on disk,
//! so that no update can destroy the federation; until then its updates are on disk, so that a restart makes it again.

use super::round::Event;
use super::{Command, Coordinator, members};
use crate::held_out::HeldOut;
use crate::llm_host::LlmHandle;
use fednano_shared::aggregate::{self, ClientUpdate, StrategyState};
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::FederationSettings;
use fednano_shared::step::Evaluation;
use fednano_shared::wire::{LocalEvaluation, ParticipantId, RoundResult, Update};
use tokio::sync::oneshot;

/// A merge under way, without its tensors.
pub(super) struct Pending {
    round: u32,
    from: Vec<(ParticipantId, u32)>, // with the round each was trained in
    training_loss: Option<f32>,
    local: Option<LocalEvaluation>,
}

/// What a thread of its own merges and judges.
struct Work {
    settings: FederationSettings,
    global: AdapterState,
    state: StrategyState,
    updates: Vec<ClientUpdate>, // none: judge the untouched model
    previous: Option<Evaluation>,
}

/// What came of it.
pub(super) struct Judged {
    merged: Option<(AdapterState, StrategyState)>,
    evaluation: Result<Evaluation, String>,
    /// Nor can the adapters from before the merge be judged (any more): that is not the updates' fault.
    broken: bool,
}

impl Work {
    fn run(mut self, held_out: &HeldOut, llm: &LlmHandle) -> Judged {
        let judge = |adapter: &AdapterState| held_out.evaluate(Some(adapter), &held_out.rows, llm).and_then(sound);
        if self.updates.is_empty() {
            return Judged { evaluation: judge(&self.global), merged: None, broken: false };
        }
        match aggregate::merge(&self.settings, &self.global, self.updates, &mut self.state) {
            Ok(merged) => {
                if !merged.shortened.is_empty() {
                    let whose: Vec<u32> = merged.shortened.iter().map(|id| id.0).collect();
                    tracing::warn!(participants = ?whose, "updates far longer than the others' were shortened");
                }
                // Adapters that have not moved are as good as they were.
                let known = self.previous.filter(|_| merged.adapter == self.global);
                let evaluation = known.map_or_else(|| judge(&merged.adapter), Ok);
                let broken = evaluation.is_err() && judge(&self.global).is_err();
                Judged { evaluation, merged: Some((merged.adapter, self.state)), broken }
            }
            // Each update was validated on arrival; should it fail all the same, the old adapters stay.
            Err(cause) => Judged { evaluation: Err(cause.to_string()), merged: None, broken: false },
        }
    }
}

impl Coordinator {
    /// Merge the updates of these, trained in these rounds, and have the result judged.
    pub(super) fn merge(&mut self, round: u32, from: Vec<(ParticipantId, u32)>) {
        // Whoever still trains does it for a later merge, or for none.
        self.llm.release_all();
        let (mut updates, mut losses, mut locals) = (Vec::new(), Vec::new(), Vec::new());
        for (id, trained) in &from {
            if let Some(update) = self.updates.remove(&(*id, *trained)) {
                losses.extend(Some(update.loss).filter(|loss| loss.is_finite()));
                locals.extend(update.local);
                updates.push(client_update(*id, update, round.saturating_sub(*trained)));
            }
        }
        let training_loss = (!losses.is_empty()).then(|| losses.iter().sum::<f32>() / losses.len() as f32);
        self.pending = Some(Pending { round, from, training_loss, local: mean(&locals) });
        self.judge(updates);
    }

    /// Merge these and judge the result (none: judge the untouched model); it comes back as a command.
    pub(super) fn judge(&self, updates: Vec<ClientUpdate>) {
        let (held_out, llm, commands) = (self.held_out.clone(), self.llm.clone(), self.commands.clone());
        let work = Work {
            settings: self.settings.clone(),
            global: self.global.clone(),
            state: self.strategy.clone(),
            updates,
            previous: self.history.last().map(|r| r.held_out),
        };
        let (sender, result) = oneshot::channel();
        // A thread of its own: the runtime would wait for one of its own when the program ends.
        let thread = std::thread::Builder::new().name("evaluation".into()).spawn(move || {
            drop(sender.send(work.run(&held_out, &llm)));
        });
        tokio::spawn(async move {
            let failed = |cause: String| Judged { merged: None, evaluation: Err(cause), broken: true };
            let judged = match thread {
                Ok(_) => result.await.unwrap_or_else(|_| failed("the evaluation broke off".into())),
                Err(e) => failed(format!("the system gives no thread: {e}")),
            };
            // A federation that has ended needs it no more.
            if let Some(commands) = commands.upgrade() {
                drop(commands.send(Command::Judged(Box::new(judged))).await);
            }
        });
    }

    /// Adopt a merge that could be judged, keep the old adapters otherwise; the round is done either way. Where nothing can be judged
    /// any more the federation stops instead: the updates stay on disk, and the merge is made again after a restart.
    ///
    /// # Errors
    /// A write that failed.
    pub(super) fn judged(&mut self, judged: Judged) -> anyhow::Result<()> {
        if judged.broken {
            let cause = judged.evaluation.err().unwrap_or_default();
            self.fail(members::not_judged(&cause));
            return Ok(());
        }
        let result = match (self.pending.take(), self.history.last().map(|r| r.held_out)) {
            (Some(pending), Some(previous)) => self.adopt(pending, judged, previous)?,
            _ => match judged.evaluation {
                Ok(held_out) => {
                    let result = RoundResult {
                        round: 0,
                        held_out,
                        participants: Vec::new(),
                        late: Vec::new(),
                        local: None,
                        training_loss: None,
                        seconds: 0.0,
                    };
                    self.store.judged(&result)?;
                    result
                }
                // Rounds would fail likewise, so none begins.
                Err(cause) => {
                    self.fail(members::not_judged(&cause));
                    return Ok(());
                }
            },
        };
        let (round, accuracy) = (result.round, result.held_out.accuracy);
        tracing::info!(federation = self.name, round, accuracy, "evaluated");
        self.history.push(result);
        self.event(Event::Evaluated)?;
        self.show();
        Ok(())
    }

    /// What a round brought; on disk, and then the federation's.
    fn adopt(&mut self, pending: Pending, judged: Judged, previous: Evaluation) -> anyhow::Result<RoundResult> {
        let Pending { round, from, training_loss, local } = pending;
        let mut result = RoundResult {
            round,
            held_out: previous,
            participants: Vec::new(),
            late: Vec::new(),
            local: None,
            training_loss: None,
            seconds: self.round_started.elapsed().as_secs_f64(),
        };
        match (judged.evaluation, judged.merged) {
            (Ok(held_out), Some((adapter, state))) => {
                let whose =
                    |late| from.iter().filter(|(_, r)| (*r < round) == late).map(|(id, _)| *id).collect::<Vec<_>>();
                (result.participants, result.late) = (whose(false), whose(true));
                (result.held_out, result.local, result.training_loss) = (held_out, local, training_loss);
                self.store.merged(&result, &adapter, &state, &from)?;
                self.shown_adapter.send_replace(adapter.clone());
                (self.global, self.strategy) = (adapter, state);
            }
            (evaluation, _) => {
                let cause = evaluation.err().unwrap_or_default();
                tracing::error!(
                    federation = self.name,
                    round,
                    "the merge cannot be judged, the old adapters stay: {cause}"
                );
                self.store.merged(&result, &self.global, &self.strategy, &from)?;
            }
        }
        self.open = None;
        self.keep_metrics()?;
        Ok(result)
    }
}

/// Figures that say something.
fn sound(evaluation: Evaluation) -> Result<Evaluation, String> {
    if evaluation.samples == 0 {
        return Err("there are no held-out samples".into());
    }
    if !evaluation.loss.is_finite() {
        return Err(format!("the held-out loss is {}", evaluation.loss));
    }
    Ok(evaluation)
}

/// A participant's own figures, if they can be true of one that announced so many samples.
pub(super) fn plausible(local: LocalEvaluation, announced: u32) -> Option<LocalEvaluation> {
    let can_be = |e: &Evaluation| {
        (0.0..=1.0).contains(&e.accuracy) && e.loss.is_finite() && (1..=announced as usize).contains(&e.samples)
    };
    Some(local).filter(|l| can_be(&l.global) && can_be(&l.own))
}

/// Means over participants, weighted by their test samples.
fn mean(locals: &[LocalEvaluation]) -> Option<LocalEvaluation> {
    let over = |of: fn(&LocalEvaluation) -> Evaluation| {
        let samples: usize = locals.iter().map(|l| of(l).samples).sum();
        let weighted = |value: fn(&Evaluation) -> f64| {
            locals.iter().map(of).map(|e| value(&e) * e.samples as f64).sum::<f64>() / samples.max(1) as f64
        };
        // A tab's numbers have 32 bits: it could not read a larger one.
        let samples = samples.min(u32::MAX as usize);
        Evaluation { accuracy: weighted(|e| e.accuracy), loss: weighted(|e| e.loss), samples }
    };
    (!locals.is_empty()).then(|| LocalEvaluation { global: over(|l| l.global), own: over(|l| l.own) })
}

/// An update as the merge takes it, so many rounds late.
pub(super) fn client_update(client: ParticipantId, update: Update, staleness: u32) -> ClientUpdate {
    ClientUpdate { client, staleness, adapter: update.adapter, fisher: update.fisher, samples: update.samples }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evaluation(accuracy: f64, samples: usize) -> Evaluation {
        Evaluation { accuracy, loss: 2.0 * accuracy, samples }
    }

    #[test]
    fn own_figures_are_weighted_by_samples() {
        assert!(mean(&[]).is_none());
        let of = |accuracy, samples| LocalEvaluation {
            global: evaluation(accuracy, samples),
            own: evaluation(accuracy / 2.0, samples),
        };
        let mean = mean(&[of(1.0, 3), of(0.0, 1)]).unwrap();
        assert_eq!((mean.global.accuracy, mean.global.loss, mean.global.samples), (0.75, 1.5, 4));
        assert_eq!((mean.own.accuracy, mean.own.samples), (0.375, 4));
    }

    #[test]
    fn sums_of_samples_fit_into_a_tab() {
        let most = evaluation(0.5, u32::MAX as usize);
        let mean = mean(&[LocalEvaluation { global: most, own: most }; 2]).unwrap();
        assert_eq!((mean.global.samples, mean.own.samples), (u32::MAX as usize, u32::MAX as usize));
        assert_eq!(mean.own.accuracy, 0.5);
    }

    #[test]
    fn figures_that_cannot_be_true_are_dropped() {
        let local = |own: Evaluation| LocalEvaluation { global: evaluation(0.5, 4), own };
        assert!(plausible(local(evaluation(1.0, 4)), 10).is_some());
        for own in [evaluation(1.1, 4), evaluation(f64::NAN, 4), evaluation(0.5, 11), evaluation(0.5, 0)] {
            assert!(plausible(local(own), 10).is_none(), "{own:?}");
        }
        let endless = Evaluation { loss: f64::INFINITY, ..evaluation(0.5, 4) };
        assert!(plausible(local(endless), 10).is_none());
    }
}
