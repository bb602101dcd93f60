"""Images from a source to batches on the device, the same on any number of ranks."""

from unic_ds.data.decoders import backend
from unic_ds.data.prefetch import Batch
from unic_ds.data.scan import scan
from unic_ds.data.source import Source, split
from unic_ds.data.stream import Stream, Views, drawn, passes

__all__ = [
    "Batch",
    "Source",
    "StepShape",
    "Stream",
    "Views",
    "backend",
    "drawn",
    "passes",
    "scan",
    "split",
]
