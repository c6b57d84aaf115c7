use super::super::numbers::Coder;
use super::*;
use crate::boundary::{Target, Want};
use crate::edge::PictureFeatures;
use crate::settings::Rounding;

const DIM: usize = 6;
const RANK: usize = 2;
const IMAGE: usize = 2;
const SHAPES: Shapes = Shapes { dim: DIM, image_positions: IMAGE };

fn values(rows: usize, width: usize, factor: usize) -> TensorBlob {
    let value = |i: usize| ((i * factor + 13) % 101) as f32 * 0.013 - 0.5;
    TensorBlob { shape: vec![rows, width], data: (0..rows * width).map(value).collect() }
}

/// The row of a token, which is as long as it has to be.
fn token(id: u32, out: &mut [f32]) -> Result<(), String> {
    if id > 100 {
        return Err(format!("no token {id}"));
    }
    out.iter_mut().enumerate().for_each(|(i, v)| *v = id as f32 + i as f32 * 0.5);
    Ok(())
}

fn low_rank(format: Format) -> Agreement {
    let formats =
        Agreement { features: format, codes: format, gradients: format, matrices: format, ..Agreement::PLAIN };
    Agreement { mode: BoundaryMode::LowRank, ..formats }
}

fn picture(format: Format, number: usize) -> Arc<PictureFeatures> {
    let blob = values(IMAGE, DIM, 31 + number);
    let packed = Coder { format, ..Coder::EXACT }.pack("features", &blob.data, DIM).unwrap();
    Arc::new(PictureFeatures::new(packed, DIM))
}

/// Three rows, as a client puts them together: picture at the front, none, the same in the middle with another.
struct Sample {
    request: BoundaryRequest,
    rows: Vec<BatchRow>,
    pictures: BTreeMap<PictureKey, Arc<Packed>>,
}

fn sample(format: Format) -> Sample {
    let [one, two] = [1, 2].map(|number| picture(format, number));
    let row =
        |ids: &[u32], picture: Option<&Arc<PictureFeatures>>| BatchRow { ids: ids.to_vec(), picture: picture.cloned() };
    let rows = vec![row(&[9, 9, 1], Some(&one)), row(&[2, 3], None), row(&[4, 9, 9, 5, 6], Some(&two))];
    let positions = Positions { lengths: vec![3, 2, 5], images: vec![0..2, 0..0, 1..3] };
    let mut x = TensorBlob::zeros(&[10, DIM]);
    for (at, id) in [(2, 1), (3, 2), (4, 3), (5, 4), (8, 5), (9, 6)] {
        token(id, &mut x.data[at * DIM..(at + 1) * DIM]).unwrap();
    }
    one.values(DIM, &mut x.data[..IMAGE * DIM]).unwrap();
    two.values(DIM, &mut x.data[6 * DIM..8 * DIM]).unwrap();
    let input = Input::Codes(CodesInput {
        x: Arc::new(x),
        codes: Pair { image: Some(values(4, RANK, 41)), text: Some(values(6, RANK, 43)) },
        up: Arc::new(Pair { image: Some(values(DIM, RANK, 47)), text: Some(values(DIM, RANK, 53)) }),
    });
    let targets = vec![Target { row: 0, position: 1, token: 5 }, Target { row: 2, position: 4, token: 7 }];
    let pictures = [one, two].map(|p| (p.key, Arc::new(p.packed.clone()))).into();
    Sample { request: BoundaryRequest { input, positions, targets, want: Want::Both }, rows, pictures }
}

fn hidden() -> BoundaryRequest {
    let sample = sample(Format::F32);
    let positions = Positions::plain(sample.request.positions.lengths.clone());
    BoundaryRequest { input: Input::Hidden(values(10, DIM, 37)), positions, ..sample.request }
}

fn pack(request: &BoundaryRequest, rows: &[BatchRow], agreement: &Agreement) -> WireRequest {
    WireRequest::pack(request, rows, Place::ALONE, false, agreement, 3).unwrap()
}

/// As a server does with the first request of a connection.
fn unpacked(
    wire: WireRequest,
    agreement: &Agreement,
    pictures: &BTreeMap<PictureKey, Arc<Packed>>,
) -> Result<BoundaryRequest, Fault> {
    let up = wire.matrices(agreement, SHAPES)?.map(Arc::new);
    wire.unpack(agreement, SHAPES, &Sources { up, pictures, token: &token })
}

/// The largest difference of two matrices, over the largest value of the row or, for f16, of all.
fn error(got: &TensorBlob, want: &TensorBlob) -> f32 {
    assert_eq!(got.shape, want.shape);
    let largest = |values: &[f32]| values.iter().fold(1e-9f32, |m, v| m.max(v.abs()));
    let rows = got.data.chunks(want.shape[1]).zip(want.data.chunks(want.shape[1]));
    let of = |(g, w): (&[f32], &[f32])| largest(&g.iter().zip(w).map(|(g, w)| g - w).collect::<Vec<_>>()) / largest(w);
    rows.map(of).fold(0.0, f32::max)
}

const LIMITS: [(Format, f32); 3] = [(Format::F32, 0.0), (Format::F16, 0.01), (Format::Int8, 0.01)];

fn close(got: &TensorBlob, want: &TensorBlob, limit: f32) {
    let error = error(got, want);
    // Nothing is 1e-9 at least.
    assert!(error <= limit.max(1e-6), "{error} is more than {limit}");
}

fn pairs_close(got: &Pair<TensorBlob>, want: &Pair<TensorBlob>, limit: f32) {
    assert_eq!(got.parts(), want.parts());
    got.iter().zip(want.iter()).for_each(|((_, got), (_, want))| close(got, want, limit));
}

#[test]
fn codes_come_back_in_every_format() {
    for (format, limit) in LIMITS {
        for deflate in [false, true] {
            for rounding in Rounding::ALL {
                let agreement = Agreement { deflate, rounding, ..low_rank(format) };
                let Sample { request, rows, pictures } = sample(format);
                let wire = pack(&request, &rows, &agreement);
                assert_eq!(wire.pictures(), pictures.keys().copied().collect::<BTreeSet<_>>());
                let back = unpacked(wire, &agreement, &pictures).unwrap();
                back.check(DIM, 10, 5).unwrap();
                let (Input::Codes(got), Input::Codes(want)) = (&back.input, &request.input) else { panic!("whole") };
                // Features are the very ones that the client has, whatever the format.
                assert_eq!(got.x, want.x);
                pairs_close(&got.codes, &want.codes, 2.0 * limit);
                pairs_close(&got.up, &want.up, 2.0 * limit);
                assert_eq!(
                    (back.positions, back.targets, back.want),
                    (request.positions, request.targets, request.want)
                );
            }
        }
    }
}

#[test]
fn activations_come_back_in_every_format() {
    for (format, limit) in LIMITS {
        let agreement = Agreement { codes: format, ..Agreement::PLAIN };
        let request = hidden();
        let wire = pack(&request, &[], &agreement);
        assert!(wire.pictures().is_empty());
        let back = unpacked(wire, &agreement, &BTreeMap::new()).unwrap();
        back.check(DIM, 10, 5).unwrap();
        let (Input::Hidden(got), Input::Hidden(want)) = (&back.input, &request.input) else { panic!("in short") };
        close(got, want, limit);
        assert_eq!(back.positions, request.positions);
    }
}

#[test]
fn a_row_is_sent_without_its_placeholders() {
    let Sample { request, rows, .. } = sample(Format::F32);
    let WireInput::Codes { rows, rank, .. } = pack(&request, &rows, &low_rank(Format::F32)).input else {
        panic!("whole")
    };
    assert_eq!(rows.iter().map(|r| &r.ids[..]).collect::<Vec<_>>(), [&[1][..], &[2, 3], &[4, 5, 6]]);
    assert_eq!(rows.iter().map(|r| Some(r.picture?.1)).collect::<Vec<_>>(), [Some(0), None, Some(1)]);
    assert_eq!(rank, 2);
}

#[test]
fn a_picture_that_cannot_be_named_is_not_sent_as_text() {
    let Sample { request, mut rows, .. } = sample(Format::F32);
    rows[2].picture = None;
    let agreement = low_rank(Format::F32);
    let error = WireRequest::pack(&request, &rows, Place::ALONE, false, &agreement, 3).unwrap_err();
    assert!(error.to_string().contains("made for decoding"), "{error}");
}

#[test]
fn matrices_are_those_last_sent() {
    let agreement = low_rank(Format::F32);
    let Sample { request, rows, pictures } = sample(Format::F32);
    let same = || WireRequest::pack(&request, &rows, Place::ALONE, true, &agreement, 3).unwrap();
    assert_eq!(same().matrices(&agreement, SHAPES), Ok(None));
    let with = |up: Option<Arc<Pair<TensorBlob>>>| {
        same().unpack(&agreement, SHAPES, &Sources { up, pictures: &pictures, token: &token })
    };
    let Input::Codes(input) = &request.input else { panic!("whole") };
    assert_eq!(with(Some(input.up.clone())), Ok(request.clone()));
    let fault = with(None).unwrap_err();
    assert_eq!(fault.code, FaultCode::OutOfOrder);
    assert!(fault.cause.contains("never sent"), "{fault}");
    // What there are no codes of is left away; what lacks is found by the check.
    let mut text = request.clone();
    if let Input::Codes(input) = &mut text.input {
        input.codes.image = None;
    }
    let wire = WireRequest::pack(&text, &rows, Place::ALONE, true, &agreement, 3).unwrap();
    let sources = Sources { up: Some(input.up.clone()), pictures: &pictures, token: &token };
    let back = wire.unpack(&agreement, SHAPES, &sources).unwrap();
    back.check(DIM, 10, 5).unwrap();
    let less = Pair { image: None, text: input.up.text.clone() };
    assert!(with(Some(Arc::new(less))).unwrap().check(DIM, 10, 5).is_err());
}

#[test]
fn without_adapters_or_positions_there_is_nothing_to_pack() {
    let agreement = low_rank(Format::F16);
    // The untouched model.
    let Sample { mut request, rows, pictures } = sample(Format::F16);
    let Input::Codes(input) = &mut request.input else { panic!("whole") };
    (input.codes, input.up) = (Pair { image: None, text: None }, Arc::new(Pair { image: None, text: None }));
    let wire = pack(&request, &rows, &agreement);
    assert_eq!(unpacked(wire, &agreement, &pictures), Ok(request));
    // Text alone: codes of the image adapter have no rows.
    let Sample { request, rows, pictures } = sample(Format::F16);
    let Input::Codes(mut input) = request.input else { panic!("whole") };
    input.x = Arc::new(TensorBlob { shape: vec![2, DIM], data: input.x.data[3 * DIM..5 * DIM].to_vec() });
    input.codes = Pair { image: Some(TensorBlob::zeros(&[0, RANK])), text: Some(values(2, RANK, 7)) };
    let positions = Positions::plain(vec![2]);
    let request = BoundaryRequest { input: Input::Codes(input), positions, targets: Vec::new(), want: Want::Gradient };
    let back = unpacked(pack(&request, &rows[1..2], &agreement), &agreement, &pictures).unwrap();
    back.check(DIM, 10, 5).unwrap();
    let Input::Codes(input) = &back.input else { panic!("whole") };
    assert_eq!(input.codes.image.as_ref().map(|c| &c.shape[..]), Some(&[0, RANK][..]));
}

/// Of rows, rank, codes and lengths.
type Change = fn(&mut Vec<WireRow>, &mut u32, &mut Pair<Packed>, &mut Vec<u32>);

#[test]
fn each_fault_of_a_request_is_named() {
    let agreement = low_rank(Format::F32);
    let fault = |change: Change| {
        let Sample { request, rows, pictures } = sample(Format::F32);
        let mut wire = pack(&request, &rows, &agreement);
        if let WireInput::Codes { rows, rank, codes, .. } = &mut wire.input {
            change(rows, rank, codes, &mut wire.lengths);
        }
        let fault = unpacked(wire, &agreement, &pictures).unwrap_err();
        assert!(!fault.remedy.is_empty());
        fault.cause
    };
    assert!(fault(|rows, _, _, _| drop(rows.pop())).contains("2 rows with 3 lengths"));
    assert!(fault(|rows, _, _, _| rows[1].ids.push(1)).contains("row 1 has 3 token ids for 2 positions"));
    assert!(fault(|rows, _, _, _| rows[0].ids.clear()).contains("row 0 has 0 token ids"));
    assert!(fault(|rows, _, _, _| rows[2].ids[0] = 101).contains("no token 101"));
    assert!(fault(|rows, _, _, _| rows[0].picture = Some((PictureKey(1), 0))).contains("not here"));
    for start in [2, u32::MAX] {
        let change: Change = match start {
            2 => |rows, _, _, _| rows[0].picture = rows[0].picture.map(|(key, _)| (key, 2)),
            _ => |rows, _, _, _| rows[0].picture = rows[0].picture.map(|(key, _)| (key, u32::MAX)),
        };
        assert!(fault(change).contains("the picture of row 0 does not fit into 3 positions"));
    }
    assert!(fault(|_, _, _, lengths| lengths[1] = 3).contains("row 1 has 2 token ids for 3"));
    assert!(fault(|_, _, _, lengths| lengths[1] = u32::MAX).contains("more than 134217728 values"));
    assert!(fault(|_, rank, _, _| *rank = 3).contains("image.up"));
    assert!(fault(|_, rank, _, _| *rank = u32::MAX).contains("has more than"));
    assert!(fault(|_, rank, _, _| *rank = 3_000_000).contains("a matrix of 6 x 3000000"));
    assert!(fault(|_, _, codes, _| std::mem::swap(&mut codes.image, &mut codes.text)).contains("image codes"));
    assert!(
        fault(|_, _, codes, _| {
            codes.text = codes.text.take().map(|packed| Packed { format: Format::F16, ..packed });
        })
        .contains("'text codes' comes in f16, agreed was f32")
    );
    assert!(
        fault(|_, _, codes, _| {
            codes.text = codes.text.take().map(|packed| Packed { deflated: true, ..packed });
        })
        .contains("deflated, which was not agreed")
    );
    assert!(
        fault(|_, _, codes, _| {
            codes.text = codes.text.take().map(|mut packed| {
                packed.bytes.pop();
                packed
            });
        })
        .contains("47 bytes")
    );
}

#[test]
fn the_other_mode_is_refused() {
    let (plain, short) = (Agreement::PLAIN, low_rank(Format::F32));
    let fault = unpacked(pack(&hidden(), &[], &plain), &short, &BTreeMap::new()).unwrap_err();
    assert!(fault.cause.contains("in the mode 'activations', agreed was 'low-rank'"), "{fault}");
    let Sample { request, rows, pictures } = sample(Format::F32);
    let fault = unpacked(pack(&request, &rows, &short), &plain, &pictures).unwrap_err();
    assert!(fault.cause.contains("in the mode 'low-rank', agreed was 'activations'"), "{fault}");
}

#[test]
fn features_are_measured_before_they_are_kept() {
    let agreement = low_rank(Format::F16);
    let sound = picture(Format::F16, 1).packed.clone();
    check_features(&sound, &agreement, SHAPES).unwrap();
    let cause = |packed: &Packed| check_features(packed, &agreement, SHAPES).unwrap_err().cause;
    assert!(cause(&picture(Format::F32, 1).packed).contains("comes in f32, agreed was f16"));
    assert!(cause(&Packed { deflated: true, ..sound.clone() }).contains("not agreed"));
    let plain = sound.bytes.len();
    assert_eq!(plain, 1 + 2 * IMAGE * DIM);
    // Neither more nor less: what is too small would be kept, and fail each request that names it.
    for bytes in [0, plain - 1, plain + 1, IMAGE * DIM * 4] {
        let words = cause(&Packed { bytes: vec![0; bytes], ..sound.clone() });
        assert!(words.contains(&format!("have {bytes} bytes; 2 x 6 values in f16 have 25")), "{words}");
    }
    for format in Format::ALL {
        check_features(&picture(format, 2).packed, &low_rank(format), SHAPES).unwrap();
    }
}

#[test]
fn deflated_features_are_measured_too() {
    let shapes = Shapes { dim: 64, image_positions: 64 };
    for format in Format::ALL {
        let agreement = Agreement { deflate: true, ..low_rank(format) };
        let check = |bytes: usize| {
            check_features(&Packed { format, deflated: true, bytes: vec![0; bytes] }, &agreement, shapes)
        };
        let plain = format.bytes(64, 64) as usize;
        for bytes in [plain - 1, plain / 2, plain / 1032] {
            assert_eq!(check(bytes), Ok(()), "{format}, {bytes}");
        }
        for bytes in [0, plain / 1032 - 1, plain, plain + 1] {
            assert!(check(bytes).unwrap_err().cause.contains("deflated"), "{format}, {bytes}");
        }
        // What shrinks as far as anything does is taken.
        let zeros = Coder { format, deflate: true, ..Coder::EXACT }.pack("features", &[0.0; 64 * 64], 64).unwrap();
        assert!(zeros.deflated);
        check_features(&zeros, &agreement, shapes).unwrap();
    }
}

#[test]
fn embeddings_of_a_text_come_back() {
    let blob = values(4, DIM, 17);
    let packed = pack_hidden(&blob, &Agreement::PLAIN, 1).unwrap();
    let back = unpack_hidden(&packed, 4, &Agreement::PLAIN, DIM).unwrap();
    assert_eq!((back.shape, back.data), (vec![1, 4, DIM], blob.data));
    for wrong in [0, 3, 5, u32::MAX] {
        assert!(unpack_hidden(&packed, wrong, &Agreement::PLAIN, DIM).is_err());
    }
    // Known before anything is unpacked, or room taken for it.
    assert_eq!(measure_hidden(4, DIM), Ok(4 * DIM));
    let fault = measure_hidden(u32::MAX, DIM).unwrap_err();
    assert!(fault.cause.contains("4294967295 new positions") && !fault.remedy.is_empty(), "{fault}");
}

#[test]
fn answers_are_never_computed_from_eight_bits() {
    let blob = values(4, DIM, 17);
    for (format, expected, limit) in
        [(Format::F32, Format::F32, 0.0), (Format::F16, Format::F16, 1e-3), (Format::Int8, Format::F16, 1e-3)]
    {
        for agreement in [low_rank(format), Agreement { codes: format, ..Agreement::PLAIN }] {
            let packed = pack_hidden(&blob, &agreement, 1).unwrap();
            assert_eq!(packed.format, expected);
            let back = unpack_hidden(&packed, 4, &agreement, DIM).unwrap();
            close(&TensorBlob { shape: blob.shape.clone(), data: back.data }, &blob, limit);
            // Nor are they taken so from a client that has them in 8 bits.
            let coarse = Coder { format: Format::Int8, ..Coder::EXACT }.pack("embeddings", &blob.data, DIM).unwrap();
            let fault = unpack_hidden(&coarse, 4, &agreement, DIM).unwrap_err();
            assert!(fault.cause.contains(&format!("comes in int8, agreed was {expected}")), "{fault}");
        }
    }
}

#[test]
fn matrices_count_with_what_comes_of_them() {
    let Sample { request, rows, .. } = sample(Format::F32);
    let wire = pack(&request, &rows, &low_rank(Format::F32));
    assert_eq!(wire.measure(SHAPES), Ok(10 * DIM + 10 * RANK + 6 * DIM * RANK));
}

#[test]
fn lists_are_no_longer_than_positions() {
    let wire = || pack(&hidden(), &[], &Agreement::PLAIN);
    assert_eq!(wire().measure(SHAPES), Ok(10 * DIM));
    let cause = |change: fn(&mut WireRequest)| {
        let mut wire = wire();
        change(&mut wire);
        wire.measure(SHAPES).unwrap_err().cause
    };
    assert!(cause(|wire| wire.lengths.push(0)).contains("row 3 is empty"));
    let more = |wire: &mut WireRequest| wire.targets = vec![Target { row: 0, position: 0, token: 0 }; 11];
    assert!(cause(more).contains("11 targets in 10 positions"));
}

// ---------------------------------------------------------------------------------------------- replies

fn reply(want: Want) -> BoundaryReply {
    let pair = |rows: [usize; 2], factor: usize| Pair {
        image: Some(values(rows[0], RANK, factor)),
        text: Some(values(rows[1], RANK, factor + 2)),
    };
    let none = || Pair { image: None, text: None };
    let squares =
        || pair([DIM; 2], 61).map(|_, blob| TensorBlob { data: blob.data.iter().map(|v| v * v).collect(), ..blob });
    let gradient = CodesGradient {
        codes: pair([4, 6], 59),
        up: if want.gradient() { pair([DIM; 2], 67) } else { none() },
        up_squares: if want.squares() { squares() } else { none() },
    };
    BoundaryReply { loss: 0.7, row_loss: vec![0.1, 0.2, 0.3], gradient: Gradient::Codes(gradient) }
}

#[test]
fn replies_come_back_in_every_format() {
    for (format, limit) in LIMITS {
        for want in [Want::Gradient, Want::Both, Want::Squares] {
            for rounding in Rounding::ALL {
                let agreement = Agreement { rounding, deflate: true, ..low_rank(format) };
                let (reply, sent) = (reply(want), SentShape::of(&sample(format).request));
                let wire = WireReply::pack(&reply, &agreement, 5).unwrap();
                assert!(wire.bytes() > 0);
                let back = wire.unpack(&sent, &agreement).unwrap();
                let (Gradient::Codes(got), Gradient::Codes(want)) = (&back.gradient, &reply.gradient) else {
                    panic!("whole")
                };
                pairs_close(&got.codes, &want.codes, 2.0 * limit);
                pairs_close(&got.up, &want.up, 2.0 * limit);
                pairs_close(&got.up_squares, &want.up_squares, 2.0 * limit);
                assert_eq!((back.loss, &back.row_loss), (reply.loss, &reply.row_loss));
            }
        }
        let agreement = Agreement { gradients: format, ..Agreement::PLAIN };
        let whole = BoundaryReply { gradient: Gradient::Hidden(values(10, DIM, 71)), ..reply(Want::Both) };
        let wire = WireReply::pack(&whole, &agreement, 5).unwrap();
        let back = wire.unpack(&SentShape::of(&hidden()), &agreement).unwrap();
        let (Gradient::Hidden(got), Gradient::Hidden(want)) = (&back.gradient, &whole.gradient) else {
            panic!("in short")
        };
        close(got, want, limit);
    }
}

#[test]
fn squares_are_never_in_eight_bits() {
    for (matrices, squares) in [(Format::F32, Format::F32), (Format::F16, Format::F16), (Format::Int8, Format::F16)] {
        let wire = WireReply::pack(&reply(Want::Both), &low_rank(matrices), 5).unwrap();
        let WireGradient::Codes { up, up_squares, .. } = wire.gradient else { panic!("whole") };
        assert!(up.iter().all(|(_, p)| p.format == matrices) && up_squares.iter().all(|(_, p)| p.format == squares));
    }
}

#[test]
fn a_reply_must_fit_its_request() {
    let agreement = low_rank(Format::F32);
    let sent = SentShape::of(&sample(Format::F32).request);
    assert_eq!((sent.rows, sent.total, sent.dim, sent.rank), (3, 10, DIM, RANK));
    assert_eq!(sent.codes, Some(Pair { image: Some(4), text: Some(6) }));
    let wire = || WireReply::pack(&reply(Want::Both), &agreement, 5).unwrap();
    let cause = |sent: &SentShape| wire().unpack(sent, &agreement).unwrap_err();
    assert!(cause(&SentShape { rows: 2, ..sent.clone() }).contains("3 rows instead of 2"));
    assert!(cause(&SentShape { codes: None, ..sent.clone() }).contains("another mode"));
    let fewer = Some(Pair { image: None, text: Some(6) });
    assert!(cause(&SentShape { codes: fewer, ..sent.clone() }).contains("other codes"));
    let longer = Some(Pair { image: Some(5), text: Some(6) });
    assert!(cause(&SentShape { codes: longer, ..sent.clone() }).contains("image codes"));
    assert!(cause(&SentShape { dim: 7, ..sent.clone() }).contains("gradient of image.up"));
    let other = Agreement { gradients: Format::F16, ..agreement };
    assert!(wire().unpack(&sent, &other).unwrap_err().contains("agreed was f16"));
    // Matrices of an adapter that was not asked about.
    let mut less = reply(Want::Both);
    if let Gradient::Codes(gradient) = &mut less.gradient {
        gradient.codes.image = None;
    }
    let wire = WireReply::pack(&less, &agreement, 5).unwrap();
    let text = SentShape { codes: Some(Pair { image: None, text: Some(6) }), ..sent };
    assert!(wire.unpack(&text, &agreement).unwrap_err().contains("there is no adapter"));
}

#[test]
fn what_is_not_finite_is_not_sent() {
    let mut request = hidden();
    if let Input::Hidden(blob) = &mut request.input {
        blob.data[7] = f32::NAN;
    }
    let error = WireRequest::pack(&request, &[], Place::ALONE, false, &Agreement::PLAIN, 3).unwrap_err();
    assert!(error.to_string().contains("'activations' has the value NaN at index 7"), "{error}");
    assert!(Coder::EXACT.pack("x", &[f32::INFINITY], 1).is_err());
}
