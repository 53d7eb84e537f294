"""README and documents: their links, their figures' files, and that they name what exists."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest

import cbn

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "docs" / "api").glob("*.md")),
    *sorted((ROOT / ".github").rglob("*.md")),
]
# Names in backticks that are not of this project: of compilers, systems and shells
FOREIGN = {"area", "imperative", "omp_set_num_threads", "rep", "movs", "ulimit", "html"}
CHOSEN = {"HAVE_", "PRIMITIVE", "TYPE_", "_in_f64", "cbn_", "from_", "fuse_", "test_from_"}  # parts of names to come
SYMBOLS = {"forward_runs_f64_avx2"}  # that macros put together


def anchors(page):
    """Those of a page's headings, as GitHub and Sphinx make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)", page.read_text()):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


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


@functools.cache
def words():
    """Every name in the sources, and of their files and folders."""
    paths = [
        path for folder in ("benchmarks", "cbn", "docs", "examples", "tests") for path in (ROOT / folder).rglob("*")
    ]
    paths = [path for path in paths if path.suffix in (".py", ".pyi", ".pyx", ".pxd", ".h", ".c")]
    paths += [ROOT / name for name in ("Makefile", "setup.py", "pyproject.toml", "README.md")]
    found = {word for path in paths for word in re.findall(r"[^\W\d]\w*", path.read_text())}
    return found | {part for path in paths for part in (path.stem, *path.relative_to(ROOT).parts)}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_names_in_backticks_exist(page):
    text = re.sub(r"```.*?```|<!-- from .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
    named = {word for code in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"[^\W\d]\w*", code)}
    assert not named - words() - FOREIGN - CHOSEN - SYMBOLS


def test_every_public_name_is_in_the_api_pages():
    pages = "\n".join(path.read_text() for path in sorted((ROOT / "docs" / "api").glob("*.md")))
    directives = r"^\.\. auto(?:class|function|module):: (?:cbn\.)?([\w.]+)|^\.\. data:: (\w+)"
    documented = {"".join(names) for names in re.findall(directives, pages, re.MULTILINE)}
    assert set(cbn.__all__) <= documented
    assert set(cbn.functional.__all__) <= documented
    overview = (ROOT / "docs" / "api" / "index.md").read_text()
    modules = {"functional", "reference", "__version__"}
    listed = set(re.findall(r"^   (?:\w+\.)?(\w+)$", overview, re.MULTILINE))
    assert (set(cbn.__all__) - modules) | set(cbn.functional.__all__) <= listed


def test_the_site_has_every_page():
    text = (ROOT / "docs" / "conf.py").read_text() + (ROOT / "docs" / "api" / "index.md").read_text()
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "api").glob("*.md")]:
        name = str(page.relative_to(ROOT).with_suffix(""))
        assert re.search(rf"^(?:{name}|{page.stem})$", text, re.MULTILINE), name


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


def update_readme():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "docs" / "update_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_figure_comes_from_a_file():
    """Tables with numbers stand in blocks that `make readme` fills, and the blocks are filled."""
    updated = [ROOT / name for name in update_readme().PAGES]
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"<!-- from (\S+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
        assert page in updated if blocks else page not in updated, page
        for name, content in blocks:
            assert name.startswith(("benchmarks/out/", "examples/out/"))
            assert content.strip(), f"{name}: run make readme"
        if page.name == "README.md":
            outside = re.sub(r"<!-- from .*?<!-- end -->", "", text, flags=re.DOTALL)
            assert not re.search(r"\d\s*(×|x) faster|\d ?(ms|µs|GB/s)", outside)


def test_update_readme_fills_blocks(tmp_path):
    module = update_readme()
    (tmp_path / "a.md").write_text("# Heading\n\n| 1 |\n")
    text = "x\n<!-- from a.md -->\nold\n<!-- end -->\ny\n"
    filled = module.updated(text, tmp_path)
    assert filled == "x\n<!-- from a.md -->\n\n| 1 |\n\n<!-- end -->\ny\n"
    assert module.updated(filled, tmp_path) == filled
    with pytest.raises(SystemExit, match=r"b\.md is missing"):
        module.updated("<!-- from b.md -->\n<!-- end -->", tmp_path)


def test_update_readme_takes_one_table_of_a_file(tmp_path):
    updated = update_readme().updated
    (tmp_path / "a.md").write_text("words\n\n| 1 |\n|---|\n\nmore\n\n| 2 |\n")
    assert updated("<!-- from a.md#2 -->\n<!-- end -->", tmp_path) == "<!-- from a.md#2 -->\n\n| 2 |\n\n<!-- end -->"
    assert "| 1 |\n|---|\n\n<!-- end" in updated("<!-- from a.md#1 -->\n<!-- end -->", tmp_path)
    with pytest.raises(SystemExit, match=r"a\.md has 2 tables, and a page asks for table 3"):
        updated("<!-- from a.md#3 -->\n<!-- end -->", tmp_path)
