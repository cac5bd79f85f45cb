"""Any image that Pillow can write, and any corruption of it, gives pixels or a reason."""

from __future__ import annotations

import io
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import pillow_heif
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features
from PIL.Image import Transpose
from support.icc_profiles import PROFILES, in_srgb
from support.image_files import FILES, orientation

from r2ncli.architectures import Preprocessing
from r2ncli.errors import ImageError
from r2ncli.images.decode import DecodeRules, decode

Array = npt.NDArray[Any]

# The modes that a format stores. All are lossless except JPEG, AVIF and HEIF.
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "LAB", "I", "F"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "ICO": ("RGBA",),
    "JPEG": ("L", "RGB", "CMYK"),
}
if int(PIL.__version__.split(".")[0]) > 11:  # which writes one that it cannot read
    MODES["TIFF"] += ("YCbCr",)
if features.check("webp"):
    MODES["WEBP"] = ("L", "RGB", "RGBA")
if features.check("jpg_2000"):
    MODES["JPEG2000"] = ("L", "LA", "RGB", "RGBA", "I;16")
if features.check("avif"):
    MODES["AVIF"] = ("L", "RGB", "RGBA")
MODES["HEIF"] = ("L", "RGB", "RGBA")
WITH_METADATA = ("PNG", "TIFF", "JPEG", "WEBP", "AVIF", "HEIF")  # EXIF and ICC
LOSSLESS = ("PNG", "TIFF", "WEBP")  # of these
OPTIONS: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}
TURNED: dict[int, Transpose] = {  # the transposition from the upright image to the stored one
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}

RULES = DecodeRules("exact")
SMALL = Preprocessing(image_size=32, resize_size=36)
QUICK = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
sizes = st.tuples(*[st.sampled_from((1, 2, 3, 7, 16, 31, 40, 73))] * 2)
LAYOUTS = [(kind, mode) for kind, modes in MODES.items() for mode in modes]


def noise(size: tuple[int, int], mode: str, seed: int) -> Image.Image:
    """An image of soft noise: every channel, alpha too, has values of its own."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (3, 4, 4), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    if mode in ("I;16", "I", "F"):
        values = np.asarray(image.getchannel(0)).astype(np.float32) * 257
        kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
        return Image.fromarray(values.astype(kinds[mode]))
    if mode in ("CMYK", "LAB"):
        return Image.merge(mode, image.split()[: 4 if mode == "CMYK" else 3])
    if mode == "LA":
        return Image.merge("LA", [image.getchannel(0), image.getchannel(3)])
    if mode == "P":
        return image.convert("RGB").quantize(32)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def encoded(image: Image.Image, kind: str, **metadata: Any) -> bytes:
    content = io.BytesIO()
    if kind == "HEIF":
        if "exif" in metadata:
            metadata["exif"] = metadata["exif"].tobytes()
        pillow_heif.from_pillow(image).save(content, **metadata)
    elif kind == "ICO":
        image.save(content, kind, sizes=[image.size])
    else:
        image.copy().save(content, kind, **OPTIONS.get(kind, {}), **metadata)
    return content.getvalue()


def decoded(content: bytes) -> Array:
    pixels = decode(content, SMALL, RULES)
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
    return pixels.astype(int)


def opened(content: bytes) -> Image.Image:
    is_heif = content[4:8] == b"ftyp" and content[8:12] != b"avif"
    return (pillow_heif.HeifImageFile if is_heif else Image.open)(io.BytesIO(content))


WHITES = {"I;16": (65535,), "I": (255, 65535), "F": (1, 255, 65535)}


def plainly(content: bytes) -> Array:
    """The whole image upright, on white, resized and cropped, with Pillow's own functions."""
    image = ImageOps.exif_transpose(opened(content))
    if image.mode in WHITES:
        values = np.asarray(image).astype(float)
        white = next(white for white in WHITES[image.mode] if values.max() <= white)
        image = Image.fromarray(np.rint(values / white * 255).astype(np.uint8))
    if image.has_transparency_data:
        white_sheet = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white_sheet, image.convert("RGBA"))
    image = image.convert("RGB")
    short = min(image.size)
    width, height = (36 * side // short for side in image.size)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + 32, top + 32))).astype(int)


@pytest.mark.parametrize(("kind", "mode"), LAYOUTS)
@given(sizes, st.integers(1, 8), st.integers(0, 99))
@settings(QUICK, max_examples=9)
def test_any_image_equals_pillows_plain_decoding_within_two_grey_levels(
    kind: str, mode: str, size: tuple[int, int], turn: int, seed: int
) -> None:
    metadata = {"exif": orientation(turn)} if kind in WITH_METADATA else {}
    content = encoded(noise(size, mode, seed), kind, **metadata)
    ours = decoded(content)
    # two passes of rounding here and there; compositing rounds once more
    assert np.abs(ours - plainly(content)).max() <= 2
    with ThreadPoolExecutor(2) as threads:
        for again in threads.map(decoded, [content] * 2):
            assert (again == ours).all()


@pytest.mark.parametrize(("kind", "mode"), [pair for pair in LAYOUTS if pair[0] in LOSSLESS])
@given(sizes, st.sampled_from(list(TURNED)), st.integers(0, 99))
@settings(QUICK, max_examples=9)
def test_an_image_stored_turned_equals_the_upright_one(
    kind: str, mode: str, size: tuple[int, int], turn: int, seed: int
) -> None:
    upright = noise(size, mode, seed)
    stored = upright.transpose(TURNED[turn])
    ours = decoded(encoded(stored, kind, exif=orientation(turn)))
    # the passes of resizing change places, and each may round the other way
    assert np.abs(ours - decoded(encoded(upright, kind))).max() <= 2


@pytest.mark.parametrize(("kind", "mode"), [pair for pair in LAYOUTS if pair[0] in WITH_METADATA])
@given(sizes, st.integers(1, 8), st.sampled_from(list(PROFILES)), st.integers(0, 99))
@settings(QUICK, max_examples=9)
def test_a_profile_is_applied_only_to_its_own_colour_space(
    kind: str, mode: str, size: tuple[int, int], turn: int, name: str, seed: int
) -> None:
    image = noise(size, mode, seed)
    plain = decoded(encoded(image, kind, exif=orientation(turn)))
    content = encoded(image, kind, exif=orientation(turn), icc_profile=PROFILES[name])
    ours = decoded(content)
    stored = opened(content).mode  # WebP keeps greyscale as RGB
    if (stored, name) == ("CMYK", "ink"):
        return  # other colours than those of an image without a profile, whatever they are
    if stored in ("1", "L", "LA", *WHITES) and name == "grey 1.8":
        assert np.abs(ours - in_srgb(plain[..., :1], name)).max() <= 1
    elif stored in ("P", "RGB", "RGBA", "YCbCr") and name in ("display p3", "adobe rgb"):
        assert np.abs(ours - in_srgb(plain, name)).max() <= 1
    else:
        assert (ours == plain).all()


@pytest.mark.filterwarnings("ignore")  # Pillow warns about metadata, which r2n ignores
@given(
    st.sampled_from(list(FILES)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=12),
    st.floats(0, 1),
    st.booleans(),
)
@settings(QUICK, max_examples=800)
def test_any_corruption_gives_pixels_or_a_reason(
    name: str, flips: list[tuple[float, int]], end: float, near_the_head: bool
) -> None:
    content = bytearray(FILES[name])
    reach = min(len(content), 200) if near_the_head else len(content)
    for where, bits in flips:
        content[int(where * reach)] ^= bits
    if not flips or end < 0.3:
        del content[int(end * len(content)) :]
    try:
        decoded(bytes(content))
    except ImageError as error:
        text = str(error)
        assert text
        assert text.isprintable()
        assert len(text) < 300
        assert not re.search(r"0x[0-9a-f]|\bobject at\b", text)
        assert not any(path in text for path in (os.getcwd(), sys.prefix, os.path.expanduser("~")))
