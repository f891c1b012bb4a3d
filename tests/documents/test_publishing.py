"""What an index shows of a release, and that what says the same thing twice agrees."""

import re
import tomllib
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

import optax_surgery as surgery

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CITATION = (ROOT / "CITATION.cff").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
HOOKS = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]
SUBSTITUTIONS = HOOKS["fancy-pypi-readme"]["substitutions"]


def on_an_index(text):
    """A README as the build of a wheel writes it into the metadata."""
    for each in SUBSTITUTIONS:
        text = re.sub(each["pattern"], each["replacement"], text)
    return text.replace("$HFPR_VERSION", PROJECT["version"])


def links(text):
    """What the links of a page lead to, and where its pictures lie."""
    html = MarkdownIt().render(text)
    return re.findall(r'href="([^"]*)"', html), re.findall(r'src(?:set)?="([^"]*)"', html)


def test_links_and_pictures_of_the_readme_hold_outside_of_a_checkout():
    source, version = PROJECT["urls"]["Source"], PROJECT["version"]
    for kind, here, there in zip(
        ("blob", "raw"), links(README), links(on_an_index(README)), strict=True
    ):
        relative = [link for link in here if not link.startswith("https://")]
        assert relative, kind
        assert there == [
            f"{source}/{kind}/v{version}/{link}" if link in relative else link for link in here
        ]


def test_code_of_the_readme_is_the_same_on_an_index():
    code = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    assert code.findall(on_an_index(README)) == code.findall(README)


def test_there_is_one_address_and_it_is_cited_once_it_is_real():
    source = PROJECT["urls"]["Source"]
    addresses = [*PROJECT["urls"].values(), *(each["replacement"][2:] for each in SUBSTITUTIONS)]
    assert [address for address in addresses if not f"{address}/".startswith(f"{source}/")] == []
    cited = re.search(r"^repository-code: (\S+)$", CITATION, re.MULTILINE)
    assert (cited and cited.group(1)) == (None if ".invalid/" in source else source)


def test_versions_and_dates_agree():
    """A version is dated in both files, or in none, where it is not released."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    version, date = re.search(r"^## (\d\S*) - (\S+)$", changelog, re.MULTILINE).groups()
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", CITATION, re.MULTILINE))
    assert PROJECT["version"] == surgery.__version__ == version == cited["version"]
    assert cited.get("date-released", "unreleased") == date


def test_authors_and_licence_agree():
    assert PROJECT["authors"] == [{"name": re.search(r"- name: (.*)", CITATION).group(1)}]
    assert PROJECT["license"] == re.search(r"^license: (.*)$", CITATION, re.MULTILINE).group(1)


def named_extras(path):
    """The extras in what a file says to install."""
    lists = re.findall(r"(?:\.|optax_surgery)\[([a-z,]+)\]", path.read_text())
    return {name for each in lists for name in each.split(",")}


PATTERNS = ["*.md", "docs/**/*.md", "notebooks/*.ipynb", "benchmarks/**/*.py", ".ci/run"]
INSTALLING = [path for pattern in PATTERNS for path in ROOT.glob(pattern) if named_extras(path)]


@pytest.mark.parametrize("path", INSTALLING, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_extra_that_a_file_names_exists(path):
    assert named_extras(path) <= set(PROJECT["optional-dependencies"])


def test_every_extra_is_named_where_one_reads_how_to_install():
    pages = ["README.md", "CONTRIBUTING.md", "docs/start.md", "docs/benchmarks.md"]
    named = set().union(*(named_extras(ROOT / page) for page in pages))
    assert set(PROJECT["optional-dependencies"]) - named == set()
