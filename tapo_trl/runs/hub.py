# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""
Uploads only shareable files, that is weights as safetensors, the card and samples, from a folder of their own. A failed
upload never stops training.
"""

import json
import shutil
from concurrent.futures import Future, wait
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..version import __version__
from .model_card import is_hub_id


logger = logging.get_logger(__name__)

UPLOAD_FOLDER = "hub_upload"
WEIGHT_FILES = ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json")
WEIGHT_FOLDERS = ("transformer/*", "transformer_2/*", "tokenizer/*")
RUN_FILES = ("README.md", "samples/*")
FINAL_FILES = ("ema/**/*",)
PRIVATE_FILES = ("ema.safetensors",)  # state of the callback, for resuming

REQUEST_TIMEOUT = 60  # seconds without a byte

ADVICE = {
    401: "the access token is missing or not valid; log in with `hf auth login`, or set `HF_TOKEN`",
    403: "the access token may not write there; it needs the write permission",
    429: "the Hub got too many requests",
}


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


def describe_error(error: Exception) -> str:
    """The same words for the same trouble: without the ids and addresses of a request."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return f"{ADVICE.get(status, error.response.reason_phrase)} (HTTP {status})"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class HubUploads:
    """
    The uploads of a run, which a trainer holds. They have what others can use, and nothing else. One that fails is reported,
    the training goes on, and the next save tries again; single requests are repeated by `huggingface_hub`.

    Args:
        args ([`~transformers.TrainingArguments`]): the configuration.

    Attributes:
        repo_id (`str`, *optional*): the repository, once it is known to exist.
    """

    def __init__(self, args: TrainingArguments):
        self.args = args
        self.repo_id: str | None = None
        self._jobs: list[Future] = []
        self._trouble: str | None = None  # what the last upload failed from
        self._api = HfApi(library_name="tapo_trl", library_version=__version__)

    @property
    def repo_name(self) -> str:
        """Name of the repository, with or without that of its owner."""
        return self.repo_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name

    @property
    def is_busy(self) -> bool:
        """Whether an upload is under way."""
        return not all(job.done() for job in self._jobs)

    def wait(self) -> None:
        """Wait until all uploads are over."""
        wait(self._jobs)

    def open(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Make the repository, or log why that failed.

        Args:
            token (`str`, *optional*): access token. Defaults to `args.hub_token`, else to that of the login.
            private (`bool`, *optional*): whether a new one is private. Defaults to `args.hub_private_repo`.

        Raises:
            ValueError: if its name cannot be one.
        """
        limit_waiting()
        try:
            self._create_repo(token, private)
        except HFValidationError:  # not a name for a repository
            raise
        except Exception as error:
            logger.warning(
                f"There is no access to the Hub repository `{self.repo_name}`: {describe_error(error)}. The training "
                "starts, and the next save tries again."
            )

    def _create_repo(self, token: str | None, private: bool | None) -> None:
        private = self.args.hub_private_repo if private is None else private
        repo = self._api.create_repo(
            self.repo_name, token=token or self.args.hub_token, private=private, exist_ok=True
        )
        self.repo_id = repo.repo_id

    def push_checkpoint(self, trainer: Trainer, checkpoint: Path) -> None:
        """Upload the weights of a checkpoint that was saved just now, if `args.hub_strategy` says so."""
        if not trainer.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.args.hub_always_push or not self.is_busy:
            trainer.callback_handler.on_push_begin(self.args, trainer.state, trainer.control)
            step = trainer.state.global_step
            self._start(checkpoint, step, f"Training in progress, step {step}")

    def push(
        self,
        trainer: Trainer,
        commit_message: str | None,
        blocking: bool,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """
        Save the model and upload it with its card and samples. If that fails, a warning tells how to do it by hand.

        Args:
            trainer ([`~transformers.Trainer`]): the trainer. All processes call this.
            commit_message (`str`): message of the commit.
            blocking (`bool`): whether to wait until it is done.
            token (`str`, *optional*): access token. Defaults to `args.hub_token`, else to that of the login.
            revision (`str`, *optional*): branch. Defaults to `args.hub_revision`.
            private (`bool`, *optional*): whether a new repository is private. Defaults to `args.hub_private_repo`.
            kwargs: further arguments of `trainer.create_model_card`, such as `dataset_name`.

        Returns:
            [`~huggingface_hub.CommitInfo`]: the commit, a `Future` of it if not `blocking`, or `None` if it failed and on
            all processes but the main one.
        """
        trainer.callback_handler.on_push_begin(self.args, trainer.state, trainer.control)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        trainer.create_model_card(**kwargs)
        self.wait()
        self._trouble = None  # that of the last upload is said in any case
        folder = Path(self.args.output_dir)
        job = self._start(folder, trainer.state.global_step, commit_message, token, revision, private)
        return job.result() if blocking else job

    def _start(
        self,
        weights_from: Path,
        step: int,
        commit_message: str,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Future:
        """Copy what is shared from a checkpoint or the output folder itself, and upload it in the background."""
        output_dir = Path(self.args.output_dir)
        folder = output_dir / UPLOAD_FOLDER / f"step-{step}"
        if not self.is_busy:
            self._jobs = []
            shutil.rmtree(folder.parent, ignore_errors=True)  # of an upload that failed
        try:
            collect_upload(folder, weights_from, output_dir, is_final=weights_from == output_dir)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            logger.warning(f"The files for the Hub could not be copied to {folder}: {error}.")
            job = Future()
            job.set_result(None)
            return job
        self._jobs.append(self._api.run_as_future(self._upload, folder, commit_message, token, revision, private))
        return self._jobs[-1]

    def _upload(
        self, folder: Path, commit_message: str, token: str | None, revision: str | None, private: bool | None
    ) -> CommitInfo | None:
        """Upload a folder and remove it. If it fails, keep it and say so, once for the same trouble in a row."""
        kept = folder.with_name("latest")
        limit_waiting()
        try:
            if self.repo_id is None:
                self._create_repo(token, private)
            commit = self._api.upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                commit_message=commit_message,
                token=token or self.args.hub_token,
                revision=revision or self.args.hub_revision,
            )
        except Exception as error:
            shutil.rmtree(kept, ignore_errors=True)
            folder.rename(kept)
            trouble = describe_error(error)
            if trouble != self._trouble:
                logger.warning(
                    f'The upload to the Hub repository `{self.repo_name}` ("{commit_message}") failed: {trouble}. The '
                    f"files are safe. The next save tries again; by hand, `hf upload {self.repo_name} {kept} .` uploads "
                    "the last ones."
                )
            self._trouble = trouble
            return None
        self._trouble = None
        for uploaded in (folder, kept):
            shutil.rmtree(uploaded, ignore_errors=True)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
        return commit


def limit_waiting() -> None:
    """End requests of this thread that get no answer; those of `huggingface_hub` would wait forever."""
    session = get_session()
    if session.timeout.read is None:
        session.timeout = REQUEST_TIMEOUT
