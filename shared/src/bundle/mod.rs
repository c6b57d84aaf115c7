//! The edge bundle: what a client needs of a model, as small files and pieces that are each known by their SHA-256.
//!
//! | module | what |
//! | --- | --- |
//! | `quantise` | f16, 8 and 4 bits |
//! | `piece` | from a checkpoint to pieces, and reading one |
//! | `assemble` | from pieces to the client's half of the model |
//! | `table` | the token table on the host |
//!
//! The server writes the bundle once, clients fetch, check and load it piece by piece, with one piece in memory beside the model.
//! All of it comes from another machine, so every size is checked before anything is allocated by it.

pub mod assemble;
pub mod piece;
pub mod quantise;
pub mod table;

use crate::config::ModelConfig;
use crate::model::checkpoint::CheckpointError;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

/// The only [`Manifest::format`] so far.
pub const FORMAT: u32 = 1;
/// Most files, most pieces.
const MOST_ENTRIES: usize = 1 << 16;
/// Largest small file: tokenizers of 256,000 tokens have 35 MB.
const LARGEST_FILE: u64 = 256 << 20;
/// Largest piece: a matrix of 16,384 x 16,384 in f16, and its header.
const LARGEST_PIECE: u64 = 513 << 20;
/// Largest bundle.
const LARGEST_BUNDLE: u64 = 64 << 30;
/// Longest name of a model; www/manifest.js has the same.
pub const LONGEST_MODEL: usize = 100;
/// Longest name of a file.
const LONGEST_NAME: usize = 100;

/// How a bundle stores weights. Biases, norms and the embeddings of patches and positions are f16 in all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EdgeDtype {
    /// 2 bytes.
    F16,
    /// 1 byte, and a scale for each row.
    Int8,
    /// Half a byte, and a scale for each 32 values.
    Int4,
}

/// A word that is no [`EdgeDtype`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no form of edge weights; choose f16, int8 or int4")]
pub struct UnknownDtype(String);

impl FromStr for EdgeDtype {
    type Err = UnknownDtype;

    fn from_str(word: &str) -> Result<Self, UnknownDtype> {
        match word {
            "f16" => Ok(Self::F16),
            "int8" => Ok(Self::Int8),
            "int4" => Ok(Self::Int4),
            other => Err(UnknownDtype(other.to_owned())),
        }
    }
}

impl fmt::Display for EdgeDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "f16",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
        })
    }
}

/// Why a bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Its manifest.
    #[error("the model's manifest cannot be used: {0}; ask the server's operator for a matching version of FedNano")]
    Manifest(String),
    /// Bytes other than those that the manifest names.
    #[error("{what} is damaged: {cause}; fetch it again")]
    Damaged {
        /// Which file or piece, by hash.
        what: String,
        /// What was found.
        cause: String,
    },
    /// Its content.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// `manifest.json`: all that a bundle consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Name of the model.
    pub model: String,
    /// How weights are stored.
    pub edge_dtype: EdgeDtype,
    /// Values in vision tower, connector and token table.
    pub parameters: u64,
    /// Bytes that a client needs about: its modules in f32, the token table as stored, the largest piece.
    pub resident_bytes: u64,
    /// Configuration, tokenizer and the like.
    pub files: Vec<FileEntry>,
    /// Weights, in the order of loading.
    pub pieces: Vec<PieceEntry>,
}

/// A small file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// As in a model directory.
    pub name: String,
    /// In hex.
    pub sha256: String,
    /// Length.
    pub bytes: u64,
}

/// A piece.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceEntry {
    /// In hex.
    pub sha256: String,
    /// Length.
    pub bytes: u64,
}

/// SHA-256 in hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes in hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

impl FileEntry {
    /// Check that these are the file's bytes.
    ///
    /// # Errors
    /// [`BundleError::Damaged`].
    pub fn verify(&self, bytes: &[u8]) -> Result<(), BundleError> {
        verify(&self.name, &self.sha256, self.bytes, bytes)
    }
}

impl PieceEntry {
    /// Check that these are the piece's bytes.
    ///
    /// # Errors
    /// [`BundleError::Damaged`].
    pub fn verify(&self, bytes: &[u8]) -> Result<(), BundleError> {
        verify("piece", &self.sha256, self.bytes, bytes)
    }
}

fn verify(what: &str, sha256: &str, length: u64, bytes: &[u8]) -> Result<(), BundleError> {
    let damaged = |cause: String| Err(BundleError::Damaged { what: format!("{what} {sha256}"), cause });
    if bytes.len() as u64 != length {
        return damaged(format!("it has {} bytes instead of {length}", bytes.len()));
    }
    let found = sha256_hex(bytes);
    if found == sha256 { Ok(()) } else { damaged(format!("its SHA-256 is {found}")) }
}

impl Manifest {
    /// Read and check.
    ///
    /// # Errors
    /// [`BundleError::Manifest`].
    pub fn from_json(json: &[u8]) -> Result<Self, BundleError> {
        let manifest: Self = serde_json::from_slice(json)
            .map_err(|e| BundleError::Manifest(format!("it is no manifest of format {FORMAT} ({e})")))?;
        manifest.validate()?;
        Ok(manifest)
    }

    /// Check that sizes are plausible, hashes are hashes and names are no paths.
    ///
    /// # Errors
    /// [`BundleError::Manifest`] with the first fault.
    pub fn validate(&self) -> Result<(), BundleError> {
        let fail = |cause: String| Err(BundleError::Manifest(cause));
        if self.format != FORMAT {
            return fail(format!("its format is {}, known here is {FORMAT}", self.format));
        }
        if self.model.is_empty() || self.model.len() > LONGEST_MODEL || self.model.chars().any(char::is_control) {
            return fail("the model's name is empty, overlong or not printable".into());
        }
        if self.pieces.is_empty() || self.pieces.len() > MOST_ENTRIES || self.files.len() > MOST_ENTRIES {
            return fail(format!("it lists {} files and {} pieces", self.files.len(), self.pieces.len()));
        }
        let (mut names, mut hashes, mut stored) = (BTreeSet::new(), BTreeSet::new(), 0);
        for file in &self.files {
            if !is_plain_name(&file.name) || !names.insert(&file.name) {
                return fail(format!("the file name '{}' is used twice or is no plain name", file.name.escape_debug()));
            }
            if !is_sha256(&file.sha256) || file.bytes > LARGEST_FILE {
                return fail(format!("{} has {} bytes or a wrong hash", file.name, file.bytes));
            }
        }
        for piece in &self.pieces {
            if !is_sha256(&piece.sha256) || !hashes.insert(&piece.sha256) {
                return fail("the hash of a piece is used twice or is no SHA-256 in hex".into());
            }
            if piece.bytes == 0 || piece.bytes > LARGEST_PIECE {
                return fail(format!("piece {} has {} bytes", piece.sha256, piece.bytes));
            }
            stored += piece.bytes; // at most 2^16 * 2^30
        }
        // Half a byte for each value, at least.
        if stored > LARGEST_BUNDLE || self.parameters == 0 || self.parameters.div_ceil(2) > stored {
            return fail(format!("{stored} bytes of pieces cannot hold {} parameters", self.parameters));
        }
        if self.resident_bytes > 4 * self.parameters + 2 * stored {
            return fail(format!("{} bytes of memory for {} parameters", self.resident_bytes, self.parameters));
        }
        Ok(())
    }

    /// Check that the model's configuration belongs to this bundle: then nothing larger than the bundle is allocated by it.
    ///
    /// # Errors
    /// [`BundleError::Manifest`].
    pub fn check(&self, config: &ModelConfig) -> Result<(), BundleError> {
        let described = parameters(config);
        if described == self.parameters {
            return Ok(());
        }
        Err(BundleError::Manifest(format!(
            "config.json describes {described} parameters, the manifest {}",
            self.parameters
        )))
    }

    /// Length of the largest piece.
    pub fn largest_piece(&self) -> u64 {
        self.pieces.iter().map(|p| p.bytes).max().unwrap_or(0)
    }

    /// The identity of model and form: SHA-256 over the pieces' hashes.
    pub fn identity(&self) -> String {
        let mut hash = Sha256::new();
        for piece in &self.pieces {
            hash.update(piece.sha256.as_bytes());
        }
        hex(&hash.finalize())
    }
}

/// Lower-case hex of the right length.
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Neither a path nor hidden.
fn is_plain_name(name: &str) -> bool {
    name.len() <= LONGEST_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

/// Values in vision tower (up to the feature layer) and connector, by arithmetic alone.
fn module_parameters(config: &ModelConfig) -> u64 {
    let (v, text) = (&config.vision, config.text.hidden as u64);
    let [d, inner, patch] = [v.hidden, v.intermediate, v.patch_size].map(|n| n as u64);
    let side = (v.image_size / v.patch_size.max(1)) as u64;
    let sum = |terms: &[u64]| terms.iter().fold(0u64, |s, t| s.saturating_add(*t));
    let product = |factors: &[u64]| factors.iter().fold(1u64, |p, f| p.saturating_mul(*f));
    // Class, patches, positions (one for the class), the first norm.
    let kernel = product(&[d, v.channels as u64, patch, patch]);
    let embeddings = sum(&[d, kernel, product(&[side, side, d]), d, product(&[2, d])]);
    // Four projections, two layers, two norms; weights and biases.
    let layer = sum(&[product(&[4, d, d]), product(&[2, d, inner]), inner, product(&[9, d])]);
    let connector = sum(&[product(&[d, text]), product(&[text, text]), product(&[2, text])]);
    sum(&[embeddings, product(&[config.feature_layer as u64, layer]), connector])
}

/// Values in the client's half of a model.
pub fn parameters(config: &ModelConfig) -> u64 {
    let table = (config.text.vocab as u64).saturating_mul(config.text.hidden as u64);
    module_parameters(config).saturating_add(table)
}

/// An estimate for [`Manifest::resident_bytes`].
pub fn resident_bytes(config: &ModelConfig, dtype: EdgeDtype, largest_piece: u64) -> u64 {
    let table = piece::stored_bytes(dtype, config.text.vocab, config.text.hidden) as u64;
    module_parameters(config).saturating_mul(4).saturating_add(table).saturating_add(largest_piece)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::adapter::standard_normal;
    use crate::model::checkpoint::{PROJECTOR, Storage, TOKEN_TABLE, VISION_TOWER, Weights, shapes, write};
    use crate::model::{clip::VisionTower, projector::Projector};
    use crate::plain::TensorBlob;
    use burn::tensor::Device;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    /// A small model with widths that 32 does not divide.
    pub(crate) fn made_up() -> ModelConfig {
        let json = r#"{"model_type":"llava","image_token_index":7,
            "vision_config":{"hidden_size":24,"intermediate_size":40,"num_hidden_layers":3,"num_attention_heads":2,
            "image_size":8,"patch_size":4},
            "text_config":{"hidden_size":36,"intermediate_size":48,"num_hidden_layers":1,"num_attention_heads":2,
            "vocab_size":50}}"#;
        ModelConfig::from_json(json).unwrap()
    }

    /// Its client's half with random values, and a tensor that LLaVA does not read.
    pub(crate) fn tensors(config: &ModelConfig) -> Vec<(String, TensorBlob)> {
        let mut all = shapes(&VisionTower::init(config, &Device::flex()), VISION_TOWER);
        all.extend(shapes(&Projector::init(config, &Device::flex()), PROJECTOR));
        all.insert(TOKEN_TABLE.to_owned(), vec![config.text.vocab, config.text.hidden]);
        all.insert("vision_tower.post_layernorm.weight".to_owned(), vec![config.vision.hidden]);
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut random = |shape: Vec<usize>| {
            let data = (0..shape.iter().product::<usize>()).map(|_| 0.2 * standard_normal(&mut rng)).collect();
            TensorBlob { shape, data }
        };
        all.into_iter().map(|(name, shape)| (name, random(shape))).collect()
    }

    /// As a checkpoint.
    pub(crate) fn weights(tensors: &[(String, TensorBlob)]) -> Weights {
        Weights::from_files(vec![("made up".into(), write(tensors, Storage::F32, &[]).unwrap())]).unwrap()
    }

    #[test]
    fn parameters_are_counted_as_they_are() {
        let config = made_up();
        let all: usize = tensors(&config).iter().map(|(_, t)| t.data.len()).sum();
        assert_eq!(parameters(&config), (all - config.vision.hidden) as u64);
        let table = 50 * (36 + 2);
        let modules = (parameters(&config) - 50 * 36) * 4;
        assert_eq!(resident_bytes(&config, EdgeDtype::Int8, 77), modules + table + 77);
    }

    fn manifest() -> Manifest {
        let entry = |i: usize| PieceEntry { sha256: sha256_hex(&[i as u8]), bytes: 1000 };
        Manifest {
            format: FORMAT,
            model: "tiny".into(),
            edge_dtype: EdgeDtype::Int8,
            parameters: 1500,
            resident_bytes: 9000,
            files: vec![FileEntry { name: "config.json".into(), sha256: sha256_hex(b"x"), bytes: 1 }],
            pieces: (0..2).map(entry).collect(),
        }
    }

    #[test]
    fn forms_have_names() {
        for dtype in [EdgeDtype::F16, EdgeDtype::Int8, EdgeDtype::Int4] {
            assert_eq!(dtype.to_string().parse(), Ok(dtype));
            assert_eq!(serde_json::to_string(&dtype).unwrap(), format!("\"{dtype}\""));
        }
        let words = "fp8".parse::<EdgeDtype>().unwrap_err().to_string();
        assert!(words.contains("'fp8'") && words.contains("f16, int8 or int4"));
    }

    #[test]
    fn a_manifest_reads_back_the_same() {
        let json = serde_json::to_vec(&manifest()).unwrap();
        assert_eq!(Manifest::from_json(&json).unwrap(), manifest());
        assert!(Manifest::from_json(b"{}").unwrap_err().to_string().contains("no manifest"));
        let other = Manifest { pieces: manifest().pieces.into_iter().rev().collect(), ..manifest() };
        assert_ne!(other.identity(), manifest().identity());
        assert!(is_sha256(&manifest().identity()));
    }

    #[test]
    fn each_fault_of_a_manifest_is_named() {
        let fault = |change: fn(&mut Manifest)| {
            let mut m = manifest();
            change(&mut m);
            m.validate().unwrap_err().to_string()
        };
        assert!(fault(|m| m.format = 2).contains("format is 2"));
        assert!(fault(|m| m.model = "a\nb".into()).contains("name"));
        assert!(fault(|m| m.pieces.clear()).contains("0 pieces"));
        assert!(fault(|m| m.pieces = vec![m.pieces[0].clone(); MOST_ENTRIES + 1]).contains("65537 pieces"));
        assert!(fault(|m| m.pieces[1].bytes = 1 << 60).contains("bytes"));
        assert!(fault(|m| m.pieces[1].bytes = 0).contains("0 bytes"));
        assert!(fault(|m| m.pieces[1].sha256 = m.pieces[0].sha256.clone()).contains("twice"));
        assert!(fault(|m| m.pieces[1].sha256 = "../../etc/passwd".into()).contains("SHA-256"));
        assert!(fault(|m| m.pieces[1].sha256 = m.pieces[1].sha256.to_uppercase()).contains("SHA-256"));
        assert!(fault(|m| m.parameters = 1 << 60).contains("cannot hold"));
        assert!(fault(|m| m.parameters = 0).contains("0 parameters"));
        assert!(fault(|m| m.resident_bytes = u64::MAX).contains("memory"));
        assert!(fault(|m| m.files[0].bytes = 1 << 60).contains("config.json"));
        for name in ["", "..", ".hidden", "../config.json", "a/b", "a\\b", "a\0b", "a b"] {
            let m =
                Manifest { files: vec![FileEntry { name: name.into(), ..manifest().files[0].clone() }], ..manifest() };
            assert!(m.validate().unwrap_err().to_string().contains("plain name"), "{name:?}");
        }
        let all = (0..200).map(|i: u8| PieceEntry { sha256: sha256_hex(&[i]), bytes: LARGEST_PIECE }).collect();
        let large = Manifest { pieces: all, ..manifest() };
        assert!(large.validate().unwrap_err().to_string().contains("cannot hold"));
    }

    #[test]
    fn other_bytes_are_not_the_file() {
        let file = &manifest().files[0];
        file.verify(b"x").unwrap();
        assert!(file.verify(b"xx").unwrap_err().to_string().contains("2 bytes instead of 1"));
        let words = file.verify(b"y").unwrap_err().to_string();
        assert!(words.contains("config.json") && words.contains(&file.sha256), "{words}");
    }

    #[test]
    fn a_configuration_must_be_of_the_size_announced() {
        let config =
            ModelConfig::from_json(r#"{"model_type":"llava","image_token_index":7,"text_config":{"vocab_size":100}}"#);
        let mut config = config.unwrap();
        let fitting = Manifest { parameters: parameters(&config), ..manifest() };
        fitting.check(&config).unwrap();
        config.vision.hidden = 1 << 40;
        config.vision.intermediate = usize::MAX;
        assert!(fitting.check(&config).unwrap_err().to_string().contains("config.json describes"));
    }
}
