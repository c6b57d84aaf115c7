//! Where tensors live and in what type the frozen LLM is computed, chosen at run time.

use anyhow::Context;
use burn::tensor::{DType, Device};
use clap::ValueEnum;
use fednano_shared::model::checkpoint::Weights;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// `--device`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
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

/// `--dtype`: the type of the frozen LLM's weights and of what is computed with them. The client's half is in f32 anywhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[value(rename_all = "lower")]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// f32 on the CPU; on a GPU the type that the checkpoint is stored in, or f32 where the GPU does not compute in that.
    Auto,
    /// 4 bytes a weight.
    F32,
    /// 2 bytes a weight.
    F16,
    /// 2 bytes a weight: an f32's range, fewer digits than f16.
    Bf16,
}

/// Types that a decoder can be computed in.
const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

impl ComputeDtype {
    /// The type for a model directory on a device with this name in plain words.
    ///
    /// # Errors
    /// A type that the device does not compute in; for [`Self::Auto`] on a GPU, weights that cannot be read.
    pub fn choose(self, model: &Path, device: &Device, name: &str) -> anyhow::Result<DType> {
        let supported = |dtype: DType| device.supports_dtype(dtype);
        let wanted = match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            // Two bytes a weight save memory there as well, but the CPU computes faster in f32.
            Self::Auto if *device == Device::flex() => DType::F32,
            Self::Auto => {
                let unusable = || format!("the model directory {} cannot be used", model.display());
                let stored = Weights::open(model).with_context(unusable)?.stored_dtype();
                if supported(stored) { stored } else { DType::F32 }
            }
        };
        among(wanted, name, supported)
    }
}

/// The wanted type, if it is supported.
fn among(wanted: DType, device: &str, supported: impl Fn(DType) -> bool) -> anyhow::Result<DType> {
    if supported(wanted) {
        return Ok(wanted);
    }
    let others: Vec<&str> = TYPES.iter().filter(|dtype| supported(**dtype)).map(DType::name).collect();
    anyhow::bail!(
        "{device} does not compute in {}; use --dtype auto or {}, or another --device",
        wanted.name(),
        others.join(" or ")
    )
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_that_the_device_lacks_is_refused_with_the_remedy() {
        let most = |dtype: DType| dtype != DType::BF16;
        assert_eq!(among(DType::F16, "that GPU", most).unwrap(), DType::F16);
        let words = among(DType::BF16, "that GPU", most).unwrap_err().to_string();
        assert!(words.contains("that GPU does not compute in bf16; use --dtype auto or f32 or f16"), "{words}");
    }

    #[test]
    fn the_cpu_computes_in_any_type_and_chooses_f32_unseen() {
        let nowhere = Path::new("no such directory");
        let choose = |dtype: ComputeDtype| dtype.choose(nowhere, &Device::flex(), "CPU").unwrap();
        assert_eq!(choose(ComputeDtype::Auto), DType::F32);
        assert_eq!(choose(ComputeDtype::F16), DType::F16);
        assert_eq!(choose(ComputeDtype::Bf16), DType::BF16);
    }
}
