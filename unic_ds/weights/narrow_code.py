"""The code in the folder of a student with narrower blocks: an architecture that timm lacks."""

from __future__ import annotations

from pathlib import Path

from unic_ds.files import write_atomic
from unic_ds.models import narrow_vit

FILE = Path(narrow_vit.__file__).name
IMPORTS = """\
import sys

sys.path.append("THIS_FOLDER")
import narrow_vit  # the folder's own code: timm's ViT with fewer heads and narrower MLPs

"""
REGISTERED = """\
import sys
import types

sys.modules["{name}"] = types.ModuleType("{name}")
exec({code!r}, vars(sys.modules["{name}"]))
"""


def write(folder: Path) -> None:
    """Write the code into an export."""
    write_atomic(folder / FILE, own_text())


def own_text() -> str:
    """The code of this version."""
    return Path(narrow_vit.__file__).read_text()


def registered(folder: Path) -> str:
    """Program that makes timm know the architecture of an export; empty if the folder has no code.

    It holds this version's code, so nothing in the folder is run or imported.
    """
    if not (folder / FILE).is_file():
        return ""
    return REGISTERED.format(name=narrow_vit.narrow_vit.__name__, code=own_text())
