"""Work of the benchmark: per op and case the implementations, their check, their counts.

A check compares with the truth, the plain algebra in fp64: an implementation may be no further from
it than twice what eager torch is in the benchmark's type, + 1e-6. The truth is affordable on
a narrow case (an eighth of every width, 4 images; as many rungs, teachers and tokens). Of
ladder and loss together it looks at predictions and gradients: losses are too few numbers to bound
a distance, and gradients go through them.
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

from unic_kernels.distill_loss import Distilled
from unic_kernels.image_losses import Pair
from unic_kernels.ladder import cpu
from unic_kernels.ladder.arguments import BackwardArguments, ForwardArguments
from unic_kernels.ladder.launch import CONFIGS
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
    known: list[Tensor]  # held anyway, so not counted as kept for backward


def works(
    op: str, case: Case, images: int, dtype: torch.dtype, device: str, names: Sequence[str]
) -> Iterator[Work]:
    """Yield the implementations of an op on a case, all from the same values."""
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
    """Draw numbers in bf16, the same whatever type holds them."""
    return torch.randn_like(x, dtype=torch.bfloat16).to(x.dtype)


def inputs(batch: Batch) -> list[Tensor]:
    return [x for kind in KINDS for x in batch.x[kind]]


def step_work(way: Way, batch: Batch) -> Work:
    """Return the work of ladder and loss; forward returns both results."""
    leaves = [*inputs(batch), *way.leaves]

    def forward() -> tuple[list[Pair], Distilled]:
        pred = way.project(batch.x)
        return pred, way.lose(pred, batch)

    def backward(found: tuple[list[Pair], Distilled], again: bool = False) -> Any:
        return torch.autograd.grad(found[1].loss, leaves, retain_graph=again)

    return Work(way.name, forward, backward, [*batch.tensors(), *way.leaves])


def ladder_work(way: Way, batch: Batch) -> Work:
    """Return the work of the ladder; its gradients are 0 on dropped (teacher, image) pairs."""
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

    known = [*batch.tensors(), *way.leaves]
    return Work(way.name, lambda: way.project(batch.x), backward, known)


def loss_work(way: Way, pred: Any, batch: Batch, leaves: list[Tensor]) -> Work:
    """Return the work of the loss of given predictions."""

    def backward(found: Distilled, again: bool = False) -> Any:
        return torch.autograd.grad(found.loss, leaves, retain_graph=again)

    return Work(way.name, lambda: way.lose(pred, batch), backward, [*batch.tensors(), *leaves])


# The check


def faults(
    op: str, case: Case, dtype: torch.dtype, device: str, wanted: Sequence[str], perturb: float = 0
) -> list[str]:
    """Return the faults of implementations on the narrow case; none: they may be timed.

    `perturb` changes our results by this share, to show that the check finds it.
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
    """Return the results of forward, gradients of inputs, and of weights."""
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
    """Return the largest distance from the truth per group; groups cut otherwise are left out."""
    return [
        max(
            ((x.double() - t).abs().max().item() for x, t in zip(group, true, strict=True)),
            default=0.0,
        )
        for group, true in zip(groups, truth, strict=True)
        if len(group) == len(true)
    ]


# Counts


class Counts(NamedTuple):
    """Cost of a forward and a backward pass, on a GPU at the case's size."""

    launches: int
    gigabytes: float  # read and written forward
    forward_tflop: float
    backward_tflop: float
    kept_gigabytes: float
    syncs: int


def counts(op: str, case: Case, images: int, names: Sequence[str]) -> dict[str, Counts]:
    """Count every implementation by tracing it on the meta device at full size."""
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
    """Return the launches of ours: those of its launchers for each op that the trace saw."""
    teachers = len(case.out)
    inside = {
        "unic_kernels::ladder": case.rungs + teachers,
        "unic_kernels::image_losses": teachers + 1,
        "unic_kernels::drop_coefficients": 1,
        "unic_kernels::moments": 2,
    }
    return trace.count + sum(n * (inside[name] - 1) for name, n in trace.ours.items())


def moved(op: str, case: Case, images: int, name: str) -> int:
    """Return the bytes that ours reads and writes forward: each launch its tensors once."""
    rows, out = images * (1 + case.patches), sum(case.out)
    hidden = sum(map(sum, case.layout))
    loss = 2 * rows * out * 2 + rows * len(case.out) * 3 * 4
    if op == "moments":
        return images * case.patches * case.out[0] * 2
    if op == "distill_loss":
        return loss
    weights = 2 * 2 * hidden * case.width + 2 * 2 * sum(
        c * k for c, k in zip(case.out, case.hidden_T, strict=True)
    )
    writes = 2 if name in ("ours/none", "ours/hidden") else 1  # z and h, or h
    ladder = 2 * rows * (case.rungs * case.width + hidden * (writes + 1) + out) + weights
    return ladder + (loss if op == "step" else 0)


def cost(case: Case, recompute: str) -> list[int]:
    """Return multiplications and additions backward for one token of each teacher."""
    again = recompute == "all"
    return [
        2 * hidden * (2 * width + (2 + again) * case.width)
        for width, hidden in zip(case.out, case.hidden_T, strict=True)
    ]


def backward_flops(op: str, case: Case, images: int, name: str) -> float:
    """Return multiplications and additions of ours backward, for the average of kept pairs."""
    if op not in ("step", "ladder"):
        return 0.0
    return case.kept * images * (1 + case.patches) * sum(cost(case, name.partition("/")[2]))


class Share(NamedTuple):
    """Backward FLOPs of the ladder over the dense ones: as computed, and of kept pairs alone."""

    path: str
    done: float
    least: float


def shares(case: Case) -> list[Share]:
    """Return the ladder's shares on a CPU, by recomputation, and in tiles of a GPU."""
    found = [on_cpu(case.small(), way.partition("/")[2]) for way in OURS]
    keep_TB = batch_of(case.small(), case.images, torch.bfloat16, "cpu").keep_TB
    path = f"tiles of a GPU at {case.images} images"
    return [*found, Share(path, tiled(case, keep_TB), least(case, keep_TB, "none"))]


def least(case: Case, keep_TB: Tensor, recompute: str) -> float:
    """Return the share of kept pairs, weighted by cost: q if all teachers have one width."""
    cost_T = torch.tensor(cost(case, recompute), dtype=torch.float64)
    return float((keep_TB.double().mean(1) * cost_T).sum() / cost_T.sum())


def on_cpu(case: Case, recompute: str) -> Share:
    """Count by torch's FLOP counter, running 8 images."""
    batch = batch_of(case, 8, torch.bfloat16, "cpu")
    groups = (batch.x["patch"], *weights_of(case, torch.bfloat16, "cpu")["patch"])
    x, w1, b1, w2, b2 = ([tensor.detach() for tensor in group] for group in groups)
    widths = [width for rung in case.layout for width in rung]
    _, z, h = cpu.forward(ForwardArguments(x, w1, b1, w2, b2, widths, recompute))

    def flops(keep_TB: Tensor) -> int:
        shape = (8, case.patches)
        dy = [
            torch.ones(*shape, c, dtype=torch.bfloat16) * keep_B.bfloat16()[:, None, None]
            for c, keep_B in zip(case.out, keep_TB, strict=True)
        ]
        with FlopCounterMode(display=False) as counter:
            cpu.backward(BackwardArguments(dy, x, w1, b1, w2, z, h, widths, recompute, True))
        return counter.get_total_flops()

    share = flops(batch.keep_TB) / flops(torch.ones_like(batch.keep_TB))
    return Share(f"CPU path, {recompute}", share, least(case, batch.keep_TB, recompute))


_CONFIGS = CONFIGS[90]
ROWS, FEW_ROWS, DEPTH = _CONFIGS.half.block_m, _CONFIGS.few_rows.block_m, _CONFIGS.half.block_k
"""Rows of a tile; of one of dx if images are no multiple of it; rows that a weight's gradient adds
in one step."""


def tiled(case: Case, keep_TB: Tensor) -> float:
    """Return the backward FLOPs of whole tiles over the dense ones without tiles.

    dz and the weights' gradients go over packed rows of kept images; dx adds up the teachers that
    keep any image of a tile of plain rows.
    """
    tokens, images = case.patches, keep_TB.shape[1]
    rows = images * tokens
    height = ROWS if tokens % ROWS == 0 else FEW_ROWS
    first_image = torch.arange(0, rows, height) // tokens
    last_image = (torch.arange(0, rows, height) + height - 1).clamp(max=rows - 1) // tokens
    done = dense = 0.0
    for width, hidden, keep_B in zip(case.out, case.hidden_T, keep_TB, strict=True):
        packed = int(keep_B.sum()) * tokens
        high, deep = (-(-packed // step) * step for step in (ROWS, DEPTH))
        plain = int((keep_B[first_image] | keep_B[last_image]).sum()) * height
        done += hidden * ((high + deep) * width + (deep + plain) * case.width)
        dense += hidden * rows * 2 * (width + case.width)
    return done / dense


def compiled_launches(case: Case) -> int:
    """Count kernels and GEMM calls in inductor's code of plain, forward; takes minutes."""
    from torch._inductor.utils import run_and_get_code

    work = next(iter(works("step", case.small(), 2, torch.bfloat16, "cpu", ["plain"])))
    with torch.no_grad():
        _, code = run_and_get_code(torch.compile(lambda: work.forward()[1].loss))
    call = r"^\s+(?:[\w, ]+ = )?(?:extern_kernels\.\w+|cpp_fused\w*|torch\.ops\.[\w.]+)\("
    return sum(len(re.findall(call, part, re.MULTILINE)) for part in code)
