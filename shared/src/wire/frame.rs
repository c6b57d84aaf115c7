//! Messages as frames and back: the head, the size limits, and what is wrong with a frame.

use super::{ClientMessage, Fault, FaultCode, MAX_FRAME, VERSION};
use serde::{Serialize, de::DeserializeOwned};

const MAGIC: [u8; 2] = *b"FN";

/// Why a frame cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Too large.
    #[error("a frame of {0} bytes is larger than the {MAX_FRAME} allowed; use a smaller batch")]
    TooLarge(usize),
    /// The same of an own message, which is not sent.
    #[error("{what} makes a frame of {bytes} bytes, {MAX_FRAME} are allowed; {remedy}")]
    OwnTooLarge {
        /// Kind of message.
        what: &'static str,
        /// Bytes that it would have.
        bytes: usize,
        /// What to do.
        remedy: &'static str,
    },
    /// No frame of this protocol.
    #[error("{0} bytes that are not a FedNano frame; is something else talking to this address?")]
    NotAFrame(usize),
    /// Another version.
    #[error(
        "the other side speaks protocol version {theirs}, this side {VERSION}; reload the page or update the older program"
    )]
    Version {
        /// The other side's.
        theirs: u16,
    },
    /// Right frame, wrong body.
    #[error("a frame of version {VERSION} with a damaged body: {0}")]
    Body(String),
}

impl WireError {
    /// As told to the peer.
    pub fn fault(&self) -> Fault {
        let (code, remedy) = match self {
            Self::TooLarge(_) => (FaultCode::TooLarge, "use a smaller batch"),
            Self::OwnTooLarge { remedy, .. } => (FaultCode::TooLarge, *remedy),
            Self::NotAFrame(_) | Self::Body(_) => {
                (FaultCode::Malformed, "use a FedNano client of the server's version")
            }
            Self::Version { .. } => (FaultCode::Version, "reload the page, or update the older program"),
        };
        Fault { code, cause: self.to_string(), remedy: remedy.into() }
    }
}

/// A message as one frame.
pub fn encode<M: Serialize>(message: &M) -> Vec<u8> {
    let mut frame = MAGIC.to_vec();
    frame.extend(VERSION.to_le_bytes());
    // Writing plain data into memory cannot fail: no map of unknown length, no custom serializer that errs.
    postcard::to_extend(message, frame).unwrap_or_default()
}

/// A client's message as one frame that a server takes.
///
/// # Errors
/// [`WireError::OwnTooLarge`], before anything is sent: a server closes the connection over such a frame.
pub fn encode_to_send(message: &ClientMessage) -> Result<Vec<u8>, WireError> {
    let (what, remedy) = match message {
        ClientMessage::Train { .. } | ClientMessage::Evaluate { .. } => ("this batch", "use a smaller batch_size"),
        ClientMessage::Features { .. } => ("the features of these pictures", "send fewer at once"),
        ClientMessage::Update(_) => ("this update", "use a smaller rank"),
        _ => (SOME_MESSAGE, SHORTEN),
    };
    let frame = encode(message);
    fitting(&frame, what, remedy)?;
    Ok(frame)
}

/// The same check for a transport, which does not look into frames.
///
/// # Errors
/// [`WireError::OwnTooLarge`].
pub fn check_outgoing(frame: &[u8]) -> Result<(), WireError> {
    fitting(frame, SOME_MESSAGE, SHORTEN)
}

const SOME_MESSAGE: &str = "this message";
const SHORTEN: &str = "send less at once";

fn fitting(frame: &[u8], what: &'static str, remedy: &'static str) -> Result<(), WireError> {
    let bytes = frame.len();
    if bytes > MAX_FRAME { Err(WireError::OwnTooLarge { what, bytes, remedy }) } else { Ok(()) }
}

/// The message of a frame.
///
/// # Errors
/// [`WireError`]; never panics, whatever the bytes.
pub fn decode<M: DeserializeOwned>(frame: &[u8]) -> Result<M, WireError> {
    if frame.len() > MAX_FRAME {
        return Err(WireError::TooLarge(frame.len()));
    }
    let Some((head, body)) = frame.split_at_checked(4).filter(|(h, _)| h[..2] == MAGIC) else {
        return Err(WireError::NotAFrame(frame.len()));
    };
    let theirs = u16::from_le_bytes([head[2], head[3]]);
    if theirs != VERSION {
        return Err(WireError::Version { theirs });
    }
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        Ok((_, rest)) => Err(WireError::Body(format!("{} bytes too many", rest.len()))),
        Err(e) => Err(WireError::Body(e.to_string())),
    }
}
