"""The command line from outside: real processes, exit codes, sentences and speed."""

import os
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pictures
import pytest

from unic_ds import cli
from unic_ds import train as entry_train
from unic_ds.config import args as entry
from unic_ds.config import overrides
from unic_ds.process import entry_point

ROOT = Path(__file__).resolve().parents[2]
EMPTY = "EMPTY"
ZERO2 = str(ROOT / "ds_configs" / "zero2.json")


def command(*args, cwd=ROOT, **env):
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def train(*args, **kwargs):
    return command(str(ROOT / "unic_ds" / "train.py"), *args, **kwargs)


def test_fire_hands_over_raw_strings():
    words, options = entry.parse(
        [
            "a",
            "--x",
            "runs#2",
            "--y=007",
            "--z",
            "a,b",
            "--n",
            "None",
            "--f",
            "-1e-3",
            "--on",
            "--my-key",
            "[1]",
        ]
    )
    assert words == ["a"]
    assert options == {
        "x": "runs#2",
        "y": "007",
        "z": "a,b",
        "n": "None",
        "f": "-1e-3",
        "on": "True",
        "my_key": "[1]",
    }


@pytest.mark.parametrize(
    "args",
    [
        ("unic_ds/train.py", "--help"),
        ("-m", "unic_ds.cli", "--help"),
        ("-m", "unic_ds.cli", "plan", "--help"),
    ],
)
def test_help_answers_at_once_and_imports_nothing_heavy(args, tmp_path):
    # As after a first call: `cached` has byte code, whether this process may write it or not.
    cached = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    seen = command("-X", "importtime", *args, **cached)
    modules = {line.rpartition("|")[2].strip() for line in seen.stderr.splitlines()}
    assert "fire" in modules and not modules & {"torch", "numpy", "deepspeed", "timm", "rich"}
    wall, cpu, parser = [], [], []
    for _ in range(3):
        done = timed(wall, cpu, *args, **cached)
        timed([], parser, "-c", "import fire", **cached)
    assert done.returncode == 0
    assert "usage: " in done.stdout
    # On a slow machine, or one that others keep busy, what the parser of options takes is the unit.
    assert min(wall) < 0.5 or min(cpu) < 4 * min(parser), (wall, cpu, parser)


def timed(wall, cpu, *args, **env):
    """Run a command, and append the seconds that it took and those of its CPU time."""
    start, before = time.monotonic(), os.times()
    done = command(*args, **env)
    used = os.times()
    wall.append(time.monotonic() - start)
    cpu.append(used.children_user - before.children_user)
    cpu[-1] += used.children_system - before.children_system
    return done


def help_of(*words, capsys, monkeypatch, columns="100"):
    monkeypatch.setenv("COLUMNS", columns)
    assert entry_point.run(cli.dispatch, [*words, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", cli.VERBS)
def test_help_explains_every_option_and_legal_word(name, capsys, monkeypatch):
    text = help_of(*name.split(), capsys=capsys, monkeypatch=monkeypatch)
    verb = cli.VERBS[name].VERB
    explained = {"--help", *re.findall(r"^  (--\S+|\S+) .*\S", text, re.M)}
    assert {f"--{f.name}" for f in fields(verb.options)} <= explained
    assert set(verb.arguments) <= explained
    if verb.takes == "nothing":
        assert "science" not in text
        return
    options = {f"--{option}" for option in overrides.option_names()} - {"--recipe"}
    assert options - {"--teachers.NAME.name"} <= set(re.findall(r"^  (--\S+)", text, re.M))
    assert "[512]" in text and "replicate|shard|offload" in text and "dropping|none|fixed" in text
    assert (
        text.index("\nscience: optim:") < text.index("\nmachinery:") < text.index("--run.compile")
    )


def test_train_py_and_the_verb_print_the_same_help(capsys, monkeypatch):
    text = help_of("train", capsys=capsys, monkeypatch=monkeypatch)
    assert entry_point.run(entry_train.main, ["--help"]) == 0
    assert capsys.readouterr().out == text
    assert "--ds_config" in text and "--resume" in text


@pytest.mark.parametrize("columns", ["60", "80", "100"])
def test_only_verbs_stand_in_the_column_of_verbs(columns, capsys, monkeypatch):
    text = help_of(capsys=capsys, monkeypatch=monkeypatch, columns=columns)
    rows = text.partition("verbs:\n")[2].partition("\n\n")[0].splitlines()
    begun = [row[2:] for row in rows if row[2] != " "]
    assert len(begun) == len(cli.VERBS)
    assert all(row.startswith(name) for row, name in zip(begun, cli.VERBS, strict=True))
    assert all(len(row) <= int(columns) for row in rows)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--ds_config", ZERO2, "--stpes", "3"], "unknown option --stpes"),
        (["--ds_config", ZERO2, "--optim.setps", "3"], "did you mean optim.steps?"),
        (["--ds_confg", ZERO2], "--ds_config is needed (did you mean ds_confg?)"),
        (["--ds_config", "nowhere.json"], "--ds_config 'nowhere.json' is no file"),
        (
            ["--ds_config", ZERO2, "--recipe", "unic_x"],
            "unknown --recipe 'unic_x' (did you mean unic_l?)",
        ),
        (["--ds_config", ZERO2, "stray"], "'stray' belongs to no option"),
        (["--ds_config", ZERO2, "--", "--interactive"], "'--' is no option"),
        (["--ds_config", ZERO2, "--seed", "1", "--seed=2"], "--seed is given twice"),
        (["--ds_config", ZERO2, "--out", "/proc/run"], "--out '/proc/run' cannot be written"),
        (["--ds_config", ZERO2, "--seed", "007x"], "--seed must be a whole number, got '007x'"),
        (["--ds_config", ZERO2, "--recipe", "unic_b"], "give --data.train DIR"),
        (
            ["--ds_config", ZERO2, "--recipe", "unic_b", "--data.train", "no#dir"],
            "'no#dir' does not exist; give a folder of images",
        ),
        (
            ["--ds_config", ZERO2, "--recipe", "unic_l", "--data.train", EMPTY],
            "is empty; give a folder of images",
        ),
        (
            ["--ds_config", ZERO2, "--recipe", "unic_b", "--data.train", str(ROOT / "tests")],
            "teacher 'ibot' has no weights at 'weights/ibot_vitb16.safetensors'",
        ),
        (
            ["--ds_config", ZERO2, "--recipe", "unic_b", "--data.train", "None"],
            "'None' does not exist",
        ),
        (
            ["--ds_config", ZERO2, "--recipe", "unic_b", "--data.train", f"{ROOT}/docs,nowhere=2"],
            "--data.train 'nowhere' does not exist",
        ),
        (
            ["--ds_config", ZERO2, "--recipe", "unic_b", "--data.train", f"{ROOT}/docs=-1,x"],
            "is -1; give one above 0",
        ),
        (
            ["--ds_config", ZERO2, "--recipe", "unic_b", "--data.train", str(ROOT / "setup.py")],
            "is no source of images",
        ),
        (
            ["--ds_config", ZERO2, "--recipe", "unic_b", "--teachers", "timmm:x"],
            "kind must be one of timm:, open_clip:",
        ),
        (["--ds_config", ZERO2, "--out", __file__], "is a file; give a folder"),
        (["--ds_config", ZERO2, "--resume", "yes"], "neither auto, never nor a run folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(args, sentence, tmp_path):
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    args = [str(tmp_path / "empty") if a is EMPTY else a for a in args]
    if "--recipe" not in args:
        args = [*args, "--recipe", "unic_l", "--data.train", str(images)]
    done = train(*args)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr
    assert done.stderr.startswith("unic_ds: error: ")
    assert done.stderr.count("\n") == 1
    assert not (ROOT / "runs" / "unic_l").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            '{"train_micro_batch_size_per_gpu": 1, "optimizer": {}}',
            "sets 'optimizer', which an option of the run decides",
        ),
        ('{"train_micro_batch_size_per_gpu": 1, "train_batch_size": 4}', "use --optim.batch_size"),
        ('{"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1}', "use --optim.clip"),
        ('{"train_micro_batch_size_per_gpu": 1, "fp16": {"enabled": true}}', "enables fp16"),
        ('{"checkpoint": {"writer": {"type": "python"}}}', "return before they are complete"),
        ('{"datastates_ckpt": {}}', "enables checkpoints by 'datastates_ckpt'"),
        (
            '{"train_micro_batch_size_per_gpu": "auto"}',
            "needs an integer train_micro_batch_size_per_gpu",
        ),
        ('{"train_micro_batch_size_per_gpu": 1, "bf16": true}', "'bf16' must be an object"),
        (
            '{"train_micro_batch_size_per_gpu": 1, "data_types": {"grad_accum_dtype": "fp32"}}',
            "needs ZeRO-2 or 3, not 0",
        ),
        (
            '{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": "3"}}',
            "the ZeRO stage must be 0 to 3, got '3'",
        ),
        ("[1]", "must hold a JSON object"),
        ("{", "is no JSON"),
    ],
)
def test_a_ds_config_may_not_set_the_science(text, sentence, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(text)
    done = train("--ds_config", str(file))
    assert done.returncode == 2
    assert sentence in done.stderr


def test_unknown_verbs_are_named():
    done = command("-m", "unic_ds.cli", "teachers", "chek")
    assert done.returncode == 2
    assert "did you mean teachers check?" in done.stderr


def test_verbs_stay_offline_but_for_those_that_need_the_hub():
    """Whatever HF_HUB_OFFLINE was before; each verb ends at a bad option."""
    code = """
import os, sys
from contextlib import suppress
from unic_ds import cli, train
starts = {name: lambda words=name.split(): cli.dispatch([*words, "--bad"]) for name in cli.VERBS}
starts["train.py"] = lambda: train.main(["--bad"])
for name, start in starts.items():
    found = []
    for said in (None, "0"):
        os.environ.pop("HF_HUB_OFFLINE", None)
        os.environ.update({"HF_HUB_OFFLINE": said} if said else {})
        with suppress(ValueError):
            sys.exit(start())
        found.append(os.environ.get("HF_HUB_OFFLINE"))
    print(name, *found, "huggingface_hub" in sys.modules, sep=",")
"""
    done = command("-c", code)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(",", 1) for line in done.stdout.splitlines())
    online = dict.fromkeys(("teachers fetch", "push"), "None,0,False")
    assert found == dict.fromkeys((*cli.VERBS, "train.py"), "1,1,False") | online


def test_a_command_can_be_checked_without_training(tmp_path, capsys):
    """By `unic-ds check`, for another number of ranks than this process has."""
    images = pictures.folder(tmp_path / "images", 2)
    told = ["check", "--ds_config", ZERO2, "--recipe", "unic_l", "--out", str(tmp_path / "run")]
    told += ["--data.train", str(images), "--optim.batch_size", "96"]
    told += ["--teachers", "t=python:small_teacher:narrow"]
    assert entry_point.run(cli.dispatch, [*told, "--ranks", "32"]) == 0
    assert "can be trained by 32 ranks" in capsys.readouterr().out
    for ranks, sentence in (("64", "is not a multiple of 64 ranks"), ("0", "must be positive")):
        assert entry_point.run(cli.dispatch, [*told, "--ranks", ranks]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
