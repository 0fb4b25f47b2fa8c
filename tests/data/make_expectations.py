"""Make the expectations in this folder from Hugging Face transformers (float32, eager).

    python tests/data/make_expectations.py [tiny] [chat] [smollm2]

Needs torch and transformers (``pip install -e '.[peers,test]'``); the tests do not. Writes

- greedy_smollm2.json.gz: the default model, converted from its GGUF file: for each prompt its token
  ids, 64 greedy tokens and, at each of them, how far the two largest logits lay apart;
- tiny_models.json: the same, 24 tokens, for the models of tests/tiny_models.py, and the logits of
  the last prompt position;
- chat_templates.json: the conversations of chat_cases.py through its templates, or the error.

End-of-sequence tokens do not end a continuation.
"""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from chat_cases import CONVERSATIONS, OPTIONS, TEMPLATES  # noqa: E402
from smollm2_prompts import PROMPTS  # noqa: E402
from tiny_models import TINY_MODELS, VOCAB_SIZE, write_tiny_model, write_tiny_tokenizer  # noqa: E402

from refengine.models.convert import convert_gguf  # noqa: E402
from refengine.models.default_model import resolve_model  # noqa: E402

TINY_PROMPT_LENGTHS = (1, 5, 17, 60, 150)


def load(directory: Path) -> Any:
    """The model in float32 with plain attention."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def greedy(model: Any, prompt_token_ids: list[int], num_tokens: int) -> dict[str, Any]:
    """Greedy continuation, with the distance between the two largest logits at each step."""
    token_ids: list[int] = []
    gaps: list[float] = []
    first_logits: list[float] = []
    inputs, cache = torch.tensor([prompt_token_ids]), None
    for _ in range(num_tokens):
        out = model(inputs, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[0, -1].float()
        if not token_ids:
            first_logits = logits.tolist()
        top = torch.topk(logits, 2)
        token_ids.append(int(top.indices[0]))
        gaps.append(round(float(top.values[0] - top.values[1]), 6))
        inputs = torch.tensor([[token_ids[-1]]])
    return {
        "prompt_token_ids": prompt_token_ids,
        "token_ids": token_ids,
        "gaps": gaps,
        "last_prompt_logits": first_logits,
    }


def make_tiny() -> None:
    """Write tiny_models.json."""
    results = {}
    for name in TINY_MODELS:
        random = np.random.RandomState(7)
        with tempfile.TemporaryDirectory() as folder:
            model = load(write_tiny_model(name, Path(folder)))
            prompts = []
            for length in TINY_PROMPT_LENGTHS:
                ids = random.randint(0, VOCAB_SIZE, length).tolist()
                entry = greedy(model, ids, 24)
                entry["last_prompt_logits"] = [round(x, 5) for x in entry["last_prompt_logits"]]
                prompts.append(entry)
        results[name] = prompts
        print(name, "smallest gaps", [min(entry["gaps"]) for entry in prompts])
    write(HERE / "tiny_models.json", {"made_with": versions(), "models": results})


def make_smollm2() -> None:
    """Write greedy_smollm2.json.gz."""
    with tempfile.TemporaryDirectory() as folder:
        directory = convert_gguf(resolve_model("smollm2"), Path(folder) / "model")
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = load(directory)
    results = []
    for prompt in PROMPTS:
        if "messages" in prompt:
            text = tokenizer.apply_chat_template(
                prompt["messages"], tokenize=False, add_generation_prompt=True
            )
        else:
            text = prompt["prompt"]
        ids = tokenizer.encode(text, add_special_tokens=False)
        entry = greedy(model, ids, 64)
        entry.pop("last_prompt_logits")
        results.append({**prompt, "text": text, **entry})
        print(
            f"{prompt['name']:24} {len(ids):5} tokens, smallest gap {min(entry['gaps']):.5f}:",
            repr(tokenizer.decode(entry["token_ids"])[:60]),
            flush=True,
        )
    write(HERE / "greedy_smollm2.json.gz", {"made_with": versions(), "prompts": results})


def make_chat() -> None:
    """Write chat_templates.json."""
    with tempfile.TemporaryDirectory() as folder:
        write_tiny_tokenizer(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder, eos_token="</s>")
    results = []
    for template, source in TEMPLATES.items():
        for conversation, messages in CONVERSATIONS.items():
            for options, values in OPTIONS.items():
                entry = {"template": template, "conversation": conversation, "options": options}
                try:
                    entry["text"] = tokenizer.apply_chat_template(
                        messages, chat_template=source, tokenize=False, **values
                    )
                except jinja2.TemplateError as error:
                    entry["error"] = str(error)
                results.append(entry)
    write(HERE / "chat_templates.json", {"made_with": versions(), "cases": results})


def versions() -> dict[str, str]:
    """What made the data."""
    return {"transformers": transformers.__version__, "torch": torch.__version__}


def write(path: Path, values: dict[str, Any]) -> None:
    """Write JSON, the same bytes for the same values."""
    data = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data + b"\n")
    print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    asked = sys.argv[1:] or ["tiny", "chat", "smollm2"]
    if "tiny" in asked:
        make_tiny()
    if "chat" in asked:
        make_chat()
    if "smollm2" in asked:
        make_smollm2()
