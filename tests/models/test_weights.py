from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_models import TINY_MODELS, tiny_tensors, write_tiny_model

from refengine.errors import ModelLoadError
from refengine.models.mapped_file import RELEASE_BYTES, MappedFile
from refengine.models.model_config import config_from_hf, load_model_config
from refengine.models.tensor_names import expected_tensors
from refengine.models.weights import DummyWeights, open_weights

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def expected(name: str) -> dict[str, Any]:
    return tiny_tensors(TINY_MODELS[name], seed=sorted(TINY_MODELS).index(name))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_tensor_is_read_as_it_was_written(
    name: str, tiny_model: Callable[[str], Path]
) -> None:
    path = tiny_model(name)
    config = load_model_config(path)
    wanted = expected(name)
    with open_weights(path, config) as source:
        assert source.names == wanted.keys()
        for tensor_name, tensor in wanted.items():
            found = source.read(tensor_name)
            assert found.dtype == tensor.dtype
            assert found.shape == source.shape(tensor_name) == tensor.shape
            assert found.tobytes() == tensor.tobytes()


def test_sharded_files_have_an_index(tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model("mistral_window")
    assert sorted(p.name for p in path.glob("*.safetensors*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_a_tensor_that_is_not_aligned_is_read_too(tmp_path: Path) -> None:
    path = write_tiny_model("llama_biases", tmp_path)
    file = path / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].rstrip() + b" "
    header += b" " * (len(header) % 2 == 0)  # an odd length
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    with open_weights(path, load_model_config(path)) as source:
        for name, tensor in expected("llama_biases").items():
            assert np.array_equal(source.read(name), tensor)


def test_a_view_outlives_its_source_and_the_release_of_its_pages(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    file = MappedFile(path)
    view = file.bytes_at(3, 6)
    file.release()
    file.close()
    assert view.tobytes() == b"abcabc"


def edit_tensors(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a tiny model's safetensors file with other tensors."""
    tensors = expected("llama3_scaling")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(Q_PROJ), rf"tensor {Q_PROJ} is missing .* shape \[96, 48\]"),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ][:90].copy()}),
            rf"tensor {Q_PROJ} in .* has shape \[90, 48\], but its config asks for \[96, 48\]",
        ),
        (
            lambda t: t.update({"model.embed_tokens.weight": np.zeros((299, 48), np.float32)}),
            r"embed_tokens.weight in .* has shape \[299, 48\].* \[300, 48\]",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": np.zeros(96, np.float32)}),
            r"q_proj\.bias of shape \[96\], which its config does not call for",
        ),
        (
            lambda t: t.update({"model.layers.2.input_layernorm.weight": np.ones(48, np.float32)}),
            r"model\.layers\.2\.input_layernorm\.weight of shape \[48\], which",
        ),
    ],
)
def test_wrong_tensors_are_named_with_both_shapes(
    edit: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    path = write_tiny_model("llama3_scaling", tmp_path)
    edit_tensors(path, edit)
    with (
        pytest.raises(ModelLoadError, match=message) as caught,
        open_weights(path, load_model_config(path)),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_tensors_outside_the_decoder_do_no_harm(tmp_path: Path) -> None:
    path = write_tiny_model("llama3_scaling", tmp_path)
    edit_tensors(
        path,
        lambda t: t.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32),
                "vision_tower.patch.weight": np.zeros((2, 2), np.int32),
            }
        ),
    )
    with open_weights(path, load_model_config(path)) as source:
        assert "vision_tower.patch.weight" in source.names


def test_an_output_layer_beside_tied_embeddings_is_ignored(tmp_path: Path) -> None:
    path = write_tiny_model("llama_biases", tmp_path)
    tensors = expected("llama_biases")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, path / "model.safetensors")
    config = load_model_config(path)
    with open_weights(path, config):
        assert "lm_head.weight" not in expected_tensors(config)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_a_decoder_beside_a_vision_tower_has_longer_names(prefix: str, tmp_path: Path) -> None:
    path = write_tiny_model("gemma3", tmp_path)
    tensors = {
        prefix + name.removeprefix("model."): tensor for name, tensor in expected("gemma3").items()
    }
    save_file(tensors, path / "model.safetensors")
    with open_weights(path, load_model_config(path)) as source:
        assert source.names == expected("gemma3").keys()


def test_a_dtype_that_is_not_computed_with_is_named(tmp_path: Path) -> None:
    path = write_tiny_model("llama3_scaling", tmp_path)
    edit_tensors(path, lambda t: t.update({Q_PROJ: np.zeros((96, 48), np.int8)}))
    with (
        open_weights(path, load_model_config(path)) as source,
        pytest.raises(ModelLoadError, match=rf"{Q_PROJ} .* dtype I8; supported: F32, F16, BF16"),
    ):
        source.read(Q_PROJ)


def truncate(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lambda data: data[:100],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: struct.pack("<Q", 2**60) + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
        lambda data: data.replace(b'"F32"', b'"F99"'),
        lambda data: b"<!DOCTYPE html><html>this is a login page</html>" * 40,
    ],
)
def test_a_damaged_file_is_one_clear_line(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = write_tiny_model("llama3_scaling", tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with (
        pytest.raises(ModelLoadError, match=r"model\.safetensors") as caught,
        open_weights(path, load_model_config(path)),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    path = write_tiny_model("mistral_window", tmp_path)
    config = load_model_config(path)

    def message(load_format: str = "auto", where: Path = path) -> str:
        with (
            pytest.raises(ModelLoadError) as caught,
            open_weights(where, config, load_format),
        ):
            pass
        return str(caught.value)

    (path / "model-00002-of-00002.safetensors").unlink()
    assert "names files that are missing: model-00002-of-00002.safetensors" in message()
    (path / "model.safetensors.index.json").write_text("{}", "utf-8")
    assert "lacks weight_map" in message()
    for file in path.glob("*.safetensors*"):
        file.unlink()
    assert "holds no safetensors files" in message()
    assert "needs a .gguf file" in message("gguf")
    assert "needs a directory" in message("safetensors", path / "config.json")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_dummy_weights_fit_the_config(name: str) -> None:
    config = config_from_hf(TINY_MODELS[name])
    source = DummyWeights(config, seed=3)
    assert source.names == expected_tensors(config).keys()
    same, other = DummyWeights(config, seed=3), DummyWeights(config, seed=4)
    for tensor_name, shape in expected_tensors(config).items():
        tensor = source.read(tensor_name)
        assert tensor.shape == source.shape(tensor_name) == shape
        assert tensor.dtype.name == config.dtype
        assert np.array_equal(tensor, same.read(tensor_name))
        if tensor_name.endswith("norm.weight"):
            assert np.all(tensor.astype(np.float32) == 1.0 - config.norm_weight_offset)
        else:
            assert not np.array_equal(tensor, other.read(tensor_name))
            if tensor.size > 500:
                assert 0.017 < np.std(tensor.astype(np.float32)) < 0.023


def test_dummy_weights_need_no_files(tmp_path: Path) -> None:
    config = config_from_hf(TINY_MODELS["qwen2_window_layers"])
    with open_weights(tmp_path, config, "dummy", seed=1) as source:
        assert source.read("model.norm.weight").dtype == ml_dtypes.bfloat16


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own memory figures")
def test_reading_a_large_file_keeps_little_of_it_in_memory(tmp_path: Path) -> None:
    # A file of zeros costs no disk; its mapped pages count as memory like any others.
    num_tensors, megabytes = 64, 4
    header, size = {}, megabytes * 2**20
    for i in range(num_tensors):
        header[f"t{i}"] = {
            "dtype": "BF16",
            "shape": [size // 2],
            "data_offsets": [i * size, (i + 1) * size],
        }
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + num_tensors * size)
    code = f"""
import re
from pathlib import Path
from refengine.models.safetensors_files import SafetensorsWeights
def figure(name):
    return int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
source = SafetensorsWeights(Path({str(tmp_path)!r}))
before = figure("VmRSS")
total = sum(int(source.read(f"t{{i}}").view("uint16")[::512].sum()) for i in range({num_tensors}))
print(figure("VmHWM") - before, total)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, total = (int(part) for part in done.stdout.split())
    assert total == 0
    assert grown < RELEASE_BYTES + (megabytes + 8) * 2**20
