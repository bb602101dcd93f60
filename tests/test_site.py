"""The documentation's site: built strictly, whole, without a network."""

import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from unic_ds.cli import reference_pages

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
CONFIG = "zensical.toml"


class Page(HTMLParser):
    """The links, loaded files and anchors of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.anchors = set(), set(), {""}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.anchors.add(given.get("id"))
        target = given.get("src") or (given.get("href") if tag == "link" else None)
        if target:
            self.loaded.add(target)
        elif tag == "a" and given.get("href"):
            self.links.add(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built from a copy."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / CONFIG, folder)
    shutil.copytree(DOCS, folder / "docs")
    (folder / "kernels").symlink_to(ROOT / "kernels")
    build = Path(sys.executable).parent / "zensical"
    ran = subprocess.run([build, "build", "--strict"], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder / "build" / "site"


def pages_of(entries):
    """Files that a navigation names."""
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else pages_of(value)


def test_the_reference_is_that_of_the_code():
    for name, text in reference_pages.pages().items():
        assert (DOCS / "reference" / name).read_text() == text, "make docs writes it anew"


def test_the_navigation_names_every_page_once():
    found = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    assert sorted(pages_of(tomllib.loads((ROOT / CONFIG).read_text())["project"]["nav"])) == found


def test_every_link_of_the_site_leads_somewhere_and_nothing_is_loaded_from_elsewhere(site):
    pages = {file: Page(file.read_text()) for file in site.rglob("*.html")}
    assert len(pages) > 20
    for file, page in pages.items():
        for link in page.loaded | page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert link in page.links and parts.scheme == "https", (file, link)
                continue
            root = site if parts.path.startswith("/") else file.parent
            target = (root / unquote(parts.path).lstrip("/")).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), (file, link)
            if target in pages and link in page.links:
                assert unquote(parts.fragment) in pages[target].anchors, (file, link)
