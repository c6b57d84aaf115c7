//! Anti-aliased drawing from signed distances, and labels per patch.

use std::f32::consts::PI;

use rand::Rng;

use super::layout::Scene;
use super::object::{Colour, Object, Shape, Variant};
use crate::data::picture::Picture;

/// Standard deviation of the pixel noise, in steps of 1/255.
const NOISE_SIGMA: f32 = 2.0;
/// Share of the pixels of a patch above which its main object labels it.
const LABEL_SHARE: f32 = 0.04;

/// What a square patch of the picture shows.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PatchLabel {
    /// Shape of the object that covers most of the patch, if it covers more
    /// than 4 % of its pixels.
    pub shape: Option<Shape>,
    /// Colour of that object.
    pub colour: Option<Colour>,
    /// Its radius in pixels, 0 without an object.
    pub radius: f32,
    /// Whether the centre of any object lies in the patch.
    pub centre: bool,
}

impl Scene {
    /// Draws the scene with Gaussian pixel noise (sigma about 2 of 255).
    pub fn render<R: Rng>(&self, rng: &mut R) -> Picture {
        let mut values: Vec<f32> =
            self.background.iter().map(|&channel| f32::from(channel)).cycle().take(self.size * self.size * 3).collect();
        for object in &self.objects {
            let rgb = object.rgb.map(f32::from);
            visit_pixels(object, self.size, |pixel, coverage| {
                for (channel, colour) in rgb.iter().enumerate() {
                    let value = &mut values[pixel * 3 + channel];
                    *value += coverage * (colour - *value);
                }
            });
        }
        add_noise(&mut values, rng);
        Picture {
            width: self.size,
            height: self.size,
            rgb: values.iter().map(|value| value.round().clamp(0.0, 255.0) as u8).collect(),
        }
    }

    /// Labels of the `(size / patch)^2` patches of `patch` x `patch` pixels,
    /// row by row.
    pub fn patch_labels(&self, patch: usize) -> Vec<PatchLabel> {
        let side = self.size / patch;
        let mut covered = vec![0usize; side * side * self.objects.len()];
        for (pixel, owner) in self.owners().into_iter().enumerate() {
            let (row, column) = (pixel / self.size / patch, pixel % self.size / patch);
            if let Some(index) = owner
                && row < side
                && column < side
            {
                covered[(row * side + column) * self.objects.len() + index] += 1;
            }
        }
        let threshold = LABEL_SHARE * (patch * patch) as f32;
        (0..side * side)
            .map(|cell| {
                let first = cell * self.objects.len();
                let main = covered[first..first + self.objects.len()]
                    .iter()
                    .zip(&self.objects)
                    .max_by_key(|(count, _)| **count)
                    .filter(|(count, _)| **count as f32 > threshold)
                    .map(|(_, object)| object);
                PatchLabel {
                    shape: main.map(|object| object.shape),
                    colour: main.map(|object| object.colour),
                    radius: main.map_or(0.0, |object| object.radius),
                    centre: self.objects.iter().any(|object| {
                        let column = object.cx as usize / patch;
                        let row = object.cy as usize / patch;
                        row * side + column == cell && column < side
                    }),
                }
            })
            .collect()
    }

    /// Index of the object that covers at least half of each pixel, row by
    /// row.
    pub(super) fn owners(&self) -> Vec<Option<usize>> {
        let mut owners = vec![None; self.size * self.size];
        for (index, object) in self.objects.iter().enumerate() {
            visit_pixels(object, self.size, |pixel, coverage| {
                if coverage >= 0.5 {
                    owners[pixel] = Some(index);
                }
            });
        }
        owners
    }
}

/// Adds noise with an approximately normal distribution: the sum of four
/// uniform bytes, which is far cheaper than an exact normal.
fn add_noise<R: Rng>(values: &mut [f32], rng: &mut R) {
    const MEAN: f32 = 4.0 * 127.5;
    const DEVIATION: f32 = 147.8;
    for pair in values.chunks_mut(2) {
        let bytes = rng.random::<u64>().to_le_bytes();
        for (value, quad) in pair.iter_mut().zip(bytes.chunks(4)) {
            let sum: u16 = quad.iter().map(|&byte| u16::from(byte)).sum();
            *value += (f32::from(sum) - MEAN) * (NOISE_SIGMA / DEVIATION);
        }
    }
}

/// Calls `visit(pixel index, coverage)` for every pixel that the object
/// covers at least in part; coverage is in `0..=1`.
fn visit_pixels(object: &Object, size: usize, mut visit: impl FnMut(usize, f32)) {
    let outline = Outline::new(object);
    let reach = object.reach() + 1.0;
    let clip = |position: f32| position.clamp(0.0, size as f32) as usize;
    let (left, right) = (clip(object.cx - reach), clip((object.cx + reach).ceil()));
    let (top, bottom) = (clip(object.cy - reach), clip((object.cy + reach).ceil()));
    for row in top..bottom {
        for column in left..right {
            let x = column as f32 + 0.5 - object.cx;
            let y = row as f32 + 0.5 - object.cy;
            let coverage = (0.5 - outline.distance(x, y)).clamp(0.0, 1.0);
            if coverage > 0.0 {
                visit(row * size + column, coverage);
            }
        }
    }
}

/// The geometry of an object relative to its centre, in pixels.
enum Outline {
    Disc(f32),
    Box(f32, f32),
    /// Half length and half thickness of the arms.
    Cross(f32, f32),
    /// Outer and inner radius.
    Ring(f32, f32),
    Polygon(Vec<[f32; 2]>),
}

impl Outline {
    fn new(object: &Object) -> Outline {
        let radius = object.radius;
        match object.shape {
            Shape::Circle => Outline::Disc(radius),
            Shape::Square | Shape::Rectangle => {
                let (half_width, half_height) = object.half_sides();
                Outline::Box(half_width, half_height)
            }
            Shape::Triangle => {
                let flip = match object.variant {
                    Variant::Flipped => -1.0,
                    _ => 1.0,
                };
                let (x, y) = (0.866 * radius, 0.5 * radius * flip);
                Outline::Polygon(vec![[0.0, -radius * flip], [x, y], [-x, y]])
            }
            Shape::Star => Outline::Polygon(
                (0..10u8)
                    .map(|corner| {
                        let angle = f32::from(corner) * PI / 5.0;
                        let length = if corner.is_multiple_of(2) { radius } else { 0.42 * radius };
                        [length * angle.sin(), -length * angle.cos()]
                    })
                    .collect(),
            ),
            Shape::Cross => Outline::Cross(0.95 * radius, 0.32 * radius),
            Shape::Diamond => {
                let x = 0.7 * radius;
                Outline::Polygon(vec![[0.0, -radius], [x, 0.0], [0.0, radius], [-x, 0.0]])
            }
            Shape::Ring => Outline::Ring(radius, 0.55 * radius),
        }
    }

    /// Signed distance in pixels of a point; negative inside.
    fn distance(&self, x: f32, y: f32) -> f32 {
        match self {
            Outline::Disc(radius) => x.hypot(y) - radius,
            Outline::Box(half_width, half_height) => box_distance(x, y, *half_width, *half_height),
            Outline::Cross(length, thickness) => {
                let lying = box_distance(x, y, *length, *thickness);
                lying.min(box_distance(x, y, *thickness, *length))
            }
            Outline::Ring(outer, inner) => {
                let distance = x.hypot(y);
                (distance - outer).max(inner - distance)
            }
            Outline::Polygon(corners) => polygon_distance(x, y, corners),
        }
    }
}

/// Signed distance to a box centred at the origin.
fn box_distance(x: f32, y: f32, half_width: f32, half_height: f32) -> f32 {
    let (dx, dy) = (x.abs() - half_width, y.abs() - half_height);
    dx.max(0.0).hypot(dy.max(0.0)) + dx.max(dy).min(0.0)
}

/// Signed distance to a simple polygon, convex or not.
fn polygon_distance(x: f32, y: f32, corners: &[[f32; 2]]) -> f32 {
    let mut nearest = f32::INFINITY;
    let mut inside = false;
    let followers = corners.iter().cycle().skip(1);
    for (&[ax, ay], &[bx, by]) in corners.iter().zip(followers) {
        let (ex, ey) = (bx - ax, by - ay);
        let (wx, wy) = (x - ax, y - ay);
        let along = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0.0, 1.0);
        let (dx, dy) = (wx - ex * along, wy - ey * along);
        nearest = nearest.min(dx * dx + dy * dy);
        if (ay > y) != (by > y) && wx < wy * ex / ey {
            inside = !inside;
        }
    }
    let distance = nearest.sqrt();
    if inside { -distance } else { distance }
}

#[cfg(test)]
mod tests {
    use super::super::layout::Style;
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn single(shape: Shape) -> Scene {
        let variant = match shape {
            Shape::Rectangle => Variant::Wide(2.0),
            _ => Variant::Plain,
        };
        let object = Object { shape, colour: Colour::Red, rgb: [250, 0, 0], cx: 32.0, cy: 32.0, radius: 12.0, variant };
        Scene { objects: vec![object], background: [240; 3], size: 64 }
    }

    fn area(shape: Shape) -> usize {
        single(shape).owners().iter().flatten().count()
    }

    #[test]
    fn areas_match_geometry() {
        let expected = [
            (Shape::Circle, 452.0),
            (Shape::Square, 416.0),
            (Shape::Rectangle, 288.0),
            (Shape::Triangle, 187.0),
            (Shape::Star, 178.0),
            (Shape::Cross, 291.0),
            (Shape::Diamond, 202.0),
            (Shape::Ring, 316.0),
        ];
        for (shape, pixels) in expected {
            let drawn = area(shape) as f32;
            assert!((drawn / pixels - 1.0).abs() < 0.12, "{shape:?}: {drawn}");
        }
    }

    #[test]
    fn colours_and_hole_are_drawn() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let red_at = |picture: &Picture, x: usize, y: usize| {
            let at = (y * picture.width + x) * 3;
            picture.rgb[at] > 220 && picture.rgb[at + 1] < 20
        };
        for shape in Shape::ALL {
            let picture = single(shape).render(&mut rng);
            assert_eq!(picture.rgb.len(), 64 * 64 * 3);
            assert_eq!(red_at(&picture, 32, 32), shape != Shape::Ring, "{shape:?}");
            assert!(!red_at(&picture, 2, 2));
        }
    }

    #[test]
    fn noise_has_the_wanted_spread() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let mut values = vec![100.0; 20_000];
        add_noise(&mut values, &mut rng);
        let count = values.len() as f32;
        let mean = values.iter().sum::<f32>() / count;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / count;
        assert!((mean - 100.0).abs() < 0.1, "{mean}");
        assert!((variance.sqrt() - NOISE_SIGMA).abs() < 0.1, "{variance}");
    }

    #[test]
    fn patch_labels_follow_the_objects() {
        let labels = single(Shape::Circle).patch_labels(8);
        assert_eq!(labels.len(), 64);
        assert_eq!(labels[4 * 8 + 4].shape, Some(Shape::Circle));
        assert_eq!(labels[4 * 8 + 4].colour, Some(Colour::Red));
        assert_eq!(labels.iter().filter(|label| label.centre).count(), 1);
        assert!(labels[4 * 8 + 4].centre);
        assert_eq!(labels[0].shape, None);

        let mut rng = ChaCha8Rng::seed_from_u64(3);
        for _ in 0..100 {
            let scene = Scene::random(&mut rng, Style::Pretraining, 1..=4);
            let labels = scene.patch_labels(8);
            for object in &scene.objects {
                assert!(
                    labels
                        .iter()
                        .any(|label| { label.shape == Some(object.shape) && label.colour == Some(object.colour) })
                );
            }
        }
    }
}
