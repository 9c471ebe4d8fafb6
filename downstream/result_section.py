"""The part of a report that shows one results.json: tables, pictures, protocol.

Owns: how each task's scores are laid out. A task without a layout of its own gets a table of its figures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from downstream import page
from downstream.charts import line_chart
from downstream.score_table import cut_of

OBJECT_SCORES = ("fg_ari", "mbo_i", "mbo_c", "miou", "ari")


def headline(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The one or two figures that a result is known by."""
    if result["task"] == "object_discovery":
        scores = result["models"][0]["scores"]
        name = result["protocol"].get("preset_name") or "objects"
        return [
            (f"{label}, {name}", _percent(scores[key]["mean"]))
            for key, label in (("fg_ari", "FG-ARI"), ("mbo_i", "MBO"))
        ]
    if result["task"] == "linear_probe":
        best = result["models"][0]
        numbers = [k for k in best["knn"] if k != "features"]
        k = "20" if "20" in numbers else numbers[0]  # fixed beforehand: the best of them would be chosen on test images
        return [
            ("linear probe, top-1", _percent(best["linear"]["top1"])),
            (f"{k}-NN, top-1", _percent(best["knn"][k]["top1"])),
        ]
    return []


def draw(folder: Path, result: dict[str, Any]) -> str:
    task = result["task"]
    tables = {"object_discovery": _object_tables, "linear_probe": _probe_tables}.get(task, _other_tables)
    pictures = [
        page.picture((folder / name).read_bytes(), _caption(name))
        for name in result.get("pictures", [])
        if isinstance(name, str) and (folder / name).is_file() and name.endswith(".png")
    ]
    protocol = page.folded("protocol and versions", json.dumps(_protocol(result), indent=1))
    return page.section(f"{task.replace('_', ' ').capitalize()} ({folder.name})", *tables(result), *pictures, protocol)


def _protocol(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result.get(key) for key in ("protocol", "commit", "versions", "date", "seconds")}


def _caption(name: str) -> str:
    captions = {
        "pictures.png": "The first images: truth, and segments of the model and of two trivial methods.",
        "extremes.png": "The best, the median and the worst images by FG-ARI.",
    }
    return captions.get(name, name)


def _object_tables(result: dict[str, Any]) -> list[str]:
    entries = [*result["models"], *result["baselines"]]
    shown = [name for name in OBJECT_SCORES if name in entries[0]["scores"]]
    rows = [[entry["name"], *(_with_spread(entry["scores"][name]) for name in shown)] for entry in entries]
    differences = [
        f"{one['model']} - {one['against']}: FG-ARI {100 * one['difference']:+.1f} "
        f"[{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]"
        for one in result["differences"]
        if one["score"] == "fg_ari" and one["difference"] is not None and one["low"] is not None
    ]
    protocol = result["protocol"]
    note = (
        f"{protocol['images']} images, {protocol['preset']['size']} px, {cut_of(protocol)}, "
        f"up-tiling {protocol['uptile']}, {protocol['starts']} starts; "
        f"{entries[0]['scores']['fg_ari']['skipped']} images without objects skipped. Per cent; +/- over starts."
    )
    return [
        page.table(["", *(name.upper().replace("_", "-") for name in shown)], rows, first=1),
        page.paragraph(note),
        *(page.paragraph(line + " (95 %, paired bootstrap over images)") for line in differences),
        _sweep(result["models"][0]["scores"]),
    ]


def _sweep(scores: dict[str, Any]) -> str:
    """FG-ARI and MBO over the number of segments, where a sweep was asked for."""
    curves = {}
    for name in ("fg_ari", "mbo_i"):
        points = {int(key.split("/")[0][2:]): scores[key]["mean"] for key in scores if key.endswith(f"/{name}")}
        curves[name] = (sorted(points), [points[k] for k in sorted(points)])
    return page.charts([line_chart(curves, title="Number of segments", x_label="k")]) if curves["fg_ari"][0] else ""


def _probe_tables(result: dict[str, Any]) -> list[str]:
    numbers = [key for key in result["models"][0]["knn"] if key != "features"]
    rows = []
    for entry in result["models"]:
        linear = entry["linear"]
        chosen = f"{linear['chosen']['features']}, {linear['chosen']['rate']:g}"
        near = [_percent(entry["knn"][k]["top1"]) for k in numbers]
        rows.append([entry["name"], *(_percent(linear[key]) for key in ("top1", "top5", "ece")), chosen, *near])
    header = ["", "linear", "top-5", "ECE", "features, rate", *(f"{k}-NN" for k in numbers)]
    protocol = result["protocol"]
    note = (
        f"{protocol['train_images']} training and {protocol['images']} test images at {protocol['size']} px. Per cent."
    )
    return [page.table(header, rows, first=1), page.paragraph(note)]


def _other_tables(result: dict[str, Any]) -> list[str]:
    """Any other result: its plain figures."""
    figures = _flat(result.get("scores", result))
    rows = [(key, _shown(value)) for key, value in figures if isinstance(value, int | float)]
    return [page.table(("", ""), rows[:60])] if rows else []


def _flat(values: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(values, dict):
        return [(prefix, values)]
    skipped = ("protocol", "config", "versions")
    return [
        pair
        for key, value in values.items()
        if key not in skipped
        for pair in _flat(value, f"{prefix} / {key}" if prefix else str(key))
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _with_spread(summary: dict[str, Any]) -> str:
    spread = summary.get("spread")
    return _percent(summary["mean"]) + (f" +/- {100 * spread:.1f}" if spread is not None else "")


def _shown(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
