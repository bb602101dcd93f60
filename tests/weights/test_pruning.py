"""Structured pruning, and encoders with narrower blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from handed_over import MEAN, STD, images
from PIL import Image
from timm.layers import SwiGLU, SwiGLUPacked
from timm.models import VisionTransformer
from torch import Tensor, nn

from unic_ds import config, demo
from unic_ds.config import job
from unic_ds.files.tensor_files import read
from unic_ds.models.encoder import attention_heads, build_encoder, features
from unic_ds.models.model_folder import encoder_of
from unic_ds.tokens import Normalise
from unic_ds.weights import pruning, push
from unic_ds.weights.export import export, tokens
from unic_ds.weights.formats import FORMATS, verify

CFG = config.Student(model="test_vit", size=32, drop_path=0.0, mean=MEAN, std=STD)


def vit(mlp: Callable[..., nn.Module]) -> VisionTransformer:
    """Two blocks of four heads and 48 channels behind the MLP's gate, or without one."""
    channels = 96 if mlp is SwiGLUPacked else 48
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = VisionTransformer(
            img_size=32, patch_size=16, num_classes=0, embed_dim=32, depth=2, num_heads=4,
            mlp_ratio=channels / 32, mlp_layer=mlp, init_values=0.5, reg_tokens=1,
        )  # fmt: skip
        for parameter in encoder.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return encoder.requires_grad_(False).eval()


def outputs(encoder: VisionTransformer) -> Tensor:
    """CLS and patches of the images."""
    found = tokens(encoder, CFG, images(32))
    return torch.cat([found.cls_BC[:, None], found.patch_BNC], 1)


@pytest.mark.parametrize("mlp", [timm.layers.Mlp, SwiGLUPacked, SwiGLU])
def test_parts_that_do_nothing_go_and_nothing_changes(mlp: Callable[..., nn.Module]) -> None:
    encoder = vit(mlp)
    idle = {"attn.proj": [0, 3], "mlp.fc2": [0, *range(11, 34)]}
    for block in encoder.blocks:
        for name, groups in idle.items():
            weight = block.get_submodule(name).weight
            weight.unflatten(1, (-1, 8 if name == "attn.proj" else 1))[:, groups] = 0
    whole = outputs(encoder)
    pruned, cfg = pruning.prune(encoder, CFG, 0.5, images(32).split(4))
    assert (cfg.heads, cfg.mlp_width) == (2, 24)
    kept = encoder.blocks[1].attn.qkv.weight.unflatten(0, (3, 4, 8))[:, 1:3].flatten(0, 2)
    assert torch.equal(pruned.blocks[1].attn.qkv.weight, kept)
    assert pruned.blocks[0].mlp.fc2.weight.shape == (32, 24)
    torch.testing.assert_close(outputs(pruned), whole, rtol=0, atol=1e-2)
    assert torch.equal(outputs(encoder), whole)  # the encoder itself is as it was


def test_least_squares_gives_a_lost_head_s_part_to_its_twin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two heads with the same values one goes, and nothing changes."""
    encoder = vit(timm.layers.Mlp)
    for block in encoder.blocks:
        for parameter in block.attn.qkv.parameters():
            heads = parameter.unflatten(0, (3, 4, 8))
            heads[:, 1], heads[:, 3] = heads[:, 0].clone(), heads[:, 2].clone()
        block.mlp.fc2.weight[:, :24] = 0

    def gap() -> float:
        pruned, _ = pruning.prune(encoder, CFG, 0.5, images(32).split(4))
        assert not torch.equal(pruned.blocks[0].attn.qkv.weight, encoder.blocks[0].attn.qkv.weight)
        return (outputs(pruned) - outputs(encoder)).abs().max().item()

    monkeypatch.setattr(pruning.Part, "kept", kept_twins)
    assert gap() < 1e-2
    monkeypatch.setattr(pruning.Part, "solved", selected)
    assert gap() > 0.1


def kept_twins(part: pruning.Part) -> Tensor:
    """Channels of the heads 0 and 2, or of the MLP's second half."""
    return torch.arange(24, 48) if part.groups == 48 else torch.tensor([*range(8), *range(16, 24)])


def selected(part: pruning.Part, kept_K: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last Linear's own weights."""
    weight, bias = f"{part.at}.weight", f"{part.at}.bias"
    return {weight: state[weight][:, kept_K], bias: state[bias]}


@contextmanager
def gate(encoder: VisionTransformer, head: int, value: float) -> Iterator[None]:
    """Scale the output of a head of the first block."""
    gate_C = torch.ones(32)
    gate_C[8 * head : 8 * head + 8] = value
    proj = encoder.blocks[0].attn.proj
    hook = proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] * gate_C,))
    yield
    hook.remove()


def test_importance_is_the_squared_slope_of_the_features() -> None:
    encoder, image_1CHW = vit(timm.layers.Mlp), images(32)[:1]
    part, *others = pruning.parts_of(encoder, 0.5)
    hook = encoder.get_submodule(part.at).register_forward_pre_hook(part.hold)
    for seed in range(100):
        pruning.differentiate(encoder, CFG, image_1CHW.expand(8, -1, -1, -1), seed=seed)
        part.measure()
    hook.remove()
    x_1CHW = Normalise(MEAN, STD)(image_1CHW, torch.float32)
    for head in range(4):
        found = []
        for value in (0.99, 1.01):
            with gate(encoder, head, value), torch.no_grad():
                cls_BC, patch_BNC = features(encoder, x_1CHW)
                found.append(torch.cat([cls_BC.flatten(), patch_BNC.flatten() / 2]))  # 4 patches
        slope = ((found[1] - found[0]) / 0.02).square().sum()
        assert part.importance_G[head] / 800 == pytest.approx(slope.item(), rel=0.25)
    assert len(others) == 3


@pytest.mark.slow
def test_a_real_vit_stays_itself(demonstration: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DINOv2-S/14 less 30 %; without least squares, or of any parts, it would be another one."""
    cfg = config.Student(model="vit_small_patch14_dinov2", size=98)
    weights = read(demo.root() / "dinov2_s14_focus.safetensors")
    encoder = encoder_of(cfg, weights, "DINOv2")
    files = sorted((demo.root() / "images").rglob("*.jpg"))[:: 2624 // 80]
    shown = [np.asarray(Image.open(file).convert("RGB").resize((98, 98))) for file in files]
    image_B3HW = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)
    train, val = image_B3HW[::2], image_B3HW[1::2]

    def cosine() -> float:
        pruned, narrow = pruning.prune(encoder, cfg, 0.3, train.split(20))
        assert (narrow.heads, narrow.mlp_width) == (4, 1072)
        x, y = (tokens(model, cfg, val).cls_BC for model in (encoder, pruned))
        return torch.cosine_similarity(x, y).mean().item()

    assert cosine() > 0.93
    with monkeypatch.context() as patch:
        patch.setattr(pruning.Part, "solved", selected)
        assert cosine() < 0.75
    measure = pruning.Part.measure

    def shuffled(part: pruning.Part) -> None:
        measure(part)
        part.importance_G = torch.rand(part.groups)

    monkeypatch.setattr(pruning.Part, "measure", shuffled)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert cosine() < 0.6


def test_shapes_that_cannot_be_are_refused() -> None:
    for wrong, says in (
        ({"heads": 3}, r"student.heads 3 is too many, give at most 2 \(test_vit\)"),
        ({"mlp_width": 200}, "student.mlp_width 200 is too wide, give at most 192"),
        ({"model": "vit_small_patch16_dinov3", "heads": 2}, "alone, not in timm.models.eva.EvaAtt"),
        ({"model": "narrow_vit"}, "'narrow_vit' is not a timm model"),
    ):
        with pytest.raises(ValueError, match=says):
            build_encoder(replace(CFG, **wrong))
    with pytest.raises(ValueError, match=r"--prune 0\.02 leaves all 4 heads and 48 MLP channels"):
        pruning.prune(vit(timm.layers.Mlp), CFG, 0.02, [])
    with pytest.raises(ValueError, match="--prune has no form of this student: heads can be fewer"):
        pruning.prune(timm.create_model("vit_small_patch16_dinov3"), CFG, 0.5, [])


def test_the_ladder_has_the_heads_of_the_whole_model() -> None:
    """A transformer projector's weights do not tell how many heads they are for."""
    halves = config.Student(model="vit_dlittle_patch16_reg1_gap_256", size=32)
    with torch.device("meta"):
        assert attention_heads(build_encoder(halves)) == 5  # each head has two of half the width
    assert attention_heads(build_encoder(replace(CFG, heads=1))) == attention_heads(
        build_encoder(CFG)
    )


def test_a_run_that_starts_from_a_pruned_student_must_have_its_shape(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text('{"model_args": {"heads": 1, "mlp_width": 96}}')
    with pytest.raises(ValueError, match=r"blocks: --student\.heads 1 --student\.mlp_width 96"):
        job.check_init(config.Student(init=str(tmp_path)))
    job.check_init(config.Student(init=str(tmp_path), heads=1, mlp_width=96))
    with pytest.raises(ValueError, match=r"is a pruned student; .* --student\.heads 1"):
        job.check_init(config.Student(init=str(tmp_path), heads=2, mlp_width=96))
    (tmp_path / "config.json").write_text('{"model_args": {"img_size": 32}}')
    job.check_init(config.Student(init=str(tmp_path)))
    with pytest.raises(ValueError, match=r"is no pruned student; .* --student\.heads 0"):
        job.check_init(config.Student(init=str(tmp_path), heads=1))


def test_no_code_of_a_folder_is_run(tmp_path: Path) -> None:
    cfg = replace(CFG, heads=1)
    state = build_encoder(cfg).state_dict()
    out = export(state, config.Config(student=cfg), images(32), tmp_path / "narrow")
    for name in ("timm.py", "safetensors.py", "torch.py", "narrow_vit.py"):
        (out / name).write_text("raise SystemExit('this was run')")
    (found,) = verify.run_fresh(FORMATS["timm"], out, [images(32)[:1]])
    assert found["cls"].shape == (1, 64)


def test_a_narrow_student_can_be_pushed(tmp_path: Path) -> None:
    cfg = replace(CFG, mlp_width=96)
    state = build_encoder(cfg).state_dict()
    out = export(state, config.Config(student=cfg), images(32), tmp_path / "narrow")
    assert "narrow_vit.py" in dict(push.files_of(out))
