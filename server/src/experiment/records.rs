//! Finished runs on disk: one JSON object a line, appended when a run is done, found again by a hash of everything that decides its
//! result. The file's form is the wire benchmark's too.

use super::figures::Figures;
use super::grid::Plan;
use super::merges::Rule;
use anyhow::{Context, ensure};
use fednano_shared::bundle::sha256_hex;
use fednano_shared::settings::FederationSettings;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// One more whenever the same settings give other results than before.
const FORMAT: u32 = 1;

/// A finished run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Of the plan, the seed, the model and the samples.
    pub key: String,
    /// The same without the seed.
    pub cell: String,
    /// Where it was first wanted, for people.
    pub name: String,
    /// Its seed.
    pub seed: u64,
    /// What it gave.
    pub figures: Figures,
    /// How long it took; not the same each time.
    pub seconds: f64,
    /// On which device.
    pub device: String,
}

/// Tells a plan with a seed from all others; `samples` is the hash of model and samples.
///
/// # Errors
/// Settings that cannot be written as JSON.
pub fn key(plan: &Plan, seed: Option<u64>, samples: &str) -> anyhow::Result<String> {
    let mut simulation = plan.simulation.clone();
    // Where they lie does not matter, what they are is in `samples`.
    simulation.model.clear();
    simulation.data = PathBuf::new();
    simulation.seeds.clear();
    let settings = text(&FederationSettings { seed: seed.unwrap_or(0), ..plan.settings.clone() })?;
    let rule = |r: &Rule| anyhow::Ok(format!("[{},{}]", serde_json::to_string(&r.name)?, text(&r.settings)?));
    let rules = plan.rules.iter().map(rule).collect::<anyhow::Result<Vec<_>>>()?.join(",");
    let (simulation, samples) = (serde_json::to_string(&simulation)?, serde_json::to_string(samples)?);
    let mut key =
        sha256_hex(format!("[{FORMAT},{simulation},{settings},{},[{rules}],{samples}]", seed.is_some()).as_bytes());
    key.truncate(24);
    Ok(key)
}

/// Settings that came after the first records, with the values that those had: `(key, value)` in JSON.
const LATER: [(&str, &str); 8] = [
    ("boundary", "\"activations\""),
    ("feature_format", "\"f32\""),
    ("code_format", "\"f32\""),
    ("gradient_format", "\"f32\""),
    ("matrix_format", "\"f32\""),
    ("rounding", "\"nearest\""),
    ("compress", "false"),
    ("overlap", "\"off\""),
];

/// Settings as JSON, without the later ones where they are as they always were: so the first records are found still.
fn text(settings: &FederationSettings) -> anyhow::Result<String> {
    let mut text = serde_json::to_string(settings)?; // one flat object, its keys in the order of the struct
    for (key, value) in LATER {
        // None of them is the first key, so there is a comma before it.
        text = text.replacen(&format!(",\"{key}\":{value}"), "", 1);
    }
    Ok(text)
}

/// A file of JSON objects, one a line. Half a line, which a kill may leave, is removed.
#[derive(Debug)]
pub struct Lines {
    path: PathBuf,
    file: File,
}

impl Lines {
    /// Open (and make) a file; all that is in it.
    ///
    /// # Errors
    /// One that cannot be read or written, or has a line that is no run.
    pub fn open<T: DeserializeOwned>(path: &Path) -> anyhow::Result<(Self, Vec<T>)> {
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
        let mut all = Vec::new();
        let lines = text.get(..whole).unwrap_or_default().split(|byte| *byte == b'\n');
        for (number, line) in (1..).zip(lines).filter(|(_, line)| !line.is_empty()) {
            all.push(serde_json::from_slice(line).with_context(|| {
                format!("line {number} of {} is no run; remove it, and the run is made again", path.display())
            })?);
        }
        Ok((Self { path: path.to_owned(), file }, all))
    }

    /// One more.
    ///
    /// # Errors
    /// A full or read-only disk.
    pub fn add(&mut self, line: &impl Serialize) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(line)?;
        line.push(b'\n');
        // In one piece, so that nothing can come between.
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        written.with_context(|| format!("cannot write {}; is the disk full?", self.path.display()))
    }
}

/// All finished runs of a file.
#[derive(Debug)]
pub struct Records {
    lines: Lines,
    all: BTreeMap<String, Record>,
}

impl Records {
    /// Open (and make) a file.
    ///
    /// # Errors
    /// As [`Lines::open`].
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let (lines, all) = Lines::open::<Record>(path)?;
        Ok(Self { lines, all: all.into_iter().map(|record| (record.key.clone(), record)).collect() })
    }

    /// A run by its key.
    pub fn get(&self, key: &str) -> Option<&Record> {
        self.all.get(key)
    }

    /// Keep a run.
    ///
    /// # Errors
    /// A full or read-only disk.
    pub fn add(&mut self, record: Record) -> anyhow::Result<()> {
        ensure!(!self.all.contains_key(&record.key), "the run {} was made twice", record.name);
        self.lines.add(&record)?;
        // Whoever finds it later must see the very same numbers.
        let record: Record = serde_json::from_slice(&serde_json::to_vec(&record)?)?;
        self.all.insert(record.key.clone(), record);
        Ok(())
    }

    /// All runs of a cell, by seed.
    pub fn of_cell(&self, cell: &str) -> Vec<&Record> {
        let mut found: Vec<&Record> = self.all.values().filter(|record| record.cell == cell).collect();
        found.sort_by_key(|record| record.seed);
        found
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::figures::{Bytes, Tested};
    use super::super::grid::{Size, cells};
    use super::*;
    use crate::store::TemporaryFolder;
    use fednano_shared::settings::{BoundaryChoice, Format, Overlap};

    /// A run of which nothing is known.
    pub(crate) fn record(key: &str, cell: &str, seed: u64) -> Record {
        let tested = Tested::of(BTreeMap::new());
        let figures = Figures {
            baselines: (0.0, 0.0),
            zero_shot: tested.clone(),
            rounds: Vec::new(),
            global: tested,
            own: None,
            clients: Vec::new(),
            bytes: Bytes::default(),
            merges: Vec::new(),
        };
        let (key, cell) = (key.to_owned(), cell.to_owned());
        Record { key, cell, name: "some".into(), seed, figures, seconds: 0.5, device: "CPU".into() }
    }

    #[test]
    fn runs_are_found_again_and_half_a_line_is_not_one() {
        let folder = TemporaryFolder::create("records").unwrap();
        let path = folder.path().join("deeper/runs.jsonl");
        let mut records = Records::open(&path).unwrap();
        records.add(record("b", "x", 2)).unwrap();
        records.add(record("a", "x", 1)).unwrap();
        records.add(record("c", "y", 1)).unwrap();
        assert!(records.add(record("c", "y", 1)).is_err());
        drop(records);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b"{\"key\": \"d"].concat()).unwrap();
        let mut records = Records::open(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), whole);
        assert_eq!(records.of_cell("x").iter().map(|r| r.seed).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(records.get("c"), Some(&record("c", "y", 1)));
        assert!(records.get("d").is_none());
        records.add(record("d", "y", 2)).unwrap();
        assert_eq!(Records::open(&path).unwrap().of_cell("y").len(), 2);
        std::fs::write(&path, "nonsense\n").unwrap();
        assert!(Records::open(&path).unwrap_err().to_string().contains("line 1"));
    }

    /// The settings as they were hashed before there was a choice of the boundary.
    #[test]
    fn the_plain_boundary_leaves_keys_as_they_were() {
        let plan = cells(Size::Quick).remove(0).plan;
        let plain = text(&plan.settings).unwrap();
        let all = serde_json::to_value(&plan.settings).unwrap();
        let left: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&plain).unwrap();
        for (key, value) in LATER {
            assert_eq!(all[key].to_string(), value, "the study is not pinned to the plain {key}");
            assert!(!left.contains_key(key), "{key}");
        }
        assert_eq!(left.len() + LATER.len(), all.as_object().unwrap().len());
        assert!(plain.starts_with("{\"rank\":") && plain.ends_with("\"grace_s\":20}"), "{plain}");

        let key = |settings: FederationSettings| key(&Plan { settings, ..plan.clone() }, Some(1), "s").unwrap();
        let base = plan.settings.clone();
        let mut keys = vec![
            key(base.clone()),
            key(FederationSettings { boundary: BoundaryChoice::LowRank, ..base.clone() }),
            key(FederationSettings { code_format: Format::F16, ..base.clone() }),
            key(FederationSettings { gradient_format: Format::F16, ..base.clone() }),
            key(FederationSettings { overlap: Overlap::Parts, ..base.clone() }),
            key(FederationSettings { compress: true, ..base }),
        ];
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 6);
    }

    #[test]
    fn keys_depend_on_what_decides_a_result_alone() {
        let plan = cells(Size::Quick).remove(0).plan;
        let of = |plan: &Plan, seed, samples| key(plan, seed, samples).unwrap();
        let own = of(&plan, Some(1), "s");
        assert_eq!(own.len(), 24);
        let mut elsewhere = plan.clone();
        elsewhere.simulation.model = "elsewhere".into();
        elsewhere.simulation.data = "there".into();
        assert_eq!(of(&elsewhere, Some(1), "s"), own);
        let mut other = plan.clone();
        other.settings.learning_rate *= 2.0;
        let different =
            [of(&plan, Some(2), "s"), of(&plan, None, "s"), of(&plan, Some(1), "t"), of(&other, Some(1), "s")];
        assert!(!different.contains(&own));
        // Without a seed, the seed that the settings happen to have is nothing.
        let mut seeded = plan.clone();
        seeded.settings.seed = 77;
        assert_eq!((of(&seeded, None, "s"), of(&seeded, Some(1), "s")), (of(&plan, None, "s"), own));
    }
}
