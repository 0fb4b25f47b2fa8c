"""Structured output: which tokens a grammar allows next, one matcher a request.

The grammars and the parsing are llguidance's (Earley over a lexer of regular-expression
derivatives; https://github.com/guidance-ai/llguidance), with the model's own tokenizer. It is an
optional package: nothing here is imported before a request asks for a structure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from refengine.errors import RefengineError, RequestError
from refengine.sampling_params import StructuredOutput

if TYPE_CHECKING:
    from refengine.models.tokenizer import Tokenizer

Bool = npt.NDArray[np.bool_]

# A grammar of more characters, or with deeper brackets, is refused: parsers of grammars recurse.
MAX_GRAMMAR_CHARACTERS = 64 * 1024
MAX_GRAMMAR_DEPTH = 64


class StructuredOutputs:
    """Makes matchers for one model.

    Args:
        tokenizer: the model's.
        vocab_size: columns of its logits.
        eos_token_ids: tokens that may end an answer, once its structure is complete.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._compiled: Any = None  # llguidance's form of the tokenizer, made once when needed

    def matcher(self, structure: StructuredOutput) -> Matcher:
        """A matcher at the structure's beginning.

        Raises:
            RequestError: where the structure is not one that llguidance takes.
            RefengineError: where llguidance is not installed.
        """
        library = _llguidance()
        check_grammar_size(structure)
        if self._compiled is None:
            eos = list(self.eos_token_ids)
            self._compiled = library.LLTokenizer(
                self._tokenizer.backend.to_str(), n_vocab=self.vocab_size, eos_token=eos or None
            )
        try:
            grammar = _grammar(library, structure)
            state = library.LLMatcher(self._compiled, grammar, log_level=0)
        except Exception as error:  # the library raises ValueError, or Exception from Rust
            raise RequestError(f"{structure.kind} is not usable: {_first_line(error)}") from None
        if state.is_error():
            raise RequestError(
                f"{structure.kind} is not usable: {_first_line(state.get_error())}"
            ) from None
        return Matcher(state, self.vocab_size, self.eos_token_ids)


class Matcher:
    """Where one request's answer stands in its structure.

    Args:
        state: llguidance's matcher.
        vocab_size: columns of the logits.
        eos_token_ids: what is allowed when nothing else is.
    """

    def __init__(self, state: Any, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._state = state
        self._vocab_size = vocab_size
        self._eos = list(eos_token_ids)
        self._num_taken = 0
        self._failed = False

    def allowed(self, output_token_ids: npt.NDArray[np.int32]) -> Bool:
        """Which tokens may follow an answer's tokens so far.

        The matcher takes in those that it has not seen, which after a preemption are all of them:
        a request's state depends on its tokens alone.

        Args:
            output_token_ids: ``[num_output_tokens]``.

        Returns:
            ``[vocab]``, true where the token may come. Where the structure is complete, or the
            matcher has failed, only the end of the answer is left.
        """
        new = output_token_ids[self._num_taken :].tolist()
        self._num_taken += len(new)
        if new and not self._state.is_stopped() and not self._failed:
            self._failed = not self._state.consume_tokens(new)
        allowed = np.zeros(self._vocab_size, np.bool_)
        if not self._failed and not self._state.is_stopped():
            words = np.zeros((1, -(-self._vocab_size // 32)), np.int32)
            import llguidance.numpy as bitmasks

            bitmasks.fill_next_token_bitmask(self._state, words, 0)
            self._failed = self._state.is_error()
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")
            allowed[:] = bits[: self._vocab_size]
        if self._failed or not allowed.any():
            allowed[:] = False
            allowed[self._eos] = True
        return allowed


def check_grammar_size(structure: StructuredOutput) -> None:
    """Refuse a grammar that is too long or nests too deeply.

    Raises:
        RequestError: with the limit.
    """
    text = structure.value
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise RequestError(
            f"{structure.kind} has {len(text):,} characters; at most "
            f"{MAX_GRAMMAR_CHARACTERS:,} are taken"
        )
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    if deepest > MAX_GRAMMAR_DEPTH:
        raise RequestError(
            f"{structure.kind} nests its brackets {deepest} deep; at most {MAX_GRAMMAR_DEPTH} "
            "are taken"
        )


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise RefengineError(
            "structured output needs llguidance: pip install 'refengine[server]'"
        ) from None
    return llguidance


def _grammar(library: Any, structure: StructuredOutput) -> str:
    """The structure as llguidance takes it."""
    kind, value = structure.kind, structure.value
    matcher = library.LLMatcher
    if kind == "json_schema":
        # Blanks between tokens would let a model that likes them never come to an end.
        options = {"whitespace_flexible": False}
        return str(matcher.grammar_from_json_schema(value, defaults=options))
    if kind == "regex":
        return str(matcher.grammar_from_regex(value))
    return str(matcher.grammar_from_lark(value))


def _first_line(error: object) -> str:
    """The beginning of a library's message, which may quote the whole grammar."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no reason given"
