//! ScienceQA (Lu et al. 2022, arXiv 2209.09513) as published: github.com/lupantech/ScienceQA, whose README describes the records and
//! whose tools/download.sh puts the pictures there.
//!
//! ```text
//! data/scienceqa/problems.json                    {"1": {"question", "choices", "answer", "hint", "image", "split", ...}, ...}
//! data/scienceqa/pid_splits.json                  {"train": ["1", ...], "val": [...], "test": [...], "minitrain": ...}
//! data/scienceqa/images/{split}/{id}/image.png    of those whose "image" is not null: about half
//! ```
//!
//! Questions are worded as in LLaVA-1.5's evaluation (haotian-liu/LLaVA: scripts/convert_sqa_to_llava.py with format CQM-A, then
//! llava/eval/model_vqa_science.py with `--single-pred-prompt`); the answer is the right choice's letter. Lectures and solutions
//! are not shown.

use super::choices::{BY_LETTER, Problem, Records};
use super::{Listing, Splits};
use anyhow::{Context, Result, anyhow};
use fednano_shared::data::dataset::Sample;
use std::path::{Path, PathBuf};

/// The folder of `problems.json`: the given one, or within a clone of the repository.
pub(super) fn root(dir: &Path) -> Option<PathBuf> {
    [dir.to_owned(), dir.join("data/scienceqa")].into_iter().find(|dir| Records::are_in(dir))
}

/// Read all parts.
pub(super) fn list(root: &Path) -> Result<Splits<PathBuf>> {
    let records = Records::read(root)?;
    let part = |name: &str| records.parts.get(name).map(|ids| list_part(&records, root, name, ids)).transpose();
    let needed = |name: &str| {
        part(name)?.with_context(|| {
            format!("{} has no '{name}'; download ScienceQA's anew", root.join(Records::PARTS).display())
        })
    };
    Ok(Splits { train: needed("train")?, val: part("val")?, test: needed("test")?, skipped: 0 })
}

fn list_part(records: &Records, root: &Path, part: &str, ids: &[String]) -> Result<Listing> {
    let mut data = Listing::default();
    for id in ids {
        let problem = records.problem(id)?;
        let (picture, question, answer) = sample(&problem, root, part, id).with_context(|| records.place(id))?;
        let picture = picture.map(|path| {
            data.pictures.push(path);
            data.pictures.len() - 1
        });
        data.samples.push(Sample { picture, question, answer });
    }
    Ok(data)
}

/// Picture, question, answer.
fn sample(problem: &Problem, root: &Path, part: &str, id: &str) -> Result<(Option<PathBuf>, String, String)> {
    let (choices, right) = problem.lettered()?;
    let context = problem.hint.as_deref().map(str::trim).filter(|hint| !hint.is_empty()).unwrap_or("N/A");
    let options: Vec<String> = choices.iter().map(|(letter, text)| format!("({letter}) {text}")).collect();
    let asked = format!("Context: {context}\nQuestion: {}\nOptions: {}", problem.question, options.join(" "));
    // As in LLaVA's script: once, so that three spaces become two.
    let asked = asked.replace("  ", " ");
    let picture = match problem.image.as_deref().map(str::trim).unwrap_or_default() {
        "" => None,
        name => Some(locate(root, problem.split.as_deref().unwrap_or(part), id, name)?),
    };
    Ok((picture, format!("{}\n{BY_LETTER}", asked.trim()), right.to_string()))
}

/// Where tools/download.sh unzips a picture, or without the folder `images/`.
fn locate(root: &Path, split: &str, id: &str, name: &str) -> Result<PathBuf> {
    let inside = Path::new(split).join(id).join(name);
    let places = [root.join("images").join(&inside), root.join(&inside)];
    let [first, second] = &places;
    let missing = || {
        let (first, second) = (first.display(), second.display());
        anyhow!("its picture is neither {first} nor {second}: unzip ScienceQA's {split}.zip there")
    };
    places.iter().find(|path| path.is_file()).cloned().ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Folder, clip};
    use super::super::{Listing, has_splits, list_splits, open, open_splits, read};
    use serde_json::{Value, json};

    /// A record with everything that the published ones have.
    fn full(answer: usize, split: &str, image: Value) -> Value {
        json!({
            "question": "Which of these states is farthest north?",
            "choices": ["West Virginia", "Louisiana", "Arizona", "Oklahoma"],
            "answer": answer, "hint": "", "image": image, "task": "closed choice", "grade": "grade2",
            "subject": "social science", "topic": "geography", "category": "Geography",
            "skill": "Read a map: cardinal directions", "lecture": "Maps have four cardinal directions.",
            "solution": "To find the answer, look at the compass rose.", "split": split
        })
    }

    /// Six records: with picture, with hint, with neither, and one that lacks whatever may be lacking.
    fn write(folder: &Folder, root: &str) {
        let bare = json!({"question": "Is ice  solid?", "choices": ["yes", "no"], "answer": 0});
        let mut hinted = full(3, "train", Value::Null);
        hinted["hint"] = json!("The map shows states.\nNorth is up. ");
        let problems = json!({
            "1": full(0, "train", json!("image.png")), "2": hinted, "3": full(2, "train", json!("image.png")),
            "6": full(1, "val", Value::Null), "4": full(1, "test", json!("image.png")), "5": bare
        });
        folder.text(&format!("{root}problems.json"), &problems.to_string());
        let parts = json!({
            "train": ["1", "2", "3"], "val": ["6"], "test": ["4", "5"], "trainval": ["1", "2", "3", "6"],
            "minitrain": ["2"], "minival": ["6"], "minitest": ["5"]
        });
        folder.text(&format!("{root}pid_splits.json"), &parts.to_string());
        for (place, red) in [("train/1", 1), ("train/3", 3), ("test/4", 4)] {
            folder.picture(&format!("{root}images/{place}/image.png"), red);
        }
    }

    fn pictures(data: &Listing) -> Vec<Option<usize>> {
        data.samples.iter().map(|s| s.picture).collect()
    }

    #[test]
    fn reads_the_published_layout() {
        let folder = Folder::new("scienceqa");
        write(&folder, "data/scienceqa/");
        for dir in [folder.0.clone(), folder.0.join("data/scienceqa")] {
            assert!(has_splits(&dir));
            let splits = open_splits(&dir, &clip()).unwrap();
            assert_eq!(splits.train.pictures.iter().map(|p| p.rgb[0]).collect::<Vec<_>>(), [1, 3]);
            assert_eq!(splits.test.pictures.iter().map(|p| p.rgb[0]).collect::<Vec<_>>(), [4]);
            assert_eq!(splits.skipped, 0);
        }
        let splits = list_splits(&folder.0).unwrap();
        assert_eq!(pictures(&splits.train), [Some(0), None, Some(1)]);
        assert_eq!(pictures(&splits.val.unwrap()), [None]);
        assert_eq!(pictures(&splits.test), [Some(0), None]);
        let answers: Vec<&str> = splits.train.samples.iter().map(|s| s.answer.as_str()).collect();
        assert_eq!(answers, ["A", "D", "C"]);
        assert_eq!(
            splits.train.samples[0].question,
            "Context: N/A\nQuestion: Which of these states is farthest north?\nOptions: (A) West Virginia (B) Louisiana (C) Arizona (D) Oklahoma\nAnswer with the option's letter from the given choices directly."
        );
        assert!(
            splits.train.samples[1].question.starts_with("Context: The map shows states.\nNorth is up.\nQuestion:")
        );
        assert!(splits.test.samples[1].question.contains("Question: Is ice solid?\nOptions: (A) yes (B) no\nAnswer"));
        // Only what is left of a listing is read.
        assert_eq!(read(&splits.train.subset(&[2, 1]), &clip()).unwrap().pictures[0].rgb[0], 3);
    }

    #[test]
    fn pictures_may_lie_without_their_folder() {
        let folder = Folder::new("scienceqa-flat");
        write(&folder, "");
        for part in ["train", "test"] {
            std::fs::rename(folder.0.join("images").join(part), folder.0.join(part)).unwrap();
        }
        assert_eq!(open_splits(&folder.0, &clip()).unwrap().train.pictures.len(), 2);
    }

    #[test]
    fn faults_name_file_and_record() {
        let folder = Folder::new("scienceqa-faults");
        write(&folder, "");
        let fault = || format!("{:#}", list_splits(&folder.0).unwrap_err());
        let whole = format!("{:#}", open(&folder.0, &clip()).unwrap_err());
        assert!(whole.contains("is ScienceQA as published") && whole.contains("simulate"), "{whole}");
        std::fs::remove_file(folder.0.join("images/train/3/image.png")).unwrap();
        let text = fault();
        assert!(text.contains("record '3' of ") && text.contains("problems.json"), "{text}");
        assert!(text.contains("images/train/3/image.png") && text.contains("train.zip"), "{text}");
        folder.text("pid_splits.json", r#"{"train": ["2", "77"], "test": ["5"]}"#);
        let text = fault();
        assert!(text.contains("record '77'") && text.contains("pid_splits.json only"), "{text}");
        folder.text("pid_splits.json", r#"{"train": ["2"], "val": ["6"]}"#);
        assert!(fault().contains("pid_splits.json has no 'test'"));
        folder.text("pid_splits.json", r#"{"train": ["2"], "test": ["5"]}"#);
        assert!(list_splits(&folder.0).unwrap().val.is_none());
        folder.text("problems.json", r#"{"2": {"choices": ["a", "b"], "answer": 0}}"#);
        let text = fault();
        assert!(text.contains("record '2'") && text.contains("question") && text.contains("anew"), "{text}");
        folder.text("problems.json", r#"{"2": {"question": "q", "choices": ["a", "b"], "answer": 5}}"#);
        assert!(fault().contains("5, not the index"));
        folder.text("problems.json", "[");
        assert!(fault().contains("problems.json cannot be read"));
    }
}
