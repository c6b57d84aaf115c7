//! Pictures and questions that a person chose, to samples. Files are opened and decoded by the page; nothing here leaves the tab.

use fednano_shared::data::dataset::{self, DataError, Dataset, Sample};
use fednano_shared::data::formats;
use fednano_shared::data::picture::Picture;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};

/// Most frequent answers in a [`summary`].
const ANSWERS_SHOWN: usize = 8;

/// Own pictures by name.
#[derive(Default)]
pub struct Pictures(BTreeMap<String, Picture>);

impl Pictures {
    /// Keep one.
    pub fn add(&mut self, name: &str, picture: Picture) {
        self.0.insert(name.to_owned(), picture);
    }

    /// Samples of a question file about these pictures, or about none.
    pub fn with_questions(&self, file_name: &str, text: &str) -> Result<Dataset, DataError> {
        dataset::assemble(formats::parse(file_name, text)?, |name| self.find(name))
    }

    /// By the full name, else by the name without folders.
    fn find(&self, name: &str) -> Result<Picture, String> {
        if let Some(picture) = self.0.get(name) {
            return Ok(picture.clone());
        }
        let wanted = without_folders(name);
        let mut alike = self.0.iter().filter(|(known, _)| without_folders(known) == wanted);
        match (alike.next(), alike.next()) {
            (Some((_, picture)), None) => Ok(picture.clone()),
            (Some((first, _)), Some((second, _))) => Err(format!("both '{first}' and '{second}' are called so")),
            // Files that are no pictures do not get here: the page names them.
            (None, _) => Err("no readable picture among the chosen files is called so".to_owned()),
        }
    }
}

fn without_folders(name: &str) -> &str {
    name.rsplit(['/', '\\']).next().unwrap_or(name)
}

/// From a canvas; opacity is dropped.
pub fn from_rgba(width: usize, height: usize, rgba: &[u8]) -> Result<Picture, String> {
    let expected = width * height * 4;
    if expected == 0 || rgba.len() != expected {
        return Err(format!(
            "a picture of {width} x {height} pixels has {} bytes instead of {expected}; choose another file",
            rgba.len()
        ));
    }
    let rgb = rgba.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
    Ok(Picture { width, height, rgb })
}

/// For a canvas.
pub fn to_rgba(picture: &Picture) -> Vec<u8> {
    picture.rgb.chunks_exact(3).flat_map(|pixel| [pixel[0], pixel[1], pixel[2], u8::MAX]).collect()
}

/// Counts, as JSON.
pub fn summary(data: &Dataset) -> String {
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for sample in &data.samples {
        *counts.entry(sample.answer.as_str()).or_default() += 1;
    }
    let mut answers: Vec<(&str, usize)> = counts.into_iter().collect();
    answers.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    answers.truncate(ANSWERS_SHOWN);
    let count = |lacks: fn(&Sample) -> bool| data.samples.iter().filter(|s| lacks(s)).count();
    json!({
        "pictures": data.pictures.len(), "samples": data.samples.len(), "answers": answers,
        "textOnly": count(|s| s.picture.is_none()), "pictureOnly": count(|s| s.question.is_empty()),
    })
    .to_string()
}
