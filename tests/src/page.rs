//! What a person does with the page, in headless Chromium: own pictures, questions, leaving, reloading, duplicating, a phone.

use crate::browser::{Browser, LIMIT};
use anyhow::{Context, ensure};
use fantoccini::Locator;
use fantoccini::actions::{InputSource, KeyAction, KeyActions};
use fantoccini::key::Key;
use fednano_server::native::SocketConnector;
use fednano_shared::client::{Connector, Transport};
use fednano_shared::ledger::Traffic;
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::FederationSettings;
use fednano_shared::wire::{self, ClientMessage, Hello, Purpose, SessionToken};
use fednano_tests::{Server, block, hello};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// A small generated shard: 48 samples, 6 steps an epoch.
const SHARD: &str = "&shard=garden&pictures=12&questions=4&seed=3";
const CAN_JOIN: &str = "return !document.getElementById('join').disabled";
const ERROR: &str = "return document.body.dataset.error";
const FINISHED: &str = "return document.body.dataset.state === 'finished'";
const JOINED: &str = "return window.fednano?.events.find((e) => e.type === 'joined')";
const STEPS: &str = "return window.fednano?.events.some((e) => e.type === 'step' && e.step >= 2)";
const STATUS: &str = "return fetch('/api/federations/test').then((r) => r.json())";
const ROUND: &str = "return window.fednano?.events.find((e) => e.type === 'round')";
const READY: &str = "return document.body.dataset.state === 'ready'";
/// Of how many participations this browser keeps work.
const KEPT: &str = "
    return new Promise((resolve, reject) => {
        const opening = indexedDB.open('fednano-work');
        opening.onerror = () => reject(opening.error);
        opening.onsuccess = () => {
            const counting = opening.result.transaction('snapshots').objectStore('snapshots').count();
            counting.onerror = () => reject(counting.error);
            counting.onsuccess = () => {
                opening.result.close();
                resolve(counting.result);
            };
        };
    })";

/// A server with one page open.
struct Stage {
    server: Server,
    browser: Browser,
    folder: tempfile::TempDir,
}

impl Stage {
    async fn open(local_epochs: u32) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let settings = FederationSettings { rounds: 1, min_participants: 1, local_epochs, ..Default::default() };
        let results = folder.path().join("server");
        std::fs::create_dir(&results)?;
        let server = Server::start(settings, &results).await?;
        Ok(Self { server, browser: Browser::open(&[]).await?, folder })
    }

    async fn go(&self, query: &str) -> anyhow::Result<()> {
        Ok(self.browser.client.goto(&format!("{}/?federation=test&device=cpu{query}", self.server.base)).await?)
    }

    async fn press(&self, css: &str) -> anyhow::Result<()> {
        Ok(self.browser.client.find(Locator::Css(css)).await?.click().await?)
    }

    async fn text(&self, css: &str) -> anyhow::Result<String> {
        Ok(self.browser.client.find(Locator::Css(css)).await?.text().await?)
    }

    /// Wait for an error with all these words.
    async fn error(&self, words: &[&str]) -> anyhow::Result<()> {
        let list = serde_json::to_string(words)?;
        let code =
            format!("const e = document.body.dataset.error; return e && {list}.every((w) => e.includes(w)) && e");
        let said = self.browser.wait(&format!("an error with {list}"), &code).await?;
        println!("{said}");
        let shown = self.text("#error").await?;
        ensure!(words.iter().all(|w| shown.contains(w)), "the banner does not show {list}: {shown}");
        Ok(())
    }

    /// The server's word on its participants.
    async fn participants(&self) -> anyhow::Result<Vec<Value>> {
        let status = self.browser.script(STATUS).await?;
        status["participants"].as_array().cloned().with_context(|| format!("no participants in {status}"))
    }

    async fn join_to_the_end(&self) -> anyhow::Result<()> {
        self.browser.wait("Join", CAN_JOIN).await?;
        self.press("#join").await?;
        self.browser.wait("the end", FINISHED).await?;
        let there = self.participants().await?;
        ensure!(there.len() == 1, "one tab, but the server saw {there:?}");
        Ok(())
    }

    /// Give these files of the folder to the page, as a person's file dialogue would.
    async fn choose(&self, names: &[&str]) -> anyhow::Result<()> {
        let paths: Vec<String> = names.iter().map(|n| self.folder.path().join(n).display().to_string()).collect();
        Ok(self.browser.client.find(Locator::Css("#files")).await?.send_keys(&paths.join("\n")).await?)
    }

    /// Back after a reload: the step with which the round goes on, which must be a later one than its first.
    async fn goes_on(&self, first: &Value) -> anyhow::Result<u64> {
        self.press("#join").await?;
        let second = self.browser.wait("being back", JOINED).await?;
        ensure!(second["resumed"] == true && second["participant"] == first["participant"], "{first}, then {second}");
        let round = self.browser.wait("the round", ROUND).await?;
        let from = round["fromStep"].as_u64().with_context(|| format!("no step in {round}"))?;
        ensure!(from > 0, "the round begins again: {round}");
        Ok(from)
    }

    /// The federation's adapters, as the server has them.
    fn adapter(&self) -> anyhow::Result<AdapterState> {
        Ok(self.server.app.federation("test").context("no federation")?.adapter())
    }

    /// Of how many participations there must be work in this browser.
    async fn keeps(&self, count: usize) -> anyhow::Result<()> {
        let kept = self.browser.script(KEPT).await?;
        ensure!(kept == count, "work of {kept} participations is kept, expected {count}");
        Ok(())
    }

    async fn close(self) -> anyhow::Result<()> {
        self.browser.close().await?;
        self.server.stop().await
    }
}

// ------------------------------------------------------------------------------------ own pictures

const PICTURES: [(&str, [u8; 3]); 3] =
    [("red.png", [220, 30, 30]), ("green.png", [30, 180, 60]), ("blue.png", [40, 60, 220])];

fn write_pictures(folder: &Path) -> anyhow::Result<()> {
    for (name, colour) in PICTURES {
        std::fs::write(folder.join(name), png(colour))?;
    }
    Ok(())
}

/// A question about each picture, then `more` lines.
fn write_questions(folder: &Path, more: &str) -> anyhow::Result<()> {
    let mut csv = "picture,question,answer\n".to_owned();
    for (name, _) in PICTURES {
        csv += &format!("{name},what colour is it?,{}\n", name.trim_end_matches(".png"));
    }
    Ok(std::fs::write(folder.join("questions.csv"), csv + more)?)
}

/// 48 x 48 pixels of one colour, not compressed.
fn png(colour: [u8; 3]) -> Vec<u8> {
    const SIZE: u8 = 48;
    let mut raw: Vec<u8> = Vec::new();
    for _ in 0..SIZE {
        raw.push(0); // no filter
        raw.extend(colour.repeat(usize::from(SIZE)));
    }
    let length = raw.len() as u16;
    let (mut low, mut high) = (1u32, 0u32); // Adler-32
    for byte in &raw {
        low = (low + u32::from(*byte)) % 65521;
        high = (high + low) % 65521;
    }
    let mut stream = vec![0x78u8, 1, 1];
    stream.extend(length.to_le_bytes());
    stream.extend((!length).to_le_bytes());
    stream.extend(raw);
    stream.extend((high << 16 | low).to_be_bytes());
    let header = [0, 0, 0, SIZE, 0, 0, 0, SIZE, 8, 2, 0, 0, 0];
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    let chunks: [(&[u8], &[u8]); 3] = [(b"IHDR", &header), (b"IDAT", &stream), (b"IEND", &[])];
    for (kind, body) in chunks {
        let content = [kind, body].concat();
        file.extend((body.len() as u32).to_be_bytes());
        file.extend(&content);
        file.extend(crc32(&content).to_be_bytes());
    }
    file
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| if c & 1 == 1 { c >> 1 ^ 0xedb8_8320 } else { c >> 1 })
    })
}

/// Three pictures and a CSV of a person.
pub fn own_pictures() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open(1).await?;
        write_pictures(stage.folder.path())?;
        write_questions(stage.folder.path(), "")?;
        stage.go("").await?;
        stage.browser.wait("ready", READY).await?;
        stage.choose(&["red.png", "green.png", "blue.png", "questions.csv"]).await?;
        let code = "return window.fednano.events.find((e) => e.type === 'encoded')";
        let encoded = stage.browser.wait("prepared pictures", code).await?;
        ensure!(encoded["pictures"] == 3 && encoded["samples"] == 3, "three pictures, but {encoded}");
        stage.join_to_the_end().await?;
        stage.close().await
    })
}

/// A page cannot keep a person's files over a reload: chosen again, the round goes on with them.
pub fn own_pictures_again() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open(200).await?; // of one step each
        write_pictures(stage.folder.path())?;
        write_questions(stage.folder.path(), "")?;
        let files = ["red.png", "green.png", "blue.png", "questions.csv"];
        stage.go("").await?;
        stage.browser.wait("ready", READY).await?;
        stage.choose(&files).await?;
        stage.browser.wait("Join", CAN_JOIN).await?;
        stage.press("#join").await?;
        stage.browser.wait("some steps", STEPS).await?;
        let first = stage.browser.script(JOINED).await?;
        stage.browser.client.refresh().await?;
        stage.browser.wait("ready", READY).await?;
        let words = stage.text("#state-line").await?;
        ensure!(words.contains("choose the same pictures and questions again"), "the page says: {words}");
        let can_join = stage.browser.script(CAN_JOIN).await?;
        ensure!(can_join == false, "the page offers to go on without pictures");
        stage.choose(&files).await?;
        stage.browser.wait("Rejoin", CAN_JOIN).await?;
        stage.goes_on(&first).await?;
        stage.close().await
    })
}

/// A file that is no picture and a question without an answer are named with their remedy, and the rest stays usable.
pub fn faulty_own_pictures() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open(1).await?;
        let folder = stage.folder.path();
        write_pictures(folder)?;
        std::fs::write(folder.join("notes.png"), "this is text")?;
        write_questions(folder, "notes.png,what is it?,text\n")?;
        stage.go("").await?;
        stage.browser.wait("ready", READY).await?;
        stage.choose(&["red.png", "green.png", "blue.png", "notes.png", "questions.csv"]).await?;
        stage.error(&["'notes.png' cannot be read as a picture", "PNG, JPEG", "take its questions out"]).await?;
        // Leave it out: its question is still there.
        stage.browser.script("document.getElementById('own').open = true").await?;
        let line = stage.text("#own-faults").await?;
        ensure!(line.contains("notes.png"), "the list of faults has: {line}");
        stage.press("#own-faults button").await?;
        stage.error(&["'notes.png'", "no readable picture among the chosen files", "remove its questions"]).await?;
        // Header and three questions come before the faulty line.
        write_questions(folder, "red.png,is it green?,\n")?;
        stage.choose(&["questions.csv"]).await?;
        stage.error(&["line 5 has no answer", "add it or remove the sample"]).await?;
        write_questions(folder, "")?;
        stage.choose(&["questions.csv"]).await?;
        stage.join_to_the_end().await?;
        let error = stage.browser.script(ERROR).await?;
        ensure!(error.is_null(), "the page still says {error}");
        stage.close().await
    })
}

// ------------------------------------------------------------------------------------ questions

/// After a round, a question gets the untouched model's answer and the tuned one's; its bytes are told, as many as the server has heard.
pub fn ask_before_and_after() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open(1).await?;
        stage.go(&format!("&auto=1{SHARD}")).await?;
        stage.browser.wait("the end", FINISHED).await?;
        stage.press("#ask-suggestions button").await?;
        let code = "return window.fednano.events.find((e) => e.type === 'answered' || e.type === 'error')";
        let answer = stage.browser.wait("answers", code).await?;
        println!("{answer}");
        for which in ["before", "after"] {
            let said = answer[which].as_str().unwrap_or_default().trim();
            let shown = stage.text(&format!("#answer-{which}")).await?;
            ensure!(!said.is_empty() && shown.trim() == said, "{which}: {answer}, the page shows '{shown}'");
        }
        let asked = stage.browser.wait("bytes of the question", "return window.fednano.asked").await?;
        let asked: Traffic = serde_json::from_value(asked)?;
        let federation = stage.server.app.federation("test").context("no federation")?;
        let (end, mut heard) = (Instant::now() + Duration::from_secs(10), Traffic::default());
        while heard.up != asked.up && Instant::now() < end {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let ledger = federation.ledger().await.context("the federation has ended")?;
            heard = Traffic::sum(ledger.questions.values());
        }
        ensure!(asked.up.hidden_states > 0 && heard.up == asked.up, "the tab counts {asked:?}, the server {heard:?}");
        let words = stage.text("#asked-words").await?;
        ensure!(words.contains("sent") && words.contains("received"), "the page says: {words}");
        stage.close().await
    })
}

// ------------------------------------------------------------------------------------ coming back

/// Leave in mid-round and rejoin: one participant, its download counted once.
pub fn leave_and_rejoin() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open(4).await?;
        stage.go(&format!("&auto=1{SHARD}")).await?;
        stage.browser.wait("some steps", STEPS).await?;
        stage.keeps(1).await?;
        stage.press("#leave").await?;
        stage.browser.wait("having left", "return document.body.dataset.state === 'left'").await?;
        stage.keeps(0).await?;
        let gone = format!("{STATUS}.then((s) => s.participants.every((p) => !p.connected))");
        stage.browser.wait("the server's knowing it", &gone).await?;
        let downloaded = stage.participants().await?[0]["traffic"]["down"]["edge_bundle"].clone();
        let words = stage.text("#join").await?;
        ensure!(words == "Rejoin", "the button says '{words}'");
        stage.join_to_the_end().await?;
        let now = stage.participants().await?[0]["traffic"]["down"]["edge_bundle"].clone();
        ensure!(downloaded.as_u64().is_some_and(|n| n > 0) && now == downloaded, "downloaded {downloaded}, then {now}");
        stage.close().await
    })
}

/// Reload in mid-round: the tab offers to go on, as the same participant, trains no step twice, and the end is the same as without.
pub fn reload() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open(8).await?;
        stage.go(SHARD).await?;
        stage.browser.wait("Join", CAN_JOIN).await?;
        stage.press("#join").await?;
        stage.browser.wait("some steps", STEPS).await?;
        let first = stage.browser.script(JOINED).await?;
        stage.browser.client.refresh().await?;
        let offered = "const j = document.getElementById('join'); return !j.disabled && j.textContent === 'Rejoin'";
        stage.browser.wait("Rejoin", offered).await?;
        let joined = stage.browser.script(JOINED).await?;
        ensure!(joined.is_null(), "the tab rejoined by itself: {joined}");
        let from = stage.goes_on(&first).await?;
        stage.browser.wait("the end", FINISHED).await?;
        let steps = "return window.fednano.events.filter((e) => e.type === 'step').map((e) => e.step)";
        let steps = stage.browser.script(steps).await?;
        let left: Vec<u64> = (from + 1..=48).collect(); // 8 epochs of 6
        ensure!(steps == serde_json::json!(left), "after step {from} came {steps}");
        let there = stage.participants().await?;
        ensure!(there.len() == 1, "one tab, but the server saw {there:?}");
        stage.keeps(0).await?;
        let reloaded = stage.adapter()?;
        stage.close().await?;
        let calm = Stage::open(8).await?;
        calm.go(SHARD).await?;
        calm.join_to_the_end().await?;
        ensure!(calm.adapter()? == reloaded, "without the reload the adapters are others");
        calm.close().await
    })
}

/// A duplicated tab has a copy of the session storage; it is somebody new, and the first tab goes on undisturbed.
pub fn duplicated_tab() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open(8).await?;
        let client = &stage.browser.client;
        stage.go(&format!("&auto=1{SHARD}")).await?;
        stage.browser.wait("some steps", STEPS).await?;
        let first = client.window().await?;
        stage.browser.script("window.open(location.href)").await?;
        let second = client.windows().await?.into_iter().find(|w| *w != first).context("no second tab")?;
        client.switch_to_window(second).await?;
        let joined = stage.browser.wait("the second tab's joining", JOINED).await?;
        ensure!(joined["resumed"] == false, "the second tab took the first one's place: {joined}");
        let both = format!("{STATUS}.then((s) => s.participants.filter((p) => p.connected).length === 2)");
        stage.browser.wait("two participants", &both).await?;
        stage.keeps(2).await?; // each its own
        client.switch_to_window(first).await?;
        let lost = "return window.fednano.events.filter((e) => e.type === 'lost' || e.type === 'error')";
        let lost = stage.browser.script(lost).await?;
        ensure!(lost.as_array().is_some_and(Vec::is_empty), "the first tab was disturbed: {lost}");
        stage.close().await
    })
}

/// Another program comes with the tab's token: the tab says so and stays away.
pub fn taken_over() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open(8).await?;
        stage.go(&format!("&auto=1{SHARD}")).await?;
        stage.browser.wait("some steps", STEPS).await?;
        let saved = stage.browser.script("return JSON.parse(sessionStorage.getItem('fednano:test')).token").await?;
        let token = SessionToken(saved.as_str().context("no token in the tab's session storage")?.to_owned());
        let greeting = Hello { resume: Some(token), ..hello("other", 48, Purpose::Train) };
        let mut other = SocketConnector::new(stage.server.socket.clone(), CancellationToken::new()).connect().await?;
        other.send(wire::encode(&ClientMessage::Hello(greeting))).await?;
        other.receive().await?;
        stage.error(&["another tab or program goes on"]).await?;
        tokio::time::sleep(Duration::from_secs(3)).await; // long enough for a try to come back
        let joins = "return window.fednano.events.filter((e) => e.type === 'joined').length";
        let joins = stage.browser.script(joins).await?;
        ensure!(joins == 1, "the tab joined {joins} times");
        let words = stage.text("#join").await?;
        ensure!(words == "Join", "the button says '{words}'");
        let there = stage.participants().await?;
        ensure!(there.len() == 1 && there[0]["connected"] == true, "the server has {there:?}");
        stage.close().await
    })
}

// ------------------------------------------------------------------------------------ phone and keyboard

/// Remember what a keyboard must reach; count the cards, and whether name and Join are among it.
const INTERACTIVE: &str = "
    document.getElementById('own').open = true;
    const all = [...document.querySelectorAll('a[href], button, input, summary, [tabindex=\"0\"]')];
    window.wanted = all.filter((e) => e.checkVisibility() && !e.matches(':disabled'));
    window.last = document.activeElement;
    const has = (id) => window.wanted.includes(document.getElementById(id));
    return [window.wanted.length, window.wanted.filter((e) => e.matches('.card')).length, has('name'), has('join')]";

/// Which of those has the focus, whether the focus moved, what it is.
const FOCUS: &str = "
    const now = document.activeElement;
    const moved = now !== window.last;
    window.last = now;
    return [window.wanted.indexOf(now), moved, now.id || now.textContent.slice(0, 40)]";

/// On a phone's screen nothing is cut off sideways, and the Tab key reaches everything.
pub fn phone_and_keyboard() -> anyhow::Result<()> {
    block(LIMIT, async {
        let stage = Stage::open(1).await?;
        stage.browser.client.set_window_size(360, 740).await?;
        stage.go("&shard=garden&pictures=4&questions=2&seed=3").await?;
        stage.browser.wait("Join", CAN_JOIN).await?;
        let found = stage.browser.script(INTERACTIVE).await?;
        // With the longest words that its corner can show.
        let measure = "document.getElementById('phase').textContent = 'testing the untouched model';
            return [innerWidth, document.documentElement.scrollWidth]";
        let widths = stage.browser.script(measure).await?;
        let width = |at: usize| widths[at].as_u64().unwrap_or(u64::MAX);
        ensure!(width(0) == 360, "the window is {} pixels wide, so this measures nothing", width(0));
        ensure!(width(1) <= 360, "the page is {} pixels wide", width(1));
        ensure!(found[1] == 3 && found[2] == true && found[3] == true, "three shards, name and Join, but {found}");
        let count = found[0].as_u64().context("no count")?;
        let mut reached = BTreeSet::new();
        for _ in 0..2 * count + 4 {
            let tab = KeyActions::new("keyboard".to_owned())
                .then(KeyAction::Down { value: Key::Tab.into() })
                .then(KeyAction::Up { value: Key::Tab.into() });
            stage.browser.client.perform_actions(tab).await?;
            let focus = stage.browser.script(FOCUS).await?;
            ensure!(focus[1] == true, "the focus is caught at {focus}");
            reached.extend(focus[0].as_u64()); // -1: elsewhere
        }
        let missed: Vec<u64> = (0..count).filter(|i| !reached.contains(i)).collect();
        let names = format!("return {missed:?}.map((i) => window.wanted[i].outerHTML.slice(0, 120))");
        let names = stage.browser.script(&names).await?;
        ensure!(missed.is_empty(), "the Tab key does not reach {names}");
        stage.close().await
    })
}
