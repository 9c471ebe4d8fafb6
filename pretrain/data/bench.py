"""The loader alone: how many images a second it gives, and where the time goes.

`python pretrain/bench.py data CONFIG [key=value ...] [--seconds 10] [--json]`. Stages are timed on one core without
workers: read (bytes from shards), decode, crop (both views), collate (into the batch), device (colour). The loader is
then run as the training would run it (the rank's workers, prefetch and keep), as fast as it goes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from configs.errors import UserError
from configs.loader import load
from configs.schema import PretrainConfig
from pretrain.data import crop, decode
from pretrain.data.batch import Batch
from pretrain.data.colour import Colour
from pretrain.data.loader import Loader
from pretrain.data.shards import ShardReader
from pretrain.data.views import SimclrTransform

STAGES = ("read", "decode", "crop", "collate", "device")
CHUNK = 32


def stages(config: PretrainConfig, loader: Loader, transform: SimclrTransform, seconds: float) -> dict[str, float]:
    """Seconds per image of each stage, on one core, over as many images as `seconds` allow."""
    size, spent, count = transform.views.size, dict.fromkeys(STAGES, 0.0), 0
    warm = False  # the first chunk is not counted: on GPUs the colour is compiled for its size
    reader = ShardReader(loader.index, loader.staging)
    colour = Colour(transform.views, (0.5,) * 3, (0.5,) * 3)
    out = np.empty((CHUNK, transform.num_views, 3, size, size), np.uint8)
    begin = time.perf_counter()
    while not count or time.perf_counter() - begin < seconds:
        positions = np.arange(count, count + CHUNK)
        epochs, samples = loader.order.at(positions)
        mark = time.perf_counter()
        draws = transform.draws(epochs, samples)
        spent["decode"] += time.perf_counter() - mark
        for row, (sample, drawn) in enumerate(zip(samples.tolist(), draws)):
            marks = [time.perf_counter()]
            parts = reader.read(sample, only=transform.parts)
            marks.append(time.perf_counter())
            source = decode.Source.of(parts, max_pixels=config.data.max_pixels)
            boxes = [transform.crops.box(draw, source.height, source.width) for draw in drawn.tolist()]
            factor, scaled = source.coarsest(boxes, size)
            image = source.pixels(factor, passing=True)
            marks.append(time.perf_counter())
            views = crop.resized_many(image, scaled, size)
            marks.append(time.perf_counter())
            out[row] = views
            marks.append(time.perf_counter())
            for stage, took in zip(STAGES, np.diff(marks)):
                spent[stage] += float(took)
        places = [torch.from_numpy(array) for array in (samples, epochs, positions)]
        batch = Batch({"images": torch.from_numpy(out)}, places[0], places[1], places[2], config.seed)
        batch = batch.to(loader.device)
        mark = time.perf_counter()
        colour(batch)
        if loader.device.type == "cuda":
            torch.cuda.synchronize()
        spent["device"] += time.perf_counter() - mark
        count += CHUNK
        if not warm:
            warm, spent, count, begin = True, dict.fromkeys(STAGES, 0.0), 0, time.perf_counter()
    return {stage: took / count for stage, took in spent.items()}


def measure(config: PretrainConfig, *, seconds: float = 10.0) -> dict[str, Any]:
    """Images per second of the loader, and seconds per image by stage.

    Raises:
        UserError: the config has no views.
    """
    if config.views is None:
        raise UserError("the data benchmark measures views: the config has no views section")
    transform = SimclrTransform(config.views, config.seed, max_pixels=config.data.max_pixels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    loader = Loader(
        config.data, config.loading, transform, seed=config.seed, batch_size=config.batch_size, device=device
    )
    loader[0]
    started = time.perf_counter() - begin
    by_stage = stages(config, loader, transform, seconds / 2)
    loader[0]
    begin, step = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds / 2 or step == 0:
        step += 1
        loader[step]
    took = time.perf_counter() - begin
    loader.close()
    return {
        "images_per_s": step * config.batch_size / took,
        "workers": loader.num_workers,
        "keep": config.data.keep,
        "device": str(device),
        "first_batch_s": started,
        "seconds_per_image": by_stage,
        "images_per_s_and_core": 1 / sum(value for stage, value in by_stage.items() if stage != "device"),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    by_stage = result["seconds_per_image"]
    whole = sum(by_stage.values())
    lines = [f"{stage:8s} {1e6 * took:9.0f} us per image {took / whole:6.1%}" for stage, took in by_stage.items()]
    how = f"{result['workers']} workers" if result["workers"] else "no workers"
    return "\n".join(
        [
            *lines,
            f"host     {result['images_per_s_and_core']:9.0f} images/s and core (read to collate)",
            f"loader   {result['images_per_s']:9.0f} images/s with {how}, data.keep={result['keep']}, "
            f"to {result['device']}; first batch after {result['first_batch_s']:.1f} s",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """What `python pretrain/bench.py data` runs."""
    parser = argparse.ArgumentParser(prog="bench.py data", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", help="YAML of a pretraining run, or its name in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_args(argv)
    config = load(args.config, args.overrides)
    if not isinstance(config, PretrainConfig):
        raise UserError(f"{args.config} describes no pretraining run (job: {config.job})")
    result = measure(config, seconds=args.seconds)
    print(json.dumps(result) if args.json else table(result))
    return 0
