"""JPEGs decoded and resized on a GPU equal those of the CPU, given the same decoded pixels.

Without a GPU, torchcodec decodes on the CPU with libjpeg-turbo, as Pillow does, and triton
interprets the kernel. The result must then equal `decode="exact"` bit for bit.
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
from support.jpegs import FOR_GPU, jpeg, patched

from r2ncli import predictor
from r2ncli.architectures import Preprocessing
from r2ncli.errors import DeviceError, UsageError
from r2ncli.images.decode import DecodeRules, decode
from r2ncli.images.jpeg import Jpeg, for_gpu
from r2ncli.options import NO_LISTENERS, RunOptions
from r2ncli.pipeline import Classify, run
from r2ncli.predictor import LOGITS, Predictor, open_predictor
from r2ncli.runs import Run, run_record
from r2ncli.sources.walk import Walk

triton = pytest.importorskip("triton")
pytest.importorskip("torchcodec")

SIDE = 32
SMALL = Preprocessing(image_size=SIDE, resize_size=36)
RULES, EXACT = DecodeRules("gpu"), DecodeRules("exact")

NUMPY, TRITON = (tuple(map(int, v.split(".")[:2])) for v in (np.__version__, triton.__version__))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def gpu_module(*, interpreted: bool) -> Any:
    """A second copy of the module, whose kernel is interpreted or compiled."""
    name = "r2ncli.images.gpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpreted)))  # read when a kernel is defined
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
    module = gpu_module(interpreted=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", SIDE * SIDE)  # a wide block takes no longer to interpret
        yield module


@pytest.fixture
def on_cpu(interpreted: Any) -> Any:
    return interpreted.GpuDecoder([torch.device("cpu")], SMALL, RULES)


def accepted(content: bytes) -> Jpeg:
    found = for_gpu(content, RULES)
    assert found is not None
    return found


def exact(content: bytes, preprocessing: Preprocessing = SMALL) -> Any:
    return decode(content, preprocessing, EXACT)


def corrupted() -> bytes:
    """A JPEG with an intact header and an invalid Huffman table."""
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
        gpu = next(module.GpuDecoder([torch.device(device)], crop, RULES)._turns)
        sizes = [size for size, preprocessing in geometries() if preprocessing == crop]
        images, jpegs, expected = {}, {}, []
        for row, (width, height) in enumerate(sizes):
            orientation = row % 8 + 1
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            box = module.stored_box((width, height), orientation, crop)
            image = Image.fromarray(pixels)
            expected.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)))
            planes = torch.from_numpy(pixels).permute(2, 0, 1)
            # as libjpeg leaves them, and as nvJPEG does
            images[row] = (planes if row % 2 else planes.contiguous()).to(device)
            jpegs[row] = Jpeg(b"", b"", (width, height), False, orientation, None)
        squares = torch.zeros((len(sizes), SIDE, SIDE, 3), dtype=torch.uint8, device=device)
        gpu._resize(images, jpegs, squares)
        yield np.stack(expected), squares.cpu().numpy()


def test_resizing_equals_pillow_bit_for_bit(interpreted: Any) -> None:
    for expected, ours in resized(interpreted, "cpu"):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.cuda
@needs_gpu
def test_resizing_on_a_gpu_equals_pillow_bit_for_bit() -> None:
    for expected, ours in resized(gpu_module(interpreted=False), "cuda"):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_other_gpus(capability: int, tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = gpu_module(interpreted=False)._resize_all
    types = {"images": "*i64", "tables": "*i32", "squares": "*u8", "side": "i32"}
    source = ASTSource(kernel, {**types, "block": "constexpr"}, {"block": 256})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    assert f"sm_{capability}" in compiled.asm["ptx"]
    assert len(compiled.asm["cubin"]) > 0


# --- decoding -------------------------------------------------------------------------------


def test_every_jpeg_for_a_gpu_equals_exact_decoding(on_cpu: Any) -> None:
    contents = [make() for make in FOR_GPU.values()]
    contents += [jpeg((60, 47), "L", icc_profile=PROFILES["grey 1.8"])]
    pixels = np.zeros((len(contents), SIDE, SIDE, 3), np.uint8)
    assert on_cpu(dict(enumerate(map(accepted, contents))), pixels) == []
    for content, ours in zip(contents, pixels, strict=True):
        np.testing.assert_array_equal(ours, exact(content))


@pytest.mark.parametrize("profile", [None, PROFILES["adobe rgb"]])
def test_images_come_out_upright(on_cpu: Any, profile: bytes | None) -> None:
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


def test_rows_without_a_jpeg_are_not_written(on_cpu: Any) -> None:
    rows = (0, 2, 3, 6)
    jpegs = {row: accepted(jpeg((40 + row, 50))) for row in rows}
    pixels = np.full((8, SIDE, SIDE, 3), 77, np.uint8)
    assert on_cpu(jpegs, pixels) == []
    for row in range(8):
        expected = exact(jpegs[row].content) if row in rows else 77
        np.testing.assert_array_equal(pixels[row], np.broadcast_to(expected, pixels[row].shape))


def test_corrupted_images_are_reported_and_their_neighbours_decoded(on_cpu: Any) -> None:
    whole = {row: accepted(jpeg((40 + row, 50))) for row in (0, 1, 3, 4, 6)}
    jpegs = {**whole, 2: accepted(corrupted()), 5: accepted(corrupted())}
    pixels = np.full((8, SIDE, SIDE, 3), 77, np.uint8)
    assert sorted(on_cpu(jpegs, pixels)) == [2, 5]
    for row, found in whole.items():
        np.testing.assert_array_equal(pixels[row], exact(found.content))
    assert (pixels[[2, 5]] == 77).all()


def test_an_image_of_another_size_than_declared_is_refused(on_cpu: Any) -> None:
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
def test_a_failure_of_the_gpu_is_not_reported_as_a_corrupted_image(
    on_cpu: Any, error: RuntimeError
) -> None:
    def failing(_encoded: list[torch.Tensor], **_options: Any) -> Any:
        raise error

    next(on_cpu._turns)._decode_jpeg = failing
    with pytest.raises(DeviceError, match=r"^cpu(: out of memory| failed) while decoding"):
        on_cpu({0: accepted(jpeg())}, np.zeros((1, SIDE, SIDE, 3), np.uint8))


def test_the_number_of_pixels_decoded_at_once_is_bounded(interpreted: Any) -> None:
    large, small = (accepted(jpeg()) for _ in range(2))
    large = replace(large, size=(8000, 8000))
    jpegs = {0: large, 2: large, 3: small, 5: large, 6: small, 9: small}
    assert list(interpreted._parts(jpegs)) == [[0, 2, 3], [5, 6, 9]]
    assert list(interpreted._parts({})) == []


def test_neighbouring_rows_are_copied_together(interpreted: Any) -> None:
    assert list(interpreted._runs([0, 1, 2, 5, 7, 8])) == [(0, 3), (5, 6), (7, 9)]
    assert list(interpreted._runs([])) == []


@pytest.mark.cuda
@needs_gpu
def test_nvjpegs_pixels_are_close_to_libjpegs(capsys: pytest.CaptureFixture[str]) -> None:
    """The mean difference is at most one grey level, for each sampling and size.

    This is the bound that README gives for reduced decoding too.
    """
    imagenet = Preprocessing()
    decoder = gpu_module(interpreted=False).GpuDecoder([torch.device("cuda")], imagenet, RULES)
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
    """A folder of images that a GPU decodes, that it does not decode, and that are corrupted."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}a.jpg").write_bytes(jpeg((40 + i, 60)))
        (folder / f"{i}b.jpg").write_bytes(jpeg((60, 40 + i), progressive=True))
    (folder / "2c.jpg").write_bytes(corrupted())
    (folder / "2d.jpg").write_bytes(jpeg()[:-30])
    (folder / "3c.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("RGB", (50, 60), "teal").save(folder / "4c.png")
    return folder


def everything(outputs: Any) -> Any:
    """Keep all outputs of a batch."""
    return outputs


@pytest.fixture
def predictors(tiny_weights: Path, interpreted: Any) -> tuple[Predictor, Predictor]:
    """A predictor with `decode="exact"`, and the same with the GPU's decoder on the CPU."""
    options = RunOptions(
        weights=tiny_weights, device="cpu", backend="torch", decode="exact", batch_size=4
    )
    one = open_predictor((LOGITS,), options)
    rules = DecodeRules("gpu")
    decoder = interpreted.GpuDecoder([torch.device("cpu")], one.preprocessing, rules)
    return one, replace(one, rules=rules, gpu_decoder=decoder)


def test_a_run_gives_the_rows_that_exact_gives(
    mixed: Path, predictors: tuple[Predictor, Predictor]
) -> None:
    results = []
    for one in predictors:
        with Walk([str(mixed)], print) as walk:
            results.append(list(run(walk, one, everything)))
    failed = []
    for batch, as_exact in zip(*results, strict=True):
        assert batch.names == as_exact.names
        assert batch.errors == as_exact.errors
        failed += [name for name, error in zip(batch.names, batch.errors, strict=True) if error]
        np.testing.assert_array_equal(batch.columns[LOGITS], as_exact.columns[LOGITS])
    assert [name[-6:-4] for name in failed] == ["2c", "2d", "3c"]


def test_the_jpegs_of_a_batch_are_decoded_in_one_call(
    mixed: Path, predictors: tuple[Predictor, Predictor]
) -> None:
    batches: list[int] = []
    decoder: Any = predictors[1].gpu_decoder

    class Counting:
        accept = decoder.accept

        def __call__(self, jpegs: Mapping[int, Jpeg], pixels: Any) -> list[int]:
            batches.append(len(jpegs))
            return list(decoder(jpegs, pixels))

    counting: Any = Counting()
    with Walk([str(mixed)], print) as walk:
        results = run(walk, replace(predictors[1], gpu_decoder=counting), everything)
        assert sum(map(len, results)) == 14
    assert (
        sum(batches) == 6
    )  # five intact ones, and one that is found to be corrupted only when decoded
    assert len(batches) <= 4


def test_a_failure_of_the_gpu_ends_the_run(
    mixed: Path, predictors: tuple[Predictor, Predictor]
) -> None:
    def failing(_encoded: list[torch.Tensor], **_options: Any) -> Any:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    decoder: Any = predictors[1].gpu_decoder
    next(decoder._turns)._decode_jpeg = failing
    with (
        Walk([str(mixed)], print) as walk,
        pytest.raises(DeviceError, match="failed while decoding"),
    ):
        list(run(walk, predictors[1], everything))


def test_the_decoder_and_its_version_are_in_the_record(
    predictors: tuple[Predictor, Predictor],
) -> None:
    from importlib.metadata import version

    walk: Any = None
    as_exact, on_gpu = (
        run_record(Run(Classify(), RunOptions(), NO_LISTENERS, walk, one)) for one in predictors
    )
    assert on_gpu["versions"]["torchcodec"] == version("torchcodec")
    assert on_gpu["decode_rules"]["decode"] == "gpu"
    assert on_gpu["fingerprint"] != as_exact["fingerprint"]
    assert "torchcodec" not in as_exact["versions"]


# --- what it needs --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_decoding_on_a_gpu_needs_a_gpu(backend: str) -> None:
    with pytest.raises(UsageError, match=r"^`decode=gpu` needs a CUDA GPU, but this run uses cpu"):
        open_predictor((LOGITS,), RunOptions(device="cpu", backend=backend, decode="gpu"))


@pytest.mark.parametrize("library", ["torchcodec", "triton"])
def test_the_error_names_a_missing_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there: Callable[[str], Any] = predictor.find_spec
    monkeypatch.setattr(
        predictor, "find_spec", lambda name: None if name == library else there(name)
    )
    with pytest.raises(UsageError, match=rf"^`decode=gpu` needs {library}: pip install "):
        predictor._check_gpu_decoding(["cuda:0"])


def test_gpus_decode_in_turns(interpreted: Any) -> None:
    decoder = interpreted.GpuDecoder([torch.device("cpu")] * 2, SMALL, RULES)
    found = decoder.accept(jpeg())
    batches = np.zeros((3, 1, SMALL.image_size, SMALL.image_size, 3), dtype=np.uint8)
    used = []
    for gpu in (next(decoder._turns), next(decoder._turns)):
        gpu._decode_jpeg = partial(noted, gpu._decode_jpeg, used, gpu)
    for batch in batches:
        assert decoder({0: found}, batch) == []
    assert used[0] is used[2] is not used[1]
    assert (batches == batches[0]).all()


def noted(decode_jpeg: Any, used: list[Any], gpu: Any, *arguments: Any, **options: Any) -> Any:
    used.append(gpu)
    return decode_jpeg(*arguments, **options)


def test_the_first_check_ignores_the_limits_on_images(interpreted: Any) -> None:
    decoder = interpreted.GpuDecoder(
        [torch.device("cpu")], SMALL, DecodeRules("gpu", max_pixels=1, max_bytes=1)
    )
    assert decoder.accept(jpeg()) is None


def test_a_torchcodec_without_nvjpeg_is_an_error_at_the_start(
    interpreted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchcodec.decoders

    def without(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError("torchcodec was not compiled with nvJPEG support\nmore")

    monkeypatch.setattr(torchcodec.decoders, "decode_jpeg", without)
    with pytest.raises(DeviceError, match="on it: torchcodec was not compiled with nvJPEG support"):
        interpreted.GpuDecoder([torch.device("cpu")], SMALL, RULES)
