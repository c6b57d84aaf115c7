//! Local training: what a step does with its gradient. `participation` has the participant's loop.

mod participation;
mod stage;

pub use participation::{fisher_without_a_pass, late, local_steps, local_test, reload, strategies, unknown};

use anyhow::{Context, ensure};
use burn::tensor::Device;
use fednano_shared::boundary::{Part, Want};
use fednano_shared::client::personal::mix;
use fednano_shared::data::dataset::Dataset;
use fednano_shared::data::scene::DemoTheme;
use fednano_shared::edge::{Batch, FeatureCache};
use fednano_shared::model::adapter::NanoAdapters;
use fednano_shared::optimizer::AdapterOptimizer;
use fednano_shared::plain::AdapterState;
use fednano_shared::probe;
use fednano_shared::settings::{AdapterChoice, FederationSettings, OptimizerKind};
use fednano_shared::step::{self, InProcess, StepReport, StepRules};
use fednano_shared::wire::agreement::BoundaryMode;
use fednano_tests::{Halves, LIMIT, adapters_close, block, close, encode, fixture, halves};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const RANK: usize = 4;
/// The same numbers in another order of summation.
const NOISE: f64 = 1e-4;
/// So large a rate that a step is far longer than the values' own rounding.
const FAR: f64 = 1e3;

/// The reference checkpoint with some samples.
struct Bench {
    halves: Halves,
    cache: FeatureCache,
    start: AdapterState,
}

impl Bench {
    /// Each sample is known by its question.
    async fn of(samples: usize) -> anyhow::Result<Self> {
        let halves = halves(&fixture(), &Device::flex())?;
        let mut data: Dataset = probe::shard(DemoTheme::Garden, 3, samples, 1);
        data.samples.iter_mut().enumerate().for_each(|(i, s)| s.question = format!("question {i}?"));
        ensure!(data.samples.len() == samples, "{} samples instead of {samples}", data.samples.len());
        let cache = encode(&halves.edge, &data).await?;
        let start = probe::adapters(RANK, halves.edge.config.text.hidden);
        Ok(Self { halves, cache, start })
    }

    fn batch(&self, rows: &[usize]) -> Batch {
        self.halves.edge.batch(&self.cache, rows).expect("features as they were encoded")
    }

    fn all(&self) -> Batch {
        self.batch(&(0..self.cache.samples.len()).collect::<Vec<_>>())
    }

    fn llm(&self) -> InProcess<'_> {
        self.llm_in(BoundaryMode::Activations)
    }

    fn llm_in(&self, mode: BoundaryMode) -> InProcess<'_> {
        InProcess::new(&self.halves.llm, mode)
    }

    fn adapters(&self, state: &AdapterState) -> NanoAdapters {
        NanoAdapters::from_state(state, &self.halves.device)
    }

    /// Adapters after one step from the start.
    async fn step(&self, rules: &StepRules<'_>, parts: &[Batch]) -> anyhow::Result<(AdapterState, StepReport)> {
        self.step_in(BoundaryMode::Activations, rules, (parts, Want::Gradient)).await
    }

    async fn step_in(
        &self,
        mode: BoundaryMode,
        rules: &StepRules<'_>,
        (parts, want): (&[Batch], Want),
    ) -> anyhow::Result<(AdapterState, StepReport)> {
        let mut adapters = self.adapters(&self.start);
        let (mut sgd, device) = (AdapterOptimizer::new(&sgd()), &self.halves.device);
        let report =
            step::train_step(&mut adapters, &mut sgd, rules, (parts, want), &mut self.llm_in(mode), device).await?;
        Ok((adapters.to_state().await?, report))
    }
}

fn sgd() -> FederationSettings {
    FederationSettings { optimizer: OptimizerKind::Sgd, momentum: 0.0, ..settings() }
}

fn settings() -> FederationSettings {
    FederationSettings { rank: RANK, batch_size: 4, ..FederationSettings::exact() }
}

fn rules(rate: f64) -> StepRules<'static> {
    StepRules { rate, prox: None, clip_norm: 0.0 }
}

/// `after - before`.
fn way(after: &AdapterState, before: &AdapterState) -> AdapterState {
    let mut way = before.clone();
    way.scale(-1.0);
    way.add(after);
    way
}

fn length(state: &AdapterState) -> f64 {
    state.0.values().flat_map(|b| &b.data).map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt()
}

/// In both modes, and the same in both.
pub fn micro_batches() -> anyhow::Result<()> {
    block(LIMIT, async {
        let bench = Bench::of(8).await?;
        let rules = rules(FAR);
        let mut first: Option<AdapterState> = None;
        for mode in BoundaryMode::ALL {
            println!("{mode}");
            let (whole, one) = bench.step_in(mode, &rules, (&[bench.all()], Want::Both)).await?;
            let parts = [bench.batch(&[0, 1, 2, 3, 4]), bench.batch(&[5, 6]), bench.batch(&[7])];
            let (parts, three) = bench.step_in(mode, &rules, (&parts, Want::Both)).await?;
            adapters_close("step", &way(&parts, &bench.start), &way(&whole, &bench.start), NOISE)?;
            ensure!((one.loss - three.loss).abs() < 1e-4, "loss {} and {}", one.loss, three.loss);
            ensure!((one.samples, three.samples) == (8, 8), "{} and {} samples", one.samples, three.samples);
            // The squares of training are those of a Fisher pass at the adapters before the step.
            let mut fisher = bench.start.zeros_like();
            let (adapters, device) = (bench.adapters(&bench.start), &bench.halves.device);
            step::fisher_group(&adapters, &[bench.all()], &mut bench.llm_in(mode), device, &mut fisher).await?;
            for (what, squares) in [("whole", one.squares), ("parts", three.squares)] {
                adapters_close(what, &squares.context("no squares")?, &fisher, 3e-4)?;
            }
            let first = first.get_or_insert_with(|| whole.clone());
            adapters_close("mode", &way(&whole, &bench.start), &way(first, &bench.start), NOISE)?;
        }
        Ok(())
    })
}

pub fn prox() -> anyhow::Result<()> {
    block(LIMIT, async {
        let bench = Bench::of(4).await?;
        let (batch, device) = ([bench.all()], &bench.halves.device);
        let start = NanoAdapters::from_state(&bench.start, device);
        let mut ends = Vec::new();
        for mu in [None, Some(0.0), Some(50.0)] {
            let mut adapters = bench.adapters(&bench.start);
            let mut optimizer = AdapterOptimizer::new(&sgd());
            let rules = StepRules { prox: mu.map(|mu| (mu, &start)), ..rules(0.01) };
            for _ in 0..10 {
                step::train_step(
                    &mut adapters,
                    &mut optimizer,
                    &rules,
                    (&batch, Want::Gradient),
                    &mut bench.llm(),
                    device,
                )
                .await?;
            }
            ends.push(adapters.to_state().await?);
        }
        ensure!(ends[0] == ends[1], "mu = 0 is not plain training");
        let [plain, near] = [0, 2].map(|i| length(&way(&ends[i], &bench.start)));
        // A constant gradient would give 10 steps, and with rate * mu = 1/2 the series 1 + 1/2 + 1/4 + ... of them.
        println!("{plain:.2e} away, with a strong pull {near:.2e}");
        ensure!(near > 0.0 && near < 0.3 * plain, "{near} is not near, against {plain}");
        Ok(())
    })
}

pub fn clipping() -> anyhow::Result<()> {
    block(LIMIT, async {
        let bench = Bench::of(4).await?;
        let batch = [bench.all()];
        let free = bench.step(&rules(FAR), &batch).await?.0;
        let norm = length(&way(&free, &bench.start)) / FAR;
        let third = StepRules { clip_norm: norm / 3.0, ..rules(FAR) };
        let clipped = way(&bench.step(&third, &batch).await?.0, &bench.start);
        let found = length(&clipped) / FAR;
        println!("gradient {norm:.3e}, clipped to {:.3e}: {found:.3e}", norm / 3.0);
        ensure!((found - norm / 3.0).abs() < 1e-4 * norm, "the clipped gradient is {found} long");
        let mut expected = way(&free, &bench.start);
        expected.scale(1.0 / 3.0);
        adapters_close("direction", &clipped, &expected, NOISE)?;
        let wide = StepRules { clip_norm: norm * 3.0, ..rules(FAR) };
        ensure!(bench.step(&wide, &batch).await?.0 == free, "a short gradient is changed");
        Ok(())
    })
}

pub fn image_only() -> anyhow::Result<()> {
    block(LIMIT, async {
        let mut bench = Bench::of(4).await?;
        let (dim, batch) = (bench.halves.edge.config.text.hidden, bench.all());
        let draw = |choice| NanoAdapters::initial(choice, RANK, dim, &mut ChaCha8Rng::seed_from_u64(1));
        let (image, text, both) = (draw(AdapterChoice::Image), draw(AdapterChoice::Text), draw(AdapterChoice::Both));
        let alike = image.0.iter().chain(&text.0).all(|(name, blob)| both.0.get(name) == Some(blob));
        ensure!(alike && image.0.len() + text.0.len() == 4, "one adapter starts otherwise than in the pair");

        let mut pair = bench.start.clone();
        pair.0.values_mut().next_back().context("no text.up")?.data.fill(0.0); // a text adapter that does nothing
        bench.start.0.retain(|name, _| name.starts_with("image"));
        let device = bench.halves.device.clone();
        let (single, pair) = (bench.adapters(&bench.start), bench.adapters(&pair));
        ensure!((single.tensors(), pair.tensors()) == (2, 4), "{} tensors are trained", single.tensors());
        let (_, gradients) = step::gradients(&single, &batch, &mut bench.llm(), &device).await?;
        ensure!(gradients.choice() == Some(AdapterChoice::Image), "{:?}", gradients.0.keys());
        let (_, of_pair) = step::gradients(&pair, &batch, &mut bench.llm(), &device).await?;
        for (name, gradient) in &gradients.0 {
            close(name, gradient, &of_pair.0[name], NOISE)?;
        }
        let hidden = step::adapted(Some(&single), &batch, &device).await?;
        let image = batch.positions.of(Part::Image);
        for (at, (h, x)) in hidden.data.chunks(dim).zip(batch.x.data.chunks(dim)).enumerate() {
            ensure!((h == x) != image.contains(&at), "position {at} is treated as the other kind");
        }
        let (after, _) = bench.step(&rules(FAR), &[batch]).await?;
        let moved = after.0.iter().all(|(name, blob)| bench.start.0.get(name).is_some_and(|old| old != blob));
        ensure!(after.choice() == Some(AdapterChoice::Image) && moved, "the image adapter does not learn");
        Ok(())
    })
}

/// Stopped after two of five steps, read, and put back.
pub fn optimizers_go_on() -> anyhow::Result<()> {
    block(LIMIT, async {
        let bench = Bench::of(4).await?;
        let (batch, device) = ([bench.all()], &bench.halves.device);
        for optimizer in OptimizerKind::ALL {
            let settings = FederationSettings { optimizer, weight_decay: 0.01, ..settings() };
            let mut ends = Vec::new();
            for stop in [false, true] {
                let mut adapters = bench.adapters(&bench.start);
                let mut optimizer = AdapterOptimizer::new(&settings);
                for step in 0..5 {
                    if stop && step == 2 {
                        let (state, memory) = (adapters.to_state().await?, optimizer.to_state().await?);
                        adapters = bench.adapters(&state);
                        optimizer = AdapterOptimizer::restored(&settings, &memory, &state, device)?;
                    }
                    let rules = StepRules { clip_norm: 0.1, ..rules(0.05) };
                    step::train_step(
                        &mut adapters,
                        &mut optimizer,
                        &rules,
                        (&batch, Want::Gradient),
                        &mut bench.llm(),
                        device,
                    )
                    .await?;
                }
                ends.push((adapters.to_state().await?, optimizer.to_state().await?));
            }
            ensure!(ends[0] == ends[1], "{optimizer} does not go on bit for bit");
            ensure!(ends[0].1.steps == 5 && ends[0].0 != bench.start, "{optimizer} did not train");
        }
        Ok(())
    })
}

/// The mix computes `(1 - share) * h + share * h'`, whatever the ranks.
pub fn mixed() -> anyhow::Result<()> {
    block(LIMIT, async {
        let bench = Bench::of(3).await?;
        let (batch, device) = (bench.all(), &bench.halves.device);
        let mut own = probe::adapters(RANK + 1, bench.halves.edge.config.text.hidden);
        own.scale(-0.7);
        let share = 0.3f32;
        let both = mix(&bench.start, &own, share);
        ensure!(both.rank() == Some(2 * RANK + 1), "{:?}", both.rank());
        let hidden = async |state: &AdapterState| step::adapted(Some(&bench.adapters(state)), &batch, device).await;
        let (a, b, found) = (hidden(&bench.start).await?, hidden(&own).await?, hidden(&both).await?);
        let mut expected = a.clone();
        expected.data.iter_mut().zip(&b.data).for_each(|(a, b)| *a = (1.0 - share) * *a + share * b);
        close("mix", &found, &expected, 1e-5)
    })
}
