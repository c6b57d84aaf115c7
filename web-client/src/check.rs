//! A checkpoint's client half against PyTorch's reference values: shared's own comparison, on the tab's device.

use crate::gpu;
use crate::session::Failure;
use fednano_shared::check::{self, EXPECTED, META, Originals};
use fednano_shared::data::picture::Picture;
use fednano_shared::model::checkpoint::Weights;
use fednano_shared::model::files::SmallFiles;
use std::collections::BTreeMap;

/// The report as JSON. `files` are the checkpoint's, [`EXPECTED`] and [`META`], by name.
pub async fn run(
    mut files: BTreeMap<String, Vec<u8>>,
    pictures: Vec<Picture>,
    device: &str,
) -> Result<String, Failure> {
    let device = gpu::open(device).await?;
    let Some(expected) = files.remove(EXPECTED) else {
        return Err(
            format!("{EXPECTED} is not beside the checkpoint; make it with tests/fixtures/make_fixture.py").into()
        );
    };
    let meta = files.remove(META).ok_or_else(|| format!("{META} is missing"));
    let small = SmallFiles::from_bytes(&files)?;
    files.retain(|name, _| name.ends_with(".safetensors"));
    let weights = Weights::from_files(files.into_iter().collect())?;
    let originals = Originals { pictures: Ok(pictures), meta };
    let report = check::clients_half(small, &weights, &expected, &originals, &device).await?;
    Ok(serde_json::to_string(&report)?)
}
