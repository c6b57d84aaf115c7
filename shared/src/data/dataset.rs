//! Data sets: pictures with questions and answers, read from several layouts. A sample may lack its picture or its question.
//!
//! The same code runs in a tab, so nothing here touches files: [`parse`] reads text, [`assemble`] asks its caller for pictures.
//!
//! [`parse`]: super::formats::parse

use super::formats::Entry;
use super::picture::Picture;
use rand::{Rng, seq::SliceRandom};
use std::collections::{BTreeMap, HashMap};

/// Why a data set cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    /// Not JSON.
    #[error("the JSON cannot be read: {0}; correct it there")]
    Json(String),
    /// Not CSV.
    #[error("the CSV cannot be read: {0}; correct it there")]
    Csv(String),
    /// None of the known layouts.
    #[error("'{file}' has none of the known layouts, which are: {accepted}", accepted = super::formats::ACCEPTED)]
    Layout {
        /// Its name.
        file: String,
    },
    /// A CSV column.
    #[error(
        "the CSV has no column '{missing}' (its first row is: {found}); the first row must name answer and picture or question or both, separated by commas"
    )]
    Column {
        /// Name of the column.
        missing: &'static str,
        /// The first row.
        found: String,
    },
    /// A CSV row that is too short or too long.
    #[error(
        "line {line} has {found} columns, the first row has {expected}; put text that contains commas into double quotes"
    )]
    Fields {
        /// Counted from 1.
        line: usize,
        /// Columns of the first row.
        expected: usize,
        /// Columns of this one.
        found: usize,
    },
    /// A part of a sample is absent, empty or not text.
    #[error(
        "{place} has no {what}; every sample needs an answer, and a picture or a question or both: add it or remove the sample"
    )]
    Missing {
        /// Line, entry or record.
        place: String,
        /// The absent part.
        what: &'static str,
    },
    /// An easy-VQA entry that is not one.
    #[error("{place} is not a list of question, answer and picture id; make it one or remove it")]
    Triple {
        /// Which entry.
        place: String,
    },
    /// A LLaVA record that has a picture and does not name it.
    #[error(
        "record {record}: 'image' is not one file name; name its picture there, or take 'image' and the mark <image> out of a text-only record"
    )]
    NoImage {
        /// Its id or number.
        record: String,
    },
    /// A LLaVA question without an answer.
    #[error("record {record}: the question '{question}' has no answer; add a turn from 'gpt' after it or remove it")]
    Unanswered {
        /// Id or number of the record.
        record: String,
        /// The question.
        question: String,
    },
    /// A LLaVA turn out of order.
    #[error("record {record}: turn {turn} is from '{from}'; turns must alternate, first 'human', then 'gpt'")]
    Turn {
        /// Id or number of the record.
        record: String,
        /// Counted from 1.
        turn: usize,
        /// Who speaks.
        from: String,
    },
    /// A picture that could not be loaded.
    #[error(
        "'{name}' is not a picture that can be read: {cause}; put a readable picture there or remove its questions"
    )]
    Picture {
        /// As written in the data set.
        name: String,
        /// The loader's words.
        cause: String,
    },
    /// No samples.
    #[error("the data set is empty; it needs at least one picture or question with an answer")]
    Empty,
}

/// What is asked about what, and the answer. One of picture and question may be absent, never both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Index into [`Dataset::pictures`]; none: a text-only sample.
    pub picture: Option<usize>,
    /// The question; empty: a picture-only sample.
    pub question: String,
    /// The answer.
    pub answer: String,
}

/// Samples and the pictures that they share. `P` stands for a picture: its pixels, or where they are to be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset<P = Picture> {
    /// Each once.
    pub pictures: Vec<P>,
    /// In the order of the source.
    pub samples: Vec<Sample>,
}

impl<P> Default for Dataset<P> {
    fn default() -> Self {
        Self { pictures: Vec::new(), samples: Vec::new() }
    }
}

/// Load each distinct picture once and number the samples accordingly.
///
/// # Errors
/// [`DataError::Picture`] names the first picture that `load` refuses; [`DataError::Empty`] without entries.
pub fn assemble<P>(
    entries: Vec<Entry>,
    mut load: impl FnMut(&str) -> Result<P, String>,
) -> Result<Dataset<P>, DataError> {
    if entries.is_empty() {
        return Err(DataError::Empty);
    }
    let mut data = Dataset::default();
    let mut loaded: HashMap<String, usize> = HashMap::new();
    for Entry { picture: name, question, answer } in entries {
        let known = name.as_ref().and_then(|name| loaded.get(name)).copied();
        let picture = match (name, known) {
            (Some(name), None) => {
                let picture = load(&name).map_err(|cause| DataError::Picture { name: name.clone(), cause })?;
                data.pictures.push(picture);
                let index = data.pictures.len() - 1;
                loaded.insert(name, index);
                Some(index)
            }
            (_, known) => known,
        };
        data.samples.push(Sample { picture, question, answer });
    }
    Ok(data)
}

impl<P> Dataset<P> {
    /// Put another data set's samples behind these.
    pub fn append(&mut self, other: Self) {
        let offset = self.pictures.len();
        self.pictures.extend(other.pictures);
        let moved = other.samples.into_iter().map(|s| Sample { picture: s.picture.map(|p| p + offset), ..s });
        self.samples.extend(moved);
    }

    /// Share of `test` answered right by the most frequent answer of `train`: what a model reaches that learned nothing else.
    pub fn constant_baseline(train: &Self, test: &Self) -> f64 {
        let guess = most_frequent(&answer_counts(&train.samples));
        share_right(&test.samples, |_| guess)
    }

    /// Share of `test` answered right by the most frequent answer of `train` to the same question (none being one too), unknown
    /// questions by the most frequent of all: what a model reaches that never looks at a picture.
    pub fn question_only_baseline(train: &Self, test: &Self) -> f64 {
        let fallback = most_frequent(&answer_counts(&train.samples));
        let mut counts: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
        for s in &train.samples {
            *counts.entry(s.question.as_str()).or_default().entry(s.answer.as_str()).or_default() += 1;
        }
        let guesses: HashMap<&str, Option<&str>> = counts.iter().map(|(q, c)| (*q, most_frequent(c))).collect();
        share_right(&test.samples, |s| guesses.get(s.question.as_str()).copied().flatten().or(fallback))
    }
}

impl<P: Clone> Dataset<P> {
    /// The samples of some rows, with only the pictures that they use.
    ///
    /// # Panics
    /// If a row is not one of [`Self::samples`].
    pub fn subset(&self, rows: &[usize]) -> Self {
        let mut kept = Self::default();
        let mut moved: Vec<Option<usize>> = vec![None; self.pictures.len()];
        for &row in rows {
            let sample = &self.samples[row];
            let picture = sample.picture.map(|old| {
                *moved[old].get_or_insert_with(|| {
                    kept.pictures.push(self.pictures[old].clone());
                    kept.pictures.len() - 1
                })
            });
            let (question, answer) = (sample.question.clone(), sample.answer.clone());
            kept.samples.push(Sample { picture, question, answer });
        }
        kept
    }

    /// `n` random samples (all if there are fewer), in random order.
    pub fn limit<R: Rng>(&self, n: usize, rng: &mut R) -> Self {
        let mut rows: Vec<usize> = (0..self.samples.len()).collect();
        rows.shuffle(rng);
        rows.truncate(n);
        self.subset(&rows)
    }
}

fn answer_counts(samples: &[Sample]) -> BTreeMap<&str, usize> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for s in samples {
        *counts.entry(s.answer.as_str()).or_default() += 1;
    }
    counts
}

/// Of equally frequent answers the first in the alphabet, so that baselines reproduce.
fn most_frequent<'a>(counts: &BTreeMap<&'a str, usize>) -> Option<&'a str> {
    let mut best: Option<(&'a str, usize)> = None;
    for (&answer, &count) in counts {
        if best.is_none_or(|(_, most)| count > most) {
            best = Some((answer, count));
        }
    }
    best.map(|(answer, _)| answer)
}

fn share_right<'a>(test: &[Sample], guess: impl Fn(&Sample) -> Option<&'a str>) -> f64 {
    let right = test.iter().filter(|s| guess(s).is_some_and(|g| g == s.answer)).count();
    right as f64 / test.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn entry(picture: &str, question: &str, answer: &str) -> Entry {
        let picture = (!picture.is_empty()).then(|| picture.to_owned());
        Entry { picture, question: question.into(), answer: answer.into() }
    }

    fn picture(value: u8) -> Picture {
        Picture { width: 1, height: 1, rgb: vec![value; 3] }
    }

    fn dataset(samples: &[(usize, &str, &str)]) -> Dataset {
        let pictures = samples.iter().map(|s| s.0 + 1).max().unwrap_or(0);
        Dataset {
            pictures: (0..pictures).map(|p| picture(p as u8)).collect(),
            samples: samples
                .iter()
                .map(|(p, q, a)| Sample { picture: Some(*p), question: (*q).into(), answer: (*a).into() })
                .collect(),
        }
    }

    fn fault<T: std::fmt::Debug>(result: Result<T, DataError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn assembles_with_each_picture_once() {
        let entries = vec![entry("b", "q1", "a"), entry("a", "q2", "a"), entry("b", "q3", "a")];
        let mut loaded = Vec::new();
        let data = assemble(entries.clone(), |name| {
            loaded.push(name.to_owned());
            Ok(picture(name.as_bytes()[0]))
        });
        let data = data.unwrap();
        assert_eq!(loaded, ["b", "a"]);
        assert_eq!(data.pictures, [picture(b'b'), picture(b'a')]);
        assert_eq!(data.samples.iter().map(|s| s.picture).collect::<Vec<_>>(), [0, 1, 0].map(Some));
        let text = fault(assemble(entries, |_| Err::<Picture, _>("it is torn".into())));
        assert!(text.contains("'b' is not a picture that can be read: it is torn"), "{text}");
        assert_eq!(assemble(Vec::new(), |_| Ok(picture(0))), Err(DataError::Empty));
    }

    /// One ordinary sample, one of text alone, one of a picture alone.
    fn mixed() -> Dataset {
        let entries = vec![entry("a", "q", "x"), entry("", "q", "y"), entry("b", "", "z")];
        assemble(entries, |name| Ok(picture(name.as_bytes()[0]))).unwrap()
    }

    #[test]
    fn pictures_and_questions_may_be_absent() {
        let data = mixed();
        assert_eq!(data.samples.iter().map(|s| s.picture).collect::<Vec<_>>(), [Some(0), None, Some(1)]);
        assert_eq!(data.samples[2].question, "");
        let part = data.subset(&[2, 1]);
        assert_eq!(part.pictures, [picture(b'b')]);
        assert_eq!(part.samples.iter().map(|s| s.picture).collect::<Vec<_>>(), [Some(0), None]);
        assert!(data.subset(&[1]).pictures.is_empty());
        let texts = assemble(vec![entry("", "q", "y")], |name| Err::<Picture, _>(name.to_owned())).unwrap();
        assert!(texts.pictures.is_empty(), "nothing is loaded for text alone");
        // The absent question is one question among others.
        assert_eq!(Dataset::question_only_baseline(&data, &data), 2.0 / 3.0);
    }

    #[test]
    fn appended_samples_keep_their_pictures() {
        let mut data = mixed();
        data.append(mixed());
        assert_eq!(data.pictures, [b'a', b'b', b'a', b'b'].map(picture));
        let pictures: Vec<_> = data.samples.iter().map(|s| s.picture).collect();
        assert_eq!(pictures, [Some(0), None, Some(1), Some(2), None, Some(3)]);
    }

    #[test]
    fn a_subset_keeps_the_pictures_it_uses() {
        let data = dataset(&[(0, "a", "x"), (1, "b", "x"), (2, "c", "y"), (2, "d", "z")]);
        let part = data.subset(&[3, 0, 2]);
        assert_eq!(part.pictures, [picture(2), picture(0)]);
        let rows: Vec<_> = part.samples.iter().map(|s| (s.picture, s.question.as_str())).collect();
        assert_eq!(rows, [(Some(0), "d"), (Some(1), "a"), (Some(0), "c")]);
        assert_eq!(data.subset(&[]), Dataset::default());
    }

    #[test]
    fn a_limit_is_random_and_reproduces() {
        let samples: Vec<_> = (0..50).map(|p| (p, "q", "a")).collect();
        let data = dataset(&samples);
        let limit = |n: usize, seed: u64| data.limit(n, &mut ChaCha8Rng::seed_from_u64(seed));
        assert_eq!(limit(10, 1), limit(10, 1));
        assert_ne!(limit(10, 1), limit(10, 2));
        assert_eq!((limit(10, 1).samples.len(), limit(10, 1).pictures.len()), (10, 10));
        assert_eq!(limit(99, 1).samples.len(), 50);
    }

    #[test]
    fn baselines() {
        let train = dataset(&[(0, "shape?", "circle"), (1, "red?", "no"), (2, "red?", "no"), (3, "blue?", "yes")]);
        let test = dataset(&[(0, "shape?", "circle"), (1, "red?", "no"), (2, "new?", "no"), (3, "blue?", "no")]);
        assert_eq!(Dataset::constant_baseline(&train, &test), 0.75);
        assert_eq!(Dataset::question_only_baseline(&train, &test), 0.75);
        let other = dataset(&[(0, "shape?", "circle"), (1, "new?", "yes")]);
        assert_eq!(Dataset::constant_baseline(&train, &other), 0.0);
        assert_eq!(Dataset::question_only_baseline(&train, &other), 0.5);
        assert_eq!(Dataset::constant_baseline(&Dataset::default(), &test), 0.0);
        assert_eq!(Dataset::question_only_baseline(&train, &Dataset::default()), 0.0);
    }
}
