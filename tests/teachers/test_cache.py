"""Stored teacher features: the same curve as online teachers, whole after kill -9, refused if not
theirs.
"""

import dataclasses
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from runs import (
    AS_SHIPPED,
    SMALL,
    TEACHERS,
    alone,
    curve,
    kill_group,
    ranks_and_port,
    run,
    start,
    verb,
)
from safetensors.torch import load_file, save_file

from unic_ds import config, demo
from unic_ds.teachers import cache
from unic_ds.teachers.teacher_set import TeacherSet
from unic_ds.tokens import Tokens

IMAGES = 40
COMMON = {k: v for k, v in SMALL.items() if k.startswith(("student.size", "teachers."))}
COMMON |= dict.fromkeys(TEACHERS, "bf16")


@pytest.fixture(scope="module")
def images(demonstration, tmp_path_factory):
    """A few of the demonstration's photographs, in two class folders."""
    folder = tmp_path_factory.mktemp("few") / "images"
    classes = sorted(path for path in (demo.root() / "images").iterdir() if path.is_dir())
    for place in classes[:2]:
        (folder / place.name).mkdir(parents=True)
        for path in sorted(place.iterdir())[: IMAGES // 2]:
            (folder / place.name / path.name).symlink_to(path)
    return folder


def store(images, out, *more, ranks=1):
    """The command line of `unic-ds cache`."""
    pairs = COMMON | {"data.train": str(images), "data.val_share": "0"}
    words = [str(out), *(w for k, v in pairs.items() for w in (f"--{k}", v)), *more]
    if ranks == 1:
        return verb("cache", *words)
    port = ranks_and_port(ranks)[3]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [*launch, "--master_port", port, "-m", "unic_ds.cli", "cache", *words]


@pytest.fixture(scope="module")
def stored(images, tmp_path_factory):
    """Two views of both teachers in bf16, written by two ranks; and what they printed."""
    out = tmp_path_factory.mktemp("cache") / "features"
    return out, run(store(images, out, "--views", "2", ranks=2))


def train(images, out, **more):
    """A run of two epochs of five steps, and two steps."""
    settings = out.with_suffix(".json")
    settings.write_text('{"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}}')
    fixed = {
        "data__train": images,
        "data__val_share": 0,
        "eval__on": "false",
        "ds_config": settings,
    }
    fixed |= AS_SHIPPED | {"precision": "fp32", "ladder__rungs": "11"}
    steps = {"optim__batch_size": 8, "optim__steps": 12, "optim__lr": 1e-3}
    return alone(out, **(fixed | steps | more))


def test_training_on_stored_features_is_training_with_the_teachers(images, stored, tmp_path):
    folder, printed = stored
    assert f"{IMAGES} images x 2 views x 2 teachers in bf16" in printed
    run(train(images, tmp_path / "online"))
    run(train(images, tmp_path / "cached", teachers__cache=folder))
    online, cached = curve(tmp_path / "online"), curve(tmp_path / "cached")
    for step in range(1, 11):  # two epochs of five: every view once, by the draws of its epoch
        for key in ("loss", "dinov2/patch_cosine", "effnet/cls_smooth_l1"):
            assert cached[step][key] == pytest.approx(online[step][key], rel=5e-3), (step, key)
    assert cached[1]["loss"] == pytest.approx(online[1]["loss"], rel=1e-4)
    # the third epoch shows the first view again, where the online run draws anew
    assert abs(cached[11]["loss"] / online[11]["loss"] - 1) > 1e-3
    facts = [json.loads((tmp_path / r / "teachers.json").read_text()) for r in ("online", "cached")]
    assert [row["sha256"] for row in facts[0].values()] == [r["sha256"] for r in facts[1].values()]


@pytest.mark.slow
def test_some_stored_and_some_online(images, stored, tmp_path):
    """Under lazy dropping, which reads all that is stored and computes a part of the rest.

    Maps of both are resized to the grid that each step draws.
    """
    folder, _ = stored
    part = tmp_path / "part"
    part.mkdir()
    manifest = json.loads((folder / cache.MANIFEST).read_text())
    del manifest["teachers"]["effnet"]
    (part / cache.MANIFEST).write_text(json.dumps(manifest))
    (part / "dinov2").symlink_to(folder / "dinov2")
    lazy = {"drop__lazy": "true", "drop__full_every": 4, "run__stop_at": 6}
    lazy |= {"data__sizes": "32,48"}
    said = run(train(images, tmp_path / "all", teachers__cache=folder, **lazy))
    assert "from the feature cache, so of images for 32 px in all steps: " in said
    run(train(images, tmp_path / "some", teachers__cache=part, **lazy))
    whole, mixed = curve(tmp_path / "all"), curve(tmp_path / "some")
    for step in range(1, 7):
        assert mixed[step]["loss"] == pytest.approx(whole[step]["loss"], rel=5e-3)


@pytest.mark.slow
def test_killed_and_run_again_it_is_the_same(images, stored, tmp_path):
    folder, _ = stored
    out = tmp_path / "features"
    process = start(store(images, out, "--views", "2", "--batch", "2"))
    deadline = time.monotonic() + 120
    while not any(out.glob("*/*.bin")) and time.monotonic() < deadline:
        time.sleep(0.02)
    kill_group(process)
    process.wait()
    assert not json.loads((out / cache.MANIFEST).read_text())["whole"]
    said = run(train(images, tmp_path / "run", teachers__cache=out), code=2)
    assert "is not finished; run `unic-ds cache" in said
    run(store(images, out, "--views", "2"))
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.bin"))
    assert len(names) == 4 == len(list(out.rglob("*.bin")))
    for name in names:
        ours, theirs = (bf16(place / name) for place in (out, folder))
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)  # batches differ


def bf16(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(path, np.int16)).view(torch.bfloat16).float()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"data__crop_min": 0.2}, "was made with data.crop_min '0.95', this run has '0.2'"),
        pytest.param(
            {"student__size": 64, "teachers__dinov2__size": 56},
            "was made with student.size 32",
            marks=pytest.mark.slow,
        ),
        ({"teachers__dinov2__precision": "fp32"}, "made with teachers.dinov2.precision"),
    ],
)
def test_another_run_s_features_are_refused(images, stored, tmp_path, more, says):
    printed = run(train(images, tmp_path / "run", teachers__cache=stored[0], **more), code=2)
    assert says in printed
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_written_is_said_before(images, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    printed = run(store(images, tmp_path / "full"), code=2)
    assert "holds something else; choose another folder" in printed
    printed = run(store(images, tmp_path / "huge", "--views", "100000000"), code=2)
    assert "GB of features do not fit" in printed and not (tmp_path / "huge").exists()


def layout(folder: Path, dtype: str, views: int = 2) -> cache.Layout:
    return cache.Layout(
        folder, samples=7, views=views, tokens=3, widths={"a": 6}, dtype=dtype, chunk=4
    )


def tokens_of(count: int, seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    scale_C = torch.tensor([1e-3, 1, 5, 100, 0, 2])
    x_BNC = torch.randn(count, 4, 6, generator=generator) * scale_C
    return Tokens(3 * x_BNC[:, 0], x_BNC[:, 1:])


def read(
    made: cache.Layout,
    index_B: list[int],
    view_B: list[int],
    *,
    threads: int = 1,
    pin: bool = False,
) -> Tokens:
    """Tokens of teacher `a`, read by so many threads."""
    with ThreadPoolExecutor(threads) as readers:
        return made.read("a", np.array(index_B), np.array(view_B), readers, pin=pin)()


@pytest.mark.parametrize("threads", [1, 16])
@pytest.mark.parametrize(("dtype", "share"), [("bf16", 2**-8), ("int8", 1 / 127)])
def test_what_is_read_is_what_was_written(tmp_path, dtype, share, threads):
    made, known = layout(tmp_path, dtype), {}
    for number, (view, span) in enumerate(made.missing()):
        assert not made.written(view, span)
        known[view, span[0] // 4] = tokens = tokens_of(len(span), number)
        halves = [Tokens(*(x[rows] for x in tokens)) for rows in (slice(0, 2), slice(2, None))]
        made.write("a", view, span, halves)
        assert made.written(view, span)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.bin")) == made.total()
    index_B, view_B = [6, 0, 5, 3], [1, 0, 0, 1]
    found = read(made, index_B, view_B, threads=threads)
    for b, (index, view) in enumerate(zip(index_B, view_B, strict=True)):
        chunk = known[view, index // 4]
        for kind, (whole, one) in enumerate(zip(chunk, found, strict=True)):
            # int8: half a step of the chunk's largest, and bf16's rounding after it
            largest_C = whole.abs().flatten(0, -2).amax(0)
            gap_C = (one[b].float() - whole[index % 4]).abs().reshape(-1, 6).amax(0)
            assert (gap_C <= largest_C * share).all(), (kind, gap_C / largest_C)


def test_what_is_not_finite_stays_so(tmp_path):
    made, tokens = replace(layout(tmp_path, "int8", 1), samples=4), tokens_of(4, 0)
    tokens.patch_BNC[1, 2, 3] = torch.inf
    made.write("a", 0, range(4), [tokens])
    found = read(made, [0, 1, 2, 3], [0, 0, 0, 0])
    assert not found.patch_BNC[1, 2, 3].isfinite()


def test_a_file_that_was_cut_off_is_told(tmp_path):
    made = layout(tmp_path, "bf16")
    made.write("a", 0, range(4), [tokens_of(4, 0)])
    path = made.path("a", 0, 0)
    path.write_bytes(path.read_bytes()[:-5])
    assert not made.written(0, range(4))
    with pytest.raises(RuntimeError, match=r"000000\.bin' was cut off; make the cache again"):
        read(made, [1, 0, 2], [0, 0, 0], threads=3)
    path.unlink()
    with pytest.raises(RuntimeError, match=r"cannot be read \(No such file or directory\); bring"):
        read(made, [1], [0])


class Meeting(cache.Layout):
    """A layout whose files are read only while three others are being read."""

    barrier = threading.Barrier(4, timeout=30)

    def fill(self, *args):
        self.barrier.wait()
        super().fill(*args)


def test_several_files_are_read_at_once(tmp_path):
    plain, index_B, view_B = layout(tmp_path, "bf16"), [6, 0, 5, 3, 4, 1, 2, 0], [1, 0] * 4
    for number, (view, span) in enumerate(plain.missing()):
        plain.write("a", view, span, [tokens_of(len(span), number)])
    fields = {f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)}
    found = read(Meeting(**fields), index_B, view_B, threads=4)
    for ours, theirs in zip(found, read(plain, index_B, view_B), strict=True):
        assert torch.equal(ours, theirs)


DRAWS = {"grid": 2, "images": "those"}


def made(folder: Path, **changed) -> dict:
    """A finished cache of 7 samples under 2 views, and its manifest with some entries changed."""
    shape = replace(layout(folder, "bf16"), tokens=4)
    for view, span in shape.missing():
        tokens = tokens_of(len(span), 0)
        more = torch.cat([tokens.patch_BNC, tokens.patch_BNC[:, :1]], 1)
        shape.write("a", view, span, [Tokens(tokens.cls_BC, more)])
    row = {"source": "python:x:y", "sha256": "f" * 64, "width": 6, "size": 32}
    row |= {f"teachers.a.{key}": value for key, value in OWN.items()}
    numbers = {"samples": 7, "views": 2, "tokens": 4, "chunk": 4, "seed": 0, "format": 1}
    manifest = numbers | {"whole": True, "dtype": "bf16", "draws": DRAWS, "teachers": {"a": row}}
    manifest = {k: v for k, v in (manifest | changed).items() if v is not None}
    (folder / cache.MANIFEST).write_text(json.dumps(manifest))
    return manifest


OWN = {key: json.dumps(value) for key, value in {"size": 0, "patch": 0, "mean": []}.items()}
OWN |= {"std": "[]", "block": '"output"', "precision": '"bf16"'}
ROW = config.Teacher(name="a", source="python:x:y")


def opened(folder: Path, row: config.Teacher = ROW) -> cache.FeatureCache:
    return cache.FeatureCache(str(folder), (row,), DRAWS, samples=7)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_stored_tokens_arrive_though_the_device_lags(tmp_path, device):
    """Two seconds behind the host, which meanwhile reads into memory that it has freed."""
    made(tmp_path)
    cached, gpu = opened(tmp_path), device != "cpu"
    teachers = TeacherSet(
        (ROW,), grid=2, standardise=config.Standardise(), device=torch.device(device), cache=cached
    )
    draws = [np.random.default_rng(k).integers(0, (7, 2), (6, 2)).T for k in range(12)]
    found = []
    with ThreadPoolExecutor(4) as readers:
        if gpu:  # a new pinned block may wait for the device: have as many as will be needed
            blocks = [cached.read(*draw, readers, pin=True)() for draw in draws]
            del blocks
            torch.cuda._sleep(int(4e9))
        for index_B, view_B in draws:
            stored = cached.read(index_B, view_B, readers, pin=gpu)()
            assert all(x.is_pinned() == gpu and x.is_contiguous() for x in stored["a"])
            found.append(teachers.features({}, stored)["a"])
            del stored
    if gpu:
        assert not torch.cuda.current_stream().query()  # the host has not waited for a copy
    for tokens, (index_B, view_B) in zip(found, draws, strict=True):
        for x, want in zip(tokens, read(cached.layout, index_B, view_B), strict=True):
            assert torch.equal(x.cpu(), want)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        *(({key: 2**62}, f"{key} must be an integer of 1 to") for key in ("samples", "views")),
        *(({key: -1}, f"{key} must be an integer of 1 to") for key in ("tokens", "chunk")),
        ({"chunk": 0}, "chunk must be an integer"),
        ({"views": 2.5}, "views must be an integer"),
        ({"samples": "7"}, "samples must be an integer"),
        ({"samples": True}, "samples must be an integer"),
        ({"seed": None}, "seed must be an integer"),
        ({"dtype": "float4"}, "dtype must be one of bf16, int8"),
        ({"dtype": None}, "dtype must be a str"),
        ({"whole": "yes"}, "whole must be a bool"),
        ({"draws": [1]}, "draws must be a dict"),
        ({"teachers": ["a"]}, "teachers must be a dict"),
        ({"teachers": {"../x": {"width": 6}}}, r"\.\./x is no teacher's name"),
        ({"teachers": {"a\nb": {}}}, r"a\\nb is no teacher's name"),
        ({"teachers": {"a": 3}}, "a must have a width and a size"),
        ({"teachers": {"a": {"width": 2**40}}}, "a must have a width and a size"),
        ({"teachers": {"a": {"width": 6, "size": 32}}}, "a must have source and sha256"),
        ({"format": 2}, "format must be 1"),
        ({"samples": 6}, "was made with samples 6, this run has 7"),
        ({"tokens": 9}, "was made with tokens 9, this run has 4"),
        ({"views": 1000}, "view_002_chunk_000000.bin' is missing"),
        ({"chunk": 7}, "view_000_chunk_000000.bin' is missing, no regular file or of another"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path, changed, says):
    made(tmp_path, **changed)
    with pytest.raises(ValueError, match=says) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value)


def test_manifests_that_are_no_json_are_refused(tmp_path):
    made(tmp_path)
    assert opened(tmp_path).views == 2
    file = tmp_path / cache.MANIFEST
    for text in ("[" * 10**5, '{"samples": ' + "9" * 5000 + "}", "\xff", "[]", '{"format": 1'):
        file.write_text(text, "latin-1")
        with pytest.raises(ValueError, match="is no feature cache's manifest of this version"):
            opened(tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="is not a regular file"):
        opened(tmp_path)


@pytest.mark.parametrize("what", ["link", "pipe", "folder", "gone", "longer"])
def test_what_is_no_file_of_the_cache_is_told_before_training(tmp_path, what):
    made(tmp_path / "c")
    path = tmp_path / "c" / "a" / "view_001_chunk_000001.bin"
    path.rename(tmp_path / "outside")
    if what == "link":
        path.symlink_to(tmp_path / "outside")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "longer":
        path.write_bytes((tmp_path / "outside").read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"view_001_chunk_000001\.bin' is missing, no regular"):
        opened(tmp_path / "c")


def test_a_cache_goes_with_its_teacher_s_weights_not_with_their_file(tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "vit.safetensors"
    save_file(timm.create_model("test_vit").state_dict(), file, {"licence": "MIT"})
    row = replace(ROW, source=f"file:{file}#arch=test_vit")
    facts = {"width": 6, "size": 32, "cls": "token", "source": row.source} | cache.own_facts(row)
    folder = tmp_path / "c"
    made(folder, teachers={"a": facts})
    old = {key: value for key, value in facts.items() if key != "content"}
    assert opened(folder, row).facts["a"] == facts
    made(folder, teachers={"a": old})  # of an older version
    assert opened(folder, row).facts["a"] == facts
    weights = load_file(file)
    save_file(weights, file, {"licence": "BSD"})
    with pytest.raises(ValueError, match="was made with sha256"):  # by which alone it is known
        opened(folder, row)
    made(folder, teachers={"a": facts})
    assert opened(folder, row).facts["a"]["content"] == facts["content"]
    save_file(weights | {"norm.bias": weights["norm.bias"] + 1}, file)
    with pytest.raises(ValueError, match="was made with sha256"):
        opened(folder, row)
