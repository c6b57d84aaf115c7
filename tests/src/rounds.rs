//! The rounds' rules under random sequences of events.

use fednano_server::coordinator::round::{Action, Event, Limits, Machine};
use fednano_shared::wire::{ParticipantId, Phase};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;

const SEQUENCES: u64 = 10_000;

pub fn random_sequences() -> anyhow::Result<()> {
    for seed in 0..SEQUENCES {
        sequence(seed).map_err(|e| e.context(format!("seed {seed}")))?;
    }
    Ok(())
}

fn sequence(seed: u64) -> anyhow::Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let limits =
        Limits { rounds: rng.random_range(1..5), min_participants: rng.random_range(1..4), deadline: 1000, grace: 50 };
    // Sometimes a restart: some rounds are done, some participants known (9 never comes back).
    let restart = rng.random_bool(0.5);
    let done = if restart { rng.random_range(0..=limits.rounds) } else { 0 };
    let ids = [1, 2, 3, 4, 9].map(ParticipantId);
    let known: Vec<_> = ids.into_iter().filter(|_| restart && rng.random_bool(0.4)).collect();
    let mut machine = Machine::new(limits, done, &known);
    let mut awaited: BTreeSet<_> = known.iter().copied().collect();
    let (mut now, mut counted) = (0, BTreeSet::new());
    let (mut merged, mut connected, mut log) = (done, BTreeSet::new(), vec![format!("{limits:?} {done} {known:?}")]);
    for _ in 0..rng.random_range(5..80) {
        now += rng.random_range(0..40);
        let id = ParticipantId(rng.random_range(1..5));
        let event = match rng.random_range(0..10) {
            0..=2 => Event::Connected(id),
            3 => Event::Lost(id),
            4 => Event::Left(id),
            // Mostly the current round, sometimes another.
            5..=7 => Event::Updated {
                from: id,
                round: (machine.round() + u32::from(rng.random_bool(0.1)))
                    .saturating_sub(u32::from(rng.random_bool(0.1))),
            },
            8 => Event::Evaluated,
            _ => Event::Tick,
        };
        match event {
            Event::Connected(id) => {
                connected.insert(id);
                awaited.remove(&id);
            }
            Event::Left(id) => {
                connected.remove(&id);
                awaited.remove(&id);
            }
            Event::Lost(id) => drop(connected.remove(&id)),
            _ => {}
        }
        let before = (machine.phase(), machine.round());
        let actions = machine.step(now, event);
        log.push(format!("{now} {event:?} -> {actions:?}"));
        let say = |what: &str| anyhow::anyhow!("{what}\n{}", log.join("\n"));
        for action in &actions {
            match action {
                Action::Accept { from, round } => {
                    anyhow::ensure!(before == (Phase::Training, *round), say("an update of another round counts"));
                    anyhow::ensure!(counted.insert((*from, *round)), say("an update counts twice"));
                }
                Action::Merge { round, from } => {
                    merged += 1;
                    anyhow::ensure!(*round == merged, say("rounds are merged out of order"));
                    anyhow::ensure!(
                        !from.is_empty() && from.iter().all(|p| counted.contains(&(*p, *round))),
                        say("merged what was not counted")
                    );
                    let all = counted.iter().filter(|(_, r)| r == round).count();
                    anyhow::ensure!(all == from.len(), say("a counted update is not merged"));
                }
                // Dropped updates may be sent again.
                Action::Abandon { round } => counted.retain(|(_, r)| r != round),
                Action::Start { to, .. } => {
                    let early = now < limits.grace && !awaited.is_empty();
                    anyhow::ensure!(!early, say("a round starts without one who may still come back"));
                    anyhow::ensure!(
                        to.iter().all(|p| connected.contains(p)),
                        say("a round starts for somebody who is away")
                    );
                }
                _ => {}
            }
        }
        // Every update is answered.
        if let Event::Updated { from, round } = event {
            let answered =
                actions.iter().any(|a| *a == Action::Accept { from, round } || *a == Action::Refuse { from, round });
            anyhow::ensure!(answered, say("an update got no answer"));
        }
        anyhow::ensure!(machine.round() <= limits.rounds, say("too many rounds"));
    }
    // Nobody waits for ever: once time has passed, a round is over or the federation waits for people.
    for id in 1..5 {
        machine.step(now, Event::Left(ParticipantId(id)));
    }
    now += limits.deadline + limits.grace;
    machine.step(now, Event::Tick);
    anyhow::ensure!(machine.phase() != Phase::Training, "a round waits for ever\n{}", log.join("\n"));
    // Nor does the lobby: the one who never came back had its grace.
    machine.step(now, Event::Evaluated);
    for id in 1..5 {
        machine.step(now, Event::Connected(ParticipantId(id)));
    }
    anyhow::ensure!(machine.phase() != Phase::Lobby, "the lobby waits for ever\n{}", log.join("\n"));
    Ok(())
}
