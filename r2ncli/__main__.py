"""The entry point of the program: ``r2n`` and ``python -m r2ncli``.

It imports the command line inside `main`, so that Ctrl-C during the import ends it cleanly.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; exit with 130 if it is interrupted while it is loaded."""
    try:
        from r2ncli.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("r2n: interrupted\n")
        sys.stderr.flush()
        os._exit(130)


if __name__ == "__main__":
    main()
