"""Tables of several runs: means over seeds, spreads, paired differences, and Markdown that says what the JSON does."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.errors import UserError
from downstream import comparison, report

IMAGES = 40


def discovery(name: str, images: np.ndarray) -> dict[str, Any]:
    def of(values: np.ndarray) -> dict[str, Any]:
        return {"mean": float(values.mean()), "images": values.tolist()}

    entry = {"name": name, "scores": {"fg_ari": of(images), "mbo_i": of(images / 2)}}
    flat = {"name": "one segment", "scores": {"fg_ari": of(0 * images), "mbo_i": of(0 * images + 0.1)}}
    random = {"name": f"{name} (random)", "scores": {"fg_ari": of(images / 4), "mbo_i": of(images / 8)}}
    return {
        "task": "object_discovery",
        "models": [entry, random],
        "baselines": [flat],
        "commit": "abc",
        "protocol": {"data_fingerprint": f"scenes:{len(images)}"},
    }


def make(folder: Path, name: str, images: np.ndarray) -> Path:
    path = folder / name / "downstream" / "object_discovery" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(discovery(name, images)))
    return folder / name


def test_means_spreads_and_differences_over_seeds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = rng.uniform(0.3, 0.6, IMAGES)
    runs = [make(tmp_path, f"full_seed-{seed}", base + 0.2 + 0.01 * seed) for seed in range(3)]
    runs += [make(tmp_path, f"none_seed-{seed}", base) for seed in range(2)]
    table = comparison.collect(runs)
    full, none = table["rows"]
    assert [(row["name"], row["seeds"]) for row in table["rows"]] == [("full", 3), ("none", 2)]
    expected = [base.mean() + 0.2 + 0.01 * seed for seed in range(3)]
    assert full["scores"]["FG-ARI"]["mean"] == pytest.approx(statistics.fmean(expected))
    assert full["scores"]["FG-ARI"]["spread"] == pytest.approx(0.01)
    difference = none["difference"]
    assert difference["difference"] == pytest.approx(-0.21)
    # all images differ by the same, so that the interval holds the seeds alone: all of them the worst, all the best
    assert (difference["low"], difference["high"]) == pytest.approx((-0.22, -0.20), abs=2e-3)
    assert [row["name"] for row in table["beside"]] == ["one segment"]
    assert none["scores"]["FG-ARI of random weights"]["mean"] == pytest.approx(base.mean() / 4)

    lines = comparison.markdown(table).splitlines()
    own = " | ".join(f"{name} of random weights" for name in ("FG-ARI", "MBO"))
    assert lines[0] == f"|  | seeds | FG-ARI | MBO | {own} | FG-ARI against the first |"
    assert f"| {100 * full['scores']['FG-ARI']['mean']:.1f} \N{PLUS-MINUS SIGN} 1.0 |" in lines[2]
    assert lines[3].endswith("| -21.0 (-22.0 to -20.0) |")
    assert lines[-1] == "| one segment |  | 0.0 | 10.0 |  |  |  |"


def test_a_run_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    runs = [make(tmp_path, name, np.full(IMAGES, 0.5)) for name in ("b_seed-0", "a_seed-0", "a_seed-1")]
    rows = comparison.collect([*runs[1:], *runs])["rows"]
    assert [(row["name"], row["seeds"]) for row in rows] == [("a", 2), ("b", 1)]


def test_scores_on_other_images_are_not_paired(tmp_path: Path) -> None:
    runs = [make(tmp_path, "a", np.full(IMAGES, 0.5)), make(tmp_path, "b", np.full(IMAGES + 1, 0.5))]
    assert comparison.collect(runs)["rows"][1]["difference"] is None


def test_a_run_renamed_since_its_evaluation_keeps_its_random_weights(tmp_path: Path) -> None:
    run = make(tmp_path, "a", np.full(IMAGES, 0.8)).rename(tmp_path / "b")
    table = comparison.collect([run])
    assert table["rows"][0]["scores"]["FG-ARI of random weights"]["mean"] == pytest.approx(0.2)
    assert [row["name"] for row in table["beside"]] == ["one segment"]


def test_evaluations_under_a_name_of_their_own_are_columns_of_their_own(tmp_path: Path) -> None:
    run = make(tmp_path, "a", np.full(IMAGES, 0.5))
    other = run / "downstream" / "uptile 4" / "results.json"
    other.parent.mkdir()
    other.write_text(json.dumps(discovery("a", np.full(IMAGES, 0.6))))
    (row,) = comparison.collect([run])["rows"]
    assert {name: score["mean"] for name, score in row["scores"].items()} == pytest.approx(
        {
            "FG-ARI": 0.5,
            "MBO": 0.25,
            "FG-ARI, uptile 4": 0.6,
            "MBO, uptile 4": 0.3,
            "FG-ARI of random weights": 0.125,
            "MBO of random weights": 0.0625,
            "FG-ARI, uptile 4 of random weights": 0.15,
            "MBO, uptile 4 of random weights": 0.075,
        }
    )


def test_runs_without_results_or_scored_differently_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no results"):
        comparison.collect([tmp_path / "empty"])
    runs = [make(tmp_path, f"a_seed-{seed}", np.full(IMAGES, 0.5)) for seed in range(2)]
    source = runs[1] / "downstream" / "object_discovery"
    source.rename(source.with_name("other"))
    with pytest.raises(UserError, match="repetitions of a were not scored alike"):
        comparison.collect(runs)


def test_repetitions_have_names_and_protocols_that_fit(tmp_path: Path) -> None:
    same = [make(tmp_path / folder, "a_seed-0", np.full(IMAGES, 0.5)) for folder in ("x", "y")]
    with pytest.raises(UserError, match="several runs are called a_seed-0"):
        comparison.collect(same)

    runs = [make(tmp_path, f"b_seed-{seed}", np.full(IMAGES, 0.5)) for seed in range(2)]
    for seed, run in enumerate(runs):
        edit(run, {"grouping": {"clusters": 4, "seed": seed}, "data": f"disk{seed}", "seed": seed})
    assert comparison.collect(runs)["rows"][0]["seeds"] == 2
    edit(runs[1], {"grouping": {"clusters": 11, "seed": 1}})
    with pytest.raises(UserError, match="grouping of object_discovery differs in b_seed-1"):
        comparison.collect(runs)


def edit(run: Path, protocol: dict[str, Any]) -> None:
    path = run / "downstream" / "object_discovery" / "results.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"protocol": result["protocol"] | protocol}))


def test_damaged_and_undefined_results_are_named(tmp_path: Path) -> None:
    run = make(tmp_path, "a", np.full(IMAGES, 0.5))
    path = run / "downstream" / "object_discovery" / "results.json"
    text = path.read_text()
    path.write_text(text.replace('"mean": 0.5', '"mean": null'))
    assert "FG-ARI" not in comparison.collect([run])["rows"][0]["scores"]  # no image with an object
    path.write_text(text[:50])
    for read in (comparison.collect, lambda runs: report.write(runs, tmp_path / "page.html")):
        with pytest.raises(UserError, match=r"results\.json is damaged"):
            read([run])


def test_the_command_prints_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(tmp_path, "a", np.linspace(0, 1, IMAGES))
    assert report.main([str(run), "--table", str(tmp_path / "table.json")]) == 0
    assert capsys.readouterr().out == comparison.markdown(json.loads((tmp_path / "table.json").read_text()))
