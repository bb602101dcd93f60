"""Losses per teacher and image; `op.py` has the maths and the public function."""

from unic_kernels.image_losses.arguments import Distance, Pair
from unic_kernels.image_losses.op import image_losses
from unic_kernels.image_losses.ref import image_losses_ref

__all__ = ["Distance", "Pair", "image_losses", "image_losses_ref"]
