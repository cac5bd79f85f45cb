"""ICC profiles made of primaries and curves, and what their pixels are in sRGB by definition."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Primaries = tuple[tuple[float, float], ...]

D65 = (0.3127, 0.3290)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
D50_XYZ = np.array([0.9642, 1.0, 0.8249])


def xyz(chromaticity: tuple[float, float]) -> Array:
    x, y = chromaticity
    return np.array([x / y, 1.0, (1 - x - y) / y])


_CONES = np.diag((BRADFORD @ D50_XYZ) / (BRADFORD @ xyz(D65)))
ADAPTATION = np.linalg.inv(BRADFORD) @ _CONES @ BRADFORD  # D65 to D50


def to_xyz(primaries: Primaries) -> Array:
    """Linear RGB of these primaries, white D65, to XYZ: float64 [3, 3]."""
    columns = np.stack([xyz(primary) for primary in primaries], -1)
    return columns * np.linalg.solve(columns, xyz(D65))


def fixed(values: Any) -> bytes:
    return b"".join(struct.pack(">i", round(float(value) * 65536)) for value in values)


def gamma_curve(gamma: float) -> bytes:
    return b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + bytes(2)


SRGB_CURVE = (
    b"para"
    + struct.pack(">IHH", 0, 3, 0)
    + fixed([2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045])
)


def icc(
    space: bytes, tags: dict[bytes, bytes], *, kind: bytes = b"mntr", pcs: bytes = b"XYZ "
) -> bytes:
    """An ICC profile of these tags."""
    tags = {b"desc": b"mluc" + bytes(4) + struct.pack(">II", 0, 12), **tags}
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(content))
        body += content
    head = struct.pack(">I4sI4s4s4s", 0, b"test", 0x04200000, kind, space, pcs)
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + fixed(D50_XYZ)
    whole = head.ljust(128, b"\0") + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


def rgb_profile(primaries: Primaries, curve: bytes) -> bytes:
    columns = (ADAPTATION @ to_xyz(primaries)).T
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    colorants = {n: b"XYZ " + bytes(4) + fixed(c) for n, c in zip(names, columns, strict=True)}
    white = {b"wtpt": b"XYZ " + bytes(4) + fixed(D50_XYZ)}
    return icc(b"RGB ", white | colorants | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve))


def grey_profile(curve: bytes) -> bytes:
    return icc(b"GRAY", {b"wtpt": b"XYZ " + bytes(4) + fixed(D50_XYZ), b"kTRC": curve})


def ink_lab(inks: Array, darkest: int) -> Array:
    """The Lab of bare paper and whole inks, [N, 4] of 0 and 1: integers."""
    cyan, magenta, yellow, black = inks.T
    light = (1 - black) * (1 - 0.3 * cyan) * (1 - 0.4 * magenta) * (1 - 0.1 * yellow)
    lightness = darkest + (100 - darkest) * light
    a, b = 60 * magenta - 35 * cyan, 80 * yellow - 45 * cyan - 10 * magenta
    return np.rint(np.stack([lightness, a * light, b * light], -1) * [2.55, 1, 1]) / [2.55, 1, 1]


INKS = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(16, 4)


def ink_profile(darkest: int = 0) -> bytes:
    """A CMYK profile with two grid points a channel; `darkest` is L* of black ink."""
    lab = np.rint(ink_lab(INKS, darkest) * [2.55, 1, 1] + [0, 128, 128]).astype(np.uint8)
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(np.eye(3).reshape(-1))
    table += ramp * 4 + lab.tobytes() + ramp * 3
    return icc(b"CMYK", {b"A2B0": table, b"A2B1": table}, kind=b"scnr", pcs=b"Lab ")


PROFILES = {
    "display p3": rgb_profile(DISPLAY_P3, SRGB_CURVE),
    "adobe rgb": rgb_profile(ADOBE_RGB, gamma_curve(563 / 256)),
    "grey 1.8": grey_profile(gamma_curve(460 / 256)),
    "ink": ink_profile(),
}


def from_srgb_curve(values: Array) -> Array:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def to_srgb_bytes(linear: Array) -> Array:
    """Linear sRGB, beyond 0 to 1 cut off, as bytes."""
    cut = linear.clip(0, 1)
    curved = np.where(cut <= 0.0031308, cut * 12.92, 1.055 * cut ** (1 / 2.4) - 0.055)
    return np.rint(curved * 255)


def in_srgb(stored: Array, name: str) -> Array:
    """What pixels with a profile of a matrix or a curve are in sRGB by its definition."""
    if name == "grey 1.8":
        return to_srgb_bytes((stored / 255) ** (460 / 256))
    primaries, linear = DISPLAY_P3, from_srgb_curve(stored / 255)
    if name == "adobe rgb":
        primaries, linear = ADOBE_RGB, (stored / 255) ** (563 / 256)
    return to_srgb_bytes(linear @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)).T)


def lab_in_srgb(lab: Array) -> Array:
    f = (lab[:, 0] + 16) / 116
    f = np.stack([f + lab[:, 1] / 500, f, f - lab[:, 2] / 200], -1)
    d50 = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50_XYZ
    return to_srgb_bytes(d50 @ np.linalg.inv(ADAPTATION @ to_xyz(SRGB)).T)
