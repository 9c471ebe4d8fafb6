"""Flags of the entry points: made from the schema, checked by it, equal to the YAML."""

from __future__ import annotations

import pytest

from configs import LinearProbeConfig, ObjectDiscoveryConfig, UserError, load
from configs.flags import parse


def objects(*argv: str) -> ObjectDiscoveryConfig:
    return parse(ObjectDiscoveryConfig, argv, description="", config="object_discovery", spill=("ckpt", "also"))


def test_flags_say_the_same_as_overrides() -> None:
    ours = objects("--ckpt", "runs/a", "--k", "7", "--distance", "0.5", "--sweep", "2", "3", "--args", "T=16", "n=2")
    expected = load("object_discovery", ["ckpt=runs/a", "k=7", "distance=0.5", "sweep=[2,3]", "args.T=16", "args.n=2"])
    assert ours == expected


def test_text_stays_text_and_lists_stay_lists() -> None:
    assert objects("--ckpt", "123").ckpt == "123"
    several = objects("--ckpt", "a", "b", "c")
    assert (several.ckpt, several.also) == ("a", ("b", "c"))
    assert objects("--baselines").baselines == ()
    assert objects("--controls", "random", "uncoupled").controls == ("random", "uncoupled")
    assert objects("--components", "none").components is None
    probe = parse(
        LinearProbeConfig, ["--keep-features", "--rates", "1e-3", "0.1"], description="", config="linear_probe"
    )
    assert probe.keep_features
    assert probe.rates == (0.001, 0.1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--k", "many"), '--k many: k: .*not "many"'),
        (("--preset", "tetromino"), "--preset tetromino: preset: no protocol 'tetromino'; did you mean 'tetrominoes'"),
        (("--controls", "none"), r"--controls none: controls\.0: input should be 'random'"),
        (("k=many",), "override 'k=many': k: "),
        (("--method", "linkag"), "linkag"),
        (("--config", "linear_probe"), "describes the job 'linear_probe'"),
        (("--config", "pretrain", "--ckpt", "a"), "pretrain describes the job 'pretrain', this is object_discovery"),
        (("pset=voc",), "preset"),
        (("--args", "T"), "--args T: expected key=value"),
    ],
)
def test_errors_name_key_and_remedy(argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        objects(*argv)


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        objects("--help")
    text = capsys.readouterr().out
    for name in ObjectDiscoveryConfig.model_fields:
        assert name in ("job", "cluster", "runs_dir") or "--" + name.replace("_", "-") in text
