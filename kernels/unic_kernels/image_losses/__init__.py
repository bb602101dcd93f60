"""Losses per teacher and image: `op.py` has the maths and the public function."""

from unic_kernels.image_losses.op import Distance, Pair, image_losses, image_losses_ref

__all__ = ["Distance", "Pair", "image_losses", "image_losses_ref"]
