//! A folder for one run.

use anyhow::Context;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A folder for one run, removed with its owner.
#[derive(Debug)]
pub struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    /// Make an empty one. Process numbers come round again: what an earlier process left under this name is removed, so that
    /// nobody goes on with somebody else's federation.
    ///
    /// # Errors
    /// A folder that cannot be removed or made.
    pub fn create(purpose: &str) -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self::fresh(std::env::temp_dir().join(format!("fednano-{purpose}-{}-{number}", std::process::id())))
    }

    fn fresh(path: PathBuf) -> anyhow::Result<Self> {
        let made = match std::fs::remove_dir_all(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => std::fs::create_dir(&path),
        };
        made.with_context(|| {
            format!("cannot make {} anew; remove it, or set TMPDIR to another folder", path.display())
        })?;
        Ok(Self(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_folder_begins_empty_and_ends() {
        let outer = TemporaryFolder::create("test").unwrap();
        let path = outer.path().join("inner");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("fednano.sqlite"), "somebody else's").unwrap();
        let inner = TemporaryFolder::fresh(path.clone()).unwrap();
        assert_eq!(std::fs::read_dir(inner.path()).unwrap().count(), 0);
        drop(inner);
        assert!(!path.exists() && outer.path().exists());
    }
}
