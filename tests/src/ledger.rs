//! The byte ledger: both ends count the same, and as much as the line between them carries.

use crate::boundary::{mixed, words_only};
use crate::browser::{self, Browser};
use anyhow::{Context, ensure};
use burn::tensor::Device;
use fednano_server::coordinator::{Federation, Ledger};
use fednano_server::edge_download::{Downloaded, download_edge};
use fednano_server::native::{Invite, SocketConnector};
use fednano_server::session::{self, SocketFault};
use fednano_server::wire_bench::link::{Proxy, Shape, proxy};
use fednano_shared::ask::Asking;
use fednano_shared::client::{ClientEvent, Connector, Observer, Outcome, Transport};
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::edge::{FeatureCache, NanoEdge};
use fednano_shared::ledger::{AFTER, Kind, Traffic};
use fednano_shared::probe::{self, shard};
use fednano_shared::settings::{BoundaryChoice, FederationSettings, Format};
use fednano_shared::wire::{self, ClientMessage, Hello, Purpose, ServerMessage};
use fednano_tests::tap::{Frames, Tap};
use fednano_tests::{LIMIT, MODES, Server, block, encode, fixture, get, hello, introduction, offer, take_part_over};
use futures_util::{Sink, Stream};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::pin::Pin;
use std::task::{self, Poll};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// What a client counted last.
#[derive(Default)]
struct Own(BTreeMap<u32, Traffic>);

impl Observer for Own {
    fn event(&mut self, event: ClientEvent<'_>) {
        if let ClientEvent::Traffic { rounds } = event {
            self.0 = rounds.clone();
        }
    }
}

fn bytes_of(frames: &[Vec<u8>]) -> u64 {
    frames.iter().map(|frame| frame.len() as u64).sum()
}

/// A participant, its own count and every frame.
struct Counted {
    name: &'static str,
    frames: Frames,
    own: BTreeMap<u32, Traffic>,
}

async fn take_part(
    name: &'static str,
    edge: &NanoEdge,
    cache: &FeatureCache,
    downloaded: Option<&Downloaded>,
    socket: &str,
) -> anyhow::Result<Counted> {
    let mut hello = introduction(name, edge, cache);
    if let Some(downloaded) = downloaded {
        (hello.edge_bytes, hello.download) = (downloaded.bytes(), Some(downloaded.id.clone()));
    }
    let mut tap = Tap::new(SocketConnector::new(socket, CancellationToken::new()));
    let mut own = Own::default();
    let outcome = take_part_over(edge, cache, hello, &mut tap, &mut own).await?;
    ensure!(matches!(outcome, Outcome::Finished { .. }), "{name} did not finish");
    Ok(Counted { name, frames: tap.frames, own: own.0 })
}

/// Wait until something holds; after ten seconds go on, so that what does not hold is told.
async fn until(mut holds: impl AsyncFnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    while !holds().await? && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

async fn ledger(federation: &Federation) -> anyhow::Result<Ledger> {
    federation.ledger().await.context("the federation has ended")
}

/// Two native clients over real sockets, one of which downloads its half of the model: in each mode both ends count the same, by kind,
/// direction and round; the frames add up to it; and the line carries that and the framing. Page and metrics show the same.
pub fn both_ends_and_the_line_agree() -> anyhow::Result<()> {
    block(LIMIT, async {
        for (boundary, _) in MODES {
            for format in [Format::F32, Format::Int8] {
                println!("{boundary}, {format}");
                agree(boundary, format).await?;
            }
        }
        Ok(())
    })
}

async fn agree(boundary: BoundaryChoice, format: Format) -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let settings = FederationSettings {
        boundary,
        feature_format: format,
        code_format: format,
        gradient_format: format,
        matrix_format: format,
        rounds: 2,
        rank: 4,
        batch_size: 4,
        micro_batch: 2,
        local_test: 0.2,
        min_participants: 2,
        ..Default::default()
    };
    let data_dir = folder.path().join("server");
    std::fs::create_dir(&data_dir)?;
    let server = Server::start_model(&fixture(), settings.clone(), &data_dir).await?;
    let to = server.address().parse()?;
    let (sockets, downloads) = (proxy(to, Shape::OPEN).await?, proxy(to, Shape::OPEN).await?);
    let (edge, downloaded) = download(&downloads, &folder.path().join("cache")).await?;

    let begun = Instant::now();
    let url = format!("ws://{}/ws", sockets.address());
    let caches =
        [encode(&edge, &mixed()).await?, encode(&edge, &words_only(shard(DemoTheme::Harbour, 7, 2, 3))).await?];
    let (a, b) = tokio::try_join!(
        take_part("a", &edge, &caches[0], Some(&downloaded), &url),
        take_part("b", &edge, &caches[1], None, &url),
    )?;
    let seconds = begun.elapsed().as_secs();

    let federation = server.app.federation("test").context("no federation")?;
    let clients = [a, b];
    let counted = Traffic::sum(clients.iter().flat_map(|c| c.own.values()));
    until(async || anyhow::Ok(ledger(&federation).await?.total == counted)).await?;
    let found = ledger(&federation).await?;
    for client in &clients {
        same_at_both_ends(client, &found)?;
    }
    ensure!(found.questions.is_empty(), "nobody asked: {:?}", found.questions);
    the_kinds(boundary, &found.total)?;
    the_download(&clients, &downloaded, &downloads)?;
    the_line(&clients, &sockets, seconds).await?;
    page_and_metrics(&server, &found).await?;
    let status = federation.status();
    let shown = status.participants.iter().map(|p| p.traffic);
    ensure!(shown.eq(found.participants.iter().map(|p| p.total)), "the status shows {:?}", status.participants);

    // It is on disk.
    server.stop().await?;
    let server = Server::start_model(&fixture(), settings, &data_dir).await?;
    let federation = server.app.federation("test").context("no federation")?;
    ensure!(ledger(&federation).await? == found, "after a restart: {:?}", ledger(&federation).await?);
    server.stop().await
}

async fn download(line: &Proxy, cache: &Path) -> anyhow::Result<(NanoEdge, Downloaded)> {
    let invite = Invite::parse(&format!("http://{}/?federation=test", line.address()))?;
    let cache = cache.to_owned();
    tokio::task::spawn_blocking(move || download_edge(&invite, &Device::flex(), Some(cache))).await?
}

/// By kind, direction and round, and no frame was forgotten.
fn same_at_both_ends(client: &Counted, ledger: &Ledger) -> anyhow::Result<()> {
    let name = client.name;
    let found = ledger.participants.iter().find(|p| p.name == name).with_context(|| format!("{name} is missing"))?;
    for round in client.own.keys().chain(found.rounds.keys()) {
        let (own, theirs) = (client.own.get(round), found.rounds.get(round));
        ensure!(own == theirs, "{name}, round {round}: the client counts {own:?}, the server {theirs:?}");
    }
    ensure!(client.own.keys().eq(&[0, 1, 2, AFTER]), "{name} has bytes in the rounds {:?}", client.own.keys());
    ensure!(found.total == Traffic::sum(client.own.values()), "{name}: {:?} in all", found.total);
    let (up, down) = (bytes_of(&client.frames.raw_up()), bytes_of(&client.frames.raw_down()));
    let total = found.total;
    ensure!(total.up.total() == up, "{name}: frames of {up} bytes up, {} counted", total.up.total());
    let counted = total.down.total() - total.down.edge_bundle;
    ensure!(counted == down, "{name}: frames of {down} bytes down, {counted} counted");
    Ok(())
}

/// What there must be in this mode, and what there cannot be.
fn the_kinds(boundary: BoundaryChoice, total: &Traffic) -> anyhow::Result<()> {
    use Kind::*;
    let short = boundary == BoundaryChoice::LowRank;
    let (mut up, mut down) = (vec![Labels, Adapters, Fisher, Control], vec![EdgeBundle, Gradients, Predictions]);
    down.extend([Adapters, Control]);
    if short {
        up.extend([Features, Text, Codes, Matrices]);
        down.push(Fisher); // squares of the matrices' gradients
    } else {
        up.push(Activations);
    }
    for (direction, bytes, expected) in [("up", &total.up, up), ("down", &total.down, down)] {
        for (kind, bytes) in bytes.iter() {
            let there = expected.contains(&kind);
            ensure!((bytes > 0) == there, "{direction}: {bytes} bytes of {}", kind.words());
        }
    }
    Ok(())
}

/// The model's half: what the client got is what the server sent, and the line carried little more.
fn the_download(clients: &[Counted], downloaded: &Downloaded, line: &Proxy) -> anyhow::Result<()> {
    let bundle = |c: &Counted| Traffic::sum(c.own.values()).down.edge_bundle;
    let found: Vec<u64> = clients.iter().map(bundle).collect();
    let (_, carried) = line.bytes();
    println!("edge bundle: {found:?} counted, {carried} carried");
    ensure!(found == [downloaded.bytes(), 0] && downloaded.pieces > 0, "{found:?} of {downloaded:?}");
    // Heads of some dozens of answers.
    let most = downloaded.bytes() + downloaded.bytes() / 20 + (64 << 10);
    ensure!((downloaded.bytes()..=most).contains(&carried), "{} counted, {carried} carried", downloaded.bytes());
    Ok(())
}

/// A WebSocket frame has a head of 2 to 10 bytes, upward 4 more, its mask (RFC 6455, section 5.2). Beside the frames there are the
/// HTTP upgrade, a close frame for each end, and pings with their answers, one each 15 seconds: 125 bytes and a head at most.
async fn the_line(clients: &[Counted], line: &Proxy, seconds: u64) -> anyhow::Result<()> {
    const UPGRADE: u64 = 1024;
    const CONTROL_FRAME: u64 = 125 + 14;
    let mut bounds = [(0, 0), (0, 0)];
    for client in clients {
        ensure!(client.frames.connections() == 1, "{} connections", client.frames.connections());
        let beside = UPGRADE + CONTROL_FRAME * (4 + seconds / 15);
        for (bound, frames, least, most) in [(0, client.frames.raw_up(), 6, 14), (1, client.frames.raw_down(), 2, 10)] {
            let (bytes, count) = (bytes_of(&frames), frames.len() as u64);
            bounds[bound].0 += bytes + least * count;
            bounds[bound].1 += bytes + most * count + beside;
        }
    }
    // Its last bytes may be on their way.
    until(async || anyhow::Ok(line.bytes().0 >= bounds[0].0 && line.bytes().1 >= bounds[1].0)).await?;
    let (up, down) = line.bytes();
    println!("the line carried {up} up, {down} down; by frames {bounds:?}");
    for ((least, most), carried) in bounds.into_iter().zip([up, down]) {
        ensure!((least..=most).contains(&carried), "the line carried {carried} bytes, by frames {least} to {most}");
    }
    Ok(())
}

/// The JSON is the ledger, with participants' rounds only if they are asked for, and the metrics have its sums.
async fn page_and_metrics(server: &Server, ledger: &Ledger) -> anyhow::Result<()> {
    let page = async |query: &str| -> anyhow::Result<Ledger> {
        let path = format!("/api/federations/test/ledger{query}");
        Ok(serde_json::from_str(&get(server.address(), &path).await?)?)
    };
    let whole = page("?rounds=true").await?;
    ensure!(whole == *ledger, "the page has {whole:?}");
    let mut sums = ledger.clone();
    sums.participants.iter_mut().for_each(|p| p.rounds.clear());
    for query in ["", "?", "?rounds=false"] {
        let found = page(query).await?;
        ensure!(found == sums, "'{query}': the page has {found:?}");
    }
    let sum = Traffic::sum(ledger.participants.iter().map(|p| &p.total));
    let by_round = Traffic::sum(ledger.rounds.values());
    ensure!(sum == ledger.total && by_round == ledger.total, "the parts do not add up: {ledger:?}");

    let mut wanted = Vec::new();
    let mut lines = |metric: &str, labels: String, traffic: &Traffic| {
        for (direction, bytes) in traffic.directions() {
            for (kind, number) in bytes.iter().filter(|(_, number)| *number > 0) {
                let labels = format!("federation=\"test\",{labels}direction=\"{direction}\",kind=\"{}\"", kind.name());
                wanted.push(format!("fednano_{metric}_bytes_total{{{labels}}} {number}"));
            }
        }
    };
    lines("traffic", String::new(), &ledger.total);
    for p in &ledger.participants {
        lines("participant_traffic", format!("participant=\"{}\",", p.id.0), &p.total);
    }
    for (round, traffic) in &ledger.rounds {
        let name = if *round == AFTER { "after".to_owned() } else { round.to_string() };
        lines("round_traffic", format!("round=\"{name}\","), traffic);
    }
    // Participants are as the status has them, which is told some times a second.
    let lacking = async || -> anyhow::Result<Vec<String>> {
        let text = get(server.address(), "/metrics").await?;
        let there = text.lines().collect::<BTreeSet<_>>();
        Ok(wanted.iter().filter(|line| !there.contains(line.as_str())).cloned().collect())
    };
    until(async || anyhow::Ok(lacking().await?.is_empty())).await?;
    let lacking = lacking().await?;
    ensure!(lacking.is_empty(), "the metrics lack\n{}", lacking.join("\n"));
    Ok(())
}

/// Connections that only ask are counted too, and not under anybody's name; of a connection that breaks, an end has counted what it
/// sent, the other what came.
pub fn askers_and_restless() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let settings = FederationSettings {
            boundary: BoundaryChoice::LowRank,
            rounds: 1,
            rank: probe::RANK,
            local_steps: 10,
            batch_size: 4,
            ..Default::default()
        };
        let server = Server::start_model(&fixture(), settings, folder.path()).await?;
        let federation = server.app.federation("test").context("no federation")?;
        let edge = server.app.held_out.edge.clone();

        let mut tap = Tap::new(SocketConnector::new(&server.socket, CancellationToken::new()));
        let hello = Hello { offer: offer(0), ..hello("asker", 0, Purpose::Ask) };
        let mut asker = Asking::open(tap.connect().await?, hello).await?;
        probe::run(&edge, &mut asker, &Device::flex()).await?;
        drop(asker);
        let (up, down) = (bytes_of(&tap.frames.raw_up()), bytes_of(&tap.frames.raw_down()));
        until(async || anyhow::Ok(ledger(&federation).await?.total.up.total() == up)).await?;
        let asked = ledger(&federation).await?;
        let questions = Traffic::sum(asked.questions.values());
        ensure!(asked.participants.is_empty() && questions == asked.total, "{asked:?}");
        ensure!(questions.up.total() == up, "{up} bytes asked, {} counted", questions.up.total());
        // A status may have been sent and not read.
        ensure!(questions.down.total() >= down, "{down} bytes came, {} were sent", questions.down.total());

        let cache = encode(&edge, &mixed()).await?;
        let mut tap = Tap::new(SocketConnector::new(&server.socket, CancellationToken::new()));
        tap.breaks = [20, 11].into();
        let mut own = Own::default();
        let hello = introduction("restless", &edge, &cache);
        let outcome = take_part_over(&edge, &cache, hello, &mut tap, &mut own).await?;
        ensure!(matches!(outcome, Outcome::Finished { .. }) && tap.frames.connections() == 3, "it was not interrupted");
        let own = Traffic::sum(own.0.values());
        let (up, down) = (tap.frames.raw_up(), tap.frames.raw_down());
        ensure!(own.up.total() == bytes_of(&up), "{} bytes sent, {} counted", bytes_of(&up), own.up.total());
        ensure!(own.down.total() == bytes_of(&down), "{} bytes came, {} counted", bytes_of(&down), own.down.total());
        // Of each break, what was said since the last answer may have been lost: a request and a word of progress upward, an answer and
        // a few statuses downward. Features may go with a request too; that none were lost is seen below.
        let request = largest(&tap.frames.up(), &up, |said| matches!(said, ClientMessage::Train { .. }));
        let answer = largest(&tap.frames.down(), &down, |said| matches!(said, ServerMessage::Trained { .. }));
        let (lost_up, lost_down) = (2 * 2 * request, 2 * 2 * answer);
        for (lost, total) in [(lost_up, own.up.total()), (lost_down, own.down.total())] {
            ensure!(lost > 0 && lost < total / 2, "{lost} of {total} bytes may be lost: that says nothing");
        }
        let of = async || anyhow::Ok(ledger(&federation).await?.participants.first().context("nobody")?.total);
        until(async || anyhow::Ok(of().await?.up.total() == own.up.total())).await?;
        let server_has = of().await?;
        let (up, down) = (server_has.up.total(), server_has.down.total());
        println!("restless, up: {} bytes sent, {up} came, {lost_up} may be lost", own.up.total());
        println!("restless, down: {down} bytes sent, {} came, {lost_down} may be lost", own.down.total());
        let possible = own.up.total() - lost_up..=own.up.total();
        ensure!(possible.contains(&up), "{up} bytes came, not {possible:?}");
        let possible = own.down.total()..=own.down.total() + lost_down;
        ensure!(possible.contains(&down), "{down} bytes were sent, not {possible:?}");
        ensure!(server_has.up.features == own.up.features, "features {server_has:?}, the client has {own:?}");
        server.stop().await
    })
}

/// Bytes of the largest of these frames whose message is of a kind.
fn largest<M>(messages: &[M], frames: &[Vec<u8>], is: impl Fn(&M) -> bool) -> u64 {
    let those = messages.iter().zip(frames).filter(|(message, _)| is(message));
    those.map(|(_, frame)| frame.len() as u64).max().unwrap_or(0)
}

/// A connection that says one thing and takes nothing.
struct Deaf(Option<Vec<u8>>);

impl Stream for Deaf {
    type Item = Result<Vec<u8>, SocketFault>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut task::Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(self.0.take().map(Ok))
    }
}

impl Sink<Vec<u8>> for Deaf {
    type Error = ();

    fn poll_ready(self: Pin<&mut Self>, _: &mut task::Context<'_>) -> Poll<Result<(), ()>> {
        Poll::Ready(Err(()))
    }

    fn start_send(self: Pin<&mut Self>, _: Vec<u8>) -> Result<(), ()> {
        Err(())
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut task::Context<'_>) -> Poll<Result<(), ()>> {
        Poll::Ready(Err(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut task::Context<'_>) -> Poll<Result<(), ()>> {
        Poll::Ready(Ok(()))
    }
}

/// Whoever is gone before its welcome has joined all the same: what it said is counted, and it is away.
pub fn unwelcomed() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let settings = FederationSettings { min_participants: 2, ..Default::default() };
        let server = Server::start_model(&fixture(), settings, folder.path()).await?;
        let federation = server.app.federation("test").context("no federation")?;
        let frame = |purpose: Purpose| wire::encode(&ClientMessage::Hello(hello("deaf", 3, purpose)));
        let (trains, asks) = (frame(Purpose::Train), frame(Purpose::Ask));
        for said in [&trains, &asks] {
            session::run(Deaf(Some(said.clone())), server.app.shared()).await;
        }
        let found = ledger(&federation).await?;
        let [me] = &found.participants[..] else { anyhow::bail!("{:?}", found.participants) };
        ensure!(me.total.up.total() == trains.len() as u64, "{} bytes said, {:?} counted", trains.len(), me.total);
        ensure!(me.total.down.total() == 0, "nothing was taken, {:?} counted", me.total);
        let questions = Traffic::sum(found.questions.values());
        ensure!(questions.total() == asks.len() as u64, "{} bytes said, {questions:?} counted", asks.len());
        let away = || federation.status().participants.first().is_some_and(|p| !p.connected);
        until(async || anyhow::Ok(away())).await?;
        ensure!(away(), "it counts as here: {:?}", federation.status().participants);
        server.stop().await
    })
}

/// Leaves in the middle of a round.
struct Leaver {
    own: Own,
    leave: CancellationToken,
}

impl Observer for Leaver {
    fn event(&mut self, event: ClientEvent<'_>) {
        if let ClientEvent::Step { step: 3, .. } = event {
            self.leave.cancel();
        }
        self.own.event(event);
    }
}

/// Whoever leaves while requests are under way is counted to the last byte at both ends, too.
pub fn leavers() -> anyhow::Result<()> {
    block(LIMIT, async {
        for (boundary, _) in MODES {
            let folder = tempfile::tempdir()?;
            let settings =
                FederationSettings { boundary, rank: 4, local_steps: 50, batch_size: 4, ..Default::default() };
            let server = Server::start_model(&fixture(), settings, folder.path()).await?;
            let federation = server.app.federation("test").context("no federation")?;
            let edge = server.app.held_out.edge.clone();
            let cache = encode(&edge, &mixed()).await?;
            let mut leaver = Leaver { own: Own::default(), leave: CancellationToken::new() };
            let mut tap = Tap::new(SocketConnector::new(&server.socket, leaver.leave.clone()));
            let hello = introduction("leaver", &edge, &cache);
            let outcome = take_part_over(&edge, &cache, hello, &mut tap, &mut leaver).await?;
            ensure!(matches!(outcome, Outcome::Left), "{boundary}: it did not leave");
            let own = leaver.own.0;
            let sum = Traffic::sum(own.values());
            ensure!(sum.up.total() == bytes_of(&tap.frames.raw_up()), "{boundary}: {sum:?}");
            ensure!(sum.down.total() == bytes_of(&tap.frames.raw_down()), "{boundary}: {sum:?}");
            let of =
                async || anyhow::Ok(ledger(&federation).await?.participants.first().context("nobody")?.rounds.clone());
            until(async || anyhow::Ok(of().await? == own)).await?;
            let found = of().await?;
            ensure!(found == own, "{boundary}: the client counts {own:?}, the server {found:?}");
            server.stop().await?;
        }
        Ok(())
    })
}

/// Where nothing happens nothing is said: a status is traffic too, and must not bring forth the next one.
pub fn quiet() -> anyhow::Result<()> {
    block(LIMIT, async {
        let folder = tempfile::tempdir()?;
        let settings = FederationSettings { min_participants: 2, ..Default::default() };
        let server = Server::start_model(&fixture(), settings, folder.path()).await?;
        let mut socket = SocketConnector::new(&server.socket, CancellationToken::new()).connect().await?;
        socket.send(wire::encode(&ClientMessage::Hello(hello("one", 3, Purpose::Train)))).await?;
        let (end, mut said) = (tokio::time::Instant::now() + Duration::from_secs(5), 0);
        while let Ok(frame) = tokio::time::timeout_at(end, socket.receive()).await {
            frame?;
            said += 1;
        }
        // The welcome, that somebody is here, that the untouched model has been tested.
        ensure!((1..=4).contains(&said), "{said} messages in five seconds in which nothing happens");
        server.stop().await
    })
}

/// A tab's own count, its download included, is the server's; the page shows both and says so.
pub fn tab() -> anyhow::Result<()> {
    block(browser::LIMIT, async {
        for (boundary, _) in MODES {
            println!("{boundary}");
            let folder = tempfile::tempdir()?;
            let settings = FederationSettings { boundary, rounds: 2, min_participants: 1, ..Default::default() };
            let server = Server::start(settings, folder.path()).await?;
            let browser = Browser::open(&[]).await?;
            let shard = "shard=garden&pictures=6&questions=4&seed=3";
            browser.client.goto(&format!("{}/?federation=test&auto=1&device=cpu&{shard}", server.base)).await?;
            browser.wait("the end", "return document.body.dataset.state === 'finished'").await?;
            let federation = server.app.federation("test").context("no federation")?;
            // Both counts as the page has them.
            let counts = "const t = window.fednano.traffic; return t && t.same ? t : null";
            let shown = browser.wait("the same bytes at both ends", counts).await?;
            let [own, theirs]: [Traffic; 2] =
                [serde_json::from_value(shown["own"].clone())?, serde_json::from_value(shown["server"].clone())?];
            let found = ledger(&federation).await?;
            let [me] = &found.participants[..] else { anyhow::bail!("{:?}", found.participants) };
            ensure!(own == me.total && theirs == me.total, "the tab has {own:?}, the server {:?}", me.total);
            ensure!(own.down.edge_bundle > 0 && own.up.labels > 0 && own.down.gradients > 0, "{own:?}");
            let short = boundary == BoundaryChoice::LowRank;
            ensure!((own.up.codes > 0) == short && (own.up.activations > 0) != short, "{own:?}");
            // By round as well.
            let told = "return JSON.stringify(window.fednano.rounds)";
            let told = browser.script(told).await?;
            let rounds: BTreeMap<u32, Traffic> = serde_json::from_str(told.as_str().context("no rounds were told")?)?;
            ensure!(rounds == me.rounds, "by round the tab has {rounds:?}, the server {:?}", me.rounds);
            let table = browser.script("return document.getElementById('traffic-table').innerText").await?;
            let table = table.as_str().unwrap_or_default().to_lowercase();
            ensure!(
                table.contains("gradients") && table.contains("model part for this device"),
                "the page shows: {table}"
            );
            browser.close().await?;
            server.stop().await?;
        }
        Ok(())
    })
}
