//! The weights of a llama, and what the two dialects call them.

use super::{Dialect, Error, ModelFile, Tensor};

/// A weight of a llama, whatever the file calls it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Weight {
    /// `[vocab, hidden]`
    Embedding,
    /// `[vocab, hidden]`; the embedding again where the two are tied.
    Output,
    /// `[hidden]`
    OutputNorm,
    Layer(usize, LayerWeight),
}

/// A weight of one layer, `[rows, cols]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerWeight {
    /// `[hidden]`
    AttentionNorm,
    /// `[heads * head_dim, hidden]`
    Query,
    /// `[kv_heads * head_dim, hidden]`
    Key,
    /// `[kv_heads * head_dim, hidden]`
    Value,
    /// `[hidden, heads * head_dim]`
    AttentionOutput,
    /// `[hidden]`
    FfnNorm,
    /// `[ffn, hidden]`
    Gate,
    /// `[ffn, hidden]`
    Up,
    /// `[hidden, ffn]`
    Down,
}

/// All weights of a layer.
pub const LAYER_WEIGHTS: [LayerWeight; 9] = [
    LayerWeight::AttentionNorm,
    LayerWeight::Query,
    LayerWeight::Key,
    LayerWeight::Value,
    LayerWeight::AttentionOutput,
    LayerWeight::FfnNorm,
    LayerWeight::Gate,
    LayerWeight::Up,
    LayerWeight::Down,
];

impl ModelFile {
    /// A llama weight under the name this file's dialect gives it. Its shape was checked if [`ModelFile::config`] succeeded.
    pub fn weight(&self, weight: Weight) -> Result<Tensor<'_>, Error> {
        let name = name(self.dialect(), weight);
        match self.tensor(&name) {
            None if weight == Weight::Output => self.weight(Weight::Embedding),
            None => self.require(&name),
            Some(tensor) => Ok(tensor),
        }
    }
}

/// What a dialect calls a weight.
pub(super) fn name(dialect: Dialect, weight: Weight) -> String {
    use LayerWeight::*;
    match (dialect, weight) {
        (Dialect::Gguf, Weight::Embedding) => "token_embd.weight".into(),
        (Dialect::Gguf, Weight::Output) => "output.weight".into(),
        (Dialect::Gguf, Weight::OutputNorm) => "output_norm.weight".into(),
        (Dialect::Gguf, Weight::Layer(layer, weight)) => {
            let part = match weight {
                AttentionNorm => "attn_norm",
                Query => "attn_q",
                Key => "attn_k",
                Value => "attn_v",
                AttentionOutput => "attn_output",
                FfnNorm => "ffn_norm",
                Gate => "ffn_gate",
                Up => "ffn_up",
                Down => "ffn_down",
            };
            format!("blk.{layer}.{part}.weight")
        }
        (Dialect::Safetensors, Weight::Embedding) => "model.embed_tokens.weight".into(),
        (Dialect::Safetensors, Weight::Output) => "lm_head.weight".into(),
        (Dialect::Safetensors, Weight::OutputNorm) => "model.norm.weight".into(),
        (Dialect::Safetensors, Weight::Layer(layer, weight)) => {
            let part = match weight {
                AttentionNorm => "input_layernorm",
                Query => "self_attn.q_proj",
                Key => "self_attn.k_proj",
                Value => "self_attn.v_proj",
                AttentionOutput => "self_attn.o_proj",
                FfnNorm => "post_attention_layernorm",
                Gate => "mlp.gate_proj",
                Up => "mlp.up_proj",
                Down => "mlp.down_proj",
            };
            format!("model.layers.{layer}.{part}.weight")
        }
    }
}
