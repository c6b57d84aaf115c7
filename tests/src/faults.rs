//! Bad input: each gets an error that names cause and remedy, and the federation goes on.

use anyhow::Context;
use fednano_server::app::bind;
use fednano_server::native::{Invite, SocketConnector};
use fednano_shared::client::{ClientError, Connector, Transport};
use fednano_shared::model::checkpoint::load_llm;
use fednano_shared::model::files::ModelFiles;
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::{AdapterChoice, FederationSettings};
use fednano_shared::wire::agreement::{BoundaryMode, Offer};
use fednano_shared::wire::{
    self, ClientMessage, Fault, FaultCode, Hello, Purpose, ServerMessage, Update, WireInput, WireRequest,
};
use fednano_tests::hand::{self, Hand, exact, numbers};
use fednano_tests::{LIMIT, Server, block, hello, nano_llava, offer};
use futures_util::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;

async fn server() -> anyhow::Result<(Server, tempfile::TempDir)> {
    let folder = tempfile::tempdir()?;
    let settings = FederationSettings { min_participants: 1, rounds: 2, ..FederationSettings::exact() };
    Ok((Server::start(settings, folder.path()).await?, folder))
}

/// Send raw messages on a fresh socket; the fault that comes back.
async fn refused(server: &Server, messages: Vec<Message>) -> anyhow::Result<Fault> {
    let (mut socket, _) = tokio_tungstenite::connect_async(&server.socket).await?;
    for message in messages {
        // The server may close while a large frame is still on its way.
        drop(socket.send(message).await);
    }
    while let Some(Ok(message)) = socket.next().await {
        if let Message::Binary(bytes) = message
            && let ServerMessage::Refused(fault) = wire::decode(&bytes)?
        {
            return Ok(fault);
        }
    }
    anyhow::bail!("the connection closed without a word")
}

fn frame(message: &ClientMessage) -> Message {
    Message::Binary(wire::encode(message).into())
}

fn expect(fault: &Fault, code: FaultCode, word: &str) -> anyhow::Result<()> {
    println!("{fault}");
    anyhow::ensure!(fault.code == code, "{:?} instead of {code:?}: {fault}", fault.code);
    anyhow::ensure!(fault.cause.contains(word) && !fault.remedy.is_empty(), "'{word}' is not in: {fault}");
    Ok(())
}

/// After all that, an honest client is still served.
async fn still_serves(server: &Server) -> anyhow::Result<()> {
    let reply = whole(server).await?.train(request(2)).await?.map_err(anyhow::Error::msg)?;
    anyhow::ensure!(reply.loss.is_finite());
    Ok(())
}

/// A connection that speaks whole activations.
async fn whole(server: &Server) -> anyhow::Result<Hand> {
    Hand::open(&server.socket, Offer { modes: vec![BoundaryMode::Activations], ..offer(0) }).await
}

fn request(rows: usize) -> WireRequest {
    hand::request(rows, WireInput::Hidden(exact(&numbers(rows * 5 * 192))))
}

pub fn frames() -> anyhow::Result<()> {
    block(LIMIT, async {
        let (server, _folder) = server().await?;
        let garbage = refused(&server, vec![Message::Binary(b"hello, is this a web server?".to_vec().into())]).await?;
        expect(&garbage, FaultCode::Malformed, "28 bytes")?;
        expect(
            &refused(&server, vec![Message::Text("hello".into())]).await?,
            FaultCode::Malformed,
            "not a FedNano frame",
        )?;
        let mut damaged = wire::encode(&ClientMessage::Hello(hello("x", 1, Purpose::Train)));
        damaged.truncate(9);
        expect(&refused(&server, vec![Message::Binary(damaged.into())]).await?, FaultCode::Malformed, "damaged body")?;
        let mut old = wire::encode(&ClientMessage::Leave);
        old[2] = 77;
        expect(&refused(&server, vec![Message::Binary(old.into())]).await?, FaultCode::Version, "version 77")?;
        let large = vec![0u8; wire::MAX_FRAME + 1];
        expect(&refused(&server, vec![Message::Binary(large.into())]).await?, FaultCode::TooLarge, "larger than")?;
        still_serves(&server).await?;
        server.stop().await
    })
}

pub fn out_of_order() -> anyhow::Result<()> {
    block(LIMIT, async {
        let (server, _folder) = server().await?;
        let train = || ClientMessage::Train { id: 1, round: 1, request: request(1) };
        expect(&refused(&server, vec![frame(&train())]).await?, FaultCode::OutOfOrder, "not a Hello")?;
        let introduce = || frame(&ClientMessage::Hello(hello("twice", 1, Purpose::Ask)));
        expect(&refused(&server, vec![introduce(), introduce()]).await?, FaultCode::OutOfOrder, "second Hello")?;
        let adapter = AdapterState::zeros(AdapterChoice::Both, 8, 192);
        let update = Update { round: 1, adapter, fisher: None, samples: 1, loss: 1.0, local: None };
        let ask_then_update = vec![introduce(), frame(&ClientMessage::Update(update))];
        expect(&refused(&server, ask_then_update).await?, FaultCode::OutOfOrder, "only asks")?;
        let empty = vec![frame(&ClientMessage::Hello(hello("nobody", 0, Purpose::Train)))];
        expect(&refused(&server, empty).await?, FaultCode::Invalid, "without samples")?;
        let long = Hello { name: "x".repeat(500), ..hello("", 1, Purpose::Train) };
        expect(&refused(&server, vec![frame(&ClientMessage::Hello(long))]).await?, FaultCode::Invalid, "500 bytes")?;
        still_serves(&server).await?;
        server.stop().await
    })
}

pub fn activations() -> anyhow::Result<()> {
    block(LIMIT, async {
        let (server, _folder) = server().await?;
        let mut asker = whole(&server).await?;
        let hidden = |r: &mut WireRequest, values: &[f32]| r.input = WireInput::Hidden(exact(values));
        let with = |at: usize, value: f32| {
            let mut values = numbers(2 * 5 * 192);
            values[at] = value;
            values
        };
        type Change<'a> = &'a dyn Fn(&mut WireRequest);
        let faults: [(Change, &str); 9] = [
            (&|r| hidden(r, &with(3, f32::NAN)), "NaN at index 3"),
            (&|r| hidden(r, &with(0, f32::NEG_INFINITY)), "-inf"),
            (&|r| hidden(r, &numbers(2 * 5 * 191)), "1920 values"),
            (&|r| hidden(r, &[]), "1920 values"),
            (
                &|r| {
                    r.lengths = vec![900, 1];
                    hidden(r, &numbers(901 * 192));
                },
                "900 positions",
            ),
            (&|r| r.targets[0].token = 1_000_000, "token 1000000"),
            (&|r| r.targets.clear(), "no target"),
            (&|r| r.lengths = vec![u32::MAX, u32::MAX], "positions"),
            (&|r| r.targets[1].row = 2, "row 2"),
        ];
        for (change, word) in faults {
            let mut r = request(2);
            change(&mut r);
            let fault =
                asker.train(r).await?.err().with_context(|| format!("a faulty request was computed: {word}"))?;
            let words = fault.to_string();
            println!("{words}");
            anyhow::ensure!(words.contains(word) && !fault.remedy.is_empty(), "'{word}' is not in: {words}");
        }
        // The same session goes on.
        anyhow::ensure!(asker.train(request(1)).await?.map_err(anyhow::Error::msg)?.loss.is_finite());
        server.stop().await
    })
}

pub fn nan_update() -> anyhow::Result<()> {
    block(LIMIT, async {
        let (server, _folder) = server().await?;
        let federation = server.app.federation("test").context("no federation")?;
        let mut socket = SocketConnector::new(&server.socket, CancellationToken::new()).connect().await?;
        socket.send(wire::encode(&ClientMessage::Hello(hello("diverged", 3, Purpose::Train)))).await?;
        let mut poisoned = None;
        let fault = loop {
            match wire::decode(&socket.receive().await?)? {
                ServerMessage::Round { round, mut adapter } => {
                    let fisher = Some(AdapterState::zeros(AdapterChoice::Both, 8, 192));
                    if let Some(blob) = adapter.0.get_mut("text.up") {
                        blob.data[5] = f32::NAN;
                    }
                    poisoned = Some(round);
                    socket
                        .send(wire::encode(&ClientMessage::Update(Update {
                            round,
                            adapter,
                            fisher,
                            samples: 3,
                            loss: 1.0,
                            local: None,
                        })))
                        .await?;
                }
                ServerMessage::UpdateRefused { fault, .. } => break fault,
                _ => {}
            }
        };
        expect(&fault, FaultCode::Invalid, "'text.up' has the value NaN at index 5")?;
        anyhow::ensure!(poisoned == Some(1));
        let adapter = federation.adapter();
        anyhow::ensure!(
            adapter.0.values().all(|b| b.data.iter().all(|v| v.is_finite())),
            "NaN reached the federation's adapters"
        );
        anyhow::ensure!(federation.status().history.len() == 1, "a round was merged from a poisoned update");
        still_serves(&server).await?;
        server.stop().await
    })
}

pub fn unknown_federation() -> anyhow::Result<()> {
    block(LIMIT, async {
        let (server, _folder) = server().await?;
        let lost = Hello { federation: "elsewhere".into(), ..hello("x", 1, Purpose::Train) };
        let fault = refused(&server, vec![frame(&ClientMessage::Hello(lost))]).await?;
        expect(&fault, FaultCode::UnknownFederation, "'elsewhere'")?;
        anyhow::ensure!(fault.remedy.contains("test"), "the remedy does not name the federations: {}", fault.remedy);
        for (link, word) in
            [("not a link", "invite link"), ("ftp://x/?federation=a", "ftp:"), ("http://x/", "names no federation")]
        {
            let words = format!("{:#}", Invite::parse(link).err().context("accepted")?);
            anyhow::ensure!(words.contains(word), "'{word}' is not in: {words}");
        }
        // A client that is refused ends with the server's words.
        let transport = SocketConnector::new(&server.socket, CancellationToken::new()).connect().await?;
        let nowhere = Hello { federation: "nowhere".into(), ..hello("x", 1, Purpose::Ask) };
        match fednano_shared::ask::Asking::open(transport, nowhere).await {
            Err(ClientError::Refused(fault)) => expect(&fault, FaultCode::UnknownFederation, "'nowhere'")?,
            other => anyhow::bail!("not refused: {:?}", other.err()),
        }
        server.stop().await
    })
}

pub fn model_directory() -> anyhow::Result<()> {
    let copy = || -> anyhow::Result<tempfile::TempDir> {
        let folder = tempfile::tempdir()?;
        for entry in std::fs::read_dir(nano_llava())? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                std::fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
            }
        }
        Ok(folder)
    };
    let fault = |folder: &tempfile::TempDir| -> anyhow::Result<String> {
        let loaded = ModelFiles::open(folder.path()).and_then(|files| {
            load_llm(&files.config, &files.weights, &burn::tensor::Device::flex())?;
            fednano_shared::edge::NanoEdge::load(&files, &burn::tensor::Device::flex())
        });
        loaded.err().map(|e| e.to_string()).context("a damaged model was loaded")
    };
    for name in ["config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"] {
        let folder = copy()?;
        std::fs::remove_file(folder.path().join(name))?;
        let words = fault(&folder)?;
        anyhow::ensure!(words.contains(name), "'{name}' is not in: {words}");
        let folder = copy()?;
        let path = folder.path().join(name);
        let bytes = std::fs::read(&path)?;
        std::fs::write(&path, &bytes[..bytes.len() / 2])?;
        let words = fault(&folder)?;
        anyhow::ensure!(words.contains(name), "truncated: '{name}' is not in: {words}");
    }
    // Sizes that do not fit: all faults in one list.
    let folder = copy()?;
    let path = folder.path().join("config.json");
    std::fs::write(
        &path,
        std::fs::read_to_string(&path)?.replace("\"intermediate_size\": 512", "\"intermediate_size\": 500"),
    )?;
    let words = fault(&folder)?;
    anyhow::ensure!(words.matches("expected").count() > 4, "not all tensors are listed: {words}");
    Ok(())
}

pub fn port_in_use() -> anyhow::Result<()> {
    block(LIMIT, async {
        let first = bind("127.0.0.1:0").await?;
        let words = bind(&first.local_addr()?.to_string()).await.err().context("bound twice")?.to_string();
        anyhow::ensure!(words.contains("in use") && words.contains("--listen"), "{words}");
        let words = bind("256.1.1.1:99").await.err().context("bound")?.to_string();
        anyhow::ensure!(words.contains("256.1.1.1") && words.contains("--listen"), "{words}");
        Ok(())
    })
}
