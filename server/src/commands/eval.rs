//! `fednano eval`: how good adapters are on a data set, beside the untouched model and answers that never look.

use crate::datasets;
use crate::device::{ComputeDtype, DeviceChoice};
use crate::edge_bundle;
use crate::fetch::resolve_model;
use crate::held_out::HeldOut;
use crate::llm_host::{self, Order};
use crate::store::{AdapterFile, TemporaryFolder};
use anyhow::Context;
use burn::tensor::Device;
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::data::dataset::Dataset;
use fednano_shared::data::picture::Preprocess;
use fednano_shared::edge::NanoEdge;
use fednano_shared::model::checkpoint::load_llm;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::step::{Evaluation, FrozenLlm};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// Measure adapters on a data set: accuracy and loss, beside the untouched model and the best answers without looking.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model directory (or a hub id fetched earlier).
    #[arg(long)]
    model: String,
    /// Adapter file, of `fednano export` or `fednano join --save`.
    #[arg(long)]
    adapter: PathBuf,
    /// Folder with train/ and test/ (measured on test/, answers without looking learned from train/); or a question file, or a
    /// folder that holds one.
    #[arg(long)]
    data: PathBuf,
    /// Samples at most, drawn from a fixed seed (0: all).
    #[arg(long, default_value_t = 0)]
    limit: usize,
    /// Where to compute.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceChoice,
    /// Type of the LLM's weights and of what is computed with them.
    #[arg(long, value_enum, default_value = "auto")]
    dtype: ComputeDtype,
    /// Form of the client's half of the model: f16, int8 or int4; without it, the one that the adapter file names, or f16.
    #[arg(long)]
    edge_dtype: Option<EdgeDtype>,
    /// Data folder of a server on this machine: its prepared client's half is used instead of preparing one anew.
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Measure adapters that were trained with another model or form, too.
    #[arg(long)]
    any_model: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What comes out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Model directory.
    pub model: String,
    /// Adapter file.
    pub adapter: String,
    /// What that file says about itself.
    pub metadata: BTreeMap<String, String>,
    /// The adapters were trained with this very model and form; none where the file does not say.
    pub fits: Option<bool>,
    /// Form of the client's half that was measured with.
    pub edge_dtype: EdgeDtype,
    /// With the adapters.
    pub tuned: Evaluation,
    /// The untouched model.
    pub zero_shot: Evaluation,
    /// Answers without looking.
    pub baselines: Baselines,
}

/// Shares of right answers without looking at a picture.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Baselines {
    /// Always the most frequent answer.
    pub constant: f64,
    /// The most frequent answer to the same question.
    pub question_only: f64,
    /// Frequent in a training set; otherwise in the measured samples themselves, which is more than can be known.
    pub from_training: bool,
}

/// Run it.
///
/// # Errors
/// A model, adapter file or data set that cannot be used, or that do not belong together.
pub async fn main(args: &Args) -> anyhow::Result<()> {
    let report = evaluate(args).await?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    Ok(())
}

/// Measure.
///
/// # Errors
/// As [`main`].
pub async fn evaluate(args: &Args) -> anyhow::Result<Report> {
    let dir = resolve_model(&args.model)?;
    let files = ModelFiles::open(&dir).with_context(|| format!("the model {} cannot be used", args.model))?;
    let (data, baselines) = open_data(args, &files.preprocess)?;
    let file = AdapterFile::open(&args.adapter, files.config.text.hidden)?;
    let edge_dtype = form(args, &file)?;
    let temporary;
    let cache = match &args.data_dir {
        Some(folder) => folder.as_path(),
        None => {
            temporary = TemporaryFolder::create("eval")?;
            temporary.path()
        }
    };
    let bundle = edge_bundle::prepare(&dir, &files, edge_dtype, cache, |_, _| {})?;
    let fits = file.metadata.get(AdapterFile::MODEL).map(|model| *model == bundle.model_hash);
    anyhow::ensure!(
        fits != Some(false) || args.any_model,
        "{} was trained with another model than {} in {edge_dtype}, or with another form of it; name the model and the --edge-dtype of its federation, or measure it all the same with --any-model",
        args.adapter.display(),
        args.model
    );
    let (device, device_name) = args.device.open()?;
    let dtype = args.dtype.choose(&dir, &device, &device_name)?;
    let held_out = encode(bundle.edge(&device)?, &data, &device).await?;
    let autodiff = device.autodiff();
    let llm =
        FrozenLlm::new(load_llm(&files.config, &files.weights, (&autodiff, dtype))?, &files.config.text, &autodiff);
    let llm = llm_host::start(llm, Order::Arrival { merge: false })?;
    drop(files);
    let adapter = file.adapter;
    let measured = tokio::task::spawn_blocking(move || -> Result<_, String> {
        let zero_shot = held_out.evaluate(None, &held_out.rows, &llm)?;
        Ok((zero_shot, held_out.evaluate(Some(&adapter), &held_out.rows, &llm)?))
    });
    let (zero_shot, tuned) = measured.await?.map_err(|cause| anyhow::anyhow!("it cannot be measured: {cause}"))?;
    Ok(Report {
        model: args.model.clone(),
        adapter: args.adapter.display().to_string(),
        metadata: file.metadata,
        fits,
        edge_dtype,
        tuned,
        zero_shot,
        baselines,
    })
}

/// The samples to measure with, and what answers without looking would reach on them.
fn open_data(args: &Args, preprocess: &Preprocess) -> anyhow::Result<(Dataset, Baselines)> {
    let (train, test) = if datasets::has_splits(&args.data) {
        let splits = datasets::open_splits(&args.data, preprocess)?;
        (Some(splits.train), splits.test)
    } else {
        (None, datasets::open(&args.data, preprocess)?)
    };
    let test = match args.limit {
        0 => test,
        limit => test.limit(limit, &mut ChaCha8Rng::seed_from_u64(0)),
    };
    let known = train.as_ref().unwrap_or(&test);
    let baselines = Baselines {
        constant: Dataset::constant_baseline(known, &test),
        question_only: Dataset::question_only_baseline(known, &test),
        from_training: train.is_some(),
    };
    Ok((test, baselines))
}

/// The form of the client's half: as asked for, as the file says, or the usual one.
fn form(args: &Args, file: &AdapterFile) -> anyhow::Result<EdgeDtype> {
    if let Some(form) = args.edge_dtype {
        return Ok(form);
    }
    let word = file.metadata.get(AdapterFile::EDGE_DTYPE).map(|word| word.parse::<EdgeDtype>());
    let form = word.transpose().with_context(|| format!("{} is of a newer fednano", args.adapter.display()))?;
    Ok(form.unwrap_or(EdgeDtype::F16))
}

async fn encode(edge: NanoEdge, data: &Dataset, device: &Device) -> anyhow::Result<HeldOut> {
    let cache = edge.encode(data, |_, _| {}).await.context("the data set cannot be used")?;
    let rows = (0..cache.samples.len()).collect();
    Ok(HeldOut { edge: Arc::new(edge), cache, rows, device: device.clone() })
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |share: f64| format!("{:.1} %", share * 100.0);
        let word = |key: &str| self.metadata.get(key).map_or("?", String::as_str);
        let (tuned, zero_shot) = (self.tuned, self.zero_shot);
        writeln!(f, "{} on {} ({}):", self.adapter, self.model, self.edge_dtype)?;
        if self.metadata.contains_key(AdapterFile::FEDERATION) {
            writeln!(
                f,
                "  round {} of federation '{}', {}, rank {}, adapters: {}",
                word(AdapterFile::ROUND),
                word(AdapterFile::FEDERATION),
                word(AdapterFile::STRATEGY),
                word(AdapterFile::RANK),
                word(AdapterFile::ADAPTERS)
            )?;
        }
        match self.fits {
            Some(true) => {}
            Some(false) => writeln!(f, "  trained with another model or form: these figures are not the federation's")?,
            None => writeln!(f, "  the file does not say which model they were trained with")?,
        }
        writeln!(f, "tuned: {} of {} samples (loss {:.3})", percent(tuned.accuracy), tuned.samples, tuned.loss)?;
        writeln!(f, "zero-shot: {} (loss {:.3})", percent(zero_shot.accuracy), zero_shot.loss)?;
        write!(
            f,
            "best constant answer {}, best question-only answer {} ({})",
            percent(self.baselines.constant),
            percent(self.baselines.question_only),
            if self.baselines.from_training { "of the training samples" } else { "of these samples themselves" }
        )
    }
}
