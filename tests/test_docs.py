"""README and documents: their links, their figures' files, and that they name what exists."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    text = page.read_text()
    named = set(re.findall(r"`make ([a-z-]+)`", text)) | set(re.findall(r"^make ([a-z-]+)", text, re.M))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`((?:cbn|tests|benchmarks|examples|docs)/[\w./]+\.\w+)`", page.read_text()):
        assert "/out/" in name or (ROOT / name).exists(), name  # what a target makes is not in a fresh checkout


def test_every_advice_to_install_names_an_extra_that_there_is():
    """In pages and messages; what belongs to a checkout, as examples and benchmarks do, is installed from it."""
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]\n")[1].split("\n\n")[0]
    extras = set(re.findall(r"^([a-z0-9-]+) = ", table, re.MULTILINE))
    assert "test" in extras
    sources = [p for name in ("cbn", "examples", "benchmarks", "tests") for p in (ROOT / name).rglob("*.py")]
    found = []
    for path in [*PAGES, *sources]:
        text = path.read_text()
        of_the_checkout = not path.is_relative_to(ROOT / "cbn") and not path.is_relative_to(ROOT / "tests")
        if of_the_checkout:
            assert not re.findall(r"pip install \w.*", text), path.name
        for advice in re.findall(r"pip install (?:-e )?'([^']*)'", text):
            target, named = re.fullmatch(r"([^\[]*)(?:\[(.*)\])?", advice).groups()
            found.append(advice)
            assert set((named or "test").split(",")) <= extras, f"{path.name}: {advice}"
            if of_the_checkout:
                assert target in (".", "{root}"), f"{path.name}: {advice}"
    assert len(found) >= 10


def test_every_figure_of_the_readme_comes_from_a_file():
    """Tables with numbers stand in blocks that `make readme` fills, and the blocks are filled."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"<!-- from (\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert len(blocks) >= 2
    for name, content in blocks:
        assert name.startswith(("benchmarks/out/", "examples/out/"))
        assert content.strip(), f"{name}: run make readme"
    outside = re.sub(r"<!-- from .*?<!-- end -->", "", text, flags=re.DOTALL)
    assert not re.search(r"\d\s*(×|x) faster|\d ?(ms|µs|GB/s)", outside)


def test_update_readme_fills_blocks(tmp_path):
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs" / "update_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "a.md").write_text("# Heading\n\n| 1 |\n")
    text = "x\n<!-- from a.md -->\nold\n<!-- end -->\ny\n"
    filled = module.updated(text, tmp_path)
    assert filled == "x\n<!-- from a.md -->\n\n| 1 |\n\n<!-- end -->\ny\n"
    assert module.updated(filled, tmp_path) == filled
    with pytest.raises(SystemExit, match=r"b\.md is missing"):
        module.updated("<!-- from b.md -->\n<!-- end -->", tmp_path)
