"""The crop decoders: stock FFCV's pixels bit for bit, and the fast path's quality, inputs and errors."""

import ctypes
import io
import subprocess
import sysconfig

import cv2
import numpy as np
import pytest
import torch
from ffcv_fields import CenterCropDecoder, CropBoxDecoder, CropSampler, RandomResizedCropDecoder, image_field
from ffcv_fields.image import REQUEST, _crop_decode_c, _resize_and_center, _scratch_bytes_c
from conftest import ROOT
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, encode_jpeg
from ffcv.transforms import ToTensor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data
from torchvision.transforms import v2

from relabel.data.loader import Loader
from relabel.data.writer import Workers, write_beton
from relabel.normalization import IMAGENET_MEAN, IMAGENET_STD, normalize

NATIVE = ROOT / "ffcv_fields" / "native"
PHOTOGRAPHS = [data.chelsea, data.astronaut, data.coffee, data.rocket]


def photograph(which, longest=500):
    image = Image.fromarray(PHOTOGRAPHS[which]())
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return image


def jpeg_of(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **({"quality": 90} | options))
    return np.frombuffer(file.getvalue(), np.uint8).copy()


def crop_decode(source, height, width, box, size, function=_crop_decode_c, **options):
    """(code, pixels) of the C function, with guard bytes around the output and the scratch memory.

    `past_line`: bytes from the beginning of a cache line to the output's.
    """
    raw, flip, statistics = (options.get(name) for name in ("raw", "flip", "statistics"))
    dtype = np.dtype(np.uint8 if statistics is None else np.float32)
    memory = np.full(size * size * 3 + 192, 77, dtype)
    before = 64 + (options.get("past_line", 0) - memory.ctypes.data) % 64 // dtype.itemsize
    guarded = memory[before - 32 : before + size * size * 3 + 32]
    out = guarded[32:-32].reshape(size, size, 3)
    scratch = np.full(_scratch_bytes_c(max(height, width), size) + 64, 77, np.uint8)
    normalize = 0 if statistics is None else statistics.ctypes.data
    resized = options.get("resized", (0, 0, 0, 0))
    request = np.array(
        [source.ctypes.data, source.size, bool(raw), height, width, *box, size, bool(flip), *resized, normalize,
         out.ctypes.data, scratch.ctypes.data], np.int64,
    )  # fmt: skip
    assert len(request) == len(REQUEST)
    code = function(request.ctypes.data)
    assert (guarded[:32] == 77).all() and (guarded[-32:] == 77).all() and (scratch[-64:] == 77).all()
    return code, out


@pytest.fixture(scope="module")
def portable(tmp_path_factory):
    """The C function, built without the steps for AVX2."""
    library = tmp_path_factory.mktemp("portable") / "decode.so"
    flags = ["-O1", "-shared", "-fPIC", "-DPORTABLE", f"-I{sysconfig.get_path('include')}"]
    subprocess.run(["gcc", *flags, "-o", library, *sorted(NATIVE.glob("*.c")), "-ljpeg"], check=True)
    function = ctypes.CDLL(str(library)).crop_decode
    function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    return function


def libjpeg_s(jpeg):
    """All pixels as PIL gives them: libjpeg's, by its accurate inverse DCT."""
    return np.asarray(Image.open(io.BytesIO(jpeg.tobytes())).convert("RGB"))


def area_crop(pixels, box, size):
    """Mean over each output pixel's rectangle, in float64: the area filter by its definition. Enlarging is bilinear."""
    y, x, h, w = box
    cropped = pixels[y : y + h, x : x + w].astype(np.float64)
    for axis, length in ((0, h), (1, w)):
        if length < size:
            place = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
            whole, part = place.astype(int), place - place.astype(int)
            shape = [1, 1, 1]
            shape[axis] = size
            following = cropped.take(np.minimum(whole + 1, length - 1), axis)
            cropped = cropped.take(whole, axis) * (1 - part.reshape(shape)) + following * part.reshape(shape)
            continue
        edges = np.arange(size + 1) * length / size
        sums = np.concatenate([np.zeros_like(cropped.take([0], axis)), cropped.cumsum(axis)], axis)
        index, part = np.minimum(edges.astype(int), length), edges - np.minimum(edges.astype(int), length)
        following = cropped.take(np.minimum(index, length - 1), axis)
        shape = [1, 1, 1]
        shape[axis] = size + 1
        cropped = np.diff(sums.take(index, axis) + following * part.reshape(shape), axis=axis) * size / length
    return cropped


@pytest.mark.parametrize("box", [(0, 0, 300, 451), (10, 20, 170, 200), (37, 101, 160, 160), (3, 5, 290, 167)])
def test_raw_pixels_are_the_area_filter_s_to_rounding(box):
    pixels = np.asarray(photograph(0))
    code, ours = crop_decode(pixels.copy(), 300, 451, box, 160, raw=True)
    assert code == 0 and np.abs(ours - area_crop(pixels, box, 160)).max() < 0.6
    assert abs((ours - area_crop(pixels, box, 160)).mean()) < 0.1
    _, flipped = crop_decode(pixels.copy(), 300, 451, box, 160, raw=True, flip=True)
    assert np.array_equal(flipped[:, ::-1], ours)


def test_enlarging_is_bilinear():
    pixels = np.asarray(photograph(1))
    _, ours = crop_decode(pixels.copy(), 500, 500, (100, 150, 60, 40), 128, raw=True)
    source = torch.from_numpy(pixels[100:160, 150:190].copy()).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(source, (128, 128), mode="bilinear")[0].permute(1, 2, 0)
    assert np.abs(ours - expected.numpy()).max() < 1.6


SAMPLINGS = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444, "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420, "4:1:1": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
    "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440, "gray": None,
}  # fmt: skip


def jpeg_sampled(image, sampling, quality=90):
    if sampling == "gray":
        return jpeg_of(image.convert("L"), quality=quality)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling]]
    return cv2.imencode(".jpg", np.asarray(image)[:, :, ::-1], options)[1].reshape(-1)


def center_crop(source, width, height, size, ratio, **options):
    resized = _resize_and_center(height, width, size, round(size / ratio))
    return crop_decode(source, height, width, (0, 0, height, width), size, resized=resized, **options)


def official_center_crop(image, size, ratio):
    """By torchvision, from a PIL image: what the official validation sees."""
    transform = v2.Compose([v2.Resize(round(size / ratio), antialias=True), v2.CenterCrop(size)])
    return np.asarray(transform(image))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.integers(0, 3), st.integers(1, 700), st.integers(1, 700), st.integers(8, 230),
    st.sampled_from([0.875, 1.0, 0.5, 224 / 232, 0.33]),
)  # fmt: skip
def test_center_crops_of_raw_pixels_are_torchvision_s_to_two_gray_levels(which, width, height, size, ratio):
    """Resize and CenterCrop, whose region is of fractions of a pixel, by PIL's filter, for images of every shape."""
    if max(width, height) > 40 * min(width, height):
        width = height  # torchvision would resize the whole of a very long image
    image = Image.fromarray(PHOTOGRAPHS[which]()).resize((width, height), Image.Resampling.BILINEAR)
    code, ours = center_crop(np.asarray(image).copy(), width, height, size, ratio, raw=True)
    expected = official_center_crop(image, size, ratio).astype(int)
    assert code == 0 and np.abs(ours - expected).max() <= 2, (np.abs(ours - expected).max(), width, height)
    assert size < 64 or abs((ours - expected).mean()) < 0.3  # where pixels are doubled, many sums end in a half


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_center_crops_of_jpegs_are_torchvision_s_of_the_exactly_decoded_image(sampling):
    psnr = []
    for which in range(4):
        for longest, size in ((500, 224), (350, 160), (301, 224), (500, 64)):
            image = photograph(which, longest)
            jpeg = jpeg_sampled(image, sampling)
            code, ours = center_crop(jpeg, *image.size, size, 0.875)
            error = ours - official_center_crop(Image.fromarray(libjpeg_s(jpeg)), size, 0.875).astype(float)
            psnr.append(10 * np.log10(255**2 / (error**2).mean()))
            assert code == 0 and abs(error.mean()) < 0.2
    assert np.mean(psnr) >= 50 and np.min(psnr) >= 40, (np.mean(psnr), np.min(psnr))


def test_white_stays_white_however_many_pixels_become_one():
    for longer, size in ((1600, 16), (1600, 17), (3000, 224), (97, 64)):
        white = np.full((longer, longer, 3), 255, np.uint8)
        code, ours = center_crop(white, longer, longer, size, 0.875, raw=True)
        assert code == 0 and (ours >= 254).all()


@pytest.mark.parametrize(
    "resized", [(64, 0, 0, 0), (63, 80, 0, 0), (80, 80, 17, 0), (80, 80, 0, -1), (1 << 40, 80, 0, 0)]
)
def test_a_center_crop_outside_of_what_is_resized_is_refused(resized):
    assert crop_decode(jpeg_of(photograph(0)), 300, 451, (0, 0, 300, 451), 64, resized=resized)[0] == 2


def test_float_output_is_the_normalized_bytes():
    image = photograph(2)
    mean, std = np.float32(IMAGENET_MEAN) * 255, np.float32(IMAGENET_STD) * 255
    statistics = np.concatenate([1 / std, -mean / std]).astype(np.float32)
    box = (20, 30, 250, 300)
    for raw, source in ((True, np.asarray(image).copy()), (False, jpeg_of(image))):
        _, bytes_out = crop_decode(source, image.height, image.width, box, 96, raw=raw)
        code, floats = crop_decode(source, image.height, image.width, box, 96, raw=raw, statistics=statistics)
        assert code == 0 and np.abs(floats - (bytes_out - mean) / std).max() < 0.6 / std.min()


@pytest.mark.parametrize("size", [96, 100, 104])  # rows that all begin a cache line as the first does, or some
@pytest.mark.parametrize("raw", [False, True])
def test_floats_are_the_same_wherever_they_are_written(raw, size):
    image, statistics = photograph(1), np.float32([0.01, 0.02, 0.03, -1, -2, -3])
    source = np.asarray(image).copy() if raw else jpeg_of(image)
    request = source, image.height, image.width, (3, 7, 280, 290), size
    at_line, half_past, unaligned = (
        crop_decode(*request, raw=raw, statistics=statistics, past_line=past)[1] for past in (0, 32, 12)
    )
    assert at_line.ctypes.data % 64 == 0 and half_past.ctypes.data % 64 == 32 and unaligned.ctypes.data % 64 == 12
    assert np.array_equal(at_line, half_past) and np.array_equal(at_line, unaligned)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_fast_crops_are_the_area_filter_s_of_the_exactly_decoded_image(sampling):
    """Over RandomResizedCrop's crops: a mean PSNR of at least 50 dB, a mean color within 0.1 of 255."""
    sample, _ = CropSampler(0).compile()
    psnr, bias = [], []
    for which in range(4):
        image = photograph(which)
        jpeg, (width, height) = jpeg_sampled(image, sampling), image.size
        full = libjpeg_s(jpeg)
        for size in (48, 160, 224):  # 48: components are reduced before they are filtered
            for i in range(12):
                box = sample(100 * which + i, height, width)
                code, ours = crop_decode(jpeg, height, width, box, size)
                assert code == 0
                error = ours - area_crop(full, box, size)
                psnr.append(10 * np.log10(255**2 / (error**2).mean()))
                bias.append(error.mean((0, 1)))
    assert np.mean(psnr) >= 50 and np.min(psnr) >= 35, (np.mean(psnr), np.min(psnr))
    assert np.abs(np.mean(bias, 0)).max() < 0.1 and np.abs(bias).max() < 0.5, (np.mean(bias, 0), np.abs(bias).max())


@pytest.mark.parametrize(
    "options, mode",
    [({"subsampling": 0}, "RGB"), ({"subsampling": 1}, "RGB"), ({"progressive": True}, "RGB"), ({}, "L"),
     ({"restart_marker_rows": 1}, "RGB")],
)  # fmt: skip
@pytest.mark.parametrize("box", [(0, 0, 300, 451), (0, 250, 40, 201), (250, 0, 50, 60), (299, 450, 1, 1)])
def test_every_kind_of_jpeg_and_corner(options, mode, box):
    image = photograph(0).convert(mode)
    jpeg = jpeg_of(image, **options)
    code, ours = crop_decode(jpeg, 300, 451, box, 32)
    assert code == 0 and np.abs(ours - area_crop(libjpeg_s(jpeg), box, 32)).mean() < 1.5


@settings(deadline=None, derandomize=True)
@given(
    st.sampled_from([0, 1, 2]), st.integers(1, 100), st.sampled_from([0, 1, 3, 40]), st.booleans(),
    st.sampled_from(["RGB", "L"]), st.integers(1, 120), st.integers(0, 3), st.booleans(),
)  # fmt: skip
def test_whole_images_are_libjpeg_s_pixels(subsampling, quality, interval, optimize, mode, side, which, noise):
    """Bit for bit where there is no color; else to the rounding of libjpeg's chroma, before and after conversion."""
    image = photograph(which, 140).convert(mode).crop((5, 5, 5 + side, 5 + side))
    if noise:  # long codes
        shape = np.asarray(image).shape
        image = Image.fromarray(np.random.default_rng(side).integers(0, 256, shape, dtype=np.uint8))
    options = {"subsampling": subsampling} if mode == "RGB" else {}
    jpeg = jpeg_of(image, quality=quality, restart_marker_blocks=interval, optimize=optimize, **options)
    code, ours = crop_decode(jpeg, side, side, (0, 0, side, side), side)
    worst = np.abs(ours.astype(int) - libjpeg_s(jpeg)).max()
    assert code == 0 and worst <= (0 if mode == "L" else 1 if subsampling == 0 else 2)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_without_avx2_pixels_are_the_same(sampling, portable):
    sample, _ = CropSampler(0, scale=(0.01, 1)).compile()
    statistics = np.float32([0.02, 0.03, 0.04, -1, -2, -3])
    for i in range(24):
        image, size, quality = photograph(i % 4, 300), (16, 33, 64, 224)[i // 4 % 4], (5, 60, 95)[i % 3]
        jpeg, box = jpeg_sampled(image, sampling, quality), sample(i, image.height, image.width)
        for source, more in ((jpeg, {}), (jpeg, {"statistics": statistics}), (np.asarray(image).copy(), {"raw": True})):
            arguments = source, image.height, image.width, box, size
            code, ours = crop_decode(*arguments, flip=i % 2, **more)
            same_code, same = crop_decode(*arguments, flip=i % 2, function=portable, **more)
            assert code == same_code == 0 and np.allclose(same, ours, rtol=0, atol=1e-5)


def test_crops_of_jpegs_with_restart_markers_are_those_without():
    pixels, stored = np.asarray(photograph(0)), {}
    for interval in (0, 1, 4, 7, 29, 1000):
        field, memory = image_field(interval, write_mode="jpg", jpeg_quality=90), []
        metadata = np.zeros(1, field.metadata_type)[0]
        field.encode(metadata, pixels, lambda size, to=memory: (0, to.append(np.zeros(size, np.uint8)) or to[-1]))
        stored[interval] = memory[0]
        assert np.array_equal(libjpeg_s(memory[0]), libjpeg_s(stored[0]))
    assert stored[0].tobytes() == bytes(encode_jpeg(pixels, 90)) and len(stored[4]) < 1.03 * len(stored[0])
    sample, _ = CropSampler(0, scale=(0.01, 1)).compile()
    for i in range(60):
        for size in (24, 96):
            box = sample(i, 300, 451)
            _, expected = crop_decode(stored[0], 300, 451, box, size)
            for interval, jpeg in stored.items():
                code, ours = crop_decode(jpeg, 300, 451, box, size)
                assert code == 0 and np.array_equal(ours, expected), (interval, box, size)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 5]), st.integers(1, 12), st.booleans())
def test_damaged_entropy_data_are_pixels_or_a_code_and_no_crash(seed, interval, changes, cut):
    rng, image = np.random.default_rng(seed), photograph(1, 120)
    jpeg = jpeg_of(image, restart_marker_blocks=interval)
    for at in rng.integers(0, len(jpeg), changes):
        jpeg[at] = rng.choice([0, 0xFF, 0xD0, 0xD7, 0xD9, rng.integers(256)])
    if cut:
        jpeg = jpeg[: rng.integers(len(jpeg))].copy()
    y, x = rng.integers(0, 100, 2)
    code, _ = crop_decode(jpeg, image.height, image.width, (y, x, 120 - y, 120 - x), 40)
    assert code in (0, 1, 2)


@pytest.mark.parametrize("interval", [0, 4])
def test_data_that_end_before_the_crop_does_are_a_code(interval):
    image = photograph(1, 120)
    jpeg = jpeg_of(image, restart_marker_blocks=interval)
    for end in range(len(jpeg) // 3, len(jpeg) - 20, 101):
        code, _ = crop_decode(jpeg[:end].copy(), 120, 120, (100, 90, 20, 30), 16)
        assert code == 1
        code, _ = crop_decode(np.concatenate([jpeg[:end], [255, 217]]).astype(np.uint8), 120, 120, (9, 0, 111, 120), 16)
        assert code == 1
    missing = [i for i in range(len(jpeg)) if jpeg[i] == 255 and jpeg[i + 1] == 0xD2]
    for at in missing[:1]:  # the third marker is missing
        code, _ = crop_decode(np.delete(jpeg, [at, at + 1]), 120, 120, (100, 90, 20, 30), 16)
        assert code == 1


@pytest.mark.parametrize(
    "change",
    [lambda j: j[:0], lambda j: j[:2], lambda j: j[: len(j) // 50], lambda j: j[2:], lambda j: j * 0,
     lambda j: np.concatenate([j[:2], j[2:200] ^ 255, j[200:]])],
)  # fmt: skip
def test_a_damaged_jpeg_is_a_code_and_no_crash(change):
    image = photograph(0)
    jpeg = change(jpeg_of(image)).copy()
    code, _ = crop_decode(jpeg, 300, 451, (200, 0, 100, 451), 64)
    assert code in (1, 2)
    good, _ = crop_decode(jpeg_of(image), 300, 451, (0, 0, 300, 451), 64)  # the thread's decoder still works
    assert good == 0


@pytest.mark.parametrize(
    "height, width, box",
    [(301, 451, (0, 0, 10, 10)), (300, 450, (0, 0, 10, 10)), (300, 451, (-1, 0, 10, 10)), (300, 451, (0, 0, 301, 10)),
     (300, 451, (0, 442, 10, 10)), (300, 451, (0, 0, 0, 10))],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(height, width, box):
    assert crop_decode(jpeg_of(photograph(0)), height, width, box, 64)[0] == 2
    assert crop_decode(np.zeros(300 * 450 * 3 - 1, np.uint8), height, width, box, 64, raw=True)[0] == 2


@pytest.fixture(scope="module", params=["jpg", "raw"])
def beton(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("photographs") / "p.beton"
    fields = {"image": RGBImageField(write_mode=request.param, jpeg_quality=90), "label": IntField()}
    load = lambda i: (np.asarray(photograph(i % 4, 200 + 7 * i)), i)  # noqa: E731
    write_beton(path, fields, range(12), load, Workers(1, 4))
    return path


def read(path, image_decoder, **more):
    pipelines = {"image": [image_decoder, ToTensor()], "label": None} | more
    loader = Loader(
        str(path), num_classes=12, batch_size=4, num_workers=2, order="sequential", drop_last=False,
        pipelines=pipelines,
    )  # fmt: skip
    batches = [[part.clone() for part in (b.images, b.crop_boxes) if part is not None] for b in loader.epoch(0)]
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # stock FFCV's changed numba types
def test_exact_decoding_is_stock_ffcv_bit_for_bit(beton):
    (stock,) = read(beton, CenterCropRGBImageDecoder((96, 96), 0.875))
    (exact,) = read(beton, CenterCropDecoder(96, 0.875, decode="exact"))
    (fast,) = read(beton, CenterCropDecoder(96, 0.875))
    assert torch.equal(exact, stock)
    assert (fast.float() - stock.float()).abs().mean() < 4  # another region, by up to 2 pixels, and another filter
    (floats,) = read(beton, CenterCropDecoder(96, 0.875, normalize=(IMAGENET_MEAN, IMAGENET_STD)))
    assert (floats.permute(0, 3, 1, 2) - normalize(fast)).abs().max() < 0.02


def test_fast_and_exact_random_crops_are_the_same_region(beton):
    from ffcv.pipeline import PipelineSpec

    crops = CropSampler(3)
    boxes = PipelineSpec("image", decoder=CropBoxDecoder(crops), transforms=[ToTensor()])
    exact, box_1 = read(beton, RandomResizedCropDecoder(64, crops, decode="exact"), crop_box=boxes)
    boxes = PipelineSpec("image", decoder=CropBoxDecoder(crops), transforms=[ToTensor()])
    fast, box_2 = read(beton, RandomResizedCropDecoder(64, crops), crop_box=boxes)
    assert torch.equal(box_1, box_2) and (fast.float() - exact.float()).abs().mean() < 3


def test_a_damaged_image_in_a_beton_ends_the_epoch_with_an_error(tmp_path):
    path = tmp_path / "bad.beton"
    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    write_beton(path, fields, range(8), lambda i: (np.asarray(photograph(0)), i), Workers(1, 4))
    raw = bytearray(path.read_bytes())
    at = [i for i in range(len(raw) - 2) if raw[i : i + 3] == b"\xff\xd8\xff"][5]
    raw[at : at + 400] = bytes(400)
    path.write_bytes(raw)
    for decode in ("fast", "exact"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            read(path, RandomResizedCropDecoder(64, CropSampler(0), decode=decode))


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="decode is 'slow'"):
        CenterCropDecoder(8, 1.0, decode="slow")
    with pytest.raises(ValueError, match=r"ratio is 1\.5"):
        CenterCropDecoder(8, 1.5)
    with pytest.raises(ValueError, match="normalize goes with"):
        CenterCropDecoder(8, 1.0, decode="exact", normalize=(IMAGENET_MEAN, IMAGENET_STD))
