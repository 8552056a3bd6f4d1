"""JPEGs that are kept without loss: the same pixels for every decoder, whatever the kind; faults are never kept."""

import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from ffcv_fields import jpeg as jpeg_module
from conftest import names_of
from ffcv.fields.rgb_image import resizer
from ffcv.libffcv import imdecode
from ffcv_fields.jpeg import DAMAGED, KEPT, OTHER_KIND, TOO_LARGE, area_resize, decode_jpeg, keep_jpeg
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jpeg_kinds import CMYK, GRAY, RGB, YCBCR, YCCK, JpegWriter
from PIL import Image
from test_image import SAMPLINGS, crop_decode, jpeg_of, jpeg_sampled, photograph

from relabel.data import images
from relabel.data.beton import read_header
from relabel.data.images import Stored, to_be_stored
from relabel.data.packing import pack
from relabel.data.settings import Packing
from relabel.errors import BadSample


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    return JpegWriter(tmp_path_factory.mktemp("encoder"))


def pixels_of(jpeg):
    return np.asarray(Image.open(io.BytesIO(bytes(jpeg))).convert("RGB"))


def stock(jpeg, height, width):
    """By FFCV's own reader."""
    out = np.empty((height, width, 3), np.uint8)
    data = np.frombuffer(bytes(jpeg), np.uint8)
    assert imdecode(data, out, height, width, height, width, 0, 0, 1, 1, False, False) == 0
    return out


def check(source, interval, fast=True):
    """Kept, and the same pixels for PIL, for FFCV's reader and for the crop decoder."""
    kept, code = keep_jpeg(source, interval)
    assert code == KEPT and kept is not None
    expected = pixels_of(source)
    assert (kept.height, kept.width) == expected.shape[:2]
    assert np.array_equal(pixels_of(kept.data), expected)
    assert np.array_equal(stock(kept.data, *expected.shape[:2]), stock(source, *expected.shape[:2]))
    side = min(kept.height, kept.width)
    code, ours = crop_decode(kept.data, kept.height, kept.width, (0, 0, side, side), side)
    assert code == 0
    if fast:
        assert np.abs(ours.astype(int) - expected[:side, :side]).max() <= 2
    return kept.data.tobytes()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.sampled_from(["RGB", "L"]), st.sampled_from([0, 1, 2]), st.fixed_dictionaries({
        "quality": st.integers(1, 100), "restart_marker_blocks": st.sampled_from([0, 1, 3, 40]),
        "optimize": st.booleans(), "progressive": st.booleans(),
    }), st.integers(1, 130), st.integers(1, 130), st.integers(0, 3), st.booleans(), st.sampled_from([0, 1, 2, 4, 999]),
)  # fmt: skip
def test_jpegs_of_pil_are_kept_bit_for_bit(mode, subsampling, options, height, width, which, noise, ours):
    image = photograph(which, 140).convert(mode).resize((width, height))
    if noise:  # long codes
        shape = np.asarray(image).shape
        image = Image.fromarray(np.random.default_rng(height).integers(0, 256, shape, dtype=np.uint8))
    options = options | ({"subsampling": subsampling} if mode == "RGB" else {})
    kept = check(jpeg_of(image, **options).tobytes(), ours)
    assert (b"\xff\xdd" in kept) == (ours > 0)


FACTORS = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(FACTORS, min_size=3, max_size=3), st.sampled_from([RGB, YCBCR]), st.integers(1, 99), st.integers(0, 5),
    st.sampled_from([{}, {}, {"progressive": 1}, {"apart": 1}, {"optimize": 1}]),
    st.tuples(st.integers(1, 90), st.integers(1, 90)), st.sampled_from([0, 1, 4]),
)  # fmt: skip
def test_any_sampling_colors_and_scans(writer, factors, space, quality, interval, options, size, ours):
    if sum(h * v for h, v in factors) > 10:  # an MCU has at most 10 blocks
        factors = [(2, 2), (1, 1), (1, 2)]
    image = np.asarray(photograph(size[0] % 4, 140).resize(size))
    jpeg = writer(image, space, factors, quality=quality, interval=interval, **options)
    assume(jpeg is not None)
    if keep_jpeg(jpeg, ours)[1] == OTHER_KIND:
        assert quality < 25  # quantizers of 16 bits
        return
    check(jpeg, ours, fast=space == YCBCR and factors[0] == (2, 2) and factors[1] == factors[2] == (1, 1))


@pytest.mark.parametrize("factors", [(1, 1), (2, 2), (3, 1), (1, 4)])
def test_gray_jpegs_whose_only_component_says_it_is_sampled(writer, factors):
    for options in ({}, {"progressive": 1}, {"interval": 3}):
        check(writer(np.asarray(photograph(0, 90).convert("L"))[..., None], GRAY, [factors], **options), 4)


def test_what_cannot_be_kept_is_refused_by_its_kind(writer):
    color = np.asarray(photograph(0, 90))
    cmyk = np.concatenate([color, color[..., :1]], 2)
    for space in (CMYK, YCCK):
        assert keep_jpeg(writer(cmyk, space, [(1, 1)] * 4), 4) == (None, OTHER_KIND)
    assert keep_jpeg(writer(color, YCBCR, [(2, 2), (1, 1), (1, 1)], arithmetic=1), 4) == (None, OTHER_KIND)
    assert keep_jpeg(writer(color, YCBCR, [(1, 1)] * 3, quality=1), 4) == (None, OTHER_KIND)  # quantizers of 16 bits
    parts = bytearray(jpeg_of(photograph(0, 90), subsampling=0).tobytes())
    for i, factors in enumerate((0x31, 0x21, 0x11)):  # 3 : 2 samples
        parts[parts.find(b"\xff\xc0") + 11 + 3 * i] = factors
    with pytest.raises(OSError):
        pixels_of(parts)
    assert keep_jpeg(bytes(parts), 4) == (None, OTHER_KIND)
    twelve = bytearray(jpeg_of(photograph(0, 90)).tobytes())
    twelve[twelve.find(b"\xff\xc0") + 4] = 12
    assert keep_jpeg(bytes(twelve), 4)[0] is None
    jpeg = jpeg_of(photograph(0, 90)).tobytes()
    assert keep_jpeg(jpeg, 4, longest=89) == (None, TOO_LARGE) and keep_jpeg(jpeg, 4, longest=90)[1] == KEPT
    assert keep_jpeg(b"", 4) == (None, OTHER_KIND)


def test_a_progressive_jpeg_without_its_last_scans_is_not_kept():
    """Decoders smooth what they do not know of it."""
    jpeg = jpeg_of(photograph(0, 140), progressive=True).tobytes()
    scans = [i for i in range(len(jpeg) - 1) if jpeg[i : i + 2] == b"\xff\xda"]
    assert keep_jpeg(jpeg, 4)[1] == KEPT and len(scans) > 5
    for at in scans[1:]:
        before = jpeg.rfind(b"\xff\xc4", 0, at) if jpeg[:at].rfind(b"\xff\xc4") > jpeg[:at].rfind(b"\xff\xda") else at
        cut = jpeg[:before] + b"\xff\xd9"
        pixels_of(cut)
        assert keep_jpeg(cut, 4) == (None, OTHER_KIND)


@pytest.mark.parametrize("progressive", [False, True])
def test_one_that_is_larger_than_a_page_is_not_kept(monkeypatch, progressive):
    jpeg = jpeg_of(photograph(0), progressive=progressive).tobytes()
    for room in (0, 1, 100, 8000, 8191, 8192, 9000, 20000, 30000):
        monkeypatch.setattr(jpeg_module, "_room", np.full(room + 64, 77, np.uint8)[:room])
        assert keep_jpeg(jpeg, 4)[0] is None and (jpeg_module._room.base[room:] == 77).all()


def test_metadata_are_left_out_and_colors_stay(writer):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret place"
    jpeg = jpeg_of(photograph(0, 90), exif=exif, comment=b"a comment", icc_profile=b"profile" * 99).tobytes()
    kept = check(jpeg, 4)
    assert b"secret" not in kept and b"comment" not in kept and b"profile" not in kept and b"JFIF" in kept
    kept = check(writer(np.asarray(photograph(0, 90)), RGB, [(1, 1)] * 3), 4)
    assert b"Adobe" in kept
    for names in (b"RGB", b"\1\2\3", b"\0\1\2"):  # no segment says the colors: the names of the components do
        jpeg = bytearray(writer(np.asarray(photograph(0, 90)), RGB, [(1, 1)] * 3))
        at = jpeg.find(b"Adobe") - 4
        del jpeg[at : at + 16]
        for marker, first, step in ((b"\xff\xc0", 10, 3), (b"\xff\xda", 5, 2)):
            for i in range(3):
                jpeg[jpeg.find(marker) + first + step * i] = names[i]
        check(bytes(jpeg), 4, fast=False)


@pytest.mark.parametrize("quality", [40, 90, 98, 100])
def test_the_codes_of_a_baseline_file_are_copied(quality):
    for which in range(4):
        jpeg = jpeg_of(photograph(which), quality=quality).tobytes()
        kept = check(jpeg, 0)
        assert kept[kept.find(b"\xff\xda") :] == jpeg[jpeg.find(b"\xff\xda") :]


def test_of_several_pictures_in_one_file_the_first_is_kept():
    file = io.BytesIO()
    photograph(0, 90).save(file, "MPO", save_all=True, append_images=[photograph(1, 90)])
    check(file.getvalue(), 4)
    counts = Stored()
    stored = to_be_stored(file.getvalue(), "a.jpg", Packing(data_dir="", write_path=""), counts)
    assert counts.kept == 1 and np.array_equal(pixels_of(stored.data), pixels_of(file.getvalue()))


def test_an_optimized_file_gets_codes_for_the_differences_behind_markers():
    """Its own table has only those that it needs: a flat image has one."""
    flat = Image.new("RGB", (200, 100), (250, 250, 250))
    check(jpeg_of(flat, optimize=True).tobytes(), 1)


def test_large_scans_are_copied_too_and_what_exceeds_a_page_is_of_another_kind():
    noise = np.random.default_rng(0).integers(0, 256, (2900, 2900), dtype=np.uint8)
    jpeg = jpeg_of(Image.fromarray(noise[:2100, :2100]), quality=100).tobytes()
    assert len(jpeg) > 6 << 20
    kept, code = keep_jpeg(jpeg, 0)
    assert code == KEPT and kept.data.tobytes()[-6_000_000:] == jpeg[-6_000_000:]
    assert keep_jpeg(jpeg_of(Image.fromarray(noise), quality=100).tobytes(), 4) == (None, OTHER_KIND)


# --- faults -------------------------------------------------------------------------------------------------------


def damaged(rng, jpeg):
    data = bytearray(jpeg)
    first = 0 if rng.random() < 0.3 else data.find(b"\xff\xda")
    for at in rng.integers(first, len(data), rng.integers(1, 6)):
        data[at] = rng.choice([0, 0xFF, 0xD0, 0xD7, 0xD9, rng.integers(256)])
    if rng.random() < 0.3:
        del data[rng.integers(len(data)) :]
    if rng.random() < 0.1:
        at = rng.integers(len(data) + 1)
        data[at:at] = rng.integers(0, 256, rng.integers(1, 5), dtype=np.uint8).tobytes()
    return bytes(data)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(st.integers(0, 2**32))
def test_damaged_jpegs_are_stored_as_pil_shows_them_or_refused_as_it_refuses_them(seed):
    rng = np.random.default_rng(seed)
    image = photograph(int(rng.integers(4)), 100).convert(rng.choice(["RGB", "L"]))
    jpeg = jpeg_of(
        image, restart_marker_blocks=int(rng.choice([0, 1, 5])), progressive=bool(rng.random() < 0.3),
        optimize=bool(rng.integers(2)), quality=int(rng.integers(5, 100)),
    ).tobytes()  # fmt: skip
    data, counts, packing = damaged(rng, jpeg), Stored(), Packing(data_dir="", write_path="", max_resolution=0)
    try:
        expected = pixels_of(data)
    except (OSError, SyntaxError, ValueError):
        with pytest.raises(BadSample, match=r"some\.jpg: cannot be decoded"):
            to_be_stored(data, "some.jpg", packing, counts)
        return
    stored = to_be_stored(data, "some.jpg", packing, counts)
    if counts.kept:
        assert np.array_equal(pixels_of(stored.data), expected)
    else:
        assert np.array_equal(np.asarray(stored), expected)


@pytest.mark.parametrize(("kind", "length", "symbol"), [(0, 9, 11), (0x10, 16, 1)])
def test_a_table_with_a_code_of_ones_alone_is_refused_as_libjpeg_refuses_it(kind, length, symbol):
    """The standard tables leave that one code, of their greatest length, out."""
    jpeg = bytearray(jpeg_of(photograph(0, 90).convert("L")).tobytes())
    at = jpeg.find(bytes([0xFF, 0xC4]))
    while jpeg[at + 4] != kind:
        at = jpeg.find(bytes([0xFF, 0xC4]), at + 2)
    jpeg[at + 4 + length] += 1
    end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    jpeg[end:end] = bytes([symbol])
    jpeg[at + 2 : at + 4] = (end + 1 - at - 2).to_bytes(2, "big")
    assert keep_jpeg(bytes(jpeg), 4) == (None, DAMAGED) and decode_jpeg(bytes(jpeg), 90, 90) is None
    with pytest.raises(BadSample):
        to_be_stored(bytes(jpeg), "a.jpg", Packing(data_dir="", write_path=""), Stored())


def test_faults_that_pil_passes_over_are_encoded_and_counted():
    jpeg = jpeg_of(photograph(0, 140), restart_marker_blocks=5).tobytes()
    packing = Packing(data_dir="", write_path="")
    for name, data in {
        "bytes too many before the end": jpeg[:-2] + bytes(20) + jpeg[-2:],
        "bytes too many before a marker": jpeg.replace(b"\xff\xd1", bytes(20) + b"\xff\xd1", 1),
        "a marker that is not due": jpeg.replace(b"\xff\xd1", b"\xff\xd2", 1),
        "less data than the image has": jpeg[: len(jpeg) * 2 // 3] + b"\xff\xd9",
    }.items():
        counts = Stored()
        assert keep_jpeg(data, 4) == (None, DAMAGED), name
        to_be_stored(data, "some.jpg", packing, counts)
        assert counts.kept == 0 and "fault" in next(iter(counts.encoded)), name


# --- packing ------------------------------------------------------------------------------------------------------


def test_packing_keeps_what_needs_no_resizing_and_says_what_it_encoded(tmp_path, capsys):
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    photograph(0, 90).save(folder / "small.jpg")
    photograph(1, 90).save(folder / "small_progressive.jpg", progressive=True)
    photograph(1, 200).save(folder / "large.jpg")
    photograph(2, 90).save(folder / "other.png")
    photograph(2, 90).convert("CMYK").save(folder / "cmyk.jpg")
    jpeg = jpeg_of(photograph(3, 90)).tobytes()
    (folder / "fault.jpg").write_bytes(jpeg[:-2] + bytes(20) + jpeg[-2:])
    for mode, kept in (("keep", {"small.jpg", "small_progressive.jpg"}), ("encode", set())):
        path = tmp_path / f"{mode}.beton"
        pack(
            Packing(
                data_dir=str(tmp_path / "images"), write_path=str(path), num_workers=2, max_resolution=100, jpeg=mode
            )
        )
        said = capsys.readouterr().out
        assert ("2 JPEGs were kept without loss, 4 images encoded at quality 90 (" in said) == (mode == "keep")
        for reason in (
            "1 larger than cfg.max_resolution",
            "1 other formats",
            "1 JPEGs with a fault",
            "1 JPEGs of a kind",
        ):
            assert (reason in said) == (mode == "keep")
        data, header = path.read_bytes(), read_header(str(path))
        for name, entry in zip(names_of(path), header.metadata["f0"], strict=True):
            at, file = int(entry["data_ptr"]), folder / name[2:]
            stored = pixels_of(data[at:])
            assert stored.shape[:2] == (entry["height"], entry["width"]) and max(stored.shape) <= 100
            if file.name != "large.jpg":
                assert np.array_equal(stored, pixels_of(file.read_bytes())) == (file.name in kept), name


def test_refusals_leave_no_memory_behind():
    """Resident memory, in KiB, after 4,000 faulty files of both ways of reading, an error in the middle of each."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024

    jpegs = [jpeg_of(photograph(0, 140), progressive=progressive).tobytes() for progressive in (False, True)]
    cut = [jpeg[: len(jpeg) * part // 4] for jpeg in jpegs for part in (1, 2, 3)]
    before = 0
    for i in range(5000):
        assert keep_jpeg(cut[i % 6], 4)[0] is None
        before = resident() if i == 1000 else before
    assert resident() - before < 2000


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [*SAMPLINGS, "progressive"])
def test_images_that_are_to_be_encoded_are_decoded_as_pil_does(sampling):
    for which in range(4):
        image = photograph(which)
        jpeg = (
            jpeg_of(image, progressive=True) if sampling == "progressive" else jpeg_sampled(image, sampling)
        ).tobytes()
        for cfg in ({"jpeg": "encode"}, {"write_mode": "raw"}):
            counts = Stored()
            stored = to_be_stored(jpeg, "a.jpg", Packing(data_dir="", write_path="", max_resolution=0, **cfg), counts)
            assert np.array_equal(stored, pixels_of(jpeg)) and not counts.kept
            assert decode_jpeg(jpeg, *image.size) is not None  # it was not PIL


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_the_area_filter_is_opencv_s_to_the_last_bit(height, width, rows, columns, noise):
    pixels = np.asarray(photograph(height % 4).resize((width, height)))
    if noise:
        pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = max(1, int(columns * width)), max(1, int(rows * height))
    ours, theirs = area_resize(pixels, *size), cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 1 and difference.mean() < 0.3  # ties, where two by two pixels become one
    with pytest.raises(ValueError, match="cannot be made smaller"):
        area_resize(pixels, width + 1, height)


@pytest.mark.parametrize("longest, target", [(500, 166), (500, 120), (501, 167), (451, 150)])
def test_images_three_times_too_large_are_decoded_at_half_the_resolution_to_the_same_size(longest, target):
    psnr = []
    for which in range(4):
        image = photograph(which)
        image = image.resize((longest, longest * image.height // image.width))
        jpeg = jpeg_of(image, quality=95).tobytes()
        packing = Packing(data_dir="", write_path="", max_resolution=target, write_mode="raw")
        stored, expected = to_be_stored(jpeg, "a.jpg", packing, Stored()), resizer(pixels_of(jpeg), target)
        assert stored.shape == expected.shape and resizer(stored, target) is stored
        error = stored.astype(float) - expected
        psnr.append(10 * np.log10(255**2 / (error**2).mean()))
        assert np.abs(error.mean((0, 1))).max() < 0.5
    assert np.mean(psnr) > 34 and np.min(psnr) > 30, psnr  # the photographs are small, hence sharp


@pytest.mark.parametrize(
    "target, pixels", [(499, 500), (250, 500), (167, 500), (166, 250), (83, 125), (41, 63), (2, 63)]
)
def test_how_many_pixels_are_decoded(monkeypatch, target, pixels):
    seen = []
    monkeypatch.setattr(images, "decode_jpeg", lambda *given: seen.append(decode_jpeg(*given)) or seen[-1])
    jpeg = jpeg_of(photograph(0).resize((500, 333))).tobytes()
    to_be_stored(jpeg, "a.jpg", Packing(data_dir="", write_path="", max_resolution=target), Stored())
    assert seen[0].shape[1] == pixels


def test_a_fault_is_found_at_a_lower_resolution_too():
    jpeg = jpeg_of(photograph(0)).tobytes()
    for cut in (jpeg[: len(jpeg) // 2], jpeg[:-300]):
        with pytest.raises(BadSample, match="truncated"):
            to_be_stored(cut, "a.jpg", Packing(data_dir="", write_path="", max_resolution=100), Stored())
