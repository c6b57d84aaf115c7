//! On which machine and with which model something was measured that depends on them: times, and sizes of real tensors.

use super::kept::{Kept, key};
use super::links::EDGE;
use super::{Bench, Work};
use crate::device::{ComputeDtype, DeviceChoice};
use crate::edge_bundle;
use anyhow::Context;
use fednano_shared::bundle::hex;
use fednano_shared::model::files::{ModelFiles, weight_files};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::File;

/// Where it was measured.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct Machine {
    /// The device in words.
    pub(super) device: String,
    /// Cores that this process could use.
    pub(super) cores: usize,
}

impl Machine {
    /// This one, with a device in words.
    pub(super) fn here(device: &str) -> Self {
        Self { device: device.to_owned(), cores: std::thread::available_parallelism().map_or(1, usize::from) }
    }

    /// For a sentence.
    pub(super) fn words(&self) -> String {
        format!("{}, {} core{}", self.device, self.cores, if self.cores == 1 { "" } else { "s" })
    }
}

/// What decides beside settings; part of keys.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Setup {
    device: DeviceChoice,
    dtype: ComputeDtype,
    /// Hash of the model's files, wherever they lie.
    model: String,
}

impl Setup {
    fn new(bench: &Bench, model: &str) -> Self {
        Self { device: bench.device, dtype: bench.dtype, model: model.to_owned() }
    }

    /// Of the model as it is, which the page will show.
    ///
    /// # Errors
    /// A model that cannot be used, a disk that cannot be written.
    pub(super) fn now(work: &mut Work<'_>) -> anyhow::Result<Self> {
        let model = hash(work)?;
        let place = place(work.bench)?;
        if work.kept.get::<String>(&place).as_ref() != Some(&model) {
            work.kept.add(&place, "model of times and sizes", &model)?;
        }
        Ok(Self::new(work.bench, &model))
    }

    /// Of the model used last; none: nothing has been measured yet.
    ///
    /// # Errors
    /// A key that cannot be made.
    pub(super) fn last(bench: &Bench, kept: &Kept) -> anyhow::Result<Option<Self>> {
        Ok(kept.get::<String>(&place(bench)?).map(|model| Self::new(bench, &model)))
    }
}

/// Where the hash is kept.
fn place(bench: &Bench) -> anyhow::Result<String> {
    key("model", &bench.quick())
}

/// SHA-256 over the client's half and every weight file.
fn hash(work: &Work<'_>) -> anyhow::Result<String> {
    let model = &work.bench.model;
    let files = ModelFiles::open(model)?;
    let bundle = edge_bundle::prepare(model, &files, EDGE, work.cache, |_, _| {})?;
    let mut hash = Sha256::new();
    hash.update(bundle.model_hash.as_bytes());
    for name in weight_files(model)? {
        let path = model.join(name);
        let read = File::open(&path).and_then(|mut file| std::io::copy(&mut file, &mut hash));
        read.with_context(|| format!("cannot read {}", path.display()))?;
    }
    Ok(hex(&hash.finalize()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::report::tests::bench;
    use super::*;
    use crate::store::TemporaryFolder;

    /// Of a model with this hash.
    pub(in crate::wire_bench) fn setup(bench: &Bench, model: &str) -> Setup {
        Setup::new(bench, model)
    }

    #[test]
    fn the_model_used_last_is_known_and_device_and_type_tell_apart() {
        let folder = TemporaryFolder::create("setup").unwrap();
        let mut kept = Kept::open(&folder.path().join("wire.jsonl")).unwrap();
        let bench = bench();
        assert_eq!(Setup::last(&bench, &kept).unwrap(), None);
        kept.add(&place(&bench).unwrap(), "model", &"abc").unwrap();
        assert_eq!(Setup::last(&bench, &kept).unwrap(), Some(setup(&bench, "abc")));
        // Where it lies does not matter.
        let elsewhere = Bench { model: "elsewhere".into(), ..bench.clone() };
        assert_eq!(Setup::last(&elsewhere, &kept).unwrap(), Some(setup(&bench, "abc")));
        let all = [
            setup(&bench, "abc"),
            setup(&bench, "abd"),
            setup(&Bench { device: DeviceChoice::Wgpu, ..bench.clone() }, "abc"),
            setup(&Bench { dtype: ComputeDtype::F32, ..bench }, "abc"),
        ];
        let keys: std::collections::BTreeSet<String> = all.iter().map(|one| key("some", one).unwrap()).collect();
        assert_eq!(keys.len(), all.len());
    }

    #[test]
    fn machines_in_words() {
        let machine = |cores| Machine { device: "CPU".into(), cores }.words();
        assert_eq!([machine(1), machine(2)], ["CPU, 1 core", "CPU, 2 cores"]);
        assert!(Machine::here("CPU").cores > 0);
    }
}
