# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""The annotation page as a [Starlette](https://www.starlette.io) application."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from transformers.utils import logging

from ..data.images import BadFileError
from .access import Access
from .assignment import Assignment, left_medium
from .live import Group, LiveGroups, check_choice
from .log import AppendLog
from .media import viewed_file
from .study import Dimension, Pair, Study, is_video
from .votes import FIRST, SECOND, SKIP_REASONS, TIE, VoteStore, check_event


logger = logging.get_logger(__name__)

PAGE = Path(__file__).with_name("page.html")
SIDES = ("left", "tie", "right")
MAX_BODY = 16_384  # bytes of a request
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class AnnotationPage:
    """
    The requests of the page. State is in the store, so that a restarted server goes on where it was.

    Args:
        study ([`Study`]): The study.
        store ([`VoteStore`]): Its votes.
        access ([`Access`]): Its people.
        clock (`Callable`, *optional*): Seconds since the epoch, for the time of a vote.
    """

    waits = False  # for more to come

    def __init__(self, study: Study, store: VoteStore, access: Access, clock: Callable[[], float] = time.time):
        self.study, self.store, self.access, self.clock = study, store, access, clock
        self.media: dict[str, str] = {}
        self.assignment = self._assignment()

    def _assignment(self) -> Assignment:
        pairs = self.study.read_pairs()
        self.media = {self.access.media_name(medium): medium for pair in pairs for medium in pair.media}
        return Assignment(self.study, pairs, self.store.rows)

    def app(self) -> Starlette:
        """The application."""
        return Starlette(
            routes=[
                Route("/", self.page),
                Route("/api/next", self.next),
                Route("/api/vote", self.vote, methods=["POST"]),
                Route("/api/skip", self.skip, methods=["POST"]),
                Route("/api/undo", self.undo, methods=["POST"]),
                Route("/media/{name}", self.medium),
            ],
            exception_handlers={HTTPException: _error},
        )

    def _annotator(self, request: Request) -> str:
        if not self.access.allows_host(request.headers.get("host")):
            raise HTTPException(
                403,
                "This page answers to localhost only. Start it with `--allowed_hosts` and the name in your address bar, or with `--annotators`.",
            )
        annotator = self.access.annotator_of(request.cookies.get(self.access.cookie))
        if annotator is None:
            raise HTTPException(401, "Open the link that you were given: this page does not know you.")
        return annotator

    async def page(self, request: Request) -> Response:
        """The page. A token in its address becomes a cookie, and leaves the address."""
        token = request.query_params.get("token")
        if token is not None:
            if self.access.annotator_of(token) is None:
                raise HTTPException(401, "This link is not valid. Ask for a new one.")
            response = RedirectResponse("/", 303, HEADERS)
            # Not strict: who comes from a link on another site, such as a mail, would be unknown after the redirection
            response.set_cookie(self.access.cookie, token, httponly=True, samesite="lax", max_age=90 * 24 * 3600)
            return response
        self._annotator(request)
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=HEADERS)

    async def next(self, request: Request) -> Response:
        """What a person sees next."""
        return self._state(self._annotator(request))

    def _state(self, annotator: str) -> Response:
        study, pair = self.study, self.assignment.next(annotator)
        done, total = self.assignment.progress(annotator)
        state = {
            "study": self.access.study_name,
            "title": study.title,
            "guidelines": study.guidelines,
            "questions": [[entry.question, entry.guideline] for entry in study.dimensions],
            "skip_reasons": SKIP_REASONS,
            "annotator": annotator,
            "done": done,
            "total": total,
            "can_undo": self.assignment.last(annotator) is not None,
            "waits": self.waits,
            "pair": None if pair is None else self._shown(pair, annotator),
        }
        return JSONResponse(state, headers=HEADERS)

    def _shown(self, pair: Pair, annotator: str) -> dict[str, Any]:
        left = left_medium(self.study.seed, annotator, pair)
        return {
            "pair_id": pair.pair_id,
            "prompt": pair.prompt,
            "is_video": is_video(pair.media[0]),
            "media": [f"/media/{self.access.media_name(pair.media[number])}" for number in (left, 1 - left)],
            "captions": ["Left", "Right"],
            "rows": [
                {"name": entry.name, "question": entry.question, "choices": SIDES} for entry in self.study.dimensions
            ],
        }

    async def vote(self, request: Request) -> Response:
        """Answers `left`, `tie` or `right` by dimension. They are on disk before the response."""
        annotator, body, pair = await self._read(request)
        answers = body.get("answers")
        if not isinstance(answers, dict) or not all(isinstance(answer, str) for answer in answers.values()):
            raise HTTPException(400, "`answers` must be a mapping of texts.")
        event = self._labels(answers, annotator, pair)
        event |= {"ms": _number(body, "ms"), "plays": _number(body, "plays")}
        return await self._write("vote", annotator, body, pair, event)

    def _labels(self, answers: dict[str, Any], annotator: str, pair: Pair) -> dict[str, Any]:
        """What a person answered, by medium instead of side."""
        left = left_medium(self.study.seed, annotator, pair)
        of_sides = {"left": SECOND if left else FIRST, "tie": TIE, "right": FIRST if left else SECOND}
        if any(answer not in of_sides for answer in answers.values()):
            raise HTTPException(400, "`answers` must be left, tie or right by dimension.")
        return {"labels": {name: of_sides[answer] for name, answer in answers.items()}, "left": left}

    async def skip(self, request: Request) -> Response:
        """A pair that cannot be judged, with a `reason`."""
        annotator, body, pair = await self._read(request)
        return await self._write("skip", annotator, body, pair, {"reason": body.get("reason")})

    async def undo(self, request: Request) -> Response:
        """Take the last vote or skip back: the pair is shown again."""
        annotator, body = await self._body(request)
        if str(body.get("id")) in self.store:  # sent again, since the response was lost: it has been done
            return self._state(annotator)
        pair = self.assignment.pairs.get(str(body.get("pair_id"))) or self.assignment.last(annotator)
        if pair is None:
            raise HTTPException(404, "There is nothing to take back.")
        return await self._write("undo", annotator, body, pair, {})

    async def _read(self, request: Request) -> tuple[str, dict[str, Any], Pair]:
        """Who sends what, and about which pair."""
        annotator, body = await self._body(request)
        pair = self.assignment.pairs.get(str(body.get("pair_id")))
        if pair is None:
            raise HTTPException(404, "This study has no such pair.")
        return annotator, body, pair

    async def _body(self, request: Request) -> tuple[str, dict[str, Any]]:
        annotator = self._annotator(request)
        # Other sites cannot send this type without being asked for permission
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            raise HTTPException(415, "Send application/json.")
        if int(request.headers.get("content-length") or MAX_BODY + 1) > MAX_BODY:
            raise HTTPException(413, f"A request may have at most {MAX_BODY} bytes.")
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise HTTPException(400, "This is no JSON.") from None
        if not isinstance(body, dict):
            raise HTTPException(400, "Send a JSON object.")
        return annotator, body

    async def _write(
        self, kind: str, annotator: str, body: dict[str, Any], pair: Pair, more: dict[str, Any]
    ) -> Response:
        event = {"id": body.get("id"), "kind": kind, "annotator": annotator, "pair_id": pair.pair_id, **more}
        event |= {"guideline": self.study.guideline_hash, "time": round(self.clock(), 3)}
        try:
            self._check(event, pair)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        try:
            is_new = await run_in_threadpool(self.store.append, event)
        except OSError as error:
            raise HTTPException(507, f"The vote could not be saved: {error}") from error
        if is_new:
            self.assignment.record(event)
            if kind == "undo":
                self.assignment.hold(annotator, pair)
        return self._state(annotator)

    def _check(self, event: dict[str, Any], pair: Pair) -> None:
        check_event(event, self.study.dimension_names)

    async def medium(self, request: Request) -> Response:
        """An image or a video, in parts if the browser asks for them."""
        self._annotator(request)
        medium = self.media.get(request.path_params["name"])
        if medium is None or not (self.study.folder / medium).is_file():
            raise HTTPException(404, "There is no such file.")
        try:
            file = await run_in_threadpool(viewed_file, self.study, medium)
        except BadFileError as error:
            logger.warning(f"A pair cannot be shown: {error}")
            raise HTTPException(404, "This file cannot be read.") from error
        return FileResponse(file, headers={**HEADERS, "Cache-Control": "private, max-age=3600"})


class LivePage(AnnotationPage):
    """
    The page of live votes: the best and the worst of the samples of a prompt, see [`~human.live.HumanReward`].

    Args:
        folder (`Path`): Folder of the samples.
        store ([`AppendLog`]): The choices.
        access ([`Access`]): People.
    """

    waits = True

    def __init__(self, folder: Path, store: AppendLog, access: Access, clock: Callable[[], float] = time.time):
        study = Study(
            title="Which is best?", dimensions=[Dimension("best", "The best"), Dimension("worst", "The worst")]
        )
        study.folder = folder
        super().__init__(study, store, access, clock)

    def _assignment(self) -> LiveGroups:
        return LiveGroups(self.study.folder, self.store.rows)

    def _shown(self, pair: Group, annotator: str) -> dict[str, Any]:
        numbers = [str(number + 1) for number in range(len(pair.media))]
        self.media |= {self.access.media_name(medium): medium for medium in pair.media}
        return {
            "pair_id": pair.pair_id,
            "prompt": pair.prompt,
            "is_video": is_video(pair.media[0]),
            "media": [f"/media/{self.access.media_name(medium)}" for medium in pair.media],
            "captions": numbers,
            "rows": [
                {"name": entry.name, "question": entry.question, "choices": numbers} for entry in self.study.dimensions
            ],
        }

    def _labels(self, answers: dict[str, Any], annotator: str, pair: Group) -> dict[str, Any]:
        numbers = {str(number + 1): number for number in range(len(pair.media))}
        if set(answers) != {"best", "worst"} or any(answer not in numbers for answer in answers.values()):
            raise HTTPException(400, "`answers` must be the numbers of the best and the worst.")
        return {name: numbers[answer] for name, answer in answers.items()}

    def _check(self, event: dict[str, Any], pair: Group) -> None:
        if pair.is_used:
            raise ValueError("Training has gone on with the choice from these samples.")
        check_choice(event, len(pair.media))


def _number(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1e9:
        raise HTTPException(400, f"`{name}` must be a number.")
    return value


async def _error(request: Request, error: HTTPException) -> Response:
    if request.url.path == "/":
        return HTMLResponse(f"<!doctype html><meta charset=utf-8><p>{error.detail}", error.status_code, HEADERS)
    return JSONResponse({"error": error.detail}, error.status_code, headers=HEADERS)
