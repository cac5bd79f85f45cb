"""``python -m r2ncli`` is the command ``r2n``."""

from r2ncli.cli.app import app

if __name__ == "__main__":
    app(prog_name="r2n")
