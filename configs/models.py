"""Model names and arguments that a configuration may use, known without importing torch.

Owns: the names this project registers with timm, and the arguments they take. Both are held equal to the code of the
models by a test, so that a typing error in a YAML fails at the prompt and not in a queue. Any other name is taken for
one of timm's own models; of it a launch asks timm (cluster/foreign.py), through the context of the validation.
"""

from __future__ import annotations

from pydantic import Field, ValidationInfo, model_validator

from configs.section import Section

AKORN_MODELS: tuple[str, ...] = (
    "akorn_tiny_patch16_256",
    "akorn_small_patch16_256",
    "akorn_base_patch16_256",
    "akorn_large_patch16_256",
    "akorn_small_patch8_256",
    "akorn_base_patch8_256",
    "akorn_clevrtex_l1_patch8_128",
    "akorn_clevrtex_l2_patch8_128",
    "akorn_clevrtex_large_patch8_128",
    "akorn_nano_patch4_32",
    "akorn_nano_patch4_64",
    "akorn_nano_l2_patch4_32",
)
AKORN_CONV_MODELS: tuple[str, ...] = (
    "akorn_conv_nano_patch4_32",
    "akorn_conv_nano_patch4_64",
    "akorn_conv_clevrtex_l1_patch8_128",
)
ITRSA_MODELS: tuple[str, ...] = tuple(name.replace("akorn", "itrsa", 1) for name in AKORN_MODELS)
CLASSIFIER_MODELS: tuple[str, ...] = ("akorn_classifier_32", "akorn_classifier_mixed_32")
OWN_MODELS: tuple[str, ...] = AKORN_MODELS + AKORN_CONV_MODELS + ITRSA_MODELS + CLASSIFIER_MODELS

# Sudoku solvers are no image models: timm does not know them (pretrain/tasks/sudoku.py builds them).
SUDOKU_MODELS: tuple[str, ...] = ("sudoku_akorn", "sudoku_itrsa", "sudoku_transformer")

# What `model.args` may hold for a name of ours, by the beginning of the name; the first that matches holds.
OWN_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "akorn_classifier": (
        "img_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "n", "num_steps", "gamma",
        "learn_gamma", "coupling", "kernel_size", "num_heads", "readout_n", "readout_kernel", "batch_norm",
        "c_norm", "omega", "omega_init", "projection", "norm", "self_drift", "drop_rate", "start_seed",
    ),
    "akorn": (
        "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads", "n",
        "num_steps", "gamma", "learn_gamma", "coupling", "kernel_size", "positions", "c_norm", "omega",
        "omega_init", "learn_omega", "projection", "norm", "carry", "self_drift", "drop_rate", "rescale_input",
        "start_seed",
    ),
    "itrsa": (
        "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads",
        "mlp_ratio", "num_steps", "positions", "norm_layer", "drop_rate", "rescale_input",
    ),
    "sudoku": (
        "embed_dim", "depth", "num_heads", "num_steps", "n", "gamma", "learn_gamma", "omega", "omega_init",
        "self_drift", "mlp_ratio", "norm_layer", "start_seed",
    ),
}  # fmt: skip

Argument = bool | int | float | str | None | list[int] | list[str] | list[float]


class Model(Section):
    """The backbone."""

    name: str = Field(description="a model of this project (docs/models.md) or any name of timm's, e.g. resnet50")
    args: dict[str, Argument] = Field(
        default_factory=dict, description="further arguments of timm.create_model, e.g. {num_steps: 16, n: 2}"
    )

    @model_validator(mode="after")
    def _check_name(self, info: ValidationInfo) -> Model:
        own = self.name.split(".")[0]
        if own.startswith(("akorn", "itrsa")) and own not in OWN_MODELS:
            raise ValueError(f"no model named {self.name!r}" + nearest(own, OWN_MODELS))
        if own.startswith("sudoku") and own not in SUDOKU_MODELS:
            raise ValueError(f"no model named {self.name!r}" + nearest(own, SUDOKU_MODELS))
        known = next((names for family, names in OWN_ARGUMENTS.items() if own.startswith(family)), None)
        for key in self.args if known else ():
            if known and key not in known:
                raise ValueError(f"{self.name} takes no argument {key!r}" + nearest(key, known))
        if known is None and info.context is not None:
            info.context(self.name, self.args)
        return self


def nearest(word: str, choices: tuple[str, ...] | list[str]) -> str:
    """`; did you mean 'x'?` for the choice nearest to `word`, or all choices if none is near and they are few."""
    import difflib

    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(choices))}" if 0 < len(choices) <= 30 else ""
