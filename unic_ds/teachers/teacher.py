"""A frozen teacher of any source: uint8 images in, tokens on the student's grid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict, cast

import torch
from torch import Tensor, nn

from unic_ds import config, dist
from unic_ds.files.printable import printable
from unic_ds.teachers import probe, quantisation, sources, weight_files
from unic_ds.teachers.adapters import TOKEN, TeacherModel
from unic_ds.tokens import Normalise, Tokens, to_grid

DTYPE = probe.DTYPE


class TeacherFacts(TypedDict):
    """Facts that identify a teacher: its entry in teachers.json and in a cache's manifest."""

    source: str
    sha256: str
    content: NotRequired[str]
    size: int
    patch: int
    mean: list[float]
    std: list[float]
    block: str
    tokens: int
    cls: str
    width: int
    grid: int
    precision: str
    parameters: int
    licence: str


class Teacher(nn.Module):
    """A frozen model that turns uint8 images of side `size` into Tokens on the student's grid.

    With `resize = larger` they stay on its own grid if that is larger (`target_grid`).

    The tower is probed with black images, which sets `width` and `own_grid`; ValueError unless it
    gives tokens on a square grid. A quantised one's `fidelity` to itself in bf16 is
    measured on the images of `sample`, if given. One that is not replicated is built, and called,
    by all ranks together.
    """

    def __init__(
        self,
        row: config.Teacher,
        model: TeacherModel,
        *,
        grid: int,
        device: torch.device,
        sample: quantisation.Sample | None = None,
    ):
        super().__init__()
        quantisation.check_device(row, device)
        self.row, self.name, self.licence = row, row.name, printable(model.licence)
        self.size, self.grid, self.summary = model.size, grid, str(model.tower.summary)
        self.mean, self.std = sources.preprocessing(row, model)
        self.dtype = DTYPE[row.precision]
        layout = torch.channels_last if row.channels_last else torch.contiguous_format
        self.layout = layout
        # Weights to be sharded go to the device block by block.
        first = device if row.placement == "replicate" else torch.device("cpu")
        self.tower = model.tower.to(first, self.dtype).to(memory_format=layout)
        self.normalise = Normalise(self.mean, self.std).to(device)
        self.requires_grad_(False).train(False)
        self.parameter_count = sum(p.numel() for p in self.tower.parameters())
        changes = row.quantised or row.placement != "replicate"
        no_file = sources.source_of(row).locate is None
        # Hashed before they are quantised or sharded.
        self.hashes = weight_files.module_hashes(self.tower) if changes and no_file else {}
        if row.placement != "replicate":
            offload = row.placement == "offload"
            dist.shard_over_node(self.tower, self.tower.blocks(), offload=offload)
        self.width, self.own_grid = probe.measure(
            row, self.size, self.on_own_grid, device=device, single=not sources.has_outline(row)
        )
        self.target_grid = self.target_grid_at(grid)
        self.fidelity = self.quantise(device, sample) if row.quantised else {}
        self.patch = model.patch or self.size // self.own_grid

    @property
    def has_cls(self) -> bool:
        """True if its summary is a CLS token."""
        return self.summary == TOKEN

    def target_grid_at(self, grid: int) -> int:
        """Side of its targets' grid for a student's patch grid: that one, or its own if larger."""
        larger = self.row.resize == "larger" and self.own_grid > grid
        return self.own_grid if larger else grid

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    # Not inference_mode: its tensors cannot be saved for the loss's backward.
    @torch.no_grad()
    def forward(
        self, image_B3HW: Tensor, row_R: Tensor | None = None, *, grid: int | None = None
    ) -> Tokens:
        """Tokens of uint8 images [B, 3, size, size] in its precision, on the target's grid.

        The student's patch grid is `grid`, or that of the constructor. With `row_R` only those
        images count: the tokens of no image are empty. At least two are run, since compiled code of
        one image would be another.
        """
        assert image_B3HW.shape[1:] == (3, self.size, self.size), (self.name, image_B3HW.shape)
        micro = self.row.micro or len(image_B3HW)
        grid = self.target_grid_at(grid or self.grid)
        if row_R is None:
            return self.encode_each(image_B3HW.split(micro), grid)
        # All ranks gather sharded weights together: all run as often, if on fewer images each.
        calls = -(-len(image_B3HW) // micro)
        if self.row.placement == "replicate":
            calls = -(-len(row_R) // micro)
            if not calls:
                return self.no_tokens(grid)
        filler_F = row_R.new_zeros(max(0, calls - len(row_R), 2 - len(row_R)))
        chosen = image_B3HW[torch.cat([row_R, filler_F])]
        tokens = self.encode_each(chosen.tensor_split(calls), grid)
        return Tokens(*(x[: len(row_R)] for x in tokens))

    def encode_each(self, parts: Sequence[Tensor], grid: int) -> Tokens:
        """Tokens on a grid of all parts of the images, which are encoded one after another."""
        found = [to_grid(self.on_own_grid(part), grid) for part in parts]
        return found[0] if len(found) == 1 else Tokens(*map(torch.cat, zip(*found, strict=True)))

    def no_tokens(self, grid: int) -> Tokens:
        """Tokens of no image."""
        like = self.normalise.mean_311.new_empty(0, dtype=self.dtype)
        return Tokens(like.new_empty(0, self.width), like.new_empty(0, grid**2, self.width))

    def on_own_grid(self, image_B3HW: Tensor) -> Tokens:
        """The tower's tokens of uint8 images."""
        image_B3HW = self.normalise(image_B3HW, self.dtype).contiguous(memory_format=self.layout)
        return self.tower(image_B3HW)

    def quantise(
        self, device: torch.device, sample: quantisation.Sample | None
    ) -> dict[str, float]:
        """Quantise its blocks; cosines of its tokens to those before, of a sample's images."""
        blocks = self.tower.blocks()
        quantisation.check_tower(self.row, blocks)
        image_B3HW = sample(self.size).to(device) if sample else None
        exact = self(image_B3HW) if image_B3HW is not None else None
        quantisation.quantise(self.row, self.tower, blocks)
        return quantisation.agreement(self(image_B3HW), exact) if exact else {}

    def facts(self) -> TeacherFacts:
        """Facts that identify the teacher; hashes its weight file."""
        path = sources.locate(self.row)
        of_module = {} if path else self.hashes or weight_files.module_hashes(self.tower)
        facts = {
            "source": self.row.source,
            **(weight_files.hashes(path) if path else of_module),
            "size": self.size,
            "patch": self.patch,
            "mean": list(self.mean),
            "std": list(self.std),
            "block": self.row.block,
            "tokens": self.own_grid**2,
            "cls": self.summary,
            "width": self.width,
            "grid": self.target_grid,
            "precision": self.row.precision,
            "parameters": self.parameter_count,
            "licence": self.licence,
        }
        return cast(TeacherFacts, facts)

    @torch.no_grad()
    def share_weights(self, other: Teacher) -> None:
        """Use the parameters of `other` in place of those of the same shape, which are then freed.

        ValueError if they are not equal.
        """
        theirs = dict(other.tower.named_parameters())
        for name, ours in list(self.tower.named_parameters()):
            same = theirs.get(name)
            if same is None or same.shape != ours.shape:
                continue
            if not torch.equal(ours, same):
                raise ValueError(
                    f"teacher {self.name!r} has other weights at {self.size} px than at"
                    f" {other.size} px ({printable(name, 60)}); give teachers.{self.name}.size, or"
                    " a source that makes the same model every time"
                )
            module, _, key = name.rpartition(".")
            setattr(self.tower.get_submodule(module), key, same)


def load(
    row: config.Teacher,
    *,
    grid: int,
    device: torch.device,
    sample: quantisation.Sample | None = None,
) -> Teacher:
    """The frozen teacher of a recipe's row; ValueError as `sources.read` and Teacher."""
    return Teacher(row, sources.read(row, grid), grid=grid, device=device, sample=sample)
