from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import SPECIAL_TOKENS, tiny_vocabulary
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from refengine.models.detokenizer import IncrementalDetokenizer
from refengine.models.tokenizer import Tokenizer
from refengine.sampling_params import SamplingParams


def byte_level() -> Tokenizer:
    """A byte-level vocabulary with added tokens, special and not, outside its alphabet too."""
    tokens, merges = tiny_vocabulary()
    backend = HFTokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(text) for text in ("a b", "日本", "Ġ日", "<tool>", "Ġé")])
    return Tokenizer(backend)


def byte_fallback(*, strip: bool) -> Tokenizer:
    """A SentencePiece-like vocabulary: "▁" for spaces, and bytes where a character is unknown."""
    words = ["▁", "▁the", "the", "a", "b", "e", "s", "t", "h", "▁a", "▁▁", "é", "語", "\ufffd"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "a"), ("▁", "▁")]
    tokens.append("th")
    backend = HFTokenizer(
        models.BPE(
            {t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


TOKENIZERS = {
    "byte level": byte_level(),
    "byte fallback": byte_fallback(strip=False),
    "byte fallback, first space stripped": byte_fallback(strip=True),
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def in_pieces(detokenizer: IncrementalDetokenizer, ids: Sequence[int], size: int) -> list[str]:
    """All deltas, ``size`` tokens at a time, the final one included."""
    deltas = [detokenizer.append(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [*deltas, detokenizer.finish()]


@st.composite
def token_lists(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Any ids, some outside the vocabulary; bytes of broken characters are common."""
    return draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30))


def test_the_kinds_of_vocabulary_are_told_apart() -> None:
    assert [t.is_byte_level for t in TOKENIZERS.values()] == [True, False, False]
    assert [len(t.byte_fallback_ids) for t in TOKENIZERS.values()] == [0, 256, 256]


@each_tokenizer
@given(data=st.data(), size=st.integers(1, 4), skip=st.booleans())
@settings(deadline=None, max_examples=200)
def test_the_deltas_of_any_tokens_are_the_decoded_whole(
    tokenizer: Tokenizer, data: st.DataObject, size: int, skip: bool
) -> None:
    ids = data.draw(token_lists(tokenizer))
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    deltas = in_pieces(detokenizer, ids, size)
    assert "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert detokenizer.text == "".join(deltas)
    assert detokenizer.num_tokens == len(ids)


@each_tokenizer
@given(text=st.text(st.characters(exclude_characters="\ufffd▁", exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=200)
def test_a_text_comes_back_and_never_shows_half_a_character(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    deltas = in_pieces(IncrementalDetokenizer(tokenizer), ids, 1)
    assert "".join(deltas) == tokenizer.decode(ids)
    assert not any("\ufffd" in delta for delta in deltas)
    if tokenizer.is_byte_level and not any(token in text for token in SPECIAL_TOKENS):
        assert "".join(deltas) == text


def test_a_character_is_given_out_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = [tokenizer.token_to_id(token) for token in ("æ", "Ĺ", "¥", "a")]
    assert [tokenizer.token_bytes(i or 0) for i in ids] == [b"\xe6", b"\x97", b"\xa5", b"a"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.append([i or 0]) for i in ids] == ["", "", "日", "a"]


def test_broken_bytes_are_shown_when_nothing_can_mend_them() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = [tokenizer.token_to_id(token) or 0 for token in ("æ", "a", "æ", "Ĺ")]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.append([i]) for i in ids] == ["", "\ufffda", "", ""]
    assert detokenizer.finish() == "\ufffd"


def test_a_byte_fallback_run_waits_for_its_end() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    ids = [tokenizer.token_to_id(t) or 0 for t in ("<0xE6>", "<0x97>", "<0xA5>", "a")]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.append([i]) for i in ids] == ["", "", "", "日a"]


def test_the_prompt_decides_over_the_first_space() -> None:
    tokenizer = TOKENIZERS["byte fallback, first space stripped"]
    the = tokenizer.token_to_id("▁the") or 0
    assert IncrementalDetokenizer(tokenizer).append([the]) == "the"
    after = IncrementalDetokenizer(tokenizer, prompt_token_ids=tokenizer.encode("the"))
    assert after.append([the]) == " the"


def test_special_tokens_are_left_out_or_shown() -> None:
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a</s>b")
    assert IncrementalDetokenizer(tokenizer).append(ids) == "ab"
    assert IncrementalDetokenizer(tokenizer, skip_special_tokens=False).append(ids) == "a</s>b"


def cut_at_first_stop(text: str, stop: Sequence[str], include: bool) -> tuple[str, str | None]:
    """What should remain of a text whose characters come one by one."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@each_tokenizer
@given(
    data=st.data(),
    size=st.integers(1, 4),
    include=st.booleans(),
    stop=st.lists(st.text("abthe ", min_size=1, max_size=5), min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=300)
def test_stop_texts_cut_wherever_tokens_end(
    tokenizer: Tokenizer, data: st.DataObject, size: int, include: bool, stop: list[str]
) -> None:
    # Few kinds of tokens, so that stop texts do come up.
    words = ["a", "b", "e", "h", "t", "the", "Ġ", "Ġt", "▁", "▁the", "▁a"]
    known = [i for word in words if (i := tokenizer.token_to_id(word)) is not None]
    ids = data.draw(st.lists(st.sampled_from(known), max_size=20))
    wanted, reason = cut_at_first_stop(tokenizer.decode(ids), stop, include)
    detokenizer = IncrementalDetokenizer(tokenizer, stop=stop, include_stop_str_in_output=include)
    deltas = in_pieces(detokenizer, ids, size)
    assert "".join(deltas) == wanted
    assert detokenizer.text == wanted
    assert detokenizer.stop_reason == reason


@given(pieces=st.lists(st.sampled_from("abthe"), max_size=20))
@settings(deadline=None)
def test_only_what_may_become_a_stop_text_is_held_back(pieces: list[str]) -> None:
    tokenizer, stop = TOKENIZERS["byte level"], ("the", "hat", "eee")
    detokenizer = IncrementalDetokenizer(tokenizer, stop=stop)
    text = ""
    for piece in pieces:
        detokenizer.append([tokenizer.token_to_id(piece) or 0])
        text += piece
        if detokenizer.stop_reason is not None:
            break
        held = text.removeprefix(detokenizer.text)
        assert held == next(
            (text[-n:] for n in (2, 1) if len(text) >= n and any(s[:n] == text[-n:] for s in stop)),
            "",
        )


def test_tokens_after_the_one_that_stops_are_not_counted() -> None:
    tokenizer = TOKENIZERS["byte level"]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["b"])
    assert detokenizer.append(tokenizer.encode("aeb") + tokenizer.encode("hhh")) == "ae"
    assert (detokenizer.stop_reason, detokenizer.num_tokens) == ("b", 3)
    assert detokenizer.append([0]) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.text == "ae"


@pytest.mark.parametrize(
    ("min_tokens", "text"), [(0, "a"), (2, "a"), (3, "abe"), (4, "abe"), (5, "abebe")]
)
def test_a_stop_text_before_min_tokens_is_ignored(min_tokens: int, text: str) -> None:
    tokenizer = TOKENIZERS["byte level"]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["b"], min_tokens=min_tokens)
    ids = [tokenizer.token_to_id(c) or 0 for c in "abebeb"]
    assert "".join(in_pieces(detokenizer, ids, 1)) == text
    assert detokenizer.stop_reason == "b"


def test_a_request_gets_a_detokenizer_with_its_parameters() -> None:
    tokenizer = TOKENIZERS["byte level"]
    params = SamplingParams(
        stop="he", include_stop_str_in_output=True, skip_special_tokens=False, min_tokens=1
    )
    detokenizer = tokenizer.detokenizer(params, [])
    assert detokenizer.append(tokenizer.encode("</s>t") + tokenizer.encode("het")) == "</s>the"
    assert detokenizer.stop_reason == "he"
