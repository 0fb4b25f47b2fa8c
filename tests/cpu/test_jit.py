"""The disk cache notices changes in every file that a function is made from."""

from __future__ import annotations

from refengine.cpu import jit
from refengine.cpu.attention_products import score_rows


def write_files(folder):
    (folder / "low.py").write_text("VALUE = 1\n")
    (folder / "middle.py").write_text("from refengine.cpu.low import VALUE\n")
    (folder / "top.py").write_text(
        "from refengine.cpu.middle import (\n    VALUE,\n)\nfrom numpy import zeros\n"
    )
    (folder / "other.py").write_text("VALUE = 2\n")


def test_a_stamp_covers_what_is_imported_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(jit, "_FOLDER", tmp_path)
    write_files(tmp_path)

    def stamp():
        return jit._stamp.__wrapped__(tmp_path / "top.py")

    before = stamp()
    (tmp_path / "other.py").write_text("VALUE = 3\n")
    assert stamp() == before
    (tmp_path / "low.py").write_text("VALUE = 4\n")
    assert stamp() != before


def test_imports_of_several_modules_are_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(jit, "_FOLDER", tmp_path)
    write_files(tmp_path)
    (tmp_path / "top.py").write_text("from refengine.cpu import low, other\n")
    before = jit._stamp.__wrapped__(tmp_path / "top.py")
    (tmp_path / "other.py").write_text("VALUE = 3\n")
    assert jit._stamp.__wrapped__(tmp_path / "top.py") != before


def test_compiled_functions_use_the_stamp():
    """Numba's own is the hash of one file; where its insides change, this shows it."""
    path = jit.Path(score_rows.py_func.__code__.co_filename)
    assert score_rows._cache._cache_file._source_stamp == jit._stamp(path)
