"""Models that the schema does not know whole, asked of timm before a launch and not by the job after its time in the
queue: models that are not of this project, and values of arguments of those that are.

Owns: the question, which a process of its own answers, since the launcher imports no torch: a few seconds, and nothing
for models of ours without arguments.
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

from configs.models import nearest


def check(name: str, arguments: dict[str, Any]) -> None:
    """Raise a `ValueError` where timm has no such model, or the model does not take the arguments.

    What cannot be asked here (a model of a hub or a folder; no timm on this machine) is left to the job.
    """
    found = "" if ":" in name else _answer(name, json.dumps(arguments))
    if found:
        raise ValueError(found)


@functools.cache  # runs of a sweep ask the same
def _answer(name: str, arguments: str) -> str:
    done = subprocess.run([sys.executable, __file__, name, arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def complaint(name: str, arguments: dict[str, Any]) -> str:
    """What is wrong with a model; empty if nothing is. Built without memory for its weights."""
    import timm
    import torch

    import pretrain  # noqa: F401  (registers the models of this project)

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


if __name__ == "__main__":
    print(complaint(sys.argv[1], json.loads(sys.argv[2])))
