"""A whole object-discovery evaluation of an AKOrN backbone against the way the published one works, on equal weights.

    python tests/benchmarks/evaluation.py [--images 320 64] [--threads 2] [--precision fp32]

Features, clustering and scores of scenes in memory (the loader is measured elsewhere), one random start. The baseline
runs the tests' transcription of the published model in fp32, without gradients and in batches, then clusters and scores
an image at a time (tests/benchmarks/clustering.py); ours is what `object_discovery.py` runs. Both are timed in turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
import torch.nn.functional as F

from configs.presets import Preset
from downstream import discovery
from downstream.backbone import load
from downstream.encoder import Encoder
from downstream.grouping import Grouping
from downstream.samples import Scene
from pretrain.models.oscillators import oscillators_of
from tests.benchmarks import clustering
from tests.plain.models import AKOrN
from tests.plain.record import randomise

BATCH = 64
SIZES: dict[int, dict[str, Any]] = {
    32: {"n": 4, "ch": 128, "L": 1, "T": 8, "psize": 4, "imsize": 32, "c_norm": "none"},
    128: {"n": 4, "ch": 256, "L": 1, "T": 8, "psize": 8, "imsize": 128, "c_norm": "gn"},
}


def coloured(images: int, size: int, patch: int) -> Scene:
    """Scenes of regions, each of one colour with noise."""
    _, truth = clustering.scenes(images, size // patch, channels=1, seed=size)
    instances = F.interpolate(torch.from_numpy(truth)[:, None].float(), size=(size, size))[:, 0].long()
    generator = torch.Generator().manual_seed(size)
    palette = torch.rand(images, clustering.CLUSTERS, 3, generator=generator)
    colours = palette[torch.arange(images)[:, None, None], instances].permute(0, 3, 1, 2)
    noise = 0.1 * torch.randn(colours.shape, generator=generator)
    return Scene((colours + noise).clamp(0, 1), instances, None, list(range(images)))


def models(arguments: dict[str, Any], folder: Path, precision: str) -> tuple[AKOrN, Encoder]:
    """The transcription with random weights, and our encoder of the same weights."""
    torch.manual_seed(0)
    plain = AKOrN(**arguments).eval()
    randomise(plain)
    torch.save(plain.state_dict(), folder / "plain.pth")
    sizes = {"T": arguments["T"], "imsize": arguments["imsize"]}
    return plain, load(str(folder / "plain.pth"), args=sizes, img_size=arguments["imsize"], precision=precision)


def as_published(plain: AKOrN, scene: Scene, start: torch.Tensor) -> list[float]:
    """FG-ARI of each image."""
    scores: list[float] = []
    for first in range(0, len(scene.images), BATCH):
        images = scene.images[first : first + BATCH]
        with torch.inference_mode():
            maps = F.normalize(plain(images, start.expand(len(images), -1, -1, -1, -1))["readout"], dim=1)
        scores += clustering.one_at_a_time(maps.numpy(), scene.instances[first : first + BATCH].numpy())[1]
    return scores


def ours(encoder: Encoder, scene: Scene, protocol: discovery.Protocol) -> list[float]:
    """FG-ARI of each image."""
    scores: list[float] = []
    for first in range(0, len(scene.images), BATCH):
        part = slice(first, first + BATCH)
        block = Scene(scene.images[part], scene.instances[part], None, scene.samples[part])
        scores += discovery.score_scene(encoder, block, protocol)["fg_ari"][0]
    return scores


def compare(size: int, images: int, rounds: int, precision: str, folder: Path) -> None:
    arguments = SIZES[size]
    scene = coloured(images, size, arguments["psize"])
    plain, encoder = models(arguments, folder, precision)
    side = size // arguments["psize"]
    start = oscillators_of(encoder.model.draw_start(0), arguments["n"], (side, side))
    protocol = discovery.Protocol(Preset(size, clustering.CLUSTERS), Grouping(clusters=clustering.CLUSTERS), starts=1)
    ours(encoder, Scene(scene.images[:2], scene.instances[:2], None, [0, 1]), protocol)  # builds the kernels
    seconds = np.zeros(2)
    for _ in range(rounds):
        begin = time.perf_counter()
        mine = ours(encoder, scene, protocol)
        middle = time.perf_counter()
        theirs = as_published(plain, scene, start)
        seconds += middle - begin, time.perf_counter() - middle
    equal = np.isclose(mine, theirs, atol=1e-6, equal_nan=True).mean()
    print(
        f"{size} px, C {arguments['ch']}, {images} images, {precision}: published way {seconds[1] / rounds:.2f} s, "
        f"ours {seconds[0] / rounds:.2f} s, ratio {seconds[1] / seconds[0]:.1f}; "
        f"equal FG-ARI in {equal:.1%} of images, "
        f"means {np.nanmean(theirs):.4f} and {np.nanmean(mine):.4f}",
        flush=True,
    )


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=[320, 64], help="of 32 px, of 128 px")
    parser.add_argument("--rounds", type=int, default=2, help="turns that the two take")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="ours; the baseline is in fp32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        for size, images in zip(SIZES, options.images):
            compare(size, images, options.rounds, options.precision, Path(folder))


if __name__ == "__main__":
    main()
