"""HEIC is decoded by pillow-heif, which is optional."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageOps, features
from support.icc_profiles import (
    PROFILES,
    in_srgb,
)
from support.image_files import (
    EVERY_16_BITS,
    FILES,
    IMAGENET,
    RULES,
    SIDE,
    SMALL,
    decoded,
    error_of,
    heic,
    orientation,
    sample,
    torchvision_pixels,
)

from r2ncli.images import heif
from r2ncli.images.decode import decode


@pytest.mark.parametrize("value", range(1, 9))
def test_a_turned_heic_is_put_upright_once(value: int) -> None:
    image = sample(72, 48)
    content = heic(image, exif=orientation(value).tobytes(), quality=90)
    image.info["exif"] = orientation(value).tobytes()
    upright = ImageOps.exif_transpose(image)
    assert upright.width == (48 if value > 4 else 72)
    reference = torchvision_pixels(upright, SMALL.resize_size, SMALL.image_size)
    ours = decoded(content, SMALL)
    assert np.abs(ours - reference)[..., :2].mean() < 4  # a lossy codec, of blue most
    assert np.abs(ours[::-1, ::-1] - reference)[..., :2].mean() > 40


def test_the_orientation_of_a_heic_is_its_containers_and_not_its_exifs() -> None:
    content = heic(sample(72, 48), exif=orientation(6).tobytes())
    turn = content.index(b"irot") + 4
    lying = content[:turn] + b"\0" + content[turn + 1 :]  # EXIF still says 6
    assert np.abs(decoded(lying) - decoded(heic(sample(72, 48)))).max() <= 2


def test_a_heic_of_several_images_gives_its_primary_one() -> None:
    several = pillow_heif.HeifFile()
    for name in ("red", "green", "blue"):
        several.add_from_pillow(Image.new("RGB", (64, 64), name))
    content = io.BytesIO()
    several.save(content, primary_index=2)
    assert np.abs(decoded(content.getvalue()) - [0, 0, 255]).max() <= 4


def test_a_heic_of_a_phone_keeps_its_colours() -> None:
    stored = decoded(heic(sample(), quality=95))
    ours = decoded(heic(sample(), quality=95, icc_profile=PROFILES["display p3"]))
    assert np.abs(ours - in_srgb(stored, "display p3")).max() <= 1


def test_a_heic_of_ten_bits_of_grey_is_read_by_its_depth() -> None:
    deep = Image.fromarray(EVERY_16_BITS.repeat(2, 0).repeat(2, 1).astype(np.uint16))
    assert np.abs(decoded(heic(deep, quality=100))[..., 0] - EVERY_16_BITS / 257).max() <= 3


@pytest.mark.parametrize(
    ("major", "compatible", "is_heif"),
    [
        (b"heic", [b"mif1", b"heic"], True),
        (b"heix", [], True),
        (b"heic", [b"mif1", b"avif"], True),
        (b"mif1", [b"mif1", b"heic"], True),
        (b"mif1", [b"mif1"], True),
        (b"msf1", [b"hevc"], True),
        (b"mif1", [b"avif", b"heic"], True),
        (b"mif1", [b"mif1", b"avif", b"miaf"], False),
        (b"avif", [b"mif1", b"heic"], False),
        (b"avis", [b"msf1"], False),
        (b"mp42", [b"isom", b"mp42"], False),
        (b"qt  ", [], False),
    ],
)
def test_the_brands_tell_heic_from_avif(
    major: bytes, compatible: list[bytes], is_heif: bool
) -> None:
    brands = b"".join(compatible)
    head = struct.pack(">I4s4sI", 16 + len(brands), b"ftyp", major, 0) + brands + b"heic"
    assert heif.is_heic(head) == is_heif


def test_the_content_of_a_file_decides_between_heic_and_avif() -> None:
    generic = FILES["heic"].replace(b"ftypheic", b"ftypmif1", 1)
    assert (decoded(generic) == decoded(FILES["heic"])).all()
    if features.check("avif"):
        generic = FILES["avif"].replace(b"ftypavif", b"ftypmif1", 1)
        assert (decoded(generic) == decoded(FILES["avif"])).all()


def test_without_pillow_heif_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert error_of(FILES["heic"]) == "HEIC support is not installed: pip install pillow-heif"
    assert decoded(FILES["png"]).shape == (SIDE, SIDE, 3)


def test_pillow_heif_is_imported_for_the_first_heic_and_is_not_registered_with_pillow() -> None:
    program = (
        "import pickle, sys; from concurrent.futures import ThreadPoolExecutor\n"
        "from PIL import Image; Image.init()\n"
        "from r2ncli.architectures import Preprocessing\n"
        "from r2ncli.images.decode import DecodeRules, decode\n"
        "png, heic = pickle.load(sys.stdin.buffer)\n"
        "read = lambda content: decode(content, Preprocessing(), DecodeRules('exact')).mean()\n"
        "read(png); assert 'pillow_heif' not in sys.modules\n"
        "known = dict(Image.OPEN), dict(Image.SAVE), dict(Image.EXTENSION)\n"
        "with ThreadPoolExecutor(8) as threads: print(*set(threads.map(read, [heic] * 32)))\n"
        "assert 'pillow_heif' in sys.modules\n"
        "assert known == (Image.OPEN, Image.SAVE, Image.EXTENSION)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps([FILES["png"], FILES["heic"]]),
        capture_output=True,
        check=True,
    )
    assert float(done.stdout) == decode(FILES["heic"], IMAGENET, RULES).mean()
    assert done.stderr == b""
