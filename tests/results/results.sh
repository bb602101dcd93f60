#!/usr/bin/env bash
# Every run of docs/results.md, in runs/results: hours of two CPU cores. The same command goes on
# where it stopped. Needs Debian's openclipart-png, tuxpaint-stamps-default, dataset-fashion-mnist.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
out=runs/results
python tests/results/image_sets.py "$out"
if [ ! -f "$out/start.safetensors" ]; then
  unic-ds teachers start dinov2 --data.train "$out/lists/all.txt" --student.size 56 \
    --out "$out/start.safetensors"
fi
unic-ds ablate tests/results/start.yaml --out "$out/start" "$@"
unic-ds ablate tests/results/results.yaml --out "$out/grid" "$@"
python tests/results/promise.py "$out/start" "$out/grid"
python tests/results/points.py "$out/start" docs/promise.png
python tests/results/curves.py "$out/grid" docs/results.png
