"""Ray, which the rest of the project does not know: processes on this machine or on others."""

from __future__ import annotations

import argparse
import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .member import Member, Outcome

NEEDS_RAY = 'The farm needs Ray: python -m pip install "ray>=2.52"'
OBJECT_STORE = 200 * 2**20
"""Bytes of memory in which Ray hands over what is larger than 100 kB; files of videos, and pictures that they begin with."""
LOCAL = {
    # Read by Ray on any system when it is imported; without a cluster, it listens on the loopback interface only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
}
VISIBLE_CARDS = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Where Ray says which GPUs a process has."""


class WorkerDied(RuntimeError):  # noqa: N818 - what happened to it
    """A process of a worker has ended."""


def import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError(NEEDS_RAY) from None
    return ray


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Have Ray for the duration: what runs already in this process, the cluster at `address`, or processes of our own.

    The latter listen on this machine's loopback interface, and to whoever has a token that only they have.

    Raises:
        ValueError: there is no Ray, or none at `address`.
    """
    if address is None:
        # From the environment rather than from a file in the home folder, where Ray would leave one.
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
        yield
    finally:
        ray.shutdown()


def room(gpus: int, wanted: int | None) -> tuple[int, int]:
    """How many workers there are to be, and how many processor cores each has.

    Args:
        gpus: GPUs of one machine that each has to itself; without, there is one on each machine, or as many as are wanted.
        wanted: workers, instead of as many as there is room for.

    Raises:
        ValueError: there is no room for them.
    """
    machines = [machine["Resources"] for machine in import_ray().nodes() if machine["Alive"]]
    most = sum(int(machine.get("GPU", 0)) // gpus for machine in machines) if gpus else wanted or len(machines)
    if (count := wanted or most) > most or not most:
        raise ValueError(
            f"Ray has room for {most} workers of {gpus} GPUs on a machine, not for {count or 1}; use other numbers for "
            "--workers and --gpus-per-worker, or --device cpu."
        )
    neighbours = -(-count // len(machines))
    return count, min(int(machine.get("CPU", 1)) for machine in machines) // neighbours


class PlacedMember(Member):
    """A member who knows where Ray has put it."""

    def meet(self) -> tuple[str, dict[str, str]]:
        """The machine that it is on, and what other processes there have to know to work together with it."""
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
    """One process with the models, or several that make each video together, and what they have been asked for last.

    The first process has the GPUs and cores of all, so that they are of one machine; the others join it there.
    """

    def __init__(self, options: argparse.Namespace, cores: int) -> None:
        self.options, self.size = options, options.gpus_per_worker
        # One thread makes videos while the other says how far the first is.
        self.member = import_ray().remote(max_concurrency=2, num_cpus=0, num_gpus=0)(PlacedMember)
        gpus = self.size if options.device == "cuda" else 0
        self.first = self.member.options(num_cpus=cores, num_gpus=gpus, scheduling_strategy="SPREAD")
        self.members: list[Any] = []
        self.pending: list[Any] = []
        self.is_meeting = False
        self.counting: Any = None
        self.steps = 0

    def start(self) -> None:
        """Start processes, in place of those that there may be, and have them load the models."""
        self.stop()
        self.members = [self.first.remote()]
        self.is_meeting = self.size > 1
        first = self.members[0]
        self.pending = [first.meet.remote() if self.is_meeting else first.load.remote(self.options)]

    def _gather(self, machine: str, launch: dict[str, str]) -> None:
        """Start the other processes where the first one is, and have all of them load the models."""
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
        """Have a video made of what `pipeline_arguments` gives."""
        self.pending = [member.make.remote(arguments, self.options.fps) for member in self.members]
        self.counting, self.steps = None, 0

    def missing(self) -> list[Any]:
        """What the processes have not answered yet."""
        return import_ray().wait(self.pending, num_returns=len(self.pending), timeout=0)[1] if self.pending else []

    def outcome(self) -> Outcome | None:
        """What has become of what it was asked for, or None if it goes on; WorkerDied if a process has ended."""
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
        """What a process has answered; None if it has ended."""
        ray = import_ray()
        try:
            return ray.get(reference)
        except ray.exceptions.RayError:
            return None

    def look(self) -> int:
        """Steps of the video that it makes, as it has said last."""
        if self.counting and import_ray().wait([self.counting], timeout=0)[0]:
            self.steps, self.counting = self._answer(self.counting) or self.steps, None
        self.counting = self.counting or self.members[0].steps_done.remote()
        return self.steps

    def stop(self) -> None:
        for member in self.members:
            import_ray().kill(member)
        self.members, self.pending = [], []


def finished(workers: list[Worker], timeout: float) -> list[Worker]:
    """Those of the workers at work that are ready by now, or when the next answer comes; none after `timeout` seconds."""
    if done := [worker for worker in workers if worker.pending and not worker.missing()]:
        return done
    missing = [reference for worker in workers for reference in worker.missing()]
    import_ray().wait(missing, timeout=timeout)
    return [worker for worker in workers if worker.pending and not worker.missing()]
