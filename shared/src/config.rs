//! Settings of a model, read once from Hugging Face's `config.json` and validated here; nothing below sees raw JSON.

use serde::{Deserialize, Serialize};

/// Why a `config.json` cannot be used.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// Not JSON at all, or a value of the wrong type.
    #[error("config.json cannot be read: {0}; restore the file from the published checkpoint")]
    Json(String),
    /// Another architecture than LLaVA.
    #[error("config.json describes a model of type '{0}', but only 'llava' (LLaVA-1.5) is supported")]
    Architecture(String),
    /// Values that contradict each other or are out of range.
    #[error("config.json is not usable: {0}")]
    Invalid(String),
}

/// An elementwise activation function, named as in Hugging Face configs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`
    QuickGelu,
    /// Exact (erf) GELU.
    Gelu,
    /// Tanh approximation of GELU.
    GeluTanh,
    /// `x * sigmoid(x)`
    Silu,
}

impl Activation {
    fn parse(name: &str, key: &str) -> Result<Self, ConfigError> {
        match name {
            "quick_gelu" => Ok(Self::QuickGelu),
            "gelu" => Ok(Self::Gelu),
            "gelu_new" | "gelu_pytorch_tanh" => Ok(Self::GeluTanh),
            "silu" | "swish" => Ok(Self::Silu),
            other => Err(ConfigError::Invalid(format!(
                "{key} is '{other}'; supported are quick_gelu, gelu, gelu_new, gelu_pytorch_tanh, silu"
            ))),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::QuickGelu => "quick_gelu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_pytorch_tanh",
            Self::Silu => "silu",
        }
    }
}

/// CLIP vision tower.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Encoder layers in the checkpoint (those after the feature layer are never run).
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Edge of the square input, pixels.
    pub image_size: usize,
    /// Edge of a patch, pixels.
    pub patch_size: usize,
    /// Input channels.
    pub channels: usize,
    /// MLP activation.
    pub activation: Activation,
    /// LayerNorm epsilon.
    pub eps: f64,
}

impl VisionConfig {
    /// Patches of a picture, without the CLS token.
    pub fn patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }
}

/// Llama decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct TextConfig {
    /// Width of the residual stream, also of the boundary.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads (grouped-query attention when fewer than `heads`).
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the token table; may exceed the tokenizer's size.
    pub vocab: usize,
    /// Longest sequence the model was made for.
    pub max_positions: usize,
    /// MLP activation.
    pub activation: Activation,
    /// RMSNorm epsilon.
    pub eps: f64,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// The head is the token table itself.
    pub tied: bool,
}

/// What follows the vision tower's hidden states into the projector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureSelect {
    /// Patches only; CLS is dropped.
    Default,
    /// CLS and patches.
    Full,
}

/// A LLaVA-1.5 model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Vision tower.
    pub vision: VisionConfig,
    /// Language model.
    pub text: TextConfig,
    /// Token id that stands for one image feature in the prompt.
    pub image_token: u32,
    /// Index into the vision tower's hidden states (0 = before the first layer), already made non-negative.
    pub feature_layer: usize,
    /// CLS dropped or kept.
    pub feature_select: FeatureSelect,
    /// Activation between the projector's two layers.
    pub projector_activation: Activation,
}

/// `config.json` as it is found: published files leave out whatever equals the class default.
#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    model_type: Option<String>,
    text_config: Option<RawText>,
    /// Absent, it is LLaVA-1.5's own in `LlavaConfig`, not CLIP's defaults.
    vision_config: Option<RawVision>,
    #[serde(alias = "image_token_id")]
    image_token_index: Option<u32>,
    vision_feature_layer: Option<i64>,
    vision_feature_select_strategy: Option<String>,
    projector_hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
}

#[derive(Deserialize, Default)]
struct RawText {
    model_type: Option<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    hidden_act: Option<String>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_parameters: Option<RawRope>,
    rope_scaling: Option<serde_json::Value>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
}

#[derive(Deserialize)]
struct RawRope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
}

#[derive(Deserialize, Default)]
struct RawVision {
    model_type: Option<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    image_size: Option<usize>,
    patch_size: Option<usize>,
    num_channels: Option<usize>,
    hidden_act: Option<String>,
    layer_norm_eps: Option<f64>,
}

impl RawVision {
    /// What `LlavaConfig` makes of an absent one: CLIP-L/14 at 336 pixels.
    fn llava() -> Self {
        Self {
            hidden_size: Some(1024),
            intermediate_size: Some(4096),
            num_hidden_layers: Some(24),
            num_attention_heads: Some(16),
            image_size: Some(336),
            patch_size: Some(14),
            ..Self::default()
        }
    }
}

impl ModelConfig {
    /// Read `config.json`; absent keys take the defaults of transformers' `LlavaConfig`, `LlamaConfig`, `CLIPVisionConfig`.
    ///
    /// # Errors
    /// [`ConfigError`] names the key and what is supported.
    pub fn from_json(json: &str) -> Result<Self, ConfigError> {
        let raw: RawConfig = serde_json::from_str(json).map_err(|e| ConfigError::Json(e.to_string()))?;
        let kind = raw.model_type.as_deref().unwrap_or("none");
        if kind != "llava" {
            return Err(ConfigError::Architecture(kind.to_owned()));
        }
        let invalid = |m: String| ConfigError::Invalid(m);
        let (t, v) = (raw.text_config.unwrap_or_default(), raw.vision_config.unwrap_or_else(RawVision::llava));
        if let Some(k) = t.model_type.as_deref().filter(|k| *k != "llama") {
            return Err(ConfigError::Architecture(format!("llava with text model {k}")));
        }
        if let Some(k) = v.model_type.as_deref().filter(|k| *k != "clip_vision_model") {
            return Err(ConfigError::Architecture(format!("llava with vision model {k}")));
        }
        if t.attention_bias == Some(true) || t.mlp_bias == Some(true) {
            return Err(invalid("attention_bias and mlp_bias must be false".into()));
        }
        let rope_type = t.rope_parameters.as_ref().and_then(|r| r.rope_type.clone());
        if rope_type.is_some_and(|k| k != "default") || t.rope_scaling.is_some_and(|s| !s.is_null()) {
            return Err(invalid("scaled rotary positions are not supported (rope_type must be 'default')".into()));
        }
        let heads = t.num_attention_heads.unwrap_or(32);
        let hidden = t.hidden_size.unwrap_or(4096);
        let text = TextConfig {
            hidden,
            intermediate: t.intermediate_size.unwrap_or(11008),
            layers: t.num_hidden_layers.unwrap_or(32),
            heads,
            kv_heads: t.num_key_value_heads.unwrap_or(heads),
            head_dim: t.head_dim.unwrap_or(hidden / heads.max(1)),
            vocab: t.vocab_size.unwrap_or(32000),
            max_positions: t.max_position_embeddings.unwrap_or(2048),
            activation: Activation::parse(t.hidden_act.as_deref().unwrap_or("silu"), "text_config.hidden_act")?,
            eps: t.rms_norm_eps.unwrap_or(1e-6),
            rope_theta: t.rope_parameters.and_then(|r| r.rope_theta).or(t.rope_theta).unwrap_or(10000.0),
            // As transformers: a text config that ties does so whatever stands outside.
            tied: raw.tie_word_embeddings == Some(true) || t.tie_word_embeddings == Some(true),
        };
        let vision = VisionConfig {
            hidden: v.hidden_size.unwrap_or(768),
            intermediate: v.intermediate_size.unwrap_or(3072),
            layers: v.num_hidden_layers.unwrap_or(12),
            heads: v.num_attention_heads.unwrap_or(12),
            image_size: v.image_size.unwrap_or(224),
            patch_size: v.patch_size.unwrap_or(32),
            channels: v.num_channels.unwrap_or(3),
            activation: Activation::parse(v.hidden_act.as_deref().unwrap_or("quick_gelu"), "vision_config.hidden_act")?,
            eps: v.layer_norm_eps.unwrap_or(1e-5),
        };
        let layer = raw.vision_feature_layer.unwrap_or(-2);
        let states = vision.layers as i64 + 1;
        let feature_layer = if layer < 0 { states + layer } else { layer };
        if !(0..states).contains(&feature_layer) {
            return Err(invalid(format!("vision_feature_layer {layer} is outside the {states} hidden states")));
        }
        let feature_select = match raw.vision_feature_select_strategy.as_deref() {
            None | Some("default") => FeatureSelect::Default,
            Some("full") => FeatureSelect::Full,
            Some(other) => {
                return Err(invalid(format!(
                    "vision_feature_select_strategy '{other}' is neither 'default' nor 'full'"
                )));
            }
        };
        let config = Self {
            text,
            vision,
            image_token: raw.image_token_index.unwrap_or(32000),
            feature_layer: feature_layer as usize,
            feature_select,
            projector_activation: Activation::parse(
                raw.projector_hidden_act.as_deref().unwrap_or("gelu"),
                "projector_hidden_act",
            )?,
        };
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let (t, v) = (&self.text, &self.vision);
        let fail = |m: String| Err(ConfigError::Invalid(m));
        let sizes = [
            t.hidden,
            t.intermediate,
            t.layers,
            t.heads,
            t.kv_heads,
            t.head_dim,
            t.vocab,
            v.hidden,
            v.intermediate,
            v.layers,
            v.heads,
            v.image_size,
            v.patch_size,
        ];
        if sizes.contains(&0) {
            return fail("a size is 0".into());
        }
        if t.heads % t.kv_heads != 0 {
            return fail(format!("{} query heads cannot share {} key-value heads", t.heads, t.kv_heads));
        }
        if t.head_dim % 2 != 0 {
            return fail(format!("head_dim {} is odd, rotary positions need pairs", t.head_dim));
        }
        if v.hidden % v.heads != 0 {
            return fail(format!("vision hidden_size {} is not divisible by {} heads", v.hidden, v.heads));
        }
        if v.image_size % v.patch_size != 0 {
            return fail(format!("image_size {} is no multiple of patch_size {}", v.image_size, v.patch_size));
        }
        if v.channels != 3 {
            return fail(format!("num_channels is {}, only RGB (3) is supported", v.channels));
        }
        if self.image_token as usize >= t.vocab {
            return fail(format!("image_token_index {} is outside the vocabulary of {}", self.image_token, t.vocab));
        }
        Ok(())
    }

    /// Image tokens that one picture becomes.
    pub fn image_tokens(&self) -> usize {
        self.vision.patches() + usize::from(self.feature_select == FeatureSelect::Full)
    }

    /// Write as a complete `config.json` (Hugging Face keys).
    pub fn to_json(&self) -> String {
        let (t, v) = (&self.text, &self.vision);
        let value = serde_json::json!({
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": self.image_token,
            "projector_hidden_act": self.projector_activation.name(),
            "vision_feature_layer": self.feature_layer as i64 - v.layers as i64 - 1,
            "vision_feature_select_strategy": if self.feature_select == FeatureSelect::Full { "full" } else { "default" },
            "tie_word_embeddings": t.tied,
            "torch_dtype": "float16",
            "text_config": {
                "model_type": "llama", "hidden_size": t.hidden, "intermediate_size": t.intermediate,
                "num_hidden_layers": t.layers, "num_attention_heads": t.heads, "num_key_value_heads": t.kv_heads,
                "head_dim": t.head_dim, "vocab_size": t.vocab, "max_position_embeddings": t.max_positions,
                "hidden_act": t.activation.name(), "rms_norm_eps": t.eps, "rope_theta": t.rope_theta,
                "tie_word_embeddings": t.tied
            },
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": v.hidden, "intermediate_size": v.intermediate,
                "num_hidden_layers": v.layers, "num_attention_heads": v.heads, "image_size": v.image_size,
                "patch_size": v.patch_size, "num_channels": v.channels, "hidden_act": v.activation.name(),
                "layer_norm_eps": v.eps
            }
        });
        serde_json::to_string_pretty(&value).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_keys_take_the_class_defaults() {
        let c = ModelConfig::from_json(
            r#"{"model_type":"llava","vision_config":{"patch_size":14,"image_size":336,
            "hidden_size":1024,"num_hidden_layers":24,"num_attention_heads":16,"intermediate_size":4096},
            "text_config":{"vocab_size":32064,"rms_norm_eps":1e-5}}"#,
        )
        .unwrap();
        assert_eq!((c.text.hidden, c.text.layers, c.text.head_dim), (4096, 32, 128));
        assert_eq!((c.image_tokens(), c.feature_layer), (576, 23));
        assert_eq!(c.vision.activation, Activation::QuickGelu);
    }

    #[test]
    fn a_written_config_reads_back_the_same() {
        let c = ModelConfig::from_json(
            r#"{"model_type":"llava","image_token_index":7,"vision_feature_layer":-1,
            "text_config":{"vocab_size":100}}"#,
        )
        .unwrap();
        assert_eq!(ModelConfig::from_json(&c.to_json()).unwrap(), c);
    }

    #[test]
    fn unusable_configs_name_the_cause() {
        let err = |s: &str| ModelConfig::from_json(s).unwrap_err().to_string();
        assert!(err("{").contains("cannot be read"));
        assert!(err(r#"{"model_type":"qwen2_vl"}"#).contains("qwen2_vl"));
        assert!(err(r#"{"model_type":"llava","projector_hidden_act":"relu6"}"#).contains("relu6"));
        assert!(err(r#"{"model_type":"llava","vision_feature_layer":-40}"#).contains("-40"));
        assert!(err(r#"{"model_type":"llava","image_token_index":99999}"#).contains("99999"));
    }

    #[test]
    fn an_absent_vision_config_is_llavas_own() {
        for vision in ["", r#","vision_config":null"#] {
            let json = format!(r#"{{"model_type":"llava","text_config":{{"vocab_size":32064}}{vision}}}"#);
            let config = ModelConfig::from_json(&json).unwrap();
            assert_eq!((config.image_tokens(), config.feature_layer, config.vision.layers), (576, 23, 24));
        }
    }

    #[test]
    fn a_tied_text_config_ties_whatever_stands_outside() {
        let json = r#"{"model_type":"llava","tie_word_embeddings":false,"text_config":{"vocab_size":32064,"tie_word_embeddings":true}}"#;
        assert!(ModelConfig::from_json(json).unwrap().text.tied);
    }
}
