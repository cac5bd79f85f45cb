"""What is written for users is complete and true: help texts, docstrings and README files."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import r2ncli
from r2ncli.architectures import PUBLISHED
from r2ncli.cli.app import app
from r2ncli.cli.options import flags
from r2ncli.errors import R2NError
from r2ncli.options import ALL, CLASSIFY, EXTRACT, options_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = (ROOT / "examples", ROOT / "r2ncli", ROOT / "tests")
DOCUMENTS = [*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in folder.rglob("*.md"))]
TABLE: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = TABLE.commands
FUNCTIONS = {
    "classify": (CLASSIFY, False),
    "extract": (EXTRACT, False),
    "classify_to": (CLASSIFY, True),
    "extract_to": (EXTRACT, True),
}

every_command = pytest.mark.parametrize("name", COMMANDS)
every_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=[file.relative_to(ROOT).as_posix() for file in DOCUMENTS]
)


def options_in(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if parameter.param_type_name == "option"]


def begins_with_imperative(sentence: str) -> bool:
    """Whether the first word can be an imperative: no article, question word or other form."""
    first = sentence.split(maxsplit=1)[0]
    others = {"A", "An", "How", "If", "No", "Whether", "What", "Where", "Which", "The", "This"}
    return first.isalpha() and first.istitle() and not re.search("ing$|ed$|[^s]s$", first) and (
        first not in others
    )  # fmt: skip


# --- help texts -----------------------------------------------------------------------


@every_command
def test_every_command_has_help_with_a_verb_and_an_example(name: str) -> None:
    command = COMMANDS[name]
    assert begins_with_imperative(command.help)
    assert command.epilog.startswith(f"Example:  r2n {name}")


@every_command
def test_every_option_and_argument_has_help(name: str) -> None:
    assert [one.name for one in COMMANDS[name].params if not one.help or one.hidden] == []


@every_command
def test_the_help_of_every_option_begins_with_a_verb(name: str) -> None:
    wrong = [one.help for one in options_in(COMMANDS[name]) if not begins_with_imperative(one.help)]
    assert wrong == []


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Classify images.", True),
        ("Compress a file.", True),
        ("Whether a file is corrupted.", False),
        ("The device.", False),
        ("A device.", False),
        ("Classifies images.", False),
        ("Pictures per batch.", False),
        ("… with this one.", False),
    ],
)
def test_imperatives_are_told_from_other_sentences(sentence: str, expected: bool) -> None:
    assert begins_with_imperative(sentence) is expected


@pytest.mark.parametrize("name", ALL)
def test_every_option_of_a_run_is_in_the_help_of_its_command(name: str) -> None:
    known = {flag for option in options_in(COMMANDS[name]) for flag in option.opts}
    wanted = {flag for one, _ in options_of(name, to_file=True) for flag in flags(one.name)}
    assert wanted - known == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_option_of_a_run_is_in_the_docstring_of_its_function(name: str) -> None:
    command, to_file = FUNCTIONS[name]
    lines = (inspect.getdoc(getattr(r2ncli, name)) or "").splitlines()
    options = [one.name for one, _ in options_of(command, to_file=to_file)]
    assert [option for option in options if option not in lines] == []


# --- README.md ------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 219


@every_command
def test_every_command_is_in_the_readme_with_an_example(name: str) -> None:
    assert re.search(rf"\br2n {name}\b", README)


def test_the_readme_names_no_option_that_does_not_exist() -> None:
    commands = [TABLE, *COMMANDS.values()]
    known = {flag for command in commands for one in options_in(command) for flag in one.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", README)) - known <= {"--help"}


def test_the_readme_has_every_exit_code() -> None:
    table = README.partition("### Exit codes")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| ([\d, ]+) \|", table, flags=re.MULTILINE)
    documented = [int(code) for cell in cells for code in cell.split(",")]
    errors = {error.exit_code for error in R2NError.__subclasses__()}
    assert sorted(documented) == sorted({0, 1, 8, 130, 143} | errors)


def test_the_readme_lists_the_published_networks() -> None:
    rows = re.findall(r"^\| `(\w+)`(?: \(default\))? \|(.*)\|$", README, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(PUBLISHED)
    for name, facts in rows:
        network = PUBLISHED[name]
        errors = f"{network.top1_error:.2f} / {network.top5_error:.2f}"
        expected = [f"`{network.file}`", f"{network.parameters:,}", errors]
        assert [cell.strip() for cell in facts.split("|")] == expected


# --- all README files -----------------------------------------------------------------


def test_the_tree_has_one_line_for_every_file_of_the_package() -> None:
    text = (ROOT / "r2ncli" / "README.md").read_text(encoding="utf-8")
    listed = sorted(name for name, _ in files_in_tree(text))
    package = ROOT / "r2ncli"
    assert listed == sorted(file.relative_to(package).as_posix() for file in package.rglob("*.py"))


def test_every_line_of_the_tree_says_what_a_file_is_for() -> None:
    text = (ROOT / "r2ncli" / "README.md").read_text(encoding="utf-8")
    assert [name for name, description in files_in_tree(text) if not description] == []


def files_in_tree(text: str) -> Iterator[tuple[str, str]]:
    """The name of each file in the tree, below the package's folder, and its description."""
    tree = text.partition("## The tree")[2].split("```")[1]
    folder = ""
    for line in tree.splitlines()[2:]:
        name, _, description = line.strip().partition(" ")
        inside = line.startswith("    ")
        if name.endswith("/"):
            folder = name
        else:
            yield (folder if inside else "") + name, description.strip()


@every_document
def test_links_lead_to_files_and_headings_that_exist(document: Path) -> None:
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        if "://" in link:
            continue
        target = document.parent / path if path else document
        if not target.exists() or (heading and heading not in headings(target)):
            missing.append(link)
    assert missing == []


def headings(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_document
def test_python_files_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"(?<![\w/])[\w/]+/\w+\.py\b", document.read_text(encoding="utf-8"))
    places = (document.parent, ROOT, ROOT / "r2ncli")
    examples = {"images/NAME.py", "engine/NAME.py"}
    assert [
        file for file in {*named} - examples if not any((place / file).exists() for place in places)
    ] == []


@every_document
def test_no_path_of_a_machine_is_written_down(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.~])/(?:home|root|work|tmp|Users|mnt|opt|var)/\S*", text) == []
