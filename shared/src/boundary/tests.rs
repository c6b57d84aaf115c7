use super::*;

fn positions() -> Positions {
    Positions { lengths: vec![3, 2, 4], images: vec![1..3, 0..0, 0..2] }
}

fn request(input: Input) -> BoundaryRequest {
    let target = |row, position, token| Target { row, position, token };
    let targets = vec![target(0, 1, 5), target(1, 1, 2), target(2, 0, 9), target(2, 3, 0)];
    BoundaryRequest { input, positions: positions(), targets, want: Want::Gradient }
}

fn hidden() -> BoundaryRequest {
    request(Input::Hidden(TensorBlob::zeros(&[9, 4])))
}

/// Four image positions, five others, rank 2.
fn codes() -> BoundaryRequest {
    let zeros = |shape: [usize; 2]| Some(TensorBlob::zeros(&shape));
    request(Input::Codes(CodesInput {
        x: Arc::new(TensorBlob::zeros(&[9, 4])),
        codes: Pair { image: zeros([4, 2]), text: zeros([5, 2]) },
        up: Arc::new(Pair { image: zeros([4, 2]), text: zeros([4, 2]) }),
    }))
}

fn fault(mut request: BoundaryRequest, change: impl FnOnce(&mut BoundaryRequest)) -> String {
    change(&mut request);
    request.check(4, 10, 4).unwrap_err().to_string()
}

fn blob(request: &mut BoundaryRequest) -> &mut TensorBlob {
    match &mut request.input {
        Input::Hidden(blob) => blob,
        Input::Codes(_) => panic!("codes"),
    }
}

fn short(request: &mut BoundaryRequest) -> &mut CodesInput {
    match &mut request.input {
        Input::Codes(input) => input,
        Input::Hidden(_) => panic!("whole"),
    }
}

#[test]
fn positions_are_found_again() {
    let p = positions();
    assert_eq!((p.rows(), p.total(), p.longest(), p.starts()), (3, 9, 4, vec![0, 3, 5]));
    assert_eq!(p.of(Part::Image), [1, 2, 5, 6]);
    assert_eq!(p.of(Part::Text), [0, 3, 4, 7, 8]);
    assert_eq!((p.counts(Part::Image), p.counts(Part::Text)), (vec![2, 0, 2], vec![1, 2, 2]));
    assert_eq!(p.cut(1..3), Positions { lengths: vec![2, 4], images: vec![0..0, 0..2] });
    assert_eq!(Positions::plain(vec![1, 2]), Positions { lengths: vec![1, 2], images: vec![0..0; 2] });
    assert_eq!(Positions::default().longest(), 0);
    // What a stranger may claim breaks nothing.
    let wild = Positions { lengths: vec![2, 3, u32::MAX], images: vec![5..9, Range { start: 2, end: 1 }] };
    assert_eq!(wild.counts(Part::Image), [0, 0, 0]);
    assert!(wild.total() >= u32::MAX as usize && wild.cut(2..9).rows() == 1);
    assert_eq!(wild.cut(0..2).of(Part::Text), [0, 1, 2, 3, 4]);
}

#[test]
fn sound_requests_pass() {
    for mut request in [hidden(), codes()] {
        request.check(4, 10, 4).unwrap();
        assert_eq!(request.target_counts(), [1, 1, 2]);
        // Without pictures the image adapter has nothing to do.
        request.positions = Positions::plain(vec![3, 2, 4]);
        if let Input::Codes(input) = &mut request.input {
            input.codes = Pair { image: Some(TensorBlob::zeros(&[0, 2])), text: Some(TensorBlob::zeros(&[9, 2])) };
        }
        request.check(4, 10, 4).unwrap();
    }
    // No adapter at all: the untouched model.
    let mut bare = codes();
    short(&mut bare).codes = Pair::default();
    short(&mut bare).up = Arc::default();
    bare.check(4, 10, 4).unwrap();
}

#[test]
fn each_fault_of_a_request_is_named() {
    assert!(fault(hidden(), |r| blob(r).data[7] = f32::NAN).contains("NaN at index 7"));
    assert!(fault(hidden(), |r| blob(r).data[0] = f32::INFINITY).contains("inf"));
    assert!(fault(hidden(), |r| blob(r).shape = vec![9, 2, 2]).contains("[9, 2, 2]"));
    assert!(fault(hidden(), |r| *blob(r) = TensorBlob::zeros(&[9, 5])).contains("[9, 5]"));
    assert!(fault(hidden(), |r| blob(r).data.truncate(35)).contains("35 values"));
    assert!(fault(hidden(), |r| r.positions.lengths[1] = 5).contains("shorten"));
    assert!(fault(hidden(), |r| r.positions.lengths[1] = 0).contains("row 1 is empty"));
    assert!(fault(hidden(), |r| r.positions = Positions::default()).contains("empty"));
    assert!(fault(hidden(), |r| r.positions.images.truncate(2)).contains("2 places"));
    assert!(fault(hidden(), |r| r.positions.images[0] = 1..4).contains("1 to 4 of 3"));
    assert!(fault(hidden(), |r| r.positions.images[0] = Range { start: 2, end: 1 }).contains("2 to 1"));
    assert!(fault(hidden(), |r| r.targets[1].row = 7).contains("row 7"));
    assert!(fault(hidden(), |r| r.targets[1].position = 2).contains("position 2"));
    assert!(fault(hidden(), |r| r.targets[0].token = 10).contains("token 10"));
    assert!(fault(hidden(), |r| r.targets.reverse()).contains("sorted"));
}

#[test]
fn each_fault_of_codes_is_named() {
    let up = |r: &mut BoundaryRequest, change: fn(&mut Pair<TensorBlob>)| change(Arc::make_mut(&mut short(r).up));
    let of = |pair: &mut Pair<TensorBlob>, shape: &[usize]| pair.text = Some(TensorBlob::zeros(shape));
    assert!(fault(codes(), |r| short(r).x = Arc::new(TensorBlob::zeros(&[9, 5]))).contains("features"));
    assert!(fault(codes(), |r| short(r).codes.image = None).contains("the text adapter with matrices of both"));
    assert!(fault(codes(), |r| of(&mut short(r).codes, &[4, 2])).contains("text codes"));
    assert!(fault(codes(), |r| of(&mut short(r).codes, &[5, 3])).contains("text codes"));
    assert!(fault(codes(), |r| r.positions.images[0] = 1..2).contains("image codes"));
    assert!(fault(codes(), |r| up(r, |up| up.text = Some(TensorBlob::zeros(&[4, 3])))).contains("text.up"));
    assert!(fault(codes(), |r| up(r, |up| up.image = Some(TensorBlob::zeros(&[8])))).contains("second axis"));
    let none = |r: &mut BoundaryRequest| {
        let empty = Pair { image: Some(TensorBlob::zeros(&[4, 0])), text: Some(TensorBlob::zeros(&[4, 0])) };
        short(r).up = Arc::new(empty);
    };
    assert!(fault(codes(), none).contains("rank"));
    let vast = |r: &mut BoundaryRequest| {
        let shape = [4, usize::MAX / 2];
        up(r, |up| up.image = Some(TensorBlob { shape: vec![4, usize::MAX / 2], data: Vec::new() }));
        assert_eq!(short(r).rank(), Some(shape[1]));
    };
    assert!(fault(codes(), vast).contains("overflows"));
    let not_finite = |r: &mut BoundaryRequest| {
        if let Some(codes) = &mut short(r).codes.image {
            codes.data[3] = f32::NAN;
        }
    };
    assert!(fault(codes(), not_finite).contains("'image codes' has the value NaN at index 3"));
}

#[test]
fn sums_begin_where_there_is_nothing() {
    let pair = |v: f32| Pair { image: None, text: Some(TensorBlob { shape: vec![1, 2], data: vec![v, -v] }) };
    let mut sum = Pair::default();
    sum.add_scaled(&pair(2.0), 0.5);
    sum.add_scaled(&pair(3.0), 1.0);
    assert_eq!(sum, pair(4.0));
    sum.add_scaled(&Pair { image: None, text: Some(TensorBlob::zeros(&[3, 1])) }, 1.0);
    assert_eq!(sum, pair(4.0));
}

#[test]
fn a_place_is_one_in_a_group() {
    Place::ALONE.check().unwrap();
    let fault = |index, of, share| Place { index, of, share }.check().unwrap_err().to_string();
    assert!(fault(2, 2, 0.5).contains("request 2 of a group of 2"));
    assert!(fault(0, 0, 0.5).contains("group of 0"));
    assert!(fault(0, 1, f32::NAN).contains("NaN"));
    assert!(fault(0, 1, 1.5).contains("1.5"));
}
