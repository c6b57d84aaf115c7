//! Questions and shards of the demo domain.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::facts::{NUMBERS, fill, pick, with_article, yes_no};
use super::layout::{Scene, Style};
use super::object::Colour;
use super::questions::{Qa, QuestionKind, draw};
use super::theme::DemoTheme;
use crate::data::picture::Picture;

/// Up to `count` different questions about a scene in the wording of a theme.
/// Every answer is a word that occurs as an answer in pretraining.
pub fn demo_questions<R: Rng>(scene: &Scene, theme: DemoTheme, rng: &mut R, count: usize) -> Vec<Qa> {
    let mix = theme.dialect().mix;
    draw(mix, count, rng, |kind, truth, rng: &mut R| build(scene, theme, kind, truth, rng))
}

/// A shard of a participant: pictures with 1 to 3 objects, each with up to
/// `questions_per_picture` questions. Equal arguments give equal shards.
pub fn demo_shard(
    theme: DemoTheme,
    seed: u64,
    pictures: usize,
    questions_per_picture: usize,
) -> Vec<(Picture, Vec<Qa>)> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(theme as u64);
    (0..pictures)
        .map(|_| {
            let scene = Scene::random(&mut rng, Style::Demo(theme), 1..=3);
            let picture = scene.render(&mut rng);
            let asked = demo_questions(&scene, theme, &mut rng, questions_per_picture);
            (picture, asked)
        })
        .collect()
}

/// One question of a kind, `None` if the kind does not apply this time.
fn build<R: Rng>(scene: &Scene, theme: DemoTheme, kind: QuestionKind, truth: bool, rng: &mut R) -> Option<Qa> {
    let dialect = theme.dialect();
    let colours: Vec<Colour> = theme.swatches().iter().map(|s| s.colour).collect();
    let (forms, slot, word, answer) = match kind {
        QuestionKind::ColourOfShape => {
            let object = scene.unique_shape(rng)?;
            let (shape, colour) = (object.shape.word(), object.colour.word());
            (dialect.colour_of_shape, "{s}", shape.to_owned(), colour)
        }
        QuestionKind::ShapeOfColour => {
            let object = scene.unique_colour(rng)?;
            let (shape, colour) = (object.shape.word(), object.colour.word());
            (dialect.shape_of_colour, "{c}", colour.to_owned(), shape)
        }
        QuestionKind::ExistColour => {
            let colour = scene.some_colour(truth, &colours, rng)?.word();
            (dialect.exist_colour, "{c}", colour.to_owned(), yes_no(truth))
        }
        QuestionKind::ExistShape => {
            let shape = scene.some_shape(truth, theme.shapes(), rng)?.word();
            (dialect.exist_shape, "{p}", with_article(shape), yes_no(truth))
        }
        QuestionKind::Negation if rng.random_bool(0.5) => {
            let colour = scene.some_colour(!truth, &colours, rng)?.word();
            (dialect.lack_colour, "{c}", colour.to_owned(), yes_no(truth))
        }
        QuestionKind::Negation => {
            let shape = scene.some_shape(!truth, theme.shapes(), rng)?.word();
            (dialect.lack_shape, "{p}", with_article(shape), yes_no(truth))
        }
        QuestionKind::Count if rng.random_bool(0.3) => {
            let number = *NUMBERS.get(scene.objects.len())?;
            (dialect.count_all, "", String::new(), number)
        }
        QuestionKind::Count => {
            let colour = scene.some_colour(rng.random_bool(0.75), &colours, rng)?;
            let number = *NUMBERS.get(scene.count_colour(colour))?;
            (dialect.count_colour, "{c}", colour.word().to_owned(), number)
        }
        QuestionKind::Position => {
            let object = scene.unique_shape(rng)?;
            let (forms, answer) = if rng.random_bool(0.5) {
                (dialect.side, scene.side(&object)?)
            } else {
                (dialect.height, scene.height(&object)?)
            };
            (forms, "{s}", object.shape.word().to_owned(), answer)
        }
        QuestionKind::EveryColour => {
            let (colour, all) = every_colour(scene, &colours, rng)?;
            let word = colour.word().to_owned();
            (dialect.every_colour, "{c}", word, yes_no(all))
        }
        QuestionKind::SharedColour => {
            let [a, b] = scene.objects.as_slice() else {
                return None;
            };
            let shared = yes_no(a.colour == b.colour);
            (dialect.shared_colour, "", String::new(), shared)
        }
        QuestionKind::EmptierSide => {
            let side = scene.emptier_side()?;
            (dialect.emptier_side, "", String::new(), side)
        }
        QuestionKind::ExistColourShape
        | QuestionKind::SingleColour
        | QuestionKind::SingleShape
        | QuestionKind::Relation
        | QuestionKind::Size
        | QuestionKind::Caption => return None,
    };
    let form = pick(forms, rng)?;
    let question = if slot.is_empty() { form.to_owned() } else { fill(form, &[(slot, word.as_str())]) };
    Some(Qa::new(kind, question, answer))
}

/// A colour and whether all objects have it. The colour is one that occurs,
/// except that in scenes of one colour it is sometimes another one.
fn every_colour<R: Rng>(scene: &Scene, colours: &[Colour], rng: &mut R) -> Option<(Colour, bool)> {
    let first = scene.objects.first()?.colour;
    let uniform = scene.count_colour(first) == scene.objects.len();
    let seen = !uniform || rng.random_bool(0.8);
    let colour = scene.some_colour(seen, colours, rng)?;
    Some((colour, uniform && seen))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::object::Shape;
    use super::super::theme::demo_vocabulary;
    use super::super::wording::answer_words;
    use super::*;

    #[test]
    fn shards_are_deterministic_and_differ() {
        let shard = demo_shard(DemoTheme::Garden, 7, 4, 5);
        assert_eq!(shard, demo_shard(DemoTheme::Garden, 7, 4, 5));
        assert_ne!(shard, demo_shard(DemoTheme::Garden, 8, 4, 5));
        assert_ne!(shard, demo_shard(DemoTheme::Harbour, 7, 4, 5));
        assert_eq!(shard.len(), 4);
    }

    #[test]
    fn answers_and_words_are_known() {
        let answers = answer_words();
        let mut words: HashSet<&str> = demo_vocabulary().into_iter().collect();
        words.extend(["a", "an"]);
        words.extend(Shape::ALL.map(Shape::word));
        words.extend(Colour::ALL.map(Colour::word));
        for theme in DemoTheme::ALL {
            for (_, asked) in demo_shard(theme, 1, 150, 6) {
                assert!(asked.len() >= 4, "{theme:?}");
                let different: HashSet<&str> = asked.iter().map(|qa| qa.question.as_str()).collect();
                assert_eq!(different.len(), asked.len());
                for qa in &asked {
                    assert!(answers.contains(&qa.answer.as_str()), "{}", qa.answer);
                    let body = qa.question.trim_end_matches('?');
                    assert_ne!(body, qa.question);
                    assert!(body.split(' ').all(|word| words.contains(word)), "{body}");
                }
            }
        }
    }

    #[test]
    fn every_kind_of_a_mix_is_drawn_and_yes_no_is_balanced() {
        for theme in DemoTheme::ALL {
            let mut kinds = HashSet::new();
            let (mut yes, mut no) = (0usize, 0usize);
            for (_, asked) in demo_shard(theme, 2, 400, 6) {
                for qa in asked {
                    kinds.insert(qa.kind);
                    yes += usize::from(qa.answer == "yes");
                    no += usize::from(qa.answer == "no");
                }
            }
            for (kind, _) in theme.dialect().mix {
                assert!(kinds.contains(kind), "{theme:?} lacks {kind:?}");
            }
            let share = yes as f32 / (yes + no) as f32;
            assert!((0.4..0.6).contains(&share), "{theme:?}: {share}");
        }
    }

    #[test]
    fn colour_for_all_is_judged_rightly() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let theme = DemoTheme::Workshop;
        let colours: Vec<Colour> = theme.swatches().iter().map(|s| s.colour).collect();
        for _ in 0..200 {
            let scene = Scene::random(&mut rng, Style::Demo(theme), 1..=3);
            if let Some((colour, all)) = every_colour(&scene, &colours, &mut rng) {
                let same = scene.objects.iter().all(|o| o.colour == colour);
                assert_eq!(same, all);
            }
        }
    }
}
