//! Limits: what is too large for one computation is split, with the same result; what is over a limit of the protocol is named
//! with its cause and remedy.

use anyhow::Context;
use burn::tensor::Device;
use fednano_server::llm_host::{self, Bounds, LlmHandle, Order};
use fednano_server::native::SocketConnector;
use fednano_shared::boundary::{
    BoundaryReply, BoundaryRequest, CodesInput, Input, Pair, Part, Positions, Target, Want,
};
use fednano_shared::client::{Connector, Transport};
use fednano_shared::generate::{GenerateRequest, Sampling};
use fednano_shared::ledger::Traffic;
use fednano_shared::plain::TensorBlob;
use fednano_shared::settings::FederationSettings;
use fednano_shared::wire::agreement::BoundaryMode;
use fednano_shared::wire::{self, ClientMessage, FaultCode, Hello, Purpose, ServerMessage};
use fednano_tests::{
    LIMIT, Server, block, close, fixture, get, gradients_close, halves, hello, nano_llava, repository,
};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The same numbers in another order of summation.
const NOISE: f64 = 1e-4;
/// Positions of the longest row.
const SEQ: usize = 12;
/// Targets of each row: some have none, the third has most.
const TARGETS: [u32; 7] = [2, 0, 5, 1, 0, 3, 1];
const RANK: usize = 3;

/// Width and vocabulary of the reference checkpoint.
struct Sizes {
    dim: usize,
    vocab: usize,
}

impl Sizes {
    /// Room for so many rows and targets at once.
    fn bounds(&self, rows: usize, targets: usize) -> Bounds {
        Bounds { attention: rows * SEQ * SEQ, logits: targets * self.vocab }
    }

    /// Rows of different lengths, the answer at the end of each; in mode `low-rank` some have a picture.
    fn request(&self, mode: BoundaryMode) -> BoundaryRequest {
        let rows = TARGETS.len();
        let vocab = self.vocab as u32;
        let answer = |row: u32| {
            let end = SEQ as u32 - row;
            let first = end - TARGETS[row as usize];
            (first..end).map(move |position| Target { row, position, token: (row * 31 + position * 7) % vocab })
        };
        let lengths: Vec<u32> = (0..rows).map(|row| (SEQ - row) as u32).collect();
        let mut positions = Positions::plain(lengths);
        let x = values(&[positions.total(), self.dim], 37);
        let input = match mode {
            BoundaryMode::Activations => Input::Hidden(x),
            BoundaryMode::LowRank => {
                for row in [0, 2, 3] {
                    positions.images[row] = 1..4;
                }
                let codes = |part| Some(values(&[positions.of(part).len(), RANK], 41));
                let up = |factor| Some(values(&[self.dim, RANK], factor));
                Input::Codes(CodesInput {
                    x: Arc::new(x),
                    codes: Pair { image: codes(Part::Image), text: codes(Part::Text) },
                    up: Arc::new(Pair { image: up(43), text: up(47) }),
                })
            }
        };
        let targets = (0..rows as u32).flat_map(answer).collect();
        BoundaryRequest { input, positions, targets, want: Want::Both }
    }
}

/// Some numbers.
fn values(shape: &[usize], factor: usize) -> TensorBlob {
    let value = |i: usize| ((i * factor + i / 11) % 101) as f32 * 0.01 - 0.5;
    TensorBlob { shape: shape.to_vec(), data: (0..shape.iter().product()).map(value).collect() }
}

/// The reference checkpoint's LLM, within bounds that depend on its sizes (none: those of a server).
fn host(bounds: Option<(usize, usize)>) -> anyhow::Result<(LlmHandle, Sizes)> {
    let half = halves(&fixture(), &Device::flex())?;
    let sizes = Sizes { dim: half.files.config.text.hidden, vocab: half.files.config.text.vocab };
    let bounds = bounds.map_or_else(Bounds::default, |(rows, targets)| sizes.bounds(rows, targets));
    Ok((llm_host::start_with(half.llm, Order::Arrival { merge: true }, bounds)?, sizes))
}

fn list(values: &[f32]) -> TensorBlob {
    TensorBlob { shape: vec![values.len()], data: values.to_vec() }
}

fn same(got: &BoundaryReply, want: &BoundaryReply) -> anyhow::Result<()> {
    close("loss", &list(&[got.loss]), &list(&[want.loss]), NOISE)?;
    close("loss of rows", &list(&got.row_loss), &list(&want.row_loss), NOISE)?;
    gradients_close(&got.gradient, &want.gradient, NOISE)
}

/// Bounds that take several parts (for the rows, for the targets, for both) change nothing but the last bits.
pub fn split_equals_whole() -> anyhow::Result<()> {
    block(LIMIT, async {
        for mode in BoundaryMode::ALL {
            println!("{mode}");
            split_equals_whole_in(mode).await?;
        }
        Ok(())
    })
}

async fn split_equals_whole_in(mode: BoundaryMode) -> anyhow::Result<()> {
    let (whole, sizes) = host(None)?;
    let request = sizes.request(mode);
    let trained = whole.train(request.clone()).await.map_err(anyhow::Error::msg)?;
    let evaluated = whole.evaluate(request.clone()).await.map_err(anyhow::Error::msg)?;
    anyhow::ensure!(evaluated.nll.len() == 12, "{} targets", evaluated.nll.len());
    for (rows, targets) in [(2, 99), (99, 5), (3, 6), (1, 5)] {
        println!("{rows} rows and {targets} targets at once");
        let (split, _) = host(Some((rows, targets)))?;
        same(&split.train(request.clone()).await.map_err(anyhow::Error::msg)?, &trained)?;
        let parts = split.evaluate(request.clone()).await.map_err(anyhow::Error::msg)?;
        close("loss of targets", &list(&parts.nll), &list(&evaluated.nll), NOISE)?;
        anyhow::ensure!(parts.predicted == evaluated.predicted, "other tokens are predicted");
        // Several that wait together are not mixed up, nor merged beyond the bounds.
        let [a, b, c] = [(); 3].map(|()| split.train(request.clone()));
        let (a, b, c) = tokio::join!(a, b, c);
        for reply in [a, b, c] {
            same(&reply.map_err(anyhow::Error::msg)?, &trained)?;
        }
    }
    Ok(())
}

/// One row that is too large by itself is refused, and the next request is computed.
pub fn too_large_a_row() -> anyhow::Result<()> {
    block(LIMIT, async {
        for mode in BoundaryMode::ALL {
            let (narrow, sizes) = host(Some((7, 4)))?;
            let request = sizes.request(mode);
            for fault in [narrow.train(request.clone()).await.err(), narrow.evaluate(request.clone()).await.err()] {
                let fault = fault.context("a row with more targets than fit was computed")?;
                println!("{fault}");
                anyhow::ensure!(fault.code == FaultCode::Invalid, "{:?}", fault.code);
                anyhow::ensure!(fault.cause.contains("row 2 of 10 positions and 5 targets"), "{fault}");
                anyhow::ensure!(fault.remedy.contains("shorten"), "{fault}");
            }
            let (none, _) = host(Some((0, 99)))?;
            let fault = none.train(request.clone()).await.err().context("a row that is too long was computed")?;
            anyhow::ensure!(fault.cause.contains("row 0 of 12 positions"), "{fault}");
            let first = BoundaryRequest {
                input: Input::Hidden(values(&[SEQ, sizes.dim], 37)),
                positions: Positions::plain(vec![SEQ as u32]),
                targets: request.targets.iter().filter(|t| t.row == 0).copied().collect(),
                want: Want::Gradient,
            };
            let reply = narrow.train(first).await.map_err(anyhow::Error::msg)?;
            anyhow::ensure!(reply.loss.is_finite(), "loss {}", reply.loss);
        }
        too_long_a_text().await
    })
}

/// New positions of a text see all before them.
async fn too_long_a_text() -> anyhow::Result<()> {
    let (narrow, sizes) = host(Some((1, 99)))?;
    let text = |past: usize, new: usize| {
        let hidden = values(&[1, new, sizes.dim], 37);
        narrow.generate(7, GenerateRequest { past: past as u32, hidden, sampling: Sampling::GREEDY })
    };
    text(0, SEQ).await.map_err(anyhow::Error::msg)?;
    let fault = text(SEQ, SEQ).await.err().context("a text that is too long was gone on with")?;
    println!("{fault}");
    anyhow::ensure!(fault.code == FaultCode::Invalid && fault.remedy.contains("shorten"), "{fault:?}");
    anyhow::ensure!(fault.cause.contains("12 new positions of a text behind 12 others"), "{fault}");
    // It is still there.
    text(SEQ, 1).await.map_err(anyhow::Error::msg)?;
    Ok(())
}

/// What a server says to an introduction.
async fn greeted(server: &Server, hello: Hello) -> anyhow::Result<ServerMessage> {
    let mut socket = SocketConnector::new(&server.socket, CancellationToken::new()).connect().await?;
    socket.send(wire::encode(&ClientMessage::Hello(hello))).await?;
    Ok(wire::decode(&socket.receive().await?)?)
}

/// Names are measured in bytes, the page lets nobody type one that is refused, and a device's name is cut.
pub fn names() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let settings = FederationSettings { min_participants: 9, ..Default::default() };
        let server = Server::start_model(&nano_llava(), settings, folder.path()).await?;
        let longest = "\u{e9}".repeat(wire::MAX_NAME / 2);
        let device = format!("x{}", "\u{e9}".repeat(500));
        let talkative = Hello { device, edge_bytes: u64::MAX, ..hello(&longest, 1, Purpose::Train) };
        match greeted(&server, talkative).await? {
            ServerMessage::Welcome { status, .. } => {
                let [me] = &status.participants[..] else { anyhow::bail!("{:?}", status.participants) };
                anyhow::ensure!(me.name == longest, "another name: {}", me.name);
                // 160 bytes would end in mid-letter.
                anyhow::ensure!(me.device.len() == wire::MAX_DEVICE - 1, "{} bytes of device", me.device.len());
                // Nor is it believed without bound what it says to have downloaded.
                let downloaded = me.traffic.down.edge_bundle;
                anyhow::ensure!(downloaded == 1 << 40, "{downloaded} bytes of the edge bundle");
            }
            other => anyhow::bail!("{other:?} instead of a welcome"),
        }
        match greeted(&server, hello(&format!("{longest}\u{e9}"), 1, Purpose::Train)).await? {
            ServerMessage::Refused(fault) => {
                println!("{fault}");
                anyhow::ensure!(fault.code == FaultCode::Invalid && !fault.remedy.is_empty(), "{fault}");
                anyhow::ensure!(fault.cause.contains("the name has 122 bytes, at most 120"), "{fault}");
            }
            other => anyhow::bail!("{other:?} instead of a refusal"),
        }
        let page = std::fs::read_to_string(repository().join("www/index.html"))?;
        let (_, rest) = page.split_once("id=\"name\" maxlength=\"").context("the page does not bound the name")?;
        let units: usize = rest.split('"').next().context("no number")?.parse()?;
        anyhow::ensure!(units * 3 <= wire::MAX_NAME, "{units} letters may be more than {} bytes", wire::MAX_NAME);
        asker_downloads(&server).await?;
        server.stop().await
    })
}

/// What somebody downloads who only asks is counted with its questions.
async fn asker_downloads(server: &Server) -> anyhow::Result<()> {
    let federation = server.app.federation("test").context("no federation")?;
    let id = "0aF3".repeat(8);
    let manifest = get(server.address(), &format!("/edge/manifest.json?download={id}")).await?;
    let asks = Hello { edge_bytes: u64::MAX, download: Some(id), ..hello("asker", 0, Purpose::Ask) };
    match greeted(server, asks).await? {
        ServerMessage::Welcome { .. } => {}
        other => anyhow::bail!("{other:?} instead of a welcome"),
    }
    // Its session hands over what it has counted when it has ended.
    loop {
        let questions = federation.ledger().await.context("the federation has ended")?.questions;
        let counted = Traffic::sum(questions.values()).down.edge_bundle;
        if counted > 0 {
            anyhow::ensure!(counted == manifest.len() as u64, "{counted} bytes instead of {}", manifest.len());
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A frame that the server would not take is not sent: the own side says so, and the connection stays as it is.
pub fn own_frame() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start_model(&nano_llava(), FederationSettings::default(), folder.path()).await?;
        let mut socket = SocketConnector::new(&server.socket, CancellationToken::new()).connect().await?;
        let refusal = socket.send(vec![0; wire::MAX_FRAME + 1]).await.err().context("it was sent")?;
        println!("{refusal}");
        let bytes = format!("{} bytes, {} are allowed", wire::MAX_FRAME + 1, wire::MAX_FRAME);
        anyhow::ensure!(refusal.to_string().contains(&bytes), "{refusal}");
        socket.send(wire::encode(&ClientMessage::Hello(hello("late", 0, Purpose::Ask)))).await?;
        let answer: ServerMessage = wire::decode(&socket.receive().await?)?;
        anyhow::ensure!(matches!(answer, ServerMessage::Welcome { .. }), "{answer:?} instead of a welcome");
        server.stop().await
    })
}
