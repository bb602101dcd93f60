"""PHI-S against plain NumPy, against the ways a batch can be split, and in a run that resumes."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from runs import DEMONSTRATION, ROOT, curve, ranks_and_port, run, statistics, two
from safetensors.torch import save_file
from scipy import linalg
from torch import Tensor

from unic_ds import config
from unic_ds.config.overrides import override_all
from unic_ds.teachers.phi_s import PhiS, hadamard
from unic_ds.teachers.teacher_set import TeacherSet
from unic_ds.tokens import Tokens
from unic_kernels.moments import moments

CFG = config.Standardise(kind="phi_s", fit_steps=1, target_clamp=0.0)
CPU = torch.device("cpu")
WIDTHS = (192, 384, 768, 1024, 1152, 1280, 1408, 1536, 1664, 2048, 4096)


def tokens_of(seed: int, images: int = 30, patches: int = 5, width: int = 12) -> Tokens:
    """Correlated channels of very different variance, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    mixer_CC = torch.randn(width, width, generator=generator) * torch.logspace(-2, 1, width)
    cls_BC = torch.randn(images, width, generator=generator) @ mixer_CC.T + 7
    patch_BNC = torch.randn(images, patches, width, generator=generator) @ mixer_CC - 50
    return Tokens(cls_BC, patch_BNC)


def rows(tokens: Tokens, kind: int) -> np.ndarray:
    """All tokens of a kind as [N, C] in fp64."""
    return tokens[kind].reshape(-1, tokens[kind].shape[-1]).double().numpy()


def part(tokens: Tokens, chosen: slice) -> Tokens:
    return Tokens(tokens.cls_BC[chosen], tokens.patch_BNC[chosen])


def fitted(*batches: Tokens, cfg: config.Standardise = CFG) -> PhiS:
    """One rank's statistics, by the functions that the pool uses."""
    norm = PhiS(batches[0].cls_BC.shape[-1], cfg)
    for tokens in batches:
        norm.observe(tokens)
    norm.fit(norm.moments()[None], lambda share: share)
    return norm


def paley_12() -> np.ndarray:
    """Paley's first construction for q = 11, entry by entry."""
    squares = {1, 3, 4, 5, 9}  # 1, 2, 3, 4, 5 squared, mod 11
    matrix = np.eye(12)
    for i in range(12):
        for j in range(12):
            if i == 0 or j == 0:
                matrix[i, j] += (i == 0 and j > 0) - (j == 0 and i > 0)
            elif i != j:
                matrix[i, j] += 1 if (i - j) % 11 in squares else -1
    return matrix


def numpy_phi_s(x_NC: np.ndarray, hadamard_CC: np.ndarray) -> np.ndarray:
    """y = H U^T (x - mean) / sqrt(mean eigenvalue), from NumPy alone."""
    value_C, vector_CC = np.linalg.eigh(np.cov(x_NC.T))
    for column in vector_CC.T:
        column *= np.sign(column[np.abs(column).argmax()])
    rotation_CC = hadamard_CC / np.sqrt(len(hadamard_CC)) @ vector_CC.T
    return (x_NC - x_NC.mean(0)) @ rotation_CC.T / np.sqrt(value_C.mean())


@pytest.mark.parametrize("width", [1, 2, 4, 12, 20, 36, *WIDTHS])
def test_hadamard_is_orthonormal(width):
    matrix_CC = hadamard(width)
    torch.testing.assert_close(
        matrix_CC.abs(), torch.full_like(matrix_CC, width**-0.5), rtol=1e-12, atol=0
    )
    sign_CC = matrix_CC.sign().float()  # sums of at most 4096 ones are exact
    assert torch.equal(sign_CC @ sign_CC.T, width * torch.eye(width))


def test_hadamard_matrices_are_the_textbooks():
    np.testing.assert_allclose(hadamard(16) * 4, linalg.hadamard(16), rtol=0, atol=1e-12)
    np.testing.assert_allclose(hadamard(12) * 12**0.5, paley_12(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [3, 6, 92, 1023])
def test_a_width_without_one_is_refused(width):
    with pytest.raises(ValueError, match=rf"width {width} .* --standardise.kind channel"):
        PhiS(width, CFG)


@pytest.mark.parametrize("width", [12, 16])
def test_against_numpy(width):
    tokens = tokens_of(0, width=width)
    norm = fitted(part(tokens, slice(0, 11)), part(tokens, slice(11, 30)))
    matrix_CC = linalg.hadamard(16) if width == 16 else paley_12()
    other, found = tokens_of(1, width=width), norm(tokens).standardised()
    for kind in range(2):
        expected = numpy_phi_s(rows(tokens, kind), matrix_CC)
        np.testing.assert_allclose(rows(found, kind), expected, rtol=1e-4, atol=1e-4)
        rotated_NC = norm(other).features[kind]  # by an orthonormal basis
        back_NC = rotated_NC @ norm.basis_2CC[kind] * norm.scale_2[kind] + norm.mean_2C[kind]
        torch.testing.assert_close(back_NC, other[kind], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [12, 36, 384])
def test_every_channel_has_variance_one_and_distances_are_kept(width):
    """Also where there are fewer tokens than channels (30 cls tokens of 384)."""
    tokens = tokens_of(2, width=width)
    norm = fitted(tokens)
    target = norm(tokens).standardised()
    for kind in range(2):
        x_NC, y_NC = rows(tokens, kind), rows(target, kind)
        np.testing.assert_allclose(y_NC.mean(0), 0, atol=1e-5)
        np.testing.assert_allclose(y_NC.var(0, ddof=1), 1, rtol=1e-4)
        ratio_N = np.linalg.norm(x_NC[1:] - x_NC[:-1], axis=1) / np.linalg.norm(
            y_NC[1:] - y_NC[:-1], axis=1
        )
        np.testing.assert_allclose(ratio_N, norm.scale_2[kind].item(), rtol=1e-4)
        scale = np.sqrt(x_NC.var(0, ddof=1).mean())
        assert norm.scale_2[kind].item() == pytest.approx(scale, rel=1e-5)


@pytest.mark.parametrize("cuts", [[4], [1, 2, 29], list(range(1, 30))])
def test_micro_batches_do_not_matter(cuts):
    tokens, bounds = tokens_of(3), [0, *cuts, 30]
    whole, split = fitted(tokens), fitted(*(part(tokens, slice(*ab)) for ab in pairwise(bounds)))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(split.state_dict()[name], value, rtol=1e-5, atol=1e-5)


def test_ranks_do_not_matter():
    tokens, ranks = tokens_of(4), [PhiS(12, CFG) for _ in range(3)]
    for norm, chosen in zip(ranks, (slice(0, 15), slice(15, 16), slice(16, 30)), strict=True):
        norm.observe(part(tokens, chosen))
    gathered_PS2C = torch.stack([norm.moments() for norm in ranks])
    means_2C = [moments(x_C)[1] for x_C in tokens]
    shares = [norm.scatter(norm.moments(), torch.stack(means_2C)) for norm in ranks]
    for norm in ranks:
        norm.fit(gathered_PS2C, lambda share: torch.stack(shares).sum(0))
    for name, value in fitted(tokens).state_dict().items():
        assert all(torch.equal(n.state_dict()[name], ranks[0].state_dict()[name]) for n in ranks)
        torch.testing.assert_close(ranks[0].state_dict()[name], value, rtol=1e-5, atol=1e-5)


def test_a_shift_of_all_tokens_changes_nothing():
    tokens = tokens_of(5)
    far = Tokens(*(x.double() + 4096 for x in tokens))
    near = Tokens(*(x.float() for x in far))
    one, two = fitted(tokens)(tokens).standardised(), fitted(near)(far).standardised()
    torch.testing.assert_close(one.patch_BNC, two.patch_BNC, rtol=0, atol=5e-2)


def test_targets_are_clamped_and_no_channel_is_floored():
    cfg = config.Standardise(kind="phi_s", fit_steps=1, target_clamp=0.5, std_floor=0.1)
    tokens = tokens_of(6)
    target = fitted(tokens, cfg=cfg)(tokens).standardised()
    free = fitted(tokens)(tokens).standardised()
    assert torch.equal(target.cls_BC, free.cls_BC.clamp(-0.5, 0.5))
    assert target.cls_BC.abs().max() == 0.5


def test_half_precision_gives_fp32_targets():
    tokens = Tokens(*(x.bfloat16() for x in tokens_of(7)))
    target = fitted(tokens)(tokens).standardised()
    assert target.cls_BC.dtype == target.patch_BNC.dtype == torch.float32
    np.testing.assert_allclose(rows(target, 1).var(0, ddof=1), 1, rtol=1e-4)


def test_constant_and_non_finite_features_are_refused():
    tokens = tokens_of(8)
    with pytest.raises(ValueError, match="its cls tokens are all the same"):
        fitted(Tokens(torch.full_like(tokens.cls_BC, 0.3), tokens.patch_BNC))
    tokens.patch_BNC[3, 2, 1] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        fitted(tokens)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"kind": "phi_s"}, "fit_steps must be positive for --standardise.kind phi_s"),
        ({"fit_steps": -1}, "fit_steps must be >= 0"),
        ({"fit_steps": 3, "freeze_after": 5}, "freeze_after must be 0 if"),
    ],
)
def test_what_cannot_be_together_is_one_sentence(knobs, sentence):
    with pytest.raises(ValueError, match=sentence):
        config.Standardise(**knobs)


def test_options_that_need_each_other_come_in_any_order():
    start = config.Config(standardise=config.Standardise(kind="phi_s", fit_steps=9))
    back = {"standardise.fit_steps": "0", "standardise.kind": "channel"}
    assert override_all(start, back) == config.Config()
    frozen = override_all(start, back | {"standardise.freeze_after": "5"})
    forth = {"standardise.freeze_after": "0", "standardise.fit_steps": "9"}
    assert override_all(frozen, forth | {"standardise.kind": "phi_s"}) == start


@pytest.fixture(scope="module")
def rows_of_teachers(tmp_path_factory) -> tuple[config.Teacher, ...]:
    """A ViT of width 64 and a CNN of width 256 with random weights."""
    folder, teachers = tmp_path_factory.mktemp("teachers"), []
    for name, arch in (("vit", "test_vit"), ("cnn", "test_efficientnet")):
        torch.manual_seed(0)
        save_file(timm.create_model(arch).state_dict(), folder / f"{name}.safetensors")
        source = f"file:{folder / name}.safetensors#arch={arch}"
        teachers.append(config.Teacher(name=name, source=source, precision="fp32"))
    return tuple(teachers)


def pool(rows: tuple[config.Teacher, ...], **knobs) -> TeacherSet:
    standardise = config.Standardise(**{"target_clamp": 0.0, "std_floor": 0.0} | knobs)
    return TeacherSet(rows, grid=4, standardise=standardise, device=CPU)


def images(teachers: TeacherSet, seed: int, count: int = 4) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return {
        size: pixels.repeat_interleave(-(-size // 16), 2).repeat_interleave(-(-size // 16), 3)[
            ..., :size, :size
        ]
        for size in teachers.sizes
    }


@pytest.mark.parametrize("kind", ["channel", "phi_s"])
def test_a_pool_fits_once_and_stays(rows_of_teachers, kind, monkeypatch):
    teachers = pool(rows_of_teachers, kind=kind, fit_steps=2)
    batches = [images(teachers, seed) for seed in range(3)]
    teachers.fit(map(teachers.features, batches))
    state = {name: value.clone() for name, value in teachers.state_dict().items()}
    targets = [teachers(batch) for batch in batches]
    assert all(norm.moments().abs().sum() == 0 for norm in teachers.norms.values())
    with monkeypatch.context() as two_ranks:
        two_ranks.setenv("WORLD_SIZE", "2")  # that never met: a collective would fail
        teachers.track(0.7)
    for name, value in teachers.state_dict().items():
        assert torch.equal(value, state[name])
    for name in teachers.widths:
        x_NC = torch.cat([target[name].kind(1).flatten(0, 1) for target in targets]).double()
        alive_C = teachers.norms[name].std_2C[1] > 1e-4
        assert alive_C.sum() > 30
        np.testing.assert_allclose(x_NC.mean(0)[alive_C], 0, atol=1e-3)
        np.testing.assert_allclose(x_NC.var(0)[alive_C], 1, rtol=2e-2)
    fresh = pool(rows_of_teachers, kind=kind, fit_steps=2)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(batches[0])["vit"].kind(0), targets[0]["vit"].kind(0))


def test_statistics_of_another_kind_are_refused(rows_of_teachers):
    channel, phi_s = (pool(rows_of_teachers, kind=k, fit_steps=1) for k in ("channel", "phi_s"))
    with pytest.raises(ValueError, match=r"of --standardise.kind phi_s, this run's of channel"):
        channel.load_state_dict(phi_s.state_dict())
    with pytest.raises(ValueError, match=r"of --standardise.kind channel, this run's of phi_s"):
        phi_s.load_state_dict(channel.state_dict())


def test_a_teacher_that_cannot_be_standardised_is_named(rows_of_teachers, tmp_path, monkeypatch):
    (tmp_path / "odd_teacher.py").write_text(ODD_TEACHER)
    monkeypatch.syspath_prepend(tmp_path)
    source = config.Teacher(name="odd", source="python:odd_teacher:build", precision="fp32")
    with pytest.raises(ValueError, match=r"teacher 'odd': no Hadamard matrix of width 6 "):
        pool((*rows_of_teachers, source), kind="phi_s", fit_steps=1)
    assert pool((source,), kind="phi_s", fit_steps=1, on=False).widths == {"odd": 6}
    teachers = pool((source,), fit_steps=1)
    with pytest.raises(ValueError, match="teacher 'odd': its features are not finite"):
        teachers.fit([teachers.features({8: torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)})])


@pytest.mark.gpu
def test_on_a_gpu_the_fit_is_the_same_and_a_step_never_waits(rows_of_teachers):
    device = torch.device("cuda")
    knobs = config.Standardise(kind="phi_s", fit_steps=2)
    here, there = (
        TeacherSet(rows_of_teachers, grid=4, standardise=knobs, device=d) for d in (CPU, device)
    )
    batches = [images(here, seed) for seed in range(2)]
    here.fit(map(here.features, batches))
    moved = [{size: pixels.to(device) for size, pixels in batch.items()} for batch in batches]
    there.fit(map(there.features, moved))
    for name, norm in there.norms.items():
        torch.testing.assert_close(norm.scale_2.cpu(), here.norms[name].scale_2, rtol=1e-2, atol=0)
    batch = {size: pixels.to(device) for size, pixels in batches[0].items()}
    there(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        there(batch)
        there.track(0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


ODD_TEACHER = """
import torch

class Odd(torch.nn.Module):
    image_size, patch_size, mean, std = 8, 2, (0.0,) * 3, (1.0,) * 3

    def forward(self, image):
        patch = torch.nn.functional.avg_pool2d(image, 2).flatten(2).mT.repeat(1, 1, 2)
        patch = patch / (1 - patch)  # white is infinite
        return patch.mean(1), patch

build = Odd
"""

RANKS = """
import sys, torch
from unic_ds import config, dist
from unic_ds.teachers.teacher_set import TeacherSet
dist.start()
source, batches, out = sys.argv[1:]
row = config.Teacher(name="vit", source=source, precision="fp32")
cfg = config.Standardise(kind="phi_s", fit_steps=1)
teachers = TeacherSet((row,), grid=4, standardise=cfg, device=torch.device("cpu"))
mine = torch.load(batches, weights_only=True)[dist.rank() :: dist.world()]
teachers.fit(map(teachers.features, mine))
torch.save(teachers.state_dict(), f"{out}.{dist.rank()}")
dist.stop()
"""


@pytest.mark.dist
def test_two_ranks_fit_as_one(rows_of_teachers, tmp_path):
    alone = pool(rows_of_teachers[:1], kind="phi_s", fit_steps=1)
    batches = [images(alone, seed, count) for seed, count in enumerate((4, 6, 2, 5))]
    torch.save(batches, tmp_path / "batches.pt")
    (port,) = ranks_and_port(2)[3:]
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env |= {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"}
    words = [rows_of_teachers[0].source, str(tmp_path / "batches.pt"), str(tmp_path / "state")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, *words], env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}
        )
        for r in range(2)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    one, two = (torch.load(tmp_path / f"state.{r}", weights_only=True) for r in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    alone.load_state_dict(one)
    targets = [alone(batch)["vit"].standardised() for batch in batches]
    for kind in range(2):
        y_NC = np.concatenate([rows(target, kind) for target in targets])
        np.testing.assert_allclose(y_NC.mean(0), 0, atol=1e-3)
        np.testing.assert_allclose(y_NC.var(0, ddof=1), 1, rtol=1e-3)


@pytest.mark.lengthy
@pytest.mark.slow
@pytest.mark.dist
@DEMONSTRATION
def test_a_run_fits_first_and_its_rotation_survives_a_stop(tmp_path):
    phi_s = {"standardise__kind": "phi_s", "standardise__fit_steps": 2, "eval__on": "false"}
    phi_s |= {"optim__steps": 3, "run__save_every": 2}
    saved = tmp_path / "whole" / "checkpoints"
    printed = run(two(tmp_path / "whole", **phi_s))
    assert printed.count("fitting the teachers' statistics to 32 images (2 batches)") == 1
    printed = run(two(tmp_path / "resumed", **phi_s, resume=saved / "step_0000002"))
    assert "resumed after step 2" in printed
    assert "fitting" not in printed
    assert curve(tmp_path / "resumed") == {3: curve(tmp_path / "whole")[3]}
    folders = [saved / "step_0000002", saved / "step_0000003"]
    folders += [tmp_path / "resumed" / "checkpoints" / "step_0000003"]
    state, *others = map(statistics, folders)
    for other in others:
        assert other.keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in other.items())
    for name, width in (("effnet", 1280), ("dinov2", 384)):
        for basis_CC in state[f"{name}.basis_2CC"]:
            product_CC = basis_CC @ basis_CC.T
            torch.testing.assert_close(product_CC, torch.eye(width), rtol=0, atol=1e-5)
        assert (state[f"{name}.scale_2"] > 0).all()
        assert (state[f"{name}.scale_2"] != 1).all()


def test_undoing_it_gives_the_features() -> None:
    norm, features = fitted(tokens_of(0)), tokens_of(1)
    assert norm.basis_2CC[0].diff().abs().max() > 0.1
    for value, truth in zip(norm.undo(norm(features).standardised()), features, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-4)
