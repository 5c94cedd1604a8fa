"""Ray, which the rest of the project does not know: processes on this machine or on others."""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .member import Member, Outcome

NEEDS_RAY = 'The farm needs Ray: python -m pip install "mochi-nodes[ray]"'
OBJECT_STORE = 200 * 2**20
"""Bytes of memory in which Ray hands over what is larger than 100 kB; files of videos, and pictures that they begin with."""
LOCAL = {
    # Read by Ray on any system when it is imported; without a cluster, it listens on the loopback interface only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
}


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


def room(on_gpus: bool, wanted: int | None) -> tuple[int, int]:
    """How many workers there are to be, and how many processor cores each has.

    Args:
        on_gpus: whether each has a GPU to itself; else there is one on each machine, or as many as are wanted.
        wanted: workers, instead of as many as there is room for.

    Raises:
        ValueError: there is no room for them.
    """
    machines = [machine["Resources"] for machine in import_ray().nodes() if machine["Alive"]]
    most = sum(int(machine.get("GPU", 0)) for machine in machines) if on_gpus else wanted or len(machines)
    if (count := wanted or most) > most or not most:
        raise ValueError(f"{count or 1} workers need a GPU each; Ray has {most}. Use --workers, or --device cpu.")
    neighbours = -(-count // len(machines))
    return count, min(int(machine.get("CPU", 1)) for machine in machines) // neighbours


class Worker:
    """A process with the models, and what it has been asked for last."""

    def __init__(self, options: argparse.Namespace, cores: int) -> None:
        on_gpu = options.device.startswith("cuda")
        resources = {"num_cpus": cores, "num_gpus": int(on_gpu), "scheduling_strategy": "SPREAD"}
        # One thread makes videos while the other says how far the first is.
        self.actor_class = import_ray().remote(Member).options(max_concurrency=2, **resources)
        self.options = options
        self.actor: Any = None
        self.pending: Any = None
        self.counting: Any = None
        self.steps = 0

    def start(self) -> None:
        """Start a process, in place of the one that there may be, and have it load the models."""
        self.stop()
        self.actor = self.actor_class.remote()
        self.pending = self.actor.load.remote(self.options)

    def make(self, arguments: dict[str, Any]) -> None:
        """Have a video made of what `pipeline_arguments` gives."""
        self.pending, self.counting, self.steps = self.actor.make.remote(arguments, self.options.fps), None, 0

    def outcome(self) -> Outcome:
        """What has become of what it was asked for; WorkerDied if its process has ended."""
        ray, self.pending, pending = import_ray(), None, self.pending
        try:
            return ray.get(pending)
        except ray.exceptions.RayError as error:
            raise WorkerDied(str(error)) from error

    def look(self) -> int:
        """Steps of the video that it makes, as it has said last."""
        ray = import_ray()
        if self.counting and ray.wait([self.counting], timeout=0)[0]:
            try:
                self.steps = ray.get(self.counting)
            except ray.exceptions.RayError:  # `outcome` tells
                return self.steps
            self.counting = None
        self.counting = self.counting or self.actor.steps_done.remote()
        return self.steps

    def stop(self) -> None:
        if self.actor is not None:
            import_ray().kill(self.actor)
        self.actor = self.pending = None


def finished(workers: list[Worker], timeout: float) -> list[Worker]:
    """Those of the workers at work that are ready by now, or by the time that one of them is; none after `timeout` seconds."""
    pending = {worker.pending: worker for worker in workers if worker.pending is not None}
    ready, _ = import_ray().wait(list(pending), timeout=timeout)
    return [pending[reference] for reference in ready]
