# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Prompts of a study, from meta elements."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from .elements import Elements
from .log import AppendLog
from .study import Study
from .writers import TemplateWriter, Writer


MAX_SIMILARITY = 0.7  # Jaccard index of the word triples of two prompts
_REFUSALS = ("i cannot", "i can't", "i'm sorry", "i am sorry", "as an ai")
_SMALL_WORDS = frozenset("a an the of in on at to and with from for is are by two three".split())


class SimilarPrompts:
    """Finds prompts that are nearly the same, by an inverted index of word triples."""

    def __init__(self):
        self.index: dict[tuple[str, ...], list[int]] = {}
        self.sizes: list[int] = []
        self.texts: set[str] = set()

    def find(self, prompt: str) -> str | None:
        """`"a duplicate"` or `"too similar to another"` if it is."""
        words = _words(prompt)
        if " ".join(words) in self.texts:
            return "a duplicate"
        triples = _triples(words)
        shared = Counter(row for triple in triples for row in self.index.get(triple, ()))
        for row, count in shared.most_common(20):
            if count / (len(triples) + self.sizes[row] - count) >= MAX_SIMILARITY:
                return "too similar to another"
        return None

    def add(self, prompt: str) -> None:
        words = _words(prompt)
        self.texts.add(" ".join(words))
        triples = _triples(words)
        for triple in triples:
            self.index.setdefault(triple, []).append(len(self.sizes))
        self.sizes.append(len(triples))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _triples(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))}


def clean_answer(text: str) -> str:
    """A prompt from the answer of a language model: its text in JSON or a list, without quotation marks."""
    text = text.strip()
    try:
        value = json.loads(text)
        while isinstance(value, (dict, list)) and value:
            value = next(iter(value.values())) if isinstance(value, dict) else value[0]
        text = value if isinstance(value, str) else ""
    except ValueError:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        lines = lines[1:] if len(lines) > 1 and lines[0].endswith(":") else lines
        text = re.sub(r"^([-*•]|\d+[.)])\s+", "", lines[0]) if lines else ""
    return text.strip().strip("\"'“”").strip()


def find_fault(prompt: str, values: dict[str, str], max_words: int) -> str | None:
    """Why a prompt cannot be used, if so. The first element is the subject, which must be named."""
    words = _words(prompt)
    if not words:
        return "empty"
    if any(phrase in prompt.lower() for phrase in _REFUSALS):
        return "a refusal"
    if len(words) > max_words:
        return f"longer than {max_words} words"
    subject = set(_words(next(iter(values.values())))) - _SMALL_WORDS
    return f"without its {next(iter(values))}" if subject and not subject & set(words) else None


def write_prompts(
    study: Study,
    elements: Elements,
    writer: Writer,
    num: int,
    *,
    max_words: int = 60,
    batch_size: int = 8,
    attempts: int = 3,
) -> dict[str, Any]:
    """
    Write prompts from combinations of values into `prompts.jsonl` until there are `num`. Each is saved at once, and a combination that has been
    asked for, kept or dropped, is not asked for again.

    Args:
        study ([`Study`]): The study, whose `seed` gives the combinations.
        elements ([`Elements`]): The meta elements.
        writer ([`Writer`]): Who writes them. What a language model fails at in all attempts is written by a template, and its row says so.
        num (`int`): Number of prompts.
        max_words (`int`, *optional*, defaults to `60`): Longest prompt.
        batch_size (`int`, *optional*, defaults to `8`): Prompts at once.
        attempts (`int`, *optional*, defaults to `3`): How often a language model is asked for a prompt.

    Returns:
        `dict`: `kept`, `from_templates` (in place of a language model), and `dropped` by reason.
    """
    fallback = TemplateWriter(elements)
    with (
        AppendLog(study.folder / "prompts.jsonl", "prompt_id", ("prompt", "backend")) as kept,
        AppendLog(study.folder / "prompts_dropped.jsonl", "combination", ("reason",)) as dropped,
    ):
        similar, known = SimilarPrompts(), {row.get("combination") for row in [*kept.rows, *dropped.rows]}
        for row in kept.rows:
            similar.add(row["prompt"])
        combinations = (values for values in elements.sample(max(num, 100), study.seed) if _name(values) not in known)
        while len(kept.rows) < num:
            batch = list(islice(combinations, min(batch_size, num - len(kept.rows))))
            if not batch:
                break
            for values, prompt, backend, reason in _write_batch(
                batch, writer, fallback, similar, max_words, attempts, study.seed
            ):
                name = _name(values)
                if reason is not None:
                    dropped.append({"combination": name, "reason": reason, "prompt": prompt})
                    continue
                similar.add(prompt)
                row = {"prompt_id": name, "prompt": prompt, "meta": values, "backend": backend, "combination": name}
                kept.append(row)
        rows = kept.rows
        return {
            "kept": len(rows),
            "from_templates": sum(row["backend"] == fallback.name for row in rows)
            if writer.name != fallback.name
            else 0,
            "dropped": dict(Counter(row["reason"] for row in dropped.rows)),
        }


def _write_batch(
    batch: Sequence[dict[str, str]],
    writer: Writer,
    fallback: TemplateWriter,
    similar: SimilarPrompts,
    max_words: int,
    attempts: int,
    seed: int,
) -> Iterable[tuple[dict[str, str], str, str, str | None]]:
    """Each combination with its prompt, who wrote it, and why it cannot be used, if so."""
    is_template = writer.name == fallback.name
    open_rows, results = list(range(len(batch))), {}
    for attempt in range(1 if is_template else attempts):
        asked = [batch[row] for row in open_rows]
        own_seed = int(_name(asked[0]), 16) % 2**31 + seed + attempt
        answers = writer.write(asked, own_seed)
        for row, answer in zip(list(open_rows), answers, strict=True):
            prompt = answer if is_template else clean_answer(answer)
            reason = find_fault(prompt, batch[row], max_words) or similar.find(prompt)
            results[row] = (prompt, writer.name, reason)
            if reason is None:
                open_rows.remove(row)
        if not open_rows:
            break
    for row in [] if is_template else open_rows:
        prompt = fallback.write([batch[row]], seed + row)[0]
        results[row] = (prompt, fallback.name, find_fault(prompt, batch[row], max_words) or similar.find(prompt))
    accepted = SimilarPrompts()
    for row, values in enumerate(batch):
        prompt, backend, reason = results[row]
        reason = reason or accepted.find(prompt)
        if reason is None:
            accepted.add(prompt)
        yield values, prompt, backend, reason


def _name(values: dict[str, str]) -> str:
    """Short name of a combination."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def import_prompts(study: Study, prompts: Sequence[str]) -> int:
    """
    Add prompts of one's own to `prompts.jsonl`, without elements; known ones are left out.

    Returns:
        `int`: How many are new.
    """
    with AppendLog(study.folder / "prompts.jsonl", "prompt_id", ("prompt",)) as log:
        return sum(
            log.append({"prompt_id": _name({"prompt": prompt}), "prompt": prompt, "meta": {}, "backend": "file"})
            for prompt in prompts
        )


def distinct_2(prompts: Sequence[str]) -> float:
    """Share of different pairs of neighbouring words: low where a language model writes the same again and again."""
    pairs = [pair for prompt in prompts for pair in zip(_words(prompt), _words(prompt)[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0
