//! The edge bundle in headless Chromium: kept between visits, continued after an interruption, mended, refused without room.

use crate::browser::{Browser, LIMIT};
use anyhow::Context;
use fednano_server::presets;
use fednano_server::random_model::{self, Options, Storage};
use fednano_shared::settings::FederationSettings;
use fednano_tests::{Server, block};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The second visit downloads nothing, without storage it works too, and deleting the stored model makes the next visit download.
pub fn second_visit() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(FederationSettings::default(), folder.path()).await?;
        let all = Bundle::of(&server)?.bytes;
        let browser = Browser::open(&[]).await?;
        let first = visit(&browser, "first visit", &server.base, "").await?;
        anyhow::ensure!(first.fetched == all && first.cached == 0, "the first visit: {first:?}, the bundle {all}");
        let second = visit(&browser, "second visit", &server.base, "").await?;
        anyhow::ensure!(second.fetched == 0 && second.cached == all, "the second visit: {second:?}, the bundle {all}");
        let words = browser.script("return document.getElementById('download-words').textContent").await?;
        anyhow::ensure!(words.to_string().contains("all from this device"), "the page says: {words}");
        let memory = visit(&browser, "edge=memory", &server.base, "&edge=memory").await?;
        anyhow::ensure!(memory.cached == 0, "edge=memory used what is stored: {memory:?}");
        browser.script("document.getElementById('forget').click()").await?;
        let words =
            browser.wait("words on what was freed", "return document.getElementById('forget-words').textContent");
        let words = words.await?.to_string();
        anyhow::ensure!(words.contains("freed"), "the page says: {words}");
        let third = visit(&browser, "after deleting", &server.base, "").await?;
        anyhow::ensure!(third.fetched == all, "after deleting: {third:?}, the bundle {all}");
        browser.close().await?;
        server.stop().await
    })
}

/// With a bundle of about 200 MB, of random weights.
pub fn interrupted_large() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let model = folder.path().join("llava-160m");
    let config = presets::find("llava-160m").context("no such preset")?;
    let options = Options { seed: 1, storage: Storage::F16, shard_bytes: 1 << 30 };
    random_model::write(&config, &options, &model, &ProgressBar::hidden())?;
    interrupted(&model)
}

/// Broken connections are taken up again in the same visit, and what a visit that ends in mid-download has got is kept.
fn interrupted(model: &Path) -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start_model(model, FederationSettings::default(), folder.path()).await?;
        let Bundle { bytes: all, .. } = Bundle::of(&server)?;
        let line = Line::open(server.address(), all / 8)?;
        let browser = Browser::open(&[]).await?;
        browser.client.goto(&address(&line.base, "")).await?;
        browser.wait("a third of the download", &downloaded(all / 3)).await?;
        line.cut();
        browser.wait("going on after a cut", &downloaded(all / 2)).await?;
        browser.client.goto("about:blank").await?;
        let before = line.bytes();
        let back = visit(&browser, "back after an interruption", &line.base, "").await?;
        let sum = line.bytes();
        println!("{before} bytes of pieces sent before the interruption, {sum} in all, of a bundle of {all}");
        anyhow::ensure!(back.fetched < all && back.fetched + back.cached == all, "back: {back:?}, the bundle {all}");
        anyhow::ensure!(sum * 10 < all * 12, "{sum} bytes were sent for a bundle of {all}");
        browser.close().await?;
        server.stop().await
    })
}

/// A piece that was damaged on the device is fetched again, and nothing else.
pub fn damaged_piece() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(FederationSettings::default(), folder.path()).await?;
        let Bundle { bytes: all, pieces } = Bundle::of(&server)?;
        let (hash, size) = pieces[pieces.len() / 2].clone();
        let browser = Browser::open(&[]).await?;
        visit(&browser, "first visit", &server.base, "").await?;
        let damage = "const [hash, at, done] = arguments; (async () => {
            const home = await (await navigator.storage.getDirectory()).getDirectoryHandle('fednano');
            const file = await (await home.getDirectoryHandle('pieces')).getFileHandle(hash);
            const old = new Uint8Array(await (await file.getFile()).slice(at, at + 1).arrayBuffer());
            const out = await file.createWritable({ keepExistingData: true });
            await out.write({ type: 'write', position: at, data: new Uint8Array([old[0] ^ 1]) });
            await out.close();
            return true;
        })().then(done, (e) => done(String(e)))";
        let done = browser.client.execute_async(damage, vec![json!(hash), json!(size / 2)]).await?;
        anyhow::ensure!(done == true, "the piece could not be damaged: {done}");
        let mended = visit(&browser, "one piece damaged", &server.base, "").await?;
        anyhow::ensure!(mended.fetched == size, "{mended:?}, the damaged piece has {size} bytes");
        anyhow::ensure!(mended.cached == all - size, "{mended:?}, the bundle {all}, the damaged piece {size}");
        let told = format!("return window.fednano.events.some((e) => e.type === 'damaged' && e.sha256 === '{hash}')");
        anyhow::ensure!(browser.script(&told).await? == true, "the page does not tell of the damaged piece {hash}");
        let after = visit(&browser, "after mending", &server.base, "").await?;
        anyhow::ensure!(after.fetched == 0, "the mended piece was not kept: {after:?}");
        browser.close().await?;
        server.stop().await
    })
}

/// Too little storage or memory: said with both numbers and a remedy, before any piece is fetched.
pub fn too_little_room() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(FederationSettings::default(), folder.path()).await?;
        let line = Line::open(server.address(), 0)?;
        let browser = Browser::open(&[]).await?;
        browser.client.goto(&format!("{}/?federation=elsewhere", line.base)).await?;
        for (call, words) in [
            ("judgeStorage({missing: 1e9, quota: 5e8, usage: 1e8, edgeDtype: 'f32'})", ["1000000000", "400000000"]),
            (
                "judgeStorage({missing: 1e9, quota: 9e9, usage: 0, claimed: 7e8, edgeDtype: 'f32'})",
                ["1.05 GB", "700000000"],
            ),
            ("judgeMemory({needed: 5e9, deviceMemory: 8, edgeDtype: 'f32'})", ["5000000000", "4294967296"]),
            ("judgeMemory({needed: 2e9, deviceMemory: 2, edgeDtype: 'f32'})", ["2000000000", "1610612736"]),
        ] {
            let said = judged(&browser, call).await?;
            anyhow::ensure!(words.iter().all(|w| said.contains(w)), "{words:?} are not in: {said}");
            anyhow::ensure!(said.contains("; ") && said.contains("--edge-dtype"), "no remedy in: {said}");
        }
        for call in [
            "judgeStorage({missing: 1e9, quota: 2e9, usage: 1e8, edgeDtype: 'f16'})",
            "judgeStorage({missing: 1e9, edgeDtype: 'f16'})",
            "judgeStorage({missing: 0, quota: 5, usage: 5, edgeDtype: 'f16'})",
            "judgeMemory({needed: 1610612736, deviceMemory: 2, edgeDtype: 'f16'})",
            "judgeMemory({needed: 1e9, edgeDtype: 'f16'})",
        ] {
            let said = judged(&browser, call).await?;
            anyhow::ensure!(!said.contains("too little") && said.contains(':'), "{call} says: {said}");
        }
        // The real thing. The browser's estimate does not show this limit: only trying to use the space does.
        cdp(&browser, "Storage.overrideQuotaForOrigin", &json!({"origin": line.base, "quotaSize": 2_000_000})).await?;
        browser.client.goto(&address(&line.base, "")).await?;
        let said = browser.wait("an error", "return document.body.dataset.error || null").await?.to_string();
        println!("{said}");
        anyhow::ensure!(said.contains("too little storage") && said.contains("free storage"), "the page says: {said}");
        anyhow::ensure!(line.bytes() == 0, "{} bytes of pieces were fetched all the same", line.bytes());
        browser.close().await?;
        server.stop().await
    })
}

/// Two tabs of one browser at once share one download.
pub fn two_tabs_share() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let server = Server::start(FederationSettings::default(), folder.path()).await?;
        let all = Bundle::of(&server)?.bytes;
        let line = Line::open(server.address(), all / 4)?;
        let browser = Browser::open(&[]).await?;
        browser.client.goto(&address(&line.base, "")).await?;
        browser.wait("a part of the download", &downloaded(all / 4)).await?;
        let first = browser.client.window().await?;
        let second = browser.client.new_window(true).await?.handle;
        browser.client.switch_to_window(second).await?;
        let b = visit(&browser, "second tab", &line.base, "").await?;
        browser.client.switch_to_window(first).await?;
        let a = loaded(&browser, "first tab").await?;
        anyhow::ensure!(a.fetched + b.fetched == all, "the tabs {a:?} and {b:?}, the bundle {all}");
        browser.close().await?;
        server.stop().await
    })
}

// ------------------------------------------------------------------------------------------------ the page

/// What the page says of its model part.
#[derive(Debug)]
struct Edge {
    fetched: u64,
    cached: u64,
}

fn address(base: &str, more: &str) -> String {
    format!("{base}/?federation=test&device=cpu{more}")
}

async fn visit(browser: &Browser, what: &str, base: &str, more: &str) -> anyhow::Result<Edge> {
    browser.client.goto(&address(base, more)).await?;
    loaded(browser, what).await
}

/// Wait until the page is ready; an error on it is the test's.
async fn loaded(browser: &Browser, what: &str) -> anyhow::Result<Edge> {
    let code = "const { state, error } = document.body.dataset;
        if (state === 'error') return { error: error || 'no words' };
        return state === 'ready' ? window.fednano.edge : null";
    let edge = browser.wait(what, code).await?;
    anyhow::ensure!(edge.get("error").is_none(), "{what}: the page says {edge}");
    println!("{what}: {edge}");
    anyhow::ensure!(edge["verified"] == true, "{what}: not verified: {edge}");
    let count = |key: &str| edge[key].as_u64().with_context(|| format!("{what}: no {key} in {edge}"));
    Ok(Edge { fetched: count("fetched")?, cached: count("fromCache")? })
}

/// Code that is true once so many bytes are on the device.
fn downloaded(bytes: u64) -> String {
    format!("const d = window.fednano && window.fednano.download; return Boolean(d && d.done >= {bytes})")
}

/// What a function of www/storage.js says, be it an error.
async fn judged(browser: &Browser, call: &str) -> anyhow::Result<String> {
    let code = format!(
        "const done = arguments[0];
        import('/storage.js').then((m) => m.{call}).then(done, (e) => done(e.message))"
    );
    let said = browser.client.execute_async(&code, Vec::new()).await?;
    println!("{call}: {said}");
    Ok(said.as_str().unwrap_or_default().to_owned())
}

/// A command of the DevTools protocol, through ChromeDriver.
async fn cdp(browser: &Browser, command: &str, parameters: &Value) -> anyhow::Result<()> {
    let session = browser.client.session_id().await?.context("no session")?;
    let body = json!({"cmd": command, "params": parameters}).to_string();
    let port = browser.port;
    let post = move || http(&format!("127.0.0.1:{port}"), &format!("POST /session/{session}/goog/cdp/execute"), &body);
    tokio::task::spawn_blocking(post).await?.map(drop)
}

/// One request; the answer's body. For what needs no client.
fn http(address: &str, request: &str, body: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let length = body.len();
    write!(stream, "{request} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n")?;
    write!(stream, "Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}")?;
    let mut answer = BufReader::new(stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        anyhow::ensure!(answer.read_line(&mut head)? > 0, "{request}: the answer ended in its head: {head}");
    }
    let head = head.to_ascii_lowercase();
    let length = head.lines().find_map(|l| l.strip_prefix("content-length:")).context("an answer without length")?;
    let mut body = vec![0; length.trim().parse()?];
    answer.read_exact(&mut body)?;
    let body = String::from_utf8(body)?;
    anyhow::ensure!(head.starts_with("http/1.1 200"), "{request}: {head}{body}");
    Ok(body)
}

/// What the server's manifest lists: all bytes, and its pieces by hash and size, equal ones once.
struct Bundle {
    bytes: u64,
    pieces: Vec<(String, u64)>,
}

impl Bundle {
    fn of(server: &Server) -> anyhow::Result<Self> {
        let manifest: Value = serde_json::from_str(&http(server.address(), "GET /edge/manifest.json", "")?)?;
        let list = |kind: &str| -> anyhow::Result<Vec<(String, u64)>> {
            let listed = manifest[kind].as_array().with_context(|| format!("no {kind} in {manifest}"))?;
            let one = |e: &Value| Some((e["sha256"].as_str()?.to_owned(), e["bytes"].as_u64()?));
            let mut found = Vec::new();
            for entry in listed {
                let entry = one(entry).with_context(|| format!("{entry} is no entry"))?;
                if !found.contains(&entry) {
                    found.push(entry);
                }
            }
            Ok(found)
        };
        let (files, pieces) = (list("files")?, list("pieces")?);
        let bytes = files.iter().chain(&pieces).map(|(_, size)| size).sum();
        println!("the bundle: {bytes} bytes, {} files, {} pieces", files.len(), pieces.len());
        anyhow::ensure!(!pieces.is_empty(), "the bundle has no pieces");
        Ok(Self { bytes, pieces })
    }
}

// ------------------------------------------------------------------------------------------------ the line

/// A line to the server on which pieces, and nothing else, are slow, counted, and can be cut.
struct Line {
    base: String,
    state: Arc<State>,
}

struct State {
    server: String,
    /// Bytes a second for all pieces together; 0: as fast as it goes.
    rate: u64,
    bytes: AtomicU64,
    free_at: Mutex<Instant>,
    connections: Mutex<Vec<(Arc<AtomicBool>, TcpStream)>>,
    ended: AtomicBool,
}

impl Line {
    fn open(server: &str, rate: u64) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let base = format!("http://{}", listener.local_addr()?);
        let state = Arc::new(State {
            server: server.to_owned(),
            rate,
            bytes: AtomicU64::new(0),
            free_at: Mutex::new(Instant::now()),
            connections: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let shared = state.clone();
        std::thread::spawn(move || {
            for browser in listener.incoming().flatten() {
                if shared.ended.load(Relaxed) {
                    return;
                }
                // A browser that goes away, or a server that does, only ends its own connection.
                if let Err(e) = shared.clone().connect(browser) {
                    println!("the line: {e}");
                }
            }
        });
        Ok(Self { base, state })
    }

    /// Bytes sent on connections that carry pieces.
    fn bytes(&self) -> u64 {
        self.state.bytes.load(Relaxed)
    }

    /// End what carries a piece just now.
    fn cut(&self) {
        let mut cut = 0;
        for (carries, browser) in self.state.connections.lock().expect("no thread panics with it").drain(..) {
            if carries.load(Relaxed) && browser.shutdown(Shutdown::Both).is_ok() {
                cut += 1;
            }
        }
        println!("cut {cut} connections");
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.state.ended.store(true, Relaxed);
        drop(TcpStream::connect(self.base.trim_start_matches("http://"))); // wakes the listener
    }
}

impl State {
    fn connect(self: Arc<Self>, mut browser: TcpStream) -> std::io::Result<()> {
        let mut server = TcpStream::connect(&self.server)?;
        let carries = Arc::new(AtomicBool::new(false));
        self.connections.lock().expect("no thread panics with it").push((carries.clone(), browser.try_clone()?));
        let (mut from_browser, mut to_server, asked) = (browser.try_clone()?, server.try_clone()?, carries.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            while let Ok(n @ 1..) = from_browser.read(&mut buffer) {
                if buffer[..n].starts_with(b"GET ") {
                    asked.store(buffer.starts_with(b"GET /edge/pieces/"), Relaxed);
                }
                if to_server.write_all(&buffer[..n]).is_err() {
                    break;
                }
            }
            drop(to_server.shutdown(Shutdown::Both));
        });
        std::thread::spawn(move || {
            let mut buffer = [0; 16 << 10];
            while let Ok(n @ 1..) = server.read(&mut buffer) {
                if carries.load(Relaxed) {
                    self.pace(n as u64);
                }
                if browser.write_all(&buffer[..n]).is_err() {
                    break;
                }
            }
            drop(browser.shutdown(Shutdown::Both));
        });
        Ok(())
    }

    /// Wait until the line is free for so many bytes.
    fn pace(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
        if self.rate == 0 {
            return;
        }
        let start = {
            let mut free_at = self.free_at.lock().expect("no thread panics with it");
            let start = (*free_at).max(Instant::now());
            *free_at = start + Duration::from_secs_f64(bytes as f64 / self.rate as f64);
            start
        };
        std::thread::sleep(start.saturating_duration_since(Instant::now()));
    }
}
