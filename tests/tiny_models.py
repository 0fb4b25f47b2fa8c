"""Tiny models of every architecture, made from a seed: whole Hugging Face directories.

``tests/data/tiny_models.json`` holds what transformers computes on them, made by
``tests/data/make_expectations.py``. Changing anything here means making it again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from refengine.models.convert import write_safetensors
from refengine.models.model_config import config_from_hf
from refengine.models.tensor_names import expected_tensors

VOCAB_SIZE = 300
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 296,
    "eos_token_id": 297,
    "hidden_act": "silu",
}

# config.json of each; the keys are those of transformers 4 in some and of 5 in others.
TINY_MODELS: dict[str, dict[str, Any]] = {
    "llama3_scaling": {
        **_SHARED,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,  # not hidden_size / num_attention_heads
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    },
    "llama_biases": {
        **_SHARED,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    },
    "mistral_window": {
        **_SHARED,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 12,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    },
    "qwen2_window_layers": {
        **_SHARED,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 56,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "qwen3_head_norms": {
        **_SHARED,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "use_sliding_window": False,
        "sliding_window": 4,
        "tie_word_embeddings": False,
        "dtype": "float32",
    },
    "gemma3": {
        **_SHARED,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,
        "sliding_window": 10,
        "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "final_logit_softcapping": 20.0,
        "tie_word_embeddings": True,
        "dtype": "float32",
    },
}
SHARDED = ("mistral_window",)
DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


class TensorDict:
    """Tensors in memory as a WeightSource."""

    def __init__(self, tensors: dict[str, npt.NDArray[Any]]) -> None:
        self.tensors = tensors

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> npt.NDArray[Any]:
        return self.tensors[name]

    def close(self) -> None:
        pass


def tiny_tensors(values: dict[str, Any], seed: int) -> dict[str, npt.NDArray[Any]]:
    """Weights of a config.json: large enough that attention and norms matter.

    RandomState is the generator that NumPy promises never to change.
    """
    random = np.random.RandomState(seed)
    config = config_from_hf(values)
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, shape in expected_tensors(config).items():
        noise = random.standard_normal(shape)
        if name.endswith("norm.weight"):
            tensor = (1.0 - config.norm_weight_offset) + 0.2 * noise
        elif name.endswith(".bias"):
            tensor = 0.3 * noise
        elif "embed" in name:  # small where tied, or a model only repeats its last token
            scale = 0.3 if config.tie_word_embeddings else 1.0
            tensor = noise * scale / config.embedding_multiplier**0.5
        else:
            tensor = noise * (4.0 if name.startswith("lm_head") else 1.2) / shape[1] ** 0.5
        tensors[name] = tensor.astype(DTYPES[config.dtype])
    return tensors


def write_tiny_model(name: str, directory: Path) -> Path:
    """Write the model called ``name`` as a Hugging Face directory."""
    values = TINY_MODELS[name]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values), encoding="utf-8")
    tensors = tiny_tensors(values, seed=sorted(TINY_MODELS).index(name))
    if name in SHARDED:
        write_shards(directory, tensors, 2)
    else:
        config = config_from_hf(values)
        path = directory / "model.safetensors"
        write_safetensors(path, TensorDict(tensors), expected_tensors(config), config.dtype)
    write_tiny_tokenizer(directory)
    return directory


def write_shards(directory: Path, tensors: dict[str, npt.NDArray[Any]], count: int) -> None:
    """Write tensors over several safetensors files with an index."""
    names = sorted(tensors)
    weight_map = {}
    for shard in range(count):
        file = f"model-{shard + 1:05}-of-{count:05}.safetensors"
        own = names[shard::count]
        save_file({name: tensors[name] for name in own}, directory / file)
        weight_map.update(dict.fromkeys(own, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def tiny_vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """A byte-level vocabulary: 256 bytes, 40 merges (296 tokens)."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    text = "Ġt he Ġa in re on er Ġw at en or is it es an ed al ar ou Ġo Ġs Ġc Ġf Ġp Ġb"
    pairs = [(part[0], part[1]) for part in text.split()]
    pairs += [("Ġt", "he"), ("in", "g"), ("Ġa", "n"), ("an", "d"), ("Ġt", "o"), ("Ġo", "f")]
    pairs += [("i", "on"), ("Ġw", "as"), ("Ġ", "is"), ("a", "s"), ("e", "a"), ("l", "l")]
    pairs += [("o", "o"), ("Ġ", "Ġ"), ("ð", "Ł")]
    for left, right in pairs[:40]:
        if left + right not in tokens and left in tokens and right in tokens:
            merges.append((left, right))
            tokens.append(left + right)
    tokens += [f"<unused{i}>" for i in range(296 - len(tokens))]
    return tokens, merges


SPECIAL_TOKENS = ("<s>", "</s>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tiny_tokenizer(directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: 296 tokens and 4 special ones."""
    tokens, merges = tiny_vocabulary()
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "special": True},
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
