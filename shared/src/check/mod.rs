//! Is a checkpoint computed here as PyTorch and transformers compute it? Tensor by tensor, against reference values that
//! `tests/fixtures/make_fixture.py` makes. Here are limits, rows and the client's half, which natively and in a tab are this same
//! code; the server's half is compared by the server's crate.
//!
//! | module | what |
//! | --- | --- |
//! | `limits` | the one table of limits |
//! | `reference` | reference values, and the inputs among them |
//! | `table` | rows under construction |
//! | `report` | what came out, for people and as JSON |
//! | `edge` | pictures, texts, vision tower, embeddings |
//! | `adapters` | the adapters' output, gradients, Fisher values |

pub mod adapters;
pub mod edge;
pub mod limits;
pub mod reference;
pub mod report;
pub mod table;

use crate::data::picture::Picture;
use crate::model::adapter::{DeviceError, NanoAdapters};
use crate::model::checkpoint::{CheckpointError, Weights};
use crate::model::files::SmallFiles;
use crate::plain::TensorBlob;
use crate::step::StepError;
use burn::tensor::{Device, Tensor, TensorData};
use reference::{Inputs, Reference};
use report::Report;
use table::Table;

/// What a reference file is called beside its checkpoint.
pub const EXPECTED: &str = "expected.safetensors";
/// The texts that it was made from, in the same folder; the pictures are there as `images/image_N.png`.
pub const META: &str = "meta.json";

/// What every fault of the reference values is remedied by.
const REMEDY: &str =
    "make the reference values anew from this checkpoint's settings with tests/fixtures/make_fixture.py";

/// Why nothing, or not everything, is as the reference says. Values that are off are rows of the report first.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Reference values that are damaged, or of another checkpoint.
    #[error("{0}; {remedy}", remedy = REMEDY)]
    Reference(String),
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device, outside a step.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The training step.
    #[error(transparent)]
    Step(#[from] StepError),
    /// A report without a comparison.
    #[error(
        "nothing was compared: the reference values hold none of the tensors that are computed here; {remedy}",
        remedy = REMEDY
    )]
    Nothing,
    /// A report with rows past their limits.
    #[error(
        "{failed} of {compared} rows are past their limits, worst {worst}; the first one in the table that fails is nearest to the cause"
    )]
    PastLimits {
        /// Rows past their limits.
        failed: usize,
        /// Rows that were compared.
        compared: usize,
        /// The worst of them, with deviation and limit.
        worst: String,
    },
}

/// What the reference values were made from, as far as it can be had.
pub struct Originals {
    /// The pictures in the order of the reference's rows, or why they are not there.
    pub pictures: Result<Vec<Picture>, String>,
    /// The bytes of [`META`], or why they are not there.
    pub meta: Result<Vec<u8>, String>,
}

/// Compare the client's half alone, as a tab holds it: `small` and `weights` are the checkpoint's, `expected` a reference file's
/// bytes. Each stage starts from the reference's own inputs, the adapters' gradients from its own answer for the server.
///
/// # Errors
/// A checkpoint that cannot be loaded, reference values of another checkpoint, a lost device. Values that are off are rows of the
/// report, not errors.
pub async fn clients_half(
    small: SmallFiles,
    weights: &Weights,
    expected: &[u8],
    originals: &Originals,
    device: &Device,
) -> Result<Report, CheckError> {
    let reference = Reference::parse(expected)?;
    let inputs = Inputs::of(&reference, &small.config)?;
    let mut table = Table::new(&reference, &inputs);
    edge::compare(&mut table, small, weights, originals, device).await?;
    if let Some(state) = reference.adapter(inputs.dim)? {
        let module = NanoAdapters::from_state(&state, device);
        adapters::forward(&mut table, &module, device).await?;
        adapters::backward(&mut table, &module, &reference.adapter_reply(&inputs)?, device).await?;
    }
    Ok(table.finish("of the server's half, or given to the client's"))
}

/// Onto a device; the blob has as many axes as the tensor.
pub fn tensor<const N: usize>(blob: &TensorBlob, device: &Device) -> Tensor<N> {
    Tensor::from_data(TensorData::new(blob.data.clone(), blob.shape.clone()), device)
}
