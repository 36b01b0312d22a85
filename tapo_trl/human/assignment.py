# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Who sees which pair next, and on which side each medium is."""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .study import Pair, Study


LEASE_SECONDS = 600.0  # for which a pair that somebody looks at counts as voted on
REPEAT_DISTANCE = 5  # votes between a pair and its repetition, if others are left


def _hash(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def left_medium(seed: int, annotator: str, pair: Pair) -> int:
    """
    The medium, 0 or 1, that a person sees on the left. It is the same whenever they see the pair. It differs between people, and
    a repeated pair is swapped.
    """
    side = _hash(seed, "side", annotator, pair.repeat_of or pair.pair_id) % 2
    return side if pair.repeat_of is None else 1 - side


class Assignment:
    """
    Hands out pairs: each person sees each pair once, in an order of their own; pairs with the fewest votes come first if not all need to see
    all of them; pairs with known answers come regularly.

    Args:
        study ([`Study`]): The study.
        pairs (`Sequence[Pair]`): Its pairs.
        events (`Iterable[dict]`): What has been done so far.
        clock (`Callable`, *optional*): Seconds; by default those of a monotonic clock.
    """

    def __init__(
        self,
        study: Study,
        pairs: Sequence[Pair],
        events: Iterable[dict[str, Any]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self.study, self.clock = study, clock
        self.pairs = {pair.pair_id: pair for pair in pairs}
        self.repeats = [pair for pair in pairs if pair.repeat_of is not None]
        self.open = {pair.pair_id for pair in pairs if pair.repeat_of is None}  # pairs that more people are to see
        self.done: dict[str, dict[str, str]] = {}  # kind of the last event, by annotator and pair
        self.history: dict[str, list[str]] = {}  # pairs that count, oldest first, by annotator
        self.votes: Counter = Counter()
        self.leases: dict[tuple[str, str], float] = {}
        self._orders: dict[str, tuple[list[Pair], list[Pair], list[Pair]]] = {}
        for event in events:
            self.record(event)

    def record(self, event: dict[str, Any]) -> None:
        """Take note of an event that has been written. One on a pair that the study does not have changes nothing."""
        annotator, pair_id = event["annotator"], event["pair_id"]
        if pair_id not in self.pairs:
            return
        done = self.done.setdefault(annotator, {})
        history = self.history.setdefault(annotator, [])
        self.leases.pop((annotator, pair_id), None)
        if done.get(pair_id) == "vote":
            self.votes[pair_id] -= 1
        if pair_id in done:
            history.remove(pair_id)
            del done[pair_id]
        if event["kind"] != "undo":
            done[pair_id] = event["kind"]
            history.append(pair_id)
            self.votes[pair_id] += event["kind"] == "vote"
        needed = self.study.votes_per_pair
        if self.pairs[pair_id].repeat_of is not None:  # it comes to whoever voted on the pair that it repeats
            return
        if needed is None or self.votes[pair_id] < needed or self.pairs[pair_id].gold:
            self.open.add(pair_id)
        else:
            self.open.discard(pair_id)

    def last(self, annotator: str) -> Pair | None:
        """The pair that a person voted on, or skipped, last."""
        history = self.history.get(annotator)
        return self.pairs[history[-1]] if history else None

    def next(self, annotator: str) -> Pair | None:
        """The next pair of a person, reserved for some minutes; `None` if there is nothing left to do."""
        now, done = self.clock(), self.done.get(annotator, {})
        self.leases = {key: end for key, end in self.leases.items() if end > now}
        held = [pair_id for name, pair_id in self.leases if name == annotator and pair_id not in done]
        pair = self.pairs[held[0]] if held else self._choose(annotator, done)
        if pair is not None:
            self.leases[annotator, pair.pair_id] = now + LEASE_SECONDS
        return pair

    def hold(self, annotator: str, pair: Pair) -> None:
        """Show a person this pair next."""
        self.leases = {key: end for key, end in self.leases.items() if key[0] != annotator}
        self.leases[annotator, pair.pair_id] = self.clock() + LEASE_SECONDS

    def _choose(self, annotator: str, done: dict[str, str]) -> Pair | None:
        plain, gold, repeats = self._order(annotator)
        gold = [pair for pair in gold if pair.pair_id not in done]
        repeats = [pair for pair in repeats if pair.pair_id not in done and done.get(pair.repeat_of) == "vote"]
        place, every = (len(done) + 1) % self.study.gold_every, self.study.gold_every
        recent = set(self.history.get(annotator, [])[-REPEAT_DISTANCE:])
        old = [pair for pair in repeats if pair.repeat_of not in recent]
        if gold and place == 0:
            return gold[0]
        if old and place == every // 2:
            return old[0]
        return self._fresh(plain, done) or next(iter([*gold, *old, *repeats]), None)

    def _fresh(self, plain: Sequence[Pair], done: dict[str, str]) -> Pair | None:
        """The first of the pairs with the fewest votes, if not all need to see all."""
        leased = Counter(pair_id for _, pair_id in self.leases)
        needed = self.study.votes_per_pair
        best, fewest = None, needed
        for pair in plain:
            if pair.pair_id in done:
                continue
            if needed is None:
                return pair
            count = self.votes.get(pair.pair_id, 0) + leased.get(pair.pair_id, 0)
            if count < fewest:
                best, fewest = pair, count
            if fewest == 0:
                break
        return best

    def progress(self, annotator: str) -> tuple[int, int]:
        """Pairs that a person has done, and those that are theirs to do in all, as far as that is known."""
        done = self.done.get(annotator, {})
        again = sum(
            repeat.pair_id not in done
            and (done[repeat.repeat_of] == "vote" if repeat.repeat_of in done else repeat.repeat_of in self.open)
            for repeat in self.repeats
        )
        return len(done), len(done) + len(self.open) - sum(pair_id in self.open for pair_id in done) + again

    def _order(self, annotator: str) -> tuple[list[Pair], list[Pair], list[Pair]]:
        """The pairs in the order of a person: new ones, those with known answers, and repetitions."""
        if annotator not in self._orders:
            seed, kinds = self.study.seed, ([], [], [])
            for pair in sorted(self.pairs.values(), key=lambda pair: _hash(seed, "order", annotator, pair.pair_id)):
                kinds[1 if pair.gold else 2 if pair.repeat_of else 0].append(pair)
            self._orders[annotator] = kinds
        return self._orders[annotator]
