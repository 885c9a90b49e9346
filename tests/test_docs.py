"""The README and the pages of docs/: their code runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WITHOUT_CODE = {"performance.md", "measurements.md"}
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name not in WITHOUT_CODE)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), page.name, "exec"), {})
