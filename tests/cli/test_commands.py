"""The command line as its user sees it, on a tiny model and the reference backend."""

import json
import subprocess
import sys

import pytest

from refengine.cli.main import COMMANDS, run

MODEL = "llama3_scaling"


@pytest.fixture
def model(tiny_model):
    return str(tiny_model(MODEL))


@pytest.fixture
def command(capsys, model):
    """Run a command line; MODEL stands for the tiny model on the reference backend."""

    def invoke(*arguments, engine=True):
        flags = {"--model": model, "--backend": "reference"}
        if not any("kv" in argument for argument in arguments):
            flags["--num-kv-blocks"] = "64"
        extra = [word for flag in flags.items() if flag[0] not in arguments for word in flag]
        status = run([*arguments, *(extra if engine else [])])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return invoke


def test_generate_json_prints_one_object_a_prompt(command):
    status, out, _ = command("generate", "the cat", "on a", "--max-tokens", "5", "--json")
    objects = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [o["prompt"] for o in objects] == ["the cat", "on a"]
    for entry in objects:
        assert {"prompt_token_ids", "text", "token_ids", "finish_reason"} <= entry.keys()
        assert len(entry["token_ids"]) == 5
        assert entry["finish_reason"] == "length"


def test_generate_streams_the_same_text(command):
    _, as_json, _ = command("generate", "the cat", "--max-tokens", "9", "--json")
    status, streamed, _ = command("generate", "the cat", "--max-tokens", "9")
    assert status == 0
    assert streamed == "the cat" + json.loads(as_json)["text"] + "\n"


def test_generate_logprobs(command):
    _, out, _ = command(
        "generate",
        "the cat",
        "--max-tokens",
        "3",
        "--json",
        "--logprobs",
        "2",
        "--prompt-logprobs",
        "1",
    )
    entry = json.loads(out)
    assert len(entry["logprobs"]) == 3
    assert len(entry["prompt_logprobs"]) == len(entry["prompt_token_ids"])
    assert entry["prompt_logprobs"][0] is None
    assert str(entry["token_ids"][0]) in entry["logprobs"][0]


def test_sampling_seed_makes_an_answer_repeatable(command):
    arguments = [
        "generate",
        "the",
        "--json",
        "--max-tokens",
        "12",
        "--temperature",
        "1",
        "--sampling-seed",
    ]
    texts = [json.loads(command(*arguments, seed)[1])["token_ids"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_generate_chat_uses_the_models_template(command):
    _, out, _ = command("generate", "--chat", "hello", "--max-tokens", "3", "--json")
    assert json.loads(out)["prompt"] == "<s><|user|>hello\n<|assistant|>"


def test_prompts_from_files(command, tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("the cat\n\non a\n", encoding="utf-8")
    objects = tmp_path / "prompts.jsonl"
    objects.write_text('"the cat"\n{"prompt_token_ids": [1, 2, 3]}\n{"prompt": "on a"}\n')
    _, out, _ = command("generate", "--prompts-file", str(lines), "--json", "--max-tokens", "1")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["the cat", "on a"]
    _, out, _ = command("generate", "--prompts-file", str(objects), "--json", "--max-tokens", "1")
    entries = [json.loads(line) for line in out.splitlines()]
    assert [entry["prompt"] for entry in entries] == ["the cat", None, "on a"]
    assert entries[1]["prompt_token_ids"] == [1, 2, 3]


def test_info_json_agrees_with_the_weights(command, model):
    status, out, _ = command("info", model, "--json", engine=False)
    facts = json.loads(out)
    assert status == 0
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert facts["kv_bytes_per_full_request"] == 512 * facts["kv_bytes_per_token"]
    from refengine.models.model_config import load_model_config
    from refengine.models.tensor_names import expected_tensors

    shapes = expected_tensors(load_model_config(model)).values()
    count = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        count += size
    assert facts["num_parameters"] == count


def test_info_for_a_person(command, model):
    status, out, _ = command("info", model, engine=False)
    assert status == 0
    assert "num_hidden_layers" in out
    assert "KiB" in out


def test_bench_throughput_json(command, tmp_path):
    workload = tmp_path / "workload.json"
    workload.write_text(
        json.dumps(
            [
                {"prompt_token_ids": [1, 2, 3], "output_len": 4},
                {"prompt_token_ids": [5], "output_len": 2},
            ]
        )
    )
    status, out, _ = command("bench", "throughput", "--workload", str(workload), "--json")
    result = json.loads(out)
    assert status == 0
    assert (result["prompt_tokens"], result["output_tokens"]) == (4, 6)
    assert result["output_tokens_per_s"] == pytest.approx(6 / result["seconds"], rel=0.01)
    for name in ("ttft_ms", "itl_ms"):
        assert set(result[name]) == {"mean", "p50", "p99"}
        assert all(value > 0 for value in result[name].values())


def test_bench_draws_the_same_workload_from_a_seed(command):
    arguments = [
        "bench",
        "throughput",
        "--num-prompts",
        "3",
        "--input-len",
        "2:9",
        "--output-len",
        "3",
        "--json",
    ]
    results = [json.loads(command(*arguments, "--seed", seed)[1]) for seed in ("1", "1", "2")]
    tokens = [result["prompt_tokens"] for result in results]
    assert tokens[0] == tokens[1] != tokens[2]
    assert results[0]["output_tokens"] == 9


def test_bench_latency_for_a_person(command):
    status, out, _ = command(
        "bench", "latency", "--input-len", "3", "--output-len", "4", "--num-iters", "2"
    )
    assert status == 0
    assert "output tokens/s" in out
    assert "forward" in out


def test_chat_keeps_the_conversation(model):
    process = subprocess.run(
        [sys.executable, "-m", "refengine", "chat", "--model", model, "--backend", "reference",
         "--num-kv-blocks", "64", "--temperature", "0", "--max-tokens", "4"],
        input="the cat\n/stats\n/reset\n\non a\n/exit\n",
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert "tokens/s" in process.stdout


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_teaches(name, capsys):
    assert run([name, "--help"] if name else ["--help"]) == 0
    out = capsys.readouterr().out
    assert "Usage: refengine" in out
    assert len(out) > 150


def one_line(status, out, err):
    """A user's mistake: a non-zero status, one line, no traceback."""
    assert status != 0
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate"], "at least one prompt"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "a", "--max-tokens", "0"], "must be an integer of at least 1, got 0"),
        (["generate", "a", "--temperature", "-1"], "must be a number at least 0, got -1"),
        (["generate", "a", "--temperature", "nan"], "temperature"),
        (["generate", "a", "--logprobs", "21"], "at most 20, got 21"),
        (["generate", "a", "--logit-bias", "{x"], "logit_bias must be a JSON object"),
        (["generate", "a", "--logit-bias", '{"300": 1}'], "outside this model's vocabulary of 300"),
        (["generate", "a", "--dtype", "int3"], "int3"),
        (["generate", "a", "--dtype", "float16"], "float16"),
        (["generate", "a", "--backend", "tpu"], "tpu"),
        (["generate", "a", "--block-size", "0"], "0"),
        (["generate", "a", "--no-such-flag"], "--no-such-flag"),
        (["generate", "z" * 600], "max_model_len is 512"),
        (["generate", "a", "--max-model-len", "100000"], "positions end at 512"),
        (["generate", "a", "--kv-cache-memory-bytes", "1KiB"], "hold no block"),
        (["generate", "a", "--kv-cache-memory-bytes", "much"], "'much' is not a number of bytes"),
        (["generate", "--prompts-file", "/no/such/file"], "cannot read /no/such/file"),
        (["bench", "throughput", "--workload", "/no/such/file"], "cannot read /no/such/file"),
        (["bench", "throughput", "--input-len", "9:2"], "'9:2' is not MIN:MAX"),
        (["nonsense"], "nonsense"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(command, arguments, says):
    last = arguments[:1] == ["nonsense"]
    assert says in one_line(*command(*arguments, engine=not last))


def test_a_request_larger_than_the_whole_cache(command):
    status, out, err = command("generate", "the cat", "--max-tokens", "400", "--num-kv-blocks", "4")
    assert "blocks" in one_line(status, out, err)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"caf\xe9\n", "is not UTF-8: byte 0xe9 at position 3"),
        (b"\n\n", "holds no prompt"),
    ],
)
def test_prompt_files_that_are_none(command, tmp_path, content, says):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert says in one_line(*command("generate", "--prompts-file", str(path)))


@pytest.mark.parametrize(
    "content", ["[]", "{}", '[{"prompt_token_ids": []}]', "[1]", "nonsense", "\udcff"]
)
def test_workload_files_that_are_none(command, tmp_path, content):
    path = tmp_path / "workload.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    one_line(*command("bench", "throughput", "--workload", str(path)))


def test_a_missing_model(capsys, tmp_path):
    status = run(["info", str(tmp_path / "nothing")])
    captured = capsys.readouterr()
    one_line(status, captured.out, captured.err)
    status = run(["generate", "a", "--model", str(tmp_path)])
    captured = capsys.readouterr()
    assert "config.json" in one_line(status, captured.out, captured.err)


def test_a_closed_pipe_is_no_error(model):
    process = subprocess.Popen(
        [sys.executable, "-m", "refengine", "info", model],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) in (0, 1)
