//! Hugging Face checkpoints to modules and back.
//!
//! A module's fields bear Hugging Face's names, so a parameter's path is its key, except: norms of burn call their weight
//! `gamma` and bias `beta`; burn's `Linear` keeps `[in, out]`, the file `[out, in]`. Four prefixes are in use for the parts;
//! [`canonical`] maps them all to one. [`check_tensors`] sees to it that nothing is missing or left over before any part is loaded.

use crate::bundle::table::TokenTable;
use crate::config::{ConfigError, ModelConfig};
use crate::model::{clip::VisionTower, llama::Llama, projector::Projector};
use crate::plain::TensorBlob;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Tensor, TensorCreationOptions, TensorData};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::{BTreeMap, BTreeSet};

use super::weights::Layout;
pub use super::weights::Weights;

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
/// Canonical name of the head, which is the token table itself where a configuration ties them.
const HEAD: &str = "lm_head.weight";
/// Prefix of the decoder's canonical names.
pub const LANGUAGE_MODEL: &str = "language_model.";
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

/// Where a module's tensors come from, if not from a whole checkpoint: one piece of a bundle.
pub trait TensorSource {
    /// A tensor of the given shape in f32 by canonical name, in the file's layout; `None` where another source has it.
    ///
    /// # Errors
    /// A sentence for the list in [`CheckpointError::Tensors`].
    fn find(&self, name: &str, shape: &[usize]) -> Result<Option<TensorBlob>, String>;
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
    let find = |name: &str, shape: &[usize], transposed: bool| -> Result<Option<TensorData>, String> {
        let Some(TensorBlob { mut shape, data }) = source.find(name, shape)? else { return Ok(None) };
        let layout = Layout::of(&shape, transposed);
        if let Layout::Transposed(..) = layout {
            shape.reverse();
            return Ok(Some(TensorData::new(layout.arrange(data.len(), |i| data[i]), shape)));
        }
        Ok(Some(TensorData::new(data, shape)))
    };
    module.map(&mut Filler { find: &find, prefix, path: Vec::new(), filled, faults })
}

/// Fill a module with a checkpoint's tensors by canonical name; `prefix` and `faults` as in [`fill`], where what is missing is a fault.
fn load<M: Module>(
    module: M,
    prefix: &str,
    find: impl Fn(&str, bool) -> Result<TensorData, String>,
    faults: &mut Vec<String>,
) -> M {
    let find = |name: &str, _: &[usize], transposed: bool| -> Result<Option<TensorData>, String> {
        find(name, transposed).map(Some)
    };
    module.map(&mut Filler { find: &find, prefix, path: Vec::new(), filled: &mut BTreeSet::new(), faults })
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

/// A tensor by name, in the file's layout; it ought to have the shape.
type Find<'a> = dyn Fn(&str, &[usize], bool) -> Result<Option<TensorData>, String> + 'a;

struct Filler<'a> {
    find: &'a Find<'a>,
    prefix: &'a str,
    path: Path,
    filled: &'a mut BTreeSet<String>,
    faults: &'a mut Vec<String>,
}

impl ModuleMapper for Filler<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.push((name.to_owned(), container.to_owned()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const N: usize>(&mut self, param: Param<Tensor<N>>) -> Param<Tensor<N>> {
        let (key, transposed) = key_of(&self.path, self.prefix);
        let expected = file_shape(&param, transposed);
        let data = match (self.find)(&key, &expected, transposed) {
            Ok(Some(data)) => data,
            Ok(None) => return param,
            Err(fault) => {
                self.faults.push(fault);
                return param;
            }
        };
        let mut shape = data.shape().as_slice().to_vec();
        if transposed {
            shape.reverse();
        }
        if shape != expected {
            self.faults.push(format!("{key}: shape {shape:?}, expected {expected:?}"));
            return param;
        }
        let (device, dtype) = (param.lazy_device(), data.dtype());
        let id = param.id;
        let tensor = Tensor::<N>::from_data(data, (&device, dtype));
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

/// Load the client's part, in f32.
///
/// # Errors
/// One list of all missing and misshapen tensors.
pub fn load_edge(config: &ModelConfig, weights: &Weights, device: &Device) -> Result<EdgeParts, CheckpointError> {
    let mut faults = Vec::new();
    let find = |name: &str, transposed: bool| weights.tensor(name, DType::F32, transposed);
    let vision = load(VisionTower::init(config, device), VISION_TOWER, find, &mut faults);
    let projector = load(Projector::init(config, device), PROJECTOR, find, &mut faults);
    let shape = [config.text.vocab, config.text.hidden];
    let table = weights.read(TOKEN_TABLE).and_then(|table| {
        if table.shape == shape {
            TokenTable::from_blob(table)
        } else {
            Err(format!("{TOKEN_TABLE}: shape {:?}, expected {shape:?}", table.shape))
        }
    });
    match table {
        Ok(token_table) if faults.is_empty() => Ok(EdgeParts { vision, projector, token_table }),
        table => {
            faults.extend(table.err());
            Err(CheckpointError::Tensors(faults))
        }
    }
}

/// Load the server's part where and in what type `place` says: a device means f32 there, `(&device, DType::BF16)` another type.
///
/// # Errors
/// One list of all missing and misshapen tensors.
pub fn load_llm(
    config: &ModelConfig,
    weights: &Weights,
    place: impl Into<TensorCreationOptions>,
) -> Result<Llama, CheckpointError> {
    let place = place.into();
    let dtype = place.dtype_or(DType::F32);
    let find = |name: &str, transposed: bool| {
        let stored = if config.text.tied && name == HEAD { TOKEN_TABLE } else { name };
        weights.tensor(stored, dtype, transposed)
    };
    let mut faults = Vec::new();
    let llm = load(Llama::init(&config.text, &place.device), LANGUAGE_MODEL, find, &mut faults);
    if faults.is_empty() { Ok(llm) } else { Err(CheckpointError::Tensors(faults)) }
}

/// Compare a whole checkpoint with the model that its config.json describes: every tensor's name, shape and stored type, in both
/// halves and beside them. Reads no values.
///
/// # Errors
/// One list of everything that is missing, misshapen, of a type that is not read, there twice, or no part of the model.
pub fn check_tensors(config: &ModelConfig, weights: &Weights) -> Result<(), CheckpointError> {
    // Large parameters are made when they are first used, which these never are.
    let device = Device::flex();
    let whole = ModelConfig { feature_layer: config.vision.layers, ..config.clone() };
    let mut expected = shapes(&VisionTower::init(&whole, &device), VISION_TOWER);
    // Layers behind the one that LLaVA reads.
    let behind: BTreeSet<String> = expected.keys().filter(|name| is_behind(name, config)).cloned().collect();
    expected.retain(|name, _| !behind.contains(name));
    expected.extend(shapes(&Projector::init(config, &device), PROJECTOR));
    expected.extend(shapes(&Llama::init(&config.text, &device), LANGUAGE_MODEL));
    expected.insert(TOKEN_TABLE.to_owned(), vec![config.text.vocab, config.text.hidden]);
    if config.text.tied {
        expected.remove(HEAD);
    }
    // What published files carry and nobody reads.
    let unread = |name: &str| {
        behind.contains(name)
            || (config.text.tied && name == HEAD)
            || (name.starts_with(LANGUAGE_MODEL) && name.ends_with("rotary_emb.inv_freq"))
            || UNREAD.contains(&name)
    };
    let faults = weights.faults(&expected, unread);
    if faults.is_empty() { Ok(()) } else { Err(CheckpointError::Tensors(faults)) }
}

/// Tensors of the vision tower that are not read: a buffer of older files, and the norm of what is pooled.
const UNREAD: [&str; 3] =
    ["vision_tower.embeddings.position_ids", "vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias"];

/// Does a tensor belong to a vision layer that is behind the feature layer?
fn is_behind(name: &str, config: &ModelConfig) -> bool {
    let layer = name.strip_prefix("vision_tower.encoder.layers.").and_then(|rest| rest.split('.').next());
    layer.and_then(|number| number.parse::<usize>().ok()).is_some_and(|number| number >= config.feature_layer)
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
