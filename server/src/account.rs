//! What a federation costs, worked out from a model's shape alone: parameters, bytes on the client, bytes on the wire.
//! Nothing is measured here; every line says what it counts. Bytes on the wire are values only, without framing.

use crate::presets::{Part, PublishedTensor, tensors};
use fednano_shared::bundle::EdgeDtype;
use fednano_shared::config::ModelConfig;
use serde::Serialize;
use std::collections::BTreeMap;
use std::ops::{Add, RangeInclusive};

fn dtype_name(dtype: EdgeDtype) -> &'static str {
    match dtype {
        EdgeDtype::F16 => "f16",
        EdgeDtype::Int8 => "int8",
        EdgeDtype::Int4 => "int4",
    }
}

/// Bytes of a matrix with its scales, as `bundle::quantise` packs it.
fn matrix_bytes(dtype: EdgeDtype, rows: u64, width: u64) -> u64 {
    rows * match dtype {
        EdgeDtype::F16 => 2 * width,
        EdgeDtype::Int8 => width + 2,
        EdgeDtype::Int4 => 18 * width.div_ceil(32), // groups are whole: 16 bytes and the scale
    }
}

/// Vectors are f16 in every form.
fn vector_bytes(width: u64) -> u64 {
    2 * width
}

/// Numbers at the boundary.
#[derive(Clone, Copy)]
enum Form {
    F32,
    F16,
    /// With a scale of 2 bytes for each row (a bf16 on the wire).
    Int8,
}

impl Form {
    const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Int8];
    const NAMES: [&'static str; 3] = ["f32", "f16", "int8"];

    fn name(self) -> &'static str {
        Self::NAMES[self as usize]
    }

    fn rows(self, count: u64, width: u64) -> u64 {
        count
            * match self {
                Self::F32 => 4 * width,
                Self::F16 => 2 * width,
                Self::Int8 => width + 2,
            }
    }
}

/// What the account is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Options {
    /// Rank of the adapters, and of LoRA.
    pub rank: u64,
    /// How the client's frozen part is stored.
    pub edge_dtype: EdgeDtype,
    /// Samples of an optimiser step.
    pub batch: u64,
    /// Text tokens of the prompt: the question, `<s>` and the template around it.
    pub question_tokens: u64,
    /// Tokens of the answer, `</s>` among them.
    pub answer_tokens: u64,
    /// Samples of a client.
    pub samples: u64,
    /// Passes over them in a round.
    pub local_epochs: u64,
}

/// Why there is no account.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccountError {
    /// An option, its value, and the smallest and largest allowed.
    #[error("{0} is {1}, it must be {2} to {3}")]
    Range(&'static str, u64, u64, u64),
    /// A sample that the model cannot take.
    #[error(
        "{image} image and {text} text tokens exceed the model's {limit} positions; lower --question-tokens or --answer-tokens"
    )]
    TooLong {
        /// Image tokens.
        image: u64,
        /// Text tokens asked for.
        text: u64,
        /// Positions of the model.
        limit: u64,
    },
}

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// For programs.
    pub key: &'static str,
    /// What is counted.
    pub counted: String,
    /// Parameters, where it makes sense.
    pub parameters: Option<u64>,
    /// Part of what the section's `share_of` names, 0 to 1.
    pub share: Option<f64>,
    /// Bytes by the form of the numbers.
    pub bytes: BTreeMap<&'static str, u64>,
}

impl Line {
    fn new(key: &'static str, counted: impl Into<String>) -> Self {
        Self { key, counted: counted.into(), parameters: None, share: None, bytes: BTreeMap::new() }
    }

    fn parameters(mut self, parameters: u64, of: u64) -> Self {
        self.parameters = Some(parameters);
        self.share = Some(parameters as f64 / of as f64);
        self
    }

    fn bytes(mut self, form: &'static str, bytes: u64) -> Self {
        self.bytes.insert(form, bytes);
        self
    }

    fn forms(mut self, bytes: impl Fn(Form) -> u64) -> Self {
        self.bytes = Form::ALL.iter().map(|f| (f.name(), bytes(*f))).collect();
        self
    }

    fn share_of_f16(mut self, of: u64) -> Self {
        self.share = self.bytes.get("f16").map(|b| *b as f64 / of as f64);
        self
    }
}

/// Figures that are compared with each other.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Section {
    /// What they are about.
    pub title: String,
    /// What `share` is a part of.
    pub share_of: &'static str,
    /// Keys of the lines' `bytes`, in the order to show.
    pub forms: Vec<&'static str>,
    /// The figures.
    pub lines: Vec<Line>,
}

/// Samples a round up to which the boundary (f16, up and down, without the adapters' own transfer) moves no more than
/// LoRA-based tuning with the connector does (f16, up and down), whatever the number of samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BreakEven {
    /// Mode `activations`.
    pub activations: u64,
    /// Mode `low-rank` in the round that also sends the features.
    pub low_rank_first_round: u64,
    /// Mode `low-rank` in every later round.
    pub low_rank_later_rounds: u64,
}

/// All figures of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Account {
    /// What was asked.
    pub options: Options,
    /// Figures by subject.
    pub sections: Vec<Section>,
    /// Where the boundary's traffic meets LoRA's.
    pub break_even: BreakEven,
}

impl Account {
    /// A figure by its key.
    pub fn line(&self, key: &str) -> Option<&Line> {
        self.sections.iter().flat_map(|s| &s.lines).find(|l| l.key == key)
    }
}

/// Parameters, and bytes in the edge's type.
#[derive(Clone, Copy, Default)]
struct Amount {
    parameters: u64,
    bytes: u64,
}

impl Add for Amount {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { parameters: self.parameters + other.parameters, bytes: self.bytes + other.bytes }
    }
}

/// Work out all figures.
///
/// # Errors
/// [`AccountError`] names the option that is out of range.
pub fn account(config: &ModelConfig, options: Options) -> Result<Account, AccountError> {
    check(config, &options)?;
    let shape = Shape::new(config, &options);
    let sections =
        vec![shape.model(), shape.client(), shape.adapters(), shape.boundary(), shape.round(), shape.lora_section()];
    let break_even = shape.break_even();
    Ok(Account { options, sections, break_even })
}

fn check(config: &ModelConfig, options: &Options) -> Result<(), AccountError> {
    // The upper ends keep every product within 64 bits.
    let ranges: [(&'static str, u64, RangeInclusive<u64>); 6] = [
        ("--rank", options.rank, 1..=65_536),
        ("--batch", options.batch, 1..=1_000_000),
        ("--question-tokens", options.question_tokens, 1..=1_000_000),
        ("--answer-tokens", options.answer_tokens, 1..=1_000_000),
        ("--samples", options.samples, 1..=10_000_000),
        ("--local-epochs", options.local_epochs, 1..=1_000),
    ];
    for (name, value, range) in ranges {
        if !range.contains(&value) {
            return Err(AccountError::Range(name, value, *range.start(), *range.end()));
        }
    }
    let (image, text) = (config.image_tokens() as u64, options.question_tokens + options.answer_tokens);
    let limit = config.text.max_positions as u64;
    if image + text > limit { Err(AccountError::TooLong { image, text, limit }) } else { Ok(()) }
}

/// What all sections are worked out from.
struct Shape<'a> {
    config: &'a ModelConfig,
    options: &'a Options,
    tensors: Vec<PublishedTensor>,
    /// Parameters of the whole model.
    whole: u64,
    /// Width of the boundary.
    width: u64,
    image_tokens: u64,
    text_tokens: u64,
    /// Parameters of both adapters.
    adapters: u64,
    /// LoRA on all matrices of the decoder layers.
    lora: u64,
    /// The same, and the connector trained in full.
    lora_with_projector: u64,
}

impl<'a> Shape<'a> {
    fn new(config: &'a ModelConfig, options: &'a Options) -> Self {
        let tensors = tensors(config);
        let width = config.text.hidden as u64;
        let sum = |part: Part, count: &dyn Fn(&PublishedTensor) -> usize| -> u64 {
            tensors.iter().filter(|t| t.part == part).map(|t| count(t) as u64).sum()
        };
        // A matrix of [out, in] gets factors of [out, r] and [r, in].
        let edges = sum(Part::DecoderMatrix, &|t| {
            let (rows, width) = t.matrix();
            rows + width
        });
        let lora = options.rank * edges;
        let lora_with_projector = lora + sum(Part::Projector, &PublishedTensor::parameters);
        let whole: u64 = tensors.iter().map(|t| t.parameters() as u64).sum();
        Self {
            config,
            options,
            whole,
            width,
            image_tokens: config.image_tokens() as u64,
            text_tokens: options.question_tokens + options.answer_tokens,
            adapters: 2 * 2 * width * options.rank,
            lora,
            lora_with_projector,
            tensors,
        }
    }

    fn tokens(&self) -> u64 {
        self.image_tokens + self.text_tokens
    }

    fn amount(&self, parts: &[Part]) -> Amount {
        let dtype = self.options.edge_dtype;
        let of = |t: &PublishedTensor| {
            let (rows, width) = (t.matrix().0 as u64, t.matrix().1 as u64);
            // As in a bundle's pieces: only linear layers and the token table are quantised.
            let quantised = t.shape.len() == 2 && !t.name.contains(".embeddings.");
            let bytes = if quantised { matrix_bytes(dtype, rows, width) } else { vector_bytes(rows * width) };
            Amount { parameters: rows * width, bytes }
        };
        self.tensors.iter().filter(|t| parts.contains(&t.part)).map(of).fold(Amount::default(), Add::add)
    }

    fn model(&self) -> Section {
        let rows = self.config.text.vocab;
        let counted = format!("every tensor of the published file, unread ones and all {rows} token rows among them");
        Section {
            title: "Whole model".into(),
            share_of: "whole model, parameters",
            forms: vec!["f16"],
            lines: vec![Line::new("model", counted).parameters(self.whole, self.whole).bytes("f16", 2 * self.whole)],
        }
    }

    fn client(&self) -> Section {
        let (text, dtype) = (&self.config.text, self.options.edge_dtype);
        let vision = self.amount(&[Part::Vision]);
        let stored = vision + self.amount(&[Part::VisionUnread]);
        let projector = self.amount(&[Part::Projector]);
        let table = self.amount(&[Part::TokenTable]);
        let adapters = Amount { parameters: self.adapters, bytes: 4 * self.adapters };
        let line = |key: &'static str, counted: String, amount: Amount| {
            Line::new(key, counted).parameters(amount.parameters, self.whole).bytes(dtype_name(dtype), amount.bytes)
        };
        let (layers, feature) = (self.config.vision.layers, self.config.feature_layer);
        let rows = text.vocab;
        let mut lines = vec![
            line("vision.stored", format!("vision tower as stored: all {layers} layers, post_layernorm"), stored),
            line("vision.needed", format!("vision tower as needed: {feature} layers, up to the feature layer"), vision),
            line("projector", "connector: both layers with biases".into(), projector),
            line("table", format!("token table as stored: {rows} rows"), table),
            line(
                "edge",
                "what a client needs: vision tower as needed, connector, whole token table".into(),
                vision + projector + table,
            ),
            line(
                "edge.adapters",
                "the same and both adapters (these in f32)".into(),
                vision + projector + table + adapters,
            ),
            line(
                "edge.stored",
                "all that is stored: vision tower as stored, connector, whole token table, both adapters".into(),
                stored + projector + table + adapters,
            ),
        ];
        // Where `<image>` was appended to the language model's vocabulary, what follows it is padding.
        let own = u64::from(self.config.image_token);
        if 2 * own > text.vocab as u64 {
            let table = Amount { parameters: own * self.width, bytes: matrix_bytes(dtype, own, self.width) };
            lines.push(line(
                "table.own",
                format!("token table of the language model's own {own} tokens: without <image> and padding rows"),
                table,
            ));
            lines.push(line(
                "edge.own",
                format!("vision tower as stored, connector, token table of {own} rows, both adapters"),
                stored + projector + table + adapters,
            ));
        }
        Section {
            title: format!("Client share, stored as {}", dtype_name(dtype)),
            share_of: "whole model, parameters",
            forms: vec![dtype_name(dtype)],
            lines,
        }
    }

    fn adapters(&self) -> Section {
        let (rank, width) = (self.options.rank, self.width);
        let line = |key, counted: &str, values: u64| {
            Line::new(key, counted).parameters(values, self.whole).bytes("f32", 4 * values).bytes("f16", 2 * values)
        };
        let shapes = format!("two adapters, down [{rank}, {width}] and up [{width}, {rank}] each, no biases");
        Section {
            title: "Adapters, and their transfer in a round".into(),
            share_of: "whole model, parameters",
            forms: vec!["f32", "f16"],
            lines: vec![
                line("adapters", &shapes, self.adapters),
                line("upload.fedavg", "up, strategy fedavg: adapters", self.adapters),
                line("upload.fisher", "up, strategy fisher: adapters and Fisher values", 2 * self.adapters),
                line("download", "down, each round: merged adapters", self.adapters),
            ],
        }
    }

    /// `h` or `g` of a sample.
    fn activations(&self, form: Form) -> u64 {
        form.rows(self.tokens(), self.width)
    }

    /// Image features, and text as ids of 4 bytes.
    fn features(&self, form: Form) -> u64 {
        form.rows(self.image_tokens, self.width) + 4 * self.text_tokens
    }

    /// `z` or `upᵀg` of a sample.
    fn codes(&self, form: Form) -> u64 {
        form.rows(self.tokens(), self.options.rank)
    }

    /// Both `up` matrices, or their gradients.
    fn matrices(&self, form: Form) -> u64 {
        form.rows(2 * self.width, self.options.rank)
    }

    fn boundary(&self) -> Section {
        let (tokens, width) = (self.tokens(), self.width);
        let (rank, batch) = (self.options.rank, self.options.batch);
        let both = 2 * self.activations(Form::F16);
        let line =
            |key, counted: String, bytes: &dyn Fn(Form) -> u64| Line::new(key, counted).forms(bytes).share_of_f16(both);
        let amortised = |form: Form| self.matrices(form).div_ceil(batch);
        let step = |form: Form| self.codes(form) + amortised(form);
        Section {
            title: format!(
                "Boundary, a sample and step: {} image and {} text tokens, batch {batch}",
                self.image_tokens, self.text_tokens
            ),
            share_of: "activations up and down, f16",
            forms: Form::NAMES.to_vec(),
            lines: vec![
                line("activations.up", format!("activations, up: h [{tokens}, {width}]"), &|f| self.activations(f)),
                line("activations.down", format!("activations, down: g [{tokens}, {width}]"), &|f| self.activations(f)),
                line(
                    "low_rank.features",
                    format!("low-rank, up, once a sample: image features [{}, {width}], text ids", self.image_tokens),
                    &|f| self.features(f),
                ),
                line("low_rank.codes_up", format!("low-rank, up: z [{tokens}, {rank}]"), &|f| self.codes(f)),
                line(
                    "low_rank.matrices_up",
                    format!("low-rank, up: both up matrices [{width}, {rank}], shared by the batch"),
                    &amortised,
                ),
                line("low_rank.up", "low-rank, up: z and the share of the matrices".into(), &step),
                line("low_rank.codes_down", format!("low-rank, down: upᵀg [{tokens}, {rank}]"), &|f| self.codes(f)),
                line(
                    "low_rank.matrices_down",
                    format!("low-rank, down: both dL/d up [{width}, {rank}], shared by the batch"),
                    &amortised,
                ),
                line("low_rank.down", "low-rank, down: upᵀg and the share of dL/d up".into(), &step),
            ],
        }
    }

    /// One epoch at the boundary in mode `low-rank`, both directions, features not counted.
    fn low_rank_epoch(&self, form: Form) -> u64 {
        let (samples, steps) = (self.options.samples, self.options.samples.div_ceil(self.options.batch));
        2 * (samples * self.codes(form) + steps * self.matrices(form))
    }

    fn round(&self) -> Section {
        let (samples, epochs) = (self.options.samples, self.options.local_epochs);
        let epoch = |form: Form| 2 * samples * self.activations(form);
        let all = epochs * epoch(Form::F16);
        let line =
            |key, counted: &str, bytes: &dyn Fn(Form) -> u64| Line::new(key, counted).forms(bytes).share_of_f16(all);
        let later = |form: Form| epochs * self.low_rank_epoch(form);
        Section {
            title: format!("Boundary, a round of {samples} samples and {epochs} local epochs, up and down together"),
            share_of: "activations, f16",
            forms: Form::NAMES.to_vec(),
            lines: vec![
                line("round.activations", "activations: h and g of all training steps", &|f| epochs * epoch(f)),
                line("round.low_rank.first", "low-rank, first round: features once, then all training steps", &|f| {
                    samples * self.features(f) + later(f)
                }),
                line("round.low_rank", "low-rank, each later round: all training steps", &later),
                line("fisher.activations", "activations: a Fisher pass over all samples adds", &epoch),
                line("fisher.low_rank", "low-rank: a Fisher pass over all samples adds", &|f| self.low_rank_epoch(f)),
            ],
        }
    }

    fn lora_section(&self) -> Section {
        let (rank, layers, of) = (self.options.rank, self.config.text.layers, self.lora_with_projector);
        let line = |key, counted: String, values: u64| {
            Line::new(key, counted).parameters(values, of).bytes("f32", 4 * values).bytes("f16", 2 * values)
        };
        let matrices = format!("LoRA of rank {rank} on q, k, v, o, gate, up and down of {layers} decoder layers");
        Section {
            title: "For comparison: federated LoRA, the whole model on the client".into(),
            share_of: "LoRA and connector, parameters",
            forms: vec!["f32", "f16"],
            lines: vec![
                line("lora", format!("{matrices}: trained, and uploaded each round"), self.lora),
                line(
                    "lora.projector",
                    "the same and the connector in full: trained, and uploaded each round".into(),
                    of,
                ),
                line("lora.adapters", "FedNano's adapters beside it, strategy fedavg".into(), self.adapters),
                line("lora.fisher", "FedNano's adapters and Fisher values beside it".into(), 2 * self.adapters),
                Line::new("lora.download", "once, down: the whole model, which a client must hold")
                    .bytes("f16", 2 * self.whole),
            ],
        }
    }

    fn break_even(&self) -> BreakEven {
        let (form, epochs, batch) = (Form::F16, self.options.local_epochs, self.options.batch);
        let lora = 2 * 2 * self.lora_with_projector;
        let step = 2 * (self.codes(form) + self.matrices(form).div_ceil(batch));
        BreakEven {
            activations: lora / (2 * epochs * self.activations(form)),
            low_rank_first_round: lora / (self.features(form) + epochs * step),
            low_rank_later_rounds: lora / (epochs * step),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets::find;

    fn options() -> Options {
        Options {
            rank: 64,
            edge_dtype: EdgeDtype::F16,
            batch: 16,
            question_tokens: 48,
            answer_tokens: 16,
            samples: 1000,
            local_epochs: 1,
        }
    }

    #[test]
    fn the_figures_of_the_design_come_out() {
        let a = account(&find("llava-1.5-7b").unwrap(), options()).unwrap();
        let parameters = |key: &str| a.line(key).and_then(|l| l.parameters).unwrap();
        let bytes = |key: &str, form: &str| a.line(key).unwrap().bytes[form];
        assert_eq!(parameters("adapters"), 1_048_576);
        assert_eq!(parameters("model"), 7_063_427_072);
        assert_eq!(parameters("vision.stored"), 303_507_456);
        assert_eq!(parameters("vision.needed"), 290_909_184);
        assert_eq!(parameters("projector"), 20_979_712);
        assert_eq!(parameters("table.own"), 131_072_000);
        assert_eq!(parameters("edge.own"), 456_607_744);
        assert_eq!(parameters("edge"), 443_223_040);
        assert_eq!(bytes("edge", "f16"), 2 * 443_223_040);
        let percent = |key: &str| format!("{:.4}", a.line(key).unwrap().share.unwrap() * 100.0);
        assert_eq!(
            [percent("adapters"), percent("vision.stored"), percent("edge.own")],
            ["0.0148", "4.2969", "6.4644"]
        );
        // Of anchors.md: adapter-FL, activations, and where they meet.
        assert_eq!(parameters("lora.projector"), 180_887_552);
        assert_eq!(bytes("activations.up", "f16"), 640 * 4096 * 2);
        assert_eq!(a.break_even.activations, 69);
    }

    #[test]
    fn low_rank_sends_codes_and_a_share_of_the_matrices() {
        let a = account(&find("llava-1.5-7b").unwrap(), options()).unwrap();
        let bytes = |key: &str, form: &str| a.line(key).unwrap().bytes[form];
        assert_eq!(bytes("low_rank.features", "int8"), 576 * 4098 + 64 * 4);
        assert_eq!(bytes("low_rank.codes_up", "int8"), 640 * 66);
        assert_eq!(bytes("low_rank.matrices_up", "f32"), 2 * 4096 * 64 * 4 / 16);
        assert_eq!(bytes("low_rank.down", "f16"), 640 * 64 * 2 + 65_536);
        assert_eq!(bytes("low_rank.down", "int8"), 640 * 66 + 2 * 4096 * 66 / 16);
        // 1000 samples in batches of 16 are 63 steps.
        assert_eq!(bytes("round.low_rank", "f16"), 2 * (1000 * 81_920 + 63 * 1_048_576));
    }

    #[test]
    fn quantised_matrices_carry_scales_and_vectors_stay_in_f16() {
        assert_eq!(matrix_bytes(EdgeDtype::Int8, 3, 70), 3 * 72);
        assert_eq!(matrix_bytes(EdgeDtype::Int4, 3, 70), 3 * 3 * 18);
        assert_eq!(vector_bytes(10), 20);
    }

    #[test]
    fn unusable_options_are_named() {
        let config = find("tiny").unwrap();
        let fault = |o: Options| account(&config, o).unwrap_err().to_string();
        assert!(fault(Options { rank: 0, ..options() }).contains("--rank is 0"));
        assert!(fault(Options { answer_tokens: 200, ..options() }).contains("256 positions"));
    }
}
