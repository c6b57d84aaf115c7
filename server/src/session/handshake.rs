//! The beginning of a connection: who it is, what it is for, and what is spoken on it.

use super::features::Owner;
use super::requests::Means;
use super::{End, Session, Shared, SocketFault, message, new_number, out_of_order};
use crate::coordinator::only_asks;
use fednano_shared::ledger::Meter;
use fednano_shared::settings::FederationSettings;
use fednano_shared::wire::agreement::Agreement;
use fednano_shared::wire::{self, ClientMessage, Fault, FaultCode, Hello, ParticipantId, ServerMessage};
use futures_util::{Sink, Stream, StreamExt};
use std::time::Duration;

/// A connection must introduce itself within this time.
const HANDSHAKE: Duration = Duration::from_secs(20);
/// Digits of the number of a download.
const DOWNLOAD: usize = 32;

/// Let a connection in; none: it is over already.
///
/// # Errors
/// A [`Fault`] for it; nobody has joined then.
pub(super) async fn handshake<S>(socket: &mut S, shared: &Shared) -> Result<Option<Session>, Fault>
where
    S: Stream<Item = Result<Vec<u8>, SocketFault>> + Sink<Vec<u8>> + Unpin,
{
    let Ok(frame) = tokio::time::timeout(HANDSHAKE, socket.next()).await else {
        return Err(out_of_order("no Hello arrived in time"));
    };
    let mut meter = Meter::default();
    let mut hello = match message(frame, &mut meter)? {
        Some(ClientMessage::Hello(hello)) => hello,
        Some(_) => return Err(out_of_order("the first message is not a Hello")),
        None => return Ok(None),
    };
    check(&hello)?;
    hello.device.truncate(hello.device.floor_char_boundary(wire::MAX_DEVICE));
    let Some(federation) = shared.federations.get(&hello.federation).cloned() else {
        let known: Vec<&str> = shared.federations.keys().map(String::as_str).collect();
        return Err(Fault {
            code: FaultCode::UnknownFederation,
            cause: format!("there is no federation '{}' here", hello.federation),
            remedy: format!("check the invite link; this server has: {}", known.join(", ")),
        });
    };
    if shared.llm.is_gone() {
        return Err(Fault {
            code: FaultCode::Server,
            cause: "the LLM's thread has ended".into(),
            remedy: "ask the operator to start the server again; nothing is lost".into(),
        });
    }
    // Before it joins: nobody waits for one that cannot take part.
    let agreement = Agreement::choose(federation.settings(), &hello.offer, shared.shape.dim)?;
    let means = Means {
        agreement,
        shape: shared.shape,
        table: shared.table.clone(),
        form: hello.offer.table,
        room: shared.room.clone(),
    };
    let mut session = Session::new(federation.clone(), means, meter);
    let welcome = if only_asks(&hello) {
        // As of those who join, but for the bytes that nobody has counted here: who only asks is not believed.
        let downloaded = hello.download.as_deref().and_then(|id| federation.claim_download(id));
        session.meter.download(downloaded.unwrap_or(0));
        ServerMessage::Welcome {
            participant: ParticipantId(0),
            token: wire::SessionToken(String::new()),
            returning: false,
            settings: FederationSettings::default(),
            status: federation.status(),
            agreement,
        }
    } else {
        let joined = federation.join(hello).await?;
        session.id = Some(joined.id);
        session.owner = Owner::Participant(joined.token.clone());
        session.connection = joined.connection;
        session.patience = joined.settings.max_staleness;
        session.outbox = Some(joined.outbox);
        ServerMessage::Welcome {
            participant: joined.id,
            token: joined.token,
            returning: joined.returning,
            settings: joined.settings,
            status: joined.status,
            agreement,
        }
    };
    shared.features.arrive(&session.owner);
    if session.send(socket, welcome).await.is_err() {
        // As any lost connection: what has come over it counts.
        session.finish(End::Lost, shared).await;
        return Ok(None);
    }
    Ok(Some(session))
}

impl Session {
    /// One that is nobody's yet.
    fn new(federation: crate::coordinator::Federation, means: Means, meter: Meter) -> Self {
        Self {
            federation,
            means,
            meter,
            id: None,
            connection: 0,
            owner: Owner::Connection(new_number()),
            outbox: None,
            outgoing: std::collections::VecDeque::new(),
            round: 0,
            patience: 0,
            in_flight: futures_util::stream::FuturesUnordered::new(),
            waiting: Vec::new(),
            up: None,
            groups: super::groups::Groups::default(),
            text: None,
        }
    }
}

fn check(hello: &Hello) -> Result<(), Fault> {
    let fault = |cause: String, remedy: &str| Err(Fault { code: FaultCode::Invalid, cause, remedy: remedy.into() });
    for (what, text) in [("name", &hello.name), ("federation", &hello.federation)] {
        if text.len() > wire::MAX_NAME {
            return fault(
                format!("the {what} has {} bytes, at most {} are allowed", text.len(), wire::MAX_NAME),
                "shorten it; letters beyond plain ASCII take 2 to 4 bytes",
            );
        }
    }
    let sound = |id: &String| id.len() == DOWNLOAD && id.bytes().all(|b| b.is_ascii_hexdigit());
    if hello.download.as_ref().is_some_and(|id| !sound(id)) {
        return fault(
            format!("the number of the download is not {DOWNLOAD} hexadecimal digits"),
            "reload the page, or update the older program",
        );
    }
    if hello.samples == 0 && !only_asks(hello) {
        return fault(
            "a participant without samples cannot train".into(),
            "choose pictures with questions and answers first",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use fednano_shared::wire::agreement::Offer;
    use fednano_shared::wire::{ClientKind, Purpose};

    fn hello(name: &str, federation: &str) -> Hello {
        Hello {
            federation: federation.into(),
            name: name.into(),
            kind: ClientKind::Tab,
            device: String::new(),
            samples: 1,
            edge_bytes: 0,
            purpose: Purpose::Train,
            resume: None,
            offer: Offer::default(),
            download: None,
        }
    }

    #[test]
    fn a_name_is_measured_in_bytes() {
        let two_bytes = "\u{e9}";
        assert!(check(&hello(&two_bytes.repeat(wire::MAX_NAME / 2), "f")).is_ok());
        let fault = check(&hello(&two_bytes.repeat(wire::MAX_NAME / 2 + 1), "f")).unwrap_err();
        assert_eq!(fault.code, FaultCode::Invalid);
        assert!(fault.cause.contains("the name has 122 bytes, at most 120") && !fault.remedy.is_empty(), "{fault}");
        assert!(check(&hello("a", &"f".repeat(wire::MAX_NAME + 1))).unwrap_err().cause.contains("the federation has"));
        // What the page's input takes, in the widest letters, is not refused here.
        let widest = "\u{6f22}".repeat(40);
        assert_eq!(widest.encode_utf16().count(), 40);
        assert!(check(&hello(&widest, "f")).is_ok());
    }

    #[test]
    fn somebody_without_samples_only_asks() {
        let nothing = Hello { samples: 0, ..hello("a", "f") };
        assert!(check(&nothing).unwrap_err().cause.contains("without samples"));
        assert!(check(&Hello { purpose: Purpose::Ask, ..nothing }).is_ok());
    }

    #[test]
    fn a_download_has_a_number() {
        let with = |id: &str| check(&Hello { download: Some(id.into()), ..hello("a", "f") });
        assert!(with(&"0aF3".repeat(8)).is_ok());
        for id in ["", "0aF3", &"0aF3".repeat(9), &"0aG3".repeat(8)] {
            assert!(with(id).unwrap_err().cause.contains("32 hexadecimal digits"), "{id}");
        }
    }
}
