"""The demonstration: paths of its two teachers and 2,624 photographs, and their preparation.

Imports only the standard library, because recipes name the paths; `conversion` makes the files.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from unic_ds import files
from unic_ds.demo.parts import PACKAGES, PARTS
from unic_ds.process import console


def root() -> Path:
    """The folder of the demonstration: `$UNIC_DS_CACHE` (or ~/.cache/unic_ds) / quickstart."""
    return files.cache_root() / "quickstart"


def precision(cpu: Path = Path("/proc/cpuinfo")) -> Literal["bf16", "fp32"]:
    """Precision of the demonstration: fp32 on a CPU without bf16 instructions, else bf16.

    Without them bf16 takes ten times as long as fp32, and an hour for the whole demonstration.
    """
    if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists() or not cpu.is_file():
        return "bf16"
    has = any(word.endswith("bf16") for word in cpu.read_text().split())
    return "bf16" if has else "fp32"


def ready() -> bool:
    """True if every part exists; a part appears by one rename, so it is complete if it exists."""
    return all((root() / part).exists() for part in PARTS)


def missing_packages() -> list[str]:
    """Requirements of `prepare` that are not installed, for pip."""
    return [PACKAGES[name] for name in PACKAGES if find_spec(name) is None]


def prepare() -> Path:
    """Make the demonstration's folder if it does not exist, and return it.

    ValueError if its packages are not installed.
    """
    if ready():
        return root()
    if missing := missing_packages():
        raise ValueError(
            f"the quickstart needs {', '.join(missing)}; `make quickstart` installs them"
        )
    from unic_ds.demo import conversion

    root().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="quickstart.", dir=root().parent) as scratch:
        made = Path(scratch) / "quickstart"
        made.mkdir()
        console.say(f"preparing the demonstration in {root()}")
        conversion.write_parts(made)
        move_into_place(made)
    return root()


def move_into_place(made: Path) -> None:
    """Move missing parts into the folder, licences last; a part that another process made stays."""
    root().mkdir(exist_ok=True)
    for part in PARTS:
        try:
            if not (root() / part).exists():
                (made / part).rename(root() / part)
        except OSError:
            if not (root() / part).exists():
                raise
