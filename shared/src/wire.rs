//! The whole protocol: one binary WebSocket message is one frame, `b"FN"`, version (u16, little-endian), then a postcard
//! body: [`ClientMessage`] upward, [`ServerMessage`] downward. The first message upward must be [`ClientMessage::Hello`].

use crate::generate::{GenerateRequest, NextToken};
use crate::plain::{AdapterState, BoundaryReply, BoundaryRequest, EvaluationReply};
use crate::settings::FederationSettings;
use crate::step::Evaluation;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// Changes with every change of a message.
pub const VERSION: u16 = 4;
/// Largest frame either side accepts, bytes: activations of a batch of 8 at LLaVA-1.5-7B's shape in f32.
pub const MAX_FRAME: usize = 96 << 20;
/// Longest name or federation id, bytes of UTF-8: 40 letters of any script. The page's input takes as many UTF-16 units
/// (`maxlength="40"`), none of which needs more than 3 bytes.
pub const MAX_NAME: usize = 120;
/// Longest description of a device that is kept, bytes of UTF-8; a longer one is cut: drivers are talkative, and that is no
/// fault of a participant's.
pub const MAX_DEVICE: usize = 160;
const MAGIC: [u8; 2] = *b"FN";

/// Number of a participant within its federation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ParticipantId(pub u32);

/// Secret by which a participant comes back as itself.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SessionToken(pub String);

impl SessionToken {
    /// 128 random bits from the system, in hexadecimal digits.
    ///
    /// # Errors
    /// The system's words, where it gives no random numbers.
    pub fn made_up() -> Result<Self, String> {
        let mut bytes = [0u8; 16];
        getrandom::fill(&mut bytes).map_err(|e| format!("the system gives no random numbers: {e}"))?;
        Ok(Self(bytes.iter().map(|b| format!("{b:02x}")).collect()))
    }

    /// Is it as [`Self::made_up`] makes them? Anything else is too easily guessed.
    pub fn is_sound(&self) -> bool {
        self.0.len() == 32 && self.0.bytes().all(|b| b.is_ascii_hexdigit())
    }
}

impl std::fmt::Debug for SessionToken {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("SessionToken(..)") // never in a log
    }
}

/// What kind of program takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientKind {
    /// A browser tab.
    Tab,
    /// `fednano join`.
    Native,
    /// `fednano simulate`.
    Simulated,
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Take part in rounds.
    Train,
    /// Only use the model: evaluation requests, no rounds, not counted as a participant.
    Ask,
}

/// The first message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Federation to join.
    pub federation: String,
    /// Name shown to others.
    pub name: String,
    /// Kind of program.
    pub kind: ClientKind,
    /// Device in plain words, shown to the operator.
    pub device: String,
    /// Training samples held.
    pub samples: u32,
    /// Bytes of edge weights downloaded before joining.
    pub edge_bytes: u64,
    /// Rounds or questions.
    pub purpose: Purpose,
    /// The secret of an earlier session, or one made up for this one ([`SessionToken::made_up`]): by it a participant is known even if
    /// the first welcome was lost. None: the server makes one up.
    pub resume: Option<SessionToken>,
}

/// Upward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ClientMessage {
    /// Handshake.
    Hello(Hello),
    /// A training request of a round.
    Train {
        /// Echoed in the reply.
        id: u64,
        /// Round it belongs to.
        round: u32,
        /// Activations and targets.
        request: BoundaryRequest,
    },
    /// Forward only.
    Evaluate {
        /// Echoed in the reply.
        id: u64,
        /// Activations and the positions to read.
        request: BoundaryRequest,
    },
    /// For the others' screens.
    Progress {
        /// Round.
        round: u32,
        /// Steps done in this round.
        step: u32,
        /// Steps of this round.
        steps: u32,
        /// Loss of the last step, nats.
        loss: f32,
    },
    /// The result of a round.
    Update(Update),
    /// Goodbye for good: do not wait for this participant.
    Leave,
    /// Go on with this connection's text.
    Generate {
        /// Echoed in the reply.
        id: u64,
        /// New embeddings.
        request: GenerateRequest,
    },
    /// This connection's text is over; its cache can go.
    StopGenerating,
    /// After `Finished`, what the participant's personal adapters are worth to it (strategy `feddpa-f`); needs no answer.
    Personal {
        /// The federation's last round.
        round: u32,
        /// The federation's adapters, and the mix with the personal ones.
        local: LocalEvaluation,
    },
}

/// What a participant uploads: adapters only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Update {
    /// Round it was trained in.
    pub round: u32,
    /// Trained adapters; no tensors with strategy `local`.
    pub adapter: AdapterState,
    /// Diagonal Fisher, for the strategies that merge by it.
    pub fisher: Option<AdapterState>,
    /// Samples trained on.
    pub samples: u32,
    /// Mean training loss of the round, nats.
    pub loss: f32,
    /// On the participant's own test samples, if it keeps any.
    pub local: Option<LocalEvaluation>,
}

/// A participant's own test samples, on which it never trains: its judgement, made through the boundary.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LocalEvaluation {
    /// With the adapters that the round began with.
    pub global: Evaluation,
    /// With the own adapters after training.
    pub own: Evaluation,
}

/// Cause and remedy, in words for a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// For programs.
    pub code: FaultCode,
    /// What is wrong.
    pub cause: String,
    /// What to do.
    pub remedy: String,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}; {}", self.cause, self.remedy)
    }
}

/// Kinds of [`Fault`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FaultCode {
    /// Not a frame of this protocol.
    Malformed,
    /// Another protocol version.
    Version,
    /// Larger than [`MAX_FRAME`].
    TooLarge,
    /// A message at the wrong time.
    OutOfOrder,
    /// No such federation.
    UnknownFederation,
    /// Wrong shape, not finite, out of range.
    Invalid,
    /// Of a round that is not the current one.
    StaleRound,
    /// The federation is finished.
    Finished,
    /// The server is shutting down or failed.
    Server,
}

/// Where a federation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Waiting for participants.
    Lobby,
    /// A round is under way.
    Training,
    /// Merging and evaluating.
    Evaluating,
    /// All rounds done.
    Finished,
    /// Too few participants are there to end the round; what is accepted of it stays.
    Paused,
}

/// One line of the participants' table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ParticipantStatus {
    /// Number.
    pub id: ParticipantId,
    /// Name.
    pub name: String,
    /// Kind of program.
    pub kind: ClientKind,
    /// Device in plain words.
    pub device: String,
    /// Training samples.
    pub samples: u32,
    /// Connected now.
    pub connected: bool,
    /// Steps done and to do in the current round.
    pub progress: (u32, u32),
    /// Loss of the last step.
    pub loss: Option<f32>,
    /// Its update of the current round is in.
    pub updated: bool,
    /// Bytes so far.
    pub traffic: Traffic,
    /// Its newest judgement on its own test samples.
    pub local: Option<LocalEvaluation>,
    /// It trains in the current round.
    pub selected: bool,
}

/// Bytes of frames by kind, as counted at the server's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Traffic {
    /// Up: activations with targets, of training and evaluation.
    pub activations_up: u64,
    /// Up: adapters and Fisher.
    pub updates_up: u64,
    /// Up: everything else.
    pub control_up: u64,
    /// Down: gradients, and evaluation replies.
    pub gradients_down: u64,
    /// Down: the merged adapters of each round.
    pub adapters_down: u64,
    /// Down: everything else on the socket.
    pub control_down: u64,
    /// Down: edge weights, as the client counted them before joining.
    pub edge_down: u64,
}

/// What a round brought.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundResult {
    /// 0 is the untouched model.
    pub round: u32,
    /// Merged model on the held-out set.
    pub held_out: Evaluation,
    /// Whose updates were merged, in order; those of earlier rounds are in `late`.
    pub participants: Vec<ParticipantId>,
    /// Whose updates of earlier rounds were merged too, in order.
    pub late: Vec<ParticipantId>,
    /// Means of the participants' own judgements, weighted by their test samples.
    pub local: Option<LocalEvaluation>,
    /// Their mean training loss.
    pub training_loss: Option<f32>,
    /// From broadcast to evaluated, seconds.
    pub seconds: f64,
}

/// Everything a page shows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Federation.
    pub federation: String,
    /// Phase.
    pub phase: Phase,
    /// Current round (0: none yet).
    pub round: u32,
    /// Rounds in all.
    pub rounds: u32,
    /// Participants, also those that are away.
    pub participants: Vec<ParticipantStatus>,
    /// Results so far.
    pub history: Vec<RoundResult>,
    /// Participants needed to start.
    pub min_participants: usize,
}

/// Downward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(clippy::large_enum_variant)] // the welcome is large, and comes once a connection
pub enum ServerMessage {
    /// Handshake accepted.
    Welcome {
        /// Own number.
        participant: ParticipantId,
        /// For coming back.
        token: SessionToken,
        /// The token was known: an earlier session goes on.
        returning: bool,
        /// What was agreed.
        settings: FederationSettings,
        /// The federation now.
        status: Status,
    },
    /// Fatal: the connection closes after this.
    Refused(Fault),
    /// A round begins (or goes on, after coming back).
    Round {
        /// Its number, from 1.
        round: u32,
        /// Where to start.
        adapter: AdapterState,
    },
    /// Answer to `Train`.
    Trained {
        /// Of the request.
        id: u64,
        /// Loss and gradient.
        reply: BoundaryReply,
    },
    /// Answer to `Evaluate`.
    Evaluated {
        /// Of the request.
        id: u64,
        /// Likelihoods and choices.
        reply: EvaluationReply,
    },
    /// One request was refused; the session goes on.
    RequestRefused {
        /// Of the request.
        id: u64,
        /// Why.
        fault: Fault,
    },
    /// The update counts.
    UpdateAccepted {
        /// Its round.
        round: u32,
    },
    /// The update was not taken.
    UpdateRefused {
        /// Its round.
        round: u32,
        /// Why. After `StaleRound`, `OutOfOrder` and `Finished` the participant waits for what comes next; after anything else it
        /// gives up.
        fault: Fault,
    },
    /// Something changed.
    Status(Status),
    /// All rounds done.
    Finished {
        /// The federation's result.
        adapter: AdapterState,
    },
    /// The server goes away in order; try again later.
    Closing(Fault),
    /// Answer to `Generate`.
    Generated {
        /// Of the request.
        id: u64,
        /// The token that follows.
        next: NextToken,
    },
    /// Not selected in this round: wait for one of the next.
    Wait {
        /// The round that others train in.
        round: u32,
        /// Rounds until the next selection that may name this participant, if that is known.
        rounds_until: Option<u32>,
    },
}

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

#[cfg(test)]
mod tests;
