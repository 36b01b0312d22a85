# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The card of an exported data set."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from .study import Study, is_video


MARK = "made with `tapo-trl votes`"

_TEXT = """---
{metadata}---

# {title}

Human preferences between {media} of one prompt, {mark}: {pairs} pairs, {votes} votes of {people} people.

| split | pairs |
|---|---|
{splits}

## Use

```python
from datasets import load_dataset

pairs = load_dataset("{name}", split="train")
```

`tapo-trl slrm --dataset_name {name} ...` trains a reward model on it.

| column | meaning |
|---|---|
| `prompt` | the prompt |
| `chosen`, `rejected` | the {media}; `chosen` is preferred over all dimensions |
| `label` | 1, or 0.5 for a tie over all dimensions |
{labels}
| `num_votes` | people who voted on the pair |
| `agreement_<dimension>` | share of equal answers of two people; null with one vote |
| `source_chosen`, `source_rejected` | the models |

## How people were asked

{guidelines}{questions}

The two {media} were side by side, on sides of their own for each person, without the names of the models. Each answer was left, tie or right.
{left_out}
## Sources

{sources}

Check what a reward model learns from: if one source wins nearly always, it can learn to tell the sources apart instead of what people prefer.
"""


def dataset_card(
    study: Study,
    rows: Sequence[dict[str, Any]],
    report: dict[str, Any],
    people: int,
    license: str | None = None,
    name: str = "NAME",
) -> str:
    """
    The text of `README.md`.

    Args:
        study ([`Study`]): The study.
        rows (`Sequence[dict]`): All rows of the data set.
        report (`dict`): `rows` and `dropped` of [`export_preferences`].
        people (`int`): Number of people whose votes are in it.
        license (`str`, *optional*): Licence, as the Hub names it.
        name (`str`, *optional*, defaults to `"NAME"`): Hub id, or folder, of the data set.
    """
    media = "videos" if is_video(rows[0]["chosen_file_name"]) else "images"
    metadata = {"tags": ["preference", "human-feedback", media, "tapo-trl"]}
    if license is not None:
        metadata["license"] = license
    wins = Counter(row["source_chosen"] for row in rows if row["label"] == 1)
    shown = Counter(source for row in rows for source in (row["source_chosen"], row["source_rejected"]))
    left_out = [f"- {number} {reason}" for reason, number in report["dropped"].items()]
    return _TEXT.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False),
        title=study.title,
        media=media,
        mark=MARK,
        name=name,
        pairs=len(rows),
        votes=sum(row["num_votes"] for row in rows),
        people=people,
        splits="\n".join(f"| {split} | {number} |" for split, number in report["rows"].items()),
        labels="\n".join(
            f"| `label_{name}` | mean answer to *{dimension.question}*: 1 `chosen`, 0.5 tie, 0 `rejected` |"
            for name, dimension in zip(study.dimension_names, study.dimensions, strict=True)
        ),
        guidelines=study.guidelines + "\n\n" if study.guidelines else "",
        questions="\n".join(
            f"- **{dimension.question}** {dimension.guideline}".rstrip() for dimension in study.dimensions
        ),
        left_out="\nLeft out:\n\n" + "\n".join(left_out) + "\n" if left_out else "",
        sources="\n".join(
            f"- {source}: preferred in {wins[source]} of {number} pairs" for source, number in shown.items()
        ),
    )
