from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CHAT_TEMPLATE, write_tiny_tokenizer
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import pre_tokenizers, processors

from refengine.errors import ModelLoadError
from refengine.models.tokenizer import Tokenizer, byte_level_alphabet

BOS, EOS = 296, 297


def edited(directory: Path, **config: Any) -> Tokenizer:
    """The tiny tokenizer with other keys in its tokenizer_config.json."""
    write_tiny_tokenizer(directory)
    path = directory / "tokenizer_config.json"
    values = {**json.loads(path.read_text("utf-8")), **config}
    values = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(values), "utf-8")
    return Tokenizer.from_path(directory)


def add_post_processor(directory: Path) -> None:
    """Have tokenizer.json itself begin every text with <s>."""
    write_tiny_tokenizer(directory)
    backend = HFTokenizer.from_file(str(directory / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(directory / "tokenizer.json"))


def test_what_the_files_say(tmp_path: Path) -> None:
    tokenizer = edited(tmp_path)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    assert tokenizer.pad_token_id is None
    assert tokenizer.vocab_size == 300
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.token(BOS) == "<s>"
    assert tokenizer.token(300) is None
    assert tokenizer.token_to_id("nothing") is None


def test_special_tokens_in_a_text_become_their_ids(tmp_path: Path) -> None:
    tokenizer = edited(tmp_path)
    ids = tokenizer.encode("a</s>b")
    assert ids[1] == EOS
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a</s>b"


def test_a_bos_comes_once_where_the_config_asks_for_it(tmp_path: Path) -> None:
    tokenizer = edited(tmp_path, add_bos_token=True)
    assert tokenizer.encode("a")[0] == BOS
    assert tokenizer.encode("<s>a").count(BOS) == 1
    assert BOS not in tokenizer.encode("a", add_special_tokens=False)
    assert BOS not in edited(tmp_path, add_bos_token=False).encode("a")
    assert BOS not in edited(tmp_path).encode("a")


def test_the_post_processor_counts_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    add_post_processor(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text("utf-8"))
    ids = Tokenizer.from_path(tmp_path).encode("abcdef" * 3)
    assert ids[0] == BOS
    assert len(ids) == 19  # neither cut nor padded, whatever tokenizer.json asks for
    for add_bos, count in ((True, 1), (False, 0)):
        path.write_text(json.dumps({**values, "add_bos_token": add_bos}), "utf-8")
        assert Tokenizer.from_path(tmp_path).encode("ab").count(BOS) == count
    assert Tokenizer.from_path(tmp_path).encode("<s>ab").count(BOS) == 1


def test_a_tokenizer_json_alone_is_enough(tmp_path: Path) -> None:
    write_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_path(tmp_path / "tokenizer.json")
    assert tokenizer.chat_template is None
    assert tokenizer.bos_token_id is None
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}', "utf-8")
    assert Tokenizer.from_path(tmp_path).eos_token_id == EOS


def test_templates_by_name_and_from_files(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    tokenizer = edited(tmp_path, chat_template=named)
    assert tokenizer.chat_template == {"default": "D", "tool_use": "T"}
    (tmp_path / "chat_template.jinja").write_text("J é", "utf-8")
    assert edited(tmp_path).chat_template == "J é"
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("R", "utf-8")
    assert edited(tmp_path, chat_template=None).chat_template == {"default": "J é", "rag": "R"}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelLoadError, match=r"cannot read .*chat_template\.jinja"):
        Tokenizer.from_path(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"holds no tokenizer\.json"),
        (lambda path: path.write_text("{}", "utf-8"), "is not a valid tokenizer"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "is not a valid tokenizer"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is not a valid tokenizer"),
        (
            lambda path: (path.parent / "tokenizer_config.json").write_text("[]", "utf-8"),
            r"tokenizer_config\.json must hold a JSON object",
        ),
    ],
)
def test_damaged_files_are_one_clear_line(
    damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write_tiny_tokenizer(tmp_path)
    damage(tmp_path / "tokenizer.json")
    with pytest.raises(ModelLoadError, match=message) as caught:
        Tokenizer.from_path(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no tokenizer at"):
        Tokenizer.from_path(tmp_path / "nowhere")


def test_the_byte_alphabet_is_that_of_the_library() -> None:
    assert set(byte_level_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_level_alphabet().values()) == list(range(256))


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None)
def test_the_bytes_of_a_texts_tokens_are_the_texts(text: str) -> None:
    from test_detokenizer import TOKENIZERS

    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode(text)
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


def test_the_bytes_of_a_byte_fallback_vocabulary() -> None:
    from test_detokenizer import TOKENIZERS

    tokenizer = TOKENIZERS["byte fallback"]
    euro = [tokenizer.token_bytes(tokenizer.token_to_id(t) or 0) for t in ("<0xE2>", "▁the", "<s>")]
    assert euro == [b"\xe2", b" the", b"<s>"]


def test_bad_words_are_spelled_at_the_beginning_and_after_a_space(tmp_path: Path) -> None:
    tokenizer = edited(tmp_path)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    found = tokenizer.bad_words_token_ids(["the", " a b"])
    assert found == (ids("the"), ids(" the"), ids("a b"), ids(" a b"))
    assert tokenizer.bad_words_token_ids([" "]) == (ids(" "), ids("  "))
    assert tokenizer.bad_words_token_ids([]) == ()
    bos_first = edited(tmp_path, add_bos_token=True)
    assert bos_first.bad_words_token_ids(["the"]) == found[:2]


@pytest.mark.model
def test_the_default_model_splits_digits(smollm2_path: Path) -> None:
    # Made with llama.cpp on the same file; 6,000 more texts of all kinds agreed.
    tokenizer = Tokenizer.from_path(smollm2_path)
    text = (
        "x = 12 + 345;  y\n\n\tFoo's 日本 é e\u0301 🎉 <|im_start|>user\nhi<|im_end|> <|endoftext|>"
    )
    wanted = [104, 446, 216, 33, 34, 1232, 216, 35, 36, 37, 43, 216, 329, 1116, 197, 54, 568, 506]
    wanted += [17097, 241, 115, 40993, 26411, 297, 151, 219, 15107, 232, 227, 216, 1, 4093, 198]
    wanted += [6004, 2, 216, 0]
    assert tokenizer.encode(text) == wanted
    assert tokenizer.decode(wanted, skip_special_tokens=False) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
