"""Object discovery of one backbone on one data set: segments and scores of each image for each random start.

Owns: the protocol as one value (and how a configuration becomes one), and the loop over starts, shifts and numbers of
segments.

B images, D channels, h x w tokens, S starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from configs import ObjectDiscoveryConfig, UserError
from configs.presets import PRESETS, Preset
from downstream import kmeans, metrics
from downstream.encoder import Encoder
from downstream.grouping import Grouping, Method, group_sweep
from downstream.samples import Samples, Scene
from downstream.tiling import interleave, shifted_crops

CODEBOOK_TOKENS = 200_000  # tokens that a codebook learns from


@dataclass(frozen=True)
class Protocol:
    """Everything that a score depends on besides the backbone and the data.

    Attributes:
        grouping: how tokens become segments. sweep: further numbers of segments.
        uptile: up-tiling factor. starts: random starts. choose: "mean" over them, or the one of least "energy".
        codebook: centres [k, D] of a data set's features; tokens take the nearest instead of being grouped.
    """

    preset: Preset
    grouping: Grouping
    sweep: tuple[int, ...] = ()
    uptile: int = 1
    starts: int = 4
    choose: Literal["mean", "energy"] = "mean"
    batch_size: int = 64
    codebook: Tensor | None = None

    def described(self) -> dict[str, Any]:
        """As results.json holds it."""
        values = dataclasses.asdict(dataclasses.replace(self, codebook=None))
        del values["codebook"], values["batch_size"]
        if self.codebook is not None:
            values["grouping"]["method"] = "codebook"
        return values

    def starts_of(self, encoder: Encoder) -> int:
        """Starts that make a difference: one for a model without oscillators."""
        return self.starts if encoder.has_oscillators else 1


def preset_of(config: ObjectDiscoveryConfig) -> Preset:
    """The preset, with what the configuration changes.

    Raises:
        UserError: neither a preset nor size and k are given.
    """
    base = PRESETS[config.preset] if config.preset is not None else None
    if base is None:
        if config.size is None or config.k is None:
            raise UserError(f"give --preset ({', '.join(PRESETS)}), or --size and --k")
        return Preset(config.size, config.k)
    return dataclasses.replace(base, size=config.size or base.size, clusters=config.k or base.clusters)


def protocol_of(config: ObjectDiscoveryConfig, preset: Preset) -> Protocol:
    """The protocol that a configuration describes."""
    method: Method = "kmeans" if config.method == "codebook" else config.method
    grouping = Grouping(
        method=method, clusters=preset.clusters, distance=config.distance, components=config.components,
        seed=config.seed,
    )  # fmt: skip
    if config.distance is not None and config.method != "linkage":
        raise UserError(f"distance={config.distance} cuts a dendrogram: it needs method=linkage, not {config.method}")
    if config.sweep and config.method == "codebook":
        raise UserError("sweep is not available with method=codebook: run it once for each k")
    if config.sweep and config.distance is not None:
        raise UserError("sweep is over numbers of segments, which distance replaces: give one of the two")
    return Protocol(
        preset=preset, grouping=grouping, sweep=config.sweep, uptile=config.uptile, starts=config.starts,
        choose=config.choose, batch_size=config.batch_size,
    )  # fmt: skip


def features(encoder: Encoder, images: Tensor, *, uptile: int, start: int) -> Tensor:
    """Feature maps [B, D, h * uptile, w * uptile] of images [B, 3, H, W] in [0, 1]; every shift has its own start."""
    maps = [encoder.encode(view, start_seed=seed).map for view, seed in _views(encoder, images, uptile, start)]
    return interleave(torch.stack(maps), factor=uptile)


def energies(encoder: Encoder, images: Tensor, *, uptile: int, start: int) -> Tensor:
    """Energy of each image [B] in the forward passes of `features`, averaged over the shifts."""
    passes = [encoder.energy(view, start_seed=seed) for view, seed in _views(encoder, images, uptile, start)]
    return torch.stack(passes).mean(0)


def _views(encoder: Encoder, images: Tensor, uptile: int, start: int) -> list[tuple[Tensor, int]]:
    """What the model sees, each with the seed of its start: the images, or the shifted crops (not clamped: published).

    Raises:
        UserError: the up-tiling factor does not divide the patch.
    """
    if uptile == 1:
        return [(images, start)]
    try:
        crops = shifted_crops(encoder.resize(images), patch=encoder.patch, factor=uptile)
    except ValueError as error:
        raise UserError(f"{encoder.name}: {error}") from None
    return [(crop, start * uptile**2 + shift) for shift, crop in enumerate(crops)]


def segments(encoder: Encoder, images: Tensor, protocol: Protocol, *, start: int = 0) -> list[Tensor]:
    """Segments [B, h, w] for k and for each number in the sweep.

    Raises:
        UserError: features are not finite.
    """
    maps = features(encoder, images, uptile=protocol.uptile, start=start)
    if protocol.codebook is not None:
        return [_nearest_codes(maps, protocol.codebook)]
    try:
        return group_sweep(maps, protocol.grouping, [protocol.grouping.clusters, *protocol.sweep])
    except ValueError as error:
        raise UserError(f"{encoder.name}: {error}") from None


def score_scene(encoder: Encoder, scene: Scene, protocol: Protocol) -> dict[str, list[list[float]]]:
    """Scores by name as [S][B], those of the sweep as `k=7/fg_ari`; energies where starts are chosen by them."""
    found: dict[str, list[list[float]]] = {}
    for start in range(protocol.starts_of(encoder)):
        for number, cut in enumerate(segments(encoder, scene.images, protocol, start=start)):
            prefix = f"k={protocol.sweep[number - 1]}/" if number else ""
            for name, values in metrics.score(scene.instances, cut, scene.classes).items():
                found.setdefault(prefix + name, []).append(values.tolist())
        if protocol.choose == "energy" and encoder.has_oscillators:
            energy = energies(encoder, scene.images, uptile=protocol.uptile, start=start)
            found.setdefault("energy", []).append(energy.tolist())
    return found


def gather(blocks: Sequence[dict[str, list[list[float | None]]]]) -> dict[str, np.ndarray]:
    """Scores of blocks -> one array [S, N] a name; null is NaN. Nothing of no blocks."""
    if not blocks:
        return {}
    return {
        name: np.concatenate([np.array(block[name], dtype=np.float64) for block in blocks], axis=1)
        for name in blocks[0]
    }


def choose_start(scores: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """For each image, keep the scores [1, N] of the start that ended in the lowest energy."""
    best = scores["energy"].argmin(0)[None]
    return {name: np.take_along_axis(values, best, axis=0) for name, values in scores.items() if name != "energy"}


def summarise(values: np.ndarray) -> dict[str, Any]:
    """Mean over images and starts, spread over starts, images skipped, and the values of each image [N]."""
    images = np.array([np.nan if np.isnan(column).all() else np.nanmean(column) for column in values.T])
    means = [float(np.nanmean(row)) if np.isfinite(row).any() else float("nan") for row in values]
    return {
        "mean": float(np.mean(means)),
        "starts": means,
        "spread": float(np.std(means, ddof=1)) if len(means) > 1 else None,
        "skipped": int(np.isnan(images).sum()),
        "images": images.tolist(),
    }


def learn_codebook(encoder: Encoder, samples: Samples, protocol: Protocol, *, seed: int) -> Tensor:
    """Centres [k, D] of the features of a whole data set (k-means by faiss on a fixed sample of its tokens).

    Raises:
        UserError: the data set has fewer tokens than k, or features are not finite.
    """
    rng = np.random.default_rng(seed)
    kept: list[np.ndarray] = []
    for block in samples.blocks(protocol.batch_size):
        scene = samples.scenes(block, protocol.preset)
        maps = features(encoder, scene.images, uptile=protocol.uptile, start=0)
        tokens = F.normalize(maps, dim=1).flatten(2).mT.flatten(0, 1).cpu().numpy()
        if not np.isfinite(tokens).all():
            raise UserError(
                f"{encoder.name}: features are not finite: the backbone diverged or its weights are damaged"
            )
        share = min(1.0, CODEBOOK_TOKENS / max(1, len(tokens) * len(samples) / len(block)))
        kept.append(tokens[rng.random(len(tokens)) < share])
    points, clusters = np.concatenate(kept), protocol.grouping.clusters
    if len(points) < clusters:
        raise UserError(f"a codebook of k={clusters} needs as many tokens; {samples.location} has {len(points)}")
    return torch.from_numpy(kmeans.train(points, clusters, restarts=3, seed=seed))


def _nearest_codes(maps: Tensor, centres: Tensor) -> Tensor:
    tokens = F.normalize(maps.float(), dim=1).permute(0, 2, 3, 1).cpu()
    labels = kmeans.assign(tokens.reshape(-1, tokens.shape[-1]).numpy(), centres.numpy())
    return torch.from_numpy(labels).view(tokens.shape[:3])
