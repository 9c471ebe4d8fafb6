"""CLEVR-like scenes, rendered by pybullet on the CPU with shadows on the floor and exact masks. An optional extra.

After Johnson et al., "CLEVR", arXiv 1612.06890: cubes, spheres and cylinders of two sizes in eight colours, shiny or
dull, on a grey floor, seen by a camera that is moved a little for each scene; every object shows at least `VISIBLE`
pixels. 3 to 6 objects (`clevr-scenes`) or 3 to 10 (`clevr-scenes-10`), 128 px.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.errors import UserError
from pretrain.data.counter import key, uniform
from pretrain.data.sources.picture import encode_png
from pretrain.data.sources.sample import Broken, Request, Sample, key_of

SIZE = 128  # pixels
DEFAULT_COUNT = 20_000
FEWEST = 3
MOST = {"clevr-scenes": 6, "clevr-scenes-10": 10}
FLOOR = 3.0  # objects lie within this distance of the middle
RADII = (0.35, 0.7)
GAP = 0.25  # between objects
VISIBLE = 30  # pixels
ATTEMPTS = 50
PER_OBJECT = 24
TARGET = (0.0, 0.0, 0.2)  # what the camera looks at
FIELD = 38.0  # degrees, of the view
SHADE = 0.6  # brightness in a shadow
COLOURS = np.array(
    [
        [87, 87, 87],
        [173, 35, 35],
        [42, 75, 215],
        [29, 105, 20],
        [129, 74, 25],
        [129, 38, 192],
        [41, 208, 208],
        [255, 238, 51],
    ]
)  # grey, red, blue, green, brown, purple, cyan, yellow as CLEVR defines them


@dataclass(frozen=True)
class Item:
    """One object: kind 0 cube, 1 sphere, 2 cylinder; place on the floor; turn in radians; colour; shine in [0, 1]."""

    kind: int
    radius: float
    x: float
    y: float
    turn: float
    colour: np.ndarray
    shine: float


class ClevrScenes:
    """Scenes 0 to count - 1 of a seed."""

    classes: Sequence[str] = ()

    def __init__(self, count: int, seed: int, most: int) -> None:
        self.count, self.seed, self.most = count, seed, most

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: np.ndarray) -> Iterator[Sample | Broken]:
        """Scenes of these numbers, rendered in this process."""
        with _renderer() as bullet:
            for number in numbers.tolist():
                rendered = self._scene(bullet, number)
                if rendered is None:
                    yield Broken(str(number), f"no scene with all objects visible in {ATTEMPTS} attempts")
                else:
                    parts = {"png": encode_png(rendered[0]), "instances.png": encode_png(rendered[1])}
                    yield Sample(key_of(number), parts)

    def _scene(self, bullet: Any, number: int) -> tuple[np.ndarray, np.ndarray] | None:
        for attempt in range(ATTEMPTS):
            draws = uniform(key(self.seed, attempt, number, 0, "clevr scenes").reshape(1), 8 + self.most * PER_OBJECT)[
                0
            ]
            items = arrange(draws[8:].reshape(self.most, PER_OBJECT), FEWEST + int(draws[0] * (self.most + 1 - FEWEST)))
            if items is not None:
                image, labels = _render(bullet, items, draws[1:8])
                if np.bincount(labels.reshape(-1), minlength=len(items) + 1)[1:].min() >= VISIBLE:
                    return image, labels
        return None


def arrange(draws: np.ndarray, count: int) -> list[Item] | None:
    """Objects side by side from uniform numbers [most, PER_OBJECT]; None where one finds no place.

    Of an object's numbers the first five are kind, size, turn, colour, shine, the rest places to try.
    """
    items: list[Item] = []
    for numbers in draws[:count]:
        kind, radius = int(numbers[0] * 3), RADII[int(numbers[1] * 2)]
        for x, y in (2 * numbers[5 : 5 + (PER_OBJECT - 5) // 2 * 2].reshape(-1, 2) - 1) * FLOOR:
            if all(np.hypot(x - item.x, y - item.y) > radius + item.radius + GAP for item in items):
                colour = COLOURS[int(numbers[3] * len(COLOURS))] / 255
                items.append(Item(kind, radius, x, y, numbers[2] * np.pi, colour, float(numbers[4] > 0.5)))
                break
        else:
            return None
    return items


@contextmanager
def _renderer() -> Iterator[Any]:
    """pybullet, connected; the greeting that it prints when loaded is kept from the screen."""
    sys.stdout.flush(), sys.stderr.flush()
    kept, sink = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1), os.dup2(sink, 2)
    try:
        import pybullet
    finally:
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        for descriptor in (*kept, sink):
            os.close(descriptor)
    client = pybullet.connect(pybullet.DIRECT)
    try:
        yield pybullet
    finally:
        pybullet.disconnect(client)


def _render(bullet: Any, items: Sequence[Item], camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [128, 128, 3] and labels uint8 [128, 128]; `camera` holds seven uniform numbers."""
    bullet.resetSimulation()
    floor = bullet.createVisualShape(bullet.GEOM_BOX, halfExtents=[30, 30, 0.01], rgbaColor=[0.5, 0.5, 0.5, 1])
    bodies = [bullet.createMultiBody(0, -1, floor, [0, 0, -0.01])]
    bodies += [_body(bullet, item) for item in items]
    eye = np.array([7.4, -6.6, 5.4]) + 0.5 * (camera[:3] - 0.5)
    light = np.array([4 + 4 * camera[3], -4 + 4 * camera[4], 8])
    _, _, rgba, _, seen = bullet.getCameraImage(
        SIZE, SIZE, bullet.computeViewMatrix(eye.tolist(), list(TARGET), [0, 0, 1]),
        bullet.computeProjectionMatrixFOV(FIELD, 1.0, 0.1, 60),
        lightDirection=light.tolist(), lightColor=[1, 1, 1], shadow=0,
        lightAmbientCoeff=0.45, lightDiffuseCoeff=0.6, lightSpecularCoeff=0.4,
        renderer=bullet.ER_TINY_RENDERER,
    )  # fmt: skip
    image = np.array(rgba, np.uint8).reshape(SIZE, SIZE, 4)[..., :3]
    seen = np.asarray(seen).reshape(SIZE, SIZE)
    labels = np.zeros((SIZE, SIZE), np.uint8)
    for label, body in enumerate(bodies[1:], 1):
        labels[seen == body] = label
    dark = shadows(items, eye, light) & (labels == 0)
    image[dark] = (image[dark] * SHADE).astype(np.uint8)
    return image, labels


def shadows(items: Sequence[Item], eye: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Whether the floor that each pixel would show lies in the shadow of an object: bool [128, 128].

    The renderer's own shadow map does not reach over the floor; here each floor point looks towards the light.
    """
    forward = (np.array(TARGET) - eye) / np.linalg.norm(np.array(TARGET) - eye)
    right = np.cross(forward, [0, 0, 1])
    right /= np.linalg.norm(right)
    at = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    spread = np.tan(np.radians(FIELD) / 2) * at
    rays = forward + spread[None, :, None] * right - spread[:, None, None] * np.cross(right, forward)  # [H, W, 3]
    reach = np.where(rays[..., 2] < -1e-6, -eye[2] / np.minimum(rays[..., 2], -1e-6), np.inf)
    with np.errstate(invalid="ignore"):
        floor = (eye + reach[..., None] * rays)[..., :2]  # [H, W, 2], where z = 0
    dark = np.zeros((SIZE, SIZE), bool)
    for item in items:
        near = np.hypot(floor[..., 0] - item.x, floor[..., 1] - item.y) < 5 * item.radius
        for height in np.linspace(0, 2 * item.radius, 32)[1:]:
            dark[near] |= _holds(item, floor[near] + light[:2] / light[2] * height, height)
    return dark


def _holds(item: Item, points: np.ndarray, height: float) -> np.ndarray:
    """Whether points [n, 2] at a height above the floor lie inside an object."""
    dx, dy = points[:, 0] - item.x, points[:, 1] - item.y
    if item.kind == 0:
        side = item.radius / np.sqrt(2)
        u = np.cos(item.turn) * dx + np.sin(item.turn) * dy
        v = np.cos(item.turn) * dy - np.sin(item.turn) * dx
        return (np.abs(u) <= side) & (np.abs(v) <= side) & (height <= 2 * side)
    inside = item.radius**2 - ((height - item.radius) ** 2 if item.kind == 1 else 0.0)
    return dx**2 + dy**2 <= inside


def _body(bullet: Any, item: Item) -> int:
    shine = [0.9 * item.shine] * 3
    colour = [*item.colour, 1]
    r = item.radius
    shape = {
        0: {"shapeType": bullet.GEOM_BOX, "halfExtents": [r / np.sqrt(2)] * 3},
        1: {"shapeType": bullet.GEOM_SPHERE, "radius": r},
        2: {"shapeType": bullet.GEOM_CYLINDER, "radius": r, "length": 2 * r},
    }[item.kind]
    visual = bullet.createVisualShape(**shape, rgbaColor=colour, specularColor=shine)
    height = r / np.sqrt(2) if item.kind == 0 else r
    turn = bullet.getQuaternionFromEuler([0, 0, item.turn])
    return int(bullet.createMultiBody(0, -1, visual, [item.x, item.y, height], turn))


def open_source(name: str, request: Request) -> dict[str, ClevrScenes]:
    """One set without splits.

    Raises:
        UserError: pybullet is not installed.
    """
    from importlib.util import find_spec

    if find_spec("pybullet") is None:
        raise UserError(f"{name} is rendered by pybullet, which is not installed: pip install pybullet")
    count = DEFAULT_COUNT if request.count is None else request.count
    return {"": ClevrScenes(count, request.seed, MOST[name])}
