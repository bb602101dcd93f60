"""What the benchmark runs: per op and case the implementations, their check, their counts.

A check compares with the truth, the plain algebra in fp64: an implementation may be no further from
it than twice what eager torch is in the benchmark's own type, + 1e-6. The truth is affordable on
the case in narrow (an eighth of every width, 4 images; as many rungs, teachers and tokens). Of
ladder and loss together it looks at predictions and gradients: how far the losses, few numbers, are
from theirs is luck, and gradients go through them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from bench_cases import KINDS, OURS, Batch, Case, Way, Weights, batch_of, ways, weights_of
from counted import Launches, kept_bytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from unic_kernels import ladder_torch
from unic_kernels.distill_loss import Distilled
from unic_kernels.image_losses import Pair
from unic_kernels.ladder_layout import Layout
from unic_kernels.moments import moments, moments_ref

BOTH_WAYS = ("plain", "reference", "concatenated", *OURS)
NAMES = {
    "step": BOTH_WAYS,
    "ladder": BOTH_WAYS,
    "distill_loss": ("plain", "ours"),
    "moments": ("plain", "ours"),
}
"""Implementations of an op; `step` is ladder and loss together."""


class Work(NamedTuple):
    """Something to run: forward gives tensors, backward leads from them to the leaves."""

    name: str
    forward: Callable[[], Any]
    backward: Callable[..., Any] | None
    known: list[Tensor]  # what is not kept for backward, but held anyway


def works(
    op: str, case: Case, images: int, dtype: torch.dtype, device: str, names: Sequence[str]
) -> Iterator[Work]:
    """The implementations of an op on a case, all from the same values."""
    batch = batch_of(case, images, dtype, device)
    if op == "moments":
        x_BNC = batch.target[0][1]
        made = {"plain": moments_ref, "ours": moments}
        yield from (Work(name, partial(made[name], x_BNC), None, [x_BNC]) for name in names)
        return
    if op == "distill_loss":
        torch.manual_seed(2)
        pred = [tuple(drawn_like(x).requires_grad_() for x in pair) for pair in batch.target]
        leaves = [x for pair in pred for x in pair]
        nothing = {kind: Weights([], [], [], []) for kind in KINDS}
        for way in ways(replace(case, rungs=0), nothing, names):
            yield loss_work(way, pred, batch, leaves)
        return
    for way in ways(case, weights_of(case, dtype, device), names):
        yield step_work(way, batch) if op == "step" else ladder_work(way, batch)


def drawn_like(x: Tensor) -> Tensor:
    """Random numbers of type bf16, the same whatever type holds them."""
    return torch.randn_like(x, dtype=torch.bfloat16).to(x.dtype)


def inputs(batch: Batch) -> list[Tensor]:
    return [x for kind in KINDS for x in batch.x[kind]]


def step_work(way: Way, batch: Batch) -> Work:
    """Ladder and loss; forward gives both results."""
    leaves = [*inputs(batch), *way.leaves]

    def forward() -> tuple[list[Pair], Distilled]:
        pred = way.project(batch.x)
        return pred, way.lose(pred, batch)

    def backward(found: tuple[list[Pair], Distilled], again: bool = False) -> Any:
        return torch.autograd.grad(found[1].loss, leaves, retain_graph=again)

    return Work(way.name, forward, backward, [*batch.given(), *way.leaves])


def ladder_work(way: Way, batch: Batch) -> Work:
    """The ladder, led back from gradients that are 0 on dropped (teacher, image) pairs."""
    leaves = [*inputs(batch), *way.leaves]
    shared: dict[torch.dtype, list[Tensor]] = {}

    def backward(pred: list[Pair], again: bool = False) -> Any:
        y = [y for pair in pred for y in pair]
        if y[0].dtype not in shared:
            keep_T = [keep_B for keep_B in batch.keep_TB for _ in KINDS]
            torch.manual_seed(2)
            shared[y[0].dtype] = [
                drawn_like(y) * keep_B.to(y.dtype).view(-1, *[1] * (y.dim() - 1))
                for y, keep_B in zip(y, keep_T, strict=True)
            ]
        return torch.autograd.grad(y, leaves, shared[y[0].dtype], retain_graph=again)

    known = [*batch.given(), *way.leaves]
    return Work(way.name, lambda: way.project(batch.x), backward, known)


def loss_work(way: Way, pred: Any, batch: Batch, leaves: list[Tensor]) -> Work:
    """The loss of given predictions."""

    def backward(found: Distilled, again: bool = False) -> Any:
        return torch.autograd.grad(found.loss, leaves, retain_graph=again)

    return Work(way.name, lambda: way.lose(pred, batch), backward, [*batch.given(), *leaves])


# The check


def faults(
    op: str, case: Case, dtype: torch.dtype, device: str, wanted: Sequence[str], perturb: float = 0
) -> list[str]:
    """How implementations are wrong on the case in narrow; none: they may be timed.

    `perturb` scales what ours gives, to see that the check would notice.
    """
    base = "reference" if op in ("step", "ladder") else "plain"
    names = dict.fromkeys((base, *wanted))
    narrow = case.small()

    def run(dtype: torch.dtype, names: Sequence[str]) -> dict[str, list[list[Tensor]]]:
        made = works(op, narrow, narrow.images, dtype, device, names)
        return {work.name: results(work, case.rungs * len(KINDS)) for work in made}

    truth = run(torch.float64, [base])[base]
    found = run(dtype, list(names))
    allowed = [2 * error + 1e-6 for error in errors(found[base], truth)]
    wrong = []
    for name, groups in found.items():
        if name.startswith("ours"):
            groups = [[x * (1 + perturb) for x in group] for group in groups]
        for i, (error, most) in enumerate(zip(errors(groups, truth), allowed, strict=False)):
            if not error <= most:
                what = ("results", "gradients of inputs", "gradients of weights")[i]
                wrong.append(f"{op} {case.name} {name}: {what} off by {error:.3g} > {most:.3g}")
    return wrong


def results(work: Work, inputs: int) -> list[list[Tensor]]:
    """What forward gives, gradients of inputs, and of weights."""
    given = work.forward()
    grads = list(work.backward(given)) if work.backward else []
    if work.backward is None:
        flat = [given]
    elif isinstance(given, Distilled):
        flat = [given.loss_TB]
    else:
        pred = given[0] if isinstance(given, tuple) else given
        flat = [y for pair in pred for y in pair]
    return [[y.detach() for y in flat], grads[:inputs], grads[inputs:]]


def errors(groups: list[list[Tensor]], truth: list[list[Tensor]]) -> list[float]:
    """Largest distance from the truth per group; plain's weights are cut otherwise: left out."""
    return [
        max(
            ((x.double() - t).abs().max().item() for x, t in zip(own, right, strict=True)),
            default=0.0,
        )
        for own, right in zip(groups, truth, strict=True)
        if len(own) == len(right)
    ]


# Counts


class Counts(NamedTuple):
    """What a forward pass and the whole cost, on a GPU at the case's own size."""

    launches: int
    gigabytes: float  # read and written forward
    forward_tflop: float
    backward_tflop: float
    kept_gigabytes: float
    syncs: int


def counts(op: str, case: Case, images: int, names: Sequence[str]) -> dict[str, Counts]:
    """Counts of every implementation, by tracing it on the meta device at full size."""
    found = {}
    for work in works(op, case, images, torch.bfloat16, "meta", names):
        with Launches() as trace, torch.no_grad():
            work.forward()
        with FlopCounterMode(display=False) as forward:
            given = work.forward()
        backward = FlopCounterMode(display=False)
        if work.backward:
            with backward:
                work.backward(given)
        kept = kept_bytes(work.forward, work.known) if work.backward else 0
        launches, nbytes = trace.count, trace.bytes
        back = backward.get_total_flops()
        if work.name.startswith("ours"):
            launches, nbytes = launched(case, trace), moved(op, case, images, work.name)
            back = round(backward_flops(op, case, images, work.name))
        found[work.name] = Counts(
            launches,
            nbytes / 1e9,
            forward.get_total_flops() / 1e12,
            back / 1e12,
            kept / 1e9,
            trace.syncs,
        )
    return found


def launched(case: Case, trace: Launches) -> int:
    """Launches of ours: what the launchers' loops say in place of each op that the trace saw."""
    teachers = len(case.out)
    inside = {
        "unic_kernels::ladder": case.rungs + teachers,
        "unic_kernels::image_losses": teachers + 1,
        "unic_kernels::drop_coefficients": 1,
        "unic_kernels::moments": 2,
    }
    return trace.count + sum(n * (inside[name] - 1) for name, n in trace.ours.items())


def moved(op: str, case: Case, images: int, name: str) -> int:
    """Bytes that ours reads and writes forward: each launch its tensors once."""
    rows, out = images * (1 + case.patches), sum(case.out)
    hidden = sum(map(sum, case.layout))
    loss = 2 * rows * out * 2 + rows * len(case.out) * 3 * 4
    if op == "moments":
        return images * case.patches * case.out[0] * 2
    if op == "distill_loss":
        return loss
    weights = 2 * 2 * hidden * case.width + 2 * 2 * sum(
        c * sum(own) for c, own in zip(case.out, zip(*case.layout, strict=True), strict=True)
    )
    writes = 2 if name in ("ours/none", "ours/hidden") else 1  # z and h, or h
    ladder = 2 * rows * (case.rungs * case.width + hidden * (writes + 1) + out) + weights
    return ladder + (loss if op == "step" else 0)


def cost(case: Case, recompute: str) -> list[int]:
    """Multiplications and additions backward for one token of each teacher."""
    again = recompute == "all"
    return [
        2 * sum(own) * (2 * width + (2 + again) * case.width)
        for width, own in zip(case.out, zip(*case.layout, strict=True), strict=True)
    ]


def backward_flops(op: str, case: Case, images: int, name: str) -> float:
    """Multiplications and additions of ours backward, for as many kept pairs as on average."""
    if op not in ("step", "ladder"):
        return 0.0
    return case.kept * images * (1 + case.patches) * sum(cost(case, name.partition("/")[2]))


class Share(NamedTuple):
    """Backward FLOPs of the ladder over the dense ones: as done, and of kept pairs alone."""

    path: str
    done: float
    least: float


def shares(case: Case) -> list[Share]:
    """The ladder's shares on a CPU, by what is recomputed, and in tiles of a GPU."""
    found = [on_cpu(case.small(), way.partition("/")[2]) for way in OURS]
    keep_TB = batch_of(case.small(), case.images, torch.bfloat16, "cpu").keep_TB
    where = f"tiles of a GPU at {case.images} images"
    return [*found, Share(where, tiled(case, keep_TB), least(case, keep_TB, "none"))]


def least(case: Case, keep_TB: Tensor, recompute: str) -> float:
    """q, where teachers are of one width."""
    cost_T = torch.tensor(cost(case, recompute), dtype=torch.float64)
    return float((keep_TB.double().mean(1) * cost_T).sum() / cost_T.sum())


def on_cpu(case: Case, recompute: str) -> Share:
    """Counted by torch from what runs, with 8 images."""
    batch = batch_of(case, 8, torch.bfloat16, "cpu")
    own = weights_of(case, torch.bfloat16, "cpu")["patch"]
    layout = Layout(case.layout)
    x = [x_BND.detach() for x_BND in batch.x["patch"]]
    weights = [[w.detach() for w in group] for group in own]
    _, z, h = ladder_torch.forward(x, *weights, layout, recompute)

    def flops(keep_TB: Tensor) -> int:
        shape = (8, case.patches)
        dy = [
            torch.ones(*shape, c, dtype=torch.bfloat16) * keep_B.bfloat16()[:, None, None]
            for c, keep_B in zip(case.out, keep_TB, strict=True)
        ]
        with FlopCounterMode(display=False) as counter:
            ladder_torch.backward(dy, x, *weights[:3], z, h, layout, recompute, need_x=True)
        return counter.get_total_flops()

    share = flops(batch.keep_TB) / flops(torch.ones_like(batch.keep_TB))
    return Share(f"CPU path, {recompute}", share, least(case, batch.keep_TB, recompute))


ROWS, NARROW, DEPTH = 128, 64, 64
"""Rows of a tile, the same where images are no multiple of it, rows that a weight's gradient adds
in one step: as the table of configs in `ladder_kernels` has them for 16-bit types."""


def tiled(case: Case, keep_TB: Tensor) -> float:
    """Backward FLOPs of whole tiles over the dense ones without tiles.

    dz and the weights' gradients go over packed rows of kept images; dx adds up the teachers that
    keep any image of a tile of plain rows.
    """
    tokens, images = case.patches, keep_TB.shape[1]
    rows = images * tokens
    height = ROWS if tokens % ROWS == 0 else NARROW
    first_image = torch.arange(0, rows, height) // tokens
    last_image = (torch.arange(0, rows, height) + height - 1).clamp(max=rows - 1) // tokens
    done = dense = 0.0
    for width, own, keep_B in zip(case.out, zip(*case.layout, strict=True), keep_TB, strict=True):
        packed = int(keep_B.sum()) * tokens
        high, deep = (-(-packed // step) * step for step in (ROWS, DEPTH))
        plain = int((keep_B[first_image] | keep_B[last_image]).sum()) * height
        done += sum(own) * ((high + deep) * width + (deep + plain) * case.width)
        dense += sum(own) * rows * 2 * (width + case.width)
    return done / dense


def compiled_launches(case: Case) -> int:
    """Kernels and GEMM calls in what inductor writes for plain, forward; minutes for many rungs."""
    from torch._inductor.utils import run_and_get_code

    work = next(iter(works("step", case.small(), 2, torch.bfloat16, "cpu", ["plain"])))
    with torch.no_grad():
        _, code = run_and_get_code(torch.compile(lambda: work.forward()[1].loss))
    call = r"^\s+(?:[\w, ]+ = )?(?:extern_kernels\.\w+|cpp_fused\w*|torch\.ops\.[\w.]+)\("
    return sum(len(re.findall(call, part, re.MULTILINE)) for part in code)
