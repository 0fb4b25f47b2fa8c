"""A GGUF file's tensors as Hugging Face names, lays out and scales them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from refengine.config import ModelConfig
from refengine.models.gguf_file import GGUFFile
from refengine.models.tensor_names import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix

_OUTSIDE_LAYERS = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": LM_HEAD,
}
_IN_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Gemma 3 normalises a sublayer's result too, which shifts what the names mean.
_IN_LAYERS_POST_NORMS = {
    **_IN_LAYERS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GGUFWeights:
    """The tensors of a GGUF file, dequantised one at a time as they are read.

    Raises:
        ModelLoadError: where the file is damaged.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        self._file = GGUFFile(path)
        self._config = config
        self._permuted = self._file.get("general.architecture") == "llama"
        # Hugging Face's name to GGUF's; what has none (rope_freqs) is not a weight.
        self._stored = {
            hf: name for name in self._file.tensors if (hf := hf_name(name, config)) is not None
        }

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._file.tensors[self._stored[name]].shape

    def read(self, name: str) -> npt.NDArray[np.generic]:
        """The tensor: float32, or float16 and bfloat16 where the file holds those."""
        tensor = self._file.read(self._stored[name])
        if self._permuted and ".self_attn.q_proj." in name:
            tensor = undo_rotary_permutation(tensor, self._config.num_attention_heads)
        elif self._permuted and ".self_attn.k_proj." in name:
            tensor = undo_rotary_permutation(tensor, self._config.num_key_value_heads)
        elif self._config.norm_weight_offset and name.endswith("norm.weight"):
            # GGUF stores Gemma's norm weights ready to multiply with.
            tensor = tensor.astype(np.float32) - np.float32(self._config.norm_weight_offset)
        return tensor

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()


def hf_name(name: str, config: ModelConfig) -> str | None:
    """Hugging Face's name of a GGUF tensor; None for what is not a weight of the decoder.

    >>> hf_name("blk.3.attn_q.weight", config)
    'model.layers.3.self_attn.q_proj.weight'
    """
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    parts = name.split(".")  # blk, layer, tensor, weight or bias
    if len(parts) != 4 or parts[0] != "blk" or not parts[1].isdigit():
        return None
    stem = (_IN_LAYERS_POST_NORMS if config.post_norms else _IN_LAYERS).get(parts[2])
    return None if stem is None else f"{layer_prefix(int(parts[1]))}{stem}.{parts[3]}"


def undo_rotary_permutation(
    tensor: npt.NDArray[np.generic], num_heads: int
) -> npt.NDArray[np.generic]:
    """Put a query or key projection's rows back from adjacent pairs to halves.

    GGML's Llama rotates elements (2i, 2i + 1) of a head, Hugging Face's (i, i + head_dim / 2), so
    converters to GGUF interleave each head's rows. ``[heads * head_dim, in]``, or a bias without
    ``in``.
    """
    rest = tensor.shape[1:]
    half = tensor.shape[0] // num_heads // 2
    return tensor.reshape(num_heads, half, 2, *rest).swapaxes(1, 2).reshape(tensor.shape)
