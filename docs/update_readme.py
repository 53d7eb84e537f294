"""Put generated tables into README.md, between `<!-- from FILE -->` and `<!-- end -->`: `make readme` calls it."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text, root=ROOT):
    """The text with every block filled from its file."""

    def fill(match):
        path = root / match[2]
        if not path.exists():
            sys.exit(f"{match[2]} is missing: run the make target that writes it first")
        text = re.sub(r"\A# .*\n", "", path.read_text())  # the page has its own headings
        return f"{match[1]}\n{text.strip()}\n\n{match[3]}"

    return BLOCK.sub(fill, text)


def main():
    """Rewrite README.md."""
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))


if __name__ == "__main__":
    main()
