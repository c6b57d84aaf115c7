//! What survives on disk: `DATA/fednano.sqlite`, several federations in one SQLite file, in WAL mode and with every commit synced.
//!
//! | module | what |
//! | --- | --- |
//! | `schema` | the tables, their version, transactions, SQLite's errors in words |
//! | `load` | rows to values |
//! | `tensors` | adapters as safetensors, in the database and as files |
//! | `crash` | a testing aid: the end of the process at a chosen write |
//! | `temporary` | a folder for one run |
//!
//! Each method that writes is one transaction: a kill at any moment leaves all of it or nothing, and what is committed stays. So
//! whoever calls it may tell others once it has returned, not before. A round goes through the store like this:
//!
//! ```text
//! create, judged -> begin_round -> assign, participant, left -> accept (once an update) -> close -> merged -> begin_round ...
//! ```

mod crash;
mod load;
mod schema;
mod temporary;
mod tensors;

pub use temporary::TemporaryFolder;
pub use tensors::{AdapterFile, read_adapter, write_adapter};

use anyhow::{Context, ensure};
use fednano_shared::aggregate::StrategyState;
use fednano_shared::ledger::Traffic;
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::FederationSettings;
use fednano_shared::wire::{self, ClientKind, LocalEvaluation, ParticipantId, RoundResult, SessionToken, Update};
use rusqlite::{Connection, params};
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Name of the database in the data folder; SQLite keeps a `-wal` and a `-shm` file beside it.
pub const FILE: &str = "fednano.sqlite";

/// A federation that begins.
#[derive(Debug, Clone, PartialEq)]
pub struct NewFederation {
    /// What was agreed.
    pub settings: FederationSettings,
    /// Identity of the client part of the model.
    pub model: String,
    /// Where the model was, for `fednano resume`.
    pub model_dir: String,
    /// Initial adapters, kept as those of round 0.
    pub adapter: AdapterState,
}

/// Everything that is kept of a federation but the adapters of earlier rounds.
#[derive(Debug, Clone, PartialEq)]
pub struct SavedFederation {
    /// What was agreed; a restart with other settings is refused.
    pub settings: FederationSettings,
    /// Identity of the client part of the model.
    pub model: String,
    /// Where the model was.
    pub model_dir: String,
    /// Who may come back, by number.
    pub participants: Vec<SavedParticipant>,
    /// What was last kept of their figures; bytes of connections that only ask are those of participant 0.
    pub metrics: BTreeMap<ParticipantId, Metrics>,
    /// Results of the rounds that are done, from round 0 on; empty before the untouched model was judged.
    pub history: Vec<RoundResult>,
    /// Adapters after the last of them.
    pub adapter: AdapterState,
    /// The strategy's own state after the last of them.
    pub state: StrategyState,
    /// The round that has begun and is not done.
    pub open: Option<SavedRound>,
    /// Updates that are accepted and not merged, in the order of their arrival; [`Update::round`] says of which round each is.
    pub updates: Vec<(ParticipantId, Update)>,
    /// Who was told to train in the done rounds whose updates are still taken (the last `max_staleness`), and whether the update
    /// was accepted.
    pub past: Vec<(ParticipantId, u32, bool)>,
}

/// A round under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedRound {
    /// Its number, from 1.
    pub round: u32,
    /// Updates that it needs.
    pub target: usize,
    /// Who was told to train, by number.
    pub assigned: Vec<ParticipantId>,
    /// It was closed with fewer than it needs: so many updates, the first of those that wait, are merged with it.
    pub closed: Option<usize>,
}

/// A participant's figures.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Metrics {
    /// Its bytes by round.
    pub traffic: BTreeMap<u32, Traffic>,
    /// Its last judgement on its own test samples.
    pub local: Option<LocalEvaluation>,
}

/// A known participant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedParticipant {
    /// Number.
    pub id: ParticipantId,
    /// Its secret.
    pub token: SessionToken,
    /// Name.
    pub name: String,
    /// Kind of program.
    pub kind: ClientKind,
    /// Device in words.
    pub device: String,
    /// Training samples.
    pub samples: u32,
    /// It said goodbye for good.
    pub left: bool,
}

/// A line about a federation.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Its name.
    pub name: String,
    /// What was agreed.
    pub settings: FederationSettings,
    /// Identity of the client part of the model.
    pub model: String,
    /// Where the model was.
    pub model_dir: String,
    /// The last round that is done (0: none).
    pub done: u32,
    /// Participants that were ever let in.
    pub participants: usize,
    /// Held-out accuracy after the last round.
    pub accuracy: Option<f64>,
}

/// A federation's part of the database; clones share one connection. Its methods block for as long as the disk takes, and all
/// of them fail on a damaged file, a full or read-only disk and a file that another program locks, each with cause and remedy.
#[derive(Debug, Clone)]
pub struct Store {
    connection: Arc<Mutex<Connection>>,
    file: PathBuf,
    federation: String,
}

impl Store {
    /// Open (and make) the database of a data folder for one federation.
    ///
    /// # Errors
    /// A folder that cannot be made, a file that cannot be used.
    pub fn open(data_dir: &Path, federation: &str) -> anyhow::Result<Self> {
        std::fs::create_dir_all(data_dir)
            .with_context(|| format!("cannot create {}; choose another --data-dir", data_dir.display()))?;
        let file = data_dir.join(FILE);
        let connection = Arc::new(Mutex::new(schema::open(&file)?));
        Ok(Self { connection, file, federation: federation.to_owned() })
    }

    /// The federations of a data folder by name; none where there is no database. Nothing is made.
    ///
    /// # Errors
    /// A file that cannot be used.
    pub fn federations(data_dir: &Path) -> anyhow::Result<Vec<Summary>> {
        let file = data_dir.join(FILE);
        if !file.exists() {
            return Ok(Vec::new());
        }
        let mut connection = schema::open(&file)?;
        schema::snapshot(&mut connection, load::summaries).map_err(|e| schema::explain(&file, e))
    }

    /// The federation of this name, or without a name the only one of a data folder.
    ///
    /// # Errors
    /// None, or several without a name: those that are there are named.
    pub fn choose(data_dir: &Path, name: Option<&str>) -> anyhow::Result<Summary> {
        let mut all = Self::federations(data_dir)?;
        let (folder, there) = (data_dir.display(), names(&all));
        ensure!(
            !all.is_empty(),
            "{folder} holds no federation; name the --data-dir of a server, or begin one with `fednano serve`"
        );
        match name {
            Some(name) => {
                all.retain(|s| s.name == name);
                all.pop().with_context(|| format!("{folder} holds no federation '{name}'; there are: {there}"))
            }
            None if all.len() > 1 => {
                anyhow::bail!("{folder} holds several federations; name one with --federation: {there}")
            }
            None => all.pop().with_context(|| format!("{folder} holds no federation")),
        }
    }

    /// What earlier runs left of the federation; none before [`Self::create`].
    ///
    /// # Errors
    /// A file that cannot be used.
    pub fn load(&self) -> anyhow::Result<Option<SavedFederation>> {
        self.read(|c| load::federation(c, &self.federation))
    }

    /// The federation's adapters after a round (0: the initial ones).
    ///
    /// # Errors
    /// A round that is not there: those that are there are named.
    pub fn adapter(&self, round: u32) -> anyhow::Result<AdapterState> {
        self.read(|c| load::checkpoint(c, &self.federation, round))
    }

    /// Results of the rounds that are done, from round 0 on; the adapters of each are there.
    ///
    /// # Errors
    /// A file that cannot be used.
    pub fn rounds(&self) -> anyhow::Result<Vec<RoundResult>> {
        self.read(|c| Ok(load::history(c, &self.federation)?))
    }

    /// Begin the federation.
    ///
    /// # Errors
    /// One of this name is there already.
    pub fn create(&self, new: &NewFederation) -> anyhow::Result<()> {
        let (settings, exact) = (serde_json::to_string(&new.settings)?, wire::encode(&new.settings));
        let adapter = write_adapter(&new.adapter, &[])?;
        self.write("create", |c| {
            c.execute(
                "INSERT INTO federation (name, settings, exact, model, model_dir) VALUES (?1, ?2, ?3, ?4, ?5)",
                (&self.federation, settings, exact, &new.model, &new.model_dir),
            )?;
            self.insert_checkpoint(c, 0, adapter)
        })
    }

    /// Keep the judgement of the untouched model: the result of round 0.
    ///
    /// # Errors
    /// Another round's result, or a second one.
    pub fn judged(&self, result: &RoundResult) -> anyhow::Result<()> {
        ensure!(result.round == 0, "the untouched model is round 0, not {}", result.round);
        self.write("judged", |c| {
            self.expect(c, 0)?;
            self.insert_result(c, result)
        })
    }

    /// Keep a participant that is let in, or what has changed about a known one.
    ///
    /// # Errors
    /// A file that cannot be used.
    pub fn participant(&self, p: &SavedParticipant) -> anyhow::Result<()> {
        let kind = load::pack(&p.kind)?;
        self.write(&format!("participant {}", p.id.0), |c| {
            c.execute(
                "INSERT INTO participant (federation, id, token, name, kind, device, samples, has_left)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
                 ON CONFLICT (federation, id) DO UPDATE SET token = excluded.token, name = excluded.name, kind = excluded.kind,
                 device = excluded.device, samples = excluded.samples, has_left = excluded.has_left",
                (&self.federation, p.id.0, &p.token.0, &p.name, kind, &p.device, p.samples, p.left),
            )?;
            Ok(())
        })
    }

    /// Keep that a participant left for good.
    ///
    /// # Errors
    /// A participant that is not known.
    pub fn left(&self, id: ParticipantId) -> anyhow::Result<()> {
        self.write(&format!("left {}", id.0), |c| {
            let sql = "UPDATE participant SET has_left = 1 WHERE federation = ?1 AND id = ?2";
            let changed = c.execute(sql, (&self.federation, id.0))?;
            ensure!(changed == 1, "participant {} of federation '{}' is not known", id.0, self.federation);
            Ok(())
        })
    }

    /// Keep that a round begins, how many updates it needs and who is told to train. A paused round may begin once more: the
    /// need is replaced, and who was told before stays so.
    ///
    /// # Errors
    /// Any round but the next one.
    pub fn begin_round(&self, round: u32, target: usize, assigned: &[ParticipantId]) -> anyhow::Result<()> {
        ensure!(round > 0, "round 0 is the untouched model and needs nobody");
        self.write(&format!("begin round {round}"), |c| {
            self.expect(c, round)?;
            c.execute(
                "INSERT INTO round (federation, number, target) VALUES (?1, ?2, ?3)
                 ON CONFLICT (federation, number) DO UPDATE SET target = excluded.target",
                (&self.federation, round, target),
            )?;
            assigned.iter().try_for_each(|id| self.insert_assignment(c, round, *id))
        })
    }

    /// Keep that one more is told to train in the round under way; a second time changes nothing.
    ///
    /// # Errors
    /// A round that has not begun, a participant that is not known.
    pub fn assign(&self, round: u32, id: ParticipantId) -> anyhow::Result<()> {
        self.write(&format!("assign round {round} to {}", id.0), |c| self.insert_assignment(c, round, id))
    }

    /// Keep that the round under way is closed with fewer updates than it needs: with the first `merged` of those that wait.
    ///
    /// # Errors
    /// A round that is not under way.
    pub fn close(&self, round: u32, merged: usize) -> anyhow::Result<()> {
        self.write(&format!("close round {round}"), |c| {
            self.expect(c, round)?;
            let sql = "UPDATE round SET closed = ?1 WHERE federation = ?2 AND number = ?3";
            let changed = c.execute(sql, (merged, &self.federation, round))?;
            ensure!(changed == 1, "round {round} of federation '{}' has not begun", self.federation);
            Ok(())
        })
    }

    /// Keep figures: last judgements, and bytes of the rounds that are named; what is kept of other rounds stays.
    ///
    /// # Errors
    /// A file that cannot be used.
    pub fn metrics(&self, metrics: &[(ParticipantId, Metrics)]) -> anyhow::Result<()> {
        let pack = |(id, metrics): &(ParticipantId, Metrics)| anyhow::Ok((id.0, load::pack(&metrics.local)?));
        let rows: Vec<(u32, String)> = metrics.iter().map(pack).collect::<anyhow::Result<_>>()?;
        self.write("metrics", |c| {
            let mut sql = c.prepare("UPDATE participant SET metrics = ?1 WHERE federation = ?2 AND id = ?3")?;
            for (id, local) in &rows {
                sql.execute((local, &self.federation, id))?;
            }
            metrics.iter().try_for_each(|(id, metrics)| self.insert_traffic(c, *id, &metrics.traffic))
        })
    }

    /// Keep an update that counts. It may be of an earlier round than the one under way.
    ///
    /// # Errors
    /// A second update of this participant for this round, a round that has not begun, a participant that is not known.
    pub fn accept(&self, from: ParticipantId, update: &Update) -> anyhow::Result<()> {
        let adapter = write_adapter(&update.adapter, &[])?;
        let fisher = update.fisher.as_ref().map(|fisher| write_adapter(fisher, &[])).transpose()?;
        let sql = format!(
            "INSERT INTO accepted (federation, participant, round, samples, loss, {}, adapter, fisher)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
            load::LOCAL
        );
        let [ga, gl, gs] = load::evaluation_values(update.local.map(|l| l.global));
        let [oa, ol, os] = load::evaluation_values(update.local.map(|l| l.own));
        self.write(&format!("accept round {} from {}", update.round, from.0), |c| {
            let (samples, loss) = (update.samples, update.loss);
            c.execute(
                &sql,
                params![self.federation, from.0, update.round, samples, loss, ga, gl, gs, oa, ol, os, adapter, fisher],
            )?;
            Ok(())
        })
    }

    /// Keep a round that is done: its result, the federation's adapters and the strategy's state after it, and which updates
    /// (from whom, trained in which round) are used up by it, whether or not the result names them. The tensors of those are
    /// freed, their figures stay.
    ///
    /// # Errors
    /// Any round but the next one; an update that is not there.
    pub fn merged(
        &self,
        result: &RoundResult,
        adapter: &AdapterState,
        state: &StrategyState,
        used: &[(ParticipantId, u32)],
    ) -> anyhow::Result<()> {
        let round = result.round;
        ensure!(round > 0, "round 0 is the untouched model and merges nothing");
        let adapter = write_adapter(adapter, &[])?;
        let state: Vec<(&String, Vec<u8>)> =
            state.0.iter().map(|(key, value)| Ok((key, write_adapter(value, &[])?))).collect::<anyhow::Result<_>>()?;
        self.write(&format!("merged round {round}"), |c| {
            self.expect(c, round)?;
            self.insert_result(c, result)?;
            self.insert_checkpoint(c, round, adapter)?;
            c.execute("DELETE FROM strategy_state WHERE federation = ?1", [&self.federation])?;
            for (key, tensors) in state {
                let sql = "INSERT INTO strategy_state (federation, name, tensors) VALUES (?1, ?2, ?3)";
                c.execute(sql, (&self.federation, key, tensors))?;
            }
            for (id, trained) in used {
                let changed = c.execute(
                    "UPDATE accepted SET merged_in = ?1, adapter = NULL, fisher = NULL
                     WHERE federation = ?2 AND participant = ?3 AND round = ?4 AND merged_in IS NULL",
                    (round, &self.federation, id.0, trained),
                )?;
                ensure!(changed == 1, "no update of participant {} for round {trained} waits to be merged", id.0);
            }
            Ok(())
        })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A thread that panicked in a transaction has rolled it back.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read<T>(&self, read: impl FnOnce(&Connection) -> anyhow::Result<T>) -> anyhow::Result<T> {
        schema::snapshot(&mut self.lock(), read)
            .map_err(|e| schema::explain(&self.file, e))
            .with_context(|| format!("federation '{}' cannot be read from {}", self.federation, self.file.display()))
    }

    fn write(&self, what: &str, change: impl FnOnce(&Connection) -> anyhow::Result<()>) -> anyhow::Result<()> {
        schema::transaction(&mut self.lock(), what, change)
            .map_err(|e| schema::explain(&self.file, e))
            .with_context(|| format!("federation '{}' cannot be kept ({what})", self.federation))
    }

    /// Two servers on one federation would keep different rounds.
    fn expect(&self, c: &Connection, round: u32) -> anyhow::Result<()> {
        let next = load::next_round(c, &self.federation)?;
        ensure!(
            round == next,
            "{} is at round {next}, not {round}; if two servers serve this federation, stop one, and start the other again",
            self.file.display()
        );
        Ok(())
    }

    fn insert_assignment(&self, c: &Connection, round: u32, id: ParticipantId) -> anyhow::Result<()> {
        let sql = "INSERT INTO assignment (federation, round, participant) VALUES (?1, ?2, ?3) ON CONFLICT DO NOTHING";
        c.execute(sql, (&self.federation, round, id.0))?;
        Ok(())
    }

    /// Bytes only grow, so a kind that there is none of has never been written.
    fn insert_traffic(&self, c: &Connection, id: ParticipantId, rounds: &BTreeMap<u32, Traffic>) -> anyhow::Result<()> {
        let mut sql = c.prepare(
            "INSERT INTO traffic (federation, participant, round, direction, kind, bytes) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT (federation, participant, round, direction, kind) DO UPDATE SET bytes = excluded.bytes",
        )?;
        for (round, traffic) in rounds {
            for (direction, bytes) in traffic.directions() {
                for (kind, count) in bytes.iter().filter(|(_, count)| *count > 0) {
                    let count = i64::try_from(count).unwrap_or(i64::MAX); // SQLite's largest
                    sql.execute((&self.federation, id.0, round, direction, kind.name(), count))?;
                }
            }
        }
        Ok(())
    }

    fn insert_checkpoint(&self, c: &Connection, round: u32, adapter: Vec<u8>) -> anyhow::Result<()> {
        let sql = "INSERT INTO checkpoint (federation, round, adapter) VALUES (?1, ?2, ?3)";
        c.execute(sql, (&self.federation, round, adapter))?;
        Ok(())
    }

    fn insert_result(&self, c: &Connection, r: &RoundResult) -> anyhow::Result<()> {
        let sql = format!(
            "INSERT INTO result (federation, round, accuracy, loss, samples, training_loss, seconds, participants, late, {})
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
            load::LOCAL
        );
        let [accuracy, loss, samples] = load::evaluation_values(Some(r.held_out));
        let [ga, gl, gs] = load::evaluation_values(r.local.map(|l| l.global));
        let [oa, ol, os] = load::evaluation_values(r.local.map(|l| l.own));
        let (participants, late) = (load::pack(&r.participants)?, load::pack(&r.late)?);
        let (name, training_loss, seconds) = (&self.federation, r.training_loss, r.seconds);
        c.execute(
            &sql,
            params![
                name,
                r.round,
                accuracy,
                loss,
                samples,
                training_loss,
                seconds,
                participants,
                late,
                ga,
                gl,
                gs,
                oa,
                ol,
                os
            ],
        )?;
        Ok(())
    }
}

/// How to open a file that nobody but this user may read, should it not be there yet: secrets of participants lie in it.
pub fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

fn names(all: &[Summary]) -> String {
    all.iter().map(|s| s.name.as_str()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
