"""A run as one page that can be mailed: curves, scores with their protocol, pictures, oscillators over time.

python downstream/report.py runs/quickstart
python downstream/report.py runs/a runs/b --out comparison.html
python downstream/report.py runs/a_seed-0 runs/a_seed-1 runs/b_seed-0 runs/b_seed-1 --table table.json
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from configs import UserError
from configs.errors import run as run_entry
from downstream import result_section, results

# Curves drawn where the run has them: title -> (metrics, label of the axis).
CURVES: dict[str, tuple[tuple[str, ...], str]] = {
    "Loss": (("loss",), ""),
    "Contrastive accuracy": (("accuracy",), "top-1"),
    "Online evaluation": (("online_knn", "online_fg_ari", "online_mbo_i"), ""),
    "Alignment and uniformity": (("alignment", "uniformity"), ""),
    "Effective rank of the embeddings": (("effective_rank",), ""),
    "Gradient norm": (("grad_norm",), ""),
    "Learning rate": (("lr",), ""),
    "Speed": (("views_per_s",), "views per second"),
}
SCENES_SHOWN = 4
_SKIPPED_EVENTS = ("saved",)


def run(run_dir: Path) -> Path:
    """Write RUN/report.html. Raises UserError where there is no run."""
    return write([Path(run_dir)], Path(run_dir) / "report.html")


def write(runs: Sequence[Path], out: Path) -> Path:
    """Write one page about a run, or one that compares several; it appears whole, by rename.

    Raises:
        UserError: a folder is no run.
    """
    from downstream import page

    for folder in runs:
        if not (folder / "config.yaml").is_file() and not results.files_in(folder):
            raise UserError(f"{folder} is no run (no config.yaml) and holds no results.json")
    read = [_Run(folder) for folder in runs]
    body = [] if len(read) == 1 else [_comparison(read)]
    body += [part for one in read for part in one.body(len(read))]
    title = " and ".join(one.name for one in read)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.write_text(page.document(title, body), encoding="utf-8")
    os.replace(partial, out)
    return out


class _Run:
    """What a run's folder tells."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.resolve().name
        config = folder / "config.yaml"
        self.yaml = config.read_text() if config.is_file() else ""
        self.metrics = _lines(folder / "metrics.jsonl")
        self.observed = _lines(folder / "observed.jsonl")
        self.events = _lines(folder / "events.jsonl")
        self.results = [(path.parent, results.read(path)) for path in results.files_in(folder)]

    def body(self, of: int) -> list[str]:
        from downstream import page

        parts = [
            f"<h1>{page.text(self.name)}</h1>",
            page.paragraph(_opening(self.yaml)) if self.yaml else "",
            page.tiles(self.tiles()),
            page.section("Training", page.charts(self.charts())),
        ]
        parts += [result_section.draw(folder, result) for folder, result in self.results]
        if of == 1:
            parts.append(self.oscillators())
        parts.append(page.section("What happened", self.happenings()))
        if self.yaml:
            parts.append(page.section("Configuration", page.folded("config.yaml", self.yaml)))
        return parts

    def tiles(self) -> list[tuple[str, str]]:
        """Key figures of the training and of every result."""
        tiles = []
        if self.metrics:
            last = self.metrics[-1]
            tiles.append(("steps", f"{last['step']:,}"))
            recent = [row["loss"] for row in self.metrics[-20:] if row.get("loss") is not None]
            if recent:
                tiles.append(("loss, mean of the last steps", f"{sum(recent) / len(recent):.3f}"))
        for _, result in self.results:
            tiles += result_section.headline(result)
        return tiles

    def charts(self) -> list[str]:
        from downstream.charts import line_chart

        drawn = []
        for title, (names, label) in CURVES.items():
            curves = {name: curve for name in names if len((curve := self.curve(name))[0]) > 1}
            if curves:
                drawn.append(line_chart(curves, title=title, y_label=label))
        return drawn

    def curve(self, name: str) -> tuple[Sequence[float], Sequence[float]]:
        """One metric over the steps, thinned."""
        from downstream.charts import thinned

        rows = [row for row in self.metrics + self.observed if isinstance(row.get(name), int | float)]
        return thinned([row["step"] for row in rows], [row[name] for row in rows])

    def happenings(self) -> str:
        """The events of the run, but for ordinary checkpoints."""
        from downstream import page

        rows = [
            (str(event.get("step", "")), event["event"], _details(event))
            for event in self.events
            if event.get("event") not in _SKIPPED_EVENTS
        ]
        return page.table(("step", "event", ""), rows) if rows else ""

    def oscillators(self) -> str:
        """Phases, coherence and energies on images of the first object discovery; empty without oscillators."""
        scored = next((result for _, result in self.results if result["task"] == "object_discovery"), None)
        if scored is None or not (self.folder / "export" / "config.json").is_file():
            return ""
        try:
            return _oscillator_section(self.folder, scored)
        except (UserError, OSError) as error:  # data that has moved must not cost the page
            from downstream import page

            return page.section("Oscillators", page.paragraph(f"not drawn: {error}"))


def _lines(path: Path) -> list[dict[str, Any]]:
    """JSON lines of a file that may be missing or still be written to."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _opening(yaml_text: str) -> str:
    """Model, task and batch in a line."""
    import yaml

    config = yaml.safe_load(yaml_text)
    model, task = config.get("model") or {}, config.get("task") or {}
    parts = [model.get("name"), task.get("name"), f"batch {config.get('batch_size')}", f"seed {config.get('seed')}"]
    return ", ".join(str(part) for part in parts if part)


def _details(event: dict[str, Any]) -> str:
    hidden = ("event", "time", "step")
    shown = {key: value for key, value in event.items() if key not in hidden and not isinstance(value, dict | list)}
    return ", ".join(f"{key} {value}" for key, value in shown.items())[:160]


def _oscillator_section(folder: Path, scored: dict[str, Any]) -> str:
    """Look at a few images of the scored data through the exported model."""
    from downstream import oscillations, page
    from downstream.backbone import load
    from downstream.charts import line_chart
    from downstream.discovery import preset_of
    from downstream.samples import Samples

    encoder = load(str(folder), device="cpu")
    if not encoder.has_oscillators:
        return ""
    from configs import ObjectDiscoveryConfig

    config = ObjectDiscoveryConfig.model_validate_json(json.dumps(scored["config"]))
    scene = Samples(config.data or "", limit=SCENES_SHOWN).scenes(range(SCENES_SHOWN), preset_of(config))
    seen = oscillations.look(encoder, scene)
    steps = list(range(len(seen.within)))
    coherence = {
        "tokens of one object": (steps, seen.within.tolist()),
        "of two objects": (steps, seen.between.tolist()),
    }
    energies = {f"image {i + 1}": (steps[1:], row[1:].tolist()) for i, row in enumerate(seen.energy)}
    strips = [
        page.picture(oscillations.strip(colours, side=64), f"Image {number}: from the random start to step T.")
        for number, colours in enumerate(seen.colours, start=1)
    ]
    moving = oscillations.animation(seen.colours, scene.images)
    return page.section(
        "Oscillators over the steps",
        page.picture(moving, "Images, and their oscillators' phases step by step (moves). Like colours: like phases."),
        *strips,
        page.charts(
            [
                line_chart(coherence, title="Phase coherence", x_label="T", y_label="mean cosine"),
                line_chart(energies, title="Energy, as published", x_label="T"),
            ]
        ),
    )


def _comparison(runs: Sequence[_Run]) -> str:
    """Scores and losses of several runs side by side."""
    from downstream import page
    from downstream.charts import line_chart

    names = list(dict.fromkeys(name for run in runs for name, _ in run.tiles()))
    rows = [[run.name, *(dict(run.tiles()).get(name, "") for name in names)] for run in runs]
    losses = {run.name: run.curve("loss") for run in runs if run.metrics}
    drawn = [line_chart(losses, title="Loss", size=(6.5, 3.2))] if losses else []
    return page.section("Comparison", page.table(["", *names], rows), page.charts(drawn))


def main(argv: Sequence[str] | None = None) -> int:
    """Write a report from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; several are compared")
    parser.add_argument(
        "--out", type=Path, help="file to write (default: RUN/report.html; of several comparison.html in the first)"
    )
    parser.add_argument(
        "--table", type=Path, help="write scores as JSON (means over runs that differ in `seed-N` of their names, "
        "differences from the first) and print them as Markdown, instead of a page",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    if arguments.table is not None:
        from downstream import comparison

        print(comparison.markdown(table := comparison.collect(arguments.runs)), end="")
        results.write_json(arguments.table, table)
        return 0
    name = "report.html" if len(arguments.runs) == 1 else "comparison.html"
    out = write(arguments.runs, arguments.out or arguments.runs[0] / name)
    print(f"{out} ({out.stat().st_size / 2**20:.1f} MB)")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
