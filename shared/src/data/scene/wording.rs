//! Question templates of the pretraining domain and its vocabulary.
//!
//! Slots: `{c}` colour, `{s}` shape, `{o}` / `{a}` / `{b}` an object ("star",
//! "red star"), `{p}` a noun phrase with article ("a star"), `{n}` a noun
//! phrase without, `{r}` a relation ("left of"). Every question ends in "?",
//! orders included, so that one token always announces the answer.

use std::collections::BTreeSet;

use super::facts::NUMBERS;
use super::object::{Colour, Shape};

/// Templates of one question kind.
pub(super) type Forms = &'static [&'static str];

/// Templates that say whether their last attribute word already decides the
/// answer, which later words ("missing" or "visible") otherwise do.
pub(super) type EarlyForms = &'static [(&'static str, bool)];

pub(super) const COLOUR_OF_SHAPE: Forms = &[
    "which color does the {s} have?",
    "name the color of the {s}?",
    "what color has the {s}?",
    "in which color do you see the {s}?",
];

pub(super) const SHAPE_OF_COLOUR: Forms =
    &["which shape is {c}?", "name the {c} shape?", "which shape do you see in {c}?", "what kind of shape is {c}?"];

pub(super) const EXIST_COLOUR: EarlyForms = &[
    ("do you see something {c}?", true),
    ("can you see something {c}?", true),
    ("is any shape {c}?", true),
    ("can something {c} be seen?", true),
    ("is something {c} visible?", false),
];

pub(super) const EXIST_SHAPE: EarlyForms = &[
    ("do you see {p}?", true),
    ("can you see {p}?", true),
    ("can {p} be seen?", true),
    ("does the scene show {p}?", true),
    ("is {p} visible?", false),
];

pub(super) const NEGATION: EarlyForms = &[
    ("is {p} missing?", false),
    ("is the scene without {p}?", true),
    ("does the scene lack {p}?", true),
    ("is it true that no {n} is visible?", true),
    ("is it true that no {n} can be seen?", true),
];

pub(super) const COUNT_ALL: Forms =
    &["how many shapes do you see?", "how many shapes are visible?", "count the shapes?"];

pub(super) const COUNT_COLOUR: Forms =
    &["how many shapes are {c}?", "how many {c} shapes do you see?", "count the {c} shapes?"];

pub(super) const COUNT_SHAPE: Forms =
    &["how many {s} shapes do you see?", "how many {s} shapes are visible?", "count the {s} shapes?"];

pub(super) const POSITION_SIDE: Forms = &[
    "is the {o} on the left or on the right?",
    "on which side is the {o}?",
    "on which side do you see the {o}?",
    "does the {o} lie on the left or on the right?",
];

pub(super) const POSITION_HEIGHT: Forms = &[
    "is the {o} at the top or at the bottom?",
    "at which height is the {o}?",
    "at which height do you see the {o}?",
    "does the {o} lie at the top or at the bottom?",
];

pub(super) const SINGLE_COLOUR: Forms =
    &["what color is this?", "which color do you see?", "name the color?", "what color has this shape?"];

pub(super) const SINGLE_SHAPE: Forms =
    &["what shape is this?", "which shape do you see?", "name the shape?", "what kind of shape is this?"];

pub(super) const RELATION_SIDE: Forms = &[
    "is the {a} left or right of the {b}?",
    "does the {a} lie left or right of the {b}?",
    "on which side of the {b} is the {a}?",
];

pub(super) const RELATION_HEIGHT: Forms = &[
    "is the {a} above or below the {b}?",
    "does the {a} lie above or below the {b}?",
    "do you see the {a} above or below the {b}?",
];

pub(super) const RELATION_TRUTH: Forms =
    &["is the {a} {r} the {b}?", "does the {a} lie {r} the {b}?", "do you see the {a} {r} the {b}?"];

pub(super) const RELATION_OPEN: Forms =
    &["which shape is {r} the {b}?", "what shape lies {r} the {b}?", "name the shape {r} the {b}?"];

pub(super) const BIGGER_CHOICE: Forms =
    &["which is bigger the {a} or the {b}?", "which shape is bigger the {a} or the {b}?"];

pub(super) const SMALLER_CHOICE: Forms =
    &["which is smaller the {a} or the {b}?", "which shape is smaller the {a} or the {b}?"];

pub(super) const BIGGER_TRUTH: Forms = &["is the {a} bigger than the {b}?"];

pub(super) const SMALLER_TRUTH: Forms = &["is the {a} smaller than the {b}?"];

pub(super) const CAPTION: Forms =
    &["describe the scene?", "what do you see?", "list the shapes?", "what does the scene show?"];

/// The four relations: left of, right of, above, below.
pub(super) const RELATIONS: [&str; 4] = ["left of", "right of", "above", "below"];

/// Every template without an early mark.
const PLAIN_FORMS: [Forms; 19] = [
    COLOUR_OF_SHAPE,
    SHAPE_OF_COLOUR,
    COUNT_ALL,
    COUNT_COLOUR,
    COUNT_SHAPE,
    POSITION_SIDE,
    POSITION_HEIGHT,
    SINGLE_COLOUR,
    SINGLE_SHAPE,
    RELATION_SIDE,
    RELATION_HEIGHT,
    RELATION_TRUTH,
    RELATION_OPEN,
    BIGGER_CHOICE,
    SMALLER_CHOICE,
    BIGGER_TRUTH,
    SMALLER_TRUTH,
    CAPTION,
    &RELATIONS,
];

/// Every word that an answer of pretraining can use, sorted and unique.
pub fn answer_words() -> Vec<&'static str> {
    let mut words: BTreeSet<&'static str> = BTreeSet::new();
    words.extend(Shape::ALL.map(Shape::word));
    words.extend(Colour::ALL.map(Colour::word));
    words.extend(NUMBERS);
    words.extend(["yes", "no", "left", "right", "top", "bottom", "above", "below"]);
    words.extend(["a", "an", "and"]);
    words.into_iter().collect()
}

/// Every word that a question or answer of pretraining can use, sorted and
/// unique; "?" is a word of its own.
pub fn vocabulary() -> Vec<&'static str> {
    let early = [EXIST_COLOUR, EXIST_SHAPE, NEGATION];
    let templates =
        PLAIN_FORMS.into_iter().flatten().copied().chain(early.into_iter().flatten().map(|(text, _)| *text));
    let mut words = template_words(templates);
    words.extend(answer_words());
    words.insert("?");
    words.into_iter().collect()
}

/// The literal words of templates, without slots and "?".
pub(super) fn template_words(templates: impl Iterator<Item = &'static str>) -> BTreeSet<&'static str> {
    templates
        .flat_map(str::split_whitespace)
        .map(|word| word.trim_end_matches('?'))
        .filter(|word| !word.is_empty() && !word.starts_with('{'))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vocabulary_is_sorted_unique_and_small() {
        let words = vocabulary();
        assert!(words.is_sorted());
        assert!(words.windows(2).all(|pair| pair[0] != pair[1]));
        assert!((70..130).contains(&words.len()), "{}", words.len());
        assert!(words.contains(&"?") && words.contains(&"orange"));
        assert!(words.iter().all(|word| !word.contains(['{', '}', ','])));
    }

    #[test]
    fn words_of_the_evaluation_set_are_absent() {
        for word in vocabulary() {
            assert!(!word.starts_with("contain"));
            assert!(!["image", "present", "not"].contains(&word));
        }
    }

    #[test]
    fn answers_are_part_of_the_vocabulary() {
        let words = vocabulary();
        assert!(answer_words().iter().all(|word| words.contains(word)));
    }
}
