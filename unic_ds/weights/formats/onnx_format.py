"""ONNX: a graph for onnxruntime, with dynamic batch and sides; weights in fp32 or int8."""

from __future__ import annotations

import json
import tempfile
import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from unic_ds.files import write_atomic
from unic_ds.weights.formats import quantised
from unic_ds.weights.formats.handover import Format, Handover, Precision
from unic_ds.weights.formats.traced import (
    IMAGES,
    Traced,
    dynamic_shapes,
    example,
    preprocessing,
    takes_any_size,
)

MODEL, FACTS = "model.onnx", "preprocessing.json"
SCOPES = "pkg.torch.onnx.name_scopes"
"""Key of a node's metadata: the modules that it is in."""
LIMIT = 2**31 - 2**20
"""Bytes of the largest ONNX file; weights beyond lie in a file beside it."""

LOADING = """\
import json

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("THIS_FOLDER/model.onnx")
names = [output.name for output in session.get_outputs()]
facts = session.get_modelmeta().custom_metadata_map  # as in preprocessing.json
mean, std = (np.array(json.loads(facts[key]), np.float32) for key in ("mean", "std"))
"""
RUNNING = """\
pixels = (images / np.float32(255) - mean) / std  # uint8 RGB [batch, height, width, 3]
outputs = dict(zip(names, session.run(names, {"pixel_values": pixels.transpose(0, 3, 1, 2)})))
"""
BINDING = """\
from functools import partial

import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = THREADS
onnxruntime.InferenceSession = partial(onnxruntime.InferenceSession, sess_options=options)
"""
"""onnxruntime takes its threads from a session's options alone, not from the environment."""


def write(handover: Handover, folder: Path, quantise: Precision) -> None:
    """Write the graph, with its preprocessing in its metadata and in a file beside it."""
    module, facts = Traced(handover), preprocessing(handover)
    names = list(handover.outputs(handover.sample(handover.cfg.size)[:1]))
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")  # of the exporter's own use of torch
        program = torch.onnx.export(
            module,
            (example(handover),),
            dynamo=True,
            dynamic_shapes=dynamic_shapes(handover),
            input_names=[IMAGES],
            output_names=names,
            verbose=False,
        )
    assert program is not None
    for key, value in facts.items():
        program.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    nbytes = sum(value.nbytes for value in module.state_dict().values())
    with tempfile.TemporaryDirectory(dir=folder) as work:
        plain = (Path(work) if quantise else folder) / MODEL
        program.save(str(plain), external_data=nbytes > LIMIT)
        if quantise:
            quantised.quantise_onnx(
                plain, folder / MODEL, kept=projectors_in(program), external=nbytes > 4 * LIMIT
            )
    write_atomic(folder / FACTS, json.dumps(facts, indent=2) + "\n")


def projectors_in(program: torch.onnx.ONNXProgram) -> list[str]:
    """Names of the nodes that compute kept projectors' predictions."""
    return [
        node.name
        for node in program.model.graph
        if node.name and "'predictions'" in node.metadata_props.get(SCOPES, "")
    ]


ONNX = Format(
    title="onnxruntime",
    library="onnx",
    write=write,
    loading=LOADING,
    running=RUNNING,
    binding=BINDING,
    files=frozenset({MODEL, f"{MODEL}.data", FACTS}),
    packages=("onnx", "onnxscript", "onnxruntime"),
    quantises=frozenset({"int8"}),
    predicts=True,
    sizes=takes_any_size,
)
