from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gguf import write_tiny_gguf
from tiny_models import CHAT_TEMPLATE, TINY_MODELS

from refengine.errors import ModelLoadError
from refengine.models.convert import convert_gguf, to_hf_config
from refengine.models.model_config import config_from_hf, load_model_config
from refengine.models.tokenizer import Tokenizer
from refengine.models.weights import open_weights


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_directory_holds_the_files_model(name: str, tmp_path: Path) -> None:
    gguf_path, directory = tmp_path / "model.gguf", tmp_path / "new" / "model"
    write_tiny_gguf(gguf_path, name)
    assert convert_gguf(gguf_path, directory) == directory
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = load_model_config(directory)
    assert config == load_model_config(gguf_path)
    with open_weights(gguf_path, config) as stored, open_weights(directory, config) as written:
        assert stored.names == written.names
        for tensor in stored.names:
            np.testing.assert_array_equal(stored.read(tensor), written.read(tensor))


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    gguf_path, directory = tmp_path / "model.gguf", tmp_path / "model"
    write_tiny_gguf(gguf_path, "llama_biases", pre="llama-bpe")
    convert_gguf(gguf_path, directory)
    stored, written = Tokenizer.from_path(gguf_path), Tokenizer.from_path(directory)
    assert written.special_tokens == stored.special_tokens
    assert written.special_ids == stored.special_ids
    assert written.chat_template == CHAT_TEMPLATE

    @given(text=st.text(st.characters(exclude_categories=["Cs"])), special=st.booleans())
    @settings(deadline=None)
    def same_tokens(text: str, special: bool) -> None:
        assert written.encode(text, special) == stored.encode(text, special)

    same_tokens()
    generation = json.loads((directory / "generation_config.json").read_text("utf-8"))
    assert generation == {"bos_token_id": 296, "eos_token_id": [297, 299]}


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)]
)
def test_weights_are_rounded_to_the_dtype_asked_for(
    dtype: str, numpy_dtype: type, tmp_path: Path
) -> None:
    tensors = write_tiny_gguf(tmp_path / "model.gguf", "llama_biases")
    convert_gguf(tmp_path / "model.gguf", tmp_path / "model", dtype)
    config = load_model_config(tmp_path / "model")
    assert config.dtype == dtype
    with open_weights(tmp_path / "model", config) as source:
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(source.read(name), tensor.astype(numpy_dtype))


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    gguf_path = tmp_path / "model.gguf"
    write_tiny_gguf(gguf_path, "llama_biases")
    with pytest.raises(ModelLoadError, match=r"dtype must be one of float32, .* got 'int8'"):
        convert_gguf(gguf_path, tmp_path / "a", "int8")
    with pytest.raises(ModelLoadError, match="no GGUF file at"):
        convert_gguf(tmp_path / "nothing.gguf", tmp_path / "a")
    convert_gguf(gguf_path, tmp_path / "a")
    with pytest.raises(ModelLoadError, match="holds a model already; name another directory"):
        convert_gguf(gguf_path, tmp_path / "a")
    with pytest.raises(ModelLoadError, match="cannot write"):
        convert_gguf(gguf_path, gguf_path / "below a file")


def test_a_failed_conversion_leaves_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf_path, directory = tmp_path / "model.gguf", tmp_path / "model"
    write_tiny_gguf(gguf_path, "llama_biases")

    def full(self: object, name: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refengine.models.gguf_weights.GGUFWeights.read", full)
    with pytest.raises(ModelLoadError, match="No space left on device"):
        convert_gguf(gguf_path, directory)
    assert list(directory.iterdir()) == []


def test_a_config_that_hugging_face_has_no_words_for() -> None:
    llama = config_from_hf(TINY_MODELS["llama_biases"])
    with pytest.raises(ModelLoadError, match="biases on all projections"):
        to_hf_config(replace(llama, attention_output_bias=False))
    with pytest.raises(ModelLoadError, match="LlamaForCausalLM has no windows"):
        to_hf_config(replace(llama, layer_windows=(3, 3)))
    qwen = config_from_hf(TINY_MODELS["qwen2_window_layers"])
    with pytest.raises(ModelLoadError, match=r"several sizes \(\[3, 4\]\)"):
        to_hf_config(replace(qwen, layer_windows=(3, 4, None)))
