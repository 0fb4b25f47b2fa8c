"""Token ids to text as they arrive, whole characters only, ending at stop strings.

The text given out, all deltas together, is exactly what decoding all tokens at once gives.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from refengine.models.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character

# Prompt tokens that a new token is decoded with, so that the first one keeps its leading space.
_CONTEXT_TOKENS = 6


class _TokenDecoder(Protocol):
    """Gives the text that each token completes."""

    def append(self, token_id: int) -> str:
        """The characters that are certain now and were not before."""

    def finish(self) -> str:
        """Whatever was held back; incomplete characters become U+FFFD."""


class IncrementalDetokenizer:
    """One answer's text, a few tokens at a time.

    Args:
        tokenizer: the model's.
        skip_special_tokens: leave special tokens out of the text.
        stop: texts that end the answer.
        include_stop_str_in_output: keep the stop text itself.
        prompt_token_ids: the prompt; some tokenizers write a token differently at a text's
            beginning.
        min_tokens: a stop text that ends in an earlier token than this one is ignored.

    Attributes:
        text: what has been given out so far; after a stop or ``finish`` the whole answer.
        stop_reason: the stop text that was found, or None.
        num_tokens: tokens taken in, up to and with the one that completed a stop text.

    A token that ends the answer by its id (end of sequence) is no part of its text: leave it out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        prompt_token_ids: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._decoder: _TokenDecoder
        if tokenizer.is_byte_level:
            self._decoder = _ByteLevelDecoder(tokenizer, skip_special_tokens)
        else:
            self._decoder = _WindowDecoder(tokenizer, skip_special_tokens, prompt_token_ids)
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._longest_stop = max((len(text) for text in self._stop), default=0)
        self._held = ""  # certain text that may be the beginning of a stop text
        self._given: list[str] = []
        self.stop_reason: str | None = None
        self.num_tokens = 0

    @property
    def text(self) -> str:
        """All text given out."""
        if len(self._given) > 1:
            self._given = ["".join(self._given)]
        return self._given[0] if self._given else ""

    def append(self, token_ids: Sequence[int]) -> str:
        """Take in new tokens.

        Args:
            token_ids: the new tokens; those after one that completes a stop text are ignored.

        Returns:
            New text to show; often empty. After a stop (``stop_reason``) nothing more comes.
        """
        new = ""
        for token_id in token_ids:
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            new += self._take(self._decoder.append(token_id), self.num_tokens >= self._min_tokens)
        self._given.append(new)
        return new

    def finish(self) -> str:
        """End the answer: everything held back, which may still complete a stop text."""
        if self.stop_reason is not None:
            return ""
        new = self._take(self._decoder.finish(), self.num_tokens >= self._min_tokens)
        new += self._held
        self._held = ""
        self._given.append(new)
        return new

    def _take(self, added: str, may_stop: bool) -> str:
        """Add certain text; return what of it can be given out."""
        if not self._stop:
            return added
        if not added:
            return ""
        held = self._held + added
        # 1 The stop text that is complete first counts, as if characters came one by one: then
        #   it makes no difference how they were cut into tokens.
        if may_stop:
            first_end = len(self._held) + 1
            found = [
                (at + len(text), at)
                for text in self._stop
                if (at := held.find(text, max(0, first_end - len(text)))) >= 0
            ]
            if found:
                end, at = min(found)
                self.stop_reason = held[at:end]
                self._held = ""
                return held[:end] if self._include_stop else held[:at]
        # 2 Hold back the longest end that some stop text begins with.
        keep = next(
            (
                size
                for size in range(min(len(held), self._longest_stop - 1), 0, -1)
                if any(size < len(text) and text.startswith(held[-size:]) for text in self._stop)
            ),
            0,
        )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


class _ByteLevelDecoder:
    """Tokens are strings of bytes; characters are given out when their last byte is there."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def append(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """Any other tokenizer: decode a short window of tokens before and after each new one.

    The window's beginning serves as context (vLLM's prefix and read offsets). It moves on only
    where the text is certain: not in the middle of a run of byte-fallback tokens, which decoders
    turn into characters or into U+FFFD as a whole.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_token_ids: Sequence[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._byte_ids = tokenizer.byte_fallback_ids
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._window = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        self._context = len(self._window)  # tokens of the window whose text was given out

    def append(self, token_id: int) -> str:
        if token_id in self._skipped or self._tokenizer.token(token_id) is None:
            return ""  # no part of the text, and no end to a run of bytes
        self._window.append(token_id)
        if token_id in self._byte_ids:
            return ""
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._window = self._window[self._context :]
        self._context = len(self._window)
        return text

    def finish(self) -> str:
        return self._new_text()

    def _new_text(self) -> str:
        before = self._decode(self._window[: self._context])
        return self._decode(self._window)[len(before) :]

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special)
