//! `fednano join`: take part from a terminal.

use crate::datasets::{self, Listing};
use crate::device::DeviceChoice;
use crate::edge_download::{download_edge, user_cache};
use crate::native::{Invite, Lines, SocketConnector, TokioClock};
use crate::store::{private, write_adapter};
use anyhow::Context;
use fednano_shared::client::keep::token_of;
use fednano_shared::client::{ClientEvent, Keeper, Observer, Outcome, Participant, participate};
use fednano_shared::data::dataset::Dataset;
use fednano_shared::data::picture::Preprocess;
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::ledger::{self, Traffic};
use fednano_shared::plain::AdapterState;
use fednano_shared::probe::shard;
use fednano_shared::wire::agreement::Offer;
use fednano_shared::wire::{ClientKind, Hello, Purpose};
use sha2::{Digest, Sha256};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// The work of a round is written to the state file at most this often.
const KEEP_EVERY: Duration = Duration::from_secs(1);

/// Join a federation from a terminal, with own pictures and questions.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Invite link.
    url: String,
    /// Question file (LLaVA JSON, CSV, easy-VQA) or a folder that holds one; or `demo:workshop`, `demo:garden`, `demo:harbour`.
    #[arg(long)]
    data: String,
    /// Name shown to others.
    #[arg(long, default_value = "native")]
    name: String,
    /// Where the own part runs.
    #[arg(long, value_enum, default_value = "cpu")]
    device: DeviceChoice,
    /// File for the federation's adapters at the end.
    #[arg(long)]
    save: Option<PathBuf>,
    /// File for the own adapters at the end, with the strategies that make them (local, feddpa-f).
    #[arg(long)]
    save_own: Option<PathBuf>,
    /// File with which the same command goes on after it was killed (default: one in the user's cache, by link, name and data).
    #[arg(long)]
    state: Option<PathBuf>,
    /// Tries to reach a server in a row.
    #[arg(long, default_value_t = 60)]
    max_tries: u32,
    /// File for a timeline of every step, as a Chrome trace (open it in ui.perfetto.dev or chrome://tracing).
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

/// Run it.
///
/// # Errors
/// Anything that ends the participation early.
pub async fn main(args: &Args) -> anyhow::Result<()> {
    let data = open(&args.data)?;
    let (samples, pictures) = data.counts();
    println!("[{}] {samples} samples of {pictures} pictures", args.name);
    let mut keeper = state_file(args)?;
    let leave = CancellationToken::new();
    let (signal, name) = (leave.clone(), args.name.clone());
    tokio::spawn(async move {
        drop(tokio::signal::ctrl_c().await);
        println!("[{name}] leaving; Ctrl-C once more stops at once");
        signal.cancel();
        drop(tokio::signal::ctrl_c().await);
        std::process::exit(130);
    });
    let read = |preprocess: &Preprocess| data.read(preprocess);
    match take_part(&args.url, &args.name, read, args.device, args.max_tries, leave, &mut keeper).await? {
        Outcome::Left => println!("[{}] left; the same command joins again, as somebody new", args.name),
        Outcome::Finished { adapter, own, local } => {
            println!("[{}] the federation is finished", args.name);
            if let Some(local) = local {
                println!(
                    "[{}] {} own test samples: {:.1} % with the adapters received, {:.1} % with the own ones",
                    args.name,
                    local.own.samples,
                    local.global.accuracy * 100.0,
                    local.own.accuracy * 100.0
                );
            }
            if let Some(path) = &args.save {
                save(path, &adapter)?;
            }
            match (&args.save_own, &own) {
                (Some(path), Some(own)) => save(path, own)?,
                (Some(_), None) => println!("[{}] this strategy makes no own adapters: nothing to save", args.name),
                (None, _) => {}
            }
        }
    }
    keeper.forget(); // only now: with it, the same command could still save what a full disk refused
    Ok(())
}

fn save(path: &Path, adapter: &AdapterState) -> anyhow::Result<()> {
    std::fs::write(path, write_adapter(adapter, &[])?).with_context(|| format!("cannot write {}", path.display()))
}

/// Data before the model is there: its faults are told before anything is downloaded.
enum Data {
    Made(Dataset),
    Listed(Listing),
}

impl Data {
    /// Samples, pictures.
    fn counts(&self) -> (usize, usize) {
        match self {
            Self::Made(data) => (data.samples.len(), data.pictures.len()),
            Self::Listed(listing) => (listing.samples.len(), listing.pictures.len()),
        }
    }

    fn read(self, preprocess: &Preprocess) -> anyhow::Result<Dataset> {
        match self {
            Self::Made(data) => Ok(data),
            Self::Listed(listing) => datasets::read(&listing, preprocess),
        }
    }
}

fn open(data: &str) -> anyhow::Result<Data> {
    match data.strip_prefix("demo:") {
        Some(theme) => {
            let theme = DemoTheme::ALL.into_iter().find(|t| t.name() == theme);
            let theme = theme.context("the demo shards are demo:workshop, demo:garden and demo:harbour")?;
            Ok(Data::Made(shard(theme, 1, 24, 4)))
        }
        None => Ok(Data::Listed(datasets::list(&PathBuf::from(data))?)),
    }
}

/// Fetch the client part, encode what `data` reads for its preprocessing, take part, as who `keeper` knows of; `leave` is cancelled when the person wants to leave.
///
/// # Errors
/// Anything that ends the participation early.
pub async fn take_part<S: Keeper>(
    url: &str,
    name: &str,
    data: impl FnOnce(&Preprocess) -> anyhow::Result<Dataset>,
    device: DeviceChoice,
    max_tries: u32,
    leave: CancellationToken,
    keeper: &mut S,
) -> anyhow::Result<Outcome> {
    let invite = Invite::parse(url)?;
    let (device, words) = device.open()?;
    let (link, place) = (invite.clone(), device.clone());
    let (edge, downloaded) = tokio::task::spawn_blocking(move || download_edge(&link, &place, None)).await??;
    let mut cache = edge.encode(&data(edge.preprocess())?, |_, _| {}).await?;
    let me = Participant {
        hello: Hello {
            federation: invite.federation.clone(),
            name: name.to_owned(),
            kind: ClientKind::Native,
            device: words,
            samples: cache.samples.len() as u32,
            edge_bytes: downloaded.bytes(),
            purpose: Purpose::Train,
            resume: keeper.kept().await.as_deref().and_then(token_of),
            offer: Offer::of(&cache, &edge),
            download: Some(downloaded.id),
        },
        edge: &edge,
        cache: &mut cache,
        device: &device,
        max_tries,
        keep_every: KEEP_EVERY,
    };
    let mut connector = SocketConnector::new(invite.socket, leave);
    let mut teller = Teller { lines: Lines(name.to_owned()), traffic: Traffic::default() };
    let result = participate(me, &mut connector, &TokioClock, keeper, &mut teller).await;
    for line in ledger::table(&teller.traffic).lines() {
        println!("[{name}] {line}");
    }
    Ok(result?)
}

/// Tells in lines, and remembers the bytes.
struct Teller {
    lines: Lines,
    traffic: Traffic,
}

impl Observer for Teller {
    fn event(&mut self, event: ClientEvent<'_>) {
        match event {
            ClientEvent::Traffic { rounds } => self.traffic = Traffic::sum(rounds.values()),
            other => self.lines.event(other),
        }
    }
}

/// Most participants of one link, name and data on a machine.
const MOST: usize = 1000;

/// The file named in the arguments, or the first in the user's cache that no other running program has.
fn state_file(args: &Args) -> anyhow::Result<FileKeeper> {
    if let Some(path) = &args.state {
        return FileKeeper::open(path.clone())?.with_context(|| {
            format!("{} belongs to a `fednano join` that is running; name another file with --state", path.display())
        });
    }
    let folder = user_cache()?.join("join");
    let mut hash = Sha256::new();
    for part in [&args.url, &args.name, &args.data] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let key: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    for number in 1..=MOST {
        if let Some(keeper) = FileKeeper::open(folder.join(format!("{key}-{number}")))? {
            return Ok(keeper);
        }
    }
    anyhow::bail!("{MOST} participants of this link, name and data are running here; name a file with --state")
}

/// Keeps a snapshot in a file. A file beside it is locked meanwhile, so that no two programs go on as one participant.
pub struct FileKeeper {
    path: PathBuf,
    _lock: File, // gives the lock back when it is closed
}

impl FileKeeper {
    /// Take a file, which need not exist; none: another program has it.
    ///
    /// # Errors
    /// A place that cannot be written to.
    pub fn open(path: PathBuf) -> anyhow::Result<Option<Self>> {
        let unwritable = || format!("cannot write {}; name another file with --state", path.display());
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(unwritable)?;
        }
        let lock = OpenOptions::new().append(true).create(true).open(beside(&path, "lock")).with_context(unwritable)?;
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) => Ok(None),
            // Where a file system has no locks, the server still lets only one of two go on as the same participant.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Some(Self { path, _lock: lock })),
        }
    }

    /// Nothing is to go on any more.
    pub fn forget(self) {
        for file in [self.path.clone(), beside(&self.path, "part"), beside(&self.path, "lock")] {
            drop(std::fs::remove_file(file)); // not there, or in the way of nobody
        }
    }

    /// Written beside and renamed, so that a kill leaves the old snapshot or the new one.
    fn write(&self, snapshot: &[u8]) -> std::io::Result<()> {
        let part = beside(&self.path, "part");
        let mut file = private().create(true).truncate(true).open(&part)?;
        file.write_all(snapshot)?;
        file.sync_all()?;
        std::fs::rename(part, &self.path)
    }
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    PathBuf::from(name)
}

impl Keeper for FileKeeper {
    async fn keep(&mut self, snapshot: &[u8]) {
        if let Err(e) = self.write(snapshot) {
            tracing::warn!("{} is not written, a kill would cost this round's work: {e}", self.path.display());
        }
    }

    async fn kept(&mut self) -> Option<Vec<u8>> {
        std::fs::read(&self.path).ok() // usually there is none
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::TemporaryFolder;

    #[test]
    fn a_state_file_belongs_to_one_program_and_survives_it() {
        let folder = TemporaryFolder::create("join-test").unwrap();
        let path = folder.path().join("deeper/state");
        let first = FileKeeper::open(path.clone()).unwrap().unwrap();
        assert!(FileKeeper::open(path.clone()).unwrap().is_none(), "two have one file");
        first.write(b"old").unwrap();
        first.write(b"new").unwrap();
        drop(first);
        let second = FileKeeper::open(path.clone()).unwrap().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        #[cfg(unix)]
        assert_eq!(std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&path).unwrap()) & 0o777, 0o600);
        second.forget();
        assert_eq!(std::fs::read_dir(folder.path().join("deeper")).unwrap().count(), 0);
    }
}
