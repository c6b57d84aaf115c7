//! The whole protocol: one binary WebSocket message is one frame, `b"FN"`, version (u16, little-endian), then a postcard
//! body: [`ClientMessage`] upward, [`ServerMessage`] downward. The first message upward must be [`ClientMessage::Hello`].
//!
//! | module | what |
//! | --- | --- |
//! | `agreement` | what both ends can do, and the choice that the server makes of it |
//! | `numbers` | tensors as bytes: f32, f16, 8 bits, deflated |
//! | `convert` | requests and replies of the boundary in their form on the wire, and back |
//! | `frame` | messages as frames, size limits, errors |

pub mod agreement;
pub mod convert;
mod frame;
pub mod numbers;

pub use crate::ledger::Traffic;
pub use frame::{WireError, check_outgoing, decode, encode, encode_to_send};

use crate::boundary::{EvaluationReply, Pair, Place, Target, Want};
use crate::generate::{NextToken, Sampling};
use crate::plain::AdapterState;
use crate::settings::FederationSettings;
use crate::step::Evaluation;
use agreement::{Agreement, Offer};
use numbers::{Packed, PictureKey};
use serde::{Deserialize, Deserializer, Serialize};
use std::marker::PhantomData;

/// Changes with every change of a message.
pub const VERSION: u16 = 5;
/// Largest frame either side accepts, bytes: activations of a batch of 8 at LLaVA-1.5-7B's shape in f32.
pub const MAX_FRAME: usize = 96 << 20;
/// Longest name or federation id, bytes of UTF-8: 40 letters of any script. The page's input takes as many UTF-16 units
/// (`maxlength="40"`), none of which needs more than 3 bytes.
pub const MAX_NAME: usize = 120;
/// Longest description of a device that is kept, bytes of UTF-8; a longer one is cut: drivers are talkative, and that is no
/// fault of a participant's.
pub const MAX_DEVICE: usize = 160;

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
    /// Only use the model: judgements, texts, and gradients too (tests and comparisons ask for them), of the sizes that the server
    /// takes. No rounds, no updates; it does not count as a participant.
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
    /// What this program can do, and how much it has: the server chooses by it.
    pub offer: Offer,
    /// Number by which the download of the edge weights was announced, 32 hexadecimal digits: so the server counts its bytes for this
    /// participant. None: nothing was downloaded from this server.
    pub download: Option<String>,
}

/// Upward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ClientMessage {
    /// Handshake.
    Hello(Hello),
    /// A request for gradients.
    Train {
        /// Echoed in the reply.
        id: u64,
        /// Round it belongs to; 0: none, on a connection that only asks.
        round: u32,
        /// What the LLM reads, and the targets.
        request: WireRequest,
    },
    /// Forward only.
    Evaluate {
        /// Echoed in the reply.
        id: u64,
        /// Round it belongs to; 0: none.
        round: u32,
        /// What the LLM reads, and the positions to judge.
        request: WireRequest,
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
    /// Goodbye for good: do not wait for this participant. As after [`Self::Bye`], the server closes.
    Leave,
    /// Go on with this connection's text.
    Generate {
        /// Echoed in the reply.
        id: u64,
        /// Positions that the server has seen already; 0 begins a text and forgets the connection's former one.
        past: u32,
        /// Embeddings of the positions that follow them, `[positions, D]`; in f16 where codes go in 8 bits.
        hidden: Packed,
        /// How many those are.
        positions: u32,
        /// How to choose.
        sampling: Sampling,
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
    /// Features of pictures that requests name by their keys, before those requests or in answer to [`ServerMessage::Missing`]. The
    /// server keeps them for this participant as long as it has room.
    Features {
        /// Round they are first needed in; 0: none.
        round: u32,
        /// `[P, D]` each, in the format agreed.
        #[serde(deserialize_with = "few")]
        pictures: Vec<(PictureKey, Packed)>,
    },
    /// The orderly end of a connection, not of a participation: nothing follows it. The server says no more and closes; whoever reads
    /// until then has counted every byte that the server has.
    Bye,
}

/// A request of the boundary, in the form agreed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WireRequest {
    /// What the LLM reads.
    pub input: WireInput,
    /// Positions of each row.
    #[serde(deserialize_with = "few")]
    pub lengths: Vec<u32>,
    /// Answer tokens of all rows, sorted by row and position.
    pub targets: Vec<Target>,
    /// What is wanted.
    pub want: Want,
    /// Which request of its optimiser step it is. Those of a step come in order; the server adds up what it can.
    pub place: Place,
}

/// What the LLM reads: all of it, or what the server needs to put it together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum WireInput {
    /// Mode `activations`: `h`, `[T, D]`.
    Hidden(Packed),
    /// Mode `low-rank`: `h = x + up z`.
    Codes {
        /// What the features `x` of each row consist of.
        #[serde(deserialize_with = "few")]
        rows: Vec<WireRow>,
        /// R, the width of the codes, at most the federation's rank (twice that where FedDPA-F's mix is judged); 0 where there are none.
        rank: u32,
        /// `z` of each adapter, `[positions of the part, R]`.
        codes: Pair<Packed>,
        /// `up` of each adapter, `[D, R]`.
        up: Matrices,
    },
}

/// Rows of a batch, or pictures of a frame, at most.
const MANY: usize = 1 << 16;

/// A list of things that take more memory than bytes on the wire: one frame has room for millions of empty ones.
fn few<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    struct Few<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> serde::de::Visitor<'de> for Few<T> {
        type Value = Vec<T>;
        fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
            write!(f, "a list of at most {MANY}")
        }
        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let mut few = Vec::new();
            while let Some(one) = list.next_element()? {
                if few.len() == MANY {
                    return Err(serde::de::Error::custom(format!("more than {MANY} in a list")));
                }
                few.push(one);
            }
            Ok(few)
        }
    }
    deserializer.deserialize_seq(Few(PhantomData))
}

/// A row of a batch without its features: tokens are looked up in the model's public table, pictures come once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireRow {
    /// Token ids of all positions but the picture's.
    pub ids: Vec<u32>,
    /// The picture and its first position in the row.
    pub picture: Option<(PictureKey, u32)>,
}

/// The adapters' `up`: they change once an optimiser step, not with every request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Matrices {
    /// These.
    Sent(Pair<Packed>),
    /// Those last sent over this connection, whatever became of that request.
    Same,
}

/// The answer to a training request, in the form agreed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WireReply {
    /// Mean negative log-likelihood over the request's targets, nats.
    pub loss: f32,
    /// The same mean for each row alone.
    pub row_loss: Vec<f32>,
    /// In the form of the request's input.
    pub gradient: WireGradient,
}

/// What the client's backward pass needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum WireGradient {
    /// `g`, `[T, D]`.
    Hidden(Packed),
    /// In short.
    Codes {
        /// `u = upT g`, in the shape of the codes.
        codes: Pair<Packed>,
        /// `dL/d up`, `[D, R]`, of the whole optimiser step: with one of its requests, the one that was computed last.
        up: Pair<Packed>,
        /// Sums of squares of each row's own `dL/d up`, `[D, R]`, likewise of the whole step.
        up_squares: Pair<Packed>,
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
    /// Larger than [`MAX_FRAME`], or than a connection that only asks may send.
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
    /// Bytes so far, by direction and kind.
    pub traffic: Traffic,
    /// Its newest judgement on its own test samples.
    pub local: Option<LocalEvaluation>,
    /// It trains in the current round.
    pub selected: bool,
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
        /// What was agreed about the federation.
        settings: FederationSettings,
        /// The federation now.
        status: Status,
        /// What is spoken on this connection.
        agreement: Agreement,
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
        reply: WireReply,
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
    /// Request `id` waits for features that the server has not, or no more. They are to be sent; the request is not to be repeated.
    /// When no features at all have come for two minutes, it is refused; or, whatever comes, after ten minutes and two more for each
    /// picture called for.
    Missing {
        /// Of the request.
        id: u64,
        /// The pictures.
        pictures: Vec<PictureKey>,
    },
}

#[cfg(test)]
mod tests;
