"""The README and the pages behind it against the program: tables, tree and commands must stay true."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dsmoe_local.cli.commands import COMMANDS, load_command

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
DEMO_DATA = ROOT / "convert" / "dsmoe_convert" / "demo" / "data"
LINKS = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)


def blocks(page: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_a_stranger_reads_it_to_the_end() -> None:
    """Guards against a README that grows into a manual: the pages in docs are for that."""
    assert len(README.splitlines()) <= 200


def output_of(*command: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"COLUMNS": "80"},
    )
    return [line.rstrip() for line in done.stdout.rstrip().splitlines()]


def test_the_table_of_types() -> None:
    """Guards the sizes against a change of a recipe or a mix."""
    for options in ([], ["--family"]):
        tables = "\n".join(output_of("benchmarks/type_sizes.py", *options)[:-1]).split("\n\n")
        assert all(table in PAGES["quantization"] for table in tables)


def test_the_table_of_the_demos_quality() -> None:
    """Guards the perplexities against a calibration that was made and measured anew."""
    quality = json.loads((DEMO_DATA / "quality.json").read_text(encoding="utf-8"))
    page = PAGES["demo"]
    assert quality["command"] in page
    for row in quality["rows"]:
        active = f"{row['active']} of {row['experts']}" if row["experts"] else "dense"
        error = row["perplexity"] * row["relative_error"]
        figures = f"{row['perplexity']:.2f} ± {error:.2f}"
        assert f"| {row['model']} | {row['type']} | {active} | {figures} |" in page


def test_the_inspect_example() -> None:
    """Guards the example against a change of the figures or of the layout."""
    code = "from dsmoe_local.cli.main import dsmoe; dsmoe()"
    assert "\n".join(output_of("-c", code, "inspect", "deepseekmoe-16b")) in PAGES["inspect"]


def test_the_tree_names_what_is_there() -> None:
    """Guards the tree against files that moved."""
    (tree,) = [block for block in blocks(CONTRIBUTING) if block.startswith("dsmoe_local/\n")]
    names = re.findall(r"^ *([\w/]+/)(?=\s)|\b(\w+\.py)\b", tree, re.MULTILINE)
    assert len(names) > 30
    for folder, module in names:
        pattern = module or folder.rstrip("/")
        assert any(".venv" not in path.parts for path in ROOT.rglob(pattern)), pattern


def commands() -> list[list[str]]:
    pages = (README, PAGES["inspect"], PAGES["quantization"], PAGES["demo"])
    lines = [line for page in pages for block in blocks(page) for line in block.splitlines()]
    found = [re.sub(r"^(\$ |.*\| )", "", line).split("   ")[0] for line in lines]
    examples = [line for name in COMMANDS for line, _ in getattr(load_command(name), "examples", ())]
    found += [line.rpartition(" | ")[2] for line in examples]
    return [shlex.split(line, comments=True) for line in found if re.match(r"dsmoe[- ]", line)]


def test_commands_and_links_are_found() -> None:
    """Guards the next two tests against patterns that find nothing, which would only skip them."""
    assert commands()
    assert LINKS


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    """Guards the commands that people copy, from pages and from help, against renamed options."""
    if words[0] == "dsmoe":
        words = words[1:]
    command = load_command(words[0].removeprefix("dsmoe-"))
    command.make_context("x", list(words[1:]))


def test_the_path_gets_our_programs_alone() -> None:
    """Guards: advice that puts the `llm` of a dependency before the reader's own."""
    for page in (README, *PAGES.values()):
        assert "bin/activate" not in page
        assert not re.search(r"PATH=.*\.venv", page)
    (pattern,) = re.findall(r'^ln -s "\$PWD"/\.venv/bin/(\S+) ', README, re.MULTILINE)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    there = [path.name for path in Path(sys.executable).parent.iterdir()]
    assert sorted(fnmatch.filter(there, pattern)) == sorted(scripts)


@pytest.mark.parametrize("target", LINKS)
def test_links_lead_somewhere(target: str) -> None:
    """Guards links to files of the repository."""
    assert (ROOT / target).exists()
