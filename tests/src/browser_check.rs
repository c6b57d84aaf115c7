//! The client's half of the reference checkpoints in headless Chromium, through `shared::check`: on wasm flex and on WebGPU, with the
//! checkpoints' own files, since a bundle rounds to f16. Then planted mistakes, which must not pass.

use crate::browser::{Browser, LIMIT};
use anyhow::{Context, ensure};
use fednano_server::commands::demo::SOFTWARE_WEBGPU;
use fednano_shared::check::report::{Report, Verdict};
use fednano_shared::config::ModelConfig;
use fednano_shared::plain::AdapterState;
use fednano_tests::{block, fixture, repository};
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Rows of every checkpoint, beside hidden states and adapter tensors.
const ROWS: [&str; 14] = [
    "image_u8",
    "pixel_values",
    "pixel_values@image_u8",
    "input_ids",
    "prompt_lengths",
    "labels",
    "attention_mask",
    "vision.selected",
    "image_features",
    "text_embeds",
    "inputs_embeds",
    "image_mask",
    "labels@batch",
    "adapter.inputs_embeds",
];

/// Rows that must be there, compared and within their limits.
fn wanted(dir: &Path) -> anyhow::Result<Vec<String>> {
    let config = ModelConfig::from_json(&std::fs::read_to_string(dir.join("config.json"))?)?;
    let mut rows: Vec<String> = ROWS.iter().map(|row| (*row).to_owned()).collect();
    rows.extend((0..=config.feature_layer).map(|state| format!("vision.hidden_states.{state}")));
    for kind in ["grad", "per_sample_grad", "fisher"] {
        rows.extend(AdapterState::NAMES.iter().map(|name| format!("adapter.{kind}.{name}")));
    }
    Ok(rows)
}

/// The tab's report on a checkpoint, of which some files are replaced.
async fn report(browser: &Browser, dir: &Path, replaced: Replaced, device: &str) -> anyhow::Result<Report> {
    let site = Site::open(dir, replaced)?;
    let text = browser.result(&format!("{}/probe.html?checkpoint=/checkpoint/&device={device}", site.base)).await?;
    let report: Report = serde_json::from_str(&text)?;
    println!("{} in the tab on {device}\n{report}", dir.display());
    Ok(report)
}

async fn pass(dirs: &[PathBuf], device: &str, flags: &[&str]) -> anyhow::Result<()> {
    let browser = Browser::open(flags).await?;
    for dir in dirs {
        let report = report(&browser, dir, Replaced::new(), device).await?;
        report.result().with_context(|| dir.display().to_string())?;
        for name in wanted(dir)? {
            let row = report.row(&name).with_context(|| format!("{}: no row {name}", dir.display()))?;
            ensure!(row.verdict == Verdict::Ok, "{}: {name} is {}: {}", dir.display(), row.verdict, row.note);
        }
    }
    browser.close().await
}

fn variant(name: &str) -> PathBuf {
    repository().join("tests/fixtures/variants").join(name)
}

/// tiny-llava and every variant.
pub fn wasm_flex() -> anyhow::Result<()> {
    let mut dirs = vec![fixture()];
    for entry in std::fs::read_dir(variant("")).context("tests/fixtures/variants is missing")? {
        dirs.push(entry?.path());
    }
    dirs.retain(|dir| dir.is_dir());
    dirs.sort();
    for needed in ["gqa", "bf16", "full"] {
        ensure!(dirs.contains(&variant(needed)), "the variant '{needed}' is missing: {dirs:?}");
    }
    block(LIMIT, pass(&dirs, "cpu", &[]))
}

/// tiny-llava and the variant with most that differs from it.
pub fn webgpu() -> anyhow::Result<()> {
    block(LIMIT, pass(&[fixture(), variant("mixed")], "webgpu", &SOFTWARE_WEBGPU))
}

// ------------------------------------------------------------------------------------ planted mistakes

/// A safetensors file with all values of a tensor negated.
fn negated(path: &Path, tensor: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = std::fs::read(path)?;
    let (header, metadata) = SafeTensors::read_metadata(&bytes)?;
    let info = metadata.info(tensor).with_context(|| format!("{} has no {tensor}", path.display()))?;
    ensure!(info.dtype == Dtype::F32, "{tensor} is stored as {:?}", info.dtype);
    let (start, end) = info.data_offsets;
    let first = 8 + header; // the header's length comes before it
    for value in bytes[first + start..first + end].chunks_exact_mut(4) {
        value[3] ^= 0x80; // the sign
    }
    Ok(bytes)
}

/// A wrong file of a checkpoint, rows that must show it and rows that it cannot reach.
struct Mistake {
    dir: PathBuf,
    file: &'static str,
    bytes: Vec<u8>,
    shown: &'static [&'static str],
    untouched: &'static [&'static str],
}

fn mistakes() -> anyhow::Result<Vec<Mistake>> {
    let (tiny, eps) = (fixture(), variant("eps"));
    let config = std::fs::read_to_string(eps.join("config.json"))?;
    let (right, wrong) = ("\"layer_norm_eps\": 0.01", "\"layer_norm_eps\": 1e-5");
    ensure!(config.contains(right), "variants/eps has another epsilon: {config}");
    let weight = "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight";
    Ok(vec![
        Mistake {
            bytes: config.replace(right, wrong).into_bytes(),
            dir: eps,
            file: "config.json",
            shown: &["vision.hidden_states.0", "vision.selected", "image_features", "inputs_embeds"],
            untouched: &["image_u8", "input_ids", "text_embeds", "adapter.inputs_embeds"],
        },
        Mistake {
            bytes: negated(&tiny.join("model.safetensors"), weight)?,
            dir: tiny.clone(),
            file: "model.safetensors",
            shown: &["vision.hidden_states.1", "vision.selected", "image_features", "inputs_embeds"],
            untouched: &["vision.hidden_states.0", "text_embeds", "adapter.grad.image.down"],
        },
        Mistake {
            bytes: std::fs::read(tiny.join("images/image_0.png"))?,
            dir: tiny.clone(),
            file: "images/image_1.png",
            shown: &["image_u8", "pixel_values"],
            untouched: &["pixel_values@image_u8", "vision.selected"],
        },
        Mistake {
            bytes: negated(&tiny.join("expected.safetensors"), "adapter.text.up")?,
            dir: tiny,
            file: "expected.safetensors",
            shown: &["adapter.inputs_embeds", "adapter.grad.text.down", "adapter.per_sample_grad.text.down"],
            untouched: &["inputs_embeds", "adapter.grad.text.up", "adapter.grad.image.down"],
        },
    ])
}

pub fn planted_mistakes() -> anyhow::Result<()> {
    block(LIMIT, async {
        let browser = Browser::open(&[]).await?;
        for Mistake { dir, file, bytes, shown, untouched } in mistakes()? {
            let report = report(&browser, &dir, Replaced::from([(file, bytes)]), "cpu").await?;
            let failed = report.failed();
            ensure!(report.result().is_err(), "a wrong {file} passed");
            for name in shown {
                ensure!(failed.contains(name), "{name} does not show a wrong {file}; failed: {failed:?}");
            }
            for name in untouched {
                let good = report.row(name).is_some_and(|row| row.verdict == Verdict::Ok);
                ensure!(good, "{name} is not good with a wrong {file}; failed: {failed:?}");
            }
        }
        browser.close().await
    })
}

// ------------------------------------------------------------------------------------ the site

/// Files in the place of a checkpoint's own, by name.
type Replaced = BTreeMap<&'static str, Vec<u8>>;

/// The page, and a checkpoint below /checkpoint/, on a free port until dropped.
struct Site {
    base: String,
    ended: Arc<AtomicBool>,
}

impl Site {
    fn open(checkpoint: &Path, replaced: Replaced) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let base = format!("http://{}", listener.local_addr()?);
        let ended = Arc::new(AtomicBool::new(false));
        let (ends, checkpoint, replaced) = (ended.clone(), checkpoint.to_owned(), Arc::new(replaced));
        std::thread::spawn(move || {
            for browser in listener.incoming().flatten() {
                if ends.load(Relaxed) {
                    return;
                }
                let (checkpoint, replaced) = (checkpoint.clone(), replaced.clone());
                std::thread::spawn(move || {
                    // A browser that goes away only ends its own connection.
                    if let Err(e) = answer(browser, &checkpoint, &replaced) {
                        println!("the site: {e}");
                    }
                });
            }
        });
        Ok(Self { base, ended })
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.ended.store(true, Relaxed);
        drop(TcpStream::connect(self.base.trim_start_matches("http://"))); // wakes the listener
    }
}

/// One request.
fn answer(mut browser: TcpStream, checkpoint: &Path, replaced: &Replaced) -> std::io::Result<()> {
    let mut asked = BufReader::new(browser.try_clone()?);
    let mut request = String::new();
    asked.read_line(&mut request)?;
    // To the empty line: what is left unread would break the connection when it is closed.
    let mut line = String::new();
    while asked.read_line(&mut line)? > 2 {
        line.clear();
    }
    let Some(path) = request.split([' ', '?']).nth(1) else {
        return Ok(()); // opened for later, and never used
    };
    let found = match path.strip_prefix("/checkpoint/") {
        Some(name) => replaced.get(name).cloned().or_else(|| std::fs::read(checkpoint.join(name)).ok()),
        None => std::fs::read(repository().join("www").join(path.trim_start_matches('/'))).ok(),
    };
    let (status, body) = found.map_or(("404 Not Found", Vec::new()), |body| ("200 OK", body));
    let kind = match path.rsplit('.').next() {
        Some("html") => "text/html",
        Some("js") => "text/javascript",
        Some("wasm") => "application/wasm",
        Some("png") => "image/png",
        _ => "application/octet-stream",
    };
    write!(browser, "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n", body.len())?;
    write!(browser, "Connection: close\r\n\r\n")?;
    browser.write_all(&body)
}
