"""The table of an object discovery on the terminal: scores in per cent, the protocol, differences with intervals.

Owns: what is shown of results.json, which holds more.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN = ("fg_ari", "mbo_i", "mbo_c", "miou", "ari")  # columns


def show(document: dict[str, Any], protocol: dict[str, Any], out: Path) -> None:
    """Scores in per cent on the terminal, with the protocol and where everything lies."""
    entries = [*document["models"], *document["baselines"]]
    shown = [name for name in SHOWN if name in entries[0]["scores"]]
    table = Table(title=None, header_style="bold")
    table.add_column("")
    for name in shown:
        table.add_column(name.upper().replace("_", "-"), justify="right")
    for position, entry in enumerate(entries):
        cells = [_cell(entry["scores"][name]) for name in shown]
        table.add_row(entry["name"], *cells, end_section=position == len(document["models"]) - 1)
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    skipped = entries[0]["scores"]["fg_ari"]["skipped"]
    console.print(
        f"{protocol['images']} images ({skipped} without objects, skipped), {protocol['preset']['size']} px, "
        f"{cut_of(protocol)}, up-tiling {protocol['uptile']}, "
        f"{protocol['starts']} starts ({protocol['choose']}); {document['seconds']:.0f} s",
        highlight=False,
    )
    for entry in document["differences"]:
        if entry["score"] == "fg_ari":
            interval = f" [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}] (95 %, paired bootstrap over images)"
            console.print(
                f"{entry['model']} - {entry['against']}: FG-ARI {100 * entry['difference']:+.1f}"
                + (interval if math.isfinite(entry["low"]) else ""),
                highlight=False,
            )
    console.print(f"results and pictures: {out}", highlight=False)


def cut_of(protocol: dict[str, Any]) -> str:
    """Method of grouping, and the number of segments or the distance that it cuts at."""
    grouping = protocol["grouping"]
    at = f"k={grouping['clusters']}" if grouping.get("distance") is None else f"distance {grouping['distance']:g}"
    return f"{grouping['method']} {at}"


def _cell(summary: dict[str, Any]) -> str:
    spread = summary["spread"]
    return f"{100 * summary['mean']:.1f}" + (f" +/-{100 * spread:.1f}" if spread is not None else "")
