"""A process that cannot import unic_ds: it loads an export, and runs it on images that it is sent.

It runs the format's own program, sees installed packages alone, and has no network for the hub.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
from torch import Tensor

from unic_ds.files.printable import printable
from unic_ds.files.tensor_files import read
from unic_ds.weights.formats.handover import Format, Outputs

PLACEHOLDER = "THIS_FOLDER"
"""The export's folder in a program: the working directory of the process."""
CHILD = """\
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("unic_ds", "unic_kernels"):
            raise ImportError(f"{name} is not to be imported")


sys.meta_path.insert(0, Absent())
loading, running = sys.argv[1:]
import json
import os
import time

# Libraries print to stdout and may ask at stdin: neither is to reach the pipes.
requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.dup2(2, 1)
import numpy
from safetensors.numpy import save_file

scope = {"__name__": "__main__"}
exec(compile(loading, "loading", "exec"), scope)
program = compile(running, "running", "exec")
answers.write("[]\\n")
for line in requests:
    request = json.loads(line)
    scope["images"] = numpy.load(request["images"])
    seconds = []
    for _ in range(request["runs"]):
        begin = time.perf_counter()
        exec(program, scope)
        seconds.append(time.perf_counter() - begin)
    if request["outputs"]:
        names = request["names"] or scope["outputs"]
        found = {name: numpy.ascontiguousarray(scope["outputs"][name]) for name in names}
        save_file(found, request["outputs"])
    assert not {"unic_ds", "unic_kernels"} & sys.modules.keys()
    answers.write(json.dumps(seconds) + "\\n")
"""
"""Runs a format's program on images, for each request in a line of JSON; answers with seconds."""


NO_ROOM = "images for a fresh process cannot be written ({}); name another folder by TMPDIR"


class FreshProcess:
    """An export that is loaded in a process of its own, until the context ends.

    `named` is its name in errors, and `threads` bounds its computation; 0: the library's default.
    Methods raise RuntimeError with the last line of the process if it fails.
    """

    def __init__(self, form: Format, folder: Path, *, named: str, threads: int = 0):
        self.named = named
        self.loading = form.loading_in(folder).replace(PLACEHOLDER, ".")
        if threads:
            self.loading = form.bind(threads) + self.loading
        self.running, self.folder = form.running, folder

    def __enter__(self) -> FreshProcess:
        try:
            self.directory = tempfile.TemporaryDirectory(prefix="unic_ds_")
        except OSError as error:
            raise OSError(NO_ROOM.format(error.strerror or error)) from None
        self.work = Path(self.directory.name)
        self.errors = self.work / "stderr"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-B", "-c", CHILD, self.loading, self.running],
                cwd=self.folder,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self.answer()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the process and remove its files."""
        self.process.kill()
        self.process.wait()
        for pipe in self.pipes():
            with suppress(BrokenPipeError):  # of a request that it did not read
                pipe.close()
        self.directory.cleanup()

    def pipes(self) -> tuple[IO[str], IO[str]]:
        """The pipes of requests and answers."""
        assert self.process.stdin and self.process.stdout
        return self.process.stdin, self.process.stdout

    def outputs(self, image_B3HW: Tensor, *, names: tuple[str, ...] = ()) -> Outputs:
        """Outputs of uint8 images, all of them unless some are named."""
        file = self.work / "outputs.safetensors"
        self.request(image_B3HW, runs=1, outputs=str(file), names=names)
        return {name: value.clone() for name, value in read(file).items()}

    def seconds(self, image_B3HW: Tensor, runs: int) -> list[float]:
        """Wall time of each of some runs on uint8 images, one after another."""
        return self.request(image_B3HW, runs=runs)

    def request(
        self, image_B3HW: Tensor, *, runs: int, outputs: str = "", names: tuple[str, ...] = ()
    ) -> list[float]:
        """Let the process run; return the seconds of each run."""
        file = self.work / "images.npy"
        try:
            np.save(file, image_B3HW.permute(0, 2, 3, 1).contiguous().numpy())
        except OSError as error:
            raise OSError(NO_ROOM.format(error.strerror or error)) from None
        text = json.dumps({"images": str(file), "runs": runs, "outputs": outputs, "names": names})
        requests, _ = self.pipes()
        try:
            requests.write(f"{text}\n")
            requests.flush()
        except BrokenPipeError:
            self.fail()
        return self.answer()

    def answer(self) -> list[float]:
        """Wait for the process's next answer."""
        line = self.pipes()[1].readline()
        if not line:
            self.fail()
        found: list[float] = json.loads(line)
        return found

    def fail(self) -> NoReturn:
        """Raise RuntimeError with the process's last line."""
        code = self.process.wait()
        lines = self.errors.read_text(errors="backslashreplace").strip().splitlines()
        last = lines[-1] if lines else f"exit code {code}"
        raise RuntimeError(f"a fresh process cannot run {self.named} ({printable(last)})")
