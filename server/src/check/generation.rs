//! Greedy decoding with the cache of keys and values, and without it.

use super::llm::Decoder;
use burn::tensor::Device;
use fednano_shared::check::table::{Part, Table};
use fednano_shared::check::tensor;
use fednano_shared::edge::NanoEdge;
use fednano_shared::model::adapter::{NanoAdapters, read};
use fednano_shared::plain::TensorBlob;
use fednano_shared::step;

/// What embeds a chosen token: the client's half and, if there are any, its adapters.
pub(super) struct Embedder<'a> {
    pub(super) edge: &'a NanoEdge,
    pub(super) adapters: Option<&'a NanoAdapters>,
    /// Without autodiff.
    pub(super) device: &'a Device,
}

impl Embedder<'_> {
    /// `D` values; a generated token is text, never image.
    async fn embed(&self, token: usize) -> anyhow::Result<Vec<f32>> {
        let batch = self.edge.assemble_token(token as u32);
        Ok(step::adapted(self.adapters, &batch, self.device).await?.data)
    }
}

/// Texts of all rows, T tokens each.
struct Texts {
    tokens: Vec<i64>,
    /// `[B, T, V]`: the logits that each token was chosen from.
    scores: TensorBlob,
    /// `[B, T]`: the best logit minus the second best.
    margins: TensorBlob,
}

/// Decode from the prompts' embeddings in `hidden` `[B, S, D]` and compare with `{prefix}generate.*`.
pub(super) async fn compare(
    table: &mut Table<'_>,
    prefix: &str,
    decoder: &Decoder,
    embedder: &Embedder<'_>,
    hidden: &TensorBlob,
) -> anyhow::Result<()> {
    let reference = table.reference;
    let tokens = format!("{prefix}generate.tokens");
    let Some(([rows, steps], _)) = reference.whole(&tokens) else {
        return Ok(());
    };
    let shape = [*rows, *steps];
    if *rows != table.inputs.rows || *steps == 0 {
        table.fail(&tokens, &shape, format!("the batch has {} rows", table.inputs.rows));
        return Ok(());
    }
    let scores = format!("{prefix}generate.scores");
    let cached = decode(table, decoder, embedder, hidden, *steps, true).await?;
    let plain = decode(table, decoder, embedder, hidden, *steps, false).await?;
    let largest = cached.scores.data.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
    for (texts, way) in [(&cached, ""), (&plain, "@uncached")] {
        table.add_whole(&format!("{tokens}{way}"), &shape, &texts.tokens, Part::All);
        if reference.floats(&scores).is_some() {
            table.add(&format!("{scores}{way}"), &texts.scores, Part::All);
        }
        table.add_scaled(&format!("{prefix}generate.margins{way}"), &texts.margins, largest);
    }
    table.add_own(&format!("{scores}@cache"), &cached.scores, &plain.scores, "with the cache against without it");
    Ok(())
}

async fn decode(
    table: &Table<'_>,
    decoder: &Decoder,
    embedder: &Embedder<'_>,
    hidden: &TensorBlob,
    steps: usize,
    cached: bool,
) -> anyhow::Result<Texts> {
    let inputs = table.inputs;
    let (mut tokens, mut scores, mut margins) = (Vec::new(), Vec::new(), Vec::new());
    for (row, length) in hidden.data.chunks_exact(inputs.seq * inputs.dim).zip(&inputs.prompt_lengths) {
        let mut cache = decoder.llm.new_cache();
        // Embeddings that the decoder is to see: all of them, or those that the cache lacks.
        let mut unseen = row[..length * inputs.dim].to_vec();
        for _ in 0..steps {
            let positions = unseen.len() / inputs.dim;
            let h = TensorBlob { shape: vec![1, positions, inputs.dim], data: unseen.clone() };
            let h = tensor::<3>(&h, &decoder.device);
            let states = if cached {
                decoder.llm.forward_cached(h, &mut cache)
            } else {
                decoder.llm.forward(h, &decoder.llm.causal_layout(positions, &decoder.device))
            };
            let last = states.narrow(1, positions - 1, 1).reshape([1, inputs.dim]); // [1,S,D] -> [1,D]
            let logits = read(decoder.llm.logits(last).inner()).await?.data;
            let (token, margin) = best(&logits);
            tokens.push(token as i64);
            margins.push(margin);
            scores.extend(logits);
            let next = embedder.embed(token).await?;
            if cached {
                unseen.clear();
            }
            unseen.extend(next);
        }
    }
    let vocabulary = scores.len() / tokens.len().max(1);
    Ok(Texts {
        tokens,
        scores: TensorBlob { shape: vec![inputs.rows, steps, vocabulary], data: scores },
        margins: TensorBlob { shape: vec![inputs.rows, steps], data: margins },
    })
}

/// Index of the largest logit, and how far the second is below it.
fn best(logits: &[f32]) -> (usize, f32) {
    let (mut at, mut first, mut second) = (0, f32::NEG_INFINITY, f32::NEG_INFINITY);
    for (i, &logit) in logits.iter().enumerate() {
        if logit > first {
            (at, second, first) = (i, first, logit);
        } else if logit > second {
            second = logit;
        }
    }
    (at, first - second)
}

#[cfg(test)]
mod tests {
    use super::best;

    #[test]
    fn the_best_and_its_margin() {
        assert_eq!(best(&[0.5, 2.0, -1.0, 1.5]), (1, 0.5));
        assert_eq!(best(&[3.0, 1.0]), (0, 2.0));
        assert_eq!(best(&[1.0, 1.0]), (0, 0.0));
        assert!(!best(&[f32::NAN, f32::NAN]).1.is_finite());
    }
}
