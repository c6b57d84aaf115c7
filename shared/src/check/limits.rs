//! How far a value may be from its reference: one table for `fednano check`, the tab and the tests, on every device.
//!
//! A deviation is `max|got - want| / max|want|` over unpadded positions where the source says nothing else. Noise is the worst of
//! ten fixtures against a second f32 implementation and against float64; a mistake is the smallest effect of 18 planted ones.

/// One line of the table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limit {
    /// Name of a row; `*` stands for any text.
    pub pattern: &'static str,
    /// Largest deviation that passes.
    pub limit: f64,
    /// Where the limit comes from.
    pub source: &'static str,
}

const fn line(pattern: &'static str, limit: f64, source: &'static str) -> Limit {
    Limit { pattern, limit, source }
}

const EXACT: &str = "values that differ: none";
const EDGE: &str = "noise 8e-7, smallest mistake 1e-4";
const LLM: &str = "noise 8e-6, smallest mistake 8e-4";
const LOGITS: &str = "noise 1.1e-5, smallest mistake 1e-3";
const LOSS: &str = "noise 6e-7; a small mistake may hide in a mean";
const GRADIENT: &str = "noise 6.3e-5, smallest mistake 9e-4";
const FISHER: &str = "noise 3.1e-5, smallest mistake 1.5e-3";

/// The first line that matches counts.
pub const LIMITS: &[Limit] = &[
    line("image_u8", 1.0, "levels of 255: resizers round differently"),
    // The same rounded level, seen through the normalisation's f32 noise.
    line("pixel_values", 1.001, "levels of 255: resizers round differently"),
    line("pixel_values@image_u8", 1e-6, "two f32 roundings"),
    line("input_ids", 0.0, EXACT),
    line("prompt_lengths", 0.0, EXACT),
    line("labels", 0.0, EXACT),
    line("attention_mask", 0.0, EXACT),
    line("image_mask", 0.0, EXACT),
    line("*generate.tokens", 0.0, EXACT),
    line("vision.*", 1e-5, EDGE),
    line("image_features", 1e-5, EDGE),
    line("text_embeds", 1e-5, EDGE),
    line("inputs_embeds", 1e-5, EDGE),
    line("adapter.inputs_embeds", 1e-5, EDGE),
    line("llm.*", 1e-4, LLM),
    line("logits", 1e-4, LOGITS),
    line("adapter.logits", 1e-4, LOGITS),
    line("token_nll", 1e-4, LOGITS),
    line("*generate.scores", 1e-4, LOGITS),
    line("*generate.margins", 2e-4, "two logits' limits, as a share of the largest logit"),
    line("*loss", 5e-6, LOSS),
    line("*grad.*", 3e-4, GRADIENT),
    line("adapter.fisher.*", 3e-4, FISHER),
];

/// The limit of a row. What follows an `@` (a part of the tensor, or another way to it) has the tensor's own limit unless the
/// table names it.
pub fn limit_of(row: &str) -> Option<&'static Limit> {
    let find = |name: &str| LIMITS.iter().find(|l| matches(l.pattern, name));
    LIMITS.iter().find(|l| l.pattern == row).or_else(|| find(row.split('@').next().unwrap_or(row)))
}

fn matches(pattern: &str, name: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| name.strip_prefix(first)) else {
        return false;
    };
    let mut between: Vec<&str> = parts.collect();
    let Some(last) = between.pop() else {
        return rest.is_empty();
    };
    for part in between {
        let Some((_, after)) = rest.split_once(part) else {
            return false;
        };
        rest = after;
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_find_their_limits() {
        for (row, limit) in [
            ("vision.hidden_states.2", 1e-5),
            ("inputs_embeds", 1e-5),
            ("adapter.inputs_embeds", 1e-5),
            ("grad.inputs_embeds", 3e-4),
            ("grad.inputs_embeds@image", 3e-4),
            ("adapter.grad.inputs_embeds@image", 3e-4),
            ("adapter.grad.text.up", 3e-4),
            ("adapter.per_sample_grad.image.down", 3e-4),
            ("adapter.fisher.image.up", 3e-4),
            ("adapter.per_sample_loss", 5e-6),
            ("loss", 5e-6),
            ("llm.layer_output.3", 1e-4),
            ("generate.tokens@uncached", 0.0),
            ("adapter.generate.scores@cache", 1e-4),
            ("adapter.generate.margins", 2e-4),
            ("pixel_values", 1.001),
            ("pixel_values@image_u8", 1e-6),
            ("labels@batch", 0.0),
        ] {
            assert_eq!(limit_of(row).map(|l| l.limit), Some(limit), "{row}");
        }
        assert_eq!(limit_of("adapter.image.down"), None);
        assert_eq!(limit_of("logits2"), None);
    }

    #[test]
    fn patterns() {
        assert!(matches("a*c*e", "abcde") && matches("a*", "a") && matches("*a", "ba") && matches("a", "a"));
        assert!(!matches("a*c*e", "abde") && !matches("a", "ab") && !matches("*a", "ab"));
    }
}
