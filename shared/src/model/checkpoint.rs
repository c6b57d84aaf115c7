//! Hugging Face checkpoints to modules and back.
//!
//! A module's fields bear Hugging Face's names, so a parameter's path is its key, except: norms of burn call their weight
//! `gamma` and bias `beta`; burn's `Linear` keeps `[in, out]`, the file `[out, in]`. Four prefixes are in use for the parts;
//! [`canonical`] maps them all to one.

use crate::bundle::table::TokenTable;
use crate::config::{ConfigError, ModelConfig};
use crate::model::{clip::VisionTower, llama::Llama, projector::Projector};
use crate::plain::TensorBlob;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor, TensorData};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::{BTreeMap, BTreeSet};

/// Why a checkpoint cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file that must be there is not.
    #[error(
        "{file} cannot be read: {cause}; a model directory needs config.json, tokenizer.json, preprocessor_config.json and model.safetensors (or an index with its parts)"
    )]
    File {
        /// Its name.
        file: String,
        /// The system's words.
        cause: String,
    },
    /// A weight file that is damaged.
    #[error("{file} is damaged ({cause}), most likely cut off while copying; fetch it again")]
    Damaged {
        /// Its name.
        file: String,
        /// What was found.
        cause: String,
    },
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Tensors missing, misshapen or unknown, all in one list.
    #[error("the checkpoint does not fit its config.json:\n  {}", .0.join("\n  "))]
    Tensors(Vec<String>),
}

/// Canonical name of the token table.
pub const TOKEN_TABLE: &str = "language_model.embed_tokens.weight";
/// Prefix of the vision tower's canonical names.
pub const VISION_TOWER: &str = "vision_tower.";
/// Prefix of the connector's canonical names.
pub const PROJECTOR: &str = "multi_modal_projector.";

/// One name for the four prefixes in use: `language_model.*`, `lm_head.*`, `vision_tower.*`, `multi_modal_projector.*`.
pub fn canonical(name: &str) -> String {
    let name = name.strip_prefix("model.").unwrap_or(name);
    for (from, to) in [
        ("language_model.model.", "language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "vision_tower."),
    ] {
        if let Some(rest) = name.strip_prefix(from) {
            return format!("{to}{rest}");
        }
    }
    name.to_owned()
}

/// The published naming (llava-hf/llava-1.5-7b-hf), used when writing.
fn published(name: &str) -> String {
    for (from, to) in [
        ("language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("vision_tower.", "vision_tower.vision_model."),
    ] {
        if let Some(rest) = name.strip_prefix(from) {
            return format!("{to}{rest}");
        }
    }
    name.to_owned()
}

/// Weight files held in memory, found by canonical name.
pub struct Weights {
    files: Vec<Vec<u8>>,
    index: BTreeMap<String, (usize, String)>,
}

impl Weights {
    /// Take over the bytes of one or several safetensors files.
    ///
    /// # Errors
    /// [`CheckpointError::Damaged`] for a file whose header or length is wrong.
    pub fn from_files(files: Vec<(String, Vec<u8>)>) -> Result<Self, CheckpointError> {
        let mut index = BTreeMap::new();
        let mut buffers = Vec::new();
        for (number, (file, bytes)) in files.into_iter().enumerate() {
            let parsed = SafeTensors::deserialize(&bytes)
                .map_err(|e| CheckpointError::Damaged { file, cause: e.to_string() })?;
            for name in parsed.names() {
                index.insert(canonical(name), (number, name.to_owned()));
            }
            buffers.push(bytes);
        }
        Ok(Self { files: buffers, index })
    }

    /// Canonical names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.index.keys().map(String::as_str)
    }

    /// Number of values in all tensors.
    pub fn parameters(&self) -> usize {
        let counts = self.files.iter().filter_map(|f| SafeTensors::deserialize(f).ok());
        counts
            .flat_map(|f| f.tensors().into_iter().map(|(_, t)| t.shape().iter().product::<usize>()).collect::<Vec<_>>())
            .sum()
    }

    /// A tensor widened to f32, in the file's own layout.
    ///
    /// # Errors
    /// A sentence for the list in [`CheckpointError::Tensors`].
    pub fn read(&self, name: &str) -> Result<TensorBlob, String> {
        let (file, original) = self.index.get(name).ok_or_else(|| format!("{name}: missing"))?;
        let parsed = SafeTensors::deserialize(&self.files[*file]).map_err(|e| e.to_string())?;
        let view = parsed.tensor(original).map_err(|e| e.to_string())?;
        Ok(TensorBlob {
            shape: view.shape().to_vec(),
            data: widen(&view)
                .ok_or_else(|| format!("{name}: stored as {:?}, supported are F32, F16, BF16", view.dtype()))?,
        })
    }

    /// Fill a module; `prefix` is put before its parameters' paths. Faults are added to `faults`, the module is returned
    /// half-filled then.
    pub fn load<M: Module>(&self, module: M, prefix: &str, faults: &mut Vec<String>) -> M {
        fill(module, self, prefix, &mut BTreeSet::new(), faults)
    }
}

/// Where a module's tensors come from: a whole checkpoint, or one piece of a bundle.
pub trait TensorSource {
    /// A tensor of the given shape in f32 by canonical name, in the file's layout; `None` where another source has it.
    ///
    /// # Errors
    /// A sentence for the list in [`CheckpointError::Tensors`].
    fn find(&self, name: &str, shape: &[usize]) -> Result<Option<TensorBlob>, String>;
}

impl TensorSource for Weights {
    /// A checkpoint is whole: what it lacks is a fault.
    fn find(&self, name: &str, _: &[usize]) -> Result<Option<TensorBlob>, String> {
        self.read(name).map(Some)
    }
}

/// Fill a module with what a source has; `prefix` is put before its parameters' paths. Names filled are added to `filled`, faults
/// to `faults`; parameters without either stay as they are.
pub fn fill<M: Module, S: TensorSource>(
    module: M,
    source: &S,
    prefix: &str,
    filled: &mut BTreeSet<String>,
    faults: &mut Vec<String>,
) -> M {
    module.map(&mut Filler { source, prefix, path: Vec::new(), filled, faults })
}

fn widen(view: &TensorView) -> Option<Vec<f32>> {
    let pairs = || view.data().chunks_exact(2).map(|b| [b[0], b[1]]);
    match view.dtype() {
        Dtype::F32 => Some(bytemuck::pod_collect_to_vec(view.data())),
        Dtype::F16 => Some(pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect()),
        Dtype::BF16 => Some(pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect()),
        _ => None,
    }
}

/// Path components with the type of what holds each of them.
type Path = Vec<(String, String)>;

/// The file's key for a parameter, and whether the file keeps it transposed.
fn key_of(path: &Path, prefix: &str) -> (String, bool) {
    let mut names: Vec<&str> = path.iter().map(|(n, _)| n.as_str()).collect();
    let holder = path.last().map_or("", |(_, t)| t.as_str());
    if let Some(last) = names.last_mut() {
        *last = match *last {
            "gamma" => "weight",
            "beta" => "bias",
            other => other,
        };
    }
    let transposed = holder == "Struct:Linear" && names.last() == Some(&"weight");
    let key = names.join(".");
    (if key.starts_with("lm_head") { key } else { format!("{prefix}{key}") }, transposed)
}

/// A parameter's shape in the file, without making the parameter.
fn file_shape<const N: usize>(param: &Param<Tensor<N>>, transposed: bool) -> Vec<usize> {
    let mut shape = param.lazy_shape().to_vec();
    if transposed {
        shape.reverse();
    }
    shape
}

struct Filler<'a, S> {
    source: &'a S,
    prefix: &'a str,
    path: Path,
    filled: &'a mut BTreeSet<String>,
    faults: &'a mut Vec<String>,
}

impl<S: TensorSource> ModuleMapper for Filler<'_, S> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push((name.to_owned(), container.to_owned()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const N: usize>(&mut self, param: Param<Tensor<N>>) -> Param<Tensor<N>> {
        let (key, transposed) = key_of(&self.path, self.prefix);
        let expected = file_shape(&param, transposed);
        let blob = match self.source.find(&key, &expected) {
            Ok(Some(blob)) => blob,
            Ok(None) => return param,
            Err(fault) => {
                self.faults.push(fault);
                return param;
            }
        };
        if blob.shape != expected {
            self.faults.push(format!("{key}: shape {:?}, expected {expected:?}", blob.shape));
            return param;
        }
        let device = param.lazy_device();
        let id = param.id;
        let mut tensor = Tensor::<N>::from_data(TensorData::new(blob.data, blob.shape), &device);
        if transposed {
            tensor = tensor.transpose();
        }
        self.filled.insert(key);
        // Nothing that comes from a checkpoint is trained by a client.
        Param::initialized(id, tensor).set_require_grad(false)
    }
}

struct Collector<'a> {
    prefix: &'a str,
    path: Path,
    found: Vec<(String, TensorBlob)>,
}

impl ModuleVisitor for Collector<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push((name.to_owned(), container.to_owned()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const N: usize>(&mut self, param: &Param<Tensor<N>>) {
        let (key, transposed) = key_of(&self.path, self.prefix);
        let value = param.val();
        let value = if transposed { value.transpose() } else { value };
        let shape = value.dims().to_vec();
        let data = value.into_data().convert::<f32>().try_into_vec().unwrap_or_default();
        self.found.push((key, TensorBlob { shape, data }));
    }
}

/// All parameters of a module under their canonical names, in the file's layout. Native only (reads synchronously).
pub fn collect<M: Module>(module: &M, prefix: &str) -> Vec<(String, TensorBlob)> {
    let mut collector = Collector { prefix, path: Vec::new(), found: Vec::new() };
    module.visit(&mut collector);
    collector.found
}

/// How [`write`] stores numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
}

/// A safetensors file of the given tensors under their published names.
///
/// # Errors
/// When the library refuses, with its words.
pub fn write(
    tensors: &[(String, TensorBlob)],
    storage: Storage,
    metadata: &[(String, String)],
) -> Result<Vec<u8>, String> {
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, blob)| {
            let data = match storage {
                Storage::F32 => bytemuck::cast_slice(&blob.data).to_vec(),
                Storage::F16 => blob.data.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
            };
            (published(name), blob.shape.clone(), data)
        })
        .collect();
    let dtype = if storage == Storage::F32 { Dtype::F32 } else { Dtype::F16 };
    let views = bytes
        .iter()
        .map(|(n, s, d)| TensorView::new(dtype, s.clone(), d).map(|v| (n.as_str(), v)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| e.to_string())?;
    let metadata = (!metadata.is_empty()).then(|| metadata.iter().cloned().collect());
    safetensors::serialize(views, metadata).map_err(|e| e.to_string())
}

/// The three parts that live on a client, without the adapters.
pub struct EdgeParts {
    /// Vision tower.
    pub vision: VisionTower,
    /// Connector.
    pub projector: Projector,
    /// `[V, D]` on the host: rows are looked up, never multiplied.
    pub token_table: TokenTable,
}

/// Tensors of the language model that published files carry and nobody reads.
fn known_unused(name: &str, config: &ModelConfig) -> bool {
    name.ends_with("rotary_emb.inv_freq") || (config.text.tied && name == "lm_head.weight")
}

/// Load the client's part.
///
/// # Errors
/// One list of all missing and misshapen tensors.
pub fn load_edge(config: &ModelConfig, weights: &Weights, device: &Device) -> Result<EdgeParts, CheckpointError> {
    let mut faults = Vec::new();
    let vision = weights.load(VisionTower::init(config, device), VISION_TOWER, &mut faults);
    let projector = weights.load(Projector::init(config, device), PROJECTOR, &mut faults);
    let table = token_table(config, weights, &mut faults);
    if !faults.is_empty() {
        return Err(CheckpointError::Tensors(faults));
    }
    let token_table = TokenTable::from_blob(table).map_err(|fault| CheckpointError::Tensors(vec![fault]))?;
    Ok(EdgeParts { vision, projector, token_table })
}

fn token_table(config: &ModelConfig, weights: &Weights, faults: &mut Vec<String>) -> TensorBlob {
    let shape = [config.text.vocab, config.text.hidden];
    let table = weights.read(TOKEN_TABLE).and_then(|t| {
        if t.shape == shape { Ok(t) } else { Err(format!("{TOKEN_TABLE}: shape {:?}, expected {shape:?}", t.shape)) }
    });
    table.unwrap_or_else(|fault| {
        faults.push(fault);
        TensorBlob::zeros(&[0, 0])
    })
}

/// Load the server's part.
///
/// # Errors
/// One list of all missing, misshapen and unknown tensors.
pub fn load_llm(config: &ModelConfig, weights: &Weights, device: &Device) -> Result<Llama, CheckpointError> {
    let mut faults = Vec::new();
    let mut llm = Llama::init(&config.text, device);
    if config.text.tied {
        let table = token_table(config, weights, &mut faults);
        if faults.is_empty() {
            let tensor = Tensor::<2>::from_data(TensorData::new(table.data, table.shape), device).transpose();
            let id = llm.lm_head.weight.id;
            let head =
                std::mem::replace(&mut llm.lm_head.weight, Param::initialized(id, tensor).set_require_grad(false));
            drop(head);
        }
        let mut ignored = Vec::new();
        let head = llm.lm_head.weight.clone();
        llm = weights.load(llm, "language_model.", &mut ignored);
        llm.lm_head.weight = head;
        faults.extend(ignored.into_iter().filter(|f| !f.starts_with("lm_head.")));
    } else {
        llm = weights.load(llm, "language_model.", &mut faults);
    }
    let expected = shapes(&llm, "language_model.");
    faults.extend(
        weights
            .names()
            .filter(|n| n.starts_with("language_model.") || n.starts_with("lm_head."))
            .filter(|n| !expected.contains_key(*n) && *n != TOKEN_TABLE && !known_unused(n, config))
            .map(|n| format!("{n}: not part of the model that config.json describes")),
    );
    if faults.is_empty() { Ok(llm) } else { Err(CheckpointError::Tensors(faults)) }
}

/// Names and shapes of a module's parameters, in the file's layout and without making them; `prefix` as in [`fill`].
pub fn shapes<M: Module>(module: &M, prefix: &str) -> BTreeMap<String, Vec<usize>> {
    struct Shapes<'a>(Path, &'a str, BTreeMap<String, Vec<usize>>);
    impl ModuleVisitor for Shapes<'_> {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.push((name.to_owned(), container.to_owned()));
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.pop();
        }
        fn visit_float<const N: usize>(&mut self, param: &Param<Tensor<N>>) {
            let (key, transposed) = key_of(&self.0, self.1);
            self.2.insert(key, file_shape(param, transposed));
        }
    }
    let mut found = Shapes(Vec::new(), prefix, BTreeMap::new());
    module.visit(&mut found);
    found.2
}
