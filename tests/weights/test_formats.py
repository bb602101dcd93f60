"""Formats of unic-ds export, each against the library that it is for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import timm
import torch
from handed_over import HEADS, images, place_clip, student, student_folder
from open_clip import pretrained
from safetensors.torch import load_file
from torch import Tensor

from unic_ds import config
from unic_ds.cli.export import Options
from unic_ds.harness.students import read_student
from unic_ds.harness.text_towers import was_with_text
from unic_ds.models.ladder import Head
from unic_ds.models.model_folder import ModelFolder
from unic_ds.tokens import Normalise
from unic_ds.training.hand_over import Request, hand_over, predictions_of
from unic_ds.weights.export import refuse_foreign
from unic_ds.weights.formats import FORMATS, card, folder, hf_format, verify
from unic_ds.weights.formats.handover import Handover
from unic_ds.weights.formats.traced import resampling

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"
IMPORTED = {"origin": "imported from unic.pth", "licence": "CC BY-NC-SA 4.0"}
CLOSE = {"rtol": 0, "atol": 1e-4}


def pixels(handover: Handover, image_B3HW: Tensor) -> Tensor:
    """Normalised images."""
    return Normalise(handover.cfg.mean, handover.cfg.std)(image_B3HW, torch.float32)


@pytest.mark.parametrize("old", [4, 7])
@pytest.mark.parametrize("new", [2, 4, 5, 16])
def test_positions_are_resampled_as_timm_does(old: int, new: int) -> None:
    grid_1DHW = torch.randn(1, 3, old, old, generator=torch.Generator().manual_seed(0))
    theirs = torch.nn.functional.interpolate(
        grid_1DHW, size=(new, new), mode="bicubic", antialias=True
    )
    weight_NO = resampling(new, old)
    assert torch.allclose(weight_NO @ grid_1DHW @ weight_NO.T, theirs, rtol=0, atol=1e-5)
    if new == old:
        assert torch.equal(weight_NO, torch.eye(old))


@pytest.mark.parametrize(
    ("model", "registers", "kind", "size"),
    [
        ("vit_tiny_patch16_224", -1, "ViTModel", 32),
        ("vit_tiny_patch16_224", 2, "Dinov2WithRegistersModel", 32),
        ("vit_small_patch14_dinov2", -1, "Dinov2Model", 28),
        ("vit_small_patch14_reg4_dinov2", -1, "Dinov2WithRegistersModel", 28),
    ],
)
def test_a_stock_class_of_transformers_has_the_encoder_s_tokens(
    model: str, registers: int, kind: str, size: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    handover = student(model, size, registers)
    hf_format.write(handover, tmp_path, "")
    loaded, found = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__name__ == kind
    assert not found["missing_keys"] and not found["unexpected_keys"]
    x_B3HW, truth = pixels(handover, images(size)), handover.outputs(images(size))
    with torch.no_grad():
        out = loaded.eval()(x_B3HW)
    tokens = out.last_hidden_state
    assert truth["patch"].std() > 0.1
    assert torch.allclose(tokens[:, 0], truth["cls"], **CLOSE)
    assert torch.allclose(tokens[:, -truth["patch"].shape[1] :], truth["patch"], **CLOSE)
    assert torch.allclose(out.pooler_output, truth["cls"], **CLOSE)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    shown = processor(list(images(size).permute(0, 2, 3, 1).numpy()), return_tensors="pt")
    assert torch.allclose(shown["pixel_values"], x_B3HW, rtol=0, atol=1e-5)


def test_swiglu_is_dinov2_s(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    handover = student("vit_small_patch14_dinov2", 28)
    encoder = timm.models.VisionTransformer(
        img_size=28,
        patch_size=14,
        num_classes=0,
        embed_dim=64,
        depth=2,
        num_heads=2,
        mlp_ratio=5.5,  # a hidden width of 176 = 64 * 4 * 2 / 3, to the next multiple of 8
        init_values=0.5,
        mlp_layer=timm.layers.SwiGLUPacked,
        act_layer=torch.nn.SiLU,
    )
    handover = replace(handover, encoder=encoder.eval().requires_grad_(False))
    assert "no whole multiple" in hf_format.misfit(encoder)
    for block in encoder.blocks:
        block.mlp = timm.layers.SwiGLUPacked(64, 2 * 128)
    hf_format.write(handover, tmp_path, "")
    loaded = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        tokens = loaded(pixels(handover, images(28))).last_hidden_state
    assert torch.allclose(tokens[:, 1:], handover.outputs(images(28))["patch"], **CLOSE)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("vit_wee_patch16_reg1_gap_256", "no CLS token"),
        ("test_vit3", "normalises queries and keys|no CLS token"),
        ("vit_base_patch16_clip_224", "normalises before its blocks"),
        ("vit_base_patch16_clip_quickgelu_224", "normalises before its blocks"),
        ("eva02_tiny_patch14_224", "no plain ViT"),
    ],
)
def test_a_shape_that_no_stock_class_has_is_refused(
    model: str, reason: str, tmp_path: Path
) -> None:
    with torch.device("meta"):
        encoder = timm.create_model(model, num_classes=0)
    handover = replace(student(), cfg=config.Student(model=model), encoder=encoder)
    with pytest.raises(ValueError, match=f"no class for {model}: .*({reason}); choose --to timm"):
        folder.write("hf", handover, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_proof_that_fails_leaves_nothing(tmp_path: Path) -> None:
    handover = student()
    handover.encoder.cls_token[:] = float("nan")
    with pytest.raises(RuntimeError, match=r"cls differs by nan .*nothing was exported"):
        folder.write("hf", handover, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before(tmp_path: Path) -> None:
    with torch.device("meta"):
        huge = torch.nn.Linear(10**7, 10**7)  # 400 TB
    with pytest.raises(ValueError, match=r"needs 1200000\d\d\d MB for a while, but its disk has"):
        folder.check_room(tmp_path / "out", replace(student(), encoder=huge))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a ladder, of weights that have a licence of their own."""
    found = student_folder(tmp_path_factory.mktemp("imported") / "student")
    file = found / "ladder.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | IMPORTED, indent=1) + "\n")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "onnx", "export", "timm"])
def test_every_format_is_proven_in_a_fresh_process(
    to: str, model_folder: Path, tmp_path: Path
) -> None:
    """`hand_over` runs the page's snippet in a process without unic_ds, or there is no folder."""
    out = hand_over(Request(source=model_folder, to=to, out=str(tmp_path / "out"), size=48))
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    form = FORMATS[to]
    assert {"README.md"} < {p.name for p in out.iterdir()} <= form.files | {"README.md"}
    text = (out / "README.md").read_text()
    assert all(value in text for value in IMPORTED.values())
    if to != "timm":
        assert form.snippet in text and "noise" in text and "48 x 48 px" in text


@pytest.mark.slow
def test_onnx_keeps_projectors_and_takes_other_sizes(model_folder: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    request = Request(
        source=model_folder, to="onnx", out=str(tmp_path / "out"), keep=("narrow", "wide")
    )
    session = onnxruntime.InferenceSession(hand_over(request) / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    assert names == ["cls", "patch", "narrow_cls", "wide_cls", "wide_patch"]
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["mean"]) == [0.4, 0.5, 0.6] and facts["any_size"] == "true"
    model = read_student("s", ModelFolder(model_folder), torch.device("cpu"))
    projection = model.encode(images(32), frozenset({"projection"})).projection
    handover = student()
    found = session.run(names, {"pixel_values": pixels(handover, images(32)).numpy()})
    shown = dict(zip(names, found, strict=True))
    for name in HEADS:
        assert np.allclose(shown[f"{name}_cls"], projection[name].cls_BC, **CLOSE)
    assert np.allclose(shown["wide_patch"], projection["wide"].patch_BNC, **CLOSE)


@pytest.fixture
def clip_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model folder whose first teacher is a small CLIP in open_clip's cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    heads = {"clip": Head(place_clip(tmp_path, "handed-over")), "other": Head(24)}
    facts = {"clip": {"source": "open_clip:handed-over/toy"}, "other": {"source": "timm:test_vit"}}
    yield student_folder(tmp_path / "student", heads=heads, teachers=facts)
    pretrained._PRETRAINED.pop("handed-over")


@pytest.mark.slow
def test_an_image_tower_for_open_clip_has_the_ladder_s_embeddings(
    clip_folder: Path, tmp_path: Path
) -> None:
    """`hand_over` itself compares images and texts in a fresh process, by the page's program."""
    out = hand_over(Request(source=clip_folder, to="openclip", out=str(tmp_path / "out")))
    state = load_file(out / "open_clip_model.safetensors")
    theirs = load_file(tmp_path / ".cache" / "clip" / "handed-over.safetensors")
    assert torch.equal(state["token_embedding.weight"], theirs["token_embedding.weight"])
    projected = theirs["visual.proj"]
    model = read_student("s", ModelFolder(clip_folder), torch.device("cpu"))
    cls_BC = model.encode(images(32), frozenset({"projection"})).projection["clip"].cls_BC
    (found,) = verify.run_fresh(FORMATS["openclip"], out, [images(32)])
    expected = torch.nn.functional.normalize(cls_BC @ projected, dim=-1)
    assert torch.allclose(found["image"], expected, **CLOSE)
    assert found["text"].shape == (3, 24) and expected.std() > 0.1
    text = (out / "README.md").read_text()
    assert re.findall(r"^\| `(image|text|cls|patch)` \|", text, re.M) == ["image", "text"]
    assert "pipeline_tag: zero-shot-image-classification\n" in text


def test_what_open_clip_cannot_hold_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    def refused(message: str, source: Path = clip_folder, *keep: str) -> None:
        request = Request(source=source, to="openclip", out=str(tmp_path / "out"), keep=keep)
        with pytest.raises(ValueError, match=message):
            hand_over(request)
        assert not list(tmp_path.glob("*out*"))

    refused("needs one teacher with a text tower", clip_folder, "clip", "other")
    refused("'other' has no text tower", clip_folder, "other")
    refused("names 'clpi' .did you mean clip", clip_folder, "clip", "clpi")
    heads = {"clip": Head(64)}
    facts = {"clip": {"source": "open_clip:handed-over/toy"}}
    each = student_folder(
        tmp_path / "each",
        heads=heads,
        teachers=facts,
        ladder=config.Ladder(width=16, combine="each"),
    )
    refused("takes ladders whose projectors.*combine each", each)
    plain = student_folder(tmp_path / "plain", heads=heads)
    refused("needs one teacher with a text tower", plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "quantise"), [("onnx", "int8"), ("export", "int8"), ("export", "bf16")]
)
def test_another_precision_states_what_it_changes(to: str, quantise: str, tmp_path: Path) -> None:
    each = config.Ladder(width=16, combine="each")  # of Linears, which torchao would quantise
    found = ModelFolder(student_folder(tmp_path / "student", ladder=each))
    kept = predictions_of(["wide"], found, found.description(found.encoder()))
    image_B3HW, handover = images(32), replace(student(), predictions=kept)
    labelled = folder.Labelled(
        [image_B3HW, 255 - image_B3HW], torch.arange(16) % 2, train=8, neighbours=3
    )
    out = tmp_path / "out"
    notes = folder.write(to, handover, out, quantise=quantise, labelled=labelled)
    cosines = [float(x) for x in re.findall(r"(?:cls|patch) (0\.\d+|1\.0+)", notes[0])]
    assert len(cosines) == 4 and min(cosines) > 0.98
    assert "kNN (k=3, 8 training and 8 validation images)" in notes[1]
    assert all(note in (out / "README.md").read_text() for note in notes)
    shown, few = verify.run_fresh(FORMATS[to], out, [image_B3HW, image_B3HW], whole=1)
    assert set(shown) == {"cls", "patch", "wide_cls", "wide_patch"} and set(few) == {"cls"}
    gap = (shown["cls"] - handover.outputs(image_B3HW)["cls"]).abs().max()
    assert 1e-6 < gap < 0.3  # these are not the fp32 weights
    if quantise == "bf16":
        assert "Weights are bf16" in (out / "README.md").read_text()
        graph = torch.export.load(out / "model.pt2")
        learned = {name: graph.state_dict[name].dtype for name in graph.graph_signature.parameters}
        assert set(learned.values()) == {torch.bfloat16}
        assert {v.dtype for v in shown.values()} == {torch.float32}
        (wider,) = verify.run_fresh(FORMATS[to], out, [images(48)])
        truth = verify.reference(handover, images(48))
        assert torch.cosine_similarity(wider["cls"], truth["cls"]).min() > 0.999
    elif to == "export":
        state = torch.export.load(out / "model.pt2").state_dict
        assert {v.dtype for v in state.values()} == {torch.int8, torch.float32}
        projectors = {k: v.dtype for k, v in state.items() if k.startswith("predictions.")}
        assert set(projectors.values()) == {torch.float32}
        assert max(v.numel() for v in state.values() if v.dtype == torch.float32) <= 3 * 16**2 * 64
    else:
        weights = sum(p.numel() for p in handover.encoder.parameters())
        weights += sum(p.numel() for p in kept.parameters())
        assert (out / "model.onnx").stat().st_size < 4 * weights
        nodes = pytest.importorskip("onnx").load(out / "model.onnx").graph.node
        quantised = [node for node in nodes if node.op_type == "MatMulInteger"]
        assert len(quantised) == 4 * len(handover.encoder.blocks)  # and no projector


def test_refusals(model_folder: Path, tmp_path: Path) -> None:
    def refused(message: str, **settings: object) -> None:
        request = {"source": model_folder, "out": str(tmp_path / "out")} | settings
        with pytest.raises(ValueError, match=message):
            hand_over(Request(**request))
        assert not (tmp_path / "out").exists()

    refused("names 'wid' .did you mean wide.*teachers are wide, narrow", to="onnx", keep=("wid",))
    refused("int8 has no form in hf", to="hf", quantize="int8")
    refused("bf16 has no form in onnx; choose --to export", to="onnx", quantize="bf16")
    refused("keep_projectors has no place in timm", keep=("wide",))
    refused("multiple of 16 px, not 40", to="hf", size=40)
    refused("cannot be exported: it is neither", to="hf", source=tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("model.safetensors", "config.json"):
        (bare / name).symlink_to(model_folder / name)
    refused("has no known ladder: the folder has no ladder", source=bare, to="onnx", keep=("wide",))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="no export"):
        hand_over(Request(source=model_folder, to="hf", out=str(tmp_path / "out")))


def test_timm_at_another_size(model_folder: Path, tmp_path: Path) -> None:
    out = hand_over(Request(source=model_folder, size=48, out=str(tmp_path / "out")))
    own = load_file(model_folder / "model.safetensors")["pos_embed"]
    larger = timm.create_model(f"local-dir:{out}", pretrained=True).pos_embed
    resampled = timm.layers.resample_abs_pos_embed(own, [3, 3], num_prefix_tokens=1)
    assert torch.allclose(larger, resampled, rtol=0, atol=1e-6)
    assert (out / "ladder.json").read_text() == (model_folder / "ladder.json").read_text()
    text = (out / "README.md").read_text()
    assert "# test_vit, imported from unic.pth\n" in text and "CC BY-NC-SA 4.0" in text


def test_the_verb_has_every_format() -> None:
    assert get_args(get_type_hints(Options)["to"]) == tuple(FORMATS)


def test_the_page_has_the_programs_that_prove_exports() -> None:
    shown = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    programs = [block for block in shown if "THIS_FOLDER" in block]
    assert programs == [form.snippet for form in FORMATS.values()]


def test_a_card_has_the_outputs_of_its_folder_and_the_weights_licence(model_folder: Path) -> None:
    found = ModelFolder(model_folder)
    description = found.description(found.encoder())
    kept = replace(
        student(), predictions=predictions_of(["narrow"], found, description), **IMPORTED
    )
    text = card.render(FORMATS["onnx"], kept, [])
    assert re.findall(r"^\| `(\w+)` \| .*, (\d+) wide", text, re.M) == [
        ("cls", "64"),
        ("patch", "64"),
        ("narrow_cls", "24"),
    ]
    assert "# test_vit for onnxruntime, imported from unic.pth\n" in text
    assert "license: cc-by-nc-sa-4.0\n" in text and "CC BY-NC-SA 4.0" in text
    bare = replace(
        student(),
        cfg=config.Student(size=256),
        encoder=timm.create_model("vit_wee_patch16_reg1_gap_256").eval(),
    )
    assert "| `cls` | mean of the patch tokens" in card.render(FORMATS["timm"], bare, [])


def test_an_export_replaces_no_other_folder(model_folder: Path, tmp_path: Path) -> None:
    def refused(message: str, out: Path, to: str = "hf", source: Path = model_folder) -> None:
        before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
        with pytest.raises(ValueError, match=message):
            hand_over(Request(source=source, to=to, size=48, out=str(out)))
        assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before

    refused("is what would be exported", model_folder, "timm")
    link = tmp_path / "link"
    link.symlink_to(model_folder)
    refused("is what would be exported", model_folder, "timm", link)
    run = tmp_path / "run"
    (run / "student").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 1\n")
    refused("is the student of a run", run / "student", "timm")
    other = tmp_path / "other"
    other.mkdir()
    for name in ("model.safetensors", "config.json", "README.md"):  # names that hf's has, too
        (other / name).write_bytes((model_folder / name).read_bytes())
    refused("holds an export for timm, which one for transformers does not replace", other)


def test_bytecode_beside_an_export_s_module_is_not_foreign(tmp_path: Path) -> None:
    (tmp_path / "out" / "__pycache__").mkdir(parents=True)
    refuse_foreign(tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="no export"):
        refuse_foreign(tmp_path / "out")


def test_only_a_run_s_own_folders_have_its_settings(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("services: [web]\n")  # of another program
    for name in ("models/unic", "unic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(model_folder)
        assert ModelFolder(tmp_path / name).run is None
    for name in ("student", "student_448", "encoders/step_40"):
        assert ModelFolder(tmp_path / name).run == tmp_path
    assert ModelFolder(tmp_path / "elsewhere" / "student").run is None


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("open_clip:ViT-B-16/openai", True),
        ("timm:vit_base_patch16_siglip_224.webli", True),
        ("timm:vit_pe_core_base_patch16_224.fb", True),
        ("timm:vit_base_patch14_dinov2.lvd142m", False),
        ("file:clip.pth#arch=vit_base_patch16_224", False),
        ("", False),
    ],
)
def test_teachers_with_text_are_known_by_their_source(source: str, found: bool) -> None:
    assert was_with_text(source) == found
