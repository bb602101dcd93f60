"""The ladder against the published vectors; the student's initial weights, drop-path and rungs."""

from dataclasses import replace
from pathlib import Path

import parity
import pytest
import timm
import torch

from unic_ds import config
from unic_ds.models.encoder import build_encoder
from unic_ds.models.initial_weights import initialise
from unic_ds.models.ladder import Head, Ladder, rung_blocks
from unic_ds.models.student import Student
from unic_ds.tokens import Tokens
from unic_ds.weights.export import export
from unic_kernels.ops import KERNELS

VECTORS = Path(__file__).parents[1] / "vectors" / "ladder.npz"
TINY = config.Student(model="vit_tiny_patch16_224", size=32, drop_path=0.3)
HEADS = {"a": Head(12), "b": Head(20)}


@pytest.mark.parametrize("kernels", KERNELS)
def test_ladder_equals_the_published_vectors(kernels):
    assert parity.over(parity.check_ladder(VECTORS, KERNELS[kernels])) == []


@pytest.mark.parametrize(
    ("rungs", "want"),
    [("all", [0, 1, 2, 3]), ("half", [1, 3]), ("middle", [1]), ("last", [3]), ("3,0", [0, 3])],
)
def test_rungs(rungs, want):
    assert rung_blocks(rungs, 4) == want


def test_a_rung_that_is_not_there_is_named():
    with pytest.raises(
        ValueError, match="ends with block 3; it must end with the student's last, 11"
    ):
        Student(TINY, config.Ladder(rungs="1,3"), HEADS, seed=0)
    with pytest.raises(ValueError, match="names block 12; the student's last is 11"):
        Student(TINY, config.Ladder(rungs="3,12"), HEADS, seed=0)


def test_initial_weights_depend_on_seed_and_name_alone():
    one = Student(TINY, config.Ladder(rungs="half"), HEADS, seed=3)
    torch.manual_seed(99)
    two = Student(
        TINY, config.Ladder(rungs="half"), {"c": Head(7), "b": Head(20), "a": Head(12)}, seed=3
    )
    other = Student(TINY, config.Ladder(rungs="half"), HEADS, seed=4)
    there = two.weights()
    for name, weight in one.weights().items():
        assert torch.equal(weight, there[name]), name
    assert not torch.equal(
        one.encoder.blocks[0].mlp.fc1.weight, other.encoder.blocks[0].mlp.fc1.weight
    )


def test_initial_weights_have_the_method_s_spread():
    student = Student(TINY, config.Ladder(), HEADS, seed=0)
    fc1 = student.encoder.blocks[5].mlp.fc1
    assert fc1.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert not fc1.bias.any()
    head = student.ladder.export_state_dict()["heads.a.patch.3.layers.0.weight"]
    assert head.std().item() == pytest.approx(0.02, rel=0.03)
    assert torch.equal(student.encoder.norm.weight, torch.ones(192))
    assert not student.encoder.norm.weight.requires_grad


@pytest.mark.parametrize("name", ["encoder.pos_embed", "encoder.cls_token", "encoder.w"])
def test_initial_weights_in_bf16_are_those_in_fp32_rounded(name):
    """ZeRO-3 draws into bf16, where torch 2.11 drew -2 and 2, a hundred times the std."""
    low, high = (torch.full((1, 64, 384), 7.0, dtype=d) for d in (torch.bfloat16, torch.float32))
    for weight in (low, high):
        initialise({name: weight}, seed=1)
    assert torch.equal(low, high.bfloat16())
    assert high.abs().max() < 6 * (1e-6 if "token" in name else 0.02)


def test_initial_weights_do_not_depend_on_torch_s_version():
    """Of normal_, held to what torch 2.11 and 2.14 both draw; trunc_normal_ changed in between."""
    weight = torch.empty(2, 8)
    initialise({"encoder.w": weight}, seed=0)
    drawn = [0.02120568, 0.02498990, -0.01624609, -0.00143706, -0.00251522, -0.03508782]
    assert weight.flatten()[:6].tolist() == pytest.approx(drawn, abs=1e-7)
    assert weight.flatten()[-2:].tolist() == pytest.approx([-0.01663949, 0.01471680], abs=1e-7)


def test_predictions_have_the_teachers_widths_and_the_student_s_grid():
    student = Student(TINY, config.Ladder(combine="each", rungs="half"), HEADS, seed=0)
    pred = student(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert pred["a"].cls_BC.shape == (6, 3, 12)
    assert pred["b"].patch_BNC.shape == (6, 3, 4, 20)


def test_drop_path_follows_the_chances_it_is_given():
    student = Student(TINY, config.Ladder(), HEADS, seed=0).train()
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    branches = len(student.paths)
    keep_all = student(image, torch.ones(2, branches))["a"].cls_BC
    drop_all = student(image, torch.zeros(2, branches))["a"].cls_BC
    mixed = student(image, torch.tensor([[1.0] * branches, [0.0] * branches]))["a"].cls_BC
    torch.testing.assert_close(mixed, torch.stack([keep_all[0], drop_all[1]]))
    assert not torch.allclose(keep_all, drop_all)
    assert len(student.paths) == 2 * 11  # timm gives the first block rate 0 and no module


def test_evaluation_never_drops_and_equals_timm():
    student = Student(TINY, config.Ladder(), HEADS, seed=0).eval()
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    student(image, torch.zeros(2, len(student.paths)))
    plain = timm.create_model(TINY.model, img_size=32, num_classes=0).eval()
    plain.load_state_dict(student.encoder.state_dict())
    with torch.no_grad():
        want = plain.forward_features(student.normalise(image, torch.float32))
    torch.testing.assert_close(student.encode(image).cls_BC, want[:, 0])


@pytest.mark.parametrize(
    "model",
    [
        "vit_small_patch14_reg4_dinov2",  # registers, layer scale
        "vit_base_patch16_siglip_224",  # no CLS, attention pool
        "vit_small_patch16_dinov3",  # rotary positions
        "deit3_small_patch16_224",
    ],
)
def test_any_vit_of_timm_can_be_the_student(model):
    cfg = config.Student(model=model, size=56 if "patch14" in model else 64, drop_path=0.1)
    student = Student(cfg, config.Ladder(rungs="last"), HEADS, seed=0)
    image = torch.randint(0, 256, (2, 3, cfg.size, cfg.size), dtype=torch.uint8)
    pred = student(image, torch.ones(2, len(student.paths)))
    assert pred["a"].patch_BNC.shape == (2, 16, 12)
    sum(value.sum() for tokens in pred.values() for value in tokens).backward()
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert {n for n, p in trained.items() if p.grad is None} <= {"encoder.mask_token"}
    assert student.encode(image).patch_BNC.shape[1] == 16


def test_registers_are_prefix_tokens_that_no_teacher_sees():
    cfg = replace(TINY, registers=4)
    student = Student(cfg, config.Ladder(), HEADS, seed=0).train()
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert student.encoder.reg_token.shape == (1, 4, 192)
    assert 0 < student.encoder.reg_token.abs().max() < 1e-5
    pred = student(image, torch.rand(2, len(student.paths)))
    assert pred["a"].cls_BC.shape == (2, 12)
    assert pred["b"].patch_BNC.shape == (2, 4, 20)
    sum(value.sum() for tokens in pred.values() for value in tokens).backward()
    assert student.encoder.reg_token.grad.abs().max() > 0
    tokens = student.encode(image)
    assert (tokens.cls_BC.shape, tokens.patch_BNC.shape) == ((2, 192), (2, 4, 192))


@pytest.mark.parametrize(
    ("model", "registers", "have", "width", "depth"),
    [
        ("vit_large_patch14_224", -1, 0, 1024, 24),
        ("vit_large_patch14_dinov2", -1, 0, 1024, 24),
        ("vit_large_patch14_dinov2", 4, 4, 1024, 24),
        ("vit_large_patch14_reg4_dinov2", -1, 4, 1024, 24),
        ("vit_large_patch14_reg4_dinov2", 0, 0, 1024, 24),
        ("vit_giant_patch14_224", 4, 4, 1408, 40),
        ("vit_giant_patch14_dinov2", -1, 0, 1536, 40),
        ("vit_giant_patch14_dinov2", 4, 4, 1536, 40),
    ],
)
@pytest.mark.parametrize("size", [224, 336])
def test_large_and_giant_with_registers_or_none(model, registers, have, width, depth, size):
    with torch.device("meta"):
        encoder = build_encoder(config.Student(model=model, size=size, registers=registers))
    assert encoder.num_prefix_tokens == 1 + have
    assert ("reg_token" in encoder.state_dict()) == (have > 0)
    assert (encoder.embed_dim, len(encoder.blocks)) == (width, depth)
    assert encoder.patch_embed.grid_size == (size // 14, size // 14)


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (config.Student(model="vit_tinny_patch16_224"), "did you mean vit_tiny_patch16_224"),
        (config.Student(model="vit_tiny_patch16_224.none"), "Invalid pretrained tag"),
        (config.Student(model="resnet18", registers=4), "'resnet18' is not a plain ViT"),
        (config.Student(model="vit_tiny_patch16_224", size=100), "not a multiple of"),
        (config.Student(model="vit_small_patch16_dinov3", registers=8), "registers 8 does not fit"),
        (config.Student(model="beit_base_patch16_224", registers=0), "registers 0 does not fit"),
        (
            config.Student(model="deit_tiny_distilled_patch16_224", registers=4),
            "registers 4 does not",
        ),
    ],
)
def test_a_student_that_cannot_be_is_refused(cfg, sentence):
    with pytest.raises(ValueError, match=sentence):
        Student(cfg, config.Ladder(), HEADS, seed=0)


@pytest.mark.parametrize(
    ("model", "size", "projector"),
    [
        ("vit_pwee_patch16_reg1_gap_256", 32, "transformer"),  # parallel blocks, no CLS
        ("deit_tiny_distilled_patch16_224", 32, "mlp"),  # two tokens before the patches
        ("vit_tiny_r_s16_p8_224", 64, "mlp"),  # patches of a small ResNet
    ],
)
def test_a_family_that_is_taken_trains_and_is_exported(model, size, projector, tmp_path):
    cfg = config.Student(model=model, size=size, drop_path=0.1)
    ladder = config.Ladder(rungs="last", projector=projector)
    student = Student(cfg, ladder, HEADS, seed=0).train()
    image = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    pred = student(image, torch.ones(2, len(student.paths)))
    sum(value.square().sum() for tokens in pred.values() for value in tokens).backward()
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert [n for n, p in trained.items() if p.grad is None] == []
    state = {n: p.detach() for n, p in student.encoder.named_parameters()}
    export(state, config.Config(student=cfg), image, tmp_path / "student")
    assert (tmp_path / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "model",
    [
        *("vit_relpos_small_patch16_224", "vitamin_small_224", "naflexvit_base_patch16_gap"),
        *("cait_xxs24_224", "tnt_s_legacy_patch16_224", "convit_tiny", "qwen3_vit_88m_enc"),
        *("swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224", "levit_128s", "pit_ti_224"),
        *("hiera_tiny_224", "crossvit_tiny_240", "samvit_base_patch16", "mixer_s16_224"),
        "vit_small_resnet26d_224",  # an export would lack its BatchNorms' means
    ],
)
def test_a_family_that_is_no_plain_vit_is_refused(model):
    with pytest.raises(
        ValueError, match=f"{model!r} is not a plain ViT; choose one of timm's vit_"
    ):
        build_encoder(config.Student(model=model, size=32))


def test_a_teacher_named_like_a_part_of_torch_is_refused():
    with pytest.raises(ValueError, match="may not be named 'type'"):
        Ladder(16, 4, {"a": Head(3), "type": Head(4)}, config.Ladder())


def plain_ladder(ladder, states):
    """The sum over rungs, written out with the ladder's own weights."""
    weights = ladder.export_state_dict()

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    found = {}
    for key in weights:
        _, teacher, kind, block, *rest = key.split(".")
        if rest != ["layers", "0", "weight"]:
            continue
        x = states[ladder.blocks.index(int(block))][("cls", "patch").index(kind)]
        y = linear(x, f"heads.{teacher}.{kind}.{block}.layers.0")
        if f"heads.{teacher}.{kind}.{block}.layers.2.weight" in weights:
            hidden = 0.5 * y * (1 + torch.erf(y / 2**0.5))
            y = linear(hidden, f"heads.{teacher}.{kind}.{block}.layers.2")
        found[teacher, kind] = found.get((teacher, kind), 0) + y
    return found


@pytest.mark.parametrize("projector", ["mlp", "linear"])
def test_a_teacher_has_its_own_rungs_and_kinds(projector):
    heads = {"a": Head(5), "hint": Head(7, ("patch",), "middle"), "late": Head(3, ("cls",), "last")}
    ladder = Ladder(8, 4, heads, config.Ladder(rungs="half", projector=projector))
    assert ladder.blocks == [1, 3]
    torch.manual_seed(0)
    states = [Tokens(torch.randn(2, 8), torch.randn(2, 9, 8)) for _ in ladder.blocks]
    pred, want = ladder(states), plain_ladder(ladder, states)
    kinds = {"a": ("cls", "patch"), "hint": ("patch",), "late": ("cls",)}
    assert want.keys() == {(name, kind) for name in kinds for kind in kinds[name]}
    for (name, kind), value in want.items():
        torch.testing.assert_close(pred[name][("cls", "patch").index(kind)], value)
    assert pred["hint"].cls_BC.numel() == 0 == pred["late"].patch_BNC.numel()


def test_a_transformer_projector_sees_all_tokens_together():
    cfg = config.Ladder(rungs="last", projector="transformer")
    ladder = Ladder(8, 2, {"a": Head(5)}, cfg, attention_heads=2)
    torch.manual_seed(0)
    state = Tokens(torch.randn(2, 8), torch.randn(2, 9, 8))
    pred = ladder([state])["a"]
    assert (pred.cls_BC.shape, pred.patch_BNC.shape) == ((2, 5), (2, 9, 5))
    rung = ladder.heads["a"]["tokens"]["1"]
    joined = torch.cat([state.cls_BC[:, None], state.patch_BNC], 1)
    torch.testing.assert_close(pred.patch_BNC, rung.linear(rung.block(joined))[:, 1:])
    state.patch_BNC[:, 0, 0] += 5  # a patch speaks to the CLS prediction
    assert not torch.allclose(ladder([state])["a"].cls_BC, pred.cls_BC)


@pytest.mark.parametrize(("which", "count"), [("full", 12), ("every:3", 4)])
def test_recomputed_blocks_give_the_same_gradients(which, count):
    image, grads = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8), []
    path_BK = torch.rand(2, len(Student(TINY, config.Ladder(), HEADS, seed=0).paths))
    for cfg in (TINY, replace(TINY, activation_checkpointing=which)):
        student = Student(cfg, config.Ladder(rungs="half"), HEADS, seed=0)
        sum(
            x.square().sum() for tokens in student(image, path_BK).values() for x in tokens
        ).backward()
        grads.append({name: p.grad for name, p in student.named_parameters() if p.requires_grad})
    assert len(student.recomputed) == count and any(path.rate for path in student.paths)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def test_what_to_recompute_is_checked():
    with pytest.raises(ValueError, match="must be none, full or every:K"):
        replace(TINY, activation_checkpointing="every:0")
