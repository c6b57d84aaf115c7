//! A question file with pictures beside it, and folders of such.

use super::{Listing, Splits};
use anyhow::{Context, Result, bail};
use fednano_shared::data::dataset::assemble;
use fednano_shared::data::formats::parse;
use std::fs;
use std::path::{Path, PathBuf};

/// What a question file is called when its folder holds other files too.
const QUESTION_FILES: [&str; 4] = ["questions.json", "questions.csv", "data.json", "data.csv"];

/// Read a question file, or the one of a folder.
pub(super) fn list(path: &Path) -> Result<Listing> {
    let file = if path.is_dir() { question_file(path)? } else { path.to_path_buf() };
    let text = fs::read_to_string(&file).with_context(|| {
        format!("the questions cannot be read from {}; name a JSON or CSV file or its folder", file.display())
    })?;
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let fault = || format!("{} cannot be used", file.display());
    let entries = parse(&name, &text).with_context(fault)?;
    let beside = file.parent().unwrap_or(Path::new(""));
    assemble(entries, |name| locate(beside, name)).with_context(fault)
}

/// Whether [`list_splits`] applies.
pub(super) fn has_splits(dir: &Path) -> bool {
    dir.join("train").is_dir() && dir.join("test").is_dir()
}

/// Read a folder with `train/`, `test/` and perhaps `val/`.
pub(super) fn list_splits(dir: &Path) -> Result<Splits<PathBuf>> {
    let part = |name: &str| {
        let folder = dir.join(name);
        if !folder.is_dir() {
            bail!(
                "{} has no folder {name}/; a data set is a folder with train/ and test/, each with questions and pictures, or ScienceQA (problems.json, pid_splits.json, images/) or IconQA (problems.json, pid_splits.json, iconqa/) as published",
                dir.display()
            );
        }
        list(&folder)
    };
    let val = if dir.join("val").is_dir() { Some(part("val")?) } else { None };
    Ok(Splits { train: part("train")?, val, test: part("test")?, skipped: 0 })
}

/// The one question file of a folder; the usual names win over other JSON and CSV files.
fn question_file(dir: &Path) -> Result<PathBuf> {
    let mut found: Vec<PathBuf> =
        QUESTION_FILES.iter().map(|name| dir.join(name)).filter(|path| path.is_file()).collect();
    if found.is_empty() {
        let unreadable = || format!("the folder {} cannot be read", dir.display());
        for item in fs::read_dir(dir).with_context(unreadable)? {
            let path = item.with_context(unreadable)?.path();
            let question = |e: &std::ffi::OsStr| e.eq_ignore_ascii_case("json") || e.eq_ignore_ascii_case("csv");
            if path.is_file() && path.extension().is_some_and(question) {
                found.push(path);
            }
        }
        found.sort();
    }
    if found.len() > 1 {
        let names: Vec<_> = found.iter().filter_map(|p| p.file_name()).map(|n| n.to_string_lossy()).collect();
        bail!("{} holds several question files ({}): name one", dir.display(), names.join(", "));
    }
    found.pop().with_context(|| {
        format!("{} holds no question file; put a questions.json or questions.csv there", dir.display())
    })
}

/// A picture beside the question file or in `images/`.
fn locate(dir: &Path, name: &str) -> Result<PathBuf, String> {
    let places = [dir.join(name), dir.join("images").join(name)];
    let [beside, inside] = &places;
    let missing = format!("there is neither {} nor {}", beside.display(), inside.display());
    places.into_iter().find(|path| path.is_file()).ok_or(missing)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Folder, clip};
    use super::super::{open, open_splits};
    use image::{Rgb, RgbImage};
    use std::fs;

    fn fault(folder: &Folder, name: &str) -> String {
        format!("{:#}", open(&folder.0.join(name), &clip()).unwrap_err())
    }

    #[test]
    fn opens_files_and_folders() {
        let folder = Folder::new("open");
        folder.picture("images/0.png", 10);
        folder.picture("images/1.png", 11);
        folder.picture("2.png", 12);
        folder.text("questions.json", r#"[["a?", "x", 1], ["b?", "y", 2], ["c?", "z", 1], ["d?", "x", 0]]"#);
        folder.text("other.json", "[]");
        let data = open(&folder.0, &clip()).unwrap();
        assert_eq!(data.pictures.iter().map(|p| p.rgb[0]).collect::<Vec<_>>(), [11, 12, 10]);
        assert_eq!(data.samples.iter().map(|s| s.picture).collect::<Vec<_>>(), [0, 1, 0, 2].map(Some));
        assert_eq!(open(&folder.path("questions.json"), &clip()).unwrap(), data);
        folder.text("some.csv", "picture,question,answer\n2.png,b?,y\n");
        assert_eq!(open(&folder.path("some.csv"), &clip()).unwrap().samples[0].question, "b?");
    }

    #[test]
    fn rows_may_lack_picture_or_question() {
        let folder = Folder::new("lacking");
        folder.picture("0.png", 7);
        folder.text("some.csv", "picture,question,answer\n,a?,x\n0.png,,y\n0.png,b?,z\n");
        let data = open(&folder.path("some.csv"), &clip()).unwrap();
        assert_eq!(data.pictures.len(), 1);
        assert_eq!(data.samples.iter().map(|s| s.picture).collect::<Vec<_>>(), [None, Some(0), Some(0)]);
        folder.text("texts.csv", "question,answer\na?,x\n");
        assert!(open(&folder.path("texts.csv"), &clip()).unwrap().pictures.is_empty());
    }

    #[test]
    fn many_pictures_keep_their_questions() {
        let folder = Folder::new("many");
        let mut csv = String::from("picture,question,answer\n");
        for i in 0..60_u8 {
            folder.picture(&format!("{i}.png"), i);
            csv.push_str(&format!("{i}.png,{i},a\n{}.png,{},a\n", i / 2, i / 2));
        }
        folder.text("data.csv", &csv);
        let data = open(&folder.0, &clip()).unwrap();
        assert_eq!((data.pictures.len(), data.samples.len()), (60, 120));
        for sample in &data.samples {
            assert_eq!(data.pictures[sample.picture.unwrap()].rgb[0].to_string(), sample.question);
        }
    }

    #[test]
    fn bad_pictures_are_named() {
        let folder = Folder::new("bad");
        folder.text("x.png", "this is text");
        let noise = RgbImage::from_fn(64, 64, |x, y| Rgb([(x * y) as u8, (x * 7 + y * 13) as u8, (x ^ (y * 5)) as u8]));
        noise.save(folder.path("whole.png")).unwrap();
        let bytes = fs::read(folder.path("whole.png")).unwrap();
        fs::write(folder.path("torn.png"), &bytes[..bytes.len() / 2]).unwrap();
        for name in ["x.png", "torn.png", "gone.png"] {
            folder.text("q.csv", &format!("picture,question,answer\nwhole.png,q,a\n{name},q,a\n"));
            let text = fault(&folder, "q.csv");
            assert!(text.contains(&format!("{name}' is not a picture that can be read")), "{text}");
            assert!(text.contains("q.csv") && text.contains("remove its questions"), "{text}");
        }
        assert!(fault(&folder, "q.csv").contains("neither"));
    }

    #[test]
    fn question_files_must_be_clear() {
        let folder = Folder::new("clear");
        assert!(fault(&folder, "").contains("no question file"));
        folder.text("a.csv", "");
        folder.text("b.JSON", "");
        let text = fault(&folder, "");
        assert!(text.contains("a.csv, b.JSON") && text.contains("name one"), "{text}");
        folder.text("data.csv", "");
        folder.text("questions.json", "");
        assert!(fault(&folder, "").contains("questions.json, data.csv"));
        assert!(fault(&folder, "missing.json").contains("missing.json"));
        assert!(fault(&folder, "a.csv").contains("empty"));
    }

    #[test]
    fn opens_train_and_test() {
        let folder = Folder::new("splits");
        folder.picture("train/images/0.png", 1);
        folder.text("train/questions.json", r#"[["a?", "x", 0]]"#);
        let text = format!("{:#}", open_splits(&folder.0, &clip()).unwrap_err());
        assert!(text.contains("no folder test/"), "{text}");
        folder.picture("test/0.png", 2);
        folder.text("test/set.csv", "image,question,answer\n0.png,b?,y\n");
        let splits = open_splits(&folder.0, &clip()).unwrap();
        assert_eq!((splits.train.pictures[0].rgb[0], splits.test.pictures[0].rgb[0]), (1, 2));
        assert_eq!(splits.test.samples[0].answer, "y");
        assert!(splits.val.is_none());
        folder.text("val/set.csv", "question,answer\nb?,y\n");
        assert_eq!(open_splits(&folder.0, &clip()).unwrap().val.unwrap().samples.len(), 1);
    }
}
