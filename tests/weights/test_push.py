"""The upload against a hub on this machine that speaks the API, and what is refused before."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hub_server import TOKEN, Hub, serve
from runs import ROOT

from unic_ds import config
from unic_ds.files import TEXT_LIMIT
from unic_ds.weights import push
from unic_ds.weights.export import export

STUDENT = config.Student(model="test_vit", size=32, drop_path=0.0)
TEACHERS = (
    config.Teacher(name="dinov2", source="timm:vit_small_patch14_dinov2.lvd142m"),
    config.Teacher(name="clip", source="timm:vit_base_patch16_clip_224.openai"),
)


def exported(out: Path, licence: str) -> Path:
    """The export of a tiny student, one of whose teachers has a licence."""
    cfg = config.Config(recipe="small", teachers=TEACHERS, student=STUDENT)
    state = timm.create_model("test_vit", img_size=32, num_classes=0).state_dict()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    licences = {"dinov2": {"licence": "apache-2.0"}, "clip": {"licence": licence}}
    extras = {"ladder.safetensors": {"x": torch.ones(3)}}
    return export(state, cfg, images, out, teachers=licences, extras=extras)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported folder of a student with a teacher for research only."""
    return exported(tmp_path_factory.mktemp("push") / "student", "apple-amlr")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the exported folder."""
    return Path(shutil.copytree(made, tmp_path / "student"))


@pytest.fixture
def hub() -> Hub:
    """A hub without repositories."""
    with serve() as found:
        yield found


def call(endpoint: str, *words: object, token: str = TOKEN, home: Path) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `unic-ds push` in a process that knows one hub."""
    own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-m", "unic_ds.cli", "push", *map(str, words)],
        env=kept | own | {"HF_TOKEN": token, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_received_is_the_folder(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a run's\n")
    words = (tmp_path, "me/student", "--private", "--revision", "v1")
    code, out, err = call(hub.url, *words, home=tmp_path / "home")
    assert code == 0, err
    assert re.fullmatch(rf"{hub.url}/me/student/commit/\w+\n", out)
    assert "warning: the licence of clip is research only" in err
    assert hub.private == {"me/student": True}
    assert hub.branches["me/student"] == {"main": {}, "v1": contents(folder)}
    assert len(hub.objects) == 2  # the weights, by LFS

    (folder / "config.json").write_text("{}")
    code, _, err = call(hub.url, folder, "me/student", home=tmp_path / "home")
    assert code == 0, err
    assert hub.branches["me/student"]["main"] == contents(folder)


def test_a_dry_run_sends_nothing(hub: Hub, folder: Path, tmp_path: Path) -> None:
    words = (folder, "me/student", "--private", "--dry_run")
    code, out, err = call(hub.url, *words, token="", home=tmp_path / "home")
    assert (code, err) == (0, "") and hub.calls == []
    assert f"me/student (private) on {hub.url}, branch main" in out
    for path in folder.iterdir():
        assert re.search(rf"{path.name} +{path.stat().st_size:,} bytes", out)
    assert "  license: apple-amlr\n" in out and "  - timm/vit_base_patch16_clip_224.openai\n" in out
    assert "warning: the licence of clip is research only" in out


def test_failures_are_one_sentence(hub: Hub, folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    code, out, err = call(hub.url, folder, "me/student", token="", home=home)
    assert (code, out) == (2, "") and "no token" in err and "hf auth login" in err
    assert hub.calls == []

    code, out, err = call(hub.url, folder, "me/student", token="hf_other", home=home)
    assert (code, out) == (1, "") and "was not uploaded" in err and "401" in err
    assert "Traceback" not in err and hub.private == {}

    hub.private["me/student"], hub.branches["me/student"] = False, {"main": {}}
    code, out, err = call(hub.url, folder, "me/student", "--private", home=home)
    assert (code, out) == (2, "") and "exists and is public" in err
    assert hub.branches["me/student"] == {"main": {}}

    hub.server_close()
    hub.shutdown()
    code, out, err = call(hub.url, folder, "me/student", home=home)
    assert (code, out) == (1, "") and "was not uploaded" in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["student", "a/b/c", "me/..", "me/a b", "me/-x", "", "me/x\n"])
def test_ids_that_the_hub_does_not_take(folder: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no repository of the hub; give OWNER/NAME"):
        push.plan(folder, name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (".env", "x", "no file of an export"),
        ("notes.txt", "x", "no file of an export"),
        ("model.bin", "x", "no file of an export"),
        ("a\n.onnx", "x", "no file of an export"),
        ("config.json", '{"a": "hf_' + "a" * 34 + '"}', "line 1 of .* holds a Hugging Face token"),
        ("NOTICE", "ok\n-----BEGIN RSA PRIVATE KEY-----", "line 2 of .* holds a private key"),
        ("README.md", "# no metadata", "has no metadata"),
        ("README.md", "---\nlicense: mit\nlicense: mit\n---\n", "are not valid"),
        ("README.md", "---\n- a\n---\n", "are not valid: it is no mapping"),
        ("README.md", "---\nmodel-index: [a]\n---\n", "are not valid"),
        ("README.md", "---\na: &a [1]\nb: [*a, *a]\n---\n", "are not valid"),
    ],
)
def test_what_is_not_sent(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        push.plan(folder, "me/student")


def test_links_and_folders_are_not_sent(folder: Path, tmp_path: Path) -> None:
    (folder / "LICENSE").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="a link out of the folder"):
        push.plan(folder, "me/student")
    (folder / "LICENSE").unlink()
    (folder / "LICENSE").symlink_to("NOTICE")
    (folder / "NOTICE").write_text("inside")
    assert push.plan(folder, "me/student").files["LICENSE"] == 6
    (folder / "__pycache__").mkdir()  # of an export's module that was imported
    (folder / "__pycache__" / "student_tower.cpython-311.pyc").write_bytes(b"code")
    assert not [name for name in push.plan(folder, "me/student").files if "pyc" in name]
    (folder / "model.pt2").mkdir()
    with pytest.raises(ValueError, match="no file of an export"):
        push.plan(folder, "me/student")
    with pytest.raises(ValueError, match=r"has no model card \(README.md\)"):
        push.plan(tmp_path, "me/student")
    with pytest.raises(ValueError, match="is no folder"):
        push.plan(tmp_path / "none", "me/student")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ValueError, match="has no student/ yet"):
        push.plan(tmp_path / "run", "me/student")
    with pytest.raises(ValueError, match="--revision must be a branch"):
        push.plan(folder, "me/student", revision="../x")


def test_a_large_tokenizer_is_searched_and_sent(folder: Path) -> None:
    file, size = folder / "tokenizer.json", TEXT_LIMIT + 1
    file.write_bytes(b"x" * size)
    assert push.plan(folder, "me/student").files["tokenizer.json"] == size
    with file.open("ab") as stream:
        stream.write(b'\n"hf_' + b"a" * 34)
    with pytest.raises(ValueError, match=r"line 2 of .* holds a Hugging Face token"):
        push.plan(folder, "me/student")
    for name, most in (("tokenizer.json", push.SEARCHED), ("README.md", TEXT_LIMIT)):
        os.truncate(folder / name, most + 1)  # a hole, which takes no room
        with pytest.raises(ValueError, match=rf"{name}' cannot be checked \(has {most + 1} bytes"):
            push.plan(folder, "me/student")
        (folder / name).unlink()


def licensed(folder: Path, line: str) -> tuple[str, ...]:
    """The warnings of a folder whose card has another line for its licence."""
    card = folder / "README.md"
    card.write_text(card.read_text().replace("license: apple-amlr\n", line))
    return push.plan(folder, "me/student").warnings


def test_a_licence_must_be_named_if_a_teacher_s_forbids_use(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"licence of clip is research only, but .* no license"):
        licensed(folder, "")


def test_a_permissive_licence_hides_no_teacher_s(folder: Path) -> None:
    assert licensed(folder, "license: mit\n") == (
        "the card says license: mit, but that of clip is research only",
    )


def test_warnings_follow_from_the_licences() -> None:
    def warned(*rows: dict[str, str]) -> list[str]:
        return list(push.licence_warnings({"license": "other", "unic_ds": {"teachers": [*rows]}}))

    assert warned({"name": "a", "licence": "mit", "terms": "permissive"}) == []
    (line,) = warned({"name": "a", "licence": "", "terms": "permissive"})
    assert "the licence of a is not known" in line
    (line,) = warned({"name": "a", "licence": "mit", "terms": "non-commercial"})
    assert "the licence of a is non-commercial" in line
    (line,) = warned({"name": "a\x1b[2J", "licence": "gemma"})
    assert "is custom" in line and "\x1b" not in line
    with pytest.raises(ValueError, match=r"licence of a is unknown, but .* no license"):
        list(push.licence_warnings({"unic_ds": {"teachers": [{"name": "a"}]}}))
    own = {"license": "other", "unic_ds": {"licence": "CC BY-NC-SA 4.0", "teachers": []}}
    (line,) = push.licence_warnings(own)
    assert line == (
        "the licence of these weights is non-commercial; it binds whoever uses this model"
    )
    with pytest.raises(ValueError, match="licence of these weights is non-commercial, but"):
        list(push.licence_warnings(own | {"license": None}))
    twice = ({"name": "a", "licence": "gemma"}, {"name": "a", "licence": "mit"})
    assert "the licence of a is custom; it may bind" in warned(*twice)[0]
    assert "names no teachers" in next(push.licence_warnings({}))
    assert "names no teachers" in next(push.licence_warnings({"unic_ds": {"teachers": "x"}}))
