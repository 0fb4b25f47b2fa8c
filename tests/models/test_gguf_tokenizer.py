from __future__ import annotations

from pathlib import Path

import pytest
from tiny_gguf import write_tiny_gguf

from refengine.errors import ModelLoadError
from refengine.models.gguf_file import GGUFFile
from refengine.models.tokenizer import Tokenizer


def tokenizer(tmp_path: Path, pre: str) -> Tokenizer:
    path = tmp_path / f"{pre}.gguf"
    write_tiny_gguf(path, "llama_biases", pre=pre)
    return Tokenizer.from_path(path)


def split(tokenizer: Tokenizer, text: str) -> list[str]:
    """How the pre-tokenizer cuts a text, spaces shown as themselves."""
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", "It|'s| 12345| o|'|CLOCK|,|  | x|\n|\n|!"),
        ("smollm", "It|'s| |1|2|3|4|5| o|'|CLOCK|,|  | x|\n|\n|!"),
        ("llama-bpe", "It|'s| |123|45| o|'CLOCK|,|  | x|\n\n|!"),
        ("qwen2", "It|'s| |1|2|3|4|5| o|'CLOCK|,|  | x|\n\n|!"),
    ],
)
def test_each_pre_tokenizer_splits_as_its_models_do(pre: str, pieces: str, tmp_path: Path) -> None:
    found = split(tokenizer(tmp_path, pre), "It's 12345 o'CLOCK,   x\n\n!")
    assert found == pieces.split("|")


def test_special_tokens_and_templates_come_along(tmp_path: Path) -> None:
    found = tokenizer(tmp_path, "smollm")
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (296, 297, None)
    assert found.special_ids == {296, 297, 298, 299}
    assert found.vocab_size == 300
    assert found.is_byte_level
    assert isinstance(found.chat_template, str)
    assert found.encode("<s>a</s>") == [296, found.token_to_id("a"), 297]
    # A user-defined token is found in text, but is no special token.
    last = found.token(295)
    assert last is not None
    assert found.encode(last) == [295]
    assert found.decode([295]) == last


def test_only_llama_3_begins_texts_with_bos_unless_the_file_says(tmp_path: Path) -> None:
    assert tokenizer(tmp_path, "smollm").encode("a")[0] != 296
    llama = tokenizer(tmp_path, "llama-bpe")
    assert llama.encode("a")[0] == 296
    assert llama.encode("a", add_special_tokens=False)[0] != 296


def test_qwen_2_composes_characters(tmp_path: Path) -> None:
    qwen = tokenizer(tmp_path, "qwen2")
    assert qwen.encode("e\u0301") == qwen.encode("é")
    smollm = tokenizer(tmp_path, "smollm")
    assert smollm.encode("e\u0301") != smollm.encode("é")


@pytest.mark.parametrize(("model", "pre"), [("llama", "default"), ("gpt2", "falcon")])
def test_other_kinds_are_refused_with_what_to_do(model: str, pre: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, "llama_biases", tokenizer_model=model, pre=pre)
    message = f"tokenizer is '{model}' with pre-tokenizer '{pre}'.*--tokenizer"
    with pytest.raises(ModelLoadError, match=message):
        Tokenizer.from_path(path)


def test_a_damaged_vocabulary_is_refused(tmp_path: Path) -> None:
    from refengine.models.gguf_tokenizer import tokenizer_from_metadata

    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, "llama_biases")
    for key, value, message in (
        ("tokenizer.ggml.tokens", None, "lacks tokenizer.ggml.tokens"),
        ("tokenizer.ggml.merges", [1, 2], "lacks tokenizer.ggml.merges, a list of texts"),
        ("tokenizer.ggml.merges", ["no such"], "its vocabulary is damaged"),
        ("tokenizer.ggml.token_type", [1], "token types"),
    ):
        with GGUFFile(path) as file:
            file.metadata[key] = value
            with pytest.raises(ModelLoadError, match=message):
                tokenizer_from_metadata(file)
