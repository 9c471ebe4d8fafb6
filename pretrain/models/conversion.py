"""Published networks as ours: which of our models a set of published arguments means, and its weights.

`converters` maps a kind to a function (source, arguments) -> (model, its state, the projector's state or None). The
arguments are complete and have their published names; see reference.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.models.akorn import AKOrN
from pretrain.models.classifier import KuramotoClassifier
from pretrain.models.itrsa import ItrSA
from pretrain.models.published import Source, State, affine, attention, kuramoto_layer, planes, projector_of, readout
from pretrain.models.sudoku import SudokuNet

Arguments = dict[str, Any]


def _omega(arguments: Arguments) -> Arguments:
    """Our arguments about Omega; without it the published code adds x itself."""
    if not arguments["use_omega"]:
        return {"omega": "none", "self_drift": True}
    return {"omega": "global" if arguments["global_omg"] else "pair", "omega_init": arguments["init_omg"]}


def _kernels(kernels: Any) -> Any:
    """One kernel size for all layers or one each; attention's, which none has, as 1."""
    return [kernel or 1 for kernel in kernels] if isinstance(kernels, list | tuple) else kernels


Converted = tuple[nn.Module, State, State | None]


def _akorn(source: Source, arguments: Arguments) -> Converted:
    n, ch, heads = arguments["n"], arguments["ch"], arguments["heads"]
    gamma = source.take("gamma")
    model = AKOrN(
        img_size=arguments["imsize"], patch_size=arguments["psize"], num_classes=0, embed_dim=ch,
        depth=arguments["L"], num_heads=heads, n=n, num_steps=arguments["T"], coupling=arguments["J"],
        kernel_size=_kernels(arguments.get("ksize", 1)), positions="gta" if arguments["gta"] else "abs",
        c_norm=arguments["c_norm"], projection=arguments["project"], rescale_input=arguments["autorescale"],
        carry="linear" if arguments["use_ro_x"] else "identity", learn_omega=arguments["learn_omg"],
        global_pool="max" if arguments["maxpool"] else "avg", **_omega(arguments),
        gamma=float(gamma) if gamma.numel() == 1 else arguments["gamma"],
    )  # fmt: skip
    channels = planes(n, ch)
    state = affine(source, "patchfy.1.", "patch_embed.proj.", rows=channels, columns=None, linear=False)
    if not arguments["gta"]:
        for part in "cx":
            state[f"pos_{part}"] = source.take(f"pemb_{part}").flatten(1).t()[:, channels]
    for i in range(arguments["L"]):
        old, new = f"layers.{i}.", f"blocks.{i}."
        state |= kuramoto_layer(source, f"{old}0.", f"{new}kuramoto.", n=n, num_heads=heads, channels=channels)
        state |= readout(source, f"{old}1.", f"{new}readout.", n=n, channels=channels, linear=True)
        if arguments["use_ro_x"] and i < arguments["L"] - 1:
            state |= affine(source, f"{old}2.", f"{new}carry.", rows=channels, columns=channels, linear=True)
    return model, state, projector_of(source, channels)


def _itrsa(source: Source, arguments: Arguments) -> Converted:
    ch, heads = arguments["ch"], arguments["heads"]
    model = ItrSA(
        img_size=arguments["imsize"], patch_size=arguments["psize"], num_classes=0, embed_dim=ch,
        depth=arguments["blocks"], num_heads=heads, mlp_ratio=arguments["mlp_dim"] / ch, num_steps=arguments["T"],
        positions="gta" if arguments["gta"] else "abs", global_pool="max",
    )  # fmt: skip
    channels = torch.arange(ch)
    state = affine(source, "patchfy.1.", "patch_embed.proj.", rows=None, columns=None, linear=False)
    if not arguments["gta"]:
        state["pos_embed"] = source.take("pos_embed").flatten(1).t()
    norms = {"out.0.": "norm."}
    for i in range(arguments["blocks"]):
        old, new = f"transformer_encoder.{i}.", f"blocks.{i}."
        state |= attention(source, f"{old}attn.", f"{new}attn.", num_heads=heads, channels=channels)
        for layer in ("mlp.0.", "mlp.2."):
            state |= affine(source, old + layer, new + layer, rows=None, columns=None, linear=True)
        norms |= {f"{old}layernorm{k}.": f"{new}norm{k}." for k in (1, 2)}
    for theirs, ours in norms.items():
        state[f"{ours}weight"] = source.take(f"{theirs}gamma").flatten()
        state[f"{ours}bias"] = source.take(f"{theirs}beta").flatten()
    return model, state, projector_of(source, channels)


def _sudoku(source: Source, arguments: Arguments) -> Converted:
    n, ch, heads = arguments["n"], arguments["ch"], arguments["heads"]
    model = SudokuNet(
        "akorn", embed_dim=ch, depth=arguments["L"], num_heads=heads, num_steps=arguments["T"], n=n, **_omega(arguments)
    )
    source.skip("x0")  # in every published state dict, used by nothing
    channels = planes(n, ch)
    state = {"gamma": source.take("gamma"), "embedding.weight": source.matrix("embedding.weight")[:, channels]}
    refinement = (("1.fn.fn.0.fn.2.", "hidden."), ("1.fn.fn.1.fn.2.", "residual."), ("2.fn.2.", "last."))
    for i in range(arguments["L"]):
        old, new = f"layers.{i}.", f"blocks.{i}."
        state |= kuramoto_layer(source, f"{old}0.", f"{new}kuramoto.", n=n, num_heads=heads, channels=channels)
        state |= readout(source, f"{old}1.0.", f"{new}readout.", n=n, channels=channels, linear=True)
        for theirs, ours in refinement:
            state |= affine(
                source, f"{old}1.{theirs}", f"{new}refinement.{ours}", rows=channels, columns=channels, linear=True
            )
    return model, state | affine(source, "out.1.", "head.", rows=None, columns=channels, linear=True), None


def _classifier(source: Source, arguments: Arguments) -> Converted:
    n, ch, depth = arguments["n"], arguments["ch"], arguments["L"]
    batch_norm = arguments["norm"] == "bn"
    model = KuramotoClassifier(
        num_classes=arguments["out_classes"], embed_dim=ch, depth=depth, n=n, num_steps=arguments["T"],
        coupling=arguments["J"], kernel_size=_kernels(arguments.get("ksizes", 1)), num_heads=arguments["heads"],
        readout_n=arguments["ro_N"], readout_kernel=arguments["ro_ksize"], batch_norm=batch_norm,
        c_norm=arguments["c_norm"], **_omega(arguments),
    )  # fmt: skip
    state = {"gamma": source.take("gamma")}
    before = planes(n, ch)
    state |= affine(source, "conv0.", "stem.", rows=before, columns=None, linear=False)
    parts = (("1.fn.fn.0.", "hidden."), ("1.fn.fn.1.", "residual."), ("2.", "last."))
    for i in range(depth):
        channels = planes(n, ch * 2**i)
        old, new = f"layers.{i}.", f"blocks.{i}."
        if i:  # one convolution under two names
            state |= affine(source, f"{old}0.0.", f"{new}down.", rows=channels, columns=before, linear=False)
            _same_twice(source, f"{old}0.")
        state |= kuramoto_layer(
            source, f"{old}2.", f"{new}kuramoto.", n=n, num_heads=arguments["heads"], channels=channels
        )
        state |= readout(source, f"{old}3.0.", f"{new}readout.norms.", n=arguments["ro_N"], channels=channels,
                         linear=False)  # fmt: skip
        for theirs, ours in parts:
            conv = f"{old}3.{theirs}fn.2.", f"{new}readout.{ours}conv."
            state |= affine(source, *conv, rows=channels, columns=channels, linear=False)
            if batch_norm:
                state |= _batch_norm(source, f"{old}3.{theirs}fn.0.", f"{new}readout.{ours}norm.", channels)
        before = channels
    return model, state | affine(source, "out.", "head.fc.", rows=None, columns=before, linear=True), None


def _same_twice(source: Source, prefix: str) -> None:
    """The transition's one convolution stands twice in the state dict: both must be equal."""
    for name in ("weight", "bias"):
        first, second = source.take(f"{prefix}0.{name}"), source.take(f"{prefix}1.{name}")
        if not source.missing and not torch.equal(first, second):
            raise ValueError(
                f"{prefix}0.{name} and {prefix}1.{name} differ, but the classifier shares this convolution"
            )


def _batch_norm(source: Source, old: str, new: str, channels: Tensor) -> State:
    """Statistics and affine map of a BatchNorm."""
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {name: source.take(old + name) for name in names}
    if source.missing:
        return {}
    state = {new + name: value[channels] for name, value in tensors.items()}
    count = f"{old}num_batches_tracked"
    source.skip(count)
    return state | {f"{new}num_batches_tracked": source.state.get(count, torch.tensor(0))}


converters: dict[str, Callable[[Source, Arguments], Converted]] = {
    "akorn": _akorn,
    "itrsa": _itrsa,
    "sudoku_akorn": _sudoku,
    "classifier_akorn": _classifier,
}
