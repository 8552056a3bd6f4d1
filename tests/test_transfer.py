"""COCO's annotations, right and wrong; targets; the backbone of a run in torchvision's detectors; average precision."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
import torchvision
from coco_data import HEIGHT, WIDTH, polygon, write_annotations, write_coco
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from relabel.errors import BadInput, BadSample
from relabel.models import build_model
from relabel.normalization import normalize
from relabel.training.export import export_weights
from relabel.transfer.average_precision import MEASURES, average_precision, write_results
from relabel.transfer.coco import CocoImage, check_same_categories, read_coco
from relabel.transfer.detectors import build_detector, load_backbone
from relabel.transfer.fine_tuning import learning_rate
from relabel.transfer.samples import Flip, read_pixels, read_sample
from relabel.transfer.settings import Data, Epochs, Model


@pytest.fixture
def content(tmp_path):
    """The annotations of the set `train` in `tmp_path`, of 3 images with two objects and one without."""
    return write_coco(tmp_path, "train", 3)


def changed(tmp_path, content, change, masks=True, evaluated=False):
    """The set with its annotations changed in place."""
    content = copy.deepcopy(content)
    change(content)
    write_annotations(tmp_path, "train", content)
    return read_coco(tmp_path, "train", masks, evaluated)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_sparse_category_ids_become_labels_in_ascending_order_and_boxes_corners(tmp_path, content):
    coco = read_coco(tmp_path, "train", masks=True)
    assert coco.categories == {7: "wide", 90: "tall"} and list(coco.annotated) == [0, 1, 2]
    for image, annotations in zip(coco.images, np.split(np.array(content["annotations"]), 3), strict=False):
        assert image.id == annotations[0]["image_id"] and image.labels.tolist() == [1, 2]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in annotations)]
        assert image.boxes.tolist() == boxes and image.boxes.dtype == np.float32
    assert coco.remarks == ["instances_train.json: 1 of 4 images have no box to train on"]


def test_crowds_and_narrow_boxes_are_not_trained_on_and_others_are_clipped(tmp_path, content):
    """At most one of ten may be narrow or exceed its image: ten more boxes make that one."""

    def change(content):
        whole = {"image_id": 997, "category_id": 7, "area": 1, "segmentation": [polygon(10, 10, 20, 20)]}
        for i in range(14):
            content["annotations"].append(whole | {"id": 100 + i, "bbox": [10, 10, 20, 20], "iscrowd": int(i == 0)})
        counts = {"size": [HEIGHT, WIDTH], "counts": [0, 5, HEIGHT * WIDTH - 5]}
        content["annotations"][6]["segmentation"] = counts  # of a crowd
        content["annotations"][7]["bbox"] = [10, 10, 0.4, 20]
        content["annotations"][8] |= {"bbox": [60, 10, 40, 70], "segmentation": [polygon(60, 10, 36, 54)]}
        content["annotations"][9] |= {"bbox": [-0.5, 10, 40, 20], "segmentation": [polygon(0, 10, 40, 20)]}

    coco = changed(tmp_path, content, change)
    (last,) = (image for image in coco.images if image.id == 997)
    assert last.annotations == tuple(range(102, 114)) and last.boxes[0].tolist() == [60, 10, WIDTH, HEIGHT]
    assert last.boxes[1].tolist() == [0, 10, 39.5, 30]
    assert coco.remarks == [
        "instances_train.json: 1 annotations of crowds are not trained on",
        "instances_train.json: 1 boxes narrower than a pixel are not trained on",
        "instances_train.json: 1 boxes are clipped to their image",
    ]


def first(content, **values):
    content["annotations"][0] |= values


MISTAKES = {
    "a box as corners": (
        lambda c: [a.update(bbox=[40, 30, 90, 60]) for a in c["annotations"]],
        "6 of 6 boxes exceed their image by more than a pixel: bbox must be [x, y, width, height]",
    ),
    "a box outside": (lambda c: first(c, bbox=[97, 3, 10, 10]), "annotation 1 of 000.png: bbox is [97, 3, 10, 10]"),
    "fractions": (
        lambda c: [a.update(bbox=[0.1, 0.1, 0.5, 0.5]) for a in c["annotations"]],
        "6 of 6 boxes are narrower than a pixel: bbox must be in pixels, not in fractions",
    ),
    "polygons as y, x": (
        lambda c: [a.update(bbox=[70, 2, 20, 9], segmentation=[polygon(2, 50, 9, 20)]) for a in c["annotations"]],
        "6 of 6 segmentations lie elsewhere than their bbox: polygons must be [x1, y1, x2, ...] in pixels",
    ),
    "no mask": (lambda c: c["annotations"][0].pop("segmentation"), "annotation 1 of 000.png: segmentation is None"),
    "a mask of another size": (
        lambda c: first(c, segmentation={"size": [WIDTH, HEIGHT], "counts": [0, HEIGHT * WIDTH]}),
        "its run lengths are of a mask of [96, 64]; must be [64, 96]",
    ),
    "run lengths too short": (
        lambda c: first(c, segmentation={"size": [HEIGHT, WIDTH], "counts": [3, 4]}), "its run lengths are of a mask",
    ),
    "a box of words": (lambda c: first(c, bbox=["1", 2, 3, 4]), "bbox is ['1', 2, 3, 4]; must be [x, y"),
    "a negative width": (lambda c: first(c, bbox=[9, 9, -3, 4]), "bbox is [9, 9, -3, 4]; must be"),
    "an infinite box": (lambda c: first(c, bbox=[9, 9, float("inf"), 4]), "bbox is [9, 9, inf, 4]; must be"),
    "a crowd of 2": (lambda c: first(c, iscrowd=2), "annotation 1 of 000.png: iscrowd is 2; must be 0 or 1"),
    "a category that is none": (lambda c: first(c, category_id=1), "annotation 1: category_id is 1, which is not in"),
    "an image that is none": (lambda c: first(c, image_id=5), "annotation 1: image_id is 5, which is not in"),
    "an id twice": (lambda c: first(c, id=2), "annotations: two have the id 2"),
    "an id as a word": (lambda c: first(c, id="2"), "has no id that is an integer"),
    "a category twice": (lambda c: c["categories"][0].update(name="wide"), "category 7 is named 'wide'; each must"),
    "no categories": (lambda c: c.pop("categories"), "not COCO's annotations of instances (KeyError: 'categories')"),
    "an image missing": (lambda c: c["images"][0].update(file_name="x.png"), "x.png: is missing; so are 1 of the 4"),
    "an image twice": (
        lambda c: c["images"][0].update(file_name="001.png"), "images 1000 and 999 have one file_name, 001.png"
    ),
    "a path out of the folder": (lambda c: c["images"][0].update(file_name="../a.png"), "must be a path below"),
    "no size": (lambda c: c["images"][0].pop("width"), "image 1000: is None x 64; must be whole pixels"),
    "nothing to train on": (lambda c: c["annotations"].clear(), "no image has a box to train on"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_in_the_annotations_is_an_error_that_names_it(tmp_path, content, mistake):
    change, says = MISTAKES[mistake]
    with pytest.raises(BadInput) as raised:
        changed(tmp_path, content, change)
    assert says in str(raised.value) and str(tmp_path) in str(raised.value)


def test_without_masks_no_segmentation_is_needed_and_to_evaluate_an_area_is(tmp_path, content):
    def change(content):
        for annotation in content["annotations"]:
            del annotation["segmentation"], annotation["area"]

    assert len(changed(tmp_path, content, change, masks=False).annotated) == 3
    with pytest.raises(BadInput, match=r"annotation 1 of 000.png: area is None; the average precision of small"):
        changed(tmp_path, content, change, masks=False, evaluated=True)


def test_other_sets_and_other_categories_are_named(tmp_path, content):
    with pytest.raises(BadInput, match=r"instances_train2017.json: is not there; data.folder must hold SET/"):
        read_coco(tmp_path, "train2017", masks=True)
    train = read_coco(tmp_path, "train", masks=True)
    val = changed(tmp_path, content, lambda c: c["categories"][0].update(name="thin"))
    with pytest.raises(BadInput, match=r"category 90 is 'thin'; in instances_train.json it is 'tall'"):
        check_same_categories(train, val)


# --- images and targets -----------------------------------------------------------------------------------------------


def test_polygons_and_run_lengths_of_either_kind_are_one_mask(tmp_path, content):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[10:40, 20:50] = 1
    packed = coco_mask.encode(np.asfortranarray(mask))
    runs = np.flatnonzero(np.diff(mask.T.ravel(), prepend=0, append=0))
    counts = np.diff(runs, prepend=0, append=mask.size).tolist()
    shapes = [
        [polygon(20, 10, 30, 30)], {"size": [HEIGHT, WIDTH], "counts": counts},
        {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()},
        [polygon(20, 10, 30, 10), polygon(20, 20, 30, 20), [1, 2, 3, 4]],  # in parts, and one that has no area
    ]  # fmt: skip

    def change(content):
        for annotation, shape in zip(content["annotations"], shapes, strict=False):
            annotation |= {"bbox": [20, 10, 30, 30], "segmentation": shape, "image_id": 1000}

    _, target = read_sample(changed(tmp_path, content, change).images[0], masks=True, flip=False)
    for found in target["masks"][:4]:
        np.testing.assert_array_equal(found, mask)


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_masks_and_pixels_stay_together(tmp_path, content, flip):
    """The rectangles' colors are found inside their masks, and the masks fill their boxes, flipped or not."""
    coco = read_coco(tmp_path, "train", masks=True)
    straight, _ = read_sample(coco.images[0], masks=True, flip=False)
    pixels, target = read_sample(coco.images[0], masks=True, flip=flip)
    assert torch.equal(pixels, straight.flip(2) if flip else straight)
    assert target["labels"].tolist() == [1, 2]
    for box, mask in zip(target["boxes"], target["masks"], strict=True):
        ys, xs = np.nonzero(mask.numpy())
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == box.tolist()
    tall = target["masks"][1].bool()  # drawn last: nothing lies over it
    assert torch.equal(pixels[:, tall], torch.tensor([40, 250, 40], dtype=torch.uint8)[:, None].expand(-1, tall.sum()))


def test_flips_depend_on_seed_epoch_and_image_alone():
    images = [CocoImage(i, None, 1, 1, None, None) for i in range(400)]
    flips = {(s, e): [Flip(0.25, s, e).of(image) for image in images] for s in (0, 1) for e in (0, 1)}
    assert flips[0, 0] == [Flip(0.25, 0, 0).of(image) for image in images]
    assert len(set(map(tuple, flips.values()))) == 4 and 250 < sum(map(sum, flips.values())) < 550
    assert not any(Flip(0, 0, 0).of(image) for image in images) and all(Flip(1, 0, 0).of(image) for image in images)


def test_pixels_are_those_that_the_annotations_are_of(tmp_path):
    """As stored, like COCO's; upright where only the upright image has the annotated size; else an error."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file, exif=exif)
    image = CocoImage(1, file, 30, 20, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    np.testing.assert_array_equal(read_pixels(image).permute(1, 2, 0), pixels)
    on_end = CocoImage(1, file, 20, 30, image.boxes, image.labels)
    np.testing.assert_array_equal(read_pixels(on_end).permute(1, 2, 0), np.rot90(pixels, -1))
    with pytest.raises(BadSample, match="is 30 x 20; its entry \\(id 1\\) says 60 x 40"):
        read_pixels(CocoImage(1, file, 60, 40, image.boxes, image.labels))
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(BadSample, match="cannot be decoded"):
        read_pixels(image)


# --- backbone and detector --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`make(arch, **settings)`: the folder of a finished run, and its network with statistics that are not trivial."""

    def make(arch, eps=1e-5, blurpool=False):
        torch.manual_seed(0)
        network = build_model(arch, 5, bn_eps=eps, use_blurpool=blurpool).train()
        for _ in range(3):
            network(torch.randn(8, 3, 64, 64) * 2 + 1)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias)
        folder = tmp_path_factory.mktemp(arch.replace("/", "_"))
        settings = {"model.arch": arch, "model.num_classes": 5, "optim.bn.eps": eps, "model.use_blurpool": blurpool}
        export_weights(network, folder, settings, {}, [f"class{i}" for i in range(5)])
        return folder, network.eval()

    return make


def features(network, images):
    """Of a ResNet, up to its third stage: torchvision's `relu` is timm's `act1`."""
    for name, module in network.named_children():
        if name == "layer4":
            return images
        images = module(images)


@pytest.mark.parametrize("given", [{}, {"eps": 0.1}, {"blurpool": True}], ids=str)
def test_the_detector_s_features_are_those_of_the_run_on_the_loader_s_normalization(runs, given):
    """Images as the detector takes them go through its own transform; those of training through `normalize`: the last
    stage must see the same. Another mean, another epsilon, another order of channels would be seen here."""
    arch = "resnet18" if given else "timm/test_resnet"
    folder, network = runs(arch, **given)
    backbone = load_backbone(str(folder / "weights.safetensors"), "auto")
    assert backbone.arch == arch and ("BlurPool" in backbone.said) == given.get("blurpool", False)
    model = Model(detector="faster_rcnn", weights="", channels=8)
    detector = build_detector(model, Data(folder="", min_size=64), backbone.network, 3).eval()
    images = torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8)
    with torch.inference_mode():
        expected = network.get_submodule("layer4")(features(network, normalize(images)))
        seen, _ = detector.transform([image.permute(2, 0, 1) / 255 for image in images])
        found = detector.backbone.body(seen.tensors)["3"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max())


def test_an_untouched_detector_is_torchvision_s(runs):
    """By names, shapes, what is trained, anchors, sizes and normalization; its state dict loads there."""
    folder, _ = runs("resnet50")
    ours = build_detector(Model(weights=""), Data(folder=""), load_backbone(str(folder / "weights.pth"), "resnet50")
                          .network, 90)  # fmt: skip
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    kept = {k: v.shape for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert {key: value.shape for key, value in ours.state_dict().items()} == kept
    trained = {n for n, p in resnet_fpn_backbone(backbone_name="resnet50", weights=None).named_parameters()
               if p.requires_grad}  # fmt: skip
    assert {name for name, p in ours.backbone.named_parameters() if p.requires_grad} == trained
    assert repr(ours.transform) == repr(theirs.transform)
    for name in ("sizes", "aspect_ratios"):
        assert getattr(ours.rpn.anchor_generator, name) == getattr(theirs.rpn.anchor_generator, name)
    assert vars(ours.roi_heads.fg_bg_sampler) == vars(theirs.roi_heads.fg_bg_sampler)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    assert torch.equal(theirs.backbone.body.layer4[0].bn1.running_var, ours.backbone.body.layer4[0].bn1.running_var)


def test_random_weights_train_everything_with_batch_norm():
    torch.manual_seed(0)
    backbone = load_backbone("random", "resnet18")
    detector = build_detector(Model(weights="random", trainable_layers=2), Data(folder=""), backbone.network, 2)
    assert all(p.requires_grad for p in detector.parameters())
    assert isinstance(detector.backbone.body["bn1"], torch.nn.BatchNorm2d)


def test_weights_of_another_architecture_are_refused(runs, tmp_path):
    folder, network = runs("resnet18")
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    torch.save(torchvision.models.shufflenet_v2_x0_5(num_classes=2).state_dict(), tmp_path / "shuffle.pth")
    shuffle, _ = runs("shufflenet_v2_x0_5")
    for weights, arch, says in (
        (folder / "weights.safetensors", "resnet50", "was trained as resnet18; model.arch is resnet50"),
        (folder / "weights.pth", "auto", "does not say what it is; give --model.arch, e.g. --model.arch=resnet50"),
        (tmp_path / "plain.pth", "resnet50", "does not fit the network: .*; it is of a resnet18: --model.arch"),
        (tmp_path / "shuffle.pth", "resnet18", "shuffle.pth: does not fit the network"),
        (shuffle / "weights.safetensors", "auto", "shufflenet_v2_x0_5, whose stages are not a ResNet's"),
        ("random", "timm/test_vit", "has no fc.weight|timm/test_vit, whose stages are not a ResNet's"),
        ("random", "resnet19", "model.arch is 'resnet19'; did you mean resnet"),
        (tmp_path / "nowhere.pth", "resnet18", "nowhere.pth: no such checkpoint"),
        ("published", "auto", "model.weights=published needs model.arch"),
    ):
        with pytest.raises(BadInput, match=says):
            load_backbone(str(weights), arch)


# --- average precision ------------------------------------------------------------------------------------------------


def by_pycocotools(annotations, results, kind):
    """COCO's own way, from files."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(MEASURES, evaluation.stats.tolist(), strict=True))


def test_average_precision_is_pycocotools_on_the_files(tmp_path):
    """Detections near the truth, some missing, some false, masks much smaller than their boxes; a crowd; an image
    without any annotation: the twelve measures to the last bit."""
    content, rng = write_coco(tmp_path, "val", 12), np.random.default_rng(1)
    content["annotations"][5]["iscrowd"] = 1
    content["annotations"][5]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": [9, 400, HEIGHT * WIDTH - 409]}
    for annotation in content["annotations"][:8]:
        annotation["area"] = 2000  # medium
    write_annotations(tmp_path, "val", content)
    found = []
    for annotation in content["annotations"]:
        for _ in range(int(rng.integers(0, 3))):
            x, y, w, h = (float(v) for v in np.array(annotation["bbox"]) + rng.normal(0, 2, 4))
            mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
            mask[round(y) + 2 : round(y + h), round(x) + 1 : round(x + w)] = 1
            rle = coco_mask.encode(mask)
            found.append({
                "image_id": annotation["image_id"], "category_id": int(rng.choice([7, 90])), "score": rng.random(),
                "bbox": [x, y, w, h], "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            })  # fmt: skip
    coco = read_coco(tmp_path, "val", masks=True, evaluated=True)
    for kind, file in write_results(found, ("bbox", "segm"), tmp_path).items():
        assert ("bbox" in json.loads(file.read_text())[0]) == (kind == "bbox")  # a mask's size is not its box's
        ours = average_precision(coco.content, json.loads(file.read_text()), kind)
        theirs = by_pycocotools(tmp_path / "annotations" / "instances_val.json", file, kind)
        assert ours == {name: None if v < 0 else 100 * v for name, v in theirs.items()}
        assert 1 < ours["AP"] < 99 and ours["APl"] is None and ours["APm"] > 0


def test_no_detection_at_all_is_an_average_precision_of_zero(tmp_path):
    write_coco(tmp_path, "val", 3)
    coco = read_coco(tmp_path, "val", masks=True, evaluated=True)
    found = average_precision(coco.content, [], "bbox")
    assert found["AP"] == found["AR100"] == 0 and found["APl"] is None


def test_the_learning_rate_warms_up_and_drops():
    rates = [learning_rate(step, step // 10, 0.02, (2, 3), 4) for step in range(40)]
    assert rates[0] == pytest.approx(0.02e-3) and rates[2] == pytest.approx(0.02 * (0.001 + 0.999 / 2))
    assert rates[4:20] == [0.02] * 16 and rates[20:] == pytest.approx([0.002] * 10 + [0.0002] * 10)
    assert Epochs().check("8, 11") == Epochs().check([8, 11]) == (8, 11) and Epochs().check("") == ()
    for bad in ("11,8", "8,8", "0", "x"):
        with pytest.raises(ValueError):
            Epochs().check(bad)
