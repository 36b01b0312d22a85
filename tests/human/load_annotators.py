# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Four people vote over HTTP, each 500 times, while the server is killed with SIGKILL and started again, at least 50 times. Counts votes that
were acknowledged and are lost, and votes that are there twice; measures the time of a vote.

    python -m tests.human.load_annotators [--votes 500] [--kills 50]
"""

import argparse
import http.client
import json
import multiprocessing
import os
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import uvicorn  # noqa: F401

from tapo_trl.cli.annotate import main as annotate
from tapo_trl.cli.human_arguments import AnnotateArguments
from tapo_trl.human.access import Access
from tapo_trl.human.server import AnnotationPage  # noqa: F401
from tapo_trl.human.study import Pair, Study
from tapo_trl.human.votes import read_events


FORK = multiprocessing.get_context("fork")  # a server starts at once: all is imported here


class Person(threading.Thread):
    """Votes like the page: what is not answered is sent again, with the same id."""

    def __init__(self, name: str, cookie: str, port: int, votes: int):
        super().__init__()
        self.person, self.port, self.votes = name, port, votes
        self.headers = {"Content-Type": "application/json", "Cookie": cookie}
        self.acknowledged: dict[str, str] = {}  # pair by the id of its vote
        self.seconds: list[float] = []
        self.retries = 0

    def send(self, method: str, path: str, body: dict | None = None) -> tuple[dict, float]:
        """The answer, and the seconds of the try that was answered."""
        while True:
            start = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            try:
                connection.request(method, path, json.dumps(body) if body else None, self.headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException, ValueError):  # killed: before, while or after it wrote
                self.retries += 1
                time.sleep(0.02)
                continue
            finally:
                connection.close()
            assert response.status == 200, answer
            return answer, time.perf_counter() - start

    def run(self):
        rng = random.Random(self.person)
        state, _ = self.send("GET", "/api/next")
        for number in range(self.votes):
            pair_id, name = state["pair"]["pair_id"], f"{self.person}-{number}"
            answers = {row["name"]: rng.choice(["left", "tie", "right"]) for row in state["pair"]["rows"]}
            body = {"id": name, "pair_id": pair_id, "answers": answers, "ms": 4000, "plays": 2}
            state, seconds = self.send("POST", "/api/vote", body)
            self.acknowledged[name] = pair_id
            self.seconds.append(seconds)


def serve(folder: Path, port: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    annotate(AnnotateArguments(folder=str(folder), port=port))


def measure(folder: Path, votes: int, kills: int, pairs: int) -> dict:
    study = Study()
    study.save(folder)
    study.write_pairs(
        [Pair(f"{n}", f"p{n}", f"prompt {n}", f"a/{n}.mp4", f"b/{n}.mp4", "a", "b") for n in range(pairs)]
    )
    access = Access(folder)
    tokens = access.add(["p01", "p02", "p03", "p04"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    people = [Person(name, f"{access.cookie}={token}", port, votes) for name, token in tokens.items()]
    start, rng, killed, server = time.perf_counter(), random.Random(0), 0, None
    for person in people:
        person.start()
    total, step = votes * len(people), votes * len(people) // (kills + 1)
    while any(person.is_alive() for person in people):
        if server is None or not server.is_alive():
            server = FORK.Process(target=serve, args=(folder, port))
            server.start()
        done = sum(len(person.acknowledged) for person in people)
        if done >= min(total - 1, step * (killed + 1)) and killed < kills:
            time.sleep(rng.uniform(0, 0.05))  # anywhere in a vote
            server.kill()
            server.join()
            killed += 1
        time.sleep(0.002)
    wall = time.perf_counter() - start
    server.kill()
    server.join()
    assert all(len(person.acknowledged) == votes for person in people), "somebody stopped"
    events = read_events(folder / "votes.jsonl", study.dimension_names)
    on_disk = Counter(event["id"] for event in events)
    acknowledged = {name: pair for person in people for name, pair in person.acknowledged.items()}
    milliseconds = 1000 * np.concatenate([person.seconds for person in people])
    return {
        "pairs": pairs,
        "kills": killed,
        "acknowledged": len(acknowledged),
        "on disk": len(events),
        "lost": sum(name not in on_disk for name in acknowledged),
        "doubled": sum(number - 1 for number in on_disk.values()),
        "pairs that a person saw twice": sum(
            number - 1 for number in Counter((event["annotator"], event["pair_id"]) for event in events).values()
        ),
        "tries without an answer": sum(person.retries for person in people),
        "ms of a vote, median": round(float(np.median(milliseconds)), 1),
        "ms of a vote, 99 %": round(float(np.quantile(milliseconds, 0.99)), 1),
        "seconds in all": round(wall, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--votes", type=int, default=500, help="of each of the four people")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=600)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.votes, args.kills, args.pairs)
    print(json.dumps(result, indent=2))
    assert result["kills"] >= args.kills and not result["lost"] and not result["doubled"], "votes were lost or doubled"
