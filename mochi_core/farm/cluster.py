"""The only module that uses Ray: processes on this machine or on others."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import interrupts
from .member import Member, Outcome

NEEDS_RAY = 'The farm needs Ray: python -m pip install "ray>=2.52"'
OBJECT_STORE = 200 * 2**20
"""Bytes of shared memory through which Ray passes objects over 100 kB: video files, and images that videos begin with."""
LOCAL = {
    # Read by Ray on import, on any system; with clusters disabled, it listens on the loopback interface only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
}
VISIBLE_CARDS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Environment variables in which Ray lists a process's GPUs."""


class WorkerDied(RuntimeError):  # noqa: N818 - named for the event
    """One of a worker's processes has died."""


def import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError(NEEDS_RAY) from None
    return ray


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Use Ray for the duration: the session already running in this process, the cluster at `address`, or our own processes.

    Our own processes listen on this machine's loopback interface only, and require a token that only they have.

    Raises:
        ValueError: Ray is not installed or cannot be used, or there is no cluster at `address`.
    """
    if address is None:
        # The token is set in the environment; Ray would otherwise leave it in a file in the home folder.
        for name, value in {**LOCAL, "RAY_AUTH_TOKEN": secrets.token_hex(32)}.items():
            os.environ.setdefault(name, value)
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        settings |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    else:
        package = Path(__file__).parents[1]
        settings |= {"address": address, "runtime_env": {"py_modules": [str(package)]}}
    try:
        ray.init(**settings)
    except (RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        where = f"at {address}" if address else "on this machine"
        raise ValueError(f"Ray cannot be used {where}: {error}") from error
    try:
        with interrupts.ended_in_order():  # Ray has set a handler of its own
            yield
    finally:
        ray.shutdown()


def room(gpus: int, wanted: int | None) -> tuple[int, int]:
    """The number of workers, and of processor cores for each.

    Args:
        gpus: GPUs of one machine reserved for each worker; with 0 there is one worker per machine, or as many as wanted.
        wanted: number of workers; None for as many as there is room for.

    Raises:
        ValueError: there is no room for them.
    """
    machines = [machine["Resources"] for machine in import_ray().nodes() if machine["Alive"]]
    most = sum(int(machine.get("GPU", 0)) // gpus for machine in machines) if gpus else wanted or len(machines)
    if (count := wanted or most) > most or not most:
        raise ValueError(
            f"Ray has room for {most} workers with {gpus} GPUs of one machine each, not for {count or 1}; change --workers and "
            "--gpus-per-worker, or use --device cpu."
        )
    neighbours = -(-count // len(machines))
    return count, min(int(machine.get("CPU", 1)) for machine in machines) // neighbours


class PlacedMember(Member):
    """A member that knows where Ray has placed it."""

    def meet(self) -> tuple[str, dict[str, str]]:
        """The machine it is on, and the environment that other processes there need to work with it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        cards = {name: os.environ[name] for name in VISIBLE_CARDS if name in os.environ}
        return import_ray().get_runtime_context().get_node_id(), {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **cards,
        }


class Worker:
    """One process with the models, or several that make each video together, and their current task.

    The first process reserves the GPUs and cores of all, so that they are on one machine; the others join it there.
    """

    def __init__(self, options: argparse.Namespace, cores: int) -> None:
        self.options, self.size = options, options.gpus_per_worker
        # One thread makes videos while the other reports progress.
        self.member = import_ray().remote(max_concurrency=2, num_cpus=0, num_gpus=0)(PlacedMember)
        gpus = self.size if options.device == "cuda" else 0
        self.first = self.member.options(num_cpus=cores, num_gpus=gpus, scheduling_strategy="SPREAD")
        self.members: list[Any] = []
        self.pending: list[Any] = []
        self.is_meeting = False
        self.counting: Any = None
        self.steps = 0

    def start(self) -> None:
        """Start processes, replacing any existing ones, and have them load the models."""
        self.stop()
        self.members = [self.first.remote()]
        self.is_meeting = self.size > 1
        first = self.members[0]
        self.pending = [first.meet.remote() if self.is_meeting else first.load.remote(self.options)]

    def _gather(self, machine: str, launch: dict[str, str]) -> None:
        """Start the other processes on the first one's machine, and have all of them load the models."""
        there = import_ray().util.scheduling_strategies.NodeAffinitySchedulingStrategy(machine, soft=False)
        self.members += [self.member.options(scheduling_strategy=there).remote() for _ in range(1, self.size)]
        self.is_meeting = False
        self.pending = [
            member.load.remote(
                self.options, {**launch, "WORLD_SIZE": str(self.size), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank, member in enumerate(self.members)
        ]

    def make(self, arguments: dict[str, Any]) -> None:
        """Start making a video from the result of `pipeline_arguments`."""
        self.pending = [member.make.remote(arguments, self.options.fps) for member in self.members]
        self.counting, self.steps = None, 0

    def missing(self) -> list[Any]:
        """Results that the processes have not returned yet."""
        return import_ray().wait(self.pending, num_returns=len(self.pending), timeout=0)[1] if self.pending else []

    def outcome(self) -> Outcome | None:
        """Outcome of the last task, or None while it continues; WorkerDied if a process has died."""
        answers, self.pending = [self._answer(reference) for reference in self.pending], []
        if failures := [answer for answer in answers if isinstance(answer, Outcome) and answer.error]:
            return failures[0]
        if None in answers:
            raise WorkerDied
        if self.is_meeting:
            self._gather(*answers[0])
            return None
        return answers[0]

    def _answer(self, reference: Any) -> Any:
        """The result from a process; None if it has died."""
        ray = import_ray()
        try:
            return ray.get(reference)
        except ray.exceptions.RayError:
            return None

    def look(self) -> int:
        """Steps done of the current video, as last reported."""
        if self.counting and import_ray().wait([self.counting], timeout=0)[0]:
            self.steps, self.counting = self._answer(self.counting) or self.steps, None
        self.counting = self.counting or self.members[0].steps_done.remote()
        return self.steps

    def stop(self) -> None:
        for member in self.members:
            import_ray().kill(member)
        self.members, self.pending = [], []


def finished(workers: list[Worker], timeout: float) -> list[Worker]:
    """Busy workers that have finished, waiting up to `timeout` seconds for the next result if none has."""
    if done := [worker for worker in workers if worker.pending and not worker.missing()]:
        return done
    missing = [reference for worker in workers for reference in worker.missing()]
    import_ray().wait(missing, timeout=timeout)
    return [worker for worker in workers if worker.pending and not worker.missing()]
