"""Decode and resize the JPEGs of a batch on a CUDA GPU.

torchcodec decodes with nvJPEG, and one kernel resizes all images with Pillow's integer
arithmetic: from the same decoded pixels it computes exactly the bytes of `images.decode`.
nvJPEG's pixels differ from libjpeg's by the rounding of the inverse cosine transform and by
the upsampling of chroma, so `decode="gpu"` is a mode of its own.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from itertools import cycle

import numpy as np
import numpy.typing as npt
import PIL
import torch
import triton
import triton.language as tl
from PIL import Image

from r2ncli.architectures import Preprocessing
from r2ncli.errors import DeviceError, UsageError
from r2ncli.images.decode import Pixels, finished
from r2ncli.images.decoders import GPU_JPEG
from r2ncli.images.geometry import stored_box
from r2ncli.images.jpeg import Jpeg, for_gpu
from r2ncli.images.rules import DecodeRules

Table = npt.NDArray[np.int32]

_AT_ONCE = 1 << 27  # pixels decoded in one call: at most 400 MB on the GPU


class GpuDecoder:
    """Decodes and resizes JPEGs on GPUs in turn; several threads may call it.

    Parameters
    ----------
    devices : sequence of torch.device
        GPUs of one model.
    preprocessing : Preprocessing
        Gives the crop and the size.
    rules : DecodeRules
        Larger JPEGs are not accepted.

    Raises
    ------
    UsageError
        torchcodec cannot be loaded.
    DeviceError
        torchcodec cannot decode on this device.
    """

    def __init__(
        self, devices: Sequence[torch.device], preprocessing: Preprocessing, rules: DecodeRules
    ) -> None:
        try:
            from torchcodec.decoders import decode_jpeg
        except (ImportError, OSError, RuntimeError) as error:
            raise UsageError(
                f'`decode="gpu"` needs a torchcodec that fits torch {torch.__version__}: '
                f"{GPU_JPEG.hint} ({_first_line(error)})"
            ) from error
        self._rules = rules
        gpus = [_Gpu(device, preprocessing, decode_jpeg) for device in devices]
        self._turns = cycle(gpus)

    def accept(self, content: bytes) -> Jpeg | None:
        """A JPEG that the GPU can decode, or None if `content` is for the CPU."""
        return for_gpu(content, self._rules)

    def __call__(self, jpegs: Mapping[int, Jpeg], pixels: Pixels) -> list[int]:
        """Decode JPEGs into rows of a batch.

        Parameters
        ----------
        jpegs : mapping of int to Jpeg
            By their rows in `pixels`.
        pixels : uint8 array [B, image_size, image_size, 3]
            C-contiguous; the other rows are left as they are.

        Returns
        -------
        list of int
            Rows of images that nvJPEG refuses, mostly corrupted ones. They are not written;
            `images.decode` decodes them or says why it cannot.

        Raises
        ------
        DeviceError
            The GPU fails, or its memory does not hold a single image.
        """
        return next(self._turns).decode(jpegs, pixels)


class _Gpu:
    """The decoder of one GPU, with a stream for each calling thread."""

    def __init__(
        self,
        device: torch.device,
        preprocessing: Preprocessing,
        decode_jpeg: Callable[..., list[torch.Tensor]],
    ) -> None:
        self._device = device
        self._preprocessing = preprocessing
        self._decode_jpeg = decode_jpeg
        self._streams = threading.local()
        self._check()

    def decode(self, jpegs: Mapping[int, Jpeg], pixels: Pixels) -> list[int]:
        """See `GpuDecoder.__call__`."""
        batch = torch.from_numpy(pixels)
        refused: list[int] = []
        with self._device_errors(), self._own_stream() as wait:
            squares = torch.empty(batch.shape, dtype=torch.uint8, device=self._device)
            for rows in _parts(jpegs):
                decoded = self._decoded([jpegs[row] for row in rows], wait)
                images = {
                    row: image
                    for row, image in zip(rows, decoded, strict=True)
                    if image is not None
                }
                refused.extend(row for row in rows if row not in images)
                self._resize(images, jpegs, squares)
                # wait before the decoded images' memory is reused: the hardware JPEG decoders
                # write their output regardless of what is queued on a stream
                wait()
            for start, end in _runs(sorted(jpegs.keys() - set(refused))):
                batch[start:end].copy_(squares[start:end], non_blocking=True)
            wait()
        for row in jpegs.keys() - set(refused):
            orientation, to_srgb = jpegs[row].orientation, jpegs[row].to_srgb
            if orientation != 1 or to_srgb is not None:
                grey = jpegs[row].grey
                square = Image.fromarray(pixels[row, :, :, 0] if grey else pixels[row])
                pixels[row] = finished(square, orientation, to_srgb)
        return refused

    def _decoded(
        self, jpegs: Sequence[Jpeg], wait: Callable[[], object]
    ) -> list[torch.Tensor | None]:
        """Each image as uint8 [1 or 3, height, width], or None if nvJPEG refuses it."""
        encoded = [_bytes_as_tensor(jpeg.encoded) for jpeg in jpegs]
        try:
            decoded = self._decode_jpeg(encoded, mode="UNCHANGED", device=self._device)
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:  # one corrupted image, or too little memory: split the batch
            wait()  # decoding that has begun still writes to memory that is free now
            if len(jpegs) > 1:
                half = len(jpegs) // 2
                return self._decoded(jpegs[:half], wait) + self._decoded(jpegs[half:], wait)
            if isinstance(error, torch.OutOfMemoryError) or _NO_MEMORY.search(str(error)):
                width, height = jpegs[0].size
                raise DeviceError(
                    f"{self._device}: out of memory while decoding a JPEG of {width} x {height} "
                    'pixels. Try `decode="auto"` or a smaller `batch_size`'
                ) from error
            return [None]
        return [
            image if image.shape == (1 if jpeg.grey else 3, *jpeg.size[::-1]) else None
            for jpeg, image in zip(jpegs, decoded, strict=True)
        ]

    def _resize(
        self, images: Mapping[int, torch.Tensor], jpegs: Mapping[int, Jpeg], squares: torch.Tensor
    ) -> None:
        """Resize images [C, height, width] into their rows of `squares`."""
        if not images:
            return
        side = squares.shape[1]
        tables: list[Table] = []
        offsets: dict[int, int] = {}  # of each table in their concatenation
        end = 0
        descriptions = []
        for row, image in images.items():
            channel, down, across = image.stride()
            axes = _axes(jpegs[row].size, jpegs[row].orientation, self._preprocessing)
            grey = image.shape[0] == 1
            description = [image.data_ptr(), 0 if grey else channel, row * side * side * 3]
            for horizontal, size, taps, table in axes:
                if id(table) not in offsets:
                    offsets[id(table)] = end
                    tables.append(table)
                    end += len(table)
                description += (across, 3) if horizontal else (down, 3 * side)
                description += (size, taps, offsets[id(table)])
            descriptions.append(description)
        _resize_all[triton.cdiv(side * side, _BLOCK), len(images)](
            torch.tensor(descriptions, dtype=torch.int64).to(self._device),
            torch.from_numpy(np.concatenate(tables)).to(self._device),
            squares,
            side,
            _BLOCK,
            enable_fp_fusion=False,  # the kernel has no floats; triton 3.9 warns without this
        )

    @contextmanager
    def _own_stream(self) -> Iterator[Callable[[], object]]:
        """Use the calling thread's own stream; the value is a function that waits for its work."""
        if self._device.type == "cpu":
            yield lambda: None
            return
        with torch.cuda.device(self._device):
            if not hasattr(self._streams, "own"):
                self._streams.own = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(self._streams.own):
                yield self._streams.own.synchronize

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f'{self._device}: out of memory while decoding. Try `decode="auto"` or a smaller '
                "`batch_size`"
            ) from error
        except torch.AcceleratorError as error:
            raise DeviceError(f"{self._device} failed while decoding: {error}") from error

    def _check(self) -> None:
        """Decode a small image, so that a missing library is not reported as corrupted images."""
        content = BytesIO()
        Image.new("RGB", (16, 16)).save(content, "JPEG")
        jpeg = for_gpu(content.getvalue(), DecodeRules("gpu"))
        assert jpeg is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that bytes cannot be written to
            encoded = _bytes_as_tensor(jpeg.encoded)
        try:
            self._decode_jpeg([encoded], device=self._device)
        except RuntimeError as error:
            raise DeviceError(
                f"{self._device}: torchcodec cannot decode a JPEG on it: {_first_line(error)}. "
                'Use `decode="auto"`'
            ) from error
        side = self._preprocessing.image_size
        self.decode({0: jpeg}, np.empty((1, side, side, 3), np.uint8))


def _bytes_as_tensor(content: bytes) -> torch.Tensor:
    """View bytes as a uint8 tensor [length] without a copy; it must not be written to."""
    return torch.frombuffer(content, dtype=torch.uint8)


_NO_MEMORY = re.compile(r"out of memory|: 5\b")  # nvJPEG's status 5: its allocation failed


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _parts(jpegs: Mapping[int, Jpeg]) -> Iterator[list[int]]:
    """Split the rows into groups that are decoded in one call each, to bound the memory."""
    rows: list[int] = []
    pixels = 0
    for row, jpeg in jpegs.items():
        width, height = jpeg.size
        if rows and pixels + width * height > _AT_ONCE:
            yield rows
            rows, pixels = [], 0
        rows.append(row)
        pixels += width * height
    if rows:
        yield rows


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The start and end of each run of consecutive rows."""
    start = 0
    for at in range(1, len(rows) + 1):
        if at == len(rows) or rows[at] != rows[at - 1] + 1:
            yield rows[start], rows[at - 1] + 1
            start = at


# --- Pillow's bilinear resize ---------------------------------------------------------------
#
# An output pixel is the weighted mean of the input pixels within the filter's support. The
# weights are doubles, rounded to 22 fractional bits. One axis is resized first and rounded to
# eight bits, then the other (Pillow's Resample.c).

Axis = tuple[bool, int, int, Table]  # horizontal; size, taps, table


@lru_cache(maxsize=4096)
def _axes(
    size: tuple[int, int], orientation: int, preprocessing: Preprocessing
) -> tuple[Axis, Axis]:
    """How an image of `size` (width, height) is resized along its axes, in Pillow's order."""
    width, height = size
    side = preprocessing.image_size
    left, top, right, bottom = stored_box(size, orientation, preprocessing)
    horizontal = (True, width, *_weights(width, left, right, side))
    vertical = (False, height, *_weights(height, top, bottom, side))
    if _TALL_VERTICALLY_FIRST and height - side > max(0, 2 * (width - side)):
        return vertical, horizontal
    return horizontal, vertical


_TALL_VERTICALLY_FIRST = int(PIL.__version__.partition(".")[0]) >= 13


@lru_cache(maxsize=4096)
def _weights(size: int, low: float, high: float, side: int) -> tuple[int, Table]:
    """The weights with which `side` output pixels cover `low` to `high` of `size` input pixels.

    Returns
    -------
    int, int32 array [(1 + taps) * side]
        The number of taps; then rows of `side`: each output pixel's first input pixel, and its
        weight for each tap. Taps beyond the image have the weight 0.
    """
    start, end = np.float32(low), np.float32(high)  # Pillow stores the box as floats
    scale = float(end - start) / side
    reach = max(scale, 1.0)
    taps = 2 * int(np.ceil(reach)) + 1
    centres = float(start) + (np.arange(side) + 0.5) * scale
    firsts = np.maximum((centres - reach + 0.5).astype(np.int64), 0)
    ends = np.minimum((centres + reach + 0.5).astype(np.int64), size)
    at = firsts + np.arange(taps)[:, None]
    weights = np.maximum(1 - np.abs((at - centres + 0.5) * (1 / reach)), 0)
    weights[at >= ends] = 0
    weights /= np.cumsum(weights, axis=0)[-1]  # summed in Pillow's order
    fixed = (0.5 + weights * (1 << 22)).astype(np.int32)
    return taps, np.concatenate([firsts.astype(np.int32)[None], fixed]).ravel()


_BLOCK = 256


@triton.jit  # type: ignore[untyped-decorator]
def _resize_all(images, tables, squares, side, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute `block` pixels of one image in each program.

    `images` int64 [N, 13]: address, stride of the channels and offset in `squares`; then, for
    the axis that is resized first and for the other: stride of its pixels in the image and in
    `squares`, size, taps, and offset of its table in `tables`.
    """
    image = images + tl.program_id(1) * 13
    source = tl.load(image).to(tl.pointer_type(tl.uint8))
    channel = tl.load(image + 1).to(tl.int32)
    target = squares + tl.load(image + 2)
    step_1 = tl.load(image + 3).to(tl.int32)
    target_1 = tl.load(image + 4).to(tl.int32)
    last_1 = tl.load(image + 5).to(tl.int32) - 1
    taps_1 = tl.load(image + 6).to(tl.int32)
    table_1 = tables + tl.load(image + 7)
    step_2 = tl.load(image + 8).to(tl.int32)
    target_2 = tl.load(image + 9).to(tl.int32)
    last_2 = tl.load(image + 10).to(tl.int32) - 1
    taps_2 = tl.load(image + 11).to(tl.int32)
    table_2 = tables + tl.load(image + 12)

    pixel = tl.program_id(0) * block + tl.arange(0, block)
    inside = pixel < side * side
    at_1 = pixel % side
    at_2 = tl.minimum(pixel // side, side - 1)
    first_1 = tl.load(table_1 + at_1)
    first_2 = tl.load(table_2 + at_2)
    half = tl.full((block,), 1 << 21, tl.int32)
    red, green, blue = half, half, half
    for tap_2 in range(taps_2):
        # no clipping: no weight is negative, and apart from rounding they sum to 1
        line = source + tl.minimum(first_2 + tap_2, last_2) * step_2
        red_1, green_1, blue_1 = half, half, half
        for tap_1 in range(taps_1):
            there = line + tl.minimum(first_1 + tap_1, last_1) * step_1
            weight = tl.load(table_1 + (1 + tap_1) * side + at_1)
            red_1 += weight * tl.load(there).to(tl.int32)
            green_1 += weight * tl.load(there + channel).to(tl.int32)
            blue_1 += weight * tl.load(there + 2 * channel).to(tl.int32)
        weight = tl.load(table_2 + (1 + tap_2) * side + at_2)
        red += weight * (red_1 >> 22)
        green += weight * (green_1 >> 22)
        blue += weight * (blue_1 >> 22)
    here = target + at_1 * target_1 + at_2 * target_2
    tl.store(here, (red >> 22).to(tl.uint8), mask=inside)
    tl.store(here + 1, (green >> 22).to(tl.uint8), mask=inside)
    tl.store(here + 2, (blue >> 22).to(tl.uint8), mask=inside)
