"""Every example on a page of docs/ runs, and prints what the page says."""

import doctest
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {
    page.relative_to(DOCS).as_posix(): page.read_text(encoding="utf-8")
    for page in sorted(DOCS.rglob("*.md"))
}


@pytest.mark.parametrize("name", [k for k, v in PAGES.items() if ">>> " in v])
def test_examples(name):
    # The fence that ends a block would else be read as expected output.
    text = re.sub(r"^```.*$", "", PAGES[name], flags=re.MULTILINE)
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert runner.tries > 0 and runner.failures == 0


@pytest.mark.parametrize("name", PAGES)
def test_links_and_figures_exist(name):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[name]):
        if "://" not in target:
            assert (DOCS / name).parent.joinpath(target).exists(), target
