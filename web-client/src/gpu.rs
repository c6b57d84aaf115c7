//! The tab's device. Which one is the page's choice (`www/device.js`); here it is opened and measured.

use crate::session::Failure;
use burn::tensor::{Device, Tensor, TensorData};
use fednano_shared::model::adapter::{DeviceError, read};

/// Width of the measured products.
const WIDTH: usize = 256;
/// Products between two reads.
const AT_ONCE: usize = 4;
/// Measure at least so long, milliseconds.
const LONG_ENOUGH: f64 = 150.0;

/// Open "cpu" or "webgpu".
pub async fn open(kind: &str) -> Result<Device, Failure> {
    match kind {
        "cpu" => Ok(Device::flex()),
        "webgpu" => Device::wgpu_options().init_async().await.map_err(|e| {
            format!("WebGPU could not be opened ({e}); add device=cpu to the address to compute on the processor")
                .into()
        }),
        other => Err(format!("'{other}' is no device; choose cpu or webgpu").into()),
    }
}

/// GFLOP/s of matrix products; `now` in milliseconds.
pub async fn speed(device: &Device, now: impl Fn() -> f64) -> Result<f64, DeviceError> {
    // Row sums below 1, so that products of products stay finite.
    let values: Vec<f32> = (0..WIDTH * WIDTH).map(|i| ((i % 7) as f32 - 3.0) * 1e-3).collect();
    let a = Tensor::<2>::from_data(TensorData::new(values, [WIDTH, WIDTH]), device);
    read(a.clone().matmul(a.clone())).await?; // a GPU compiles its programs at the first use
    let each = 2.0 * (WIDTH as f64).powi(3);
    let mut products = 0;
    let start = now();
    loop {
        let mut b = a.clone();
        for _ in 0..AT_ONCE {
            b = b.matmul(a.clone());
        }
        read(b).await?;
        products += AT_ONCE;
        let milliseconds = now() - start;
        if milliseconds >= LONG_ENOUGH {
            return Ok(each * products as f64 / milliseconds / 1e6);
        }
    }
}
