//! Against PyTorch and transformers, through `fednano check`'s own comparison: `tests/fixtures/tiny-llava` and its variants, made by
//! `tests/fixtures/make_fixture.py`; then the same with planted mistakes, which must not pass.

use anyhow::{Context, ensure};
use burn::tensor::Device;
use fednano_server::check::report::{Report, Verdict};
use fednano_server::check::{compare, finite};
use fednano_server::device::DeviceChoice;
use fednano_shared::config::{Activation, FeatureSelect};
use fednano_shared::edge::NanoEdge;
use fednano_shared::model::checkpoint::{Weights, canonical, load_llm};
use fednano_shared::model::files::ModelFiles;
use fednano_tests::{fixture, repository};
use safetensors::{Dtype, SafeTensors, serialize, tensor::TensorView};
use std::path::{Path, PathBuf};

/// What the model is not meant to compute, or the reference was given.
const NOT_COMPUTED: [&str; 3] = ["vision.", "adapter.image.", "adapter.text."];

fn against_reference(files: &ModelFiles, dir: &Path, device: &Device) -> anyhow::Result<Report> {
    compare(files, dir, &std::fs::read(dir.join("expected.safetensors"))?, device)
}

/// Every tensor that is computed here is compared, and within its limit.
fn passes(dir: &Path, device: &Device) -> anyhow::Result<()> {
    let report = against_reference(&ModelFiles::open(dir)?, dir, device)?;
    println!("{}\n{report}", dir.display());
    report.result()?;
    let skipped: Vec<&str> = report
        .rows
        .iter()
        .filter(|r| r.verdict == Verdict::NotComputed && !NOT_COMPUTED.iter().any(|n| r.name.starts_with(n)))
        .map(|r| r.name.as_str())
        .collect();
    ensure!(skipped.is_empty(), "not compared: {}", skipped.join(", "));
    for name in ["image_u8", "input_ids", "vision.selected", "generate.tokens", "adapter.fisher.text.up"] {
        ensure!(report.row(name).is_some_and(|r| r.verdict == Verdict::Ok), "{name} is not in the report");
    }
    Ok(())
}

fn variant(name: &str) -> PathBuf {
    repository().join("tests/fixtures/variants").join(name)
}

/// Fewer variants would leave knobs of published checkpoints untested.
const VARIANTS: usize = 8;

fn all_variants(device: &Device) -> anyhow::Result<()> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(variant("")).context("tests/fixtures/variants is missing")? {
        let path = entry?.path();
        if path.is_dir() {
            found.push(path);
        }
    }
    found.sort();
    ensure!(found.len() >= VARIANTS, "only {} variants, there must be {VARIANTS}: {found:?}", found.len());
    let faults: Vec<String> =
        found.iter().filter_map(|dir| passes(dir, device).err().map(|e| format!("{}: {e:#}", dir.display()))).collect();
    ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

pub fn tiny_on_flex() -> anyhow::Result<()> {
    passes(&fixture(), &Device::flex())
}

pub fn tiny_on_wgpu() -> anyhow::Result<()> {
    passes(&fixture(), &DeviceChoice::Wgpu.open()?.0)
}

pub fn variants_on_flex() -> anyhow::Result<()> {
    all_variants(&Device::flex())
}

pub fn variants_on_wgpu() -> anyhow::Result<()> {
    all_variants(&DeviceChoice::Wgpu.open()?.0)
}

/// Without reference values: it runs, and says that nothing was compared.
pub fn without_reference() -> anyhow::Result<()> {
    let report = finite(&ModelFiles::open(&fixture())?, &Device::flex())?;
    report.result()?;
    ensure!(report.rows.iter().all(|r| r.deviation.is_none() && r.note == "finite"), "{report}");
    Ok(())
}

// ------------------------------------------------------------------------------------ planted mistakes

/// Plant a mistake; rows that must show it and rows that it cannot reach.
fn planted(
    dir: &Path,
    plant: impl FnOnce(&mut ModelFiles) -> anyhow::Result<()>,
    shown: &[&str],
    untouched: &[&str],
) -> anyhow::Result<()> {
    let mut files = ModelFiles::open(dir)?;
    plant(&mut files)?;
    let report = against_reference(&files, dir, &Device::flex())?;
    println!("{report}");
    let failed = report.failed();
    println!("rows that failed: {}", failed.join(", "));
    ensure!(report.result().is_err(), "the mistake passed");
    for name in shown {
        ensure!(failed.contains(name), "{name} does not show the mistake; rows that failed: {}", failed.join(", "));
    }
    for name in untouched {
        ensure!(report.row(name).is_some_and(|r| r.verdict == Verdict::Ok), "{name} failed, or is not in the report");
    }
    Ok(())
}

/// A tensor of a weight file.
struct Stored {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    fn value_bytes(&self) -> usize {
        self.bytes.len() / self.shape.iter().product::<usize>().max(1)
    }

    /// Blocks of `size` bytes in another order: the new block i is the old block `order[i]`.
    fn reorder(bytes: &[u8], size: usize, order: &[usize]) -> Vec<u8> {
        order.iter().flat_map(|i| &bytes[i * size..(i + 1) * size]).copied().collect()
    }

    fn transpose(&mut self) -> anyhow::Result<()> {
        let [rows, cols] = self.shape[..] else {
            anyhow::bail!("{} is no matrix", self.name);
        };
        ensure!(rows == cols, "{} is not square, so the loader would notice", self.name);
        let order: Vec<usize> = (0..rows * cols).map(|i| i % rows * cols + i / rows).collect();
        self.bytes = Self::reorder(&self.bytes, self.value_bytes(), &order);
        Ok(())
    }
}

fn tensors_of(path: &Path) -> anyhow::Result<Vec<Stored>> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let parsed = SafeTensors::deserialize(&bytes)?;
    let stored = parsed.iter().map(|(name, view)| Stored {
        name: name.to_owned(),
        dtype: view.dtype(),
        shape: view.shape().to_vec(),
        bytes: view.data().to_vec(),
    });
    let mut stored: Vec<Stored> = stored.collect();
    // The file's own order is lost in parsing.
    stored.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(stored)
}

fn file_of<'a>(tensors: impl IntoIterator<Item = &'a Stored>) -> anyhow::Result<Vec<u8>> {
    let mut views = Vec::new();
    for t in tensors {
        views.push((t.name.as_str(), TensorView::new(t.dtype, t.shape.clone(), &t.bytes)?));
    }
    Ok(serialize(views, None)?)
}

/// The weights of a directory with one file, changed; `edit` is told canonical names and says whether it changed anything.
fn edited(dir: &Path, mut edit: impl FnMut(&str, &mut Stored) -> anyhow::Result<bool>) -> anyhow::Result<Weights> {
    let mut tensors = tensors_of(&dir.join("model.safetensors"))?;
    let mut changed = 0;
    for t in &mut tensors {
        changed += usize::from(edit(&canonical(&t.name), t)?);
    }
    ensure!(changed > 0, "no tensor was changed");
    Ok(Weights::from_files(vec![("model.safetensors".into(), file_of(&tensors)?)])?)
}

pub fn untransposed_matrix() -> anyhow::Result<()> {
    let dir = fixture();
    let plant = |files: &mut ModelFiles| -> anyhow::Result<()> {
        files.weights = edited(&dir, |name, t| {
            let meant = name == "language_model.layers.1.self_attn.q_proj.weight";
            if meant {
                t.transpose()?;
            }
            Ok(meant)
        })?;
        Ok(())
    };
    let shown =
        ["llm.layer_output.1", "logits", "grad.inputs_embeds", "grad.inputs_embeds@image", "adapter.grad.text.up"];
    planted(&dir, plant, &shown, &["llm.layer_output.0", "image_features", "inputs_embeds"])
}

/// With query heads permuted, grouped key-value heads compute what tiled ones would with the heads in order.
pub fn tiled_heads() -> anyhow::Result<()> {
    let dir = variant("gqa");
    let plant = |files: &mut ModelFiles| -> anyhow::Result<()> {
        let text = files.config.text.clone();
        let groups = text.heads / text.kv_heads;
        ensure!(groups > 1 && text.kv_heads > 1, "variants/gqa needs 2 or more groups of 2 or more heads");
        let heads: Vec<usize> = (0..text.heads).map(|h| h / groups + h % groups * text.kv_heads).collect();
        files.weights = edited(&dir, |name, t| {
            let head_bytes = text.head_dim * t.value_bytes();
            if name.ends_with("self_attn.q_proj.weight") && name.starts_with("language_model.") {
                t.bytes = Stored::reorder(&t.bytes, head_bytes * text.hidden, &heads); // rows [H*E, D]
                Ok(true)
            } else if name.ends_with("self_attn.o_proj.weight") {
                let rows = t.bytes.chunks_exact(head_bytes * text.heads); // columns [D, H*E]
                t.bytes = rows.flat_map(|row| Stored::reorder(row, head_bytes, &heads)).collect();
                Ok(true)
            } else {
                Ok(false)
            }
        })?;
        Ok(())
    };
    let shown = ["llm.layer_output.0", "logits", "grad.inputs_embeds", "adapter.logits", "adapter.fisher.image.down"];
    planted(&dir, plant, &shown, &["vision.selected", "inputs_embeds"])
}

pub fn tanh_gelu_in_the_projector() -> anyhow::Result<()> {
    let plant = |files: &mut ModelFiles| -> anyhow::Result<()> {
        files.config.projector_activation = Activation::GeluTanh;
        Ok(())
    };
    planted(&fixture(), plant, &["image_features", "inputs_embeds"], &["vision.selected", "logits", "loss"])
}

pub fn wrong_rms_epsilon() -> anyhow::Result<()> {
    let plant = |files: &mut ModelFiles| -> anyhow::Result<()> {
        ensure!(files.config.text.eps == 1e-5, "tiny-llava's epsilon is another one");
        files.config.text.eps = 1e-6;
        Ok(())
    };
    let shown =
        ["llm.layer_output.0", "logits", "loss", "grad.inputs_embeds", "adapter.grad.image.up", "adapter.logits"];
    planted(&fixture(), plant, &shown, &["image_features", "inputs_embeds"])
}

pub fn wrong_layer_norm_epsilon() -> anyhow::Result<()> {
    let plant = |files: &mut ModelFiles| -> anyhow::Result<()> {
        ensure!(files.config.vision.eps > 1e-4, "variants/eps needs an epsilon that shows");
        files.config.vision.eps = 1e-5;
        Ok(())
    };
    let shown = ["vision.hidden_states.0", "vision.selected", "image_features", "inputs_embeds"];
    planted(&variant("eps"), plant, &shown, &["input_ids", "logits"])
}

/// One image feature too many: misshapen rows, no panic.
pub fn class_token_kept() -> anyhow::Result<()> {
    let plant = |files: &mut ModelFiles| -> anyhow::Result<()> {
        files.config.feature_select = FeatureSelect::Full;
        Ok(())
    };
    let shown = ["vision.selected", "image_features", "inputs_embeds", "image_mask"];
    planted(&fixture(), plant, &shown, &["vision.hidden_states.2", "logits"])
}

// ------------------------------------------------------------------------------------ files of a checkpoint

/// tiny-llava without its weights.
fn small_files() -> anyhow::Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    for entry in std::fs::read_dir(fixture())? {
        let entry = entry?;
        let weights = entry.file_name().to_string_lossy().ends_with(".safetensors");
        if entry.file_type()?.is_file() && !weights {
            std::fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
        }
    }
    Ok(folder)
}

/// Client's and server's half, or the loader's words.
fn load(dir: &Path) -> Result<(), String> {
    let device = Device::flex();
    let files = ModelFiles::open(dir).map_err(|e| e.to_string())?;
    NanoEdge::load(&files, &device).map_err(|e| e.to_string())?;
    load_llm(&files.config, &files.weights, &device).map_err(|e| e.to_string())?;
    Ok(())
}

pub fn shards() -> anyhow::Result<()> {
    let folder = small_files()?;
    let tensors = tensors_of(&fixture().join("model.safetensors"))?;
    let names =
        ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"];
    let mut map = serde_json::Map::new();
    for (i, name) in names.iter().enumerate() {
        let part: Vec<&Stored> = tensors.iter().skip(i).step_by(names.len()).collect();
        map.extend(part.iter().map(|t| (t.name.clone(), serde_json::json!(name))));
        std::fs::write(folder.path().join(name), file_of(part)?)?;
    }
    let index =
        |map: serde_json::Map<String, serde_json::Value>| serde_json::json!({"metadata": {}, "weight_map": map});
    let path = folder.path().join("model.safetensors.index.json");
    std::fs::write(&path, index(map.clone()).to_string())?;
    let files = ModelFiles::open(folder.path())?;
    ensure!(files.weights.names().count() == tensors.len(), "not all shards are read");
    against_reference(&files, &fixture(), &Device::flex())?.result()?;

    std::fs::remove_file(folder.path().join(names[1]))?;
    let words = load(folder.path()).err().context("a shard is missing and it loads")?;
    ensure!(words.contains(names[1]), "{words}");
    // The same shard left out of the index as well: its tensors, all in one list.
    map.retain(|_, file| *file != names[1]);
    std::fs::write(&path, index(map).to_string())?;
    let words = load(folder.path()).err().context("a third of the tensors is missing and it loads")?;
    ensure!(words.matches("missing").count() > 5, "{words}");
    Ok(())
}

pub fn unexpected_tensors() -> anyhow::Result<()> {
    let folder = small_files()?;
    let mut tensors = tensors_of(&fixture().join("model.safetensors"))?;
    let extra =
        ["language_model.model.layers.0.self_attn.q_proj.bias", "language_model.model.layers.9.mlp.up_proj.weight"];
    for name in extra {
        tensors.push(Stored { name: name.into(), dtype: Dtype::F32, shape: vec![2], bytes: vec![0; 8] });
    }
    std::fs::write(folder.path().join("model.safetensors"), file_of(&tensors)?)?;
    let words = load(folder.path()).err().context("tensors that config.json does not describe were ignored")?;
    for name in extra {
        ensure!(words.contains(&canonical(name)), "{name} is not in: {words}");
    }
    Ok(())
}

pub fn unknown_architecture() -> anyhow::Result<()> {
    let folder = small_files()?;
    std::fs::copy(fixture().join("model.safetensors"), folder.path().join("model.safetensors"))?;
    let path = folder.path().join("config.json");
    let config = std::fs::read_to_string(&path)?;
    for (from, to) in
        [("\"llava\"", "\"qwen2_vl\""), ("\"llama\"", "\"mistral\""), ("clip_vision_model", "siglip_model")]
    {
        ensure!(config.contains(from), "tiny-llava's config.json has no {from}");
        std::fs::write(&path, config.replace(from, to))?;
        let words = load(folder.path()).err().with_context(|| format!("{to} was loaded"))?;
        ensure!(words.contains(to.trim_matches('"')) && words.contains("supported"), "{words}");
    }
    Ok(())
}
