"""The documentation's build: `sphinx-build -W --keep-going docs docs/_build/html`."""

import datetime
import os
import sys
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.util import logging

# The pictures of methods are drawn on the CPU, to be the same everywhere.
os.environ["JAX_PLATFORMS"] = "cpu"

import optax_surgery

sys.path.insert(0, str(Path(__file__).parent))
import method_pictures

logger = logging.getLogger(__name__)

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
nitpicky = True
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
napoleon_attr_annotations = False  # as `autodoc_typehints`, for fields

# --- What it looks like

html_theme = "furo"
html_title = "optax_surgery"
pygments_dark_style = "a11y-high-contrast-dark"  # in the default one, modules look like links
html_static_path = ["_static"]
html_css_files = ["mathml.css", "pictures.css", "tables.css"]
templates_path = []


html_math_renderer = "mathml"


# --- Formulas: MathML, made here. A browser draws it without network, scripts or fonts.


def inline_math(writer, node):
    """Writes a formula within a line."""
    writer.body.append(f'<span class="math">{mathml(node, "inline")}</span>')
    raise nodes.SkipNode


def displayed_math(writer, node):
    """Writes a formula of its own line."""
    writer.body.append(f'<div class="math">{mathml(node, "block")}</div>')
    raise nodes.SkipNode


# What latex2mathml does not know, and knows by another name.
OTHER_NAMES = {r"\arg\min": r"\argmin", r"\arg\max": r"\argmax", r"\Big\|": r"\Big‖"}


def mathml(node, display):
    """The formula as MathML, with a warning if a command would be shown as it is typed."""
    latex = " ".join(node.astext().split())  # a backslash at the end of a line is a space
    for name, other in OTHER_NAMES.items():
        latex = latex.replace(name, other)
    formula = convert(latex, display=display)
    if "\\" in formula:
        logger.warning("a formula with an unknown command: %s", latex, location=node)
    return formula


# --- Pictures of the methods, drawn in every build


def draw_pictures(app):
    """Draws all of them; the build ends at a method that cannot be drawn."""
    try:
        app.method_pictures = method_pictures.write_all(Path(app.srcdir, "_pictures"))
    except ValueError as error:
        raise ExtensionError(str(error)) from error


def show_pictures(app, doctree):
    """Puts a row of pictures before the first method of a page."""
    if not app.env.docname.startswith("methods/"):
        return
    names = {
        signature["ids"][0]: signature["fullname"]
        for signature in doctree.findall(addnodes.desc_signature)
        if signature.get("fullname") in app.method_pictures
    }
    if names:
        row = nodes.container(classes=["pictures"])
        row += [picture_of(app, name, identifier) for identifier, name in names.items()]
        first = next(doctree.findall(addnodes.index))
        place = first.parent.index(first)
        first.parent[place:place] = [explanation(), row]


def explanation():
    """What a row of pictures begins with."""
    legend = nodes.reference("", "what else they show", refuri="index.html#the-pictures")
    text = "The same gradients under each method; the bold arrow is the update ("
    return nodes.paragraph("", "", nodes.Text(text), legend, nodes.Text(")."))


def picture_of(app, name, identifier):
    """A figure: the picture for light and for dark pages, and a link to the method below."""
    shown = app.method_pictures[name]
    figure = nodes.figure(ids=[f"picture-{name}"])
    for file, theme in ((f"{name}.svg", "only-light"), (f"{name}_dark.svg", "only-dark")):
        alt = f"The update of {name} among the gradients that it is made of"
        figure += nodes.image(uri=f"../_pictures/{file}", alt=alt, classes=[theme])
    link = nodes.reference("", "", nodes.literal("", name), refid=identifier)
    figure += nodes.caption("", "", link, nodes.Text(" " + shown.notes()))
    return figure


def check_pictures(app, env):
    """Fails on a method whose picture is on no page."""
    pages = env.get_domain("py").objects.items()
    shown = {
        name.rpartition(".")[2] for name, entry in pages if entry.docname.startswith("methods/")
    }
    missing = sorted(set(app.method_pictures) - shown)
    if missing:
        raise ExtensionError(f"methods on no page of docs/methods: {', '.join(missing)}")


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
    folder = Path(app.srcdir, "notebooks")
    folder.mkdir(exist_ok=True)
    for notebook in (Path(app.srcdir).parent / "notebooks").glob("*.ipynb"):
        # One level nearer to the pages that they lead to.
        text = notebook.read_text(encoding="utf-8").replace("](../docs/", "](../")
        method_pictures.write(folder / notebook.name, text)


def setup(app):
    """Called by Sphinx."""
    app.connect("config-inited", copy_notebooks)
    app.connect("builder-inited", draw_pictures)
    # Before Sphinx collects the images of a page, which it does at 500.
    app.connect("doctree-read", show_pictures, priority=400)
    app.connect("env-check-consistency", check_pictures)
    app.add_html_math_renderer("mathml", (inline_math, None), (displayed_math, None))
    app.connect("env-check-consistency", check_names)
