//! Decoding token by token. The client makes every embedding (prompt, picture, and each token that was chosen, through its own
//! text adapter); the server keeps keys and values of what it has seen and chooses the next token.

use crate::boundary::RequestError;
use crate::data::text::Encoded;
use crate::edge::NanoEdge;
use crate::model::adapter::{DeviceError, NanoAdapters};
use crate::model::llama::KvCache;
use crate::plain::TensorBlob;
use crate::step::{self, BoundaryError, FrozenLlm, StepError};
use burn::tensor::Device;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0: the likeliest token. Else logits are divided by it.
    pub temperature: f32,
    /// Only the likeliest tokens that together reach this probability (nucleus sampling, Holtzman et al. 2020,
    /// arXiv 1904.09751); 1: all.
    pub top_p: f32,
    /// Equal seeds give equal texts.
    pub seed: u64,
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_p: 1.0, seed: 0 };

    /// Check the values.
    ///
    /// # Errors
    /// The value out of range, in words.
    pub fn check(&self) -> Result<(), String> {
        if !(0.0..=100.0).contains(&self.temperature) {
            return Err(format!("temperature is {}, it must be 0 to 100", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(format!("top_p is {}, it must be above 0 and at most 1", self.top_p));
        }
        Ok(())
    }

    /// Choose from logits `[V]`; `position` makes each draw of a text another one.
    pub fn choose(&self, logits: &[f32], position: usize) -> NextToken {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        // Equal logits: the lower id, as argmax does.
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let best = order.first().map_or(0.0, |&i| logits[i]);
        let log_sum = logits.iter().map(|l| f64::from(l - best).exp()).sum::<f64>().ln();
        let reply = |i: usize| NextToken {
            token: i as u32,
            log_probability: logits.get(i).map_or(0.0, |l| (f64::from(l - best) - log_sum) as f32),
        };
        if self.temperature <= 0.0 {
            return reply(order.first().copied().unwrap_or(0));
        }
        let weight = |i: usize| (f64::from(logits[i] - best) / f64::from(self.temperature)).exp();
        let total: f64 = order.iter().map(|&i| weight(i)).sum();
        let mut reached = 0.0;
        let nucleus = order.iter().position(|&i| {
            reached += weight(i) / total;
            reached >= f64::from(self.top_p)
        });
        order.truncate(nucleus.map_or(order.len(), |last| last + 1));
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(position as u64);
        let mut left = rng.random::<f64>() * order.iter().map(|&i| weight(i)).sum::<f64>();
        let chosen = order.iter().find(|&&i| {
            left -= weight(i);
            left < 0.0
        });
        reply(chosen.or(order.last()).copied().unwrap_or(0))
    }
}

/// New positions of a text, and how to choose what follows them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// Positions that the server has seen already; 0 begins a text and forgets the connection's former one.
    pub past: u32,
    /// Embeddings `[1, S, D]` of the positions that follow them.
    pub hidden: TensorBlob,
    /// How to choose.
    pub sampling: Sampling,
}

impl GenerateRequest {
    /// Check everything that the server relies on.
    ///
    /// # Errors
    /// [`RequestError`] says which value is wrong.
    pub fn check(&self, dim: usize, max_positions: usize) -> Result<(), RequestError> {
        let new = self.hidden.shape.get(1).copied().unwrap_or(0);
        if new == 0 || self.hidden.shape.len() != 3 {
            return Err(RequestError::Invalid(format!(
                "embeddings have shape {:?}, expected [1, positions, {dim}]",
                self.hidden.shape
            )));
        }
        if new > max_positions || self.past as usize > max_positions - new {
            let asked = self.past as usize + new;
            return Err(RequestError::Invalid(format!(
                "the text has {asked} positions, the model takes {max_positions}; shorten the question or the answer"
            )));
        }
        self.hidden.check("embeddings", &[1, new, dim])?;
        self.sampling.check().map_err(RequestError::Invalid)
    }
}

/// The token that follows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NextToken {
    /// Its id.
    pub token: u32,
    /// Its log-probability at temperature 1, nats.
    pub log_probability: f32,
}

/// Answers [`GenerateRequest`]s: over the wire, or in-process.
#[allow(async_fn_in_trait)] // as for `LlmBoundary`
pub trait TokenSource {
    /// The next token.
    async fn next(&mut self, request: GenerateRequest) -> Result<NextToken, BoundaryError>;
}

/// Why a token could not be chosen.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// The request.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The cache of this text is gone.
    #[error("{past} positions of this text should be here, {held} are; begin it again")]
    Forgotten {
        /// Positions that the client counts on.
        past: u32,
        /// Positions held.
        held: usize,
    },
}

/// Texts under way, one for each session; when they are too many or too large, those that were asked for
/// longest ago are forgotten.
pub struct Generations {
    held: VecDeque<(u64, KvCache)>, // least recently used first
    limit: usize,
    bytes: usize,
}

impl Generations {
    /// Room for `limit` texts whose keys and values have so many `bytes` together; the latest one is kept in any case.
    pub fn new(limit: usize, bytes: usize) -> Self {
        Self { held: VecDeque::new(), limit: limit.max(1), bytes }
    }

    /// Go on with the text of a session.
    ///
    /// # Errors
    /// [`GenerateError`].
    pub async fn next(
        &mut self,
        llm: &FrozenLlm,
        session: u64,
        request: &GenerateRequest,
    ) -> Result<NextToken, GenerateError> {
        llm.check_generation(request)?;
        let kept = self.take(session);
        let mut cache = match kept {
            _ if request.past == 0 => llm.new_cache(),
            Some(cache) if cache.positions() == request.past as usize => cache,
            other => {
                let held = other.map_or(0, |c| c.positions());
                return Err(GenerateError::Forgotten { past: request.past, held });
            }
        };
        let logits = llm.next_logits(&mut cache, &request.hidden).await?;
        let reply = request.sampling.choose(&logits, cache.positions());
        self.keep(session, cache);
        Ok(reply)
    }

    /// Make room for a text, the latest one.
    fn keep(&mut self, session: u64, cache: KvCache) {
        let held = |all: &VecDeque<(u64, KvCache)>| all.iter().map(|(_, c)| c.bytes()).sum::<usize>();
        while self.held.len() >= self.limit || (!self.held.is_empty() && held(&self.held) + cache.bytes() > self.bytes)
        {
            self.held.pop_front();
        }
        self.held.push_back((session, cache));
    }

    /// A session's text is over.
    pub fn forget(&mut self, session: u64) {
        drop(self.take(session));
    }

    fn take(&mut self, session: u64) -> Option<KvCache> {
        let at = self.held.iter().position(|(s, _)| *s == session)?;
        self.held.remove(at).map(|(_, cache)| cache)
    }
}

/// The LLM in the same process.
pub struct InProcessTokens<'a> {
    llm: &'a FrozenLlm,
    generations: Generations,
}

impl<'a> InProcessTokens<'a> {
    /// Of one text at a time.
    pub fn new(llm: &'a FrozenLlm) -> Self {
        Self { llm, generations: Generations::new(1, usize::MAX) }
    }
}

impl TokenSource for InProcessTokens<'_> {
    async fn next(&mut self, request: GenerateRequest) -> Result<NextToken, BoundaryError> {
        self.generations.next(self.llm, 0, &request).await.map_err(|e| BoundaryError::Refused(e.to_string()))
    }
}

/// Bounds of an answer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AnswerOptions {
    /// Tokens at most.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// Answer a prompt. `on_text` hears the text so far after each token and stops the answer by returning false.
/// With the prompt go the picture's features, `P * D` values (none for a prompt without picture); the text adapter covers the
/// generated tokens too.
///
/// # Errors
/// [`StepError`].
pub async fn answer<S: TokenSource>(
    edge: &NanoEdge,
    adapters: Option<&NanoAdapters>,
    (prompt, features): (&Encoded, &[f32]),
    options: AnswerOptions,
    source: &mut S,
    device: &Device,
    mut on_text: impl FnMut(&str) -> bool,
) -> Result<String, StepError> {
    let mut ids = Vec::new();
    let mut batch = edge.assemble(&[(prompt, features)])?;
    let (mut past, mut text) = (0, String::new());
    let room = edge.config.text.max_positions.saturating_sub(prompt.ids.len());
    for _ in 0..options.max_tokens.min(room) {
        let TensorBlob { shape, data } = step::adapted(adapters, &batch, device).await?; // [S,D]
        let hidden = TensorBlob { shape: [vec![1], shape].concat(), data };
        let new = batch.positions.total() as u32;
        let next = source.next(GenerateRequest { past, hidden, sampling: options.sampling }).await?;
        past += new;
        if edge.text.is_stop(next.token) {
            break;
        }
        if next.token as usize >= edge.vocabulary() {
            return Err(StepError::Reply(format!("token {} is outside the vocabulary", next.token)));
        }
        ids.push(next.token);
        text = edge.text.decode(&ids);
        if !on_text(&text) {
            break;
        }
        batch = edge.assemble_token(next.token);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelConfig;
    use crate::model::llama::Llama;
    use burn::tensor::Tensor;

    #[test]
    fn greedy_takes_the_best_and_tells_its_probability() {
        let next = Sampling::GREEDY.choose(&[0.0, 3f32.ln(), 3f32.ln()], 5);
        assert_eq!(next.token, 1);
        assert!((next.log_probability - (3.0f32 / 7.0).ln()).abs() < 1e-6);
    }

    #[test]
    fn sampling_follows_the_probabilities_and_the_nucleus() {
        let logits: Vec<f32> = [0.6f32, 0.3, 0.1].iter().map(|p| p.ln()).collect();
        let share = |sampling: Sampling, token: u32| {
            let hits = (0..4000).filter(|&p| sampling.choose(&logits, p).token == token).count();
            hits as f32 / 4000.0
        };
        let all = Sampling { temperature: 1.0, top_p: 1.0, seed: 1 };
        for (token, p) in [(0, 0.6), (1, 0.3), (2, 0.1)] {
            assert!((share(all, token) - p).abs() < 0.03);
        }
        let nucleus = Sampling { top_p: 0.8, ..all };
        assert_eq!(share(nucleus, 2), 0.0);
        assert!((share(nucleus, 0) - 2.0 / 3.0).abs() < 0.03);
        let cold = Sampling { temperature: 0.05, ..all };
        assert!(share(cold, 0) > 0.99);
        assert_eq!(all.choose(&logits, 7), all.choose(&logits, 7));
    }

    #[test]
    fn texts_are_forgotten_by_number_and_by_memory() {
        let json = r#"{"model_type":"llava","image_token_index":7,
            "vision_config":{"hidden_size":24,"intermediate_size":40,"num_hidden_layers":3,"num_attention_heads":2,
            "image_size":8,"patch_size":4},
            "text_config":{"hidden_size":36,"intermediate_size":48,"num_hidden_layers":1,"num_attention_heads":2,
            "vocab_size":50}}"#;
        let device = Device::flex();
        let llama = Llama::init(&ModelConfig::from_json(json).unwrap().text, &device);
        let cache = |positions: usize| {
            let mut cache = llama.new_cache();
            drop(llama.forward_cached(Tensor::zeros([1, positions, 36], &device), &mut cache));
            cache
        };
        let one = 2 * 36 * 4; // keys and values of a position, f32
        assert_eq!((llama.new_cache().bytes(), cache(3).bytes()), (0, 3 * one));
        let left = |limit: usize, bytes: usize, texts: &[usize]| {
            let mut all = Generations::new(limit, bytes);
            texts.iter().enumerate().for_each(|(session, n)| all.keep(session as u64, cache(*n)));
            all.held.iter().map(|(session, _)| *session).collect::<Vec<_>>()
        };
        assert_eq!(left(2, usize::MAX, &[1, 1, 1]), [1, 2]);
        assert_eq!(left(9, 5 * one, &[2, 3]), [0, 1]);
        assert_eq!(left(9, 5 * one, &[2, 2, 1, 4]), [2, 3]);
        assert_eq!(left(9, 5 * one, &[2, 2, 6]), [2]);
    }

    #[test]
    fn values_out_of_range_are_named() {
        let request = |past, shape: Vec<usize>, sampling| {
            let data = vec![0.0; shape.iter().product()];
            GenerateRequest { past, hidden: TensorBlob { shape, data }, sampling }
        };
        let fault = |r: GenerateRequest| r.check(2, 10).unwrap_err().to_string();
        assert!(request(4, vec![1, 6, 2], Sampling::GREEDY).check(2, 10).is_ok());
        assert!(fault(request(5, vec![1, 6, 2], Sampling::GREEDY)).contains("11 positions"));
        assert!(fault(request(u32::MAX, vec![1, 6, 2], Sampling::GREEDY)).contains("positions"));
        assert!(fault(request(0, vec![1, 0, 2], Sampling::GREEDY)).contains("shape"));
        assert!(fault(request(0, vec![2, 3, 2], Sampling::GREEDY)).contains("shape"));
        let hot = Sampling { temperature: f32::NAN, ..Sampling::GREEDY };
        assert!(fault(request(0, vec![1, 1, 2], hot)).contains("temperature"));
    }
}
