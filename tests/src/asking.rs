//! `fednano ask`: the answer comes token by token, is the model's own, and the server is as it was before.

use anyhow::Context;
use burn::tensor::Device;
use clap::Parser;
use fednano_server::commands::ask;
use fednano_server::datasets::read_picture;
use fednano_server::store::write_adapter;
use fednano_shared::data::picture::Picture;
use fednano_shared::data::scene::{Scene, Style};
use fednano_shared::edge::NanoEdge;
use fednano_shared::generate::{AnswerOptions, InProcessTokens, Sampling, answer};
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::plain::AdapterState;
use fednano_shared::probe;
use fednano_shared::settings::{AdapterChoice, FederationSettings};
use fednano_tests::{Halves, LIMIT, Server, block, halves, nano_llava};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::Notify;

/// It is answered with a caption, so in several tokens.
const QUESTION: &str = "what do you see?";

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: ask::Args,
}

fn arguments(picture: &Path, more: &[&str]) -> anyhow::Result<ask::Args> {
    let picture = picture.display().to_string();
    let mut all = vec!["ask", QUESTION, "--picture", picture.as_str()];
    all.extend_from_slice(more);
    Ok(Cli::try_parse_from(all)?.args)
}

/// Keeps what is written, piece by piece, and says when a piece is there.
#[derive(Default)]
struct Output {
    pieces: Vec<String>,
    unfinished: Vec<u8>,
    piece: Arc<Notify>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.unfinished.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        let piece = std::mem::take(&mut self.unfinished);
        self.pieces.push(String::from_utf8_lossy(&piece).into_owned());
        self.piece.notify_one();
        Ok(())
    }
}

impl Output {
    fn text(&self) -> String {
        format!("{}{}", self.pieces.concat(), String::from_utf8_lossy(&self.unfinished))
    }
}

/// What the model itself answers: the text after each token.
struct Answer(Vec<String>);

impl Answer {
    /// All of it, as it ends on a terminal.
    fn line(&self) -> String {
        self.line_of(self.0.len())
    }

    /// The same of an answer of at most so many tokens.
    fn line_of(&self, tokens: usize) -> String {
        let text = tokens.checked_sub(1).and_then(|last| self.0.get(last));
        format!("{}\n", text.map_or("", String::as_str))
    }

    /// What each token adds.
    fn pieces(&self) -> Vec<String> {
        let mut shown = 0;
        let mut pieces = Vec::new();
        for text in &self.0 {
            pieces.push(text.get(shown..).unwrap_or_default().to_owned());
            shown = text.len();
        }
        pieces
    }
}

/// A server, the same model in this process, and a picture.
struct Stage {
    server: Server,
    own: Halves,
    picture: PathBuf,
    folder: tempfile::TempDir,
}

impl Stage {
    async fn open() -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let data = folder.path().join("server");
        std::fs::create_dir(&data)?;
        let server = Server::start_model(&nano_llava(), FederationSettings::default(), &data).await?;
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let scene = Scene::random(&mut rng, Style::Pretraining, 2..=2);
        let picture = folder.path().join("scene.bmp");
        std::fs::write(&picture, bmp(&scene.render(&mut rng)))?;
        Ok(Self { server, own: halves(&nano_llava(), &Device::flex())?, picture, folder })
    }

    fn link(&self, federation: &str) -> String {
        format!("{}/?federation={federation}", self.server.base)
    }

    fn cache(&self) -> Option<PathBuf> {
        Some(self.folder.path().join("cache"))
    }

    /// Ask the server.
    async fn ask(&self, more: &[&str]) -> anyhow::Result<Output> {
        let link = self.link("test");
        let mut all = vec!["--url", link.as_str()];
        all.extend_from_slice(more);
        let mut out = Output::default();
        ask::run(&arguments(&self.picture, &all)?, self.cache(), &mut out).await?;
        Ok(out)
    }

    /// What comes of a question that cannot be answered.
    async fn fault(&self, picture: &Path, more: &[&str]) -> anyhow::Result<String> {
        let mut out = Output::default();
        let result = ask::run(&arguments(picture, more)?, self.cache(), &mut out).await;
        let words = format!("{:#}", result.err().context("it was answered all the same")?);
        println!("{words}");
        anyhow::ensure!(out.text().is_empty(), "something was answered before: {}", out.text());
        Ok(words)
    }

    /// The same question to the model in this process, always the likeliest token.
    async fn expected(
        &self,
        edge: &NanoEdge,
        adapter: Option<&AdapterState>,
        max_tokens: usize,
    ) -> anyhow::Result<Answer> {
        let device = &self.own.device;
        let adapters = adapter.map(|state| NanoAdapters::from_state(state, device));
        let picture = read_picture(&self.picture).map_err(anyhow::Error::msg)?;
        let features = edge.image_features(&[&picture]).await?.concat();
        let prompt = edge.text.encode(QUESTION, None)?;
        let options = AnswerOptions { max_tokens, sampling: Sampling::GREEDY };
        let mut source = InProcessTokens::new(&self.own.llm);
        let mut grown = Vec::new();
        let whole =
            answer(edge, adapters.as_ref(), (&prompt, &features), options, &mut source, device, |text: &str| {
                grown.push(text.to_owned());
                true
            })
            .await?;
        println!("{whole}");
        Ok(Answer(grown))
    }
}

/// A picture as a BMP file: rows from the bottom, blue first, each filled up to a multiple of 4 bytes.
fn bmp(picture: &Picture) -> Vec<u8> {
    let (width, height) = (picture.width, picture.height);
    let row = (width * 3).next_multiple_of(4);
    let mut file = b"BM".to_vec();
    for value in [54 + row * height, 0, 54, 40, width, height] {
        file.extend((value as u32).to_le_bytes());
    }
    file.extend([1, 0, 24, 0]); // planes, bits a pixel
    file.extend([0; 24]); // not compressed, no palette
    for line in picture.rgb.chunks_exact(width * 3).rev() {
        let end = file.len() + row;
        file.extend(line.chunks_exact(3).flat_map(|p| [p[2], p[1], p[0]]));
        file.resize(end, 0);
    }
    file
}

/// Over a server: each token as it comes, no more than asked for, and what the model says in this process.
pub fn streamed() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open().await?;
        let expected = stage.expected(&stage.server.app.held_out.edge, None, 128).await?;
        anyhow::ensure!(expected.0.len() >= 3, "an answer of {} tokens shows nothing", expected.0.len());
        let said = stage.ask(&[]).await?;
        anyhow::ensure!(said.text() == expected.line(), "'{}' instead of '{}'", said.text(), expected.line());
        anyhow::ensure!(said.pieces == expected.pieces(), "{:?} instead of {:?}", said.pieces, expected.pieces());
        for most in [0, 1, 2] {
            let said = stage.ask(&["--max-tokens", &most.to_string()]).await?;
            anyhow::ensure!(said.text() == expected.line_of(most), "'{}' of {most} tokens", said.text());
            anyhow::ensure!(said.pieces.len() == most, "{} tokens instead of {most}", said.pieces.len());
        }
        // Who asks takes no part.
        let status = stage.server.app.federation("test").context("no federation")?.status();
        anyhow::ensure!(status.participants.is_empty(), "{:?}", status.participants);
        stage.server.stop().await
    })
}

/// Adapters from a file are used, over a server as in one process.
pub fn with_adapters() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open().await?;
        let edge = &stage.server.app.held_out.edge;
        let mut state = probe::adapters(8, edge.config.text.hidden);
        // Far from harmless, so that another answer follows.
        for (_, blob) in state.0.iter_mut().filter(|(name, _)| name.ends_with("up")) {
            blob.data.iter_mut().for_each(|v| *v *= 5.0);
        }
        let file = stage.folder.path().join("adapter.safetensors");
        std::fs::write(&file, write_adapter(&state, &[])?)?;
        let plain = stage.expected(edge, None, 12).await?;
        let expected = stage.expected(edge, Some(&state), 12).await?;
        anyhow::ensure!(plain.line() != expected.line(), "the adapters change nothing: nothing is tested");
        let file = file.display().to_string();
        let said = stage.ask(&["--adapter", &file, "--max-tokens", "12"]).await?;
        anyhow::ensure!(said.text() == expected.line(), "'{}' instead of '{}'", said.text(), expected.line());
        stage.server.stop().await
    })
}

/// The whole model on this machine.
pub fn without_a_server() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open().await?;
        let expected = stage.expected(&stage.own.edge, None, 128).await?;
        let model = nano_llava().display().to_string();
        let mut out = Output::default();
        ask::run(&arguments(&stage.picture, &["--model", &model])?, None, &mut out).await?;
        anyhow::ensure!(out.text() == expected.line(), "'{}' instead of '{}'", out.text(), expected.line());
        anyhow::ensure!(out.pieces == expected.pieces(), "{:?} instead of {:?}", out.pieces, expected.pieces());
        stage.server.stop().await
    })
}

/// What is wrong is said with its remedy, and the next question is answered.
pub fn faults() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open().await?;
        let free = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let nobody = format!("http://{free}/?federation=test");
        let (here, elsewhere) = (stage.link("test"), stage.link("elsewhere"));
        let text = stage.folder.path().join("notes.txt");
        std::fs::write(&text, "no picture")?;
        let narrow = stage.folder.path().join("narrow.safetensors");
        std::fs::write(&narrow, write_adapter(&AdapterState::zeros(AdapterChoice::Both, 4, 7), &[])?)?;
        let narrow = narrow.display().to_string();
        let cases: [(&Path, &[&str], &[&str]); 5] = [
            // Said first: nothing was downloaded in vain, and no server is needed for it.
            (Path::new("no-such.png"), &["--url", &nobody], &["no-such.png", "--picture"]),
            (&text, &["--url", &nobody], &["notes.txt", "not PNG", "--picture"]),
            (&stage.picture, &["--url", &nobody], &["cannot fetch", "is the server running"]),
            (&stage.picture, &["--url", &elsewhere], &["no federation 'elsewhere'", "this server has: test"]),
            (
                &stage.picture,
                &["--url", &here, "--adapter", &narrow],
                &["narrow.safetensors holds adapters of width 7"],
            ),
        ];
        for (picture, more, words) in cases {
            let fault = stage.fault(picture, more).await?;
            anyhow::ensure!(words.iter().all(|w| fault.contains(w)), "{words:?} are not in: {fault}");
        }
        let said = stage.ask(&[]).await?;
        anyhow::ensure!(said.text().trim().len() > 1, "no answer after the faults: '{}'", said.text());
        stage.server.stop().await
    })
}

/// Whoever asks and goes away in mid-answer takes nothing along.
pub fn interrupted() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open().await?;
        let whole = stage.ask(&[]).await?.text();
        let link = stage.link("test");
        let args = arguments(&stage.picture, &["--url", &link])?;
        for _ in 0..3 {
            let mut out = Output::default();
            let piece = out.piece.clone();
            tokio::select! {
                done = ask::run(&args, stage.cache(), &mut out) => {
                    anyhow::bail!("the answer was there before it could be interrupted: {done:?}");
                }
                () = piece.notified() => {}
            }
            let begun = out.text();
            anyhow::ensure!(
                !begun.is_empty() && begun.len() < whole.trim_end().len() && whole.starts_with(&begun),
                "'{begun}' is no beginning of '{whole}'"
            );
            let next = stage.ask(&[]).await?.text();
            anyhow::ensure!(next == whole, "'{next}' after an interruption, '{whole}' before");
        }
        stage.server.stop().await
    })
}
