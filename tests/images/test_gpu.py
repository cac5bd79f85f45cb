"""JPEGs decoded and resized on a card are what the CPU makes of the same pixels.

Without a card torchcodec decodes on the CPU, by libjpeg-turbo as Pillow does, and triton
interprets the kernel: what a row is then made of must equal `--decode exact` in every bit.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.icc_profiles import PROFILES
from support.jpegs import FOR_CARD, jpeg, patched

from r2ncli import predictor
from r2ncli.architectures import Preprocessing
from r2ncli.errors import DeviceError, UsageError
from r2ncli.images.decode import DecodeRules, decode
from r2ncli.images.jpeg import Jpeg, for_card
from r2ncli.pipeline import open_walk, run
from r2ncli.predictor import Pipeline, open_classifier
from r2ncli.runs import run_record

triton = pytest.importorskip("triton")
pytest.importorskip("torchcodec")

SIDE = 32
SMALL = Preprocessing(image_size=SIDE, resize_size=36)
RULES, EXACT = DecodeRules("gpu"), DecodeRules("exact")

NUMPY, TRITON = (tuple(map(int, v.split(".")[:2])) for v in (np.__version__, triton.__version__))
needs_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


def card_decoding(*, interpreted: bool) -> Any:
    """The module: one more, beside that of the other tests, with its kernel as is wanted."""
    name = "r2ncli.images.gpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpreted)))  # counts where one is defined
        real = sys.modules.pop(name, None)
        module = importlib.import_module(name)
        del sys.modules[name]
        if real is not None:
            sys.modules[name] = real
    return module


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Any]:
    """The module with its kernel interpreted, on the CPU."""
    if TRITON < (3, 7) and NUMPY >= (2, 4):
        pytest.skip("this triton's interpreter does not know this numpy")
    module = card_decoding(interpreted=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", SIDE * SIDE)  # interpreting takes as long for a wide one
        yield module


@pytest.fixture
def on_cpu(interpreted: Any) -> Any:
    return interpreted.CardDecoder([torch.device("cpu")], SMALL, RULES)


def accepted(content: bytes) -> Jpeg:
    found = for_card(content, RULES)
    assert found is not None
    return found


def exact(content: bytes, preprocessing: Preprocessing = SMALL) -> Any:
    return decode(content, preprocessing, EXACT)


def damaged() -> bytes:
    """A JPEG with the header of a whole one, whose Huffman table cannot be."""
    content = jpeg()
    table = content.index(b"\xff\xc4") + 5
    return patched(content, table, b"\xff" * 16)


# --- resizing -----------------------------------------------------------------------------


def geometries() -> list[tuple[tuple[int, int], Preprocessing]]:
    """Sizes and crops: larger and smaller than the network's input, in every shape."""
    random = np.random.default_rng(0)
    sizes = [(SIDE, SIDE), (36, 36), (1, 1), (1, 90), (90, 1), (33, 300), (300, 33), (40, 61)]
    sizes += [(int(w), int(h)) for w, h in random.integers(2, 150, (12, 2))]
    sizes += [(int(w), int(2.2 * w)) for w in random.integers(20, 100, 3)]
    crops = [
        SMALL,
        replace(SMALL, crop="square"),
        Preprocessing(SIDE, SIDE, crop="square"),
        replace(SMALL, crop="none"),
    ]
    return [(size, crops[i % len(crops)]) for i, size in enumerate(sizes * 2)]


def resized(module: Any, device: str) -> Iterator[tuple[Any, Any]]:
    """Random pixels of every geometry, resized by Pillow and by the kernel, in batches."""
    random = np.random.default_rng(1)
    for crop in {preprocessing for _, preprocessing in geometries()}:
        card = next(module.CardDecoder([torch.device(device)], crop, RULES)._turns)
        sizes = [size for size, preprocessing in geometries() if preprocessing == crop]
        pictures, jpegs, expected = {}, {}, []
        for row, (width, height) in enumerate(sizes):
            orientation = row % 8 + 1
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            box = module.stored_box((width, height), orientation, crop)
            image = Image.fromarray(pixels)
            expected.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)))
            planes = torch.from_numpy(pixels).permute(2, 0, 1)
            # as libjpeg leaves them, and as nvJPEG does
            pictures[row] = (planes if row % 2 else planes.contiguous()).to(device)
            jpegs[row] = Jpeg(b"", b"", (width, height), False, orientation, None)
        squares = torch.zeros((len(sizes), SIDE, SIDE, 3), dtype=torch.uint8, device=device)
        card._resize(pictures, jpegs, squares)
        yield np.stack(expected), squares.cpu().numpy()


def test_a_resize_is_pillows_to_the_last_bit(interpreted: Any) -> None:
    for expected, ours in resized(interpreted, "cpu"):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.cuda
@needs_card
def test_a_resize_on_a_card_is_pillows_to_the_last_bit() -> None:
    for expected, ours in resized(card_decoding(interpreted=False), "cuda"):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_cards_that_are_not_here(capability: int, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = card_decoding(interpreted=False)._resize_all
    types = {"pictures": "*i64", "tables": "*i32", "squares": "*u8", "side": "i32"}
    source = ASTSource(kernel, {**types, "block": "constexpr"}, {"block": 256})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    assert f"sm_{capability}" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0


# --- decoding -------------------------------------------------------------------------------


def test_every_jpeg_for_a_card_is_what_exact_makes_of_it(on_cpu: Any) -> None:
    contents = [make() for make in FOR_CARD.values()]
    contents += [jpeg((60, 47), "L", icc_profile=PROFILES["grey 1.8"])]
    pixels = np.zeros((len(contents), SIDE, SIDE, 3), np.uint8)
    assert on_cpu(dict(enumerate(map(accepted, contents))), pixels) == []
    for content, ours in zip(contents, pixels, strict=True):
        np.testing.assert_array_equal(ours, exact(content))


@pytest.mark.parametrize("profile", [None, PROFILES["adobe rgb"]])
def test_pictures_come_out_upright(on_cpu: Any, profile: bytes | None) -> None:
    contents = []
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        contents.append(jpeg((61, 40), exif=exif, icc_profile=profile))
    pixels = np.zeros((len(contents), SIDE, SIDE, 3), np.uint8)
    assert on_cpu(dict(enumerate(map(accepted, contents))), pixels) == []
    for content, ours in zip(contents, pixels, strict=True):
        np.testing.assert_array_equal(ours, exact(content))
    assert len(np.unique(pixels, axis=0)) == 8


def test_rows_that_are_not_asked_for_are_left_alone(on_cpu: Any) -> None:
    rows = (0, 2, 3, 6)
    jpegs = {row: accepted(jpeg((40 + row, 50))) for row in rows}
    pixels = np.full((8, SIDE, SIDE, 3), 77, np.uint8)
    assert on_cpu(jpegs, pixels) == []
    for row in range(8):
        expected = exact(jpegs[row].content) if row in rows else 77
        np.testing.assert_array_equal(pixels[row], np.broadcast_to(expected, pixels[row].shape))


def test_damaged_pictures_are_told_and_their_neighbours_do_not_notice(on_cpu: Any) -> None:
    whole = {row: accepted(jpeg((40 + row, 50))) for row in (0, 1, 3, 4, 6)}
    jpegs = {**whole, 2: accepted(damaged()), 5: accepted(damaged())}
    pixels = np.full((8, SIDE, SIDE, 3), 77, np.uint8)
    assert sorted(on_cpu(jpegs, pixels)) == [2, 5]
    for row, found in whole.items():
        np.testing.assert_array_equal(pixels[row], exact(found.content))
    assert (pixels[[2, 5]] == 77).all()


def test_a_picture_of_another_size_than_declared_is_refused(on_cpu: Any) -> None:
    lying = replace(accepted(jpeg((40, 50))), size=(50, 40))
    pixels = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    assert on_cpu({0: lying}, pixels) == [0]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_a_batch_too_large_for_the_memory_is_decoded_in_parts(on_cpu: Any, most: int) -> None:
    real = next(on_cpu._turns)._decode_jpeg

    def too_little_memory(encoded: list[torch.Tensor], **options: Any) -> Any:
        if len(encoded) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(encoded, **options)

    next(on_cpu._turns)._decode_jpeg = too_little_memory
    jpegs = {row: accepted(jpeg((40 + row, 50))) for row in range(7)}
    pixels = np.zeros((7, SIDE, SIDE, 3), np.uint8)
    assert on_cpu(jpegs, pixels) == []
    for row, found in jpegs.items():
        np.testing.assert_array_equal(pixels[row], exact(found.content))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("nvjpegDecode failed: 5"),
        torch.AcceleratorError("an illegal memory access was encountered"),
    ],
)
def test_a_card_that_fails_is_no_damaged_picture(on_cpu: Any, error: RuntimeError) -> None:
    def failing(_encoded: list[torch.Tensor], **_options: Any) -> Any:
        raise error

    next(on_cpu._turns)._decode_jpeg = failing
    with pytest.raises(DeviceError, match=r"^cpu(: out of memory| failed) while decoding"):
        on_cpu({0: accepted(jpeg())}, np.zeros((1, SIDE, SIDE, 3), np.uint8))


def test_no_more_pixels_are_decoded_at_once_than_memory_is_meant_for(interpreted: Any) -> None:
    large, small = (accepted(jpeg()) for _ in range(2))
    large = replace(large, size=(8000, 8000))
    jpegs = {0: large, 2: large, 3: small, 5: large, 6: small, 9: small}
    assert list(interpreted._parts(jpegs)) == [[0, 2, 3], [5, 6, 9]]
    assert list(interpreted._parts({})) == []


def test_neighbouring_rows_are_copied_together(interpreted: Any) -> None:
    assert list(interpreted._runs([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 6), (7, 9)]
    assert list(interpreted._runs([])) == []


@pytest.mark.cuda
@needs_card
def test_nvjpegs_pixels_are_near_libjpegs(capsys: pytest.CaptureFixture[str]) -> None:
    """Within a grey level in the mean, by sampling and size.

    The bound is what README promises of reduced decoding too. It was set without a card at
    hand: the figures that this prints on one are the first to be measured.
    """
    imagenet = Preprocessing()
    decoder = card_decoding(interpreted=False).CardDecoder([torch.device("cuda")], imagenet, RULES)
    random = np.random.default_rng(0)
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        for size in ((500, 375), (320, 480), (1600, 1200)):
            coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
            content = io.BytesIO()
            smooth = coarse.resize(size, Image.Resampling.BICUBIC)
            smooth.save(content, "JPEG", quality=90, subsampling=subsampling)
            pixels = np.zeros((1, 224, 224, 3), np.uint8)
            assert decoder({0: accepted(content.getvalue())}, pixels) == []
            expected = exact(content.getvalue(), imagenet).astype(int)
            differences = np.abs(pixels[0] - expected)
            with capsys.disabled():
                mean, most = differences.mean(), differences.max()
                print(f"\n{subsampling} {size}: mean {mean:.3f}, at most {most}", end="")
            assert differences.mean() <= 1


# --- a run ----------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A folder of what a card decodes, what it does not, and what nobody can read."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}a.jpg").write_bytes(jpeg((40 + i, 60)))
        (folder / f"{i}b.jpg").write_bytes(jpeg((60, 40 + i), progressive=True))
    (folder / "2c.jpg").write_bytes(damaged())
    (folder / "2d.jpg").write_bytes(jpeg()[:-30])
    (folder / "3c.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("RGB", (50, 60), "teal").save(folder / "4c.png")
    return folder


@pytest.fixture
def pipelines(tiny_weights: Path, interpreted: Any) -> tuple[Pipeline, Pipeline]:
    """One that decodes as `--decode exact`, and the same with a decoder as a card's."""
    one = open_classifier(
        1, weights=tiny_weights, device="cpu", backend="torch", decode="exact", batch_size=4
    )
    rules = DecodeRules("gpu")
    decoder = interpreted.CardDecoder([torch.device("cpu")], one.preprocessing, rules)
    return one, replace(one, rules=rules, card_decoder=decoder)


def test_a_run_gives_the_rows_that_exact_gives(
    mixed: Path, pipelines: tuple[Pipeline, Pipeline]
) -> None:
    rows = []
    for one in pipelines:
        with open_walk([mixed]) as walk:
            rows.append(list(run(walk, one)))
    expected, ours = rows
    assert [(row.name, row.error) for row in ours] == [(row.name, row.error) for row in expected]
    assert [row.name[-6:-4] for row in ours if row.error] == ["2c", "2d", "3c"]
    for row, as_exact in zip(ours, expected, strict=True):
        assert row.outputs.keys() == as_exact.outputs.keys()
        for layer, values in row.outputs.items():
            np.testing.assert_array_equal(values, as_exact.outputs[layer])


def test_a_batch_goes_to_the_card_as_one(mixed: Path, pipelines: tuple[Pipeline, Pipeline]) -> None:
    batches: list[int] = []
    decoder: Any = pipelines[1].card_decoder

    class Counting:
        accept = decoder.accept

        def __call__(self, jpegs: Mapping[int, Jpeg], pixels: Any) -> list[int]:
            batches.append(len(jpegs))
            return list(decoder(jpegs, pixels))

    counting: Any = Counting()
    with open_walk([mixed]) as walk:
        assert len(list(run(walk, replace(pipelines[1], card_decoder=counting)))) == 14
    assert sum(batches) == 6  # five whole ones, and one that only a decoder finds damaged
    assert len(batches) <= 4


def test_a_card_that_fails_ends_the_run(mixed: Path, pipelines: tuple[Pipeline, Pipeline]) -> None:
    def failing(_encoded: list[torch.Tensor], **_options: Any) -> Any:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    decoder: Any = pipelines[1].card_decoder
    next(decoder._turns)._decode_jpeg = failing
    with open_walk([mixed]) as walk, pytest.raises(DeviceError, match="failed while decoding"):
        list(run(walk, pipelines[1]))


def test_the_decoder_and_its_version_are_in_the_record(
    pipelines: tuple[Pipeline, Pipeline],
) -> None:
    from importlib.metadata import version

    as_exact, on_card = (run_record("classify", one, {}) for one in pipelines)
    assert on_card["versions"]["torchcodec"] == version("torchcodec")
    assert on_card["decode_rules"]["decode"] == "gpu"
    assert on_card["fingerprint"] != as_exact["fingerprint"]
    assert "torchcodec" not in as_exact["versions"]


# --- what it needs --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_decoding_on_a_card_needs_a_card(tiny_weights: Path, backend: str) -> None:
    with pytest.raises(UsageError, match=r"^decode 'gpu' is for a CUDA card, and this runs on"):
        open_classifier(1, weights=tiny_weights, device="cpu", backend=backend, decode="gpu")


@pytest.mark.parametrize("library", ["torchcodec", "triton"])
def test_a_library_that_is_not_there_is_named(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: Callable[[str], Any] = predictor.find_spec
    monkeypatch.setattr(
        predictor, "find_spec", lambda name: None if name == library else there(name)
    )
    with pytest.raises(UsageError, match=rf"^decode 'gpu' needs {library}: pip install "):
        predictor._check_decoding({"decode": "gpu"}, "cuda")
    predictor._check_decoding({"decode": "exact"}, "cuda")


def test_cards_decode_in_turns(interpreted: Any) -> None:
    decoder = interpreted.CardDecoder([torch.device("cpu")] * 2, SMALL, RULES)
    found = decoder.accept(jpeg())
    batches = np.zeros((3, 1, SMALL.image_size, SMALL.image_size, 3), dtype=np.uint8)
    used = []
    for card in (next(decoder._turns), next(decoder._turns)):
        card._decode_jpeg = partial(noted, card._decode_jpeg, used, card)
    for batch in batches:
        assert decoder({0: found}, batch) == []
    assert used[0] is used[2] is not used[1]
    assert (batches == batches[0]).all()


def noted(decode_jpeg: Any, used: list[Any], card: Any, *arguments: Any, **options: Any) -> Any:
    used.append(card)
    return decode_jpeg(*arguments, **options)


def test_no_limit_on_pictures_is_in_the_way_of_the_first_look(interpreted: Any) -> None:
    decoder = interpreted.CardDecoder(
        [torch.device("cpu")], SMALL, DecodeRules("gpu", max_pixels=1, max_bytes=1)
    )
    assert decoder.accept(jpeg()) is None


def test_a_torchcodec_without_nvjpeg_is_told_at_the_start(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchcodec.decoders

    def without(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError("torchcodec was not compiled with nvJPEG support\nmore")

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", without)
    with pytest.raises(DeviceError, match="there: torchcodec was not compiled with nvJPEG support"):
        interpreted.CardDecoder([torch.device("cpu")], SMALL, RULES)
