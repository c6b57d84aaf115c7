//! The client's half of the model as files, prepared once: `CACHE/edge/KEY-DTYPE/` holds pieces and small files under their
//! SHA-256, and `manifest.json`.
//!
//! KEY is a SHA-256 over all that the files depend on and that is quick to read: the model's name, the small files, and of each
//! weight file name, length, time of modification and header (not the weights: a 7B model has 14 GB of them).

use anyhow::Context;
use burn::tensor::Device;
use fednano_shared::bundle::assemble::BundleLoader;
use fednano_shared::bundle::piece::{TARGET_BYTES, pieces};
use fednano_shared::bundle::{
    EdgeDtype, FORMAT, FileEntry, LONGEST_MODEL, Manifest, PieceEntry, hex, parameters, resident_bytes, sha256_hex,
};
use fednano_shared::edge::NanoEdge;
use fednano_shared::model::files::{ModelFiles, small_files, weight_files};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Name of the manifest's file.
const MANIFEST: &str = "manifest.json";
/// Headers of safetensors files are not longer.
const LONGEST_HEADER: u64 = 100 << 20;

/// A prepared bundle.
pub struct Bundle {
    /// What it consists of.
    pub manifest: Manifest,
    /// The same as it is sent.
    pub manifest_json: Vec<u8>,
    /// Where pieces and small files lie under their hash.
    pub folder: PathBuf,
    /// The small files by name.
    pub small: BTreeMap<String, Vec<u8>>,
    /// Identity of model and form.
    pub model_hash: String,
}

/// Prepare the bundle of a model, or take the one that an earlier run has left in `cache`. `progress(done, all)` hears of
/// bytes written; `all` is an estimate.
///
/// # Errors
/// A model that lacks tensors, a full disk.
pub fn prepare(
    model_dir: &Path,
    files: &ModelFiles,
    dtype: EdgeDtype,
    cache: &Path,
    mut progress: impl FnMut(u64, u64),
) -> anyhow::Result<Bundle> {
    let name = name_of(model_dir);
    let small = small_files(model_dir)?;
    let key = key(model_dir, &name, &small)?;
    let folder = cache.join("edge").join(format!("{key}-{dtype}"));
    if let Some(bundle) = open(&folder, &small) {
        return Ok(bundle);
    }
    // Written beside its place and renamed, so that a kill leaves no half of a bundle behind.
    let part = folder.with_extension(format!("part-{}", std::process::id()));
    let written = write(&part, name, files, &small, dtype, &mut progress).and_then(|()| {
        // What is there is damaged, or `open` would have taken it.
        drop(std::fs::remove_dir_all(&folder));
        std::fs::rename(&part, &folder).with_context(|| format!("cannot create {}", folder.display()))
    });
    if written.is_err() {
        drop(std::fs::remove_dir_all(&part));
    }
    // Another server may have been faster.
    match (open(&folder, &small), written) {
        (Some(bundle), _) => Ok(bundle),
        (None, Err(e)) => Err(e.context("the model cannot be prepared for clients")),
        (None, Ok(())) => anyhow::bail!("{} is incomplete after writing; is the disk full?", folder.display()),
    }
}

/// The folder's name; of a snapshot in the hub's cache (models--OWNER--NAME/snapshots/COMMIT) the hub's.
fn name_of(dir: &Path) -> String {
    let name = |dir: &Path| dir.file_name().map(|n| n.to_string_lossy().into_owned());
    let folder = dir.parent().filter(|p| p.file_name().is_some_and(|n| n == "snapshots")).and_then(Path::parent);
    let hub = folder.and_then(name).and_then(|n| Some(n.strip_prefix("models--")?.replace("--", "/")));
    let mut name = hub.or_else(|| name(dir)).unwrap_or_else(|| "model".to_owned());
    name.truncate(name.floor_char_boundary(LONGEST_MODEL));
    name
}

/// An earlier run's bundle, if all of it is there. Contents are checked when they are loaded.
fn open(folder: &Path, small: &BTreeMap<String, Vec<u8>>) -> Option<Bundle> {
    let manifest_json = std::fs::read(folder.join(MANIFEST)).ok()?;
    let manifest = Manifest::from_json(&manifest_json).ok()?;
    let there = |hash: &str, bytes: u64| std::fs::metadata(folder.join(hash)).is_ok_and(|m| m.len() == bytes);
    let whole = manifest.pieces.iter().all(|p| there(&p.sha256, p.bytes))
        && manifest.files.iter().all(|f| there(&f.sha256, f.bytes));
    let model_hash = manifest.identity();
    whole.then(|| Bundle { manifest, manifest_json, folder: folder.to_owned(), small: small.clone(), model_hash })
}

/// How the bundle of this identity keeps weights, if an earlier run has left it in `cache`.
pub fn dtype_of(cache: &Path, model_hash: &str) -> Option<EdgeDtype> {
    let folders = std::fs::read_dir(cache.join("edge")).ok()?;
    folders.flatten().find_map(|folder| {
        let manifest = Manifest::from_json(&std::fs::read(folder.path().join(MANIFEST)).ok()?).ok()?;
        (manifest.identity() == model_hash).then_some(manifest.edge_dtype)
    })
}

fn write(
    folder: &Path,
    model: String,
    files: &ModelFiles,
    small: &BTreeMap<String, Vec<u8>>,
    dtype: EdgeDtype,
    progress: &mut impl FnMut(u64, u64),
) -> anyhow::Result<()> {
    drop(std::fs::remove_dir_all(folder));
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot create {}; choose another --data-dir", folder.display()))?;
    let keep = |name: &str, bytes: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, bytes).with_context(|| format!("cannot write {}; is the disk full?", path.display()))
    };
    let mut manifest = Manifest {
        format: FORMAT,
        model,
        edge_dtype: dtype,
        parameters: parameters(&files.config),
        resident_bytes: 0,
        files: Vec::new(),
        pieces: Vec::new(),
    };
    for (name, bytes) in small {
        let entry = FileEntry { name: name.clone(), sha256: sha256_hex(bytes), bytes: bytes.len() as u64 };
        keep(&entry.sha256, bytes)?;
        manifest.files.push(entry);
    }
    // Scales, headers and what is never quantised come on top.
    let bits = match dtype {
        EdgeDtype::F16 => 16,
        EdgeDtype::Int8 => 8,
        EdgeDtype::Int4 => 4,
    };
    let (mut done, all) = (0, manifest.parameters * bits / 8);
    for piece in pieces(&files.config, &files.weights, dtype, TARGET_BYTES) {
        let piece = piece?;
        let entry = PieceEntry { sha256: sha256_hex(&piece), bytes: piece.len() as u64 };
        keep(&entry.sha256, &piece)?;
        done += entry.bytes;
        manifest.pieces.push(entry);
        progress(done.min(all), all);
    }
    manifest.resident_bytes = resident_bytes(&files.config, dtype, manifest.largest_piece());
    manifest.validate()?;
    keep(MANIFEST, &serde_json::to_vec(&manifest)?)
}

fn key(model_dir: &Path, model: &str, small: &BTreeMap<String, Vec<u8>>) -> anyhow::Result<String> {
    let mut hash = Sha256::new();
    // Each with its length, so that no two lists read the same.
    let mut add = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    add(format!("edge bundle {FORMAT}, pieces of {TARGET_BYTES} bytes").as_bytes());
    add(model.as_bytes());
    for (name, bytes) in small {
        add(name.as_bytes());
        add(bytes);
    }
    for name in weight_files(model_dir)? {
        let path = model_dir.join(&name);
        let (length, modified, header) = look(&path).with_context(|| format!("cannot read {}", path.display()))?;
        add(name.as_bytes());
        add(&length.to_le_bytes());
        add(&modified.to_le_bytes());
        add(&header);
    }
    // Half of it keeps paths short and is still no number that two models share.
    let mut key = hex(&hash.finalize());
    key.truncate(32);
    Ok(key)
}

/// Length, time of modification in nanoseconds and header of a weight file.
fn look(path: &Path) -> anyhow::Result<(u64, u128, Vec<u8>)> {
    let mut file = std::fs::File::open(path)?;
    let about = file.metadata()?;
    let modified = about.modified()?.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(length).min(LONGEST_HEADER)).read_to_end(&mut header)?;
    Ok((about.len(), modified, header))
}

impl Bundle {
    /// The server's own client half, from the very bytes that clients get.
    ///
    /// # Errors
    /// Files that somebody has changed.
    pub fn edge(&self, device: &Device) -> anyhow::Result<NanoEdge> {
        let damaged = || format!("{} cannot be used; remove that folder and start again", self.folder.display());
        let mut loader = BundleLoader::open(self.manifest.clone(), &self.small, device).with_context(damaged)?;
        for piece in &self.manifest.pieces {
            let bytes = std::fs::read(self.folder.join(&piece.sha256)).with_context(damaged)?;
            loader.add(&bytes).with_context(damaged)?;
        }
        loader.finish().with_context(damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_has_the_hubs_name() {
        for (dir, name) in [
            ("/hub/models--llava-hf--llava-1.5-7b-hf/snapshots/0123abc", "llava-hf/llava-1.5-7b-hf"),
            ("/models/nano-llava", "nano-llava"),
            ("/models/snapshots/nano-llava", "nano-llava"),
            ("snapshots/nano-llava", "nano-llava"),
            ("/", "model"),
        ] {
            assert_eq!(name_of(Path::new(dir)), name, "{dir}");
        }
    }
}
