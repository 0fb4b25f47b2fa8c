from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_gguf import write_tiny_gguf
from tiny_models import write_tiny_model
from tokenizers import Tokenizer as HFTokenizer

from refengine.config import EngineConfig
from refengine.errors import ModelLoadError
from refengine.models.loading import open_model
from refengine.models.tensor_names import expected_tensors


def test_a_directory_and_its_parts(tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model("qwen3_head_norms")
    files = open_model(EngineConfig(model=str(path)))
    assert files.path == path
    assert files.config.architecture == "Qwen3ForCausalLM"
    assert files.tokenizer is not None
    assert files.chat_template is not None
    assert files.chat_template.special_tokens["bos_token"] == "<s>"
    with files.open_weights() as source:
        assert source.names == expected_tensors(files.config).keys()


def test_a_gguf_file_with_another_tokenizer(
    tmp_path: Path, tiny_model: Callable[[str], Path]
) -> None:
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, "llama_biases", tokenizer_model="llama")
    with pytest.raises(ModelLoadError, match="--tokenizer"):
        open_model(EngineConfig(model=str(path)))
    other = tiny_model("llama_biases")
    for name in (other, other / "tokenizer.json"):
        files = open_model(EngineConfig(model=str(path), tokenizer=str(name)))
        assert files.tokenizer is not None
        assert files.tokenizer.eos_token_id == 297


def test_dummy_weights_need_a_config_alone(tmp_path: Path) -> None:
    write_tiny_model("gemma3", tmp_path)
    for path in tmp_path.iterdir():
        if path.name != "config.json":
            path.unlink()
    files = open_model(EngineConfig(model=str(tmp_path), load_format="dummy", seed=5))
    assert files.tokenizer is None
    assert files.chat_template is None
    with files.open_weights() as source:
        assert source.read("model.norm.weight").shape == (48,)
    with pytest.raises(ModelLoadError, match=r"holds no tokenizer\.json"):
        open_model(EngineConfig(model=str(tmp_path)))


def test_a_tokenizer_must_fit_the_vocabulary(tmp_path: Path) -> None:
    write_tiny_model("llama_biases", tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text("utf-8"))
    # Added tokens may lie beyond the model's vocabulary, trained ones may not.
    path.write_text(json.dumps({**values, "vocab_size": 296}), "utf-8")
    files = open_model(EngineConfig(model=str(tmp_path)))
    assert files.tokenizer is not None
    assert files.tokenizer.vocab_size == 300
    path.write_text(json.dumps({**values, "vocab_size": 295}), "utf-8")
    with pytest.raises(ModelLoadError, match="296 tokens and the model's vocabulary 295"):
        open_model(EngineConfig(model=str(tmp_path)))


def test_padding_of_the_vocabulary_does_no_harm(tmp_path: Path) -> None:
    write_tiny_model("llama_biases", tmp_path)
    backend = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert backend.get_vocab_size() == 300
    path = tmp_path / "config.json"
    values = {**json.loads(path.read_text("utf-8")), "vocab_size": 320}
    path.write_text(json.dumps(values), "utf-8")
    files = open_model(EngineConfig(model=str(tmp_path)))
    assert files.tokenizer is not None
    assert files.tokenizer.decode([310]) == ""
    assert files.tokenizer.token_bytes(310) == b""
