//! Shapes of published models, and smaller ones of the same make: as configurations, and as the list of tensors that a
//! published file of them holds.

use fednano_shared::config::{Activation, FeatureSelect, ModelConfig, TextConfig, VisionConfig};

/// A row of the table below.
struct Preset {
    name: &'static str,
    /// Hidden, MLP, layers, heads, image size, patch size.
    vision: [usize; 6],
    /// Hidden, MLP, layers, heads, key-value heads.
    text: [usize; 5],
    vocab: usize,
    max_positions: usize,
    image_token: u32,
}

const CLIP_L_336: [usize; 6] = [1024, 4096, 24, 16, 336, 14];
const LLAMA_7B: [usize; 5] = [4096, 11008, 32, 32, 32];
const LLAMA_13B: [usize; 5] = [5120, 13824, 40, 40, 40];

const PRESETS: [Preset; 5] = [
    Preset {
        name: "llava-1.5-7b",
        vision: CLIP_L_336,
        text: LLAMA_7B,
        vocab: 32064,
        max_positions: 4096,
        image_token: 32000,
    },
    Preset {
        name: "llava-1.5-13b",
        vision: CLIP_L_336,
        text: LLAMA_13B,
        vocab: 32064,
        max_positions: 4096,
        image_token: 32000,
    },
    // The 7B's widths, token table and whole vision tower, but two decoder layers: its client part is the real one.
    Preset {
        name: "llava-1.5-7b-depth2",
        vision: CLIP_L_336,
        text: [4096, 11008, 2, 32, 32],
        vocab: 32064,
        max_positions: 4096,
        image_token: 32000,
    },
    // CLIP ViT-B/16 before four narrow layers: a client part of 105 M parameters, over 100 MB even in 8 bits.
    Preset {
        name: "llava-160m",
        vision: [768, 3072, 12, 12, 224, 16],
        text: [768, 2048, 4, 12, 12],
        vocab: 32064,
        max_positions: 2048,
        image_token: 32000,
    },
    // Of nano-llava's order, for tests: shared key-value heads, spare rows in the table, a layer that is never run.
    Preset {
        name: "tiny",
        vision: [64, 128, 3, 4, 32, 8],
        text: [96, 160, 2, 6, 3],
        vocab: 2064,
        max_positions: 256,
        image_token: 2000,
    },
];

/// Names that [`find`] knows.
pub const NAMES: [&str; PRESETS.len()] = {
    let mut names = [""; PRESETS.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = PRESETS[i].name;
        i += 1;
    }
    names
};

/// The configuration of a preset, none for an unknown name.
pub fn find(name: &str) -> Option<ModelConfig> {
    let preset = PRESETS.into_iter().find(|p| p.name == name)?;
    let [hidden, intermediate, layers, heads, image_size, patch_size] = preset.vision;
    let vision = VisionConfig {
        hidden,
        intermediate,
        layers,
        heads,
        image_size,
        patch_size,
        channels: 3,
        activation: Activation::QuickGelu,
        eps: 1e-5,
    };
    let [hidden, intermediate, layers, heads, kv_heads] = preset.text;
    let text = TextConfig {
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        head_dim: hidden / heads,
        vocab: preset.vocab,
        max_positions: preset.max_positions,
        activation: Activation::Silu,
        eps: 1e-5,
        rope_theta: 10000.0,
        tied: false,
    };
    Some(ModelConfig {
        // LLaVA-1.5 reads the last state but one.
        feature_layer: vision.layers - 1,
        vision,
        text,
        image_token: preset.image_token,
        feature_select: FeatureSelect::Default,
        projector_activation: Activation::Gelu,
    })
}

/// What a tensor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Vision tower up to the feature layer.
    Vision,
    /// Vision tower behind the feature layer: in every published file, never run by LLaVA.
    VisionUnread,
    /// Connector.
    Projector,
    /// Token table.
    TokenTable,
    /// Matrices of the decoder layers, which LoRA tunes.
    DecoderMatrix,
    /// Norms and head of the language model.
    OtherText,
}

/// A tensor of a published file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishedTensor {
    /// As in llava-hf's files.
    pub name: String,
    /// In the file's layout: `[out, in]`.
    pub shape: Vec<usize>,
    /// What it belongs to.
    pub part: Part,
}

impl PublishedTensor {
    /// Values.
    pub fn parameters(&self) -> usize {
        self.shape.iter().product()
    }

    /// Output rows (1 for a vector) and values of each.
    pub fn matrix(&self) -> (usize, usize) {
        match self.shape[..] {
            [rows, _, ..] => (rows, self.shape[1..].iter().product()),
            _ => (1, self.parameters()),
        }
    }
}

/// All tensors of a published file of this shape, under the names of llava-hf/llava-1.5-7b-hf.
pub fn tensors(config: &ModelConfig) -> Vec<PublishedTensor> {
    let mut list = Vec::new();
    let mut add = |part: Part, name: String, shape: &[usize]| {
        list.push(PublishedTensor { name, shape: shape.to_vec(), part });
    };

    let t = &config.text;
    let (queries, keys) = (t.heads * t.head_dim, t.kv_heads * t.head_dim);
    add(Part::TokenTable, "language_model.model.embed_tokens.weight".into(), &[t.vocab, t.hidden]);
    for layer in 0..t.layers {
        let layer = format!("language_model.model.layers.{layer}");
        for (name, shape) in [
            ("self_attn.q_proj", [queries, t.hidden]),
            ("self_attn.k_proj", [keys, t.hidden]),
            ("self_attn.v_proj", [keys, t.hidden]),
            ("self_attn.o_proj", [t.hidden, queries]),
            ("mlp.gate_proj", [t.intermediate, t.hidden]),
            ("mlp.up_proj", [t.intermediate, t.hidden]),
            ("mlp.down_proj", [t.hidden, t.intermediate]),
        ] {
            add(Part::DecoderMatrix, format!("{layer}.{name}.weight"), &shape);
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(Part::OtherText, format!("{layer}.{norm}.weight"), &[t.hidden]);
        }
    }
    add(Part::OtherText, "language_model.model.norm.weight".into(), &[t.hidden]);
    if !t.tied {
        add(Part::OtherText, "language_model.lm_head.weight".into(), &[t.vocab, t.hidden]);
    }

    let v = &config.vision;
    for (name, width) in [("linear_1", v.hidden), ("linear_2", t.hidden)] {
        add(Part::Projector, format!("multi_modal_projector.{name}.weight"), &[t.hidden, width]);
        add(Part::Projector, format!("multi_modal_projector.{name}.bias"), &[t.hidden]);
    }

    let tower = "vision_tower.vision_model";
    add(Part::Vision, format!("{tower}.embeddings.class_embedding"), &[v.hidden]);
    let patch = [v.hidden, v.channels, v.patch_size, v.patch_size];
    add(Part::Vision, format!("{tower}.embeddings.patch_embedding.weight"), &patch);
    add(Part::Vision, format!("{tower}.embeddings.position_embedding.weight"), &[v.patches() + 1, v.hidden]);
    // "layrnorm": spelt as in the published files.
    for (part, norm) in [(Part::Vision, "pre_layrnorm"), (Part::VisionUnread, "post_layernorm")] {
        add(part, format!("{tower}.{norm}.weight"), &[v.hidden]);
        add(part, format!("{tower}.{norm}.bias"), &[v.hidden]);
    }
    for layer in 0..v.layers {
        let part = if layer < config.feature_layer { Part::Vision } else { Part::VisionUnread };
        let layer = format!("{tower}.encoder.layers.{layer}");
        for (name, shape) in [
            ("self_attn.q_proj", [v.hidden, v.hidden]),
            ("self_attn.k_proj", [v.hidden, v.hidden]),
            ("self_attn.v_proj", [v.hidden, v.hidden]),
            ("self_attn.out_proj", [v.hidden, v.hidden]),
            ("mlp.fc1", [v.intermediate, v.hidden]),
            ("mlp.fc2", [v.hidden, v.intermediate]),
        ] {
            add(part, format!("{layer}.{name}.weight"), &shape);
            add(part, format!("{layer}.{name}.bias"), &shape[..1]);
        }
        for norm in ["layer_norm1", "layer_norm2"] {
            add(part, format!("{layer}.{norm}.weight"), &[v.hidden]);
            add(part, format!("{layer}.{norm}.bias"), &[v.hidden]);
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(name: &str, parts: &[Part]) -> usize {
        tensors(&find(name).unwrap()).iter().filter(|t| parts.contains(&t.part)).map(PublishedTensor::parameters).sum()
    }

    fn all(name: &str) -> usize {
        tensors(&find(name).unwrap()).iter().map(PublishedTensor::parameters).sum()
    }

    #[test]
    fn presets_are_usable_configurations() {
        for name in NAMES {
            let config = find(name).unwrap();
            assert_eq!(ModelConfig::from_json(&config.to_json()).unwrap(), config, "{name}");
        }
        assert_eq!(find("llava-1.5-70b"), None);
        let config = find("llava-1.5-7b").unwrap();
        assert_eq!((config.image_tokens(), config.feature_layer, config.text.head_dim), (576, 23, 128));
    }

    #[test]
    fn sizes_are_those_of_the_models_they_stand_for() {
        // Llama 2 with its 32,000 tokens, 64 more rows in table and head, CLIP ViT-L/14-336, connector.
        assert_eq!(all("llava-1.5-7b"), 6_738_415_616 + 2 * 64 * 4096 + 303_507_456 + 20_979_712);
        assert_eq!(all("llava-1.5-13b"), 13_015_864_320 + 2 * 64 * 5120 + 303_507_456 + 31_467_520);
        assert!((150_000_000..200_000_000).contains(&all("llava-160m")));
        let client = parameters("llava-160m", &[Part::Vision, Part::Projector, Part::TokenTable]);
        assert!(client > 100_000_000, "{client}");
        // 3 vision and 4 decoder layers make 98 tensors in the reference fixture; this has 2 decoder layers.
        assert_eq!(tensors(&find("tiny").unwrap()).len(), 98 - 2 * 9);
    }
}
