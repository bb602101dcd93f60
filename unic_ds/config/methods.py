"""Published methods as functions from a Config to a Config: ladder, loss, balance, standardisation.

`--recipe BASE+METHOD` keeps the base's teachers, student, data and optimiser. docs/methods.md says
in what each differs from its paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from unic_ds.config import Balance, Config, Drop, Ladder, Loss, Standardise

FIT_STEPS = 100
"""Batches on which fixed statistics are fitted: 51,200 images at batch 512."""


def unic(cfg: Config) -> Config:
    """Ladder on all blocks, running standardisation, teacher dropping.

    Sariyildiz et al., "UNIC: Universal Classification Models via Multi-teacher Distillation", ECCV
    2024, arXiv 2408.05088. p is 0.5 for more than two teachers, else 0.25.
    """
    return replace(
        cfg,
        ladder=Ladder(),
        loss=Loss(),
        balance=Balance(),
        drop=Drop(rate=0.5 if len(cfg.teachers) > 2 else 0.25),
        standardise=Standardise(),
    )


def standard(cfg: Config) -> Config:
    """Several teachers, projectors on the last block, all teachers equal, raw features.

    The "basic" row of the UNIC paper's component table (arXiv 2408.05088).
    """
    return replace(standard_norm(cfg), standardise=Standardise(on=False))


def standard_norm(cfg: Config) -> Config:
    """`standard` with standardised features (the next row of the same table)."""
    return replace(
        cfg,
        ladder=Ladder(rungs="last"),
        loss=Loss(),
        balance=Balance(kind="none"),
        standardise=Standardise(),
    )


def fitnet(cfg: Config) -> Config:
    """The last teacher only: its output from the last block, a hint from the middle block.

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550. The hint is the
    patch tokens of the teacher's middle block, regressed by mean squared error from the student's.
    """
    if not cfg.teachers:
        return standard_norm(cfg)
    teacher = cfg.teachers[-1]
    hint = replace(
        teacher,
        name=f"{teacher.name}_hint",
        block="middle",
        rungs="middle",
        cls_loss="none",
        patch_loss="1 mse",
    )
    return replace(standard_norm(cfg), teachers=(teacher, hint))


def crd(cfg: Config) -> Config:
    """CLS tokens by InfoNCE at temperature 0.07, negatives from all ranks; teachers are summed.

    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699.
    """
    return replace(standard(cfg), loss=Loss(cls="1 contrastive", patch="none", temperature=0.07))


def theia(cfg: Config) -> Config:
    """Patch tokens only, fixed per-channel statistics, 0.9 cosine + 0.1 smooth-L1, equal weights.

    Shang et al., "Theia: Distilling Diverse Vision Foundation Models for Robot Learning", CoRL
    2024, arXiv 2407.20179.
    """
    return replace(
        standard_norm(cfg),
        loss=Loss(cls="none", patch="0.9 cosine + 0.1 smooth_l1"),
        standardise=Standardise(fit_steps=FIT_STEPS),
    )


def radio(cfg: Config) -> Config:
    """CLS by cosine, patches by 0.9 cosine + 0.1 smooth-L1, PHI-S standardisation.

    Ranzinger et al., "AM-RADIO", CVPR 2024, arXiv 2312.06709; "PHI-S", arXiv 2410.01680.
    """
    return replace(
        standard_norm(cfg),
        loss=Loss(cls="1 cosine", patch="0.9 cosine + 0.1 smooth_l1"),
        standardise=Standardise(kind="phi_s", fit_steps=FIT_STEPS),
    )


def dune(cfg: Config) -> Config:
    """A transformer block and a Linear per teacher on the last block's tokens, no ladder.

    Sariyildiz et al., "DUNE: Distilling a Universal Encoder from Heterogeneous 2D and 3D Teachers",
    CVPR 2025, arXiv 2503.14405. `--balance.kind dropping` adds teacher dropping.
    """
    return replace(standard_norm(cfg), ladder=Ladder(rungs="last", projector="transformer"))


METHODS: dict[str, Callable[[Config], Config]] = {
    method.__name__: method
    for method in (unic, standard, standard_norm, fitnet, crd, theia, radio, dune)
}
"""Registry: name -> function from a Config to a Config. A plugin adds its own."""
