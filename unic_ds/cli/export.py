"""`unic-ds export`: hands a student over, in a format that another tool loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unic_ds.config.option import option
from unic_ds.config.verb import Verb

NEEDS = "export needs RUN (a run folder or a model folder), and may have --out DIR (a new folder)"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the verb."""

    run: str = option("", "the same as RUN")
    to: Literal["timm", "hf", "onnx", "export", "openclip"] = option(
        "timm", "format; docs/export.md has them"
    )
    out: str = option(
        "",
        "new folder; default: RUN/encoders/CHECKPOINT, and for other formats than timm beside the"
        " student's folder, with the format at the end of its name",
    )
    quantize: Literal["", "int8", "bf16"] = option(
        "",
        "int8: weights of eight bits (onnx, export); bf16: weights and computation (export); the"
        " change of its features is printed",
    )
    prune: float = option(
        0.0,
        "share of the attention heads and MLP channels of each block to remove, the least"
        " important on training images of the run first, in (0, 0.9]; 0: none",
    )
    keep_projectors: tuple[str, ...] = option(
        (),
        "teachers whose predicted features are outputs too, as TEACHER[,TEACHER] (onnx, export);"
        " the one whose text tower is meant (openclip)",
    )
    size: int = option(
        0, "image size in pixels that position embeddings are resampled to; 0: the student's"
    )


VERB = Verb(
    name="export",
    summary="write a student for timm, transformers, onnxruntime, torch.export or open_clip",
    options=Options,
    arguments={
        "[RUN]": "run folder (its newest checkpoint for timm, else its student/ if it is finished),"
        " or a student/ or imported folder"
    },
    usage="unic-ds export RUN [--to FORMAT] [--out DIR] [--option value ...]",
)


def run(argv: Sequence[str]) -> int:
    """Export a student, print its folder's path; return the exit code."""
    call = VERB.read(argv)
    options = call.options
    given = [*call.arguments, *filter(None, [options.run])]
    if not given or ("out" in call.given and not options.out):
        raise ValueError(NEEDS)
    if len(given) > 1:
        raise ValueError(f"export takes one RUN, got {given[0]!r} and --run {given[1]!r}")
    from unic_ds.training.hand_over import Request, hand_over

    request = Request(
        source=Path(given[0]),
        to=options.to,
        out=options.out,
        quantize=options.quantize,
        prune=options.prune,
        keep=options.keep_projectors,
        size=options.size,
    )
    print(hand_over(request))
    return 0
