"""A checkpoint under the names, or in the container, that another library loads.

Nothing has its final name before it was read back and gave the source's logits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from r2ncli.architectures import Architecture
from r2ncli.errors import CheckpointError, OutputError, UsageError
from r2ncli.files import reason, sync
from r2ncli.model import Res2Net
from r2ncli.weights.checkpoints import (
    checked_sha256,
    find_checkpoint,
    labels_of,
    preprocessing_of,
    read_metadata,
)
from r2ncli.weights.containers import container
from r2ncli.weights.download import OnProgress
from r2ncli.weights.loading import (
    StateDict,
    Weights,
    build,
    expected_shapes,
    identify,
    load_state_dict,
    variant_name,
)
from r2ncli.weights.naming import MMPRETRAIN, OFFICIAL, TIMM, names_for

TORCHVISION = "torchvision-backbone"
NAMINGS = (OFFICIAL, TIMM, MMPRETRAIN, TORCHVISION)

# how far the logits may be from the source's: another runtime adds in another order
TOLERANCES = {".pth": 0.0, ".safetensors": 0.0, ".onnx": 1e-4, ".xml": 1e-4}
NEEDED = {
    ".onnx": ("onnx", "onnxscript", "onnxruntime"),
    ".xml": ("onnx", "onnxscript", "openvino"),  # OpenVINO reads what is exported to ONNX
}

Run = Callable[[Tensor], Tensor]  # pixels to logits, by what was written


@dataclass(frozen=True)
class Conversion:
    """What was converted into what.

    Attributes
    ----------
    source, output : str
        The checkpoint that was read, and what was written.
    sha256 : str
        The source's.
    variant : str
        The published network's name, or the architecture in words.
    naming : str
        One of `NAMINGS`.
    files : tuple of str
        Everything that was written, `output` last.
    difference : float
        Largest difference of the logits from the source's, relative to the largest logit.
    """

    source: str
    sha256: str
    variant: str
    output: str
    naming: str
    files: tuple[str, ...]
    difference: float


def convert(
    weights: Weights,
    output: str | os.PathLike[str],
    *,
    to: str = OFFICIAL,
    overwrite: bool = False,
    on_download: OnProgress | None = None,
) -> Conversion:
    """Write a checkpoint under another library's names, or for another runtime.

    Parameters
    ----------
    weights : str, path or None
        What to convert, as everywhere: a checkpoint under any names that are understood, a
        published network's name, or ``demo``.
    output : str or path
        Its suffix is the container: ``.pth``, ``.safetensors``, ``.onnx`` (dynamic batch
        axis), or ``.xml`` for OpenVINO, which comes with a ``.bin``. A ``.pth`` gets its
        metadata beside it (``mine.pth.json``).
    to : str
        The names: ``official``, ``timm``, ``mmpretrain``, or ``torchvision-backbone``: the
        official ones without the classifier, for detectors and segmenters.
    overwrite : bool
        Whether what exists is replaced.

    Raises
    ------
    UsageError
        The suffix or the naming is unknown, they do not go together, or a library is missing.
    CheckpointError
        The weights are absent, altered, or no Res2Net.
    OutputError
        The output exists, cannot be written, or does not give the source's logits.
    """
    out = Path(output)
    suffix = out.suffix.lower()
    _check_options(out, suffix, to)
    _refuse_existing(out, overwrite)

    path = find_checkpoint(weights, on_progress=on_download)
    container(path)
    digest = checked_sha256(path)
    state_dict = load_state_dict(path)
    architecture = identify(state_dict, path)
    network = build(architecture, state_dict)
    metadata = _metadata(path, digest, architecture.classes)
    size = metadata["preprocessing"]["image_size"]
    seeded = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = network(seeded)
    if not bool(logits.isfinite().all()):
        raise CheckpointError(f"{path}: its logits are not finite; r2n verify-weights says more")
    try:
        with TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.", suffix=".partial") as folder:
            partial = Path(folder, f"converted{suffix}")
            if suffix in NEEDED:
                run = _write_program(partial, network, size, json.dumps(metadata))
            else:
                run = _write_tensors(partial, state_dict, architecture, to, json.dumps(metadata))
            with torch.inference_mode():
                difference = float((run(seeded) - logits).abs().max() / logits.abs().max())
            if not difference <= TOLERANCES[suffix]:
                raise OutputError(
                    f"{out}: not written: its logits differ from those of {path} by "
                    f"{difference:.2g} of the largest, expected at most {TOLERANCES[suffix]:g}"
                )
            _publish(partial, out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {reason(error)}") from error
    return Conversion(
        source=str(path),
        sha256=digest,
        variant=variant_name(architecture),
        output=str(out),
        naming=to,
        files=tuple(str(file) for file in _files(out)),
        difference=difference,
    )


def _check_options(out: Path, suffix: str, to: str) -> None:
    if suffix not in TOLERANCES:
        raise UsageError(
            f"{out}: suffix {suffix!r} is no container, expected one of {', '.join(TOLERANCES)}"
        )
    if to not in NAMINGS:
        raise UsageError(f"--to {to!r}: expected one of {', '.join(NAMINGS)}")
    if suffix in NEEDED and to != OFFICIAL:
        raise UsageError(f"--to {to}: {suffix} has no tensor names that {to} would load")
    missing = [name for name in NEEDED.get(suffix, ()) if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{out}: {suffix} needs {' and '.join(missing)}: pip install 'r2ncli[onnx]'"
        )


def _files(out: Path) -> tuple[Path, ...]:
    """Everything that belongs to an output, itself last."""
    beside = {
        ".pth": out.with_name(out.name + ".json"),  # where `read_metadata` looks for it
        ".xml": out.with_suffix(".bin"),
    }
    companion = beside.get(out.suffix.lower())
    return (out,) if companion is None else (companion, out)


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not os.path.isdir(out.parent):
        raise OutputError(f"{out}: cannot be written: there is no folder {out.parent}")
    for file in _files(out):
        if os.path.isdir(file):
            raise OutputError(f"{file} is a folder, expected a name for a file")
        if os.path.lexists(file) and not overwrite:
            raise OutputError(f"{file} exists. --overwrite replaces it")


def _metadata(path: Path, digest: str, classes: int) -> dict[str, Any]:
    """What a checkpoint says of itself and what r2n takes for granted, with where it is from."""
    found = read_metadata(path)
    source: dict[str, Any] = {"file": path.name, "sha256": digest}
    if "source" in found:  # itself converted
        source["source"] = found["source"]
    metadata = {**found, "preprocessing": asdict(preprocessing_of(found, path)), "source": source}
    labels = labels_of(found, classes, path)
    if labels is not None:
        metadata["labels"] = labels.labels
        if labels.wnids is not None:
            metadata["wnids"] = labels.wnids
    return metadata


def _write_tensors(
    path: Path, state_dict: StateDict, architecture: Architecture, to: str, metadata: str
) -> Run:
    """Write the tensors as they are, in the published order, and read them back."""
    official = [name for name in expected_shapes(architecture) if name in state_dict]
    if to == TORCHVISION:
        names = {name: name for name in official if not name.startswith("fc.")}
    else:
        names = names_for(to, official)
    # clones: torch would save the whole storage of which a tensor is a part
    tensors = {
        new: state_dict[name].clone(memory_format=torch.contiguous_format)
        for name, new in names.items()
    }
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        path.write_bytes(save(tensors, {"format": "pt", "r2n": metadata}))
    else:
        buffer = BytesIO()
        torch.save(tensors, buffer)
        path.write_bytes(buffer.getbuffer())
        _files(path)[0].write_text(metadata + "\n", encoding="utf-8")
    classifier = {name: state_dict[name] for name in official if name.startswith("fc.")}
    return build(architecture, classifier | load_state_dict(path))


def _write_program(path: Path, network: Res2Net, size: int, metadata: str) -> Run:
    """Write the network as a program of another runtime, and load it there."""
    onnx = path.with_suffix(".onnx")
    program = torch.onnx.export(
        network,
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert program is not None  # so with dynamo
    for node in program.model.graph:
        node.metadata_props.clear()  # it names the files of this machine
    program.model.metadata_props["r2n"] = metadata
    program.save(onnx)
    if path.suffix == ".onnx":
        from onnxruntime import InferenceSession

        session = InferenceSession(onnx, providers=["CPUExecutionProvider"])
        return lambda pixels: torch.from_numpy(session.run(None, {"input": pixels.numpy()})[0])

    from r2ncli.openvino_import import Core, save_model

    core = Core()
    read = core.read_model(onnx)
    read.set_rt_info(metadata, "r2n")
    save_model(read, path, compress_to_fp16=False)
    compiled = core.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: torch.from_numpy(compiled({"input": pixels.numpy()})["logits"])


def _publish(partial: Path, out: Path) -> None:
    """Give what was written its final name, the companion first."""
    written, final = _files(partial), _files(out)
    for file in written:
        sync(file)
    if len(final) > 1:
        out.unlink(missing_ok=True)  # what was there does not fit the new companion
    for file, name in zip(written, final, strict=True):
        os.replace(file, name)
    sync(out.parent)
