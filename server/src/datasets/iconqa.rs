//! IconQA (Lu et al. 2021, arXiv 2110.13214) as published: iconqa_data.zip of github.com/lupantech/IconQA; its README shows the
//! folders, its run_choose_txt/dataset.py and tools/generate_img_choice_feature.py the records.
//!
//! ```text
//! iconqa_data/problems.json                         {"1": {"question", "choices", "answer", "ques_type", "split", ...}, ...}
//! iconqa_data/pid_splits.json                       {"choose_txt_train": ["1", ...], "fill_in_blank_train": [...], ...}
//! iconqa_data/iconqa/{split}/{task}/{id}/image.png  beside it data.json, the same record, and choice_0.png ... of choose_img
//! ```
//!
//! Where `problems.json` is missing, the folders and their `data.json` say the same.
//!
//! Two of the three tasks are read, each worded as in LLaVA-1.5's evaluation (haotian-liu/LLaVA, docs/Evaluation.md): `choose_txt` by the
//! right choice's letter, `fill_in_blank` by its word. **`choose_img` is left out and counted**: its choices are pictures, and a
//! sample here has one picture, as LLaVA-1.5 was trained. Tiling them into one would shrink each to a fraction of the 336 pixels
//! that the model sees, and make up a task that no published figure is about.

use super::choices::{BY_LETTER, BY_WORD, Problem, Records, read_json};
use super::{Listing, Splits};
use anyhow::{Context, Result, ensure};
use fednano_shared::data::dataset::Sample;
use std::fs;
use std::path::{Path, PathBuf};

const PARTS: [&str; 3] = ["train", "val", "test"];
const CHOOSE_TEXT: &str = "choose_txt";
const FILL_IN: &str = "fill_in_blank";
/// Choices are pictures.
const CHOOSE_PICTURE: &str = "choose_img";

/// Where its files lie.
pub(super) struct Place {
    /// Has `train/choose_txt/` and the like.
    folders: PathBuf,
    /// Has `problems.json` and `pid_splits.json`, if they are there.
    records: Option<PathBuf>,
}

/// Find it: the given folder is `iconqa_data`, `iconqa_data/iconqa`, or a clone of the repository.
pub(super) fn place(dir: &Path) -> Option<Place> {
    let has_tasks = |folders: &Path| {
        let tasks = [CHOOSE_TEXT, FILL_IN, CHOOSE_PICTURE];
        PARTS.iter().any(|part| tasks.iter().any(|task| folders.join(part).join(task).is_dir()))
    };
    [dir.to_owned(), dir.join("iconqa_data"), dir.join("data/iconqa_data")].into_iter().find_map(|root| {
        let folders = [root.join("iconqa"), root.clone()].into_iter().find(|folders| has_tasks(folders))?;
        Some(Place { folders, records: Some(root).filter(|root| Records::are_in(root)) })
    })
}

/// Read all parts.
pub(super) fn list(place: &Place) -> Result<Splits<PathBuf>> {
    let source = Source { place, records: place.records.as_deref().map(Records::read).transpose()? };
    let [train, val, test] = PARTS.map(|part| source.part(part));
    let needed = |listing: Option<Listing>, part: &str| {
        listing.with_context(|| {
            let folders = place.folders.display();
            format!("{folders} has no {part} part of {CHOOSE_TEXT} or {FILL_IN}; unzip IconQA's iconqa_data.zip anew")
        })
    };
    let mut skipped = 0;
    for part in PARTS {
        skipped += source.ids(part, CHOOSE_PICTURE)?.unwrap_or_default().len();
    }
    if skipped > 0 {
        tracing::info!("IconQA: {skipped} questions whose choices are pictures ({CHOOSE_PICTURE}) are left out");
    }
    Ok(Splits { train: needed(train?, PARTS[0])?, val: val?, test: needed(test?, PARTS[2])?, skipped })
}

/// Records from `problems.json`, or from the folders.
struct Source<'a> {
    place: &'a Place,
    records: Option<Records>,
}

impl Source<'_> {
    /// Both tasks of a part, one after the other; none if there is neither.
    fn part(&self, part: &str) -> Result<Option<Listing>> {
        let mut data: Option<Listing> = None;
        for task in [CHOOSE_TEXT, FILL_IN] {
            let Some(ids) = self.ids(part, task)? else { continue };
            let data = data.get_or_insert_default();
            for id in ids {
                let problem = self.problem(part, task, &id)?;
                let split = problem.split.as_deref().unwrap_or(part);
                let picture = self.folder(split, task, &id).join("image.png");
                let sample = sample(&problem, task, &picture).with_context(|| self.fault(part, task, &id));
                let (question, answer) = sample?;
                data.samples.push(Sample { picture: Some(data.pictures.len()), question, answer });
                data.pictures.push(picture);
            }
        }
        Ok(data)
    }

    /// Ids of a part's task; none if there is no such part.
    fn ids(&self, part: &str, task: &str) -> Result<Option<Vec<String>>> {
        if let Some(records) = &self.records {
            return Ok(records.parts.get(&format!("{task}_{part}")).cloned());
        }
        let dir = self.place.folders.join(part).join(task);
        if !dir.is_dir() {
            return Ok(None);
        }
        let unreadable = || format!("the folder {} cannot be read", dir.display());
        let mut ids = Vec::new();
        for item in fs::read_dir(&dir).with_context(unreadable)? {
            let item = item.with_context(unreadable)?;
            if item.path().is_dir() {
                ids.push(item.file_name().to_string_lossy().into_owned());
            }
        }
        // In the order of the numbers that they are.
        ids.sort_by_key(|id| (id.parse::<u64>().unwrap_or(u64::MAX), id.clone()));
        Ok(Some(ids))
    }

    fn problem(&self, part: &str, task: &str, id: &str) -> Result<Problem> {
        match &self.records {
            Some(records) => records.problem(id),
            None => read_json(&self.folder(part, task, id).join("data.json")),
        }
    }

    fn folder(&self, part: &str, task: &str, id: &str) -> PathBuf {
        self.place.folders.join(part).join(task).join(id)
    }

    fn fault(&self, part: &str, task: &str, id: &str) -> String {
        match &self.records {
            Some(records) => records.place(id),
            None => {
                let folder = self.folder(part, task, id);
                format!("{} cannot be used; correct it or unzip IconQA anew", folder.join("data.json").display())
            }
        }
    }
}

/// Question and answer.
fn sample(problem: &Problem, task: &str, picture: &Path) -> Result<(String, String)> {
    ensure!(picture.is_file(), "its picture {} is missing", picture.display());
    let question = problem.question.trim();
    ensure!(!question.is_empty(), "its question is empty");
    if task == FILL_IN {
        return Ok((format!("{question}\n{BY_WORD}"), problem.word()?));
    }
    let (choices, right) = problem.lettered()?;
    let lines: String = choices.iter().map(|(letter, text)| format!("{letter}. {text}\n")).collect();
    Ok((format!("{question}\n{lines}{BY_LETTER}"), right.to_string()))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Folder, clip};
    use super::super::{has_splits, list_splits, open, open_splits};
    use serde_json::{Value, json};
    use std::fs;

    /// Part, task and id of each record, and the record as published.
    fn records() -> Vec<(&'static str, &'static str, &'static str, Value)> {
        let choose = json!({
            "question": "How likely is it that you will pick a black one? ",
            "choices": ["certain", "unlikely", "impossible", "probable"],
            "answer": 2, "ques_type": "choose_txt", "grade": "grade1", "label": "S2"
        });
        let short = json!({"question": "Is it round?", "choices": ["yes", "no"], "answer": 0});
        let fill = json!({
            "question": "How many marbles are there?", "answer": "10", "ques_type": "fill_in_blank",
            "grade": "prek", "label": "B1"
        });
        let choose_picture = json!({
            "question": "Which picture is next?", "choices": ["choice_0.png", "choice_1.png"], "answer": 1,
            "ques_type": "choose_img", "grade": "k", "label": "P1"
        });
        vec![
            ("train", "choose_txt", "10", choose.clone()),
            ("train", "choose_txt", "9", short.clone()),
            ("train", "fill_in_blank", "3", fill.clone()),
            ("train", "choose_img", "4", choose_picture.clone()),
            ("val", "choose_txt", "5", choose.clone()),
            ("test", "choose_txt", "6", short),
            ("test", "fill_in_blank", "7", fill),
            ("test", "choose_img", "8", choose_picture),
        ]
    }

    fn write(folder: &Folder, root: &str) {
        let (mut problems, mut parts) = (json!({}), json!({}));
        for (part, task, id, mut record) in records() {
            let at = format!("{root}iconqa/{part}/{task}/{id}");
            folder.text(&format!("{at}/data.json"), &record.to_string());
            folder.picture(&format!("{at}/image.png"), id.parse().unwrap());
            if task == "choose_img" {
                folder.picture(&format!("{at}/choice_0.png"), 0);
                folder.picture(&format!("{at}/choice_1.png"), 1);
            }
            record["split"] = json!(part);
            problems[id] = record;
            let ids = &mut parts[format!("{task}_{part}")];
            match ids.as_array_mut() {
                Some(ids) => ids.push(json!(id)),
                None => *ids = json!([id]),
            }
        }
        folder.text(&format!("{root}problems.json"), &problems.to_string());
        folder.text(&format!("{root}pid_splits.json"), &parts.to_string());
        folder.text(&format!("{root}pid2skills.json"), "{}");
    }

    #[test]
    fn reads_the_published_layout() {
        let folder = Folder::new("iconqa");
        write(&folder, "data/iconqa_data/");
        let zip = folder.0.join("data/iconqa_data");
        for dir in [folder.0.clone(), folder.0.join("data"), zip.clone(), zip.join("iconqa")] {
            assert!(has_splits(&dir), "{}", dir.display());
            let splits = open_splits(&dir, &clip()).unwrap();
            assert_eq!(splits.skipped, 2, "{}", dir.display());
            let red = |data: &fednano_shared::data::dataset::Dataset| -> Vec<u8> {
                data.samples.iter().map(|s| data.pictures[s.picture.unwrap()].rgb[0]).collect()
            };
            // The lists of pid_splits.json keep their order; folders go by number.
            let first = if dir.ends_with("iconqa") { [9, 10, 3] } else { [10, 9, 3] };
            assert_eq!(red(&splits.train), first);
            assert_eq!((red(&splits.val.unwrap()), red(&splits.test)), (vec![5], vec![6, 7]));
        }
        let train = list_splits(&zip).unwrap().train.samples;
        assert_eq!(
            train[0].question,
            "How likely is it that you will pick a black one?\nA. certain\nB. unlikely\nC. impossible\nD. probable\nAnswer with the option's letter from the given choices directly."
        );
        assert_eq!(
            train[2].question,
            "How many marbles are there?\nAnswer the question using a single word or phrase."
        );
        assert_eq!(train.iter().map(|s| s.answer.as_str()).collect::<Vec<_>>(), ["C", "A", "10"]);
    }

    #[test]
    fn faults_name_file_and_record() {
        let folder = Folder::new("iconqa-faults");
        write(&folder, "");
        let fault = || format!("{:#}", list_splits(&folder.0).unwrap_err());
        let whole = format!("{:#}", open(&folder.0, &clip()).unwrap_err());
        assert!(whole.contains("is IconQA as published"), "{whole}");
        fs::remove_file(folder.0.join("iconqa/test/fill_in_blank/7/image.png")).unwrap();
        let text = fault();
        assert!(text.contains("record '7' of ") && text.contains("test/fill_in_blank/7/image.png"), "{text}");
        folder.picture("iconqa/test/fill_in_blank/7/image.png", 7);
        folder.text("pid_splits.json", r#"{"choose_txt_train": ["9", "99"], "choose_txt_test": ["6"]}"#);
        let text = fault();
        assert!(text.contains("record '99'") && text.contains("pid_splits.json only"), "{text}");
        folder.text("pid_splits.json", r#"{"choose_txt_train": ["9"]}"#);
        assert!(fault().contains("no test part"));
        // Without the lists, each folder speaks for itself.
        fs::remove_file(folder.0.join("problems.json")).unwrap();
        folder.text("iconqa/train/choose_txt/9/data.json", r#"{"question": "q", "choices": ["a", "b"], "answer": 2}"#);
        let text = fault();
        assert!(text.contains("choose_txt/9/data.json") && text.contains("2, not the index"), "{text}");
        folder.text("iconqa/train/choose_txt/9/data.json", "{");
        assert!(fault().contains("9/data.json cannot be read"));
    }
}
