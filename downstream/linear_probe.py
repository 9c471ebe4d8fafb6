"""Linear probe and k-NN on frozen features.

python downstream/linear_probe.py --ckpt runs/cifar10 --train data/cifar10/train --data data/cifar10/test
python downstream/linear_probe.py --ckpt runs/imagenet --train shards/train --data shards/val --low-shot 0.01 0.1
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from configs import LinearProbeConfig, UserError
from configs.errors import run as run_entry
from configs.flags import parse

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from downstream.encoder import Control, Encoder
    from downstream.features import Table
    from downstream.samples import Samples

TASK = "linear_probe"
KEYS = "keys.txt"  # keys of the samples in order, beside features that are kept
CROP_SHARE = 0.875  # of the resized image's side that the centre crop keeps


def run(config: LinearProbeConfig, *, out_dir: Path | None = None) -> dict[str, Any]:
    """Evaluate as configured; writes results.json, prints a table, returns what results.json holds.

    With RANK and WORLD_SIZE set, processes share the extraction of features; rank 0 trains and writes.
    """
    from downstream import results

    if config.ckpt is None:
        raise UserError("no backbone: give --ckpt (run, export, weights file or timm name)")
    if config.train is None or config.data is None:
        raise UserError("give --train SHARDS (the probe learns from them) and --data SHARDS (it is tested on them)")
    out = results.folder_of(config.ckpt, TASK, out=out_dir or config.out, name=config.name)
    return _probe_masks(config, out) if config.segmentation is not None else _Probing(config, out).run()


class _Probing:
    """One evaluation: the two data sets, the backbone, its controls."""

    def __init__(self, config: LinearProbeConfig, out: Path) -> None:
        import os

        from downstream.samples import LABEL, Samples

        self.config, self.out, self.began = config, out, time.monotonic()
        workers = os.cpu_count() or 1
        self.train = Samples(config.train or "", limit=config.images, needs=(LABEL,), workers=workers)
        self.test = Samples(config.data or "", limit=config.images, needs=(LABEL,), workers=workers)
        self.labels, self.answers = self.train.labels(), self.test.labels()
        for share in (None, *config.low_shot):
            self._split(share)
        self.made: list[Path] = []  # tables of features that go when all is scored
        self.encoders: dict[str, Encoder] = {}
        for encoder in _encoders(config, config.size):
            self.encoders[encoder.name] = encoder
        self.size = config.size or self._own_size()
        whole = self._stored_side() <= self.size
        self.resize = config.resize or (self.size if whole else round(self.size / CROP_SHARE))

    def _own_size(self) -> int:
        model = next(iter(self.encoders.values())).model
        return int(model.pretrained_cfg["input_size"][-1])

    def _stored_side(self) -> float:
        """Usual shorter side of the training images: the median of some of them, since the first may be an odd one."""
        some = range(0, len(self.train), max(1, len(self.train) // 15))
        return statistics.median(min(self.train.image(sample).shape[1:]) for sample in some)

    def run(self) -> dict[str, Any]:
        from downstream import results

        entries = [self._probed(name, encoder) for name, encoder in self.encoders.items()]
        if "pixels" in self.config.controls:
            entries.append(self._probed("raw pixels", None))
        if results.ranks()[0] != 0:
            return {}
        document = {"models": entries, "seconds": round(time.monotonic() - self.began, 2)}
        protocol = self._protocol()
        results.write(self.out, TASK, self.config, protocol, **document)
        if not self.config.keep_features:
            for folder in self.made:  # never the whole cache, which may be a folder of the user's
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self._cache().rmdir()  # where nothing else lies in it
        print_table(document, protocol, self.out)
        return {"protocol": protocol, **document}

    def _protocol(self) -> dict[str, Any]:
        config = self.config
        return {
            "train": config.train, "data": config.data, "train_images": len(self.train), "images": len(self.test),
            "data_fingerprint": [self.train.fingerprint, self.test.fingerprint], "resize": self.resize,
            "size": self.size, "input_size": config.input_size, "features": config.features, "layer": config.layer,
            "crops": config.crops, "rates": config.rates, "epochs": config.epochs, "head_batch": config.head_batch,
            "held_out": config.held_out, "optimizer": "SGD, momentum 0.9, cosine to 0, no weight decay",
            "features_standardised": True, "knn": config.knn, "knn_temperature": config.knn_temperature,
            "steps": config.steps, "precision": config.precision, "seed": config.seed,
        }  # fmt: skip

    def _cache(self) -> Path:
        return Path(self.config.cache_dir or self.out / "features")

    def _probed(self, name: str, encoder: Encoder | None) -> dict[str, Any]:
        """Probe, low-shot probes and k-NN of one kind of features."""
        tables = self._tables(encoder)
        if tables is None:
            return {}
        train, test = tables
        columns = train[0].columns
        kinds = [*columns, *(["all"] if len(columns) > 1 else [])]
        entry: dict[str, Any] = {"name": name, "digest": None if encoder is None else encoder.digest()}
        entry["linear"] = self._linear(train, test, kinds, share=None)
        entry["low_shot"] = {
            str(share): self._linear(train, test, kinds, share=share) for share in self.config.low_shot
        }
        entry["knn"] = self._neighbours(train[0], test, "pooled" if "pooled" in columns else kinds[0])
        return entry

    def _tables(self, encoder: Encoder | None) -> tuple[list[Table], Table] | None:
        """Training features of the centre crops and of each random copy, and test features; None beyond rank 0.

        Collective: every rank extracts its share of all of them.
        """
        copies = 0 if encoder is None else self.config.crops
        train = [self._table(encoder, self.train, copy=copy) for copy in range(copies + 1)]
        test = self._table(encoder, self.test, copy=0)
        return None if test is None else ([table for table in train if table is not None], test)

    def _table(self, encoder: Encoder | None, samples: Samples, *, copy: int) -> Table | None:
        """Features of a data set; copy 0 sees centre crops, the others random crops and flips."""
        from downstream import features, results
        from downstream.views import crop_and_flip

        kinds = ("pixels",) if encoder is None else self._kinds(encoder)
        digest = "pixels" if encoder is None else encoder.digest()

        def compute(images: Tensor, positions: list[int]) -> dict[str, Tensor]:
            if copy:
                images = crop_and_flip(images, positions, seed=self.config.seed, copy=copy)
            if encoder is None:
                return {"pixels": features.pixels_of(images)}
            return features.kinds_of(encoder, images, kinds)

        described = {"weights": digest, "data": samples.fingerprint, "size": self.size, "resize": self.resize}
        key = results.key_of(described, kinds, copy, self.config.seed, self.config.batch_size)
        folder = self._cache() / key
        if not (folder / KEYS).exists():  # an earlier evaluation was told to keep the others
            self.made.append(folder)
        table = features.extract(
            folder, samples, compute, resize=self.resize, size=self.size,
            batch_size=self.config.batch_size, description={**described, "copy": copy, "location": samples.location},
        )  # fmt: skip
        if table is not None and self.config.keep_features:
            keys = "\n".join(samples.index.keys(range(len(samples))))
            (folder / KEYS).write_text(keys + "\n")
        return table

    def _kinds(self, encoder: Encoder) -> tuple[str, ...]:
        """The kinds asked for, without those that the model does not have."""
        lacking = () if encoder.has_oscillators else ("oscillators",)
        kinds = tuple(kind for kind in self.config.features if kind not in lacking)
        if not kinds:
            raise UserError(f"features={','.join(self.config.features)}: {encoder.name} has none of these")
        return kinds

    def _linear(self, train: list[Table], test: Table, kinds: list[str], *, share: float | None) -> dict[str, Any]:
        """Train all heads, choose on held-out training images, train the chosen one on all of them, test it."""
        from downstream import probe

        config = self.config
        classes = int(max(int(self.labels.max()), int(self.answers.max()))) + 1
        available, learned, chosen_on = self._split(share)
        device = self._device()
        options: dict[str, Any] = {"classes": classes, "epochs": config.epochs, "batch_size": config.head_batch}
        tried = []
        for kind in kinds:
            rows, labels = train[0].take(kind, device), self.labels.to(device)
            heads = probe.train(rows[learned], labels[learned], rates=config.rates, seed=config.seed, **options)
            accuracy = probe.evaluate(heads, rows[chosen_on], labels[chosen_on]).top1.tolist()
            tried += [{"features": kind, "rate": rate, "held_out": top1} for rate, top1 in zip(config.rates, accuracy)]
        best = max(tried, key=lambda one: one["held_out"])
        rows, labels = self._augmented(train, best["features"], available)
        heads = probe.train(rows, labels, rates=[best["rate"]], seed=config.seed, **options)
        tested = probe.evaluate(heads, test.take(best["features"], device), self.answers.to(device))
        names = ("top1", "top5", "ece")
        scores = {name: float(getattr(tested, name)[0]) for name in names}
        return {**scores, "chosen": best, "train_images": len(available), "heads": tried}

    def _split(self, share: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of the training images (or of a share of them), of those that heads learn from while rates are
        tried, and of those that choose among the rates.

        Raises:
            UserError: no class has a second image, so that none can be held out.
        """
        import torch

        from downstream import probe

        config, available = self.config, torch.arange(len(self.labels))
        if share is not None:
            available = probe.split(self.labels, share, seed=config.seed)[1]
        learned, chosen_on = probe.split(self.labels[available], config.held_out, seed=config.seed)
        if not len(chosen_on):
            part = "the training set" if share is None else f"a share of {share:g} of the labels"
            raise UserError(f"{part} has one image a class at most: none can be held out to choose the learning rate")
        return available, available[learned], available[chosen_on]

    def _augmented(self, train: list[Table], kind: str, available: Tensor) -> tuple[Tensor, Tensor]:
        """Training features of the chosen kind, with those of the randomly cropped copies (raw pixels have none)."""
        import torch

        device = self._device()
        tables = train[:1] if kind == "pixels" else train
        rows = [table.take(kind, device)[available] for table in tables]
        return torch.cat(rows), self.labels[available].repeat(len(tables)).to(device)

    def _neighbours(self, train: Table, test: Table, kind: str) -> dict[str, Any]:
        from downstream.neighbours import knn_accuracy

        found = knn_accuracy(
            train.take(kind), self.labels, test.take(kind), self.answers, neighbours=self.config.knn,
            temperature=self.config.knn_temperature,
        )  # fmt: skip
        return {"features": kind, **{str(k): accuracy for k, accuracy in found.items()}}

    def _device(self) -> torch.device:
        return next(iter(self.encoders.values())).device


def _encoders(config: LinearProbeConfig, size: int | None) -> Iterator[Encoder]:
    """The backbone and, if wanted, the untrained one beside it, for images of this size."""
    from downstream.backbone import load

    controls: tuple[Control | None, ...] = (None, "random") if "random" in config.controls else (None,)
    for control in controls:
        yield load(
            config.ckpt or "", arch=config.arch, args=config.args, img_size=config.input_size or size, control=control,
            steps=config.steps, layer=config.layer, device=config.device, precision=config.precision, seed=config.seed,
        )  # fmt: skip


def _probe_masks(config: LinearProbeConfig, out: Path) -> dict[str, Any]:
    """The segmentation probe, with the untrained backbone beside it; on one process."""
    from configs.presets import PRESETS
    from downstream import results
    from downstream.samples import CLASSES, Samples
    from downstream.segmentation import probe_segmentation

    if results.ranks()[0] != 0:
        return {}
    preset = PRESETS[config.segmentation or ""]
    train, test = (Samples(one or "", limit=config.images, needs=(CLASSES,)) for one in (config.train, config.data))
    entries = []
    for encoder in _encoders(config, preset.size):
        found = probe_segmentation(
            encoder, train, test, preset, rates=config.rates, epochs=config.epochs, held_out=config.held_out,
            batch_size=config.batch_size, seed=config.seed,
        )  # fmt: skip
        entries.append({"name": encoder.name, "digest": encoder.digest(), "scores": found})
        print(
            f"{encoder.name}: mIoU {100 * float(str(found['miou'])):.1f} (token accuracy {found['token_accuracy']:.3f})"
        )
    protocol = {"preset_name": config.segmentation, "train": config.train, "data": config.data, "images": len(test)}
    results.write(out, "segmentation_probe", config, protocol, models=entries)
    return {"protocol": protocol, "models": entries}


def print_table(document: dict[str, Any], protocol: dict[str, Any], out: Path) -> None:
    """Scores in per cent on the terminal, with the protocol and where everything lies."""
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold")
    numbers = [key for key in document["models"][0]["knn"] if key != "features"]
    for position, title in enumerate(["", "linear", "top-5", "ECE", "features", "rate", *(f"{k}-NN" for k in numbers)]):
        table.add_column(title, justify="left" if position in (0, 4) else "right")
    for entry in document["models"]:
        linear = entry["linear"]
        cells = [f"{100 * linear[name]:.1f}" for name in ("top1", "top5", "ece")]
        chosen = linear["chosen"]
        near = [f"{100 * entry['knn'][k]['top1']:.1f}" for k in numbers]
        table.add_row(entry["name"], *cells, chosen["features"], f"{chosen['rate']:g}", *near)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    for entry in document["models"]:
        for share, low in entry["low_shot"].items():
            console.print(
                f"{entry['name']}, {100 * float(share):g} % of the labels ({low['train_images']} images): "
                f"{100 * low['top1']:.1f}",
                highlight=False,
            )
    console.print(
        f"{protocol['train_images']} training and {protocol['images']} test images at {protocol['size']} px, "
        f"{protocol['epochs']} epochs of the heads, chosen on {protocol['held_out']:.0%} of the training set; "
        f"{document['seconds']:.0f} s",
        highlight=False,
    )
    console.print(f"results: {out}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; every key of the configuration is a flag."""
    run(parse(LinearProbeConfig, argv, description=__doc__ or "", config="linear_probe"))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
