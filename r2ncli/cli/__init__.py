"""The command line: the only package that prints, and that imports typer and rich."""
