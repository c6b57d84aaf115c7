//! Data sets on disk: told apart by their layout, listed first, then their pictures are decoded on all cores.
//!
//! | module | what |
//! | --- | --- |
//! | `question_file` | a question file (LLaVA JSON, CSV, easy-VQA) with its pictures, and folders of such |
//! | `scienceqa` | ScienceQA as published |
//! | `iconqa` | IconQA as published |
//! | `choices` | what both make of a multiple-choice question |
//! | `pictures` | decoding |

mod choices;
mod iconqa;
mod pictures;
mod question_file;
mod scienceqa;
#[cfg(test)]
mod testing;

pub use pictures::read_picture;

use anyhow::{Context, Result, bail};
use fednano_shared::data::dataset::Dataset;
use fednano_shared::data::picture::{Picture, Preprocess};
use std::path::{Path, PathBuf};

/// A data set whose pictures have not been read: where each one lies. Large ones are split and limited so, before [`read`].
pub type Listing = Dataset<PathBuf>;

/// A data set with its parts. `P` stands for a picture, as in [`Dataset`].
#[derive(Debug, Clone)]
pub struct Splits<P = Picture> {
    /// To learn from.
    pub train: Dataset<P>,
    /// To choose settings with, where there is such a part.
    pub val: Option<Dataset<P>>,
    /// To measure with.
    pub test: Dataset<P>,
    /// Questions that were left out because they need several pictures.
    pub skipped: usize,
}

/// Read a data set: a question file, or a folder that holds exactly one. Pictures lie in the folder of the question file or in
/// `images/` beside it; large ones are kept as a model with this `preprocess` sees them.
///
/// # Errors
/// Which file, line, record or picture cannot be used, why, and what to do.
pub fn open(path: &Path, preprocess: &Preprocess) -> Result<Dataset> {
    read(&list(path)?, preprocess).with_context(|| format!("{} cannot be used", path.display()))
}

/// [`open`] without reading the pictures.
///
/// # Errors
/// As [`open`], except for the pictures' content.
pub fn list(path: &Path) -> Result<Listing> {
    if let Some(layout) = Layout::of(path) {
        bail!(
            "{} is {} as published, with all its parts; `fednano simulate --data` takes it whole, here a question file (or a folder with one) is needed",
            path.display(),
            layout.name()
        );
    }
    question_file::list(path)
}

/// Whether a folder holds a data set with its parts, for [`open_splits`].
pub fn has_splits(dir: &Path) -> bool {
    Layout::of(dir).is_some() || question_file::has_splits(dir)
}

/// Read a data set with its parts: a folder with `train/`, `test/` and perhaps `val/`, each as in [`open`]; ScienceQA or IconQA as
/// published.
///
/// # Errors
/// As [`open`], and for an absent part.
pub fn open_splits(dir: &Path, preprocess: &Preprocess) -> Result<Splits> {
    let Splits { train, val, test, skipped } = list_splits(dir)?;
    let read = |listing: &Listing| read(listing, preprocess);
    Ok(Splits { train: read(&train)?, val: val.as_ref().map(read).transpose()?, test: read(&test)?, skipped })
}

/// [`open_splits`] without reading the pictures.
///
/// # Errors
/// As [`open_splits`], except for the pictures' content.
pub fn list_splits(dir: &Path) -> Result<Splits<PathBuf>> {
    match Layout::of(dir) {
        Some(Layout::ScienceQa(root)) => scienceqa::list(&root),
        Some(Layout::IconQa(place)) => iconqa::list(&place),
        None => question_file::list_splits(dir),
    }
}

/// Decode the pictures of a listing.
///
/// # Errors
/// The first picture that cannot be used, and what to do.
pub fn read(listing: &Listing, preprocess: &Preprocess) -> Result<Dataset> {
    Ok(Dataset { pictures: pictures::read_all(&listing.pictures, preprocess)?, samples: listing.samples.clone() })
}

/// A published data set, by where its files lie.
enum Layout {
    ScienceQa(PathBuf),
    IconQa(iconqa::Place),
}

impl Layout {
    fn of(dir: &Path) -> Option<Self> {
        // IconQA first: both have files of the same names.
        iconqa::place(dir).map(Self::IconQa).or_else(|| scienceqa::root(dir).map(Self::ScienceQa))
    }

    fn name(&self) -> &'static str {
        match self {
            Self::ScienceQa(_) => "ScienceQA",
            Self::IconQa(_) => "IconQA",
        }
    }
}
