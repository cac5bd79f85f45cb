"""The header of a JPEG decides whether a GPU or the CPU decodes it."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.icc_profiles import PROFILES, SRGB, SRGB_CURVE, rgb_profile
from support.jpegs import (
    FOR_GPU,
    SOF0,
    frame,
    jpeg,
    patched,
    with_segment,
    with_size,
)

from r2ncli.images.decode import DecodeRules, header_rules
from r2ncli.images.jpeg import for_gpu

RULES = DecodeRules("gpu")
FOR_CPU: dict[str, Callable[[], bytes]] = {
    "progressive": lambda: jpeg(progressive=True),
    "CMYK": lambda: jpeg(mode="CMYK"),
    "RGB": lambda: jpeg(keep_rgb=True),
    "RGB by its components": lambda: patched(
        patched(patched(jpeg(), frame(jpeg()) + 6, b"R"), frame(jpeg()) + 9, b"G"),
        frame(jpeg()) + 12,
        b"B",
    ),
    "Adobe's RGB": lambda: with_segment(jpeg(), 0xEE, b"Adobe\0d\0\0\0\0\0"),
    "4:1:1": lambda: patched(jpeg(), frame(jpeg()) + 7, b"\x41"),
    "twelve bits": lambda: patched(jpeg(), frame(jpeg()), b"\x0c"),
    "arithmetic coding": lambda: jpeg().replace(SOF0, b"\xff\xc9"),
    "a height that follows": lambda: with_size(jpeg(), 32, 0),
    "no width": lambda: with_size(jpeg(), 0, 32),
    "too wide": lambda: with_size(jpeg(), 16385, 4),
    "too high for its width": lambda: with_size(jpeg(), 20, 2001),
    "too many pixels": lambda: with_size(jpeg(), 16384, 16384),
    "truncated": lambda: jpeg()[:-40],
    "bytes after its end": lambda: jpeg() + b"\0",
    "bytes between markers": lambda: jpeg().replace(b"\xff\xdb", b"\xff\xff\xdb", 1),
    "one component in a scan": lambda: jpeg().replace(b"\xff\xda\0\x0c\3", b"\xff\xda\0\x08\1"),
    "no tables": lambda: jpeg().replace(b"\xff\xc4", b"\xff\xfe"),
    "two frames": lambda: with_segment(jpeg(), 0xC0, jpeg()[frame(jpeg()) :][:15]),
    "a segment beyond its end": lambda: patched(jpeg(), 4, b"\xff\xff"),
    "a segment shorter than its length": lambda: with_segment(jpeg(), 0xE5, b"").replace(
        b"\xe5\0\2", b"\xe5\0\1", 1
    ),
    "a part of a profile": lambda: with_segment(jpeg(), 0xE2, b"ICC_PROFILE\0\1\2" + bytes(99)),
    "nothing but markers": lambda: b"\xff\xd8\xff\xd9",
    "nothing": lambda: b"",
    "PNG": lambda: b"\x89PNG\r\n\x1a\n" + bytes(20),
}


@pytest.mark.parametrize("kind", FOR_GPU)
def test_a_gpu_decodes_the_usual_baseline_jpegs(kind: str) -> None:
    content = FOR_GPU[kind]()
    found = for_gpu(content, RULES)
    assert found is not None
    with Image.open(io.BytesIO(content)) as image:
        assert found.size == image.size
        assert found.grey == (image.mode == "L")
    assert found.content == found.encoded == content
    assert found.orientation == 1
    assert (found.to_srgb is not None) == (kind == "another profile")


@pytest.mark.parametrize("kind", FOR_CPU)
def test_everything_else_is_decoded_on_the_cpu(kind: str) -> None:
    assert for_gpu(jpeg(), RULES) is not None
    assert for_gpu(FOR_CPU[kind](), RULES) is None


def test_an_image_beyond_the_limit_is_left_to_the_cpu_to_refuse() -> None:
    assert for_gpu(jpeg((20, 10)), DecodeRules("gpu", max_pixels=200)) is not None
    assert for_gpu(jpeg((20, 10)), DecodeRules("gpu", max_pixels=199)) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_gpu_decodes_an_image_as_stored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = jpeg((40, 20), exif=exif)
    found = for_gpu(content, RULES)
    assert found is not None
    assert (found.content, found.size, found.orientation) == (content, (40, 20), orientation)
    assert b"Exif" in content
    assert found.encoded == jpeg((40, 20))


@pytest.mark.parametrize("name", ["display p3", "grey 1.8", "ink"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_profile_is_used_as_on_the_cpu(name: str, mode: str) -> None:
    profile = PROFILES[name]
    for content in (
        jpeg(mode=mode, icc_profile=profile),
        jpeg(mode=mode, icc_profile=profile + bytes(70_000)),  # in two segments
        jpeg(mode=mode, icc_profile=profile[:200]),
    ):
        found = for_gpu(content, RULES)
        assert found is not None
        assert (found.to_srgb is None) == (header_rules(content)[1] is None)


@given(st.data())
@settings(max_examples=300, deadline=None)
@pytest.mark.filterwarnings("ignore")  # Pillow's asides about metadata; r2n ignores them too
def test_an_orientation_is_found_wherever_pillow_finds_one(data: st.DataObject) -> None:
    order = data.draw(st.sampled_from(["<", ">"]))
    tags = data.draw(st.lists(st.sampled_from([0x0112, 0x010F, 0x1201, 0x0312]), max_size=4))
    entry = st.tuples(st.sampled_from([1, 3, 3, 3, 4]), st.integers(0, 2), st.integers(0, 9))
    entries = b"".join(
        struct.pack(order + "HHIHH", tag, *data.draw(entry), data.draw(st.integers(0, 0x1201)))
        for tag in tags
    )
    mark = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    exif = b"Exif\0\0" + mark + struct.pack(order + "H", len(tags)) + entries + bytes(4)
    content = with_segment(jpeg((40, 20)), 0xE1, exif)
    if data.draw(st.booleans()):
        value = data.draw(st.integers(1, 8))
        form = data.draw(st.sampled_from(['<a tiff:Orientation="%d"/>', "<tiff:Orientation>%d</"]))
        xmp = (form % value).encode()
        content = with_segment(content, 0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp)
    found = for_gpu(content, RULES)
    if found is not None:
        assert found.orientation == header_rules(content)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("at", [6, 10, 14, 16, 22, 24])
@pytest.mark.parametrize("value", [b"\0", b"\xff"])
def test_corrupted_exif_is_read_as_on_the_cpu(at: int, value: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = jpeg((40, 20), exif=exif)
    content = patched(content, content.index(b"Exif") + at, value)
    found = for_gpu(content, RULES)
    assert found is not None
    assert found.orientation == header_rules(content)[0]
    assert b"Exif" not in found.encoded


@pytest.mark.filterwarnings("ignore")
@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_corrupted_header_is_never_an_error(data: st.DataObject) -> None:
    content = bytearray(
        jpeg((20, 10), exif=Image.Exif(), icc_profile=rgb_profile(SRGB, SRGB_CURVE)[:200])
    )
    scan = content.index(b"\xff\xda") + 14
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, scan))] = data.draw(st.integers(0, 255))
    found = for_gpu(bytes(content), RULES)
    assert found is None or min(found.size) > 0
