"""The site's configuration: `make docs` builds `build/docs` from these pages, offline, with warnings as errors.

The pages are Markdown that reads on GitHub as it stands. The site adds the navigation, the API reference from the
docstrings of the public packages, and the help of every command; see `site_extension.py` beside this file.
"""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "tenure"
author = "the tenure contributors"
copyright = f"{author}, Apache-2.0"
version = release = installed_version("tenure")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib.mermaid",
    "site_extension",
]
exclude_patterns = ["records"]
suppress_warnings = ["ref.python"]  # attributes of one name in several classes
nitpicky = False  # types of torch and transformers have no inventory offline

# Markdown: anchors as GitHub makes them; a link to a page, heading or file that does not exist is a warning.
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
myst_enable_extensions = ["strikethrough"]

# Docstrings: plain English with `backticks` and Google-style sections.
default_role = "code"
autodoc_default_options = {"members": True, "imported-members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"tenure {release}"
html_show_sourcelink = False
html_copy_source = False
