//! Models from a hub, here a small imitation of it on this machine: its listing, its redirect to large files, its
//! headers; and what goes wrong with it.

use anyhow::Context;
use fednano_server::fetch::{FetchOptions, Progress, Stage, cached, fetch, resolve_model};
use fednano_shared::model::files::ModelFiles;
use fednano_tests::{LIMIT, block, fixture};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const REPO: &str = "llava-hf/tiny-llava";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "model.safetensors";

/// What the hub has, how it behaves, and what it has seen.
#[derive(Default)]
struct State {
    endpoint: String,
    files: BTreeMap<String, Vec<u8>>,
    /// Sizes and hashes in the listing, as the hub has them and some mirrors do not.
    lists_hashes: bool,
    /// Ranges are answered with the whole file.
    knows_no_ranges: bool,
    /// Cut the weights' connection once after so many bytes.
    cut: Option<usize>,
    /// After the cut, answer 503.
    fails_after_cut: bool,
    failing: bool,
    /// This file leaves with one bit flipped.
    corrupt: Option<&'static str>,
    /// This file is closed to all.
    gated: Option<&'static str>,
    /// Bytes of content sent, for each file.
    sent: BTreeMap<String, usize>,
    /// Range headers of requests for the weights.
    ranges: Vec<String>,
}

impl State {
    fn sent(&self) -> usize {
        self.sent.values().sum()
    }
}

/// The imitation.
struct Hub {
    endpoint: String,
    state: Arc<Mutex<State>>,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn sha256(content: &[u8]) -> String {
    hex(&Sha256::digest(content))
}

/// The hash under which git keeps a file.
fn git_hash(content: &[u8]) -> String {
    let header = Sha1::new_with_prefix(format!("blob {}\0", content.len()));
    hex(&header.chain_update(content).finalize())
}

/// Weights lie in large storage, all else in git.
fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn blob_name(name: &str, content: &[u8]) -> String {
    if is_large(name) { sha256(content) } else { git_hash(content) }
}

impl Hub {
    /// Serve the reference checkpoint, and files of the same repository that nobody needs.
    fn start() -> anyhow::Result<Self> {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(fixture())? {
            let path = entry?.path();
            let name = path.file_name().and_then(|n| n.to_str()).context("a name that is no text")?.to_owned();
            if path.is_file() && name != "expected.safetensors" && name != "meta.json" {
                files.insert(name, std::fs::read(&path)?);
            }
        }
        files.insert("README.md".into(), b"# A model".to_vec());
        files.insert("pytorch_model.bin".into(), vec![7; 3_000_000]);
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let state = State { endpoint: endpoint.clone(), files, lists_hashes: true, ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        // It ends with the process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = shared.clone();
                // A client that hangs up is no fault of the server's.
                std::thread::spawn(move || drop(answer(stream, &shared)));
            }
        });
        Ok(Self { endpoint, state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The same weights in two files' clothing: an index and one part.
    fn shard(&self) {
        let mut state = self.state();
        let part = "model-00001-of-00001.safetensors";
        let weights = state.files.remove(WEIGHTS).unwrap_or_default();
        let names = safetensors::SafeTensors::deserialize(&weights)
            .map(|f| f.names().into_iter().map(str::to_owned).collect::<Vec<_>>())
            .unwrap_or_default();
        let map: serde_json::Map<String, serde_json::Value> = names.into_iter().map(|n| (n, part.into())).collect();
        let index = serde_json::json!({ "metadata": {}, "weight_map": map });
        state.files.insert(part.into(), weights);
        state.files.insert("model.safetensors.index.json".into(), index.to_string().into_bytes());
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A response, of which `send` bytes are sent.
struct Response {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    send: usize,
}

impl Response {
    fn new(status: &'static str, body: Vec<u8>) -> Self {
        Self { status, headers: Vec::new(), send: body.len(), body }
    }

    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

/// One request, one response, then the connection ends.
fn answer(mut stream: TcpStream, state: &Mutex<State>) -> anyhow::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().context("no request")??;
    let path = first.split(' ').nth(1).context("no path")?.to_owned();
    let mut range = None;
    for line in lines {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("range")
        {
            range = Some(value.trim().to_owned());
        }
    }
    let response = respond(&path, range.as_deref(), &mut lock(state));
    let mut head = format!("HTTP/1.1 {}\r\nConnection: close\r\n", response.status);
    for (name, value) in &response.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("Content-Length: {}\r\n\r\n", response.body.len());
    stream.write_all(head.as_bytes())?;
    stream.write_all(&response.body[..response.send])?;
    Ok(())
}

/// The hub's routes: the listing, a file by name, a large file by its hash.
fn respond(path: &str, range: Option<&str>, state: &mut State) -> Response {
    let unknown = || Response::new("404 Not Found", b"{}".to_vec()).with("X-Error-Code", "RepoNotFound");
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    if let Some(rest) = path.strip_prefix("/api/models/") {
        let known = [format!("{REPO}/revision/main"), format!("{REPO}/revision/{COMMIT}")];
        if !known.iter().any(|k| k == rest) {
            return unknown().with("X-Error-Message", "Repository not found");
        }
        let hashes = state.lists_hashes && query.contains("blobs=true");
        let siblings = state.files.iter().map(|(name, content)| match (hashes, is_large(name)) {
            (false, _) => serde_json::json!({ "rfilename": name }),
            (true, false) => {
                serde_json::json!({ "rfilename": name, "size": content.len(), "blobId": git_hash(content) })
            }
            (true, true) => serde_json::json!({
                "rfilename": name,
                "size": content.len(),
                "blobId": git_hash(b"a pointer"),
                "lfs": { "sha256": sha256(content), "size": content.len(), "pointerSize": 134 },
            }),
        });
        let siblings: Vec<serde_json::Value> = siblings.collect();
        let listing = serde_json::json!({ "id": REPO, "sha": COMMIT, "private": false, "siblings": siblings });
        return Response::new("200 OK", listing.to_string().into_bytes()).with("Content-Type", "application/json");
    }
    if let Some(hash) = path.strip_prefix("/storage/") {
        let found = state.files.iter().find(|(name, content)| is_large(name) && sha256(content) == hash);
        let Some((name, content)) = found.map(|(n, c)| (n.clone(), c.clone())) else { return unknown() };
        return content_of(&name, content, range, state).with("ETag", "\"of-the-storage\"");
    }
    let names = [format!("/{REPO}/resolve/main/"), format!("/{REPO}/resolve/{COMMIT}/")];
    let name = names.iter().find_map(|prefix| path.strip_prefix(prefix.as_str())).unwrap_or_default();
    let Some(content) = state.files.get(name).cloned() else { return unknown() };
    if state.gated == Some(name) {
        return Response::new("403 Forbidden", b"{}".to_vec())
            .with("X-Error-Code", "GatedRepo")
            .with("X-Error-Message", "Access to this model is restricted");
    }
    let blob = blob_name(name, &content);
    if is_large(name) {
        // An absolute address, as that of the real storage; there, nobody knows of commits any more.
        return Response::new("302 Found", Vec::new())
            .with("Location", format!("{}/storage/{blob}", state.endpoint))
            .with("X-Repo-Commit", COMMIT)
            .with("X-Linked-Size", content.len().to_string())
            .with("X-Linked-Etag", format!("\"{blob}\""))
            .with("Accept-Ranges", "bytes");
    }
    let name = name.to_owned();
    content_of(&name, content, range, state).with("X-Repo-Commit", COMMIT).with("ETag", format!("\"{blob}\""))
}

/// A file's content, or a range of it, with the faults that are asked for.
fn content_of(name: &str, mut content: Vec<u8>, range: Option<&str>, state: &mut State) -> Response {
    if state.failing && is_large(name) {
        return Response::new("503 Service Unavailable", Vec::new());
    }
    if state.corrupt == Some(name) {
        let middle = content.len() / 2;
        content[middle] ^= 1;
    }
    if is_large(name) {
        state.ranges.extend(range.map(str::to_owned));
    }
    let all = content.len();
    let asked = range.filter(|_| !state.knows_no_ranges).and_then(|r| r.strip_prefix("bytes=")?.split_once('-'));
    let mut response = match asked {
        Some((from, to)) => {
            let from: usize = from.parse().unwrap_or(all);
            let to = to.parse().map_or(all, |last: usize| (last + 1).min(all));
            if from >= to {
                return Response::new("416 Range Not Satisfiable", Vec::new())
                    .with("Content-Range", format!("bytes */{all}"));
            }
            Response::new("206 Partial Content", content[from..to].to_vec())
                .with("Content-Range", format!("bytes {from}-{}/{all}", to - 1))
        }
        None => Response::new("200 OK", content),
    };
    if is_large(name)
        && let Some(after) = state.cut.take()
    {
        response.send = after.min(response.body.len());
        state.failing = state.fails_after_cut;
    }
    *state.sent.entry(name.to_owned()).or_default() += response.send;
    response.with("Accept-Ranges", "bytes").with("Content-Type", "application/octet-stream")
}

fn options(hub: &Hub, cache: &Path) -> FetchOptions {
    FetchOptions {
        repo: REPO.into(),
        revision: "main".into(),
        endpoint: hub.endpoint.clone(),
        cache: cache.join("hub"),
        token: None,
        tries: 1,
    }
}

/// Fetch quietly; with it, how often a connection was begun again.
fn quiet(options: &FetchOptions) -> anyhow::Result<(PathBuf, usize)> {
    let mut again = 0;
    let dir = fetch(options, &mut |progress| again += usize::from(matches!(progress, Progress::Again(..))))?;
    Ok((dir, again))
}

/// The words of a fetch that has to fail.
fn refused(options: &FetchOptions, words: &[&str]) -> anyhow::Result<()> {
    let said = format!("{:#}", quiet(options).err().context("it was fetched")?);
    println!("{said}");
    for word in words {
        anyhow::ensure!(said.contains(word), "'{word}' is not in: {said}");
    }
    Ok(())
}

/// Every file of the cache's blobs is named by its own hash: nothing half, nothing damaged. Returns their number.
fn blobs_are_right(cache: &Path) -> anyhow::Result<usize> {
    let mut blobs = 0;
    for entry in std::fs::read_dir(cache.join("hub/models--llava-hf--tiny-llava/blobs"))? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).context("a name that is no text")?;
        if name.ends_with(".lock") {
            continue;
        }
        let content = std::fs::read(&path)?;
        anyhow::ensure!(name == sha256(&content) || name == git_hash(&content), "{name} has another content");
        blobs += 1;
    }
    Ok(blobs)
}

/// Blocking work within the usual limit.
fn limited(test: fn() -> anyhow::Result<()>) -> anyhow::Result<()> {
    block(LIMIT, async move { tokio::task::spawn_blocking(test).await? })
}

pub fn whole() -> anyhow::Result<()> {
    limited(|| {
        for (sharded, lists_hashes) in [(false, true), (true, true), (true, false)] {
            let (hub, cache) = (Hub::start()?, tempfile::tempdir()?);
            hub.state().lists_hashes = lists_hashes;
            if sharded {
                hub.shard();
            }
            let options = options(&hub, cache.path());
            let mut fetched = Vec::new();
            let dir = fetch(&options, &mut |progress| {
                if let Progress::File { file, stage: Stage::Fetched, .. } = progress {
                    fetched.push(file.to_owned());
                }
            })?;
            println!("sharded {sharded}, hashes listed {lists_hashes}: {}", fetched.join(", "));
            anyhow::ensure!(ModelFiles::open(&dir)?.config.vision.image_size > 0);
            anyhow::ensure!(fetched.len() == if sharded { 9 } else { 8 }, "other files than those needed: {fetched:?}");
            anyhow::ensure!(!dir.join("README.md").exists() && !dir.join("pytorch_model.bin").exists());
            for name in &fetched {
                let right = hub.state().files.get(name).cloned().context("no such file")?;
                anyhow::ensure!(std::fs::read(dir.join(name))? == right, "{name} differs");
            }
            // The cache has the layout that Python's tools expect.
            let root = options.cache.join("models--llava-hf--tiny-llava");
            anyhow::ensure!(dir == root.join("snapshots").join(COMMIT), "{}", dir.display());
            anyhow::ensure!(std::fs::read_to_string(root.join("refs/main"))? == COMMIT);
            anyhow::ensure!(blobs_are_right(cache.path())? == fetched.len());
            anyhow::ensure!(cached(&options.cache, REPO, "main")? == dir);
            anyhow::ensure!(cached(&options.cache, REPO, COMMIT)? == dir);
        }
        Ok(())
    })
}

pub fn second_time() -> anyhow::Result<()> {
    limited(|| {
        let (hub, cache) = (Hub::start()?, tempfile::tempdir()?);
        let options = options(&hub, cache.path());
        let (dir, _) = quiet(&options)?;
        let sent = hub.state().sent();
        anyhow::ensure!(quiet(&options)?.0 == dir);
        let again = hub.state().sent() - sent;
        anyhow::ensure!(again == 0, "{again} bytes were fetched again");
        // What was spoiled on disk since is noticed, and only that is fetched.
        let spoiled = std::fs::canonicalize(dir.join("config.json"))?;
        let size = std::fs::read(&spoiled)?.len();
        std::fs::write(&spoiled, vec![b' '; size])?;
        quiet(&options)?;
        let again = hub.state().sent() - sent;
        anyhow::ensure!(again == size, "{again} bytes were fetched for one file of {size}");
        anyhow::ensure!(ModelFiles::open(&dir).is_ok() && blobs_are_right(cache.path())? == 8);
        Ok(())
    })
}

pub fn resume() -> anyhow::Result<()> {
    limited(|| {
        for (fails, knows_no_ranges) in [(false, false), (true, false), (false, true)] {
            let (hub, cache) = (Hub::start()?, tempfile::tempdir()?);
            let options = options(&hub, cache.path());
            let size = hub.state().files.get(WEIGHTS).context("no weights")?.len();
            let part = size / 3;
            {
                let mut state = hub.state();
                state.cut = Some(part);
                state.fails_after_cut = fails;
                state.knows_no_ranges = knows_no_ranges;
            }
            if fails {
                // The first run ends in the middle; another one goes on, later.
                refused(&options, &[WEIGHTS, "503", "bytes are kept", "same command", "HF_ENDPOINT"])?;
                anyhow::ensure!(cached(&options.cache, REPO, "main").is_err(), "half a model passes for a whole one");
                hub.state().failing = false;
            }
            let (dir, again) = quiet(&options)?;
            anyhow::ensure!(again == usize::from(!fails), "{again} connections were begun again");
            anyhow::ensure!(ModelFiles::open(&dir).is_ok() && blobs_are_right(cache.path())? == 8);
            let state = hub.state();
            let sent = state.sent.get(WEIGHTS).copied().unwrap_or_default();
            println!("{sent} bytes sent for a file of {size}; ranges: {}", state.ranges.join(", "));
            let expected = format!("bytes={part}-");
            anyhow::ensure!(state.ranges.contains(&expected), "nobody asked for {expected}");
            let limit = if knows_no_ranges { size + part } else { size + size / 2 };
            anyhow::ensure!(sent <= limit, "{sent} bytes for a file of {size}");
        }
        Ok(())
    })
}

pub fn damaged() -> anyhow::Result<()> {
    limited(|| {
        for (name, kind) in [(WEIGHTS, "SHA-256"), ("tokenizer.json", "git hash")] {
            let (hub, cache) = (Hub::start()?, tempfile::tempdir()?);
            let options = options(&hub, cache.path());
            hub.state().corrupt = Some(name);
            refused(&options, &[name, "damaged", kind, "removed", "same command"])?;
            // Nothing of it is left, neither as a blob nor as a part that a later run would go on from.
            blobs_are_right(cache.path())?;
            let snapshot = options.cache.join("models--llava-hf--tiny-llava/snapshots").join(COMMIT);
            anyhow::ensure!(std::fs::symlink_metadata(snapshot.join(name)).is_err(), "{name} is in the snapshot");
            anyhow::ensure!(cached(&options.cache, REPO, "main").is_err());
            hub.state().corrupt = None;
            anyhow::ensure!(ModelFiles::open(&quiet(&options)?.0).is_ok());
        }
        Ok(())
    })
}

pub fn no_network() -> anyhow::Result<()> {
    limited(|| {
        let cache = tempfile::tempdir()?;
        let hub = Hub::start()?;
        let reachable = options(&hub, cache.path());
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let endpoint = format!("http://127.0.0.1:{port}");
        let closed = FetchOptions { endpoint: endpoint.clone(), ..reachable.clone() };
        refused(&closed, &["cannot reach", &endpoint, "HF_ENDPOINT", "HTTPS_PROXY", "by hand", "--model DIR"])?;
        // What is there is there without the network too.
        let (dir, _) = quiet(&reachable)?;
        refused(&closed, &["has this model already", &dir.display().to_string()])?;
        let no_address = FetchOptions { endpoint: "huggingface.co".into(), ..reachable };
        refused(&no_address, &["'huggingface.co' is no address", "https://"])
    })
}

pub fn unknown_or_closed() -> anyhow::Result<()> {
    limited(|| {
        let (hub, cache) = (Hub::start()?, tempfile::tempdir()?);
        let known = options(&hub, cache.path());
        let unknown = FetchOptions { repo: "nobody/nothing".into(), ..known.clone() };
        refused(&unknown, &["HTTP 404", "nobody/nothing", "Repository not found", "HF_TOKEN", "hf auth login"])?;
        let revision = FetchOptions { revision: "v9".into(), ..known.clone() };
        refused(&revision, &["HTTP 404", "'v9'", "no token was sent"])?;
        let no_name = FetchOptions { repo: "../../etc".into(), ..known.clone() };
        refused(&no_name, &["owner/name"])?;
        hub.state().gated = Some(WEIGHTS);
        let with_token = FetchOptions { token: Some("hf_not_a_token".into()), ..known.clone() };
        refused(&with_token, &["HTTP 403", WEIGHTS, "is restricted", "terms", "a token was sent"])?;
        hub.state().files.remove(WEIGHTS);
        refused(&known, &["lacks model.safetensors", "llava-hf/llava-1.5-7b-hf"])?;
        // A model that is not in the cache: the error has the command.
        let words = cached(&known.cache, "nobody/nothing", "main").err().context("found")?.to_string();
        anyhow::ensure!(words.contains("`fednano fetch nobody/nothing`"), "{words}");
        let words = resolve_model("no directory").err().context("found")?.to_string();
        anyhow::ensure!(words.contains("fednano fetch owner/name"), "{words}");
        anyhow::ensure!(resolve_model(&fixture().display().to_string())? == fixture());
        Ok(())
    })
}
