//! Number formats: each in each direction trains, is near f32, and is as short as it says.

use super::lean::counted;
use super::{Ran, apart, bits, falls, mixed, run, settings};
use anyhow::ensure;
use fednano_shared::settings::{BoundaryChoice, FederationSettings, Format, Rounding, Strategy};
use fednano_tests::{LIMIT, MODES, block};

/// One direction's numbers in a mode.
struct Direction {
    what: &'static str,
    boundary: BoundaryChoice,
    /// Sets their format.
    set: fn(&mut FederationSettings, Format),
    /// Their bytes in training.
    bytes: fn(&Ran) -> u64,
    /// How far off f32's the adapters may end in each of [`FORMATS`], over the way's length: about three times the farthest that was
    /// found, with either rounding, and at least 2e-3 in f16. At 1 nothing need have been learned, so none is there. Adam divides by the
    /// gradient's size, so that noise moves what hardly has a gradient as far as the rest: hidden states in 8 bits end 0.6 off.
    near: [f64; 2],
}

/// A format, and how far off f32's the loss may end: about twice the farthest that was found.
const FORMATS: [(Format, f32); 2] = [(Format::F16, 0.02), (Format::Int8, 0.25)];

const DIRECTIONS: [Direction; 6] = [
    Direction {
        what: "hidden states",
        boundary: BoundaryChoice::Activations,
        set: |s, f| s.code_format = f,
        bytes: |ran| counted(&ran.frames)[0],
        near: [0.075, 0.9],
    },
    Direction {
        what: "gradients",
        boundary: BoundaryChoice::Activations,
        set: |s, f| s.gradient_format = f,
        bytes: |ran| counted(&ran.frames)[1],
        near: [2e-3, 0.8],
    },
    Direction {
        what: "features",
        boundary: BoundaryChoice::LowRank,
        set: |s, f| s.feature_format = f,
        bytes: |ran| ran.traffic.up.features,
        near: [0.012, 0.9],
    },
    Direction {
        what: "codes",
        boundary: BoundaryChoice::LowRank,
        set: |s, f| s.code_format = f,
        bytes: |ran| counted(&ran.frames)[0],
        near: [3e-3, 0.14],
    },
    Direction {
        what: "gradients",
        boundary: BoundaryChoice::LowRank,
        set: |s, f| s.gradient_format = f,
        bytes: |ran| counted(&ran.frames)[1],
        near: [2e-3, 0.05],
    },
    Direction {
        what: "matrices",
        boundary: BoundaryChoice::LowRank,
        set: |s, f| s.matrix_format = f,
        bytes: |ran| ran.traffic.up.matrices,
        near: [2e-3, 0.22],
    },
];

/// Each format in each direction trains, is near f32 and not f32, and is as short as it says.
pub fn formats_train() -> anyhow::Result<()> {
    // Dozens of runs, of a second or two each.
    block(LIMIT * 2, async {
        let data = mixed();
        for boundary in [BoundaryChoice::Activations, BoundaryChoice::LowRank] {
            let settings = || FederationSettings { strategy: Strategy::FedAvg, local_steps: 20, ..settings(boundary) };
            let exact = run(&data, settings()).await?;
            let exact_loss = falls("f32", &exact)?;
            for direction in DIRECTIONS.iter().filter(|d| d.boundary == boundary) {
                for ((format, loss), limit) in FORMATS.into_iter().zip(direction.near) {
                    for rounding in Rounding::ALL {
                        let what = format!("{boundary}, {} in {format}, {rounding}", direction.what);
                        let mut settings = FederationSettings { rounding, ..settings() };
                        (direction.set)(&mut settings, format);
                        let ran = run(&data, settings).await?;
                        let apart_in_loss = (falls(&what, &ran)? - exact_loss).abs();
                        ensure!(apart_in_loss <= loss, "{what}: the loss is {apart_in_loss} off, the limit is {loss}");
                        let off = apart(&ran, &exact);
                        let (bytes, all) = ((direction.bytes)(&ran), (direction.bytes)(&exact));
                        println!("{what}: {off:.1e} off, limit {limit:.1e}; {bytes} bytes instead of {all}");
                        ensure!(off > 0.0, "{what}: that is what f32 gives, so it was not used");
                        ensure!(off <= limit, "{what}: {off:.2e} off, the limit is {limit:.1e}");
                        // In 8 bits a row of 4 codes has 6 bytes, with its scale; a tensor in f16 has an exponent.
                        let most = if format == Format::F16 { 0.51 } else { 0.38 };
                        ensure!((bytes as f64) < most * all as f64, "{what}: {bytes} bytes instead of {all}");
                    }
                }
            }
        }
        Ok(())
    })
}

/// Deflated frames carry the same numbers, in no more bytes.
pub fn deflated_is_the_same() -> anyhow::Result<()> {
    block(LIMIT, async {
        let data = mixed();
        for (boundary, _) in MODES {
            for format in Format::ALL {
                let plain = FederationSettings {
                    local_steps: 5,
                    feature_format: format,
                    code_format: format,
                    gradient_format: format,
                    matrix_format: format,
                    ..settings(boundary)
                };
                let plain = FederationSettings { strategy: Strategy::FedAvg, ..plain };
                let deflated = FederationSettings { compress: true, ..plain.clone() };
                let (plain, deflated) = (run(&data, plain).await?, run(&data, deflated).await?);
                ensure!(bits(&plain.update.adapter) == bits(&deflated.update.adapter), "{boundary}, {format}: others");
                let (all, fewer) = (plain.traffic.up.total(), deflated.traffic.up.total());
                println!("{boundary}, {format}: {fewer} bytes deflated, {all} plain");
                // A flag in a frame, a setting in the handshake: nothing else may grow.
                ensure!(deflated.agreement.deflate && fewer <= all + 64, "{boundary}, {format}: {fewer} of {all}");
            }
        }
        Ok(())
    })
}
