//! Rows of the database to values, and the few values that are more than one column.

use super::{Metrics, SavedFederation, SavedParticipant, SavedRound, Summary, tensors};
use anyhow::Context;
use fednano_shared::ledger::{Kind, Traffic};
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::FederationSettings;
use fednano_shared::step::Evaluation;
use fednano_shared::wire::{self, LocalEvaluation, ParticipantId, RoundResult, SessionToken, Update};
use rusqlite::types::{Type, Value};
use rusqlite::{Connection, OptionalExtension, Params, Row};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;

/// Columns of a [`LocalEvaluation`], in `accepted` and `result`.
pub(super) const LOCAL: &str = "global_accuracy, global_loss, global_samples, own_accuracy, own_loss, own_samples";

/// For tensors that SQLite gives back and nobody can read.
const REMEDY: &str = "put a copy of the data folder back, or begin another federation";

/// Everything about a federation, if it is there.
pub(super) fn federation(c: &Connection, name: &str) -> anyhow::Result<Option<SavedFederation>> {
    let Some((settings, model, model_dir)) = about(c, name)? else { return Ok(None) };
    let history = history(c, name)?;
    let done = history.last().map_or(0, |r| r.round);
    Ok(Some(SavedFederation {
        participants: participants(c, name)?,
        metrics: metrics(c, name)?,
        adapter: checkpoint(c, name, done)?,
        state: fednano_shared::aggregate::StrategyState(strategy_state(c, name)?),
        open: open_round(c, name, done)?,
        updates: updates(c, name)?,
        past: past(c, name, done, settings.max_staleness)?,
        settings,
        model,
        model_dir,
        history,
    }))
}

/// All federations of a database, by name.
pub(super) fn summaries(c: &Connection) -> anyhow::Result<Vec<Summary>> {
    let names: Vec<String> = rows(c, "SELECT name FROM federation ORDER BY name", [], |row| row.get(0))?;
    let mut all = Vec::new();
    for name in names {
        let Some((settings, model, model_dir)) = about(c, &name)? else { continue };
        let last = "SELECT round, accuracy FROM result WHERE federation = ?1 ORDER BY round DESC LIMIT 1";
        let last =
            c.query_row(last, [&name], |row| Ok((row.get::<_, u32>(0)?, row.get::<_, Option<f64>>(1)?))).optional()?;
        let count = "SELECT count(*) FROM participant WHERE federation = ?1";
        all.push(Summary {
            participants: c.query_row(count, [&name], |row| row.get(0))?,
            done: last.map_or(0, |(round, _)| round),
            accuracy: last.and_then(|(_, accuracy)| accuracy),
            name,
            settings,
            model,
            model_dir,
        });
    }
    Ok(all)
}

/// The round whose result comes next: 0 before the untouched model is judged.
pub(super) fn next_round(c: &Connection, name: &str) -> rusqlite::Result<u32> {
    let sql = "SELECT coalesce(max(round) + 1, 0) FROM result WHERE federation = ?1";
    c.query_row(sql, [name], |row| row.get(0))
}

/// Results of the rounds that are done, in order.
pub(super) fn history(c: &Connection, name: &str) -> rusqlite::Result<Vec<RoundResult>> {
    let sql = format!(
        "SELECT round, accuracy, loss, samples, training_loss, seconds, participants, late, {LOCAL}
         FROM result WHERE federation = ?1 ORDER BY round"
    );
    rows(c, &sql, [name], |row| {
        Ok(RoundResult {
            round: row.get(0)?,
            held_out: evaluation(row, 1)?.unwrap_or_default(),
            training_loss: row.get(4)?,
            seconds: real(row, 5)?,
            participants: unpack(row, 6)?,
            late: unpack(row, 7)?,
            local: local(row, 8)?,
        })
    })
}

/// The federation's adapters after a round.
pub(super) fn checkpoint(c: &Connection, name: &str, round: u32) -> anyhow::Result<AdapterState> {
    let sql = "SELECT adapter FROM checkpoint WHERE federation = ?1 AND round = ?2";
    let blob: Option<Vec<u8>> = c.query_row(sql, (name, round), |row| row.get(0)).optional()?;
    let Some(blob) = blob else {
        let kept = "SELECT round FROM checkpoint WHERE federation = ?1 ORDER BY round";
        let kept: Vec<u32> = rows(c, kept, [name], |row| row.get(0))?;
        match (kept.first(), kept.last()) {
            (Some(first), Some(last)) => anyhow::bail!(
                "federation '{name}' has no adapters of round {round}; those of rounds {first} to {last} are there"
            ),
            _ => anyhow::bail!("there is no federation '{name}'; `fednano serve` begins one"),
        }
    };
    tensors::read_tensors(&blob)
        .with_context(|| format!("the adapters of round {round} of '{name}' are damaged; {REMEDY}"))
}

type About = (FederationSettings, String, String);

/// Settings, model and its directory.
fn about(c: &Connection, name: &str) -> anyhow::Result<Option<About>> {
    let sql = "SELECT settings, exact, model, model_dir FROM federation WHERE name = ?1";
    let row = c.query_row(sql, [name], |row| {
        Ok((row.get::<_, String>(0)?, row.get::<_, Vec<u8>>(1)?, row.get::<_, String>(2)?, row.get::<_, String>(3)?))
    });
    let Some((json, exact, model, model_dir)) = row.optional()? else { return Ok(None) };
    // JSON's numbers may come back one bit off. Those of the wire do not, but only this version reads them.
    let settings = wire::decode::<FederationSettings>(&exact).or_else(|_| serde_json::from_str(&json)).with_context(|| {
        format!(
            "the settings of federation '{name}' are none of this version's; go on with the fednano that wrote them, or begin another federation"
        )
    })?;
    Ok(Some((settings, model, model_dir)))
}

fn participants(c: &Connection, name: &str) -> rusqlite::Result<Vec<SavedParticipant>> {
    let sql =
        "SELECT id, token, name, kind, device, samples, has_left FROM participant WHERE federation = ?1 ORDER BY id";
    rows(c, sql, [name], |row| {
        Ok(SavedParticipant {
            id: ParticipantId(row.get(0)?),
            token: SessionToken(row.get(1)?),
            name: row.get(2)?,
            kind: unpack(row, 3)?,
            device: row.get(4)?,
            samples: row.get(5)?,
            left: row.get(6)?,
        })
    })
}

/// Figures for people to look at: what cannot be read is as if it had never been kept.
fn metrics(c: &Connection, name: &str) -> rusqlite::Result<BTreeMap<ParticipantId, Metrics>> {
    let mut metrics: BTreeMap<ParticipantId, Metrics> = BTreeMap::new();
    let sql = "SELECT id, metrics FROM participant WHERE federation = ?1 AND metrics IS NOT NULL";
    for (id, json) in rows(c, sql, [name], |row| Ok((ParticipantId(row.get(0)?), row.get::<_, String>(1)?)))? {
        metrics.entry(id).or_default().local = serde_json::from_str(&json).unwrap_or_default();
    }
    for (id, rounds) in traffic(c, name)? {
        metrics.entry(id).or_default().traffic = rounds;
    }
    Ok(metrics)
}

/// Bytes of each participant by round.
fn traffic(c: &Connection, name: &str) -> rusqlite::Result<BTreeMap<ParticipantId, BTreeMap<u32, Traffic>>> {
    let sql = "SELECT participant, round, direction, kind, bytes FROM traffic WHERE federation = ?1";
    let found = rows(c, sql, [name], |row| {
        let (id, round) = (ParticipantId(row.get(0)?), row.get::<_, u32>(1)?);
        Ok((id, round, row.get::<_, String>(2)?, row.get::<_, String>(3)?, row.get::<_, i64>(4)?))
    })?;
    let mut traffic: BTreeMap<ParticipantId, BTreeMap<u32, Traffic>> = BTreeMap::new();
    for (id, round, direction, kind, count) in found {
        let Some(kind) = Kind::ALL.into_iter().find(|known| known.name() == kind) else { continue };
        let sums = traffic.entry(id).or_default().entry(round).or_default();
        let sums = if direction == "up" { &mut sums.up } else { &mut sums.down };
        sums.count(kind, u64::try_from(count).unwrap_or(0));
    }
    Ok(traffic)
}

/// The round that has begun and is not done.
fn open_round(c: &Connection, name: &str, done: u32) -> rusqlite::Result<Option<SavedRound>> {
    let sql = "SELECT number, target, closed FROM round WHERE federation = ?1 AND number > ?2";
    let open = c.query_row(sql, (name, done), |row| {
        Ok((row.get::<_, u32>(0)?, row.get::<_, usize>(1)?, row.get::<_, Option<usize>>(2)?))
    });
    let Some((round, target, closed)) = open.optional()? else { return Ok(None) };
    let sql = "SELECT participant FROM assignment WHERE federation = ?1 AND round = ?2 ORDER BY participant";
    let assigned = rows(c, sql, (name, round), |row| Ok(ParticipantId(row.get(0)?)))?;
    Ok(Some(SavedRound { round, target, assigned, closed }))
}

/// Updates that wait to be merged, in the order of their arrival.
fn updates(c: &Connection, name: &str) -> anyhow::Result<Vec<(ParticipantId, Update)>> {
    let sql = format!(
        "SELECT participant, round, samples, loss, adapter, fisher, {LOCAL}
         FROM accepted WHERE federation = ?1 AND merged_in IS NULL ORDER BY sequence"
    );
    let mut statement = c.prepare(&sql)?;
    let found = statement.query_and_then([name], |row| {
        let from = ParticipantId(row.get(0)?);
        let round: u32 = row.get(1)?;
        let damaged =
            || format!("the update of participant {} in round {round} of '{name}' is damaged; {REMEDY}", from.0);
        let fisher = row.get::<_, Option<Vec<u8>>>(5)?;
        let update = Update {
            round,
            adapter: tensors::read_tensors(&row.get::<_, Vec<u8>>(4)?).with_context(damaged)?,
            fisher: fisher.map(|blob| tensors::read_tensors(&blob)).transpose().with_context(damaged)?,
            samples: row.get(2)?,
            loss: row.get::<_, Option<f32>>(3)?.unwrap_or(f32::NAN),
            local: local(row, 6)?,
        };
        anyhow::Ok((from, update))
    })?;
    found.collect()
}

/// Who was to train in the done rounds whose updates may still come (up to `staleness` rounds late), and whose counts.
fn past(c: &Connection, name: &str, done: u32, staleness: u32) -> rusqlite::Result<Vec<(ParticipantId, u32, bool)>> {
    let sql = "SELECT participant, round, EXISTS (
                   SELECT 1 FROM accepted
                   WHERE accepted.federation = assignment.federation AND accepted.round = assignment.round
                   AND accepted.participant = assignment.participant
               )
               FROM assignment WHERE federation = ?1 AND round <= ?2 AND round > ?3 ORDER BY round, participant";
    let before = i64::from(done) - i64::from(staleness);
    rows(c, sql, (name, done, before), |row| Ok((ParticipantId(row.get(0)?), row.get(1)?, row.get(2)?)))
}

fn strategy_state(c: &Connection, name: &str) -> anyhow::Result<BTreeMap<String, AdapterState>> {
    let sql = "SELECT name, tensors FROM strategy_state WHERE federation = ?1";
    let found = rows(c, sql, [name], |row| Ok((row.get::<_, String>(0)?, row.get::<_, Vec<u8>>(1)?)))?;
    let read = |(key, blob): (String, Vec<u8>)| {
        let tensors =
            tensors::read_tensors(&blob).with_context(|| format!("the strategy's '{key}' is damaged; {REMEDY}"))?;
        anyhow::Ok((key, tensors))
    };
    found.into_iter().map(read).collect()
}

// ------------------------------------------------------------------------------------ rows and columns

fn rows<T, P: Params>(
    c: &Connection,
    sql: &str,
    params: P,
    read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
) -> rusqlite::Result<Vec<T>> {
    let mut statement = c.prepare(sql)?;
    let found = statement.query_map(params, read)?;
    found.collect()
}

/// Accuracy, loss, samples from three columns on; none where there is no number of samples.
fn evaluation(row: &Row<'_>, at: usize) -> rusqlite::Result<Option<Evaluation>> {
    let Some(samples) = row.get::<_, Option<usize>>(at + 2)? else { return Ok(None) };
    Ok(Some(Evaluation { accuracy: real(row, at)?, loss: real(row, at + 1)?, samples }))
}

/// The columns [`LOCAL`].
fn local(row: &Row<'_>, at: usize) -> rusqlite::Result<Option<LocalEvaluation>> {
    let (global, own) = (evaluation(row, at)?, evaluation(row, at + 3)?);
    Ok(global.zip(own).map(|(global, own)| LocalEvaluation { global, own }))
}

/// What [`evaluation`] reads.
pub(super) fn evaluation_values(evaluation: Option<Evaluation>) -> [Value; 3] {
    match evaluation {
        Some(e) => [Value::Real(e.accuracy), Value::Real(e.loss), Value::Integer(e.samples as i64)],
        None => [Value::Null, Value::Null, Value::Null],
    }
}

/// SQLite keeps what is not a number as NULL.
fn real(row: &Row<'_>, at: usize) -> rusqlite::Result<f64> {
    Ok(row.get::<_, Option<f64>>(at)?.unwrap_or(f64::NAN))
}

/// A value as text: a word as it is, anything else as JSON.
pub(super) fn pack<T: Serialize>(value: &T) -> anyhow::Result<String> {
    Ok(match serde_json::to_value(value)? {
        serde_json::Value::String(word) => word,
        other => other.to_string(),
    })
}

/// What [`pack`] made.
fn unpack<T: DeserializeOwned>(row: &Row<'_>, at: usize) -> rusqlite::Result<T> {
    let text: String = row.get(at)?;
    let json = serde_json::from_str(&text).unwrap_or(serde_json::Value::String(text));
    serde_json::from_value(json).map_err(|e| rusqlite::Error::FromSqlConversionFailure(at, Type::Text, Box::new(e)))
}
