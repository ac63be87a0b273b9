"""Tests of the Markdown files: links resolve, and files, commands and verbs in them exist."""

import re
from pathlib import Path

import pytest
from processes import ROOT, python

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text() for page in PAGES}
TARGET = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<img[^>]*\ssrc=\"([^\"]+)\"")
FILE = re.compile(r"`([\w./-]+\.py)`")
FOLDERS = ("", "fusedrnn", "kernels", "bench", "bench/lessons", "tests", "docs")
VERB = re.compile(r"(?:`|^ *|^\$ )make ([a-z-]+)", re.MULTILINE)
VERBS = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(text: str) -> set[str]:
    """Returns the anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@every_page
def test_links_resolve(page):
    for target in ("".join(found) for found in TARGET.findall(TEXTS[page])):
        path, _, anchor = target.partition("#")
        if "://" not in target:
            other = page.parent / path if path else page
            assert other.exists(), target
            assert not anchor or anchor in anchors(other.read_text()), target


@every_page
def test_named_files_and_verbs_of_make_exist(page):
    named = FILE.findall(TEXTS[page])
    there = {file for file in named for folder in FOLDERS if (ROOT / folder / file).is_file()}
    assert set(named) <= there | {"setup.py", "script.py", "yourscript.py", "train.py", "NAME.py"}
    assert set(VERB.findall(TEXTS[page])) <= set(VERBS)


def test_contributing_names_every_verb_and_every_file():
    said = TEXTS[ROOT / "CONTRIBUTING.md"]
    assert [verb for verb in VERBS if f"make {verb}" not in said] == []
    files = [*ROOT.glob("fusedrnn/*.py"), *ROOT.glob("kernels/*.py")]
    assert [f.name for f in files if f"{f.name} " not in said and f.stem != "__init__"] == []


def test_commands_of_the_bench_exist():
    known = python("-m", "bench", "--help").stdout
    named = {word for text in TEXTS.values() for word in re.findall(r"-m bench ([a-z]+)", text)}
    assert named
    assert [word for word in named if not re.search(rf"\b{word}\b", known)] == []


def test_every_figure_is_shown():
    shown = {Path("".join(found)).name for t in TEXTS.values() for found in TARGET.findall(t)}
    assert {figure.name for figure in (ROOT / "docs").rglob("*.svg")} <= shown
