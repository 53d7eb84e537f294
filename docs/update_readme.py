"""Fill the generated tables of the pages in, between `<!-- from FILE -->` and `<!-- end -->`: `make readme` calls it.

`FILE#1` takes the first table of the file alone, `FILE#2` the second.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/numerics.md",
    "docs/performance.md",
    "docs/scaling.md",
    "docs/api/outofcore.md",
    "examples/README.md",
)
PICTURES = ("scaling.svg",)  # of benchmarks/out, that pages show
BLOCK = re.compile(r"(<!-- from (\S+?)(?:#(\d+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text, root=ROOT):
    """The text with every block filled from its file."""

    def fill(match):
        path = root / match[2]
        if not path.exists():
            sys.exit(f"{match[2]} is missing: run the make target that writes it first")
        content = re.sub(r"\A# .*\n", "", path.read_text())  # the page has its own headings
        if match[3]:
            tables = re.findall(r"(?:^\|.*\n?)+", content, re.MULTILINE)
            if not 1 <= int(match[3]) <= len(tables):
                sys.exit(f"{match[2]} has {len(tables)} tables, and a page asks for table {match[3]}")
            content = tables[int(match[3]) - 1]
        return f"{match[1]}\n{content.strip()}\n\n{match[4]}"

    return BLOCK.sub(fill, text)


def main():
    """Rewrite the pages."""
    for name in PAGES:
        page = ROOT / name
        page.write_text(updated(page.read_text()))
    for name in PICTURES:
        shutil.copy(ROOT / "benchmarks" / "out" / name, ROOT / "docs" / "_static" / name)


if __name__ == "__main__":
    main()
