"""What docs/ says stays true: its maps of the papers, its links, and the commands in it."""

import argparse
import contextlib
import importlib
import pathlib
import re
import sys

import pytest

import angular
import blurring
import data
import ddm
import pixel_aware
import unet
from extras import autoencoder, latent, neighbours, tasks

HOME = pathlib.Path(__file__).parents[1]
PAGES = [HOME / "README.md", *sorted(HOME.glob("docs/*.md"))]
TESTS = [HOME / "test_all.py", *HOME.glob("extras/test_*.py")]
EVERYWHERE = data.ACTIONS | data.COMMON | data.MACHINE
PROGRAMS = {script.__name__: (script.FLAGS | unet.FLAGS, script.SAMPLING)
            for script in (ddm, blurring, angular, pixel_aware, tasks)}
PROGRAMS["ihdm"] = neighbours.FLAGS, neighbours.SAMPLING["ihdm"]
PROGRAMS["autoencoder"] = autoencoder.FLAGS, autoencoder.SAMPLING
PROGRAMS["latent"] = latent.FLAGS, ddm.SAMPLING
PAPERS = [("ddm", 28, 2), ("blurring", 30, 2), ("angular", 13, 0), ("pixel_aware", 26, 1)]


def rows(paper):
    """The lines of a page's map: [number, what, where, test] each."""
    page = (HOME / f"docs/{paper}.md").read_text()
    table = page.split("\n## Map\n")[1].split("\n## ")[0]
    return [line.split("|")[1:-1] for line in table.splitlines() if line[:2] == "| "][1:]


def numbers(cell):
    """"Eq. 1 to 3, 7" -> Eq. 1, Eq. 2, Eq. 3 and Eq. 7; of a table or a figure, none."""
    kind, _, rest = cell.strip().partition(" ")
    if kind not in ("Eq.", "Algorithm"):
        return
    for part in rest.split(", "):
        first, _, last = part.partition(" to ")
        for n in range(int(first), int(last or first) + 1):
            yield f"{kind} {n}"


@pytest.mark.parametrize("paper, equations, algorithms", PAPERS)
def test_map_is_true(paper, equations, algorithms):
    """No number is missing; each function and test exists; each `# Eq. n` of the code is in it."""
    tests = "".join(file.read_text() for file in TESTS)
    found = {}
    for number, _, where, proof in rows(paper):
        assert "`" in where or "not code: " in where, number
        for file, name in re.findall(r"`(\w+)\.(\w+)`", where):
            module = file if (HOME / f"{file}.py").exists() else f"extras.{file}"
            assert callable(getattr(importlib.import_module(module), name)), where
        for name in re.findall(r"`(\w+)`", proof):
            assert f"\ndef {name}(" in tests, name
        for n in numbers(number):
            assert found.setdefault(n, where) is where, f"{n} has two lines"
    wanted = {f"Eq. {n + 1}" for n in range(equations)}
    assert found.keys() == wanted | {f"Algorithm {n + 1}" for n in range(algorithms)}
    for tag in re.findall(r"# (Eq\. \d+(?:, \d+)*)", (HOME / f"{paper}.py").read_text()):
        assert not any("not code: " in found[n] for n in numbers(tag)), tag


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_commands_of_a_page_work(page, monkeypatch):
    """Each file that is linked exists, and each `python -m extras.NAME ...` is understood."""
    text = page.read_text().replace("\\\n", " ")
    for link in re.findall(r"\]\(([^)#:]+)[^)]*\)", text):
        assert (page.parent / link).exists(), link
    understand = argparse.ArgumentParser.parse_args

    def understand_and_stop(parser, *arguments):
        raise StopIteration(understand(parser, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", understand_and_stop)
    for name, flags in re.findall(r"python -m extras\.([a-z_]+)([^`\n#;&|]*)", text):
        monkeypatch.setattr(sys, "argv", [name, *flags.split()])
        with pytest.raises(StopIteration):
            importlib.import_module(f"extras.{name}").main()


def understood(words, names):
    """Whether one of these programs takes these flags and their values, or has this one flag."""
    words = words.replace(" N ", " 1 ").replace("NAME", "sine").split()
    flag, *values = words
    for name in names:
        flags, sampling = PROGRAMS[name]
        rows = flags | sampling | EVERYWHERE
        if not values and flag[2:].replace("-", "_") in rows:
            return True
        with contextlib.suppress(data.Problem):
            data.parse(name, "", flags, sampling, ["--train", *words])
            return True
    return False


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.stem)
def test_flags_that_a_page_names_are_understood(page):
    """Each `python SCRIPT.py ...` by its script, each `--flag value` by some program. Catches
    flags that went, and values under another flag's name.
    """
    text = re.sub(r"\\?\n *", " ", page.read_text())
    found = re.findall(r"python (\w+)\.py ([^`#;&|]*?)(?=[`#;&|]| python )", text)
    assert all(understood(words, [name]) for name, words in found), found
    named = re.findall(r"`(--[^`]+)`", text)
    strange = [words for words in named if not understood(words, PROGRAMS)]
    assert len(named) > 5 and not strange, strange
