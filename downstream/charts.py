"""Charts of a report as inline SVG: small, sharp on a phone and in print, without scripts.

Owns: how curves look. matplotlib draws; text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import numpy as np

Series = tuple[Sequence[float], Sequence[float]]  # x, y
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444")
MARGINS = {"left": 0.16, "right": 0.97, "bottom": 0.17, "top": 0.9}  # the same for all: charts in a grid line up
FROM_THOUSANDS = 10_000  # x axes that go further count in k and M: longer labels would touch
MOST_POINTS = 400  # per curve: more are averaged, since no screen shows them


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> Series:
    """At most `most` points: neighbours are averaged; points that are not finite are left out."""
    pairs = np.array([(a, b) for a, b in zip(x, y) if b is not None and np.isfinite(b)], dtype=np.float64)
    if len(pairs) <= most:
        return pairs[:, 0].tolist() if len(pairs) else [], pairs[:, 1].tolist() if len(pairs) else []
    chunks = np.array_split(pairs, most)
    return [float(chunk[:, 0].mean()) for chunk in chunks], [float(chunk[:, 1].mean()) for chunk in chunks]


def line_chart(
    curves: Mapping[str, Series],
    *,
    title: str,
    x_label: str = "step",
    y_label: str = "",
    size: tuple[float, float] = (4.2, 2.6),
) -> str:
    """Curves over a common axis as an SVG element."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=size)
    axes = figure.subplots(gridspec_kw=MARGINS)
    for number, (name, (x, y)) in enumerate(curves.items()):
        marker = "o" if len(x) < 12 else None
        axes.plot(x, y, color=COLOURS[number % len(COLOURS)], label=name, linewidth=1.4, marker=marker, markersize=3)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x_label, fontsize=8)
    axes.set_ylabel(y_label, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=6)
    if axes.get_xlim()[1] >= FROM_THOUSANDS:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(color="#e3e3e3", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(curves) > 1:
        axes.legend(fontsize=7.5, frameon=False)
    return _svg(figure, title)


def _svg(figure: object, title: str) -> str:
    """The figure as an element that scales with the page; identifiers are made unique by the title."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})  # type: ignore[attr-defined]
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)
    text = re.sub(r' d="[^"]*"', _shortened, text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def _shortened(path: re.Match[str]) -> str:
    """Coordinates to hundredths of a point."""
    return re.sub(r"(\d+\.\d{2})\d+", r"\1", path.group())
