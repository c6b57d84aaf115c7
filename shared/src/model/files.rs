//! A model directory (or the part of one that a client is sent), parsed and checked together.

#[cfg(not(target_arch = "wasm32"))]
use super::checkpoint::check_tensors;
use super::checkpoint::{CheckpointError, Weights};
use crate::config::ModelConfig;
use crate::data::picture::Preprocess;
use crate::data::text::{TextCodec, TextError};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
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

/// Small files of a model directory that a client needs beside the weights; all but the first two may be absent.
pub const SMALL_FILES: [&str; 5] =
    ["config.json", "tokenizer.json", PICTURES, "generation_config.json", "processor_config.json"];
/// How pictures become pixels.
const PICTURES: &str = "preprocessor_config.json";
/// Weights in one file.
pub const WEIGHTS: &str = "model.safetensors";
/// The list of weights in several files.
pub const INDEX: &str = "model.safetensors.index.json";

impl SmallFiles {
    /// Parse files by name: those of [`SMALL_FILES`]; others are not looked at.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file.
    pub fn from_bytes(files: &BTreeMap<String, Vec<u8>>) -> Result<Self, CheckpointError> {
        let need = |name: &str| files.get(name).ok_or_else(|| unusable(name, "it is missing".into()));
        let config = ModelConfig::from_json(&String::from_utf8_lossy(need("config.json")?))?;
        let preprocess = pictures(files)?;
        if preprocess.crop != config.vision.image_size {
            return Err(unusable(
                PICTURES,
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

/// transformers 5 has no file of its own for this, but a part of processor_config.json.
fn pictures(files: &BTreeMap<String, Vec<u8>>) -> Result<Preprocess, CheckpointError> {
    let own = files.get(PICTURES).map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    let nested = || {
        let json: serde_json::Value = serde_json::from_slice(files.get("processor_config.json")?).ok()?;
        json.get("image_processor").map(serde_json::Value::to_string)
    };
    let lacking = || unusable(PICTURES, "it is missing, and processor_config.json has no image_processor".into());
    Preprocess::from_json(&own.or_else(nested).ok_or_else(lacking)?).map_err(|e| unusable(PICTURES, e.to_string()))
}

/// How a model directory has pictures turned into pixels.
///
/// # Errors
/// [`CheckpointError`] names the file.
#[cfg(not(target_arch = "wasm32"))]
pub fn preprocess(dir: &Path) -> Result<Preprocess, CheckpointError> {
    pictures(&small_files(dir)?)
}

/// A file that is missing, or whose content cannot be used.
pub(super) fn unusable(file: &str, cause: String) -> CheckpointError {
    CheckpointError::File { file: file.into(), cause }
}

#[cfg(not(target_arch = "wasm32"))]
impl ModelFiles {
    /// Read a model directory and compare its tensors with its configuration, by their headers: weights are read when they are loaded.
    /// Weights are `model.safetensors`, or the files that `model.safetensors.index.json` names; no other file is.
    ///
    /// # Errors
    /// [`CheckpointError`] names the file, or lists everything that is wrong with the tensors.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let SmallFiles { config, text, preprocess } = SmallFiles::from_bytes(&small_files(dir)?)?;
        let weights = Weights::open(dir)?;
        check_tensors(&config, &weights)?;
        Ok(Self { config, text, preprocess, weights })
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
            Err(e) if i < 2 => return Err(e),
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
    Ok(WeightIndex::open(dir)?.map_or_else(|| vec![WEIGHTS.to_owned()], |index| index.files()))
}

/// Which weight file holds which tensor, both by the names in use there.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct WeightIndex {
    #[serde(rename = "weight_map")]
    tensors: BTreeMap<String, String>,
}

impl WeightIndex {
    /// Parse the content of [`INDEX`].
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] when it has no weight map, an empty one, or one that names something else than files beside it.
    pub fn parse(json: &[u8]) -> Result<Self, CheckpointError> {
        let damaged = |cause: String| CheckpointError::Damaged { file: INDEX.into(), cause };
        let index: Self = serde_json::from_slice(json).map_err(|e| damaged(e.to_string()))?;
        if index.tensors.is_empty() {
            return Err(damaged("its weight_map is empty".into()));
        }
        match index.tensors.values().find(|name| !is_plain(name)) {
            Some(name) => Err(damaged(format!("it names '{name}', which is no plain file name"))),
            None => Ok(index),
        }
    }

    /// The index of a model directory; none where all weights are in [`WEIGHTS`].
    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn open(dir: &Path) -> Result<Option<Self>, CheckpointError> {
        if dir.join(INDEX).exists() { Self::parse(&read(dir, INDEX)?).map(Some) } else { Ok(None) }
    }

    /// The weight files, each once, in order of their names.
    pub fn files(&self) -> Vec<String> {
        let files: BTreeSet<&String> = self.tensors.values().collect();
        files.into_iter().cloned().collect()
    }

    /// File by tensor.
    pub fn tensors(&self) -> &BTreeMap<String, String> {
        &self.tensors
    }
}

/// A name that is no path and needs no escaping in an address.
pub fn is_plain(name: &str) -> bool {
    let known = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    !name.is_empty() && !name.starts_with('.') && name.bytes().all(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processors_file_has_what_the_pictures_file_would() {
        let file = |(name, content): &(&str, &str)| ((*name).to_owned(), content.as_bytes().to_vec());
        let files = |all: &[(&str, &str)]| all.iter().map(file).collect::<BTreeMap<_, _>>();
        let own = (PICTURES, r#"{"size": 8, "crop_size": 6}"#);
        let nested = ("processor_config.json", r#"{"image_processor": {"size": 7, "crop_size": 5}}"#);
        assert_eq!(pictures(&files(&[nested])).unwrap().crop, 5);
        assert_eq!(pictures(&files(&[own, nested])).unwrap().crop, 6);
        let fault = |all: &[(&str, &str)]| pictures(&files(all)).unwrap_err().to_string();
        let other = ("processor_config.json", r#"{"patch_size": 14}"#);
        for all in [vec![], vec![other], vec![(PICTURES, "{"), nested]] {
            assert!(fault(&all).contains(PICTURES), "{all:?}");
        }
    }

    #[test]
    fn an_index_names_plain_files() {
        let fault = |json: &str| WeightIndex::parse(json.as_bytes()).unwrap_err().to_string();
        for name in ["../up.safetensors", "a/b.safetensors", "a\\\\b.safetensors", "", ".hidden"] {
            let json = format!(r#"{{"weight_map": {{"a": "b.safetensors", "c": "{name}"}}}}"#);
            assert!(fault(&json).contains("plain file name"), "{name}");
        }
        assert!(fault(r#"{"weight_map": {}}"#).contains("empty"));
        assert!(fault(r#"{"metadata": {}}"#).contains("weight_map"));
        assert!(fault("{").contains(INDEX));
        let json =
            br#"{"metadata": {"total_size": 4}, "weight_map": {"a": "2.safetensors", "b": "1.st", "c": "1.st"}}"#;
        assert_eq!(WeightIndex::parse(json).unwrap().files(), ["1.st", "2.safetensors"]);
    }
}
