"""Formats that a student is exported in, each proven in a fresh process without unic_ds.

A format is a module here and a row of `FORMATS`; its contract is `handover.Format`.
"""

from __future__ import annotations

from unic_ds.weights.formats.handover import Format
from unic_ds.weights.formats.hf_format import HF
from unic_ds.weights.formats.onnx_format import ONNX
from unic_ds.weights.formats.openclip_format import OPENCLIP
from unic_ds.weights.formats.timm_format import TIMM
from unic_ds.weights.formats.torch_export_format import TORCH_EXPORT

FORMATS: dict[str, Format] = {
    "timm": TIMM,
    "hf": HF,
    "onnx": ONNX,
    "export": TORCH_EXPORT,
    "openclip": OPENCLIP,
}
"""By the value of `unic-ds export --to`."""
