//! The byte ledger: what went over the network, by direction, kind and round. Both ends count with the same code, frame by frame,
//! so their sums are equal; what HTTP, WebSocket and TCP add around a frame is not in it.
//!
//! A frame's payload is counted under its kind, everything else of it (names, shapes, numbers of requests, the head) as
//! [`Kind::Control`]. So the kinds of a frame add up to its length, always.

use crate::plain::AdapterState;
use crate::wire::numbers::Packed;
use crate::wire::{ClientMessage, Matrices, ServerMessage, WireGradient, WireInput, WireReply, WireRequest};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The round of what comes after the last one: the result, personal adapters. Rounds that there cannot be are counted here too.
pub const AFTER: u32 = u32::MAX;
/// A ledger tells so many rounds apart. What names a later one is counted under [`AFTER`].
pub const MOST_ROUNDS: u32 = 4096;

macro_rules! kinds {
    ($($(#[$doc:meta])+ $variant:ident $field:ident $words:literal,)+) => {
        /// What bytes are for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Kind {
            $($(#[$doc])+ $variant,)+
        }

        impl Kind {
            /// All of them, in the order of tables.
            pub const ALL: [Self; [$($words),+].len()] = [$(Self::$variant),+];

            /// As in JSON and in metrics.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => stringify!($field),)+
                }
            }

            /// For people.
            pub const fn words(self) -> &'static str {
                match self {
                    $(Self::$variant => $words,)+
                }
            }
        }

        /// Bytes by kind.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
        #[serde(default)]
        pub struct Bytes {
            $($(#[$doc])+ pub $field: u64,)+
        }

        impl Bytes {
            /// Of one kind.
            pub const fn get(&self, kind: Kind) -> u64 {
                match kind {
                    $(Kind::$variant => self.$field,)+
                }
            }

            /// So many more of one kind.
            pub const fn count(&mut self, kind: Kind, bytes: u64) {
                let sum = match kind {
                    $(Kind::$variant => &mut self.$field,)+
                };
                *sum = sum.saturating_add(bytes);
            }
        }
    };
}

kinds! {
    /// The client's half of the model: manifest, files and pieces, over HTTP.
    EdgeBundle edge_bundle "edge bundle",
    /// Features of pictures, once each.
    Features features "features",
    /// Token ids.
    Text text "text",
    /// Hidden states of a batch (mode `activations`).
    Activations activations "activations",
    /// Codes of a batch (mode `low-rank`).
    Codes codes "codes",
    /// The adapters' `up` matrices (mode `low-rank`).
    Matrices matrices "matrices",
    /// What training needs back: gradients of hidden states, of codes and of the `up` matrices.
    Gradients gradients "gradients",
    /// Which tokens are right.
    Labels labels "labels",
    /// Hidden states of a text that the model writes.
    HiddenStates hidden_states "hidden states",
    /// Likelihoods and tokens: what the model thinks.
    Predictions predictions "predictions",
    /// Adapters, uploaded and merged.
    Adapters adapters "adapters",
    /// Fisher values: diagonals uploaded, squares of gradients downloaded.
    Fisher fisher "Fisher values",
    /// Everything else.
    Control control "control",
}

impl Bytes {
    /// Every kind with its bytes, also those of which there are none.
    pub fn iter(&self) -> impl Iterator<Item = (Kind, u64)> {
        Kind::ALL.into_iter().map(move |kind| (kind, self.get(kind)))
    }

    /// Of all kinds together.
    pub fn total(&self) -> u64 {
        self.iter().fold(0, |sum, (_, bytes)| sum.saturating_add(bytes))
    }

    /// These on top.
    pub fn add(&mut self, other: &Self) {
        other.iter().for_each(|(kind, bytes)| self.count(kind, bytes));
    }

    /// A frame of so many bytes with this payload.
    fn in_frame(mut self, frame_bytes: usize) -> Self {
        let control = (frame_bytes as u64).saturating_sub(self.total());
        self.count(Kind::Control, control);
        self
    }
}

/// Bytes in both directions, as seen from the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Traffic {
    /// To the server.
    pub up: Bytes,
    /// From the server.
    pub down: Bytes,
}

impl Traffic {
    /// These on top.
    pub fn add(&mut self, other: &Self) {
        self.up.add(&other.up);
        self.down.add(&other.down);
    }

    /// Both directions together.
    pub fn total(&self) -> u64 {
        self.up.total().saturating_add(self.down.total())
    }

    /// Both directions with their names.
    pub fn directions(&self) -> [(&'static str, &Bytes); 2] {
        [("up", &self.up), ("down", &self.down)]
    }

    /// Several together.
    pub fn sum<'a>(of: impl IntoIterator<Item = &'a Self>) -> Self {
        of.into_iter().fold(Self::default(), |mut sum, traffic| {
            sum.add(traffic);
            sum
        })
    }
}

/// Counts the frames of one connection, at either end: every frame that is sent or read goes through it.
///
/// Which round a frame belongs to follows from the frames alone, so both ends agree. Upward it is the round that the frame names, or
/// else the one named last; downward the one that was announced last, the announcement included. Before the first of the connection it
/// is 0: so 0 is what came before the first round, and each connection's handshake. Questions belong to no round, so they name 0 or
/// none and are counted there. After `Finished` it is [`AFTER`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meter {
    rounds: BTreeMap<u32, Traffic>,
    named: u32,
    announced: u32,
    /// The federation's last round, from the welcome on.
    last: Option<u32>,
}

impl Meter {
    /// A frame upward.
    pub fn up(&mut self, message: &ClientMessage, frame_bytes: usize) {
        if let Some(round) = round_of(message) {
            self.named = self.within(round);
        }
        let bytes = payload_up(message).in_frame(frame_bytes);
        self.rounds.entry(self.named).or_default().up.add(&bytes);
    }

    /// A frame downward.
    pub fn down(&mut self, message: &ServerMessage, frame_bytes: usize) {
        match message {
            ServerMessage::Welcome { settings, .. } => self.last = Some(settings.rounds),
            ServerMessage::Round { round, .. } | ServerMessage::Wait { round, .. } => {
                self.announced = self.within(*round);
            }
            ServerMessage::Finished { .. } => self.announced = AFTER,
            _ => {}
        }
        let bytes = payload_down(message).in_frame(frame_bytes);
        self.rounds.entry(self.announced).or_default().down.add(&bytes);
    }

    /// A frame upward that is no message.
    pub fn up_unread(&mut self, frame_bytes: usize) {
        let bytes = Bytes::default().in_frame(frame_bytes);
        self.rounds.entry(self.named).or_default().up.add(&bytes);
    }

    /// A frame downward that is no message.
    pub fn down_unread(&mut self, frame_bytes: usize) {
        let bytes = Bytes::default().in_frame(frame_bytes);
        self.rounds.entry(self.announced).or_default().down.add(&bytes);
    }

    /// Bytes of the edge bundle, which is downloaded before the first round.
    pub fn download(&mut self, bytes: u64) {
        if bytes > 0 {
            self.rounds.entry(0).or_default().down.count(Kind::EdgeBundle, bytes);
        }
    }

    /// Everything counted since the last [`Self::take`].
    pub fn total(&self) -> Traffic {
        Traffic::sum(self.rounds.values())
    }

    /// The same by round.
    pub const fn by_round(&self) -> &BTreeMap<u32, Traffic> {
        &self.rounds
    }

    /// Hand out what was counted, to be added up elsewhere; counting goes on from 0, in the same round.
    pub fn take(&mut self) -> BTreeMap<u32, Traffic> {
        std::mem::take(&mut self.rounds)
    }

    /// A peer may name any round; only those that there can be get a line of their own.
    fn within(&self, round: u32) -> u32 {
        let last = self.last.map_or(MOST_ROUNDS, |last| last.min(MOST_ROUNDS));
        if round > last { AFTER } else { round }
    }
}

/// The round that a frame names.
fn round_of(message: &ClientMessage) -> Option<u32> {
    match message {
        ClientMessage::Train { round, .. }
        | ClientMessage::Evaluate { round, .. }
        | ClientMessage::Features { round, .. }
        | ClientMessage::Progress { round, .. }
        | ClientMessage::Personal { round, .. } => Some(*round),
        ClientMessage::Update(update) => Some(update.round),
        _ => None,
    }
}

fn payload_up(message: &ClientMessage) -> Bytes {
    let mut bytes = Bytes::default();
    match message {
        ClientMessage::Train { request, .. } | ClientMessage::Evaluate { request, .. } => bytes = of_request(request),
        ClientMessage::Features { pictures, .. } => bytes.features = packed(pictures.iter().map(|(_, p)| p)),
        ClientMessage::Generate { hidden, .. } => bytes.hidden_states = packed([hidden]),
        ClientMessage::Update(update) => {
            bytes.adapters = values(&update.adapter);
            bytes.fisher = update.fisher.as_ref().map_or(0, values);
        }
        _ => {} // all of it is control
    }
    bytes
}

fn payload_down(message: &ServerMessage) -> Bytes {
    let mut bytes = Bytes::default();
    match message {
        ServerMessage::Trained { reply, .. } => bytes = of_reply(reply),
        ServerMessage::Evaluated { reply, .. } => bytes.predictions = written(reply),
        ServerMessage::Generated { next, .. } => bytes.predictions = written(next),
        ServerMessage::Round { adapter, .. } | ServerMessage::Finished { adapter } => bytes.adapters = values(adapter),
        _ => {} // all of it is control
    }
    bytes
}

fn of_request(request: &WireRequest) -> Bytes {
    let mut bytes = Bytes { labels: written(&request.targets), ..Bytes::default() };
    match &request.input {
        WireInput::Hidden(hidden) => bytes.activations = packed([hidden]),
        WireInput::Codes { rows, codes, up, .. } => {
            bytes.text = rows.iter().fold(0, |sum, row| sum + written(&row.ids));
            bytes.codes = packed(codes.iter().map(|(_, p)| p));
            if let Matrices::Sent(up) = up {
                bytes.matrices = packed(up.iter().map(|(_, p)| p));
            }
        }
    }
    bytes
}

fn of_reply(reply: &WireReply) -> Bytes {
    match &reply.gradient {
        WireGradient::Hidden(gradient) => Bytes { gradients: packed([gradient]), ..Bytes::default() },
        WireGradient::Codes { codes, up, up_squares } => Bytes {
            gradients: packed(codes.iter().chain(up.iter()).map(|(_, p)| p)),
            fisher: packed(up_squares.iter().map(|(_, p)| p)),
            ..Bytes::default()
        },
    }
}

/// Of values in their form on the wire.
fn packed<'a>(all: impl IntoIterator<Item = &'a Packed>) -> u64 {
    all.into_iter().fold(0, |sum, packed| sum + packed.bytes.len() as u64)
}

/// Of the values of adapters, which are sent as they are.
fn values(state: &AdapterState) -> u64 {
    state.0.values().fold(0, |sum, blob| sum + size_of_val(blob.data.as_slice()) as u64)
}

/// Of a part of a message.
fn written<T: Serialize + ?Sized>(part: &T) -> u64 {
    // Plain data has a length.
    postcard::experimental::serialized_size(part).map_or(0, |bytes| bytes as u64)
}

/// For a terminal: a line for each kind that there is, then all together.
pub fn table(traffic: &Traffic) -> String {
    let line = |name: &str, up: &str, down: &str| format!("{name:<16}{up:>18}{down:>18}\n");
    let mut text = line("bytes", "up", "down");
    for kind in Kind::ALL {
        let (up, down) = (traffic.up.get(kind), traffic.down.get(kind));
        if up > 0 || down > 0 {
            text += &line(kind.words(), &grouped(up), &grouped(down));
        }
    }
    text + &line("together", &grouped(traffic.up.total()), &grouped(traffic.down.total()))
}

/// Digits in threes; none at all as a dash.
fn grouped(number: u64) -> String {
    if number == 0 {
        return "-".into();
    }
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests;
