//! A server that is played by a script.

use super::*;
use crate::boundary::{CodesInput, Pair, Positions, Target, Want};
use crate::client::{ClientEvent, TransportError};
use crate::edge::BatchRow;
use crate::ledger::Traffic;
use crate::plain::{AdapterState, TensorBlob};
use crate::settings::{Overlap, Rounding};
use crate::wire::agreement::Agreement;
use crate::wire::numbers::{Coder, Packed};
use crate::wire::{self, Fault, Matrices, Phase, Status, WireGradient, WireInput, WireReply};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

/// Width.
const D: usize = 4;
/// Rank.
const R: usize = 2;
/// Image positions of a row.
const P: usize = 2;

#[derive(Default)]
struct Script {
    sent: Vec<ClientMessage>,
    answers: VecDeque<Vec<u8>>,
    bytes: u64,
}

#[derive(Clone, Default)]
struct Played(Rc<RefCell<Script>>);

impl Played {
    fn will_say(&self, messages: impl IntoIterator<Item = ServerMessage>) {
        self.0.borrow_mut().answers.extend(messages.into_iter().map(|message| wire::encode(&message)));
    }

    /// What has been sent since the last time, in words.
    fn heard(&self) -> Vec<String> {
        std::mem::take(&mut self.0.borrow_mut().sent).iter().map(words).collect()
    }
}

impl Transport for Played {
    async fn send(&mut self, frame: Vec<u8>) -> Result<(), TransportError> {
        let mut script = self.0.borrow_mut();
        script.bytes += frame.len() as u64;
        script.sent.push(wire::decode(&frame).unwrap());
        Ok(())
    }

    async fn receive(&mut self) -> Result<Vec<u8>, TransportError> {
        let mut script = self.0.borrow_mut();
        let Some(frame) = script.answers.pop_front() else { return Err(TransportError::Lost("silence".into())) };
        script.bytes += frame.len() as u64;
        Ok(frame)
    }
}

struct Nobody;

impl Observer for Nobody {
    fn event(&mut self, _: ClientEvent<'_>) {}
}

fn words(message: &ClientMessage) -> String {
    match message {
        ClientMessage::Features { round, pictures } => format!("features of {} in round {round}", pictures.len()),
        ClientMessage::Train { id, request, .. } => format!("train {id}, {}", matrices(&request.input)),
        ClientMessage::Evaluate { id, request, .. } => format!("evaluate {id}, {}", matrices(&request.input)),
        _ => "something else".into(),
    }
}

fn matrices(input: &WireInput) -> &'static str {
    match input {
        WireInput::Hidden(_) => "whole",
        WireInput::Codes { up: Matrices::Sent(_), .. } => "sent",
        WireInput::Codes { up: Matrices::Same, .. } => "same",
    }
}

/// Runs what never waits.
fn run<F: Future>(future: F) -> F::Output {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("it waits"),
    }
}

fn packed(rows: usize, width: usize) -> Packed {
    Coder::EXACT.pack("values", &vec![0.5; rows * width], width).unwrap()
}

fn picture(value: f32) -> Arc<PictureFeatures> {
    let values = Coder::EXACT.pack("features", &[value; P * D], D).unwrap();
    Arc::new(PictureFeatures::new(values, D))
}

/// Each row: a picture, then one token.
fn batch(pictures: &[&Arc<PictureFeatures>]) -> Batch {
    let (rows, length) = (pictures.len(), P + 1);
    let row = |picture: &&Arc<PictureFeatures>| BatchRow { ids: vec![0, 0, 5], picture: Some(Arc::clone(picture)) };
    Batch {
        x: Arc::new(TensorBlob::zeros(&[length * rows, D])),
        positions: Positions { lengths: vec![length as u32; rows], images: vec![0..P as u32; rows] },
        targets: vec![Target { row: 0, position: 2, token: 1 }],
        rows: pictures.iter().map(row).collect(),
    }
}

fn up(value: f32) -> Arc<Pair<TensorBlob>> {
    let blob = || Some(TensorBlob { shape: vec![D, R], data: vec![value; D * R] });
    Arc::new(Pair { image: blob(), text: blob() })
}

fn request(batch: &Batch, up: &Arc<Pair<TensorBlob>>) -> BoundaryRequest {
    let rows = batch.rows.len();
    let codes = Pair { image: Some(TensorBlob::zeros(&[P * rows, R])), text: Some(TensorBlob::zeros(&[rows, R])) };
    let input = Input::Codes(CodesInput { x: Arc::clone(&batch.x), codes, up: Arc::clone(up) });
    BoundaryRequest { input, positions: batch.positions.clone(), targets: batch.targets.clone(), want: Want::Gradient }
}

/// The answer to a request of so many rows; the loss tells answers apart.
fn trained(id: u64, rows: usize, loss: f32) -> ServerMessage {
    let codes = Pair { image: Some(packed(P * rows, R)), text: Some(packed(rows, R)) };
    let gradient = WireGradient::Codes { codes, up: Pair::default(), up_squares: Pair::default() };
    ServerMessage::Trained { id, reply: WireReply { loss, row_loss: vec![loss; rows], gradient } }
}

fn link<'a>(played: &Played, observer: &'a mut Nobody) -> Link<'a, Played, Nobody> {
    let mut link = Link::new(played.clone(), observer);
    link.agree(Agreement { mode: BoundaryMode::LowRank, overlap: Overlap::Parts, ..Agreement::PLAIN }, 7);
    link
}

#[test]
fn features_go_first_and_once_and_matrices_when_they_change() {
    let (played, mut nobody) = (Played::default(), Nobody);
    let mut link = link(&played, &mut nobody);
    let (a, b) = (picture(1.0), picture(2.0));
    let (both, one) = (batch(&[&a, &b, &a]), batch(&[&b]));
    played.will_say([trained(1, 3, 1.0), trained(2, 1, 2.0), trained(3, 1, 3.0)]);
    let mut remote = Remote::new(&mut link, 4, 0);
    for (batch, matrices) in [(&both, 0.0), (&one, 0.0), (&one, 1.0)] {
        run(remote.send(request(batch, &up(matrices)), batch, Place::ALONE)).unwrap();
        run(remote.reply()).unwrap();
    }
    assert_eq!(played.heard(), ["features of 2 in round 4", "train 1, sent", "train 2, same", "train 3, sent"]);
    let lasting = link.end();
    let total = Traffic::sum(lasting.rounds().values());
    assert_eq!(total.total(), played.0.borrow().bytes);
    assert_eq!(total.up.features, 2 * (P * D * 4) as u64);

    // On the next connection the pictures are known still, the matrices are not.
    let mut link = Link::going_on(played.clone(), &mut nobody, lasting);
    link.agree(Agreement { mode: BoundaryMode::LowRank, ..Agreement::PLAIN }, 7);
    run(Remote::new(&mut link, 4, 0).send(request(&both, &up(1.0)), &both, Place::ALONE)).unwrap();
    assert_eq!(played.heard(), ["train 1, sent"]);
    assert_eq!(Traffic::sum(link.end().rounds().values()).total(), played.0.borrow().bytes);
}

#[test]
fn what_the_server_lacks_is_sent_again_while_the_request_waits() {
    let (played, mut nobody) = (Played::default(), Nobody);
    let mut link = link(&played, &mut nobody);
    let (a, b) = (picture(1.0), picture(2.0));
    let both = batch(&[&a, &b]);
    played.will_say([
        ServerMessage::Missing { id: 9, pictures: vec![b.key] }, // of a request that was cancelled
        ServerMessage::Missing { id: 1, pictures: vec![b.key] },
        trained(1, 2, 1.0),
        ServerMessage::Missing { id: 2, pictures: vec![PictureKey(0)] },
    ]);
    let mut remote = Remote::new(&mut link, 1, 0);
    run(remote.send(request(&both, &up(0.0)), &both, Place::ALONE)).unwrap();
    assert_eq!(run(remote.reply()).unwrap().loss, 1.0);
    assert_eq!(played.heard(), ["features of 2 in round 1", "train 1, sent", "features of 1 in round 1"]);
    run(remote.send(request(&both, &up(0.0)), &both, Place::ALONE)).unwrap();
    let fault = run(remote.reply()).unwrap_err();
    assert!(matches!(&fault, BoundaryError::Failed(words) if words.contains("does not have")), "{fault}");
}

#[test]
fn what_two_requests_lack_is_sent_once() {
    let (played, mut nobody) = (Played::default(), Nobody);
    let mut link = link(&played, &mut nobody);
    let (a, b, c) = (picture(1.0), picture(2.0), picture(3.0));
    let (first, second) = (batch(&[&a, &b]), batch(&[&b, &c]));
    let missing = |id, pictures: [&Arc<PictureFeatures>; 2]| ServerMessage::Missing {
        id,
        pictures: pictures.map(|picture| picture.key).to_vec(),
    };
    let mut remote = Remote::new(&mut link, 1, 0);
    for batch in [&first, &second] {
        run(remote.send(request(batch, &up(0.0)), batch, Place::ALONE)).unwrap();
    }
    // Both were said before anything came.
    played.will_say([missing(1, [&a, &b]), missing(2, [&b, &c]), trained(1, 2, 1.0), trained(2, 2, 2.0)]);
    assert_eq!([1, 2].map(|_| run(remote.reply()).unwrap().loss), [1.0, 2.0]);
    let sent = ["features of 2 in round 1", "train 1, sent", "features of 1 in round 1", "train 2, same"];
    assert_eq!(played.heard(), [&sent[..], &["features of 2 in round 1", "features of 1 in round 1"]].concat());
    // What the server has dropped by the next request goes again.
    run(remote.send(request(&first, &up(0.0)), &first, Place::ALONE)).unwrap();
    played.will_say([missing(3, [&a, &b]), trained(3, 2, 3.0)]);
    run(remote.reply()).unwrap();
    assert_eq!(played.heard(), ["train 3, same", "features of 2 in round 1"]);
}

#[test]
fn another_answer_to_an_update_cancels_nothing() {
    let (played, mut nobody) = (Played::default(), Nobody);
    let mut link = link(&played, &mut nobody);
    let a = picture(1.0);
    let one = batch(&[&a]);
    let fault = Fault { code: FaultCode::StaleRound, cause: "c".into(), remedy: "r".into() };
    let answers = [ServerMessage::UpdateRefused { round: 1, fault }, ServerMessage::UpdateAccepted { round: 1 }];
    played.will_say(answers.into_iter().chain([trained(1, 1, 1.0)]));
    let mut remote = Remote::new(&mut link, 2, 0);
    run(remote.send(request(&one, &up(0.0)), &one, Place::ALONE)).unwrap();
    assert_eq!(run(remote.reply()).unwrap().loss, 1.0);
    assert!(link.order.is_none());
}

#[test]
fn another_version_is_said_with_one_remedy() {
    let (played, mut nobody) = (Played::default(), Nobody);
    let mut frame = wire::encode(&trained(1, 1, 1.0));
    frame[2] ^= 1;
    played.0.borrow_mut().answers.push_back(frame);
    let Err(Interruption::Failed(fault)) = run(link(&played, &mut nobody).receive()) else { panic!("it was read") };
    let words = fault.to_string();
    assert!(words.contains("protocol version") && words.matches("reload the page").count() == 1, "{words}");
}

/// Hears of bytes.
#[derive(Default)]
struct Told(Vec<u64>);

impl Observer for Told {
    fn event(&mut self, event: ClientEvent<'_>) {
        if let ClientEvent::Traffic { rounds } = event {
            self.0.push(Traffic::sum(rounds.values()).total());
        }
    }
}

#[test]
fn bytes_are_told_while_there_is_nothing_to_do() {
    let (played, mut told) = (Played::default(), Told::default());
    let status = || {
        ServerMessage::Status(Status {
            federation: "f".into(),
            phase: Phase::Lobby,
            round: 0,
            rounds: 1,
            participants: Vec::new(),
            history: Vec::new(),
            min_participants: 2,
        })
    };
    played.will_say([status(), status(), ServerMessage::Wait { round: 1, rounds_until: None }]);
    let seconds = Cell::new(0);
    let now = || {
        seconds.set(seconds.get() + 2);
        Duration::from_secs(seconds.get())
    };
    let mut link = Link::new(played, &mut told);
    assert!(matches!(run(link.next(now)), Ok(ServerMessage::Wait { .. })));
    drop(link);
    let each = wire::encode(&status()).len() as u64;
    assert_eq!(told.0, [0, each, 2 * each]);
}

#[test]
fn answers_come_in_the_order_of_the_requests() {
    let (played, mut nobody) = (Played::default(), Nobody);
    let mut link = link(&played, &mut nobody);
    let a = picture(1.0);
    let one = batch(&[&a]);
    let mut remote = Remote::new(&mut link, 1, 0);
    assert_eq!((remote.window(), remote.mode()), (2, BoundaryMode::LowRank));
    played.will_say([trained(2, 1, 2.0), trained(7, 1, 7.0), trained(1, 1, 1.0)]);
    for _ in 0..2 {
        run(remote.send(request(&one, &up(0.0)), &one, Place::ALONE)).unwrap();
    }
    assert_eq!([1, 2].map(|_| run(remote.reply()).unwrap().loss), [1.0, 2.0]);
    assert!(matches!(run(remote.reply()), Err(BoundaryError::Failed(_))), "nothing was asked");
    // An answer of another shape is not taken.
    run(remote.send(request(&one, &up(0.0)), &one, Place::ALONE)).unwrap();
    played.will_say([trained(3, 2, 1.0)]);
    assert!(matches!(run(remote.reply()), Err(BoundaryError::Failed(_))));
}

#[test]
fn a_fault_ends_the_waiting_and_matrices_are_sent_anew() {
    let (played, mut nobody) = (Played::default(), Nobody);
    let mut link = link(&played, &mut nobody);
    let a = picture(1.0);
    let one = batch(&[&a]);
    let send = |link: &mut Link<'_, Played, Nobody>| {
        run(Remote::new(link, 1, 1).send(request(&one, &up(0.0)), &one, Place::ALONE)).unwrap();
    };
    send(&mut link);
    send(&mut link);
    // One round later the update would still be taken; two rounds later it would not.
    let round = |round| ServerMessage::Round { round, adapter: AdapterState::default() };
    played.will_say([round(2), round(3)]);
    let fault = run(Remote::new(&mut link, 1, 1).reply()).unwrap_err();
    assert!(matches!(fault, BoundaryError::Cancelled(_)), "{fault}");
    assert!(matches!(link.order, Some(ServerMessage::Round { round: 3, .. })) && link.requests.is_empty());
    played.heard();
    send(&mut link);
    assert_eq!(played.heard(), ["train 3, sent"]);
    let fault = |code| Fault { code, cause: "c".into(), remedy: "r".into() };
    let refused = |id, code| ServerMessage::RequestRefused { id, fault: fault(code) };
    played.will_say([trained(1, 1, 1.0), refused(2, FaultCode::Invalid), refused(3, FaultCode::Server)]);
    assert!(matches!(run(Remote::new(&mut link, 1, 0).reply()), Err(BoundaryError::Lost(_))));
    send(&mut link);
    assert_eq!(played.heard(), ["train 4, sent"]);
}

#[test]
fn features_go_deflated_and_in_the_agreed_format_only() {
    let (played, mut nobody) = (Played::default(), Nobody);
    let mut link = link(&played, &mut nobody);
    link.agreement.deflate = true;
    let values = vec![1.0; 64 * D];
    let plain = Coder::EXACT.pack("features", &values, D).unwrap();
    let a = Arc::new(PictureFeatures::new(plain.clone(), D));
    let one = batch(&[&a]);
    run(Remote::new(&mut link, 1, 0).send(request(&one, &up(0.0)), &one, Place::ALONE)).unwrap();
    let sent = std::mem::take(&mut played.0.borrow_mut().sent);
    let ClientMessage::Features { pictures, .. } = &sent[0] else { panic!("{sent:?}") };
    let (key, packed) = &pictures[0];
    assert!(packed.deflated && packed.bytes.len() < plain.bytes.len());
    // The key is that of the values, deflated or not.
    assert_eq!((*key, packed.unpack("features", values.len(), D).unwrap()), (PictureKey::of(&plain), values));

    link.agreement.features = Format::F16;
    let b = picture(2.0);
    let other = batch(&[&b]);
    let mut remote = Remote::new(&mut link, 1, 0);
    assert_eq!(remote.features(), Format::F16);
    let fault = run(remote.send(request(&other, &up(0.0)), &other, Place::ALONE)).unwrap_err();
    assert!(matches!(&fault, BoundaryError::Failed(words) if words.contains("agreed was f16")), "{fault}");
    assert!(played.heard().is_empty());
}

#[test]
fn what_is_judged_is_not_drawn_by_lot() {
    let (played, mut nobody) = (Played::default(), Nobody);
    let mut link = link(&played, &mut nobody);
    let nearest = Agreement { codes: Format::Int8, matrices: Format::Int8, ..link.agreement };
    link.agreement = Agreement { rounding: Rounding::Stochastic, ..nearest };
    let a = picture(1.0);
    let one = batch(&[&a]);
    // The second of each row lies between two codes.
    let blob = || Some(TensorBlob { shape: vec![D, R], data: [1.0, 0.123].repeat(D) });
    let up = Arc::new(Pair { image: blob(), text: blob() });
    let judged = |id| ServerMessage::Evaluated { id, reply: EvaluationReply { nll: vec![0.0], predicted: vec![1] } };
    played.will_say([judged(1), trained(2, 1, 2.0), trained(3, 1, 3.0), judged(4), trained(5, 1, 5.0)]);
    let judge = |link: &mut Link<'_, Played, Nobody>| {
        run(Remote::new(link, 1, 0).evaluate(request(&one, &up), &one)).unwrap();
    };
    let train = |link: &mut Link<'_, Played, Nobody>| {
        let mut remote = Remote::new(link, 1, 0);
        run(remote.send(request(&one, &up), &one, Place::ALONE)).unwrap();
        run(remote.reply()).unwrap();
    };
    judge(&mut link);
    train(&mut link);
    train(&mut link);
    judge(&mut link);
    // Exact matrices are the same either way.
    link.agreement.matrices = Format::F32;
    train(&mut link);
    let expected = WireRequest::pack(&request(&one, &up), &one.rows, Place::ALONE, false, &nearest, 0).unwrap();
    let as_expected = |message: &ClientMessage| match message {
        ClientMessage::Train { request, .. } | ClientMessage::Evaluate { request, .. } => Some(*request == expected),
        _ => None,
    };
    let found: Vec<bool> = played.0.borrow().sent.iter().filter_map(as_expected).collect();
    assert_eq!(found, [true, false, false, true, false]);
    let words = ["features of 1 in round 1", "evaluate 1, sent", "train 2, sent", "train 3, same", "evaluate 4, sent"];
    assert_eq!(played.heard(), [&words[..], &["train 5, same"]].concat());
}

#[test]
fn no_seed_is_drawn_twice() {
    let (played, mut nobody) = (Played::default(), Nobody);
    let mut first = link(&played, &mut nobody);
    let mut seeds: Vec<u64> = (0..3).map(|_| first.new_seed()).collect();
    let lasting = first.end();
    let mut second = Link::going_on(played.clone(), &mut nobody, lasting);
    second.agree(Agreement::PLAIN, 7);
    seeds.extend((0..3).map(|_| second.new_seed()));
    let different: std::collections::BTreeSet<u64> = seeds.iter().copied().collect();
    assert_eq!(different.len(), seeds.len(), "{seeds:?}");
}

#[test]
fn frames_of_features_are_small() {
    let picture = || picture(1.0);
    let bytes = P * D * 4;
    let sizes = |count: usize, limit: usize| {
        let pictures = (0..count).map(|_| picture()).collect();
        in_frames(pictures, limit).iter().map(Vec::len).collect::<Vec<_>>()
    };
    assert_eq!(sizes(5, 2 * bytes), [2, 2, 1]);
    assert_eq!(sizes(3, 2 * bytes - 1), [1, 1, 1]);
    assert_eq!(sizes(2, 0), [1, 1]);
    assert!(sizes(0, bytes).is_empty());
}
