//! Questions and answers to token ids, with the picture's place held by image tokens.
//!
//! A missing part leaves the prompt with the white space between it and the other part, as in LLaVA's own training code
//! (haotian-liu/LLaVA, llava/train/train.py: `preprocess_multimodal` strips `<image>\n` where no text follows, and records without a
//! picture get no `<image>`): of `USER: <image>\n{question} ASSISTANT:` remains `USER: <image> ASSISTANT:` for a picture alone,
//! `USER: {question} ASSISTANT:` for a question alone.

use crate::config::ModelConfig;
use tokenizers::Tokenizer;

/// The prompt of LLaVA-1.5; `{question}` is replaced, `<image>` becomes the image tokens.
pub const LLAVA_PROMPT: &str = "USER: <image>\n{question} ASSISTANT:";

const IMAGE: &str = "<image>";
const QUESTION: &str = "{question}";

/// Why text cannot be encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TextError {
    /// tokenizer.json or its companions.
    #[error("{file} cannot be used: {cause}")]
    File {
        /// Which file.
        file: &'static str,
        /// What is wrong.
        cause: String,
    },
    /// Nothing to answer.
    #[error("there is neither a picture nor a question; at least one of them is needed")]
    NoPrompt,
    /// No answer.
    #[error("{0} has no answer; every training sample needs one")]
    NoAnswer(String),
    /// Longer than the model's positions.
    #[error("{asked} takes {tokens} tokens in all, the model has {limit} positions; shorten it")]
    TooLong {
        /// What was asked.
        asked: String,
        /// Length found.
        tokens: usize,
        /// Length allowed.
        limit: usize,
    },
    /// The tokenizer refused.
    #[error("'{text}' cannot be tokenized: {cause}")]
    Tokenize {
        /// The text.
        text: String,
        /// The tokenizer's words.
        cause: String,
    },
}

/// A tokenized sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    /// `<s>` prompt (image tokens in place) answer `</s>`; without answer the prompt alone.
    pub ids: Vec<u32>,
    /// Index of the first image token; none: there is no picture.
    pub image_start: Option<usize>,
    /// Ids that belong to the prompt.
    pub prompt_length: usize,
}

/// Tokenizer and prompt of a model.
#[derive(Clone)]
pub struct TextCodec {
    tokenizer: Tokenizer,
    prompt: String,
    image_token: u32,
    image_tokens: usize,
    max_positions: usize,
    eos: u32,
    stops: Vec<u32>,
}

impl TextCodec {
    /// From the files of a model directory; `generation_config` and `processor_config` may be absent.
    /// `processor_config.json` may carry the prompt under `fednano_prompt`.
    ///
    /// # Errors
    /// [`TextError::File`] names the file and the fault.
    pub fn new(
        config: &ModelConfig,
        tokenizer: &[u8],
        generation_config: Option<&[u8]>,
        processor_config: Option<&[u8]>,
    ) -> Result<Self, TextError> {
        let fault = |file: &'static str| move |cause: String| TextError::File { file, cause };
        let tokenizer = Tokenizer::from_bytes(tokenizer).map_err(|e| fault("tokenizer.json")(e.to_string()))?;
        let json = |bytes: Option<&[u8]>, file: &'static str| match bytes {
            None => Ok(serde_json::Value::Null),
            Some(b) => serde_json::from_slice(b).map_err(|e| fault(file)(e.to_string())),
        };
        let generation = json(generation_config, "generation_config.json")?;
        let processor = json(processor_config, "processor_config.json")?;
        // One id, or a list of which the first ends answers that are learned from.
        let listed = &generation["eos_token_id"];
        let mut stops: Vec<u32> = listed
            .as_array()
            .unwrap_or(&vec![listed.clone()])
            .iter()
            .filter_map(|n| Some(n.as_u64()? as u32))
            .collect();
        if stops.is_empty() {
            stops.extend(tokenizer.token_to_id("</s>"));
        }
        let eos = *stops
            .first()
            .ok_or_else(|| fault("generation_config.json")("no eos_token_id, and no </s> in tokenizer.json".into()))?;
        if tokenizer.token_to_id("<image>").is_none_or(|id| id != config.image_token) {
            return Err(fault("tokenizer.json")(format!(
                "<image> must be token {}, the image_token_index of config.json",
                config.image_token
            )));
        }
        let prompt = processor["fednano_prompt"].as_str().unwrap_or(LLAVA_PROMPT).to_owned();
        if prompt.matches(IMAGE).count() != 1 || prompt.matches(QUESTION).count() != 1 {
            return Err(fault("processor_config.json")("fednano_prompt needs <image> and {question} once each".into()));
        }
        Ok(Self {
            tokenizer,
            prompt,
            image_token: config.image_token,
            image_tokens: config.image_tokens(),
            max_positions: config.text.max_positions,
            eos,
            stops,
        })
    }

    /// The id that ends an answer.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// Whether an id ends a generated answer.
    pub fn is_stop(&self, id: u32) -> bool {
        self.stops.contains(&id)
    }

    /// Encode a question about a picture (empty: the picture alone), and an answer to learn from if there is one.
    ///
    /// # Errors
    /// [`TextError`] for an empty answer or overlong text.
    pub fn encode(&self, question: &str, answer: Option<&str>) -> Result<Encoded, TextError> {
        let question = cleaned(question);
        let prompt = if question.is_empty() {
            without(&self.prompt, QUESTION, IMAGE)
        } else {
            self.prompt.replace(QUESTION, &question)
        };
        self.encode_prompt(&prompt, &question, answer)
    }

    /// Encode a question without a picture, and an answer to learn from if there is one.
    ///
    /// # Errors
    /// [`TextError`] for empty or overlong text.
    pub fn encode_text(&self, question: &str, answer: Option<&str>) -> Result<Encoded, TextError> {
        let question = cleaned(question);
        if question.is_empty() {
            return Err(TextError::NoPrompt);
        }
        let prompt = without(&self.prompt, IMAGE, QUESTION).replace(QUESTION, &question);
        self.encode_prompt(&prompt, &question, answer)
    }

    /// `question` is for errors only.
    fn encode_prompt(&self, prompt: &str, question: &str, answer: Option<&str>) -> Result<Encoded, TextError> {
        let asked = || match question {
            "" => "a picture without question".to_owned(),
            _ => format!("the question '{question}'"),
        };
        let prompt = self.ids(prompt, true)?;
        let mut ids = Vec::with_capacity(prompt.len() + self.image_tokens);
        let mut image_start = None;
        for id in prompt {
            if id == self.image_token {
                image_start = Some(ids.len());
                ids.extend(std::iter::repeat_n(id, self.image_tokens));
            } else {
                ids.push(id);
            }
        }
        let prompt_length = ids.len();
        if let Some(answer) = answer {
            let answer = cleaned(answer);
            if answer.is_empty() {
                return Err(TextError::NoAnswer(asked()));
            }
            ids.extend(self.ids(&answer, false)?);
            ids.push(self.eos);
        }
        if ids.len() > self.max_positions {
            return Err(TextError::TooLong { asked: asked(), tokens: ids.len(), limit: self.max_positions });
        }
        Ok(Encoded { ids, image_start, prompt_length })
    }

    /// Ids of a bare text; `special` lets the post-processor add `<s>`.
    ///
    /// # Errors
    /// [`TextError::Tokenize`].
    pub fn ids(&self, text: &str, special: bool) -> Result<Vec<u32>, TextError> {
        self.tokenizer
            .encode(text, special)
            .map(|e| e.get_ids().to_vec())
            .map_err(|e| TextError::Tokenize { text: text.to_owned(), cause: e.to_string() })
    }

    /// Text of ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        // Ids beyond the tokenizer (a table may have spare rows) decode to nothing.
        let known: Vec<u32> = ids.iter().copied().filter(|id| self.tokenizer.id_to_token(*id).is_some()).collect();
        self.tokenizer.decode(&known, true).unwrap_or_default().trim().to_owned()
    }
}

/// Trimmed, and without the picture's mark: its place cannot be written by a text itself.
fn cleaned(text: &str) -> String {
    text.replace(IMAGE, " ").trim().to_owned()
}

/// A prompt without one of its two parts, and without the white space between that and the other part.
fn without(prompt: &str, missing: &str, other: &str) -> String {
    match prompt.split_once(missing) {
        Some((before, after)) if after.contains(other) => format!("{before}{}", after.trim_start()),
        Some((before, after)) => format!("{}{after}", before.trim_end()),
        None => prompt.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_part_takes_the_white_space_to_the_other_with_it() {
        let parts = |prompt: &str| (without(prompt, QUESTION, IMAGE), without(prompt, IMAGE, QUESTION));
        for (prompt, picture, text) in [
            (LLAVA_PROMPT, "USER: <image> ASSISTANT:", "USER: {question} ASSISTANT:"),
            ("<image>{question}", "<image>", "{question}"),
            ("{question}\n<image> ", "<image> ", "{question} "),
            (
                "See <image>\nQuestion: {question} Answer:",
                "See <image>\nQuestion: Answer:",
                "See Question: {question} Answer:",
            ),
        ] {
            assert_eq!(parts(prompt), (picture.to_owned(), text.to_owned()), "{prompt}");
        }
    }
}
