//! Where tensors live, chosen at run time.

use burn::tensor::Device;
use clap::ValueEnum;

/// `--device`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// A real GPU if there is one, else the CPU.
    Auto,
    /// burn's flex backend (SIMD, all cores).
    Cpu,
    /// wgpu: Vulkan, Metal or DirectX.
    Wgpu,
    /// CUDA; needs a build with `--features cuda`.
    Cuda,
}

impl DeviceChoice {
    /// The device, and its name in plain words.
    ///
    /// # Errors
    /// A device that this build or this machine does not have.
    pub fn open(self) -> anyhow::Result<(Device, String)> {
        match self {
            Self::Cpu => Ok((Device::flex(), "CPU (flex)".into())),
            Self::Wgpu => wgpu(),
            Self::Auto => Ok(wgpu_if_real().unwrap_or_else(|| (Device::flex(), "CPU (flex)".into()))),
            Self::Cuda => cuda(),
        }
    }
}

#[cfg(feature = "wgpu")]
fn wgpu() -> anyhow::Result<(Device, String)> {
    let device = Device::wgpu_options().init().map_err(|e| {
        anyhow::anyhow!(
            "no wgpu device: {e}; install a Vulkan driver (mesa-vulkan-drivers is a software one), or use --device cpu"
        )
    })?;
    let name = device.identity().map_or_else(|| "wgpu".to_owned(), |i| format!("wgpu ({i:?})"));
    Ok((device, name))
}

#[cfg(not(feature = "wgpu"))]
fn wgpu() -> anyhow::Result<(Device, String)> {
    anyhow::bail!("this build has no wgpu; build with --features wgpu, or use --device cpu")
}

#[cfg(feature = "wgpu")]
fn wgpu_if_real() -> Option<(Device, String)> {
    // A software Vulkan driver would be far slower than flex.
    let real = Device::enumerate_physical().iter().any(|gpu| {
        let text = format!("{gpu:?}").to_lowercase();
        !["llvmpipe", "swiftshader", "softpipe", "cpu"].iter().any(|soft| text.contains(soft))
    });
    if real { wgpu().ok() } else { None }
}

#[cfg(not(feature = "wgpu"))]
fn wgpu_if_real() -> Option<(Device, String)> {
    None
}

#[cfg(feature = "cuda")]
fn cuda() -> anyhow::Result<(Device, String)> {
    Ok((Device::cuda(0usize), "CUDA device 0".into()))
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> anyhow::Result<(Device, String)> {
    anyhow::bail!(
        "this build has no CUDA; build with `cargo build --release -p fednano-server --features cuda`, or use --device cpu"
    )
}
