"""The report: self-contained, small, complete; opened in a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from configs import UserError
from downstream import charts, oscillations, page, report, result_section

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with curves, events and one result of each kind."""
    folder = tmp_path / "a <run>"
    objects = folder / "downstream" / "object_discovery"
    objects.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "model: {name: akorn_nano_patch4_32}\ntask: {name: simclr}\nbatch_size: 8\nseed: 0\n"
    )
    rows = [{"step": step, "loss": 5.0 / step, "lr": 0.001, "grad_norm": 1.0} for step in range(1, 900)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 900, "lo')
    (folder / "events.jsonl").write_text(
        '{"event": "saved", "step": 4}\n{"event": "rollback", "step": 7, "why": "<NaN>"}\n'
    )
    summary = {"mean": 0.5, "spread": 0.01, "skipped": 1, "images": [0.5, None], "starts": [0.5]}
    entry = {
        "name": "model & co",
        "scores": {"fg_ari": summary, "mbo_i": summary, "k=2/fg_ari": summary, "k=2/mbo_i": summary},
    }
    protocol = {
        "images": 2, "preset": {"size": 32}, "grouping": {"method": "linkage", "clusters": 4}, "uptile": 1, "starts": 4,
        "preset_name": "tetrominoes",
    }  # fmt: skip
    charts_png = oscillations.strip(np.zeros((2, 4, 4, 3), np.uint8))
    (objects / "pictures.png").write_bytes(charts_png)
    difference = {"model": "a", "against": "b", "score": "fg_ari", "difference": 0.1, "low": 0.0, "high": 0.2}
    (objects / "results.json").write_text(
        json.dumps(
            {
                "task": "object_discovery",
                "protocol": protocol,
                "models": [entry],
                "baselines": [entry],
                "differences": [difference],
                "pictures": ["pictures.png"],
                "config": {},
            }
        )
    )
    probe = folder / "downstream" / "linear_probe"
    probe.mkdir()
    linear = {"top1": 0.6, "top5": 0.9, "ece": 0.1, "chosen": {"features": "avg", "rate": 0.1}}
    (probe / "results.json").write_text(
        json.dumps(
            {
                "task": "linear_probe",
                "protocol": {"train_images": 5, "images": 2, "size": 32},
                "models": [
                    {"name": "m", "linear": linear, "low_shot": {}, "knn": {"features": "pooled", "10": {"top1": 0.4}}}
                ],
            }
        )
    )
    return folder


def test_page_holds_everything_and_nothing_from_elsewhere(run: Path) -> None:
    out = report.run(run)
    text = out.read_text()
    assert out.stat().st_size < 10 * 2**20
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "<script" not in text
    assert "@import" not in text
    for expected in (
        "model &amp; co",
        "50.0 +/- 1.0",
        "rollback",
        "&lt;NaN&gt;",
        "60.0",
        "Loss",
        "+10.0",
        "a &lt;run&gt;",
    ):
        assert expected in text
    assert text.count("<svg") == 4  # loss, gradient norm, learning rate, sweep over k
    assert ">saved<" not in text


def test_headline_takes_a_number_of_neighbours_that_was_fixed_beforehand() -> None:
    linear = {"top1": 0.6}
    knn = {"features": "pooled", "10": {"top1": 0.5}, "20": {"top1": 0.4}, "200": {"top1": 0.45}}
    result = {"task": "linear_probe", "models": [{"linear": linear, "knn": knn}]}
    assert result_section.headline(result)[1] == ("20-NN, top-1", "40.0")
    del knn["20"]
    assert result_section.headline(result)[1] == ("10-NN, top-1", "50.0")


def test_runs_are_compared(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "b"
    shutil.copytree(run, other)
    out = report.write([run, other], tmp_path / "both.html")
    assert "Comparison" in out.read_text()
    assert report.main([str(other), str(run)]) == 0
    assert "Comparison" in (other / "comparison.html").read_text()  # its own report.html stays
    with pytest.raises(UserError, match="is no run"):
        report.write([tmp_path / "none"], out)
    with pytest.raises(UserError, match="is no run"):  # but a folder of runs
        report.write([other.parent], tmp_path / "none.html")


def test_curves_are_thinned_without_losing_their_course() -> None:
    steps = list(range(10_000))
    x, y = charts.thinned(steps, [2.0 * step for step in steps])
    assert len(x) == charts.MOST_POINTS
    np.testing.assert_allclose(y, 2 * np.array(x))
    assert charts.thinned([1, 2], [float("nan"), 3.0]) == ([2.0], [3.0])


def test_coherence_of_known_states() -> None:
    """Two objects of two tokens each: their oscillators agree within, and are opposite between."""
    direction = torch.tensor([1.0, 0.0, 0.0, 1.0]) / 1.0  # two oscillators of two components
    tokens = torch.stack([direction, direction, -direction, -direction, direction])
    states = torch.stack([tokens, tokens])[None]
    within, between = oscillations.coherence(states, torch.tensor([[1, 1, 2, 2, 0]]), oscillators=2)
    assert within.tolist() == [1.0, 1.0]
    assert between.tolist() == [-1.0, -1.0]


def test_like_phases_have_like_colours() -> None:
    states = torch.randn(3, 4, 6)
    states[:, 1] = states[:, 0]
    colours = oscillations.phase_colours(states, (2, 2))
    assert colours.shape == (3, 2, 2, 3)
    assert (colours[:, 0, 0] == colours[:, 0, 1]).all()
    assert not (colours[-1, 0, 0] == colours[-1, 1, 1]).all()


def test_tokens_take_the_commonest_label() -> None:
    truth = torch.zeros(1, 4, 4, dtype=torch.long)
    truth[0, :2, :2] = 3
    truth[0, 3, 3] = 1
    assert oscillations.tokens_of(truth, (2, 2)).tolist() == [[3, 0, 0, 0]]


def test_other_tasks_get_a_table_of_their_figures(tmp_path: Path) -> None:
    drawn = result_section.draw(tmp_path, {"task": "sudoku", "scores": {"hard": {"T=16": 0.5}, "note": "text"}})
    assert "hard / T=16" in drawn
    assert "0.5" in drawn
    assert "note" not in drawn.split("<details>")[0]
    assert result_section.headline({"task": "sudoku"}) == []


def test_text_is_escaped() -> None:
    assert page.table(["<a>"], [["<b>"]]).count("&lt;") == 2


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_it_without_errors_or_requests(run: Path, tmp_path: Path) -> None:
    report.run(run)
    served = tmp_path / "report.html"
    shutil.copy(run / "report.html", served)
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0",
        f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={tmp_path / 'net.json'}",
    ]  # fmt: skip
    probe = (
        "<script>window.onload=()=>{document.title=[...document.images].every(i=>i.complete&&i.naturalWidth>0)?"
        "'all shown':'missing';document.body.append(document.title, ' overflow '+"
        "(document.documentElement.scrollWidth>innerWidth))}</script>"
    )
    served.write_text(served.read_text().replace("</head>", probe + "</head>"))
    for width in (390, 1280):
        seen = subprocess.run(
            [str(CHROMIUM), *options, f"--window-size={width},900", "--dump-dom", served.as_uri()],
            capture_output=True, text=True, timeout=300, check=True,
        )  # fmt: skip
        assert "all shown" in seen.stdout
        assert "overflow false" in seen.stdout
        assert "CONSOLE" not in seen.stderr
    hosts = set(re.findall(r'"url":"https?://([^/"]+)', (tmp_path / "net.json").read_text()))
    own = (".google.com", ".googleapis.com", ".gvt1.com")  # the browser asks its maker for the time, whatever it shows
    assert not [host for host in hosts if not host.endswith(own)]
