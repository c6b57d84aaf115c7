//! Against PyTorch and transformers, through `fednano check`'s own comparison: `tests/fixtures/tiny-llava` and its variants, made by
//! `tests/fixtures/make_fixture.py`; then the same with planted mistakes, which must not pass.

use anyhow::{Context, ensure};
use burn::tensor::{DType, Device};
use fednano_server::check::report::{Report, Verdict};
use fednano_server::check::{compare, finite};
use fednano_server::device::{ComputeDtype, DeviceChoice};
use fednano_shared::boundary::{BoundaryReply, Gradient};
use fednano_shared::check::reference::{Inputs, Reference};
use fednano_shared::config::{Activation, FeatureSelect};
use fednano_shared::edge::NanoEdge;
use fednano_shared::model::checkpoint::{Weights, canonical, load_llm};
use fednano_shared::model::files::ModelFiles;
use fednano_shared::plain::{AdapterState, TensorBlob};
use fednano_shared::step::FrozenLlm;
use fednano_tests::{LIMIT, block, deviation, fixture, repository};
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
    // What comes of codes and matrices is held to the same values within the same limits.
    for kind in ["grad", "fisher"] {
        for name in AdapterState::NAMES {
            let whole = format!("adapter.{kind}.{name}");
            let short = format!("{whole}@low-rank");
            let row = |name: &str| report.row(name).with_context(|| format!("{name} is not in the report"));
            let (whole, short) = (row(&whole)?, row(&short)?);
            ensure!(short.verdict == Verdict::Ok && short.deviation.is_some(), "{} is {}", short.name, short.verdict);
            ensure!(
                short.limit == whole.limit,
                "{} has the limit {:?}, not {:?}",
                short.name,
                short.limit,
                whole.limit
            );
        }
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

    // A file that lacks what the index says is in it, and a tensor that no file has.
    let misplaced = [(tensors[0].name.as_str(), names[1]), ("language_model.model.nowhere", names[2])];
    let mut wrong = map.clone();
    wrong.extend(misplaced.iter().map(|(tensor, file)| ((*tensor).to_owned(), serde_json::json!(file))));
    std::fs::write(&path, index(wrong).to_string())?;
    let words = load(folder.path()).err().context("an index was believed that names what is not there")?;
    for (tensor, file) in misplaced {
        let said = |line: &str| line.contains(&canonical(tensor)) && line.contains("missing") && line.contains(file);
        ensure!(words.lines().any(said), "{tensor} in {file} is not in: {words}");
    }

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

/// What published files carry beside is accepted; anything else that is wrong, in any part, is in one list.
pub fn unexpected_tensors() -> anyhow::Result<()> {
    let folder = small_files()?;
    let path = folder.path().join("model.safetensors");
    let mut tensors = tensors_of(&fixture().join("model.safetensors"))?;
    let zeros = |name: &str, dtype: Dtype, bytes: usize| Stored {
        name: name.into(),
        dtype,
        shape: vec![2],
        bytes: vec![0; 2 * bytes],
    };
    tensors.push(zeros("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", Dtype::F32, 4));
    tensors.push(zeros("vision_tower.vision_model.embeddings.position_ids", Dtype::I64, 8));
    std::fs::write(&path, file_of(&tensors)?)?;
    std::fs::write(folder.path().join("adapter.safetensors"), "not among the weights")?;
    load(folder.path()).map_err(anyhow::Error::msg)?;

    let unexpected = [
        "language_model.model.layers.0.self_attn.q_proj.bias",
        "language_model.model.layers.9.mlp.up_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_norm.weight",
        "vision_tower.vision_model.encoder.layers.99.layer_norm1.bias",
        "multi_modal_projector.linear_3.weight",
        "image_newline",
    ];
    tensors.extend(unexpected.iter().map(|name| zeros(name, Dtype::F32, 4)));
    let (missing, misshapen, unread, twice) = (
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.pre_layrnorm.bias",
        "language_model.model.norm.weight",
        "language_model.model.embed_tokens.weight",
    );
    tensors.retain(|t| t.name != missing);
    for t in &mut tensors {
        if t.name == misshapen {
            t.shape.insert(0, 1);
        } else if t.name == unread {
            t.dtype = Dtype::I32; // as wide as f32
        }
    }
    tensors.push(zeros("model.language_model.embed_tokens.weight", Dtype::F32, 4));
    std::fs::write(&path, file_of(&tensors)?)?;
    let words = load(folder.path()).err().context("tensors that config.json does not describe were ignored")?;
    let expected = [(missing, "missing"), (misshapen, "expected"), (unread, "I32"), (twice, "twice")];
    for (name, fault) in unexpected.map(|name| (name, "not part of the model")).into_iter().chain(expected) {
        let said = |line: &str| line.contains(&canonical(name)) && line.contains(fault);
        ensure!(words.lines().any(said), "{name}: {fault} is not in: {words}");
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

// ------------------------------------------------------------------------------------ the decoder in two bytes a weight

/// A type, and how far from f32 it may be: loss of a row, gradient at the boundary, logits behind a cache. Each limit is about three
/// times what an independent calculation with rounding after every operation gave for tiny-llava, the farthest off.
const HALVES: [(DType, f64, f64, f64); 2] = [(DType::F16, 2e-3, 0.1, 0.03), (DType::BF16, 1e-2, 0.4, 0.15)];

/// Loss and gradient of the reference's own batch, and the logits behind its first row, most of which comes from a cache.
async fn decoder_in(dtype: DType, files: &ModelFiles, inputs: &Inputs) -> anyhow::Result<(BoundaryReply, Vec<f32>)> {
    let device = Device::flex().autodiff();
    let llm = load_llm(&files.config, &files.weights, (&device, dtype))?;
    ensure!(llm.dtype() == dtype, "loaded in {:?}", llm.dtype());
    let llm = FrozenLlm::new(llm, &files.config.text, &device);
    let reply = llm.train(&[&inputs.request(&inputs.embeds)]).await?.pop().context("no reply")?;
    let (length, dim) = (inputs.lengths[0], inputs.dim);
    let part = |from: usize, to: usize| TensorBlob {
        shape: vec![1, to - from, dim],
        data: inputs.embeds.data[from * dim..to * dim].to_vec(),
    };
    let mut cache = llm.new_cache();
    llm.next_logits(&mut cache, &part(0, length - 2)).await?;
    llm.next_logits(&mut cache, &part(length - 2, length - 1)).await?;
    Ok((reply, llm.next_logits(&mut cache, &part(length - 1, length)).await?))
}

/// `g` of every position.
fn whole(reply: &BoundaryReply) -> anyhow::Result<&[f32]> {
    match &reply.gradient {
        Gradient::Hidden(g) => Ok(&g.data),
        Gradient::Codes(_) => anyhow::bail!("codes were not sent"),
    }
}

/// Near f32, and not f32.
fn off_by(what: &str, got: &[f32], want: &[f32], limit: f64) -> anyhow::Result<()> {
    let off = deviation(got, want);
    println!("{what}: {off:.1e}, limit {limit:.1e}");
    ensure!(off > 0.0, "{what} is what f32 gives, so it was not computed in that type");
    ensure!(off <= limit, "{what} is {off:.2e} off, the limit is {limit:.1e}");
    Ok(())
}

pub fn half_types() -> anyhow::Result<()> {
    block(LIMIT, async {
        // Grouped heads and a tied head as well.
        for dir in [fixture(), variant("gqa"), variant("tied")] {
            let files = ModelFiles::open(&dir)?;
            let reference = Reference::parse(&std::fs::read(dir.join("expected.safetensors"))?)?;
            let inputs = Inputs::of(&reference, &files.config)?;
            let (want, want_logits) = decoder_in(DType::F32, &files, &inputs).await?;
            for (dtype, loss, gradient, logits) in HALVES {
                let (got, got_logits) = decoder_in(dtype, &files, &inputs).await?;
                let what = |part: &str| format!("{} {} {part}", dir.display(), dtype.name());
                off_by(&what("loss"), &got.row_loss, &want.row_loss, loss)?;
                off_by(&what("gradient"), whole(&got)?, whole(&want)?, gradient)?;
                off_by(&what("logits"), &got_logits, &want_logits, logits)?;
            }
        }
        Ok(())
    })
}

/// WGSL has no bf16.
pub fn lacking_type() -> anyhow::Result<()> {
    let (device, name) = DeviceChoice::Wgpu.open()?;
    let stored_so = variant("bf16");
    let chosen = ComputeDtype::Bf16.choose(&stored_so, &device, &name);
    let words = chosen.err().with_context(|| format!("{name} computes in bf16"))?.to_string();
    ensure!(words.contains(&name) && words.contains("in bf16") && words.contains("--dtype auto or f32"), "{words}");
    // Nobody asked for it, so nothing is refused.
    ensure!(ComputeDtype::Auto.choose(&stored_so, &device, &name)? == DType::F32);
    Ok(())
}
