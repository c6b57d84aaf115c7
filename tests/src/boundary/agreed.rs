//! What is agreed on at the handshake.

use super::{Scene, mixed, run, settings, words_only};
use anyhow::{Context, ensure};
use burn::tensor::Device;
use fednano_server::native::SocketConnector;
use fednano_shared::client::{Connector, Transport};
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::generate::{AnswerOptions, Sampling, answer};
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::probe::{self, shard};
use fednano_shared::settings::{BoundaryChoice, FederationSettings, Format, Rounding, Strategy};
use fednano_shared::step::{self, InProcess};
use fednano_shared::wire::agreement::{Agreement, BoundaryMode, Offer};
use fednano_shared::wire::{self, ClientMessage, Fault, FaultCode, Hello, Purpose, ServerMessage};
use fednano_tests::{LIMIT, MODES, Server, asking, block, fixture, halves, hello, offer};
use tokio_util::sync::CancellationToken;

/// What a server says to an offer.
async fn greeted(server: &Server, offer: Offer) -> anyhow::Result<Result<Agreement, Fault>> {
    let mut socket = SocketConnector::new(&server.socket, CancellationToken::new()).connect().await?;
    let hello = Hello { offer, ..hello("one", 3, Purpose::Ask) };
    socket.send(wire::encode(&ClientMessage::Hello(hello))).await?;
    match wire::decode(&socket.receive().await?)? {
        ServerMessage::Welcome { agreement, .. } => Ok(Ok(agreement)),
        ServerMessage::Refused(fault) => Ok(Err(fault)),
        other => anyhow::bail!("{other:?} in answer to a Hello"),
    }
}

/// Left to itself the server takes the mode that needs fewer bytes, as running both shows: codes where batches are large beside the
/// rank, whole hidden states where they are small.
pub fn auto_by_shapes() -> anyhow::Result<()> {
    block(LIMIT, async {
        let (pictures, words) = (mixed(), words_only(shard(DemoTheme::Garden, 3, 2, 2)));
        let mut chosen = Vec::new();
        for (data, rank, batch_size) in [(&pictures, 2, 8), (&words, 64, 1)] {
            let of = |boundary| FederationSettings {
                rank,
                batch_size,
                micro_batch: 0,
                local_steps: 8,
                strategy: Strategy::FedAvg,
                ..settings(boundary)
            };
            let auto = run(data, of(BoundaryChoice::Auto)).await?;
            let mut bytes = Vec::new();
            for (boundary, mode) in MODES {
                let ran = run(data, of(boundary)).await?;
                ensure!(ran.agreement.mode == mode, "{:?} was agreed on", ran.agreement);
                bytes.push((ran.traffic.up.total() + ran.traffic.down.total(), mode));
            }
            println!("rank {rank}, batches of {batch_size}: {bytes:?}, chosen {}", auto.agreement.mode);
            let (_, least) = bytes.iter().min_by_key(|(bytes, _)| *bytes).context("no modes")?;
            ensure!(auto.agreement.mode == *least, "{} was chosen of {bytes:?}", auto.agreement.mode);
            chosen.push(*least);
        }
        ensure!(chosen == [BoundaryMode::LowRank, BoundaryMode::Activations], "one mode wins always: {chosen:?}");
        Ok(())
    })
}

/// Nobody is made to speak what it did not offer: with a choice the other thing is taken, without one it is refused with cause and
/// remedy.
pub fn only_what_is_offered() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let start = |name: &str, settings: FederationSettings| {
            let data_dir = folder.path().join(name);
            async move {
                std::fs::create_dir(&data_dir)?;
                Server::start_model(&fixture(), settings, &data_dir).await
            }
        };
        let only = |modes: Vec<BoundaryMode>| Offer { modes, ..offer(3000) };

        let server = start("auto", settings(BoundaryChoice::Auto)).await?;
        for (modes, expected) in [
            (BoundaryMode::ALL.to_vec(), BoundaryMode::LowRank),
            (vec![BoundaryMode::Activations], BoundaryMode::Activations),
            (vec![BoundaryMode::LowRank], BoundaryMode::LowRank),
        ] {
            let agreed = greeted(&server, only(modes.clone())).await?.map_err(anyhow::Error::msg)?;
            ensure!(agreed.mode == expected, "{modes:?} offered, {:?} agreed on", agreed.mode);
        }
        refused(&server, only(Vec::new()), &[]).await?;
        server.stop().await?;

        for (boundary, mode) in MODES {
            let server = start(boundary.name(), settings(boundary)).await?;
            let others = BoundaryMode::ALL.into_iter().filter(|m| *m != mode).collect();
            refused(&server, only(others), &[mode.name()]).await?;
            let agreed = greeted(&server, only(vec![mode])).await?.map_err(anyhow::Error::msg)?;
            ensure!(agreed.mode == mode, "{:?} was agreed on", agreed.mode);
            server.stop().await?;
        }

        let int8 = FederationSettings { code_format: Format::Int8, ..settings(BoundaryChoice::LowRank) };
        let server = start("formats", int8).await?;
        refused(&server, Offer { formats: vec![Format::F32, Format::F16], ..offer(3000) }, &["int8"]).await?;
        refused(&server, Offer { labels: Vec::new(), ..offer(3000) }, &["label"]).await?;
        let agreed = greeted(&server, offer(3000)).await?.map_err(anyhow::Error::msg)?;
        let formats = (agreed.features, agreed.codes, agreed.gradients, agreed.matrices);
        ensure!(formats == (Format::F32, Format::Int8, Format::F32, Format::F32), "{agreed:?}");
        // Deflating is a saving, not a necessity.
        let deflating = FederationSettings { compress: true, ..settings(BoundaryChoice::LowRank) };
        server.stop().await?;
        let server = start("deflate", deflating).await?;
        for deflate in [true, false] {
            let agreed = greeted(&server, Offer { deflate, ..offer(3000) }).await?.map_err(anyhow::Error::msg)?;
            ensure!(agreed.deflate == deflate, "{agreed:?}");
        }
        server.stop().await
    })
}

/// The offer is refused, in these words among others.
async fn refused(server: &Server, offer: Offer, words: &[&str]) -> anyhow::Result<()> {
    let fault = greeted(server, offer).await?.err().context("it was let in")?;
    println!("{fault}");
    ensure!(fault.code == FaultCode::Invalid && !fault.remedy.is_empty(), "{fault:?}");
    ensure!(words.iter().all(|w| fault.cause.contains(w)), "{words:?} are not in: {fault}");
    Ok(())
}

/// How far off the exact loss a step may be in a format.
const OFF: [(Format, f32); 3] = [(Format::F32, 1e-4), (Format::F16, 0.02), (Format::Int8, 0.25)];

/// Whoever only asks is served whatever is spoken: steps, judgements, which come out the same each time, and texts.
pub fn asking_in_every_setting() -> anyhow::Result<()> {
    block(LIMIT, async {
        let h = halves(&fixture(), &Device::flex())?;
        for (boundary, mode) in MODES {
            for (format, limit) in OFF {
                let spoken = FederationSettings {
                    rank: probe::RANK,
                    feature_format: format,
                    code_format: format,
                    gradient_format: format,
                    matrix_format: format,
                    rounding: Rounding::Stochastic,
                    compress: true,
                    ..settings(boundary)
                };
                let scene = Scene::open(&mixed(), spoken).await?;
                let exact = probe::run(&scene.edge, &mut InProcess::new(&h.llm, mode), &h.device).await?;
                let offer = Offer { table: scene.edge.table_form(), ..Offer::default() };
                let mut asker = asking(&scene.server.socket, offer).await?;
                ensure!(asker.agreement().mode == mode, "{:?} was agreed on", asker.agreement());
                let asked = probe::run(&scene.edge, &mut asker, &h.device).await?;
                let off = (asked.loss - exact.loss).abs();
                println!("{mode}, {format}: the loss is {off} off");
                ensure!(off <= limit, "{mode}, {format}: the loss is {off} off, the limit is {limit}");

                let width = scene.edge.config.text.hidden;
                let cache = scene.cache.in_format(asker.agreement().features, width)?;
                let adapters = NanoAdapters::from_state(&probe::adapters(4, width), &h.device);
                let rows: Vec<usize> = (0..cache.samples.len()).collect();
                let mut judged = Vec::new();
                for _ in 0..2 {
                    let one = step::evaluate(&scene.edge, Some(&adapters), &cache, &rows, 4, &mut asker, &h.device);
                    judged.push(one.await?);
                }
                ensure!(judged[0] == judged[1], "{mode}, {format}: judged twice, {judged:?}");

                let prompt = scene.edge.text.encode_text("what is it?", None)?;
                let options = AnswerOptions { max_tokens: 3, sampling: Sampling::GREEDY };
                let said =
                    answer(&scene.edge, Some(&adapters), (&prompt, &[]), options, &mut asker, &h.device, |_| true);
                println!("{mode}, {format}: {:?}", said.await?);
                scene.server.stop().await?;
            }
        }
        Ok(())
    })
}
