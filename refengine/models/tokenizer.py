"""Text to token ids and back, over the ``tokenizers`` library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as HFTokenizer

from refengine.errors import ModelLoadError
from refengine.models.model_config import read_json_object
from refengine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from refengine.models.detokenizer import IncrementalDetokenizer

# Keys of tokenizer_config.json that name one special token each.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class Tokenizer:
    """A model's tokenizer and what its files say of special tokens and chat.

    Attributes:
        backend: the ``tokenizers.Tokenizer``.
        special_tokens: texts of the named special tokens ("bos_token": "<s>", ...), as chat
            templates see them.
        chat_template: the model's Jinja template, or several by name, or None.
        add_bos_token: whether a prompt begins with the beginning-of-sequence token; None leaves it
            to the tokenizer's own post-processor.
    """

    def __init__(
        self,
        backend: HFTokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.add_bos_token = add_bos_token
        backend.no_padding()
        backend.no_truncation()

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """Load from a model directory, a tokenizer.json, or a GGUF file.

        Raises:
            ModelLoadError: where there is no tokenizer, or one of an unknown kind.
        """
        path = Path(path)
        if path.is_file() and path.suffix != ".json":
            from refengine.models.gguf_file import GGUFFile
            from refengine.models.gguf_tokenizer import tokenizer_from_metadata

            with GGUFFile(path) as file:
                return tokenizer_from_metadata(file)
        if path.is_file():
            return _from_directory(path.parent, path)
        return _from_directory(path, path / "tokenizer.json")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text; special tokens written out in it become their ids.
            add_special_tokens: whether the model's own beginning and end are added; off for text
                from a chat template, which writes them itself.
        """
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        bos = self.bos_token_id
        if add_special_tokens and self.add_bos_token is not None and bos is not None:
            begins = ids[:1] == [bos]
            if self.add_bos_token and not begins:
                ids = [bos, *ids]
            elif not self.add_bos_token and begins and self._post_processor_adds_bos:
                ids = ids[1:]
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids outside the vocabulary give nothing."""
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token ("Ġthe"), or None outside the vocabulary."""
        text: str | None = self.backend.id_to_token(token_id)
        return text

    def token_to_id(self, token: str) -> int | None:
        """The id of a vocabulary entry, or None."""
        token_id: int | None = self.backend.token_to_id(token)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, which need not be whole characters.

        Exact for byte-level vocabularies (GPT-2, Llama 3, Qwen, SmolLM) and for byte-fallback
        tokens (``<0xE2>``); any other token is the UTF-8 of its own text. Empty outside the
        vocabulary.
        """
        token = self.token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            table = byte_level_alphabet()
            if all(character in table for character in token):
                return bytes(table[character] for character in token)
            return token.encode()
        if token_id in self.byte_fallback_ids:
            return bytes([int(token[3:5], 16)])
        return self.decode([token_id], skip_special_tokens=False).encode()

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens; the model's own vocab_size may be padded beyond it."""
        size: int = self.backend.get_vocab_size(with_added_tokens=True)
        return size

    @cached_property
    def base_vocab_size(self) -> int:
        """Number of tokens without those that were added to the trained vocabulary."""
        size: int = self.backend.get_vocab_size(with_added_tokens=False)
        return size

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that ``skip_special_tokens`` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @property
    def bos_token_id(self) -> int | None:
        """The beginning-of-sequence token, if the tokenizer names one."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token, if the tokenizer names one."""
        return self._named_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The padding token, if the tokenizer names one."""
        return self._named_id("pad_token")

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether each token is a string of bytes, so that text is their plain concatenation."""
        return self._decoder_kinds == ["ByteLevel"]

    @cached_property
    def byte_fallback_ids(self) -> frozenset[int]:
        """Ids of the tokens ``<0x00>`` to ``<0xFF>``, where the decoder joins them."""
        if "ByteFallback" not in self._decoder_kinds:
            return frozenset()
        ids = (self.token_to_id(f"<0x{value:02X}>") for value in range(256))
        return frozenset(token_id for token_id in ids if token_id is not None)

    def detokenizer(
        self, params: SamplingParams, prompt_token_ids: Sequence[int] = ()
    ) -> IncrementalDetokenizer:
        """An incremental detokenizer for one request's answer."""
        from refengine.models.detokenizer import IncrementalDetokenizer

        return IncrementalDetokenizer(
            self,
            skip_special_tokens=params.skip_special_tokens,
            stop=tuple(params.stop),
            include_stop_str_in_output=params.include_stop_str_in_output,
            prompt_token_ids=prompt_token_ids,
            min_tokens=params.min_tokens,
        )

    def bad_words_token_ids(self, bad_words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences that spell the given texts, at a text's beginning and after a space.

        A sampler forbids each sequence's last token wherever the others were just generated.
        """
        sequences: dict[tuple[int, ...], None] = {}
        for word in bad_words:
            bare = word.lstrip() or word
            for text in (bare, " " + bare):
                sequences[tuple(self.encode(text, add_special_tokens=False))] = None
        sequences.pop((), None)
        return tuple(sequences)

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.token_to_id(text)

    @cached_property
    def _post_processor_adds_bos(self) -> bool:
        ids = self.backend.encode("", add_special_tokens=True).ids
        return bool(ids) and ids[0] == self.bos_token_id

    @cached_property
    def _decoder_kinds(self) -> list[str]:
        """The steps of the decoder, by the names that tokenizer.json has for them."""
        decoder = self.backend.decoder
        if decoder is None:
            return []
        description: dict[str, Any] = json.loads(decoder.__getstate__())
        return [str(part["type"]) for part in description.get("decoders", [description])]


def byte_level_alphabet() -> dict[str, int]:
    """Byte-level vocabularies' characters to the bytes that they stand for.

    Printable bytes stand for themselves, the others for characters from U+0100 on, in order
    (GPT-2's ``bytes_to_unicode``).
    """
    if not _ALPHABET:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        _ALPHABET.update({chr(value): value for value in printable})
        others = [value for value in range(256) if chr(value) not in _ALPHABET]
        _ALPHABET.update({chr(256 + i): value for i, value in enumerate(others)})
    return _ALPHABET


_ALPHABET: dict[str, int] = {}


def _from_directory(directory: Path, tokenizer_path: Path) -> Tokenizer:
    """Load tokenizer.json, and what lies beside it of tokenizer_config.json and templates."""
    if not tokenizer_path.is_file():
        if not directory.is_dir():
            raise ModelLoadError(f"no tokenizer at {directory}")
        raise ModelLoadError(
            f"{directory} holds no tokenizer.json; make one with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        backend = HFTokenizer.from_file(str(tokenizer_path))
    except Exception as error:  # the library raises plain Exception for any fault in the file
        raise ModelLoadError(f"{tokenizer_path} is not a valid tokenizer: {error}") from None
    config_path = directory / "tokenizer_config.json"
    config = read_json_object(config_path) if config_path.exists() else {}
    map_path = directory / "special_tokens_map.json"
    names = read_json_object(map_path) if map_path.exists() else {}
    special = {}
    for name in _NAMED_TOKENS:
        value = config.get(name, names.get(name))
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            special[name] = text
    add_bos = config.get("add_bos_token")
    return Tokenizer(
        backend,
        special_tokens=special,
        chat_template=_chat_template(directory, config),
        add_bos_token=add_bos if isinstance(add_bos, bool) else None,
    )


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The template or templates of a model directory.

    tokenizer_config.json holds a text, or a list of named ones; newer models keep it in a file
    chat_template.jinja (others in additional_chat_templates/), which then counts.
    """
    template = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(template, str):
        templates["default"] = template
    elif isinstance(template, list):
        for entry in template:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                templates[str(entry.get("name", "default"))] = entry["template"]
    try:
        path = directory / "chat_template.jinja"
        if path.is_file():
            templates["default"] = path.read_text(encoding="utf-8")
        for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
            templates[path.stem] = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from None
    if list(templates) == ["default"]:
        return templates["default"]
    return templates or None
