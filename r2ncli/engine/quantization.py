"""A graph in int8, by NNCF's post-training quantisation.

NNCF works in a process of its own: importing it replaces Python's class of loggers, it prints
its progress, and what it holds would stay in memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from r2ncli.engine import Pixels
from r2ncli.errors import DeviceError, UsageError
from r2ncli.openvino_import import Core, Model, save_model, without_telemetry


def quantizer() -> str:
    """NNCF with its version, which is not imported.

    Raises
    ------
    UsageError
        It is not installed.
    """
    if find_spec("nncf") is None:
        raise UsageError("precision 'int8' is made by an extra: pip install 'r2ncli[int8]'")
    return f"nncf {version('nncf')}"


def quantized(graph: Model, pixels: Pixels) -> Model:
    """`graph` with its weights and activations in int8.

    Parameters
    ----------
    graph : Model
        For batches of one picture, without batch norms (see `folded`).
    pixels : uint8 array [N, H, W, 3]
        Pictures that show the usual range of its activations.

    Raises
    ------
    DeviceError
        NNCF failed.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="r2n-int8-") as folder:
            save_model(graph, Path(folder, "graph.xml"), compress_to_fp16=False)
            np.save(Path(folder, "pixels.npy"), pixels)
            done = subprocess.run(
                [sys.executable, "-P", "-W", "ignore", "-m", __name__, folder],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            )  # fmt: skip
            if done.returncode:
                last = done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}"
                raise DeviceError(f"cpu: NNCF failed to quantise the network: {last}")
            core = Core()
            core.set_property({"ENABLE_MMAP": False})  # the file goes
            return core.read_model(Path(folder, "quantized.xml"))
    except (OSError, RuntimeError) as error:
        raise DeviceError(f"cpu: the network cannot be quantised: {error}") from error


def _quantize(folder: Path) -> None:
    """What the other process does.

    The range of an activation is from its least to its largest value over all pictures: NNCF's
    default, the mean of the pictures' extremes, cuts more off than finer steps are worth (on
    the demonstration checkpoint it loses 0.15 points of top-1, this 0.07). Its slower bias
    correction gains little over the fast one, and takes twice the time and 2.8 GB.
    """
    # it would load all of torch to ask whether the network is one of torch's
    sys.modules["torch"] = None  # type: ignore[assignment]
    with without_telemetry():
        import nncf
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    pixels = np.load(folder / "pixels.npy")
    ranges = nncf.AdvancedQuantizationParameters(
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
    )
    model = nncf.quantize(
        Core().read_model(folder / "graph.xml"),
        nncf.Dataset(list(pixels[:, None])),
        subset_size=len(pixels),
        advanced_parameters=ranges,
    )
    save_model(model, folder / "quantized.xml", compress_to_fp16=False)


if __name__ == "__main__":
    _quantize(Path(sys.argv[1]))
