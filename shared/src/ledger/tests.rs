//! Every frame is counted whole, and under what it carries.

use super::*;
use crate::boundary::{EvaluationReply, Pair, Place, Target, Want};
use crate::generate::{NextToken, Sampling};
use crate::plain::TensorBlob;
use crate::settings::{AdapterChoice, Format};
use crate::wire::numbers::PictureKey;
use crate::wire::{self, Fault, FaultCode, Update, WireRow};

fn packed_of(bytes: usize) -> Packed {
    Packed { format: Format::F32, deflated: false, bytes: vec![7; bytes] }
}

fn pair_of(bytes: usize) -> Pair<Packed> {
    Pair { image: Some(packed_of(bytes)), text: Some(packed_of(2 * bytes)) }
}

fn targets() -> Vec<Target> {
    vec![Target { row: 0, position: 3, token: 300 }, Target { row: 0, position: 4, token: 2 }]
}

fn request(input: WireInput) -> WireRequest {
    WireRequest { input, lengths: vec![5], targets: targets(), want: Want::Gradient, place: Place::ALONE }
}

fn codes(up: Matrices) -> WireRequest {
    let rows = vec![WireRow { ids: vec![1, 300, 20_000], picture: Some((PictureKey(u64::MAX), 1)) }];
    request(WireInput::Codes { rows, rank: 2, codes: pair_of(40), up })
}

fn train(round: u32, request: WireRequest) -> ClientMessage {
    ClientMessage::Train { id: 9, round, request }
}

fn reply(gradient: WireGradient) -> ServerMessage {
    ServerMessage::Trained { id: 9, reply: WireReply { loss: 1.0, row_loss: vec![1.0], gradient } }
}

fn adapter() -> AdapterState {
    AdapterState::zeros(AdapterChoice::Both, 2, 6) // 4 x 12 values
}

fn update(round: u32, fisher: bool) -> ClientMessage {
    let fisher = fisher.then(adapter);
    ClientMessage::Update(Update { round, adapter: adapter(), fisher, samples: 1, loss: 0.5, local: None })
}

/// What a meter makes of one frame upward.
fn up(message: &ClientMessage) -> Bytes {
    let (mut meter, frame) = (Meter::default(), wire::encode(message));
    meter.up(message, frame.len());
    let all = meter.total();
    assert_eq!((all.up.total(), all.down.total()), (frame.len() as u64, 0), "{message:?}");
    all.up
}

/// The same downward.
fn down(message: &ServerMessage) -> Bytes {
    let (mut meter, frame) = (Meter::default(), wire::encode(message));
    meter.down(message, frame.len());
    let all = meter.total();
    assert_eq!((all.up.total(), all.down.total()), (0, frame.len() as u64), "{message:?}");
    all.down
}

#[test]
fn a_frame_upward_is_counted_under_what_it_carries() {
    // A varint has 7 bits a byte, and a list its length before it.
    let (labels, text) = (1 + (1 + 1 + 2) + 3, 1 + 1 + 2 + 3);
    let counted = up(&train(1, request(WireInput::Hidden(packed_of(1000)))));
    assert_eq!(counted, Bytes { activations: 1000, labels, control: counted.control, ..Bytes::default() });
    assert!((8..64).contains(&counted.control), "{counted:?}");

    let counted = up(&train(1, codes(Matrices::Sent(pair_of(100)))));
    let expected = Bytes { text, codes: 120, matrices: 300, labels, control: counted.control, ..Bytes::default() };
    assert_eq!(counted, expected);
    let again = up(&ClientMessage::Evaluate { id: 9, round: 1, request: codes(Matrices::Same) });
    assert_eq!((again.codes, again.matrices, again.text), (120, 0, text));

    let pictures = vec![(PictureKey(1), packed_of(30)), (PictureKey(2), packed_of(50))];
    assert_eq!(up(&ClientMessage::Features { round: 1, pictures }).features, 80);
    let counted = up(&update(1, true));
    assert_eq!((counted.adapters, counted.fisher), (192, 192));
    assert_eq!(up(&update(1, false)).fisher, 0);
    let sampling = Sampling::GREEDY;
    let text = ClientMessage::Generate { id: 1, past: 0, hidden: packed_of(64), positions: 2, sampling };
    assert_eq!(up(&text).hidden_states, 64);
    for message in [ClientMessage::Leave, ClientMessage::Bye, ClientMessage::StopGenerating] {
        assert_eq!(up(&message), Bytes { control: 5, ..Bytes::default() });
    }
}

#[test]
fn a_frame_downward_is_counted_under_what_it_carries() {
    assert_eq!(down(&reply(WireGradient::Hidden(packed_of(500)))).gradients, 500);
    let counted =
        down(&reply(WireGradient::Codes { codes: pair_of(10), up: pair_of(20), up_squares: Pair::default() }));
    assert_eq!((counted.gradients, counted.fisher), (90, 0));
    let counted = down(&reply(WireGradient::Codes { codes: pair_of(10), up: Pair::default(), up_squares: pair_of(5) }));
    assert_eq!((counted.gradients, counted.fisher), (30, 15));
    let reply = EvaluationReply { nll: vec![0.5, 1.5], predicted: vec![3, 300] };
    assert_eq!(down(&ServerMessage::Evaluated { id: 1, reply }).predictions, 1 + 8 + 1 + 3);
    let next = NextToken { token: 300, log_probability: -0.5 };
    assert!((2..10).contains(&down(&ServerMessage::Generated { id: 1, next }).predictions));
    assert_eq!(down(&ServerMessage::Round { round: 1, adapter: adapter() }).adapters, 192);
    assert_eq!(down(&ServerMessage::Finished { adapter: adapter() }).adapters, 192);
    let counted = down(&ServerMessage::Missing { id: 1, pictures: vec![PictureKey(1)] });
    assert_eq!(counted.total(), counted.control);
}

/// A connection as one end sees it; both see the same.
fn connection(meter: &mut Meter) {
    let up = |meter: &mut Meter, message: ClientMessage| meter.up(&message, wire::encode(&message).len());
    let down = |meter: &mut Meter, message: ServerMessage| meter.down(&message, wire::encode(&message).len());
    up(meter, ClientMessage::StopGenerating); // stands for the Hello, which names no round either
    meter.last = Some(2); // as the welcome says
    down(meter, ServerMessage::UpdateAccepted { round: 9 }); // announces nothing
    down(meter, ServerMessage::Round { round: 1, adapter: adapter() });
    up(meter, train(1, codes(Matrices::Same)));
    down(meter, ServerMessage::Wait { round: 2, rounds_until: None });
    up(meter, update(1, false)); // late
    up(meter, ClientMessage::StopGenerating);
    down(meter, ServerMessage::Finished { adapter: adapter() });
    up(meter, train(3, codes(Matrices::Same))); // personal
    up(meter, ClientMessage::Bye);
}

#[test]
fn rounds_follow_from_the_frames() {
    let mut meter = Meter::default();
    meter.download(1000);
    meter.download(0);
    connection(&mut meter);
    let rounds = meter.by_round().clone();
    assert_eq!(rounds.keys().copied().collect::<Vec<_>>(), [0, 1, 2, AFTER]);
    assert_eq!((rounds[&0].down.edge_bundle, rounds[&0].up.total()), (1000, 5));
    assert_eq!((rounds[&1].up.codes, rounds[&1].up.adapters, rounds[&1].down.adapters), (120, 192, 192));
    assert_eq!((rounds[&2].up.total(), rounds[&2].down.adapters), (0, 0));
    assert!(rounds[&2].down.control > 0, "the announcement belongs to the round that it announces");
    assert_eq!((rounds[&AFTER].up.codes, rounds[&AFTER].down.adapters), (120, 192));

    // In pieces it is the same.
    let mut pieces = Meter::default();
    pieces.download(1000);
    let mut sum = pieces.take();
    connection(&mut pieces);
    for (round, traffic) in pieces.take() {
        sum.entry(round).or_default().add(&traffic);
    }
    assert_eq!(sum, rounds);
    assert!(pieces.by_round().is_empty());
    pieces.up_unread(7);
    pieces.down_unread(11);
    assert_eq!(pieces.by_round()[&AFTER].up, Bytes { control: 7, ..Bytes::default() });
    assert_eq!(pieces.total().total(), 18);
}

#[test]
fn whoever_names_many_rounds_gets_few_lines() {
    let mut meter = Meter::default();
    let progress = |round| ClientMessage::Progress { round, step: 1, steps: 2, loss: 0.5 };
    for round in [MOST_ROUNDS, MOST_ROUNDS + 1, MOST_ROUNDS + 2, u32::MAX] {
        meter.up(&progress(round), 10);
    }
    assert_eq!(meter.by_round().keys().copied().collect::<Vec<_>>(), [MOST_ROUNDS, AFTER]);
    meter.last = Some(3);
    meter.up(&progress(4), 10);
    assert_eq!(meter.by_round()[&AFTER].up.control, 40);
}

#[test]
fn a_damaged_length_never_counts_below_nothing() {
    let fault = Fault { code: FaultCode::Server, cause: "c".into(), remedy: "r".into() };
    let mut meter = Meter::default();
    meter.down(&ServerMessage::Closing(fault), 0);
    meter.up(&train(1, request(WireInput::Hidden(packed_of(1000)))), 10);
    assert_eq!((meter.total().up.activations, meter.total().up.control), (1000, 0));
    let mut most = Bytes { text: u64::MAX, ..Bytes::default() };
    most.add(&Bytes { text: 1, control: 1, ..Bytes::default() });
    assert_eq!((most.text, most.total()), (u64::MAX, u64::MAX));
}

#[test]
fn values_of_adapters_are_counted_by_their_bytes() {
    let state = AdapterState([("image.up".to_owned(), TensorBlob::zeros(&[3, 5]))].into());
    assert_eq!(values(&state), 60);
}

#[test]
fn ledgers_survive_being_written() {
    let mut traffic = Traffic::default();
    for (number, kind) in (1..).zip(Kind::ALL) {
        traffic.up.count(kind, number);
        traffic.down.count(kind, u64::MAX / number);
        assert_eq!(serde_json::to_value(kind).unwrap(), kind.name());
    }
    let json = serde_json::to_value(traffic).unwrap();
    assert_eq!(json["up"]["hidden_states"], 9);
    assert_eq!(json["down"].as_object().unwrap().len(), Kind::ALL.len());
    assert_eq!(serde_json::from_value::<Traffic>(json).unwrap(), traffic);
    let bytes = postcard::to_stdvec(&traffic).unwrap();
    assert_eq!(postcard::from_bytes::<Traffic>(&bytes), Ok(traffic));
    // A kind that an older program did not know.
    let older: Traffic = serde_json::from_str(r#"{"up": {"codes": 5}}"#).unwrap();
    assert_eq!((older.up.codes, older.total()), (5, 5));
    let rounds = BTreeMap::from([(1, traffic), (AFTER, Traffic::default())]);
    let json = serde_json::to_string(&rounds).unwrap();
    assert_eq!(serde_json::from_str::<BTreeMap<u32, Traffic>>(&json).unwrap(), rounds);
}

#[test]
fn a_table_names_what_there_is() {
    let mut traffic = Traffic::default();
    traffic.up.codes = 1_234_567;
    traffic.down.edge_bundle = 12;
    let text = table(&traffic);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert_eq!(lines[1], format!("{:<16}{:>18}{:>18}", "edge bundle", "-", "12"));
    assert_eq!(lines[2], format!("{:<16}{:>18}{:>18}", "codes", "1,234,567", "-"));
    assert!(lines[3].starts_with("together") && lines[3].ends_with("12"), "{text}");
    assert_eq!([1, 999, 1000, 1_000_000].map(grouped), ["1", "999", "1,000", "1,000,000"]);
}
