"""Unsupervised object discovery: group a backbone's features, image by image, and compare with the masks.

python downstream/object_discovery.py --ckpt runs/quickstart --data data/tetrominoes/test --preset tetrominoes
python downstream/object_discovery.py --ckpt runs/imagenet --data shards/voc-val --preset voc --uptile 4
python downstream/object_discovery.py --ckpt runs/imagenet --image photo.jpg --k 5
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from configs import ObjectDiscoveryConfig, UserError
from configs.errors import run as run_entry
from configs.flags import parse
from downstream import score_table

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from downstream.discovery import Protocol
    from downstream.encoder import Control, Encoder

TASK = "object_discovery"
Scores = dict[str, "np.ndarray"]  # name -> [S, N]


def run(config: ObjectDiscoveryConfig, *, out_dir: Path | None = None) -> dict[str, Any]:
    """Evaluate as configured; writes results.json and pictures, prints a table, returns what results.json holds.

    With RANK and WORLD_SIZE set, processes share the images; rank 0 writes, the others return {}.
    """
    from downstream import results

    if config.ckpt is None:
        raise UserError("no backbone: give --ckpt (run, export, weights file or timm name)")
    out = results.folder_of(config.ckpt, TASK, out=out_dir or config.out, name=config.name)
    _use_cores(config)
    if config.image is not None:
        from downstream.photo import segment_picture

        return segment_picture(config, out)
    return _Evaluation(config, out).run()


class _Evaluation:
    """One evaluation: its data, its protocol, and the models and baselines under it."""

    def __init__(self, config: ObjectDiscoveryConfig, out: Path) -> None:
        from downstream.discovery import preset_of, protocol_of
        from downstream.samples import INSTANCES, Samples

        self.config, self.out, self.began = config, out, time.monotonic()
        self.preset = preset_of(config)
        self.samples = Samples(
            config.data or "", limit=config.images, needs=(INSTANCES,), workers=config.workers or os.cpu_count() or 1
        )
        self.protocol = protocol_of(config, self.preset)
        self.parts = out / ".parts"
        self._codebooks: dict[str, Tensor] = {}

    def run(self) -> dict[str, Any]:
        encoders = self._encoders()
        models = [self._model(encoder) for encoder in encoders]
        grid = self._grid(encoders[0])
        baselines = [self._baseline(name, grid) for name in self.config.baselines]
        from downstream import results

        if results.ranks()[0] != 0:
            return {}
        from downstream.discovery import summarise

        document = {
            "models": [_described(encoder, scores) for encoder, scores in models],
            "baselines": [_baseline_entry(name, scores) for name, scores in baselines],
            "differences": self._differences(models),
            "seconds": round(time.monotonic() - self.began, 2),
        }
        protocol = {
            "data": self.config.data,
            "data_fingerprint": self.samples.fingerprint,
            "images": len(self.samples),
            "preset_name": self.config.preset,
            **self._protocol_of(encoders[0]).described(),
            "features": self.config.layer,
            "steps": self.config.steps,
            "input_size": self.config.input_size,
            "precision": self.config.precision,
            "seed": self.config.seed,
        }
        pictures = self._pictures(models[0][0], summarise(models[0][1]["fg_ari"])["images"])
        results.write(self.out, TASK, self.config, protocol, pictures=pictures, **document)
        shutil.rmtree(self.parts, ignore_errors=True)
        score_table.show(document, protocol, self.out)
        return {"protocol": protocol, "pictures": pictures, **document}

    def _encoders(self) -> list[Encoder]:
        """The models of the table: each --ckpt, then the controls of the first."""
        first = self.config.ckpt
        assert first is not None
        plain = [self._load(ckpt) for ckpt in (first, *self.config.also)]
        return plain + [self._load(first, control) for control in self.config.controls if _applies(control, plain[0])]

    def _load(self, ckpt: str, control: Control | None = None) -> Encoder:
        from downstream.backbone import load

        config = self.config
        size = config.input_size or self.preset.size
        args = {} if config.also and Path(ckpt).is_dir() else config.args  # where others in the table may take them
        return load(
            ckpt, arch=config.arch, args=args, img_size=size, control=control, steps=config.steps,
            layer=config.layer, device=config.device, precision=config.precision, seed=config.seed,
        )  # fmt: skip

    def _model(self, encoder: Encoder) -> tuple[Encoder, Scores]:
        from downstream import discovery, results

        protocol = self._protocol_of(encoder)
        key = results.key_of(encoder.digest(), self.samples.fingerprint, protocol.described(), protocol.batch_size)
        blocks = self.samples.blocks(protocol.batch_size)

        def work(block: int) -> dict[str, Any]:
            scene = self.samples.scenes(blocks[block], self.preset)
            return discovery.score_scene(encoder, scene, protocol)

        scores = discovery.gather(results.shared_blocks(self.parts / key, len(blocks), work))
        if protocol.choose == "energy" and "energy" in scores:
            scores = discovery.choose_start(scores)
        return encoder, scores

    def _protocol_of(self, encoder: Encoder) -> Protocol:
        """The protocol, with the codebook of this model's features where it asks for one."""
        if self.config.method != "codebook":
            return self.protocol
        from downstream.discovery import learn_codebook

        digest = encoder.digest()
        if digest not in self._codebooks:
            self._codebooks[digest] = learn_codebook(encoder, self.samples, self.protocol, seed=self.config.seed)
        return dataclasses.replace(self.protocol, codebook=self._codebooks[digest])

    def _baseline(self, name: str, grid: tuple[int, int]) -> tuple[str, Scores]:
        from downstream import baselines, discovery, metrics, results

        blocks = self.samples.blocks(self.protocol.batch_size)

        def work(block: int) -> dict[str, Any]:
            scene = self.samples.scenes(blocks[block], self.preset)
            if name == "grid":
                scores = baselines.grid_scores(scene, grid)
            else:
                prediction = baselines.BASELINES[name](scene, self.protocol.grouping.clusters)
                scores = metrics.score(scene.instances, prediction, scene.classes)
            return {score: [values.tolist()] for score, values in scores.items()}

        key = results.key_of(name, self.samples.fingerprint, self.protocol.described(), grid)
        return name, discovery.gather(results.shared_blocks(self.parts / key, len(blocks), work))

    def _grid(self, encoder: Encoder) -> tuple[int, int]:
        """Tokens of a model, up-tiling included."""
        side = encoder.side or self.preset.size
        tokens = max(1, side // encoder.patch) * self.protocol.uptile
        return tokens, tokens

    def _differences(self, models: list[tuple[Encoder, Scores]]) -> list[dict[str, Any]]:
        """The first model against each other one, with bootstrap intervals over images."""
        import numpy as np

        from downstream.discovery import summarise
        from downstream.results import paired_bootstrap

        def values(scores: Scores, name: str) -> np.ndarray:
            return np.array(summarise(scores[name])["images"], dtype=np.float64)

        (first, ours), *others = models
        return [
            {"model": first.name, "against": other.name, "score": name}
            | paired_bootstrap(values(ours, name), values(theirs, name), resamplings=self.config.bootstrap)
            for other, theirs in others
            for name in ("fg_ari", "mbo_i")
        ]

    def _pictures(self, encoder: Encoder, values: list[float]) -> list[str]:
        """The first images, and the best, middle and worst ones."""
        if not self.config.pictures:
            return []
        count = min(self.config.pictures, len(self.samples))
        defined = sorted((value, sample) for sample, value in enumerate(values) if value == value)
        third = max(1, count // 3)
        middle = max(0, (len(defined) - third) // 2)
        extremes = [*defined[::-1][:third], *defined[middle : middle + third], *defined[:third]]
        sheets = {"pictures.png": list(range(count)), "extremes.png": [sample for _, sample in extremes]}
        return [
            str(self._sheet(encoder, self.out / name, chosen, values).name) for name, chosen in sheets.items() if chosen
        ]

    def _sheet(self, encoder: Encoder, path: Path, chosen: list[int], values: list[float]) -> Path:
        from downstream import baselines, discovery, pictures
        from downstream.grouping import enlarge

        scene = self.samples.scenes(chosen, self.preset)
        size = (self.preset.size, self.preset.size)
        clusters = self.protocol.grouping.clusters

        def segmented(model: Encoder) -> Tensor:
            return enlarge(discovery.segments(model, scene.images, self._protocol_of(model))[0], size)

        columns = {encoder.name: segmented(encoder)}
        if "random" in self.config.controls:
            columns["random weights"] = segmented(self._load(self.config.ckpt or "", "random"))
        columns[baselines.TITLES["colour_position"]] = baselines.colour_position(scene, clusters)
        notes = [f"FG-ARI {100 * values[sample]:.0f}" for sample in chosen]
        return pictures.sheet(path, scene.images, columns, truth=scene.instances, notes=notes)


def _described(encoder: Encoder, scores: Scores) -> dict[str, Any]:
    from downstream.discovery import summarise

    return {
        "name": encoder.name,
        "digest": encoder.digest(),
        "scores": {name: summarise(values) for name, values in scores.items()},
    }


def _baseline_entry(name: str, scores: Scores) -> dict[str, Any]:
    from downstream.baselines import TITLES
    from downstream.discovery import summarise

    return {"name": TITLES[name], "scores": {score: summarise(values) for score, values in scores.items()}}


def _applies(control: str, encoder: Encoder) -> bool:
    return control == "random" or encoder.has_oscillators


def _use_cores(config: ObjectDiscoveryConfig) -> None:
    import torch

    if config.workers is not None:
        torch.set_num_threads(config.workers)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; every key of the configuration is a flag."""
    config = parse(
        ObjectDiscoveryConfig, argv, description=__doc__ or "", config="object_discovery", spill=("ckpt", "also")
    )
    run(config)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
