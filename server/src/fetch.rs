//! Models from the Hugging Face hub in its standard cache: only the files that are read, resumed after a break, and
//! checked before they get their name.
//!
//! hf-hub gives the requests (address, token, redirects, proxy) and the layout of the cache, as Python's tools have it.
//! Its own transfer is not used: hf-hub 0.5 checks no hash, spoils a part when a server ignores the range or when a try
//! fails before its first byte, never gets past a part that is already whole (HTTP 416), and waits for ever on a dead
//! connection; hf-hub 1.0 begins every file anew.

use anyhow::Context;
use fednano_shared::model::files::{INDEX, WEIGHTS, WeightIndex, is_plain};
use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde::Deserialize;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Display;
use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::RequestBuilder;
use ureq::typestate::WithoutBody;

/// The hub's address.
pub const HUB: &str = "https://huggingface.co";
/// Files without which no model loads.
const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
/// One of these says how pictures become pixels: the second, which transformers 5 writes, where the first is not.
const PICTURES: [&str; 2] = ["preprocessor_config.json", "processor_config.json"];
/// Files taken where a repository has them; the last two are for other programs that read the same snapshot.
const OPTIONAL: [&str; 5] = [
    "preprocessor_config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
];
/// Time to reach a server.
const CONNECT: Duration = Duration::from_secs(30);
/// A connection that is silent for so long is dead.
const SILENCE: Duration = Duration::from_secs(60);
/// Bytes read at once.
const BUFFER: usize = 1 << 18;

/// What to fetch, from where, to where.
#[derive(Clone)]
pub struct FetchOptions {
    /// `owner/name` on the hub.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// Address of the hub or of a mirror.
    pub endpoint: String,
    /// The cache's folder, the one that holds `models--owner--name`.
    pub cache: PathBuf,
    /// Access token for private and gated models.
    pub token: Option<String>,
    /// Tries in a row that bring no byte, before a file is given up.
    pub tries: u32,
}

/// What [`fetch`] tells while it works.
#[derive(Debug)]
pub enum Progress<'a> {
    /// The small files are there; so many weight files, of so many bytes together, are next.
    Weights(usize, u64),
    /// A file got further.
    File {
        /// Name.
        file: &'a str,
        /// What is done with it.
        stage: Stage,
        /// Bytes that are through; those received in earlier runs count.
        have: u64,
        /// Bytes in all.
        size: u64,
    },
    /// The file's connection broke for this cause; another one follows after the pause.
    Again(&'a str, Duration),
}

/// Where a file is in [`Progress::File`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Its bytes arrive.
    Receiving,
    /// It is hashed.
    Checking,
    /// Whole and right, fetched now.
    Fetched,
    /// Whole and right, there before.
    Kept,
}

/// Download a model into the cache; what is there already is checked and kept. Returns the snapshot's directory.
///
/// # Errors
/// Names that cannot be, no network, a model that is unknown, closed or of another kind, a damaged file, a full disk.
pub fn fetch(options: &FetchOptions, progress: &mut dyn FnMut(Progress<'_>)) -> anyhow::Result<PathBuf> {
    let (id, revision) = (&options.repo, &options.revision);
    anyhow::ensure!(
        is_repo(id) && is_revision(revision),
        "'{id}' at '{revision}' is no model of the hub; give owner/name, such as llava-hf/llava-1.5-7b-hf, and a \
         branch, tag or commit"
    );
    let endpoint = options.endpoint.trim_end_matches('/');
    anyhow::ensure!(
        endpoint.starts_with("http://") || endpoint.starts_with("https://"),
        "the endpoint '{endpoint}' is no address; it begins with https://, such as {HUB}"
    );

    let cache = Cache::new(options.cache.clone());
    let api = ApiBuilder::from_cache(cache.clone()).with_endpoint(endpoint.to_owned());
    let api = api.with_token(options.token.clone()).with_user_agent("fednano", env!("CARGO_PKG_VERSION"));
    let api = api.build().context("cannot set up requests to the hub")?;
    let named = Repo::with_revision(id.clone(), RepoType::Model, revision.clone());
    let listing = list(&api.repo(named.clone()), options)?;
    let listed: BTreeMap<String, Sibling> = listing.siblings.into_iter().map(|s| (s.rfilename.clone(), s)).collect();
    let commit = listing.sha;
    // It becomes the name of a folder.
    anyhow::ensure!(is_hex(&commit, 40), "{endpoint} gave '{commit}' as a commit; is it a Hugging Face hub?");
    let mut lacking: Vec<&str> = REQUIRED.into_iter().filter(|n| !listed.contains_key(*n)).collect();
    if !PICTURES.iter().any(|n| listed.contains_key(*n)) {
        lacking.push(PICTURES[0]);
    }
    if !listed.contains_key(INDEX) && !listed.contains_key(WEIGHTS) {
        lacking.push(WEIGHTS);
    }
    anyhow::ensure!(
        lacking.is_empty(),
        "{id} at '{revision}' lacks {}; FedNano reads LLaVA-1.5 models in Hugging Face's layout with safetensors, such \
         as llava-hf/llava-1.5-7b-hf",
        lacking.join(", ")
    );

    let cache = cache.repo(named);
    let mut run = Run {
        options,
        // By commit, so that a push to the branch in between cannot mix two versions.
        repo: api.repo(Repo::with_revision(id.clone(), RepoType::Model, commit.clone())),
        api: &api,
        snapshot: cache.pointer_path(&commit),
        cache,
        listed,
        progress,
    };
    for name in REQUIRED.into_iter().chain(OPTIONAL) {
        if run.listed.contains_key(name) {
            let remote = run.remote(name)?;
            run.store(&remote)?;
        }
    }
    let names = if run.listed.contains_key(INDEX) {
        let remote = run.remote(INDEX)?;
        run.store(&remote)?;
        let path = run.snapshot.join(INDEX);
        let index = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let unusable = || format!("{INDEX} of {id} is not usable; fetch another model or revision");
        WeightIndex::parse(&index).with_context(unusable)?.files()
    } else {
        vec![WEIGHTS.to_owned()]
    };
    let weights = names.iter().map(|n| run.remote(n)).collect::<anyhow::Result<Vec<Remote>>>()?;
    (run.progress)(Progress::Weights(weights.len(), weights.iter().map(|w| w.size).sum()));
    for remote in &weights {
        run.store(remote)?;
    }
    // Last, so that a branch never points to half a model. A commit needs no pointer.
    if *revision != commit {
        run.cache.create_ref(&commit).map_err(|e| disk(&options.cache, &e))?;
    }
    Ok(run.snapshot)
}

/// A model directory as it is, or a model of the hub (`owner/name`, `owner/name@revision`) that is in the cache.
///
/// # Errors
/// Neither; the error names the command that fetches it.
pub fn resolve_model(arg: &str) -> anyhow::Result<PathBuf> {
    if Path::new(arg).is_dir() {
        return Ok(PathBuf::from(arg));
    }
    let (repo, revision) = arg.split_once('@').unwrap_or((arg, "main"));
    anyhow::ensure!(
        is_repo(repo) && is_revision(revision),
        "there is no directory '{arg}'; give a model directory, or a model of the hub as owner/name after \
         `fednano fetch owner/name`"
    );
    cached(&cache_dir()?, repo, revision)
}

/// A whole model in a cache, without the network.
///
/// # Errors
/// It is not there, or not whole; the error names the command that fetches it.
pub fn cached(cache: &Path, repo: &str, revision: &str) -> anyhow::Result<PathBuf> {
    let named = Repo::with_revision(repo.to_owned(), RepoType::Model, revision.to_owned());
    let at = Cache::new(cache.to_owned()).repo(named);
    let command = format!("fednano fetch {repo} --revision {revision}");
    let command = command.trim_end_matches(" --revision main");
    let by_name = at.get("config.json").and_then(|f| f.parent().map(Path::to_owned));
    let by_commit = || Some(at.pointer_path(revision)).filter(|d| is_hex(revision, 40) && d.is_dir());
    let nowhere = || {
        format!(
            "there is no directory '{repo}', and no model of that name at '{revision}' in the cache {}; `{command}` \
             downloads one from the hub",
            cache.display()
        )
    };
    let dir = by_name.or_else(by_commit).with_context(nowhere)?;
    let lacking = lacking(&dir);
    anyhow::ensure!(lacking.is_empty(), "{} lacks {}; `{command}` fetches the rest", dir.display(), lacking.join(", "));
    Ok(dir)
}

/// What a snapshot still needs.
fn lacking(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = REQUIRED.map(str::to_owned).into();
    if !PICTURES.iter().any(|n| dir.join(n).exists()) {
        names.push(PICTURES[0].to_owned());
    }
    match std::fs::read(dir.join(INDEX)) {
        Ok(index) => match WeightIndex::parse(&index) {
            Ok(index) => names.extend(index.files()),
            Err(_) => names.push(format!("a usable {INDEX}")),
        },
        Err(_) => names.push(WEIGHTS.to_owned()),
    }
    // `exists` follows links: one that leads nowhere counts as lacking.
    names.retain(|n| !dir.join(n).exists());
    names
}

/// The hub's answer about a model; of its many fields, those that are needed.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

/// A file in a [`Listing`]. Size and hashes come with `blobs=true`.
#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    #[serde(rename = "blobId")]
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

/// A file too large for git itself.
#[derive(Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// A file to fetch.
struct Remote {
    name: String,
    size: u64,
    /// The cache's name for its content, which is a hash of it.
    blob: String,
}

impl Sibling {
    fn remote(&self) -> Option<Remote> {
        let (blob, size) = match &self.lfs {
            Some(lfs) => (lfs.sha256.as_ref().filter(|h| is_hex(h, 64))?, lfs.size.or(self.size)?),
            None => (self.blob_id.as_ref().filter(|h| is_hex(h, 40))?, self.size?),
        };
        Some(Remote { name: self.rfilename.clone(), size, blob: blob.clone() })
    }
}

fn list(repo: &ApiRepo, options: &FetchOptions) -> anyhow::Result<Listing> {
    let request = patient(repo.info_request().query("blobs", "true"));
    let mut response = request.call().map_err(|e| no_connection(options, &e))?;
    if !response.status().is_success() {
        return Err(refused(options, &options.repo, &response));
    }
    let body = response.body_mut().read_to_vec().map_err(|e| no_connection(options, &e))?;
    serde_json::from_slice(&body).with_context(|| {
        format!("{} does not answer as the hub does; check HF_ENDPOINT, and for a proxy in its place", options.endpoint)
    })
}

/// Status by hand, because the hub's words are in the headers; and an end to every wait.
fn patient(request: RequestBuilder<WithoutBody>) -> RequestBuilder<WithoutBody> {
    let config = request.config().http_status_as_error(false).timeout_connect(Some(CONNECT));
    config.timeout_recv_response(Some(SILENCE)).timeout_per_read(Some(SILENCE)).build()
}

/// One call of [`fetch`], once the listing is there.
struct Run<'a> {
    options: &'a FetchOptions,
    api: &'a Api,
    repo: ApiRepo,
    cache: CacheRepo,
    snapshot: PathBuf,
    listed: BTreeMap<String, Sibling>,
    progress: &'a mut dyn FnMut(Progress<'_>),
}

impl Run<'_> {
    /// Size and hash of a file.
    fn remote(&self, name: &str) -> anyhow::Result<Remote> {
        let (endpoint, id) = (&self.options.endpoint, &self.options.repo);
        let no_file = || format!("{id} lacks {name}, which its {INDEX} names; fetch another revision (--revision)");
        let sibling = self.listed.get(name).with_context(no_file)?;
        if let Some(remote) = sibling.remote() {
            return Ok(remote);
        }
        // A mirror may list names only; then the file's own headers tell.
        let no_word =
            || format!("{endpoint} tells neither size nor hash of {name}; use {HUB} or another mirror (HF_ENDPOINT)");
        let seen = self.api.metadata(&self.repo.url(name)).with_context(no_word)?;
        let blob = seen.etag().trim_start_matches("W/").to_owned();
        anyhow::ensure!(is_plain(&blob) && !blob.contains('.'), "{}", no_word());
        Ok(Remote { name: name.to_owned(), size: seen.size() as u64, blob })
    }

    /// Bring a file into the snapshot.
    fn store(&mut self, remote: &Remote) -> anyhow::Result<()> {
        let (blob, pointer) = (self.cache.blob_path(&remote.blob), self.snapshot.join(&remote.name));
        for folder in [&blob, &pointer].into_iter().filter_map(|p| p.parent()) {
            std::fs::create_dir_all(folder).map_err(|e| disk(folder, &e))?;
        }
        // Part and lock have the names that hf-hub gives them, so that no two programs write the same part.
        let part = blob.with_extension("part");
        let _lock = self.lock(&blob.with_extension("lock"), &remote.name)?;
        let cached = self.sound(&pointer, remote)? || self.sound(&blob, remote)?;
        if !cached {
            self.transfer(remote, &part)?;
            if let Some(fault) = self.fault(&part, remote)? {
                std::fs::remove_file(&part).map_err(|e| disk(&part, &e))?;
                anyhow::bail!(
                    "{} arrived damaged: {fault}; it was removed, run the same command again, and if it happens again \
                     look for a proxy or mirror that alters files (HF_ENDPOINT)",
                    remote.name
                );
            }
            std::fs::rename(&part, &blob).map_err(|e| disk(&blob, &e))?;
        }
        if !pointer.is_file() {
            // A link that leads nowhere would be in the way.
            drop(std::fs::remove_file(&pointer));
            link(&blob, &pointer, &remote.blob).map_err(|e| disk(&pointer, &e))?;
        }
        self.tell(remote, if cached { Stage::Kept } else { Stage::Fetched }, remote.size);
        Ok(())
    }

    fn tell(&mut self, remote: &Remote, stage: Stage, have: u64) {
        (self.progress)(Progress::File { file: &remote.name, stage, have, size: remote.size });
    }

    /// Keep others from the same file for as long as the returned file is open.
    fn lock(&self, path: &Path, name: &str) -> anyhow::Result<File> {
        let file = File::create(path).map_err(|e| disk(path, &e))?;
        // Some network file systems have no locks; going without is better than not at all.
        anyhow::ensure!(
            !matches!(file.try_lock(), Err(TryLockError::WouldBlock)),
            "another program is fetching {name} into {}; wait for its end and run the same command again",
            self.options.cache.display()
        );
        Ok(file)
    }

    /// Whether a file is there and right; a wrong one is removed.
    fn sound(&mut self, path: &Path, remote: &Remote) -> anyhow::Result<bool> {
        if !path.is_file() {
            return Ok(false);
        }
        let sound = self.fault(path, remote)?.is_none();
        if !sound {
            std::fs::remove_file(path).map_err(|e| disk(path, &e))?;
        }
        Ok(sound)
    }

    /// What is wrong with a file, if anything: its size, or the hash by which the hub calls it.
    fn fault(&mut self, path: &Path, remote: &Remote) -> anyhow::Result<Option<String>> {
        let unreadable = || format!("cannot read {}; remove it and run the same command again", path.display());
        let file = File::open(path).with_context(unreadable)?;
        let size = file.metadata().with_context(unreadable)?.len();
        if size != remote.size {
            return Ok(Some(format!("it has {size} bytes, the hub says {}", remote.size)));
        }
        let each = |have| self.tell(remote, Stage::Checking, have);
        let (kind, found) = if is_hex(&remote.blob, 64) {
            ("SHA-256", digest(Sha256::new(), file, each).with_context(unreadable)?)
        } else if is_hex(&remote.blob, 40) {
            // As git hashes a file.
            let header = Sha1::new_with_prefix(format!("blob {size}\0"));
            ("git hash", digest(header, file, each).with_context(unreadable)?)
        } else {
            // A mirror with tags of its own: the size has to do.
            return Ok(None);
        };
        Ok((found != remote.blob).then(|| format!("its {kind} is {found}, the hub says {}", remote.blob)))
    }

    /// Receive a part to its end, over as many connections as it takes.
    fn transfer(&mut self, remote: &Remote, part: &Path) -> anyhow::Result<()> {
        let fault = |e: std::io::Error| disk(part, &e);
        let mut file = File::options().append(true).create(true).open(part).map_err(fault)?;
        let mut have = file.metadata().map_err(fault)?.len();
        if have > remote.size {
            file.set_len(0).map_err(fault)?;
            have = 0;
        }
        let mut idle: u32 = 0;
        while have != remote.size {
            let cause = self.receive(remote, part, &mut file, have)?;
            let now = file.metadata().map_err(fault)?.len();
            // Tries count only when they bring nothing: a poor line gets there too.
            idle = if now > have { 0 } else { idle + 1 };
            have = now;
            if have == remote.size {
                break;
            }
            anyhow::ensure!(
                idle < self.options.tries,
                "{}: {cause}; {have} of {} bytes are kept, the same command goes on from there. Check the network and \
                 that {} can be reached, or name a mirror (HF_ENDPOINT) or a proxy (HTTPS_PROXY)",
                remote.name,
                remote.size,
                self.options.endpoint
            );
            let pause = if idle == 0 { Duration::ZERO } else { Duration::from_secs(1 << (idle - 1).min(5)) };
            (self.progress)(Progress::Again(&cause, pause));
            std::thread::sleep(pause);
        }
        Ok(())
    }

    /// Receive over one connection from `have` on. Returns why it ended; if that was the file's end, its length tells.
    fn receive(&mut self, remote: &Remote, part: &Path, file: &mut File, mut have: u64) -> anyhow::Result<String> {
        // hf-hub's own agent and headers, at another address. Compressed, offsets would mean nothing.
        let request = self.repo.info_request().uri(self.repo.url(&remote.name));
        let mut request = patient(request).header("accept-encoding", "identity");
        if have > 0 {
            request = request.header("range", format!("bytes={have}-"));
        }
        let response = match request.call() {
            Ok(response) => response,
            Err(e) => return Ok(e.to_string()),
        };
        let range = response.headers().get("content-range").and_then(|v| v.to_str().ok()).unwrap_or_default();
        let empty = || file.set_len(0).map_err(|e| disk(part, &e));
        match response.status().as_u16() {
            // This server knows no ranges, and sends the whole.
            200 if have > 0 => {
                empty()?;
                have = 0;
            }
            200 => {}
            206 if range.starts_with(&format!("bytes {have}-")) => {}
            206 | 416 => {
                empty()?;
                return Ok(format!("asked for bytes from {have} on, the server has '{range}'"));
            }
            status @ (408 | 429 | 500..=599) => return Ok(format!("the server answered HTTP {status}")),
            _ => return Err(refused(self.options, &remote.name, &response)),
        }
        let mut body = response.into_body().into_reader().take(remote.size - have);
        let mut buffer = vec![0; BUFFER];
        loop {
            let read = match body.read(&mut buffer) {
                Ok(0) => return Ok("the connection ended too early".into()),
                Ok(read) => read,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return Ok(e.to_string()),
            };
            file.write_all(&buffer[..read]).map_err(|e| disk(part, &e))?;
            have += read as u64;
            self.tell(remote, Stage::Receiving, have);
        }
    }
}

/// Hash a file in pieces.
fn digest<D: Digest>(mut hasher: D, mut file: File, mut each: impl FnMut(u64)) -> std::io::Result<String> {
    let mut buffer = vec![0; BUFFER];
    let mut have = 0;
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hasher.finalize().iter().map(|b| format!("{b:02x}")).collect());
        }
        hasher.update(&buffer[..read]);
        have += read as u64;
        each(have);
    }
}

/// A snapshot's file is a link to its blob, relative, so that a cache can be moved.
fn link(blob: &Path, pointer: &Path, name: &str) -> std::io::Result<()> {
    let target = Path::new("../../blobs").join(name);
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(target, pointer);
    #[cfg(windows)]
    let linked = std::os::windows::fs::symlink_file(target, pointer);
    // exFAT knows no links, and Windows may forbid them; then the file itself moves, as with hf-hub.
    linked.or_else(|_| std::fs::rename(blob, pointer))
}

/// Nothing answers at the endpoint.
fn no_connection(options: &FetchOptions, cause: &dyn Display) -> anyhow::Error {
    let there = cached(&options.cache, &options.repo, &options.revision).ok();
    let there =
        there.map(|d| format!(". The cache has this model already: --model {}", d.display())).unwrap_or_default();
    anyhow::anyhow!(
        "cannot reach {}: {cause}; check the network, name a mirror in HF_ENDPOINT (or --endpoint) or a proxy in \
         HTTPS_PROXY or ALL_PROXY; a model directory copied by hand works too (--model DIR){there}",
        options.endpoint
    )
}

/// The hub answered, and said no.
fn refused(options: &FetchOptions, what: &str, response: &ureq::http::Response<ureq::Body>) -> anyhow::Error {
    let (endpoint, id, status) = (options.endpoint.trim_end_matches('/'), &options.repo, response.status().as_u16());
    let words = response.headers().get("x-error-message").and_then(|v| v.to_str().ok());
    let words = words.map(|w| format!(" ({w})")).unwrap_or_default();
    let remedy = match status {
        // The hub says 401 for an unknown name too when there is no token, so that private names stay private.
        401 | 403 | 404 => format!(
            "the model is unknown, private or gated: check its name and the revision '{}' at {endpoint}/{id}, accept \
             its terms there if it has any, and give a token of that account in HF_TOKEN or by `hf auth login` ({})",
            options.revision,
            if options.token.is_some() { "a token was sent" } else { "no token was sent" }
        ),
        429 => "too many requests: wait some minutes, or give a token in HF_TOKEN".into(),
        _ => "try again later, or name a mirror in HF_ENDPOINT".into(),
    };
    anyhow::anyhow!("{endpoint} answered HTTP {status} for {what}{words}; {remedy}")
}

/// A file that cannot be written.
fn disk(path: &Path, e: &std::io::Error) -> anyhow::Error {
    let remedy = if matches!(e.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
        "free some space and run the same command again, what is there is kept; or name a folder elsewhere in HF_HOME"
    } else {
        "make the folder writable, or name another one in HF_HOME"
    };
    anyhow::anyhow!("cannot write {}: {e}; {remedy}", path.display())
}

/// An environment variable that says something.
pub fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|v| !v.is_empty())
}

/// Hugging Face's folder: `HF_HOME`, or `~/.cache/huggingface`.
///
/// # Errors
/// No home directory, and no variable in its place.
pub fn hf_home() -> anyhow::Result<PathBuf> {
    if let Some(home) = variable("HF_HOME") {
        return Ok(home.into());
    }
    let caches = variable("XDG_CACHE_HOME").map(PathBuf::from);
    let caches = caches.or_else(|| std::env::home_dir().map(|home| home.join(".cache")));
    Ok(caches.context("there is no home directory; name a folder for models in HF_HOME")?.join("huggingface"))
}

/// The hub's cache: `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or `~/.cache/huggingface/hub`.
///
/// # Errors
/// No home directory, and no variable in its place.
pub fn cache_dir() -> anyhow::Result<PathBuf> {
    match variable("HF_HUB_CACHE") {
        Some(dir) => Ok(dir.into()),
        None => Ok(hf_home()?.join("hub")),
    }
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_repo(text: &str) -> bool {
    text.split_once('/').is_some_and(|(owner, name)| is_plain(owner) && is_plain(name))
}

fn is_revision(text: &str) -> bool {
    text.split('/').all(is_plain)
}
