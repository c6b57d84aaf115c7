//! Signs of life: whoever goes silent without a goodbye is noticed, whoever only has nothing to say is not.

use anyhow::Context;
use fednano_server::edge_bundle;
use fednano_server::http::{self, Site};
use fednano_server::native::{ClientEnd, SocketConnector, channel};
use fednano_server::session::{self, Room, Shared, SignsOfLife};
use fednano_shared::boundary::{Pair, Place};
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::client::{Connector, Transport, TransportError};
use fednano_shared::generate::Sampling;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::settings::FederationSettings;
use fednano_shared::wire::agreement::{BoundaryMode, Offer};
use fednano_shared::wire::numbers::PictureKey;
use fednano_shared::wire::{
    self, ClientMessage, Hello, Matrices, Purpose, ServerMessage, SessionToken, WireInput, WireRequest, WireRow,
};
use fednano_tests::hand::{Hand, exact, numbers, request};
use fednano_tests::{LIMIT, Server, block, hello, nano_llava, offer, repository};
use futures_util::{SinkExt, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Soon over.
const SHORT: SignsOfLife = SignsOfLife {
    beat: Duration::from_millis(50),
    silence: Duration::from_millis(300),
    pictures: Duration::from_millis(300),
};
/// Soon over, but not because the machine is busy.
const PATIENT: SignsOfLife = SignsOfLife {
    beat: Duration::from_millis(50),
    silence: Duration::from_secs(1),
    pictures: Duration::from_millis(600),
};

/// The same with more time between two looks: a machine that is busy is not held up for as long.
const CALM: SignsOfLife = SignsOfLife { beat: Duration::from_millis(300), ..PATIENT };

/// A server with a second door, at which peers are watched with this patience.
struct Watched {
    server: Server,
    socket: String,
    _folder: tempfile::TempDir,
}

impl Watched {
    async fn start(signs: SignsOfLife) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        // Nobody trains: for two too few are there.
        let settings = FederationSettings { min_participants: 2, ..FederationSettings::exact() };
        let server = Server::start_model(&nano_llava(), settings, folder.path()).await?;
        let files = ModelFiles::open(&nano_llava())?;
        let bundle = edge_bundle::prepare(&nano_llava(), &files, EdgeDtype::F16, folder.path(), |_, _| {})?;
        let (shared, sessions) = (server.app.shared(), TaskTracker::new());
        let site = Arc::new(Site { shared, bundle, www: repository().join("www"), sessions });
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let socket = format!("ws://{}/ws", listener.local_addr()?);
        tokio::spawn(http::serve_with(listener, site, signs, server.shutdown.clone().cancelled_owned()));
        Ok(Self { server, socket, _folder: folder })
    }

    /// Is participant 1, the only one, connected, as everybody sees it?
    fn connected(&self) -> anyhow::Result<bool> {
        let status = self.server.app.federation("test").context("no federation")?.status();
        match &status.participants[..] {
            [] => Ok(false),
            [one] => Ok(one.connected),
            several => anyhow::bail!("{} participants instead of 1", several.len()),
        }
    }

    async fn until(&self, connected: bool) -> anyhow::Result<()> {
        while self.connected()? != connected {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }
}

type Raw = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Join by a socket that answers pings only while it is read.
async fn join(url: &str, resume: Option<SessionToken>) -> anyhow::Result<(Raw, SessionToken)> {
    let (mut socket, _) = tokio_tungstenite::connect_async(url).await?;
    let hello = ClientMessage::Hello(Hello { resume, ..hello("lid", 3, Purpose::Train) });
    socket.send(Message::Binary(wire::encode(&hello).into())).await?;
    while let Some(message) = socket.next().await {
        if let Message::Binary(frame) = message? {
            match wire::decode(&frame)? {
                ServerMessage::Welcome { token, .. } => return Ok((socket, token)),
                other => anyhow::bail!("{other:?} instead of a welcome"),
            }
        }
    }
    anyhow::bail!("the connection closed without a word")
}

/// Read, and so answer, until the server has asked for so many signs of life.
async fn answer_pings(socket: &mut Raw, count: usize) -> anyhow::Result<()> {
    let mut pings = 0;
    while pings < count {
        let message = socket.next().await.context("the server closed the connection")??;
        pings += usize::from(matches!(message, Message::Ping(_)));
    }
    Ok(())
}

/// A lid that closes: no goodbye, no answer any more. The federation hears of it, and it may come back as itself.
pub fn silent() -> anyhow::Result<()> {
    block(LIMIT, async {
        let watched = Watched::start(PATIENT).await?;
        let (mut socket, token) = join(&watched.socket, None).await?;
        watched.until(true).await?;
        answer_pings(&mut socket, 5).await?;
        // From here on nobody reads it, and it stays open.
        watched.until(false).await?;
        drop(socket);
        let (mut again, same) = join(&watched.socket, Some(token.clone())).await?;
        anyhow::ensure!(same == token, "it came back as somebody else");
        watched.until(true).await?;
        answer_pings(&mut again, 1).await?;
        watched.server.stop().await
    })
}

/// Nothing to say, but each sign of life is answered: nobody is given up for that.
pub fn quiet() -> anyhow::Result<()> {
    block(LIMIT, async {
        let watched = Watched::start(PATIENT).await?;
        // The server's signs of life keep this side content too.
        let connector = SocketConnector::new(&watched.socket, CancellationToken::new());
        let mut socket = connector.with_silence(PATIENT.silence).connect().await?;
        socket.send(wire::encode(&ClientMessage::Hello(hello("quiet", 3, Purpose::Train)))).await?;
        watched.until(true).await?;
        let end = Instant::now() + PATIENT.silence * 3;
        let mut heard = 0;
        while let Ok(frame) = timeout_at(end, socket.receive()).await {
            frame?;
            heard += 1;
            anyhow::ensure!(watched.connected()?, "it was given up after {heard} messages");
        }
        anyhow::ensure!(heard > 3, "{heard} messages: a page would not know that the server lives");
        watched.server.stop().await
    })
}

/// Channels know no signs of life; who has never given one is not expected to.
pub fn unwatched() -> anyhow::Result<()> {
    block(LIMIT, async {
        let watched = Watched::start(SHORT).await?;
        let (server_end, mut client) = channel();
        tokio::spawn(session::run_with(server_end, watched.server.app.shared(), SHORT));
        client.send(wire::encode(&ClientMessage::Hello(hello("channel", 3, Purpose::Train)))).await?;
        watched.until(true).await?;
        let end = Instant::now() + SHORT.silence * 5;
        while let Ok(frame) = timeout_at(end, client.receive()).await {
            let message: ServerMessage = wire::decode(&frame?)?;
            let expected = matches!(message, ServerMessage::Welcome { .. } | ServerMessage::Status(_));
            anyhow::ensure!(expected, "{message:?} to somebody in the lobby");
            anyhow::ensure!(watched.connected()?, "it was given up");
        }
        // It is still listened to.
        client.send(wire::encode(&ClientMessage::Leave)).await?;
        watched.until(false).await?;
        heard_out(&watched).await?;
        unread(&watched).await?;
        pushed_out(&watched).await?;
        watched.server.stop().await
    })
}

/// A connection that only asks, over a channel, and speaks whole activations.
async fn over_a_channel(shared: &Shared) -> anyhow::Result<Hand<ClientEnd>> {
    let (server_end, client) = channel();
    tokio::spawn(session::run(server_end, shared.clone()));
    Hand::over(client, Offer { modes: vec![BoundaryMode::Activations], ..offer(0) }).await
}

/// A training request of so many rows.
fn train(watched: &Watched, id: u64, rows: usize) -> ClientMessage {
    let values = numbers(rows * 5 * watched.server.app.held_out.edge.config.text.hidden);
    ClientMessage::Train { id, round: 0, request: request(rows, WireInput::Hidden(exact(&values))) }
}

/// Who is refused may still be sending: what it sends is taken until it has heard why.
async fn heard_out(watched: &Watched) -> anyhow::Result<()> {
    let (server_end, mut client) = channel();
    tokio::spawn(session::run(server_end, watched.server.app.shared()));
    client.send(wire::encode(&ClientMessage::Leave)).await?;
    match wire::decode(&client.receive().await?)? {
        ServerMessage::Refused(fault) => anyhow::ensure!(fault.cause.contains("not a Hello"), "{fault}"),
        other => anyhow::bail!("{other:?} instead of a refusal"),
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    client.send(wire::encode(&ClientMessage::Leave)).await.context("the server takes nothing any more")
}

/// Who does not read keeps no room from others: what it has asked for is computed, and waits to be sent.
async fn unread(watched: &Watched) -> anyhow::Result<()> {
    /// More than the channel holds.
    const REFUSED: u64 = 12;
    // One request at a time.
    let shared = Shared { room: Room::new(1), ..watched.server.app.shared() };
    let mut deaf = over_a_channel(&shared).await?;
    deaf.say(&train(watched, 1000, 400)).await?;
    for id in 0..REFUSED {
        let mut empty = request(1, WireInput::Hidden(exact(&[])));
        empty.lengths = vec![0];
        deaf.say(&ClientMessage::Train { id, round: 0, request: empty }).await?;
        // It would listen if it had to wait for the channel.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let mut other = over_a_channel(&shared).await?;
    other.say(&train(watched, 1, 1)).await?;
    let heard = timeout(Duration::from_secs(30), other.hear()).await.context("who does not read keeps the room")??;
    anyhow::ensure!(matches!(heard, ServerMessage::Trained { id: 1, .. }), "{heard:?} instead of an answer");
    let (mut trained, mut refused) = (0, 0);
    for _ in 0..=REFUSED {
        match deaf.hear().await? {
            ServerMessage::Trained { id: 1000, .. } => trained += 1,
            ServerMessage::RequestRefused { id, .. } if id < REFUSED => refused += 1,
            other => anyhow::bail!("{other:?} instead of an answer"),
        }
    }
    anyhow::ensure!((trained, refused) == (1, REFUSED), "{trained} answers and {refused} refusals");
    Ok(())
}

/// A text that is begun and ended at once leaves nothing behind, whichever of both reaches the LLM first: no other text is pushed out.
async fn pushed_out(watched: &Watched) -> anyhow::Result<()> {
    let shared = watched.server.app.shared();
    let hidden = exact(&numbers(2 * watched.server.app.held_out.edge.config.text.hidden));
    let (positions, sampling) = (2, Sampling::GREEDY);
    let text = |id: u64, past: u32| ClientMessage::Generate { id, past, hidden: hidden.clone(), positions, sampling };
    let mut patient = over_a_channel(&shared).await?;
    patient.say(&text(1, 0)).await?;
    let heard = patient.hear().await?;
    anyhow::ensure!(matches!(heard, ServerMessage::Generated { id: 1, .. }), "{heard:?} instead of a token");

    let mut hasty = over_a_channel(&Shared { room: Room::new(1), ..shared }).await?;
    // The LLM keeps 32 texts.
    for id in 0..60 {
        // This takes the room, so the text waits for it, and its end goes ahead.
        hasty.say(&train(watched, 1000 + id, 8)).await?;
        hasty.say(&text(id, 0)).await?;
        hasty.say(&ClientMessage::StopGenerating).await?;
        for _ in 0..2 {
            let heard = hasty.hear().await?;
            let answers = matches!(heard, ServerMessage::Trained { .. } | ServerMessage::Generated { .. });
            anyhow::ensure!(answers, "{heard:?} instead of an answer");
        }
    }
    patient.say(&text(2, positions)).await?;
    let heard = patient.hear().await?;
    anyhow::ensure!(matches!(heard, ServerMessage::Generated { id: 2, .. }), "{heard:?}: the text was pushed out");
    Ok(())
}

/// Features that were called for and do not come: the request is refused and its step given up, and the connection goes on.
pub fn no_pictures() -> anyhow::Result<()> {
    block(LIMIT, async {
        let watched = Watched::start(CALM).await?;
        let config = &watched.server.app.held_out.edge.config;
        let (dim, each) = (config.text.hidden, config.image_tokens());
        let offer = Offer { modes: vec![BoundaryMode::LowRank], ..offer(3) };
        let mut hand = Hand::open(&watched.socket, offer).await?;
        // Five ids, and perhaps a picture after the first; rank 1.
        let request = |picture: Option<PictureKey>, place: Place| {
            let positions = if picture.is_some() { each } else { 0 };
            let row = WireRow { ids: vec![5, 6, 7, 8, 9], picture: picture.map(|key| (key, 1)) };
            let codes = Pair { image: Some(exact(&numbers(positions))), text: Some(exact(&numbers(5))) };
            let up = || Some(exact(&numbers(dim)));
            let up = Matrices::Sent(Pair { image: up(), text: up() });
            let mut request = request(1, WireInput::Codes { rows: vec![row], rank: 1, codes, up });
            request.lengths[0] += positions as u32;
            WireRequest { place, ..request }
        };
        let part = |index: u16| Place { index, of: 3, share: 0.3 };
        let reply = hand.train(request(None, part(0))).await?.map_err(anyhow::Error::msg)?;
        anyhow::ensure!(reply.loss.is_finite(), "loss {}", reply.loss);

        let (id, begun) = (1000, Instant::now());
        hand.say(&ClientMessage::Train { id, round: 0, request: request(Some(PictureKey(7)), part(1)) }).await?;
        match hand.hear().await? {
            ServerMessage::Missing { id: theirs, pictures } if theirs == id => {
                anyhow::ensure!(pictures == [PictureKey(7)], "{pictures:?} are called for");
            }
            other => anyhow::bail!("{other:?} instead of a call for features"),
        }
        // Others may come first, which takes longer than it has.
        for key in 100..104 {
            tokio::time::sleep(CALM.pictures / 3).await;
            let features = exact(&numbers(each * dim));
            hand.say(&ClientMessage::Features { round: 0, pictures: vec![(PictureKey(key), features)] }).await?;
        }
        let last = Instant::now();
        // Frames without any do not count.
        let heard = loop {
            match timeout(CALM.pictures / 3, hand.hear()).await {
                Ok(heard) => break heard?,
                Err(_) => hand.say(&ClientMessage::Features { round: 0, pictures: Vec::new() }).await?,
            }
        };
        match heard {
            ServerMessage::RequestRefused { id: theirs, fault } if theirs == id => {
                println!("after {:?}: {fault}", begun.elapsed());
                anyhow::ensure!(fault.cause.contains("features of 1 pictures") && !fault.remedy.is_empty(), "{fault}");
                anyhow::ensure!(fault.cause.contains("none came within"), "{fault}");
            }
            other => anyhow::bail!("{other:?} instead of a refusal"),
        }
        // The last of them has been on its way for a moment.
        let waited = last.elapsed();
        anyhow::ensure!(waited > CALM.pictures / 2, "it was refused {waited:?} after features came");

        // Its step is given up; the next one is computed.
        let fault = hand.train(request(None, part(2))).await?.err().context("a step without its middle went on")?;
        anyhow::ensure!(fault.cause.contains("does not follow"), "{fault}");
        let reply = hand.train(request(None, Place::ALONE)).await?.map_err(anyhow::Error::msg)?;
        anyhow::ensure!(reply.loss.is_finite(), "loss {}", reply.loss);
        watched.server.stop().await
    })
}

/// The other way round: a native client gives up a server that is silent, and not one that only pings.
pub fn silent_server() -> anyhow::Result<()> {
    block(LIMIT, async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let url = format!("ws://{}", listener.local_addr()?);
        let connect = |silence: Duration| {
            let connector = SocketConnector::new(&url, CancellationToken::new());
            async move { connector.with_silence(silence).connect().await }
        };
        let accept = async || anyhow::Ok(tokio_tungstenite::accept_async(listener.accept().await?.0).await?);

        let (client, mute) = tokio::join!(connect(SHORT.silence), accept());
        let (mut client, _mute) = (client?, mute?);
        match client.receive().await {
            Err(TransportError::Lost(cause)) => anyhow::ensure!(cause.contains("silent for 0.3 s"), "{cause}"),
            other => anyhow::bail!("{other:?} from a server that says nothing"),
        }

        let (client, alive) = tokio::join!(connect(PATIENT.silence), accept());
        let (mut client, mut alive) = (client?, alive?);
        let speak = async {
            let end = Instant::now() + PATIENT.silence * 2;
            while Instant::now() < end {
                alive.send(Message::Ping(Vec::<u8>::new().into())).await?;
                tokio::time::sleep(PATIENT.beat).await;
            }
            alive.send(Message::Binary(vec![7u8].into())).await
        };
        let (frame, spoken) = tokio::join!(client.receive(), speak);
        spoken?;
        let frame = frame?;
        anyhow::ensure!(frame == [7], "{frame:?} instead of what was sent");
        Ok(())
    })
}
