"""Run folders without a run: logs, events and tables of any content and length."""

import json
import math

import yaml

from unic_ds.config import overrides, recipes

TEACHER = {
    "source": "timm:x",
    "licence": "Apache-2.0",
    "parameters": 86_000_000,
    "sha256": "ab" * 32,
    "size": 224,
    "patch": 14,
    "precision": "bf16",
}


def run_folder(folder, *, lines=40, teachers=("dino", "clip"), events=(), table=None, **options):
    """A run folder with a log of so many lines."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {key.replace("__", "."): str(value) for key, value in options.items()}
    cfg = overrides.override_all(recipes.get("quickstart"), given)
    (folder / "config.yaml").write_text(yaml.safe_dump(overrides.to_dict(cfg), sort_keys=False))
    (folder / "teachers.json").write_text(json.dumps(dict.fromkeys(teachers, TEACHER)))
    with (folder / "log.jsonl").open("w") as log:
        log.writelines(json.dumps(line(10 * i, teachers)) + "\n" for i in range(1, lines + 1))
    at = {"time": "2026-03-04T05:06:07+00:00"}
    (folder / "events.jsonl").write_text("".join(json.dumps(at | e) + "\n" for e in events))
    if table:
        table.write(folder)
        (folder / "student").mkdir()
        (folder / "student" / "model.safetensors").touch()
    return folder


def line(step, teachers):
    """A line of a log whose loss falls, with a spike at step 200 and a NaN at step 210."""
    loss = 3 / math.sqrt(step) + 0.1 * math.sin(step)
    loss = {200: 77.0, 210: "nan"}.get(step, loss)
    row = {"step": step, "samples": 64 * step, "lr": 1e-3, "grad_norm": 1.5, "loss": loss}
    for i, name in enumerate(teachers):
        for metric in ("cls_cosine", "cls_smooth_l1", "patch_cosine", "patch_smooth_l1"):
            row[f"{name}/{metric}"] = 0.5 + i / 10 + 0.1 * math.cos(step)
        row |= {f"{name}/kept": 0.5, f"{name}/weight": 0.25 * (i + 1)}
    row |= {"data_wait_share": 0.01, "images_per_s": 640.0, "mem_gb": 2.0, "skipped": 0}
    return row | {"bad_images": 3, "tflops": 1.25}
