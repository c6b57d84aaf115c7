//! `fednano fetch`: a model from the Hugging Face hub into its cache.

use crate::fetch::{FetchOptions, HUB, Progress, Stage, cache_dir, fetch, hf_home, variable};
use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};
use std::path::PathBuf;

/// Download a model from the Hugging Face hub into its cache (HF_HOME); run again, it goes on where it stopped.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model on the hub: owner/name, such as llava-hf/llava-1.5-7b-hf.
    repo: String,
    /// Branch, tag or commit.
    #[arg(long, default_value = "main")]
    revision: String,
    /// Address of the hub or of a mirror; without it, HF_ENDPOINT or https://huggingface.co.
    #[arg(long)]
    endpoint: Option<String>,
}

/// Run it. It blocks.
///
/// # Errors
/// Whatever keeps the model from being fetched whole.
pub fn main(args: &Args) -> anyhow::Result<()> {
    let endpoint = args.endpoint.clone().or_else(|| variable("HF_ENDPOINT")?.into_string().ok());
    let options = FetchOptions {
        repo: args.repo.clone(),
        revision: args.revision.clone(),
        endpoint: endpoint.unwrap_or_else(|| HUB.to_owned()),
        cache: cache_dir()?,
        token: token(),
        tries: 6,
    };
    println!("{} from {} into {}", options.repo, options.endpoint, options.cache.display());
    let style = ProgressStyle::with_template(
        "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left",
    )?;
    let mut bars = Bars { style, shown: None };
    let dir = fetch(&options, &mut |progress| bars.show(&progress))?;
    println!("{0}\nnext: fednano serve --model {0}", dir.display());
    Ok(())
}

/// The token that Python's huggingface_hub would send: `HF_TOKEN`, or what `hf auth login` has stored.
fn token() -> Option<String> {
    let stored = || {
        let path = variable("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(hf_home().ok()?.join("token")))?;
        std::fs::read_to_string(path).ok()
    };
    let token = variable("HF_TOKEN").and_then(|t| t.into_string().ok()).or_else(stored)?;
    Some(token.trim().to_owned()).filter(|t| !t.is_empty())
}

/// A bar for the file at hand, a line for each file that is through.
struct Bars {
    style: ProgressStyle,
    shown: Option<(String, ProgressBar)>,
}

impl Bars {
    fn show(&mut self, progress: &Progress<'_>) {
        match *progress {
            Progress::Weights(files, bytes) => println!("weights: {files} file(s), {}", DecimalBytes(bytes)),
            Progress::File { file, stage: Stage::Receiving, have, size } => self.at(file.to_owned(), have, size),
            Progress::File { file, stage: Stage::Checking, have, size } => {
                self.at(format!("checking {file}"), have, size);
            }
            Progress::File { file, stage: Stage::Fetched, size, .. } => self.through(file, size, "fetched"),
            Progress::File { file, stage: Stage::Kept, size, .. } => self.through(file, size, "there already"),
            Progress::Again(cause, pause) => {
                let line = format!("{cause}; going on in {} s", pause.as_secs());
                match &self.shown {
                    // Beside the bar, not across it.
                    Some((_, bar)) => bar.suspend(|| eprintln!("{line}")),
                    None => eprintln!("{line}"),
                }
            }
        }
    }

    fn at(&mut self, title: String, have: u64, size: u64) {
        if let Some((shown, bar)) = &self.shown
            && *shown == title
        {
            return bar.set_position(have);
        }
        self.clear();
        let bar = ProgressBar::new(size).with_style(self.style.clone()).with_message(title.clone()).with_position(have);
        // What an earlier run has received says nothing about the speed of this one.
        bar.reset_eta();
        self.shown = Some((title, bar));
    }

    fn through(&mut self, file: &str, size: u64, how: &str) {
        self.clear();
        println!("{file}: {}, {how}", DecimalBytes(size));
    }

    fn clear(&mut self) {
        if let Some((_, bar)) = self.shown.take() {
            bar.finish_and_clear();
        }
    }
}
