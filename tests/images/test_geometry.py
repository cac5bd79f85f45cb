"""The network sees the part of the upright image that torchvision's evaluation transform crops."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin, features
from support.image_files import (
    FILES,
    IMAGENET,
    RULES,
    SMALL,
    assert_alike,
    decoded,
    encoded,
    orientation,
    sample,
    torchvision_pixels,
)

from r2ncli.architectures import Preprocessing
from r2ncli.images.decode import decode


@pytest.mark.parametrize(
    ("width", "height"),
    [
        *((1, 1), (1, 2), (2, 1), (3, 5), (31, 33), (223, 225), (224, 224), (256, 256)),
        *((255, 257), (257, 300), (300, 257), (640, 480), (481, 321), (333, 500), (1024, 683)),
        *((1, 100), (100, 1), (2, 301), (999, 7), (17, 1000), (1920, 1080), (511, 513)),
    ],
)
def test_pixels_equal_torchvisions_within_one_grey_level(width: int, height: int) -> None:
    noise = np.random.default_rng(width * 10_000 + height)
    values = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    ours = decoded(encoded(image, "BMP"), IMAGENET)
    assert np.abs(ours - torchvision_pixels(image)).max() <= 1


@given(
    width=st.integers(1, 180),
    height=st.integers(1, 180),
    mode=st.sampled_from(["1", "L", "P", "RGB", "CMYK"]),
    image_size=st.integers(32, 256),
    margin=st.integers(0, 40),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_size_and_mode_at_any_input_size_equals_torchvision(
    width: int, height: int, mode: str, image_size: int, margin: int
) -> None:
    image = sample(width, height, mode)
    content = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    preprocessing = Preprocessing(image_size=image_size, resize_size=image_size + margin)
    reference = torchvision_pixels(image.convert("RGB"), image_size + margin, image_size)
    assert_alike(decoded(content, preprocessing), reference)


def test_another_input_size_keeps_the_ratio_of_the_resize() -> None:
    image = sample(200, 150)
    preprocessing = IMAGENET.resized(96, no_crop=False)
    assert (preprocessing.image_size, preprocessing.resize_size) == (96, 110)
    ours = decoded(encoded(image, "PNG"), preprocessing)
    assert_alike(ours, torchvision_pixels(image, 110, 96))


def test_without_a_crop_the_whole_image_is_stretched() -> None:
    from torchvision.transforms import Resize

    image = sample(200, 90)
    ours = decoded(encoded(image, "PNG"), IMAGENET.resized(None, no_crop=True))
    whole = np.asarray(Resize((224, 224))(image)).astype(int)
    assert ours.shape == (224, 224, 3)
    assert np.abs(ours - whole).max() <= 1


@pytest.mark.parametrize("width", [100, 101, 102, 103])
def test_a_square_crop_is_centred_to_a_fraction_of_a_pixel(width: int) -> None:
    ramp = np.tile(2 * np.arange(width, dtype=np.uint8), (64, 1))  # linear: resizing keeps it
    preprocessing = Preprocessing(image_size=64, resize_size=64, crop="square")
    ours = decoded(encoded(Image.fromarray(ramp), "PNG"), preprocessing)
    expected = 2 * ((width - 64) / 2 + np.arange(64))
    assert np.abs(ours[:, :, 0] - expected).max() <= 0.5 + 1e-6


def test_a_square_crop_keeps_the_part_that_its_sizes_say() -> None:
    ramp = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    preprocessing = Preprocessing(image_size=64, resize_size=80, crop="square")
    ours = decoded(encoded(Image.fromarray(ramp), "PNG"), preprocessing)
    side = 100 * 64 / 80  # of the short side
    expected = (200 - side) / 2 + (np.arange(64) + 0.5) * side / 64 - 0.5
    assert np.abs(ours[:, :, 0] - expected).max() <= 1


@pytest.mark.parametrize(("width", "height"), [(65_000, 2), (2, 65_000)])
def test_a_very_long_image_costs_no_more_than_another(width: int, height: int) -> None:
    # resized as torchvision does, this one would have 8,320,000 x 256 pixels
    y, x = np.mgrid[0:height, 0:width]
    halves = np.where((x < width // 2) if width > height else (y < height // 2), 0, 255)
    ours = decoded(encoded(Image.fromarray(halves.astype(np.uint8)), "PNG"), IMAGENET)
    along = ours[112, :, 0] if width > height else ours[:, 112, 0]
    assert along[0] <= 1
    assert along[-1] >= 254
    assert (np.diff(along) >= 0).all()


def test_the_result_is_a_contiguous_array_of_bytes() -> None:
    for content in (FILES["png"], encoded(sample(60, 40), "JPEG", exif=orientation(6))):
        pixels = decode(content, IMAGENET, RULES)
        assert pixels.shape == (224, 224, 3)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(("width", "height"), [(75, 50), (48, 83)])
def test_a_turned_image_is_put_upright_first(
    kind: str, value: int, width: int, height: int
) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    content = encoded(sample(width, height), kind, exif=orientation(value))
    with Image.open(io.BytesIO(content)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    assert (upright.width, upright.height) == ((height, width) if value > 4 else (width, height))
    reference = torchvision_pixels(upright, SMALL.resize_size, SMALL.image_size)
    assert_alike(decoded(content, SMALL), reference)


def test_a_compressed_tiff_is_put_upright_once() -> None:
    if not features.check("libtiff"):
        pytest.skip("this Pillow has no libtiff")
    image = sample()
    content = encoded(image, "TIFF", exif=orientation(6), compression="tiff_lzw")
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert (decoded(content) == np.asarray(upright)).all()


@pytest.mark.filterwarnings("ignore")  # Pillow warns about metadata, which r2n ignores
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"no exif at all",
        b"Exif\0\0" + b"\xff" * 40,
        b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03" + b"\xff" * 9,  # cut within an entry
        b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\2\0\4\0\0\0abc\0\0\0\0\0",  # orientation is a text
        b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\x63\0\0\0\0\0\0\0",  # orientation 99
    ],
)
def test_corrupted_exif_is_harmless(kind: str, exif: bytes) -> None:
    image = sample()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    ours = decoded(encoded(image, kind, exif=exif, **lossless))
    assert np.abs(ours - decoded(encoded(image, kind, **lossless))).max() == 0


def test_a_tiff_is_turned_by_its_own_orientation_tag() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112] = 3
    image = sample()
    ours = decoded(encoded(image, "TIFF", tiffinfo=tags))
    assert (ours == np.asarray(image.rotate(180))).all()
