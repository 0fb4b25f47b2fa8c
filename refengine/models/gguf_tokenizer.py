"""The tokenizer inside a GGUF file, for byte-level BPE vocabularies.

GGUF keeps words, merges and the name of a pre-tokenizer; how that name splits text is knowledge of
each reader. The rules here are those of the models' own tokenizer.json files.
"""

from __future__ import annotations

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import (
    Tokenizer as HFTokenizer,
)

from refengine.errors import ModelLoadError
from refengine.models.gguf_file import GGUFFile
from refengine.models.tokenizer import Tokenizer

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen 2 differs from Llama 3 in taking digits one by one.
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

# token_type values (ggml's llama_token_type).
_CONTROL, _USER_DEFINED = 3, 4

_PRE_TOKENIZERS = ("default", "gpt-2", "smollm", "llama-bpe", "qwen2")


def tokenizer_from_metadata(file: GGUFFile) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes.

    Raises:
        ModelLoadError: where it is not byte-level BPE with a pre-tokenizer known here.
    """
    kind = file.get("tokenizer.ggml.model")
    pre = file.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelLoadError(
            f"{file.path}: its tokenizer is {kind!r} with pre-tokenizer {pre!r}; supported in GGUF "
            f"files: 'gpt2' with {', '.join(_PRE_TOKENIZERS)}; name a directory that holds the "
            "model's tokenizer.json with --tokenizer"
        )
    tokens, merges = _texts(file, "tokenizer.ggml.tokens"), _texts(file, "tokenizer.ggml.merges")
    backend = HFTokenizer(_model(file, tokens, merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    # Special tokens are found in text before anything is split.
    types = file.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ModelLoadError(f"{file.path} has {len(tokens)} tokens, but {len(types)} token types")
    for token, token_type in zip(tokens, types, strict=True):
        if token_type == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif token_type == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = file.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token_id, int) and token_id < len(tokens):
            special[f"{name}_token"] = tokens[token_id]
    add_bos = file.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    bos = special.get("bos_token")
    if add_bos and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"],
            pair=[bos, "$A", bos, "$B:1"],
            special_tokens=[(bos, tokens.index(bos))],
        )
    template = file.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        special_tokens=special,
        chat_template=template if isinstance(template, str) else None,
        add_bos_token=bool(add_bos),
    )


def _texts(file: GGUFFile, key: str) -> list[str]:
    values = file.get(key)
    if not isinstance(values, list) or not values or not isinstance(values[0], str):
        raise ModelLoadError(f"{file.path} lacks {key}, a list of texts")
    return values


def _model(file: GGUFFile, tokens: list[str], merges: list[str], *, ignore_merges: bool) -> Any:
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        return models.BPE(vocabulary, pairs, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises plain Exception for merges outside the words
        raise ModelLoadError(f"{file.path}: its vocabulary is damaged ({error})") from None


def _pre_tokenizer(pre: str) -> Any:
    """How a named pre-tokenizer splits text before byte-level BPE."""
    if pre in ("llama-bpe", "qwen2"):
        pattern = Regex(_LLAMA3_SPLIT if pre == "llama-bpe" else _QWEN2_SPLIT)
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(pattern, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits by GPT-2's expression
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    return byte_level
