"""ICC profiles are applied to the resized pixels, and unusable ones are ignored."""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageCms, features
from support.icc_profiles import (
    INKS,
    PROFILES,
    SRGB,
    SRGB_CURVE,
    from_srgb_curve,
    gamma_curve,
    grey_profile,
    in_srgb,
    ink_lab,
    ink_profile,
    lab_in_srgb,
    rgb_profile,
)
from support.image_files import (
    EVERY_16_BITS,
    SIDE,
    SMALL,
    decoded,
    encoded,
    orientation,
    png,
    png_chunk,
    sample,
)

from r2ncli.images import colour

MODE_OF = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
WITH_PROFILES = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 95}}
WITH_PROFILES |= {"AVIF": {"quality": 95}, "MPO": {"quality": 95}}


@pytest.mark.parametrize("kind", list(WITH_PROFILES))
@pytest.mark.parametrize("name", ["display p3", "adobe rgb"])
def test_a_wide_gamut_image_keeps_its_colours(name: str, kind: str) -> None:
    if kind in ("WEBP", "AVIF") and not features.check(kind.lower()):
        pytest.skip(f"this Pillow has no {kind}")
    image = sample()
    stored = decoded(encoded(image, kind, **WITH_PROFILES[kind]))
    ours = decoded(encoded(image, kind, icc_profile=PROFILES[name], **WITH_PROFILES[kind]))
    assert np.abs(ours - in_srgb(stored, name)).max() <= 1
    assert np.abs(ours - stored).max() > 20


def test_srgbs_red_stored_as_display_p3_becomes_pure_red() -> None:
    stored = Image.new("RGB", (SIDE, SIDE), (234, 51, 35))  # sRGB's red, as Display P3 has it
    ours = decoded(encoded(stored, "PNG", icc_profile=PROFILES["display p3"]))
    assert np.abs(ours - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("name", ["display p3", "adobe rgb", "grey 1.8"])
def test_a_profile_is_applied_to_the_resized_pixels(name: str) -> None:
    mode = MODE_OF[PROFILES[name][16:20]]
    image = sample(90, 60, mode)
    stored = decoded(encoded(image, "PNG"), SMALL)
    ours = decoded(encoded(image, "PNG", icc_profile=PROFILES[name]), SMALL)
    assert np.abs(ours - in_srgb(stored, name)).max() <= 1


def test_a_profile_and_an_orientation_go_together() -> None:
    for value in range(1, 9):
        options = {"exif": orientation(value), "icc_profile": PROFILES["adobe rgb"]}
        stored = decoded(encoded(sample(75, 50), "PNG", exif=orientation(value)), SMALL)
        ours = decoded(encoded(sample(75, 50), "PNG", **options), SMALL)
        assert np.abs(ours - in_srgb(stored, "adobe rgb")).max() <= 1


def test_greyscale_of_every_depth_has_its_profile_applied() -> None:
    profile = PROFILES["grey 1.8"]
    ramp = np.tile(np.arange(SIDE, dtype=np.uint8) * 8, (SIDE, 1))
    deep = png(
        ramp.astype(">u2") * 257, 16, 0, png_chunk(b"iCCP", b"x\0\0" + zlib.compress(profile))
    )
    expected = in_srgb(ramp, "grey 1.8")[..., None]
    for content in (encoded(Image.fromarray(ramp), "PNG", icc_profile=profile), deep):
        assert np.abs(decoded(content) - expected).max() <= 1
    bits = decoded(encoded(sample(mode="1"), "PNG", icc_profile=profile))
    assert {*bits.reshape(-1)} == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_an_image_with_a_profile_is_composited_on_white_first(mode: str) -> None:
    name = "grey 1.8" if mode == "LA" else "display p3"
    image = sample(mode=mode)
    options = {"transparency": 3} if mode == "P" else {}
    stored = decoded(encoded(image, "PNG", **options))
    ours = decoded(encoded(image, "PNG", icc_profile=PROFILES[name], **options))
    expected = in_srgb(stored[..., :1] if mode == "LA" else stored, name)
    assert np.abs(ours - expected).max() <= 1
    assert (ours[stored.min(-1) == 255] == 255).all()  # white stays white


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks_have_the_colours_of_their_profile(kind: str) -> None:
    for ink, expected in zip(INKS, lab_in_srgb(ink_lab(INKS, 0)), strict=True):
        image = Image.new("CMYK", (SIDE, SIDE), tuple(int(255 * part) for part in ink))
        ours = decoded(encoded(image, kind, icc_profile=ink_profile()))
        assert np.abs(ours - expected).max() <= 2, ink


def test_black_ink_that_is_only_dark_grey_becomes_black() -> None:
    image = Image.new("CMYK", (SIDE, SIDE), (255, 255, 255, 255))
    ours = decoded(encoded(image, "TIFF", icc_profile=ink_profile(darkest=20)))
    assert ours.max() <= 2


SRGB_TABLE = np.rint(from_srgb_curve(np.arange(1024) / 1023) * 65535).astype(">u2").tobytes()
SRGB_BY_ANY_NAME = {
    "LittleCMS's": ("RGB", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    "a formula": ("RGB", rgb_profile(SRGB, SRGB_CURVE)),
    "a table": ("RGB", rgb_profile(SRGB, b"curv" + struct.pack(">II", 0, 1024) + SRGB_TABLE)),
    "grey": ("L", grey_profile(SRGB_CURVE)),
}


@pytest.mark.parametrize("name", list(SRGB_BY_ANY_NAME))
def test_with_a_profile_that_is_srgb_nothing_changes(name: str) -> None:
    mode, profile = SRGB_BY_ANY_NAME[name]
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    plain = decoded(encoded(image, "PNG"), SMALL)
    assert (decoded(encoded(image, "PNG", icc_profile=profile), SMALL) == plain).all()


def test_srgb_with_another_curve_is_another_space() -> None:
    image = Image.new("RGB", (SIDE, SIDE), (20, 20, 20))
    ours = decoded(encoded(image, "PNG", icc_profile=rgb_profile(SRGB, gamma_curve(2.2))))
    assert np.abs(ours - to_srgb(20, 2.2)).max() <= 1
    assert ours.max() < 20


def to_srgb(value: int, gamma: float) -> float:
    return float(255 * (1.055 * ((value / 255) ** gamma) ** (1 / 2.4) - 0.055))


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *(("L", "display p3"), ("L", "ink"), ("RGB", "grey 1.8"), ("RGB", "ink")),
        *(("CMYK", "adobe rgb"), ("CMYK", "grey 1.8"), ("LAB", "display p3"), ("I;16", "ink")),
    ],
)
def test_a_profile_of_another_colour_space_is_ignored(mode: str, name: str) -> None:
    deep = Image.fromarray(EVERY_16_BITS.astype(np.uint16))
    image = (
        deep if mode == "I;16" else Image.frombytes(mode, (16, 16), bytes(range(256)) * len(mode))
    )
    if mode == "CMYK":
        image = sample(mode=mode)
    plain = decoded(encoded(image, "TIFF"))
    assert (decoded(encoded(image, "TIFF", icc_profile=PROFILES[name])) == plain).all()


def test_a_corrupted_profile_is_ignored() -> None:
    image, profile = sample(), PROFILES["display p3"]
    plain = decoded(encoded(image, "PNG"))
    for corrupted in (
        *(profile[:cut] for cut in (1, 20, 100, 130, 200)),
        *(profile[:36] + b"nope" + profile[40:], profile.replace(b"rTRC", b"xxxx")),
        *(bytes(len(profile)), profile[:128] + b"\xff" * 300, b"\xff" * 300),
    ):
        assert (decoded(encoded(image, "PNG", icc_profile=corrupted)) == plain).all()


def test_a_profile_of_unusual_size_is_ignored() -> None:
    huge = PROFILES["adobe rgb"].ljust(colour._MAX_PROFILE_BYTES + 1, b"\0")
    assert colour.conversion(huge, "RGB", "RGB") is None
    assert colour.conversion(huge[:-1], "RGB", "RGB") is not None
    colour._transform.cache_clear()


def test_one_transform_serves_many_threads_and_few_are_kept() -> None:
    gammas = [1.2 + n / 20 for n in range(20)]
    profiles = [rgb_profile(SRGB, gamma_curve(gamma)) for gamma in gammas]
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    contents = [encoded(Image.fromarray(noise), "PNG", icc_profile=each) for each in profiles]
    alone = [decoded(content) for content in contents]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(decoded, contents[-8:] * 20 + contents))
    for pixels, expected in zip(together, alone[-8:] * 20 + alone, strict=True):
        assert (pixels == expected).all()
    kept = colour._transform.cache_info()
    assert kept.maxsize is not None
    assert kept.currsize <= kept.maxsize < len(profiles)
