//! The style of a domain and random, non-overlapping scenes in it.

use std::ops::RangeInclusive;

use rand::Rng;

use super::facts::pick;
use super::object::{Object, PRETRAINING_PALETTE, Shape, Swatch, Variant};
use super::theme::DemoTheme;

/// Side of the square canvas, in pixels.
pub const CANVAS: usize = 64;

/// Smallest radius that a crowded scene may shrink an object to, in pixels.
const SMALLEST_RADIUS: f32 = 4.0;
/// Largest radius in scenes with three or more objects, in pixels.
const CROWDED_RADIUS: f32 = 11.0;
/// Gap between two objects, in pixels.
const GAP: f32 = 2.5;
/// Gap between an object and the border of the canvas, in pixels.
const BORDER: f32 = 1.0;

/// The domain that a scene belongs to: palette, sizes, background.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Style {
    /// The domain of the pretraining corpus.
    Pretraining,
    /// The shifted domain of one demo theme.
    Demo(DemoTheme),
}

impl Style {
    /// The colours that occur, with their RGB ranges.
    pub fn swatches(self) -> &'static [Swatch] {
        match self {
            Style::Pretraining => &PRETRAINING_PALETTE,
            Style::Demo(theme) => theme.swatches(),
        }
    }

    /// The shapes that occur.
    pub fn shapes(self) -> &'static [Shape] {
        match self {
            Style::Pretraining => &Shape::ALL,
            Style::Demo(theme) => theme.shapes(),
        }
    }

    /// Lowest and highest radius, in pixels.
    fn radii(self) -> (f32, f32) {
        match self {
            Style::Pretraining => (SMALLEST_RADIUS, 14.0),
            Style::Demo(theme) => theme.radii(),
        }
    }

    /// Range of the aspect ratio (long to short side) of rectangles.
    fn aspects(self) -> (f32, f32) {
        match self {
            Style::Pretraining => (1.6, 2.6),
            Style::Demo(theme) => theme.aspects(),
        }
    }

    /// One background colour.
    fn background<R: Rng>(self, rng: &mut R) -> [u8; 3] {
        let (low, high) = match self {
            Style::Pretraining if rng.random_bool(0.6) => ([225; 3], [255; 3]),
            Style::Pretraining => ([180; 3], [255; 3]),
            Style::Demo(theme) => theme.background(),
        };
        let mut rgb = low;
        for (channel, value) in rgb.iter_mut().enumerate() {
            *value = rng.random_range(low[channel]..=high[channel]);
        }
        rgb
    }

    /// Whether objects of the next scene may share their colour, their shape.
    fn sharing<R: Rng>(self, rng: &mut R) -> (bool, bool) {
        let roll: f32 = rng.random();
        let (colour, shape) = match self {
            Style::Pretraining => (0.2, 0.2),
            Style::Demo(_) => (0.45, 0.15),
        };
        if roll < colour {
            (true, false)
        } else if roll < colour + shape {
            (false, true)
        } else {
            let both = roll > 0.93;
            (both, both)
        }
    }
}

/// A picture before drawing: objects on a plain background.
#[derive(Clone, PartialEq, Debug)]
pub struct Scene {
    /// The objects, in no special order; they do not overlap.
    pub objects: Vec<Object>,
    /// Background colour before noise.
    pub background: [u8; 3],
    /// Side of the square canvas, in pixels.
    pub size: usize,
}

impl Scene {
    /// A random 64x64 scene; the number of objects is uniform in `objects`
    /// (in the rare case that they do not fit, fewer are placed).
    pub fn random<R: Rng>(rng: &mut R, style: Style, objects: RangeInclusive<usize>) -> Scene {
        let wanted = rng.random_range(objects);
        let attributes = attributes(style, wanted, rng);
        let mut placed = Vec::new();
        for _ in 0..12 {
            placed = place(style, &attributes, rng);
            if placed.len() == wanted {
                break;
            }
        }
        Scene { objects: placed, background: style.background(rng), size: CANVAS }
    }
}

/// Shapes and swatches for `count` objects: mostly all different, sometimes
/// with a shared colour, a shared shape, or both.
fn attributes<R: Rng>(style: Style, count: usize, rng: &mut R) -> Vec<(Shape, Swatch)> {
    let (share_colour, share_shape) = style.sharing(rng);
    let mut chosen: Vec<(Shape, Swatch)> = Vec::with_capacity(count);
    for _ in 0..count {
        let previous = pick(&chosen, rng);
        let free_shapes: Vec<Shape> =
            style.shapes().iter().copied().filter(|shape| chosen.iter().all(|(other, _)| other != shape)).collect();
        let free_swatches: Vec<Swatch> =
            style.swatches().iter().copied().filter(|swatch| chosen.iter().all(|(_, other)| other != swatch)).collect();
        let repeat_shape = share_shape && rng.random_bool(0.65);
        let repeat_colour = share_colour && rng.random_bool(0.65);
        let shape = match previous {
            Some((shape, _)) if repeat_shape => Some(shape),
            _ => pick(&free_shapes, rng).or_else(|| pick(style.shapes(), rng)),
        };
        let swatch = match previous {
            Some((_, swatch)) if repeat_colour => Some(swatch),
            _ => pick(&free_swatches, rng).or_else(|| pick(style.swatches(), rng)),
        };
        if let (Some(shape), Some(swatch)) = (shape, swatch) {
            chosen.push((shape, swatch));
        }
    }
    chosen
}

/// Places objects with the given attributes; stops at the first that finds no
/// room.
fn place<R: Rng>(style: Style, attributes: &[(Shape, Swatch)], rng: &mut R) -> Vec<Object> {
    let (low, mut high) = style.radii();
    if attributes.len() >= 3 {
        high = high.min(CROWDED_RADIUS);
    }
    let mut placed: Vec<Object> = Vec::with_capacity(attributes.len());
    for &(shape, swatch) in attributes {
        let mut object = Object {
            shape,
            colour: swatch.colour,
            rgb: swatch.sample(rng),
            cx: 0.0,
            cy: 0.0,
            radius: rng.random_range(low..=high),
            variant: variant(style, shape, rng),
        };
        let mut fits = false;
        for attempt in 0..60 {
            if attempt % 12 == 11 {
                object.radius = (object.radius * 0.85).max(low.max(SMALLEST_RADIUS));
            }
            let margin = object.reach() + BORDER;
            object.cx = rng.random_range(margin..=CANVAS as f32 - margin);
            object.cy = rng.random_range(margin..=CANVAS as f32 - margin);
            fits = placed.iter().all(|other| {
                let distance = (object.cx - other.cx).hypot(object.cy - other.cy);
                distance > object.reach() + other.reach() + GAP
            });
            if fits {
                break;
            }
        }
        if !fits {
            break;
        }
        placed.push(object);
    }
    placed
}

/// The variant of a shape in this style.
fn variant<R: Rng>(style: Style, shape: Shape, rng: &mut R) -> Variant {
    let (low, high) = match shape {
        Shape::Rectangle => style.aspects(),
        Shape::Square => (1.0, 1.1),
        Shape::Triangle if rng.random_bool(0.25) => return Variant::Flipped,
        _ => return Variant::Plain,
    };
    let aspect = rng.random_range(low..=high);
    if rng.random_bool(0.5) { Variant::Wide(aspect) } else { Variant::Tall(aspect) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn styles() -> Vec<Style> {
        let mut styles = vec![Style::Pretraining];
        styles.extend(DemoTheme::ALL.map(Style::Demo));
        styles
    }

    #[test]
    fn objects_neither_overlap_nor_leave_the_canvas() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        for style in styles() {
            for _ in 0..200 {
                let scene = Scene::random(&mut rng, style, 1..=4);
                for (index, object) in scene.objects.iter().enumerate() {
                    assert!((4.0..=14.0).contains(&object.radius));
                    assert!(object.cx - object.radius >= 0.0);
                    assert!(object.cx + object.radius <= CANVAS as f32);
                    assert!(object.cy - object.radius >= 0.0);
                    assert!(object.cy + object.radius <= CANVAS as f32);
                    for other in &scene.objects[index + 1..] {
                        let distance = (object.cx - other.cx).hypot(object.cy - other.cy);
                        assert!(distance > object.reach() + other.reach());
                    }
                }
            }
        }
    }

    #[test]
    fn nearly_all_scenes_have_the_wanted_number() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let full = (0..300)
            .filter(|_| {
                let scene = Scene::random(&mut rng, Style::Pretraining, 4..=4);
                scene.objects.len() == 4
            })
            .count();
        assert!(full >= 295, "{full}");
    }

    #[test]
    fn attributes_are_mostly_distinguishing() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let distinct = (0..400)
            .filter(|_| {
                let scene = Scene::random(&mut rng, Style::Pretraining, 3..=3);
                scene.objects.iter().enumerate().all(|(index, object)| {
                    scene.objects[index + 1..]
                        .iter()
                        .all(|other| other.shape != object.shape && other.colour != object.colour)
                })
            })
            .count();
        assert!((180..360).contains(&distinct), "{distinct}");
    }

    #[test]
    fn an_empty_scene_is_possible() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let scene = Scene::random(&mut rng, Style::Pretraining, 0..=0);
        assert!(scene.objects.is_empty());
        assert_eq!(scene.size, CANVAS);
    }
}
