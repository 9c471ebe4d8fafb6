"""ImageNet: as downloaded and as unpacked, on small archives in the original format."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
from source_inputs import request, samples_of
from test_make_shards import photo
from test_tar import archive

from configs import LinearProbeConfig, PretrainConfig, load
from configs.errors import UserError
from configs.loader import CONFIG_DIR
from pretrain import make_shards
from pretrain.data.sources import imagenet
from pretrain.data.sources.picture import encode_jpeg


def synset_images() -> dict[str, dict[str, bytes]]:
    return {
        synset: {f"{synset}_{number}.JPEG": encode_jpeg(photo(7 * at + number)) for number in range(2)}
        for at, synset in enumerate(("n01440764", "n01443537", "n02119789"))
    }


def development_kit(path: Path, truth: list[int]) -> None:
    """meta.mat as in the real kit: leaves 1 to 3 out of the order of their names, and an inner node."""
    from scipy.io import savemat

    rows = [
        (1, "n02119789", "fox", "", 0),
        (2, "n01440764", "tench", "", 0),
        (3, "n01443537", "fish", "", 0),
        (1001, "n00001740", "entity", "", 3),
    ]
    kinds = [
        ("ILSVRC2012_ID", object),
        ("WNID", object),
        ("words", object),
        ("gloss", object),
        ("num_children", object),
    ]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    files = [
        ("ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue()),
        (
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
            "".join(f"{t}\n" for t in truth).encode(),
        ),
    ]
    import gzip

    path.write_bytes(gzip.compress(archive(files)))


def test_imagenet_as_downloaded(tmp_path: Path) -> None:
    images = synset_images()
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(
        archive([(f"{synset}.tar", archive(list(files.items()))) for synset, files in images.items()])
    )
    val = [(f"ILSVRC2012_val_{number:08d}.JPEG", encode_jpeg(photo(90 + number))) for number in range(1, 5)]
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(archive(val))
    with pytest.raises(UserError, match=r"put ILSVRC2012_devkit_t12\.tar\.gz"):
        imagenet.open_source("imagenet", request(tmp_path, tmp_path))
    development_kit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", [1, 3, 2, 1])
    sources = imagenet.open_source("imagenet", request(tmp_path, tmp_path))
    train, held_out = samples_of(sources["train"]), samples_of(sources["val"])
    assert [sample.parts["cls"] for sample in train] == [b"0", b"0", b"1", b"1", b"2", b"2"]
    assert train[3].parts["jpg"] == images["n01443537"]["n01443537_1.JPEG"]
    assert [sample.parts["cls"] for sample in held_out] == [b"2", b"1", b"0", b"2"]
    assert held_out[2].parts["jpg"] == val[2][1]


@pytest.mark.parametrize("kaggle", [True, False])
def test_imagenet_unpacked(tmp_path: Path, kaggle: bool) -> None:
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC" if kaggle else tmp_path
    for synset, files in synset_images().items():
        (root / "train" / synset).mkdir(parents=True)
        (root / "val" / ("" if kaggle else synset)).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (root / "train" / synset / name).write_bytes(content)
    if kaggle:
        (root / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(encode_jpeg(photo(1)))
        (tmp_path / "LOC_val_solution.csv").write_text(
            "ImageId,PredictionString\nILSVRC2012_val_00000001,n01443537 1 2 3 4 \n"
        )
    else:
        (root / "val" / "n01443537" / "ILSVRC2012_val_00000001.JPEG").write_bytes(encode_jpeg(photo(1)))
    sources = imagenet.open_source("imagenet", request(tmp_path, tmp_path))
    assert [sample.parts["cls"] for sample in samples_of(sources["train"])] == [b"0", b"0", b"1", b"1", b"2", b"2"]
    assert [sources["val"].classes[int(sample.parts["cls"])] for sample in samples_of(sources["val"])] == ["n01443537"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no ImageNet in"):
        imagenet.open_source("imagenet", request(tmp_path / "none", tmp_path))


def test_the_flagships_own_command_makes_the_shards_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        for synset, files in synset_images().items():
            (tmp_path / "imagenet" / split / synset).mkdir(parents=True)
            for name, content in files.items():
                (tmp_path / "imagenet" / split / synset / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    command = re.search(r"make_shards\.py (imagenet .*)", (CONFIG_DIR / "pretrain.yaml").read_text())
    assert command is not None
    make_shards.main([*command[1].replace("/datasets/imagenet", "imagenet").split(), "--workers", "1"])
    config = load("pretrain.yaml")
    assert isinstance(config, PretrainConfig)
    probe = next(job for job in config.downstream if isinstance(job, LinearProbeConfig))
    for place in (config.data.shards, probe.train, probe.data):
        assert list(Path(str(place)).glob("*.tar")), f"the command writes nothing to {place}"
