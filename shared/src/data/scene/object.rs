//! Shapes, colours and the single drawn object.

use rand::Rng;

/// The eight shapes, in the order of their class index.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Shape {
    /// A filled disc.
    Circle,
    /// A square with sides along the axes (at most slightly oblong).
    Square,
    /// A clearly oblong rectangle, lying or standing.
    Rectangle,
    /// An equilateral triangle, pointing up or (more rarely) down.
    Triangle,
    /// A five-pointed star.
    Star,
    /// A plus-shaped cross.
    Cross,
    /// A rhombus that is taller than wide.
    Diamond,
    /// An annulus with a clear hole.
    Ring,
}

impl Shape {
    /// Every shape, ordered by [`Shape::index`].
    pub const ALL: [Shape; 8] = [
        Shape::Circle,
        Shape::Square,
        Shape::Rectangle,
        Shape::Triangle,
        Shape::Star,
        Shape::Cross,
        Shape::Diamond,
        Shape::Ring,
    ];

    /// The word for this shape in questions and answers.
    pub fn word(self) -> &'static str {
        match self {
            Shape::Circle => "circle",
            Shape::Square => "square",
            Shape::Rectangle => "rectangle",
            Shape::Triangle => "triangle",
            Shape::Star => "star",
            Shape::Cross => "cross",
            Shape::Diamond => "diamond",
            Shape::Ring => "ring",
        }
    }

    /// Class index in `0..8`.
    pub fn index(self) -> usize {
        self as usize
    }
}

/// The fourteen named colours, in the order of their class index.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Colour {
    /// Bright red.
    Red,
    /// Dark green in pretraining.
    Green,
    /// Bright green in pretraining.
    Lime,
    /// Strong blue.
    Blue,
    /// Bright yellow.
    Yellow,
    /// Orange.
    Orange,
    /// Dark violet.
    Purple,
    /// Light, reddish pink in pretraining.
    Pink,
    /// Bright cyan.
    Cyan,
    /// Dark blue-green.
    Teal,
    /// Dark red.
    Maroon,
    /// Orange-brown in pretraining.
    Brown,
    /// Nearly black.
    Black,
    /// Medium gray.
    Gray,
}

impl Colour {
    /// Every colour, ordered by [`Colour::index`].
    pub const ALL: [Colour; 14] = [
        Colour::Red,
        Colour::Green,
        Colour::Lime,
        Colour::Blue,
        Colour::Yellow,
        Colour::Orange,
        Colour::Purple,
        Colour::Pink,
        Colour::Cyan,
        Colour::Teal,
        Colour::Maroon,
        Colour::Brown,
        Colour::Black,
        Colour::Gray,
    ];

    /// The word for this colour in questions and answers.
    pub fn word(self) -> &'static str {
        match self {
            Colour::Red => "red",
            Colour::Green => "green",
            Colour::Lime => "lime",
            Colour::Blue => "blue",
            Colour::Yellow => "yellow",
            Colour::Orange => "orange",
            Colour::Purple => "purple",
            Colour::Pink => "pink",
            Colour::Cyan => "cyan",
            Colour::Teal => "teal",
            Colour::Maroon => "maroon",
            Colour::Brown => "brown",
            Colour::Black => "black",
            Colour::Gray => "gray",
        }
    }

    /// Class index in `0..14`.
    pub fn index(self) -> usize {
        self as usize
    }
}

/// A colour name with the RGB range (0 to 255, inclusive) it is drawn from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Swatch {
    /// The name that questions and answers use for this range.
    pub colour: Colour,
    /// Lowest red, green and blue.
    pub low: [u8; 3],
    /// Highest red, green and blue.
    pub high: [u8; 3],
}

impl Swatch {
    /// A swatch from its name and its bounds.
    pub const fn new(colour: Colour, low: [u8; 3], high: [u8; 3]) -> Swatch {
        Swatch { colour, low, high }
    }

    /// One RGB value from the range. Black and gray share one level over the
    /// three channels (up to a difference of 8) so that they get no tint.
    pub fn sample<R: Rng>(&self, rng: &mut R) -> [u8; 3] {
        let neutral = matches!(self.colour, Colour::Black | Colour::Gray);
        let level = rng.random_range(self.low[0]..=self.high[0]);
        let mut rgb = [level; 3];
        for (channel, value) in rgb.iter_mut().enumerate() {
            let (low, high) = (self.low[channel], self.high[channel]);
            *value = if neutral {
                let jittered = i16::from(level) + rng.random_range(-4..=4i16);
                jittered.clamp(i16::from(low), i16::from(high)) as u8
            } else {
                rng.random_range(low..=high)
            };
        }
        rgb
    }
}

/// The palette of the pretraining domain, one swatch per colour.
pub(super) const PRETRAINING_PALETTE: [Swatch; 14] = [
    Swatch::new(Colour::Red, [205, 0, 0], [255, 50, 50]),
    Swatch::new(Colour::Green, [0, 85, 0], [40, 140, 45]),
    Swatch::new(Colour::Lime, [0, 210, 0], [120, 255, 75]),
    Swatch::new(Colour::Blue, [0, 0, 185], [55, 70, 255]),
    Swatch::new(Colour::Yellow, [230, 215, 0], [255, 255, 70]),
    Swatch::new(Colour::Orange, [240, 120, 0], [255, 165, 40]),
    Swatch::new(Colour::Purple, [100, 0, 125], [150, 50, 190]),
    Swatch::new(Colour::Pink, [240, 100, 165], [255, 180, 215]),
    Swatch::new(Colour::Cyan, [0, 205, 215], [80, 255, 255]),
    Swatch::new(Colour::Teal, [0, 85, 130], [30, 115, 160]),
    Swatch::new(Colour::Maroon, [120, 15, 15], [175, 48, 48]),
    Swatch::new(Colour::Brown, [145, 85, 20], [185, 112, 55]),
    Swatch::new(Colour::Black, [0, 0, 0], [35, 35, 35]),
    Swatch::new(Colour::Gray, [105, 105, 105], [150, 150, 150]),
];

/// How a shape deviates from its plain form.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Variant {
    /// The plain form.
    Plain,
    /// Upside down (triangles).
    Flipped,
    /// Lying: width divided by height (squares, rectangles).
    Wide(f32),
    /// Standing: height divided by width (squares, rectangles).
    Tall(f32),
}

/// One shape on the canvas. Coordinates and radius are in pixels; the canvas
/// spans `0..64` on both axes, y grows downwards.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Object {
    /// The shape.
    pub shape: Shape,
    /// The colour name.
    pub colour: Colour,
    /// The drawn colour, inside the swatch of the name.
    pub rgb: [u8; 3],
    /// Horizontal centre.
    pub cx: f32,
    /// Vertical centre.
    pub cy: f32,
    /// Half of the largest extent along an axis (about).
    pub radius: f32,
    /// Deviation from the plain form.
    pub variant: Variant,
}

impl Object {
    /// Half width and half height of a square or rectangle, in pixels.
    pub(super) fn half_sides(&self) -> (f32, f32) {
        let long = match self.shape {
            Shape::Square => 0.85 * self.radius,
            _ => self.radius,
        };
        match self.variant {
            Variant::Wide(aspect) => (long, long / aspect),
            Variant::Tall(aspect) => (long / aspect, long),
            Variant::Plain | Variant::Flipped => (long, long),
        }
    }

    /// Radius in pixels of a circle round the centre that covers the object.
    pub fn reach(&self) -> f32 {
        match self.shape {
            Shape::Square | Shape::Rectangle => {
                let (half_width, half_height) = self.half_sides();
                half_width.hypot(half_height)
            }
            Shape::Cross => 1.02 * self.radius,
            _ => self.radius,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn indices_follow_the_listing() {
        for (index, shape) in Shape::ALL.iter().enumerate() {
            assert_eq!(shape.index(), index);
        }
        for (index, colour) in Colour::ALL.iter().enumerate() {
            assert_eq!(colour.index(), index);
            assert_eq!(PRETRAINING_PALETTE[index].colour, *colour);
        }
    }

    #[test]
    fn samples_stay_in_range() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for swatch in PRETRAINING_PALETTE {
            for _ in 0..50 {
                let rgb = swatch.sample(&mut rng);
                for (channel, value) in rgb.iter().enumerate() {
                    assert!((swatch.low[channel]..=swatch.high[channel]).contains(value));
                }
            }
        }
    }

    #[test]
    fn palette_ranges_are_disjoint() {
        for (index, first) in PRETRAINING_PALETTE.iter().enumerate() {
            for second in &PRETRAINING_PALETTE[index + 1..] {
                let apart = (0..3).any(|channel| {
                    first.high[channel] < second.low[channel] || second.high[channel] < first.low[channel]
                });
                assert!(apart, "{:?} meets {:?}", first.colour, second.colour);
            }
        }
    }
}
