"""From a folder of images to batches on the device, the same whatever the ranks and restarts."""

from unic_ds.data.prefetch import Batch, backend
from unic_ds.data.scan import scan
from unic_ds.data.source import Source, split
from unic_ds.data.stream import Stream, Views, drawn, passes

__all__ = ["Batch", "Source", "Stream", "Views", "backend", "drawn", "passes", "scan", "split"]
