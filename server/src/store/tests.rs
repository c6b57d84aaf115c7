//! The store as a whole: what comes back, what a kill leaves, what is said about files that cannot be used.

use super::*;
use fednano_shared::settings::AdapterChoice;
use fednano_shared::step::Evaluation;
use std::process::{Command, Stdio};

const NAME: &str = "f";
const A: ParticipantId = ParticipantId(1);
const B: ParticipantId = ParticipantId(2);
const C: ParticipantId = ParticipantId(7);
const ASKERS: ParticipantId = ParticipantId(0);

/// Adapters whose values differ in all bits.
fn adapter(number: f32) -> AdapterState {
    let mut state = AdapterState::zeros(AdapterChoice::Both, 2, 3);
    for (i, value) in state.0.values_mut().flat_map(|b| &mut b.data).enumerate() {
        *value = (number + i as f32 / 7.0).sin();
    }
    state
}

fn evaluation(number: f64) -> Evaluation {
    Evaluation { accuracy: 1.0 / number, loss: number.exp(), samples: number as usize }
}

fn local(number: f64) -> LocalEvaluation {
    LocalEvaluation { global: evaluation(number), own: evaluation(number + 1.0) }
}

fn new() -> NewFederation {
    let settings = FederationSettings {
        // 17 digits, of which a reader of JSON may lose the last.
        learning_rate: 0.1 + 0.2 / 3.0,
        seed: u64::MAX,
        max_staleness: 1,
        ..Default::default()
    };
    NewFederation { settings, model: "m".into(), model_dir: "/models/x".into(), adapter: adapter(0.0) }
}

fn participant(id: ParticipantId) -> SavedParticipant {
    SavedParticipant {
        id,
        token: SessionToken(format!("secret {}", id.0)),
        name: "Zoë 'x' \"y\"".into(),
        kind: ClientKind::Tab,
        device: "WebGPU".into(),
        samples: 30 + id.0,
        left: false,
    }
}

fn update(round: u32, id: ParticipantId) -> Update {
    let number = round as f32 * 10.0 + id.0 as f32;
    Update {
        round,
        adapter: adapter(number),
        fisher: (id == A).then(|| adapter(number + 0.5)),
        samples: 5 + id.0,
        loss: 0.3 / number,
        local: (id == B).then(|| local(f64::from(number))),
    }
}

fn result(round: u32) -> RoundResult {
    RoundResult {
        round,
        held_out: evaluation(f64::from(round) + 3.0),
        participants: if round == 0 { Vec::new() } else { vec![B, A] },
        late: if round == 2 { vec![C] } else { Vec::new() },
        local: (round > 0).then(|| local(f64::from(round))),
        training_loss: (round > 0).then_some(0.1 * round as f32),
        seconds: 0.1 + f64::from(round),
    }
}

fn state(number: f32) -> StrategyState {
    StrategyState(BTreeMap::from([("m".into(), adapter(number)), ("v".into(), adapter(number + 0.5))]))
}

/// So many bytes of codes up and of gradients down in each round.
fn bytes(rounds: &[(u32, u64)]) -> Metrics {
    let of = |(round, count): &(u32, u64)| {
        let mut traffic = Traffic::default();
        (traffic.up.codes, traffic.down.gradients) = (*count, 1);
        (*round, traffic)
    };
    Metrics { traffic: rounds.iter().map(of).collect(), local: None }
}

fn folder() -> TemporaryFolder {
    TemporaryFolder::create("store").unwrap()
}

/// A federation whose round 1 is under way, with an update of A.
fn begun(folder: &Path) -> Store {
    let store = Store::open(folder, NAME).unwrap();
    store.create(&new()).unwrap();
    store.judged(&result(0)).unwrap();
    for id in [A, B, C] {
        store.participant(&participant(id)).unwrap();
    }
    store.begin_round(1, 2, &[B, A]).unwrap();
    store.accept(A, &update(1, A)).unwrap();
    store
}

fn loaded(store: &Store) -> SavedFederation {
    store.load().unwrap().unwrap()
}

fn fault<T>(result: anyhow::Result<T>) -> String {
    match result {
        Ok(_) => panic!("it passed"),
        Err(e) => format!("{e:#}"),
    }
}

#[test]
fn everything_comes_back_bit_for_bit() {
    let folder = folder();
    let store = Store::open(folder.path(), NAME).unwrap();
    assert_eq!(store.load().unwrap(), None);
    store.create(&new()).unwrap();
    let saved = loaded(&store);
    assert_eq!((&saved.settings, &saved.adapter), (&new().settings, &adapter(0.0)));
    assert_eq!((saved.model.as_str(), saved.model_dir.as_str()), ("m", "/models/x"));
    assert!(saved.history.is_empty() && saved.participants.is_empty() && saved.open.is_none());
    drop(store);

    let store = Store::open(folder.path(), NAME).unwrap();
    store.judged(&result(0)).unwrap();
    for id in [C, A, B] {
        store.participant(&participant(id)).unwrap();
    }
    store.begin_round(1, 2, &[B, A]).unwrap();
    store.assign(1, C).unwrap();
    store.assign(1, C).unwrap();
    store.accept(B, &update(1, B)).unwrap();
    store.accept(A, &update(1, A)).unwrap();
    store.left(B).unwrap();
    let saved = loaded(&store);
    assert_eq!(saved.open, Some(SavedRound { round: 1, target: 2, assigned: vec![A, B, C], closed: None }));
    assert_eq!(saved.updates, [(B, update(1, B)), (A, update(1, A))], "in the order of arrival");
    assert_eq!(saved.history, [result(0)]);
    let gone = SavedParticipant { left: true, ..participant(B) };
    assert_eq!(saved.participants, [participant(A), gone, participant(C)]);

    store.merged(&result(1), &adapter(1.0), &state(1.0), &[(A, 1), (B, 1)]).unwrap();
    store.begin_round(2, 1, &[A]).unwrap();
    store.begin_round(2, 2, &[B]).unwrap(); // after a pause
    store.accept(C, &update(1, C)).unwrap(); // a round late
    store.close(2, 1).unwrap();
    let judged = Evaluation { accuracy: 0.25, loss: 1.5, samples: 4 };
    let own = Metrics { local: Some(LocalEvaluation { global: judged, own: judged }), ..Metrics::default() };
    store.metrics(&[(A, bytes(&[(0, 7), (1, 5)])), (B, own.clone())]).unwrap();
    store.metrics(&[(A, bytes(&[(1, 9), (u32::MAX, u64::MAX)])), (ASKERS, bytes(&[(2, 3)]))]).unwrap();
    store.participant(&participant(B)).unwrap(); // is back
    drop(store);
    let store = Store::open(folder.path(), NAME).unwrap();
    let saved = loaded(&store);
    assert_eq!((&saved.adapter, &saved.state), (&adapter(1.0), &state(1.0)));
    assert_eq!(saved.history, [result(0), result(1)]);
    assert_eq!(saved.open, Some(SavedRound { round: 2, target: 2, assigned: vec![A, B], closed: Some(1) }));
    assert_eq!(saved.updates, [(C, update(1, C))]);
    assert_eq!(saved.past, [(A, 1, true), (B, 1, true), (C, 1, true)]);
    assert_eq!(saved.participants, [A, B, C].map(participant));
    let most = u64::try_from(i64::MAX).unwrap(); // SQLite's
    let kept = [(ASKERS, bytes(&[(2, 3)])), (A, bytes(&[(0, 7), (1, 9), (u32::MAX, most)])), (B, own)];
    assert_eq!(saved.metrics, kept.into());

    store.accept(A, &update(2, A)).unwrap();
    store.merged(&result(2), &adapter(2.0), &StrategyState::default(), &[(C, 1), (A, 2)]).unwrap();
    let saved = loaded(&store);
    assert_eq!((saved.open, saved.updates, saved.state), (None, Vec::new(), StrategyState::default()));
    assert_eq!(saved.past, [(A, 2, true), (B, 2, false)], "round 1 is too long ago for max_staleness 1");
    assert_eq!(store.rounds().unwrap(), [0, 1, 2].map(result));
    for round in 0..3 {
        assert_eq!(store.adapter(round).unwrap(), adapter(round as f32));
    }
    assert!(fault(store.adapter(3)).contains("rounds 0 to 2 are there"));
}

#[test]
fn figures_that_are_no_numbers_do_no_harm() {
    let folder = folder();
    let store = begun(folder.path());
    let nothing = Evaluation { accuracy: f64::NAN, loss: f64::INFINITY, samples: 0 };
    let local = Some(LocalEvaluation { global: nothing, own: nothing });
    store.accept(B, &Update { loss: f32::NAN, local, ..update(1, B) }).unwrap();
    store.merged(&RoundResult { local, ..result(1) }, &adapter(1.0), &state(1.0), &[(A, 1)]).unwrap();
    let saved = loaded(&store);
    let [(B, Update { loss, local: Some(kept), .. })] = &saved.updates[..] else { panic!("{:?}", saved.updates) };
    assert!(loss.is_nan() && kept.own.accuracy.is_nan() && kept.own.loss == f64::INFINITY);
    assert!(saved.history[1].local.unwrap().global.accuracy.is_nan());
}

#[test]
fn updates_of_clients_who_keep_their_adapters_have_no_tensors() {
    let folder = folder();
    let store = begun(folder.path());
    let update = Update { adapter: AdapterState::default(), ..update(1, B) };
    store.accept(B, &update).unwrap();
    assert_eq!(loaded(&store).updates[1], (B, update));
}

#[test]
fn two_federations_share_a_file() {
    let folder = folder();
    let first = begun(folder.path());
    let second = Store::open(folder.path(), "g").unwrap();
    assert_eq!(second.load().unwrap(), None);
    let other = NewFederation { model: "n".into(), ..new() };
    second.create(&other).unwrap();
    second.judged(&result(0)).unwrap();
    second.participant(&SavedParticipant { name: "other".into(), ..participant(A) }).unwrap();
    second.begin_round(1, 1, &[A]).unwrap();
    second.accept(A, &update(1, A)).unwrap();
    second.merged(&result(1), &adapter(5.0), &state(5.0), &[(A, 1)]).unwrap();
    let (f, g) = (loaded(&first), loaded(&second));
    assert_eq!((f.history.len(), f.updates.len(), f.participants.len(), f.state), (1, 1, 3, StrategyState::default()));
    assert_eq!((g.history.len(), g.updates.len(), g.participants.len(), g.model.as_str()), (2, 0, 1, "n"));
    let all = Store::federations(folder.path()).unwrap();
    let lines: Vec<_> = all.iter().map(|s| (s.name.as_str(), s.done, s.participants, s.accuracy)).collect();
    let accuracy = |round| Some(result(round).held_out.accuracy);
    assert_eq!(lines, [("f", 0, 3, accuracy(0)), ("g", 1, 1, accuracy(1))]);
    let choose = |name| Store::choose(folder.path(), name);
    assert!(fault(choose(None)).contains("several federations; name one with --federation: f, g"));
    assert!(fault(choose(Some("h"))).contains("no federation 'h'; there are: f, g"));
    assert_eq!(choose(Some("g")).unwrap(), all[1]);
}

#[test]
fn a_folder_without_federations_stays_as_it_is() {
    let folder = folder();
    assert!(Store::federations(folder.path()).unwrap().is_empty());
    assert!(fault(Store::choose(folder.path(), None)).contains("fednano serve"));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let store = begun(folder.path());
    assert_eq!(Store::choose(folder.path(), None).unwrap().name, NAME);
    drop(store);
}

#[test]
fn merged_updates_lose_their_tensors_and_keep_their_figures() {
    let folder = folder();
    let store = begun(folder.path());
    store.accept(B, &update(1, B)).unwrap();
    let count = |column: &str| -> i64 {
        let sql = format!("SELECT count({column}) FROM accepted");
        store.lock().query_row(&sql, [], |row| row.get(0)).unwrap()
    };
    assert_eq!([count("adapter"), count("fisher"), count("merged_in"), count("samples")], [2, 1, 0, 2]);
    store.merged(&result(1), &adapter(1.0), &state(1.0), &[(A, 1), (B, 1)]).unwrap();
    assert_eq!([count("adapter"), count("fisher"), count("merged_in"), count("samples")], [0, 0, 2, 2]);
    assert_eq!(count("loss"), 2);
    // And what was freed is used again: a round adds its checkpoint, not the two matrices of its update.
    let pages = || -> i64 { store.lock().query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap() };
    let (big, before) = (adapter_of_rank(40), pages()); // of 11 pages
    for round in 2..12 {
        store.begin_round(round, 1, &[A]).unwrap();
        let update = Update { adapter: big.clone(), fisher: Some(big.clone()), ..update(round, A) };
        store.accept(A, &update).unwrap();
        store.merged(&result(round), &big, &StrategyState::default(), &[(A, round)]).unwrap();
    }
    assert!(pages() < before + 10 * 16, "{} pages after {before}", pages());
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let folder = folder();
    let store = begun(folder.path());
    let before = loaded(&store);
    assert!(fault(store.create(&new())).contains("two servers"));
    assert!(fault(store.judged(&result(0))).contains("is at round 1, not 0"));
    assert!(fault(store.judged(&result(1))).contains("round 0"));
    assert!(fault(store.begin_round(2, 1, &[A])).contains("is at round 1, not 2"));
    assert!(fault(store.begin_round(0, 1, &[A])).contains("round 0"));
    assert!(fault(store.begin_round(1, 9, &[ParticipantId(99)])).contains("somebody else"), "an unknown participant");
    assert!(fault(store.assign(2, A)).contains("somebody else"), "a round that has not begun");
    assert!(fault(store.accept(A, &update(1, A))).contains("somebody else"), "a second update");
    assert!(fault(store.accept(B, &update(2, B))).contains("somebody else"), "a round that has not begun");
    assert!(fault(store.left(ParticipantId(99))).contains("99"));
    assert!(fault(store.close(2, 1)).contains("is at round 1, not 2"));
    store.metrics(&[(ParticipantId(99), Metrics::default())]).unwrap(); // nobody's
    // The second update is not there: nor is anything of the round then.
    let merged = |used: &[_]| store.merged(&result(1), &adapter(1.0), &state(1.0), used);
    assert!(fault(merged(&[(A, 1), (B, 1)])).contains("participant 2 for round 1"));
    assert_eq!(loaded(&store), before);
    merged(&[(A, 1)]).unwrap();
    assert!(fault(merged(&[])).contains("is at round 2, not 1"));
}

// ------------------------------------------------------------------------------------ kills

/// A large change of every kind that is not committed, its pages in the log already.
fn half_a_transaction(store: &Store) {
    let connection = store.lock();
    connection
        .execute_batch(
            "PRAGMA cache_size = 1;
             BEGIN IMMEDIATE;
             UPDATE participant SET has_left = 1;
             DELETE FROM result;
             UPDATE checkpoint SET adapter = randomblob(100000);
             UPDATE accepted SET merged_in = 1, adapter = NULL;
             INSERT INTO round VALUES ('f', 9, 9, NULL);",
        )
        .unwrap();
    assert!(!connection.is_autocommit());
}

#[test]
fn half_a_transaction_leaves_what_was_before() {
    let folder = folder();
    let store = begun(folder.path());
    let before = loaded(&store);
    half_a_transaction(&store);
    drop(store);
    assert_eq!(loaded(&Store::open(folder.path(), NAME).unwrap()), before);
}

#[test]
fn files_copied_in_mid_transaction_are_what_was_before() {
    let (folder, copy) = (folder(), folder());
    let store = begun(folder.path());
    let before = loaded(&store);
    let log = || std::fs::metadata(folder.path().join(format!("{FILE}-wal"))).unwrap().len();
    let committed = log();
    half_a_transaction(&store);
    assert!(log() > committed, "nothing of the transaction is in the log");
    // As a kill or a loss of power leaves them: the index of the log is rebuilt.
    for end in ["", "-wal"] {
        let name = format!("{FILE}{end}");
        std::fs::copy(folder.path().join(&name), copy.path().join(&name)).unwrap();
    }
    let again = Store::open(copy.path(), NAME).unwrap();
    assert_eq!(loaded(&again), before);
    again.accept(B, &update(1, B)).unwrap();
    assert_eq!(loaded(&again).updates.len(), 2);
}

/// Two rounds of two participants, going on from whatever is there, one write after the other.
fn run(folder: &Path) -> SavedFederation {
    let store = Store::open(folder, NAME).unwrap();
    loop {
        let Some(saved) = store.load().unwrap() else {
            store.create(&new()).unwrap();
            continue;
        };
        let (next, joined) = (saved.history.len() as u32, saved.participants.len());
        match &saved.open {
            _ if next == 0 => store.judged(&result(0)).unwrap(),
            _ if joined < 2 => store.participant(&participant([A, B][joined])).unwrap(),
            None if next == 3 => return saved,
            None => store.begin_round(next, 2, &[A]).unwrap(),
            Some(open) if open.assigned.len() < 2 => store.assign(next, B).unwrap(),
            Some(_) if saved.updates.len() < 2 => {
                let from = [A, B][saved.updates.len()];
                store.accept(from, &update(next, from)).unwrap();
            }
            Some(_) if !saved.participants[0].left => store.left(A).unwrap(),
            Some(_) => {
                let used: Vec<_> = saved.updates.iter().map(|(id, u)| (*id, u.round)).collect();
                store.merged(&result(next), &adapter(next as f32), &state(next as f32), &used).unwrap();
            }
        }
    }
}

/// The process is really killed, at each of its writes in turn, and started again: this test calls itself as that process.
#[test]
fn killed_at_every_write_it_goes_on_to_the_same_end() {
    const FOLDER: &str = "FEDNANO_STORE_TEST_FOLDER";
    if let Some(folder) = std::env::var_os(FOLDER) {
        run(Path::new(&folder));
        return;
    }
    let process = |folder: &Path, variable: &str, value: &std::ffi::OsStr| {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::tests::killed_at_every_write_it_goes_on_to_the_same_end"])
            .env(FOLDER, folder)
            .env(variable, value)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap()
            .success()
    };
    let whole = folder();
    let log = whole.path().join("points");
    assert!(process(whole.path(), "FEDNANO_CRASH_LOG", log.as_os_str()));
    let points: Vec<String> = std::fs::read_to_string(log).unwrap().lines().map(str::to_owned).collect();
    // Tables, federation, judgement, two participants, one that leaves, and twice: a round, one more for it, two updates, a merge.
    assert_eq!(points.len(), 2 * (6 + 2 * 5), "{points:#?}");
    assert_eq!(points[0], "1 create the tables: before its transaction");
    assert!(points.iter().any(|p| p.ends_with("merged round 2: before its commit")), "{points:#?}");
    let end = run(whole.path());
    for (number, name) in (1..).zip(&points) {
        let killed = folder();
        let at = number.to_string();
        assert!(!process(killed.path(), "FEDNANO_CRASH_AT", at.as_ref()), "not killed at {name}");
        assert_eq!(run(killed.path()), end, "killed at {name}");
        let store = Store::open(killed.path(), NAME).unwrap();
        assert_eq!(store.adapter(1).unwrap(), adapter(1.0), "killed at {name}");
    }
}

// ------------------------------------------------------------------------------------ files that cannot be used

/// The database of an ordinary federation, closed, changed by `change`.
fn changed(folder: &Path, change: impl FnOnce(&Path)) -> String {
    drop(begun(folder));
    change(&folder.join(FILE));
    let words = fault(Store::open(folder, NAME).and_then(|store| store.load()));
    assert!(words.contains(FILE), "the file is not named: {words}");
    words
}

fn sql(file: &Path, sql: &str) {
    Connection::open(file).unwrap().execute_batch(sql).unwrap();
}

#[test]
fn files_of_other_versions_and_programs_are_told_apart_and_left_alone() {
    let at = folder();
    let newer = changed(at.path(), |file| sql(file, "PRAGMA user_version = 99"));
    assert!(newer.contains("newer fednano") && newer.contains("update this program"), "{newer}");

    let at = folder();
    let foreign = at.path().join(FILE);
    sql(&foreign, "CREATE TABLE notes (text); INSERT INTO notes VALUES ('mine')");
    let before = std::fs::read(&foreign).unwrap();
    let words = fault(Store::open(at.path(), NAME));
    assert!(words.contains("another program") && words.contains("--data-dir"), "{words}");
    assert_eq!(std::fs::read(&foreign).unwrap(), before, "somebody else's file was changed");

    let at = folder();
    let words = changed(at.path(), |file| {
        sql(file, "UPDATE federation SET settings = '{\"strategy\":\"of 2030\"}', exact = x'00'");
    });
    assert!(words.contains("'f'") && words.contains("go on with the fednano that wrote them"), "{words}");
}

#[test]
fn settings_that_only_json_still_has_are_read() {
    let at = folder();
    drop(begun(at.path()));
    // Another version of the wire, and a setting that did not exist then.
    sql(&at.path().join(FILE), "UPDATE federation SET exact = x'00', settings = json_remove(settings, '$.grace_s')");
    let saved = loaded(&Store::open(at.path(), NAME).unwrap());
    assert_eq!(saved.settings.grace_s, FederationSettings::default().grace_s);
    assert_eq!(saved.settings.seed, new().settings.seed);
}

/// As version 1 left it: without the ledger, with sums of other kinds.
#[test]
fn files_of_the_first_version_go_on() {
    let at = folder();
    drop(begun(at.path()));
    let file = at.path().join(FILE);
    let own = serde_json::to_string(&local(3.0)).unwrap();
    sql(
        &file,
        &format!(
            "DROP TABLE traffic; PRAGMA user_version = 1;
             UPDATE participant SET metrics = '[{{\"updates_up\": 5}}, null]' WHERE id = 1;
             UPDATE participant SET metrics = '[{{\"updates_up\": 5}}, {own}]' WHERE id = 2;"
        ),
    );
    let store = Store::open(at.path(), NAME).unwrap();
    let saved = loaded(&store);
    assert_eq!((saved.updates.len(), saved.participants.len()), (1, 3));
    assert_eq!(saved.metrics.keys().copied().collect::<Vec<_>>(), [B]);
    assert_eq!(saved.metrics[&B].local.unwrap().own.samples, 4);
    store.metrics(&[(A, bytes(&[(1, 5)]))]).unwrap();
    drop(store);
    assert_eq!(loaded(&Store::open(at.path(), NAME).unwrap()).metrics[&A], bytes(&[(1, 5)]));
}

#[test]
fn damaged_files_are_named_with_a_remedy() {
    let at = folder();
    let words = changed(at.path(), |file| std::fs::write(file, "this is text, and no database at all").unwrap());
    assert!(words.contains("no SQLite database") && words.contains("move it away"), "{words}");

    let at = folder();
    let words = changed(at.path(), |file| {
        let mut bytes = std::fs::read(file).unwrap();
        bytes[4096..].fill(0xff);
        std::fs::write(file, bytes).unwrap();
    });
    assert!(words.contains("is damaged") && words.contains("put a copy of it back"), "{words}");

    let at = folder();
    let words = changed(at.path(), |file| {
        let bytes = std::fs::read(file).unwrap();
        std::fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
    });
    assert!(words.contains("is damaged"), "{words}");

    let at = folder();
    let words = changed(at.path(), |file| sql(file, "UPDATE checkpoint SET adapter = x'0011'"));
    assert!(words.contains("adapters of round 0 of 'f' are damaged"), "{words}");
}

#[test]
fn places_that_cannot_be_written_are_named_with_a_remedy() {
    let at = folder();
    std::fs::write(at.path().join("file"), "").unwrap();
    let words = fault(Store::open(&at.path().join("file"), NAME));
    assert!(words.contains("cannot create") && words.contains("--data-dir"), "{words}");

    std::fs::create_dir_all(at.path().join("folder").join(FILE)).unwrap();
    let words = fault(Store::open(&at.path().join("folder"), NAME));
    assert!(words.contains("cannot be opened for writing") && words.contains("--data-dir"), "{words}");

    // What SQLite reports of a read-only disk, which even the system's administrator has in this way.
    let store = begun(&at.path().join("read-only"));
    store.lock().execute_batch("PRAGMA query_only = ON").unwrap();
    let words = fault(store.accept(B, &update(1, B)));
    assert!(words.contains("cannot be opened for writing") && words.contains("accept round 1 from 2"), "{words}");
    assert_eq!(loaded(&store).updates.len(), 1);
}

#[cfg(unix)]
#[test]
fn nobody_else_may_read_it() {
    use std::os::unix::fs::PermissionsExt;
    let at = folder();
    let _store = begun(at.path());
    for end in ["", "-wal", "-shm"] {
        let about = std::fs::metadata(at.path().join(format!("{FILE}{end}"))).unwrap();
        assert_eq!(about.permissions().mode() & 0o777, 0o600, "{FILE}{end}");
    }
}

#[cfg(unix)]
#[test]
fn a_read_only_folder_is_named_with_a_remedy() {
    use std::os::unix::fs::PermissionsExt;
    let at = folder();
    drop(begun(at.path()));
    let permit = |mode| std::fs::set_permissions(at.path(), std::fs::Permissions::from_mode(mode)).unwrap();
    permit(0o555);
    let administrator = std::fs::write(at.path().join("probe"), "").is_ok();
    let opened = Store::open(at.path(), NAME).and_then(|store| store.load());
    permit(0o755);
    if administrator {
        // To whom nothing is read-only: the test above has the words.
        assert!(opened.is_ok());
    } else {
        let words = fault(opened);
        assert!(words.contains("cannot be opened for writing") && words.contains("this user"), "{words}");
    }
}

#[test]
fn a_full_disk_and_a_locked_file_are_named_with_a_remedy() {
    let at = folder();
    let store = begun(at.path());
    // A database may not grow any more: what a full disk reports.
    store.lock().execute_batch("PRAGMA max_page_count = 1").unwrap();
    let many = Update { adapter: adapter_of_rank(400), ..update(1, B) };
    let words = fault(store.accept(B, &many));
    assert!(words.contains("is full") && words.contains("make room"), "{words}");
    assert_eq!(loaded(&store).updates.len(), 1);

    let other = Connection::open(at.path().join(FILE)).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    store.lock().busy_timeout(std::time::Duration::ZERO).unwrap();
    let words = fault(store.left(A));
    assert!(words.contains("another program") && words.contains("stop"), "{words}");
    other.execute_batch("ROLLBACK").unwrap();
    store.left(A).unwrap();
}

fn adapter_of_rank(rank: usize) -> AdapterState {
    AdapterState::zeros(AdapterChoice::Both, rank, 64)
}
