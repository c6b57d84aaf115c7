use super::*;
use crate::plain::{Target, TensorBlob};

fn train() -> ClientMessage {
    ClientMessage::Train {
        id: 7,
        round: 2,
        request: BoundaryRequest {
            hidden: TensorBlob { shape: vec![1, 2, 1], data: vec![1.0, -0.5] },
            lengths: vec![2],
            targets: vec![Target { row: 0, position: 1, token: 300 }],
        },
    }
}

#[test]
fn golden_bytes() {
    let expected = [
        b'F', b'N', 4, 0, // frame, version
        1, 7, 2, // Train, id, round
        3, 1, 2, 1, 8, 0, 0, 0x80, 0x3f, 0, 0, 0, 0xbf, // shape, byte length, values
        1, 2, // lengths
        1, 0, 1, 0xac, 2, // targets
    ];
    assert_eq!(encode(&train()), expected);
    assert_eq!(decode::<ClientMessage>(&expected).unwrap(), train());
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
    let mut expected = vec![b'F', b'N', 4, 0, 4, 2, 1, 9]; // frame, version, Update, round, tensors, length of a name
    expected.extend(b"text.down");
    expected.extend([2, 1, 1, 4, 0, 0, 0x80, 0x3f]); // shape, byte length, value
    expected.extend([0, 5, 0, 0, 0x80, 0x3f, 1]); // no Fisher, samples, loss, a judgement
    expected.extend([0, 0, 0, 0, 0, 0, 0xe0, 0x3f, 0, 0, 0, 0, 0, 0, 0, 0x40, 3]); // accuracy, loss, samples
    expected.extend([0, 0, 0, 0, 0, 0, 0xf0, 0x3f, 0, 0, 0, 0, 0, 0, 0, 0x40, 3]);
    assert_eq!(encode(&update), expected);
    assert_eq!(decode::<ClientMessage>(&expected).unwrap(), update);
    let wait = ServerMessage::Wait { round: 3, rounds_until: None };
    assert_eq!(encode(&wait), [b'F', b'N', 4, 0, 12, 3, 0]);
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
fn a_frame_that_is_too_large_is_not_sent() {
    // Frame head, variant, id, round, shape, byte length, one length, no targets.
    let head = 4 + 1 + 1 + 1 + (1 + 1 + 1 + 4) + 4 + (1 + 1) + 1;
    let batch = |values: usize| ClientMessage::Train {
        id: 7,
        round: 2,
        request: BoundaryRequest { hidden: TensorBlob::zeros(&[1, 1, values]), lengths: vec![1], targets: Vec::new() },
    };
    let most = (MAX_FRAME - head) / 4;
    let frame = encode_to_send(&batch(most)).unwrap();
    assert!(frame.len() <= MAX_FRAME && frame.len() + 4 > MAX_FRAME, "{}", frame.len());
    let error = encode_to_send(&batch(most + 1)).unwrap_err();
    let words = error.to_string();
    assert!(words.starts_with("this batch makes a frame of 10066"), "{words}");
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
    let good = encode(&train());
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
