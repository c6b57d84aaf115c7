use super::agreement::{BoundaryMode, TableForm};
use super::numbers::Coder;
use super::*;
use crate::plain::TensorBlob;
use crate::settings::Format;

fn packed(values: &[f32]) -> Packed {
    Coder::EXACT.pack("test", values, 1).unwrap()
}

fn request(input: WireInput) -> WireRequest {
    let targets = vec![Target { row: 0, position: 1, token: 300 }];
    WireRequest { input, lengths: vec![2], targets, want: Want::Gradient, place: Place::ALONE }
}

fn train() -> ClientMessage {
    ClientMessage::Train { id: 7, round: 2, request: request(WireInput::Hidden(packed(&[1.0, -0.5]))) }
}

fn short() -> ClientMessage {
    let row = WireRow { ids: vec![300], picture: Some((PictureKey(5), 1)) };
    let up = Matrices::Sent(Pair { image: Some(packed(&[1.0])), text: None });
    let codes = Pair { image: Some(packed(&[-0.5])), text: None };
    let input = WireInput::Codes { rows: vec![row], rank: 1, codes, up };
    ClientMessage::Evaluate { id: 7, round: 2, request: request(input) }
}

#[test]
fn golden_bytes() {
    let expected = [
        b'F', b'N', 5, 0, // frame, version
        1, 7, 2, // Train, id, round
        0, 0, 0, 8, 0, 0, 0x80, 0x3f, 0, 0, 0, 0xbf, // hidden: format, not deflated, byte length, values
        1, 2, // lengths
        1, 0, 1, 0xac, 2, // targets
        0, 0, 1, 0, 0, 0x80, 0x3f, // the gradient is wanted; request 0 of 1, its share
    ];
    assert_eq!(encode(&train()), expected);
    assert_eq!(decode::<ClientMessage>(&expected).unwrap(), train());
}

#[test]
fn golden_bytes_of_codes() {
    let expected = [
        b'F', b'N', 5, 0, // frame, version
        2, 7, 2, // Evaluate, id, round
        1, 1, 1, 0xac, 2, 1, 5, 1, // codes: one row, its ids, its picture and where
        1, // rank
        1, 0, 0, 4, 0, 0, 0, 0xbf, 0, // codes of the image adapter, none of the text adapter
        0, 1, 0, 0, 4, 0, 0, 0x80, 0x3f, 0, // matrices are sent
        1, 2, // lengths
        1, 0, 1, 0xac, 2, // targets
        0, 0, 1, 0, 0, 0x80, 0x3f, // as above
    ];
    assert_eq!(encode(&short()), expected);
    assert_eq!(decode::<ClientMessage>(&expected).unwrap(), short());
    let same = Matrices::Same;
    assert_eq!(postcard::to_stdvec(&same).unwrap(), [1]);
}

#[test]
fn golden_bytes_of_an_update() {
    let judged = |accuracy| Evaluation { accuracy, loss: 2.0, samples: 3 };
    let down = TensorBlob { shape: vec![1, 1], data: vec![1.0] };
    let update = ClientMessage::Update(Update {
        round: 2,
        adapter: AdapterState([("text.down".to_owned(), down)].into()),
        fisher: None,
        samples: 5,
        loss: 1.0,
        local: Some(LocalEvaluation { global: judged(0.5), own: judged(1.0) }),
    });
    let mut expected = vec![b'F', b'N', 5, 0, 4, 2, 1, 9]; // frame, version, Update, round, tensors, length of a name
    expected.extend(b"text.down");
    expected.extend([2, 1, 1, 4, 0, 0, 0x80, 0x3f]); // shape, byte length, value
    expected.extend([0, 5, 0, 0, 0x80, 0x3f, 1]); // no Fisher, samples, loss, a judgement
    expected.extend([0, 0, 0, 0, 0, 0, 0xe0, 0x3f, 0, 0, 0, 0, 0, 0, 0, 0x40, 3]); // accuracy, loss, samples
    expected.extend([0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0, 0, 0, 0, 0, 0, 0, 0x40, 3]);
    assert_eq!(encode(&update), expected);
    assert_eq!(decode::<ClientMessage>(&expected).unwrap(), update);
    let wait = ServerMessage::Wait { round: 3, rounds_until: None };
    assert_eq!(encode(&wait), [b'F', b'N', 5, 0, 12, 3, 0]);
}

#[test]
fn golden_bytes_of_pictures_and_goodbyes() {
    let features = ClientMessage::Features { round: 1, pictures: vec![(PictureKey(5), packed(&[1.0]))] };
    let expected = [b'F', b'N', 5, 0, 9, 1, 1, 5, 0, 0, 4, 0, 0, 0x80, 0x3f];
    assert_eq!(encode(&features), expected);
    assert_eq!(decode::<ClientMessage>(&expected).unwrap(), features);
    assert_eq!(encode(&ClientMessage::Bye), [b'F', b'N', 5, 0, 10]);
    let missing = ServerMessage::Missing { id: 3, pictures: vec![PictureKey(5)] };
    assert_eq!(encode(&missing), [b'F', b'N', 5, 0, 13, 3, 1, 5]);
    assert_eq!(decode::<ServerMessage>(&encode(&missing)).unwrap(), missing);
}

#[test]
fn an_introduction_comes_back_the_same() {
    let hello = ClientMessage::Hello(Hello {
        federation: "f".into(),
        name: "n".into(),
        kind: ClientKind::Native,
        device: "d".into(),
        samples: 3,
        edge_bytes: 4,
        purpose: Purpose::Train,
        resume: None,
        offer: Offer { table: TableForm::Int4, modes: vec![BoundaryMode::LowRank], ..Offer::default() },
        download: Some("0".repeat(32)),
    });
    assert_eq!(decode::<ClientMessage>(&encode(&hello)).unwrap(), hello);
    let reply = WireReply {
        loss: 0.5,
        row_loss: vec![0.5],
        gradient: WireGradient::Codes {
            codes: Pair { image: None, text: Some(packed(&[2.0])) },
            up: Pair { image: None, text: None },
            up_squares: Pair { image: Some(packed(&[3.0])), text: None },
        },
    };
    assert_eq!(reply.bytes(), 8);
    let trained = ServerMessage::Trained { id: 9, reply };
    assert_eq!(decode::<ServerMessage>(&encode(&trained)).unwrap(), trained);
}

#[test]
fn faulty_frames_are_told_apart() {
    let good = encode(&train());
    let mut wrong_version = good.clone();
    wrong_version[2] = 9;
    assert_eq!(decode::<ClientMessage>(&wrong_version), Err(WireError::Version { theirs: 9 }));
    assert_eq!(decode::<ClientMessage>(b"GET / HTTP/1.1"), Err(WireError::NotAFrame(14)));
    assert_eq!(decode::<ClientMessage>(&[]), Err(WireError::NotAFrame(0)));
    assert!(matches!(decode::<ClientMessage>(&good[..good.len() - 1]), Err(WireError::Body(_))));
    let long = [good, vec![0]].concat();
    assert!(decode::<ClientMessage>(&long).unwrap_err().to_string().contains("1 bytes too many"));
}

#[test]
fn lists_that_would_take_more_memory_than_bytes_are_refused() {
    let body = |head: &[u8], count: usize, each: &[u8]| {
        let mut frame = encode(&ClientMessage::Leave);
        frame.truncate(4);
        frame.extend(head);
        frame.extend(postcard::to_stdvec(&count).unwrap());
        frame.extend(each.repeat(count));
        frame
    };
    // Pictures, rows of codes, lengths.
    for (head, each) in
        [(&[9, 1][..], &[0, 0, 0, 0][..]), (&[1, 7, 2, 1][..], &[0, 0][..]), (&[1, 7, 2, 0, 0, 0, 0][..], &[1][..])]
    {
        let refused = |count: usize| decode::<ClientMessage>(&body(head, count, each)).err();
        let (most, more) = (refused(MANY), refused(MANY + 1));
        let Some(WireError::Body(words)) = &more else { panic!("{head:?} was read") };
        // Without words of its own, postcard says which kind of fault it was.
        assert!(!words.is_empty());
        // As many as may be are not refused for their number: features end here, a request lacks the rest.
        assert_eq!(most.is_none(), head == [9, 1], "{head:?}");
        assert_ne!(most, more, "{head:?}");
    }
}

#[test]
fn a_frame_that_is_too_large_is_not_sent() {
    // Frame head, variant, id, round, input, format, deflated, byte length, one length, no targets, want, place.
    let head = 4 + 1 + 1 + 1 + (1 + 1 + 1 + 4) + (1 + 1) + 1 + 1 + (1 + 1 + 4);
    let batch = |values: usize| {
        let hidden = Packed { format: Format::F32, deflated: false, bytes: vec![0; values] };
        let request = WireRequest { lengths: vec![1], targets: Vec::new(), ..request(WireInput::Hidden(hidden)) };
        ClientMessage::Train { id: 7, round: 2, request }
    };
    let most = MAX_FRAME - head;
    let frame = encode_to_send(&batch(most)).unwrap();
    assert_eq!(frame.len(), MAX_FRAME);
    let error = encode_to_send(&batch(most + 1)).unwrap_err();
    let words = error.to_string();
    assert!(words.starts_with("this batch makes a frame of 100663297"), "{words}");
    assert!(words.contains("100663296 are allowed; use a smaller batch_size"), "{words}");
    assert_eq!(error.fault().code, FaultCode::TooLarge);
    assert!(check_outgoing(&frame).is_ok());
    let words = check_outgoing(&vec![0u8; MAX_FRAME + 1]).unwrap_err().to_string();
    assert!(words.contains("makes a frame of 100663297 bytes, 100663296 are allowed"), "{words}");
}

#[test]
fn no_garbage_makes_it_panic() {
    use rand::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    for good in [encode(&train()), encode(&short())] {
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(4..bytes.len());
                bytes[at] = rng.random();
            }
            bytes.truncate(rng.random_range(0..=bytes.len()));
            drop(decode::<ClientMessage>(&bytes));
            drop(decode::<ServerMessage>(&bytes));
        }
    }
}
