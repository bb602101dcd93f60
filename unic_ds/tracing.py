"""A training step on tensors without contents: its FLOPs, what it keeps, what it holds at most.

Every shape and type is the real step's, and so is every operator, but for kernels' own scratch
memory; nothing is computed, so a ViT-g fits into a laptop.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from unic_ds import balance, config
from unic_ds.ladder import heads_of
from unic_ds.loss import distill_loss
from unic_ds.ops import KERNELS
from unic_ds.student import Student, grid_of
from unic_ds.teachers import sources
from unic_ds.tokens import Target, Tokens


@dataclass(frozen=True)
class Trace:
    """One micro batch of `images`; FLOPs of all of it, bytes of one rank."""

    images: int
    flops: dict[str, float]  # teacher NAME, encoder forward, ladder forward, backward
    kept: dict[str, int]  # for backward: encoder, ladder and loss
    targets: int  # bytes of the teachers' tokens
    teachers_peak: int  # beyond weights and targets, while a teacher runs
    step_peak: int  # beyond weights, targets and gradients, while the student runs
    encoder: int  # parameters, by part
    ladder: int
    frozen: int  # parameters of the student that are not trained
    teachers: dict[str, tuple[int, int]]  # name -> (parameters, bytes)
    widths: dict[str, int]
    tokens: int  # patch tokens of an image


class Live(TorchDispatchMode):
    """Bytes of the tensors that operators make: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_iter(found):
            if isinstance(value, Tensor):
                self.meet(value.untyped_storage())
        return found

    def meet(self, storage: Any) -> None:
        """Count a storage until it is freed."""
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key: int, nbytes: int) -> None:
        """A storage is gone."""
        self.known.discard(key)
        self.now -= nbytes


def between(few: Trace, many: Trace, images: int) -> Trace:
    """The trace of another micro batch: FLOPs and bytes are affine in its images."""
    share = (images - few.images) / (many.images - few.images)

    def line(a: float, b: float) -> float:
        return a + share * (b - a)

    return replace(
        few,
        images=images,
        flops={name: line(a, many.flops[name]) for name, a in few.flops.items()},
        kept={name: round(line(a, many.kept[name])) for name, a in few.kept.items()},
        targets=round(line(few.targets, many.targets)),
        teachers_peak=round(line(few.teachers_peak, many.teachers_peak)),
        step_peak=round(line(few.step_peak, many.step_peak)),
    )


def flop_counter() -> FlopCounterMode:
    """torch's counter, told of the attention that a CPU runs."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    known = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=known)


def trace(cfg: config.Config, images: int, *, bf16: bool) -> Trace:
    """Trace a micro batch of a run; ValueError for teachers or a student that cannot be built."""
    grid, dtype = grid_of(cfg.student), torch.bfloat16 if bf16 else torch.float32
    mode, flops, teachers = FakeTensorMode(allow_non_fake_inputs=True), {}, {}
    targets: dict[str, Tokens] = {}
    held = peak = 0
    for row in cfg.teachers:
        with quiet():
            source = sources.outline(row, grid=grid)
        teacher = sources.Teacher(row, source, grid=grid, device=torch.device("meta"))
        with mode:
            teacher.to_empty(device="cpu")
            image = torch.empty(images, 3, teacher.size, teacher.size, dtype=torch.uint8)
            with flop_counter() as counter, Live() as live:
                targets[row.name] = teacher(image)
        flops[f"teacher {row.name}"] = float(counter.get_total_flops())
        weights = list(teacher.parameters())
        teachers[row.name] = (sum(p.numel() for p in weights), sum(p.nbytes for p in weights))
        said = sum(x.nbytes for x in targets[row.name])
        peak, held = max(peak, live.peak - said + held), held + said
    widths = {name: tokens.cls_BC.shape[-1] for name, tokens in targets.items()}
    with torch.device("meta"):
        student = Student(
            cfg.student,
            cfg.ladder,
            heads_of(cfg, widths),
            seed=cfg.seed,
            ops=KERNELS[cfg.kernels],
        ).to(dtype)
    with mode:
        student.to_empty(device="cpu")
        parts, kept, top = step(cfg, student, targets, images)
    own = list(student.parameters())
    trained = {p for p in own if p.requires_grad}
    return Trace(
        images=images,
        flops=flops | parts,
        kept=kept,
        targets=held,
        teachers_peak=peak - held,
        step_peak=top,
        encoder=sum(p.numel() for p in student.encoder.parameters() if p in trained),
        ladder=sum(p.numel() for p in student.ladder.parameters()),
        frozen=sum(p.numel() for p in own if p not in trained),
        teachers=teachers,
        widths=widths,
        tokens=grid * grid,
    )


def step(
    cfg: config.Config, student: Student, targets: dict[str, Tokens], images: int
) -> tuple[dict[str, float], dict[str, int], int]:
    """(FLOPs by part, bytes kept for backward by part, bytes held at most) of a student's step."""
    for parameter in student.parameters():  # where gradients go is another matter: ZeRO's
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_grad)
    side = cfg.student.size
    image = torch.empty(images, 3, side, side, dtype=torch.uint8)
    path_BK = torch.empty(images, len(student.paths))
    drop_TB = torch.empty(len(cfg.teachers), images)
    weights = {p.untyped_storage()._cdata for p in student.parameters()}
    weights |= {x.untyped_storage()._cdata for tokens in targets.values() for x in tokens}
    kept: Counter[str] = Counter()
    part, seen = "ladder and loss", set(weights)

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept[part] += storage.nbytes()
        return x

    totals = [0.0]
    with flop_counter() as counter, Live() as live:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            part = "encoder"
            hook = student.ladder.register_forward_pre_hook(lambda *_: mark())

            def mark() -> None:
                nonlocal part
                part = "ladder and loss"
                totals.append(float(counter.get_total_flops()))

            pred = student(image, path_BK)
            hook.remove()
            judged, _ = distill_loss(
                pred,
                {name: Target.of(tokens) for name, tokens in targets.items()},
                drop_TB,
                loss=cfg.loss,
                balance=balance.build(cfg),
                distances=cfg.distances,
                ops=KERNELS[cfg.kernels],
            )
        totals.append(float(counter.get_total_flops()))
        judged.backward()
        totals.append(float(counter.get_total_flops()))
    names = ("encoder forward", "ladder forward", "backward")
    flops = {n: b - a for n, a, b in zip(names, totals, totals[1:], strict=False)}
    return flops, dict(kept), live.peak


def drop_grad(parameter: nn.Parameter) -> None:
    """Free a gradient as soon as it is there."""
    parameter.grad = None


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip warns of a model without weights, which is what is wanted."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
