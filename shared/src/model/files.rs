//! A model directory (or the part of one that a client is sent) as bytes, parsed and checked together.

use super::checkpoint::{CheckpointError, Weights};
use crate::config::ModelConfig;
use crate::data::picture::Preprocess;
use crate::data::text::{TextCodec, TextError};
use std::collections::BTreeMap;
#[cfg(not(target_arch = "wasm32"))]
use std::path::Path;

/// What the small files of a model directory say.
#[derive(Clone)]
pub struct SmallFiles {
    /// Sizes and switches.
    pub config: ModelConfig,
    /// Tokenizer and prompt.
    pub text: TextCodec,
    /// Pictures to pixels.
    pub preprocess: Preprocess,
}

/// Everything that a Hugging Face model directory says.
pub struct ModelFiles {
    /// Sizes and switches.
    pub config: ModelConfig,
    /// Tokenizer and prompt.
    pub text: TextCodec,
    /// Pictures to pixels.
    pub preprocess: Preprocess,
    /// Weights, still in the file's form.
    pub weights: Weights,
}

/// Small files of a model directory that a client needs beside the weights; the last two may be absent.
pub const SMALL_FILES: [&str; 5] =
    ["config.json", "tokenizer.json", "preprocessor_config.json", "generation_config.json", "processor_config.json"];

impl SmallFiles {
    /// Parse files by name: those of [`SMALL_FILES`]; others are not looked at.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file.
    pub fn from_bytes(files: &BTreeMap<String, Vec<u8>>) -> Result<Self, CheckpointError> {
        let need = |name: &str| files.get(name).ok_or_else(|| unusable(name, "it is missing".into()));
        let config = ModelConfig::from_json(&String::from_utf8_lossy(need("config.json")?))?;
        let preprocess = Preprocess::from_json(&String::from_utf8_lossy(need("preprocessor_config.json")?))
            .map_err(|e| unusable("preprocessor_config.json", e.to_string()))?;
        if preprocess.crop != config.vision.image_size {
            return Err(unusable(
                "preprocessor_config.json",
                format!("it crops to {} pixels, the vision tower takes {}", preprocess.crop, config.vision.image_size),
            ));
        }
        let optional = |name: &str| files.get(name).map(Vec::as_slice);
        let text = TextCodec::new(
            &config,
            need("tokenizer.json")?,
            optional("generation_config.json"),
            optional("processor_config.json"),
        )
        .map_err(|e| match e {
            TextError::File { file, cause } => unusable(file, cause),
            other => unusable("tokenizer.json", other.to_string()),
        })?;
        Ok(Self { config, text, preprocess })
    }
}

fn unusable(file: &str, cause: String) -> CheckpointError {
    CheckpointError::File { file: file.into(), cause }
}

impl ModelFiles {
    /// Parse files by name: those of [`SMALL_FILES`] and any number of `*.safetensors`.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file.
    pub fn from_bytes(mut files: BTreeMap<String, Vec<u8>>) -> Result<Self, CheckpointError> {
        let mut weights: Vec<(String, Vec<u8>)> = Vec::new();
        let names: Vec<String> = files.keys().filter(|n| n.ends_with(".safetensors")).cloned().collect();
        for name in names {
            if let Some(bytes) = files.remove(&name) {
                weights.push((name, bytes));
            }
        }
        let SmallFiles { config, text, preprocess } = SmallFiles::from_bytes(&files)?;
        if weights.is_empty() {
            return Err(unusable("model.safetensors", "it is missing".into()));
        }
        Ok(Self { config, text, preprocess, weights: Weights::from_files(weights)? })
    }

    /// Read a model directory. Only `model.safetensors`, or the parts that `model.safetensors.index.json` lists, are weights.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let mut files = small_files(dir)?;
        for name in weight_files(dir)? {
            let bytes = read(dir, &name)?;
            files.insert(name, bytes);
        }
        Self::from_bytes(files)
    }
}

#[cfg(not(target_arch = "wasm32"))]
fn read(dir: &Path, name: &str) -> Result<Vec<u8>, CheckpointError> {
    std::fs::read(dir.join(name)).map_err(|e| unusable(&dir.join(name).display().to_string(), e.to_string()))
}

/// The files of [`SMALL_FILES`] in a model directory, by name.
///
/// # Errors
/// [`CheckpointError`] names one that must be there and is not.
#[cfg(not(target_arch = "wasm32"))]
pub fn small_files(dir: &Path) -> Result<BTreeMap<String, Vec<u8>>, CheckpointError> {
    let mut files = BTreeMap::new();
    for (i, name) in SMALL_FILES.iter().enumerate() {
        match read(dir, name) {
            Ok(bytes) => drop(files.insert((*name).to_owned(), bytes)),
            Err(e) if i < 3 => return Err(e),
            Err(_) => {}
        }
    }
    Ok(files)
}

/// Names of a model directory's weight files.
///
/// # Errors
/// [`CheckpointError`] names an index that cannot be used.
#[cfg(not(target_arch = "wasm32"))]
pub fn weight_files(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    let index = "model.safetensors.index.json";
    if !dir.join(index).exists() {
        return Ok(vec!["model.safetensors".to_owned()]);
    }
    let damaged = |cause: String| CheckpointError::Damaged { file: index.into(), cause };
    let json: serde_json::Value = serde_json::from_slice(&read(dir, index)?).map_err(|e| damaged(e.to_string()))?;
    let map = json["weight_map"].as_object().ok_or_else(|| damaged("it has no weight_map".into()))?;
    let mut parts: Vec<String> = map.values().filter_map(|v| v.as_str().map(str::to_owned)).collect();
    parts.sort();
    parts.dedup();
    // A name in an index is no path.
    if let Some(part) = parts.iter().find(|part| part.contains(['/', '\\'])) {
        return Err(damaged(format!("it names '{part}' outside the directory")));
    }
    Ok(parts)
}
