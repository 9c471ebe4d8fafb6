"""Models that are not of this project, asked of timm before a launch and not by the job after its time in the queue.

Owns: the question, which a process of its own answers, since the launcher imports no torch: a few seconds for timm's
models, nothing for ours, which the schema knows.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import functools
import inspect
import json
import re
import subprocess
from typing import Any

from configs.models import OWN_MODELS, SUDOKU_MODELS, nearest


def check(name: str, arguments: dict[str, Any]) -> None:
    """Raise a `ValueError` where timm has no such model, or the model does not take the arguments.

    What cannot be asked here (a model of a hub or a folder; no timm on this machine) is left to the job.
    """
    found = "" if ":" in name else _answer(name, json.dumps(arguments))["complaint"]
    if found:
        raise ValueError(found)


def has_batch_norm(name: str, arguments: dict[str, Any]) -> bool:
    """Whether a model has BatchNorm; False where that cannot be asked here."""
    own = name.split(".")[0]
    if own in (*OWN_MODELS, *SUDOKU_MODELS):
        return own.startswith("akorn_classifier") and bool(arguments.get("batch_norm", True))
    return ":" not in name and bool(_answer(name, json.dumps(arguments))["batch_norm"])


@functools.cache  # runs of a sweep ask the same
def _answer(name: str, arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, name, arguments], capture_output=True, text=True)
    if done.returncode:
        return {"complaint": "", "batch_norm": False}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def complaint(name: str, arguments: dict[str, Any]) -> str:
    """What is wrong with a model of timm's; empty if nothing is. Built without memory for its weights."""
    import timm
    import torch

    if not timm.is_model(name):
        return f"no model named {name!r}" + nearest(name.split(".")[0], timm.list_models())
    with torch.device("meta"):
        try:
            timm.create_model(name, **arguments)
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if unknown is None:
                # A model that needs numbers while it is built is none that can be judged here.
                return "" if "meta" in str(error) else f"{name} with args {arguments}: {error}"
            known = list(inspect.signature(type(timm.create_model(name))).parameters)
            return f"{name} takes no argument {unknown[1]!r}" + nearest(unknown[1], known)
    return ""


def normalises_batches(name: str, arguments: dict[str, Any]) -> bool:
    """Whether timm's model has BatchNorm; False where it is not one that can be built without memory."""
    import timm
    import torch

    try:
        with torch.device("meta"):
            model = timm.create_model(name, **arguments)
    except Exception:  # whatever is wrong with it is `complaint`'s to say
        return False
    return any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())


def main(name: str, arguments: dict[str, Any]) -> None:
    """The answers, as JSON on standard output."""
    print(json.dumps({"complaint": complaint(name, arguments), "batch_norm": normalises_batches(name, arguments)}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
