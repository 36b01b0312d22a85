# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Writes the option tables of the documentation from the dataclasses: `python docs/update_options.py`."""

import dataclasses
import importlib
import re
from pathlib import Path


FOLDER = Path(__file__).parent
BLOCK = re.compile(r"(<!-- options: ([\w.]+) -->\n).*?(<!-- end of options -->)", re.DOTALL)


def table(path: str) -> str:
    """Markdown table of the fields that the class `module.Class` declares itself."""
    module, _, name = path.rpartition(".")
    config = importlib.import_module(f"tapo_trl.{module}").__dict__[name]
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        if field.name in config.__annotations__:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            text = field.metadata["help"].replace("%%", "%").replace("|", "\\|")
            rows.append(f"| `{field.name}` | `{default!r}` | {text} |")
    return "\n".join(rows) + "\n"


def update(text: str) -> str:
    """`text` with all of its tables renewed."""
    return BLOCK.sub(lambda match: match[1] + table(match[2]) + match[3], text)


if __name__ == "__main__":
    for page in sorted(FOLDER.glob("*.md")):
        page.write_text(update(page.read_text(encoding="utf-8")), encoding="utf-8")
