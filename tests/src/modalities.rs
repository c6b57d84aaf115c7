//! Samples without a picture and samples without a question, beside ordinary ones: prompts, batches, gradients, a federation, the page.

use crate::browser::{self, Browser};
use anyhow::{Context, ensure};
use burn::tensor::Device;
use fantoccini::Locator;
use fednano_shared::client::Outcome;
use fednano_shared::data::dataset::Dataset;
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::data::text::{Encoded, TextCodec};
use fednano_shared::edge::FeatureCache;
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::plain::AdapterState;
use fednano_shared::probe::{self, shard};
use fednano_shared::settings::{AdapterChoice, BoundaryChoice, FederationSettings, Strategy};
use fednano_shared::step::{self, InProcess};
use fednano_shared::wire::agreement::BoundaryMode;
use fednano_tests::{Halves, Heard, LIMIT, MODES, Server, block, encode, fixture, halves, nano_llava, take_part};
use std::path::PathBuf;

// ------------------------------------------------------------------------------------ data

/// The same questions without their pictures.
fn text_only(mut data: Dataset) -> Dataset {
    data.pictures.clear();
    data.samples.iter_mut().for_each(|s| s.picture = None);
    data
}

/// The same pictures without their questions.
fn picture_only(mut data: Dataset) -> Dataset {
    data.samples.iter_mut().for_each(|s| s.question.clear());
    data
}

/// An ordinary sample, one of text alone, one of a picture alone.
fn one_of_each() -> Dataset {
    let ordinary = shard(DemoTheme::Garden, 3, 2, 4);
    let mut data = ordinary.subset(&[0]);
    data.append(text_only(ordinary.subset(&[1])));
    data.append(picture_only(ordinary.subset(&[2])));
    data
}

// ------------------------------------------------------------------------------------ prompts

/// What is missing leaves LLaVA's prompt as in its own training; nano-llava's has no words around it.
pub fn prompts() -> anyhow::Result<()> {
    let files = ModelFiles::open(&fixture())?;
    let count = files.config.image_tokens();
    same(&files.text, count, files.text.encode("what is it?", Some("red"))?, "USER: <image>\nwhat is it? ASSISTANT:")?;
    same(&files.text, count, files.text.encode(" ", Some("red"))?, "USER: <image> ASSISTANT:")?;
    same(&files.text, count, files.text.encode_text(" what is it?", Some("red"))?, "USER: what is it? ASSISTANT:")?;
    let forged = files.text.encode_text("what is <image>it?", Some("red"))?;
    ensure!(forged.image_start.is_none(), "a question placed a picture that there is not");
    let refused = files.text.encode_text(" <image> ", Some("red")).err().context("nothing was asked")?.to_string();
    ensure!(refused.contains("neither a picture nor a question"), "{refused}");
    let refused = files.text.encode("", Some(" ")).err().context("nothing was answered")?.to_string();
    ensure!(refused.contains("a picture without question has no answer"), "{refused}");

    if nano_llava().join("model.safetensors").exists() {
        let files = ModelFiles::open(&nano_llava())?;
        let count = files.config.image_tokens();
        same(&files.text, count, files.text.encode("", Some("red"))?, "<image>")?;
        same(&files.text, count, files.text.encode_text("what is it?", Some("red"))?, "what is it?")?;
    }
    Ok(())
}

/// The ids are those of a prompt in words, its picture's place widened, and of the answer `red`.
fn same(codec: &TextCodec, image_tokens: usize, encoded: Encoded, prompt: &str) -> anyhow::Result<()> {
    let (before, after) = match prompt.contains("<image>") {
        true => {
            let ids = codec.ids(prompt, true)?;
            let mark = *codec.ids("<image>", false)?.last().context("<image> has no id")?;
            let at = ids.iter().position(|id| *id == mark).context("the prompt has no image token")?;
            ensure!(encoded.image_start == Some(at), "'{prompt}': the picture begins at {:?}", encoded.image_start);
            ensure!(encoded.ids[at..at + image_tokens].iter().all(|id| *id == mark), "'{prompt}': {:?}", encoded.ids);
            (ids[..at].to_vec(), ids[at + 1..].to_vec())
        }
        false => {
            ensure!(encoded.image_start.is_none(), "'{prompt}' has a picture");
            (codec.ids(prompt, true)?, Vec::new())
        }
    };
    let widened = encoded.image_start.map_or(0, |_| image_tokens);
    let mut text = encoded.ids.clone();
    text.drain(before.len()..before.len() + widened);
    let answer = [codec.ids("red", false)?, vec![codec.eos()]].concat();
    ensure!(text == [before, after, answer.clone()].concat(), "'{prompt}' became {:?}", encoded.ids);
    let target = &encoded.ids[encoded.prompt_length..];
    ensure!(target == answer, "'{prompt}': {target:?} is learned");
    Ok(())
}

// ------------------------------------------------------------------------------------ batches and gradients

async fn on_fixture(data: &Dataset) -> anyhow::Result<(Halves, FeatureCache)> {
    let h = halves(&fixture(), &Device::flex())?;
    let cache = encode(&h.edge, data).await?;
    Ok((h, cache))
}

/// In one batch each row is what it is alone, and so is its loss.
pub fn mixed_batch() -> anyhow::Result<()> {
    block(LIMIT, async {
        let (h, cache) = on_fixture(&one_of_each()).await?;
        let (d, p) = (h.edge.config.text.hidden, h.edge.config.image_tokens());
        let batch = h.edge.batch(&cache, &[0, 1, 2])?;
        let untouched = NanoAdapters::from_state(&AdapterState::zeros(AdapterChoice::Both, 4, d), &h.device);
        for mode in BoundaryMode::ALL {
            let mut boundary = InProcess::new(&h.llm, mode);
            let (together, _) = step::gradients(&untouched, &batch, &mut boundary, &h.device).await?;
            for (row, pictures) in [1, 0, 1].into_iter().enumerate() {
                let alone = h.edge.batch(&cache, &[row])?;
                let (at, length) = (batch.positions.starts()[row], alone.positions.total());
                ensure!(
                    batch.x.data[at * d..(at + length) * d] == alone.x.data,
                    "row {row} is another one in the batch"
                );
                let image = &batch.positions.images[row];
                ensure!(*image == alone.positions.images[0], "row {row} has its picture elsewhere in the batch");
                ensure!(image.len() == pictures * p, "row {row} has the image positions {image:?}");
                let (reply, _) = step::gradients(&untouched, &alone, &mut boundary, &h.device).await?;
                let (loss, beside) = (reply.loss, together.row_loss[row]);
                ensure!((loss - beside).abs() < 1e-4, "{mode}: row {row}: loss {loss} alone, {beside} in the batch");
            }
        }
        Ok(())
    })
}

/// Without a picture in the batch the image adapter gets a gradient, and it is 0: the step's count holds, and so does its Fisher.
pub fn zero_gradient() -> anyhow::Result<()> {
    block(LIMIT, async {
        let (h, cache) = on_fixture(&one_of_each()).await?;
        let state = probe::adapters(4, h.edge.config.text.hidden);
        let adapters = NanoAdapters::from_state(&state, &h.device);
        for (mode, (row, without_image)) in
            BoundaryMode::ALL.into_iter().flat_map(|mode| [(0, false), (1, true), (2, false)].map(|case| (mode, case)))
        {
            let batch = h.edge.batch(&cache, &[row])?;
            let mut boundary = InProcess::new(&h.llm, mode);
            let (_, gradients) = step::gradients(&adapters, &batch, &mut boundary, &h.device).await?;
            let mut fisher = state.zeros_like();
            let group = std::slice::from_ref(&batch);
            step::fisher_group(&adapters, group, &mut boundary, &h.device, &mut fisher).await?;
            ensure!(gradients.0.len() == 4, "{mode}: row {row}: gradients of {:?}", gradients.0.keys());
            for (what, values) in [("gradient", &gradients), ("Fisher", &fisher)] {
                for (name, blob) in &values.0 {
                    let zero = blob.data.iter().all(|v| *v == 0.0);
                    let expected = without_image && name.starts_with("image");
                    ensure!(zero == expected, "{mode}: row {row}: {what} of {name}");
                }
            }
        }
        Ok(())
    })
}

// ------------------------------------------------------------------------------------ a federation

/// One client with ordinary samples, one without pictures, one without questions.
pub fn federation() -> anyhow::Result<()> {
    block(LIMIT, async {
        for (boundary, _) in MODES {
            // With the image adapter alone, whoever has no picture can teach nothing, and yet nobody waits.
            together(boundary, Strategy::Fisher, AdapterChoice::Both).await?;
            together(boundary, Strategy::FedAvg, AdapterChoice::Image).await?;
        }
        Ok(())
    })
}

async fn together(boundary: BoundaryChoice, strategy: Strategy, adapters: AdapterChoice) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let settings = FederationSettings {
        rounds: 2,
        rank: 2,
        batch_size: 4,
        min_participants: 3,
        strategy,
        adapters,
        boundary,
        ..Default::default()
    };
    let server = Server::start_model(&fixture(), settings, folder.path()).await?;
    let edge = server.app.held_out.edge.clone();
    let data = [
        shard(DemoTheme::Workshop, 1, 2, 4),
        text_only(shard(DemoTheme::Garden, 2, 2, 4)),
        picture_only(shard(DemoTheme::Harbour, 3, 2, 4)),
    ];
    let [ordinary, texts, pictures] = &data;
    let caches = [encode(&edge, ordinary).await?, encode(&edge, texts).await?, encode(&edge, pictures).await?];
    ensure!(caches[1].pictures.is_empty(), "features of pictures that there are not");
    let (mut a, mut b, mut c) = (Heard::default(), Heard::default(), Heard::default());
    let outcomes = tokio::try_join!(
        take_part(&edge, &caches[0], &server.socket, "ordinary", &mut a),
        take_part(&edge, &caches[1], &server.socket, "text", &mut b),
        take_part(&edge, &caches[2], &server.socket, "pictures", &mut c),
    )?;
    let federation = server.app.federation("test").context("no federation")?;
    let status = federation.finished().await;
    for outcome in [outcomes.0, outcomes.1, outcomes.2] {
        let Outcome::Finished { adapter, .. } = outcome else { anyhow::bail!("a client left") };
        ensure!(adapter == federation.adapter(), "a client has other adapters than the server");
    }
    let [_, first, second] = &status.history[..] else { anyhow::bail!("{} results", status.history.len()) };
    for round in [first, second] {
        ensure!(round.participants.len() == 3, "round {} merged {:?}", round.round, round.participants);
        ensure!(round.held_out.samples > 0 && round.held_out.loss.is_finite(), "{round:?} is not judged");
        ensure!(round.training_loss.is_some_and(f32::is_finite), "{round:?}");
    }
    let adapter = federation.adapter();
    ensure!(adapter.0.values().flat_map(|b| &b.data).all(|v| v.is_finite()), "the merged adapter is not finite");
    // `up` starts at 0.
    for (name, blob) in adapter.0.iter().filter(|(name, _)| name.ends_with("up")) {
        ensure!(blob.data.iter().any(|v| *v != 0.0), "{name} has learned nothing");
    }
    server.stop().await
}

// ------------------------------------------------------------------------------------ the page

const OWN_WORDS: &str = "return document.getElementById('own-words').textContent";
const DATA_WORDS: &str = "return document.getElementById('data-words').textContent";
const FINISHED: &str = "return document.body.dataset.state === 'finished'";

/// Give the page files, as a person's file dialogue would.
async fn choose(browser: &Browser, files: &[PathBuf]) -> anyhow::Result<()> {
    let names: Vec<String> = files.iter().map(|f| f.display().to_string()).collect();
    Ok(browser.client.find(Locator::Css("#files")).await?.send_keys(&names.join("\n")).await?)
}

async fn press(browser: &Browser, css: &str) -> anyhow::Result<()> {
    Ok(browser.client.find(Locator::Css(css)).await?.click().await?)
}

/// A question file alone is asked for its pictures; with them it trains; the model answers a question without a picture.
pub fn page() -> anyhow::Result<()> {
    block(browser::LIMIT, async {
        let folder = tempfile::tempdir()?;
        let settings = FederationSettings { rounds: 1, min_participants: 1, batch_size: 2, ..Default::default() };
        let server = Server::start(settings, folder.path()).await?;
        let browser = Browser::open(&[]).await?;
        let csv = folder.path().join("questions.csv");
        let rows = "image_0.png,what colour is it?,red\n,what colour is the sky?,blue\nimage_1.png,,green\n";
        std::fs::write(&csv, format!("picture,question,answer\n{rows}"))?;
        browser.client.goto(&format!("{}/?federation=test&device=cpu", server.base)).await?;
        browser.wait("ready", "return document.body.dataset.state === 'ready'").await?;
        choose(&browser, &[csv]).await?;
        browser.wait("the pictures to be asked for", &format!("{OWN_WORDS}.includes('Now add the pictures')")).await?;
        let error = browser.script("return document.body.dataset.error ?? null").await?;
        ensure!(error.is_null(), "the page says {error}");
        let images = fixture().join("images").canonicalize()?;
        choose(&browser, &[images.join("image_0.png"), images.join("image_1.png")]).await?;
        let encoded = "return window.fednano.events.find((e) => e.type === 'encoded')";
        let encoded = browser.wait("prepared samples", encoded).await?;
        ensure!(encoded["pictures"] == 2 && encoded["samples"] == 3, "two pictures, three samples, but {encoded}");
        let words = browser.script(DATA_WORDS).await?;
        let said = words.as_str().unwrap_or_default();
        ensure!(said.contains("1 without a picture, 1 without a question"), "the page says '{said}'");
        browser.wait("Join", "return !document.getElementById('join').disabled").await?;
        press(&browser, "#join").await?;
        browser.wait("the end", FINISHED).await?;
        press(&browser, "#ask-pictures .none").await?;
        press(&browser, "#ask-suggestions button").await?;
        let answered = "return window.fednano.events.find((e) => e.type === 'answered' || e.type === 'error')";
        let answer = browser.wait("an answer", answered).await?;
        println!("{answer}");
        ensure!(answer["question"] == "what colour is the sky?" && answer["after"].is_string(), "{answer}");
        browser.close().await?;
        server.stop().await
    })
}
