"""The pictures of docs/watch.md, of a real run: its report, its TensorBoard, `unic-ds watch`.

    python tests/support/docs_pictures.py RUN OUT    OUT/{report,tensorboard,watch}.png

Needs Debian's chromium and Python's playwright.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from rich.console import Console

from unic_ds.report import page, run_record, watch_view

CHROMIUM = "/usr/bin/chromium"
SIZE = {"width": 1280, "height": 1150}
WIDTH = 100
"""Columns of the terminal."""


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """TensorBoard's address while it serves a folder."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            said = ""
            for line in process.stderr:
                said += line
                if found := re.search(r"http://localhost:\d+/", line):
                    yield found[0]
                    return
            raise RuntimeError(f"TensorBoard has ended: {said}")
        finally:
            process.terminate()


def draw_report(shown: Page, run: Path, file: Path) -> None:
    """The head of a run's report and its first curves; the settings between are left out."""
    shown.goto(page.write_for([run], file.with_suffix(".html")).as_uri())
    shown.wait_for_function("document.documentElement.dataset.drawn")
    shown.evaluate("document.getElementById('settings').hidden = true")
    shown.screenshot(path=file)
    file.with_suffix(".html").unlink()


def draw_tensorboard(shown: Page, run: Path, file: Path) -> None:
    """The scalars, as TensorBoard groups them."""
    with tensorboard(run / "tb") as address:
        shown.goto(f"{address}#timeseries")
        shown.wait_for_selector("scalar-card canvas", timeout=60_000)
        shown.get_by_label("Close side pane").click()
        shown.wait_for_timeout(3000)  # its charts fade in
        shown.screenshot(path=file)


def draw_watch(shown: Page, run: Path, file: Path) -> None:
    """A frame of `unic-ds watch`."""
    terminal = Console(record=True, width=WIDTH, file=file.open("w"))
    terminal.print(watch_view.frame(run_record.read(run), width=WIDTH))
    shown.set_content(terminal.export_svg(title=f"unic-ds watch {run.name}"))
    shown.locator("svg").first.screenshot(path=file)


def main() -> None:
    """Draw all pictures."""
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, draw in (
            ("report", draw_report),
            ("tensorboard", draw_tensorboard),
            ("watch", draw_watch),
        ):
            shown = browser.new_page(viewport=SIZE)
            draw(shown, run, (out / f"{name}.png").absolute())
            print(out / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
