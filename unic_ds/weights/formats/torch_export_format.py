"""torch.export's format (.pt2): a graph for torch alone, with dynamic batch and sides."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from unic_ds.files import write_atomic
from unic_ds.weights.formats import quantised
from unic_ds.weights.formats.handover import Format, Handover, Precision
from unic_ds.weights.formats.traced import Traced, TracedBf16, preprocessing, takes_any_size, trace

MODEL, FACTS = "model.pt2", "preprocessing.json"

LOADING = """\
import json

import torch

program = torch.export.load("THIS_FOLDER/model.pt2")
model = program.module()
with open("THIS_FOLDER/preprocessing.json") as file:
    facts = json.load(file)
mean, std = (torch.tensor(facts[key]) for key in ("mean", "std"))
"""
RUNNING = """\
pixels = (torch.tensor(images) / 255 - mean) / std  # uint8 RGB [batch, height, width, 3]
with torch.inference_mode():
    outputs = model(pixels.permute(0, 3, 1, 2))
"""


def write(handover: Handover, folder: Path, quantise: Precision) -> None:
    """Write the graph, and its preprocessing beside it."""
    module = TracedBf16(handover) if quantise == "bf16" else Traced(handover)
    if quantise == "int8":
        quantised.quantise_linears(module.encoder)
    torch.export.save(trace(module, handover), folder / MODEL)
    write_atomic(folder / FACTS, json.dumps(preprocessing(handover), indent=2) + "\n")


TORCH_EXPORT = Format(
    title="torch.export",
    library="pytorch",
    write=write,
    loading=LOADING,
    running=RUNNING,
    files=frozenset({MODEL, FACTS}),
    quantises=frozenset({"int8", "bf16"}),
    predicts=True,
    sizes=takes_any_size,
)
