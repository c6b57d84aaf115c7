//! Questions and answers of the pretraining domain.

use std::collections::HashSet;

use rand::Rng;

use super::facts::{NUMBERS, fill, pick, with_article, yes_no};
use super::layout::Scene;
use super::object::{Colour, Object, Shape};
use super::wording::{self, Forms};

/// Smallest difference of two centres on an axis, in pixels, for a question
/// about their relation.
const RELATION_GAP: f32 = 8.0;
/// Smallest difference of two radii, in pixels, for a question about size.
const SIZE_GAP: f32 = 3.0;

/// What a question asks for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum QuestionKind {
    /// The colour of the only object of a shape.
    ColourOfShape,
    /// The shape of the only object of a colour.
    ShapeOfColour,
    /// Whether a colour occurs.
    ExistColour,
    /// Whether a shape occurs.
    ExistShape,
    /// Whether an object has both a colour and a shape.
    ExistColourShape,
    /// Whether a colour, a shape or a pair is absent.
    Negation,
    /// How many objects there are, in all or with an attribute.
    Count,
    /// The half of the canvas that an object lies in.
    Position,
    /// The colour of the only object.
    SingleColour,
    /// The shape of the only object.
    SingleShape,
    /// How two objects lie to each other.
    Relation,
    /// Which of two objects is bigger.
    Size,
    /// All objects from left to right.
    Caption,
    /// Whether all objects have one colour (demo domain only).
    EveryColour,
    /// Whether two objects share their colour (demo domain only).
    SharedColour,
    /// The side with fewer object pixels (demo domain only).
    EmptierSide,
}

impl QuestionKind {
    /// Every kind: those of pretraining first, then those of the demo domain.
    pub const ALL: [QuestionKind; 16] = [
        QuestionKind::ColourOfShape,
        QuestionKind::ShapeOfColour,
        QuestionKind::ExistColour,
        QuestionKind::ExistShape,
        QuestionKind::ExistColourShape,
        QuestionKind::Negation,
        QuestionKind::Count,
        QuestionKind::Position,
        QuestionKind::SingleColour,
        QuestionKind::SingleShape,
        QuestionKind::Relation,
        QuestionKind::Size,
        QuestionKind::Caption,
        QuestionKind::EveryColour,
        QuestionKind::SharedColour,
        QuestionKind::EmptierSide,
    ];

    /// A short name for reports.
    pub fn name(self) -> &'static str {
        match self {
            QuestionKind::ColourOfShape => "color of shape",
            QuestionKind::ShapeOfColour => "shape of color",
            QuestionKind::ExistColour => "color exists",
            QuestionKind::ExistShape => "shape exists",
            QuestionKind::ExistColourShape => "color and shape exist",
            QuestionKind::Negation => "negation",
            QuestionKind::Count => "count",
            QuestionKind::Position => "position",
            QuestionKind::SingleColour => "single color",
            QuestionKind::SingleShape => "single shape",
            QuestionKind::Relation => "relation",
            QuestionKind::Size => "size",
            QuestionKind::Caption => "caption",
            QuestionKind::EveryColour => "one color for all",
            QuestionKind::SharedColour => "shared color",
            QuestionKind::EmptierSide => "emptier side",
        }
    }
}

/// Kinds with their weights.
pub(super) type Mix = [(QuestionKind, f32)];

/// The mix of pretraining.
const PRETRAINING_MIX: &Mix = &[
    (QuestionKind::ColourOfShape, 3.0),
    (QuestionKind::ShapeOfColour, 3.0),
    (QuestionKind::ExistColour, 2.0),
    (QuestionKind::ExistShape, 2.0),
    (QuestionKind::ExistColourShape, 1.5),
    (QuestionKind::Negation, 2.5),
    (QuestionKind::Count, 2.0),
    (QuestionKind::Position, 2.5),
    (QuestionKind::SingleColour, 2.0),
    (QuestionKind::SingleShape, 2.0),
    (QuestionKind::Relation, 3.0),
    (QuestionKind::Size, 1.5),
    (QuestionKind::Caption, 3.0),
];

/// A question about a scene with its answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Qa {
    /// What the question asks for.
    pub kind: QuestionKind,
    /// Lower-case words with single blanks; "?" sticks to the last word.
    pub question: String,
    /// Lower-case words with single blanks.
    pub answer: String,
    /// The last colour or shape word of a yes/no question if the words up to
    /// it already decide the answer.
    pub early_word: Option<String>,
}

impl Qa {
    /// A question without an early word.
    pub(super) fn new(kind: QuestionKind, question: String, answer: impl Into<String>) -> Qa {
        Qa { kind, question, answer: answer.into(), early_word: None }
    }
}

/// Up to `count` different pretraining questions about a scene. Kinds are
/// drawn by weight among those that apply; yes and no are equally likely.
/// Fewer come back only if the scene allows no more.
pub fn questions<R: Rng>(scene: &Scene, rng: &mut R, count: usize) -> Vec<Qa> {
    draw(PRETRAINING_MIX, count, rng, |kind, truth, rng: &mut R| build(scene, kind, truth, rng))
}

/// Draws kinds by weight and collects what `build(kind, truth, rng)` makes of
/// them, without repeated questions; `truth` is the wanted yes/no answer.
pub(super) fn draw<R: Rng>(
    mix: &Mix,
    count: usize,
    rng: &mut R,
    build: impl Fn(QuestionKind, bool, &mut R) -> Option<Qa>,
) -> Vec<Qa> {
    let total: f32 = mix.iter().map(|(_, weight)| weight).sum();
    let mut asked: HashSet<String> = HashSet::new();
    let mut drawn = Vec::with_capacity(count);
    for _ in 0..count * 12 {
        if drawn.len() == count {
            break;
        }
        let mut left = rng.random::<f32>() * total;
        let chosen = mix.iter().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        let Some(&(kind, _)) = chosen else { continue };
        let truth = rng.random_bool(0.5);
        // Keeping the wish while repeating keeps yes and no balanced.
        for _ in 0..8 {
            match build(kind, truth, rng) {
                Some(qa) if asked.insert(qa.question.clone()) => {
                    drawn.push(qa);
                    break;
                }
                _ => {}
            }
        }
    }
    drawn
}

/// One question of a kind, `None` if the kind does not apply this time.
fn build<R: Rng>(scene: &Scene, kind: QuestionKind, truth: bool, rng: &mut R) -> Option<Qa> {
    match kind {
        QuestionKind::ColourOfShape => {
            let object = scene.unique_shape(rng)?;
            let form = pick(wording::COLOUR_OF_SHAPE, rng)?;
            let question = fill(form, &[("{s}", object.shape.word())]);
            Some(Qa::new(kind, question, object.colour.word()))
        }
        QuestionKind::ShapeOfColour => {
            let object = scene.unique_colour(rng)?;
            let form = pick(wording::SHAPE_OF_COLOUR, rng)?;
            let question = fill(form, &[("{c}", object.colour.word())]);
            Some(Qa::new(kind, question, object.shape.word()))
        }
        QuestionKind::ExistColour => {
            let word = scene.some_colour(truth, &Colour::ALL, rng)?.word();
            let (form, early) = pick(wording::EXIST_COLOUR, rng)?;
            let question = fill(form, &[("{c}", word)]);
            Some(truth_of(kind, question, truth, early.then_some(word)))
        }
        QuestionKind::ExistShape => {
            let word = scene.some_shape(truth, &Shape::ALL, rng)?.word();
            let (form, early) = pick(wording::EXIST_SHAPE, rng)?;
            let question = fill(form, &[("{p}", with_article(word).as_str())]);
            Some(truth_of(kind, question, truth, early.then_some(word)))
        }
        QuestionKind::ExistColourShape => {
            let (colour, shape) = scene.some_pair(truth, rng)?;
            let noun = format!("{} {}", colour.word(), shape.word());
            let (form, early) = pick(wording::EXIST_SHAPE, rng)?;
            let question = fill(form, &[("{p}", with_article(&noun).as_str())]);
            Some(truth_of(kind, question, truth, early.then_some(shape.word())))
        }
        QuestionKind::Negation => negation(scene, truth, rng),
        QuestionKind::Count => count(scene, rng),
        QuestionKind::Position => position(scene, rng),
        QuestionKind::SingleColour | QuestionKind::SingleShape => {
            let [object] = scene.objects.as_slice() else {
                return None;
            };
            let (forms, answer) = match kind {
                QuestionKind::SingleColour => (wording::SINGLE_COLOUR, object.colour.word()),
                _ => (wording::SINGLE_SHAPE, object.shape.word()),
            };
            Some(Qa::new(kind, pick(forms, rng)?.to_owned(), answer))
        }
        QuestionKind::Relation => relation(scene, truth, rng),
        QuestionKind::Size => size(scene, truth, rng),
        QuestionKind::Caption => {
            let form = pick(wording::CAPTION, rng)?;
            Some(Qa::new(kind, form.to_owned(), caption(scene)?))
        }
        QuestionKind::EveryColour | QuestionKind::SharedColour | QuestionKind::EmptierSide => None,
    }
}

/// A yes/no question.
fn truth_of(kind: QuestionKind, question: String, truth: bool, early: Option<&str>) -> Qa {
    Qa { early_word: early.map(str::to_owned), ..Qa::new(kind, question, yes_no(truth)) }
}

fn negation<R: Rng>(scene: &Scene, truth: bool, rng: &mut R) -> Option<Qa> {
    let seen = !truth;
    let (noun, word) = match rng.random_range(0..20) {
        0..9 => {
            let word = scene.some_shape(seen, &Shape::ALL, rng)?.word();
            (word.to_owned(), word)
        }
        9..15 => {
            let word = scene.some_colour(seen, &Colour::ALL, rng)?.word();
            (format!("{word} shape"), word)
        }
        _ => {
            let (colour, shape) = scene.some_pair(seen, rng)?;
            let word = shape.word();
            (format!("{} {word}", colour.word()), word)
        }
    };
    let (form, early) = pick(wording::NEGATION, rng)?;
    let question = fill(form, &[("{p}", with_article(&noun).as_str()), ("{n}", noun.as_str())]);
    let early = early.then_some(word);
    Some(truth_of(QuestionKind::Negation, question, truth, early))
}

fn count<R: Rng>(scene: &Scene, rng: &mut R) -> Option<Qa> {
    // A quarter of the attributes asked for is absent.
    let seen = rng.random_bool(0.75);
    let (question, number) = match rng.random_range(0..3) {
        0 => (pick(wording::COUNT_ALL, rng)?.to_owned(), scene.objects.len()),
        1 => {
            let colour = scene.some_colour(seen, &Colour::ALL, rng)?;
            let form = pick(wording::COUNT_COLOUR, rng)?;
            (fill(form, &[("{c}", colour.word())]), scene.count_colour(colour))
        }
        _ => {
            let shape = scene.some_shape(seen, &Shape::ALL, rng)?;
            let form = pick(wording::COUNT_SHAPE, rng)?;
            (fill(form, &[("{s}", shape.word())]), scene.count_shape(shape))
        }
    };
    let answer = *NUMBERS.get(number)?;
    Some(Qa::new(QuestionKind::Count, question, answer))
}

fn position<R: Rng>(scene: &Scene, rng: &mut R) -> Option<Qa> {
    let object = pick(&scene.objects, rng)?;
    let name = scene.refer(&object, rng)?;
    let (forms, answer) = if rng.random_bool(0.5) {
        (wording::POSITION_SIDE, scene.side(&object)?)
    } else {
        (wording::POSITION_HEIGHT, scene.height(&object)?)
    };
    let question = fill(pick(forms, rng)?, &[("{o}", name.as_str())]);
    Some(Qa::new(QuestionKind::Position, question, answer))
}

/// How far `a` lies from `b` in the direction of a relation (an index of
/// `RELATIONS`), in pixels; negative in the opposite direction.
fn lead(a: &Object, b: &Object, relation: usize) -> f32 {
    match relation {
        0 => b.cx - a.cx,
        1 => a.cx - b.cx,
        2 => b.cy - a.cy,
        _ => a.cy - b.cy,
    }
}

/// Two different random objects with the words that single them out.
fn two_objects<R: Rng>(scene: &Scene, rng: &mut R) -> Option<[(Object, String); 2]> {
    let number = scene.objects.len();
    if number < 2 {
        return None;
    }
    let first = rng.random_range(0..number);
    let second = (first + rng.random_range(1..number)) % number;
    let (a, b) = (scene.objects[first], scene.objects[second]);
    let (a_name, b_name) = (scene.refer(&a, rng)?, scene.refer(&b, rng)?);
    Some([(a, a_name), (b, b_name)])
}

fn relation<R: Rng>(scene: &Scene, truth: bool, rng: &mut R) -> Option<Qa> {
    let kind = QuestionKind::Relation;
    let [(a, a_name), (b, b_name)] = two_objects(scene, rng)?;
    let relation = rng.random_range(0..4usize);
    let lead_of_a = lead(&a, &b, relation);
    let names = |form: &str, relation: &str| {
        fill(form, &[("{a}", a_name.as_str()), ("{b}", b_name.as_str()), ("{r}", relation)])
    };
    match rng.random_range(0..20) {
        0..8 if lead_of_a >= RELATION_GAP => {
            let (forms, answer): (Forms, &str) = match relation {
                0 => (wording::RELATION_SIDE, "left"),
                1 => (wording::RELATION_SIDE, "right"),
                2 => (wording::RELATION_HEIGHT, "above"),
                _ => (wording::RELATION_HEIGHT, "below"),
            };
            Some(Qa::new(kind, names(pick(forms, rng)?, ""), answer))
        }
        8..15 if lead_of_a.abs() >= RELATION_GAP => {
            // The opposite relation is the next or the previous in the list.
            let holds = if lead_of_a > 0.0 { relation } else { relation ^ 1 };
            let asked = if truth { holds } else { holds ^ 1 };
            let form = pick(wording::RELATION_TRUTH, rng)?;
            let question = names(form, wording::RELATIONS[asked]);
            Some(truth_of(kind, question, truth, None))
        }
        15.. if lead_of_a >= RELATION_GAP => {
            let rivals = scene.objects.iter().filter(|other| lead(other, &b, relation) > 0.0).count();
            if rivals != 1 {
                return None;
            }
            let form = pick(wording::RELATION_OPEN, rng)?;
            let question = names(form, wording::RELATIONS[relation]);
            Some(Qa::new(kind, question, a.shape.word()))
        }
        _ => None,
    }
}

fn size<R: Rng>(scene: &Scene, truth: bool, rng: &mut R) -> Option<Qa> {
    let kind = QuestionKind::Size;
    let [(a, a_name), (b, b_name)] = two_objects(scene, rng)?;
    if (a.radius - b.radius).abs() < SIZE_GAP {
        return None;
    }
    let a_bigger = a.radius > b.radius;
    let fill_in = |form: &str| fill(form, &[("{a}", a_name.as_str()), ("{b}", b_name.as_str())]);
    if a.shape != b.shape && rng.random_bool(0.5) {
        let ask_bigger = rng.random_bool(0.5);
        let forms = if ask_bigger { wording::BIGGER_CHOICE } else { wording::SMALLER_CHOICE };
        let winner = if a_bigger == ask_bigger { a } else { b };
        let question = fill_in(pick(forms, rng)?);
        return Some(Qa::new(kind, question, winner.shape.word()));
    }
    let forms = if a_bigger == truth { wording::BIGGER_TRUTH } else { wording::SMALLER_TRUTH };
    Some(truth_of(kind, fill_in(pick(forms, rng)?), truth, None))
}

/// "a red star and a blue circle", from left to right.
fn caption(scene: &Scene) -> Option<String> {
    let mut objects: Vec<&Object> = scene.objects.iter().collect();
    objects.sort_by(|a, b| a.cx.total_cmp(&b.cx));
    let phrases: Vec<String> =
        objects.iter().map(|o| with_article(&format!("{} {}", o.colour.word(), o.shape.word()))).collect();
    (!phrases.is_empty()).then(|| phrases.join(" and "))
}

#[cfg(test)]
#[path = "questions_tests.rs"]
mod tests;
