"""Times of the evaluation's parts: `python -m unic_ds.evaluate.bench` is `harness.bench`.

The benchmark needs models and images, which this package does not import.
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("unic_ds.harness.bench", run_name="__main__", alter_sys=True)
