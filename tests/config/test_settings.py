"""Settings from strangers: the smallest file of each kind ends in one sentence, soon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unic_ds import train
from unic_ds.config import Config, Data, Eval, Optim, Run, Standardise, ds_config, recipes
from unic_ds.config.overrides import override_all, to_dict
from unic_ds.files.documents import read_yaml
from unic_ds.process import entry_point

ROOT = Path(__file__).resolve().parents[2]
ZERO2 = str(ROOT / "ds_configs" / "zero2.json")
LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"

YAML = [
    (LAUGHS, "an alias, *a, which settings may not have, in line 2"),
    ("a: &a [*a]", "an alias, *a"),
    ("a: !!python/object/apply:os.system [x]", "a tag, tag:yaml.org,2002:python/object"),
    ("a: !!binary aGk=", "a tag"),
    ("[" * 10_000, "more than 20 levels"),
    ("- " * 10_000, "more than 20 levels"),
    ("[" + "1," * 20_000 + "]", "10,000 values"),
    ("seed: " + "9" * 5000, "a number of 5,000 characters"),
    ("seed: 0x" + "f" * 5000, "a number of 5,002 characters"),
    ("seed: 1\nseed: 2", "the key 'seed' a second time in line 2"),
    ("optim: {lr: 1}\noptim.lr: 2", "optim.lr is given twice"),
    ("? [a]\n: b", "a key that is not plain text"),
    ("a: 1\n---\nb: 2", "another document"),
    ("a: [", "cannot be read as a run's settings"),
    ("\x00", "unacceptable character"),
    (b"\xff\xfe", "is not UTF-8 text"),
    (b"x" * 2_000_000, "has 2000000 bytes, more than 1048576"),
    ("- a", "holds no settings"),
    ("", "holds no settings"),
    ("teachers: [a]", "teachers must be a mapping from names to settings"),
    ("teachers: timm:x", "got 'timm:x'"),
    ("teachers:", "got nothing"),
    ("teachers: 3", "got 3"),
    ("teachers: {a: timm:x}", "teachers.a must be a mapping of settings with a source"),
    ("teachers: {a: null}", "teachers.a must be a mapping"),
    ("teachers: {a: [1]}", "teachers.a must be a mapping of settings with a source, got a list"),
    ("teachers: {a: {}}", "teachers.a is an empty mapping"),
    ("teachers: {1: {source: 'timm:x'}}", "a teacher's name must be"),
    ('teachers: {"a\\nb": {source: "timm:x"}}', "got 'a\\nb'"),
    ("teachers: {a: {source: 'timm:x', sise: 3}}", "unknown option --teachers.a.sise"),
    ("teachers: {a: {source: 'timm:x', size: {b: 1}}}", "--teachers.a.size has no parts"),
    ("optim: {lrr: 1}", "unknown option --optim.lrr (did you mean optim.lr?)"),
    ("optim: 3", "--optim is a section"),
    ("seed: {}", "seed is an empty mapping"),
    ("seed:", "seed has no value"),
    ("seed: .nan", "--seed must be a whole number, got 'nan'"),
    ("optim: {lr: .inf}", "--optim.lr must be finite"),
    ("student: {mean: [1, [2], 3]}", "student.mean must be a value or a list of values"),
    ("1: 2", "unknown option --1"),
    ('"a\\n\\e[2J": 2', "unknown option --a\\n\\x1b[2J"),
    ('data: {train: "a\\0b"}', "--data.train must be text without a zero byte"),
    ("recipe: ..", "recipe must be a name of letters"),
    ("recipe: -rf", "recipe must be a name of letters"),
    ("recipe: $(x)", "recipe must be a name of letters"),
    ('recipe: "a\\nunic_ds: error: b"', "got 'a\\nunic_ds: error: b'"),
    ("stages: '" + "optim.lr=1;" * 10_000 + "'", "stages must be at most 100, got 10001"),
    ("seed: 18446744073709551616", "seed must be at most 18,446,744,073,709,551,615"),
    ("optim: {batch_size: 1000000000000}", "optim.batch_size must be at most"),
]


@pytest.mark.parametrize(("text", "sentence"), YAML, ids=range(len(YAML)))
def test_a_run_config_that_cannot_be_is_one_sentence(text, sentence, tmp_path, capsys):
    """No traceback, no text of the file that breaks the line, no folder."""
    file = tmp_path / "x.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    words = ["--ds_config", ZERO2, "--recipe", str(file), "--out", str(tmp_path / "run")]
    assert entry_point.run(train.main, words) == 2
    said = capsys.readouterr().err
    assert said.startswith("unic_ds: error: ") and sentence in said
    assert said.count("\n") == 1 and said[:-1].isprintable() and len(said) < 1500
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [0, 4, 20, 44])
def test_the_command_itself_says_the_same(number, tmp_path):
    text, sentence = YAML[number]
    (tmp_path / "x.yaml").write_text(str(text))
    command = [sys.executable, str(ROOT / "unic_ds" / "train.py"), "--ds_config", ZERO2]
    done = subprocess.run(
        [*command, "--recipe", "x.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert sentence in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]


SMALL = '{"train_micro_batch_size_per_gpu": 1, '
ZERO3 = SMALL + '"zero_optimization": {"stage": 3, '
JSON = [
    (SMALL + '"a": NaN}', "NaN is no number"),
    (SMALL + '"a": 1e999}', "the number 1e999 is too large"),
    (SMALL + '"a": ' + "9" * 5000 + "}", "a number of 5,000 characters"),
    ("[" * 100_000, "more than 20 levels"),
    ("[" * 100 + "]" * 100, "more than 20 levels"),
    (SMALL + '"bf16": {"enabled": true, "enabled": false}}', "the key 'enabled' is given twice"),
    (SMALL + '"bf16": {"enabled": "yes"}}', "'bf16.enabled' must be true or false, got 'yes'"),
    ('{"train_micro_batch_size_per_gpu": 1000000000000}', "must be a whole number from 0 to"),
    (SMALL + '"zero_optimization": {"stage": true}}', "must be a whole number"),
    (SMALL + '"zero_optimization": {"stage": [2]}}', "the ZeRO stage must be 0 to 3"),
    (ZERO3 + '"reduce_bucket_size": "auto"}}', "reduce_bucket_size' must be a whole number"),
    (ZERO3 + '"reduce_bucket_size": 1e15}}', "reduce_bucket_size' must be a whole number"),
    (ZERO3 + '"overlapp_comm": true}}', "(did you mean overlap_comm?)"),
    (
        ZERO3 + '"leaf_module": {"classes": ["os.x"]}}}',
        "it would import classes by name",
    ),
    (
        ZERO3 + '"offload_param": {"device": "nvme", "nvme_path": "%s"}}}',
        "of an empty or new folder",
    ),
    (SMALL + '"compile": {"backend": "os.system"}}', "'compile' is not allowed; use --run.compile"),
    (SMALL + '"wandb": {"enabled": true, "team": "x"}}', "'wandb' is not allowed"),
    (SMALL + '"tensorboard": {"enabled": true, "output_path": "/"}}', "is not allowed"),
    (SMALL + '"flops_profiler": {"enabled": true, "output_file": "/x"}}', "must be null"),
    (SMALL + '"autotuning": {"enabled": true}}', "'autotuning' is not allowed"),
    (SMALL + '"a\\n\\u001b[2J": 1}', "'a\\n\\x1b[2J' is not allowed"),
]


@pytest.mark.parametrize(("text", "sentence"), JSON, ids=range(len(JSON)))
def test_a_ds_config_that_could_do_harm_is_one_sentence(text, sentence, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(text.replace("%s", str(tmp_path)))
    with pytest.raises(ValueError) as caught:
        ds_config.read(str(file))
    said = str(caught.value)
    assert sentence in said and said.isprintable() and len(said) < 500


def test_a_ds_config_of_flags_and_numbers_is_taken(tmp_path):
    file = tmp_path / "ds.json"
    offload = {"device": "nvme", "nvme_path": str(tmp_path / "swap")}
    settings = {
        "_comment": "ours",
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 5e8, "offload_param": offload},
        "bf16": {"enabled": True},
        "wall_clock_breakdown": True,
        "activation_checkpointing": {"partition_activations": True, "number_checkpoints": None},
        "flops_profiler": {"enabled": True, "profile_step": 1, "output_file": None},
        "wandb": {"enabled": False},
    }
    file.write_text(json.dumps(settings))
    assert ds_config.read(str(file)) == settings


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_what_is_no_file_is_not_read(kind, tmp_path):
    file = tmp_path / "x.yaml"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else file.name)
    with pytest.raises(ValueError, match=r"is not a regular file|Too many levels"):
        recipes.read(file)
    with pytest.raises(ValueError, match=r"is not a regular file|is no file"):
        ds_config.read(str(file))


def test_a_config_names_no_folder_and_long_names_are_sentences(tmp_path):
    """A run folder is called after the settings' file, never after what the file says."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    cfg = override_all(Config(recipe="theirs"), {"teachers": "timm:vit_tiny_patch16_224"})
    plain = to_dict(cfg) | {"data": to_dict(Data(train="images"))}
    (tmp_path / "mine.yaml").write_text(json.dumps(plain))
    script = (
        "import sys; from unic_ds import cli; from unic_ds.config import job\n"
        "for words in sys.argv[1:]:\n"
        "    options = dict(pair.split('=') for pair in words.split('|'))\n"
        "    try: print(job.resolve(options).out)\n"
        "    except ValueError as error: print(error)\n"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(plain))
    (tmp_path / "a b.yaml").write_text(json.dumps(plain))
    given = (
        "recipe=mine.yaml",
        "recipe=run/config.yaml",
        "recipe=a b.yaml",
        "recipe=a b.yaml|out=there",
        "recipe=mine.yaml|out=",
        f"recipe=mine.yaml|out={'x' * 300}",
        f"recipe=mine.yaml|data.train={'x' * 300}",
        f"recipe=mine.yaml|student.init={'x' * 300}",
        "recipe=mine.yaml|student.init=~nobody_of_this_name/x",
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *(f"ds_config={ZERO2}|{words}" for words in given)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    out = done.stdout.splitlines()
    assert len(out) == len(given), done.stderr
    assert out[:2] == ["runs/mine", "runs/run"]
    assert out[2] == "--recipe 'a b.yaml' gives no name for a run folder; give --out"
    assert out[3] == "there"
    assert "--out is empty" in out[4] and "File name too long" in out[5]
    assert "does not exist" in out[6]
    assert "is no model folder" in out[7] and "is no model folder" in out[8]


def test_keys_are_text_and_dates_too(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("on: on\n1: 2024-99-99\n~: =\n")
    assert read_yaml(file) == {"on": True, "1": "2024-99-99", "~": "="}


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        (Optim, "batch_size", 10**12),
        (Optim, "steps", 10**7),
        (Optim, "epochs", 1e18),
        (Optim, "lr_batch", 2**64),
        (Data, "prefetch", 10**9),
        (Data, "threads", 10**9),
        (Data, "readers", 10**9),
        (Data, "window", 10**9),
        (Data, "blur_max", 1e9),
        (Standardise, "fit_steps", 10**9),
        (Eval, "max_val", 2**64),
        (Run, "keep_last", 10**12),
        (Run, "save_every", 2**64),
        (Run, "hang_timeout", 1e18),
        (Config, "seed", 2**64),
    ],
)
def test_every_number_has_a_largest_value(section, field, value):
    with pytest.raises(ValueError, match=rf"{field} must be at most [\d,.]+, got"):
        section(**{field: value})


def test_a_run_has_no_more_steps_than_names_of_checkpoints():
    with pytest.raises(ValueError, match="makes 1,953,125,000 steps, more than 9,999,999"):
        Optim(epochs=1e6).step_count(1_000_000)
    assert Optim(steps=9_999_999).step_count(1) == 9_999_999


def test_deepspeed_s_settings_have_its_own_defaults():
    """Those of DeepSpeed's model of zero_optimization, in every field that has its name."""
    zero_config = pytest.importorskip("deepspeed.runtime.zero.config")
    made = ds_config.DeepSpeedSettings.parse({"train_micro_batch_size_per_gpu": 3})
    theirs = zero_config.DeepSpeedZeroConfig()
    names = (*ds_config.SIZES, *ds_config.FLAGS, "stage")
    assert {n: getattr(made, n) for n in names} == {n: getattr(theirs, n) for n in names}
    assert (made.micro_batch, made.accumulation, made.bf16) == (3, 1, False)
    for stage in (1, 3):
        zero = {"zero_optimization": {"stage": stage}}
        parsed = ds_config.DeepSpeedSettings.parse(made.raw | zero)
        assert parsed.overlap_comm == zero_config.DeepSpeedZeroConfig(stage=stage).overlap_comm


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_a_shipped_file_is_merged_with_the_run(name):
    file = ds_config.read(str(ROOT / "ds_configs" / f"{name}.json"))
    cfg = Config(optim=Optim(batch_size=4096, clip=1.0))
    merged = ds_config.merge(file, cfg, 16)
    assert (merged.micro_batch, merged.accumulation, merged.bf16) == (32, 8, True)
    assert (merged.raw["train_batch_size"], merged.raw["gradient_clipping"]) == (4096, 1.0)
    assert (merged.stage, merged.communication_dtype) == (int(name[4]), "fp32")
    assert merged.grad_accum_dtype == (None if name == "zero1" else "fp32")
    assert merged.offload_optimizer.on == merged.offload_param.on == ("offload" in name)
    assert (merged.reduce_bucket_size, merged.overlap_comm) == (100_000_000, True)
    assert json.loads(json.dumps(merged.raw)) == merged.raw and merged.raw.items() >= file.items()
