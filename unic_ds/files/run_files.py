"""Names of what a run folder has and several packages read or write."""

from __future__ import annotations

LOG = "log.jsonl"
EVENTS = "events.jsonl"
TEACHERS = "teachers.json"
START = "start.json"
HEARTBEATS = "heartbeats"
"""Folder."""
PICTURES, PICTURE_LIST = "pictures", "pictures.json"
"""Folder, and the file in it."""
COMPARISON, COMPARISON_PICTURE = "teacher_comparison.json", "teacher_comparison.png"
"""Of `unic-ds teachers compare`; `TEACHERS` has the run's own teachers."""
CHOICE = "teacher_choice.json"
"""Of `--teachers auto`."""
