"""Processes that compute one video together, over gloo on the CPU: started once, grouped in any number for each call."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import traceback
from datetime import timedelta


class MemberPool:
    """Context manager: `size` processes that wait for work."""

    def __init__(self, size):
        # One process imports PyTorch and forks the others before it has any threads.
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch.distributed", "tests.harness.parallel_runs"])
        self.size, self.calls = size, 0
        self.members = []

    def __enter__(self):
        from torch.distributed import TCPStore

        # Members of a new group find each other here immediately; through a file, each group would poll every 10 ms.
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        while len(self.members) < self.size:
            self._start()
        return self

    def __exit__(self, *_):
        for process, connection in self.members:
            connection.close()
            process.kill()
            process.join()
        del self.store

    def _start(self):
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self.members.append((process, ours))

    def run(self, count, name, *arguments, timeout=30, **options):
        """Results of tests.harness.parallel_runs' function `name` in each of `count` members of one group, by rank.

        An exception is returned as its text, "TypeName: message".
        """
        self.calls += 1
        place = self.store.port, str(self.calls)
        for rank, (_, connection) in enumerate(self.members[:count]):
            connection.send((rank, count, place, timeout, name, arguments, options))
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


@functools.cache
def _store(port):
    from torch.distributed import TCPStore

    return TCPStore("127.0.0.1", port, is_master=False)


def _call(rank, count, place, timeout, name, arguments, options):
    import torch.distributed as dist

    from mochi_core.parallel.group import Processes

    function = getattr(importlib.import_module("tests.harness.parallel_runs"), name)
    port, call = place
    store, limit = dist.PrefixStore(call, _store(port)), timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=limit)
    try:
        return function(Processes(), *arguments, **options)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    finally:
        dist.destroy_process_group()
