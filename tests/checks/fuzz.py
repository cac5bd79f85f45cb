"""Read corrupted and hostile files of every kind that r2n reads: only an R2NError may come out.

    python tests/checks/fuzz.py                          # every kind, 300 mutants each
    python tests/checks/fuzz.py checkpoint-zip --count 20000
    python tests/checks/fuzz.py h5 --first 4711 --count 1 --keep mutants

A mutant is a folder of sound files of which one was changed. The kind, the seed and the number
decide how, so that a mutant can be made again. A process reads one mutant after another; it ends
the check with exit code 1 if anything but an R2NError is raised, if the process dies or hangs, or
if it takes more than 500 MB of memory beyond what it had for sound files. The last line is one
JSON document.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import pickletools
import resource
import shutil
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Annotated, Any

import h5py
import numpy as np
import torch
import typer
from corruption import corrupt, watch
from PIL import Image

import r2ncli
from r2ncli.architectures import Architecture
from r2ncli.engine.cache import Entry, cache_folder, read_entry, write_entry
from r2ncli.errors import ImageError, R2NError
from r2ncli.model import Res2Net
from r2ncli.outputs.results import read_rows
from r2ncli.sources.selection import Selection
from r2ncli.sources.walk import find_images

app = typer.Typer(add_completion=False)

MORE_MEMORY_MB = 500
MOST_ADDRESS_SPACE = 8_000_000_000  # bytes beyond what a process has when it begins
IMAGES = 8
CLASSES = 6
TINY = Architecture(
    (1, 1, 1, 1), base_width=16, stem=(8, 8, 16), average_pool_shortcut=True,
    stage_planes=(16, 16, 16, 16), classes=CLASSES,
)  # fmt: skip
RUN: dict[str, Any] = {"weights": "tiny.pth", "image_size": 32, "batch_size": 2, "workers": 1}
LAYERS = ("layer3", "layer4")
CACHED = {"network": "fuzz"}


@dataclass(frozen=True)
class Target:
    """What a kind of mutant is: sound files, which of them are changed, and who reads them."""

    make: Callable[[], None]  # writes the sound files into the current folder
    changed: str  # a pattern for the names of the files of which one is changed
    reads: tuple[Callable[[Random], object], ...]  # each of them reads every mutant


@app.command()
def fuzz(
    kinds: Annotated[
        list[str] | None, typer.Argument(metavar="[KIND]...", help="All, if none is given.")
    ] = None,
    count: Annotated[int, typer.Option(help="Number of mutants of each kind.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the mutations.")] = 0,
    first: Annotated[int, typer.Option(help="Number of the first mutant.")] = 0,
    jobs: Annotated[int, typer.Option(help="Number of processes.")] = os.cpu_count() or 1,
    keep: Annotated[
        Path | None, typer.Option(help="Copy what breaks r2n into this folder.")
    ] = None,
) -> None:
    """Read mutants of each kind: no crash, no hang, no error but an R2NError."""
    if unknown := set(kinds or ()) - set(TARGETS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    report: dict[str, Any] = {"command": "fuzz", "seed": seed, "kinds": {}}
    for kind in kinds or TARGETS:
        began = time.monotonic()
        shares = [range(first + job, first + count, jobs) for job in range(jobs)]
        work = (kind, seed, keep and keep.absolute())
        with ThreadPoolExecutor(jobs) as threads:
            watched = list(threads.map(lambda share: watch(share, read_mutants, work), shares))  # noqa: B023
        outcomes: Counter[str] = Counter()
        broken: list[dict[str, Any]] = []
        for read, troubles, _ in watched:
            broken += troubles
            for number, (outcome, what) in read:
                outcomes[outcome] += 1
                if outcome == "broken":
                    broken.append({"number": number, "what": what})
        report["kinds"][kind] = {
            "mutants": sum(len(read) + len(troubles) for read, troubles, _ in watched),
            **outcomes,
            "broken": broken,
            "peak_resident_mb": max(peak for *_, peak in watched) // 1024,
            "seconds": round(time.monotonic() - began),
        }
        shown = {**report["kinds"][kind], "broken": len(broken)}
        print(kind, shown, *broken[:20], sep="\n  ", flush=True)
    print(json.dumps(report))
    raise typer.Exit(int(any(one["broken"] for one in report["kinds"].values())))


def read_mutants(numbers: range, work: tuple[str, int, Path | None], sender: Connection) -> None:
    """Read one mutant after another, and send what came out of each."""
    kind, seed, keep = work
    target = TARGETS[kind]
    warnings.simplefilter("ignore")  # as the command line does
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where fsync takes no time
    with tempfile.TemporaryDirectory("", "r2n-fuzz-", memory, True) as scratch:
        os.environ["R2N_CACHE"] = os.path.join(scratch, "cache")
        sound, mutant = Path(scratch, "sound"), Path(scratch, "mutant")
        sound.mkdir()
        os.chdir(sound)
        target.make()
        for read in (*target.reads, *target.reads):  # the memory of what is imported and kept
            read_one(read, Random(0), mutant, sound)
        before = resident_mb()
        limit_address_space()
        for number in numbers:
            random = Random(f"{kind} {seed} {number}")
            copy(sound, mutant)
            changed = random.choice(sorted(mutant.glob(target.changed)))
            changed.write_bytes(mutate(changed.name, changed.read_bytes(), random))
            size = changed.stat().st_size
            if keep:  # before it is read, because it may end the process
                copy(mutant, keep / f"{kind}-{number}")
            results = [read_one(read, random, mutant) for read in target.reads]
            broken = [what for outcome, what in results if outcome == "broken"]
            more = resident_mb() - before - 4 * size // 1_000_000
            if more > MORE_MEMORY_MB:
                broken.append(f"takes {more} MB more memory")
            outcome = "read" if all(outcome == "read" for outcome, _ in results) else "refused"
            sender.send(
                (("broken" if broken else outcome, "; ".join(broken)), 1024 * resident_mb())
            )
            if keep and not broken:
                shutil.rmtree(keep / f"{kind}-{number}")
            if more > MORE_MEMORY_MB:
                return  # another process begins with little memory again
            os.chdir(scratch)


def read_one(
    read: Callable[[Random], object], random: Random, mutant: Path, sound: Path | None = None
) -> tuple[str, str]:
    """Return what one reader makes of a mutant: ``read``, ``refused`` or ``broken``, and why."""
    if sound:
        copy(sound, mutant)
    os.chdir(mutant)
    try:
        read(random)
    except (R2NError, ImageError) as error:
        if sound:
            raise
        text = str(error)
        return ("refused", "") if text and "\0" not in text else ("broken", f"says {text!r}")
    except BaseException as error:
        if sound:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "r2ncli" in frame.filename] or frames
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return "broken", f"{name_of(read)}: {type(error).__name__}: {error} ({place})"[:400]
    return "read", ""


def name_of(read: Callable[..., object]) -> str:
    while isinstance(read, partial):
        read = read.func
    return getattr(read, "__name__", repr(read))


def copy(folder: Path, to: Path) -> None:
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)


def resident_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def limit_address_space() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MOST_ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


# --- mutations --------------------------------------------------------------------------


def mutate(name: str, content: bytes, random: Random) -> bytes:
    """Return the file changed: its bytes as they lie there, or what it contains."""
    inside = next((change for suffix, change in INSIDE.items() if name.endswith(suffix)), None)
    if inside is None or random.random() < 0.3:
        return bytes(corrupt(content, lambda: content, random))
    return inside(content, random)


def mutate_zip(content: bytes, random: Random) -> bytes:
    """Change a member of a zip archive, or the list of members; every checksum is right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    number = random.randrange(len(members))
    pickles = [n for n, (name, _) in enumerate(members) if name.endswith(".pkl")]
    if pickles and random.random() < 0.7:
        number = pickles[0]
    name, member = members[number]
    action = random.random()
    if action < 0.8:
        members[number] = name, mutate(name, member, random)
    elif action < 0.85:
        del members[number]
    elif action < 0.9:
        members.insert(number, (name, mutate(name, member, random)))
    elif action < 0.95:
        text = mutate_text(name, random).encode(errors="replace").decode()
        members[number] = text.partition("\0")[0] or "x", member  # zipfile writes no other name
    else:
        members[number] = name, member * random.choice((2, 100))
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    changed = io.BytesIO()
    with zipfile.ZipFile(changed, "w", method) as archive:
        for name, member in members:
            archive.writestr(name, member)
    return changed.getvalue()


def mutate_pickle(content: bytes, random: Random) -> bytes:
    """Change, remove, double or move opcodes; the result is a sequence of opcodes again."""
    opcodes: list[bytes] = []
    at, end = 0, len(content)
    with suppress(ValueError, IndexError):  # behind the pickle, and in a mutant of a mutant
        for _ in range(5):  # torch before 1.6 writes five pickles in a row
            positions = [at + position for *_, position in pickletools.genops(content[at:])]
            positions = [p for p in positions if p is not None]
            bounds = [*positions, positions[-1] + 1]
            opcodes += [content[a:b] for a, b in pairwise(bounds)]
            at = bounds[-1]
    if not opcodes:
        return bytes(corrupt(content, lambda: content, random))
    for _ in range(random.choice((1, 1, 2, 5))):
        where = random.randrange(len(opcodes))
        action = random.randrange(6)
        if action == 0:
            del opcodes[where : where + random.choice((1, 1, 3, 20))]
        elif action == 1:
            opcodes.insert(where, random.choice(opcodes))
        elif action == 2:
            opcodes[where] = random.choice(opcodes)
        elif action == 3:
            opcodes.insert(where, random.choice(HOSTILE_OPCODES))
        elif action == 4:
            opcodes[where] = random.choice(HOSTILE_OPCODES)
        else:
            opcodes[where] *= random.choice((2, 2, 100, 20_000))
        if not opcodes:
            break
    return b"".join(opcodes) + content[at:end]


def long_number(number: int) -> bytes:
    digits = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


HOSTILE_OPCODES = (
    *map(long_number, (0, 1, -1, 3, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, 2**64, 2**500)),
    *(b"N", b"\x88", b"\x89", b"]", b"}", b")", b"(", b"t", b"\x85", b"\x86", b"\x87", b"2", b"0"),
    *(b"R", b"b", b"s", b"u", b"a", b"e", b"Q", b"1", b"q\x00", b"h\x00", b"h\x01", b"\x94", b"."),
    *(b"G\x7f\xf8" + bytes(6), b"X\x03\x00\x00\x00get", b"X\x01\x00\x00\x00\x1b", b"\x8f", b"\x91"),
    *(b"cos\nsystem\n", b"ctorch._utils\n_rebuild_qtensor\n", b"ccollections\nOrderedDict\n"),
    *(b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nSize\n", b"ctorch\nDoubleStorage\n"),
    *(b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch.serialization\n_get_layout\n"),
    *(
        b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n",
        b"c_codecs\nencode\n",
        b"cbuiltins\nset\n",
    ),
    *(b"ctorch\nTensor\n", b"ctorch._utils\n_rebuild_parameter_with_state\n", b"ctorch\nfloat16\n"),
    *(b"X\xff\xff\xff\xff", b"B\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"\x95" + b"\xff" * 8),
)


def mutate_json(content: bytes, random: Random) -> bytes:
    """Replace, remove or add values anywhere in a JSON document."""
    try:
        document = json.loads(content)
    except ValueError:
        return bytes(corrupt(content, lambda: content, random))
    for _ in range(random.choice((1, 1, 1, 3))):
        holder: Any = {"": document}
        key: Any = ""
        while isinstance(holder[key], dict | list) and holder[key] and random.random() < 0.75:
            holder = holder[key]
            key = random.choice([*holder] if isinstance(holder, dict) else range(len(holder)))
        action = random.randrange(5)
        if action == 0 and key != "":
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[mutate_text(str(key), random)] = holder[key]
        elif action == 2 and isinstance(holder[key], int | float):
            holder[key] = random.choice(NUMBERS)
        elif action == 2 and isinstance(holder[key], str):
            holder[key] = mutate_text(holder[key], random)
        else:
            holder[key] = random.choice(VALUES)()
        if key == "":
            document = holder[key]
    return json.dumps(document).encode("utf-8", "surrogatepass")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


NUMBERS = (
    *(0, -1, 1, 2, 7, 255, 5000, 2**31, 2**32, 2**53 + 1, 2**63, -(2**63), 10**30, 1e300),
    *(0.5, -0.0, float("nan"), float("inf"), float("-inf"), True),
)
VALUES: tuple[Callable[[], Any], ...] = (
    *(lambda: None, lambda: True, lambda: "", list, dict, lambda: [[]], lambda: {"": {}}),
    *(lambda: -1, lambda: 2**70, lambda: 1e999, lambda: 0.1, lambda: "\0", lambda: "\x1b]0;x\x07"),
    *(lambda: "\ud800", lambda: "x" * 100_000, lambda: [0] * 10_000, lambda: ["a", 1, None]),
    *(lambda: nested(500), lambda: {"a": {"b": []}}, lambda: "../../etc/passwd", lambda: "1/2"),
)


def mutate_text(text: str, random: Random) -> str:
    part = random.choice(
        (
            "",
            "\0",
            "\x1b[31m",
            "\x9b",
            "\ud800",
            "\udcff",
            "/",
            "..",
            "=1",
            "\n",
            '"',
            "x" * 5000,
            "é",
        )
    )
    start, end = sorted((random.randint(0, len(text)), random.randint(0, len(text))))
    return random.choice(
        (text[:start] + part + text[start:], text[:start] + part + text[end:], part)
    )


def mutate_lines(content: bytes, random: Random) -> bytes:
    """Change a line of a JSON Lines file."""
    lines = content.split(b"\n")
    number = random.randrange(len(lines))
    lines[number] = mutate_json(lines[number], random) * random.choice((1, 1, 2))
    return b"\n".join(lines)


def mutate_csv(content: bytes, random: Random) -> bytes:
    """Change cells, rows or the header of a CSV file."""
    rows = list(csv.reader(io.StringIO(content.decode("utf-8"), newline="")))
    for _ in range(random.choice((1, 1, 3))):
        row = random.choice(rows)
        action = random.randrange(4)
        if action == 0 or not row:
            rows.insert(random.randrange(len(rows)), row[: random.randint(0, len(row))])
        elif action == 1:
            row.insert(random.randrange(len(row) + 1), random.choice(row))
        else:
            number = str(random.choice(NUMBERS))
            cell = random.randrange(len(row))
            row[cell] = random.choice((mutate_text(row[cell], random), number, "x" * 200_000))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def mutate_header(content: bytes, random: Random) -> bytes:
    """Change the JSON header of a safetensors file; its length is right again."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = mutate_json(content[8:end], random)
    return len(header).to_bytes(8, "little") + header + content[end:]


def mutate_npy(content: bytes, random: Random) -> bytes:
    """Change the header of an array; its length is right again."""
    end = 10 + int.from_bytes(content[8:10], "little")
    header = content[10:end].decode("latin-1")
    old, new = random.choice(
        (("'<f4'", "'|O'"), ("(", "(9999999999, "), ("(", "(-1, "), ("'<", "'>"),
         ("'<f4'", "'<M8'"), ("False", "True"), ("{", "[" * 200), ("'<f4'", "[('a', '<f4')]"),
         ("'<U", "'<U99999"))
    )  # fmt: skip
    changed = header.replace(old, new, 1).encode("latin-1")
    return content[:8] + len(changed).to_bytes(2, "little") + changed + content[end:]


def mutate_cached(content: bytes, random: Random) -> bytes:
    """Change the header of an entry of the cache; the digest is right again."""
    end = 40 + int.from_bytes(content[32:40], "little")
    header = mutate_json(content[40:end], random)
    length = random.choice((len(header), len(header), *(n for n in (0, 2**40, 2**63)))).to_bytes(
        8, "little"
    )
    rest = length + header + content[end:]
    return sha256(rest).digest() + rest


def mutate_tar(content: bytes, random: Random) -> bytes:
    """Change headers of a tar archive; their checksums are right again."""
    changed = corrupt(content, lambda: content, random)
    for at in range(0, len(changed) - 511, 512):
        if changed[at + 257 : at + 262] == b"ustar":
            changed[at + 148 : at + 156] = b" " * 8
            changed[at + 148 : at + 156] = b"%06o\0 " % sum(changed[at : at + 512])
    return bytes(changed)


def mutate_gzip(content: bytes, random: Random) -> bytes:
    return gzip.compress(mutate_tar(gzip.decompress(content), random), 1)


def mutate_h5(content: bytes, random: Random) -> bytes:
    """Replace a dataset, a group or an attribute of an HDF5 file; the file itself is sound."""
    memory = io.BytesIO(content)
    with h5py.File(memory, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        for _ in range(random.choice((1, 1, 2))):
            if random.random() < 0.3:
                key = random.choice([*file.attrs, "new"])
                with suppress(TypeError, ValueError, RuntimeError, OSError):
                    file.attrs[key] = random.choice((*ATTRIBUTES, *NUMBERS))
                continue
            name = random.choice(names)
            old = file.get(name)
            if old is None:
                continue
            if random.random() < 0.9:
                del file[name]
            else:
                name += "-more"
            with suppress(TypeError, ValueError, RuntimeError, OSError, KeyError):
                random.choice(HOSTILE_OBJECTS)(file, name, getattr(old, "shape", (3,)))
    return memory.getvalue()


ATTRIBUTES = (
    "",
    "null",
    "[",
    "{}",
    "[1]",
    "[" * 5000,
    '{"inputs": -1}',
    "x" * 50_000,
    b"\xff",
    [1, 2],
)
Hostile = Callable[[h5py.File, str, tuple[int, ...]], object]
HOSTILE_OBJECTS: tuple[Hostile, ...] = (
    lambda file, name, shape: file.create_group(name),
    lambda file, name, shape: file.__setitem__(name, h5py.SoftLink("/paths")),
    lambda file, name, shape: file.__setitem__(name, h5py.SoftLink("/nowhere")),
    lambda file, name, shape: file.__setitem__(name, h5py.ExternalLink("sound.h5", "/paths")),
    lambda file, name, shape: file.__setitem__(name, file["/"]),
    lambda file, name, shape: file.create_dataset(
        name, shape, "f4", external=[("/etc/passwd", 0, 2000)]
    ),
    lambda file, name, shape: file.create_dataset(
        name, (shape[0], 10**12), "f4", chunks=(1, 10**6)
    ),
    lambda file, name, shape: file.create_dataset(name, (10**15, 4), "f4", chunks=(1, 4)),
    lambda file, name, shape: file.create_dataset(name, (shape[0], 0), "f4"),
    lambda file, name, shape: file.create_dataset(name, (), "f4"),
    lambda file, name, shape: file.create_dataset(name, shape, "i8"),
    lambda file, name, shape: file.create_dataset(name, shape, [("a", "f4"), ("b", "i4")]),
    lambda file, name, shape: file.create_dataset(name, shape, h5py.ref_dtype),
    lambda file, name, shape: file.create_dataset(name, shape, h5py.vlen_dtype(np.int8)),
    lambda file, name, shape: file.create_dataset(name, shape[:1], h5py.string_dtype()),
    lambda file, name, shape: file.create_dataset(name, data=["\0a", "b\x1b"] * (shape[0] // 2)),
    lambda file, name, shape: file.create_dataset(
        name, (shape[0], 50_000_000), "f4", chunks=(1, 50_000_000), compression="gzip", fillvalue=1
    ),
)

INSIDE: dict[str, Callable[[bytes, Random], bytes]] = {
    "legacy.pth": mutate_pickle,
    ".pth": mutate_zip,
    ".npz": mutate_zip,
    ".zip": mutate_zip,
    ".npy": mutate_npy,
    ".pkl": mutate_pickle,
    ".safetensors": mutate_header,
    ".json": mutate_json,
    ".jsonl": mutate_lines,
    ".csv": mutate_csv,
    ".h5": mutate_h5,
    ".tar": mutate_tar,
    ".tar.gz": mutate_gzip,
    ".network": mutate_cached,
}


# --- the sound files, and who reads them ------------------------------------------------


def tiny_network() -> Res2Net:
    torch.manual_seed(0)
    return Res2Net(TINY).eval()


def save_tiny(name: str = "tiny.pth", **options: Any) -> None:
    torch.save(tiny_network().state_dict(), name, **options)


def save_training(name: str) -> None:
    """Save what a training script does: the network, its optimiser, numbers, options."""
    network = tiny_network()
    optimiser = torch.optim.SGD(network.parameters(), momentum=0.9)
    state = {"state_dict": network.state_dict(), "optimizer": optimiser.state_dict(), "epoch": 3}
    torch.save(state, name)


def save_safetensors(name: str) -> None:
    save_tiny()
    r2ncli.convert("tiny.pth", name)
    os.remove("tiny.pth")


def metadata() -> dict[str, Any]:
    return {
        "labels": [f"label {number}" for number in range(CLASSES)],
        "wnids": [f"n{number:08d}" for number in range(CLASSES)],
        "preprocessing": {"image_size": 32, "resize_size": 37, "mean": [0.5] * 3, "std": [0.2] * 3},
        "note": "any text",
    }


def make_metadata() -> None:
    save_tiny()
    Path("tiny.pth.json").write_text(json.dumps(metadata()))
    make_images()


def make_images() -> None:
    for number in range(IMAGES):
        Image.new("RGB", (40, 30), (30 * number, 90, 200 - 20 * number)).save(f"{number}.png")


def images() -> list[str]:
    return [f"{number}.png" for number in range(IMAGES)]


def checkpoint_of(_: Random) -> Path:
    return next(path for path in Path().iterdir() if path.name.startswith("checkpoint"))


def verify(random: Random) -> None:
    json.dumps(str(r2ncli.verify_weights(checkpoint_of(random))))


def load(random: Random) -> None:
    r2ncli.load_model(checkpoint_of(random))


def convert(random: Random) -> None:
    if random.random() < 0.1:
        r2ncli.convert(checkpoint_of(random), "converted.safetensors", overwrite=True)


def compare(random: Random) -> None:
    if random.random() < 0.1:
        r2ncli.verify_weights(checkpoint_of(random), against="demo")


def classify_with_metadata(_: Random) -> None:
    options = {**RUN, "image_size": None}
    list(r2ncli.classify(images()[:2], **options))
    r2ncli.verify_weights("tiny.pth")


def write(output: str, **options: Any) -> None:
    if output.endswith(".h5"):
        r2ncli.extract_to(output, images(), layers=LAYERS, **RUN, **options)
    else:
        r2ncli.classify_to(output, images(), **RUN, topk=2, **options)


def make_output(suffix: str) -> None:
    save_tiny()
    make_images()
    for output, shard in (("whole", None), ("sound", None), ("one", "1/2"), ("two", "2/2")):
        write(output + suffix, shard=shard)


def read_all(suffix: str, _: Random) -> None:
    for _row in read_rows(Path("whole" + suffix)):
        pass


def compare_outputs(suffix: str, _: Random) -> None:
    r2ncli.diff("whole" + suffix, "sound" + suffix)


def merge(suffix: str, _: Random) -> None:
    r2ncli.merge(["one" + suffix, "two" + suffix], "merged" + suffix, overwrite=True)


def resume(suffix: str, random: Random) -> None:
    if random.random() < 0.2:
        write("whole" + suffix, **{random.choice(("resume", "retry_failed")): True})


def make_partial(suffix: str) -> None:
    """Interrupt a run, so that its blocks stay."""
    save_tiny()
    make_images()

    def interrupt(progress: r2ncli.Progress) -> None:
        if progress.done >= 4:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        write("out" + suffix, on_progress=interrupt)
    assert list(Path(f"out{suffix}.partial").glob("block-*"))


def resume_partial(suffix: str, _: Random) -> None:
    write("out" + suffix, resume=True)


def make_archive(name: str) -> None:
    make_images()
    if name.endswith(".zip"):
        with zipfile.ZipFile(name, "w") as archive:
            for number, image in enumerate(images()):
                method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2]
                archive.write(image, f"folder/{image}", method)
    else:
        mode: Any = "w:gz" if name.endswith(".gz") else "w"
        format = tarfile.PAX_FORMAT
        with tarfile.open(name, mode, format=format) as archive:
            for image in images():
                archive.add(image, f"folder-é/{'long' * 30}/{image}")
    for image in images():
        os.remove(image)


def read_archive(_: Random) -> None:
    name = next(path.name for path in Path().iterdir())
    for found in find_images([name], lambda _: None, Selection()):
        assert "\0" not in found.name
        with suppress(ImageError):
            found.read(1_000_000)


def make_cached() -> None:
    write_entry(CACHED, Entry({"fact": 1, "names": ["a"]}, np.arange(5000, dtype=np.uint8)))
    for entry in cache_folder().iterdir():
        shutil.copy(entry, entry.name)


def read_cached(_: Random) -> None:
    for entry in Path().iterdir():
        shutil.copy(entry, cache_folder() / entry.name)
    entry = read_entry(CACHED)
    assert entry is None or isinstance(entry.facts, dict)


def of_checkpoint(make: Callable[[str], None], name: str) -> Target:
    return Target(partial(make, name), name, (verify, load, convert, compare))


def of_output(suffix: str) -> Target:
    reads = (read_all, compare_outputs, merge, resume)
    changed = f"[wo][hn][oe]*{suffix}" if suffix == ".h5" else "[wo][hn][oe]*"
    return Target(
        partial(make_output, suffix), changed, tuple(partial(read, suffix) for read in reads)
    )


def of_partial(suffix: str) -> Target:
    return Target(
        partial(make_partial, suffix), f"out{suffix}.partial/*", (partial(resume_partial, suffix),)
    )


def of_archive(name: str) -> Target:
    return Target(partial(make_archive, name), name, (read_archive,))


TARGETS: dict[str, Target] = {
    "checkpoint-zip": of_checkpoint(save_tiny, "checkpoint.pth"),
    "checkpoint-training": of_checkpoint(save_training, "checkpoint.pth"),
    "checkpoint-legacy": of_checkpoint(
        partial(save_tiny, _use_new_zipfile_serialization=False), "checkpoint-legacy.pth"
    ),
    "checkpoint-safetensors": of_checkpoint(save_safetensors, "checkpoint.safetensors"),
    "metadata": Target(make_metadata, "*.json", (classify_with_metadata,)),
    **{suffix[1:]: of_output(suffix) for suffix in (".csv", ".jsonl", ".parquet", ".h5")},
    **{f"partial-{suffix[1:]}": of_partial(suffix) for suffix in (".csv", ".parquet", ".h5")},
    **{name: of_archive(f"images.{name}") for name in ("tar", "tar.gz", "zip")},
    "cache": Target(make_cached, "*.network", (read_cached,)),
}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    app()
