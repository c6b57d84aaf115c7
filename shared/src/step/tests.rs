use super::*;
use crate::boundary::{Positions, Target};
use crate::edge::BatchRow;
use crate::settings::{AdapterChoice, FederationSettings, OptimizerKind};
use std::future::Future;
use std::sync::Weak;
use std::task::{Context, Poll, Waker};

const DIM: usize = 3;
const RANK: usize = 2;

/// Nothing here has to wait for anybody.
fn now<F: Future>(future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return output;
        }
    }
}

fn values(count: usize, factor: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * factor + 5) % 23) as f32 * 0.04 - 0.44).collect()
}

/// Rows of these lengths, each with one target at its end; the first has a picture of two positions.
fn batch(lengths: &[u32], factor: usize) -> Batch {
    let mut positions = Positions::plain(lengths.to_vec());
    positions.images[0] = 1..3;
    let target = |(row, length): (usize, &u32)| Target { row: row as u32, position: length - 1, token: 1 };
    Batch {
        x: Arc::new(TensorBlob { shape: vec![positions.total(), DIM], data: values(positions.total() * DIM, factor) }),
        targets: lengths.iter().enumerate().map(target).collect(),
        rows: lengths.iter().map(|length| BatchRow { ids: vec![0; *length as usize], picture: None }).collect(),
        positions,
    }
}

fn adapters() -> NanoAdapters {
    let mut state = AdapterState::zeros(AdapterChoice::Both, RANK, DIM);
    state.0.values_mut().zip(7..).for_each(|(blob, factor)| blob.data = values(DIM * RANK, factor));
    NanoAdapters::from_state(&state, &Device::flex())
}

fn sgd() -> AdapterOptimizer {
    let settings = FederationSettings {
        optimizer: OptimizerKind::Sgd,
        momentum: 0.0,
        weight_decay: 0.0,
        ..FederationSettings::default()
    };
    AdapterOptimizer::new(&settings)
}

const RULES: StepRules<'static> = StepRules { rate: 0.5, prox: None, clip_norm: 0.0 };

/// An "LLM" with `g = h / targets`, in either mode; what was asked and answered, in order.
struct Toy {
    mode: BoundaryMode,
    window: usize,
    waiting: VecDeque<BoundaryReply>,
    sums: CodesGradient,
    log: Vec<String>,
}

impl Toy {
    fn new(mode: BoundaryMode, window: usize) -> Self {
        Self { mode, window, waiting: VecDeque::new(), sums: CodesGradient::default(), log: Vec::new() }
    }
}

/// `a bT` or `aT b` of small matrices.
fn product(a: &TensorBlob, b: &TensorBlob, left: bool, right: bool) -> TensorBlob {
    let tensor = |blob: &TensorBlob, turned: bool| {
        let tensor = tensor(blob.clone(), &Device::flex());
        if turned { tensor.transpose() } else { tensor }
    };
    now(read(tensor(a, left).matmul(tensor(b, right)))).unwrap()
}

/// Some rows of a matrix.
fn rows_at(all: &TensorBlob, places: &[usize]) -> TensorBlob {
    let width = all.shape[1];
    let data = places.iter().flat_map(|at| &all.data[at * width..(at + 1) * width]).copied().collect();
    TensorBlob { shape: vec![places.len(), width], data }
}

impl LlmBoundary for Toy {
    fn mode(&self) -> BoundaryMode {
        self.mode
    }

    async fn send(&mut self, request: BoundaryRequest, _: &Batch, place: Place) -> Result<(), BoundaryError> {
        request.check(DIM, 9, 99).map_err(|e| BoundaryError::Refused(e.to_string()))?;
        let all = request.targets.len() as f32;
        let mut gradient = match &request.input {
            Input::Hidden(h) => Gradient::Hidden(h.clone()),
            Input::Codes(input) => {
                let mut h = (*input.x).clone();
                for (part, z) in input.codes.iter().filter(|(_, z)| z.shape[0] > 0) {
                    let branch = product(z, input.up.get(part).unwrap(), false, true);
                    for (place, row) in request.positions.of(part).into_iter().zip(branch.data.chunks(DIM)) {
                        h.data[place * DIM..].iter_mut().zip(row).for_each(|(h, v)| *h += v);
                    }
                }
                let mut codes = CodesGradient::default();
                for (part, z) in input.codes.iter() {
                    let (up, places) = (input.up.get(part).unwrap(), request.positions.of(part));
                    let (mut d_up, mut squares) = (TensorBlob::zeros(&up.shape), TensorBlob::zeros(&up.shape));
                    let mut u = TensorBlob::zeros(&z.shape);
                    if !places.is_empty() {
                        let mut g = rows_at(&h, &places);
                        g.data.iter_mut().for_each(|v| *v /= all);
                        u = product(&g, up, false, false);
                        d_up = product(&g, z, true, false);
                        let mut first = 0;
                        for count in request.positions.counts(part) {
                            let own: Vec<usize> = (first..first + count).collect();
                            first += count;
                            if count > 0 {
                                let own = product(&rows_at(&g, &own), &rows_at(z, &own), true, false);
                                squares.data.iter_mut().zip(&own.data).for_each(|(s, v)| *s += (v * all).powi(2));
                            }
                        }
                    }
                    *codes.codes.slot(part) = Some(u);
                    if request.want.gradient() {
                        *codes.up.slot(part) = Some(d_up);
                    }
                    if request.want.squares() {
                        *codes.up_squares.slot(part) = Some(squares);
                    }
                }
                Gradient::Codes(codes)
            }
        };
        match &mut gradient {
            Gradient::Hidden(g) => g.data.iter_mut().for_each(|v| *v /= all),
            Gradient::Codes(codes) => {
                let (up, squares) = (std::mem::take(&mut codes.up), std::mem::take(&mut codes.up_squares));
                self.sums.up.add_scaled(&up, place.share);
                self.sums.up_squares.add_scaled(&squares, 1.0);
                if place.index + 1 == place.of {
                    let sums = std::mem::take(&mut self.sums);
                    (codes.up, codes.up_squares) = (sums.up, sums.up_squares);
                }
            }
        }
        self.log.push(format!("send {}/{}", place.index, place.of));
        let row_loss = vec![all; request.positions.rows()];
        self.waiting.push_back(BoundaryReply { loss: all, row_loss, gradient });
        assert!(self.waiting.len() <= self.window, "more than the window");
        Ok(())
    }

    async fn reply(&mut self) -> Result<BoundaryReply, BoundaryError> {
        self.log.push("reply".into());
        self.waiting.pop_front().ok_or_else(|| BoundaryError::Failed("nothing was sent".into()))
    }

    async fn evaluate(&mut self, _: BoundaryRequest, _: &Batch) -> Result<EvaluationReply, BoundaryError> {
        Err(BoundaryError::Failed("nothing to evaluate".into()))
    }

    fn window(&self) -> usize {
        self.window
    }
}

fn close(got: &AdapterState, want: &AdapterState) {
    assert!(got.0.keys().eq(want.0.keys()), "{:?} {:?}", got.0.keys(), want.0.keys());
    for ((name, got), want) in got.0.iter().zip(want.0.values()) {
        for (g, w) in got.data.iter().zip(&want.data) {
            assert!((g - w).abs() < 1e-5, "{name}: {got:?} {want:?}");
        }
    }
}

fn step(mode: BoundaryMode, window: usize, parts: &[Batch]) -> (AdapterState, StepReport, Vec<String>) {
    let (mut adapters, mut boundary) = (adapters(), Toy::new(mode, window));
    let report =
        now(train_step(&mut adapters, &mut sgd(), &RULES, (parts, Want::Both), &mut boundary, &Device::flex()))
            .unwrap();
    (now(adapters.to_state()).unwrap(), report, boundary.log)
}

#[test]
fn both_modes_and_any_window_take_the_same_step() {
    let parts = [batch(&[4, 3], 11), batch(&[5], 13), batch(&[3, 4, 5], 17)];
    let (want, report, log) = step(BoundaryMode::Activations, 1, &parts);
    assert_eq!(log, ["send 0/3", "reply", "send 1/3", "reply", "send 2/3", "reply"]);
    // Targets are 2, 1 and 3, and so are the losses.
    assert!((report.loss - 14.0 / 6.0).abs() < 1e-6 && report.samples == 6, "{report:?}");
    assert_ne!(want, now(adapters().to_state()).unwrap());
    for mode in BoundaryMode::ALL {
        for window in [1, 2] {
            let (state, other, log) = step(mode, window, &parts);
            close(&state, &want);
            close(other.squares.as_ref().unwrap(), report.squares.as_ref().unwrap());
            assert_eq!((other.loss, other.samples), (report.loss, report.samples));
            if window == 2 {
                assert_eq!(log, ["send 0/3", "send 1/3", "reply", "send 2/3", "reply", "reply"]);
            }
        }
        // The squares of a pass without a step.
        let mut sums = now(adapters().to_state()).unwrap().zeros_like();
        let mut boundary = Toy::new(mode, 2);
        now(fisher_group(&adapters(), &parts, &mut boundary, &Device::flex(), &mut sums)).unwrap();
        close(&sums, report.squares.as_ref().unwrap());
    }
}

#[test]
fn a_step_is_finished_with_the_gradient_that_it_was_begun_for() {
    let device = Device::flex();
    let parts = [batch(&[4, 3], 11), batch(&[5], 13), batch(&[3, 4, 5], 17)];
    let start = now(adapters().to_state()).unwrap();
    for mode in BoundaryMode::ALL {
        let (after, _, _) = step(mode, 2, &parts);
        let mut boundary = Toy::new(mode, 2);
        let begun = now(begin_step(&adapters(), &parts, Want::Both, &mut boundary, &device)).unwrap();
        assert!(!begun.all_sent());
        // Meanwhile the adapters went on.
        let mut moved = adapters().with_values(|_, value| value.mul_scalar(2.0));
        now(finish_step(begun, &mut moved, &mut sgd(), &RULES, &mut boundary, &device)).unwrap();
        // moved - (start - after) = start + after
        let mut want = start.clone();
        want.add(&after);
        close(&now(moved.to_state()).unwrap(), &want);
    }
}

#[test]
fn an_adapter_without_positions_has_a_gradient_of_zeros() {
    let mut words = batch(&[4, 3], 11);
    words.positions = Positions::plain(vec![4, 3]);
    for mode in BoundaryMode::ALL {
        let mut boundary = Toy::new(mode, 1);
        let (_, found) = now(gradients(&adapters(), &words, &mut boundary, &Device::flex())).unwrap();
        assert!(found.0.keys().eq(AdapterState::NAMES));
        for (name, blob) in &found.0 {
            assert_eq!(blob.data.iter().all(|v| *v == 0.0), name.starts_with("image"), "{mode}: {name}");
        }
    }
    let (state, report, _) = step(BoundaryMode::LowRank, 1, &[]);
    assert_eq!((report.samples, state), (0, now(adapters().to_state()).unwrap()));
}

#[test]
fn a_reply_that_does_not_fit_is_an_error() {
    struct Faulty(Toy, fn(&mut BoundaryReply));

    impl LlmBoundary for Faulty {
        fn mode(&self) -> BoundaryMode {
            self.0.mode
        }
        async fn send(&mut self, request: BoundaryRequest, batch: &Batch, place: Place) -> Result<(), BoundaryError> {
            self.0.send(request, batch, place).await
        }
        async fn reply(&mut self) -> Result<BoundaryReply, BoundaryError> {
            let mut reply = self.0.reply().await?;
            (self.1)(&mut reply);
            Ok(reply)
        }
        async fn evaluate(
            &mut self,
            request: BoundaryRequest,
            batch: &Batch,
        ) -> Result<EvaluationReply, BoundaryError> {
            self.0.evaluate(request, batch).await
        }
    }

    fn codes(reply: &mut BoundaryReply) -> &mut CodesGradient {
        match &mut reply.gradient {
            Gradient::Codes(codes) => codes,
            Gradient::Hidden(_) => panic!("another mode"),
        }
    }

    type Change = fn(&mut BoundaryReply);
    let faults: [(BoundaryMode, Change, &str); 7] = [
        (BoundaryMode::Activations, |r| r.row_loss.truncate(1), "for 1 rows, 2 were sent"),
        (BoundaryMode::Activations, |r| r.gradient = Gradient::Hidden(TensorBlob::zeros(&[6, 3])), "[6, 3]"),
        (BoundaryMode::Activations, |r| r.gradient = Gradient::Codes(CodesGradient::default()), "mode activations"),
        (BoundaryMode::LowRank, |r| codes(r).codes.text = None, "text codes"),
        (BoundaryMode::LowRank, |r| codes(r).codes.image = Some(TensorBlob::zeros(&[3, 2])), "[3, 2]"),
        (BoundaryMode::LowRank, |r| codes(r).up.image = None, "lacks the gradient of 'image.up'"),
        (BoundaryMode::LowRank, |r| codes(r).up_squares.text = None, "lacks the squares of 'text.up'"),
    ];
    let cause = |mode: BoundaryMode, change: Change| {
        let (mut adapters, mut boundary) = (adapters(), Faulty(Toy::new(mode, 1), change));
        let parts = [batch(&[4, 3], 11)];
        let (mut sgd, device) = (sgd(), Device::flex());
        let done = train_step(&mut adapters, &mut sgd, &RULES, (&parts, Want::Both), &mut boundary, &device);
        now(done).unwrap_err().to_string()
    };
    for (mode, change, word) in faults {
        let cause = cause(mode, change);
        let all = ["does not fit the request", word, "one version"];
        assert!(all.iter().all(|part| cause.contains(part)), "{cause}");
    }
    let diverged = cause(BoundaryMode::LowRank, |r| r.loss = f32::NAN);
    assert!(diverged.contains("NaN") && diverged.contains("learning_rate"), "{diverged}");
}

#[test]
fn a_pass_makes_its_batches_when_they_are_sent() {
    let parts = [batch(&[4, 3], 11), batch(&[5], 13), batch(&[3, 4, 5], 17), batch(&[6], 19)];
    let zeros = now(adapters().to_state()).unwrap().zeros_like();
    for mode in BoundaryMode::ALL {
        for window in [1, 2] {
            let (mut whole, mut boundary) = (zeros.clone(), Toy::new(mode, window));
            now(fisher_group(&adapters(), &parts, &mut boundary, &Device::flex(), &mut whole)).unwrap();
            let log = boundary.log;
            assert_eq!(log.len(), 2 * parts.len());
            assert_eq!(log.iter().take_while(|line| line.starts_with("send")).count(), window);

            let (mut found, mut boundary) = (zeros.clone(), Toy::new(mode, window));
            let mut made: Vec<Weak<TensorBlob>> = Vec::new();
            let one_by_one = parts.iter().map(|part| {
                assert!(made.iter().all(|x| x.strong_count() == 0), "features of a batch that was sent are held");
                let part = Batch { x: Arc::new((*part.x).clone()), ..part.clone() };
                made.push(Arc::downgrade(&part.x));
                Ok(part)
            });
            now(fisher_parts(&adapters(), one_by_one, &mut boundary, &Device::flex(), &mut found)).unwrap();
            assert_eq!((found, boundary.log), (whole, log));
            // A batch that cannot be made ends the pass, and nothing is added.
            let (mut none, mut boundary) = (zeros.clone(), Toy::new(mode, window));
            let lacking = parts.iter().enumerate().map(|(n, part)| match n {
                2 => Err(EdgeError::Features { found: 1, expected: 2 }),
                _ => Ok(part.clone()),
            });
            let fault = now(fisher_parts(&adapters(), lacking, &mut boundary, &Device::flex(), &mut none)).unwrap_err();
            assert!(matches!(fault, StepError::Samples(_)), "{fault}");
            assert_eq!(none, zeros);
        }
    }
}
