"""The page of inspect_label_maps.py in headless Chromium: opened, dragged on, and its numbers against label_pooling."""

import base64
import json
import re
import shutil

import numpy as np
import pytest
import torch
from ffcv_fields import CropSampler, label_pooling
from ffcv_fields.label_map import unpack_label_map
from browser import CHROMIUM, Browser
from conftest import ROOT, names_of, run, write_images, write_label_maps
from hypothesis import given, settings
from hypothesis import strategies as st
from pooling_reference import problems
from safetensors.torch import load_file
from test_train import small, train  # noqa: F401

from relabel.data.reading import Reading, validation_loader
from relabel.label_maps.inspection import Samples
from relabel.label_maps.page import CROPS, SCRIPTS
from relabel.models import build_model
from relabel.normalization import normalize
from relabel.processes import Processes
from relabel.training.finished import FinishedRun

PAGE = ROOT / "relabel" / "label_maps" / "page"
CLOSE, ONE = 1e-4, Processes(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("needs a Chromium: apt-get install chromium")
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(beton, tmp_path_factory):
    """The page of a `.beton` with 48 images of 8 classes."""
    file = tmp_path_factory.mktemp("page") / "new" / "page.html"
    result = run("inspect_label_maps.py", f"--beton={beton}", f"--out={file}", "--temperature=0.7")
    assert result.returncode == 0, result.stderr
    assert re.search(r"page\.html: 48 images, \d+ KB$", result.stdout, re.MULTILINE)
    return file


@pytest.fixture
def opened(browser, page):
    browser.open(page)
    yield browser
    assert browser.faults() == []


def center_of(browser, selector):
    return tuple(
        browser.run(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
    )


def at(browser, x, y):
    """The place in the window of a point of the image, in fractions."""
    left, top, width, height = browser.run(
        "(() => { const r = document.getElementById('stage').getBoundingClientRect();"
        "return [r.x, r.y, r.width, r.height]; })()"
    )
    return left + x * width, top + y * height


def enter(browser, name, value, event):
    """Give a field another value, as a user does."""
    browser.run(
        f"(() => {{ const e = document.getElementById({name!r}); e.value = {value!r};"
        f"e.dispatchEvent(new Event({event!r})); }})()"
    )


def target_shown(browser, num_classes):
    """The target that the page has for its crop, dense, and the crop as a box."""
    shares, rest, box = browser.run(
        "(() => { const t = targetOf(); return [[...t.shares], t.rest, boxOf(state.crop, state.image)]; })()"
    )
    dense = np.full(num_classes, float(rest))
    for c, share in shares:
        dense[c] = share
    return dense, np.array([box])


# --- LabelPooling ---------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problem=problems(), temperature=st.sampled_from([0.3, 1.0, 2.5]), softmax=st.booleans(), exchanged=st.booleans())
def test_the_script_pools_as_label_pooling_does(browser, problem, temperature, softmax, exchanged):
    maps, boxes, num_classes = problem
    if browser.run("typeof poolCrop") == "undefined":
        browser.run((PAGE / "pooling.js").read_text().replace('"use strict";', ""))
    turned = maps.swapaxes(3, 4) if exchanged else maps
    expected = label_pooling(
        torch.from_numpy(np.ascontiguousarray(turned)), torch.from_numpy(boxes), num_classes,
        temperature=temperature, softmax=softmax,
    ).numpy()  # fmt: skip
    scores, classes = unpack_label_map(maps)
    for one, kinds, box, wanted in zip(scores, classes, boxes.tolist(), expected, strict=True):
        text = base64.b64encode(one.astype("<f4").tobytes() + kinds.astype("<i2").tobytes()).decode()
        pooling = {"numClasses": num_classes, "temperature": temperature, "softmax": softmax}
        arguments = f"decodeMap({text!r}, {list(one.shape)}), {box}, {json.dumps(pooling)}, {json.dumps(exchanged)}"
        shares, rest = browser.run(f"(() => {{ const t = poolCrop({arguments}); return [[...t.shares], t.rest]; }})()")
        found = np.full(num_classes, float(rest))
        for c, share in shares:
            found[c] = share
        assert np.abs(found - wanted).max() <= CLOSE * max(1, np.abs(wanted).max())


def test_dragging_and_resizing_the_crop_show_its_target(opened, beton):
    samples = Samples(str(beton))
    opened.run("choose(data.images[7])")
    opened.run("document.getElementById('whole').click()")
    assert opened.run("document.querySelectorAll('#rows tr').length") >= 1
    seen = []

    def check():
        target, box = target_shown(opened, 8)
        assert np.abs(target - samples[7].targets(box, 8, 0.7)[0]).max() <= CLOSE
        first = opened.run("document.querySelector('#rows tr').cells[1].textContent")
        assert first == f"{100 * target.max():.1f}" and opened.run(
            "document.querySelector('#rows th').firstChild.data"
        ) == (f"class{target.argmax()}")
        seen.append(opened.run("state.crop"))

    check()
    opened.drag(at(opened, 0.2, 0.3), at(opened, 0.6, 0.7))  # the whole image cannot be moved: a new crop
    check()
    width, height = opened.run("[state.image.width, state.image.height]")
    x, y, w, h = seen[-1]
    assert (abs(x - 0.2 * width), abs(y - 0.3 * height), abs(w - 0.4 * width), abs(h - 0.4 * height)) < (2, 2, 2, 2)
    opened.drag(center_of(opened, "#crop"), at(opened, 0.7, 0.3))  # moved, up to the border
    check()
    assert seen[-1][2:] == [w, h] and seen[-1][0] > x and seen[-1][1] < y
    opened.drag(center_of(opened, ".handle.sw"), at(opened, 0.05, 0.95))
    check()
    assert seen[-1][0] < x and seen[-1][3] > h and seen[-1][1] + h < seen[-1][1] + seen[-1][3] <= height
    opened.drag(at(opened, 0.01, 0.01), at(opened, 0.01, 0.01))  # a point: the least crop
    check()
    assert seen[-1][2:] == [1, 1]
    opened.run("document.getElementById('exchanged').click()")
    target, box = target_shown(opened, 8)
    assert np.abs(target - samples[7].targets(box[:, [1, 0, 3, 2]], 8, 0.7)[0]).max() <= CLOSE


def test_random_crops_are_those_of_training(opened, beton):
    samples, crops = Samples(str(beton)), CropSampler(0)
    take, _ = crops.compile()
    opened.run("choose(data.images[31])")
    for crops.epoch in range(CROPS):
        height, width = samples[31].image.size[::-1]
        y, x, h, w = take(samples.numbers[31], height, width)
        assert opened.run("state.crop") == [x, y, w, h]
        assert f"in epoch {crops.epoch + 1} " in opened.run("document.getElementById('drawn').textContent")
        opened.run("document.getElementById('random').click()")


# --- without a mouse ------------------------------------------------------------------------------------------


def test_the_crop_is_moved_and_resized_by_keys_and_numbers_and_its_target_is_said(opened):
    opened.run("setOwnCrop([4, 5, 20, 21])")
    opened.run("document.getElementById('crop').focus()")
    step = opened.run("Math.max(1, Math.round(Math.min(state.image.width, state.image.height) / 40))")
    for key, modifiers, wanted in (
        ("ArrowRight", 0, [4 + step, 5, 20, 21]),
        ("ArrowDown", 2, [4 + step, 6, 20, 21]),
        ("ArrowRight", 8, [4 + step, 6, 20 + step, 21]),
        ("ArrowUp", 10, [4 + step, 6, 20 + step, 20]),
    ):
        opened.key(key, modifiers)
        assert opened.run("state.crop") == wanted
    assert opened.run("document.getElementById('crop').getAttribute('aria-label')") == (
        f"Crop, {20 + step} by 20 pixels, left {4 + step}, top 6"
    )
    opened.key("Home")
    assert opened.run("isWhole()")
    for name, value in (("width", 10), ("height", 12), ("left", 3), ("top", 999)):
        enter(opened, name, value, "change")
    assert opened.run("state.crop") == [3, opened.run("state.image.height") - 12, 10, 12]
    opened.run("new Promise((done) => setTimeout(done, 600))")
    said = opened.run("document.getElementById('said').textContent")
    best = opened.run("byShare(targetOf())[0]")
    assert re.match(rf"Crop 10 by 12 pixels at 3, \d+: class{best[0]} {100 * best[1]:.1f} percent, class", said)


def test_images_are_chosen_by_keys_searched_and_ordered(opened):
    opened.run("document.querySelector('[aria-selected=true]').focus()")
    opened.key("ArrowRight")
    opened.key("ArrowDown")
    assert opened.run("state.image.number") == 2 == opened.run("data.images.indexOf(state.image)")
    assert opened.run("document.activeElement === state.image.option && document.activeElement.tabIndex") == 0
    opened.key("End")
    assert opened.run("state.image.number") == 47
    opened.run(
        "{ const s = document.getElementById('search'); s.value = 'IMG02'; s.dispatchEvent(new Event('input')); }"
    )
    assert opened.run("document.querySelectorAll('[role=option]').length") == 10
    assert opened.run("document.getElementById('count').textContent") == "10 of 48"
    opened.run(
        "{ const o = document.getElementById('order'); o.value = 'relabelled'; o.dispatchEvent(new Event('change')); }"
    )
    shares = opened.run("found().map((image) => image.share)")
    assert shares == sorted(shares) and len(shares) == 10
    options = opened.run("[...document.getElementById('order').options].map((option) => option.value)")
    assert options == ["relabelled", "uncertain", "file"]  # hardest: of a run


def test_everything_that_can_be_operated_has_a_role_and_a_name(opened):
    nodes = opened.call("Accessibility.getFullAXTree")["nodes"]
    operated = ("button", "textbox", "searchbox", "combobox", "spinbutton", "radio", "slider", "option", "listbox",
                "application", "image", "table")  # fmt: skip
    found = {}
    for node in nodes:
        role = node.get("role", {}).get("value", "").lower()
        if not node["ignored"] and role in operated:
            found.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert {"button", "searchbox", "combobox", "spinbutton", "radio", "slider", "option", "listbox", "application",
            "table"} <= found.keys()  # fmt: skip
    unnamed = [role for role, names in found.items() if role != "table" and not all(names)]
    assert unnamed == [] and len(found["spinbutton"]) == 4
    assert len(found["option"]) == 48 + 3  # the images, and their orders


def test_both_color_schemes_have_contrast(browser, page):
    backs = set()
    for scheme in ("light", "dark"):
        browser.colors(scheme)
        browser.open(page)
        for selector in ("h1", "#facts", "summary", "#rows th", "[role=option] .other", "button", "legend", ".badge"):
            colors = browser.run(
                f"(() => {{ let e = document.querySelector({selector!r}); const text = getComputedStyle(e).color;"
                "while (getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;"
                "return [text, getComputedStyle(e).backgroundColor]; })()"
            )
            text, back = (luminance(color) for color in colors)
            assert (max(text, back) + 0.05) / (min(text, back) + 0.05) >= 4.5, (scheme, selector, colors)
        backs.add(browser.run("getComputedStyle(document.body).backgroundColor"))
    browser.colors("light")
    assert len(backs) == 2


def luminance(color):
    """Of `rgb(r, g, b)`, relative, as WCAG defines it."""
    parts = np.array([int(v) for v in re.findall(r"\d+", color)[:3]]) / 255
    return np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]


# --- the label map over the image -----------------------------------------------------------------------------


def test_layers_show_the_cells_of_a_class_in_both_axis_orders(opened, beton):
    sample = Samples(str(beton))[5]
    opened.run("choose(data.images[5])")
    for exchanged in (False, True):
        opened.run(f"document.getElementById('{'exchanged' if exchanged else 'straight'}').click()")
        c = opened.run("best[1]")
        opened.run("document.querySelectorAll('[name=layer]')[3].click()")  # none, best, first, second
        assert opened.run("state.layer") == c
        rows, columns = opened.run("gridOf()")
        alpha = opened.run(
            "(() => { const e = document.getElementById('layer');"
            "const pixels = e.getContext('2d').getImageData(0, 0, e.width, e.height).data;"
            "return [...pixels].filter((_, i) => i % 4 === 3); })()"
        )
        scores = np.where(sample.classes == c, sample.scores, 0).sum(0)
        shown = (scores.T if exchanged else scores).clip(0) / sample.scores.max()
        assert np.abs(np.reshape(alpha, (rows, columns)) / 255 - shown).max() < 0.01
    opened.run("document.querySelectorAll('[name=layer]')[0].click()")
    assert opened.run("document.getElementById('layer').hidden")
    opened.mouse("move", *at(opened, 0.01, 0.99))
    row, column = (15, 1)
    best = sample.scores[:, 0, 14].argmax()  # exchanged: the first column's last row
    text = opened.run("document.getElementById('cell').textContent")
    assert text.startswith(f"Cell in row {row}, column {column}: class{sample.classes[best, 0, 14]} ")


# --- what may stand in it -------------------------------------------------------------------------------------


def test_names_are_text_and_nothing_is_loaded(browser, tmp_path):
    evil = "<img src=x onerror=window.hacked=1>"
    images = tmp_path / "a<" / "script><script>window.hacked=1;<" / "script>"
    images.mkdir(parents=True)
    files = write_images(tmp_path / "plain", 4, num_classes=2)
    write_label_maps(tmp_path / "maps", files)
    for tree in (tmp_path / "plain", tmp_path / "maps"):
        for folder in list(tree.iterdir()):
            for file in list(folder.iterdir()):
                file.rename(folder / f"<script>window.hacked=1<&\"'{file.name}")
            folder.rename(tree / f"{evil}{folder.name}")
    images.rmdir()
    (tmp_path / "plain").rename(images)
    result = run(
        "inspect_label_maps.py", "--images", str(images), "--label-maps", str(tmp_path / "maps"), "--axis-order=yx",
        "--num-classes=8", f"--out={tmp_path / 'page.html'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    browser.open(tmp_path / "page.html")
    browser.run("new Promise((done) => setTimeout(done, 300))")
    assert browser.faults() == [] and browser.run("typeof window.hacked") == "undefined"
    assert browser.run("document.getElementById('title').textContent") == f"Label maps of {images}"
    assert browser.run("data.images[0].labelName") == f"{evil}class0"
    assert browser.run("state.image.option.querySelector('.label').textContent") == f"{evil}class0"
    assert browser.run("document.getElementById('name').textContent").startswith(f"{evil}class0/<script>")
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked[0].startswith("file://") and all(url.startswith("data:") for url in asked[1:])
    browser.run(
        "{ const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s); }"
    )
    assert browser.run("typeof window.hacked") == "undefined"  # the policy keeps other scripts out


def test_the_page_names_no_other_place():
    for file in PAGE.iterdir():
        if file.suffix in (".html", ".css", ".js"):
            text = file.read_text().replace("http://www.w3.org/2000/svg", "")  # a name
            assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text), file
    assert {file.name for file in PAGE.glob("*.js")} == set(SCRIPTS)


def test_probabilities_and_labels_that_the_maps_do_not_name(browser, tmp_path):
    files = write_images(tmp_path / "images", 3, num_classes=3)
    for i, file in enumerate(files):
        tensor = torch.zeros(2, 2, 4, 6)
        tensor[0, 0], tensor[0, 1], tensor[1, 0], tensor[1, 1] = 0.6, 0.3, 0, 1
        (tmp_path / "maps" / f"class{i}").mkdir(parents=True)
        torch.save(tensor, tmp_path / "maps" / f"class{i}" / f"{file.stem}.pt")
    result = run(
        "inspect_label_maps.py", f"--images={tmp_path}/images", f"--label-maps={tmp_path}/maps", "--axis-order=yx",
        "--num-classes=2", f"--out={tmp_path / 'page.html'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "scores: probabilities" in result.stdout
    browser.open(tmp_path / "page.html")
    browser.run("choose(data.images[2])")
    assert browser.run("[...document.querySelectorAll('#rows tr')].map((r) => r.cells[1].textContent)") == [
        "60.0",
        "30.0",
    ]
    assert browser.run("document.getElementById('facts').textContent").startswith("single label class2 · 0.0 %")
    assert browser.faults() == []


# --- a run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):  # noqa: F811
    """The folder of a run of two epochs with the official pairing, with one label replaced and one sample left out."""
    root = tmp_path_factory.mktemp("run")
    names = names_of(small / "train.beton")
    replaced, left_out = names[3], names[5]
    label = next(name.split("/")[0] for name in names if name.split("/")[0] != replaced.split("/")[0])
    (root / "clean.tsv").write_text(f"{replaced}\t{label}\n{left_out}\t-\n")
    result = train(
        small, root / "run", "--data.relabel.pairing=official", "--data.relabel.temperature=0.5",
        f"--data.clean_labels={root}/clean.tsv", "--optim.batch_size=16", "--model.arch=resnet18",
        "--data.crop_ratio=0.875", "--validation.every=1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return root / "run", replaced, label, left_out


@pytest.fixture(scope="module")
def page_of_run(trained):
    """Its page with all images, and what stands in it."""
    folder = trained[0]
    result = run("inspect_label_maps.py", f"--run={folder}", "--count=127")
    assert result.returncode == 0, result.stderr
    return folder / "page.html", in_page(folder / "page.html")


def in_page(file):
    return json.loads(file.read_text().partition('id="data">')[2].partition("</script>")[0])


def test_hardest_and_most_relabelled_are_what_they_are_called(small, trained, page_of_run):  # noqa: F811
    folder, replaced, label, left_out = trained
    data = page_of_run[1]
    names = [image["name"] for image in data["images"]]
    assert len(set(names)) == 127 and left_out not in names
    changed = data["images"][names.index(replaced)]
    assert changed["labelName"] == label == data["names"][changed["label"]]
    samples = Samples(str(small / "train.beton"))
    network = build_model("resnet18", 8)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    reading = Reading(8, ONE, 1, classes=samples.classes)
    (batch,) = validation_loader(str(small / "train.beton"), reading, 128, 32, 0.875).epoch(0)
    with torch.inference_mode():
        log_p = network.eval()(normalize(batch.images)).log_softmax(1).double().numpy()
    for image in data["images"]:
        number = image["number"]
        sample, (width, height) = samples[number], samples[number].image.size
        x, y, w, h = image["seen"]
        side = min(width, height) * 32 / round(32 / 0.875)
        assert abs(w - side) <= 0.5 and w == h and abs(2 * x + w - width) <= 1 and abs(2 * y + h - height) <= 1
        box = np.array([[y / height, x / width, (y + h) / height, (x + w) / width]])  # the official code's
        target = sample.targets(box, 8, 0.5)[0].astype(np.float64)
        assert image["name"] == sample.name
        assert image["loss"] == pytest.approx(-(target * log_p[number]).sum(), rel=1e-3)
        entropy = -(target * np.log(target.clip(1e-30))).sum()
        assert image["excess"] == pytest.approx(image["loss"] - entropy, rel=1e-5, abs=1e-3)
        whole = sample.targets(np.array([[0, 0, 1, 1]]), 8, 0.5)[0]
        assert image["share"] == pytest.approx(whole[image["label"]], abs=1e-5)
        assert image["predicted"][0][0] == log_p[number].argmax() and len(image["predicted"]) == 5
        assert image["predicted"][0][1] == pytest.approx(np.exp(log_p[number].max()), abs=1e-3)


def test_the_page_of_a_run_shows_curves_and_the_network_s_view(browser, page_of_run):
    file, data = page_of_run
    browser.open(file)
    assert browser.run("state.exchanged && document.getElementById('exchanged').checked") is True
    assert browser.run("found().map((image) => image.excess)") == sorted(
        (image["excess"] for image in data["images"]), reverse=True
    )
    browser.run("document.getElementById('seen').click()")
    assert browser.run("state.crop") == browser.run("state.image.seen")
    assert browser.run("document.querySelectorAll('#columns th').length") == 4
    assert browser.run("document.querySelectorAll('#charts figure').length") == 3
    said = browser.run("document.querySelectorAll('#charts svg')[1].getAttribute('aria-label')")
    assert said.startswith("Validation accuracy, epochs 1 to 2: top-1 from ")
    table = browser.run("[...document.querySelectorAll('#lines tbody tr')].map((row) => row.cells[0].textContent)")
    assert table == ["1", "2"]
    assert browser.faults() == []


def test_fewer_images_are_the_hardest_and_the_most_relabelled_of_those_that_were_drawn(trained, page_of_run, tmp_path):
    result = run("inspect_label_maps.py", f"--run={trained[0]}", f"--out={tmp_path}/p.html", "--count=6", "--most=40")
    assert result.returncode == 0, result.stderr
    few, every = in_page(tmp_path / "p.html"), {image["number"]: image for image in page_of_run[1]["images"]}
    assert few["report"][1].startswith("of 40 training images, drawn by seed 0: ")
    drawn = [every[n] for n in np.random.default_rng(0).permutation(sorted(every))[:40]]
    hardest = sorted(drawn, key=lambda image: -image["excess"])[:4]
    relabelled = sorted(drawn, key=lambda image: image["share"])[:4]
    shown = [image["number"] for image in few["images"]]
    assert len(shown) == 6 and {hardest[0]["number"], hardest[1]["number"], relabelled[0]["number"]} <= set(shown)
    assert set(shown) <= {image["number"] for image in (*hardest, *relabelled, *drawn)}


def test_what_is_no_run_is_said(tmp_path, trained):
    for options, code, says in (
        ([f"--run={tmp_path}"], 1, "holds no run of train_imagenet.py"),
        ([f"--run={trained[0]}", "--temperature=2"], 2, "a run has its own"),
        ([f"--run={tmp_path}", "--count=0"], 2, "--count is 0; give 1 or more"),
    ):
        result = run("inspect_label_maps.py", *options)
        assert result.returncode == code and says in result.stderr
    assert not FinishedRun(trained[0], ONE).packed_again
    again = tmp_path / "again"
    shutil.copytree(trained[0], again)
    state = torch.load(again / "checkpoint.pt", weights_only=True)
    state["data"]["metadata_crc"] += 1
    torch.save(state, again / "checkpoint.pt")
    assert FinishedRun(again, ONE).packed_again
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.yaml", "log.jsonl"):
        (bare / name).write_bytes((trained[0] / name).read_bytes())
    result = run("inspect_label_maps.py", f"--run={bare}")
    assert result.returncode == 1 and "holds no checkpoint" in result.stderr
