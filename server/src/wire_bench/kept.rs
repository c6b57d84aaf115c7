//! Finished runs on disk: one JSON object a line, appended when a run is done and found again by a hash of everything that decides its
//! result, so that a benchmark that was stopped goes on where it was. Half a line, which a kill may leave, is removed.

use anyhow::Context;
use fednano_shared::bundle::sha256_hex;
use fednano_shared::wire;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

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

/// All finished runs of a file.
#[derive(Debug)]
pub(super) struct Kept {
    path: PathBuf,
    file: File,
    all: BTreeMap<String, serde_json::Value>,
}

impl Kept {
    /// Open (and make) a file.
    ///
    /// # Errors
    /// One that cannot be read or written, or has a line that is no run.
    pub(super) fn open(path: &Path) -> anyhow::Result<Self> {
        let unusable = || format!("cannot use {}", path.display());
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path).with_context(unusable)?;
        let text = std::fs::read(path).with_context(unusable)?;
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        if whole < text.len() {
            file.set_len(whole as u64).with_context(unusable)?;
        }
        let mut all = BTreeMap::new();
        let lines = text.get(..whole).unwrap_or_default().split(|byte| *byte == b'\n');
        for (number, line) in (1..).zip(lines).filter(|(_, line)| !line.is_empty()) {
            let line: Line = serde_json::from_slice(line).with_context(|| {
                format!("line {number} of {} is no run; remove it, and the run is made again", path.display())
            })?;
            all.insert(line.key, line.value);
        }
        Ok(Self { path: path.to_owned(), file, all })
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
        let mut line = serde_json::to_vec(&Line { key: key.to_owned(), name: name.to_owned(), value: value.clone() })?;
        line.push(b'\n');
        // In one piece, so that nothing can come between.
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        written.with_context(|| format!("cannot write {}; is the disk full?", self.path.display()))?;
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
        std::fs::write(&path, "nonsense\n").unwrap();
        assert!(Kept::open(&path).unwrap_err().to_string().contains("line 1"));
    }
}
