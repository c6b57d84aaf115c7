//! A folder of one test.

use image::{Rgb, RgbImage};
use std::fs;
use std::path::PathBuf;

/// Removed when dropped.
pub(super) struct Folder(pub(super) PathBuf);

impl Folder {
    /// `test` must be unlike every other test's.
    pub(super) fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("fednano-datasets-{test}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A file in it, whose folder is made.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    pub(super) fn text(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// 3 x 2 pixels; `value` is the red of the first.
    pub(super) fn picture(&self, name: &str, value: u8) {
        RgbImage::from_pixel(3, 2, Rgb([value, 1, 2])).save(self.path(name)).unwrap();
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // A leftover in the temporary folder is no failure of the test.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// CLIP's preprocessing.
pub(super) fn clip() -> fednano_shared::data::picture::Preprocess {
    fednano_shared::data::picture::Preprocess::from_json("{}").unwrap()
}
