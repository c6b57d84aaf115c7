//! Adapters as safetensors in f32: blobs in the database, and files of their own with what they come from as metadata.

use anyhow::{Context, bail, ensure};
use fednano_shared::model::checkpoint::{Storage, Weights, write};
use fednano_shared::plain::AdapterState;
use fednano_shared::settings::AdapterChoice;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::path::Path;

/// An adapter file, as `fednano export` and `fednano join --save` write it.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterFile {
    /// The adapters.
    pub adapter: AdapterState,
    /// Their rank; twice the federation's where a personal adapter is mixed in.
    pub rank: usize,
    /// What the file says about them; see the constants here.
    pub metadata: BTreeMap<String, String>,
}

impl AdapterFile {
    /// Key of the identity of the client's half that they were trained with.
    pub const MODEL: &'static str = "model";
    /// Key of the form in which that half is kept: f16, int8 or int4.
    pub const EDGE_DTYPE: &'static str = "edge_dtype";
    /// Key of the federation's name.
    pub const FEDERATION: &'static str = "federation";
    /// Key of the round after which they were kept.
    pub const ROUND: &'static str = "round";
    /// Key of the rank that was agreed.
    pub const RANK: &'static str = "rank";
    /// Key of which adapters there are: image, text or both.
    pub const ADAPTERS: &'static str = "adapters";
    /// Key of the strategy's name.
    pub const STRATEGY: &'static str = "strategy";
    /// Key of the federation's settings as JSON.
    pub const SETTINGS: &'static str = "settings";
    /// Key of the share of held-out samples answered right.
    pub const ACCURACY: &'static str = "accuracy";
    /// Key of the mean held-out loss, nats.
    pub const LOSS: &'static str = "loss";
    /// Key of the number of held-out samples.
    pub const SAMPLES: &'static str = "samples";

    /// Read a file and check that it fits a model of width `dim`.
    ///
    /// # Errors
    /// No file, no adapters in it, or those of another model.
    pub fn open(path: &Path, dim: usize) -> anyhow::Result<Self> {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let adapter = read_adapter(&bytes)
            .with_context(|| format!("{} holds no adapters; `fednano export` writes such a file", path.display()))?;
        let (rank, width) = size(&adapter)?;
        ensure!(
            width == dim,
            "{} holds adapters of width {width}, the model has {dim}; name the model that they were trained with",
            path.display()
        );
        Ok(Self { adapter, rank, metadata: metadata(&bytes)? })
    }
}

/// Adapters as a safetensors file in f32; `metadata` are words about them.
///
/// # Errors
/// The library's words.
pub fn write_adapter(adapter: &AdapterState, metadata: &[(&str, String)]) -> anyhow::Result<Vec<u8>> {
    let tensors: Vec<_> = adapter.0.iter().map(|(name, blob)| (name.clone(), blob.clone())).collect();
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    write(&tensors, Storage::F32, &metadata).map_err(anyhow::Error::msg)
}

/// Adapters from a safetensors file: of one choice, of one rank and width, finite.
///
/// # Errors
/// Damaged bytes; tensors that are no adapters, named.
pub fn read_adapter(bytes: &[u8]) -> anyhow::Result<AdapterState> {
    let adapter = read_tensors(bytes)?;
    let choice = choice(&adapter)?;
    let (rank, dim) = size(&adapter)?;
    adapter.check_like(&AdapterState::zeros(choice, rank, dim))?;
    Ok(adapter)
}

/// Whatever tensors [`write_adapter`] wrote, none among them: the database also keeps Fisher values, moments and updates of
/// participants who keep their adapters.
pub(super) fn read_tensors(bytes: &[u8]) -> anyhow::Result<AdapterState> {
    let weights = Weights::from_files(vec![("what is kept as safetensors".into(), bytes.to_vec())])?;
    let tensors = weights.names().map(|name| Ok((name.to_owned(), weights.read(name).map_err(anyhow::Error::msg)?)));
    Ok(AdapterState(tensors.collect::<anyhow::Result<_>>()?))
}

fn metadata(bytes: &[u8]) -> anyhow::Result<BTreeMap<String, String>> {
    let (_, header) = SafeTensors::read_metadata(bytes)?;
    Ok(header.metadata().clone().unwrap_or_default().into_iter().collect())
}

/// Which adapters these are, by their tensors' names.
fn choice(adapter: &AdapterState) -> anyhow::Result<AdapterChoice> {
    adapter.choice().with_context(|| {
        let names: Vec<&str> = adapter.0.keys().map(String::as_str).take(6).collect();
        format!(
            "its tensors ({} in all) are {}; adapters are {}, or only the two of image or of text",
            adapter.0.len(),
            names.join(", "),
            AdapterState::names(AdapterChoice::Both).join(", ")
        )
    })
}

/// Rank and width, from a matrix `down`: `[rank, width]`.
fn size(adapter: &AdapterState) -> anyhow::Result<(usize, usize)> {
    let down = adapter.0.iter().find(|(name, _)| name.ends_with("down"));
    match down.map(|(_, blob)| &blob.shape[..]) {
        Some([rank, width]) if *rank > 0 && *width > 0 => Ok((*rank, *width)),
        Some(shape) => bail!("a matrix 'down' has the shape {shape:?}; it must be [rank, width]"),
        None => bail!("it holds no matrix 'down'"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(choice: AdapterChoice) -> AdapterState {
        let mut state = AdapterState::zeros(choice, 2, 3);
        for (i, value) in state.0.values_mut().flat_map(|b| &mut b.data).enumerate() {
            *value = (i as f32).exp(); // all bits of the mantissa
        }
        state
    }

    #[test]
    fn adapters_of_every_choice_come_back_bit_for_bit() {
        for choice in AdapterChoice::ALL {
            let state = filled(choice);
            let bytes = write_adapter(&state, &[(AdapterFile::ROUND, "3".into())]).unwrap();
            assert_eq!(read_adapter(&bytes).unwrap(), state);
            assert_eq!(metadata(&bytes).unwrap(), BTreeMap::from([("round".into(), "3".into())]));
        }
        let none = AdapterState::default();
        assert_eq!(read_tensors(&write_adapter(&none, &[]).unwrap()).unwrap(), none);
    }

    #[test]
    fn files_that_hold_no_adapters_say_what_is_wrong() {
        let fault =
            |state: &AdapterState| format!("{:#}", read_adapter(&write_adapter(state, &[]).unwrap()).unwrap_err());
        assert!(fault(&AdapterState::default()).contains("image.down"));
        let mut three = filled(AdapterChoice::Both);
        three.0.remove("text.up");
        assert!(fault(&three).contains("3 in all"), "{}", fault(&three));
        let mut uneven = filled(AdapterChoice::Image);
        uneven.0.insert("image.up".into(), fednano_shared::plain::TensorBlob::zeros(&[3, 1]));
        assert!(fault(&uneven).contains("[3, 1]"), "{}", fault(&uneven));
        let mut endless = filled(AdapterChoice::Text);
        endless.0.values_mut().for_each(|b| b.data.fill(f32::INFINITY));
        assert!(fault(&endless).contains("inf"), "{}", fault(&endless));
        assert!(read_adapter(b"PK").is_err() && read_adapter(&[]).is_err());
    }

    #[test]
    fn a_file_of_another_width_or_place_is_named() {
        let folder = super::super::TemporaryFolder::create("tensors").unwrap();
        let path = folder.path().join("a.safetensors");
        std::fs::write(&path, write_adapter(&filled(AdapterChoice::Text), &[]).unwrap()).unwrap();
        assert_eq!(AdapterFile::open(&path, 3).unwrap().rank, 2);
        let fault = |path: &Path, dim| format!("{:#}", AdapterFile::open(path, dim).unwrap_err());
        assert!(fault(&path, 4).contains("width 3, the model has 4"));
        assert!(fault(&folder.path().join("b"), 3).contains("cannot read"));
        std::fs::write(&path, "text").unwrap();
        assert!(fault(&path, 3).contains("fednano export"));
    }
}
