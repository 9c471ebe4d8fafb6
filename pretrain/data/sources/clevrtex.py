"""CLEVRTex (Karazija et al., arXiv 2111.10265): full, outd and camo, with instance masks.

INPUT: clevrtex_full (_outd, _camo) with folders of CLEVRTEX_full_000000.png and CLEVRTEX_full_000000_flat.png, or its
tar. Splits by number as in the authors' loader: test the first tenth, val the second, train the rest; outd is all test.
Unless raw, pictures are cut to the central 0.8 of the shorter side and brought to 128 px (image bilinear, mask
nearest), as the published AKOrN evaluation does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from configs.errors import UserError
from pretrain.data.decode import decode_image, decode_mask
from pretrain.data.sources.files import PictureSource
from pretrain.data.sources.picture import encode_labels, encode_png
from pretrain.data.sources.sample import Request
from pretrain.data.sources.tree import Tree, numbers_by_name, open_tree

SIZE = 128  # pixels
CENTRAL = 0.8
COMPLETE = {"full": 50_000, "outd": 10_000, "camo": 20_000}  # pictures
SHARES = {"test": (0.0, 0.1), "val": (0.1, 0.2), "train": (0.2, 1.0)}


def square(
    image: np.ndarray, labels: np.ndarray, top: int, left: int, side: int, resample: Image.Resampling
) -> tuple[np.ndarray, np.ndarray]:
    """A square of a picture and (nearest) its labels, brought to 128 px: uint8 [128, 128, 3], int32 [128, 128]."""
    box = (left, top, left + side, top + side)
    small = Image.fromarray(image).crop(box).resize((SIZE, SIZE), resample)
    cut = labels[top : top + side, left : left + side].astype(np.int32)
    return np.array(small), np.array(Image.fromarray(cut).resize((SIZE, SIZE), Image.Resampling.NEAREST))


class ClevrtexSource(PictureSource):
    """Pictures of one split."""

    def __init__(self, tree: Tree, files: Sequence[tuple[int, int]], raw: bool) -> None:
        """
        Args:
            files: numbers of image and mask in the tree.
        """
        self.tree, self.files, self.raw = tree, np.asarray(files, np.int64).reshape(-1, 2), raw

    def __len__(self) -> int:
        return len(self.files)

    def name_of(self, number: int) -> str:
        return self.tree.names[int(self.files[number, 0])]

    def parts_of(self, number: int) -> dict[str, bytes]:
        image, mask = (self.tree.read(int(file)) for file in self.files[number])
        if self.raw:
            return {"png": image, "instances.png": encode_labels(decode_mask(mask))}
        pixels, labels = decode_image(image), decode_mask(mask)
        height, width = labels.shape
        side = int(CENTRAL * min(height, width))
        top, left = (height - side) // 2, (width - side) // 2
        pixels, labels = square(pixels, labels, top, left, side, Image.Resampling.BILINEAR)
        return {"png": encode_png(pixels), "instances.png": encode_labels(labels)}


def open_source(name: str, request: Request) -> dict[str, ClevrtexSource]:
    """Sources by split of the variant `name` ends in: clevrtex-full, clevrtex-outd, clevrtex-camo.

    Raises:
        UserError: no such pictures there, or masks missing.
    """
    assert request.input is not None
    variant = name.removeprefix("clevrtex-")
    tree = open_tree(request.input, request.temporary)
    request.notes.extend(tree.notes)
    numbers = numbers_by_name(tree)
    pattern = re.compile(rf"(?:.*/)?CLEVRTEX_{variant}_([0-9]{{6}})\.png")
    found = sorted((int(match[1]), match[0]) for file in numbers if (match := pattern.fullmatch(file)))
    if not found:
        raise UserError(f"no CLEVRTex in {request.input}: looked for CLEVRTEX_{variant}_000000.png in it and below")
    files = []
    for _, image in found:
        mask = image.removesuffix(".png") + "_flat.png"
        if mask not in numbers:
            raise UserError(f"{request.input}: {mask} is missing; unpack the archive completely")
        files.append((numbers[image], numbers[mask]))
    if len(found) != COMPLETE[variant]:
        request.notes.append(
            f"{len(found):,} pictures, the whole set has {COMPLETE[variant]:,}: with all its archives splits are others"
        )
    if variant == "outd":
        return {"test": ClevrtexSource(tree, files, request.raw)}
    shares = {split: files[int(a * len(files)) : int(b * len(files))] for split, (a, b) in SHARES.items()}
    return {split: ClevrtexSource(tree, part, request.raw) for split, part in shares.items() if part}
