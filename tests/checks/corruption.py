"""Corrupt bytes, and watch the processes that read them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from random import Random
from typing import Any

HANG_SECONDS = 60

Corrupt = Callable[[bytearray, bytes, Random], None]


def watch(
    numbers: range, work: Callable[..., None], argument: Any
) -> tuple[list[tuple[int, Any]], list[dict[str, Any]], int]:
    """Let a process work on `numbers`, and go on in another one when it dies or hangs.

    The process executes ``work(numbers, argument, sender)``, which sends for each number an
    outcome and the peak of resident memory.

    Returns
    -------
    tuple
        Each number's outcome, the numbers that ended or stopped a process, and the highest peak.
    """
    context = multiprocessing.get_context("spawn")
    outcomes: list[tuple[int, Any]] = []
    troubles: list[dict[str, Any]] = []
    peak = 0
    while numbers:
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(numbers, argument, sender))
        worker.start()
        sender.close()
        done, trouble = 0, f"hangs for {HANG_SECONDS} s"
        try:
            while receiver.poll(HANG_SECONDS):
                outcome, rss = receiver.recv()
                outcomes.append((numbers[done], outcome))
                peak = max(peak, rss)
                done += 1
        except EOFError:
            worker.join()
            trouble = f"ends the process: {worker.exitcode}"
        worker.kill()
        worker.join()
        numbers = numbers[done:]
        if numbers and not (done and worker.exitcode == 0):  # it may ask for a fresh process
            troubles.append({"number": numbers[0], "what": trouble})
            numbers = numbers[1:]
    return outcomes, troubles, peak


def corrupt(original: bytes, other: Callable[[], bytes], random: Random) -> bytearray:
    """Return the bytes after one to four corruptions; `other` gives bytes to splice in."""
    content = bytearray(original)
    for _ in range(random.choice((1, 1, 1, 2, 3, 4))):
        if content:
            random.choice(CORRUPTIONS)(content, other(), random)
    return content


def span(content: bytearray, random: Random, longest: int = 64) -> slice:
    start = random.randrange(len(content))
    return slice(start, min(start + random.randint(1, longest), len(content)))


def flip_bits(content: bytearray, _other: bytes, random: Random) -> None:
    for _ in range(random.choice((1, 2, 8, 64))):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)


def cut_off(content: bytearray, _other: bytes, random: Random) -> None:
    del content[random.randrange(len(content)) :]


def cut_out(content: bytearray, _other: bytes, random: Random) -> None:
    del content[span(content, random)]


def splice(content: bytearray, other: bytes, random: Random) -> None:
    content[random.randrange(len(content)) :] = other[random.randrange(len(other)) :]


def change_a_header_byte(content: bytearray, _other: bytes, random: Random) -> None:
    content[random.randrange(min(len(content), 64))] = random.randrange(256)


def change_a_number(content: bytearray, _other: bytes, random: Random) -> None:
    """Most formats count in two or four bytes: lengths of chunks, sizes, offsets, numbers."""
    size, order = random.choice((2, 4)), random.choice(("big", "little"))
    start = random.randrange(min(len(content), random.choice((64, 512, len(content)))))
    most = 256**size - 1
    number = random.choice((0, 1, 2, 16, 255, 5000, len(content), most // 2, most // 2 + 1, most))
    content[start : start + size] = min(number, most).to_bytes(size, order)


def zero(content: bytearray, _other: bytes, random: Random) -> None:
    where = span(content, random)
    content[where] = bytes(where.stop - where.start)


def repeat(content: bytearray, _other: bytes, random: Random) -> None:
    where = span(content, random, longest=256)
    content[where] = content[where] * random.choice((2, 3, 50))


CORRUPTIONS: tuple[Corrupt, ...] = (
    *(flip_bits, cut_off, cut_out, splice),
    *(change_a_header_byte, change_a_number, zero, repeat),
)
