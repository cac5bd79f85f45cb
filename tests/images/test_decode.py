"""Encoded images become pixels, and files that are no whole image become errors."""

from __future__ import annotations

import base64
import io
import re
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, features
from support.image_files import (
    AS_IT_IS,
    FILES,
    RULES,
    SIDE,
    SMALL,
    decoded,
    encoded,
    error_of,
    on_white,
    pattern,
    png,
    png_chunk,
    sample,
)

from r2ncli.architectures import Preprocessing
from r2ncli.errors import ImageError
from r2ncli.images import decode as decoding
from r2ncli.images import pillow
from r2ncli.images import tiff as tiff_rules
from r2ncli.images.decode import DecodeRules, decode

# --- stored pixels, which must not change with a version of Pillow ----------------------

# a stored JPEG, so that a change of Pillow's encoder does not count
JPEG_FILE = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywt"
    "QFdBRkxOUlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
    "T09PT09PT09PT09PT09PT09PT0//wAARCAAeACgDASIAAhEBAxEB/8QAFwABAQEBAAAAAAAAAAAAAAAABAAFBv/EACYQ"
    "AAEEAgIBBAIDAAAAAAAAAAEAAgMRBCESMRMiI0FRFGEycYH/xAAXAQEBAQEAAAAAAAAAAAAAAAAFAwQH/8QAKREAAQMD"
    "AQYHAQAAAAAAAAAAAQACBAMRITESFCIyQVETQlJhcoGR8f/aAAwDAQACEQMRAD8A4fGxeLrcKFfKS3FJlDgNWNrS/HEj"
    "QGbPaTFjgR8D/KqpIPqtA8MHhGQe57KEeV1We7G5ceIuvpLbjAxBo7oaTsfG8d8xV9JMWIRJzI9PdrM+SSS46uwR6Rpf"
    "8zlOxpKDjY3FtO0b+VLYGIZHAsFjpShv9WlwU27QGhzlNU5AIuShQ4hiPJwsHWkpmIXO8gGu0+OETenqtpMcIb7X+X/a"
    "yvrMtYcnT5Lk8aSftBbjeauIqvtKZjhzfGBvpOjgEP7tKjxg33b/AHSzPruudrm8/sP52TsaSgQ44iHFw33pS2I8YTeq"
    "6rSlDeZIxRF29NE1Tki2V//Z"
)
# fmt: off
STORED = {
    "landscape": [
        63, 30, 164, 106, 30, 76, 148, 30, 164, 191, 30, 76, 63, 95, 200, 106, 95, 40, 148, 95,
        200, 191, 95, 40, 63, 159, 200, 106, 159, 40, 148, 159, 200, 191, 159, 40, 63, 224, 200,
        106, 224, 40, 148, 224, 200, 191, 224, 40,
    ],
    "portrait": [
        30, 64, 40, 94, 64, 200, 160, 64, 40, 225, 64, 200, 30, 104, 40, 94, 104, 200, 160, 104,
        40, 225, 104, 200, 30, 145, 68, 94, 145, 172, 160, 145, 68, 225, 145, 172, 30, 185, 169,
        94, 185, 71, 160, 185, 169, 225, 185, 71,
    ],
    "enlarged": [
        47, 8, 40, 101, 8, 40, 154, 8, 40, 207, 8, 182, 47, 87, 40, 101, 87, 40, 154, 87, 40,
        207, 87, 182, 47, 167, 40, 101, 167, 40, 154, 167, 40, 207, 167, 182, 47, 247, 40, 101,
        247, 40, 154, 247, 40, 207, 247, 182,
    ],
    "alpha": [
        112, 87, 131, 167, 122, 136, 208, 158, 218, 236, 195, 238, 112, 135, 127, 167, 161, 129,
        208, 187, 222, 236, 212, 241, 112, 184, 127, 167, 199, 129, 208, 214, 222, 236, 229,
        241, 112, 232, 127, 167, 237, 129, 208, 242, 222, 236, 247, 241,
    ],
    "16 bits": [
        63, 63, 63, 64, 64, 64, 65, 65, 65, 65, 65, 65, 103, 103, 103, 104, 104, 104, 105, 105,
        105, 105, 105, 105, 144, 144, 144, 144, 144, 144, 145, 145, 145, 145, 145, 145, 183,
        183, 183, 184, 184, 184, 184, 184, 184, 185, 185, 185,
    ],
    "jpeg": [
        62, 28, 174, 112, 27, 167, 144, 33, 61, 193, 33, 44, 44, 92, 54, 91, 97, 78, 153, 90,
        181, 207, 89, 203, 64, 166, 166, 116, 158, 178, 143, 159, 81, 190, 159, 62, 50, 217, 69,
        88, 228, 49, 158, 230, 157, 208, 223, 200,
    ],
}
# fmt: on


def stored_images() -> dict[str, bytes]:
    grey = (np.arange(61 * 97, dtype=np.uint32).reshape(97, 61) * 11 % 65536).astype(">u2")
    return {
        "landscape": encoded(sample(90, 60), "PNG"),
        "portrait": encoded(sample(61, 97), "BMP"),
        "enlarged": encoded(sample(7, 5), "PPM"),
        "alpha": encoded(sample(80, 50, "RGBA"), "PNG"),
        "16 bits": png(grey, 16, 0),
        "jpeg": base64.b64decode(JPEG_FILE),
    }


@pytest.mark.parametrize("name", list(STORED))
def test_pixels_equal_the_stored_ones(name: str) -> None:
    pixels = decoded(stored_images()[name], SMALL)[2::9, 2::9].reshape(-1).tolist()
    drift = np.abs(np.subtract(pixels, STORED[name])).max()
    assert drift <= (2 if name == "jpeg" else 0)


@pytest.mark.parametrize("name", list(FILES))
def test_every_format_gives_its_image(name: str) -> None:
    if name == "bmp runs":
        row = decoded(FILES[name])[-1]  # stored from the bottom upwards
        assert row[0].tolist() == [0, 0, 0]
        assert row[-1].tolist() == [8, 16, 24]
        return
    image = sample(24, 20, "RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    if "alpha" in name or "ico" in name or name == "webp lossless":
        image = Image.fromarray(on_white(sample(24, 20, "RGBA"))).resize((SIDE, SIDE), 2)
    reference = np.asarray(image).astype(int)
    ours = decoded(FILES[name])
    if name in ("jpeg grey", "heic grey", "pgm", "j2k"):
        reference = np.asarray(image.convert("L").convert("RGB")).astype(int)
    elif name in ("png 16", "tiff 16", "pgm 16"):
        reference = reference[:, :, [0, 0, 0]]
    elif name in ("pbm", "group4"):
        assert {*ours[0, 0], *ours[-1, -1]} == {0, 255}
        assert np.abs(ours.mean() - reference.mean()) < 15
        return
    assert np.abs(ours - reference).mean() < 12


# --- large JPEGs, reduced while they are decoded ----------------------------------------


AUTO = DecodeRules("auto")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coarse shapes with fine grain, as a camera gives them."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    grain = random.normal(0, 6, smooth.shape)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("size", [(144, 200), (145, 171), (301, 288), (577, 611), (700, 149)])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2, "progressive": True}])
def test_a_reduced_jpeg_differs_by_less_than_a_grey_level_in_the_mean(
    size: tuple[int, int], orientation: int, options: dict[str, Any]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(photograph(*size), "JPEG", quality=95, exif=exif, **options)
    for preprocessing in (SMALL, Preprocessing(SIDE, 36, crop="none")):
        whole = decode(content, preprocessing, RULES).astype(int)
        reduced = decode(content, preprocessing, AUTO).astype(int)
        difference = reduced - whole
        assert np.abs(difference).mean() < 1
        assert np.abs(difference.mean((0, 1))).max() < 0.5  # nothing has moved or changed colour
        assert np.abs(difference).max() <= 16


@pytest.mark.parametrize(("short", "decoded_at"), [(143, 143), (144, 72), (288, 72), (576, 72)])
def test_a_jpeg_is_reduced_while_its_short_side_is_twice_what_it_is_resized_to(
    monkeypatch: pytest.MonkeyPatch, short: int, decoded_at: int
) -> None:
    loaded: list[int] = []
    codec = pillow.JPEG

    def watched(image: Image.Image, content: bytes) -> None:
        codec.load(image, content)
        loaded.append(min(image.size))

    [row] = [row for row in decoding.DECODERS if row.name == "JPEG"]
    monkeypatch.setitem(vars(row), "codec", replace(codec, load=watched))
    content = encoded(photograph(short + 50, short), "JPEG")
    decode(content, SMALL, AUTO)
    decode(content, SMALL, RULES)
    assert loaded == [decoded_at, short]


def test_only_jpegs_are_reduced() -> None:
    image = photograph(400, 300)
    for kind in ("PNG", "WEBP", "TIFF"):
        content = encoded(image, kind)
        assert (decode(content, SMALL, AUTO) == decode(content, SMALL, RULES)).all()


def test_a_reduced_jpeg_that_ends_early_or_is_too_large_is_a_failed_row() -> None:
    content = encoded(photograph(600, 600), "JPEG")
    assert "truncated" in error_of(content[: len(content) // 2], AUTO)
    limited = DecodeRules("auto", max_pixels=600 * 600 - 1)
    assert "600 x 600 pixels" in error_of(content, limited)


def test_a_cmyk_and_a_grey_jpeg_are_reduced_too() -> None:
    for mode in ("CMYK", "L"):
        content = encoded(photograph(600, 500).convert(mode), "JPEG", quality=95)
        whole, reduced = (decode(content, SMALL, r).astype(int) for r in (RULES, AUTO))
        assert np.abs(whole - reduced).mean() < 1


# --- files that are no image, or only a part of one --------------------------------------


def cuts(content: bytes) -> list[int]:
    step = max(1, len(content) // 120)
    return sorted({*range(0, len(content), step), *range(max(0, len(content) - 40), len(content))})


@pytest.mark.filterwarnings("ignore")  # Pillow warns about metadata, which r2n ignores
@pytest.mark.parametrize("name", list(FILES))
def test_a_truncated_file_is_an_error_or_has_all_its_pixels(name: str) -> None:
    content = FILES[name]
    whole = decoded(content)
    lost = 0
    for cut in cuts(content):
        try:
            pixels = decoded(content[:cut])
        except ImageError:
            lost = cut
            continue
        assert (pixels == whole).all(), f"cut at {cut} of {len(content)}"
        assert cut > len(content) // 5, "no image has all its pixels there"
    assert lost > len(content) // 5


def test_a_jpeg_2000_that_ends_between_two_tiles_is_an_error() -> None:
    if not features.check("jpg_2000"):
        pytest.skip("this Pillow has no JPEG 2000")
    content = FILES["jp2 tiles"]
    tiles = [match.start() for match in re.finditer(b"\xff\x90\x00\x0a", content)]
    assert len(tiles) == 9
    for tile in tiles:
        assert "truncated" in error_of(content[:tile])


def test_a_png_with_a_broken_stream_is_an_error() -> None:
    content = encoded(sample(64, 64), "PNG")
    start = content.index(b"IDAT") + 4
    stream = bytearray(zlib.compress(b"".join(b"\0" + row.tobytes() for row in pattern(64, 64))))
    for broken in (2, len(stream) // 3, len(stream) // 2):
        corrupted = bytes(stream[:broken]) + bytes(b ^ 255 for b in stream[broken : broken + 8])
        corrupted += bytes(stream[broken + 8 :])
        assert "data stream" in error_of(
            content[: start - 8] + png_chunk(b"IDAT", corrupted) + png_chunk(b"IEND", b"")
        )


@pytest.mark.parametrize("name", list(FILES))
def test_bytes_after_the_end_are_ignored(name: str) -> None:
    content = FILES[name]
    another = b"" if name.startswith("jp2") else content  # Pillow reads boxes up to a JP2's end
    for more in (b"\0" * 100, b"the end", another):
        assert (decoded(content + more) == decoded(content)).all()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not an image"),
        (b"holiday in Norway\n", "not an image of a known format"),
        (b"P", "not an image of a known format"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page or other markup"),
        (b"\n  <svg xmlns='http://www.w3.org/2000/svg'/>", "a web page or other markup"),
        (b"\0" * 1000, "not an image of a known format"),
        (b"%PDF-1.7", "not an image of a known format"),
        (b"PK\x03\x04" + bytes(100), "not an image of a known format"),
        (b"\xff\xd8\xff\xe0", "JPEG"),
        (b"BM", "BMP"),
        (b"GIF89a", "GIF"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"II*\0", "TIFF"),
        (b"P6 0 5 255 ", "PPM"),
    ],
)
def test_the_error_says_what_is_wrong_with_a_file(content: bytes, reason: str) -> None:
    assert reason in error_of(content)


def test_a_format_that_pillow_knows_and_r2n_does_not_is_refused() -> None:
    assert error_of(encoded(sample(), "TGA")) == "not an image of a known format"


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    stream = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    reason = error_of(b"\x89PNG\r\n\x1a\n" + stream)
    assert reason == "60000 x 60000 pixels, more than the limit of 200,000,000"


@pytest.mark.parametrize("name", ["png", "jpeg", "tiff", "gif", "bmp", "ico", "ppm"])
def test_an_image_beyond_max_pixels_is_refused_and_one_at_it_is_not(name: str) -> None:
    decode(FILES[name], AS_IT_IS, DecodeRules("exact", max_pixels=24 * 20))
    reason = error_of(FILES[name], DecodeRules("exact", max_pixels=24 * 20 - 1))
    assert reason == "24 x 20 pixels, more than the limit of 479"


def test_an_icon_larger_than_its_directory_says_is_measured_itself() -> None:
    content = encoded(sample(24, 20, "RGBA"), "ICO", sizes=[(24, 20)])
    assert content[6:8] == bytes([24, 20])
    lying = content[:6] + bytes([8, 8]) + content[8:]
    with pytest.warns(UserWarning, match="expected size"):
        assert "24 x 20" in error_of(lying, DecodeRules("exact", max_pixels=100))


def test_pillows_own_limit_on_pixels_is_not_used_and_keeps_its_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 480 pixels are beyond twice of it
    monkeypatch.setattr(tiff_rules, "_LARGE", 100)
    names = [name for name in FILES if not name.startswith("ico")]
    with ThreadPoolExecutor(4) as threads:
        shapes = list(threads.map(lambda name: decoded(FILES[name]).shape, names * 4))
    assert set(shapes) == {(SIDE, SIDE, 3)}
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TIFF", "PNG", "BMP"])
def test_an_image_within_max_pixels_is_decoded_without_a_warning(kind: str) -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    side = 10_000
    assert Image.MAX_IMAGE_PIXELS < side * side < RULES.max_pixels
    content = encoded(Image.new("1", (side, side), 1), kind)
    assert (decoded(content) == 255).all()  # a warning would be an error


@pytest.mark.filterwarnings("ignore")  # Pillow warns about metadata, which r2n ignores
@pytest.mark.parametrize("name", list(FILES))
def test_an_error_is_the_same_twice_and_contains_no_memory_address(name: str) -> None:
    content = FILES[name]
    for cut in cuts(content)[::7]:
        texts = set()
        for _ in range(2):
            try:
                decode(content[:cut], AS_IT_IS, RULES)
            except ImageError as error:
                texts.add(str(error))
        assert len(texts) <= 1
        for text in texts:
            assert text.isprintable()
            assert "0x" not in text
            assert len(text) < 200


def test_the_address_of_an_object_is_removed_from_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError(f"cannot identify {io.BytesIO()!r} at all")

    monkeypatch.setattr(decoding, "opaque", fail)
    assert error_of(FILES["png"]) == "cannot be decoded: cannot identify at all"


def test_too_little_memory_fails_this_image_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decoding, "opaque", fail)
    assert error_of(FILES["png"]) == "cannot be decoded: not enough memory"


def test_libtiff_does_not_write_to_stderr() -> None:
    if not features.check("libtiff"):
        pytest.skip("this Pillow has no libtiff")
    content = bytearray(FILES["tiff_lzw"])
    content[20:60] = b"\xff" * 40
    program = (
        "import sys; from r2ncli.architectures import Preprocessing\n"
        "from r2ncli.images.decode import DecodeRules, ImageError, decode\n"
        "try: decode(sys.stdin.buffer.read(), Preprocessing(), DecodeRules('exact'))\n"
        "except ImageError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        input=bytes(content),
        capture_output=True,
        check=True,
    )
    assert b"cannot be decoded" in done.stdout
    assert done.stderr == b""


def test_threads_do_not_disturb_each_other() -> None:
    names = [name for name in FILES for _ in range(3)]
    alone = {name: decoded(FILES[name]) for name in FILES}
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda name: decoded(FILES[name]), names))
    for name, pixels in zip(names, together, strict=True):
        assert (pixels == alone[name]).all(), name
