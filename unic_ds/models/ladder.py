"""The ladder of projectors: from the student's blocks to predictions per teacher and token kind.

After every chosen block the raw residual stream goes through `Linear -> GELU -> Linear` per teacher
and token kind; the rungs' projections are summed (Sariyildiz et al., UNIC, arXiv 2408.05088,
section 3). That form runs as few large GEMMs with weights that live concatenated (`Rungs`); every
other form is a module per rung. Names of weights outside the program are the published ones,
`heads.{teacher}.{cls|patch}.{block}.layers.{i}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeAlias, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from unic_ds import config
from unic_ds.config.block_choice import RungChoice
from unic_ds.tokens import KINDS, Tokens
from unic_kernels.ops import FUSED, Ops


class Head(NamedTuple):
    """One teacher's outputs of the ladder: channels, kinds of token, student blocks."""

    width: int
    kinds: tuple[str, ...] = KINDS
    rungs: str = ""  # empty: the ladder's


def heads_of(cfg: config.Config, widths: Mapping[str, int]) -> dict[str, Head]:
    """Heads of a run's ladder by teacher; `widths` are the teachers' channels."""
    return {
        row.name: Head(widths[row.name], cfg.distance(row).kinds, row.rungs) for row in cfg.teachers
    }


Columns: TypeAlias = Mapping[str, Mapping[str, nn.Module]]
"""One teacher's projectors: kind of token (or `tokens`, both) -> block -> projector."""


class Projector(nn.Module):
    """`[LayerNorm ->] Linear(D, H) -> [LayerNorm ->] GELU -> Linear(H, C)`; `[LN ->] Linear(D, C)`
    without a hidden width.
    """

    def __init__(self, width: int, hidden: int, out: int, *, prenorm: bool, midnorm: bool):
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(width)] if prenorm else []
        if hidden:
            layers += [nn.Linear(width, hidden)] + ([nn.LayerNorm(hidden)] if midnorm else [])
            layers += [nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden or width, out))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.layers(x_ND)


class BlockProjector(nn.Module):
    """One transformer block over [CLS; patches] and a Linear to the teacher's width.

    Sariyildiz et al., DUNE, arXiv 2503.14405.
    """

    def __init__(self, width: int, attention_heads: int, out: int, *, prenorm: bool):
        super().__init__()
        self.block = Block(width, attention_heads, qkv_bias=True)
        self.norm = nn.LayerNorm(width) if prenorm else nn.Identity()
        self.linear = nn.Linear(width, out)

    def forward(self, tokens: Tokens) -> Tokens:
        x_BND = torch.cat([tokens.cls_BC[:, None], tokens.patch_BNC], 1)
        y_BNC = self.linear(self.norm(self.block(x_BND)))
        return Tokens(y_BNC[:, 0], y_BNC[:, 1:])


class Region(NamedTuple):
    """The part of a concatenated parameter that holds one published weight."""

    parameter: str
    region: tuple[slice, ...]


class Rungs(nn.Module):
    """Projectors of one kind of token, of all teachers and blocks, as one op.

    A block's first Linears are stacked, teacher after teacher; a teacher's second Linears stand
    side by side, block after block, so that the sum over rungs is inside of one GEMM. Their biases
    are kept apart, flat, since each is a published weight.
    """

    def __init__(
        self,
        width: int,
        hidden: Mapping[str, Mapping[int, int]],
        outs: Mapping[str, int],
        project: Callable[..., list[Tensor]],
    ):
        """`hidden`: teacher -> block -> hidden width; `outs`: teacher -> channels."""
        super().__init__()
        self.project, self.outs = project, outs
        self.blocks = sorted(set().union(*hidden.values()))
        self.layout = [[own.get(block, 0) for own in hidden.values()] for block in self.blocks]
        self.regions: dict[str, Region] = {}
        for block, widths in zip(self.blocks, self.layout, strict=True):
            self.register_parameter(f"fc1_weight_{block}", empty(sum(widths), width))
            self.register_parameter(f"fc1_bias_{block}", empty(sum(widths)))
            for teacher, rows in zip(hidden, slices(widths), strict=True):
                if block in hidden[teacher]:
                    at = f"{teacher}.{block}.layers.0"
                    self.regions[f"{at}.weight"] = Region(f"fc1_weight_{block}", (rows,))
                    self.regions[f"{at}.bias"] = Region(f"fc1_bias_{block}", (rows,))
        for teacher, by_block in hidden.items():
            out, sizes = outs[teacher], [by_block[block] for block in sorted(by_block)]
            self.register_parameter(f"fc2_weight_{teacher}", empty(out, sum(sizes)))
            self.register_parameter(f"fc2_bias_{teacher}", empty(out * len(sizes)))
            second = zip(sorted(by_block), slices(sizes), slices([out] * len(sizes)), strict=True)
            for block, columns, rows in second:
                at = f"{teacher}.{block}.layers.2"
                self.regions[f"{at}.weight"] = Region(
                    f"fc2_weight_{teacher}", (slice(None), columns)
                )
                self.regions[f"{at}.bias"] = Region(f"fc2_bias_{teacher}", (rows,))

    def forward(self, states: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Tokens [B, N, D] by block -> predictions [B, N, C] by teacher."""
        weights = cast(dict[str, Tensor], self._parameters)
        y = self.project(
            [states[block] for block in self.blocks],
            [weights[f"fc1_weight_{block}"] for block in self.blocks],
            [weights[f"fc1_bias_{block}"] for block in self.blocks],
            [weights[f"fc2_weight_{teacher}"] for teacher in self.outs],
            [weights[f"fc2_bias_{t}"].view(-1, out).sum(0) for t, out in self.outs.items()],
            self.layout,
        )
        return dict(zip(self.outs, y, strict=True))


def empty(*shape: int) -> nn.Parameter:
    """A parameter of zeros, to be initialised later."""
    return nn.Parameter(torch.zeros(shape))


def slices(sizes: Sequence[int]) -> list[slice]:
    """Neighbouring slices of these sizes."""
    ends = [0, *accumulate(sizes)]
    return [slice(*pair) for pair in pairwise(ends)]


class Ladder(nn.Module):
    """The projectors of a run: `Rungs` (one op) in `rungs`, or a module per rung in `heads`."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: Mapping[str, Head],
        cfg: config.Ladder,
        *,
        attention_heads: int = 1,
        ops: Ops = FUSED,
    ):
        """`heads` is keyed by teacher; `width`, `depth`, `attention_heads` are the encoder's."""
        super().__init__()
        if taken := [name for name in heads if hasattr(nn.ModuleDict(), name)]:
            raise ValueError(
                f"a teacher may not be named {taken[0]!r}, an attribute of torch modules"
            )
        self.cfg, self.names = cfg, tuple(heads)
        rungs = {name: rung_blocks(head.rungs or cfg.rungs, depth) for name, head in heads.items()}
        # Without teachers (to evaluate the encoder alone) the rungs are those of the settings.
        blocks = set().union(*rungs.values()) if rungs else rung_blocks(cfg.rungs, depth)
        self.blocks = require_last(sorted(blocks), depth)
        hidden = cfg.width or width
        last = cfg.last_width or 4 * hidden
        sizes = {
            name: {block: last if block == depth - 1 else hidden for block in own}
            for name, own in rungs.items()
        }
        self.rungs = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        if cfg.one_op:
            project = partial(ops.ladder_projection, recompute=cfg.activation_checkpointing)
            self.add_rungs(width, heads, sizes=sizes, project=project)
        else:
            self.add_projectors(width, heads, sizes=sizes, attention_heads=attention_heads)

    def add_rungs(
        self,
        width: int,
        heads: Mapping[str, Head],
        *,
        sizes: Mapping[str, Mapping[int, int]],
        project: Callable[..., list[Tensor]],
    ) -> None:
        """Add all projectors of a kind of token as one op; `sizes` are hidden widths."""
        for kind in KINDS:
            outs = {name: head.width for name, head in heads.items() if kind in head.kinds}
            if outs:
                hidden = {name: sizes[name] for name in outs}
                self.rungs[kind] = Rungs(width, hidden, outs, project)

    def add_projectors(
        self,
        width: int,
        heads: Mapping[str, Head],
        *,
        sizes: Mapping[str, Mapping[int, int]],
        attention_heads: int,
    ) -> None:
        """Add a projector per teacher, kind of token and block; `sizes` are hidden widths."""
        cfg = self.cfg

        def projector(out: int, hidden: int) -> nn.Module:
            if cfg.projector == "transformer":
                return BlockProjector(width, attention_heads, out, prenorm=cfg.prenorm)
            hidden = 0 if cfg.projector == "linear" else hidden
            return Projector(width, hidden, out, prenorm=cfg.prenorm, midnorm=cfg.midnorm)

        for name, head in heads.items():
            columns = {}
            for kind in ("tokens",) if cfg.projector == "transformer" else head.kinds:
                column = {str(block): projector(head.width, n) for block, n in sizes[name].items()}
                columns[kind] = nn.ModuleDict(column)
            self.heads[name] = nn.ModuleDict(columns)

    def forward(self, states: list[Tokens]) -> dict[str, Tokens]:
        """Tokens of each rung -> prediction per teacher; `combine = each` adds a leading axis L.

        A kind of token that is not learned is an empty tensor.
        """
        if self.heads:
            at = dict(zip(map(str, self.blocks), states, strict=True))
            heads = cast(Mapping[str, Columns], self.heads)
            return {name: self.project(columns, at) for name, columns in heads.items()}
        found = []
        for i, kind in enumerate(KINDS):
            at_BND = {
                block: state[i] if i else state[i][:, None]
                for block, state in zip(self.blocks, states, strict=True)
            }
            found.append(self.rungs[kind](at_BND) if kind in self.rungs else {})
        nothing = states[-1].cls_BC.new_empty(0)
        cls, patch = found
        return {
            name: Tokens(cls[name][:, 0] if name in cls else nothing, patch.get(name, nothing))
            for name in self.names
        }

    def project(self, columns: Columns, at: Mapping[str, Tokens]) -> Tokens:
        """One teacher's projections, over its rungs: fp32 sum or stack."""
        if "tokens" in columns:
            rungs = [rung(at[block]) for block, rung in columns["tokens"].items()]
            return Tokens(*(self.combine(list(kind)) for kind in zip(*rungs, strict=True)))
        found = []
        for i, kind in enumerate(KINDS):
            column = columns[kind].items() if kind in columns else ()
            rungs = [rung(at[block][i]) for block, rung in column]
            found.append(self.combine(rungs) if rungs else at[str(self.blocks[-1])][i].new_empty(0))
        return Tokens(*found)

    def combine(self, projections: list[Tensor]) -> Tensor:
        """fp32 sum of the rungs' projections of one kind of token, or their stack."""
        if self.cfg.combine == "each":
            return torch.stack([y.float() for y in projections])
        total = projections[0].float()
        for y in projections[1:]:
            total = total + y
        return total

    def export_state_dict(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Views of the weights by their published names.

        `state` may hold other tensors of the same names and shapes, such as gradients.

        A `transformer` projector, which sees both kinds of token, is `heads.{teacher}.tokens`.
        """
        state = self.state_dict() if state is None else state
        found = {name: value for name, value in state.items() if name.startswith("heads.")}
        for name, (parameter, region) in self.export_names().items():
            found[name] = state[parameter][region]
        return found

    def regions(self) -> dict[str, dict[str, tuple[slice, ...]]]:
        """Parameter -> published name -> region of the parameter that holds that weight."""
        found: dict[str, dict[str, tuple[slice, ...]]] = {
            name: {name: ()} for name, _ in self.heads.named_parameters(prefix="heads")
        }
        for name, (parameter, region) in self.export_names().items():
            found.setdefault(parameter, {})[name] = region
        return found

    def export_names(self) -> dict[str, Region]:
        """Published name -> region, of every weight of the concatenated parameters."""
        found = {}
        for kind, rungs in self.rungs.items():
            assert isinstance(rungs, Rungs)
            for name, (parameter, region) in rungs.regions.items():
                teacher, rest = name.split(".", 1)
                found[f"heads.{teacher}.{kind}.{rest}"] = Region(
                    f"rungs.{kind}.{parameter}", region
                )
        return found


def rung_blocks(rungs: str, depth: int) -> list[int]:
    """0-based blocks that `all`, `half`, `middle`, `last` or a list names; ValueError if absent."""
    return RungChoice.parse(rungs).blocks(depth)


def require_last(blocks: list[int], depth: int) -> list[int]:
    """The blocks; ValueError unless the student's last is among them."""
    if blocks[-1] != depth - 1:  # blocks above the last rung would get no gradient
        raise ValueError(
            f"ladder.rungs ends with block {blocks[-1]}; it must end with the student's last,"
            f" {depth - 1}"
        )
    return blocks
