//! On a tiny random model: packed rows equal rows alone, and requests in short equal whole ones.

use super::*;
use crate::boundary::{Part, Positions, Target, Want};
use crate::config::{ModelConfig, TextConfig};
use crate::model::adapter::standard_normal;
use burn::module::{Module, ModuleMapper, Param};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::future::Future;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

const DIM: usize = 16;
const RANK: usize = 3;
const VOCAB: u32 = 20;

/// The same numbers in another order of summation.
const NOISE: f32 = 2e-5;

/// Two layers, two heads that share keys and values.
fn config() -> TextConfig {
    let json = r#"{"model_type":"llava","image_token_index":7,
        "vision_config":{"hidden_size":24,"intermediate_size":40,"num_hidden_layers":3,"num_attention_heads":2,
        "image_size":8,"patch_size":4},
        "text_config":{"hidden_size":16,"intermediate_size":24,"num_hidden_layers":2,"num_attention_heads":2,
        "num_key_value_heads":1,"vocab_size":20}}"#;
    ModelConfig::from_json(json).unwrap().text
}

/// Weights of a seed, in a type; norms stay 1.
/// Random matrices, and norms with this weight.
struct Seeded(ChaCha8Rng, DType, f32);

impl ModuleMapper for Seeded {
    fn map_float<const N: usize>(&mut self, param: Param<Tensor<N>>) -> Param<Tensor<N>> {
        let shape = param.lazy_shape().to_vec();
        let deviation = (shape[0] as f32).powf(-0.5);
        let mut value = || if N == 1 { self.2 } else { deviation * standard_normal(&mut self.0) };
        let data: Vec<f32> = (0..shape.iter().product()).map(|_: usize| value()).collect();
        let device = param.lazy_device();
        let values = Tensor::from_data(TensorData::new(data, shape), (&device, self.1));
        Param::from_tensor(values).set_require_grad(false)
    }
}

fn llama(dtype: DType, norm: f32) -> Llama {
    let device = Device::flex().autodiff();
    Llama::init(&config(), &device).map(&mut Seeded(ChaCha8Rng::seed_from_u64(3), dtype, norm))
}

fn llm_with(dtype: DType, norm: f32) -> FrozenLlm {
    FrozenLlm::new(llama(dtype, norm), &config(), &Device::flex().autodiff())
}

fn llm() -> FrozenLlm {
    llm_with(DType::F32, 1.0)
}

/// On the CPU nothing is ever awaited for long.
fn now<F: Future>(future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
    }
}

fn train(llm: &FrozenLlm, request: &BoundaryRequest) -> BoundaryReply {
    llm.check(request).unwrap();
    now(llm.train(&[request])).unwrap().remove(0)
}

fn random(shape: &[usize], seed: u64) -> TensorBlob {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let data = (0..shape.iter().product()).map(|_: usize| 0.3 * standard_normal(&mut rng)).collect();
    TensorBlob { shape: shape.to_vec(), data }
}

/// Four rows of three lengths, the second without a picture.
fn positions() -> Positions {
    Positions { lengths: vec![5, 3, 7, 5], images: vec![1..4, 0..0, 0..2, 2..4] }
}

/// Different numbers of them, so that a row's share is not 1 / rows.
fn targets() -> Vec<Target> {
    let places = [(0, 3), (0, 4), (1, 2), (2, 1), (2, 2), (2, 6), (3, 4)];
    places
        .iter()
        .enumerate()
        .map(|(i, &(row, position))| Target { row, position, token: (7 * i as u32) % VOCAB })
        .collect()
}

fn hidden(seed: u64) -> BoundaryRequest {
    let input = Input::Hidden(random(&[20, DIM], seed));
    BoundaryRequest { input, positions: positions(), targets: targets(), want: Want::Gradient }
}

fn codes(seed: u64, want: Want) -> BoundaryRequest {
    let positions = positions();
    let blob = |rows: usize, seed| Some(random(&[rows, RANK], seed));
    let count = |part| positions.of(part).len();
    let input = Input::Codes(CodesInput {
        x: Arc::new(random(&[20, DIM], seed)),
        codes: Pair { image: blob(count(Part::Image), seed + 1), text: blob(count(Part::Text), seed + 2) },
        up: Arc::new(Pair { image: blob(DIM, seed + 3), text: blob(DIM, seed + 4) }),
    });
    BoundaryRequest { input, positions, targets: targets(), want }
}

fn short(request: &BoundaryRequest) -> &CodesInput {
    match &request.input {
        Input::Codes(input) => input,
        Input::Hidden(_) => panic!("the request is whole"),
    }
}

/// `h = x + up z`, one value after the other.
fn by_hand(request: &BoundaryRequest) -> BoundaryRequest {
    let input = short(request);
    let mut h = (*input.x).clone();
    for (part, z) in input.codes.iter() {
        let up = input.up.get(part).unwrap();
        for (row, at) in request.positions.of(part).into_iter().enumerate() {
            for d in 0..DIM {
                let branch = (0..RANK).map(|r| up.data[d * RANK + r] * z.data[row * RANK + r]);
                h.data[at * DIM + d] += branch.sum::<f32>();
            }
        }
    }
    BoundaryRequest { input: Input::Hidden(h), want: Want::Gradient, ..request.clone() }
}

fn whole_gradient(reply: &BoundaryReply) -> &TensorBlob {
    match &reply.gradient {
        Gradient::Hidden(g) => g,
        Gradient::Codes(_) => panic!("the gradient is short"),
    }
}

fn short_gradient(reply: &BoundaryReply) -> &CodesGradient {
    match &reply.gradient {
        Gradient::Codes(g) => g,
        Gradient::Hidden(_) => panic!("the gradient is whole"),
    }
}

/// Relative to the largest value there is.
fn close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-6f32, |most, v| most.max(v.abs()));
    for (at, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * largest, "{what} at {at}: {a}, expected {b} (largest {largest})");
    }
}

/// Rows of a request, as requests.
fn alone(request: &BoundaryRequest) -> Vec<BoundaryRequest> {
    let Input::Hidden(h) = &request.input else { panic!("the request is short") };
    let places = request.positions.starts().into_iter().zip(&request.positions.lengths).enumerate();
    let one = |(row, (start, length)): (usize, (usize, &u32))| {
        let data = h.data[start * DIM..(start + *length as usize) * DIM].to_vec();
        let own = request.targets.iter().filter(|t| t.row as usize == row);
        BoundaryRequest {
            input: Input::Hidden(TensorBlob { shape: vec![*length as usize, DIM], data }),
            positions: request.positions.cut(row..row + 1),
            targets: own.map(|t| Target { row: 0, ..*t }).collect(),
            want: request.want,
        }
    };
    places.map(one).collect()
}

/// Values of each row of a packed blob.
fn of_rows(blob: &TensorBlob, lengths: &[u32]) -> Vec<Vec<f32>> {
    let mut rest = blob.data.as_slice();
    let row = |length: &u32| {
        let (own, others) = rest.split_at(*length as usize * DIM);
        rest = others;
        own.to_vec()
    };
    lengths.iter().map(row).collect()
}

#[test]
fn packed_rows_equal_each_row_alone() {
    let llm = llm();
    let mut equal = hidden(1);
    equal.positions = Positions::plain(vec![5; 4]);
    equal.targets = (0..4).map(|row| Target { row, position: 4 - row, token: row }).collect();
    for request in [hidden(1), equal] {
        let together = train(&llm, &request);
        let evaluated = now(llm.evaluate(&request)).unwrap();
        let (mut nll, mut predicted) = (Vec::new(), Vec::new());
        let rows = of_rows(whole_gradient(&together), &request.positions.lengths);
        for (row, (one, g)) in alone(&request).iter().zip(rows).enumerate() {
            let reply = train(&llm, one);
            close("loss", &[together.row_loss[row]], &[reply.loss], NOISE);
            // The whole loss is a mean over all targets: a row weighs as its share of them.
            let share = one.targets.len() as f32 / request.targets.len() as f32;
            let own: Vec<f32> = whole_gradient(&reply).data.iter().map(|g| g * share).collect();
            close("gradient", &g, &own, NOISE);
            let reply = now(llm.evaluate(one)).unwrap();
            nll.extend(reply.nll);
            predicted.extend(reply.predicted);
        }
        close("likelihoods", &evaluated.nll, &nll, NOISE);
        assert_eq!(evaluated.predicted, predicted);
        let mean = nll.iter().sum::<f32>() / nll.len() as f32;
        close("mean loss", &[together.loss], &[mean], NOISE);
    }
}

#[test]
fn a_packed_layout_gives_the_states_of_each_row() {
    let (llama, device) = (llama(DType::F32, 1.0), Device::flex().autodiff());
    let lengths = [4, 1, 6];
    let h = random(&[11, DIM], 5);
    let tensor = |data: &[f32]| {
        let shape = [1, data.len() / DIM, DIM];
        Tensor::<3>::from_data(TensorData::new(data.to_vec(), shape), &device)
    };
    let packed = llama.forward(tensor(&h.data), &llama.rows_layout(&lengths, &device));
    let packed = now(read(packed.inner())).unwrap();
    assert_eq!(packed.shape, [1, 11, DIM]);
    let mut start = 0;
    for length in lengths {
        let own = start * DIM..(start + length) * DIM;
        let one = llama.forward(tensor(&h.data[own.clone()]), &llama.causal_layout(length, &device));
        close("states", &packed.data[own], &now(read(one.inner())).unwrap().data, NOISE);
        start += length;
    }
}

#[test]
fn requests_in_short_equal_whole_ones() {
    let llm = llm();
    for want in [Want::Gradient, Want::Both, Want::Squares] {
        let request = codes(10, want);
        let whole = by_hand(&request);
        let (found, expected) = (train(&llm, &request), train(&llm, &whole));
        close("loss", &[found.loss], &[expected.loss], NOISE);
        close("row losses", &found.row_loss, &expected.row_loss, NOISE);
        let (g, gradient) = (whole_gradient(&expected), short_gradient(&found));
        for part in Part::ALL {
            let (z, up) = (short(&request).codes.get(part).unwrap(), short(&request).up.get(part).unwrap());
            let at = request.positions.of(part);
            let counts = request.positions.counts(part);
            let row_of: Vec<usize> = counts.iter().enumerate().flat_map(|(row, n)| vec![row; *n]).collect();
            let (mut u, mut d_up) = (vec![0f32; z.data.len()], vec![vec![0f32; DIM * RANK]; counts.len()]);
            for (row, &at) in at.iter().enumerate() {
                for d in 0..DIM {
                    let g = g.data[at * DIM + d];
                    for r in 0..RANK {
                        u[row * RANK + r] += up.data[d * RANK + r] * g;
                        d_up[row_of[row]][d * RANK + r] += g * z.data[row * RANK + r];
                    }
                }
            }
            let own = gradient.codes.get(part).unwrap();
            assert_eq!(own.shape, z.shape);
            close("u", &own.data, &u, NOISE);
            assert_eq!(gradient.up.get(part).is_some(), want.gradient(), "{want:?}");
            assert_eq!(gradient.up_squares.get(part).is_some(), want.squares(), "{want:?}");
            let summed = |row_value: &dyn Fn(usize, f32) -> f32| -> Vec<f32> {
                (0..DIM * RANK).map(|i| (0..counts.len()).map(|row| row_value(row, d_up[row][i])).sum()).collect()
            };
            if let Some(up) = gradient.up.get(part) {
                assert_eq!(up.shape, [DIM, RANK]);
                close("d up", &up.data, &summed(&|_, g| g), NOISE);
            }
            if let Some(squares) = gradient.up_squares.get(part) {
                let targets = request.target_counts();
                let scale = |row: usize| request.targets.len() as f32 / targets[row] as f32;
                close("squares", &squares.data, &summed(&|row, g| (g * scale(row)).powi(2)), 5.0 * NOISE);
            }
        }
        let (short, whole) = (now(llm.evaluate(&request)).unwrap(), now(llm.evaluate(&whole)).unwrap());
        close("likelihoods", &short.nll, &whole.nll, NOISE);
        assert_eq!(short.predicted, whole.predicted);
    }
}

#[test]
fn merged_requests_come_back_unmixed() {
    let llm = llm();
    let requests = [codes(20, Want::Both), hidden(21), codes(22, Want::Squares), alone(&hidden(23)).remove(2)];
    let merged = now(llm.train(&requests.iter().collect::<Vec<_>>())).unwrap();
    assert_eq!(merged.len(), requests.len());
    for (request, reply) in requests.iter().zip(&merged) {
        let own = train(&llm, request);
        close("loss", &[reply.loss], &[own.loss], NOISE);
        close("row losses", &reply.row_loss, &own.row_loss, NOISE);
        match (&reply.gradient, &own.gradient) {
            (Gradient::Hidden(g), Gradient::Hidden(own)) => close("g", &g.data, &own.data, NOISE),
            (Gradient::Codes(g), Gradient::Codes(own)) => {
                for (g, own) in [(&g.codes, &own.codes), (&g.up, &own.up), (&g.up_squares, &own.up_squares)] {
                    assert_eq!(g.parts(), own.parts());
                    for (part, blob) in own.iter() {
                        close(part.name(), &g.get(part).unwrap().data, &blob.data, 5.0 * NOISE);
                    }
                }
            }
            _ => panic!("another form"),
        }
    }
}

#[test]
fn parts_without_positions_or_adapters_have_no_gradient() {
    let llm = llm();
    // No pictures: the image adapter has no codes, and nothing comes of its matrix.
    let mut request = codes(30, Want::Both);
    request.positions = Positions::plain(request.positions.lengths);
    let Input::Codes(input) = &mut request.input else { panic!("the request is whole") };
    input.codes = Pair { image: Some(TensorBlob::zeros(&[0, RANK])), text: Some(random(&[20, RANK], 31)) };
    let reply = train(&llm, &request);
    let gradient = short_gradient(&reply);
    let zeros = Some(TensorBlob::zeros(&[DIM, RANK]));
    assert_eq!(gradient.codes.image, Some(TensorBlob::zeros(&[0, RANK])));
    assert_eq!((&gradient.up.image, &gradient.up_squares.image), (&zeros, &zeros));
    assert!(gradient.up.text.as_ref().is_some_and(|up| up.data.iter().any(|v| *v != 0.0)));
    // One adapter, then none.
    let mut request = codes(30, Want::Both);
    let Input::Codes(input) = &mut request.input else { panic!("the request is whole") };
    input.codes.image = None;
    Arc::make_mut(&mut input.up).image = None;
    let expected = train(&llm, &by_hand(&request));
    let reply = train(&llm, &request);
    close("loss", &[reply.loss], &[expected.loss], NOISE);
    assert_eq!(short_gradient(&reply).up.parts(), [false, true]);
    let Input::Codes(input) = &mut request.input else { panic!("the request is whole") };
    (input.codes, input.up) = (Pair::default(), Arc::default());
    let expected = train(&llm, &by_hand(&request));
    let reply = train(&llm, &request);
    close("loss", &[reply.loss], &[expected.loss], NOISE);
    assert_eq!(short_gradient(&reply), &CodesGradient::default());
}

#[test]
fn a_request_without_targets_asks_nothing() {
    let llm = llm();
    let without = |mut request: BoundaryRequest| {
        request.targets.clear();
        request
    };
    let requests = [without(hidden(1)), without(codes(2, Want::Both)), hidden(3)];
    // Alone, and beside one that asks something.
    for all in [&requests[..2], &requests[..]] {
        let replies = now(llm.train(&all.iter().collect::<Vec<_>>())).unwrap();
        assert_eq!((replies[0].loss, &replies[0].row_loss), (0.0, &vec![0.0; 4]));
        assert_eq!(whole_gradient(&replies[0]), &TensorBlob::zeros(&[20, DIM]));
        let gradient = short_gradient(&replies[1]);
        for pair in [&gradient.codes, &gradient.up, &gradient.up_squares] {
            assert_eq!(pair.parts(), [true, true]);
            assert!(pair.iter().all(|(_, blob)| blob.data.iter().all(|v| *v == 0.0)));
        }
    }
    let nothing = now(llm.evaluate(&requests[0])).unwrap();
    assert!(nothing.nll.is_empty() && nothing.predicted.is_empty());
}

#[test]
fn half_precision_loses_no_gradient() {
    // Small norms and large features, so that gradients are less than half of the least f16, 6e-8.
    let [half, whole] = [DType::F16, DType::F32].map(|dtype| llm_with(dtype, 2f32.powi(-12)));
    let mut request = codes(40, Want::Gradient);
    let Input::Codes(input) = &mut request.input else { panic!("the request is whole") };
    Arc::make_mut(&mut input.x).data.iter_mut().for_each(|value| *value *= 8192.0);
    let (found, expected) = (train(&half, &request), train(&whole, &request));
    close("loss", &[found.loss], &[expected.loss], 0.01);
    let (found, expected) = (short_gradient(&found), short_gradient(&expected));
    let largest = |blob: &TensorBlob| blob.data.iter().fold(0f32, |most, value| most.max(value.abs()));
    let lifted = |blob: &TensorBlob| blob.data.iter().map(|value| value * 2f32.powi(24)).collect::<Vec<_>>();
    for (part, up) in expected.up.iter() {
        let codes = expected.codes.get(part).unwrap();
        assert!(largest(codes) < 3e-8 && largest(codes) > 0.0, "{}", largest(codes));
        close(part.up_name(), &lifted(found.up.get(part).unwrap()), &lifted(up), 0.05);
        close(part.name(), &lifted(found.codes.get(part).unwrap()), &lifted(codes), 0.05);
    }
}

#[test]
fn without_a_wire_matrices_of_a_group_are_summed_too() {
    let llm = llm();
    let requests = [codes(50, Want::Both), codes(60, Want::Both)];
    let mut boundary = InProcess::new(&llm, BoundaryMode::LowRank);
    let shares = [0.25, 0.75];
    let mut sums = CodesGradient::default();
    for (request, share) in requests.iter().zip(shares) {
        let reply = train(&llm, request);
        sums.up.add_scaled(&short_gradient(&reply).up, share);
        sums.up_squares.add_scaled(&short_gradient(&reply).up_squares, 1.0);
    }
    // What was left of another group is forgotten.
    let place = |index: u16, share| Place { index, of: 2, share };
    let mut given = |index: u16| {
        let reply = train(&llm, &requests[usize::from(index)]);
        let reply = boundary.summed(reply, place(index, shares[usize::from(index)]));
        let gradient = short_gradient(&reply).clone();
        assert_eq!(gradient.codes.parts(), [true, true]);
        gradient
    };
    drop(given(0));
    let first = given(0);
    assert!(first.up.is_empty() && first.up_squares.is_empty());
    let last = given(1);
    assert_eq!((last.up, last.up_squares), (sums.up, sums.up_squares));
    // A group of one keeps its own.
    let reply = train(&llm, &requests[0]);
    assert_eq!(boundary.summed(reply.clone(), Place::ALONE), reply);
}
