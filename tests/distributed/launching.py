# Copyright 2026 The tapo_trl authors
# SPDX-License-Identifier: Apache-2.0

"""Starts `worker.py` on one or several processes, and never leaves one of them behind."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil


ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
MARK = "TAPO_TRL_TEST_LAUNCH"


@dataclass(frozen=True)
class Engine:
    """
    A way to run on several processes.

    Args:
        recipe (`str`): the accelerate configuration in `recipes/accelerate`, without `.yaml`.
        num_processes (`int`): how many to start.
        flags (`tuple[str, ...]`): further flags of `accelerate launch`.
        expected (`dict`): the facts that every process must report, see `worker.facts`.
    """

    recipe: str
    num_processes: int = 2
    flags: tuple[str, ...] = ()
    expected: dict = field(default_factory=dict)

    def command(self, port: int) -> list[str]:
        launch = [sys.executable, "-m", "accelerate.commands.launch"]
        launch += ["--config_file", str(ROOT / "recipes" / "accelerate" / f"{self.recipe}.yaml")]
        launch += ["--num_processes", str(self.num_processes), "--main_process_port", str(port)]
        return [*launch, *self.flags]


def _deepspeed(recipe: str, stage: int, *flags: str) -> Engine:
    expected = {"distributed_type": "DEEPSPEED", "engine": "DeepSpeedEngine", "zero_stage": stage}
    return Engine(recipe, flags=flags, expected=expected)


ENGINES = {
    "single": Engine("cpu", 1, expected={"distributed_type": "NO", "engine": "PeftModel", "zero_stage": 0}),
    "ddp": Engine("multi_gpu", expected={"distributed_type": "MULTI_CPU", "engine": "DistributedDataParallel"}),
    "zero1": _deepspeed("deepspeed_zero1", 1),
    "zero2": _deepspeed("deepspeed_zero2", 2),
    "zero3": _deepspeed("deepspeed_zero3", 3),
    "fsdp2": Engine("fsdp2", expected={"distributed_type": "FSDP"}),
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment() -> dict[str, str]:
    """
    What the processes see: the CPU only, this checkout, and a place for what DeepSpeed compiles that belongs to this
    interpreter alone, because a build for another one is thrown away and made again.
    """
    binaries = str(Path(sys.executable).parent)  # DeepSpeed looks for `ninja` there
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "TORCH_EXTENSIONS_DIR": str(Path(sys.prefix) / "torch_extensions"),
        **{name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))},
        "PATH": os.pathsep.join([binaries, os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess:
    """
    Run a command to its end, or until the timeout, and end everything that it started: launchers give each of their
    processes a session of its own, so that these are found by a mark in their environment.

    Args:
        command (`list[str]`): the command.
        timeout (`float`): seconds.

    Returns:
        `subprocess.CompletedProcess`: with both output streams in `stdout`.

    Raises:
        AssertionError: if it took too long, or left processes behind.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, env=environment() | {MARK: mark}, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            pass
        finished = process.poll() is not None
        left = end_marked(mark)
        process.wait()
        log.seek(0)
        output = log.read()
    assert finished, f"{command} took more than {timeout} s:\n{output[-5000:]}"
    assert not left, f"{command} left {left} behind:\n{output[-5000:]}"
    return subprocess.CompletedProcess(command, process.returncode, output)


def marked(mark: str) -> list[psutil.Process]:
    """Processes that carry `mark` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            pass  # it has ended, or is not ours
    return found


def end_marked(mark: str) -> list[int]:
    """Kill the processes that carry `mark` in their environment, and say which they were."""
    ended = []
    for process in marked(mark):
        with suppress(psutil.NoSuchProcess):
            process.kill()
            ended.append(process.pid)
    return ended


def compile_deepspeed(timeout: float = 1200) -> None:
    """Build what DeepSpeed needs on CPUs, a minute or two the first time. A build that was killed left a lock behind."""
    for lock in Path(environment()["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        lock.unlink()
    build = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"
    result = run([sys.executable, "-c", build], timeout)
    assert result.returncode == 0, result.stdout[-5000:]


def stop(engine: Engine, job: dict, folder: Path, launcher: str, timeout: float = 1800) -> None:
    """
    Run a job that stops its own launcher, see `worker.py`, and wait until its processes have ended too.

    Args:
        launcher (`str`): `"accelerate"` or `"torchrun"`.
        timeout (`float`): seconds after which the launcher, or a process that it left, counts as one that never ends.

    Raises:
        AssertionError: if one of them never ends.
    """
    job_file = folder / "stop.json"
    folder.mkdir(parents=True, exist_ok=True)
    job_file.write_text(json.dumps(job | {"output_dir": str(folder)}))
    command = engine.command(free_port())
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--master_port", str(free_port())]
        command += ["--nproc_per_node", str(engine.num_processes)]
    mark = uuid.uuid4().hex
    with (folder / "stop.log").open("w") as log:
        process = subprocess.Popen(
            [*command, str(WORKER), str(job_file)],
            env=environment() | {MARK: mark},
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            assert process.wait(timeout) != 0, (folder / "stop.log").read_text()[-8000:]
            _, alive = psutil.wait_procs(marked(mark), timeout)
            assert not alive, (folder / "stop.log").read_text()[-8000:]
        finally:
            process.kill()
            end_marked(mark)


def on_two_nodes(launcher: str, job: dict, folder: Path, timeout: float = 1800) -> list[int]:
    """
    Run a job, see `worker.py`, as on two machines: two launchers with a process each, which meet on the loopback interface.

    Args:
        launcher (`str`): `"accelerate"`, with the recipe for several machines, or `"torchrun"`, with the rendezvous `c10d`.
        timeout (`float`): seconds after which a launcher, or a process that it left, counts as one that never ends.

    Returns:
        `list[int]`: exit codes of the launchers.

    Raises:
        AssertionError: if one of them, or one of their processes, never ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job_file, port, mark = folder / "job.json", str(free_port()), uuid.uuid4().hex
    job_file.write_text(json.dumps(job | {"output_dir": str(folder)}))
    processes = []
    for node in range(2):
        if launcher == "accelerate":
            command = Engine("multi_node", 2).command(port)
            command += ["--machine_rank", str(node), "--main_process_ip", "127.0.0.1"]
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
            command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", mark]
        with (folder / f"node_{node}.log").open("w") as log:
            options = {"env": environment() | {MARK: mark}, "cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT}
            processes.append(subprocess.Popen([*command, str(WORKER), str(job_file)], **options))
    try:
        codes = [process.wait(timeout) for process in processes]
        _, alive = psutil.wait_procs(marked(mark), timeout)
        assert not alive, [(folder / f"node_{node}.log").read_text()[-4000:] for node in range(2)]
        return codes
    finally:
        for process in processes:
            process.kill()
        end_marked(mark)


def launch(engine: Engine, job: dict, folder: Path, timeout: float = 1800) -> dict[str, dict]:
    """
    Run a job, see `worker.py`, under an engine.

    Returns:
        `dict[str, dict]`: the facts of each run.
    """
    job_file = folder / "job.json"
    folder.mkdir(parents=True, exist_ok=True)
    job_file.write_text(json.dumps(job | {"output_dir": str(folder)}))
    result = run([*engine.command(free_port()), str(WORKER), str(job_file)], timeout)
    (folder / "output.log").write_text(result.stdout)
    assert result.returncode == 0, result.stdout[-8000:]
    return {name: json.loads((folder / name / "facts.json").read_text()) for name in job["runs"]}
