"""`make soak`: a run of two ranks killed fifty times at random moments ends as if nothing was."""

import json
import os
import random
import signal
import time

import pytest
from runs import DEMONSTRATION, curve, kill_group, reached, run, saved, start, two

pytestmark = DEMONSTRATION

KILLS = 50
RUN = {
    "optim__batch_size": "8",
    "optim__steps": "700",
    "ladder__rungs": "11",
    "run__save_every": "3",
    "eval__on": "false",
}


def live_for_a_while(out, chance):
    """One life of the run, killed while it starts, trains or saves; what was killed, and when."""
    process, before = start(two(out, **RUN)), reached(out)
    if chance.random() < 0.2:  # while it starts
        time.sleep(chance.uniform(0, 12))
    else:
        while process.poll() is None and reached(out) <= max(before, saved(out)):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 2.5))
    assert process.poll() is None, (
        f"too short for {KILLS} kills: {process.communicate()[0][-2000:]}"
    )
    ranks = process.ranks()
    if ranks and chance.random() < 0.5:
        os.kill(chance.choice(ranks), signal.SIGKILL)
        try:
            process.communicate(timeout=120)
            return "one rank", reached(out)
        finally:
            if process.poll() is None:
                kill_group(process)
    kill_group(process)
    return "all ranks", reached(out)


@pytest.mark.soak
@pytest.mark.dist
@pytest.mark.fault(f"{KILLS} kills at random moments", "each start goes on; the same curve")
def test_fifty_random_kills_leave_the_curve_as_it_is(tmp_path):
    seed = int(os.environ.get("SOAK_SEED", "0"))
    chance, begun = random.Random(seed), time.monotonic()
    run(two(tmp_path / "whole", **RUN), timeout=1800)
    out = tmp_path / "killed"
    for kill in range(1, KILLS + 1):
        what, step = live_for_a_while(out, chance)
        print(f"kill {kill}: {what} at step {step}, checkpoint {saved(out)}", flush=True)
    run(two(out, **RUN), timeout=1800)
    assert curve(out) == curve(tmp_path / "whole")
    assert len(curve(out)) == int(RUN["optim__steps"])
    took = time.monotonic() - begun
    print(json.dumps({"kills": KILLS, "seed": seed, "seconds": round(took)}))
