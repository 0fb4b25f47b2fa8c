"""ModelConfig (what a model is) and EngineConfig (how to run it). Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

BACKENDS = ("auto", "reference", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    ``rope_type`` "linear" divides every frequency by ``factor``; "llama3" divides low frequencies
    only, as Llama 3.1 does.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder, described by numbers rather than by a class per family.

    Names follow Hugging Face's config.json where it has one.
    """

    architecture: str  # "LlamaForCausalLM", ...
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # biases of the query, key and value projections (Qwen2)
    attention_output_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head (Qwen3, Gemma 3)
    hidden_act: str = "silu"  # or "gelu_pytorch_tanh" (Gemma)
    # One entry a layer: the window in tokens, or None for full attention. () means all full.
    layer_windows: tuple[int | None, ...] = ()
    # Gemma 3: the rotary base of windowed layers; None uses rope_theta (and rope_scaling).
    rope_local_theta: float | None = None
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_logits_soft_cap: float | None = None
    final_logits_soft_cap: float | None = None
    embedding_multiplier: float = 1.0  # Gemma: sqrt(hidden_size)
    norm_weight_offset: float = 0.0  # Gemma stores norm weights less one
    post_norms: bool = False  # Gemma: a norm after attention and after the MLP as well
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"  # what the checkpoint holds

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer in tokens, or None."""
        return self.layer_windows[layer] if self.layer_windows else None

    @property
    def scale(self) -> float:
        """What query-key products are multiplied by."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def num_parameters(self) -> int:
        """Elements of all weights; tied embeddings are counted once."""
        h, d = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        layer = h * (q + 2 * kv) + q * h + 3 * h * self.intermediate_size
        layer += h * (4 if self.post_norms else 2)
        layer += (q + 2 * kv) * self.attention_bias + h * self.attention_output_bias
        layer += 2 * d * self.qk_norm
        embeddings = self.vocab_size * h * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + h

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values that one token keeps, over all layers."""
        heads = self.num_hidden_layers * self.num_key_value_heads
        return 2 * heads * self.head_dim * dtype_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to run a model; every field is a command-line flag of the same name, as in vLLM.

    Raises:
        ValueError: where a value is not one that the field takes.
    """

    model: str = "smollm2"  # a directory, a GGUF file, a hub id, or "smollm2"
    tokenizer: str | None = None  # a directory or file; None: the model's own
    backend: str = "auto"
    dtype: str = "auto"
    load_format: str = "auto"
    block_size: int = 16  # tokens a block
    max_model_len: int | None = None  # tokens a request may have; None: the model's own
    max_num_seqs: int = 256  # requests in one step
    max_num_batched_tokens: int | None = None  # tokens in one step; None: by backend
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = False  # share the blocks of equal prompt beginnings
    scheduling_policy: str = "fcfs"  # a name in scheduling/policies.py, or "module:Class"
    num_kv_blocks: int | None = None  # None: as many as the memory setting below gives
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    seed: int = 0
    threads: int | None = None  # CPU threads; None: all that this process may use
    enforce_eager: bool = False  # the readable decoder, kernel by kernel, not its compiled form

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        for name, choices in (
            ("backend", BACKENDS),
            ("dtype", DTYPES),
            ("load_format", LOAD_FORMATS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        positive = ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len",
                    "num_kv_blocks", "kv_cache_memory_bytes", "threads")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                "gpu_memory_utilization must be above 0 and at most 1, "
                f"got {self.gpu_memory_utilization}"
            )
