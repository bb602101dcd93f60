"""Adapters of foreign models: normalised images in, `Tokens` of the model's own grid out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import torch
from timm.layers import AttentionPool2d, RotAttentionPool2d
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from unic_ds.tokens import KINDS, Tokens, from_map, split_prefix

if TYPE_CHECKING:
    from open_clip.modified_resnet import AttentionPool2d as ClipPool
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer as ClipTransformer

TOKEN, MEAN = "token", "mean of patches"
POOL, NORMED_MEAN = "attention pool", "mean of patches, normed"
"""Kinds of a tower's summary, the token that takes the place of CLS."""


class NotTokens(ValueError):
    """A module's output that is not a pair of tokens; the text follows the teacher's name."""


class Tower(nn.Module):
    """Base class of the adapters: the kind of summary, and the blocks that hold the weights."""

    summary = MEAN

    def blocks(self) -> list[nn.Module]:
        """The modules that repeat, in order: most of the weights, used one after another.

        These are the entries of lists that hold no such list themselves; those of CNNs are small.
        """
        return list(repeated(self))


def repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost entries of a module's lists of blocks."""
    for name, part in module.named_children():
        listed = isinstance(part, (nn.Sequential, nn.ModuleList)) and name in LISTS
        for inner in part.children() if listed else (part,):
            below = list(repeated(inner))
            yield from below or ([inner] if listed else [])


LISTS = ("blocks", "resblocks", "stages", "layers", "layer")
"""Names that timm, open_clip and most others give to the lists of a tower's blocks."""


class TeacherModel(NamedTuple):
    """A teacher's tower and preprocessing, as its source gives them."""

    tower: Tower  # normalised images -> Tokens
    size: int  # side of the images in pixels
    patch: int  # pixels a patch token covers; 0: unknown
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str = ""


class TimmViT(Tower):
    """A timm ViT: its output tokens, or those after `block` without the final norm.

    The output's summary is the attention pool's, if there is one (SigLIP, PE): the embedding that
    is compared with text, before a projection. Tokens after a block have no such pool, nor without
    `pooled`: their summary is the CLS token or the mean of the patches.

    Unnormed, because the final norm is fitted to the last block and the targets are standardised
    anyway; on the demonstration's ViT the two differ by less than 0.01 in kNN, within the noise.
    """

    def __init__(self, model: VisionTransformer, block: int, *, pooled: bool = True):
        super().__init__()
        self.has_cls = model.num_prefix_tokens > 0 and cls_token_of(model) is not None
        self.pools = pooled and block < 0 and getattr(model, "attn_pool", None) is not None
        self.summary = POOL if self.pools else TOKEN if self.has_cls else MEAN
        self.block = block
        if block >= 0:
            model.prune_intermediate_layers([block], prune_norm=True, prune_head=True)
        self.model = model

    def forward(self, image_B3HW: Tensor) -> Tokens:
        prefix = self.model.num_prefix_tokens
        if self.block < 0:
            tokens_BNC = self.model.forward_features(image_B3HW)
            if self.pools:
                cls_BC = self.model.forward_head(tokens_BNC, pre_logits=True)
                return Tokens(cls_BC, tokens_BNC[:, prefix:])
            return split_prefix(tokens_BNC, prefix, has_cls=self.has_cls)
        states = self.model.forward_intermediates(
            image_B3HW,
            indices=[self.block],
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        (state,) = cast(list[Tensor | tuple[Tensor, Tensor]], states)
        tokens_BNC = state if isinstance(state, Tensor) else torch.cat([state[1], state[0]], 1)
        return split_prefix(tokens_BNC, prefix, has_cls=self.has_cls)


def cls_token_of(model: nn.Module) -> Tensor | None:
    """The CLS token of a timm ViT, which NaFlexViT keeps in its embedding; None without one."""
    return getattr(getattr(model, "embeds", model), "cls_token", None)


class MapModel(Protocol):
    """A timm model whose features are a map."""

    def forward_features(self, x: Tensor) -> Tensor: ...

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor: ...

    def forward_intermediates(
        self, x: Tensor, *, indices: list[int], output_fmt: str, intermediates_only: bool
    ) -> list[Tensor]: ...


class TimmMap(Tower):
    """A timm model whose features are a map (CNNs, Swin): the last, or that of stage `block`.

    The last one's summary is the attention pool's, if there is one (CLIP's ResNets).
    """

    def __init__(self, model: MapModel, block: int):
        super().__init__()
        self.block = block
        self.channels_last = getattr(model, "output_fmt", None) == "NHWC"
        head = getattr(model, "head", None)
        self.pools = block < 0 and isinstance(head, (AttentionPool2d, RotAttentionPool2d))
        self.summary = POOL if self.pools else MEAN
        self.model = model

    def forward(self, image_B3HW: Tensor) -> Tokens:
        if self.block >= 0:
            (map_BCHW,) = self.model.forward_intermediates(
                image_B3HW, indices=[self.block], output_fmt="NCHW", intermediates_only=True
            )
            return from_map(map_BCHW)
        features = self.model.forward_features(image_B3HW)
        shape = tuple(features.shape) if isinstance(features, Tensor) else ()
        sides = shape[1:3] if self.channels_last else shape[2:4]
        if len(shape) != 4 or sides[0] != sides[1]:
            raise NotTokens(
                f"is a {type(self.model).__name__}, whose features are"
                f" {shape or type(features).__name__}: neither ViT tokens nor a square map"
            )
        tokens = from_map(features.permute(0, 3, 1, 2) if self.channels_last else features)
        if not self.pools:
            return tokens
        return tokens._replace(cls_BC=self.model.forward_head(features, pre_logits=True))


class ClipViT(Tower):
    """open_clip's own ViT: tokens after `ln_post` and before the projection to the text space.

    The summary is what that projection reads: the CLS token, the mean of the patches (CLIPA) or an
    attention pool's (CoCa). Such a pool may be narrower than the patches, whose width its summary
    is padded to with zeros: a tower has one width. It norms the patches as they enter it, which is
    done here too. After `block` the summary is the CLS token.
    """

    def __init__(self, visual: ClipTransformer, block: int):
        super().__init__()
        self.summary = TOKEN
        if block < 0 and visual.attn_pool is not None:
            self.summary = POOL
        elif block < 0 and visual.pool_type == "avg":
            self.summary = NORMED_MEAN
        self.block, self.width = block, visual.transformer.width
        if self.summary == POOL and visual.output_dim > self.width:
            raise ValueError(
                f"the attention pool of this open_clip tower is {visual.output_dim} wide, its"
                f" patches {self.width}: a summary may not be wider than the patches"
            )
        # MultiheadAttention's own shortcut writes out its attention matrix on a CPU, and FLOP
        # counters do not count it; without it, this is scaled_dot_product_attention.
        torch.backends.mha.set_fastpath_enabled(False)
        if block >= 0:
            visual.prune_intermediate_layers([block])
            visual.attn_pool = None
        visual.proj = None
        self.visual = visual

    def forward(self, image_B3HW: Tensor) -> Tokens:
        found = self.visual.forward_intermediates(
            image_B3HW,
            indices=[self.block] if self.block >= 0 else 1,
            normalize_intermediates=self.block < 0 and self.summary != POOL,
            intermediates_only=self.summary == TOKEN,
            output_fmt="NLC",
            output_extra_tokens=True,
        )
        patch_BNC = found["image_intermediates"][0]
        if self.summary == TOKEN:
            return Tokens(found["image_intermediates_prefix"][0][:, 0], patch_BNC)
        cls_BC = found["image_features"]
        if self.summary == POOL:
            patch_BNC = self.visual.attn_pool.ln_k(patch_BNC)
            cls_BC = F.pad(cls_BC, (0, self.width - cls_BC.shape[-1]))
        return Tokens(cls_BC, patch_BNC)


class ClipMap(Tower):
    """open_clip's ModifiedResNet: the last stage's map, and its attention pool's summary.

    The pool is without its output projection, which is the one to the text space.
    """

    summary = POOL

    def __init__(self, visual: ModifiedResNet):
        super().__init__()
        self.pool = attention_pool(visual.attnpool)
        visual.attnpool = nn.Identity()
        self.visual = visual

    def forward(self, image_B3HW: Tensor) -> Tokens:
        found = self.visual.forward_intermediates(image_B3HW, indices=1, intermediates_only=True)
        map_BCHW = found["image_intermediates"][0]
        return from_map(map_BCHW)._replace(cls_BC=self.pool(map_BCHW))


def attention_pool(theirs: ClipPool) -> nn.Module:
    """timm's form of open_clip's AttentionPool2d, with its weights but for the output's."""
    positions_NC = theirs.positional_embedding
    side = round((len(positions_NC) - 1) ** 0.5)
    pool = AttentionPool2d(
        positions_NC.shape[1],
        out_features=0,
        feat_size=side,
        num_heads=theirs.num_heads,
        qkv_separate=True,
        device=positions_NC.device,
    )
    state = {
        f"{key[0]}.{part}": value
        for key in ("q_proj", "k_proj", "v_proj")
        for part, value in getattr(theirs, key).state_dict().items()
    }
    pool.load_state_dict(state | {"pos_embed": positions_NC.data})
    return pool


class PythonTower(Tower):
    """A user's module: its (cls [B, C], patch [B, N, C]) as Tokens; NotTokens for what is not."""

    summary = TOKEN

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image_B3HW: Tensor) -> Tokens:
        found = self.model(image_B3HW)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            what = type(found).__name__
            if isinstance(found, (tuple, list)):
                what += f" of {len(found)}"
            raise NotTokens(f"must return Tokens(cls, patch) from its forward, got {what}")
        tokens = Tokens(*found)
        if tokens.cls_BC is None:
            raise NotTokens("gives no CLS token: return the mean of the patches")
        for kind, x in zip(KINDS, tokens, strict=True):
            if not isinstance(x, Tensor):
                raise NotTokens(f"gives {kind} as {type(x).__name__}; it must be a torch tensor")
        return tokens
