"""The table of decoders: suffixes, versions, advice and decoding all follow from its rows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import features
from support.image_files import encoded, heic, sample

from r2ncli.architectures import Preprocessing
from r2ncli.images import decoders
from r2ncli.images.decode import DecodeRules, decode
from r2ncli.images.decoders import SUFFIXES, decoder_versions, may_be_added
from r2ncli.outputs.record import differing_settings, fingerprint, in_words
from r2ncli.sources.walk import find_images

SIDE = 32
RULES = DecodeRules("exact")
AS_STORED = Preprocessing(image_size=SIDE, resize_size=SIDE, crop="none")

# --- suffixes --------------------------------------------------------------------------


def animated(kind: str) -> bytes:
    """An animation whose first frame is the test image."""
    return encoded(sample(), kind, save_all=True, append_images=[sample().rotate(180)])


def with_brand(content: bytes, brand: bytes) -> bytes:
    """A file of the ISO base media format with another major brand."""
    assert content[4:8] == b"ftyp"
    return content[:8] + brand + content[12:]


def jpx() -> bytes:
    """A JPEG 2000 file that declares itself to be a JPX."""
    content = encoded(sample(), "JPEG2000")
    assert content.count(b"ftypjp2 ") == 1
    return content.replace(b"ftypjp2 ", b"ftypjpx ")


def codestream() -> bytes:
    """JPEG 2000 without a container."""
    return encoded(sample(), "JPEG2000", no_jp2=True)


EXAMPLES: dict[str, Callable[[], bytes]] = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), lambda: encoded(sample(), "JPEG")),
    ".mpo": lambda: animated("MPO"),
    ".png": lambda: encoded(sample(), "PNG"),
    ".apng": lambda: animated("PNG"),
    ".webp": lambda: encoded(sample(), "WEBP"),
    ".gif": lambda: encoded(sample(), "GIF"),
    ".bmp": lambda: encoded(sample(), "BMP"),
    ".dib": lambda: encoded(sample(), "DIB"),
    **dict.fromkeys((".tif", ".tiff"), lambda: encoded(sample(), "TIFF")),
    **dict.fromkeys((".heic", ".heif"), lambda: heic(sample())),
    ".hif": lambda: with_brand(heic(sample()), b"heix"),
    ".heics": lambda: with_brand(heic(sample()), b"hevc"),
    ".avif": lambda: encoded(sample(), "AVIF"),
    ".avifs": lambda: animated("AVIF"),
    ".jp2": lambda: encoded(sample(), "JPEG2000"),
    **dict.fromkeys((".jpx", ".jpf"), jpx),
    **dict.fromkeys((".j2k", ".j2c", ".jpc"), codestream),
    ".ico": lambda: encoded(sample(mode="RGB"), "ICO", sizes=[(SIDE, SIDE)]),
    **dict.fromkeys((".ppm", ".pnm"), lambda: encoded(sample(), "PPM")),
    ".pgm": lambda: encoded(sample(mode="L"), "PPM"),
    ".pbm": lambda: encoded(sample(mode="1"), "PPM"),
}
OPTIONAL = {".webp": "webp", ".avif": "avif", ".avifs": "avif"}
OPTIONAL |= dict.fromkeys((".jp2", ".jpx", ".jpf", ".j2k", ".j2c", ".jpc"), "jpg_2000")


def test_every_suffix_has_an_example_here() -> None:
    assert set(EXAMPLES) == set(SUFFIXES)
    assert len(SUFFIXES) == len(set(SUFFIXES))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_of_every_suffix_is_found_in_a_folder_and_decoded(
    suffix: str, tmp_path: Path
) -> None:
    if suffix in OPTIONAL and not features.check(OPTIONAL[suffix]):
        pytest.skip(f"this Pillow has no {OPTIONAL[suffix]}")
    (tmp_path / f"image{suffix}").write_bytes(EXAMPLES[suffix]())
    [found] = find_images([str(tmp_path)], print)
    pixels = decode(Path(found.name).read_bytes(), AS_STORED, RULES).astype(int)
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    expected = np.asarray(sample(mode=mode).convert("RGB")).astype(int)
    # red and green alone, which are smooth: lossy formats blur the checks of blue
    assert np.abs(pixels - expected)[..., :2].mean() < 6
    assert np.abs(pixels[::-1, ::-1] - expected)[..., :2].mean() > 40


def test_a_dib_with_the_header_of_a_bmp_is_decoded() -> None:
    content = encoded(sample(), "BMP")
    assert (decode(content, AS_STORED, RULES) == np.asarray(sample())).all()


# --- a new row -----------------------------------------------------------------------------

NEW_ROW = """DECODERS = (
    Decoder(
        "PLAIN",
        (".plain",),
        lambda: __import__("plain").CODEC,
        (Library("libplain", lambda: "1.5", may_be_absent=True),),
        package="plain",
    ),
"""
PLAIN = """
from PIL import Image
from r2ncli.images.decoders import Codec

def open_image(content):
    if content[5:] == b"absent":
        raise ImportError
    return Image.new("RGB", (9, 9), tuple(content[5:8]))

CODEC = Codec(lambda head: head[:5] == b"PLAIN", open_image, lambda image, content: image.load())
"""
PROGRAM = """
from pathlib import Path
from r2ncli.architectures import Preprocessing
from r2ncli.errors import ImageError
from r2ncli.images.decode import DecodeRules, decode
from r2ncli.images.decoders import decoder_versions, may_be_added
from r2ncli.sources.walk import find_images

Path("folder").mkdir()
Path("folder/a.plain").write_bytes(b"PLAIN" + bytes([200, 100, 50]))
Path("folder/b.other").write_bytes(b"")
[found] = find_images(["folder"], print)
print(found.name)
print(*decode(Path(found.name).read_bytes(), Preprocessing(), DecodeRules("auto"))[0, 0])
print(decoder_versions()["libplain"], "libplain" in may_be_added())
try:
    decode(b"PLAINabsent", Preprocessing(), DecodeRules("auto"))
except ImageError as error:
    print(error)
"""


def test_a_new_format_needs_a_new_row_and_nothing_else(tmp_path: Path) -> None:
    """The package with one more row in its table finds, decodes and records a new format."""
    source = Path(decoders.__file__).read_text(encoding="utf-8")
    assert source.count("DECODERS = (") == 1
    (tmp_path / "table.py").write_text(source.replace("DECODERS = (", NEW_ROW, 1))
    (tmp_path / "plain.py").write_text(PLAIN)
    start = "import sys, table; sys.modules['r2ncli.images.decoders'] = table\n"
    done = subprocess.run(
        [sys.executable, "-c", start + PROGRAM],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "folder/a.plain",
        "200 100 50",
        "1.5 True",
        "PLAIN support is not installed: pip install plain",
    ], done.stderr


def test_reading_the_table_imports_no_decoder() -> None:
    program = "import sys, r2ncli.images.decoders, r2ncli.sources.selection; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"PIL", "numpy", "pillow_heif"} & set(done.stdout.split())


# --- versions ------------------------------------------------------------------------------


def test_the_versions_are_those_of_every_library_that_decides_pixels() -> None:
    assert decoder_versions() == {
        "pillow": version("pillow"),
        "libjpeg": features.version("libjpeg_turbo") or features.version("jpg"),
        "littlecms2": features.version("littlecms2"),
        "pillow-heif": version("pillow-heif"),
    }
    assert list(decoder_versions()) == ["pillow", "libjpeg", "littlecms2", "pillow-heif"]


def test_the_version_of_a_library_that_is_not_installed_is_none() -> None:
    assert decoders.installed_version("no-such-distribution-of-anything") is None


def test_a_retry_may_find_decoders_added_but_no_change_of_colours() -> None:
    assert may_be_added() == {"libjpeg", "pillow-heif"}


# --- the version of the rules ----------------------------------------------------------------


def test_a_record_with_rules_in_words_differs_by_the_version_and_nothing_else() -> None:
    limits = {"decode": "auto", "max_pixels": 200_000_000, "max_bytes": 512_000_000}
    older = {"decode_rules": {**limits, "frame": "first; HEIF primary", "alpha": "on white"}}
    newer = {"decode_rules": {**limits, "version": DecodeRules("auto").version}}
    assert fingerprint(older) != fingerprint(newer)
    assert in_words(differing_settings(older, newer)) == "decode_rules version was None, is 2"


def test_records_with_the_same_rules_in_words_do_not_differ() -> None:
    older = {"decode_rules": {"decode": "auto", "frame": "first", "alpha": "on white"}}
    assert differing_settings(older, older) == {}


def test_the_mode_of_decoding_has_no_default_here() -> None:
    with pytest.raises(TypeError, match="decode"):
        DecodeRules()  # type: ignore[call-arg]
