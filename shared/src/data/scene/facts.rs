//! What is true of a scene: the common ground of every question generator.

use rand::Rng;
use rand::seq::IndexedRandom;

use super::layout::Scene;
use super::object::{Colour, Object, Shape};

/// Number words for counts; larger counts are not asked for.
pub(super) const NUMBERS: [&str; 5] = ["zero", "one", "two", "three", "four"];

/// Smallest distance of a centre from the middle line, in pixels, for a
/// question about its position.
const OFF_MIDDLE: f32 = 5.0;

/// A random item, `None` of an empty slice.
pub(super) fn pick<T: Copy, R: Rng>(items: &[T], rng: &mut R) -> Option<T> {
    items.choose(rng).copied()
}

/// "yes" or "no".
pub(super) fn yes_no(truth: bool) -> &'static str {
    if truth { "yes" } else { "no" }
}

/// A noun with its indefinite article.
pub(super) fn with_article(noun: &str) -> String {
    let article = if noun.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
    format!("{article} {noun}")
}

/// A template with every slot (such as `{s}`) replaced.
pub(super) fn fill(template: &str, slots: &[(&str, &str)]) -> String {
    slots.iter().fold(template.to_owned(), |text, (slot, word)| text.replace(*slot, word))
}

impl Scene {
    /// How many objects have this colour.
    pub(super) fn count_colour(&self, colour: Colour) -> usize {
        self.objects.iter().filter(|o| o.colour == colour).count()
    }

    /// How many objects have this shape.
    pub(super) fn count_shape(&self, shape: Shape) -> usize {
        self.objects.iter().filter(|o| o.shape == shape).count()
    }

    /// How many objects have both this colour and this shape.
    pub(super) fn count_pair(&self, colour: Colour, shape: Shape) -> usize {
        self.objects.iter().filter(|o| o.colour == colour && o.shape == shape).count()
    }

    /// A random object whose shape no other object has.
    pub(super) fn unique_shape<R: Rng>(&self, rng: &mut R) -> Option<Object> {
        let unique: Vec<Object> = self.objects.iter().copied().filter(|o| self.count_shape(o.shape) == 1).collect();
        pick(&unique, rng)
    }

    /// A random object whose colour no other object has.
    pub(super) fn unique_colour<R: Rng>(&self, rng: &mut R) -> Option<Object> {
        let unique: Vec<Object> = self.objects.iter().copied().filter(|o| self.count_colour(o.colour) == 1).collect();
        pick(&unique, rng)
    }

    /// A colour that occurs (`seen`), or one of `colours` that does not.
    pub(super) fn some_colour<R: Rng>(&self, seen: bool, colours: &[Colour], rng: &mut R) -> Option<Colour> {
        if seen {
            return pick(&self.objects, rng).map(|o| o.colour);
        }
        let absent: Vec<Colour> = colours.iter().copied().filter(|&colour| self.count_colour(colour) == 0).collect();
        pick(&absent, rng)
    }

    /// A shape that occurs (`seen`), or one of `shapes` that does not.
    pub(super) fn some_shape<R: Rng>(&self, seen: bool, shapes: &[Shape], rng: &mut R) -> Option<Shape> {
        if seen {
            return pick(&self.objects, rng).map(|o| o.shape);
        }
        let absent: Vec<Shape> = shapes.iter().copied().filter(|&shape| self.count_shape(shape) == 0).collect();
        pick(&absent, rng)
    }

    /// A colour-shape pair that occurs (`seen`) or does not. Half of the
    /// absent pairs share one attribute with an object, the others none.
    pub(super) fn some_pair<R: Rng>(&self, seen: bool, rng: &mut R) -> Option<(Colour, Shape)> {
        let object = pick(&self.objects, rng)?;
        if seen {
            return Some((object.colour, object.shape));
        }
        let share = rng.random_bool(0.5);
        let share_colour = rng.random_bool(0.5);
        if !share {
            let colour = self.some_colour(false, &Colour::ALL, rng)?;
            return Some((colour, self.some_shape(false, &Shape::ALL, rng)?));
        }
        for _ in 0..12 {
            let (colour, shape) = if share_colour {
                (object.colour, pick(&Shape::ALL, rng)?)
            } else {
                (pick(&Colour::ALL, rng)?, object.shape)
            };
            if self.count_pair(colour, shape) == 0 {
                return Some((colour, shape));
            }
        }
        None
    }

    /// Words that single out an object ("star" or "red star"), `None` if
    /// another object has the same colour and shape.
    pub(super) fn refer<R: Rng>(&self, object: &Object, rng: &mut R) -> Option<String> {
        if self.count_shape(object.shape) == 1 && rng.random_bool(0.5) {
            return Some(object.shape.word().to_owned());
        }
        (self.count_pair(object.colour, object.shape) == 1)
            .then(|| format!("{} {}", object.colour.word(), object.shape.word()))
    }

    /// "left" or "right" half of the object, `None` near the middle.
    pub(super) fn side(&self, object: &Object) -> Option<&'static str> {
        let offset = object.cx - self.size as f32 / 2.0;
        (offset.abs() >= OFF_MIDDLE).then_some(if offset < 0.0 { "left" } else { "right" })
    }

    /// "top" or "bottom" half of the object, `None` near the middle.
    pub(super) fn height(&self, object: &Object) -> Option<&'static str> {
        let offset = object.cy - self.size as f32 / 2.0;
        (offset.abs() >= OFF_MIDDLE).then_some(if offset < 0.0 { "top" } else { "bottom" })
    }

    /// The side with clearly fewer object pixels, if there is one: the
    /// difference has to be 30 % of all object pixels.
    pub(super) fn emptier_side(&self) -> Option<&'static str> {
        let (mut left, mut right) = (0usize, 0usize);
        for (pixel, owner) in self.owners().into_iter().enumerate() {
            match owner {
                Some(_) if pixel % self.size < self.size / 2 => left += 1,
                Some(_) => right += 1,
                None => {}
            }
        }
        let clear = left.abs_diff(right) * 10 >= (left + right) * 3;
        (clear && left != right).then_some(if left < right { "left" } else { "right" })
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::Style;
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn chosen_attributes_are_seen_or_absent_as_asked() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for round in 0..300 {
            let seen = round % 2 == 0;
            let scene = Scene::random(&mut rng, Style::Pretraining, 1..=4);
            if let Some(colour) = scene.some_colour(seen, &Colour::ALL, &mut rng) {
                assert_eq!(scene.count_colour(colour) > 0, seen);
            }
            if let Some(shape) = scene.some_shape(seen, &Shape::ALL, &mut rng) {
                assert_eq!(scene.count_shape(shape) > 0, seen);
            }
            if let Some((colour, shape)) = scene.some_pair(seen, &mut rng) {
                assert_eq!(scene.count_pair(colour, shape) > 0, seen);
            }
        }
    }

    #[test]
    fn the_emptier_side_is_opposite_to_a_lone_object() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for _ in 0..100 {
            let scene = Scene::random(&mut rng, Style::Pretraining, 1..=1);
            let object = scene.objects[0];
            if object.cx + object.reach() < 32.0 {
                assert_eq!(scene.emptier_side(), Some("right"));
            } else if object.cx - object.reach() > 32.0 {
                assert_eq!(scene.emptier_side(), Some("left"));
            }
        }
    }

    #[test]
    fn templates_and_articles() {
        assert_eq!(fill("is {p} here?", &[("{p}", "a star")]), "is a star here?");
        assert_eq!(with_article("orange star"), "an orange star");
        assert_eq!(with_article("red star"), "a red star");
    }
}
