"""Protocols of object discovery by name: how a data set's images are cut, and into how many segments.

Owns: the published protocols (arXiv 2410.13821 and its code), without torch, so that a wrong name fails at the prompt.
Images that already have the final size are taken as they are; those of the original size are cut as published; all
others are resized to the final shorter side and cut centrally.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preset:
    """One protocol.

    Attributes:
        size: side of the square image that is scored, in pixels.
        clusters: k.
        raw: (height, width) of the original images, and
        box: the part of them that is used, as (top, left, height, width).
        resize: of images; masks are always resized to the nearest pixel.
        images: how many the published test set has; informative.
        note: what a reader of the scores should know.
    """

    size: int
    clusters: int
    raw: tuple[int, int] | None = None
    box: tuple[int, int, int, int] | None = None
    resize: Literal["bilinear", "nearest"] = "bilinear"
    images: int | None = None
    note: str = ""


_CLEVRTEX = Preset(128, 11, raw=(240, 320), box=(24, 64, 192, 192), note="central 0.8 of the shorter side")

PRESETS: dict[str, Preset] = {
    "tetrominoes": Preset(32, 4, raw=(35, 35), box=(1, 1, 32, 32), images=320),
    "dsprites": Preset(64, 7, images=320, note="coloured sprites on grey, up to 5"),
    "shapes": Preset(40, 5, note="outlined shapes, 2 to 4; not in the AKOrN paper"),
    "clevr": Preset(128, 11, raw=(240, 320), box=(29, 64, 192, 192), images=320, note="CLEVR6: up to 6 objects"),
    "clevrtex-full": _CLEVRTEX,
    "clevrtex-outd": _CLEVRTEX,
    "clevrtex-camo": _CLEVRTEX,
    "voc": Preset(
        256, 4, resize="nearest", note="val; images resized to the nearest pixel, as the published code does"
    ),
    "voc-320": Preset(320, 4, note="val; bilinear, the size used by the literature on slots"),
    "coco": Preset(256, 7, note="val2017; crowds dropped, overlapping pixels ignored when the shards were written"),
}
