"""The site of `make docs`: pages and docstrings of this checkout. It needs no network."""

import cbn

project = "cbn"
copyright = "the cbn authors"
version = release = cbn.__version__

# The source folder is the root of the checkout, so that links between pages are the same here and in the repository
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md", "examples/README.md"]
exclude_patterns = [".*", "benchmarks", "build", "cbn", "dist", "docs/_build", "examples/out", "tests"]
templates_path = ["_templates"]

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "myst_parser"]
highlight_language = "text"
default_role = "autolink"  # a name in single backticks is a link if there is such an object
nitpicky = True
# Attributes without an entry of their own, a parameter with the name of a module, parameters of a class, scikit-learn's
NAMES = (
    *("bias_grad", "state", "weight_grad", "channel_axis", "count", "extrema", "shape"),
    "sklearn.preprocessing.StandardScaler",
)
nitpick_ignore = [("py:obj", name) for name in NAMES]
nitpick_ignore_regex = [("py:obj", r"torch\..*")]
autosummary_generate = False
autodoc_mock_imports = ["dask", "mpi4py", "torch"]  # which are large, or need MPI
autodoc_typehints = "none"  # docstrings have the types
autodoc_preserve_defaults = True
autodoc_member_order = "groupwise"
toc_object_entries_show_parents = "hide"
smartquotes = False  # "relu" is a string
maximum_signature_line_length = 72
numpydoc_show_class_members = False
add_module_names = False
python_use_unqualified_type_names = True
myst_heading_anchors = 4

html_theme = "pydata_sphinx_theme"
html_title = "cbn"
html_static_path = ["_static"]
html_css_files = ["cbn.css"]
html_additional_pages = {"index": "index.html"}
html_sidebars = {"**": ["contents.html"]}
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navbar_center": [],
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": False,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

CONTENTS = """
```{toctree}
:hidden:

docs/features
examples/README
docs/api/index
docs/architecture
docs/numerics
docs/performance
docs/scaling
docs/glossary
CONTRIBUTING
CHANGELOG
```
"""


def add_contents(app, docname, source):
    """Give the first page the list of all pages, which the repository shows by itself."""
    if docname == root_doc:
        source[0] += CONTENTS


def setup(app):
    """Connect the above."""
    app.connect("source-read", add_contents)
