"""Sphinx's configuration: ``sphinx-build -W docs docs/_build`` makes the site."""

import importlib.metadata

project = "gpubn"
version = release = importlib.metadata.version("gpubn")
author = "the gpubn authors"
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"gpubn {version}"

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
# Pages that are included from elsewhere link to files beside them: those are on the project's page.
suppress_warnings = ["myst.xref_missing"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and dtypes are in the docstrings
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
