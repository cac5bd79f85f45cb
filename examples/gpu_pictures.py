"""The sections of gpu_check.py about images: decoding, and whole programs from JPEGs to rows.

All libraries decode the same generated JPEGs, and all programs classify the same folder of them.
Meanwhile the load of the cores, the GPU and its JPEG engines is sampled.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from support.reference_weights import TINY, reference_network
from torch import Tensor

from r2ncli.architectures import Preprocessing
from r2ncli.engine.base import Engine, EngineDescription, Outputs, Pixels, cores
from r2ncli.pipeline import run
from r2ncli.sources.walk import file_input

if TYPE_CHECKING:
    from gpu_check import Call, Section

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = sorted(Path(__file__).with_name("photos").glob("*.jpg"))
JPEGS = "500 x 375 crops of the photographs in examples/photos, with noise, 4:2:0, quality 90"
CHECK = Path(__file__).with_name("gpu_check.py")
NEEDS_GPU = "skipped: needs a CUDA GPU"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


# --- decoding ----------------------------------------------------------------------------------


def decoding(section: Section) -> None:
    """JPEGs to the network's squares: r2n's ways beside others, their speed and their pixels."""
    with tempfile.TemporaryDirectory(prefix="r2n-gpu-check-") as room:
        files = make_jpegs(Path(room), 16 if section.quick else 1024)
        contents = [file.read_bytes() for file in files]
    section.put("images", f"{JPEGS}; {sum(map(len, contents)) // len(contents)} bytes each")
    ways: dict[str, Callable[[], Callable[[Sequence[bytes]], Any]]] = {
        f"Pillow, {cores()} threads": lambda: (
            lambda some: np.stack(in_threads(pillow_square, some))
        ),
        "r2n --decode exact": partial(r2n_decoding, section, "exact"),
        "r2n --decode gpu": partial(r2n_decoding, section, "gpu"),
        "torchvision": lambda: partial(library_squares, section, torchvision_jpegs),
        "torchcodec": lambda: partial(library_squares, section, torchcodec_jpegs),
    }
    expected = np.stack(in_threads(pillow_square, contents[:64])).astype(np.int16)
    calls: dict[str, tuple[Call, float]] = {}
    for name, way in ways.items():
        if name == "r2n --decode gpu" and not section.on_gpu:
            section.put(name, NEEDS_GPU)
            continue
        try:
            decoded = way()
            found = decoded(contents[:64])
            found = found.cpu().numpy() if isinstance(found, Tensor) else found
        except Exception as error:  # absent here, or of another torch: the others go on
            section.put(name, f"not measured: {type(error).__name__}: {error}"[:500])
            continue
        off = np.abs(found - expected)
        levels = {"mean": off.mean(), "p99": np.percentile(off, 99), "most": off.max()}
        section.put(f"{name}: grey levels off Pillow's", levels)
        some = contents * (1 if section.quick else 4)
        calls[name] = partial(decoded, some), len(some)
    rates = section.in_turns("images/s", calls)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    own = max((name for name in rates if name.startswith("r2n")), key=lambda name: medians[name])
    best = max((name for name in rates if "r2n" not in name), key=lambda name: medians[name])
    section.reaches(f"decoding, {own} against {best}", ratio(rates[own], rates[best]), 1.0)


def make_jpegs(folder: Path, count: int) -> list[Path]:
    """`JPEGS`: all different, the same each time."""
    photos = [Image.open(file).convert("RGB") for file in PHOTOS]

    def make(number: int) -> Path:
        random, photo = np.random.default_rng(number), photos[number % len(photos)]
        width = int(min(photo.width, photo.height * 4 / 3) * random.uniform(0.6, 1))
        left = int(random.integers(0, photo.width - width + 1))
        top = int(random.integers(0, photo.height - width * 3 // 4 + 1))
        crop = photo.resize((500, 375), box=(left, top, left + width, top + width * 3 // 4))
        pixels = np.asarray(crop) + 4 * random.standard_normal((375, 500, 1), np.float32)
        file = folder / f"{number:05d}.jpg"
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(file, quality=90, subsampling="4:2:0")
        return file

    return in_threads(make, range(count))


def in_threads(function: Callable[[Any], Any], values: Sequence[Any]) -> list[Any]:
    with ThreadPoolExecutor(cores()) as threads:
        return list(threads.map(function, values))


def pillow_square(content: bytes) -> Pixels:
    """Resize(256) and CenterCrop(224), as torchvision does, for an image of 500 x 375."""
    image = Image.open(BytesIO(content)).convert("RGB")
    resized = image.resize((341, 256), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((58, 16, 58 + 224, 16 + 224)))


@dataclass(frozen=True)
class NoNetwork:
    """An engine without a network, to time everything else; it keeps the first pixels."""

    engine: Engine
    seen: list[Pixels]

    @property
    def description(self) -> EngineDescription:
        return self.engine.description

    def empty_batch(self, side: int) -> Pixels:
        return self.engine.empty_batch(side)

    def __call__(self, pixels: Pixels) -> Outputs:
        if not self.seen:
            self.seen.append(pixels[:64].copy())
        return {"fc": np.zeros((len(pixels), 1), dtype=np.float32)}


def r2n_decoding(section: Section, how: str) -> Callable[[Sequence[bytes]], Pixels]:
    """Return a function that runs what r2n does before its network."""
    network = reference_network(TINY["v1b"])
    size = 16 if section.quick else 256
    predictor = section.predictor(network, decode=how, image_size=224, batch_size=size)
    memory = file_input("memory.jpg", "memory.jpg")

    def decoded(contents: Sequence[bytes]) -> Pixels:
        engine = NoNetwork(predictor.engine, [])
        inputs = (replace(memory, read=lambda _most, one=one: one) for one in contents)
        batches = run(inputs, replace(predictor, engine=engine), lambda outputs: outputs)
        failed = [error for batch in batches for error in batch.errors if error is not None]
        assert not failed, failed[0]
        return engine.seen[0][: len(contents)]

    return decoded


def torchvision_jpegs(contents: list[Tensor], device: str) -> Any:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(contents, ImageReadMode.RGB, device)


def torchcodec_jpegs(contents: list[Tensor], device: str) -> Any:
    from torchcodec.decoders import decode_jpeg

    return decode_jpeg(contents, device=device)


def library_squares(section: Section, library: Call, contents: Sequence[bytes]) -> Tensor:
    """A library's decoder and torchvision's antialiased resize on the device, 128 at a time."""
    from torchvision.transforms.v2 import functional

    squares = []
    for start in range(0, len(contents), 128):
        some = contents[start : start + 128]
        encoded = [torch.frombuffer(bytearray(one), dtype=torch.uint8) for one in some]
        images = torch.stack(library(encoded, str(section.device)))  # all have the same size
        resized = functional.resize(images, [256], antialias=True)
        squares.append(functional.center_crop(resized, [224, 224]).permute(0, 2, 3, 1).contiguous())
    return torch.cat(squares)


# --- end to end --------------------------------------------------------------------------------


def end_to_end(section: Section) -> None:
    """A folder of JPEGs to a CSV file of the five best classes: whole processes, in turns."""
    different, images = (20, 768) if section.quick else (2000, 40_000)
    section.put("images", f"{images}, {different} different ones: {JPEGS}")
    runs: dict[str, list[dict[str, Any]]] = {}
    classes: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="r2n-gpu-check-") as room:
        originals, folder = Path(room, "originals"), Path(room, "images", "class")
        originals.mkdir()
        folder.mkdir(parents=True)
        files = make_jpegs(originals, different)
        for number in range(images):
            os.link(files[number % different], folder / f"{number:06d}.jpg")
        weights, out = Path(room, "reference.pth"), Path(room, "out.csv")
        torch.save(section.network().state_dict(), weights)
        options = {"--weights": weights, "--device": section.device, "--backend": "torch"}
        options |= {"--image-size": section.side, "-o": out}
        ours = [
            "-m",
            "r2ncli",
            "classify",
            folder.parent,
            "-q",
            "--overwrite",
            *chain(*options.items()),
        ]
        where = section.device, int(section.quick)
        commands: dict[str, list[Any]] = {
            "timm": [CHECK, "--timm", *where, folder.parent, weights, out],
            "r2n --decode exact": [*ours, "--decode", "exact"],
            "r2n --decode gpu": [*ours, "--decode", "gpu"],
        }
        if not section.on_gpu:
            section.put("r2n --decode gpu", NEEDS_GPU)
            del commands["r2n --decode gpu"]
        longest = 0.0
        for _ in range(1 if section.quick else 2):
            start = time.monotonic()
            for name in list(commands) if section.time_left(longest) else ():
                try:
                    one = watched(section, [sys.executable, *map(str, commands[name])], out, images)
                except subprocess.CalledProcessError as error:
                    section.put(f"{name}: error", error.output[-1500:])
                    del commands[name]
                    continue
                runs.setdefault(name, []).append(one)
                section.put(name, runs[name])
                with open(out, newline="") as file:
                    classes[name] = [row["index_1"] for row in csv.DictReader(file)]
                out.unlink()
            longest = max(longest, time.monotonic() - start)
    for name in commands.keys() - {"timm"} if "timm" in commands else ():
        same = [a == b for a, b in zip(classes[name], classes["timm"], strict=True)]
        section.put(f"{name}: top-1 as timm's", statistics.fmean(same))
        for part in ("whole", "steady"):
            rates = [[one[part]["images/s"] for one in runs[each]] for each in (name, "timm")]
            section.reaches(f"end to end, {part}: {name} against timm", ratio(*rates), 5)
        busy = [one["steady"].get("gpu, %", 0.0) for one in runs[name]]
        if section.on_gpu:
            section.reaches(f"GPU busy, %: {name}", statistics.median(busy), 80)


def watched(section: Section, command: list[str], out: Path, images: int) -> dict[str, Any]:
    """A process from its start to its end: how fast, and how busy the machine was meanwhile.

    The steady part is that from a fifth to nine tenths of the output, which is seen growing:
    r2n's blocks of 256 rows, or the bytes of a file that is written row by row.
    """
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    grown: list[tuple[float, float, float]] = []  # when, output, seconds that cores were busy
    with tempfile.TemporaryFile("w+") as log, gpu_samples(section) as samples:
        start = time.time()
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": python_path}
        )
        while process.poll() is None:
            blocks = 256 * len(list(Path(f"{out}.partial").glob("block-*")))
            grown.append((time.time(), blocks or -size_of(out), busy_seconds()))
            time.sleep(0.02)
        took = time.time() - start
        log.seek(0)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, log.read())
    if any(amount > 0 for _, amount, _ in grown):
        shares = [amount / images for _, amount, _ in grown]
    else:
        shares = [-amount / size_of(out) for _, amount, _ in grown]
    at = [i for i, share in enumerate(shares) if 0.2 <= share <= 0.9]
    first, last = (at[0], shares.index(shares[at[-1]])) if at else (0, 0)
    seconds = grown[last][0] - grown[first][0]
    steady = {"seconds": seconds, "images/s": math.nan}
    if last > first:
        steady["images/s"] = images * (shares[last] - shares[first]) / seconds
        steady["busy cores"] = (grown[last][2] - grown[first][2]) / seconds
        for what in ("gpu", "jpeg"):
            found = [
                one[what]
                for one in samples
                if what in one and grown[first][0] <= one["at"] <= grown[last][0]
            ]
            if found:
                steady[f"{what}, %"] = statistics.fmean(found)
    return {"whole": {"seconds": took, "images/s": images / took}, "steady": steady}


def size_of(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_size
    return 0


def busy_seconds() -> float:
    """Seconds that all cores together have been busy since the machine's start."""
    with suppress(OSError, ValueError):
        cells = Path("/proc/stat").read_text().splitlines()[0].split()
        user, nice, system, _idle, _waiting, irq, soft = map(int, cells[1:8])
        return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
    return math.nan


def nvidia_smi(device: torch.device, query: str) -> list[str]:
    """Its answers; none where it is not there or does not know a field."""
    with suppress(OSError):
        command = smi_command(device, query)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return [] if done.returncode else done.stdout.strip().split(", ")
    return []


def smi_command(device: torch.device, query: str) -> list[str]:
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    return ["nvidia-smi", gpu, f"--query-gpu={query}", "--format=csv,noheader,nounits"]


@contextmanager
def gpu_samples(section: Section) -> Iterator[list[dict[str, float]]]:
    """Sample the load of the GPU and its JPEG engines every 100 ms; fill the list at the end."""
    samples: list[dict[str, float]] = []
    # not every driver knows of JPEG engines
    known = [["gpu", "jpeg"], ["gpu"]] if section.on_gpu else []
    queries = {f"timestamp,{','.join(f'utilization.{w}' for w in what)}": what for what in known}
    query = next((query for query in queries if nvidia_smi(section.device, query)), None)
    if query is None:
        yield samples
        return
    with tempfile.TemporaryFile("w+") as file:
        command = [*smi_command(section.device, query), "--loop-ms=100"]
        process = subprocess.Popen(command, stdout=file)
        try:
            yield samples
        finally:
            process.terminate()
            process.wait()
        file.seek(0)
        for line in file.read().splitlines():
            with suppress(ValueError):  # cut short
                stamp, *cells = line.split(", ")
                at = datetime.strptime(stamp, "%Y/%m/%d %H:%M:%S.%f").timestamp()
                known_now = zip(queries[query], cells, strict=True)
                busy = {what: float(cell) for what, cell in known_now if cell.isdigit()}
                samples.append({"at": at, **busy})


def timm_process(device: str, quick: str, folder: str, weights: str, out: str) -> None:
    """timm's data set, loader and network, as its own inference script puts them together."""
    import timm
    from timm.data import create_dataset, create_loader

    torch.backends.cudnn.benchmark = True
    network = timm.create_model("test_resnet" if int(quick) else "res2net50d").eval()
    if not int(quick):
        network.load_state_dict(torch.load(weights, weights_only=True))
    network = network.to(device, memory_format=torch.channels_last)
    dataset = create_dataset("", root=folder)
    loader = create_loader(
        dataset,
        input_size=(3, 64, 64) if int(quick) else (3, 224, 224),
        batch_size=256,
        interpolation="bilinear",
        mean=Preprocessing().mean,
        std=Preprocessing().std,
        crop_pct=224 / 256,
        num_workers=cores(),
        pin_memory=device != "cpu",
        device=torch.device(device),
    )
    half = torch.bfloat16 if device == "cpu" or torch.cuda.is_bf16_supported() else torch.float16
    names = iter(dataset.filenames())
    mixed = torch.autocast(torch.device(device).type, half)
    with torch.inference_mode(), mixed, open(out, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["path", *(f"{cell}_{k}" for k in range(1, 6) for cell in ("index", "probability"))]
        )
        for pixels, _ in loader:
            top = network(pixels.to(memory_format=torch.channels_last)).softmax(1).topk(5)
            for indices, values in zip(top.indices.tolist(), top.values.tolist(), strict=True):
                rows.writerow([next(names), *chain(*zip(indices, values, strict=True))])
            file.flush()
