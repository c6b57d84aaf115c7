//! The database file: its tables, the versions of their layout, transactions, and SQLite's errors as cause and remedy.

use super::crash;
use anyhow::{bail, ensure};
use rusqlite::{Connection, ErrorCode, OpenFlags, TransactionBehavior};
use std::path::Path;
use std::time::Duration;

/// Layout of the tables, kept as `user_version`: one more with each change, which must then be made to files of the version before.
const VERSION: i64 = 2;
/// `application_id`: FNAN.
const APPLICATION: i64 = 0x464E_414E;
/// Somebody else's transaction is waited for that long.
const BUSY: Duration = Duration::from_secs(10);

/// Real numbers that are not numbers become NULL in SQLite, so no real column is NOT NULL: a participant's figures are its own.
/// Blobs of adapters come last in their tables, so that the rest is read without them.
const TABLES: &str = "
CREATE TABLE federation (
    name TEXT PRIMARY KEY NOT NULL,
    settings TEXT NOT NULL, -- JSON, for people and for later versions
    exact BLOB NOT NULL,    -- the same as on the wire: numbers bit for bit
    model TEXT NOT NULL,    -- identity of the client's half
    model_dir TEXT NOT NULL
) STRICT;
CREATE TABLE participant (
    federation TEXT NOT NULL REFERENCES federation (name),
    id INTEGER NOT NULL,
    token TEXT NOT NULL,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    device TEXT NOT NULL,
    samples INTEGER NOT NULL,
    has_left INTEGER NOT NULL,
    metrics TEXT, -- JSON of the last own judgement
    PRIMARY KEY (federation, id)
) STRICT, WITHOUT ROWID;
CREATE TABLE round ( -- that have begun
    federation TEXT NOT NULL REFERENCES federation (name),
    number INTEGER NOT NULL,
    target INTEGER NOT NULL, -- updates that it needs
    closed INTEGER, -- merged with fewer: with so many of those that waited
    PRIMARY KEY (federation, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE assignment ( -- who was told to train in a round
    federation TEXT NOT NULL,
    round INTEGER NOT NULL,
    participant INTEGER NOT NULL,
    PRIMARY KEY (federation, round, participant),
    FOREIGN KEY (federation, round) REFERENCES round (federation, number),
    FOREIGN KEY (federation, participant) REFERENCES participant (federation, id)
) STRICT, WITHOUT ROWID;
CREATE TABLE accepted ( -- updates that count; once merged, without their tensors
    sequence INTEGER PRIMARY KEY,
    federation TEXT NOT NULL,
    participant INTEGER NOT NULL,
    round INTEGER NOT NULL, -- it was trained in
    samples INTEGER NOT NULL,
    loss REAL,
    global_accuracy REAL, global_loss REAL, global_samples INTEGER,
    own_accuracy REAL, own_loss REAL, own_samples INTEGER,
    merged_in INTEGER, -- round, NULL while it waits
    adapter BLOB,
    fisher BLOB,
    UNIQUE (federation, participant, round),
    FOREIGN KEY (federation, round) REFERENCES round (federation, number),
    FOREIGN KEY (federation, participant) REFERENCES participant (federation, id)
) STRICT;
CREATE TABLE result ( -- of the rounds that are done; round 0 is the untouched model
    federation TEXT NOT NULL REFERENCES federation (name),
    round INTEGER NOT NULL,
    accuracy REAL, loss REAL, samples INTEGER,
    training_loss REAL,
    seconds REAL,
    participants TEXT NOT NULL, -- JSON list of ids
    late TEXT NOT NULL,         -- the same
    global_accuracy REAL, global_loss REAL, global_samples INTEGER,
    own_accuracy REAL, own_loss REAL, own_samples INTEGER,
    PRIMARY KEY (federation, round)
) STRICT, WITHOUT ROWID;
CREATE TABLE checkpoint ( -- the federation's adapters after each round
    federation TEXT NOT NULL REFERENCES federation (name),
    round INTEGER NOT NULL,
    adapter BLOB NOT NULL,
    PRIMARY KEY (federation, round)
) STRICT;
CREATE TABLE strategy_state ( -- what the strategy needs besides the adapters, after the last round
    federation TEXT NOT NULL REFERENCES federation (name),
    name TEXT NOT NULL,
    tensors BLOB NOT NULL,
    PRIMARY KEY (federation, name)
) STRICT;
";

/// Bytes as last kept. Participant 0: connections that only ask. Round 0: before the first, each connection's handshake, questions;
/// 4294967295: after the last.
const TRAFFIC: &str = "
CREATE TABLE traffic (
    federation TEXT NOT NULL REFERENCES federation (name),
    participant INTEGER NOT NULL,
    round INTEGER NOT NULL,
    direction TEXT NOT NULL, -- up: to the server; down
    kind TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (federation, participant, round, direction, kind)
) STRICT, WITHOUT ROWID;
";

/// From version 1, which kept few sums of each participant: they say nothing of these kinds, and are let go.
const FROM_1: &str = "
UPDATE participant SET metrics = CASE WHEN json_valid(metrics) THEN json_extract(metrics, '$[1]') END;
";

/// Open (and make) a database.
///
/// # Errors
/// A file that is damaged, another program's, of a newer version, or cannot be written: with cause and remedy.
pub(super) fn open(file: &Path) -> anyhow::Result<Connection> {
    connect(file).map_err(|e| explain(file, e))
}

fn connect(file: &Path) -> anyhow::Result<Connection> {
    // Its other files get the same rights. Where it cannot be made, SQLite says so in a moment.
    drop(super::private().create_new(true).open(file));
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let mut connection = Connection::open_with_flags(file, flags)?;
    connection.busy_timeout(BUSY)?;
    // Looked at before anything is written: it may be somebody else's.
    let known = layout(&connection, file)?;
    let mode: String = connection.query_row("PRAGMA journal_mode = WAL", [], |row| row.get(0))?;
    ensure!(
        mode == "wal",
        "the file system of {} has no shared memory for SQLite's write-ahead log; choose a --data-dir on a disk of this machine",
        file.display()
    );
    connection.execute_batch("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")?;
    if known != Layout::Present {
        transaction(&mut connection, "create the tables", |c| {
            // Another server may have been faster.
            match layout(c, file)? {
                Layout::Present => return Ok(()),
                Layout::Empty => c.execute_batch(TABLES)?,
                Layout::First => c.execute_batch(FROM_1)?,
            }
            c.execute_batch(TRAFFIC)?;
            Ok(c.execute_batch(&format!("PRAGMA application_id = {APPLICATION}; PRAGMA user_version = {VERSION};"))?)
        })?;
    }
    Ok(connection)
}

/// What a file holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// Nothing.
    Empty,
    /// The tables of version 1.
    First,
    /// Those of this version.
    Present,
}

/// The tables of a file.
fn layout(connection: &Connection, file: &Path) -> anyhow::Result<Layout> {
    let number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0));
    let (application, version) = (number("PRAGMA application_id")?, number("PRAGMA user_version")?);
    let file = file.display();
    match (application, version) {
        (APPLICATION, VERSION) => Ok(Layout::Present),
        (APPLICATION, 1) => Ok(Layout::First),
        (APPLICATION, newer) if newer > VERSION => bail!(
            "{file} was written by a newer fednano (its layout is {newer}, this program knows {VERSION}); update this program, or choose another --data-dir"
        ),
        (APPLICATION, older) => bail!(
            "{file} was written by an older fednano (its layout is {older}, this program knows {VERSION}); go on with that version, or choose another --data-dir"
        ),
        (0, 0) if number("SELECT count(*) FROM sqlite_schema")? == 0 => Ok(Layout::Empty),
        _ => bail!("{file} is a SQLite database of another program; choose another --data-dir, or move it away"),
    }
}

/// One transaction that writes, with its two points of [`crash`]. What fails leaves nothing behind.
pub(super) fn transaction(
    connection: &mut Connection,
    what: &str,
    change: impl FnOnce(&Connection) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    crash::point(what, "before its transaction");
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    change(&transaction)?;
    crash::point(what, "before its commit");
    Ok(transaction.commit()?)
}

/// One transaction that reads: all of it as of one moment.
pub(super) fn snapshot<T>(
    connection: &mut Connection,
    read: impl FnOnce(&Connection) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let transaction = connection.transaction()?;
    read(&transaction)
}

/// SQLite's errors as cause and remedy; others as they are.
pub(super) fn explain(file: &Path, error: anyhow::Error) -> anyhow::Error {
    let code = error.chain().find_map(|e| e.downcast_ref::<rusqlite::Error>()).map(rusqlite::Error::sqlite_error_code);
    let file = file.display();
    let words = match code {
        None => return error,
        Some(Some(ErrorCode::NotADatabase)) => format!(
            "{file} is no SQLite database, or its beginning is damaged; put a copy of it back, or move it away to begin anew"
        ),
        // No code: a row is not what this program writes.
        Some(Some(ErrorCode::DatabaseCorrupt) | None) => format!(
            "{file} is damaged; put a copy of it back, or move it away together with its -wal and -shm files to begin anew (`sqlite3 {file} .recover` saves what can be read)"
        ),
        Some(Some(ErrorCode::DiskFull)) => {
            format!("the disk of {file} is full; make room and start again, what was acknowledged is kept")
        }
        Some(Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied | ErrorCode::CannotOpen)) => format!(
            "{file} cannot be opened for writing; make the file and its folder writable for this user, or choose another --data-dir"
        ),
        Some(Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked)) => format!(
            "{file} has been in use by another program for {} s; stop the other fednano or sqlite3 that works on it",
            BUSY.as_secs()
        ),
        Some(Some(ErrorCode::ConstraintViolation)) => format!(
            "{file} was changed by somebody else; if two servers serve one federation, stop one, and start the other again"
        ),
        Some(Some(ErrorCode::SystemIoFailure)) => {
            format!("the disk of {file} does not work; look into the system's log, then start again")
        }
        Some(Some(_)) => format!("{file} cannot be used; start again, and if it stays, move it away to begin anew"),
    };
    error.context(words)
}
