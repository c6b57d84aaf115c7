//! Generated scenes of coloured shapes with questions and answers.
//!
//! One generator serves two purposes: the corpus on which the tiny
//! vision-language model is pretrained, and the shifted shards that
//! federated participants hold in a demonstration.
//!
//! | file | concern |
//! |---|---|
//! | `object.rs` | shapes, colours, palettes, one drawn object |
//! | `layout.rs` | style of a domain; random non-overlapping scenes |
//! | `render.rs` | anti-aliased drawing, patch labels |
//! | `facts.rs` | what is true of a scene (unique, absent, counted) |
//! | `wording.rs` | question templates and vocabulary of pretraining |
//! | `questions.rs` | question kinds, answers of pretraining |
//! | `theme.rs` | palettes, wordings and mixes of the demo themes |
//! | `demo.rs` | questions and shards of the demo domain |
//!
//! Everything is a pure function of a caller's random generator; there are
//! no files, clocks or threads, so the module also runs in a browser.

mod demo;
mod facts;
mod layout;
mod object;
mod questions;
mod render;
mod theme;
mod wording;

pub use demo::{demo_questions, demo_shard};
pub use layout::{CANVAS, Scene, Style};
pub use object::{Colour, Object, Shape, Swatch, Variant};
pub use questions::{Qa, QuestionKind, questions};
pub use render::PatchLabel;
pub use theme::{DemoTheme, demo_vocabulary};
pub use wording::{answer_words, vocabulary};
