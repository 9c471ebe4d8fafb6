"""Scenes: generated pictures with exact instance masks. Each is a pure function of (seed, number of the scene).

B scenes are rendered at once, vectorised over the batch; the same scene comes out whatever the batch. Masks are uint8:
0 background, 1.. objects, 255 ignore (where two outlines cross).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pretrain.data.scenes import dsprites, shapes, tetrominoes

Render = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(seed, numbers int64 [B]) -> images uint8 [B, H, W, 3], masks uint8 [B, H, W]"""

SCENES: dict[str, Render] = {
    "tetrominoes": tetrominoes.coloured,
    "tetrominoes-one-colour": tetrominoes.one_colour,
    "tetrominoes-white": tetrominoes.white,
    "multi-dsprites": dsprites.render,
    "shapes": shapes.render,
}
