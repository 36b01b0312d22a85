# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

from .parser import FolderParser, RecipeParser


def make_parser() -> RecipeParser:
    """Parser of `tapo-trl annotate`."""
    from .human_arguments import AnnotateArguments

    return FolderParser((AnnotateArguments,), prog="tapo-trl annotate")


def main(args) -> None:
    """
    Serves the annotation page until it is interrupted.

    Args:
        args ([`AnnotateArguments`]): Options of the command.

    Raises:
        SystemExit: if the page cannot be served; says why.
    """
    try:
        import uvicorn

        from ..human.server import AnnotationPage, LivePage
    except ImportError as error:
        raise SystemExit(f"The page needs `pip install starlette uvicorn` ({error}).") from error
    import socket
    from pathlib import Path

    from ..human.access import LOOPBACK, Access
    from ..human.live import CHOICES
    from ..human.study import Study
    from ..human.votes import VoteStore

    try:
        folder = Path(args.folder)
        is_live = (folder / "groups").is_dir()
        study = None if is_live else Study.load(folder)
        store = VoteStore(folder / (CHOICES if is_live else "votes.jsonl"))
        access = Access(folder, args.allowed_hosts or ())
        if access.hashes and args.allowed_hosts:
            raise ValueError(f"`allowed_hosts` has no effect: the people in {access.file} have links.")
        if args.host not in LOOPBACK and not (access.hashes or args.annotators):
            raise ValueError(f"`host={args.host}` can be reached by others: name `annotators`, who get secret links.")
        page = LivePage(folder, store, access) if is_live else AnnotationPage(study, store, access)
        server = socket.create_server(
            (args.host, args.port), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET
        )
        tokens = access.add(args.annotators or [])  # last: they are printed once
    except (ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"tapo-trl annotate: error: {error}") from error
    address = f"http://{args.host}:{server.getsockname()[1]}/"
    if args.host not in LOOPBACK:
        print(
            f"Others can reach {address}. It is not encrypted: use it in a network that you trust, or behind a proxy with HTTPS."
        )
    for name, token in tokens.items():
        print(f"{name}: {address}?token={token}")
    known = sorted(set(access.hashes) - set(tokens))
    if known:
        print(
            f"Links given out earlier stay valid: {', '.join(known)}. Remove a name from tokens.json to make a new one."
        )
    print(f"{page.study.title}: {address}  (Ctrl+C ends it; votes are saved as they are given)", flush=True)
    with store:
        config = uvicorn.Config(page.app(), log_level="warning", access_log=False, server_header=False)
        uvicorn.Server(config).run(sockets=[server])
