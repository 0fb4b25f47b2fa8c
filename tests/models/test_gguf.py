from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from tiny_gguf import tiny_values, write_tiny_gguf
from tiny_models import TINY_MODELS

from refengine.errors import ModelLoadError
from refengine.models.gguf_dequantize import dequantize
from refengine.models.gguf_file import GGUFFile
from refengine.models.gguf_weights import undo_rotary_permutation
from refengine.models.model_config import config_from_hf, load_model_config
from refengine.models.weights import open_weights

Kind = gguf.GGMLQuantizationType


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_file_holds_the_model_that_it_was_made_from(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tensors = write_tiny_gguf(path, name)
    config = load_model_config(path)
    wanted = replace(config_from_hf(tiny_values(name)), eos_token_ids=(297, 299), dtype="float32")
    assert config == wanted
    with open_weights(path, config) as source:
        assert source.names == tensors.keys()
        for key, tensor in tensors.items():
            found = source.read(key)
            assert source.shape(key) == found.shape
            if config.norm_weight_offset and key.endswith("norm.weight"):
                np.testing.assert_allclose(found, tensor, atol=2e-7)
            else:
                np.testing.assert_array_equal(found, tensor)


def test_the_reader_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, "llama_biases", Kind.Q8_0)
    theirs = gguf.GGUFReader(path)
    with GGUFFile(path) as ours:
        for key, field in theirs.fields.items():
            if not key.startswith("GGUF."):
                assert ours.metadata[key] == field.contents(), key
        assert ours.tensors.keys() == {tensor.name for tensor in theirs.tensors}
        for tensor in theirs.tensors:
            found = ours.read(tensor.name)
            np.testing.assert_array_equal(
                found.astype(np.float32), gguf.dequantize(tensor.data, tensor.tensor_type)
            )


@pytest.mark.parametrize(
    "kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0, Kind.Q6_K, Kind.Q4_K, Kind.IQ4_NL]
)
def test_dequantising_gives_the_same_bits_as_the_gguf_package(kind: Kind) -> None:
    block, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    shape = (2100, 2 * block)  # more than one piece, and a piece that is not full
    # Random bytes are scales of any size, infinities and NaN too.
    raw = random.integers(0, 256, (shape[0], 2 * num_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        found = dequantize(raw.reshape(-1), kind, shape)
        wanted = gguf.dequantize(raw, kind)
    assert found.dtype == np.float32
    assert found.shape == shape
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(Kind.F32, np.float32), (Kind.F16, np.float16), (Kind.BF16, ml_dtypes.bfloat16)],
)
def test_plain_formats_are_views(kind: Kind, dtype: type) -> None:
    raw = np.frombuffer(np.arange(12).astype(dtype).tobytes(), np.uint8)
    found = dequantize(raw, kind, (3, 4))
    assert found.dtype == dtype
    assert np.shares_memory(found, raw)
    np.testing.assert_array_equal(found.astype(np.float32), np.arange(12.0).reshape(3, 4))


@pytest.mark.parametrize("shape", [(24, 5), (24,), (24, 1)])
def test_the_rotary_permutation_is_undone_per_head(shape: tuple[int, ...]) -> None:
    # Three heads of 8: element i of the first half belongs with i of the second.
    pairs = [[0, 4, 1, 5, 2, 6, 3, 7], [8, 12, 9, 13, 10, 14, 11, 15]]
    pairs.append([16, 20, 17, 21, 18, 22, 19, 23])
    original = np.random.default_rng(1).standard_normal(shape)
    stored = original[np.array(pairs).reshape(-1)]
    np.testing.assert_array_equal(undo_rotary_permutation(stored, 3), original)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.F16, Kind.BF16])
def test_a_stored_dtype_is_the_models(kind: Kind, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tensors = write_tiny_gguf(path, "llama_biases", kind)
    config = load_model_config(path)
    assert config.dtype == ("float16" if kind == Kind.F16 else "bfloat16")
    with open_weights(path, config) as source:
        name = "model.layers.0.self_attn.k_proj.weight"
        np.testing.assert_allclose(
            source.read(name).astype(np.float32), tensors[name], rtol=0.01, atol=0.01
        )


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, "llama_biases", arch="mamba")
    with pytest.raises(ModelLoadError, match=r"'mamba' is not one .* llama, qwen2, qwen3, gemma3"):
        load_model_config(path)


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, "llama_biases")
    config = replace(load_model_config(path), intermediate_size=60)
    message = r"mlp.gate_proj.weight in .* has shape \[64, 32\], but its config asks for \[60, 32\]"
    with pytest.raises(ModelLoadError, match=message), open_weights(path, config):
        pass


def test_numbers_that_cannot_be_run_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def message() -> str:
        with pytest.raises(ModelLoadError) as caught:
            load_model_config(path)
        return str(caught.value)

    def edited(change: Callable[[GGUFFile], object]) -> str:
        from refengine.models.gguf_config import config_from_metadata

        with GGUFFile(path) as file:
            change(file)
            with pytest.raises(ModelLoadError) as caught:
                config_from_metadata(file)
        return str(caught.value)

    write_tiny_gguf(path, "llama_biases")
    assert "lacks llama.block_count" in edited(lambda f: f.metadata.pop("llama.block_count"))
    assert "lacks the tensor token_embd.weight" in edited(
        lambda f: f.tensors.pop("token_embd.weight")
    )
    for key, value, text in (
        ("llama.attention.head_count", [4, 2], "differs between layers"),
        ("llama.attention.head_count_kv", 3, "the first must be a multiple of the second"),
        ("llama.embedding_length", 0, "must be a positive integer, got 0"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "must be a positive number"),
        ("llama.rope.dimension_count", 4, "rotary embeddings of 4 of 8 dimensions"),
        ("llama.rope.scaling.type", "yarn", "rope scaling 'yarn' is not supported"),
    ):
        assert text in edited(lambda f, k=key, v=value: f.metadata.update({k: v}))
    write_tiny_gguf(path, "llama3_scaling")
    data = path.read_bytes()
    with GGUFFile(path) as file:
        at = file.tensors["rope_freqs.weight"].offset
    path.write_bytes(data[:at] + struct.pack("<f", 3.0) + data[at + 4 :])
    assert "rope_freqs.weight is not the scaling of Llama 3.1" in message()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: b"GG", "is not a GGUF file"),
        (lambda data: b"PK\x03\x04" + data[4:], "is not a GGUF file"),
        (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 1 .* supported: 2"),
        (lambda data: data[:10], "truncated in its header"),
        (lambda data: data[:500], "truncated in its header"),
        (lambda data: data[:6000], "truncated in its header"),
        (lambda data: data[: len(data) // 2], "is truncated: tensor .* ends at byte"),
        (lambda data: data[:-40], "is truncated: tensor .* ends at byte .*download it again"),
        (lambda data: data[:16] + struct.pack("<Q", 2**62) + data[24:], "truncated|damaged"),
        (lambda data: data[:24] + struct.pack("<Q", 2**62) + data[32:], "truncated in its header"),
        (lambda data: data.replace(b"general.architecture", b"\xff" * 20), "is damaged"),
    ],
)
def test_a_damaged_file_is_one_clear_line(
    damage: Callable[[bytes], bytes], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, "llama_biases")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ModelLoadError, match=message) as caught:
        load_model_config(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_any_cut_of_a_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, "llama_biases")
    data = path.read_bytes()
    for size in range(4, 12_000, 97):
        path.write_bytes(data[:size])
        with pytest.raises(ModelLoadError, match=r"truncated|damaged"):
            GGUFFile(path)
