"""The parts of a robustness test: predictions, attacks in both settings, curves over eps, corruptions, transfer.

Owns: what each part measures. Accuracies are in percent. A classifier with random starts is attacked in two settings:

fixed  one start, known to the attacker, for attack and score: deterministic, so that AutoAttack's standard form applies
       and gradients cannot hide behind the draw;
eot    fresh starts for every query, gradients averaged over them (expectation over transformations).

Adversarial images of both are scored once more on starts that the attack never saw.

Shapes: N images [N, 3, S, S] in [0, 1], E starts, K classes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from configs.jobs import RobustnessConfig
from downstream import calibration, corruptions
from downstream.attacks.ball import Ball
from downstream.attacks.ensemble import Budget, autoattack
from downstream.attacks.losses import cross_entropy
from downstream.attacks.pgd import fgsm, pgd
from downstream.attacks.square import square
from downstream.attacks.victim import Victim
from downstream.classifier import Classifier, Labelled
from downstream.voting import interval

Found = TypeVar("Found")

_FRESH = 7919  # added to the seed for starts that no attack has seen


@dataclass
class Trial:
    """A classifier, the images it is tested on, and what was found so far."""

    classifier: Classifier
    data: Labelled
    config: RobustnessConfig
    seconds: dict[str, float] = field(default_factory=dict)
    examples: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.images, self.labels = self.data.tensors(self.classifier.device)

    @property
    def settings(self) -> list[str]:
        """The settings that make sense: without random starts there is only one."""
        if not self.classifier.victim().is_random:
            return ["fixed"]
        return list(self.config.settings)

    def fresh(self) -> Victim:
        """The classifier on starts that no attack has seen."""
        return self.classifier.victim(self.config.starts, seed=self.config.seed + _FRESH)

    def timed(self, name: str, work: Callable[[], Found]) -> Found:
        """Run a part, note its seconds, say that it is done."""
        began = time.monotonic()
        found = work()
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f"{name}: {self.seconds[name]:.0f} s", file=sys.stderr, flush=True)
        return found

    def batches(self) -> Sequence[slice]:
        """Images that are worked on at once."""
        size = self.config.batch_size
        return [slice(first, first + size) for first in range(0, len(self.labels), size)]

    def attack(self, victim: Victim, attack: Callable[[Victim, Tensor, Tensor], Tensor]) -> Tensor:
        """Adversarial images of all images [N, 3, S, S]."""
        return torch.cat([attack(victim, self.images[part], self.labels[part]) for part in self.batches()])

    def probabilities(self, victim: Victim, images: Tensor) -> np.ndarray:
        """Probabilities of all draws [E, N, K]."""
        parts = [victim.probabilities(images[part]) for part in self.batches()]
        return torch.cat(parts, dim=1).cpu().numpy()


def clean(trial: Trial) -> tuple[dict[str, Any], np.ndarray]:
    """Accuracy and calibration without an attack; also the probabilities on fresh starts [E, N, K]."""
    chances = trial.probabilities(trial.fresh(), trial.images)
    fixed = trial.probabilities(trial.classifier.victim(), trial.images)[0]
    found: dict[str, Any] = {"calibration": calibration.summary(chances, trial.data.labels)}
    return {"fixed": _accuracy(fixed.argmax(1) == trial.data.labels), **found}, chances


def attacks(trial: Trial) -> list[dict[str, Any]]:
    """All attacks of the configuration, in each setting."""
    found = []
    for setting in trial.settings:
        for name in trial.config.attacks:
            if name == "square" and "autoattack" in trial.config.attacks and setting == "fixed":
                continue  # it is a part of AutoAttack there
            found.append(trial.timed(f"{name} ({setting})", partial(_one_attack, trial, name, setting)))
    return found


def _one_attack(trial: Trial, name: str, setting: str) -> dict[str, Any]:
    config = trial.config
    victim = trial.classifier.victim(config.draws if setting == "eot" else 0, seed=config.seed)
    ball = Ball("l2", config.eps_l2) if name.endswith("l2") else Ball("linf", config.eps)
    entry: dict[str, Any] = {"attack": name, "setting": setting, "norm": ball.norm, "eps": ball.eps}
    if name.startswith("autoattack"):
        budget = Budget(config.auto_steps, config.auto_targets, config.queries)
        outcomes = [
            autoattack(victim, trial.images[part], trial.labels[part], ball, budget=budget) for part in trial.batches()
        ]
        images = torch.cat([outcome.images for outcome in outcomes])
        broken_by = torch.cat([outcome.broken_by for outcome in outcomes])
        entry["broken_by"] = {part: int((broken_by == i).sum()) for i, part in enumerate(outcomes[0].names)}
    else:
        images = trial.attack(victim, partial(_plain, name, config, ball))
    trial.examples[f"{name} {setting}"] = images[: config.pictures]
    scored = victim if setting == "fixed" else trial.fresh()
    chances = trial.probabilities(scored, images)
    correct = chances.argmax(2) == trial.data.labels
    if setting == "fixed" and victim.is_random:
        fresh = trial.probabilities(trial.fresh(), images).argmax(2) == trial.data.labels
        entry["on_fresh_starts"] = 100 * float(fresh.mean())
    averaged = _accuracy(chances.mean(0).argmax(1) == trial.data.labels)
    return {**entry, "accuracy": 100 * float(correct.mean()), "averaged": averaged, "queries": victim.queries}


def _plain(name: str, config: RobustnessConfig, ball: Ball, victim: Victim, images: Tensor, labels: Tensor) -> Tensor:
    if name == "fgsm":
        return fgsm(victim, images, labels, ball)
    if name == "square":
        return square(victim, images, labels, ball, queries=config.queries, seed=config.seed)
    return pgd(victim, images, labels, ball, steps=config.pgd_steps, seed=config.seed)


def curve(trial: Trial) -> list[dict[str, float]]:
    """Loss and accuracy over rising eps under PGD and under random search of as many passes, with the fixed start."""
    points = []
    for eps in sorted(set(trial.config.curve)):
        ball, victim = Ball("linf", eps), trial.classifier.victim()
        if eps == 0:
            found = {"pgd": trial.images, "random": trial.images}
        else:
            searching = partial(square, ball=ball, queries=3 * trial.config.pgd_steps, seed=trial.config.seed)
            climbing = partial(pgd, ball=ball, steps=trial.config.pgd_steps, seed=trial.config.seed)
            found = {"pgd": trial.attack(victim, climbing), "random": trial.attack(victim, searching)}
        point = {"eps": eps}
        for name, images in found.items():
            answers = [victim.score(images[part], trial.labels[part], cross_entropy) for part in trial.batches()]
            point[f"{name}_loss"] = torch.cat([answer.loss for answer in answers]).mean().item()
            point[f"{name}_accuracy"] = 100 * (1 - torch.cat([answer.fooled for answer in answers]).mean().item())
        points.append(point)
    return points


def transfer(trial: Trial, source: Classifier) -> dict[str, Any]:
    """Accuracy on PGD's adversarial images of another classifier."""
    ball, config = Ball("linf", trial.config.eps), trial.config
    images = trial.attack(source.victim(), partial(pgd, ball=ball, steps=config.pgd_steps, seed=config.seed))
    own = trial.probabilities(source.victim(), images)[0].argmax(1) == trial.data.labels
    correct = trial.probabilities(trial.fresh(), images).argmax(2) == trial.data.labels
    return {
        "from": source.name,
        "eps": ball.eps,
        "accuracy": 100 * float(correct.mean()),
        "accuracy_of_source": 100 * float(own.mean()),
    }


def corrupted(trial: Trial) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Accuracy and calibration under every corruption; also all probabilities [E, sum N, K] and labels."""
    names = corruptions.NAMES if trial.config.corruptions == ("all",) else trial.config.corruptions
    rows, all_chances, all_labels = [], [], []
    for name in names:
        for severity in trial.config.severities:
            data = _corrupted_images(trial, name, severity)
            images, _ = data.tensors(trial.classifier.device)
            part = Trial(trial.classifier, data, trial.config)
            chances = part.probabilities(trial.fresh(), images)
            rows.append({"name": name, "severity": severity, **calibration.summary(chances, data.labels)})
            all_chances.append(chances)
            all_labels.append(data.labels)
    scores = [key for key in rows[0] if key not in ("name", "severity")]
    mean = {key: float(np.mean([row[key] for row in rows])) for key in scores}
    return {"mean": mean, "rows": rows}, np.concatenate(all_chances, axis=1), np.concatenate(all_labels)


def _corrupted_images(trial: Trial, name: str, severity: int) -> Labelled:
    if trial.config.cifar10c is not None:
        from pathlib import Path

        images, labels = corruptions.published(Path(trial.config.cifar10c), name, severity)
        return Labelled(np.array(images[: len(trial.labels)]), labels[: len(trial.labels)])
    made = [
        corruptions.corrupt(image, name, severity, seed=trial.config.seed, index=index)
        for index, image in enumerate(trial.data.images)
    ]
    return Labelled(np.stack(made), trial.data.labels)


def signs_of_masking(document: dict[str, Any]) -> list[str]:
    """Signs that gradients mislead the attacks, in words with figures (arXiv 1802.00420, 1902.06705).

    An empty list means that none of these signs was found, not that there is no masking.
    """
    points = document.get("curve") or []
    found = [
        f"random search beats PGD at eps {point['eps']:.4f}: "
        f"{point['random_accuracy']:.1f} against {point['pgd_accuracy']:.1f}"
        for point in points
        if point["random_accuracy"] < point["pgd_accuracy"] - 2
    ]
    found += [
        f"PGD's loss falls from eps {before['eps']:.4f} to {after['eps']:.4f}"
        for before, after in pairwise(points)
        if after["pgd_loss"] < before["pgd_loss"] - 1e-3
    ]
    if points and points[-1]["eps"] >= 0.25 and points[-1]["pgd_accuracy"] > 5:
        found.append(f"{points[-1]['pgd_accuracy']:.1f} % are still right at eps {points[-1]['eps']:.3f}")
    by_name = {(entry["attack"], entry["setting"]): entry["accuracy"] for entry in document.get("attacks", [])}
    moved = document.get("transfer")
    if moved and ("pgd", "fixed") in by_name and moved["accuracy"] < by_name["pgd", "fixed"] - 2:
        found.append(f"transfer from {moved['from']} beats PGD: {moved['accuracy']:.1f}")
    return found


def _accuracy(correct: np.ndarray) -> dict[str, Any]:
    low, high = interval(int(correct.sum()), len(correct))
    return {"accuracy": 100 * float(correct.mean()), "interval": [100 * low, 100 * high], "images": len(correct)}
