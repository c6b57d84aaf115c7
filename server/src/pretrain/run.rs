//! Pretraining from first to last step: the eyes alone (dense labels), then the alignment of words, then everything jointly, last with the
//! emphasis on what is learned last.
//!
//! Batches are functions of (seed, step), so a run that was stopped goes on as if it had not been.

use super::corpus::{self, Emphasis, PackedBatch, Stream};
use super::objectives::{self, AlignmentWords, Marked};
use super::tokenizer;
use super::trainee::{Eyes, Speech, weights};
use anyhow::Context;
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use fednano_shared::config::{Activation, FeatureSelect, ModelConfig, TextConfig, VisionConfig};
use fednano_shared::data::picture::Preprocess;
use fednano_shared::data::text::TextCodec;
use fednano_shared::model::checkpoint::{Storage, write};
use indicatif::{ProgressBar, ProgressStyle};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// What is trained, and for how long.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// Seed of start values and corpus.
    pub seed: u64,
    /// Steps of the vision tower alone.
    pub eyes_steps: u64,
    /// Steps of projector and token table alone.
    pub align_steps: u64,
    /// Joint steps.
    pub joint_steps: u64,
    /// Joint steps with the emphasis on what is learned last.
    pub hard_steps: u64,
    /// Pictures a step in the first two stages.
    pub eyes_pictures: usize,
    /// Pictures a step in the joint stage, about 12 questions each.
    pub joint_pictures: usize,
    /// Peak learning rate of the first stage.
    pub eyes_rate: f64,
    /// Learning rate of the second.
    pub align_rate: f64,
    /// Peak learning rate of the joint stage; the eyes take a fifth.
    pub joint_rate: f64,
    /// Peak learning rate of the hard stage.
    pub hard_rate: f64,
    /// Decoder layers.
    pub text_layers: usize,
}

impl Schedule {
    fn total(&self) -> u64 {
        self.eyes_steps + self.align_steps + self.joint_steps + self.hard_steps
    }
}

const PROMPT: &str = "<image>{question}";
const SAVE_EVERY: u64 = 250;
const MARK_EVERY: u64 = 250;
const WARM_UP: u64 = 100;
const CLIP_NORM: f64 = 1.0;

/// The architecture of nano-llava: LLaVA-1.5's, small.
pub fn architecture(vocab: usize, text_layers: usize) -> ModelConfig {
    ModelConfig {
        vision: VisionConfig {
            hidden: 128,
            intermediate: 512,
            layers: 4,
            heads: 4,
            image_size: 64,
            patch_size: 8,
            channels: 3,
            activation: Activation::QuickGelu,
            eps: 1e-5,
        },
        text: TextConfig {
            hidden: 192,
            intermediate: 512,
            layers: text_layers,
            heads: 6,
            kv_heads: 6,
            head_dim: 32,
            vocab,
            max_positions: 256,
            activation: Activation::Silu,
            eps: 1e-5,
            rope_theta: 10000.0,
            tied: false,
        },
        image_token: 3,
        feature_layer: 4,
        feature_select: FeatureSelect::Default,
        projector_activation: Activation::Gelu,
    }
}

/// The small files of the model directory, by name.
pub fn small_files(config: &ModelConfig, tokenizer_json: String) -> BTreeMap<String, Vec<u8>> {
    let json = |v: serde_json::Value| serde_json::to_vec_pretty(&v).unwrap_or_default();
    let size = config.vision.image_size;
    BTreeMap::from([
        ("config.json".to_owned(), config.to_json().into_bytes()),
        ("tokenizer.json".to_owned(), tokenizer_json.into_bytes()),
        (
            "tokenizer_config.json".to_owned(),
            json(serde_json::json!({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",
            "model_max_length": config.text.max_positions})),
        ),
        (
            "special_tokens_map.json".to_owned(),
            json(serde_json::json!({
            "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})),
        ),
        (
            "generation_config.json".to_owned(),
            json(serde_json::json!({
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})),
        ),
        (
            "processor_config.json".to_owned(),
            json(serde_json::json!({
            "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": config.vision.patch_size,
            "vision_feature_select_strategy": "default", "fednano_prompt": PROMPT})),
        ),
        (
            "preprocessor_config.json".to_owned(),
            json(serde_json::json!({
            "image_processor_type": "CLIPImageProcessor", "do_resize": true, "do_center_crop": true, "do_normalize": true,
            "do_rescale": true, "do_convert_rgb": true, "resample": 3, "rescale_factor": 1.0 / 255.0,
            "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size},
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]})),
        ),
    ])
}

/// Where a stopped run stands.
#[derive(Debug, Serialize, Deserialize)]
struct Progress {
    schedule: Schedule,
    step: u64,
    seconds: f64,
}

/// The stages.
#[derive(Debug, Clone, Copy)]
enum Stage {
    Eyes,
    Align,
    Joint,
    Hard,
}

/// Losses and gradients of a step.
#[derive(Default)]
struct StepGradients {
    answers: f32,
    dense: f32,
    alignment: f32,
    eyes: GradientsParams,
    speech: GradientsParams,
}

/// A batch is cut into so many parts, one thread each. Fixed, so that a seed gives the same model on any machine.
const PARTS: usize = 2;

/// Everything that a step changes.
struct Trainer {
    pools: Vec<rayon::ThreadPool>,
    schedule: Schedule,
    config: ModelConfig,
    text: TextCodec,
    preprocess: Preprocess,
    words: AlignmentWords,
    device: Device,
    eyes: Eyes,
    speech: Speech,
    eyes_optimizer: ModuleOptimizer,
    speech_optimizer: ModuleOptimizer,
    files: BTreeMap<String, Vec<u8>>,
}

/// Run (or go on with) pretraining; writes the model directory `out`. Returns the seconds spent training.
///
/// # Errors
/// Files that cannot be read or written; a checkpoint of another schedule.
pub fn run(schedule: Schedule, out: &Path, device: &Device, restart: bool) -> anyhow::Result<f64> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot create {}", out.display()))?;
    let work = out.join("training");
    if restart {
        drop(std::fs::remove_dir_all(&work));
    }
    std::fs::create_dir_all(&work)?;
    let mut trainer = Trainer::new(schedule, device)?;
    let (mut step, mut seconds) = trainer.resume(&work)?;
    let total = trainer.schedule.total();
    let bar = ProgressBar::new(total).with_position(step);
    bar.set_style(ProgressStyle::with_template("{msg}\n{wide_bar} step {pos}/{len}, {elapsed} spent, {eta} left")?);
    bar.reset_eta();
    while step < total {
        let started = Instant::now();
        let line = trainer.step(step)?;
        step += 1;
        seconds += started.elapsed().as_secs_f64();
        bar.set_position(step);
        bar.set_message(line.clone());
        if step.is_multiple_of(50) && !console_is_shown(&bar) {
            println!("step {step}/{total} {seconds:.0} s {line}");
        }
        let joint = step > trainer.schedule.eyes_steps + trainer.schedule.align_steps;
        if joint && step.is_multiple_of(MARK_EVERY) {
            let table = accuracy_line(&trainer.held_out(96)?);
            bar.println(format!("step {step}, {seconds:.0} s, held-out first token: {table}"));
            if !console_is_shown(&bar) {
                println!("step {step}, {seconds:.0} s, held-out first token: {table}");
            }
        }
        if step.is_multiple_of(SAVE_EVERY) || step == total {
            trainer.save(&work, step, seconds)?;
        }
    }
    bar.finish();
    trainer.export(out)?;
    Ok(seconds)
}

fn console_is_shown(bar: &ProgressBar) -> bool {
    !bar.is_hidden()
}

impl Trainer {
    fn new(schedule: Schedule, device: &Device) -> anyhow::Result<Self> {
        let tokenizer = tokenizer::build()?;
        let config = architecture(tokenizer.get_vocab_size(true), schedule.text_layers);
        let json = tokenizer.to_string(true).map_err(|e| anyhow::anyhow!("{e}"))?;
        let files = small_files(&config, json);
        let text = TextCodec::new(
            &config,
            &files["tokenizer.json"],
            Some(&files["generation_config.json"]),
            Some(&files["processor_config.json"]),
        )?;
        let preprocess = Preprocess::from_json(&String::from_utf8_lossy(&files["preprocessor_config.json"]))?;
        let device = device.clone().autodiff();
        let mut rng = Stream::Train(u64::MAX - 2).rng(schedule.seed);
        let optimizer =
            || AdamWConfig::new().with_beta_1(0.9).with_beta_2(0.98).with_epsilon(1e-8).with_weight_decay(0.02).init();
        let pool = || rayon::ThreadPoolBuilder::new().num_threads(1).build();
        Ok(Self {
            pools: (0..PARTS).map(|_| pool()).collect::<Result<_, _>>()?,
            words: AlignmentWords::new(&text)?,
            eyes: Eyes::init(&config, &mut rng, &device),
            speech: Speech::init(&config, &mut rng, &device),
            eyes_optimizer: optimizer(),
            speech_optimizer: optimizer(),
            schedule,
            config,
            text,
            preprocess,
            device,
            files,
        })
    }

    /// One optimiser step; returns a line that tells of it.
    fn step(&mut self, step: u64) -> anyhow::Result<String> {
        let s = &self.schedule;
        let joint_from = s.eyes_steps + s.align_steps;
        let hard_from = joint_from + s.joint_steps;
        let mut rng = Stream::Train(step).rng(s.seed);
        let picture_count = if step < joint_from { s.eyes_pictures } else { s.joint_pictures };
        // One object first, for the eyes only: the language model must learn to look things up from the start.
        let objects = match step {
            _ if step < s.eyes_steps / 8 => 1..=1,
            _ if step >= joint_from && step < joint_from + s.joint_steps * 3 / 10 => 1..=3,
            _ => 1..=4,
        };
        let stage = match step {
            _ if step < s.eyes_steps => Stage::Eyes,
            _ if step < joint_from => Stage::Align,
            _ if step < hard_from => Stage::Joint,
            _ => Stage::Hard,
        };
        let emphasis = if matches!(stage, Stage::Hard) { Emphasis::Hard } else { Emphasis::Even };
        let mut parts = Vec::with_capacity(PARTS);
        for _ in 0..PARTS {
            let pictures = picture_count / PARTS;
            parts.push(corpus::batch(
                &mut rng,
                pictures,
                objects.clone(),
                emphasis,
                &self.config,
                &self.text,
                &self.preprocess,
            )?);
        }
        let gradients = self.gradients(stage, &parts)?;
        let line = format!(
            "{stage:?}: answers {:.3}, dense {:.3}, alignment {:.3}",
            gradients.answers, gradients.dense, gradients.alignment
        );
        let (eyes_rate, speech_rate) = match stage {
            Stage::Eyes => (s.eyes_rate * warm_cosine(step, s.eyes_steps), 0.0),
            Stage::Align => (0.0, s.align_rate),
            Stage::Joint => {
                let rate = s.joint_rate * warm_cosine(step - joint_from, s.joint_steps);
                (rate * 0.2, rate)
            }
            Stage::Hard => {
                let rate = s.hard_rate * warm_cosine(step - hard_from, s.hard_steps);
                (rate * 0.2, rate)
            }
        };
        if eyes_rate > 0.0 {
            let clipped = clipped(gradients.eyes, &self.eyes);
            self.eyes = self.eyes_optimizer.step(eyes_rate, self.eyes.clone(), clipped);
        }
        if speech_rate > 0.0 {
            let clipped = clipped(gradients.speech, &self.speech);
            self.speech = self.speech_optimizer.step(speech_rate, self.speech.clone(), clipped);
        }
        Ok(line)
    }

    /// Forward and backward of each part on a thread of its own, then the mean. burn's elementwise operations use one core,
    /// so this is nearly twice as fast on two cores as one large batch.
    fn gradients(&self, stage: Stage, parts: &[PackedBatch]) -> anyhow::Result<StepGradients> {
        let size = self.config.vision.image_size;
        let results: Vec<StepGradients> = std::thread::scope(|scope| {
            let threads: Vec<_> = parts
                .iter()
                .zip(&self.pools)
                .map(|(batch, pool)| {
                    // Forked: the same parameters as leaves of a graph of their own.
                    let (eyes, speech) = (self.eyes.clone().fork(&self.device), self.speech.clone().fork(&self.device));
                    let (words, device) = (&self.words, &self.device);
                    scope.spawn(move || {
                        pool.install(|| part_gradients(stage, &eyes, &speech, batch, size, words, device))
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|t| t.join().map_err(|_| anyhow::anyhow!("a training thread failed")))
                .collect::<Result<_, _>>()
        })?;
        let share = 1.0 / results.len() as f64;
        let mut mean = StepGradients::default();
        let (mut eyes, mut speech) = (Vec::new(), Vec::new());
        for r in results {
            mean.answers += r.answers * share as f32;
            mean.dense += r.dense * share as f32;
            mean.alignment += r.alignment * share as f32;
            eyes.push(r.eyes);
            speech.push(r.speech);
        }
        mean.eyes = mean_gradients(eyes, &self.eyes, share);
        mean.speech = mean_gradients(speech, &self.speech, share);
        Ok(mean)
    }

    /// Mark held-out scenes of one to four objects, packed.
    fn held_out(&self, scenes: usize) -> anyhow::Result<Vec<Marked>> {
        let device = self.device.clone().inner();
        let (eyes, speech) = (self.eyes.valid(), self.speech.valid());
        let mut rng = Stream::HeldOut.rng(self.schedule.seed);
        let mut marks = Vec::new();
        for _ in 0..scenes / 16 {
            let batch: PackedBatch =
                corpus::batch(&mut rng, 16, 1..=4, Emphasis::Even, &self.config, &self.text, &self.preprocess)?;
            let features = eyes.forward(&batch, self.config.vision.image_size, &device);
            let hidden = speech.forward(&batch, speech.projector.forward(features), 1);
            marks.extend(objectives::mark(objectives::answer_logits(&speech, hidden, &batch, &device), &batch));
        }
        Ok(marks)
    }

    fn save(&self, work: &Path, step: u64, seconds: f64) -> anyhow::Result<()> {
        // A folder of its own per save, renamed into place: a kill leaves the last whole one.
        let (fresh, current) = (work.join("fresh"), work.join("current"));
        drop(std::fs::remove_dir_all(&fresh));
        std::fs::create_dir_all(&fresh)?;
        self.eyes.clone().save_file(fresh.join("eyes"))?;
        self.speech.clone().save_file(fresh.join("speech"))?;
        self.eyes_optimizer.save(fresh.join("eyes-optimizer"))?;
        self.speech_optimizer.save(fresh.join("speech-optimizer"))?;
        let progress = Progress { schedule: self.schedule.clone(), step, seconds };
        std::fs::write(fresh.join("progress.json"), serde_json::to_vec_pretty(&progress)?)?;
        drop(std::fs::remove_dir_all(work.join("old")));
        if current.exists() {
            std::fs::rename(&current, work.join("old"))?;
        }
        std::fs::rename(&fresh, &current)?;
        drop(std::fs::remove_dir_all(work.join("old")));
        Ok(())
    }

    fn resume(&mut self, work: &Path) -> anyhow::Result<(u64, f64)> {
        let Some(from) =
            [work.join("current"), work.join("old")].into_iter().find(|p| p.join("progress.json").exists())
        else {
            return Ok((0, 0.0));
        };
        let progress: Progress = serde_json::from_slice(&std::fs::read(from.join("progress.json"))?)?;
        anyhow::ensure!(
            self.schedule == progress.schedule,
            "{} holds a run with other settings; give the same ones, or --restart to begin anew",
            work.display()
        );
        let at = |name: &str| -> PathBuf { from.join(name) };
        self.eyes = self.eyes.clone().try_load_file(at("eyes"))?;
        self.speech = self.speech.clone().try_load_file(at("speech"))?;
        self.eyes_optimizer = self.eyes_optimizer.clone().load(at("eyes-optimizer"))?;
        self.speech_optimizer = self.speech_optimizer.clone().load(at("speech-optimizer"))?;
        println!("going on at step {} after {:.0} s", progress.step, progress.seconds);
        Ok((progress.step, progress.seconds))
    }

    fn export(&self, out: &Path) -> anyhow::Result<()> {
        for (name, bytes) in &self.files {
            std::fs::write(out.join(name), bytes)?;
        }
        let metadata = [("format".to_owned(), "pt".to_owned()), ("seed".to_owned(), self.schedule.seed.to_string())];
        let bytes = write(&weights(&self.eyes, &self.speech), Storage::F16, &metadata).map_err(anyhow::Error::msg)?;
        let temporary = out.join("model.safetensors.part");
        std::fs::write(&temporary, bytes)?;
        std::fs::rename(temporary, out.join("model.safetensors"))?;
        Ok(())
    }
}

/// One part's losses and gradients.
fn part_gradients(
    stage: Stage,
    eyes: &Eyes,
    speech: &Speech,
    batch: &PackedBatch,
    size: usize,
    words: &AlignmentWords,
    device: &Device,
) -> StepGradients {
    let mut out = StepGradients::default();
    let features = eyes.forward(batch, size, device);
    let loss = match stage {
        Stage::Eyes => {
            let dense = objectives::dense(eyes, features, batch);
            out.dense = scalar(&dense);
            dense
        }
        Stage::Align => {
            let projected = speech.projector.forward(features.detach());
            let alignment = objectives::alignment(speech, projected, batch, words);
            out.alignment = scalar(&alignment);
            alignment
        }
        Stage::Joint | Stage::Hard => {
            let dense = objectives::dense(eyes, features.clone(), batch);
            let projected = speech.projector.forward(features);
            let alignment = objectives::alignment(speech, projected.clone(), batch, words);
            let hidden = speech.forward(batch, projected, 1);
            let answers = objectives::answers(objectives::answer_logits(speech, hidden, batch, device), batch);
            (out.answers, out.dense, out.alignment) = (scalar(&answers), scalar(&dense), scalar(&alignment));
            answers + dense * 0.3 + alignment * 0.5
        }
    };
    let mut gradients = loss.backward();
    out.eyes = GradientsParams::from_module(&mut gradients, eyes);
    out.speech = GradientsParams::from_module(&mut gradients, speech);
    out
}

/// Mean of the parts' gradients for one module.
fn mean_gradients<M: Module>(parts: Vec<GradientsParams>, module: &M, share: f64) -> GradientsParams {
    struct Mean(Vec<GradientsParams>, GradientsParams, f64);
    impl ModuleVisitor for Mean {
        fn visit_float<const N: usize>(&mut self, param: &Param<Tensor<N>>) {
            let all = self.0.iter_mut().filter_map(|p| p.remove::<N>(param.id)).reduce(|a, b| a + b);
            if let Some(sum) = all {
                self.1.register(param.id, sum * self.2);
            }
        }
    }
    let mut mean = Mean(parts, GradientsParams::new(), share);
    module.visit(&mut mean);
    mean.1
}

/// Linear warm-up, then cosine down to 5 %.
fn warm_cosine(step: u64, steps: u64) -> f64 {
    let warm = ((step + 1) as f64 / WARM_UP.min(steps / 10).max(1) as f64).min(1.0);
    let part = step as f64 / steps.max(1) as f64;
    warm * (0.05 + 0.95 * 0.5 * (1.0 + (std::f64::consts::PI * part).cos()))
}

fn scalar(t: &Tensor<1>) -> f32 {
    t.clone().inner().into_scalar::<f32>()
}

/// Scale gradients so that their joint norm is at most [`CLIP_NORM`].
fn clipped<M: Module>(gradients: GradientsParams, module: &M) -> GradientsParams {
    struct Norm<'a>(&'a GradientsParams, Option<Tensor<1>>);
    impl ModuleVisitor for Norm<'_> {
        fn visit_float<const N: usize>(&mut self, param: &Param<Tensor<N>>) {
            if let Some(g) = self.0.get::<N>(param.id) {
                let squares = g.powi_scalar(2).sum();
                self.1 = Some(match self.1.take() {
                    Some(sum) => sum + squares,
                    None => squares,
                });
            }
        }
    }
    struct Scale(GradientsParams, f64);
    impl ModuleVisitor for Scale {
        fn visit_float<const N: usize>(&mut self, param: &Param<Tensor<N>>) {
            if let Some(g) = self.0.remove::<N>(param.id) {
                self.0.register(param.id, g * self.1);
            }
        }
    }
    let mut norm = Norm(&gradients, None);
    module.visit(&mut norm);
    let norm = norm.1.map_or(0.0, |n| f64::from(n.into_scalar::<f32>()).sqrt());
    if norm <= CLIP_NORM {
        return gradients;
    }
    let mut scale = Scale(gradients, CLIP_NORM / norm);
    module.visit(&mut scale);
    scale.0
}

/// Accuracy of first tokens, all and by kind.
pub fn accuracy_line(marks: &[Marked]) -> String {
    let mut kinds: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for m in marks {
        let entry = kinds.entry(m.kind.name()).or_default();
        entry.0 += usize::from(m.first);
        entry.1 += 1;
    }
    let right: usize = kinds.values().map(|k| k.0).sum();
    let share = |a: usize, b: usize| a as f64 / b.max(1) as f64;
    let parts: Vec<String> = kinds.iter().map(|(k, (a, b))| format!("{k} {:.2}", share(*a, *b))).collect();
    format!("all {:.3} ({} questions): {}", share(right, marks.len()), marks.len(), parts.join(", "))
}
