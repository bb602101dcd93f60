"""Train several jobs one after another in the processes of one launch: a launch costs more than a
small run.
"""

import json
import sys
from pathlib import Path

from unic_ds import train

if __name__ == "__main__":
    plan = next(
        word for word in sys.argv[1:] if not word.startswith("--")
    )  # the launcher adds --local_rank
    for arguments in json.loads(Path(plan).read_text()):
        code = train.main(arguments)
        if code:
            sys.exit(code)
