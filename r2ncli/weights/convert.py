"""Convert a checkpoint to another library's tensor names, or to another runtime.

A file gets its final name only after it was read back and gave the source's outputs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from r2ncli.architectures import Architecture
from r2ncli.errors import CheckpointError, OutputError, UsageError
from r2ncli.files import reason, sync
from r2ncli.model import Res2Net
from r2ncli.weights.checkpoints import CheckpointFile, Weights, open_checkpoint
from r2ncli.weights.download import OnProgress
from r2ncli.weights.loading import build, check_work, load_state_dict
from r2ncli.weights.structure import (
    CLASSIFIER,
    MMPRETRAIN,
    OFFICIAL,
    TIMM,
    StateDict,
    expected_shapes,
    identify,
    names_for,
    variant_name,
)

TORCHVISION = "torchvision-backbone"
NAMINGS = (OFFICIAL, TIMM, MMPRETRAIN, TORCHVISION)

LOGITS, FEATURES = "logits", "features"  # what is compared before a file gets its name

# how far the outputs may be from the source's: another runtime adds in another order
TOLERANCES = {".pth": 0.0, ".safetensors": 0.0, ".onnx": 1e-4, ".xml": 1e-4}
NEEDED = {
    ".onnx": ("onnx", "onnxscript", "onnxruntime"),
    ".xml": ("onnx", "onnxscript", "openvino"),  # OpenVINO reads the model that is exported to ONNX
}

Run = Callable[[Tensor], Tensor]  # from pixels to the outputs that are compared


@dataclass(frozen=True)
class Conversion:
    """What a conversion read, wrote and compared.

    `sha256` is the source's, `variant` the published network's name or the architecture in
    words, `naming` one of `NAMINGS`. `files` are all that were written, `output` last. `compared`
    is ``logits``, or ``features`` (those of layer4) where the output has no classifier;
    `difference` is the largest one, relative to the source's largest value.
    """

    source: str
    sha256: str
    variant: str
    output: str
    naming: str
    files: tuple[str, ...]
    compared: str
    difference: float


def convert(
    weights: Weights,
    output: str | os.PathLike[str],
    *,
    to: str = OFFICIAL,
    overwrite: bool = False,
    on_download: OnProgress | None = None,
) -> Conversion:
    """Write a checkpoint with another library's tensor names, or for another runtime.

    Parameters
    ----------
    weights : str, path or None
        What to convert: a checkpoint file with the tensor names of any known library, a
        published network's name, or ``demo``.
    output : str or path
        Its suffix is the container: ``.pth``, ``.safetensors``, ``.onnx`` (dynamic batch
        axis), or ``.xml`` for OpenVINO, which comes with a ``.bin``. The metadata of a
        ``.pth`` is written beside it (``mine.pth.json``).
    to : str
        The tensor names: ``official``, ``timm``, ``mmpretrain``, or
        ``torchvision-backbone``, the official names without the classifier, for detectors
        and segmentation networks.
    on_download : callable, optional
        Called with a `DownloadProgress` during a download.

    Raises
    ------
    UsageError
        The suffix or the names are unknown, they do not go together, or a library is missing.
    CheckpointError
        The weights are absent, altered, or not a Res2Net.
    OutputError
        The output exists, cannot be written, or does not give the source's outputs.
    """
    out = Path(output)
    suffix = out.suffix.lower()
    _check(out, suffix, to, overwrite)

    source = open_checkpoint(weights, on_progress=on_download)
    state_dict = load_state_dict(source.path)
    architecture = identify(state_dict, source.path)
    size, metadata = source.preprocessing.image_size, _metadata(source, architecture.classes)
    check_work(architecture, size, source.path)
    network = build(architecture, state_dict)
    compared = FEATURES if to == TORCHVISION else LOGITS
    # tensors are the same at any size; a program has one size, and large images take long
    side = size if suffix in NEEDED else min(size, 224)
    count = 3 if side <= 256 else 1
    seeded = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        outputs = _outputs(network, compared)(seeded)
    if not bool(outputs.isfinite().all()):
        found = f"its {compared} are not finite; r2n verify-weights shows more"
        raise CheckpointError(f"{source.path}: {found}")
    try:
        with TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.", suffix=".partial") as folder:
            partial = Path(folder, f"converted{suffix}")
            if suffix in NEEDED:
                run = _write_program(partial, network, size, metadata)
            else:
                run = _write_tensors(partial, state_dict, architecture, to, metadata)
            with torch.inference_mode():
                difference = float((run(seeded) - outputs).abs().max() / outputs.abs().max())
            if not difference <= TOLERANCES[suffix]:
                raise OutputError(
                    f"{out}: not written: its {compared} differ from those of {source.path} by "
                    f"{difference:.2g} of the largest, expected at most {TOLERANCES[suffix]:g}"
                )
            _publish(partial, out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written: {reason(error)}") from error
    return Conversion(
        source=str(source.path),
        sha256=source.sha256,
        variant=variant_name(architecture),
        output=str(out),
        naming=to,
        files=tuple(str(file) for file in _files(out)),
        compared=compared,
        difference=difference,
    )


def _check(out: Path, suffix: str, to: str, overwrite: bool) -> None:
    if suffix not in TOLERANCES:
        known = ", ".join(TOLERANCES)
        raise UsageError(f"{out}: unknown suffix {suffix!r}, expected one of {known}")
    if to not in NAMINGS:
        raise UsageError(f"`to` {to!r}: expected one of {', '.join(NAMINGS)}")
    if suffix in NEEDED and to != OFFICIAL:
        raise UsageError(f'`to="{to}"`: {suffix} files have no tensor names; leave `to` out')
    missing = " ".join(name for name in NEEDED.get(suffix, ()) if find_spec(name) is None)
    if missing:
        raise UsageError(f"{suffix} needs what is not installed: pip install {missing}")
    if not os.path.isdir(out.parent):
        raise OutputError(f"{out}: cannot be written: the folder {out.parent} does not exist")
    for file in _files(out):
        if os.path.isdir(file):
            raise OutputError(f"{file} is a folder, expected the name of a file")
        if os.path.lexists(file) and not overwrite:
            raise OutputError(f"{file} exists. `overwrite=True` replaces it")


def _files(out: Path) -> tuple[Path, ...]:
    """Return every file that belongs to an output, the output itself last."""
    suffix = out.suffix.lower()
    if suffix == ".pth":
        return out.with_name(out.name + ".json"), out  # where `read_metadata` looks for it
    return (out.with_suffix(".bin"), out) if suffix == ".xml" else (out,)


def _metadata(file: CheckpointFile, classes: int) -> str:
    """Return the source's metadata as JSON, completed by r2n's defaults and the source."""
    source: dict[str, Any] = {"file": file.path.name, "sha256": file.sha256}
    if "source" in file.metadata:  # the source was converted itself
        source["source"] = file.metadata["source"]
    metadata = {**file.metadata, "preprocessing": asdict(file.preprocessing), "source": source}
    labels = file.labels(classes)
    if labels is not None:
        metadata["labels"] = labels.labels
        if labels.wnids is not None:
            metadata["wnids"] = labels.wnids
    return json.dumps(metadata)


def _outputs(network: Res2Net, compared: str) -> Run:
    """Return the function that gives the outputs to be compared."""
    if compared == LOGITS:
        return network
    return lambda pixels: network.forward_features(pixels)[-1]


def _write_tensors(
    path: Path, state_dict: StateDict, architecture: Architecture, to: str, metadata: str
) -> Run:
    """Write the tensors as they are, in the published order, and read them back."""
    official = [name for name in expected_shapes(architecture) if name in state_dict]
    if to == TORCHVISION:
        names = {name: name for name in official if name not in CLASSIFIER}
    else:
        names = names_for(to, official)
    # cloned, because torch saves the whole storage that a tensor is a part of
    tensors = {
        new: state_dict[name].clone(memory_format=torch.contiguous_format)
        for name, new in names.items()
    }
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        path.write_bytes(save(tensors, {"format": "pt", "r2n": metadata}))
    else:
        with open(path, "wb") as file:  # with a path, torch would write its name into it
            torch.save(tensors, file)
        _files(path)[0].write_text(metadata + "\n", encoding="utf-8")
    written = load_state_dict(path)
    if to == TORCHVISION:  # features do not depend on the classifier that a network needs
        written |= {name: state_dict[name] for name in CLASSIFIER}
        return _outputs(build(architecture, written), FEATURES)
    return build(architecture, written)


def _write_program(path: Path, network: Res2Net, size: int, metadata: str) -> Run:
    """Write the network for another runtime, and load it there."""
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
    assert program is not None  # true with dynamo
    for node in program.model.graph:
        node.metadata_props.clear()  # it has the paths of this machine
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
    """Rename the written files to their final names, the companion first."""
    written, final = _files(partial), _files(out)
    for file in written:
        sync(file)
    if len(final) > 1:
        out.unlink(missing_ok=True)  # an older file would not match the new companion
    for file, name in zip(written, final, strict=True):
        os.replace(file, name)
    sync(out.parent)
