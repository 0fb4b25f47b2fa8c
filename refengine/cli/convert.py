"""``refengine convert``: a GGUF file as a Hugging Face directory."""

from __future__ import annotations

import click


@click.command("convert")
@click.argument("gguf", type=click.Path())
@click.argument("directory", type=click.Path(file_okay=False))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the written tensors; float32 keeps every bit of a quantised file.",
)
def command(gguf: str, directory: str, dtype: str) -> None:
    """Write the model in GGUF (a file, or "smollm2") to DIRECTORY as Hugging Face lays it out."""
    from refengine.cli.options import show_progress
    from refengine.models.convert import convert_gguf
    from refengine.models.default_model import resolve_model

    path = resolve_model(gguf, progress=show_progress())
    convert_gguf(path, directory, dtype=dtype, progress=show_progress())
    click.echo(f"wrote {directory}")
