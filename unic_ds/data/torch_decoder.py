"""The torch decoder: applies the draws with torchvision in threads, where DALI is missing.

Each image goes through crop, resize, flip, colour, blur and solarise, rounding to 8 bits where DALI
does, so the two agree within 2 grey levels on average after every step. PIL decodes: torchvision's
own decoders are deprecated, read no BMP and do not turn a WebP upright.
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

UPRIGHT = {  # EXIF orientation -> what turns the stored image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Decoder:
    """Decodes batches in threads, in the order they were pushed."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        *,
        batch: int,
        depth: int,
        threads: int,
        colour: bool,
        device: torch.device,
    ):
        """`batch` and `depth` (batches pushed ahead) bind DALI only."""
        self.sizes, self.colour, self.device = sizes, colour, device
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="unic_ds-decode")
        self._ahead: deque[tuple[list[Tensor], list[Future[None]]]] = deque()

    def push(self, encoded: list[NDArray[np.uint8]], draws: Draws) -> None:
        """Begin a batch; `draws` are of the same images."""
        pixel_B33, mean_B33 = map(torch.from_numpy, augmentation.colour(draws))
        gpu = self.device.type == "cuda"  # pinned, so that the copy does not wait
        images = [
            torch.empty(len(encoded), 3, size, size, dtype=torch.uint8, pin_memory=gpu)
            for size in self.sizes
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
        self._ahead.append((images, futures))

    def pop(self) -> dict[int, Tensor]:
        """Size -> uint8 B3HW of the oldest batch; Undecodable where an image of it is."""
        images, futures = self._ahead.popleft()
        for future in futures:
            future.result()
        # torch keeps pinned memory until what copies from it is done.
        images = [image_B3HW.to(self.device, non_blocking=True) for image_B3HW in images]
        return dict(zip(self.sizes, images, strict=True))

    def restart(self) -> None:
        """Forget every batch that was pushed."""
        for _, futures in self._ahead:
            for future in futures:
                future.cancel()
        self._ahead.clear()

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
        """Write one image at every size, uint8 3HW, to `out`."""
        crop_3HW = decode(encoded, *one.window_B4[0].tolist())
        images = [resize(crop_3HW, size, flip=bool(one.flip_B[0])) for size in self.sizes]
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
        size, first = image_3HW.shape[-1], self.sizes[0]
        return blur(image_3HW, sigma * size / first, augmentation.blur_radius(size, first))


def decode(encoded: NDArray[np.uint8], x: int, y: int, width: int, height: int) -> Tensor:
    """The window of the upright image, uint8 RGB 3HW; Undecodable where the file is broken."""
    try:
        with opened(encoded.tobytes()) as image:
            image.load()
            whole = upright(image)
            if x + width > whole.width or y + height > whole.height:
                raise ValueError(f"the window ends outside {whole.width} x {whole.height}")
            window_HW3 = np.array(rgb(whole.crop((x, y, x + width, y + height))))
    except Exception as error:  # on hostile bytes PIL raises SyntaxError, OSError, KeyError, ...
        raise Undecodable(str(error) or type(error).__name__) from error
    return torch.from_numpy(window_HW3).permute(2, 0, 1)


def upright(image: ImageFile) -> Image.Image:
    """The image as its EXIF orientation wants it shown."""
    turn = UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits: alpha is dropped, 16 bits lose the lower 8.

    PIL takes every CMYK for Adobe's, which stores inverses, and inverts it; libjpeg and DALI only
    those with Adobe's marker.
    """
    if image.mode == "CMYK" and "adobe_transform" not in image.info:
        image = ImageChops.invert(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":  # straight to RGB PIL warns of a transparent palette
        image = image.convert("RGBA")
    return image.convert("RGB")


def resize(image_3HW: Tensor, size: int, *, flip: bool) -> Tensor:
    """Bicubic with antialias to a square, then mirrored."""
    square_3HW: Tensor = V.resize(
        image_3HW, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return square_3HW.flip(2) if flip else square_3HW


def recolour(image_3HW: Tensor, pixel_33: Tensor, shift_31: Tensor) -> Tensor:
    """The affine map of `draw.colour`, its mean's part worked out, rounded and clamped."""
    rgb_3P = torch.addmm(shift_31, pixel_33, image_3HW.flatten(1).float())
    return rgb_3P.round_().clamp_(0, 255).to(torch.uint8).view_as(image_3HW)


def blur(image_3HW: Tensor, sigma: float, radius: int) -> Tensor:
    """Gaussian of 2 radius + 1 taps along either side, mirrored about the edge pixels."""
    at_K = torch.arange(-radius, radius + 1, dtype=torch.float32)
    tap_K = torch.exp(-0.5 * (at_K / sigma) ** 2)
    tap_K /= tap_K.sum()
    wide_31HW = F.pad(image_3HW.float(), (radius, radius, radius, radius), mode="reflect")[:, None]
    blurred_31HW = F.conv2d(F.conv2d(wide_31HW, tap_K.view(1, 1, 1, -1)), tap_K.view(1, 1, -1, 1))
    return blurred_31HW[:, 0].round_().clamp_(0, 255).to(torch.uint8)


def solarise(image_3HW: Tensor) -> Tensor:
    """Values of 128 and more are inverted, which is the smaller of a value and its inverse."""
    return torch.minimum(image_3HW, 255 - image_3HW)
