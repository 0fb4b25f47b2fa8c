"""The one list of a decoder's tensors, in Hugging Face's names and shapes."""

from __future__ import annotations

from refengine.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.layers.{layer}."


def layer_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names (after ``layer_prefix``) and shapes of one layer's tensors; matrices are [out, in].

    ``post_attention_layernorm`` is the norm before the MLP, except with ``post_norms`` (Gemma 3),
    where it is applied to attention's result and ``pre_feedforward_layernorm`` comes before the
    MLP.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
    }
    if config.attention_bias:
        shapes["self_attn.q_proj.bias"] = (q,)
        shapes["self_attn.k_proj.bias"] = (kv,)
        shapes["self_attn.v_proj.bias"] = (kv,)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = (config.head_dim,)
        shapes["self_attn.k_norm.weight"] = (config.head_dim,)
    shapes["self_attn.o_proj.weight"] = (hidden, q)
    if config.attention_output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    if config.post_norms:
        shapes["pre_feedforward_layernorm.weight"] = (hidden,)
    shapes["mlp.gate_proj.weight"] = (inner, hidden)
    shapes["mlp.up_proj.weight"] = (inner, hidden)
    shapes["mlp.down_proj.weight"] = (hidden, inner)
    if config.post_norms:
        shapes["post_feedforward_layernorm.weight"] = (hidden,)
    return shapes


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this config has: name to shape, in reading order.

    Loader, dummy weights, conversion and ``refengine info`` all go by this list. A model with tied
    embeddings has no ``lm_head.weight``.
    """
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    layer = layer_tensors(config)
    for index in range(config.num_hidden_layers):
        prefix = layer_prefix(index)
        shapes.update({prefix + name: shape for name, shape in layer.items()})
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return shapes
