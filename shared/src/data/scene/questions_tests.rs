//! Tests of the pretraining questions.

use std::collections::HashMap;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::super::layout::Style;
use super::super::object::Variant;
use super::super::wording::{answer_words, vocabulary};
use super::*;

fn corpus(scenes: usize, per_scene: usize) -> Vec<(Scene, Vec<Qa>)> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    (0..scenes)
        .map(|_| {
            let scene = Scene::random(&mut rng, Style::Pretraining, 1..=4);
            let asked = questions(&scene, &mut rng, per_scene);
            (scene, asked)
        })
        .collect()
}

fn object(shape: Shape, colour: Colour, cx: f32, cy: f32, radius: f32) -> Object {
    Object { shape, colour, rgb: [0; 3], cx, cy, radius, variant: Variant::Plain }
}

/// A small red star at the upper left and a large blue ring at the lower right.
fn two() -> Scene {
    Scene {
        objects: vec![
            object(Shape::Ring, Colour::Blue, 48.0, 44.0, 12.0),
            object(Shape::Star, Colour::Red, 14.0, 12.0, 7.0),
        ],
        background: [250; 3],
        size: 64,
    }
}

#[test]
fn all_words_are_in_the_vocabulary() {
    let (words, answers) = (vocabulary(), answer_words());
    for (_, asked) in corpus(400, 12) {
        for qa in asked {
            assert!(qa.question.ends_with('?'));
            let body = qa.question.trim_end_matches('?');
            assert!(body.split(' ').all(|word| words.contains(&word)), "{body}");
            assert!(qa.answer.split(' ').all(|word| answers.contains(&word)));
        }
    }
}

#[test]
fn no_question_of_the_evaluation_set_occurs() {
    let shapes: HashSet<&str> = Shape::ALL.iter().map(|s| s.word()).collect();
    let colours: HashSet<&str> = Colour::ALL.iter().map(|c| c.word()).collect();
    let barred = [
        "what is the X shape?",
        "what color is the shape?",
        "what color is the X?",
        "what is the color of the X?",
        "is there a X shape?",
        "is there a X?",
    ];
    for (_, asked) in corpus(300, 12) {
        for qa in asked {
            let body = qa.question.trim_end_matches('?');
            let masked: Vec<&str> =
                body.split(' ').map(|w| if shapes.contains(w) || colours.contains(w) { "X" } else { w }).collect();
            let masked = format!("{}?", masked.join(" "));
            assert!(!barred.contains(&masked.as_str()), "{masked}");
        }
    }
}

#[test]
fn every_scene_gets_its_number_of_different_questions() {
    for (scene, asked) in corpus(300, 10) {
        assert_eq!(asked.len(), 10, "{scene:?}");
        let different: HashSet<&str> = asked.iter().map(|qa| qa.question.as_str()).collect();
        assert_eq!(different.len(), asked.len());
    }
    let empty = Scene { objects: Vec::new(), background: [255; 3], size: 64 };
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let asked = questions(&empty, &mut rng, 3);
    assert!(asked.len() <= 3);
}

#[test]
fn yes_and_no_are_balanced_in_every_kind() {
    let mut tally: HashMap<QuestionKind, (usize, usize)> = HashMap::new();
    for (_, asked) in corpus(3000, 10) {
        for qa in asked {
            let (yes, all) = tally.entry(qa.kind).or_default();
            if qa.answer == "yes" || qa.answer == "no" {
                *yes += usize::from(qa.answer == "yes");
                *all += 1;
            }
        }
    }
    for kind in PRETRAINING_MIX.iter().map(|(kind, _)| kind) {
        let (yes, all) = tally[kind];
        if all > 300 {
            let share = yes as f32 / all as f32;
            assert!((0.44..0.56).contains(&share), "{kind:?}: {share}");
        }
    }
}

#[test]
fn early_words_are_the_last_attribute_words() {
    let tail = ["shape", "be", "seen", "is", "visible", "can"];
    let mut early = 0;
    for (_, asked) in corpus(300, 12) {
        for qa in asked {
            let Some(word) = qa.early_word else { continue };
            early += 1;
            assert!(qa.answer == "yes" || qa.answer == "no");
            let body = qa.question.trim_end_matches('?');
            let after = body.split(' ').rev().take_while(|other| *other != word);
            assert!(after.clone().all(|other| tail.contains(&other)), "{body}");
            assert!(after.count() < body.split(' ').count());
        }
    }
    assert!(early > 300);
}

#[test]
fn answers_about_a_known_scene_are_right() {
    let expected: HashMap<&str, &str> = HashMap::from([
        ("which color does the star have?", "red"),
        ("which shape is blue?", "ring"),
        ("do you see a star?", "yes"),
        ("does the scene lack a blue ring?", "no"),
        ("how many shapes do you see?", "two"),
        ("on which side is the star?", "left"),
        ("at which height is the ring?", "bottom"),
        ("is the star left or right of the ring?", "left"),
        ("is the ring above or below the star?", "below"),
        ("is the ring left of the star?", "no"),
        ("is the star above the ring?", "yes"),
        ("which shape is right of the star?", "ring"),
        ("which is bigger the star or the ring?", "ring"),
        ("is the star smaller than the ring?", "yes"),
        ("describe the scene?", "a red star and a blue ring"),
    ]);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut met: HashSet<&str> = HashSet::new();
    let scene = two();
    for _ in 0..2000 {
        for qa in questions(&scene, &mut rng, 12) {
            if let Some((question, answer)) = expected.get_key_value(qa.question.as_str()) {
                assert_eq!(qa.answer, *answer, "{question}");
                met.insert(question);
            }
        }
    }
    assert_eq!(met.len(), expected.len(), "{met:?}");
}

#[test]
fn kinds_have_different_names() {
    let names: HashSet<&str> = QuestionKind::ALL.iter().map(|kind| kind.name()).collect();
    assert_eq!(names.len(), QuestionKind::ALL.len());
}
