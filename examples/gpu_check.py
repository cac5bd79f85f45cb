"""Check and measure r2n on a CUDA GPU, with one command and nothing to download.

    python examples/gpu_check.py -o gpu_check.json
    python examples/gpu_check.py --only decoding --only end_to_end
    python examples/gpu_check.py --device cpu --quick        # does the script itself work?

It needs a checkout, torch, torchvision, timm, typer, h5py and Pillow; torchcodec for
`--decode gpu`. Every section is a process of its own with a time limit, so that a section that
fails, hangs or breaks the GPU's state does not affect the others. The JSON file is complete after
each section; --only keeps the other sections of an existing file. Programs that are compared run
in turns, and the median of the ratios of all rounds counts. The script ends within ten minutes.
The exit code is 1 if a check of numbers failed or could not run; a missed target for speed is
only reported.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import features
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_pictures import NEEDS_GPU, PHOTOS, decoding, end_to_end, nvidia_smi, ratio, timm_process
from support.reference_weights import TINY, reference_network, relative_error

import r2ncli
from r2ncli.architectures import DEFAULT_NETWORK, PUBLISHED, Preprocessing
from r2ncli.engine.base import Engine, Pixels, cores, cpu_model
from r2ncli.engine.devices import DTYPES, exact_settings
from r2ncli.engine.folding import FoldedNetwork
from r2ncli.engine.fused import FusedNetwork
from r2ncli.errors import DeviceError
from r2ncli.images.decode import DecodeRules, decode
from r2ncli.model import Res2Net, forward_flops, layer_shapes
from r2ncli.options import RunOptions
from r2ncli.pipeline import run
from r2ncli.predictor import Predictor, assemble_predictor, open_predictor
from r2ncli.sources.selection import Selection
from r2ncli.sources.walk import Walk
from r2ncli.weights.loading import Checkpoint

LIMITS = {"fp32": 1e-4, "fp16": 3e-3, "bf16": 1e-2}  # max|difference| / max|plain fp32 on a CPU|
CHANNELS_LAST = torch.channels_last
Call = Callable[[], Any]
Rates = dict[str, list[float]]  # by name, of every round


class Section:
    """One section of the check: its device, its time limit and its results."""

    def __init__(self, device: str, quick: bool, pictures: str, seconds: float, file: Path) -> None:
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.quick = quick
        self.pictures = pictures
        self.side = 32 if quick else 224
        self.batches = (2,) if quick else (256, 64, 512)
        self.preprocessing = Preprocessing(self.side, self.side * 256 // 224)
        self.options = [device, str(int(quick)), pictures]
        self.found: dict[str, Any] = {"checks": []}
        self._ends = time.monotonic() + seconds
        self._file = file

    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    def time_left(self, seconds: float = 0.0) -> bool:
        return self.seconds_left() > seconds

    def put(self, name: str, value: Any) -> None:
        self.found[name] = value
        save(self._file, self.found)

    def check(self, kind: str, what: str, value: float, wanted: str, passed: bool) -> None:
        """`kind` is ``numbers``, which must hold, or ``speed``, which is a target."""
        one = {"kind": kind, "what": what, "value": value, "wanted": wanted, "passed": passed}
        self.put("checks", [*self.found["checks"], one])

    def within_limit(self, what: str, ours: Any, expected: Any, precision: str) -> None:
        error, limit = relative_error(ours, expected), LIMITS[precision]
        self.check("numbers", what, error, f"at most {limit:g}", error <= limit)  # NaN is not

    def holds(self, what: str, holds: bool) -> None:
        self.check("numbers", what, holds, "true", holds)

    def reaches(self, what: str, value: float, wanted: float, kind: str = "speed") -> None:
        self.check(kind, what, value, f"at least {wanted:g}", value >= wanted)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def rate(self, call: Call, amount: float) -> float:
        """How many a second, where a call does `amount`: for 0.25 s, to the device's end."""

        def seconds(repeats: int) -> float:
            self.synchronize()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            self.synchronize()
            return time.perf_counter() - start

        repeats = 1 if self.quick else round(0.25 / seconds(1))
        repeats = min(max(repeats, 1), 1000)
        return amount * repeats / seconds(repeats)

    def in_turns(self, what: str, calls: Mapping[str, tuple[Call, float]]) -> Rates:
        """Everyone's rate in each of five rounds, after one that does not count."""
        rates: Rates = {}
        for name, (call, amount) in calls.items():
            with suppress(torch.OutOfMemoryError):  # then it has none
                self.rate(call, amount)
                rates[name] = []
        for number in range(1 if self.quick else 5):
            if number == 0 or self.time_left():
                for name, values in rates.items():
                    values.append(self.rate(*calls[name]))
        shown = {n: {"median": statistics.median(v), "all": v} for n, v in rates.items()}
        self.put(what, shown)
        return rates

    def network(self) -> Res2Net:
        """The network that is timed, with the reference weights."""
        return reference_network(TINY["v1b"] if self.quick else DEFAULT_NETWORK)

    def predictor(
        self, network: Res2Net, layers: Sequence[str] = ("fc",), **options: Any
    ) -> Predictor:
        """Get a network ready on the device, as r2n does."""
        checkpoint = Checkpoint(Path("reference"), "", "reference", network, None, Preprocessing())
        standard = {"device": str(self.device), "backend": "torch", "image_size": self.side}
        return assemble_predictor(checkpoint, layers, RunOptions(**{**standard, **options}))

    def precisions(self) -> list[str]:
        if not self.on_gpu:
            return ["fp32"]  # Triton's interpreter cannot multiply bf16
        old = torch.cuda.get_device_capability(self.device) < (8, 0)
        return ["fp32", "fp16"] if old else ["fp32", "fp16", "bf16"]

    def default_precision(self) -> str:
        """Return the precision that r2n uses by default."""
        precision = "auto" if self.on_gpu else "fp32"
        predictor = self.predictor(self.network(), batch_size=1, precision=precision)
        return predictor.engine.description.precision


def save(file: Path, document: Any) -> None:
    """Write a JSON file that is there whole or as it was."""
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps(plain(document), indent=1) + "\n")
    os.replace(new, file)


def plain(value: Any) -> Any:
    """What JSON has a form for: numbers of six digits; NaN and infinity as words."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


# --- 1: the environment ---------------------------------------------------------------------------


def environment(section: Section) -> None:
    """What this was measured on, and the machine's own limits."""
    packages = ("torch", "torchvision", "torchcodec", "triton", "timm", "numpy", "pillow", "h5py")
    versions: dict[str, Any] = {"python": platform.python_version(), "r2n": r2ncli.__version__}
    versions |= {name: version_of(name) for name in packages}
    versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    section.put("versions", versions | {"libjpeg_turbo": features.version("libjpeg_turbo")})
    section.put("processor", {"model": cpu_model(), "cores": cores()})
    if section.on_gpu:
        gpu = torch.cuda.get_device_properties(section.device)
        query = "driver_version,pcie.link.gen.max,pcie.link.width.max,clocks.max.sm,power.limit"
        facts = {
            "name": gpu.name,
            "memory_bytes": gpu.total_memory,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
        }
        answers = nvidia_smi(section.device, query)
        section.put("gpu", facts | dict(zip(query.split(","), answers, strict=False)))
    rows, count = (256, 1 << 20) if section.quick else (8192, 1 << 30)
    left, right = (
        torch.randn(rows, rows, device=section.device, dtype=torch.bfloat16) for _ in range(2)
    )
    large = torch.empty(count, dtype=torch.uint8, device=section.device).random_()
    other = torch.empty_like(large)
    host = torch.zeros(count // 4, dtype=torch.uint8, pin_memory=section.on_gpu)
    part = large[: count // 4]
    calls: dict[str, tuple[Call, float]] = {
        "bf16 product, FLOP/s": (lambda: left @ right, 2 * rows**3),
        "copy on the device, bytes/s read and written": (lambda: other.copy_(large), 2 * count),
        "copy to the device, bytes/s": (lambda: part.copy_(host), count // 4),
        "copy from the device, bytes/s": (lambda: host.copy_(part), count // 4),
    }
    for name, (call, amount) in calls.items():
        section.put(name, max(section.rate(call, amount) for _ in range(3)))


def version_of(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


# --- 2: numbers -----------------------------------------------------------------------------------


def numbers(section: Section) -> None:
    """The engine on the device against the plain network in fp32 on the CPU."""
    section.put("precisions", section.precisions())
    logits_are_the_plain_ones(section, "v1b" if section.quick else DEFAULT_NETWORK)
    rows_depend_on_their_image_alone(section)
    layers_are_the_plain_ones(section)


def logits_are_the_plain_ones(section: Section, name: str) -> None:
    network = reference_network(TINY[name] if section.quick else name)
    pixels = photo_squares(4, section.side)
    expected = hooked(network, pixels, ("fc",))["fc"]
    for precision in section.precisions():
        engine = section.predictor(network, precision=precision, batch_size=4).engine
        what = (
            f"{name} {precision}, {engine.description.library}"  # which names Triton where it ran
        )
        section.within_limit(what, engine(pixels)["fc"], expected, precision)


def architectures(section: Section) -> None:
    """The other networks: several processes, since each compiles kernels of its own."""
    names = ["v1"] if section.quick else [name for name in PUBLISHED if name != DEFAULT_NETWORK]

    def checked(name: str) -> dict[str, Any]:
        return section_found(f"network {name}", section.seconds_left(), section.options, False)

    with ThreadPoolExecutor(max(1, min(8, cores() // 2))) as threads:
        for name, found in zip(names, threads.map(checked, names), strict=True):
            for one in found.get("checks", ()):
                section.check(**one)
            if "error" in found:
                section.put(name, found)
                section.holds(f"{name}: {found['error']}", False)


def photo_squares(count: int, side: int) -> Pixels:
    """uint8 [count, side, side, 3]: of the photographs beside this file, in turn mirrored."""
    shape = Preprocessing(side, side * 256 // 224)
    squares = [decode(file.read_bytes(), shape, DecodeRules("exact")) for file in PHOTOS[:count]]
    squares += [square[:, ::-1] for square in squares]
    return np.stack(list(islice(cycle(squares), count)))


def normalised(pixels: Pixels) -> Tensor:
    """float32 [N, 3, H, W] as the plain network takes it."""
    mean, std = torch.tensor(Preprocessing().mean), torch.tensor(Preprocessing().std)
    return ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def hooked(network: Res2Net, pixels: Pixels, layers: Sequence[str]) -> dict[str, Any]:
    """What hooks on the plain network see: fp32, on the CPU."""
    seen: dict[str, Any] = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output.numpy()})
        )
        for name in layers
    ]
    network(normalised(pixels))
    for hook in hooks:
        hook.remove()
    return seen


def layers_are_the_plain_ones(section: Section) -> None:
    """All layers at once, then alone as far as the time goes: each has its own rewriting."""
    network, pixels = section.network(), photo_squares(2, section.side)
    layers = list(layer_shapes(network.architecture, section.side))
    expected = hooked(network, pixels, layers)
    mixed = np.random.default_rng(0).permutation(layers)[: 3 if section.quick else None].tolist()

    def errors(some: list[str]) -> dict[str, float]:
        options = {"pool": "none", "precision": "fp32", "batch_size": 2}
        outputs = section.predictor(network, some, **options).engine(pixels)
        return {name: relative_error(outputs[name], expected[name]) for name in some}

    together = errors(layers)
    section.put("errors of all layers at once", together)
    alone = errors(mixed[:1])
    for name in mixed[1:]:
        if section.time_left():
            alone |= errors([name])
    for what, found in (("at once", together), ("alone", alone)):
        all_near = all(error <= LIMITS["fp32"] for error in found.values())  # NaN is not
        worst = f"{max(found.values()):.1e}"
        section.holds(f"{len(found)} of {len(layers)} layers {what}, fp32: {worst}", all_near)


def rows_depend_on_their_image_alone(section: Section) -> None:
    """Check that a row depends on its image alone, to the byte."""
    network, pixels = section.network(), photo_squares(8, section.side)
    for precision in ("fp32", "auto"):
        engine, another = (
            section.predictor(network, precision=precision, batch_size=8).engine for _ in range(2)
        )
        logits = engine(pixels)["fc"]
        alone = np.zeros_like(pixels)
        neighbours = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
        neighbours[2] = alone[0] = pixels[5]
        shifted = [np.roll(pixels, shift, axis=0) for shift in range(8)] * 4
        streams = engine.description.streams
        with ThreadPoolExecutor(streams) as threads:
            found = list(threads.map(lambda some, engine=engine: engine(some)["fc"], shifted))
        same = {
            "twice": np.array_equal(engine(pixels)["fc"], logits),
            "from another engine": np.array_equal(another(pixels)["fc"], logits),
            "alone": np.array_equal(engine(alone)["fc"][0], logits[5]),
            "among others": np.array_equal(engine(neighbours)["fc"][2], logits[5]),
            "at other places": np.array_equal(np.roll(engine(shifted[3])["fc"], -3, 0), logits),
            f"from {streams} threads at once": all(
                np.array_equal(np.roll(f, -shift, 0), logits) for shift, f in enumerate(found)
            ),
        }
        for how, holds in same.items():
            section.holds(f"{engine.description.precision}: the same bytes {how}", holds)


# --- 3: agreement ---------------------------------------------------------------------------------


def agreement(section: Section) -> None:
    """The demonstration network's classes on the device and in fp32 on the CPU."""
    if not section.pictures:
        section.put("skipped", "no images: give a folder or a zip file of them with --pictures")
        return
    selection = Selection(max=20 if section.quick else 10_000)
    if zipfile.is_zipfile(section.pictures):
        members = zipfile.ZipFile(section.pictures).namelist()
        if any(name.startswith("test/") for name in members):
            selection = replace(selection, include=("*!test/*",))
    places = {"cpu": ("cpu", "fp32")}
    places |= {precision: (str(section.device), precision) for precision in section.precisions()}
    classes: dict[str, dict[str, int]] = {}
    for name, (device, precision) in places.items():
        options = RunOptions(weights="demo", backend="torch", device=device, precision=precision)
        predictor = open_predictor(("fc",), options)
        assert predictor.labels is not None
        labels = predictor.labels.labels
        with Walk([section.pictures], lambda _warning: None, selection) as walk:
            classes[name] = {
                row: int(logits.argmax())
                for batch in run(walk, predictor, lambda outputs: outputs)
                for row, error, logits in zip(
                    batch.names, batch.errors, batch.columns["fc"], strict=True
                )
                if error is None
            }
        folders = {row: Path(row.replace("!", "/")).parent.name for row in classes[name]}
        right = [labels[classes[name][n]] == f for n, f in folders.items() if f in labels]
        if right:
            section.put(f"{name}: accuracy of {len(right)}", statistics.fmean(right))
        if name != "cpu":
            same = [classes[name][n] == index for n, index in classes["cpu"].items()]
            what = f"{name}: top-1 as fp32 on the CPU, of {len(same)}"
            section.reaches(what, statistics.fmean(same), 0.999, "numbers")


# --- 4: the model alone ---------------------------------------------------------------------------


def model(section: Section) -> None:
    """Images/s of the network alone: r2n's beside what people use instead."""
    import timm

    precision = section.default_precision()
    dtype, device, network = DTYPES[precision], section.device, section.network()
    section.put("precision", precision)
    section.put("peers", "take normalised float32, or half, that is on the device; r2n uint8")
    flops = forward_flops(network.architecture, section.side)
    eager32 = section.network().to(device)
    eager = section.network().to(device, memory_format=CHANNELS_LAST)
    half = section.network().to(device, dtype, memory_format=CHANNELS_LAST)
    timms = timm.create_model("test_resnet" if section.quick else "res2net50d").eval()
    timms = timms.to(device, memory_format=CHANNELS_LAST)

    def mixed(peer: torch.nn.Module, pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
            return peer(pixels)  # type: ignore[no-any-return]

    def measure(batch: int) -> None:
        pixels = photo_squares(batch, section.side)
        there = normalised(pixels).to(device)
        last = there.contiguous(memory_format=CHANNELS_LAST)
        engine = section.predictor(network, precision=precision, batch_size=batch).engine
        batches = 4 * engine.description.streams
        host = engine.empty_batch(section.side)
        host[...] = pixels
        busy = partial(keep_busy, engine, host, batches)
        calls: dict[str, tuple[Call, float]] = {
            **{n: (c, batch) for n, c in best_forms(section, precision, pixels).items()},
            "r2n engine, host to host": (busy, batch * batches),
            "eager fp32": (partial(eager32, there), batch),
            f"eager {precision} channels_last": (partial(half, last.to(dtype)), batch),
            "eager AMP channels_last": (partial(mixed, eager, last), batch),
            "timm AMP channels_last": (partial(mixed, timms, last), batch),
        }
        torch.backends.cudnn.benchmark = True  # as timm's scripts have it; ours is captured
        rates = section.in_turns(f"batch {batch}, images/s", calls)
        torch.backends.cudnn.benchmark = False
        ours = against_peers(section, f"batch {batch}", rates, batch == section.batches[0] and 3)
        section.put(
            f"batch {batch}: TFLOP/s of {ours}", statistics.median(rates[ours]) * flops / 1e12
        )

    for_each_batch(section, measure)


def against_peers(section: Section, what: str, rates: Rates, wanted: float) -> str:
    """The fastest form of r2n's network, by name, beside everyone; `wanted` is a target or 0."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    forms, peers = [f"r2n {form}" for form in FORMS], [name for name in rates if "r2n" not in name]
    ours = max((form for form in forms if form in rates), key=lambda name: medians[name])
    ratios = {name: ratio(rates[ours], rates[name]) for name in rates}
    section.put(f"{what}: {ours} to others", ratios)
    best = max(peers, key=lambda name: medians[name])
    if wanted:
        section.reaches(f"model alone, {what}, {ours} against {best}", ratios[best], wanted)
    return ours


def for_each_batch(section: Section, measure: Callable[[int], None]) -> None:
    """As far as the time goes, and the memory holds."""
    for batch in section.batches:
        if section.time_left(5):
            gc.collect()  # graphs keep their memory until then
            torch.cuda.empty_cache()
            try:
                measure(batch)
            except (torch.OutOfMemoryError, DeviceError) as error:
                section.put(f"batch {batch}", f"left out: {error}".splitlines()[0])


def keep_busy(engine: Engine, pixels: Pixels, batches: int) -> None:
    """So many batches through all of the engine's streams: host pixels in, logits out."""
    with ThreadPoolExecutor(engine.description.streams) as threads:
        list(threads.map(engine, [pixels] * batches))


# --- 5: r2n's forms of the network ----------------------------------------------------------------

FORMS = {form.__name__: form for form in (FoldedNetwork, FusedNetwork)}


def form_call(section: Section, form: str, precision: str, pixels: Pixels) -> Call:
    """A form of the network at work on pixels that are on the device."""
    device, dtype = section.device, DTYPES[precision]
    made = FORMS[form](section.network(), ("fc",), "avg", section.preprocessing, device, dtype)
    return partial(made, torch.from_numpy(pixels).to(device))


def best_forms(section: Section, precision: str, pixels: Pixels) -> dict[str, Call]:
    """Every form, with a CUDA graph where there are any."""
    calls = {form: form_call(section, form, precision, pixels) for form in FORMS}
    graphs = {form: graphed(section, call) for form, call in calls.items() if section.on_gpu}
    return {f"r2n {form}": call for form, call in (graphs or calls).items()}


def graphed(section: Section, call: Call) -> Call:
    """`call`, captured as a CUDA graph under the engine's settings."""
    side = torch.cuda.Stream(section.device)
    side.wait_stream(torch.cuda.current_stream(section.device))
    graph = torch.cuda.CUDAGraph()
    with exact_settings(section.device):
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(section.device).wait_stream(side)
        with torch.cuda.graph(graph):
            outputs = call()
    return lambda: (graph.replay(), outputs)


def forms(section: Section) -> None:
    """Each form of the network with CUDA graphs and without, and where its time goes."""
    precision = section.default_precision()
    section.put("precision", precision)
    few = photo_squares(4, section.side)
    expected = hooked(section.network(), few, ("fc",))["fc"]
    for form in FORMS:
        # Triton takes long to compile products of float32; `numbers` has the engine's
        for other in section.precisions()[1:] or ["fp32"]:
            with exact_settings(section.device):
                found = form_call(section, form, other, few)()["fc"].cpu().numpy()
            section.within_limit(f"{form} {other}", found, expected, other)

    def measure(batch: int) -> None:
        pixels = photo_squares(batch, section.side)
        calls = {form: form_call(section, form, precision, pixels) for form in FORMS}
        if batch == section.batches[0]:
            for form, call in calls.items():
                section.put(f"{form}, batch {batch}: kernels", kernel_table(section, call))
        if section.on_gpu:
            calls |= {f"{form}, CUDA graph": graphed(section, call) for form, call in calls.items()}
        timed = {name: (call, float(batch)) for name, call in calls.items()}
        section.in_turns(f"batch {batch}, images/s", timed)

    for_each_batch(section, measure)


def kernel_table(section: Section, call: Call) -> list[dict[str, Any]]:
    """The 25 kernels that take most of the device's time in one call."""
    activity, own = torch.profiler.ProfilerActivity.CPU, "self_cpu_time_total"
    if section.on_gpu:
        activity, own = torch.profiler.ProfilerActivity.CUDA, "self_device_time_total"
    call()
    section.synchronize()
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        section.synchronize()
    events = [
        event
        for event in sorted(profile.key_averages(), key=lambda event: -getattr(event, own))
        if not section.on_gpu or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    total = sum(getattr(event, own) for event in events) or 1
    return [
        {
            "kernel": event.key[:160],
            "calls": event.count,
            "microseconds": getattr(event, own),
            "share": getattr(event, own) / total,
        }
        for event in events[:25]
    ]


# --- 6: memory ------------------------------------------------------------------------------------


def memory(section: Section) -> None:
    """A batch that does not fit is halved until it does: no row is lost, none changes."""
    if not section.on_gpu:
        section.put("skipped", NEEDS_GPU)
        return
    network, pixels = section.network(), photo_squares(1024, section.side)
    engine = section.predictor(network, batch_size=64).engine
    precision = engine.description.precision
    expected = [engine(pixels[start : start + 64])["fc"] for start in range(0, 1024, 64)]
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(section.device).total_memory
    allowed = torch.cuda.memory_reserved(section.device) + 2e9
    torch.cuda.set_per_process_memory_fraction(allowed / total, section.device)
    engine = section.predictor(network, batch_size=1024).engine
    found = engine(pixels)["fc"]
    section.put("bytes allowed", allowed)
    section.put("engine", repr(engine.description))
    what = f"batches of 1024 images in {allowed / 1e9:.1f} GB, {precision}"
    section.within_limit(what, found, np.concatenate(expected), precision)


# --- 7: compiled ----------------------------------------------------------------------------------


def compiled(section: Section, mode: str = "max-autotune") -> None:
    """r2n's network against the plain one under torch.compile, in the same precision."""
    precision, batch, device = section.default_precision(), section.batches[0], section.device
    section.put("what", f"plain network, {precision}, channels_last, batch {batch}, mode {mode}")
    pixels = photo_squares(batch, section.side)
    eager = section.network().to(device, DTYPES[precision], memory_format=CHANNELS_LAST)
    there = normalised(pixels).to(device, DTYPES[precision], memory_format=CHANNELS_LAST)
    # a CPU's compiler is not the question there
    how: dict[str, str] = {"mode": mode} if section.on_gpu else {"backend": "aot_eager"}
    fast: Any = torch.compile(eager, dynamic=False, **how)
    start = time.perf_counter()
    for _ in range(3):  # the second records a CUDA graph, where the mode has one
        found = fast(there).float().cpu().numpy()
    section.put("seconds to compile", time.perf_counter() - start)
    expected = eager(there).float().cpu().numpy()
    section.put("differs from eager", relative_error(found, expected))
    calls = {
        **best_forms(section, precision, pixels),
        "compiled": partial(fast, there),
    }
    rates = section.in_turns("images/s", {name: (call, batch) for name, call in calls.items()})
    against_peers(section, f"batch {batch}, torch.compile({mode})", rates, 1.6)


def compiled_default(section: Section) -> None:
    """The same in torch.compile's default mode, for where max-autotune takes too long."""
    compiled(section, "default")


# --- all of it ------------------------------------------------------------------------------------

SECTIONS: dict[Callable[[Section], None], float] = {  # each is stopped after so many seconds
    environment: 40,
    numbers: 90,
    architectures: 90,
    model: 75,
    forms: 75,
    decoding: 75,
    end_to_end: 120,
    agreement: 90,
    memory: 40,
    compiled: 420,
    compiled_default: 120,
}
FOR_THE_DEFAULT_MODE = 70  # seconds that are kept when max-autotune begins
NAMES = {section.__name__: section for section in SECTIONS}


def check(
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("gpu_check.json"),
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(NAMES)}.")] = None,
    device: Annotated[str, typer.Option(help="cuda:N, or cpu.")] = "cuda:0",
    pictures: Annotated[str, typer.Option(help="A folder or zip file, for agreement.")] = "",
    seconds: Annotated[float, typer.Option(help="For everything.")] = 580,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: whether it works at all.")] = False,
) -> None:
    """Run the sections one after the other, and say what holds."""
    end = time.monotonic() + seconds
    document: dict[str, Any] = json.loads(output.read_text()) if only and output.exists() else {}
    sections: dict[str, Any] = document.get("sections", {})
    for name in only or NAMES:
        began = datetime.now().isoformat(timespec="seconds")
        limit = min(SECTIONS[NAMES[name]], end - time.monotonic())
        if name == "compiled" and not only:
            limit -= FOR_THE_DEFAULT_MODE
        tuned = "images/s" in sections.get("compiled", {})
        if name == "compiled_default" and tuned and not (only or quick):
            found: dict[str, Any] = {"skipped": "max-autotune was measured"}
        elif limit < 15:
            found = {"error": f"no time was left: --only {name}"}
        else:
            found = section_found(name, limit, [device, str(int(quick)), pictures])
        sections[name] = {"began": began, "device": device, "quick": quick, "checks": [], **found}
        save(output, {"sections": sections})
        how = found.get("error") or found.get("skipped") or f"{found['seconds']:.0f} s"
        print(f"{name}: {how}", file=sys.stderr, flush=True)
    raise typer.Exit(summary(sections))


def section_found(
    name: str, limit: float, options: list[str], own_group: bool = True
) -> dict[str, Any]:
    """What a section finds in a process of its own, however that ends."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="r2n-gpu-check-") as room:
        file, log = Path(room, "found.json"), Path(room, "log")
        command = [sys.executable, __file__, "--section", name, str(limit), str(file), *options]
        # without a GPU Triton interprets its kernels
        environ = os.environ | ({"TRITON_INTERPRET": "1"} if options[0] == "cpu" else {})
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, stdout=stream, stderr=stream, env=environ, start_new_session=own_group
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                process.kill()
                with suppress(ProcessLookupError):
                    if own_group:  # what it has started goes too
                        os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if code != 0:
            error = f"stopped after {limit:.0f} s" if code is None else f"ended with {code}"
            found = {"error": error, "log": log.read_text(errors="replace")[-3000:], **found}
    return {"seconds": time.monotonic() - start, **found}


def section_process(name: str, limit: str, file: str, *options: str) -> None:
    """One section; its error is a part of what it has found."""
    device, quick, pictures = options
    section = Section(device, bool(int(quick)), pictures, 0.8 * float(limit), Path(file))
    try:
        if section.on_gpu:
            torch.cuda.set_device(section.device)
        with torch.no_grad():
            if name.startswith("network "):
                logits_are_the_plain_ones(section, name.removeprefix("network "))
            else:
                NAMES[name](section)
        section.put("whole", True)
    except Exception as error:
        section.put("traceback", traceback.format_exc().splitlines()[-20:])
        section.put("error", f"{type(error).__name__}: {error}".splitlines()[0][:500])
        sys.exit(1)


def summary(sections: Mapping[str, Any]) -> int:
    """Print every check, and every section that failed; 1 if the numbers are not proven."""
    unproven = False
    for name, found in sections.items():
        for one in found["checks"]:
            proof = one["kind"] == "numbers"
            verdict = "PASS" if one["passed"] else "FAIL" if proof else "MISSED"
            unproven |= verdict == "FAIL"
            value = "" if isinstance(one["value"], bool) else f": {one['value']} ({one['wanted']})"
            print(f"{verdict:<7}{one['what']}{value}")
        if "error" in found:
            unproven |= name in ("numbers", "architectures", "agreement", "forms", "memory")
            print(f"ERROR  {name}: {found['error']}")
    return int(unproven)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--section"]:
        section_process(*sys.argv[2:])
    elif sys.argv[1:2] == ["--timm"]:
        timm_process(*sys.argv[2:])
    else:
        typer.run(check)
