"""Published checkpoints into our models: `load_published(path, {"T": 8, ...})`.

Takes state dicts of github.com/autonomousvision/akorn under the published names, bare, inside a training checkpoint, or
inside a file of ema_pytorch (whose average is taken). Architecture arguments have the published names too; all that the
tensors' shapes tell is inferred and checked against what is given, so that T (and the heads, without GTA) is all a file
needs. Nothing is unpickled: files are read with `weights_only=True`, or as safetensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.conversion import Arguments, converters
from pretrain.models.published import Source, State

# Published defaults of what shapes do not tell.
DEFAULTS: dict[str, Arguments] = {
    "akorn": {"T": 8, "heads": 8, "maxpool": True, "project": True, "autorescale": True, "gamma": 1.0,
              "init_omg": 0.01, "learn_omg": False, "imsize": 128},
    "itrsa": {"T": 8, "heads": 8, "imsize": 128},
    "sudoku_akorn": {"T": 16, "heads": 8, "init_omg": 0.5, "learn_omg": True, "gamma": 1.0},
    "classifier_akorn": {"n": 2, "T": 3, "heads": 8, "init_omg": 1.0, "norm": "bn", "gamma": 1.0},
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published network in our form.

    Attributes:
        kind: "akorn", "itrsa", "sudoku_akorn" or "classifier_akorn".
        model: ours, in evaluation mode; backbones without their projector.
        projector: SimCLR's MLP on the pooled features, of "akorn" and "itrsa".
        arguments: all architecture arguments, under their published names.
    """

    kind: str
    model: nn.Module
    projector: nn.Sequential | None
    arguments: Arguments


def load_published(path: str | Path, arguments: Arguments | None = None) -> Published:
    """Read a checkpoint of the published code (.pth, .pt or .safetensors). Raises ValueError when it does not fit."""
    return convert(read_state(path), arguments or {})


def read_state(path: str | Path) -> State:
    """The state dict inside a checkpoint file: the averaged weights where the file has them.

    Raises:
        ValueError: it is no file of weights.
    """
    path = Path(path)
    try:
        content: Any = _content(path)
    except OSError:
        raise
    except Exception as error:  # what a file that holds something else makes the readers raise is anything
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise ValueError(f"{path} cannot be read as weights ({said})") from error
    for name in ("model_state_dict", "state_dict", "model", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds no state dict: give a model or EMA file of the published code")
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    for prefix in ("ema_model.", "module."):
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def kind_of(state: Mapping[str, Tensor]) -> str:
    """Which of the published networks a state dict belongs to."""
    if any(key.startswith("transformer_encoder.") for key in state):
        return "itrsa"
    for key, kind in (("embedding.weight", "sudoku_akorn"), ("conv0.weight", "classifier_akorn"),
                      ("patchfy.1.weight", "akorn")):  # fmt: skip
        if key in state:
            return kind
    raise ValueError(
        "not a state dict of a published AKOrN or ItrSA: it has neither patchfy.1.weight, embedding.weight nor "
        f"conv0.weight, but {', '.join(sorted(state)[:4]) or 'nothing'}"
    )


def convert(state: Mapping[str, Tensor], arguments: Arguments, *, kind: str | None = None) -> Published:
    """A published state dict as our model.

    arguments: architecture arguments under their published names; those that shapes tell may be left out.
    Raises ValueError naming arguments that contradict the tensors, and tensors that are missing or unknown.
    """
    kind = kind_of(state) if kind is None else kind
    told = _inferred(kind, state)
    wrong = [f"{name}={arguments[name]!r} (the tensors say {value!r})"
             for name, value in told.items() if name in arguments and not _same(arguments[name], value)]  # fmt: skip
    if wrong:
        raise ValueError(f"architecture arguments contradict the state dict: {', '.join(wrong)}")
    unknown = set(arguments) - set(told) - set(DEFAULTS[kind]) - {"J", "ksize", "no_ro"}
    if unknown:
        known = sorted({*told, *DEFAULTS[kind]})
        raise ValueError(f"unknown architecture arguments {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if arguments.get("no_ro"):
        raise ValueError("no_ro=True (the published ablation without readout) is not supported")
    full = {**DEFAULTS[kind], **arguments, **told}
    source = Source(state)
    try:
        model, ours, projector = converters[kind](source, full)
    except IndexError:  # what is missing cannot be permuted
        source.check()
        raise
    source.check()
    model.load_state_dict(ours)
    head = None
    if projector is not None:
        (width, dim), out = projector["0.weight"].shape, projector["2.weight"].shape[0]
        head = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, out))
        head.load_state_dict(projector)
        head.eval()
    return Published(kind, model.eval(), head, full)


def _same(given: Any, told: Any) -> bool:
    """Equal, where one value may stand for all layers."""
    if isinstance(told, list) and not isinstance(given, list | tuple):
        return all(entry == given for entry in told if entry is not None)
    if isinstance(told, list):
        return len(given) == len(told) and all(b is None or a == b for a, b in zip(given, told, strict=True))
    return bool(given == told)


def _shape(state: Mapping[str, Tensor], name: str) -> torch.Size:
    if name not in state:
        raise ValueError(f"the state dict lacks {name}")
    return state[name].shape


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Length of a module list, by its names."""
    return 1 + max((int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)), default=-1)


def _inferred(kind: str, state: Mapping[str, Tensor]) -> Arguments:
    """What the tensors' shapes tell of the architecture."""
    if kind == "itrsa":
        return _inferred_itrsa(state)
    layer = "layers.0.2." if kind == "classifier_akorn" else "layers.0.0."
    reading = {"akorn": "layers.0.1.", "sudoku_akorn": "layers.0.1.0.", "classifier_akorn": "layers.0.3.0."}[kind]
    norm = f"{layer}c_norm."
    c_norm = "gn" if norm + "weight" in state else "sandb" if norm + "scale" in state else "none"
    rows, ch = _shape(state, f"{reading}invconv.weight")[:2]
    told: Arguments = {"ch": ch, "L": _count(state, "layers."), "use_omega": f"{layer}omg.omg_param" in state}
    told |= _inferred_heads(state)
    if told["use_omega"]:
        told["global_omg"] = _shape(state, f"{layer}omg.omg_param") == (2,)
    if kind == "classifier_akorn":
        told |= {"ro_N": rows // ch, "ro_ksize": _shape(state, f"{reading}invconv.weight")[2], "c_norm": c_norm}
        return told | {"out_classes": _shape(state, "out.weight")[0]} | _inferred_couplings(state, told["L"], ".2.")
    told |= {"n": rows // ch, **_inferred_couplings(state, told["L"], ".0.")}
    if kind == "sudoku_akorn":
        return {key: value for key, value in told.items() if not key.startswith("ksize")}
    told |= {"c_norm": c_norm, "psize": _shape(state, "patchfy.1.weight")[2], "gta": "pemb_c" not in state}
    told["use_ro_x"] = "layers.0.2.weight" in state
    return told | _inferred_size(state, told["psize"])


def _inferred_couplings(state: Mapping[str, Tensor], depth: int, layer: str) -> Arguments:
    """J, and the kernels of convolutions, of every layer."""
    weights = [state.get(f"layers.{i}{layer}connectivity.weight") for i in range(depth)]
    kinds = ["attn" if weight is None else "conv" for weight in weights]
    kernels = [None if weight is None else weight.shape[2] for weight in weights]
    name = "ksizes" if layer == ".2." else "ksize"
    told: Arguments = {"J": kinds}
    if any(kernel is not None for kernel in kernels):
        told[name] = kernels
    return told


def _inferred_heads(state: Mapping[str, Tensor]) -> Arguments:
    """With GTA, the heads: a layer has as many matrices as a head has pairs of channels."""
    for key, value in state.items():
        if key.endswith("mat_q"):
            qkv = _shape(state, key.replace("mat_q", "W_qkv.weight"))
            return {"heads": qkv[1] // (2 * value.shape[1])}
    return {}


def _inferred_size(state: Mapping[str, Tensor], patch: int) -> Arguments:
    """imsize, by the table of positions."""
    for key, value in state.items():
        if key in ("pemb_c", "pos_embed"):
            return {"imsize": value.shape[1] * patch}
    for key, value in state.items():
        if key.endswith("mat_q"):
            return {"imsize": math.isqrt(value.shape[0]) * patch}
    return {}


def _inferred_itrsa(state: Mapping[str, Tensor]) -> Arguments:
    ch, _, psize, _ = _shape(state, "patchfy.1.weight")
    told = {"ch": ch, "psize": psize, "blocks": _count(state, "transformer_encoder."), "gta": "pos_embed" not in state}
    told["mlp_dim"] = _shape(state, "transformer_encoder.0.mlp.0.weight")[0]
    return told | _inferred_heads(state) | _inferred_size(state, psize)
