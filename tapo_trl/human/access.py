# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Who may vote: names with secret tokens. Only their hashes are on disk."""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ..files import atomic_write


LOOPBACK = ("127.0.0.1", "::1", "localhost")
LOCAL_ANNOTATOR = "local"  # who votes on a page without tokens


class Access:
    """
    The people of a study, and names of media that tell nothing.

    Args:
        folder (`str` or `Path`): Folder of the study. `tokens.json` in it is readable by its owner alone, and is never exported.
        allowed_hosts (`Sequence[str]`, *optional*): Names of the server under which it answers without tokens, besides those of loopback.
    """

    def __init__(self, folder: str | Path, allowed_hosts: Sequence[str] = ()):
        self.allowed_hosts = {*LOOPBACK, *(name.lower() for name in allowed_hosts)}
        self.file = Path(folder) / "tokens.json"
        try:
            content = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        except ValueError as error:
            raise ValueError(f"{self.file} is damaged ({error}). Without it, all need new links.") from error
        self.hashes: dict[str, str] = content.get("annotators", {})
        self.secret: str = content.get("secret") or secrets.token_hex(32)
        if not content:
            self._save()

    def _save(self) -> None:
        with atomic_write(self.file) as aside:
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"secret": self.secret, "annotators": self.hashes}, file, indent=2)

    def add(self, annotators: Iterable[str]) -> dict[str, str]:
        """
        Make tokens for people who have none.

        Returns:
            `dict[str, str]`: The new tokens by name. They cannot be read again.
        """
        tokens = {}
        for name in annotators:
            if not name.isidentifier():
                raise ValueError(
                    f"`annotators`: {name!r} is no name: use letters, digits and underscores, such as p07."
                )
            if name == "all":
                raise ValueError(f"`annotators`: {name!r} stands for all people in results. Take another name.")
            if name not in self.hashes:
                tokens[name] = secrets.token_urlsafe(24)
                self.hashes[name] = hashlib.sha256(tokens[name].encode()).hexdigest()
        if tokens:
            self._save()
        return tokens

    def annotator_of(self, token: str | None) -> str | None:
        """Whose token it is; `None` if nobody's. Without tokens, all are `local`."""
        if not self.hashes:
            return LOCAL_ANNOTATOR
        digest = hashlib.sha256((token or "").encode()).hexdigest()
        for name, known in self.hashes.items():
            if hmac.compare_digest(digest, known):
                return name
        return None

    def allows_host(self, header: str | None) -> bool:
        """
        Whether a request was meant for this page, by its `Host`. Without tokens, another site could reach the page by a name of its own that
        leads to this machine (DNS rebinding).
        """
        try:
            name = urlsplit(f"//{header or ''}").hostname
        except ValueError:
            name = None
        return bool(self.hashes) or name in self.allowed_hosts

    @property
    def cookie(self) -> str:
        """Name of the cookie with the token. Browsers share cookies between ports, and thus between studies on one machine."""
        return "tapo_trl_" + self.media_name("cookie")[:12]

    @property
    def study_name(self) -> str:
        """Name of the study for its page, which tells nothing. Browsers keep the drafts of all studies at one address together."""
        return self.media_name("study")[:12]

    def media_name(self, medium: str) -> str:
        """The name under which a medium is served."""
        return hmac.new(self.secret.encode(), medium.encode(), hashlib.sha256).hexdigest()[:32] + Path(medium).suffix
