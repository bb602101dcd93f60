"""Groups in which services show the values of log.jsonl."""

from __future__ import annotations

GROUPS = {
    "loss": ("loss",),
    "optimisation": ("lr", "grad_norm", "skipped", "hardest_other"),
    "throughput": (
        *("images_per_s", "tflops", "mfu", "data_wait_share", "mem_gb"),
        *("samples", "bad_images", "probe_s"),
    ),
}
"""Names in log.jsonl by group; names with a `/` are of a probe or a teacher."""

GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}


def group_of(name: str) -> str:
    """Tag of a value in log.jsonl: GROUP/NAME, teachers/TEACHER/NAME or probes/NAME/MODEL.

    No tag is the beginning of another: a service may make them files and folders.
    """
    if name.startswith("probe/"):
        _, value, *model = name.split("/", 2)
        return f"probes/{value}/{model[0] if model else 'student'}"
    if "/" in name:
        return f"teachers/{name}"
    return f"{GROUP_OF.get(name, 'other')}/{name}"
