"""Each code can be met: the example on its page is run through the public interface, and leaves a report with that code, on the line that
the page marks. What the page says was printed, is printed. And no code is used that has no page.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import pickle
import re
import sys
from pathlib import Path

import pytest

from attnopt.remarks import PAGES, NodeInfo, Remark
from attnopt.remarks.page import HERE

ROOT = Path(__file__).parents[1]

_spec = importlib.util.spec_from_file_location("remark_pages", ROOT / "tools" / "remark_pages.py")
assert _spec is not None and _spec.loader is not None
remark_pages = importlib.util.module_from_spec(_spec)
sys.modules["remark_pages"] = remark_pages
_spec.loader.exec_module(remark_pages)

ALSO = {
    "AO108": {"AO104"},
    "AO209": {"AO302"},  # a graph breaks only under torch.compile, and that is remarked
    "AO306": {"AO302"},
    "AO105": {"AO103", "AO104"},  # in a model that is served keys and values are cached
    "AO106": {"AO104"},
    "AO107": {"AO104"},
    "AO218": {"AO104"},
    "AO110": {"AO109"},  # what is merged changes the results, and how far is told
    "AO109": {"AO110"},
    "AO219": {"AO110"},  # the layer whose heads can be merged
}
"""Other codes that the example of a code gives, with the reason; AO101 is what any replaced attention has."""


@pytest.mark.parametrize("code", PAGES)
def test_the_example_gives_its_code_on_the_marked_line_and_prints_what_its_page_says(code: str, tmp_path: Path) -> None:
    report = remark_pages.run(code, tmp_path)
    found = remark_pages.remarks(report)
    assert {r.code for r in found} - ({"AO101"} - {code}) == {code} | ALSO.get(code, set()), [str(r) for r in found]
    lines = PAGES[code].example.splitlines()
    marked = [i for i, line in enumerate(lines, 1) if line.endswith(HERE)]
    assert len(marked) <= 1
    places = {(r.node.source if r.node is not None and r.node.source else r.source) for r in found if r.code == code}
    assert places == ({f"{tmp_path / 'example.py'}:{marked[0]}"} if marked else {""})
    page = remark_pages.DOCS / f"{code}.md"
    assert page.is_file() and page.read_text() == remark_pages.page(code, remark_pages.printed(report, code, tmp_path)), "`make docs` writes the pages again"


def test_there_is_one_page_for_each_code_and_an_index() -> None:
    assert {p.name for p in remark_pages.DOCS.iterdir()} == {"README.md", *(f"{code}.md" for code in PAGES)}
    assert (remark_pages.DOCS / "README.md").read_text() == remark_pages.index(), "`make docs` writes the index again"


@pytest.mark.parametrize("file", [ROOT / "README.md", ROOT / "docs" / "architecture.md", *sorted(remark_pages.DOCS.glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(file: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL))
    assert [x for x in links if not x.startswith("https://") and not (file.parent / x.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("code", PAGES)
def test_a_page_says_what_why_and_what_to_do(code: str) -> None:
    page = PAGES[code]
    needed = {"title", "text", "cause", "example"} | ({"hint"} if code[2] != "1" else set()) | ({"supported"} if code[2] == "2" else set())
    assert [name for name in needed if not getattr(page, name)] == []
    for sentence in (page.text, page.cause, page.hint, page.supported):
        assert not sentence or sentence.endswith("."), sentence


def _used() -> dict[str, set[str]]:
    """Each code that stands as a string in the package outside of the table, with the files where it does."""
    out: dict[str, set[str]] = {}
    for file in (ROOT / "attnopt").rglob("*.py"):
        if "remarks" in file.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"AO\d{3}", node.value):
                out.setdefault(node.value, set()).add(str(file.relative_to(ROOT)))
    return out


def test_every_code_that_is_used_is_in_the_table_and_the_other_way_round() -> None:
    used = _used()
    assert {code: files for code, files in used.items() if code not in PAGES} == {}
    assert set(PAGES) - set(used) == set(), "these are in the table, and nothing gives them"


def test_a_remark_with_a_code_of_its_own_invention_is_refused() -> None:
    with pytest.raises(KeyError, match="AO999 is not in the table"):
        Remark("AO999", "no such thing")


def test_a_remark_travels_as_json_and_as_pickle() -> None:
    node = NodeInfo("aten::softmax", "softmax", ("s77", "9"), "float32", "model.py:12", (2, 9))
    remark = Remark("AO203", "the probabilities are returned.", "layers.0", "model.py:12", node=node)
    assert pickle.loads(pickle.dumps(remark)) == remark
    facts = json.loads(json.dumps(remark.to_dict()))
    assert facts == remark.to_dict()
    assert facts["node"] == {
        "operator": "aten::softmax",
        "name": "softmax",
        "shape": ["s77", "9"],
        "dtype": "float32",
        "source": "model.py:12",
        "example": [2, 9],
    }
    assert (facts["level"], facts["title"], facts["site"]) == ("missed", PAGES["AO203"].title, "layers.0")
    assert dataclasses.replace(remark, node=None).to_dict()["node"] is None


def test_a_node_in_words() -> None:
    assert str(NodeInfo("aten::add", "add_1", ("s0", "4"), "bfloat16", "m.py:3", (2, 4))) == "aten::add 'add_1', bfloat16[s0, 4], in the example [2, 4]"
    assert str(NodeInfo("aten::sym_size", "sym_size", source="m.py:3")) == "aten::sym_size 'sym_size'"
    assert str(NodeInfo("buffer", "mask", ("9", "9"), "bool")) == "buffer 'mask', bool[9, 9]"
