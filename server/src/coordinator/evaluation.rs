//! Merging a round and judging the merge. A merge becomes the federation's adapters only once it has been evaluated, so that
//! what is saved meanwhile is the last sound round and no update can destroy the federation.

use super::round::Event;
use super::{Command, Coordinator};
use fednano_shared::aggregate::{self, ClientUpdate};
use fednano_shared::plain::AdapterState;
use fednano_shared::step::Evaluation;
use fednano_shared::wire::{Fault, FaultCode, ParticipantId, Phase, RoundResult, ServerMessage, Update};
use tokio::sync::oneshot;

impl Coordinator {
    /// Merge the updates of these, have the result evaluated.
    pub(super) fn merge(&mut self, round: u32, from: &[ParticipantId]) {
        let updates: Vec<ClientUpdate> =
            from.iter().filter_map(|id| self.updates.get(id).map(|u| client_update(*id, u))).collect();
        self.merged_from = from.to_vec();
        match aggregate::merge(self.settings.strategy, &self.global, updates) {
            Ok(merged) => self.merged = Some(merged),
            // Each update was validated on arrival; should it fail all the same, the old adapters stay.
            Err(e) => tracing::error!(federation = self.name, round, "the round is not merged: {e}"),
        }
        self.evaluate(self.merged.as_ref().unwrap_or(&self.global).clone());
    }

    /// Judge adapters; the result comes back as a command.
    pub(super) fn evaluate(&self, adapter: AdapterState) {
        let (held_out, llm, commands) = (self.held_out.clone(), self.llm.clone(), self.commands.clone());
        let (sender, result) = oneshot::channel();
        // A thread of its own: the runtime would wait for one of its own when the program ends.
        let thread = std::thread::Builder::new().name("evaluation".into()).spawn(move || {
            drop(sender.send(held_out.evaluate(Some(&adapter), &held_out.rows, &llm)));
        });
        tokio::spawn(async move {
            let result = match thread {
                Ok(_) => result.await.unwrap_or_else(|_| Err("the evaluation broke off".into())),
                Err(e) => Err(format!("the system gives no thread: {e}")),
            };
            drop(commands.send(Command::Evaluated(result)).await);
        });
    }

    /// Adopt a merge that could be judged, keep the old adapters otherwise; the round is done either way.
    pub(super) fn evaluated(&mut self, result: Result<Evaluation, String>) {
        let round = self.machine.round();
        let (mut adopted, mut participants) = (self.merged.take(), std::mem::take(&mut self.merged_from));
        let held_out = match (result.and_then(sound), self.history.last().map(|r| r.held_out)) {
            (Ok(held_out), _) => held_out,
            (Err(cause), Some(previous)) => {
                tracing::error!(
                    federation = self.name,
                    round,
                    "the merge cannot be judged, the old adapters stay: {cause}"
                );
                adopted = None;
                previous
            }
            (Err(cause), None) => return self.fail(cause),
        };
        match adopted {
            Some(merged) => self.global = merged,
            None => participants.clear(),
        }
        let losses: Vec<f32> = participants.iter().filter_map(|id| self.updates.get(id)).map(|u| u.loss).collect();
        let training_loss = (!losses.is_empty()).then(|| losses.iter().sum::<f32>() / losses.len() as f32);
        let seconds = if round == 0 { 0.0 } else { self.round_started.elapsed().as_secs_f64() };
        self.history.push(RoundResult { round, held_out, participants, training_loss, seconds });
        tracing::info!(federation = self.name, round, accuracy = held_out.accuracy, "evaluated");
        self.updates.clear();
        self.save();
        self.shown_adapter.send_replace(self.global.clone());
        // Whoever waits for the round to be on disk.
        for waiting in self.settling.drain(..) {
            let _ = waiting.send(());
        }
        self.event(Event::Evaluated);
        self.show();
    }

    /// Answer once no merge is under way. Round 0 merges nothing: nothing would be lost.
    pub(super) fn settle(&mut self, reply: oneshot::Sender<()>) {
        if self.machine.phase() == Phase::Evaluating && self.machine.round() > 0 {
            self.settling.push(reply);
        } else {
            let _ = reply.send(());
        }
    }

    /// Not even the untouched model can be judged: rounds would fail likewise, so none begins.
    fn fail(&mut self, cause: String) {
        tracing::error!(federation = self.name, "the untouched model cannot be judged: {cause}");
        for id in self.participants.keys().copied().collect::<Vec<_>>() {
            self.tell(id, ServerMessage::Refused(not_judged(&cause)));
        }
        self.failure.send_replace(Some(cause));
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

/// What participants of a failed federation are told.
pub(super) fn not_judged(cause: &str) -> Fault {
    Fault {
        code: FaultCode::Server,
        cause: format!("the untouched model cannot be judged: {cause}"),
        remedy: "the operator should look at the server's device and its held-out set, then restart it".into(),
    }
}

/// An update as the merge takes it.
pub(super) fn client_update(client: ParticipantId, update: &Update) -> ClientUpdate {
    ClientUpdate { client, adapter: update.adapter.clone(), fisher: update.fisher.clone(), samples: update.samples }
}
