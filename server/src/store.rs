//! What a federation keeps on disk: `DATA/FEDERATION/state.json` and one adapter file for each merged round.
//! Each file is written beside its place and renamed into it, so that a kill leaves the old one or the new one, never half.

use anyhow::Context;
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::FederationSettings;
use fednano_shared::wire::{ClientKind, RoundResult};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Everything but the adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedState {
    /// What was agreed; a restart with other settings is refused.
    pub settings: FederationSettings,
    /// Hash of the client part of the model.
    pub model: String,
    /// Results of the merged rounds.
    pub history: Vec<RoundResult>,
    /// Who may come back.
    pub participants: Vec<SavedParticipant>,
}

/// A known participant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedParticipant {
    /// Number.
    pub id: u32,
    /// Its secret.
    pub token: String,
    /// Name.
    pub name: String,
    /// Kind of program.
    pub kind: ClientKind,
    /// Device in words.
    pub device: String,
    /// Training samples.
    pub samples: u32,
}

/// A federation's folder.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// Open (and make) the folder of a federation.
    ///
    /// # Errors
    /// A folder that cannot be made.
    pub fn open(data_dir: &Path, federation: &str) -> anyhow::Result<Self> {
        let folder = data_dir.join(federation);
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}; choose another --data-dir", folder.display()))?;
        Ok(Self { folder })
    }

    /// What an earlier run left, with the adapters of its last merged round.
    ///
    /// # Errors
    /// Damaged files, named.
    pub fn load(&self) -> anyhow::Result<Option<(SavedState, AdapterState)>> {
        let path = self.folder.join("state.json");
        if !path.exists() {
            return Ok(None);
        }
        let damaged = || format!("{} is damaged; move {} away to begin anew", path.display(), self.folder.display());
        let state: SavedState =
            serde_json::from_slice(&std::fs::read(&path).with_context(damaged)?).with_context(damaged)?;
        let round = state.history.last().map_or(0, |r| r.round);
        let file = self.adapter_file(round);
        let bytes = std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let adapter = read_adapter(&bytes).with_context(|| format!("{} is damaged", file.display()))?;
        Ok(Some((state, adapter)))
    }

    /// Keep a round: adapters first, then the state that refers to them.
    ///
    /// # Errors
    /// A full or read-only disk.
    pub fn save(&self, state: &SavedState, adapter: &AdapterState) -> anyhow::Result<()> {
        let round = state.history.last().map_or(0, |r| r.round);
        self.write(&self.adapter_file(round), &write_adapter(adapter, Some(round))?)?;
        self.write(&self.folder.join("state.json"), &serde_json::to_vec_pretty(state)?)
    }

    fn adapter_file(&self, round: u32) -> PathBuf {
        self.folder.join(format!("adapter-round-{round:04}.safetensors"))
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
        let part = path.with_extension("part");
        std::fs::write(&part, bytes)
            .and_then(|()| std::fs::rename(&part, path))
            .with_context(|| format!("cannot write {}; is the disk full?", path.display()))
    }
}

/// A folder for one run, removed with its owner.
#[derive(Debug)]
pub struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    /// Make an empty one. Process numbers come round again: what an earlier process left under this name is removed, so that
    /// nobody goes on with somebody else's federation.
    ///
    /// # Errors
    /// A folder that cannot be removed or made.
    pub fn create(purpose: &str) -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self::fresh(std::env::temp_dir().join(format!("fednano-{purpose}-{}-{number}", std::process::id())))
    }

    fn fresh(path: PathBuf) -> anyhow::Result<Self> {
        let made = match std::fs::remove_dir_all(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => std::fs::create_dir(&path),
        };
        made.with_context(|| {
            format!("cannot make {} anew; remove it, or set TMPDIR to another folder", path.display())
        })?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// Adapters as a safetensors file in f32, with the round that they come from if it is known.
///
/// # Errors
/// The library's words.
pub fn write_adapter(adapter: &AdapterState, round: Option<u32>) -> anyhow::Result<Vec<u8>> {
    use fednano_shared::model::checkpoint::{Storage, write};
    let tensors: Vec<_> = adapter.0.iter().map(|(n, b)| (n.clone(), b.clone())).collect();
    let metadata: Vec<_> = round.map(|r| ("round".to_owned(), r.to_string())).into_iter().collect();
    write(&tensors, Storage::F32, &metadata).map_err(anyhow::Error::msg)
}

/// Adapters from a safetensors file.
///
/// # Errors
/// Damaged bytes or missing tensors.
pub fn read_adapter(bytes: &[u8]) -> anyhow::Result<AdapterState> {
    use fednano_shared::model::checkpoint::Weights;
    let weights = Weights::from_files(vec![("adapter".into(), bytes.to_vec())])?;
    let tensors =
        AdapterState::NAMES.iter().map(|n| Ok(((*n).to_owned(), weights.read(n).map_err(anyhow::Error::msg)?)));
    Ok(AdapterState(tensors.collect::<anyhow::Result<_>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_folder_begins_empty_and_ends() {
        let outer = TemporaryFolder::create("test").unwrap();
        let path = outer.path().join("inner");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("state.json"), "somebody else's").unwrap();
        let inner = TemporaryFolder::fresh(path.clone()).unwrap();
        assert_eq!(std::fs::read_dir(inner.path()).unwrap().count(), 0);
        drop(inner);
        assert!(!path.exists() && outer.path().exists());
    }
}
