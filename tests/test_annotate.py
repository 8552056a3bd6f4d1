"""Dense annotators of many architectures; label maps written, resumed, packed, inspected and checked."""

import base64
import json

import numpy as np
import pytest
import torch
from conftest import names_of, run, write_images, write_label_maps
from PIL import Image
from torch import nn

from relabel.data.beton import read_header
from relabel.data.label_map_files import find_label_maps, read_tensor
from relabel.data.label_map_set import open_label_maps
from relabel.errors import BadInput, BadSample
from relabel.imagenet import imagenet_names
from relabel.label_maps.annotator import DenseAnnotator, Preprocessing, annotator_network, label_maps
from relabel.label_maps.inspection import Samples, axis_agreement, quality
from relabel.label_maps.settings import LITE0
from relabel.models import build_model


@pytest.mark.parametrize(
    "arch",
    ["resnet18", "regnet_y_400mf", "efficientnet_b0", "convnext_tiny", "densenet121", "mobilenet_v2", "swin_t",
     "timm/test_convnext", "timm/test_efficientnet", "timm/rexnet_100", "timm/tf_efficientnet_lite0"],
)  # fmt: skip
def test_dense_logits_average_to_the_network_s(arch):
    torch.manual_seed(0)
    network = build_model(arch, 20)
    for value in network.parameters():
        if value.dim() == 1:  # norms that do something
            nn.init.normal_(value, 0.5, 0.5)
    annotator, images = DenseAnnotator(network, 96), torch.randn(2, 3, 96, 96)
    with torch.inference_mode():
        dense, expected = annotator(images), network(images)
    assert dense.shape == (2, 20, 3, 3) and annotator.grid == (3, 3)
    torch.testing.assert_close(dense.mean((2, 3)), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    "arch, says",
    [("vit_b_16", "class token"), ("mobilenet_v3_small", "cannot be made dense"), ("squeezenet1_0", "no linear layer")],
)
def test_a_network_that_cannot_be_made_dense_is_refused(arch, says):
    with pytest.raises(BadInput, match=says):
        DenseAnnotator(build_model(arch, 20), 224)


class Shades(nn.Module):
    """Four classes of brightness, by squares of 8 pixels: a network whose dense logits are known."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 8, 8)
        nn.init.constant_(self.features.weight, 1 / 192)
        self.features.bias.data = torch.tensor([0.0, -0.25, -0.5, -0.75])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 4)
        self.head.weight.data, self.head.bias.data = (
            40 * torch.tensor([[1.0, -2, 0, 0], [0, 1, -2, 0], [0, 0, 1, -2], [0, 0, 0, 1]]),
            torch.zeros(4),
        )

    def forward(self, x):
        return self.head(self.pool(self.features(x).relu()).flatten(1))


PLAIN = Preprocessing(64, (0.0,) * 3, (1.0,) * 3)


def test_rows_of_a_map_are_the_image_s_y_and_the_full_image_is_seen(tmp_path):
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[15:] = 255  # the lower half is bright
    Image.fromarray(pixels).save(tmp_path / "half.png")
    images = PLAIN.normalize(PLAIN.read((tmp_path / "half.png").read_bytes(), "half.png")[None])
    scores, classes = label_maps(DenseAnnotator(Shades(), 64), images, 2, 8)
    assert scores.shape == classes.shape == (1, 2, 8, 8)
    assert (classes[0, 0, 5:] == 3).all() and (classes[0, 0, :3] != 3).all()
    assert (scores[0, 0] >= scores[0, 1]).all()


def generate(images, path, *more):
    return run(
        "generate_label_maps.py", f"--data.data_dir={images}", f"--maps.path={path}", "--model.arch=resnet18",
        f"--model.weights={images.parent}/net.pth", "--model.num_classes=8", "--data.num_workers=0", *more,
    )  # fmt: skip


def test_maps_are_generated_in_the_official_format_and_resume_where_they_stopped(tmp_path):
    files = write_images(tmp_path / "images", 12)
    torch.manual_seed(0)
    torch.save(build_model("resnet18", 8).state_dict(), tmp_path / "net.pth")
    tree, archive = tmp_path / "maps", tmp_path / "maps.npy"
    result = generate(tmp_path / "images", tree, "--maps.batch_size=5")
    assert result.returncode == 0, result.stderr
    assert "480 x 480 pixels give a grid of 15 x 15" in result.stdout and "of the time in the network" in result.stdout
    tensors = {f.stem: read_tensor(f) for f in tree.rglob("*.pt")}
    assert len(tensors) == 12 and {t.shape for t in tensors.values()} == {(2, 5, 15, 15)}
    assert all(t.dtype == torch.float32 and (t[0].diff(dim=0) <= 0).all() for t in tensors.values())
    manifest = json.loads((tree / "label_maps.json").read_text())
    assert manifest["axis_order"] == "yx" and "480 x 480" in manifest["preprocessing"]

    victims = sorted(tree.rglob("*.pt"))[:3]
    for victim in victims:
        victim.unlink()
    again = generate(tmp_path / "images", tree)
    assert "3 of 12 images to do" in again.stdout
    for victim in victims:
        torch.testing.assert_close(read_tensor(victim), tensors[victim.stem], atol=1e-4, rtol=1e-4)
    other = generate(tmp_path / "images", tree, "--maps.top_k=3")
    assert other.returncode == 1 and "have another top_k" in other.stderr

    assert generate(tmp_path / "images", archive).returncode == 0
    assert sorted(p.name for p in tmp_path.glob("maps.npy*")) == ["maps.npy", "maps.npy.json"]
    entries = find_label_maps(archive, [f"class{i}" for i in range(8)])
    for key, entry in entries.items():
        torch.testing.assert_close(
            read_tensor(entry)[0], tensors[key.rpartition("/")[2]][0], atol=1e-2, rtol=1e-3
        )  # float16
    archive.rename(tmp_path / "maps.npy.part")  # as a kill leaves it
    np.save(tmp_path / "maps.npy.done", np.arange(12, dtype=np.uint8) % 4)
    (tmp_path / "maps.npy.done.npy").rename(tmp_path / "maps.npy.done")
    assert "3 of 12 images to do" in generate(tmp_path / "images", archive).stdout

    stored = {}
    for source in (tree, archive):
        path = tmp_path / f"{source.name}.beton"
        packed = run(
            "write_datasets.py", f"--cfg.data_dir={tmp_path}/images", f"--cfg.label_map_dir={source}",
            f"--cfg.write_path={path}",
        )  # fmt: skip
        assert packed.returncode == 0, packed.stderr
        assert read_header(str(path)).handlers["label_map"].imported_axis_order == "yx"  # from the manifest
        stored[source] = [sample.scores for sample in Samples(str(path))]
    np.testing.assert_allclose(stored[tree], stored[archive], atol=1e-2)

    straight = generate(tmp_path / "images", tmp_path / "straight.beton")
    assert straight.returncode == 0, straight.stderr
    np.testing.assert_allclose([s.scores for s in Samples(f"{tmp_path}/straight.beton")], stored[archive], atol=1e-2)
    assert sorted(p.name for p in tmp_path.glob("straight*")) == ["straight.beton"]
    again = generate(tmp_path / "images", tmp_path / "straight.beton")
    assert again.returncode == 1 and "exists already" in again.stderr
    (tmp_path / "images" / "class7").rename(tmp_path / "class7")
    fewer = generate(tmp_path / "images", tmp_path / "fewer.beton")
    assert fewer.returncode == 1 and "has 7 classes, not cfg.num_classes=8" in fewer.stderr
    assert len(files) == 12


def test_the_axis_order_is_said_by_the_manifest_or_by_the_user(tmp_path):
    write_label_maps(tmp_path / "maps", write_images(tmp_path / "images", 8))
    classes, root = [f"class{i}" for i in range(8)], tmp_path / "maps"
    assert open_label_maps(root, classes).format.axis_order == "yx"  # eight random maps tell nothing
    assert "cannot be told" in open_label_maps(root, classes).remarks[0]
    assert open_label_maps(root, classes, "xy").format.axis_order == "xy"
    (root / "label_maps.json").write_text('{"axis_order": "xy"}')
    assert open_label_maps(root, classes).format.axis_order == "xy"
    with pytest.raises(BadSample, match="says axis_order xy, not yx"):
        open_label_maps(root, classes, "yx")
    (root / "label_maps.json").write_text('{"axis_order": "zz"}')
    with pytest.raises(BadSample, match="is no manifest"):
        open_label_maps(root, classes)


def test_tokenlabeling_s_maps_pack_as_label_maps(tmp_path):
    files = write_images(tmp_path / "images", 8)
    rng = np.random.default_rng(0)
    for file in files:
        classes = rng.random((8, 18, 18)).argsort(0)[:5]
        tensor = torch.from_numpy(np.stack([rng.random((5, 18, 18)) / 5, classes])).half()
        (tmp_path / "maps" / file.parent.name).mkdir(parents=True, exist_ok=True)
        torch.save(tensor, tmp_path / "maps" / file.parent.name / f"{file.stem}.pt")
    result = run(
        "write_datasets.py", f"--cfg.data_dir={tmp_path}/images", f"--cfg.label_map_dir={tmp_path}/maps",
        f"--cfg.write_path={tmp_path}/t.beton", "--cfg.axis_order=yx",
    )  # fmt: skip
    assert result.returncode == 0 and "rounded" not in result.stdout, result.stderr
    assert "the scores are probabilities" in result.stdout
    field = read_header(f"{tmp_path}/t.beton").handlers["label_map"]
    assert field.packed_shape == (2, 5, 18, 18) and field.scores == "probabilities"


def test_a_wrong_axis_order_is_found_by_an_annotator(tmp_path):
    images = tmp_path / "images"
    rng = np.random.default_rng(0)
    network = DenseAnnotator(Shades(), 64)
    for i in range(6):
        pixels = np.repeat(rng.integers(0, 255, (8, 1), dtype=np.uint8), 8, 1)[..., None].repeat(3, 2)  # rows differ
        (images / f"class{i % 4}").mkdir(parents=True, exist_ok=True)
        file = images / f"class{i % 4}" / f"{i}.png"
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(file)
        scores, classes = label_maps(network, PLAIN.normalize(PLAIN.read(file.read_bytes(), file)[None]), 1, 8)
        (tmp_path / "maps" / file.parent.name).mkdir(parents=True, exist_ok=True)
        torch.save(torch.stack([scores[0], classes[0].float()]), tmp_path / "maps" / file.parent.name / f"{i}.pt")
    fits = {
        order: axis_agreement(Samples(str(images), str(tmp_path / "maps"), order, 4), network, PLAIN, 10)
        for order in ("yx", "xy")
    }
    assert fits["yx"][0] > 1.5 * fits["yx"][1] and fits["xy"] == pytest.approx(fits["yx"][::-1])


def test_the_quality_report_by_hand(tmp_path):
    write_images(tmp_path / "images", 4, num_classes=4)
    maps = {0: (0, 0), 1: (1, 2), 2: (3, 3)}  # class0's and class1's maps name them, class2's does not; class3 has none
    for label, (left, right) in maps.items():
        tensor = torch.zeros(2, 1, 2, 2)
        tensor[0], tensor[1, 0, :, 0], tensor[1, 0, :, 1] = 9.0, left, right
        (tmp_path / "maps" / f"class{label}").mkdir(parents=True)
        torch.save(tensor, tmp_path / "maps" / f"class{label}" / f"img{label:03d}.pt")
    samples = Samples(str(tmp_path / "images"), str(tmp_path / "maps"), "yx", num_classes=4)
    found = quality(samples, temperature=1.0, most=10)
    assert found["coverage"] == 75 and found["images"] == 3
    assert found["top_1"] == pytest.approx(200 / 3) and found["top_5"] == 100  # of 4 classes, all are among five
    assert found["multi_label"] == pytest.approx(100 / 3)
    even = -2 * (z := np.exp(4.5) / (2 * np.exp(4.5) + 2)) * np.log2(z) - 2 * (0.5 - z) * np.log2(0.5 - z)
    sure = -(p := np.exp(9) / (np.exp(9) + 3)) * np.log2(p) - (1 - p) * np.log2((1 - p) / 3)
    assert found["entropy"] == pytest.approx((even + 2 * sure) / 3, abs=1e-4)


def test_pages_and_reports_of_a_beton_and_of_a_folder(tmp_path):
    files = write_images(tmp_path / "images", 8)
    maps = write_label_maps(tmp_path / "maps", files)
    common = ["--num-classes=8", "--count=2"]
    folder = run(
        "inspect_label_maps.py", f"--images={tmp_path}/images", f"--label-maps={tmp_path}/maps", "--axis-order=yx",
        f"--out={tmp_path}/a.html", *common,
    )  # fmt: skip
    assert folder.returncode == 0, folder.stderr
    run(
        "write_datasets.py", f"--cfg.data_dir={tmp_path}/images", f"--cfg.label_map_dir={tmp_path}/maps",
        f"--cfg.write_path={tmp_path}/t.beton", "--cfg.axis_order=yx",
    )  # fmt: skip
    beton = run("inspect_label_maps.py", f"--beton={tmp_path}/t.beton", f"--out={tmp_path}/b.html", *common)
    assert beton.returncode == 0, beton.stderr
    reports = [result.stdout.splitlines()[:3] for result in (folder, beton)]
    assert reports[0] == reports[1] and "label maps of 100.0 % of 8 images, axis order yx" in reports[0][0]
    pages = [json.loads(between(tmp_path / f"{name}.html")) for name in "ab"]
    for page in pages:
        assert len(page["images"]) == 2 and page["names"] == [f"class{i}" for i in range(8)]
        for image in page["images"]:
            scores, classes = decoded(image["map"], page["shape"])
            tensor = maps[tuple(image["name"].removesuffix(".jpg").split("/"))]
            assert np.array_equal(scores, tensor[0]) and np.array_equal(classes, tensor[1])
            assert image["labelName"] == page["names"][image["label"]] == image["name"].split("/")[0]
    named = [file.relative_to(tmp_path / "images").as_posix() for file in files]
    for page, names, says in zip(pages, (named, names_of(tmp_path / "t.beton")), ("Random", "The"), strict=True):
        assert all(image["name"] == names[image["number"]] for image in page["images"])
        assert page["drawn"].startswith(f"{says} crop")
    refused = run("inspect_label_maps.py", f"--beton={tmp_path}/t.beton", f"--out={tmp_path}")
    assert refused.returncode == 2 and f"such as {tmp_path}/page.html" in refused.stderr


def between(page):
    """The JSON in a page."""
    return page.read_text().partition('id="data">')[2].partition("</script>")[0]


def decoded(text, shape):
    """Scores and classes of a map in a page."""
    count, content = int(np.prod(shape)), base64.b64decode(text)
    scores, classes = np.frombuffer(content, "<f4", count), np.frombuffer(content, "<i2", count, 4 * count)
    return scores.reshape(shape), classes.reshape(shape)


def test_the_cat_s_cells_say_cat(tmp_path):
    from skimage import data

    network, statistics, _ = annotator_network(LITE0, "published", 1000)
    preprocessing = Preprocessing(480, **statistics)
    Image.fromarray(data.chelsea()).save(tmp_path / "cat.png")
    images = preprocessing.normalize(preprocessing.read((tmp_path / "cat.png").read_bytes(), "cat.png")[None])
    _, classes = label_maps(DenseAnnotator(network, 480), images, 5, 15)
    cats = [i for i, name in enumerate(imagenet_names()) if name in ("tabby", "tiger cat", "Egyptian cat")]
    face = classes[0, 0, 3:13, 3:12]  # its position in the photograph
    assert torch.isin(face, torch.tensor(cats)).double().mean() > 0.7
    assert not torch.isin(classes[0, 0, :5, 14], torch.tensor(cats)).any()  # the background above right
