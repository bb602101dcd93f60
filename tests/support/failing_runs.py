"""Train several jobs in the processes of one launch, each of which is meant to fail, and say why.

The last may fail on one rank alone, which takes the launch with it.
"""

import json
import sys
from pathlib import Path

from unic_ds import train

if __name__ == "__main__":
    plan = next(word for word in sys.argv[1:] if not word.startswith("--"))
    for arguments in json.loads(Path(plan).read_text()):
        try:
            train.main(arguments)
        except OSError as error:
            print(f"failed as it should: {error}", flush=True)
        else:
            sys.exit(f"it did not fail: {arguments}")
    sys.exit(1)
