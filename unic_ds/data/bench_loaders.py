"""The data loaders that `bench` compares: torchvision's, and ours with each decoder."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from unic_ds.config import Data
from unic_ds.data import Source, Stream, backend
from unic_ds.data.source import MAX_MB, Mixture
from unic_ds.process import console

PHOTOGRAPHS = 384  # made if no images are given

Batches = Stream | Generator[torch.Tensor, None, None]
Loader = Callable[[], Batches]
"""Starts an endless iterator over batches."""


def make_photographs(folder: Path, count: int = PHOTOGRAPHS) -> Path:
    """Write JPEGs of 500 x 375 in ten classes: crops of scikit-learn's two photographs."""
    scenes = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in console.track(range(count), count, "photographs"):
        scene = scenes[i % len(scenes)]
        width = int(rng.integers(380, scene.height * 4 // 3))
        height = width * 3 // 4
        x, y = int(rng.integers(scene.width - width)), int(rng.integers(scene.height - height + 1))
        file = folder / f"class_{i % 10}" / f"{i:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        cut = scene.crop((x, y, x + width, y + height)).resize((500, 375))
        cut.save(file, quality=90)
    return folder


def all_loaders(
    source: Source, packed: Source, size: int, batch: int, threads: int
) -> dict[str, Loader]:
    """Every loader that can run here, by name."""
    torch_cfg, dali_cfg = (Data(backend=name, threads=threads) for name in ("torch", "dali"))
    loaders: dict[str, Loader] = {
        "torchvision, PIL": lambda: torchvision_batches(source, size, batch, threads, tensors=False)
    }
    loaders["torchvision, tensors"] = lambda: torchvision_batches(
        source, size, batch, threads, tensors=True
    )
    loaders["torch decoder"] = stream_loader(source, torch_cfg, size, batch)
    if backend(Data()) == "dali":
        loaders["DALI on the CPU"] = stream_loader(source, dali_cfg, size, batch)
        loaders["DALI on the CPU, packed"] = stream_loader(packed, dali_cfg, size, batch)
        if torch.cuda.is_available():
            loaders["DALI mixed (GPU)"] = stream_loader(source, dali_cfg, size, batch, "cuda")
            loaders["DALI mixed (GPU), packed"] = stream_loader(
                packed, dali_cfg, size, batch, "cuda"
            )
    return loaders


def stream_loader(source: Source, cfg: Data, size: int, batch: int, device: str = "cpu") -> Loader:
    """A loader of our streams."""
    return lambda: Stream(
        source,
        cfg,
        seed=0,
        sizes=(size,),
        batch_size=batch,
        micro=batch,
        rank=0,
        world=1,
        device=torch.device(device),
    )


@dataclass(frozen=True, eq=False)
class SlowSource(Mixture):
    """A source that delays every read, as a remote file server does."""

    latency_s: float = 0.0

    def read(self, index: int, max_mb: float = MAX_MB) -> NDArray[np.uint8]:
        """The encoded bytes of a sample, after the latency."""
        time.sleep(self.latency_s)
        return super().read(index, max_mb)


def slowed(source: Source, latency_s: float) -> Source:
    """The same samples, with a latency in seconds for each read."""
    fields = source.folder, source.names, source.classes, source.label_N
    whole = (source,), (1.0,), (str(source.folder),)
    return SlowSource(*fields, *whole, latency_s) if latency_s else source


class TorchvisionDataset(Dataset[torch.Tensor]):
    """Images decoded by PIL and augmented by torchvision's transforms, as most scripts do it."""

    def __init__(self, source: Source, size: int, *, tensors: bool):
        """With `tensors`, torchvision augments tensors; otherwise PIL images."""
        cfg = Data()
        self.source, self.tensors = source, tensors
        ratio = (1 / cfg.ratio_max, cfg.ratio_max)
        bicubic = v2.InterpolationMode.BICUBIC
        colour = v2.ColorJitter(cfg.brightness, cfg.contrast, cfg.saturation, cfg.hue)
        sigma = (cfg.blur_min, cfg.blur_max)
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(size, (cfg.crop_min, 1), ratio, bicubic, antialias=True),
                v2.RandomHorizontalFlip(cfg.flip),
                v2.RandomApply([colour], cfg.jitter),
                v2.RandomGrayscale(cfg.grey),
                v2.RandomApply([v2.GaussianBlur(9, sigma)], cfg.blur),
                v2.RandomSolarize(128, cfg.solarise),
            ]
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(io.BytesIO(self.source.read(index).tobytes())) as file:
            image = file.convert("RGB")
        if self.tensors:
            return self.augment(V.pil_to_tensor(image))
        return V.pil_to_tensor(self.augment(image))


def torchvision_batches(
    source: Source, size: int, batch: int, workers: int, *, tensors: bool
) -> Generator[torch.Tensor, None, None]:
    """Endless batches of a DataLoader with torchvision's transforms."""
    torch.manual_seed(0)
    loader = DataLoader(
        TorchvisionDataset(source, size, tensors=tensors),
        batch_size=batch,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    while True:
        yield from loader
