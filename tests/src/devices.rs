//! The same step on another native device.

use burn::tensor::Device;
use fednano_server::device::DeviceChoice;
use fednano_shared::probe::{self, ProbeResult};
use fednano_shared::step::InProcess;
use fednano_shared::wire::agreement::BoundaryMode;
use fednano_tests::{LIMIT, adapters_close, block, close, halves, nano_llava};

/// Limits between devices: f32 everywhere, other orders of summation and other libraries for exp and erf.
pub fn compare(got: &ProbeResult, want: &ProbeResult) -> anyhow::Result<()> {
    close("image features", &got.features, &want.features, 1e-4)?;
    close("adapted embeddings", &got.hidden, &want.hidden, 1e-4)?;
    anyhow::ensure!((got.loss / want.loss - 1.0).abs() < 1e-4, "loss {} and {}", got.loss, want.loss);
    close("gradient", &got.gradient, &want.gradient, 1e-3)?;
    adapters_close("adapter gradient", &got.adapter_gradients, &want.adapter_gradients, 1e-3)?;
    adapters_close("Fisher", &got.fisher, &want.fisher, 2e-3)
}

/// The native reference, in a mode of the boundary.
pub async fn native(mode: BoundaryMode) -> anyhow::Result<ProbeResult> {
    let h = halves(&nano_llava(), &Device::flex())?;
    Ok(probe::run(&h.edge, &mut InProcess::new(&h.llm, mode), &h.device).await?)
}

pub fn wgpu_equals_flex() -> anyhow::Result<()> {
    block(LIMIT, async {
        let (device, name) = DeviceChoice::Wgpu.open()?;
        println!("on {name}");
        let h = halves(&nano_llava(), &device)?;
        for mode in BoundaryMode::ALL {
            println!("{mode}");
            let got = probe::run(&h.edge, &mut InProcess::new(&h.llm, mode), &device).await?;
            compare(&got, &native(mode).await?)?;
        }
        Ok(())
    })
}
