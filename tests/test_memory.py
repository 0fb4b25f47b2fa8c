"""Peak memory: the weights, the cache, and at most 300 MB for everything else.

Once kernels are compiled, that is: a process that compiles them takes some 150 MB more.
"""

import json
import subprocess
import sys

import pytest

# The kernel's high-water mark of this program alone: ru_maxrss would count the test's own process,
# which the program was forked from.
PROGRAM = """
import json, re, sys
from pathlib import Path
from refengine import LLM, SamplingParams

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

llm = LLM(sys.argv[1], dtype=sys.argv[2], backend="cpu", kv_cache_memory_bytes=2**26)
loaded = peak()
prompts = [{"prompt_token_ids": list(range(5, 305))}] * 8
llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))
parameters = llm.loaded.model_config.num_parameters
print(json.dumps({"loaded": loaded, "peak": peak(), "parameters": parameters}))
"""


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_peak_is_weights_and_cache_and_a_process(smollm2_path, dtype, size):
    command = [sys.executable, "-c", PROGRAM, str(smollm2_path), dtype]
    for _ in ("compile", "measure"):
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    result = json.loads(run.stdout)
    weights = result["parameters"] * size
    assert result["loaded"] < weights + 2**26 + 300e6
    assert result["peak"] < weights + 2**26 + 300e6
