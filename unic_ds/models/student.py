"""The student: a timm ViT whose blocks feed a ladder of projectors; only the ViT is exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unic_ds import config
from unic_ds.blocks import compile_each
from unic_ds.config.block_choice import ActivationCheckpointing
from unic_ds.models.drop_path import give_drop_paths
from unic_ds.models.encoder import (
    attention_heads,
    build_encoder,
    features,
    freeze_after_blocks,
    has_cls,
    residuals,
)
from unic_ds.models.initial_weights import initialise
from unic_ds.models.ladder import Head, Ladder
from unic_ds.tokens import Normalise, Shared, Tokens
from unic_kernels.ops import FUSED, Ops

Gathered = Callable[[nn.Parameter], AbstractContextManager[bool]]
"""Context manager that gathers a ZeRO-3 parameter; True on the rank whose writes are kept."""


class Student(nn.Module):
    """Encoder and ladder: uint8 images in, a prediction per teacher out."""

    def __init__(
        self,
        cfg: config.Student,
        ladder: config.Ladder,
        heads: Mapping[str, Head],
        *,
        seed: int,
        ops: Ops = FUSED,
        gathered: Gathered = lambda _: nullcontext(True),
        compiled: bool = False,
        any_size: bool = False,
    ):
        """`heads` is keyed by teacher; weights are a function of (seed, published name).

        `gathered` makes a parameter writable that is partitioned; `compiled`: blocks run through
        torch.compile. `any_size`: images may have other sides than `cfg.size`.
        """
        super().__init__()
        self.encoder = build_encoder(cfg, any_size=any_size)
        self.normalise = Normalise(cfg.mean, cfg.std)
        self.ladder = ladder_on(self.encoder, ladder, heads, ops)
        self.paths = give_drop_paths(self.encoder)
        for parameter, regions in self.views_by_name():
            with gathered(parameter) as writes:
                if writes:
                    initialise({name: parameter[at] for name, at in regions.items()}, seed)
        freeze_after_blocks(self.encoder)
        if compiled:
            compile_each(self.encoder.blocks)
        self.recomputed = recompute(self.encoder.blocks, cfg.activation_checkpointing)
        self.keeps_shared = False  # set for balancers that compare the teachers' gradients
        self._shared: Shared | None = None

    def views_by_name(self) -> Iterator[tuple[nn.Parameter, dict[str, tuple[slice, ...]]]]:
        """Every parameter with the region of each published weight in it, by name."""
        for name, parameter in self.encoder.named_parameters():
            yield parameter, {f"encoder.{name}": ()}
        for name, regions in self.ladder.regions().items():
            at = {f"ladder.{published}": region for published, region in regions.items()}
            yield self.ladder.get_parameter(name), at

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by its published name; the ladder's are views."""
        return {name: p[at] for p, regions in self.views_by_name() for name, at in regions.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.encoder.patch_embed.proj.weight.dtype

    def forward(self, image_B3HW: Tensor, path_BK: Tensor | None = None) -> dict[str, Tokens]:
        """Predictions per teacher.

        `path_BK` is drop-path's noise in [0, 1) per image and residual branch; None: no drop path.
        """
        if path_BK is not None:
            for path, uniform_B in zip(self.paths, path_BK.unbind(1), strict=True):
                path.scale_B = (uniform_B >= path.rate).float() / (1 - path.rate)
        image_B3HW = self.normalise(image_B3HW, self.dtype)
        states = residuals(self.encoder, image_B3HW, self.ladder.blocks)
        pred = self.ladder(states)
        if not self.keeps_shared:
            return pred
        # Without a CLS token the mean of the patches takes its place: its gradient is theirs.
        self._shared = Shared(tuple(states[-1])[not has_cls(self.encoder) :], pred)
        return {name: tokens.copies() for name, tokens in pred.items()}

    def take_shared(self) -> Shared | None:
        """The last block's tokens in the last forward, and their predictions; None if not kept.

        They are the caller's from then on, so that they are freed with the loss.
        """
        shared, self._shared = self._shared, None
        return shared

    @torch.no_grad()
    def encode(self, image_B3HW: Tensor) -> Tokens:
        """Exported features: tokens after the final norm."""
        return features(self.encoder, self.normalise(image_B3HW, self.dtype))


def ladder_on(
    encoder: VisionTransformer, cfg: config.Ladder, heads: Mapping[str, Head], ops: Ops = FUSED
) -> Ladder:
    """The ladder of an encoder."""
    return Ladder(
        encoder.embed_dim,
        len(encoder.blocks),
        heads,
        cfg,
        attention_heads=attention_heads(encoder),
        ops=ops,
    )


def recompute(blocks: nn.Sequential, which: str) -> list[nn.Module]:
    """Recompute `which` blocks (none, full, every:K) in backward, and return them.

    Their random decisions are given (`DropPath`), so no generator's state need be kept.
    """
    chosen = [blocks[i] for i in ActivationCheckpointing.parse(which).blocks(len(blocks))]
    for block in chosen:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False
        )
    return chosen
