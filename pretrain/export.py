"""From a checkpoint to a folder that timm loads: the backbone with averaged weights.

python pretrain/export.py runs/imagenet
python pretrain/export.py runs/imagenet --step 50000 --out /tmp/at_50000
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from configs.errors import UserError, run

if TYPE_CHECKING:
    from torch import nn

    from configs.schema import PretrainConfig


FILES = {"model.safetensors", "README.md", "config.json", "fingerprint.json"}


def export(source: Path, out: Path, *, ema: bool = True) -> Path:
    """Write the backbone of a run's newest whole checkpoint, or of one checkpoint, in timm's hub layout.

    `out` gets config.json, model.safetensors, README.md and fingerprint.json; it appears whole, by rename, and replaces
    an older export; what else lies beside that (.git, notes) stays. `ema=False` takes the weights themselves instead of
    their average.

    Raises:
        UserError: there is no whole checkpoint, or `out` holds something else than an export.
    """
    from pretrain import checkpoint

    if out.exists() and not _may_replace(out):
        raise UserError(f"{out} holds other things than an export, which would replace them; give another --out")
    path = source if checkpoint.is_checkpoint(source) else checkpoint.newest(source)
    reason = "there is none" if path is None else checkpoint.damage(path)
    if path is None or reason is not None:
        raise UserError(f"{source} holds no whole checkpoint to export: {reason}")
    snapshot = checkpoint.load(path)
    config = _config(snapshot.state["config"])
    averaged = ema and "ema" in snapshot.tensors
    backbone = _backbone(config, snapshot.tensors["ema" if averaged else "weights"])
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _write(partial, backbone, config)
    text = card(config, snapshot.step, averaged=averaged, is_timm=hasattr(backbone, "pretrained_cfg"))
    (partial / "README.md").write_text(text)
    _put_in_place(partial, out)
    return out


@contextlib.contextmanager
def exported(folder: Path) -> Iterator[Path]:
    """The export that a folder stands for: itself, that of a run, or for the time being one of the newest checkpoint.

    Raises:
        UserError: it is neither a run, nor a checkpoint, nor an export.
    """
    from pretrain import checkpoint

    for place in (folder, folder / "export"):
        if (place / "model.safetensors").is_file() and (place / "config.json").is_file():
            yield place
            return
    if not (folder / "checkpoints").is_dir() and not checkpoint.is_checkpoint(folder):
        raise UserError(f"{folder} is neither a run nor an export: it has no model.safetensors and no checkpoints")
    with tempfile.TemporaryDirectory() as temporary:
        yield export(folder, Path(temporary) / "export")


def _config(values: dict[str, Any]) -> PretrainConfig:
    from configs.schema import PretrainConfig

    return PretrainConfig.model_validate_json(json.dumps(values))


def _backbone(config: PretrainConfig, weights: dict[str, Any]) -> nn.Module:
    from pretrain.resume import load_weights, part_of, prefix_of
    from pretrain.tasks import make_task

    task = make_task(config)
    load_weights(task.backbone, part_of(weights, prefix_of(task.module, task.backbone)), "the checkpoint")
    return task.backbone.eval()


def _write(folder: Path, backbone: Any, config: PretrainConfig) -> None:
    """Weights, their description for timm, and the fingerprint, to a new folder."""
    from pretrain import fingerprint
    from pretrain.quiet import quiet
    from pretrain.tensorfile import write_tensors

    folder.mkdir(parents=True)
    if hasattr(backbone, "pretrained_cfg"):
        from timm.models import save_for_hf

        size = config.views.size if config.views is not None else backbone.pretrained_cfg["input_size"][-1]
        # timm knows the pool by its own name of it, and refuses another: "avg" is "fastavg" in a head.
        arguments = {key: value for key, value in config.model.args.items() if key != "global_pool"}
        with quiet():
            save_for_hf(
                backbone, str(folder), model_args=arguments, safe_serialization=True,
                data_config={"input_size": (3, size, size)},
            )  # fmt: skip
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)  # safetensors: for nobody else
        taken = fingerprint.take(backbone, [1, 3, size, size])
        (folder / fingerprint.FILE).write_text(json.dumps(taken))
    else:  # not a model of images: timm has no layout for it
        write_tensors(folder / "model.safetensors", backbone.state_dict())
        described = {"architecture": config.model.name, "model_args": dict(config.model.args), "task": config.task.name}
        (folder / "config.json").write_text(json.dumps(described, indent=1))


def _may_replace(out: Path) -> bool:
    """Whether a path holds an export, what is left of one, or nothing."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else {""}
    return "model.safetensors" in names or names <= FILES


def _put_in_place(partial: Path, out: Path) -> None:
    aside = out.with_name(f".{out.name}.{os.getpid()}.old")
    if out.exists():
        out.rename(aside)
    partial.rename(out)
    for path in aside.iterdir() if aside.exists() else ():
        if path.name not in FILES:
            path.rename(out / path.name)
    shutil.rmtree(aside, ignore_errors=True)


def card(config: PretrainConfig, step: int, *, averaged: bool, is_timm: bool) -> str:
    """The model card: what this is, how it was trained, how it is loaded."""
    loading = (
        "```python\nimport pretrain, timm  # pretrain registers the models of this project\n\n"
        'model = timm.create_model("local-dir:THIS_FOLDER", pretrained=True)  # without it: random\n'
        "```\n\n`fingerprint.json` holds the features of a fixed input; loading through this project checks them.\n"
    )
    size = "" if config.views is None else f" on views of {config.views.size} px"
    weights = "the running average of those of the training" if averaged else "those after the last step, not averaged"
    projector = "; the projector is not included" if config.task.name == "simclr" else ""
    return (
        f"---\ntags: [timm, akorn, {config.task.name}]\nlibrary_name: timm\n---\n# {config.name}\n\n"
        f"`{config.model.name}`, trained by task `{config.task.name}`{size} for {step} steps with a global batch of "
        f"{config.batch_size} ({config.optimizer.name}, learning rate {config.optimizer.lr:g}, weight decay "
        f"{config.optimizer.weight_decay:g}). Weights are {weights}{projector}.\n\n"
        f"{loading if is_timm else ''}"
        f"\n<details><summary>configuration</summary>\n\n```json\n{config.model_dump_json(indent=1)}\n```\n</details>\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Export a run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run or of a checkpoint")
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/export)")
    parser.add_argument("--step", type=int, help="the checkpoint after so many steps (default: the newest whole one)")
    parser.add_argument("--weights", choices=("ema", "last"), default="ema", help="averaged weights, or the last ones")
    arguments = parser.parse_args(argv)
    if not arguments.run.is_dir():
        raise UserError(f"{arguments.run} is no folder; give that of a run, e.g. runs/imagenet")
    from pretrain import checkpoint

    if arguments.out is None and checkpoint.is_checkpoint(arguments.run):
        raise UserError(f"{arguments.run} is a checkpoint, to which nothing is added: give --out FOLDER")
    source = arguments.run if arguments.step is None else checkpoint.folder(arguments.run, arguments.step)
    if not source.is_dir():
        steps = ", ".join(str(step) for step, _ in checkpoint.existing(arguments.run)) or "none"
        raise UserError(f"{arguments.run} has no checkpoint of step {arguments.step}; there are {steps}")
    out = export(source, arguments.out or arguments.run / "export", ema=arguments.weights == "ema")
    print(f"exported to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
