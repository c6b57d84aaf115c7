//! Records of published multiple-choice sets, and the words that LLaVA-1.5 is asked in (haotian-liu/LLaVA, docs/Evaluation.md,
//! llava/eval/model_vqa_science.py).

use anyhow::{Context, Result, anyhow};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Asks for a letter.
pub(super) const BY_LETTER: &str = "Answer with the option's letter from the given choices directly.";
/// Asks for a word.
pub(super) const BY_WORD: &str = "Answer the question using a single word or phrase.";

/// Names of choices; no question has as many.
const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// A record of ScienceQA's or IconQA's `problems.json`, as far as it is needed. Either may lack or null what is optional here.
#[derive(Debug, Deserialize)]
pub(super) struct Problem {
    pub(super) question: String,
    #[serde(default)]
    choices: Option<Vec<Value>>,
    /// Index of the right choice; without choices the answer itself.
    answer: Value,
    /// ScienceQA: more text to go by; may be empty.
    #[serde(default)]
    pub(super) hint: Option<String>,
    /// ScienceQA: file name of its picture; many have none.
    #[serde(default)]
    pub(super) image: Option<String>,
    /// Its part of the data set.
    #[serde(default)]
    pub(super) split: Option<String>,
}

impl Problem {
    /// The choices with their letters, and the right one's letter.
    pub(super) fn lettered(&self) -> Result<(Vec<(char, String)>, char)> {
        let texts = self.choices.as_deref().unwrap_or_default().iter().map(text);
        let texts = texts.collect::<Option<Vec<_>>>().context("a choice is not text")?;
        if texts.len() < 2 || texts.len() > LETTERS.len() {
            return Err(anyhow!("it has {} choices, 2 to {} are possible", texts.len(), LETTERS.len()));
        }
        let lettered: Vec<(char, String)> = LETTERS.chars().zip(texts).collect();
        let answer = text(&self.answer).and_then(|index| index.parse::<usize>().ok());
        let right = answer.and_then(|index| lettered.get(index)).map(|(letter, _)| *letter);
        let right = right.with_context(|| format!("its answer is {}, not the index of a choice", self.answer))?;
        Ok((lettered, right))
    }

    /// The answer in words, where there is nothing to choose from.
    pub(super) fn word(&self) -> Result<String> {
        text(&self.answer).with_context(|| format!("its answer is {}, not text", self.answer))
    }
}

/// Trimmed text; numbers count as text.
fn text(value: &Value) -> Option<String> {
    let text = match value {
        Value::String(s) => s.trim().to_owned(),
        Value::Number(n) => n.to_string(),
        _ => String::new(),
    };
    (!text.is_empty()).then_some(text)
}

/// `problems.json` and `pid_splits.json` of a folder.
pub(super) struct Records {
    problems: PathBuf,
    by_id: HashMap<String, Value>,
    /// Ids of each part.
    pub(super) parts: HashMap<String, Vec<String>>,
}

impl Records {
    pub(super) const PROBLEMS: &str = "problems.json";
    pub(super) const PARTS: &str = "pid_splits.json";

    /// Whether both files are there.
    pub(super) fn are_in(dir: &Path) -> bool {
        dir.join(Self::PROBLEMS).is_file() && dir.join(Self::PARTS).is_file()
    }

    pub(super) fn read(dir: &Path) -> Result<Self> {
        let problems = dir.join(Self::PROBLEMS);
        Ok(Self { by_id: read_json(&problems)?, parts: read_json(&dir.join(Self::PARTS))?, problems })
    }

    /// A record.
    pub(super) fn problem(&self, id: &str) -> Result<Problem> {
        let value = self.by_id.get(id).ok_or_else(|| anyhow!("it is named by {} only", Self::PARTS));
        value.and_then(|value| Ok(Problem::deserialize(value)?)).with_context(|| self.place(id))
    }

    /// For errors.
    pub(super) fn place(&self, id: &str) -> String {
        format!("record '{id}' of {} cannot be used; correct it or download the data set anew", self.problems.display())
    }
}

/// A whole JSON file.
pub(super) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let fault = || format!("{} cannot be read; download it anew", path.display());
    let bytes = fs::read(path).with_context(fault)?;
    serde_json::from_slice(&bytes).with_context(fault)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn problem(value: Value) -> Problem {
        Problem::deserialize(value).unwrap()
    }

    #[test]
    fn letters_go_with_the_choices() {
        let found = problem(json!({"question": "q", "choices": [" yes ", 2], "answer": 1})).lettered().unwrap();
        assert_eq!(found, (vec![('A', "yes".into()), ('B', "2".into())], 'B'));
        let found = problem(json!({"question": "q", "choices": ["a", "b"], "answer": "0", "hint": null})).lettered();
        assert_eq!(found.unwrap().1, 'A', "an index may be written as text");
        assert_eq!(problem(json!({"question": "q", "answer": 7})).word().unwrap(), "7");
    }

    #[test]
    fn faults_are_named() {
        let fault = |choices: Value, answer: Value| {
            let problem = problem(json!({"question": "q", "choices": choices, "answer": answer}));
            format!("{:#}", problem.lettered().unwrap_err())
        };
        assert!(fault(json!(["a", "b"]), json!(2)).contains("2, not the index of a choice"));
        assert!(fault(json!(["a", "b"]), json!(null)).contains("null, not the index"));
        assert!(fault(json!(["a", ""]), json!(0)).contains("not text"));
        assert!(fault(json!(["a"]), json!(0)).contains("1 choices"));
        assert!(fault(json!(null), json!(0)).contains("0 choices"));
        assert!(problem(json!({"question": "q", "answer": []})).word().is_err());
    }
}
