//! Checkpoints of a model's real shape with random weights, to measure size, memory and speed where the published
//! weights are not to be had. Written tensor by tensor, so memory stays at about one tensor.

use crate::presets::{PublishedTensor, tensors};
use crate::pretrain::run::small_files;
use crate::pretrain::tokenizer;
use anyhow::Context;
use fednano_shared::config::ModelConfig;
use indicatif::ProgressBar;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use safetensors::tensor::{Dtype, View, serialize_to_file};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// How the weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "lower")]
pub enum Storage {
    /// 4 bytes.
    F32,
    /// 2 bytes, as the published files.
    F16,
    /// 2 bytes with an f32's range.
    Bf16,
}

impl Storage {
    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    fn torch_name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    fn bytes(self, tensor: &PublishedTensor) -> usize {
        tensor.parameters() * if self == Self::F32 { 4 } else { 2 }
    }
}

/// What to write.
#[derive(Debug, Clone)]
pub struct Options {
    /// The weights are a function of the seed and the tensors' names.
    pub seed: u64,
    /// How they are stored.
    pub storage: Storage,
    /// A weight file holds at most so many bytes of weights, and at least one tensor.
    pub shard_bytes: u64,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Parameters.
    pub parameters: u64,
    /// Bytes of all weights.
    pub bytes: u64,
    /// Weight files.
    pub shards: usize,
}

/// Write the model directory `out`, which must not exist or be empty; it appears when it is whole.
///
/// # Errors
/// A directory that is in use, or a disk that is full.
pub fn write(config: &ModelConfig, options: &Options, out: &Path, bar: &ProgressBar) -> anyhow::Result<Written> {
    if out.exists() {
        let empty = out.read_dir().is_ok_and(|mut entries| entries.next().is_none());
        anyhow::ensure!(empty, "{} exists and is not an empty directory; choose another --out", out.display());
    }
    let name = out.file_name().with_context(|| format!("{} is no name for a new directory", out.display()))?;
    let mut part = name.to_owned();
    part.push(".part");
    let part = out.with_file_name(part);
    anyhow::ensure!(!part.exists(), "{} is left of an unfinished run, or in use by one; remove it", part.display());
    std::fs::create_dir_all(&part).with_context(|| format!("cannot create {}", part.display()))?;
    let written = write_into(&part, config, options, bar).and_then(|written| {
        if out.exists() {
            std::fs::remove_dir(out)?; // empty, as seen above; not every system renames onto it
        }
        std::fs::rename(&part, out)?;
        Ok(written)
    });
    if written.is_err() {
        drop(std::fs::remove_dir_all(&part));
    }
    written
}

fn write_into(dir: &Path, config: &ModelConfig, options: &Options, bar: &ProgressBar) -> anyhow::Result<Written> {
    let cannot = |path: &Path| format!("cannot write {}; is the disk full?", path.display());
    for (name, bytes) in companions(config, options.storage)? {
        let path = dir.join(name);
        std::fs::write(&path, bytes).with_context(|| cannot(&path))?;
    }
    let readable = std::fs::metadata(dir.join("config.json"))?.permissions();
    let tensors = tensors(config);
    let bytes: u64 = tensors.iter().map(|t| options.storage.bytes(t) as u64).sum();
    bar.set_length(bytes);
    let shards = shards(&tensors, options);
    let mut weight_map = BTreeMap::new();
    for (number, shard) in (1..).zip(&shards) {
        let file = match shards.len() {
            1 => "model.safetensors".to_owned(),
            many => format!("model-{number:05}-of-{many:05}.safetensors"),
        };
        let path = dir.join(&file);
        let views = shard.iter().map(|tensor| (tensor.name.as_str(), RandomTensor { tensor, options, bar }));
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        serialize_to_file(views, Some(metadata), &path).with_context(|| cannot(&path))?;
        // The library makes a file that only its owner can read.
        std::fs::set_permissions(&path, readable.clone())?;
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.as_str(), file.clone())));
    }
    if shards.len() > 1 {
        let path = dir.join("model.safetensors.index.json");
        let index = json!({"metadata": {"total_size": bytes}, "weight_map": weight_map});
        std::fs::write(&path, serde_json::to_vec_pretty(&index)?).with_context(|| cannot(&path))?;
    }
    let parameters = tensors.iter().map(|t| t.parameters() as u64).sum();
    Ok(Written { parameters, bytes, shards: shards.len() })
}

/// Runs of tensors that share a file.
fn shards<'a>(tensors: &'a [PublishedTensor], options: &Options) -> Vec<&'a [PublishedTensor]> {
    let mut shards = Vec::new();
    let (mut start, mut size) = (0, 0);
    for (at, tensor) in tensors.iter().enumerate() {
        let bytes = options.storage.bytes(tensor) as u64;
        if at > start && size + bytes > options.shard_bytes {
            shards.push(&tensors[start..at]);
            (start, size) = (at, 0);
        }
        size += bytes;
    }
    shards.push(&tensors[start..]);
    shards
}

// ---------------------------------------------------------------------------------------------- weights

/// A tensor whose values are drawn when the file is written.
struct RandomTensor<'a> {
    tensor: &'a PublishedTensor,
    options: &'a Options,
    bar: &'a ProgressBar,
}

impl View for RandomTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.options.storage.dtype()
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let (tensor, seed) = (self.tensor, self.options.seed);
        let bytes = match self.options.storage {
            Storage::F32 => values(tensor, seed, f32::to_le_bytes),
            Storage::F16 => values(tensor, seed, |v| half::f16::from_f32(v).to_le_bytes()),
            Storage::Bf16 => values(tensor, seed, |v| half::bf16::from_f32(v).to_le_bytes()),
        };
        self.bar.inc(bytes.len() as u64);
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.options.storage.bytes(self.tensor)
    }
}

/// Values that one stream of random numbers yields: with another number a seed would stand for other weights. Even,
/// because draws come in pairs.
const CHUNK: usize = 1 << 16;

/// Stored values of a tensor: norms 1, biases 0, anything else normal with deviation `1 / sqrt(fan_in)`.
fn values<const W: usize>(tensor: &PublishedTensor, seed: u64, encode: impl Fn(f32) -> [u8; W] + Sync) -> Vec<u8> {
    let count = tensor.parameters();
    if tensor.name.ends_with(".bias") {
        return encode(0.0).repeat(count);
    }
    if tensor.shape.len() == 1 && tensor.name.ends_with(".weight") {
        return encode(1.0).repeat(count);
    }
    let (_, fan_in) = tensor.matrix();
    let deviation = (fan_in as f32).powf(-0.5);
    let key: [u8; 32] = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(&tensor.name).finalize().into();
    let source = ChaCha8Rng::from_seed(key);
    let mut bytes = vec![0u8; count * W];
    bytes.par_chunks_mut(CHUNK * W).enumerate().for_each(|(number, chunk)| {
        let mut rng = source.clone();
        rng.set_stream(number as u64);
        for pair in chunk.chunks_mut(2 * W) {
            for (slot, value) in pair.chunks_exact_mut(W).zip(normal_pair(&mut rng)) {
                slot.copy_from_slice(&encode(value * deviation));
            }
        }
    });
    bytes
}

/// Two draws from N(0, 1), Box and Muller 1958. In f32 and both at once: a 7B has 7 billion of them.
fn normal_pair(rng: &mut ChaCha8Rng) -> [f32; 2] {
    const STEP: f32 = 1.0 / (1 << 24) as f32; // an f32's mantissa
    let mut unit = || ((rng.next_u32() >> 8) + 1) as f32 * STEP; // (0, 1]
    let radius = (-2.0 * unit().ln()).sqrt();
    let (sin, cos) = (std::f32::consts::TAU * unit()).sin_cos();
    [radius * cos, radius * sin]
}

// ---------------------------------------------------------------------------------------------- other files

/// Everything but the weights, by name.
fn companions(config: &ModelConfig, storage: Storage) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let mut files = small_files(config, tokenizer_json(config)?);
    let mut put = |name: &str, value: &Value| {
        serde_json::to_vec_pretty(value).map(|bytes| drop(files.insert(name.to_owned(), bytes)))
    };
    let mut described: Value = serde_json::from_str(&config.to_json())?;
    if let Some(keys) = described.as_object_mut() {
        keys.insert("torch_dtype".into(), storage.torch_name().into());
    }
    put("config.json", &described)?;
    let size = config.vision.image_size;
    let preprocessor = json!({
        "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
        "do_resize": true, "do_center_crop": true, "do_normalize": true, "do_rescale": true, "do_convert_rgb": true,
        "resample": 3, "rescale_factor": 1.0 / 255.0,
        "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size},
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]
    });
    put("preprocessor_config.json", &preprocessor)?;
    let processor = json!({
        "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"
    });
    put("processor_config.json", &processor)?;
    Ok(files)
}

/// nano-llava's tokenizer with `<image>` at the configuration's id. Ids that this leaves free get a token of their own,
/// so that whatever a random model says has a text.
fn tokenizer_json(config: &ModelConfig) -> anyhow::Result<String> {
    let text =
        tokenizer::build()?.to_string(false).map_err(|e| anyhow::anyhow!("the tokenizer has no JSON form: {e}"))?;
    let mut json: Value = serde_json::from_str(&text)?;
    let vocab = json.pointer_mut("/model/vocab").and_then(Value::as_object_mut);
    let vocab = vocab.context("the tokenizer has no vocabulary; this is a bug, please report it")?;
    let (image, taken) = (u64::from(config.image_token), vocab.len() as u64);
    let before = vocab.get("<image>").and_then(Value::as_u64);
    let before = before.context("the tokenizer has no <image>; this is a bug, please report it")?;
    anyhow::ensure!(
        image == before || image >= taken,
        "<image> cannot be token {image}, the tokenizer has {taken} tokens of its own; choose a preset with a larger id"
    );
    if image != before {
        for id in std::iter::once(before).chain(taken..image) {
            vocab.insert(format!("<spare{id}>"), id.into());
        }
        vocab.insert("<image>".into(), image.into());
    }
    let tokens = vocab.len();
    anyhow::ensure!(
        tokens <= config.text.vocab,
        "the token table has {} rows, the tokenizer {tokens} tokens; choose a preset with a larger table",
        config.text.vocab
    );
    for token in json.pointer_mut("/added_tokens").and_then(Value::as_array_mut).into_iter().flatten() {
        if token["content"] == "<image>" {
            token["id"] = image.into();
        }
    }
    Ok(serde_json::to_string(&json)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets::find;
    use burn::tensor::Device;
    use fednano_shared::model::checkpoint::{load_edge, load_llm};
    use fednano_shared::model::files::ModelFiles;
    use std::path::PathBuf;
    use tokenizers::Tokenizer;

    const WHOLE: u64 = 1 << 30;

    /// An own directory that goes when the test is over.
    struct Folder(PathBuf);

    impl Folder {
        fn new(test: &str) -> Self {
            let path = std::env::temp_dir().join(format!("fednano-random-model-{test}-{}", std::process::id()));
            drop(std::fs::remove_dir_all(&path));
            std::fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn model(&self, name: &str, seed: u64, storage: Storage, shard_bytes: u64) -> (ModelFiles, Written) {
            let (config, out) = (find("tiny").unwrap(), self.0.join(name));
            let options = Options { seed, storage, shard_bytes };
            let written = write(&config, &options, &out, &ProgressBar::hidden()).unwrap();
            assert!(!self.0.join(format!("{name}.part")).exists());
            (ModelFiles::open(&out).unwrap(), written)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            drop(std::fs::remove_dir_all(&self.0));
        }
    }

    #[test]
    fn a_random_model_loads_like_a_published_one() {
        let folder = Folder::new("loads");
        let (files, written) = folder.model("m", 1, Storage::F16, WHOLE);
        assert_eq!(files.config, find("tiny").unwrap());
        assert_eq!(written, Written { parameters: 673_888, bytes: 2 * 673_888, shards: 1 });
        assert_eq!(files.weights.parameters(), 673_888);
        assert!(!folder.0.join("m/model.safetensors.index.json").exists());
        let device = Device::flex();
        load_edge(&files.config, &files.weights, &device).unwrap();
        load_llm(&files.config, &files.weights, &device).unwrap();
    }

    #[test]
    fn weights_depend_on_seed_and_name_alone() {
        let folder = Folder::new("seeds");
        let (whole, _) = folder.model("whole", 7, Storage::F16, WHOLE);
        let (sharded, written) = folder.model("sharded", 7, Storage::F16, 100_000);
        let (other, _) = folder.model("other", 8, Storage::F16, WHOLE);
        assert!(written.shards > 3, "{written:?}");
        let last = format!("model-{0:05}-of-{0:05}.safetensors", written.shards);
        assert!(folder.0.join("sharded").join(last).exists());
        let names: Vec<&str> = whole.weights.names().collect();
        assert_eq!(names.len(), 80);
        for name in &names {
            assert_eq!(whole.weights.read(name), sharded.weights.read(name), "{name}");
        }
        // Larger than a chunk, so of several streams.
        let name = "language_model.embed_tokens.weight";
        let table = whole.weights.read(name).unwrap().data;
        assert_ne!(table, other.weights.read(name).unwrap().data);
        assert_ne!(table[..CHUNK], table[CHUNK..2 * CHUNK]);
        assert_ne!(table, whole.weights.read("lm_head.weight").unwrap().data);
    }

    #[test]
    fn values_are_spread_as_a_fresh_model() {
        let folder = Folder::new("spread");
        for (name, storage) in [("f32", Storage::F32), ("bf16", Storage::Bf16)] {
            let (files, _) = folder.model(name, 1, storage, WHOLE);
            let data = |tensor: &str| files.weights.read(tensor).unwrap().data;
            let gate = data("language_model.layers.1.mlp.gate_proj.weight");
            let mean = |f: fn(f32) -> f32| gate.iter().map(|v| f64::from(f(*v))).sum::<f64>() / gate.len() as f64;
            let deviation = mean(|v| v * v).sqrt() * 96f64.sqrt();
            assert!((deviation - 1.0).abs() < 0.03, "{deviation}");
            assert!(mean(|v| v).abs() < 0.005);
            assert!(data("language_model.norm.weight").iter().all(|v| *v == 1.0));
            assert!(data("vision_tower.encoder.layers.2.mlp.fc1.bias").iter().all(|v| *v == 0.0));
            assert!(data("vision_tower.embeddings.class_embedding").iter().any(|v| *v != 0.0));
        }
    }

    #[test]
    fn text_encodes_with_the_image_token_of_the_configuration() {
        let folder = Folder::new("text");
        let (files, _) = folder.model("m", 1, Storage::F16, WHOLE);
        let encoded = files.text.encode("What colour is the box?", Some("red")).unwrap();
        assert_eq!(encoded.ids.iter().filter(|id| **id == 2000).count(), files.config.image_tokens());
        assert!(encoded.ids.iter().all(|id| (*id as usize) < files.config.text.vocab));
        assert_eq!(files.text.decode(&encoded.ids[encoded.prompt_length..]), "red");
        let large = tokenizer_json(&find("llava-1.5-7b").unwrap()).unwrap();
        let large = Tokenizer::from_bytes(large.as_bytes()).unwrap();
        assert_eq!((large.token_to_id("<image>"), large.get_vocab_size(true)), (Some(32000), 32001));
    }

    #[test]
    fn nothing_is_overwritten() {
        let folder = Folder::new("refuses");
        let config = find("tiny").unwrap();
        let options = Options { seed: 1, storage: Storage::F16, shard_bytes: WHOLE };
        let attempt = |name: &str| write(&config, &options, &folder.0.join(name), &ProgressBar::hidden());
        std::fs::create_dir_all(folder.0.join("full")).unwrap();
        std::fs::write(folder.0.join("full/notes.txt"), "mine").unwrap();
        assert!(attempt("full").unwrap_err().to_string().contains("choose another --out"));
        assert_eq!(std::fs::read(folder.0.join("full/notes.txt")).unwrap(), b"mine");
        std::fs::create_dir_all(folder.0.join("half.part")).unwrap();
        assert!(attempt("half").unwrap_err().to_string().contains("remove it"));
        std::fs::create_dir_all(folder.0.join("empty")).unwrap();
        attempt("empty").unwrap();
        assert!(folder.0.join("empty/model.safetensors").exists());
    }
}
