//! The losses of pretraining.

use super::corpus::PackedBatch;
use super::trainee::{COLOUR_CLASSES, Eyes, SHAPE_CLASSES, Speech};
use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use fednano_shared::data::scene::{Colour, QuestionKind, Shape};
use fednano_shared::data::text::TextCodec;

/// Background patches are many; they count a tenth.
const BACKGROUND: f32 = 0.1;
/// Unit of the radius that patches tell, pixels.
const RADIUS_UNIT: f32 = 8.0;

/// Token ids of the words that pictures are aligned with.
pub struct AlignmentWords {
    shapes: Vec<i64>,  // and "nothing"
    colours: Vec<i64>, // and "nothing"
    heights: Vec<i64>, // top, bottom
    sides: Vec<i64>,   // left, right
}

impl AlignmentWords {
    /// Look the words up.
    ///
    /// # Errors
    /// A word that is not one token.
    pub fn new(text: &TextCodec) -> anyhow::Result<Self> {
        let id = |word: &str| match text.ids(word, false)?[..] {
            [id] => Ok(i64::from(id)),
            _ => Err(anyhow::anyhow!("'{word}' is not one token")),
        };
        let with_nothing =
            |words: Vec<&'static str>| words.into_iter().chain(["nothing"]).map(id).collect::<Result<_, _>>();
        Ok(Self {
            shapes: with_nothing(Shape::ALL.iter().map(|s| s.word()).collect())?,
            colours: with_nothing(Colour::ALL.iter().map(|c| c.word()).collect())?,
            heights: ["top", "bottom"].into_iter().map(id).collect::<Result<_, _>>()?,
            sides: ["left", "right"].into_iter().map(id).collect::<Result<_, _>>()?,
        })
    }
}

/// Dense labels of a batch, as indices and weights.
struct PatchTargets {
    shapes: Vec<i64>,
    colours: Vec<i64>,
    heights: Vec<i64>,
    sides: Vec<i64>,
    weights: Vec<f32>,    // background counts little
    foreground: Vec<f32>, // background counts nothing
    centres: Vec<f32>,
    radii: Vec<f32>,
}

impl PatchTargets {
    fn new(batch: &PackedBatch) -> Self {
        let per_picture = batch.patches.len() / batch.rows;
        let edge = per_picture.isqrt();
        let class = |i: Option<usize>, none: usize| i.unwrap_or(none) as i64;
        let half = |at: usize| i64::from(at >= edge / 2);
        let patches = || batch.patches.iter().enumerate();
        Self {
            shapes: patches().map(|(_, p)| class(p.shape.map(Shape::index), SHAPE_CLASSES - 1)).collect(),
            colours: patches().map(|(_, p)| class(p.colour.map(Colour::index), COLOUR_CLASSES - 1)).collect(),
            heights: patches().map(|(i, _)| half(i % per_picture / edge)).collect(),
            sides: patches().map(|(i, _)| half(i % edge)).collect(),
            weights: patches().map(|(_, p)| if p.shape.is_some() { 1.0 } else { BACKGROUND }).collect(),
            foreground: patches().map(|(_, p)| f32::from(u8::from(p.shape.is_some()))).collect(),
            centres: patches().map(|(_, p)| f32::from(u8::from(p.centre))).collect(),
            radii: patches().map(|(_, p)| p.radius / RADIUS_UNIT).collect(),
        }
    }
}

/// Weighted mean cross-entropy. logits `[N, C]`.
fn cross_entropy(logits: Tensor<2>, classes: &[i64], weights: &[f32]) -> Tensor<1> {
    let device = logits.device();
    let n = classes.len();
    let index = Tensor::<2, Int>::from_data(TensorData::new(classes.to_vec(), [n, 1]), &device);
    let total: f32 = weights.iter().sum::<f32>().max(1e-6);
    let weights: Vec<f32> = weights.iter().map(|w| w / total).collect();
    let weights = Tensor::<1>::from_data(TensorData::new(weights, [n]), &device);
    let nll = activation::log_softmax(logits, 1).gather(1, index).reshape([n]).neg();
    (nll * weights).sum()
}

/// Each patch names its shape, colour and radius and whether an object's centre lies in it: dense supervision teaches the vision
/// tower in minutes what answers alone would take hours for. features `[B, P, vision D]`.
pub fn dense(eyes: &Eyes, features: Tensor<3>, batch: &PackedBatch) -> Tensor<1> {
    let targets = PatchTargets::new(batch);
    let [b, p, d] = features.dims();
    let logits = eyes.dense.forward(features.reshape([b * p, d])); // [B*P, classes]
    let shapes = cross_entropy(logits.clone().narrow(1, 0, SHAPE_CLASSES), &targets.shapes, &targets.weights);
    let colours =
        cross_entropy(logits.clone().narrow(1, SHAPE_CLASSES, COLOUR_CLASSES), &targets.colours, &targets.weights);
    let device = logits.device();
    let constant = |values: Vec<f32>| Tensor::<1>::from_data(TensorData::new(values, [b * p]), &device);
    let z = logits.clone().narrow(1, SHAPE_CLASSES + COLOUR_CLASSES, 1).reshape([b * p]);
    let centres = (activation::softplus(z.clone(), 1.0) - z * constant(targets.centres)).mean();
    let foreground: f32 = targets.foreground.iter().sum::<f32>().max(1.0);
    let off = logits.narrow(1, SHAPE_CLASSES + COLOUR_CLASSES + 1, 1).reshape([b * p]) - constant(targets.radii);
    let radii = (off.powi_scalar(2) * constant(targets.foreground)).sum() / foreground;
    shapes * 1.5 + colours + centres + radii
}

/// Projected patches lie near the words for what they show and where they are. projected `[B, P, D]`.
pub fn alignment(speech: &Speech, projected: Tensor<3>, batch: &PackedBatch, words: &AlignmentWords) -> Tensor<1> {
    let targets = PatchTargets::new(batch);
    let device = projected.device();
    let [b, p, d] = projected.dims();
    let patches = projected.reshape([b * p, d]) * (2.0 / (d as f64).sqrt());
    let near = |ids: &[i64], classes: &[i64], weights: &[f32]| {
        let logits = patches.clone().matmul(speech.embed(ids, &device).transpose()); // [B*P, words]
        cross_entropy(logits, classes, weights)
    };
    let what = near(&words.shapes, &targets.shapes, &targets.weights)
        + near(&words.colours, &targets.colours, &targets.weights);
    let place = near(&words.heights, &targets.heights, &targets.foreground)
        + near(&words.sides, &targets.sides, &targets.foreground);
    what + place * 0.5
}

/// Logits of all targets, `[T, V]`.
pub fn answer_logits(speech: &Speech, hidden: Tensor<3>, batch: &PackedBatch, device: &Device) -> Tensor<2> {
    let [b, s, d] = hidden.dims();
    let at: Vec<i64> = batch.targets.iter().map(|t| (t.row * s + t.position) as i64).collect();
    let index = Tensor::<1, Int>::from_data(TensorData::new(at, [batch.targets.len()]), device);
    speech.llm.logits(hidden.reshape([b * s, d]).select(0, index))
}

/// Weighted cross-entropy of the answers.
pub fn answers(logits: Tensor<2>, batch: &PackedBatch) -> Tensor<1> {
    let tokens: Vec<i64> = batch.targets.iter().map(|t| i64::from(t.token)).collect();
    let weights: Vec<f32> = batch.targets.iter().map(|t| t.weight).collect();
    cross_entropy(logits, &tokens, &weights)
}

/// What became of each question.
#[derive(Debug, Clone, Copy)]
pub struct Marked {
    /// Its kind.
    pub kind: QuestionKind,
    /// The first answer token is right.
    pub first: bool,
    /// All answer tokens are right.
    pub all: bool,
}

/// Mark the answers of a batch.
pub fn mark(logits: Tensor<2>, batch: &PackedBatch) -> Vec<Marked> {
    let best = logits.argmax(1).into_data().convert::<i64>().try_into_vec::<i64>().unwrap_or_default();
    let mut marks: Vec<(usize, Marked)> = Vec::new();
    for (t, best) in batch.targets.iter().zip(best) {
        let Some((number, kind)) = t.question else { continue };
        let right = best == i64::from(t.token);
        match marks.last_mut() {
            Some((n, m)) if *n == number => m.all &= right,
            _ => marks.push((number, Marked { kind, first: right, all: right })),
        }
    }
    marks.into_iter().map(|(_, m)| m).collect()
}
