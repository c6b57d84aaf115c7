//! Finished runs on disk: one JSON object a line, found again by a hash of everything that decides its result, so that a benchmark that
//! was stopped goes on where it was.

use crate::experiment::records::Lines;
use anyhow::Context;
use fednano_shared::bundle::sha256_hex;
use fednano_shared::wire;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

/// One more whenever the same settings give other results than before.
const FORMAT: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    key: String,
    name: String, // for people
    value: serde_json::Value,
}

/// Everything that decides a run's result, as a key. The protocol's version is part of it: another one has other bytes.
///
/// # Errors
/// What has no JSON form.
pub(super) fn key(part: &str, decides: &impl Serialize) -> anyhow::Result<String> {
    let mut key = sha256_hex(&serde_json::to_vec(&(FORMAT, wire::VERSION, part, decides))?);
    key.truncate(24);
    Ok(key)
}

/// Remove a file of finished runs, if there is one.
///
/// # Errors
/// One that cannot be removed.
pub(super) fn remove(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// All finished runs of a file.
#[derive(Debug)]
pub(super) struct Kept {
    lines: Lines,
    all: BTreeMap<String, serde_json::Value>,
}

impl Kept {
    /// Open (and make) a file.
    ///
    /// # Errors
    /// One that cannot be read or written, or has a line that is no run.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let (lines, all) = Lines::open::<Line>(path)?;
        Ok(Self { lines, all: all.into_iter().map(|line| (line.key, line.value)).collect() })
    }

    /// A run by its key; none too where it has another form than today's.
    pub(super) fn get<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        T::deserialize(self.all.get(key)?).ok()
    }

    /// Keep a run, in the place of an older one of this key.
    ///
    /// # Errors
    /// A full or read-only disk.
    pub(super) fn add(&mut self, key: &str, name: &str, value: &impl Serialize) -> anyhow::Result<()> {
        let value = serde_json::to_value(value)?;
        self.lines.add(&Line { key: key.to_owned(), name: name.to_owned(), value: value.clone() })?;
        self.all.insert(key.to_owned(), value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::TemporaryFolder;

    #[test]
    fn runs_are_found_again_and_half_a_line_is_not_one() {
        let folder = TemporaryFolder::create("kept").unwrap();
        let path = folder.path().join("deeper/wire.jsonl");
        let (one, two) = (key("part", &(1, "a")).unwrap(), key("part", &(2, "a")).unwrap());
        assert!(one != two && one != key("other", &(1, "a")).unwrap() && one.len() == 24);
        let mut kept = Kept::open(&path).unwrap();
        kept.add(&one, "first", &(1u32, "one")).unwrap();
        drop(kept);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b"{\"key\": \"d"].concat()).unwrap();
        let mut kept = Kept::open(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        assert_eq!(kept.get::<(u32, String)>(&one), Some((1, "one".to_owned())));
        assert_eq!((kept.get::<u32>(&one), kept.get::<(u32, String)>(&two)), (None, None));
        kept.add(&one, "again", &(3u32, "three")).unwrap();
        assert_eq!(Kept::open(&path).unwrap().get::<(u32, String)>(&one), Some((3, "three".to_owned())));
        // Removed, also where there is none.
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(Kept::open(&path).unwrap().get::<(u32, String)>(&one), None);
        assert!(remove(folder.path()).unwrap_err().to_string().contains("cannot remove"));
    }
}
