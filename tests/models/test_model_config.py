from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TINY_MODELS

from refengine.config import RopeScaling
from refengine.errors import ModelLoadError
from refengine.models.convert import to_hf_config
from refengine.models.model_config import config_from_hf, load_model_config
from refengine.models.tensor_names import expected_tensors

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def with_architecture(name: str, **values: Any) -> dict[str, Any]:
    names = [f"{name}ForCausalLM"]
    return {**LLAMA, "architectures": names, "num_key_value_heads": 2, **values}


def test_what_config_json_leaves_out_takes_transformers_defaults() -> None:
    config = config_from_hf(LLAMA)
    assert (config.head_dim, config.num_key_value_heads) == (16, 4)
    assert (config.rms_norm_eps, config.rope_theta) == (1e-6, 10000.0)
    assert config.max_position_embeddings == 2048
    assert not config.tie_word_embeddings
    assert config.rope_scaling is None
    assert config.layer_windows == ()
    assert config.eos_token_ids == ()
    assert config.dtype == "float32"


def test_both_layouts_of_rope_keys_mean_the_same() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = config_from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    new = config_from_hf({**LLAMA, "rope_parameters": {**scaling, "rope_theta": 5e5}})
    assert old == new
    assert old.rope_theta == 5e5
    assert old.rope_scaling == RopeScaling(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0
    )
    named_type = config_from_hf({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert named_type.rope_scaling == RopeScaling(rope_type="linear", factor=2.0)


def test_generation_config_names_the_ends_of_sequence() -> None:
    values = {**LLAMA, "eos_token_id": 2}
    assert config_from_hf(values).eos_token_ids == (2,)
    assert config_from_hf(values, {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert config_from_hf(values, {"temperature": 0.6}).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        (with_architecture("Mistral"), (4096,) * 3),
        (with_architecture("Mistral", sliding_window=None), ()),
        (with_architecture("Mistral", sliding_window=5), (5,) * 3),
        (with_architecture("Qwen2", sliding_window=5), ()),
        (
            with_architecture(
                "Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1
            ),
            (None, 5, 5),
        ),
        (with_architecture("Qwen3", use_sliding_window=True, sliding_window=5), ()),
        (
            with_architecture(
                "Qwen3",
                use_sliding_window=True,
                sliding_window=5,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            ),
            (5, None, 5),
        ),
        (with_architecture("Gemma3", sliding_window=5, sliding_window_pattern=2), (5, None, 5)),
        (with_architecture("Gemma3", num_hidden_layers=7), (*(4096,) * 5, None, 4096)),
    ],
)
def test_windows_are_one_a_layer(values: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert config_from_hf(values).layer_windows == windows


def test_gemma_3_is_the_same_decoder_with_other_switches() -> None:
    config = config_from_hf(TINY_MODELS["gemma3"])
    assert config.qk_norm
    assert config.post_norms
    assert config.norm_weight_offset == 1.0
    assert config.embedding_multiplier == pytest.approx(48**0.5)
    assert config.scale == pytest.approx(24**-0.5)
    assert config.hidden_act == "gelu_pytorch_tanh"
    assert (config.rope_theta, config.rope_local_theta) == (1e6, 1e4)
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=8.0)
    assert config.final_logits_soft_cap == 20.0


def test_the_text_half_of_gemma_3_with_a_vision_tower() -> None:
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
    config = config_from_hf(
        {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {**text, "sliding_window": 8},
            "vision_config": {},
            "eos_token_id": [1, 106],
            "torch_dtype": "bfloat16",
        }
    )
    assert (config.num_attention_heads, config.head_dim, config.vocab_size) == (8, 256, 262208)
    assert config.layer_windows == (8, 8, 8, 8, 8, None)
    assert config.eos_token_ids == (1, 106)
    assert config.dtype == "bfloat16"
    assert config.tie_word_embeddings


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_config_survives_being_written_and_read(name: str) -> None:
    config = config_from_hf(TINY_MODELS[name])
    written = json.loads(json.dumps(to_hf_config(config)))
    assert config_from_hf(written) == config


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_list_of_tensors_has_as_many_elements_as_the_config_says(name: str) -> None:
    config = config_from_hf(TINY_MODELS[name])
    total = 0
    for shape in expected_tensors(config).values():
        total += shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert total == config.num_parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertModel"]}, "'BertModel' is not one .* supported: LlamaFor"),
        ({"architectures": None, "model_type": "mamba"}, "'mamba' is not one that"),
        ({"architectures": None}, "None is not one that"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"num_attention_heads": True}, "num_attention_heads must be .* got True"),
        ({"num_attention_heads": 128}, "head_dim"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must be a divisor of 4 .* got 3"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rms_norm_eps": -1}, "rms_norm_eps must be a positive number, got -1"),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu.* got 'relu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type must be .*'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_parameters": 3}, "rope_parameters must be an object, got 3"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or a list"),
        ({"torch_dtype": "float8"}, "dtype must be one of float32"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq are not supported"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false, got 'yes'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_by_name(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        config_from_hf({**LLAMA, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "types", [["full_attention"], ["full_attention", "linear_attention", "full_attention"], 5]
)
def test_layer_types_must_be_known_and_one_a_layer(types: object) -> None:
    values = with_architecture("Qwen3", use_sliding_window=True, layer_types=types)
    with pytest.raises(ModelLoadError, match="layer_types must be 3 of sliding_attention"):
        config_from_hf(values)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no model at"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match=r"holds no config\.json"):
        load_model_config(tmp_path)
    path = tmp_path / "config.json"
    for data, message in (
        (b'{"a": ', "not valid JSON"),
        (b"[1, 2]", "must hold a JSON object, got list"),
        (b"\xff\xfe", "cannot read"),
        (b"[" * 100_000, "not valid JSON"),
    ):
        path.write_bytes(data)
        with pytest.raises(ModelLoadError, match=message):
            load_model_config(tmp_path)


def test_generation_config_is_read_from_the_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), "utf-8")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}', "utf-8")
    assert load_model_config(tmp_path).eos_token_ids == (3, 4)
