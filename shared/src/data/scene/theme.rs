//! The demo themes: palettes, wordings and question mixes that differ from
//! pretraining and from each other.
//!
//! Where a theme names an RGB range otherwise than pretraining (bright lime
//! is "green"), every theme that has this range uses the same new name. So a
//! common model can serve all themes although each meets only part of the
//! shift.

use super::object::{Colour, Shape, Swatch};
use super::questions::{Mix, QuestionKind};
use super::wording::{Forms, template_words};

/// One of the three shifted domains that demo participants hold.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DemoTheme {
    /// Angular figures in rust and signal colours on a cool bench.
    Workshop,
    /// Large round figures in flower colours on pale green.
    Garden,
    /// Figures in sea colours on sand, with questions about place.
    Harbour,
}

/// The wordings and the question mix of a theme.
pub(super) struct Dialect {
    pub(super) colour_of_shape: Forms,
    pub(super) shape_of_colour: Forms,
    pub(super) exist_colour: Forms,
    pub(super) exist_shape: Forms,
    pub(super) lack_colour: Forms,
    pub(super) lack_shape: Forms,
    pub(super) count_all: Forms,
    pub(super) count_colour: Forms,
    pub(super) side: Forms,
    pub(super) height: Forms,
    pub(super) every_colour: Forms,
    pub(super) shared_colour: Forms,
    pub(super) emptier_side: Forms,
    pub(super) mix: &'static Mix,
}

/// What pretraining calls lime.
const GREEN: Swatch = Swatch::new(Colour::Green, [0, 205, 0], [85, 255, 75]);
/// What pretraining calls maroon.
const BROWN: Swatch = Swatch::new(Colour::Brown, [135, 20, 20], [175, 48, 48]);
/// A light purple without a name in pretraining.
const PINK: Swatch = Swatch::new(Colour::Pink, [155, 55, 165], [190, 105, 215]);
/// An amber between yellow and orange of pretraining.
const YELLOW: Swatch = Swatch::new(Colour::Yellow, [235, 175, 0], [255, 205, 45]);
/// What pretraining calls brown.
const ORANGE: Swatch = Swatch::new(Colour::Orange, [150, 85, 20], [190, 112, 55]);
/// What pretraining calls teal.
const BLUE: Swatch = Swatch::new(Colour::Blue, [0, 85, 130], [30, 115, 160]);
/// As in pretraining.
const RED: Swatch = Swatch::new(Colour::Red, [205, 0, 0], [255, 50, 50]);
/// As in pretraining.
const BLACK: Swatch = Swatch::new(Colour::Black, [0, 0, 0], [35, 35, 35]);
/// As in pretraining.
const PURPLE: Swatch = Swatch::new(Colour::Purple, [95, 0, 120], [135, 40, 175]);
/// As in pretraining.
const CYAN: Swatch = Swatch::new(Colour::Cyan, [0, 205, 215], [80, 255, 255]);

const WORKSHOP: Dialect = Dialect {
    colour_of_shape: &["tell me the tint of the {s}?", "the {s} was painted how?"],
    shape_of_colour: &["which figure wears {c}?", "tell me which part is {c}?"],
    exist_colour: &["did anyone paint with {c}?", "was {c} used?"],
    exist_shape: &["does the bench hold {p}?", "did anyone leave {p}?"],
    lack_colour: &["does the view lack {c}?", "did anyone forget {c}?"],
    lack_shape: &["does the view lack {p}?", "did anyone forget {p}?"],
    count_all: &["what is the tally of parts?"],
    count_colour: &["what is the tally of {c}?", "how many figures wear {c}?"],
    side: &["the {s} rests on what flank?"],
    height: &["does the {s} rest high or low?"],
    every_colour: &["is everything {c}?", "was every part painted {c}?"],
    shared_colour: &["do both figures share a tint?"],
    emptier_side: &["which side is emptier?"],
    mix: &[
        (QuestionKind::ColourOfShape, 3.0),
        (QuestionKind::ShapeOfColour, 3.0),
        (QuestionKind::ExistShape, 1.5),
        (QuestionKind::Negation, 3.0),
        (QuestionKind::Count, 1.5),
        (QuestionKind::EveryColour, 1.5),
        (QuestionKind::SharedColour, 0.5),
    ],
};

const GARDEN: Dialect = Dialect {
    colour_of_shape: &["what tint has the {s}?", "in which hue blooms the {s}?"],
    shape_of_colour: &["which figure wears {c}?", "what blooms in {c}?"],
    exist_colour: &["does {c} bloom here?", "would a visitor find {c}?"],
    exist_shape: &["does {p} grow here?", "would a visitor find {p}?"],
    lack_colour: &["does the view lack {c}?", "would a visitor miss {c}?"],
    lack_shape: &["does the view lack {p}?", "would a visitor miss {p}?"],
    count_all: &["what number of blooms grow here?"],
    count_colour: &["how many figures wear {c}?", "what number of blooms are {c}?"],
    side: &["toward which flank grows the {s}?"],
    height: &["does the {s} grow high or low?"],
    every_colour: &["is everything {c}?", "does all bloom in {c}?"],
    shared_colour: &["do both figures share a tint?", "have these two the same hue?"],
    emptier_side: &["which side is emptier?"],
    mix: &[
        (QuestionKind::ColourOfShape, 3.5),
        (QuestionKind::ShapeOfColour, 2.0),
        (QuestionKind::ExistColour, 2.0),
        (QuestionKind::ExistShape, 2.0),
        (QuestionKind::Negation, 1.5),
        (QuestionKind::SharedColour, 2.5),
        (QuestionKind::EveryColour, 0.5),
    ],
};

const HARBOUR: Dialect = Dialect {
    colour_of_shape: &["what tint has the {s}?", "the {s} sails under which hue?"],
    shape_of_colour: &["tell me what sails in {c}?", "which vessel flies {c}?"],
    exist_colour: &["does any vessel fly {c}?", "has {c} come ashore?"],
    exist_shape: &["has {p} come ashore?", "did {p} dock?"],
    lack_colour: &["is the bay free of {c}?", "does the view lack {c}?"],
    lack_shape: &["is the bay free of {p}?", "does the view lack {p}?"],
    count_all: &["what is the tally of vessels?"],
    count_colour: &["how many vessels fly {c}?"],
    side: &["the {s} rests on what flank?", "toward which flank sails the {s}?"],
    height: &["does the {s} sail high or low?"],
    every_colour: &["is everything {c}?"],
    shared_colour: &["do both vessels share a hue?"],
    emptier_side: &["which side is emptier?", "which half of the bay is emptier?"],
    mix: &[
        (QuestionKind::ColourOfShape, 2.0),
        (QuestionKind::ShapeOfColour, 2.5),
        (QuestionKind::ExistColour, 1.5),
        (QuestionKind::Negation, 2.5),
        (QuestionKind::Position, 2.0),
        (QuestionKind::EmptierSide, 1.5),
        (QuestionKind::Count, 0.5),
    ],
};

impl DemoTheme {
    /// Every theme.
    pub const ALL: [DemoTheme; 3] = [DemoTheme::Workshop, DemoTheme::Garden, DemoTheme::Harbour];

    /// Identifier: one lower-case word.
    pub fn name(self) -> &'static str {
        match self {
            DemoTheme::Workshop => "workshop",
            DemoTheme::Garden => "garden",
            DemoTheme::Harbour => "harbour",
        }
    }

    /// Title for people.
    pub fn title(self) -> &'static str {
        match self {
            DemoTheme::Workshop => "Workshop",
            DemoTheme::Garden => "Garden",
            DemoTheme::Harbour => "Harbour",
        }
    }

    /// One sentence for people on what the shard holds.
    pub fn description(self) -> &'static str {
        match self {
            DemoTheme::Workshop => {
                "Small angular parts in rust and signal colors on a cool bench: \
                 tints, missing parts, tallies."
            }
            DemoTheme::Garden => {
                "Large round blooms in flower colors on pale green: \
                 hues, what grows here, shared tints."
            }
            DemoTheme::Harbour => {
                "Vessels in sea colors on sand: \
                 who flies which color, where they lie, what the bay lacks."
            }
        }
    }

    /// The palette; names partly differ from pretraining.
    pub(super) fn swatches(self) -> &'static [Swatch] {
        match self {
            DemoTheme::Workshop => &[GREEN, BROWN, YELLOW, ORANGE, RED, BLACK],
            DemoTheme::Garden => &[GREEN, PINK, YELLOW, ORANGE, RED, PURPLE],
            DemoTheme::Harbour => &[GREEN, BROWN, PINK, BLUE, CYAN, BLACK],
        }
    }

    /// The shapes that occur.
    pub(super) fn shapes(self) -> &'static [Shape] {
        match self {
            DemoTheme::Workshop => {
                &[Shape::Square, Shape::Rectangle, Shape::Cross, Shape::Ring, Shape::Triangle, Shape::Diamond]
            }
            DemoTheme::Garden => {
                &[Shape::Circle, Shape::Star, Shape::Ring, Shape::Diamond, Shape::Cross, Shape::Triangle]
            }
            DemoTheme::Harbour => {
                &[Shape::Triangle, Shape::Rectangle, Shape::Circle, Shape::Star, Shape::Cross, Shape::Square]
            }
        }
    }

    /// Lowest and highest radius, in pixels.
    pub(super) fn radii(self) -> (f32, f32) {
        match self {
            DemoTheme::Workshop => (5.0, 9.5),
            DemoTheme::Garden => (8.0, 14.0),
            DemoTheme::Harbour => (6.0, 12.0),
        }
    }

    /// Range of the aspect ratio of rectangles (narrower than pretraining).
    pub(super) fn aspects(self) -> (f32, f32) {
        match self {
            DemoTheme::Workshop => (1.4, 1.9),
            DemoTheme::Garden | DemoTheme::Harbour => (1.5, 2.2),
        }
    }

    /// Lowest and highest background colour.
    pub(super) fn background(self) -> ([u8; 3], [u8; 3]) {
        match self {
            DemoTheme::Workshop => ([165, 180, 195], [195, 210, 225]),
            DemoTheme::Garden => ([195, 220, 180], [220, 245, 205]),
            DemoTheme::Harbour => ([215, 195, 160], [240, 220, 185]),
        }
    }

    /// Wordings and mix.
    pub(super) fn dialect(self) -> &'static Dialect {
        match self {
            DemoTheme::Workshop => &WORKSHOP,
            DemoTheme::Garden => &GARDEN,
            DemoTheme::Harbour => &HARBOUR,
        }
    }
}

/// Every literal word of the demo wordings (answers and attribute words are
/// those of pretraining), sorted and unique. Many are unknown to pretraining.
pub fn demo_vocabulary() -> Vec<&'static str> {
    let templates = DemoTheme::ALL.into_iter().flat_map(|theme| {
        let dialect = theme.dialect();
        [
            dialect.colour_of_shape,
            dialect.shape_of_colour,
            dialect.exist_colour,
            dialect.exist_shape,
            dialect.lack_colour,
            dialect.lack_shape,
            dialect.count_all,
            dialect.count_colour,
            dialect.side,
            dialect.height,
            dialect.every_colour,
            dialect.shared_colour,
            dialect.emptier_side,
        ]
        .into_iter()
        .flatten()
        .copied()
    });
    template_words(templates).into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::super::object::PRETRAINING_PALETTE;
    use super::super::wording::vocabulary;
    use super::*;

    #[test]
    fn palettes_are_disjoint_within_a_theme() {
        for theme in DemoTheme::ALL {
            let palette = theme.swatches();
            for (index, first) in palette.iter().enumerate() {
                for second in &palette[index + 1..] {
                    assert_ne!(first.colour, second.colour);
                    let apart = (0..3).any(|channel| {
                        first.high[channel] < second.low[channel] || second.high[channel] < first.low[channel]
                    });
                    assert!(apart, "{:?} meets {:?}", first.colour, second.colour);
                }
            }
        }
    }

    #[test]
    fn every_theme_renames_colours() {
        for theme in DemoTheme::ALL {
            let renamed = theme.swatches().iter().filter(|swatch| {
                let known = PRETRAINING_PALETTE[swatch.colour.index()];
                (0..3).any(|channel| {
                    swatch.high[channel] < known.low[channel] || known.high[channel] < swatch.low[channel]
                })
            });
            assert!(renamed.count() >= 3, "{theme:?}");
        }
    }

    #[test]
    fn wordings_are_new_and_keep_clear_of_the_evaluation_set() {
        let known = vocabulary();
        let words = demo_vocabulary();
        assert!(words.iter().filter(|word| !known.contains(word)).count() > 20);
        for word in words {
            assert!(!word.starts_with("contain"));
            assert!(!["image", "present", "not"].contains(&word));
        }
    }
}
