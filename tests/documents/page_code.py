"""The Python of README and docs, a file for each page: for tests, and for the type checker.

Run `python -m tests.documents.page_code FOLDER` to write the files.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


def main(folder):
    for page in PAGES:
        name = "_".join(page.relative_to(ROOT).with_suffix(".py").parts)
        if found := blocks(page):
            Path(folder, name).write_text("\n".join(found))


if __name__ == "__main__":
    main(sys.argv[1])
