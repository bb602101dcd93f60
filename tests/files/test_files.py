"""Text made printable, files read up to a limit: the smallest input of each kind."""

import errno
import os
import stat

import numpy as np
import pytest

from unic_ds.data import shard_index
from unic_ds.files import (
    apply_umask,
    nearest_existing,
    open_atomic,
    open_regular,
    read_limited,
    read_text,
    remove_folder,
    replace_folder,
    sha256,
    write_atomic,
)
from unic_ds.files.printable import markdown, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ViT-B/16 é 猫", "ViT-B/16 é 猫"),
        ("a\nunic_ds: error: all is well", "a\\nunic_ds: error: all is well"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\u2028b\u202ec", "a\\u2028b\\u202ec"),
        (os.fsdecode(b"caf\xe9.jpg"), "caf\\udce9.jpg"),
    ],
)
def test_foreign_text_is_one_line_of_visible_characters(text, shown):
    assert printable(text) == shown
    assert printable(text).encode("utf-8")


def test_foreign_text_has_a_largest_length():
    assert printable("x" * 10_000_000, 10) == "xxxxxxx..."


def test_markdown_shows_foreign_text_as_it_is():
    assert markdown("a|b <script> [x](y) `z`\n") == "a\\|b &lt;script&gt; \\[x\\](y) \\`z\\`\\\\n"


def test_only_regular_files_are_opened_and_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="is not a regular file"):
            open_regular(path)


def test_a_file_is_read_up_to_a_limit(tmp_path):
    file = tmp_path / "sparse"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(OSError, match="more than 100") as caught:
        read_limited(file, 100)
    assert caught.value.errno == errno.EFBIG
    file.write_bytes(b"x" * 100)
    assert read_limited(file, 100) == b"x" * 100
    with pytest.raises(OSError, match="more than 10"):  # its size is told as 0
        read_limited("/proc/self/status", 10)


def test_text_is_utf8_with_or_without_a_byte_order_mark(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_text(file) == "a: 1\n"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_text(file)


def test_a_written_file_is_whole_and_has_the_mode_of_the_umask(tmp_path):
    file = tmp_path / "file"
    before = os.umask(0o027)
    try:
        write_atomic(file, "é\n")
        file.chmod(0o600)
        apply_umask(file)
    finally:
        os.umask(before)
    assert file.read_text("utf-8") == "é\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_part_follows_no_link_and_is_removed_where_writing_fails(tmp_path):
    """In a shared folder somebody else may have made links under any name that can be foreseen."""
    theirs, file = tmp_path / "theirs", tmp_path / "file"
    theirs.write_text("theirs")
    for name in ("file.part", ".file.part", "file.partial", f"file.{os.getpid()}.part"):
        (tmp_path / name).symlink_to(theirs)
    names = {path.name for path in tmp_path.iterdir()}
    write_atomic(file, "ours")
    shard_index.write({"a": np.zeros(1)}, tmp_path / "file")
    with pytest.raises(RuntimeError), open_atomic(file) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert theirs.read_text() == "theirs"
    assert np.load(file)["a"] == 0
    assert {path.name for path in tmp_path.iterdir()} == names | {"file"}


def test_a_folder_replaces_an_older_one_and_leaves_nothing_else(tmp_path):
    new, old, of_a_kill = (tmp_path / name for name in ("new", "old", ".old.removed"))
    for folder in (new, old, of_a_kill):
        (folder / f"in {folder.name}").mkdir(parents=True)
    replace_folder(new, old)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert [path.name for path in old.iterdir()] == ["in new"]
    replace_folder(old, tmp_path / "first")
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_a_link_to_a_folder_is_not_replaced_and_is_removed_alone(tmp_path):
    new, real, link = (tmp_path / name for name in ("new", "real", "link"))
    for folder in (new, real):
        (folder / f"in {folder.name}").mkdir(parents=True)
    for name in ("real", "nothing"):
        link.symlink_to(name)
        with pytest.raises(OSError, match="is a link"):
            replace_folder(new, link)
        assert {path.name for path in tmp_path.iterdir()} == {"new", "real", "link"}
        assert (new / "in new").is_dir()
        remove_folder(link)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "real"}
    assert (real / "in real").is_dir()


def test_the_nearest_existing_parent_of_a_path(tmp_path):
    assert nearest_existing(tmp_path) == tmp_path
    assert nearest_existing(tmp_path / "a" / "b") == tmp_path


def test_sha256_of_a_regular_file(tmp_path):
    file, pipe = tmp_path / "file", tmp_path / "pipe"
    file.write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not a regular file"):
        sha256(pipe)
