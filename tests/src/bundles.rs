//! The edge bundle: prepared once, fetched piece by piece, kept, continued; and what becomes of damaged and hostile ones.

use anyhow::Context;
use burn::tensor::Device;
use fednano_server::datasets::read_picture;
use fednano_server::edge_bundle::{Bundle, prepare};
use fednano_server::edge_download::fetch_edge;
use fednano_server::native::Invite;
use fednano_shared::bundle::{EdgeDtype, Manifest, PieceEntry};
use fednano_shared::edge::NanoEdge;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::settings::FederationSettings;
use fednano_tests::{LIMIT, Server, block, deviation, fixture};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Image features of the fixture's pictures.
async fn features(edge: &NanoEdge) -> anyhow::Result<Vec<f32>> {
    let picture = |i: usize| read_picture(&fixture().join(format!("images/image_{i}.png"))).map_err(anyhow::Error::msg);
    let (first, second) = (picture(0)?, picture(1)?);
    Ok(edge.image_features(&[&first, &second]).await?.concat())
}

/// The fixture's bundle, and how often its preparation told of progress.
fn prepared(dtype: EdgeDtype, cache: &Path) -> anyhow::Result<(Bundle, usize)> {
    let mut told = 0;
    let bundle = prepare(&fixture(), &ModelFiles::open(&fixture())?, dtype, cache, |_, _| told += 1)?;
    Ok((bundle, told))
}

fn all_bytes(manifest: &Manifest) -> u64 {
    manifest.files.iter().map(|f| f.bytes).chain(manifest.pieces.iter().map(|p| p.bytes)).sum()
}

pub fn same_features() -> anyhow::Result<()> {
    block(LIMIT, async {
        let whole = features(&NanoEdge::load(&ModelFiles::open(&fixture())?, &Device::flex())?).await?;
        let folder = tempfile::tempdir()?;
        let mut sizes = Vec::new();
        // Twice to three times what was found: 7e-4, 1.5e-2, 0.21 of the largest feature (the fixture is f32, so f16 rounds).
        for (dtype, limit) in [(EdgeDtype::F16, 2e-3), (EdgeDtype::Int8, 0.03), (EdgeDtype::Int4, 0.4)] {
            let (bundle, _) = prepared(dtype, folder.path())?;
            let found = deviation(&features(&bundle.edge(&Device::flex())?).await?, &whole);
            sizes.push(all_bytes(&bundle.manifest));
            println!("{dtype}: deviation {found:.1e}, limit {limit:.1e}, {} bytes", sizes[sizes.len() - 1]);
            anyhow::ensure!(found <= limit, "{dtype}: features deviate by {found:.2e}, limit {limit:.1e}");
        }
        anyhow::ensure!(sizes.is_sorted_by(|a, b| a > b), "fewer bits do not make it smaller: {sizes:?}");
        Ok(())
    })
}

pub fn prepared_once() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (first, told) = prepared(EdgeDtype::Int8, folder.path())?;
    anyhow::ensure!(told == first.manifest.pieces.len(), "{told} reports for {} pieces", first.manifest.pieces.len());
    let (second, told) = prepared(EdgeDtype::Int8, folder.path())?;
    anyhow::ensure!(told == 0 && second.manifest_json == first.manifest_json, "it was prepared again");
    // A piece that lost its end is written anew, and is the same.
    let victim = first.folder.join(&first.manifest.pieces[0].sha256);
    std::fs::write(&victim, &std::fs::read(&victim)?[..100])?;
    let (third, told) = prepared(EdgeDtype::Int8, folder.path())?;
    anyhow::ensure!(told > 0 && third.manifest == first.manifest, "a cut piece went unnoticed, or pieces vary");
    third.edge(&Device::flex())?;
    // Damage of the same length is found when it is loaded.
    let mut bytes = std::fs::read(&victim)?;
    bytes[200] ^= 1;
    std::fs::write(&victim, bytes)?;
    let words = format!("{:#}", third.edge(&Device::flex()).err().context("a damaged piece was loaded")?);
    anyhow::ensure!(words.contains("remove that folder") && words.contains("SHA-256"), "{words}");
    // Other forms are other bundles.
    let (other, told) = prepared(EdgeDtype::Int4, folder.path())?;
    anyhow::ensure!(told > 0 && other.model_hash != first.model_hash && other.folder != first.folder);
    anyhow::ensure!(
        std::fs::read_dir(folder.path().join("edge"))?.count() == 2,
        "something is left beside the bundles"
    );
    Ok(())
}

/// From a real server: all of it once, nothing the second time, the rest of what is half there.
pub fn fetched_once() -> anyhow::Result<()> {
    block(LIMIT, async {
        let (data, cache) = (tempfile::tempdir()?, tempfile::tempdir()?);
        let server = Server::start(FederationSettings::default(), data.path()).await?;
        let invite = Invite::parse(&format!("{}/?federation=test", server.base))?;
        let fetch = async || {
            let (invite, cache) = (invite.clone(), cache.path().to_owned());
            tokio::task::spawn_blocking(move || fetch_edge(&invite, &Device::flex(), Some(cache))).await?
        };
        let address = server.address().to_owned();
        let reply = tokio::task::spawn_blocking(move || get(&address, "/edge/manifest.json", &[])).await??;
        let manifest = Manifest::from_json(&reply.body)?;
        let (edge, bytes) = fetch().await?;
        anyhow::ensure!(bytes == all_bytes(&manifest), "{bytes} bytes of {}", all_bytes(&manifest));
        // The server judges with the very features that clients compute.
        let own = features(&server.app.held_out.edge).await?;
        anyhow::ensure!(features(&edge).await? == own, "client and server have other features");
        let (edge, bytes) = fetch().await?;
        anyhow::ensure!(bytes == 0 && features(&edge).await? == own, "{bytes} bytes were fetched again");
        // Half a piece is continued, a damaged one fetched anew.
        let pieces = cache.path().join("pieces");
        let (first, last) = (&manifest.pieces[0], &manifest.pieces[manifest.pieces.len() - 1]);
        let half = std::fs::read(pieces.join(&first.sha256))?;
        std::fs::write(pieces.join(format!("{}.part", first.sha256)), &half[..half.len() / 2])?;
        std::fs::remove_file(pieces.join(&first.sha256))?;
        let mut damaged = std::fs::read(pieces.join(&last.sha256))?;
        damaged[70] ^= 1;
        std::fs::write(pieces.join(&last.sha256), damaged)?;
        let expected = first.bytes - first.bytes / 2 + last.bytes;
        let (edge, bytes) = fetch().await?;
        anyhow::ensure!(bytes == expected, "{bytes} bytes instead of {expected}");
        anyhow::ensure!(features(&edge).await? == own, "a continued piece has other features");
        server.stop().await
    })
}

/// An answer over HTTP.
struct Reply {
    status: u16,
    /// Names in lower case.
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

impl Reply {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// One request on a connection of its own.
fn get(address: &str, path: &str, headers: &[(&str, &str)]) -> anyhow::Result<Reply> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let more: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{more}\r\n")?;
    let mut reply = BufReader::new(stream);
    let head = head(&mut reply)?;
    let status = head.first().and_then(|l| l.split(' ').nth(1)).context("no status")?.parse()?;
    let headers =
        head.iter().filter_map(|l| l.split_once(": ")).map(|(n, v)| (n.to_lowercase(), v.to_owned())).collect();
    let mut body = Vec::new();
    reply.read_to_end(&mut body)?;
    Ok(Reply { status, headers, body })
}

/// Lines before the empty one.
fn head(stream: &mut impl BufRead) -> anyhow::Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        match line.trim_end() {
            "" => return Ok(lines),
            text => lines.push(text.to_owned()),
        }
    }
}

pub fn ranges_and_tags() -> anyhow::Result<()> {
    block(LIMIT, async {
        let data = tempfile::tempdir()?;
        let server = Server::start(FederationSettings::default(), data.path()).await?;
        let address = server.address().to_owned();
        tokio::task::spawn_blocking(move || check_headers(&address)).await??;
        server.stop().await
    })
}

fn check_headers(address: &str) -> anyhow::Result<()> {
    let reply = get(address, "/edge/manifest.json", &[])?;
    anyhow::ensure!(reply.status == 200 && reply.header("cache-control") == "no-cache", "{:?}", reply.headers);
    let same = get(address, "/edge/manifest.json", &[("If-None-Match", reply.header("etag"))])?;
    anyhow::ensure!(same.status == 304 && same.body.is_empty(), "the manifest is sent again: {}", same.status);

    let manifest = Manifest::from_json(&reply.body)?;
    let piece = &manifest.pieces[0];
    let (path, tag, size) = (format!("/edge/pieces/{}", piece.sha256), format!("\"{}\"", piece.sha256), piece.bytes);
    let whole = get(address, &path, &[("Accept-Encoding", "gzip")])?;
    piece.verify(&whole.body)?;
    for (name, value) in [
        ("etag", tag.as_str()),
        ("accept-ranges", "bytes"),
        ("cache-control", "public, max-age=31536000, immutable"),
        ("content-type", "application/octet-stream"),
        ("content-encoding", ""),
    ] {
        anyhow::ensure!(whole.header(name) == value, "{name} is {:?}, expected {value:?}", whole.header(name));
    }
    let (last, rest) = (size - 1, size - 10);
    for (range, from, to) in [
        ("bytes=2-5".to_owned(), 2, 5),
        ("bytes=10-".to_owned(), 10, last),
        ("bytes=-10".to_owned(), rest, last),
        (format!("bytes=5-{}", 2 * size), 5, last),
    ] {
        let part = get(address, &path, &[("Range", range.as_str()), ("If-Range", tag.as_str())])?;
        let expected = format!("bytes {from}-{to}/{size}");
        anyhow::ensure!(part.status == 206 && part.header("content-range") == expected, "{range}: {:?}", part.headers);
        anyhow::ensure!(part.body == whole.body[from as usize..=to as usize], "{range}: other bytes");
        anyhow::ensure!(part.header("etag") == tag, "{range}: {:?}", part.headers);
    }
    let beyond = get(address, &path, &[("Range", format!("bytes={size}-").as_str())])?;
    anyhow::ensure!(beyond.status == 416 && beyond.header("content-range") == format!("bytes */{size}"));
    anyhow::ensure!(!beyond.header("cache-control").contains("immutable"), "a refusal may be kept for good");
    let other = get(address, &path, &[("Range", "bytes=2-5"), ("If-Range", "\"another\"")])?;
    anyhow::ensure!(other.status == 200 && other.body == whole.body, "a part is glued to another file's beginning");
    for tags in [tag.clone(), format!("\"another\", W/{tag}"), "*".to_owned()] {
        let known = get(address, &path, &[("If-None-Match", tags.as_str()), ("Range", "bytes=2-5")])?;
        anyhow::ensure!(known.status == 304 && known.body.is_empty(), "{tags}: {}", known.status);
    }

    for file in &manifest.files {
        let path = format!("/edge/files/{}", file.sha256);
        file.verify(&get(address, &path, &[])?.body)?;
        let packed = get(address, &path, &[("Accept-Encoding", "gzip")])?;
        anyhow::ensure!(packed.header("content-encoding") == "gzip", "{} is not compressed", file.name);
    }
    let hash = "0".repeat(64);
    for path in [
        format!("/edge/pieces/{hash}"),
        format!("/edge/files/{}", piece.sha256),
        "/edge/pieces/manifest.json".into(),
        "/edge/pieces/..%2fmanifest.json".into(),
        "/edge/files/%2fetc%2fpasswd".into(),
    ] {
        let none = get(address, &path, &[])?;
        anyhow::ensure!(none.status == 404 && !none.header("cache-control").contains("immutable"), "{path}");
    }
    Ok(())
}

/// What a bad server does with one of its pieces.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Vice {
    /// Damages it the first time.
    DamagesOnce,
    /// Damages it whenever it is asked.
    Damages,
    /// Closes in the middle of it the first time.
    CutsOnce,
    /// The same, and knows no ranges.
    CutsOnceWithoutRanges,
}

/// A server in a thread, with the heads of the requests that it got.
struct BadServer {
    invite: Invite,
    heard: Arc<Mutex<Vec<Vec<String>>>>,
}

impl BadServer {
    /// `folder` holds pieces and files.
    fn start(manifest: Vec<u8>, folder: &Path, victim: &str, vice: Vice) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let invite = Invite::parse(&format!("http://{}/?federation=test", listener.local_addr()?))?;
        let heard = Arc::new(Mutex::new(Vec::new()));
        let (folder, victim, log) = (folder.to_owned(), victim.to_owned(), heard.clone());
        // It ends with the tests.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that hangs up is no fault of this server.
                drop(answer(stream, &manifest, &folder, &victim, vice, &log));
            }
        });
        Ok(Self { invite, heard })
    }

    fn fetch(&self, cache: &Path) -> anyhow::Result<(NanoEdge, u64)> {
        fetch_edge(&self.invite, &Device::flex(), Some(cache.to_owned()))
    }

    /// Requests for a path that ends so, with their headers.
    fn asked(&self, end: &str) -> Vec<Vec<String>> {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.iter().filter(|h| path_of(h).ends_with(end)).cloned().collect()
    }
}

fn path_of(head: &[String]) -> &str {
    head.first().and_then(|l| l.split(' ').nth(1)).unwrap_or_default()
}

fn answer(
    mut stream: TcpStream,
    manifest: &[u8],
    folder: &Path,
    victim: &str,
    vice: Vice,
    log: &Mutex<Vec<Vec<String>>>,
) -> anyhow::Result<()> {
    let head = head(&mut BufReader::new(stream.try_clone()?))?;
    let path = path_of(&head).to_owned();
    let from = head.iter().find_map(|l| l.strip_prefix("range: bytes=").or_else(|| l.strip_prefix("Range: bytes=")));
    let from = from.and_then(|r| r.trim_end_matches('-').parse::<usize>().ok()).unwrap_or(0);
    let first = {
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        log.push(head);
        log.iter().filter(|h| path_of(h) == path).count() == 1
    };
    let mut body = match path.rsplit('/').next() {
        Some(name) if name != "manifest.json" => std::fs::read(folder.join(name))?,
        _ => manifest.to_vec(),
    };
    let chosen = path.ends_with(victim);
    if chosen && (vice == Vice::Damages || (vice == Vice::DamagesOnce && first)) {
        body[99] ^= 1;
    }
    let cuts = matches!(vice, Vice::CutsOnce | Vice::CutsOnceWithoutRanges) && chosen && first;
    let mut status = "200 OK".to_owned();
    if from > 0 && vice != Vice::CutsOnceWithoutRanges {
        status = format!("206 Partial Content\r\nContent-Range: bytes {from}-{}/{}", body.len() - 1, body.len());
        body.drain(..from);
    }
    write!(stream, "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
    let sent = if cuts { body.len() / 3 } else { body.len() };
    stream.write_all(&body[..sent])?;
    Ok(())
}

pub fn damaged_and_cut() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (bundle, _) = prepared(EdgeDtype::F16, folder.path())?;
    let victim = &bundle.manifest.pieces[0];
    let (all, third) = (all_bytes(&bundle.manifest), victim.bytes / 3);
    let start = |vice| BadServer::start(bundle.manifest_json.clone(), &bundle.folder, &victim.sha256, vice);

    // Damaged once: fetched once more.
    let (server, cache) = (start(Vice::DamagesOnce)?, tempfile::tempdir()?);
    let (_, bytes) = server.fetch(cache.path())?;
    anyhow::ensure!(bytes == all + victim.bytes, "{bytes} bytes instead of {}", all + victim.bytes);
    anyhow::ensure!(server.asked(&victim.sha256).len() == 2, "{:?}", server.asked(&victim.sha256));

    // Always damaged: reported by its hash, and not kept.
    let (server, cache) = (start(Vice::Damages)?, tempfile::tempdir()?);
    let words = format!("{:#}", server.fetch(cache.path()).err().context("a damaged piece was used")?);
    println!("{words}");
    anyhow::ensure!(
        words.contains(&victim.sha256) && words.contains("2 tries") && words.contains("operator"),
        "{words}"
    );
    anyhow::ensure!(server.asked(&victim.sha256).len() == 2, "{:?}", server.asked(&victim.sha256));
    anyhow::ensure!(!cache.path().join("pieces").join(&victim.sha256).exists(), "a damaged piece was kept");

    // Cut: continued where it stopped; from a server without ranges, begun anew.
    for (vice, expected) in [(Vice::CutsOnce, all), (Vice::CutsOnceWithoutRanges, all + third)] {
        let (server, cache) = (start(vice)?, tempfile::tempdir()?);
        let (_, bytes) = server.fetch(cache.path())?;
        anyhow::ensure!(bytes == expected, "{bytes} bytes instead of {expected}");
        let again = server.asked(&victim.sha256).pop().context("it was not asked for")?.join("\n").to_lowercase();
        anyhow::ensure!(again.contains(&format!("range: bytes={third}-")), "{again}");
    }
    Ok(())
}

/// What a hostile server does to a manifest.
type Damage = fn(&mut Manifest);

pub fn hostile_manifests() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let (bundle, _) = prepared(EdgeDtype::F16, folder.path())?;
    let cases: [(&str, Damage); 7] = [
        ("bytes", |m| m.pieces[0].bytes = 1 << 60),
        ("plain name", |m| m.files[0].name = "../../escaped.json".into()),
        ("SHA-256", |m| m.pieces[0].sha256 = "../escaped".into()),
        ("format", |m| m.format = 9),
        ("parameters", |m| m.parameters /= 2),
        ("cannot hold", |m| m.parameters = 1 << 60),
        ("missing", |m| drop(m.pieces.pop())),
    ];
    for (word, change) in cases {
        let (cache, mut manifest) = (tempfile::tempdir()?, bundle.manifest.clone());
        change(&mut manifest);
        let server = BadServer::start(serde_json::to_vec(&manifest)?, &bundle.folder, "nothing", Vice::Damages)?;
        let words = format!("{:#}", server.fetch(cache.path()).err().context("a hostile manifest was used")?);
        println!("{words}");
        anyhow::ensure!(words.contains(word), "'{word}' is not in: {words}");
        anyhow::ensure!(std::fs::read_dir(cache.path())?.count() == 1, "files were written outside of the cache");
    }
    // Pieces in another order, and one that is no piece at all though its hash is right.
    let mut manifest = bundle.manifest.clone();
    manifest.pieces.reverse();
    let text = &manifest.files[0];
    let not_a_piece = PieceEntry { sha256: text.sha256.clone(), bytes: text.bytes };
    let forged = Manifest { pieces: [vec![not_a_piece], bundle.manifest.pieces.clone()].concat(), ..manifest.clone() };
    let cache = tempfile::tempdir()?;
    let server = BadServer::start(serde_json::to_vec(&manifest)?, &bundle.folder, "nothing", Vice::Damages)?;
    // The token table may come first: only its own rows have an order.
    server.fetch(cache.path())?;
    let server = BadServer::start(serde_json::to_vec(&forged)?, &bundle.folder, "nothing", Vice::Damages)?;
    let words = format!("{:#}", server.fetch(cache.path()).err().context("a text was taken for a piece")?);
    anyhow::ensure!(words.contains("damaged"), "{words}");
    let nonsense = BadServer::start(b"<html>".to_vec(), &bundle.folder, "nothing", Vice::Damages)?;
    let words = format!("{:#}", nonsense.fetch(cache.path()).err().context("a page was taken for a manifest")?);
    anyhow::ensure!(words.contains("FedNano server"), "{words}");
    Ok(())
}
