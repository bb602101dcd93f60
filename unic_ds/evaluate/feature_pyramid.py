"""A detector on one feature map: ViTDet's simple feature pyramid under torchvision's heads.

Layers, anchors and heads as in arXiv 2203.16527, appendix A.2, all with layer normalisation. The
map comes from a frozen encoder: only what is here is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

CELL = 16
"""Pixels of the detector's frame per patch, for every patch size: strides are powers of two."""
ANCHORS = tuple((side,) for side in (32, 64, 128, 256, 512))
RATIOS = ((0.5, 1.0, 2.0),) * len(ANCHORS)


SMALL = 256
"""Pixels under which an image has fewer regions: on a CPU they cost more than the encoder."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Sizes of pyramid and heads; the defaults are ViTDet's."""

    channels: int = 256
    hidden: int = 1024
    regions: int = 512
    """Regions of an image that the box head is trained on."""
    proposals: int = 1000
    """Regions of an image that are proposed; before suppression of each map, in training twice."""

    def for_images(self, size: int) -> Heads:
        """An eighth of the regions for images under 256 px, which hold few objects."""
        if size >= SMALL:
            return self
        return replace(self, regions=self.regions // 8, proposals=self.proposals // 8)


class SimplePyramid(nn.Module):
    """Maps of 4, 2, 1 and 1/2 times the side of the encoder's last map, and 1/4 for proposals."""

    def __init__(self, width: int, channels: int):
        """`width` is that of the encoder, `channels` that of the maps."""
        super().__init__()
        self.out_channels = channels
        half, quarter = max(1, width // 2), max(1, width // 4)
        upwards: list[list[nn.Module]] = [
            [
                nn.ConvTranspose2d(width, half, 2, 2),
                LayerNorm2d(half),
                nn.GELU(),
                nn.ConvTranspose2d(half, quarter, 2, 2),
            ],
            [nn.ConvTranspose2d(width, half, 2, 2)],
            [],
            [nn.MaxPool2d(2)],
        ]
        self.levels = nn.ModuleList(
            nn.Sequential(
                *layers,
                nn.Conv2d(inner, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for layers, inner in zip(upwards, (quarter, half, width, width), strict=True)
        )

    def forward(self, map_BCGG: Tensor) -> dict[str, Tensor]:
        """Maps by torchvision's names, the largest first; G is 2 or more."""
        maps = {str(at): level(map_BCGG) for at, level in enumerate(self.levels)}
        return maps | {"pool": F.max_pool2d(maps["3"], kernel_size=1, stride=2)}


def detector(width: int, classes: int, heads: Heads, *, masks: bool) -> FasterRCNN:
    """Faster R-CNN, or Mask R-CNN if `masks`, on maps of `width` channels.

    Its class 0 is the background.
    """
    channels, layers = heads.channels, [heads.channels] * 4
    settings = {
        "rpn_anchor_generator": AnchorGenerator(ANCHORS, RATIOS),
        "rpn_head": RPNHead(channels, len(RATIOS[0]), conv_depth=2),
        "box_head": FastRCNNConvFCHead(
            (channels, 7, 7), layers, [heads.hidden], norm_layer=LayerNorm2d
        ),
        "box_predictor": FastRCNNPredictor(heads.hidden, classes + 1),
        "box_batch_size_per_image": heads.regions,
        "rpn_pre_nms_top_n_train": 2 * heads.proposals,
        "rpn_post_nms_top_n_train": heads.proposals,
        "rpn_pre_nms_top_n_test": heads.proposals,
        "rpn_post_nms_top_n_test": heads.proposals,
    }
    pyramid = SimplePyramid(width, channels)
    if not masks:
        return FasterRCNN(pyramid, **settings)
    settings |= {
        "mask_head": MaskRCNNHeads(channels, layers, 1, norm_layer=LayerNorm2d),
        "mask_predictor": MaskRCNNPredictor(channels, channels, classes + 1),
    }
    return MaskRCNN(pyramid, **settings)


def losses(model: FasterRCNN, map_BCGG: Tensor, targets: Sequence[dict[str, Tensor]]) -> Tensor:
    """Sum of the losses; `targets` are torchvision's, with boxes and masks in the frame."""
    model.train()
    found, terms = run(model, map_BCGG, list(targets))
    assert not found
    return torch.stack(list(terms.values())).sum()


def detect(model: FasterRCNN, map_BCGG: Tensor) -> list[dict[str, Tensor]]:
    """At most 100 boxes (D, 4) in the frame, labels from 1, scores and masks (D, 1, 28, 28)."""
    model.eval()
    return run(model, map_BCGG, None)[0]


def run(
    model: FasterRCNN, map_BCGG: Tensor, targets: list[dict[str, Tensor]] | None
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The forward of torchvision's model without its transform: detections and losses."""
    side = CELL * map_BCGG.shape[-1]
    # The anchors need the images' shape alone. All images count as full squares: torchvision would
    # infer the strides from the shape without padding.
    pixels_B3SS = map_BCGG.new_empty(1).expand(len(map_BCGG), 3, side, side)
    images = ImageList(pixels_B3SS, [(side, side)] * len(map_BCGG))
    maps = model.backbone(map_BCGG)
    proposals, rpn_losses = model.rpn(images, maps, targets)
    found, box_losses = model.roi_heads(maps, proposals, images.image_sizes, targets)
    return found, rpn_losses | box_losses
