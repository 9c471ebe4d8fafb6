"""The configuration loader: strict YAML, overrides, and errors that say where and what to do."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import configs
from configs import UserError, dump, load
from configs.loader import CONFIG_DIR, find

ROOT = Path(configs.__file__).resolve().parents[1]

MINIMAL = """\
name: small
batch_size: 128
steps: 10
model:
  name: akorn_nano_patch4_32
data:
  shards: data/train
views:
  size: 32
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(MINIMAL)
    return path


def test_overrides_of_any_depth(small: Path) -> None:
    config = load(small, ["optimizer.lr=1e-3", "views.jitter=[0.1, 0.2, 0.3, 0]", "cluster.env.A=b", "init_from=null"])
    assert config.optimizer.lr == 0.001
    assert config.views.jitter == (0.1, 0.2, 0.3, 0.0)
    assert config.cluster.env == {"A": "b"}
    assert config.init_from is None


def test_dump_loads_back_to_the_same(small: Path, tmp_path: Path) -> None:
    config = load(small, ["downstream=[{job: object_discovery, data: d}]", "model.args={num_steps: 4}"])
    again = tmp_path / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config


def test_frozen(small: Path) -> None:
    config = load(small)
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3


def test_an_override_of_a_list_is_named_for_its_items() -> None:
    with pytest.raises(UserError, match=r"^override 'T=\[0\]': T\.0: input should be greater than 0"):
        load("solve_sudoku", ["T=[0]"])  # the file has a list of its own


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lrr=1", "did you mean 'lr'"),
        ("stepss=4", "did you mean 'steps'"),
        ("downstream=[{job: object_discovery, dat: x}]", "did you mean 'data'"),
        ("optimizer.lr=fast", 'valid number, not "fast"'),
        ("optimizer.lr=-1", "greater than 0"),
        ("batch_size=1.5", "valid integer, not 1.5"),
        ("batch_size=on", 'not "on"'),
        ("data.shards=", "data.shards: input should be a valid string or a valid array, not null"),
        ("model.args.n={a: 1}", "model.args.n: input should be a valid boolean or a valid integer or a valid number"),
        ("task={name: sudoku, sudoku: 1}", "task.sudoku: unknown key"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: is required and not given"),
        ("downstream=[{job: linear_probe, epochs: x}]", "downstream.0.epochs: input should be a valid integer"),
        ("task=classify", 'an object, not "classify"'),
        ("job=[pretrain]", "is no job"),
        ("name={{name}}", "a list or mapping stands where a key is expected"),
        ("downstream.0.data=x", "is a list of 0, which has no positions"),
        ("task.name=simclear", "none of 'simclr', 'classify', 'sudoku'"),
        ("model.name=akorn_nano_patch4_23", "did you mean 'akorn_nano_patch4_32'"),
        ("epochs=3", "one of the two"),
        ("views.scale=[0.5, 0.1]", "rising"),
        ("observers.knn_every=5", "needs observers.knn_train and observers.knn_test"),
        ("observers.objects_preset=tetromino", "did you mean 'tetrominoes'"),
        ("batch_size=1", "at least 2"),
        ("name=../outside", "pattern"),
        ("seed", "expected key=value"),
        ("seed.x=1", "no keys"),
    ],
)
def test_errors_name_place_and_remedy(small: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load(small, ["seed=3", "downstream=[]", override])
    assert expected in str(caught.value)
    assert override in str(caught.value) or str(small) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("seed: 1\nseed: 2\n", "small.yaml:11: the key 'seed' stands twice"),
        ("optimizer:\n  learning_rate: 1\n", "small.yaml:11: optimizer.learning_rate: unknown key"),
        ("optimizer: {lr: [}\n", "small.yaml:10: not valid YAML"),
        ("init_from: &a [*a]\n", "small.yaml: is nested too deeply, or holds itself"),
        ("seed: 2020-01-01\n", "small.yaml:10: seed: input should be a valid integer"),
        ("1: 2\n", "small.yaml:10: 1: unknown key"),
    ],
)
def test_errors_name_file_and_line(small: Path, line: str, expected: str) -> None:
    small.write_text(MINIMAL + line)
    with pytest.raises(UserError) as caught:
        load(small)
    assert expected in str(caught.value)


def test_bare_names_and_the_nearest_file() -> None:
    assert find("pretrain") == find("pretrain.yaml") == CONFIG_DIR / "pretrain.yaml"
    with pytest.raises(UserError, match=r"did you mean 'pretrain\.yaml'"):
        find("pretrian.yaml")


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_valid_and_say_how_to_run_them(path: Path) -> None:
    config = load(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(re.search(rf"python cluster/launch\.py {path.stem}\b", line) for line in header)
    if config.job == "pretrain":
        assert any("measured" in line for line in header)


def test_loading_imports_no_torch_and_is_quick(small: Path) -> None:
    code = "import sys, configs; configs.load(sys.argv[1]); sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, str(small)], cwd=ROOT, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert after.ru_utime - before.ru_utime < 1.5  # processor time: 0.3 s when nothing else runs
