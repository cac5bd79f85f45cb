"""Compare r2n with what people use instead: whole processes, in turns, on the same images.

    python tests/checks/compare_peers.py --images 1000 --rounds 5
    python tests/checks/compare_peers.py --peers timm_best,r2n_extract

Every peer classifies the same JPEGs with the same weights (random ones unless --weights names a
file: they are as fast) and writes the five best classes to a CSV file. Every round runs all peers
one after the other; the result is the median of the rounds' ratios, with their spread. r2n's
cache is filled before the first round. The model alone is measured in the same rounds. The
output begins with the processor's features and the settings with which `timm_best` runs: the
fastest that were measured for a processor with, and for one without, bfloat16 in hardware.
Peers whose library (timm, nncf) is not installed are left out.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

NETWORK = "res2net50_v1b_26w_4s"  # timm's res2net50d
SIZE, RESIZE = 224, 256


# --- the peers: each is a process of its own ----------------------------------------------------


def timm_default(folder: str, weights: str, out: str) -> None:
    """timm's loader and network with its inference script's defaults."""
    _timm(folder, weights, out, Settings(256, workers=2, channels_last=False, bf16=False))


def timm_best(folder: str, weights: str, out: str) -> None:
    """The same with the settings that are fastest on this processor."""
    _timm(folder, weights, out, best_settings())


@dataclass(frozen=True)
class Settings:
    """How timm's network is run."""

    batch_size: int
    workers: int
    channels_last: bool
    bf16: bool


def best_settings() -> Settings:
    """Return timm's fastest settings for this processor.

    Autocast to bfloat16 is slower than float32 where the processor does not have bfloat16 in
    hardware. There, on two cores with AVX2, channels_last gave 8 % more than timm's layout at
    batch size 8, batches of 8 gave 13 % more than batches of 32, and autocast a fifth.
    """
    from r2ncli.engine.base import cores, cpu_has_bf16

    bf16 = cpu_has_bf16()
    return Settings(32 if bf16 else 8, workers=cores(), channels_last=True, bf16=bf16)


def _timm(folder: str, weights: str, out: str, settings: Settings) -> None:
    import timm
    import torch
    from timm.data import ImageDataset, create_loader, resolve_model_data_config

    network = timm.create_model("res2net50d").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    data = resolve_model_data_config(network)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    network = network.to(memory_format=layout)
    loader = create_loader(
        ImageDataset(folder),
        input_size=data["input_size"],
        batch_size=settings.batch_size,
        is_training=False,
        interpolation="bilinear",
        mean=data["mean"],
        std=data["std"],
        crop_pct=SIZE / RESIZE,
        num_workers=settings.workers,
        use_prefetcher=False,
        device=torch.device("cpu"),
    )
    precision = torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16)
    with torch.inference_mode(), precision, open(out, "w", newline="") as file:
        rows = csv.writer(file)
        for pixels, _ in loader:
            top = network(pixels.to(memory_format=layout)).softmax(1).topk(5)
            rows.writerows(
                [*map(float, values), *map(int, indices)]
                for values, indices in zip(top.values, top.indices, strict=True)
            )


def plain_script(folder: str, weights: str, out: str) -> None:
    """A script as a user would write it: torchvision's transforms, a DataLoader, the network."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    import r2ncli

    class Images(Dataset[Any]):
        def __init__(self) -> None:
            self.paths = sorted(Path(folder).rglob("*.jpg"))
            self.transform = transforms.Compose(
                [
                    transforms.Resize(RESIZE),
                    transforms.CenterCrop(SIZE),
                    transforms.ToTensor(),
                    transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
                ]
            )

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, number: int) -> Any:
            return self.transform(Image.open(self.paths[number]).convert("RGB"))

    network = r2ncli.load_model(weights)
    loader: DataLoader[Any] = DataLoader(Images(), batch_size=32, num_workers=2)
    with torch.inference_mode(), open(out, "w", newline="") as file:
        rows = csv.writer(file)
        for pixels in loader:
            top = network(pixels).softmax(1).topk(5)
            rows.writerows(
                [*map(float, values), *map(int, indices)]
                for values, indices in zip(top.values, top.indices, strict=True)
            )


def r2n(folder: str, weights: str, out: str) -> None:
    """The command `r2n classify`."""
    _command("classify", folder, "--weights", weights, "-q", "-o", out, "--overwrite")


def r2n_extract(folder: str, weights: str, out: str) -> None:
    """The command `r2n extract`: features of layer3, pooled, to HDF5."""
    features = str(Path(out).with_suffix(".h5"))
    layer = ("--layer", "layer3", "--overwrite")
    _command("extract", folder, "--weights", weights, "-q", *layer, "-o", features)


def r2n_int8(folder: str, weights: str, out: str) -> None:
    """The command in int8, calibrated with 300 of the images."""
    int8 = ("--precision", "int8", "--calibration", folder)
    _command("classify", folder, "--weights", weights, "-q", *int8, "-o", out, "--overwrite")


def _command(*arguments: str) -> None:
    os.execv(sys.executable, [sys.executable, "-m", "r2ncli", *arguments])


PEERS: dict[str, Callable[[str, str, str], None]] = {
    peer.__name__: peer
    for peer in (timm_default, timm_best, plain_script, r2n, r2n_extract, r2n_int8)
}
LIBRARIES = {"timm_default": "timm", "timm_best": "timm", "r2n_int8": "nncf"}
MODEL = "model"  # not a process: the rates of the model alone
CHOICES = ", ".join([*PEERS, MODEL])


# --- the model alone ------------------------------------------------------------------------------


def openvino_model(weights: str, seconds: float) -> Iterator[tuple[str, float]]:
    """Measure images/s of OpenVINO's own asynchronous queue, by batch and streams."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # tell nobody
    import numpy as np
    import openvino
    import torch

    import r2ncli
    from r2ncli.engine.base import cpu_has_bf16

    network = r2ncli.load_model(weights)
    core = openvino.Core()
    for batch, streams in ((8, 2), (4, 2), (8, 1)):
        graph = openvino.convert_model(network, example_input=torch.zeros(1, 3, SIZE, SIZE))
        graph.reshape([batch, 3, SIZE, SIZE])
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if cpu_has_bf16() else "f32",
            "NUM_STREAMS": streams,
            "PERFORMANCE_HINT": "THROUGHPUT",
        }
        queue = openvino.AsyncInferQueue(core.compile_model(graph, "CPU", options), streams)
        pixels = np.random.default_rng(0).standard_normal((batch, 3, SIZE, SIZE), np.float32)

        def infer(count: int, queue: Any = queue, pixels: Any = pixels) -> None:
            for _ in range(count):
                queue.start_async({0: pixels})
            queue.wait_all()

        infer(2 * streams)
        start, batches = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds:
            infer(4 * streams)
            batches += 4 * streams
        yield f"batch {batch}, {streams} streams", batch * batches / elapsed


def r2n_bench(weights: str, folder: str, seconds: float) -> dict[str, float]:
    """Measure images/s of the model alone and of the whole pipeline with `r2n bench`."""
    arguments = ["bench", folder, "--weights", weights, "--precision", "auto", "-b", "8"]
    command = [sys.executable, "-m", "r2ncli", *arguments, "--seconds", str(seconds)]
    done = subprocess.run([*command, "--json", "-q"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    whole = next(stage for stage in report["stages"] if stage["stage"] == "whole")
    return {
        "model": report["model"][0]["images_per_second"],
        "whole": whole["images_per_second"],
    }


# --- the comparison -------------------------------------------------------------------------------


def compare(
    images: Annotated[int, typer.Option(help="Number of JPEGs of 500 x 375 to generate.")] = 1000,
    folder: Annotated[Path | None, typer.Option(help="Use the JPEGs in this folder.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Use this .pth file.")] = None,
    rounds: Annotated[int, typer.Option(help="Number of times that every peer runs.")] = 5,
    seconds: Annotated[float, typer.Option(help="Time for each rate of the model alone.")] = 6.0,
    peers: Annotated[
        str | None, typer.Option(help=f"Run only r2n and these, separated by commas: {CHOICES}.")
    ] = None,
) -> None:
    """Run all peers in turns and print the ratios of their times to r2n's."""
    chosen = chosen_peers(peers)
    found, settings = processor(), asdict(best_settings())
    print(", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in found.items()))
    print("timm_best:", ", ".join(f"{name} {value}" for name, value in settings.items()), "\n")
    with tempfile.TemporaryDirectory(prefix="r2n-compare-") as scratch:
        os.environ["R2N_CACHE"] = str(Path(scratch, "cache"))
        here = folder or _generated(Path(scratch, "images"), images)
        file = weights or _random_weights(Path(scratch, "random.pth"))
        out = Path(scratch, "out.csv")
        took: dict[str, list[float]] = {name: [] for name in PEERS if name in chosen}
        alone: dict[str, list[float]] = {}
        for name in took:
            if name.startswith("r2n"):
                _time(name, here, file, out)
        for number in range(rounds):
            for name, times in took.items():
                times.append(_time(name, here, file, out))
            if MODEL in chosen:
                for name, rate in r2n_bench(str(file), str(here), seconds).items():
                    alone.setdefault(f"r2n {name}", []).append(rate)
                for name, rate in openvino_model(str(file), seconds):
                    alone.setdefault(f"openvino {name}", []).append(rate)
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    ratios = {base: _ratios(took, base) for base in ("r2n", "r2n_int8") if base in took}
    print(f"{'whole process':<24}{'median s':>9}", *(f"   times {base}'s" for base in ratios))
    for name, times in took.items():
        cells = [f"   {_with_spread(each[name]):<22}" for each in ratios.values()]
        print(f"{name:<24}{statistics.median(times):>9.1f}", *cells)
    if alone:
        print(f"\n{'images/s':<28}{'median':>10}{'least':>12}{'most':>9}")
    for name, rates in alone.items():
        print(f"{name:<28}{statistics.median(rates):>10.1f}{min(rates):>12.1f}{max(rates):>9.1f}")
    report = {"processor": found, "timm_best": settings, "seconds": took, "ratios": ratios}
    print(json.dumps(report | {"images_per_second": alone}))


def processor() -> dict[str, Any]:
    """Return the processor's name, cores, and the features that decide a network's speed."""
    import torch

    from r2ncli.engine.base import cores, cpu_has_bf16, cpu_model

    return {
        "model": cpu_model(),
        "cores": cores(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_in_hardware": cpu_has_bf16(),
    }


def chosen_peers(peers: str | None) -> set[str]:
    """Return the peers to run: those that are named and r2n, or all whose library is there."""
    absent = {name for name, library in LIBRARIES.items() if find_spec(library) is None}
    if peers is None:
        return {*PEERS, MODEL} - absent
    chosen = {"r2n", *peers.split(",")}
    if unknown := chosen - {*PEERS, MODEL}:
        raise typer.BadParameter(f"{', '.join(unknown)}: expected some of {CHOICES}")
    for name in sorted(chosen & absent):
        raise typer.BadParameter(f"{name}: {LIBRARIES[name]} is not installed")
    return chosen


def _ratios(took: dict[str, list[float]], base: str) -> dict[str, list[float]]:
    """Divide every peer's times by those of `base` in the same rounds."""
    return {
        name: [theirs / ours for theirs, ours in zip(times, took[base], strict=True)]
        for name, times in took.items()
    }


def _with_spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _time(name: str, folder: Path, weights: Path, out: Path) -> float:
    command = [sys.executable, __file__, "--run", name, str(folder), str(weights)]
    start = time.perf_counter()
    subprocess.run([*command, str(out)], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _generated(folder: Path, count: int) -> Path:
    from r2ncli.bench import generated_jpegs

    (folder / "images").mkdir(parents=True)  # timm takes a folder of classes
    generated_jpegs(folder / "images", count)
    return folder


def _random_weights(file: Path) -> Path:
    import torch

    from r2ncli import Res2Net
    from r2ncli.architectures import PUBLISHED

    torch.save(Res2Net(PUBLISHED[NETWORK].architecture).state_dict(), file)
    return file


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        name, *arguments = sys.argv[2:]
        PEERS[name](*arguments)
    else:
        typer.run(compare)
