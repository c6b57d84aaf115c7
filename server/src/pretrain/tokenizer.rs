//! nano-llava's `tokenizer.json`: byte-level BPE, lower case, trained on a word list until each word is one token.
//! Any other text still encodes, in pieces.

use fednano_shared::data::scene;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::utils::Lowercase;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
};
use tokenizers::{Tokenizer, TokenizerBuilder};

/// Special tokens; ids 0 to 3 in this order.
pub const SPECIALS: [&str; 4] = ["<pad>", "<s>", "</s>", "<image>"];

/// Frequent words of English (function words, words of pictures), so that a participant's own questions stay short. Their
/// embeddings keep their start values in pretraining.
const COMMON: &str = "a about above across after all also am an and any are around as ask at away back background be because
 before behind below beside best between big both bottom but by call can center chair color colour contain contains could
 dark day depict did different do does each edge either empty every everything exactly far few figure find first for from
 front give go good green group guess has have he her here high him his how i if image in inside into it item its just know
 large last least left less let light like line little located long look low made make many may me middle more most much
 must my name near new next no none not nothing now number object objects of off old on one only or other our out outside
 over part people person photo picture piece place please point present right round same say see seen shade shape she shown
 shows side single size small so some something spot square such take tell than that the their them then there these they
 thing things this those three tint to too top true two under up upon us use very view visible want was wear wears we well were
 what when where whether which while white who whole whose why will with within without wooden word would yellow yes you your";

/// Train the tokenizer.
///
/// # Errors
/// The library's words.
pub fn build() -> anyhow::Result<Tokenizer> {
    let fail = |e: tokenizers::Error| anyhow::anyhow!("the tokenizer cannot be trained: {e}");
    let mut words: Vec<String> = scene::vocabulary().iter().map(|w| format!(" {w}")).collect();
    words.extend(COMMON.split_whitespace().map(|w| format!(" {w}")));
    words.push(" nothing".to_owned());
    words.sort();
    words.dedup();
    let byte_level = ByteLevel::new(true, true, true);
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let specials = SPECIALS.map(|s| AddedToken::from(s, true));
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(8192) // more than the words need: merging ends when every word is whole
        .min_frequency(0)
        .initial_alphabet(alphabet.into_iter().collect())
        .special_tokens(specials.to_vec())
        .build();
    let mut tokenizer =
        TokenizerBuilder::<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>::new()
            .with_model(BPE::default())
            .with_normalizer(Some(Lowercase.into()))
            .with_pre_tokenizer(Some(byte_level.into()))
            .with_post_processor(None)
            .with_decoder(Some(byte_level.into()))
            .build()
            .map_err(fail)?;
    tokenizer.train(&mut trainer, words.into_iter()).map_err(fail)?;
    let template = TemplateProcessing::builder()
        .try_single("<s> $A")
        .map_err(|e| anyhow::anyhow!("{e}"))?
        .special_tokens(vec![("<s>", 1)])
        .build()?;
    tokenizer.with_post_processor(Some(PostProcessorWrapper::from(template)));
    let mut generic: Tokenizer = serde_json::from_str(&serde_json::to_string(&tokenizer)?)?;
    let _: &ModelWrapper = generic.get_model();
    generic.with_truncation(None).map_err(fail)?;
    Ok(generic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_word_of_the_corpus_is_one_token_and_any_text_encodes() {
        let tokenizer = build().unwrap();
        for (id, special) in SPECIALS.iter().enumerate() {
            assert_eq!(tokenizer.token_to_id(special), Some(id as u32));
        }
        for word in scene::vocabulary() {
            let ids = tokenizer.encode(word, false).unwrap().get_ids().len();
            assert!(ids == 1 || word == "?" && ids <= 2, "{word}: {ids}");
        }
        let text = "¿Wo steht das rote Haus, bitte?";
        let ids = tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(ids[0], 1);
        assert_eq!(tokenizer.decode(&ids, true).unwrap().trim(), text.to_lowercase());
        assert!(tokenizer.get_vocab_size(true) < 2000, "{}", tokenizer.get_vocab_size(true));
    }
}
