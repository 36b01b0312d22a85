# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Sharing a run on the Hub. What is uploaded is a folder of its own, made of what others can use: weights as safetensors, the
card and samples. What cannot be uploaded is reported, and the training goes on.
"""

import json
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from huggingface_hub import CommitInfo, HfApi, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from ..version import __version__
from .model_card import is_hub_id


logger = logging.get_logger(__name__)

UPLOAD_FOLDER = "hub_upload"
WEIGHT_FILES = ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json")
WEIGHT_FOLDERS = ("transformer/*", "tokenizer/*")
RUN_FILES = ("README.md", "samples/*")
FINAL_FILES = ("ema/**/*",)
PRIVATE_FILES = ("ema.safetensors",)  # state of the callback, for resuming

RETRY_WAITS = (5, 30, 120)  # seconds
MAX_RETRY_AFTER = 600
PATIENCE = 600  # after that no attempt begins
REQUEST_TIMEOUT = 60  # seconds without a byte; huggingface_hub's own requests would wait forever
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
NEVER_RETRIED = (ValueError, LocalTokenNotFoundError, OfflineModeIsEnabled)

ADVICE = {
    401: "the access token is missing or not valid; log in with `hf auth login`, or set `HF_TOKEN`",
    403: "the access token may not write there; it needs the write permission",
    429: "the Hub got too many requests",
}

Result = TypeVar("Result")


def check_hub_strategy(args: TrainingArguments) -> None:
    """
    Refuse to upload what a run resumes from.

    Raises:
        ValueError: if `hub_strategy` is `"checkpoint"` or `"all_checkpoints"`.
    """
    if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f'`hub_strategy="{args.hub_strategy.value}"` would upload the states of the optimizer and of the random number '
            "generators, which are pickles, and paths of this machine. Use `every_save`, which uploads the weights of every "
            "checkpoint, and resume from `output_dir`."
        )


def collect_upload(folder: Path, weights_from: Path, output_dir: Path, is_final: bool) -> None:
    """
    Copy what is shared into a folder of its own, without the names of this machine's folders.

    Args:
        folder (`Path`): where to; replaced if it exists.
        weights_from (`Path`): a checkpoint, or the output folder itself.
        output_dir (`Path`): the output folder, with the card and the samples.
        is_final (`bool`): whether the run is over, so that averaged weights are there, too.
    """
    shutil.rmtree(folder, ignore_errors=True)
    patterns = {weights_from: WEIGHT_FILES + WEIGHT_FOLDERS}
    patterns[output_dir] = (*patterns.get(output_dir, ()), *RUN_FILES, *(FINAL_FILES if is_final else ()))
    for source, names in patterns.items():
        for path in (path for name in names for path in source.glob(name)):
            if path.name in PRIVATE_FILES or not path.is_file():
                continue
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                target.write_text(_public_json(path.read_text(encoding="utf-8")), encoding="utf-8")
            else:
                shutil.copy(path, target)


def _public_json(text: str) -> str:
    """A configuration in which a base model or a CLIP that is a local folder has no name."""
    config = json.loads(text)
    for name in ("base_model_name_or_path", "clip_model_name_or_path", "_name_or_path"):
        if config.get(name) and not is_hub_id(config[name]):
            config[name] = ""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def with_retries(function: Callable[[], Result], waits: tuple[int, ...]) -> Result:
    """
    Call the Hub, again after a while if it is down or busy. A wait that the server asks for is respected, unless it is
    longer than ten minutes.

    Args:
        function (`Callable`): what to call.
        waits (`tuple[int, ...]`): seconds before each further attempt.

    Raises:
        Exception: the last one, if the Hub says no, or could not be reached in any attempt.
    """
    start = time.monotonic()
    for wait in (*waits, None):
        session = get_session()
        if session.timeout.read is None:
            session.timeout = REQUEST_TIMEOUT
        try:
            return function()
        except Exception as error:
            asked = retry_after(error)
            is_over = wait is None or asked > MAX_RETRY_AFTER or time.monotonic() - start > PATIENCE
            if is_over or not is_transient(error):
                raise
            time.sleep(max(wait, asked))


def is_transient(error: Exception) -> bool:
    """Whether what went wrong may go well a while later."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUS
    return not isinstance(error, NEVER_RETRIED)


def retry_after(error: Exception) -> int:
    """Seconds that the server asks to wait in `Retry-After` or `RateLimit`, 0 if it does not."""
    if not isinstance(error, HfHubHTTPError):
        return 0
    headers = error.response.headers
    seconds = re.fullmatch(r"\s*(\d+)\s*", headers.get("retry-after", ""))
    seconds = seconds or re.search(r";\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return int(seconds[1]) if seconds else 0


def describe_error(error: Exception) -> str:
    """The same words for the same trouble: without the ids and addresses of a request."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"{ADVICE.get(status, error.response.reason_phrase)} (HTTP {status})"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class HubPushMixin:
    """
    Put before a `Trainer`, it uploads with `push_to_hub=True` what others can use, and outlives a Hub that fails: every
    upload is tried again for some minutes, then reported, and the next save tries once more.
    """

    push_in_progress: PushInProgress | None = None
    _hub_trouble: str | None = None  # what the last upload failed from

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if not self.is_world_process_zero():
            return
        check_hub_strategy(self.args)
        try:
            with_retries(lambda: self._create_repo(token, private), waits=())
        except HFValidationError:  # not a name for a repository
            raise
        except Exception as error:
            logger.warning(
                f"There is no access to the Hub repository `{self._repo_name}`: {describe_error(error)}. The training "
                "starts, and the next save tries again."
            )

    @cached_property
    def _hub_api(self) -> HfApi:
        return HfApi(library_name="tapo_trl", library_version=__version__)

    @property
    def _repo_name(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    def _create_repo(self, token: str | None, private: bool | None) -> None:
        repo = self._hub_api.create_repo(
            self._repo_name,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            exist_ok=True,
        )
        self.hub_model_id = repo.repo_id

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        in_progress = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if in_progress and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        job = self._start_push(Path(checkpoint_folder), f"Training in progress, step {self.state.global_step}")
        jobs = self.push_in_progress.jobs if in_progress else []
        self.push_in_progress = PushInProgress([*jobs, job])

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """
        Save the model and upload it with its card and samples. If that fails, a warning tells how to do it by hand.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): message of the commit.
            blocking (`bool`, *optional*, defaults to `True`): whether to wait until it is done.
            token (`str`, *optional*): access token. Defaults to `args.hub_token`, else to that of the login.
            revision (`str`, *optional*): branch. Defaults to `args.hub_revision`.
            private (`bool`, *optional*): whether a new repository is private. Defaults to `args.hub_private_repo`.
            kwargs: further arguments of `create_model_card`, such as `dataset_name`.

        Returns:
            [`~huggingface_hub.CommitInfo`]: the commit, a `Future` of it if not `blocking`, or `None` if it failed and on
            all processes but the main one.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        self._hub_trouble = None
        job = self._start_push(Path(self.args.output_dir), commit_message, token, revision, private)
        self.push_in_progress = PushInProgress([job])
        return job.result() if blocking else job

    def _start_push(
        self,
        weights_from: Path,
        commit_message: str,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Future:
        output_dir = Path(self.args.output_dir)
        folder = output_dir / UPLOAD_FOLDER / f"step-{self.state.global_step}"
        if self.push_in_progress is None or self.push_in_progress.is_done():
            shutil.rmtree(folder.parent, ignore_errors=True)  # of an upload that failed
        try:
            collect_upload(folder, weights_from, output_dir, is_final=weights_from == output_dir)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning(f"The files for the Hub could not be copied to {folder}: {error}.")
            job = Future()
            job.set_result(None)
            return job
        return self._hub_api.run_as_future(self._upload, folder, commit_message, token, revision, private)

    def _upload(
        self, folder: Path, commit_message: str, token: str | None, revision: str | None, private: bool | None
    ) -> CommitInfo | None:
        """Upload a folder and remove it. If it fails, keep it and say so, once for the same trouble in a row."""
        kept = folder.with_name("latest")

        def upload() -> CommitInfo:
            if self.hub_model_id is None:
                self._create_repo(token, private)
            return self._hub_api.upload_folder(
                repo_id=self.hub_model_id,
                folder_path=folder,
                commit_message=commit_message,
                token=token or self.args.hub_token,
                revision=revision or self.args.hub_revision,
            )

        try:
            commit = with_retries(upload, RETRY_WAITS)
        except Exception as error:
            shutil.rmtree(kept, ignore_errors=True)
            folder.rename(kept)
            trouble = describe_error(error)
            if trouble != self._hub_trouble:
                logger.warning(
                    f'The upload to the Hub repository `{self._repo_name}` ("{commit_message}") failed: {trouble}. The '
                    f"files are safe. The next save tries again; by hand, `hf upload {self._repo_name} {kept} .` uploads "
                    "the last ones."
                )
            self._hub_trouble = trouble
            return None
        self._hub_trouble = None
        for uploaded in (folder, kept):
            shutil.rmtree(uploaded, ignore_errors=True)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
        return commit
