"""Processes that work on one video together, over gloo on the CPU: started once, and made a group of any size for each call."""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path


class MemberPool:
    """`size` processes that wait for work; a context manager."""

    def __init__(self, size):
        # One process imports PyTorch, and the others are its forks: before it has any threads.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch.distributed", "tests.harness.parallel_runs"])
        self.size, self.calls = size, 0
        self.members = []

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        while len(self.members) < self.size:
            self._start()
        return self

    def __exit__(self, *_):
        for process, connection in self.members:
            connection.close()
            process.kill()
            process.join()
        self.folder.cleanup()

    def _start(self):
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self.members.append((process, ours))

    def run(self, count, name, *arguments, timeout=30, **options):
        """What `name` of tests.harness.parallel_runs returns in each of `count` members of one group, by rank.

        An exception is returned as its text, "TypeName: message".
        """
        self.calls += 1
        store = str(Path(self.folder.name) / str(self.calls))
        for rank, (_, connection) in enumerate(self.members[:count]):
            connection.send((rank, count, store, timeout, name, arguments, options))
        return [connection.recv() for _, connection in self.members[:count]]


def _serve(connection):
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        connection.send(_call(*call))


def _call(rank, count, store, timeout, name, arguments, options):
    import torch.distributed as dist

    from mochi_core.parallel.group import Processes

    function = getattr(importlib.import_module("tests.harness.parallel_runs"), name)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count, timeout=limit)
    try:
        return function(Processes(), *arguments, **options)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    finally:
        dist.destroy_process_group()
