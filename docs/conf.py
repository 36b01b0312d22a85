# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The documentation as a site: `make docs` writes it to `site/`. Pages and API docstrings are Markdown, as in TRL."""

import re

import tapo_trl


project = "tapo_trl"
author = "The tapo_trl authors"
version = release = tapo_trl.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
include_patterns = [
    "docs/*.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "benchmarks/*.md",
    "benchmarks/**/*.md",
    "examples/*/README.md",
    "examples/*/HUMAN_LOOP.md",
    "examples/*/LICENSES.md",
    "examples/*/data/*.md",
]
root_doc = "docs/index"
suppress_warnings = ["toc.not_included"]  # pages that only other pages link to
html_theme = "furo"
html_title = f"tapo_trl {version}"
html_static_path = []

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
nitpicky = False

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
default_role = "code"  # `x` is code in Markdown

REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")
WEB_LINK = re.compile(r"\[`?([^\]`]+)`?\]\((https?://[^)]+)\)")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
MATH = re.compile(r"(?<!\$)\$(?!\$)([^$\n]+)\$")
UNDERSCORE = re.compile(r"(`+[^`]*`+)|(?<=\w)_(?!\w)")  # outside of code, the end of a reST reference
LINK = re.compile(r"\]\(([\w./]+\.md)\)")


def markdown_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Markdown in docstrings, as far as ours use it: references such as [`~trl.RewardTrainer`], code blocks and formulas."""
    text = "\n".join(lines)

    def reference(match: re.Match) -> str:
        target = match[2].split(".")[-1] if match[1] else match[2]
        public = match[2] in tapo_trl.__all__
        return f":py:class:`~tapo_trl.{match[2]}`" if public else f"``{target}``"

    def fence(match: re.Match) -> str:
        body = "\n".join(f"    {line}" if line.strip() else "" for line in match[3].splitlines())
        return f"{match[1]}.. code-block:: {match[2] or 'text'}\n\n{body}\n"

    text = WEB_LINK.sub(r"`\1 <\2>`__", text)
    text = FENCE.sub(fence, REFERENCE.sub(reference, text))
    text = MATH.sub(r":math:`\1`", text)
    lines[:] = UNDERSCORE.sub(lambda match: match[1] or r"\_", text).split("\n")


def add_contents(app, docname: str, source: list[str]) -> None:
    """The pages that the front page links to are the contents of the site, in that order."""
    if docname == root_doc:
        pages = dict.fromkeys(LINK.findall(source[0]))
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", "", *pages, "```", ""])


def setup(app) -> None:
    app.connect("source-read", add_contents)
    # Before Napoleon, which turns "Args:" into fields
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=100)
