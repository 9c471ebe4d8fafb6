"""Object discovery end to end on small generated scenes: scores, baselines, controls, resuming, several processes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from configs import ObjectDiscoveryConfig, UserError
from configs.presets import PRESETS, Preset
from downstream import baselines, discovery, object_discovery, pictures, results, score_table
from downstream.backbone import load
from downstream.grouping import Grouping
from downstream.samples import Samples, Scene
from downstream.tiling import shifted_crops
from pretrain.data.shards import ShardWriter

MODEL = "akorn_nano_patch4_32"


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def squares(seed: int, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """An image of two coloured squares on black, and its instances."""
    generator = np.random.default_rng(seed)
    image, mask = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8)
    for label, left in ((1, 2), (2, 18)):
        top = int(generator.integers(2, side - 14))
        image[top : top + 12, left : left + 12] = generator.integers(80, 255, 3)
        mask[top : top + 12, left : left + 12] = label
    return image, mask


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten scenes, the last one without objects."""
    folder = tmp_path_factory.mktemp("scenes")
    with ShardWriter(folder / "scenes-000000.tar") as writer:
        for number in range(10):
            image, mask = squares(number)
            mask = mask * (number < 9)
            writer.write(f"{number:04d}", {"png": png(image), "instances.png": png(mask)})
    return folder


def config(scenes: Path, **values: object) -> ObjectDiscoveryConfig:
    known = {
        "ckpt": MODEL, "data": str(scenes), "preset": "tetrominoes", "k": 3, "starts": 2, "batch_size": 4,
        "pictures": 2, "bootstrap": 50, "device": "cpu",
    }  # fmt: skip
    return ObjectDiscoveryConfig.model_validate_json(json.dumps(known | values))


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--ckpt akorn_...` without a hub: random weights (the names of ours have no pretrained weights)."""
    import downstream.backbone as backbone

    plain = backbone._Source._of_timm
    monkeypatch.setattr(
        backbone._Source, "_of_timm", lambda self, name: self._created(name) if "akorn" in name else plain(self, name)
    )


@pytest.mark.usefixtures("untrained")
def test_a_whole_evaluation(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = object_discovery.run(
        config(scenes, controls=["random", "uncoupled", "no_steps"], sweep=[2]), out_dir=tmp_path
    )
    written = json.loads((tmp_path / "results.json").read_text())
    names = [entry["name"] for entry in written["models"]]
    assert names == [MODEL, f"{MODEL} (random)", f"{MODEL} (uncoupled)", f"{MODEL} (no_steps)"]
    scores = written["models"][0]["scores"]
    assert len(scores["fg_ari"]["images"]) == 10
    assert scores["fg_ari"]["skipped"] == 1
    assert scores["fg_ari"]["images"][9] is None
    assert "k=2/mbo_i" in scores
    assert written["protocol"]["grouping"]["clusters"] == 3
    by_name = {entry["name"]: entry["scores"] for entry in written["baselines"]}
    assert by_name["connected regions of a colour"]["fg_ari"]["mean"] == 1.0
    assert by_name["one segment"]["fg_ari"]["mean"] == 0.0
    assert by_name["ceiling of the token grid"]["fg_ari"]["mean"] > 0.8
    assert (tmp_path / "pictures.png").stat().st_size > 1000
    assert not (tmp_path / ".parts").exists()
    assert done["models"][0]["scores"]["fg_ari"]["mean"] == pytest.approx(scores["fg_ari"]["mean"], abs=1e-6)
    out = capsys.readouterr().out
    assert "1 without objects" in out
    assert "95 %, paired" in out


@pytest.mark.usefixtures("untrained")
def test_processes_share_the_work_and_change_nothing(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"controls": [], "baselines": ["one_segment"], "pictures": 0}
    object_discovery.run(config(scenes, **plain), out_dir=tmp_path / "alone")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert object_discovery.run(config(scenes, **plain), out_dir=tmp_path / "shared") == {}
    left = sorted(path.name for path in (tmp_path / "shared").glob(".parts/*/*.json"))
    assert left == ["block_000001.json", "block_000001.json"]
    monkeypatch.setenv("RANK", "0")
    object_discovery.run(config(scenes, **plain), out_dir=tmp_path / "shared")
    alone, together = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("alone", "shared"))
    assert together["models"] == alone["models"]


def test_finished_blocks_are_not_computed_again(tmp_path: Path) -> None:
    seen: list[int] = []

    def work(block: int) -> int:
        seen.append(block)
        if block == 2 and seen.count(2) == 1:
            raise KeyboardInterrupt
        return block * 10

    with pytest.raises(KeyboardInterrupt):
        results.shared_blocks(tmp_path, 4, work)
    assert results.shared_blocks(tmp_path, 4, work) == [0, 10, 20, 30]
    assert seen == [0, 1, 2, 2, 3]


def test_up_tiling_refines_the_grid_and_starts_differ() -> None:
    encoder = load(MODEL, control="random")
    images = torch.rand(2, 3, 32, 32)
    assert discovery.features(encoder, images, uptile=4, start=0).shape == (2, 128, 32, 32)
    first, other = (discovery.features(encoder, images, uptile=1, start=start) for start in (0, 1))
    assert not torch.equal(first, other)
    torch.testing.assert_close(first[:1], discovery.features(encoder, images[:1], uptile=1, start=0))


def test_energy_chooses_a_start_for_each_image() -> None:
    scores = {"energy": np.array([[1.0, 5.0], [2.0, 4.0]]), "fg_ari": np.array([[0.1, 0.2], [0.3, 0.4]])}
    assert discovery.choose_start(scores)["fg_ari"].tolist() == [[0.1, 0.4]]


@pytest.mark.parametrize("uptile", [1, 2])
def test_energies_are_those_of_the_passes_that_give_the_features(uptile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load(MODEL, control="random")
    images = torch.rand(2, 3, 32, 32)
    plain, seen = encoder.encode, []

    def noted(images: torch.Tensor, *, start_seed: int) -> object:
        seen.append((images, start_seed))
        return plain(images, start_seed=start_seed)

    monkeypatch.setattr(encoder, "encode", noted)
    discovery.features(encoder, images, uptile=uptile, start=3)
    expected = torch.stack([encoder.energy(view, start_seed=seed) for view, seed in seen]).mean(0)
    torch.testing.assert_close(discovery.energies(encoder, images, uptile=uptile, start=3), expected)
    assert len({seed for _, seed in seen}) == uptile**2


def test_up_tiled_crops_reach_the_model_as_published() -> None:
    encoder = load(MODEL, control="random")
    images = (torch.rand(1, 3, 32, 32) > 0.5).float()
    seen = [view for view, _ in discovery._views(encoder, images, 4, 0)]
    torch.testing.assert_close(torch.stack(seen), shifted_crops(images, patch=4, factor=4))
    assert torch.stack(seen).max() > 1.01  # bicubic, not clamped (golden/up_tiling)


@pytest.mark.parametrize(
    ("image", "mask", "preset", "fits"),
    [
        ((32, 32), (32, 32), "tetrominoes", True),
        ((32, 32), (64, 64), "tetrominoes", True),  # enlarged as a whole
        ((32, 32), (64, 40), "tetrominoes", False),
        ((240, 320), (120, 160), "clevr", False),  # the box of one, the centre of the other
        ((240, 320), (120, 160), "voc", True),
    ],
)
def test_masks_are_cut_as_their_images(
    image: tuple[int, int], mask: tuple[int, int], preset: str, fits: bool, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path / "a-000000.tar") as writer:
        writer.write("0", {"png": png(np.zeros((*image, 3), np.uint8)), "instances.png": png(np.ones(mask, np.uint8))})
    samples = Samples(str(tmp_path))
    if fits:
        assert samples.scenes([0], PRESETS[preset]).instances.min() == 1
    else:
        with pytest.raises(UserError, match=f"{mask[1]} x {mask[0]} pixels, its image {image[1]} x {image[0]}"):
            samples.scenes([0], PRESETS[preset])


def test_classes_need_no_instances_and_every_sample_its_masks(tmp_path: Path) -> None:
    image, mask = squares(0)
    parts = {"png": png(image), "classes.png": png(mask)}
    with ShardWriter(tmp_path / "a-000000.tar") as writer:
        writer.write("0", parts)
    scene = Samples(str(tmp_path)).scenes([0], PRESETS["tetrominoes"])
    assert scene.classes is not None
    assert scene.classes[0].tolist() == mask.tolist()
    other = tmp_path / "other"
    other.mkdir()
    with ShardWriter(other / "a-000000.tar") as writer:
        writer.write("0", parts)
        writer.write("1", {"png": png(image)})
    with pytest.raises(UserError, match=r"sample 1 has no classes\.png"):
        Samples(str(other)).scenes([0, 1], PRESETS["tetrominoes"])


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"distance": 1.0, "sweep": [2]}, "distance replaces"),
        ({"distance": 1.0, "method": "kmeans"}, "dendrogram"),
        ({"method": "codebook", "k": 3000}, "needs as many tokens"),
    ],
)
def test_protocols_that_contradict_themselves_are_refused(
    scenes: Path, tmp_path: Path, values: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        object_discovery.run(config(scenes, **values), out_dir=tmp_path)


def test_tables_say_where_the_dendrogram_is_cut() -> None:
    grouping = {"method": "linkage", "clusters": 4, "distance": None}
    assert score_table.cut_of({"grouping": grouping}) == "linkage k=4"
    assert score_table.cut_of({"grouping": grouping | {"distance": 0.7}}) == "linkage distance 0.7"


def test_an_image_that_is_ignored_altogether_can_be_drawn() -> None:
    segments = torch.tensor([[0, 1], [2, 2]])
    assert torch.equal(pictures.matched(segments, torch.full((2, 2), -1)), segments)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("values", [{"method": "codebook"}, {"method": "kmeans"}, {"choose": "energy"}, {"uptile": 2}])
def test_other_protocols_run(scenes: Path, tmp_path: Path, values: dict[str, object]) -> None:
    plain = {"controls": [], "baselines": [], "pictures": 0, "images": 4}
    done = object_discovery.run(config(scenes, **plain, **values), out_dir=tmp_path)
    assert 0 <= done["models"][0]["scores"]["mbo_i"]["mean"] <= 1
    assert done["protocol"]["grouping"]["method"] == values.get("method", "linkage")


@pytest.mark.usefixtures("untrained")
def test_pictures_of_a_codebook_are_cut_by_it(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = discovery.segments
    used: list[bool] = []

    def watched(*given: Any, **more: Any) -> list[torch.Tensor]:
        used.append(given[2].codebook is not None)
        return cut(*given, **more)

    monkeypatch.setattr(discovery, "segments", watched)
    plain = {"controls": ["random"], "baselines": [], "pictures": 2, "images": 4, "starts": 1}
    object_discovery.run(config(scenes, **plain, method="codebook"), out_dir=tmp_path)
    assert len(used) > 2
    assert all(used)


def test_colour_baselines_know_colours() -> None:
    image, mask = squares(0)
    scene = Scene(torch.from_numpy(image).permute(2, 0, 1)[None] / 255, torch.from_numpy(mask)[None].long(), None, [0])
    for method in (baselines.colour, baselines.components):
        labels = method(scene, 3)[0]
        assert all(len(labels[scene.instances[0] == object_].unique()) == 1 for object_ in (0, 1, 2))
    assert len(baselines.colour_position(scene, 3).unique()) == 3
    fine = baselines.grid_ceiling(scene, (32, 32), foreground=False)
    assert torch.equal(fine, scene.instances)


@pytest.mark.parametrize(
    ("size", "preset"),
    [((35, 35), "tetrominoes"), ((240, 320), "clevr"), ((100, 150), "voc"), ((32, 32), "tetrominoes")],
)
def test_images_and_masks_are_cut_alike(tmp_path: Path, size: tuple[int, int], preset: str) -> None:
    """The mask is written as the image, so that cutting and resizing must keep them in step."""
    rows = np.arange(size[0])[:, None] // 12 + np.arange(size[1])[None] // 12
    mask = (rows % 3).astype(np.uint8)
    image = np.repeat((mask * 100)[:, :, None], 3, axis=2)
    mask[0, :] = 255
    with ShardWriter(tmp_path / "a-000000.tar") as writer:
        writer.write("0", {"png": png(image), "instances.png": png(mask)})
    protocol = PRESETS[preset]
    scene = Samples(str(tmp_path)).scenes([0], protocol)
    assert scene.images.shape == (1, 3, protocol.size, protocol.size)
    seen, labels = (scene.images[0, 0] * 255 / 100), scene.instances[0]
    agree = ((seen.round() == labels) | (labels == -1)).float().mean()
    assert agree > 0.85  # borders are blended by the resizing of images, not of masks
    assert set(labels.unique().tolist()) <= {-1, 0, 1, 2}


def test_published_boxes() -> None:
    assert PRESETS["tetrominoes"].box == (1, 1, 32, 32)
    top, left, height, width = PRESETS["clevr"].box or (0, 0, 0, 0)
    assert (top, top + height, left, left + width) == (29, 221, 64, 256)
    assert PRESETS["clevrtex-full"].box == (24, 64, 192, 192)  # 0.8 of 240, centred in 240 x 320
    assert {name: preset.clusters for name, preset in PRESETS.items() if name in ("voc", "coco")} == {
        "voc": 4,
        "coco": 7,
    }


def test_bootstrap_interval_covers_the_difference() -> None:
    generator = np.random.default_rng(0)
    theirs = generator.normal(size=400)
    found = results.paired_bootstrap(theirs + 0.1 + 0.01 * generator.normal(size=400), theirs, resamplings=500)
    assert found["low"] < 0.1 < found["high"]
    assert found["high"] - found["low"] < 0.005  # paired: the spread of images cancels
    assert np.isnan(results.paired_bootstrap(np.array([np.nan]), np.array([1.0]), resamplings=10)["difference"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "/nowhere"}, "no shards at /nowhere"),
        ({"preset": None, "k": None}, "give --preset"),
        ({"ckpt": "runs/none"}, "no run, export or weights file"),
        ({"ckpt": "akorn_nano_pach4_32"}, "did you mean 'akorn_nano_patch4_32'"),
        ({"distance": 0.5, "method": "kmeans"}, "cuts a dendrogram"),
    ],
)
def test_errors_say_what_to_do(scenes: Path, tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        object_discovery.run(config(scenes, **values), out_dir=tmp_path)


def test_unlabelled_shards_are_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a-000000.tar") as writer:
        writer.write("0", {"png": png(np.zeros((32, 32, 3), np.uint8))})
    with pytest.raises(UserError, match=r"no part instances.png"):
        Samples(str(tmp_path), needs=("instances.png",))


@pytest.mark.usefixtures("untrained")
def test_a_picture_of_ones_own(tmp_path: Path) -> None:
    Image.fromarray(squares(0, 48)[0]).save(tmp_path / "photo.jpg")
    done = object_discovery.run(
        ObjectDiscoveryConfig(ckpt=MODEL, image=str(tmp_path / "photo.jpg"), k=3, size=32), out_dir=tmp_path
    )
    assert done["segments"] == 3
    assert Image.open(done["picture"]).size == (1024, 512)


def test_segments_of_a_protocol_without_preset() -> None:
    encoder = load(MODEL, control="random")
    protocol = discovery.Protocol(Preset(32, 3), Grouping(clusters=3), sweep=(2,), starts=1)
    cuts = discovery.segments(encoder, torch.rand(2, 3, 32, 32), protocol)
    assert [int(cut.max()) + 1 for cut in cuts] == [3, 2]
