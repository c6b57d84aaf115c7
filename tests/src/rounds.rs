//! The rules of rounds under random sequences of events: people come, lose their connection, leave and come back, train, are late or
//! send what nobody asked for, time passes, and the server is killed between any two writes. The rules themselves are assertions
//! of the model beside this file; a sequence that breaks one is shortened and shown as a log of events.

mod model;

use anyhow::{Context, bail, ensure};
use fednano_server::coordinator::round::{Action, Event, Limits, Machine, Millis};
use fednano_shared::wire::{ParticipantId, Phase};
use model::{Model, PEOPLE, Stage};
use proptest::arbitrary::any;
use proptest::collection::{btree_set, vec};
use proptest::prop_oneof;
use proptest::sample::select;
use proptest::strategy::{Just, Strategy};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// Sequences of each test, if the environment variable does not ask for another number.
const SEQUENCES: u32 = 10_000;
const VARIABLE: &str = "FEDNANO_SEQUENCES";

/// What may happen; numbers are taken modulo what there is.
#[derive(Debug, Clone)]
enum Happening {
    Connect(u32),
    Lose(u32),
    Leave(u32),
    /// One of those who train is done.
    Deliver(usize),
    /// An update of a closed round comes after all.
    DeliverLate(usize),
    /// An update that nobody asked for: from whom, rounds after the next one to merge.
    Stray(u32, i32),
    Evaluated,
    Tick,
}

#[derive(Debug, Clone)]
struct Step {
    wait: Millis,
    what: Happening,
    /// The server is killed before the step (0) or before so many-th action.
    kill: Option<usize>,
}

#[derive(Debug, Clone)]
struct Sequence {
    limits: Limits,
    steps: Vec<Step>,
    /// Who never delivers anything at the end.
    hung: BTreeSet<u32>,
    /// Everybody leaves before the end.
    deserted: bool,
    /// Where the server of [`restarts_change_nothing`] is killed.
    fork: usize,
    /// Who stays away then.
    gone: BTreeSet<u32>,
}

fn person() -> impl Strategy<Value = u32> {
    1..=PEOPLE
}

fn limits() -> impl Strategy<Value = Limits> {
    let sampling = (select(vec![1.0f64, 1.0, 0.5, 0.34, 0.75]), select(vec![0.0f64, 0.0, 0.3, 1.0]));
    (1u32..=6, 1usize..=3, 0usize..=3, sampling, 0u32..=3, 0u64..10).prop_map(
        |(rounds, min_participants, min_updates, (fraction, over_selection), max_staleness, seed)| Limits {
            rounds,
            min_participants,
            min_updates,
            fraction,
            over_selection,
            max_staleness,
            deadline: 1000,
            grace: 100,
            seed,
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let what = prop_oneof![
        22 => person().prop_map(Happening::Connect),
        7 => person().prop_map(Happening::Lose),
        5 => person().prop_map(Happening::Leave),
        24 => any::<usize>().prop_map(Happening::Deliver),
        6 => any::<usize>().prop_map(Happening::DeliverLate),
        8 => (person(), -3i32..=1).prop_map(|(id, after)| Happening::Stray(id, after)),
        13 => Just(Happening::Evaluated),
        15 => Just(Happening::Tick),
    ];
    let wait = prop_oneof![14 => 0u64..40, 1 => 0u64..1500];
    let kill = prop_oneof![39 => Just(None::<usize>), 1 => (0usize..5).prop_map(Some)];
    (wait, what, kill).prop_map(|(wait, what, kill)| Step { wait, what, kill })
}

fn sequences() -> impl Strategy<Value = Sequence> {
    let some = || btree_set(person(), 0..=3usize);
    (limits(), vec(step(), 1..150usize), some(), any::<bool>(), any::<usize>(), some())
        .prop_map(|(limits, steps, hung, deserted, fork, gone)| Sequence { limits, steps, hung, deserted, fork, gone })
}

fn event(model: &Model, what: &Happening) -> Event {
    let of = |updates: Vec<(ParticipantId, u32)>, n: usize| {
        let update = updates.get(n % updates.len().max(1));
        update.map_or(Event::Tick, |(from, round)| Event::Updated { from: *from, round: *round })
    };
    match *what {
        Happening::Connect(id) => Event::Connected(ParticipantId(id)),
        Happening::Lose(id) => Event::Lost(ParticipantId(id)),
        Happening::Leave(id) => Event::Left(ParticipantId(id)),
        Happening::Deliver(n) => of(model.trainers().into_iter().map(|id| (id, model.round())).collect(), n),
        Happening::DeliverLate(n) => of(model.missing(), n),
        Happening::Stray(id, after) => {
            Event::Updated { from: ParticipantId(id), round: (model.saved.done + 1).saturating_add_signed(after) }
        }
        Happening::Evaluated => Event::Evaluated,
        Happening::Tick => Event::Tick,
    }
}

/// How often what happened.
type Seen = BTreeMap<&'static str, u64>;

/// Run a test on many sequences, always the same ones; the first that fails is shortened. How many, and what happened.
fn check(test: impl Fn(&Sequence, &mut Model) -> anyhow::Result<()>) -> anyhow::Result<(u32, Seen)> {
    let cases = match std::env::var(VARIABLE) {
        Ok(number) => {
            number.parse::<u32>().with_context(|| format!("{VARIABLE} is '{number}', it must be a whole number"))?
        }
        Err(_) => SEQUENCES,
    };
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 20_000, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let seen: RefCell<Seen> = RefCell::default();
    let result = runner.run(&sequences(), |sequence| {
        let mut model = Model::new(sequence.limits);
        let result = test(&sequence, &mut model);
        for (what, times) in &model.seen {
            *seen.borrow_mut().entry(*what).or_default() += times;
        }
        result.map_err(|e| TestCaseError::fail(format!("{e:#}\n{}", model.story())))
    });
    match result {
        Ok(()) => println!("{cases} sequences: {:?}", seen.borrow()),
        Err(TestError::Fail(why, sequence)) => bail!("{why}\nfrom {sequence:?}"),
        Err(other) => bail!("{other}"),
    }
    Ok((cases, seen.into_inner()))
}

/// Every rule in every sequence, and an end for all who are left.
pub fn random_sequences() -> anyhow::Result<()> {
    let (cases, seen) = check(|sequence, model| {
        for step in &sequence.steps {
            model.now += step.wait;
            let event = event(model, &step.what);
            model.step(event, step.kill)?;
        }
        end(sequence, model)
    })?;
    // A rule that is never put to the test proves nothing.
    let all = [
        "begin",
        "begin, over-selected",
        "newcomer",
        "back in its round",
        "others asked",
        "wait",
        "accept",
        "accept late",
        "merge",
        "merge, short",
        "pause",
        "refuse: stale",
        "refuse: counted",
        "refuse: not selected",
        "refuse: finished",
        "refuse: not training",
        "restart in a round",
        "restart in an evaluation",
        "restart elsewhere",
    ];
    let never: Vec<_> = all.iter().filter(|what| !seen.contains_key(**what)).collect();
    ensure!(never.is_empty() || cases < SEQUENCES, "no sequence came to {never:?}: make that more likely in `step`");
    Ok(())
}

/// RULES: with nobody left it pauses; as long as there are people enough who train, all rounds come to their end, even if some hang.
fn end(sequence: &Sequence, model: &mut Model) -> anyhow::Result<()> {
    if sequence.deserted {
        for id in 1..=PEOPLE {
            model.step(Event::Left(ParticipantId(id)), None)?;
        }
        model.now += model.limits.deadline + model.limits.grace;
        model.step(Event::Tick, None)?;
        ensure!(model.machine.phase() != Phase::Training, "RULE: a round goes on with nobody");
    }
    for id in 1..=PEOPLE {
        model.step(Event::Connected(ParticipantId(id)), None)?;
    }
    for _ in 0..40 * (model.limits.rounds + 1) {
        let willing = model.trainers().into_iter().find(|id| !sequence.hung.contains(&id.0));
        let event = match (model.stage, willing) {
            (Stage::Finished, _) => return Ok(()),
            (Stage::Judging | Stage::Closed, _) => Event::Evaluated,
            (_, Some(from)) => Event::Updated { from, round: model.round() },
            _ => {
                model.now += model.limits.deadline / 2;
                Event::Tick
            }
        };
        model.step(event, None)?;
    }
    bail!("RULE: they wait for ever")
}

/// A server that is killed anywhere and comes back to the same people decides as the one that was not. Time, which begins anew
/// after a restart, plays no part here: nothing is ever overdue, nobody's grace ends.
pub fn restarts_change_nothing() -> anyhow::Result<()> {
    check(|sequence, model| {
        (model.limits.deadline, model.limits.grace) = (Millis::MAX, Millis::MAX);
        *model = Model::new(model.limits);
        let (before, after) = sequence.steps.split_at(sequence.fork % sequence.steps.len().max(1));
        for step in before {
            model.now += step.wait;
            let event = event(model, &step.what);
            model.step(event, None)?;
        }
        let mut restored = come_back(sequence, model)?;
        for step in after {
            model.now += step.wait;
            let event = event(model, &step.what);
            both(model, &mut restored, event)?;
        }
        Ok(())
    })?;
    Ok(())
}

/// Another machine from what is saved; those who were connected come back to it, the others come back to both or leave both.
fn come_back(sequence: &Sequence, model: &mut Model) -> anyhow::Result<Machine> {
    let mut restored = Machine::new(model.limits, &model.saved);
    let first = restored.step(0, Event::Tick);
    if model.stage == Stage::Closed {
        let again = Action::Merge { round: model.round(), from: model.merging.clone() };
        ensure!(first == [again], "before the restart {:?} were merged, after it {first:?}", model.merging);
    }
    for id in &model.connected {
        let actions = restored.step(0, Event::Connected(*id));
        let told = |a: &Action| matches!(a, Action::Start { .. } | Action::Wait { .. } | Action::TellFinished(_));
        ensure!(actions.iter().all(told), "the return of {id:?} after the restart brings {actions:?}");
    }
    let known: Vec<_> = model.saved.known.iter().filter(|(_, left)| !left).map(|(id, _)| *id).collect();
    for id in known {
        if !model.connected.contains(&id) {
            // In the lobby a return could begin a round, for which the restored machine would wait for the others.
            let gone = model.stage == Stage::Lobby || sequence.gone.contains(&id.0);
            both(model, &mut restored, if gone { Event::Left(id) } else { Event::Connected(id) })?;
        }
    }
    Ok(restored)
}

/// RULE: both decide the same.
fn both(model: &mut Model, restored: &mut Machine, event: Event) -> anyhow::Result<()> {
    let actions = model.step(event, None)?;
    let after = restored.step(0, event);
    ensure!(after == actions, "after {event:?} the restored machine says {after:?}, the other one {actions:?}");
    let (phase, round) = (restored.phase(), restored.round());
    ensure!((phase, round) == (model.machine.phase(), model.machine.round()), "restored: {phase:?} in round {round}");
    Ok(())
}
