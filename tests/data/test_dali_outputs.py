"""DALI's outputs stay alive until torch has copied them."""

import threading
import weakref

import pytest
import torch
from augmentation_cases import CASES, SIZES, drawn
from pictures import encode, photo

dali = pytest.importorskip(
    "unic_ds.data.dali_decoder", reason="nvidia-dali-cuda130 is not installed"
)


class Copied(threading.Event):
    """An event of a copy that the test ends: what torch.cuda.Event is on a GPU."""

    query = threading.Event.is_set
    synchronize = threading.Event.wait


class Outputs(list):
    """A list that a weak reference can follow, as it can DALI's outputs."""


def test_outputs_live_until_their_copy_is_done():
    lent, copied, kept = dali.LentOutputs(), [Copied() for _ in range(3)], []
    for event in copied:
        outputs = Outputs()
        kept.append(weakref.ref(outputs))
        lent.keep(outputs, event)
        del outputs
    assert all(ref() is not None for ref in kept)
    copied[0].set()
    lent.keep(Outputs(), Copied())  # forgets the first
    assert kept[0]() is None and kept[1]() is not None and kept[2]() is not None


def test_what_is_closed_waits_for_the_copies():
    lent, copied = dali.LentOutputs(), Copied()
    outputs = Outputs()
    ref = weakref.ref(outputs)
    lent.keep(outputs, copied)
    del outputs
    waiting = threading.Thread(target=lent.wait)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive() and ref() is not None
    copied.set()
    waiting.join(10)
    assert not waiting.is_alive() and ref() is None


@pytest.mark.gpu
def test_a_stream_that_lags_gets_the_same_images():
    """Two seconds behind DALI, which decodes two more batches meanwhile."""
    encoded = [encode(photo(300, 200, seed=i)) for i in range(6)]

    def shown(cycles: int) -> list[torch.Tensor]:
        decoder = dali.Decoder(
            len(SIZES),
            reference=SIZES[0],
            batch=6,
            depth=2,
            threads=2,
            colour=True,
            device=torch.device("cuda"),
        )
        for seed in range(2):
            decoder.push(encoded, drawn(encoded, CASES["unic"], seed), SIZES)
        torch.cuda._sleep(cycles)
        batches = []
        for seed in range(2, 6):
            batches.append(decoder.pop())
            decoder.push(encoded, drawn(encoded, CASES["unic"], seed), SIZES)
        torch.cuda.synchronize()
        decoder.close()
        return [batch[size].cpu() for batch in batches for size in SIZES]

    for late, prompt in zip(shown(int(2e9)), shown(1), strict=True):
        assert torch.equal(late, prompt)
