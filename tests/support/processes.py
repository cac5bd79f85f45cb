"""What a child process does before its program begins."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """Let SIGINT end a child process (for `preexec_fn`).

    A shell script that starts the tests in the background makes them ignore SIGINT, and a child
    inherits that.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
