"""The documentation's build: `sphinx-build -W --keep-going docs docs/_build/html`."""

import datetime
import shutil
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.errors import ExtensionError

import optax_surgery

# --- What is built

project = "optax_surgery"
author = "The optax_surgery authors"
copyright = f"{datetime.date.today().year}, {author}"
release = optax_surgery.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx_copybutton",
    "myst_nb",
]
exclude_patterns = ["_build"]
nitpicky = False
default_role = "code"  # single backticks are code, as in our docstrings
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Notebooks are executed by the tests; the pages show the outputs that lie in them.
nb_execution_mode = "off"

# --- Docstrings

autodoc_typehints = "none"  # ranges and shapes stand in `Args`
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_use_rtype = False

# --- What it looks like

html_theme = "furo"
html_title = "optax_surgery"
html_static_path = ["_static"]
html_css_files = ["mathml.css"]
templates_path = []


html_math_renderer = "mathml"


# --- Formulas: MathML, made here. A browser draws it without network, scripts or fonts.


def inline_math(writer, node):
    """Writes a formula within a line."""
    writer.body.append(f'<span class="math">{convert(node.astext())}</span>')
    raise nodes.SkipNode


def displayed_math(writer, node):
    """Writes a formula of its own line."""
    formula = convert(node.astext(), display="block")
    writer.body.append(f'<div class="math">{formula}</div>')
    raise nodes.SkipNode


# --- What is checked


def public_names():
    """Every public name, with its object."""
    return {name: getattr(optax_surgery, name) for name in optax_surgery.__all__}


def check_names(app, env):
    """Fails on a public name without an entry on some page."""
    documented = {name.rpartition(".")[2] for name in env.get_domain("py").objects}
    missing = sorted(set(public_names()) - documented)
    if missing:
        raise ExtensionError(f"public names that no page documents: {', '.join(missing)}")


def copy_notebooks(app, config):
    """Notebooks lie where their readers look for them; Sphinx reads what lies here."""
    source = Path(app.srcdir).parent / "notebooks"
    shutil.copytree(source, Path(app.srcdir, "notebooks"), dirs_exist_ok=True)


def setup(app):
    """Called by Sphinx."""
    app.connect("config-inited", copy_notebooks)
    app.add_html_math_renderer("mathml", (inline_math, None), (displayed_math, None))
    app.connect("env-check-consistency", check_names)
