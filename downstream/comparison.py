"""Several runs as one table: means over seeds with their spread, and differences from the first with intervals.

Owns: which runs repeat each other (their names are equal but for the seed), which scores of a results.json stand in the
table, and its form: JSON with every figure, and Markdown made from that JSON and nothing else.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from downstream.results import files_in, paired_bootstrap, read

SEED = re.compile(r"[-_]seed-\d+")
DECIDING = "FG-ARI"  # the score whose differences get an interval, where there is one
RESAMPLINGS = 2000


def collect(runs: Sequence[Path]) -> dict[str, Any]:
    """The table of some runs (or folders with their results), the first of which the others are held against.

    Raises:
        UserError: a run has no results, or repetitions of a run were not scored alike.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in dict.fromkeys(run.resolve() for run in runs):  # `runs/a_* runs/*` puts a first and counts it once
        groups.setdefault(SEED.sub("", run.name), []).append(_read(run))
    rows = [_row(name, repetitions) for name, repetitions in groups.items()]
    first = next(iter(groups.values()))
    for row, repetitions in zip(rows[1:], list(groups.values())[1:], strict=True):
        row["difference"] = _difference(repetitions, first)
    everything = [run for repetitions in groups.values() for run in repetitions]
    return {
        "rows": rows,
        "beside": [{"name": name, "scores": scores} for name, scores in first[0]["beside"].items()],
        "commits": sorted({commit for run in everything for commit in run["commits"]}),
    }


def markdown(table: dict[str, Any]) -> str:
    """A table of `collect` as Markdown, scores in percent."""
    columns = list(dict.fromkeys(name for row in table["rows"] for name in row["scores"]))
    compared = any(row.get("difference") for row in table["rows"])
    head = ["", "seeds", *columns, *([f"{DECIDING} against the first"] if compared else [])]
    lines = [head, ["---"] * len(head)]
    for row in table["rows"]:
        scores = [_shown(row["scores"].get(name)) for name in columns]
        lines.append([row["name"], str(row["seeds"]), *scores, *([_interval(row.get("difference"))] * compared)])
    lines += [
        [row["name"], "", *(_percent(row["scores"].get(name)) for name in columns), *([""] * compared)]
        for row in table["beside"]
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _read(run: Path) -> dict[str, Any]:
    """Scores of a run in [0, 1] by column, of the deciding one by image as well, and what was scored beside it."""
    scores: dict[str, float] = {}
    beside: dict[str, dict[str, float]] = {}
    images: list[float | None] = []
    data = None
    commits = []
    protocol: dict[str, Any] = {}
    for path in files_in(run):
        result = read(path)
        suffix = "" if path.parent.name in (result["task"], run.name) else f", {path.parent.name}"
        own = ""
        for place, (name, columns) in enumerate(_scores(result)):
            own = own or name  # at the time of the evaluation: the run's folder may have another by now
            control = name.removeprefix(f"{own} ").strip("()")  # "RUN (random)" -> "random"
            into = scores if place == 0 else beside.setdefault(control, {})
            into |= {column + suffix: value for column, value in columns.items()}
        if result["task"] == "object_discovery" and not suffix:
            images = result["models"][0]["scores"]["fg_ari"].get("images", [])
            data = result["protocol"]["data_fingerprint"]
        commits.append(str(result["commit"]))
        of = f"of {result['task']}{suffix}"
        protocol |= {f"{key} {of}": value for key, value in _comparable(result["protocol"]).items()}
    if "random" in beside:  # a control of this run's own network: a column, not a row that all share
        scores |= {f"{name} of random weights": score for name, score in beside.pop("random").items()}
    if not scores:
        raise UserError(f"{run} holds no results of object discovery or a probe, or none is defined: evaluate it first")
    return {
        "name": run.name,
        "protocol": protocol,
        "scores": scores,
        "images": images,
        "data": data,
        "beside": beside,
        "commits": commits,
    }


def _scores(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """Name and scores of each thing in a results.json, the run itself first."""
    for one in [*result.get("models", []), *result.get("baselines", [])]:
        if result["task"] == "object_discovery":
            means = {"FG-ARI": one["scores"]["fg_ari"]["mean"], "MBO": one["scores"]["mbo_i"]["mean"]}
            yield one["name"], {column: mean for column, mean in means.items() if mean is not None}
        elif result["task"] == "linear_probe":
            shots = {
                f"linear, {100 * float(share):g} % of labels": probe["top1"]
                for share, probe in one.get("low_shot", {}).items()
            }
            nearest = {"20-NN": one["knn"]["20"]["top1"]} if "20" in one["knn"] else {}
            yield one["name"], {"linear": one["linear"]["top1"], **shots, **nearest}


def _comparable(protocol: dict[str, Any]) -> dict[str, Any]:
    """A protocol without what may differ between repetitions: seeds, and where the data lie."""
    return {
        key: _comparable(value) if isinstance(value, dict) else value
        for key, value in protocol.items()
        if key not in ("seed", "data", "train")
    }


def _row(name: str, repetitions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    columns = list(repetitions[0]["scores"])
    if any(list(run["scores"]) != columns for run in repetitions):
        raise UserError(f"repetitions of {name} were not scored alike: give each the same evaluations")
    if len({run["name"] for run in repetitions}) < len(repetitions):
        raise UserError(
            f"several runs are called {repetitions[0]['name']}: repetitions differ by seed-N in their names"
        )
    first = repetitions[0]["protocol"]
    for run in repetitions[1:]:
        differing = [key for key in first if run["protocol"].get(key, first[key]) != first[key]]
        if differing:
            raise UserError(f"repetitions of {name} were not scored alike: {differing[0]} differs in {run['name']}")
    scores = {}
    for column in columns:
        values = [run["scores"][column] for run in repetitions]
        spread = statistics.stdev(values) if len(values) > 1 else None
        scores[column] = {"mean": statistics.fmean(values), "spread": spread, "values": values}
    return {"name": name, "seeds": len(repetitions), "scores": scores}


def _difference(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Of the deciding score, with an interval over images (paired) and seeds; None if the images were not the same."""
    if len({run["data"] for run in (*ours, *theirs)}) > 1 or not ours[0]["images"]:
        return None
    mine, others = (np.array([run["images"] for run in runs], dtype=float) for runs in (ours, theirs))
    return paired_bootstrap(mine, others, resamplings=RESAMPLINGS)


def _percent(score: float | None) -> str:
    return "" if score is None else f"{100 * score:.1f}"


def _shown(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    return _percent(score["mean"]) + (
        f" \N{PLUS-MINUS SIGN} {_percent(score['spread'])}" if score["spread"] is not None else ""
    )


def _interval(difference: dict[str, float] | None) -> str:
    if difference is None:
        return ""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * difference[name] for name in ("difference", "low", "high")))
