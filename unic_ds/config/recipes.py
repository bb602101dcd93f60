"""Recipes: named Configs. `--recipe NAME` starts from one; `--section.key value` changes it.

A teacher is one row: its name, its source, and what differs from the source's own preprocessing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from unic_ds import demo
from unic_ds.config import (
    RECIPE_NAME,
    Config,
    Data,
    Drop,
    Eval,
    Ladder,
    Loss,
    Optim,
    Run,
    Standardise,
    Student,
    Teacher,
    methods,
)
from unic_ds.config.option import nearest
from unic_ds.config.overrides import from_dict, parse_teachers

YAML = (".yaml", ".yml")

PAPER_LOSS = Loss(divisor="kept")
PAPER_STATISTICS = Standardise(std_floor=0.0, target_clamp=0.0)
"""The paper's divisor, std floor and target clamp, which are not our defaults."""

DINOV2_G = Teacher(name="dinov2_g", source="timm:vit_giant_patch14_dinov2.lvd142m")
METACLIP_H = Teacher(name="metaclip_h", source="open_clip:ViT-H-14-quickgelu/metaclip_fullcc")


def quickstart_recipe() -> Config:
    """Two real teachers, solar-cell photographs, a ViT-Ti: minutes on two CPU cores.

    deepspeed unic_ds/train.py --ds_config ds_configs/zero2.json
    Expected: the student's kNN at least 4 points over raw pixels and 10 over its initial weights.
    """
    root, precision = demo.root(), demo.precision()
    effnet = f"file:{root / demo.PARTS[1]}#arch=tf_efficientnet_lite0"
    dinov2 = f"file:{root / demo.PARTS[2]}#arch=vit_small_patch14_dinov2"
    return Config(
        recipe="quickstart",
        precision="fp32" if precision == "fp32" else "",
        teachers=(
            Teacher(
                name="effnet", source=effnet, size=112, channels_last=True, precision=precision
            ),
            Teacher(name="dinov2", source=dinov2, size=98, block="10", precision=precision),
        ),
        # The cells fill their photographs: a tight crop would teach positions that no cell has.
        data=Data(
            train=str(root / demo.PARTS[0]),
            val_share=0.25,
            augment="weak",
            crop_min=0.95,
            ratio_max=1.0,
        ),
        student=Student(model="vit_tiny_patch16_224", size=112, drop_path=0.0),
        ladder=Ladder(rungs="half"),
        drop=Drop(rate=0.25),
        optim=Optim(batch_size=64, lr=2e-3, lr_batch=64, epochs=3.9, warmup_epochs=0.3),
        eval=Eval(sizes=(64, 112)),
        run=Run(log_every=5, save_every=50),
    )


def unic_b() -> Config:
    """UNIC ViT-B/16 from four ViT-B teachers: 200 epochs of ImageNet-1K at batch 512.

    deepspeed unic_ds/train.py --ds_config ds_configs/zero2.json --recipe unic_b --data.train DIR

    Expected (arXiv 2408.05088, table 1): ImageNet-1K linear 83.8, ADE20K mIoU 39.6. iBOT and
    dBOT-ft are on no hub: put their weights in timm's layout at these paths, or choose others.
    """
    return Config(
        recipe="unic_b",
        teachers=(
            Teacher(name="dino", source="timm:vit_base_patch16_224.dino"),
            Teacher(name="deit3", source="timm:deit3_base_patch16_224.fb_in1k"),
            Teacher(
                name="ibot", source="file:weights/ibot_vitb16.safetensors#arch=vit_base_patch16_224"
            ),
            Teacher(
                name="dbotft",
                source="file:weights/dbotft_vitb16.safetensors#arch=vit_base_patch16_224",
            ),
        ),
        loss=PAPER_LOSS,
        standardise=PAPER_STATISTICS,
    )


def unic_l() -> Config:
    """UNIC-L ViT-L/14 from DINOv2-g and MetaCLIP-H: 200 epochs at 224 px, then 100 at 336 px.

    deepspeed unic_ds/train.py --ds_config ds_configs/zero2.json --recipe unic_l --data.train DIR

    Expected (the paper, at batch 512): ImageNet-1K kNN 85.4 after the first stage and 85.6 after
    the second, ADE20K mIoU 47.1 and 48.3. The batch is ours, for 64 GPUs, and untested at scale;
    --optim.batch_size 512 is the paper's.
    """
    return Config(
        recipe="unic_l",
        teachers=(DINOV2_G, METACLIP_H),
        student=Student(model="vit_large_patch14_224", size=336),
        stages="student.size=224 optim.epochs=200",
        drop=Drop(rate=0.25),
        optim=Optim(batch_size=2048, epochs=100, lr=6e-4, lr_batch=512, lr_scaling="sqrt"),
        loss=PAPER_LOSS,
        standardise=PAPER_STATISTICS,
    )


def unic_g() -> Config:
    """ViT-g/14 from the teachers of UNIC-L, for 256 GPUs (batch 4096); no published numbers.

    deepspeed unic_ds/train.py --ds_config ds_configs/zero3.json --recipe unic_g --data.train DIR

    Untested at scale. The ladder has rungs on every block, H = D, and 4 D on the last.
    """
    return Config(
        recipe="unic_g",
        teachers=(DINOV2_G, METACLIP_H),
        student=Student(model="vit_giant_patch14_224"),
        drop=Drop(rate=0.25),
        optim=Optim(batch_size=4096, lr=6e-4, lr_batch=512, lr_scaling="sqrt"),
        loss=PAPER_LOSS,
        standardise=PAPER_STATISTICS,
    )


RECIPES: dict[str, Callable[[], Config]] = {
    "quickstart": quickstart_recipe,
    "unic_b": unic_b,
    "unic_l": unic_l,
    "unic_g": unic_g,
}
"""Registry: name -> function that makes its Config. A plugin adds its own."""


@dataclass(frozen=True)
class RecipeName:
    """A recipe by name: a base and the methods that change it, `BASE+METHOD`."""

    base: str
    methods: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> RecipeName:
        """Parse `--recipe`; a method alone changes unic_b. ValueError for unknown names."""
        base, *applied = text.split("+")
        if base in methods.METHODS:
            base, applied = "unic_b", [base, *applied]
        wrong = [base] if base not in RECIPES else [m for m in applied if m not in methods.METHODS]
        if wrong:
            raise ValueError(
                f"unknown --recipe {text!r}{nearest(wrong[0], [*RECIPES, *methods.METHODS])}; there"
                f" are {', '.join(RECIPES)}, with {', '.join(methods.METHODS)} after a +, or give a"
                " .yaml file"
            )
        return cls(base, tuple(applied))


def get(name: str, teachers: str = "", *, plugins: tuple[str, ...] = ()) -> Config:
    """The Config of a recipe's name or of a YAML file (a run's config.yaml); else ValueError.

    `BASE+METHOD` keeps a recipe's teachers, student and data, and changes its method. `teachers`,
    as on the command line, replace the recipe's before a method is applied, and may be some of
    these by name; so do `plugins`, the modules whose names they may use.
    """
    cfg, applied = without_methods(name)
    if plugins:
        cfg = replace(cfg, plugins=plugins)
    if teachers:
        cfg = replace(cfg, teachers=parse_teachers(teachers, cfg.teachers))
    for method in applied:
        cfg = methods.METHODS[method](cfg)
    return cfg


def without_methods(name: str) -> tuple[Config, tuple[str, ...]]:
    """The Config of a recipe before its methods, and their names; errors as `get`."""
    if Path(name).suffix in YAML:
        return read(Path(name)), ()
    parsed = RecipeName.parse(name)
    return replace(RECIPES[parsed.base](), recipe=name), parsed.methods


def read(file: Path) -> Config:
    """Read the Config of a YAML file; ValueError if it is missing or holds something else."""
    from unic_ds.files.documents import read_yaml

    name = repr(str(file))
    try:
        plain = read_yaml(file)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as a run's settings: {error}") from None
    if not isinstance(plain, dict):
        raise ValueError(f"{name} holds no settings; a run's config.yaml does")
    try:
        return from_dict(plain)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def folder_name(name: str) -> str:
    """The name of a recipe's default run folder; ValueError if its file's name cannot be one.

    A recipe from a file is named after the file, or, for a run's config.yaml, after its folder;
    never after the `recipe` in the file.
    """
    file = Path(name)
    if file.suffix not in YAML:
        return name
    stem = file.absolute().parent.name if file.stem == "config" else file.stem
    if not RECIPE_NAME.fullmatch(stem):
        raise ValueError(f"--recipe {name!r} gives no name for a run folder; give --out")
    return stem
