"""Accuracy of a classifier under attack and under corruption, and how honest its confidence is.

python downstream/robustness.py --ckpt runs/classify --data data/cifar10/test --images 1000
python downstream/robustness.py --ckpt runs/classify --data data/cifar10/test --images 100 --transfer-from runs/resnet
python downstream/robustness.py --ckpt resnet18.a1_in1k --data shards/imagenet-val --images 100 --corruptions none
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from configs import RobustnessConfig, UserError
from configs.errors import run as run_entry
from configs.flags import parse

if TYPE_CHECKING:
    from downstream.classifier import Classifier
    from downstream.robust_scores import Trial

TASK = "robustness"
PUBLISHED_SIDE = 32  # of the images in CIFAR-10-C's arrays


def run(config: RobustnessConfig, *, out_dir: Path | None = None) -> dict[str, Any]:
    """Test a classifier; writes results.json and pictures, prints a table, returns what results.json holds."""
    if config.ckpt is None:
        raise UserError("no classifier: give --ckpt (run, export, weights file or timm name)")
    from downstream import classifier, results

    if results.ranks()[0] != 0:
        return {}
    check_corruptions(config)
    model = classifier.load(config.ckpt, arch=config.arch, args=config.args, device=config.device)
    data = classifier.read(config.data, limit=config.images, size=config.size, num_classes=model.num_classes)
    side = data.images.shape[1]
    if side != PUBLISHED_SIDE and config.cifar10c is not None and config.corruptions not in ((), ("none",)):
        raise UserError(
            f"the arrays in {config.cifar10c} are of {PUBLISHED_SIDE} px, the images of {side}: both are scored at one "
            "size only; leave --cifar10c out for corruptions made at that size"
        )
    from downstream.robust_scores import Trial

    trial, source = Trial(model, data, config), _source(config, model.num_classes)
    for one in (model, source):
        if one is not None:
            one.check_size(side)
    out = results.folder_of(config.ckpt, TASK, out=out_dir or config.out, name=config.name)
    document = measure(trial, out, source)
    protocol = protocol_of(trial)
    path = results.write(out, TASK, config, protocol, **document, seconds=trial.seconds)
    print(table(document))
    print(f"written to {path}")
    return {**document, "path": str(path)}


def _source(config: RobustnessConfig, num_classes: int) -> Classifier | None:
    """The classifier whose adversarial images are tried; read before hours of attacks, not after them."""
    from downstream import classifier

    if config.transfer_from is None:
        return None
    source = classifier.load(config.transfer_from, device=config.device)
    if source.num_classes != num_classes:
        raise UserError(
            f"{config.transfer_from} has {source.num_classes} classes, {config.ckpt} has {num_classes}: "
            "adversarial images are moved between classifiers of the same classes only"
        )
    return source


def measure(trial: Trial, out: Path, source: Classifier | None = None) -> dict[str, Any]:
    """Run all parts and draw the pictures. source: the classifier whose adversarial images are tried."""
    from downstream import calibration, robust_pictures, robust_scores

    config = trial.config
    out.mkdir(parents=True, exist_ok=True)
    found, chances = trial.timed("clean", lambda: robust_scores.clean(trial))
    document: dict[str, Any] = {"clean": found}
    reliability = {"clean": calibration.reliability(chances.mean(0), trial.data.labels)}
    document["attacks"] = robust_scores.attacks(trial)
    document["curve"] = trial.timed("curve", lambda: robust_scores.curve(trial)) if config.curve else []
    if source is not None:
        document["transfer"] = trial.timed("transfer", lambda: robust_scores.transfer(trial, source))
    if config.corruptions not in ((), ("none",)):
        document["corruptions"], many, labels = trial.timed("corruptions", lambda: robust_scores.corrupted(trial))
        reliability["corrupted"] = calibration.reliability(many.mean(0), labels)
    document["signs_of_masking"] = robust_scores.signs_of_masking(document)
    calibration.draw(out / "reliability.png", reliability)
    if document["curve"]:
        robust_pictures.curve(out / "curve.png", document["curve"])
    if trial.examples and config.pictures:
        robust_pictures.examples(out / "adversarial.png", trial.images[: config.pictures], trial.examples)
    return document


def check_corruptions(config: RobustnessConfig) -> None:
    """Raises UserError for corruptions or severities that do not exist, and for published arrays that are missing."""
    from configs.models import nearest
    from downstream.corruptions import NAMES, SEVERITIES, published

    for name in config.corruptions:
        if name not in NAMES and config.corruptions not in (("all",), ("none",)):
            raise UserError(f"no corruption {name!r}" + nearest(name, NAMES))
    for severity in config.severities:
        if severity not in SEVERITIES:
            raise UserError(f"severity {severity} does not exist; there are 1 to 5")
    if config.cifar10c is not None and config.corruptions != ("none",):
        for name in NAMES if config.corruptions == ("all",) else config.corruptions:
            published(Path(config.cifar10c), name, config.severities[0])


def protocol_of(trial: Trial) -> dict[str, Any]:
    """All that the scores depend on."""
    config = trial.config
    own = "frost textures are generated, random numbers differ from the published arrays"
    return {
        "data": config.data,
        "images": len(trial.data.labels),
        "size": trial.data.images.shape[1],
        "classifier": trial.classifier.name,
        "random_starts": trial.classifier.victim().is_random,
        "settings": trial.settings,
        "eps": config.eps,
        "eps_l2": config.eps_l2,
        "pgd": f"{config.pgd_steps} steps of 2.5 eps / steps, one random start in the ball, worst point kept",
        "autoattack": {"steps": config.auto_steps, "targets": config.auto_targets, "queries": config.queries},
        "draws": config.draws,
        "starts": config.starts,
        "corruptions": f"published arrays in {config.cifar10c}"
        if config.cifar10c
        else f"CIFAR-10-C's constants; {own}",
        "ece": "15 bins of equal width over the largest probability",
        "seed": config.seed,
        "precision": "fp32",
    }


def table(document: dict[str, Any]) -> str:
    """The results as lines for the terminal."""
    fixed, scores = document["clean"]["fixed"], document["clean"]["calibration"]
    low, high = fixed["interval"]
    lines = [
        f"accuracy on {fixed['images']} images (%), 95 % interval",
        f"  clean, fixed start           {fixed['accuracy']:5.1f}  [{low:.1f}, {high:.1f}]",
        f"  clean, starts averaged       {100 * scores['accuracy_averaged']:5.1f}   ECE "
        f"{100 * scores['ece']:.1f} single, {100 * scores['ece_averaged']:.1f} averaged",
    ]
    for entry in document["attacks"]:
        title = f"{entry['attack']}, {entry['setting']}"
        fresh = f"   on fresh starts {entry['on_fresh_starts']:.1f}" if "on_fresh_starts" in entry else ""
        lines.append(f"  {title:<28s} {entry['accuracy']:5.1f}   eps {entry['eps']:.4f} {entry['norm']}{fresh}")
    if "transfer" in document:
        moved = document["transfer"]
        lines.append(
            f"  {'transfer from ' + moved['from']:<28s} {moved['accuracy']:5.1f}   eps {moved['eps']:.4f} linf"
        )
    if "corruptions" in document:
        mean = document["corruptions"]["mean"]
        lines.append(
            f"  {'corruptions, averaged':<28s} {100 * mean['accuracy_averaged']:5.1f}   ECE {100 * mean['ece']:.1f} "
            f"single, {100 * mean['ece_averaged']:.1f} averaged"
        )
    lines += [f"  sign of masked gradients: {sign}" for sign in document["signs_of_masking"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Test a classifier from the command line."""
    run(parse(RobustnessConfig, argv, description=__doc__ or "", config="robustness"))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
