//! What a run gives. Everything here is the same whenever a run is repeated on the same machine; how long it took stands apart.

use super::config::Task;
use fednano_shared::ledger::Traffic;
use fednano_shared::step::Evaluation;
use fednano_shared::wire::RoundResult;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A judgement with an exam.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tested {
    /// Over all samples.
    pub together: Evaluation,
    /// For each task, where there are several.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tasks: BTreeMap<Task, Evaluation>,
}

impl Tested {
    /// From the judgements of each task.
    pub fn of(tasks: BTreeMap<Task, Evaluation>) -> Self {
        let together = weighted(&tasks.values().copied().collect::<Vec<_>>());
        Self { together, tasks: if tasks.len() > 1 { tasks } else { BTreeMap::new() } }
    }

    /// Plain mean of several judgements with the same exam; none of none.
    pub fn mean(of: &[Self]) -> Option<Self> {
        let first = of.first()?;
        let of_task = |task: &Task| plain(of.iter().filter_map(|t| t.tasks.get(task)));
        Some(Self {
            together: plain(of.iter().map(|t| &t.together)),
            tasks: first.tasks.keys().map(|task| (*task, of_task(task))).collect(),
        })
    }
}

/// Mean weighted by samples.
fn weighted(of: &[Evaluation]) -> Evaluation {
    let samples: usize = of.iter().map(|e| e.samples).sum();
    let sum = |value: fn(&Evaluation) -> f64| of.iter().map(|e| value(e) * e.samples as f64).sum::<f64>();
    let all = samples.max(1) as f64;
    Evaluation { accuracy: short(sum(|e| e.accuracy) / all), loss: short(sum(|e| e.loss) / all), samples }
}

/// Plain mean; the samples are those of one.
fn plain<'a>(of: impl Iterator<Item = &'a Evaluation>) -> Evaluation {
    let (mut sum, mut count) = (Evaluation::default(), 0.0);
    for e in of {
        count += 1.0;
        sum = Evaluation { accuracy: sum.accuracy + e.accuracy, loss: sum.loss + e.loss, samples: e.samples };
    }
    let count = f64::max(count, 1.0);
    Evaluation { accuracy: short(sum.accuracy / count), loss: short(sum.loss / count), samples: sum.samples }
}

/// Six digits behind the point: results are kept as text. What is no number counts as huge: JSON has no word for it.
pub fn short(value: f64) -> f64 {
    if value.is_finite() { (value * 1e6).round() / 1e6 } else { 1e9 }
}

/// A round of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundFigures {
    /// Its number; 0 is the untouched model.
    pub round: u32,
    /// Of the federation's adapters, with the samples used after each round.
    pub accuracy: f64,
    /// The same, nats.
    pub loss: f64,
    /// Updates merged.
    pub updates: usize,
    /// Mean loss of their training.
    pub training_loss: Option<f64>,
}

impl RoundFigures {
    /// Without what depends on the machine.
    pub fn of(result: &RoundResult) -> Self {
        Self {
            round: result.round,
            accuracy: short(result.held_out.accuracy),
            loss: short(result.held_out.loss),
            updates: result.participants.len() + result.late.len(),
            training_loss: result.training_loss.map(|loss| short(f64::from(loss))),
        }
    }
}

/// A client at a run's end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClientFigures {
    /// Its samples, those it tests with included.
    pub samples: usize,
    /// With the adapters that it would use, on its own test samples, if it has any.
    pub local: Option<Evaluation>,
}

/// Bytes of a client in a whole run, as four sums of the ledger's kinds; mean over clients. Control is left out: how often the status
/// is sent depends on the machine. (Runs from before the ledger counted the head of each of these messages with it.)
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Bytes {
    /// What the LLM is asked with: features, tokens, hidden states or codes, `up` matrices, labels.
    pub activations_up: u64,
    /// Adapters and Fisher values.
    pub updates_up: u64,
    /// What it answers: gradients, squares of them, evaluations.
    pub gradients_down: u64,
    /// Merged adapters.
    pub adapters_down: u64,
}

impl Bytes {
    /// Mean over clients.
    pub fn mean(of: &[Traffic]) -> Self {
        let Traffic { up, down } = Traffic::sum(of);
        let mean = |sum: u64| sum / of.len().max(1) as u64;
        Self {
            activations_up: mean(up.features + up.text + up.activations + up.codes + up.matrices + up.labels),
            updates_up: mean(up.adapters + up.fisher),
            gradients_down: mean(down.gradients + down.fisher + down.matrices + down.predictions),
            adapters_down: mean(down.adapters),
        }
    }

    /// All upward.
    pub fn up(&self) -> u64 {
        self.activations_up + self.updates_up
    }

    /// All downward.
    pub fn down(&self) -> u64 {
        self.gradients_down + self.adapters_down
    }
}

/// What a run gives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Shares of right answers without looking: always the most frequent one, always the most frequent one to the question.
    pub baselines: (f64, f64),
    /// The untouched model.
    pub zero_shot: Tested,
    /// Round by round, from the untouched model on.
    pub rounds: Vec<RoundFigures>,
    /// The federation's adapters at the end.
    pub global: Tested,
    /// Where the strategy is a personal one: each client's own adapters, mean over clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own: Option<Tested>,
    /// Client by client.
    pub clients: Vec<ClientFigures>,
    /// A client's bytes.
    pub bytes: Bytes,
    /// Each round's updates merged by every rule, where that was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub merges: Vec<MergedRound>,
}

impl Figures {
    /// What a client would use at the end: its own adapters if it has any, else the federation's.
    pub fn used(&self) -> &Tested {
        self.own.as_ref().unwrap_or(&self.global)
    }

    /// Accuracy on the clients' own test samples, mean over those who have any.
    pub fn local(&self) -> Option<f64> {
        let all: Vec<f64> = self.clients.iter().filter_map(|c| c.local).map(|e| e.accuracy).collect();
        (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
    }
}

/// A round's updates, merged by several rules.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MergedRound {
    /// Its number.
    pub round: u32,
    /// Of each rule's result, by the rule's name: accuracy and loss with the samples used after each round.
    pub rules: BTreeMap<String, (f64, f64)>,
    /// Whose updates they were, in order.
    pub clients: Vec<Contribution>,
}

/// What a client's update weighs in a Fisher merge as printed in the paper.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Contribution {
    /// Samples trained on.
    pub samples: u32,
    /// Mean loss of the round's training.
    pub loss: f64,
    /// Mean Fisher value of the `down` tensors.
    pub down: f64,
    /// Of the `up` tensors.
    pub up: f64,
    /// Mean over the values of the `down` tensors of its share in them.
    pub share_down: f64,
    /// Of the `up` tensors.
    pub share_up: f64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use fednano_shared::ledger::Kind;

    fn evaluation(accuracy: f64, samples: usize) -> Evaluation {
        Evaluation { accuracy, loss: accuracy * 2.0, samples }
    }

    #[test]
    fn tasks_count_by_their_samples_and_clients_alike() {
        let of = |data, scenes| {
            Tested::of(BTreeMap::from([(Task::Data, evaluation(data, 30)), (Task::Scenes, evaluation(scenes, 10))]))
        };
        let tested = of(0.4, 0.8);
        assert_eq!((tested.together.accuracy, tested.together.loss, tested.together.samples), (0.5, 1.0, 40));
        assert_eq!(tested.tasks.len(), 2);
        let mean = Tested::mean(&[tested, of(0.8, 0.8)]).unwrap();
        assert_eq!((mean.tasks[&Task::Data].accuracy, mean.together.accuracy), (0.6, 0.65));
        let alone = Tested::of(BTreeMap::from([(Task::Data, evaluation(0.4, 30))]));
        assert!(alone.tasks.is_empty() && alone.together.accuracy == 0.4);
        assert!(Tested::mean(&[]).is_none());
    }

    #[test]
    fn the_ledger_makes_four_sums() {
        let mut one = Traffic::default();
        for (number, kind) in (0..).zip(Kind::ALL) {
            one.up.count(kind, 1 << number);
            one.down.count(kind, 1 << number);
        }
        let of = |kinds: &[Kind]| kinds.iter().map(|kind| one.up.get(*kind)).sum::<u64>();
        use Kind::*;
        let expected = Bytes {
            activations_up: of(&[Features, Text, Activations, Codes, Matrices, Labels]),
            updates_up: of(&[Adapters, Fisher]),
            gradients_down: of(&[Gradients, Fisher, Matrices, Predictions]),
            adapters_down: of(&[Adapters]),
        };
        assert_eq!(Bytes::mean(&[one, one]), expected);
        assert_eq!(Bytes::mean(&[]), Bytes::default());
        // A line from before the ledger.
        let old = r#"{"activations_up":4,"updates_up":3,"gradients_down":2,"adapters_down":1}"#;
        let bytes: Bytes = serde_json::from_str(old).unwrap();
        assert_eq!((bytes.up(), bytes.down()), (7, 3));
        assert_eq!(serde_json::to_string(&bytes).unwrap(), old);
    }

    #[test]
    fn figures_survive_being_text() {
        let tested = Tested::of(BTreeMap::from([(Task::Scenes, evaluation(1.0 / 3.0, 3))]));
        let figures = Figures {
            baselines: (0.25, 0.5),
            zero_shot: tested.clone(),
            rounds: vec![RoundFigures {
                round: 0,
                accuracy: short(f64::NAN),
                loss: 0.1,
                updates: 0,
                training_loss: None,
            }],
            global: tested.clone(),
            own: Some(tested),
            clients: vec![
                ClientFigures { samples: 3, local: Some(evaluation(0.5, 2)) },
                ClientFigures { samples: 1, local: None },
            ],
            bytes: Bytes { activations_up: 5, ..Default::default() },
            merges: Vec::new(),
        };
        let text = serde_json::to_string(&figures).unwrap();
        assert_eq!(serde_json::from_str::<Figures>(&text).unwrap(), figures);
        assert_eq!((figures.local(), figures.used().together.accuracy), (Some(0.5), 0.333333));
    }
}
