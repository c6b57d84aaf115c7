//! The beginning of a federation, and going on after a restart.

use super::ledger::ASKERS;
use super::members::Participant;
use super::round::{Limits, Machine, Open, Saved};
use super::{Account, COMMANDS, Coordinator, Federation, Opened};
use crate::held_out::HeldOut;
use crate::llm_host::LlmHandle;
use crate::store::{NewFederation, SavedFederation, SavedParticipant, Store};
use anyhow::Context;
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::settings::FederationSettings;
use fednano_shared::wire::{Phase, Status};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::sync::{Arc, OnceLock};
use std::time::Instant;
use tokio::sync::{mpsc, watch};

/// What a federation is founded with.
#[derive(Debug, Clone)]
pub struct Founding {
    /// Its name.
    pub name: String,
    /// What participants agree on.
    pub settings: FederationSettings,
    /// Hash of the client part of the model.
    pub model: String,
    /// Where the model lies, for a later run.
    pub model_dir: String,
    /// The model's width.
    pub dim: usize,
}

/// Start a federation, or go on with it: the same round with the same participants.
///
/// # Errors
/// Invalid settings; a store that cannot be used, or is of other settings or another model.
pub fn start(founding: Founding, llm: LlmHandle, held_out: Arc<HeldOut>, store: Store) -> anyhow::Result<Federation> {
    let Founding { name, settings, model, model_dir, dim } = founding;
    settings.validate().map_err(|faults| anyhow::anyhow!("the settings are not usable: {}", faults.join("; ")))?;
    let saved = match store.load()? {
        Some(saved) => saved,
        None => {
            let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
            let adapter = NanoAdapters::initial(settings.adapters, settings.rank, dim, &mut rng);
            store.create(&NewFederation { settings: settings.clone(), model: model.clone(), model_dir, adapter })?;
            store
                .load()?
                .with_context(|| format!("federation '{name}' was not kept; is its --data-dir being changed?"))?
        }
    };
    anyhow::ensure!(
        saved.settings == settings && saved.model == model,
        "federation '{name}' was begun with other settings or another model; use the same ones (`fednano resume` does), another name, or another --data-dir"
    );
    let machine = Machine::new(Limits::of(&settings), &machine(&saved));
    let mut metrics = saved.metrics;
    let questions = metrics.remove(&ASKERS).unwrap_or_default().traffic;
    let away = |p: SavedParticipant| {
        let metrics = metrics.remove(&p.id).unwrap_or_default();
        (p.id, Participant::away(p, metrics))
    };
    let (commands, inbox) = mpsc::channel(COMMANDS);
    let mut coordinator = Coordinator {
        machine,
        participants: saved.participants.into_iter().map(away).collect(),
        updates: saved.updates.into_iter().map(|(id, update)| ((id, update.round), update)).collect(),
        open: saved.open.map(|o| Opened { round: o.round, assigned: o.assigned.into_iter().collect() }),
        history: saved.history,
        strategy: saved.state,
        questions: Account::kept(questions),
        downloads: Arc::new(OnceLock::new()),
        pending: None,
        round_started: Instant::now(),
        clock: Instant::now(),
        llm,
        held_out,
        store,
        commands: commands.downgrade(),
        shown: watch::Sender::new(Status {
            federation: name.clone(),
            phase: Phase::Lobby,
            round: 0,
            rounds: settings.rounds,
            participants: Vec::new(),
            history: Vec::new(),
            min_participants: settings.min_participants,
        }),
        shown_adapter: watch::Sender::new(saved.adapter.clone()),
        failure: watch::Sender::new(None),
        global: saved.adapter,
        name,
        settings,
        changed: true,
        news: false,
        told: None,
        told_at: Instant::now(),
    };
    coordinator.show();
    let handle = Federation {
        commands,
        status: coordinator.shown.subscribe(),
        adapter: coordinator.shown_adapter.subscribe(),
        failure: coordinator.failure.subscribe(),
        settings: Arc::new(coordinator.settings.clone()),
        downloads: coordinator.downloads.clone(),
    };
    if coordinator.history.is_empty() {
        coordinator.judge(Vec::new());
    }
    tokio::spawn(coordinator.run(inbox));
    Ok(handle)
}

/// What the rounds' rules need to know of what is on disk.
fn machine(saved: &SavedFederation) -> Saved {
    Saved {
        done: saved.history.last().map_or(0, |r| r.round),
        evaluated_start: !saved.history.is_empty(),
        open: saved.open.as_ref().map(|o| Open {
            round: o.round,
            target: o.target,
            assigned: o.assigned.clone(),
            closed: o.closed,
        }),
        accepted: saved.updates.iter().map(|(id, update)| (*id, update.round)).collect(),
        known: saved.participants.iter().map(|p| (p.id, p.left)).collect(),
        past: saved.past.clone(),
    }
}
