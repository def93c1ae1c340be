"""What docs/tour.ipynb promises: it runs, its claims hold, and its outputs are stored."""

import json
import pathlib
import re
import shutil
import sys
import types

import pytest
import torch

HOME = pathlib.Path(__file__).parents[1]
FILE = HOME / "docs/tour.ipynb"
CELLS = json.loads(FILE.read_text(encoding="utf-8"))["cells"]
CODE = {cell["id"]: cell for cell in CELLS if cell["cell_type"] == "code"}


def test_tour_is_short_and_has_its_outputs():
    """Catches more than 25 cells, one that was not run, a large file, and an absolute path."""
    assert len({cell["id"] for cell in CELLS}) == len(CELLS) <= 25
    assert FILE.stat().st_size < 1_500_000
    lines = sum([cell["source"] for cell in CELLS], [])
    for count, (name, cell) in enumerate(CODE.items(), 1):
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert cell["execution_count"] == count, name
        assert {"stream"} <= kinds <= {"stream", "display_data"}, name
        lines += sum([output.get("text", []) for output in cell["outputs"]], [])
    for line in lines:
        assert not re.search(r"""(^|[\s"'`(])(~?/\w|[A-Z]:\\)""", line), line


def test_tour_runs_and_its_claims_hold(tmp_path, monkeypatch, capsys):
    """All cells, with a training of two steps. Catches a wrong root, a target that `predictor`
    does not mean, noises that are not the path's, and weights that are there or are not."""
    pictures = []
    display = types.SimpleNamespace(display=pictures.append)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sources = {name: "".join(cell["source"]) for name, cell in CODE.items()}
    setup = sources.pop("setup")
    for place in (HOME, HOME / "docs"):                       # where Jupyter may start
        monkeypatch.chdir(place)
        exec(setup, names := {})
        assert sys.path[0] == str(names["root"]) == str(HOME)
    names["root"] = tmp_path                                  # where no weights are
    for source in sources.values():
        exec(re.sub(r"ITERATIONS = \d+", "ITERATIONS = 2", source), names)
    assert "without them" in capsys.readouterr().out and len(pictures) == 6
    shutil.copytree(names["run"], tmp_path / "assets/weights/ddm")
    exec(sources["weights-code"], names)
    assert pictures[6].size == (8 * 66 + 2, 4 * 66 + 2)
    for name, error in dict(ddm=0.007, blurring=0.01, angular=0.01, pixel_aware=0.37).items():
        assert torch.allclose(names["exact"][name], names["x0"], atol=1e-5), name
        off = names["rms"](names["inexact"][name] - names["x0"])
        assert off[-1] == pytest.approx(error, rel=0.05), name
    assert names["new"].std() == pytest.approx(1, rel=0.03)   # of the path's last step
    for image, k in dict(literal=2, quiet=1, mended=0).items():
        theory = (k * torch.expm1(20 * names["stripes"])).sqrt()
        assert torch.allclose(names["of_stripes"](names[image]), theory, rtol=0.08, atol=1e-9)
