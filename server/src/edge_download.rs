//! A native client's download of its half of the model: each file and piece by its hash, kept for the next time, continued where
//! an earlier download stopped.

use crate::native::Invite;
use anyhow::Context;
use burn::tensor::Device;
use fednano_shared::bundle::assemble::BundleLoader;
use fednano_shared::bundle::{Manifest, PieceEntry};
use fednano_shared::edge::NanoEdge;
use fednano_shared::wire::SessionToken;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::Agent;
use url::Url;

/// A longer manifest is none.
const LARGEST_MANIFEST: u64 = 32 << 20;
/// Tries of a piece that arrives damaged or in part.
const TRIES: usize = 2;
/// Time to reach the server.
const CONNECT: Duration = Duration::from_secs(30);
/// A connection that is silent for so long is dead.
const SILENCE: Duration = Duration::from_secs(60);

/// What came over the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Downloaded {
    /// Bytes of files and pieces.
    pub pieces: u64,
    /// Bytes of the manifest, which is fetched each time.
    pub manifest: u64,
    /// Under which the server has counted the same, for [`Hello::download`](fednano_shared::wire::Hello::download).
    pub id: String,
}

impl Downloaded {
    /// All of it, for [`Hello::edge_bytes`](fednano_shared::wire::Hello::edge_bytes).
    pub const fn bytes(&self) -> u64 {
        self.pieces.saturating_add(self.manifest)
    }
}

/// [`download_edge`] for who is no participant: with the bytes of files and pieces downloaded.
///
/// # Errors
/// As there.
pub fn fetch_edge(invite: &Invite, device: &Device, cache_dir: Option<PathBuf>) -> anyhow::Result<(NanoEdge, u64)> {
    download_edge(invite, device, cache_dir).map(|(edge, downloaded)| (edge, downloaded.pieces))
}

/// Fetch the client's half of the server's model and load it, one piece in memory at a time. What is in `cache_dir` (none:
/// `fednano` in the user's cache) is not fetched again.
///
/// # Errors
/// No server, a full disk, or what stays damaged, by its hash.
pub fn download_edge(
    invite: &Invite,
    device: &Device,
    cache_dir: Option<PathBuf>,
) -> anyhow::Result<(NanoEdge, Downloaded)> {
    let folder = cache_dir.map_or_else(user_cache, Ok)?.join("pieces");
    std::fs::create_dir_all(&folder).with_context(|| {
        format!("cannot create {}; set XDG_CACHE_HOME to a folder that can be written", folder.display())
    })?;
    let config = Agent::config_builder().timeout_connect(Some(CONNECT)).timeout_per_read(Some(SILENCE)).build();
    let id = SessionToken::made_up().map_err(anyhow::Error::msg)?.0; // as unlikely to be another's
    let downloaded = Downloaded { pieces: 0, manifest: 0, id };
    let mut source = Source { agent: Agent::new_with_config(config), base: &invite.base, folder, downloaded };
    let manifest = source.manifest()?;
    let bytes = manifest.files.iter().map(|f| f.bytes).chain(manifest.pieces.iter().map(|p| p.bytes)).sum::<u64>();
    tracing::info!("{} for this machine: {:.1} MB in {}", manifest.model, bytes as f64 / 1e6, manifest.edge_dtype);
    let mut small = BTreeMap::new();
    for file in &manifest.files {
        let entry = PieceEntry { sha256: file.sha256.clone(), bytes: file.bytes };
        small.insert(file.name.clone(), source.obtain("files", &entry)?);
    }
    let mut loader = BundleLoader::open(manifest.clone(), &small, device)?;
    for piece in &manifest.pieces {
        loader.add(&source.obtain("pieces", piece)?)?;
    }
    Ok((loader.finish()?, source.downloaded))
}

/// The folder of this program in the user's cache.
///
/// # Errors
/// The environment names none.
pub(crate) fn user_cache() -> anyhow::Result<PathBuf> {
    // The XDG specification has relative paths ignored.
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
    Ok(cache
        .context("neither XDG_CACHE_HOME nor HOME names a folder for downloads; set XDG_CACHE_HOME")?
        .join("fednano"))
}

/// A server's files, and what is kept of them.
struct Source<'a> {
    agent: Agent,
    base: &'a Url,
    folder: PathBuf,
    downloaded: Downloaded,
}

impl Source<'_> {
    /// A request that the server counts. Compressed bytes could not be continued, nor compared with the server's count.
    fn get(&self, url: &Url) -> ureq::RequestBuilder<ureq::typestate::WithoutBody> {
        let id = self.downloaded.id.as_str();
        self.agent.get(url.as_str()).header("Accept-Encoding", "identity").header("X-Download", id)
    }

    fn manifest(&mut self) -> anyhow::Result<Manifest> {
        let url = self.base.join("edge/manifest.json")?;
        let response = self.get(&url).call();
        let mut response =
            response.with_context(|| format!("cannot fetch {url}; is the server running, and the link right?"))?;
        let json = response.body_mut().with_config().limit(LARGEST_MANIFEST).read_to_vec();
        let json = json.with_context(|| format!("{url} broke off; try again"))?;
        self.downloaded.manifest += json.len() as u64;
        Manifest::from_json(&json).with_context(|| format!("{url} cannot be used; is that a FedNano server?"))
    }

    /// The bytes of an entry, from the cache or from the server.
    fn obtain(&mut self, kind: &str, entry: &PieceEntry) -> anyhow::Result<Vec<u8>> {
        let kept = self.folder.join(&entry.sha256);
        if let Some(bytes) = intact(&kept, entry) {
            return Ok(bytes);
        }
        if kept.exists() {
            tracing::warn!("{} is damaged and is fetched again", kept.display());
        }
        let part = self.folder.join(format!("{}.part", entry.sha256));
        let unwritable = || format!("cannot write {}; is the disk full?", part.display());
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(&part).with_context(unwritable)?;
        // Other participants on this machine wait for the one that is fetching it. Where a file system has no locks, the worst
        // that they do to each other is a part that is damaged and fetched again.
        drop(file.lock());
        if let Some(bytes) = intact(&kept, entry) {
            return Ok(bytes);
        }
        let url = self.base.join(&format!("edge/{kind}/{}", entry.sha256))?;
        let mut last = None;
        for attempt in 0..TRIES {
            match self.complete(&url, entry, attempt > 0, &mut file) {
                Ok(bytes) => {
                    std::fs::rename(&part, &kept).with_context(unwritable)?;
                    return Ok(bytes);
                }
                Err(e) => {
                    tracing::warn!("{url}: {e:#}; try {} of {TRIES}", attempt + 1);
                    last = Some(e);
                }
            }
        }
        let cause = last.unwrap_or_else(|| anyhow::anyhow!("it was not tried"));
        Err(cause.context(format!(
            "{url} could not be fetched, {TRIES} tries; join again to go on, and tell the operator if it stays so"
        )))
    }

    /// Download what a part lacks and check all of it. A broken connection leaves what has come, damage leaves nothing.
    fn complete(&mut self, url: &Url, entry: &PieceEntry, again: bool, file: &mut File) -> anyhow::Result<Vec<u8>> {
        if file.metadata()?.len() > entry.bytes {
            file.set_len(0)?;
        }
        let had = file.metadata()?.len();
        if had < entry.bytes {
            self.download(url, entry, had, again, file)?;
        }
        let mut bytes = Vec::new();
        file.rewind()?;
        file.read_to_end(&mut bytes)?;
        let found = bytes.len() as u64;
        anyhow::ensure!(found >= entry.bytes, "the connection ended after {found} of {} bytes", entry.bytes);
        if let Err(damaged) = entry.verify(&bytes) {
            file.set_len(0)?;
            return Err(damaged.into());
        }
        Ok(bytes)
    }

    /// Append to a part that has `had` bytes, or begin it anew where the server cannot continue it.
    fn download(
        &mut self,
        url: &Url,
        entry: &PieceEntry,
        had: u64,
        again: bool,
        file: &mut File,
    ) -> anyhow::Result<()> {
        let mut request = self.get(url);
        if had > 0 {
            request = request.header("Range", format!("bytes={had}-"));
            request = request.header("If-Range", format!("\"{}\"", entry.sha256));
        }
        if again {
            // The damage may sit in a proxy.
            request = request.header("Cache-Control", "no-cache");
        }
        let mut response = match request.call() {
            Ok(response) => response,
            Err(e) => {
                if matches!(e, ureq::Error::StatusCode(416)) {
                    file.set_len(0)?;
                }
                return Err(e.into());
            }
        };
        let (status, range) = (response.status().as_u16(), response.headers().get("Content-Range"));
        let begins = |range: &str| range.starts_with(&format!("bytes {had}-"));
        let continued = status == 206 && range.and_then(|r| r.to_str().ok()).is_some_and(begins);
        let from = if continued { had } else { 0 };
        if !continued {
            file.set_len(0)?;
            anyhow::ensure!(status == 200, "the server answered HTTP {status} to a request for bytes from {had}");
        }
        let copied = std::io::copy(&mut response.body_mut().as_reader().take(entry.bytes - from), file);
        // Where there are no locks, another program may have cut the file.
        self.downloaded.pieces += file.metadata()?.len().saturating_sub(from);
        copied?;
        Ok(())
    }
}

/// A kept file, if it is what it should be.
fn intact(path: &Path, entry: &PieceEntry) -> Option<Vec<u8>> {
    if std::fs::metadata(path).ok()?.len() != entry.bytes {
        return None;
    }
    let bytes = std::fs::read(path).ok()?;
    entry.verify(&bytes).is_ok().then_some(bytes)
}
