"""Pictures of Sudoku solving: curves over steps and starts, energy against correctness, a board being solved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from downstream.rollout import noise
from downstream.solver import Solver
from pretrain.data.sudoku.board import Boards

CELL = 36
_INK, _ANSWER, _WRONG, _LINE = (20, 20, 20), (38, 92, 160), (200, 40, 40), (150, 150, 150)


def curves(path: Path, document: dict[str, Any]) -> None:
    """Board accuracy over the steps, over the starts by each vote, and by the number of givens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (over_steps, over_starts, over_givens) = pyplot.subplots(1, 3, figsize=(12, 3.6))
    steps = [entry["T"] for entry in document["by_steps"]]
    colours = {name: f"C{number}" for number, name in enumerate(document["by_steps"][0]["votes"], start=1)}
    over_steps.plot(steps, [entry["single"]["accuracy"] for entry in document["by_steps"]], "o-", label="one start")
    for name, colour in colours.items():
        values = [entry["votes"][name]["accuracy"] for entry in document["by_steps"]]
        over_steps.plot(steps, values, "o--", label=name, color=colour)
    over_steps.set(xlabel="steps T", ylabel="boards solved (%)", ylim=(0, 101))
    over_steps.legend(fontsize=7)
    numbers = [1]
    for name, points in document["by_starts"].items():
        numbers = [point["starts"] for point in points]
        over_starts.plot(numbers, [point["accuracy"] for point in points], "o--", label=name, color=colours[name])
    over_starts.set(xlabel="starts", ylim=(0, 101), title=f"T = {steps[-1]}, by vote")
    for axes, ticks in ((over_steps, steps), (over_starts, numbers)):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, labels=map(str, ticks))
        axes.minorticks_off()
    given = document["by_givens"]
    over_givens.bar([int(number) for number in given], [entry["accuracy"] for entry in given.values()], color="#3b6ea5")
    chosen = next(iter(colours), "one start")
    over_givens.set(xlabel="givens", ylim=(0, 101), title=f"T = {steps[-1]}, {chosen}")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def energies(path: Path, energy: NDArray[np.float32], correct: NDArray[np.bool_]) -> None:
    """Histograms of the energies of right and of wrong answers [P, S], each puzzle's mean taken off."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    centred = energy - energy.mean(axis=1, keepdims=True)
    low, high = np.quantile(centred, [0.005, 0.995]).tolist()
    bins = np.linspace(low, max(high, low + 1e-6), 40).tolist()
    figure, axes = pyplot.subplots(figsize=(4.6, 3.4))
    for answers, label, colour in ((correct, "right", "#2f8f4e"), (~correct, "wrong", "#b03a2e")):
        if answers.any():
            axes.hist(centred[answers], bins, alpha=0.6, density=True, label=label, color=colour)
    axes.set(xlabel="energy minus the puzzle's mean", ylabel="density")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


@torch.no_grad()
def animate(
    path: Path, solver: Solver, puzzle: Boards, solution: Boards, *, steps: int, number: int, seed: int
) -> None:
    """A GIF of one puzzle [81] being solved: the network's answer after each step, wrong digits in red.

    For models of one layer with oscillators. `number` keys the start, as in `roll_out`.
    """
    digits = torch.from_numpy(puzzle.astype(np.int64))[None].to(solver.device)
    start = noise(solver, np.array([number]), np.array([0]), seed=seed)
    output = solver.net.forward_oscillators(digits, start, steps=steps, trajectory=True, energy=True)
    frames = []
    for step in range(1, steps + 1):
        logits = solver.net.decode(output.trajectory[-1][step]).float()[0]
        chances, answers = logits.softmax(1).max(1)
        answer = np.where(puzzle > 0, puzzle, (answers + 1).cpu().numpy())
        caption = f"step {step}  energy {output.energy[-1][step, 0].item():.1f}"
        frames.append(picture(answer, puzzle, solution, chances.cpu().numpy(), caption))
    times = [120] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)


def picture(
    answer: Boards, puzzle: Boards, solution: Boards, chances: NDArray[np.floating], caption: str
) -> Image.Image:
    """One board [81]: givens black, answers blue (red where wrong), paler the less probable [81]."""
    image = Image.new("RGB", (9 * CELL + 1, 9 * CELL + 24), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=22)
    for cell in range(81):
        row, column = divmod(cell, 9)
        ink = _INK if puzzle[cell] else _ANSWER if answer[cell] == solution[cell] else _WRONG
        share = 1.0 if puzzle[cell] else 0.25 + 0.75 * float(chances[cell])
        colour = tuple(int(255 - share * (255 - value)) for value in ink)
        middle = (column * CELL + CELL / 2, row * CELL + CELL / 2)
        draw.text(middle, str(answer[cell]), fill=colour, font=font, anchor="mm")
    for line in range(10):
        width = 3 if line % 3 == 0 else 1
        draw.line([(line * CELL, 0), (line * CELL, 9 * CELL)], fill=_LINE, width=width)
        draw.line([(0, line * CELL), (9 * CELL, line * CELL)], fill=_LINE, width=width)
    draw.text((4, 9 * CELL + 4), caption, fill=_INK, font=ImageFont.load_default(size=14))
    return image
