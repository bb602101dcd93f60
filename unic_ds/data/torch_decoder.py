"""Decode with PIL and augment with torchvision in threads, if DALI is not used.

The steps are crop, resize, flip, colour, blur and solarise, rounded to 8 bits where DALI rounds, so
the two decoders agree within 2 grey levels on average after every step. PIL decodes because
torchvision's decoders are deprecated, read no BMP and ignore the orientation of a WebP.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops
from PIL.ImageFile import ImageFile
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from unic_ds.data import augmentation
from unic_ds.data.augmentation import Draws
from unic_ds.data.reader import Undecodable, opened, orientation

UPRIGHT = {  # EXIF orientation -> operation that makes the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Decoder:
    """Decodes batches in threads, in the order of `push`."""

    def __init__(
        self,
        outputs: int,
        *,
        reference: int,
        batch: int,
        depth: int,
        threads: int,
        colour: bool,
        device: torch.device,
    ):
        """Blur is in pixels of images of side `reference`.

        `outputs`, `batch` and `depth` have no effect; the DALI decoder needs them.
        """
        self.reference, self.colour, self.device = reference, colour, device
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="unic_ds-decode")
        self._flight: deque[tuple[list[Tensor], list[Future[None]]]] = deque()

    def push(self, encoded: list[NDArray[np.uint8]], draws: Draws, sides: tuple[int, ...]) -> None:
        """Start a batch of images with their augmentation, at each side in pixels."""
        pixel_B33, mean_B33 = map(torch.from_numpy, augmentation.colour(draws))
        gpu = self.device.type == "cuda"  # pinned, so that the copy does not wait
        images = [
            torch.empty(len(encoded), 3, side, side, dtype=torch.uint8, pin_memory=gpu)
            for side in sides
        ]
        futures = [
            self._threads.submit(
                self._image,
                image,
                draws.one(b),
                pixel_B33[b],
                mean_B33[b],
                [image_B3HW[b] for image_B3HW in images],
            )
            for b, image in enumerate(encoded)
        ]
        self._flight.append((images, futures))

    def pop(self) -> dict[int, Tensor]:
        """uint8 B3HW of the oldest batch by side; Undecodable if an image of it is broken."""
        images, futures = self._flight.popleft()
        for future in futures:
            future.result()
        # torch reuses pinned memory only after copies from it are done.
        images = [image_B3HW.to(self.device, non_blocking=True) for image_B3HW in images]
        return {image_B3HW.shape[-1]: image_B3HW for image_B3HW in images}

    def restart(self) -> None:
        """Drop all batches in flight."""
        for _, futures in self._flight:
            for future in futures:
                future.cancel()
        self._flight.clear()

    def close(self) -> None:
        """Stop the threads."""
        self.restart()
        self._threads.shutdown()

    def _image(
        self,
        encoded: NDArray[np.uint8],
        one: Draws,
        pixel_33: Tensor,
        mean_33: Tensor,
        out: list[Tensor],
    ) -> None:
        """Decode one image and write it to each of `out`, uint8 3HW, at its side."""
        crop_3HW = decode(encoded, *one.window_B4[0].tolist())
        flip = bool(one.flip_B[0])
        images = [resize(crop_3HW, image_3HW.shape[-1], flip=flip) for image_3HW in out]
        if self.colour:
            shift_31 = mean_33 @ images[0].float().mean((1, 2))[:, None]
            images = [recolour(image_3HW, pixel_33, shift_31) for image_3HW in images]
            if one.sigma_B[0] > 0:
                images = [self._blur(image_3HW, float(one.sigma_B[0])) for image_3HW in images]
            if one.solarise_B[0]:
                images = [solarise(image_3HW) for image_3HW in images]
        for image_3HW, out_3HW in zip(images, out, strict=True):
            out_3HW.copy_(image_3HW)

    def _blur(self, image_3HW: Tensor, sigma: float) -> Tensor:
        side, reference = image_3HW.shape[-1], self.reference
        radius = augmentation.blur_radius(side, reference)
        return blur(image_3HW, sigma * side / reference, radius)


def decode(encoded: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> Tensor:
    """A window of the upright image, uint8 RGB 3HW; Undecodable if the file is broken."""
    try:
        with opened(encoded.tobytes()) as image:
            image.load()
            full = upright(image)
            if x + width > full.width or y + height > full.height:
                raise ValueError(f"the window ends outside {full.width} x {full.height}")
            window_HW3 = np.array(rgb(full.crop((x, y, x + width, y + height))))
    except Exception as error:  # on hostile bytes PIL raises SyntaxError, OSError, KeyError, ...
        raise Undecodable(str(error) or type(error).__name__) from error
    return torch.from_numpy(window_HW3).permute(2, 0, 1)


def upright(image: ImageFile) -> Image.Image:
    """Apply the EXIF orientation of an image."""
    operation = UPRIGHT.get(orientation(image))
    return image if operation is None else image.transpose(operation)


def rgb(image: Image.Image) -> Image.Image:
    """Convert to three channels of 8 bits: drops alpha, and the lower 8 of 16 bits.

    PIL inverts every CMYK image, since Adobe stores inverted values; libjpeg and DALI invert only
    those with Adobe's marker.
    """
    if image.mode == "CMYK" and "adobe_transform" not in image.info:
        image = ImageChops.invert(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":  # converted directly, a transparent palette makes PIL warn
        image = image.convert("RGBA")
    return image.convert("RGB")


def resize(image_3HW: Tensor, size: int, *, flip: bool) -> Tensor:
    """Resize to a square, bicubic with antialiasing, then flip if asked."""
    square_3HW: Tensor = V.resize(
        image_3HW, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return square_3HW.flip(2) if flip else square_3HW


def recolour(image_3HW: Tensor, pixel_33: Tensor, shift_31: Tensor) -> Tensor:
    """Apply the affine map of `augmentation.colour`; `shift_31` is its part of the mean colour."""
    rgb_3P = torch.addmm(shift_31, pixel_33, image_3HW.flatten(1).float())
    return rgb_3P.round_().clamp_(0, 255).to(torch.uint8).view_as(image_3HW)


def blur(image_3HW: Tensor, sigma: float, radius: int) -> Tensor:
    """Gaussian blur with 2 radius + 1 taps per axis, reflected at the edge pixels."""
    at_K = torch.arange(-radius, radius + 1, dtype=torch.float32)
    tap_K = torch.exp(-0.5 * (at_K / sigma) ** 2)
    tap_K /= tap_K.sum()
    wide_31HW = F.pad(image_3HW.float(), (radius, radius, radius, radius), mode="reflect")[:, None]
    blurred_31HW = F.conv2d(F.conv2d(wide_31HW, tap_K.view(1, 1, 1, -1)), tap_K.view(1, 1, -1, 1))
    return blurred_31HW[:, 0].round_().clamp_(0, 255).to(torch.uint8)


def solarise(image_3HW: Tensor) -> Tensor:
    """Invert values of 128 and more: the smaller of a value and its inverse."""
    return torch.minimum(image_3HW, 255 - image_3HW)
