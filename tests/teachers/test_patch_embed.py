"""The measurement of patch embeddings: both ways are the same function, and it prints both."""

from __future__ import annotations

import json
import subprocess
import sys

import patch_embed
import torch
from timm.layers import PatchEmbed


def test_a_linear_layer_over_pixels_is_the_convolution():
    torch.manual_seed(0)
    embed = PatchEmbed(28, 7, 3, 16).double()
    image_B3HW = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    found = {}
    for name, tokens_BND in (
        ("conv", embed(image_B3HW)),
        ("linear", patch_embed.linear(embed, image_B3HW)),
    ):
        embed.zero_grad()
        (tokens_BND * torch.arange(16)).sum().backward()
        found[name] = (tokens_BND, *(p.grad.clone() for p in embed.parameters()))
    for conv, linear in zip(found["conv"], found["linear"], strict=True):
        torch.testing.assert_close(linear, conv)


def test_it_prints_one_line():
    command = [sys.executable, patch_embed.__file__, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["largest_difference"] < 0.05  # bf16
    for suffix in ("", "_backward"):
        conv, linear = result[f"conv{suffix}_ms"], result[f"linear{suffix}_ms"]
        assert conv > 0 and linear > 0 and result[f"ratio{suffix}"] == conv / linear
    assert result["device"] == "cpu" or torch.cuda.is_available()
