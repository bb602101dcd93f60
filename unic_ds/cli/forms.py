"""`unic-ds forms`: compares a student with its exports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unic_ds.config.option import option
from unic_ds.config.verb import Verb


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb."""

    threads: int = option(0, "CPU threads of a form; 0: two, or one on a machine with one core")


VERB = Verb(
    name="forms",
    summary="compare a student with its exports: size, latency on CPU, kNN, fidelity",
    options=Options,
    arguments={
        "RUN": "run folder, or a student/ or imported folder",
        "[FOLDER...]": "exports (timm, hf, onnx, export), also of a smaller student; default:"
        " those beside the student's folder",
    },
)


def run(argv: Sequence[str]) -> int:
    """Print the table in Markdown; return the exit code."""
    call = VERB.read(argv)
    source, *folders = map(Path, call.arguments)
    from unic_ds.training import form_comparison

    print(form_comparison.compare(source, folders, threads=call.options.threads))
    return 0
