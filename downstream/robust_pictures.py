"""Pictures of a robustness test: loss and accuracy over eps, adversarial images beside clean ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def curve(path: Path, points: list[dict[str, float]]) -> None:
    """Accuracy and loss over eps, under PGD and under random search."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.4))
    eps = [255 * point["eps"] for point in points]
    for panel, kind, label in zip(panels, ("accuracy", "loss"), ("accuracy (%)", "cross-entropy"), strict=True):
        for name, title in (("pgd", "PGD"), ("random", "random search")):
            panel.plot(eps, [point[f"{name}_{kind}"] for point in points], "o-", label=title)
        panel.set(xlabel="eps (of 255)", ylabel=label)
    panels[0].set_ylim(0, 101)
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def examples(path: Path, clean: Tensor, adversarial: dict[str, Tensor]) -> None:
    """Clean images [B, 3, S, S] in the first row, then each attack's images and its perturbation, scaled up."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows: list[tuple[str, Tensor]] = [("clean", clean)]
    for name, images in adversarial.items():
        offset = images - clean
        scale = 0.5 / offset.abs().amax().clamp_min(1e-6)
        rows += [(name, images), (f"x {scale.item():.0f}", 0.5 + scale * offset)]
    figure, axes = pyplot.subplots(
        len(rows), len(clean), figsize=(1.1 * len(clean) + 1.5, 1.15 * len(rows)), squeeze=False
    )
    for line, (name, images) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for axis, image in zip(line, images.clamp(0, 1), strict=True):
            axis.imshow(torch.movedim(image, 0, 2).cpu().numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
