"""Processes started by a launcher such as torchrun: how they find each other, and how they end together."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from .. import interrupts
from ..devices import check_device
from ..output_files import remove_unfinished
from .group import MEETING_TIMEOUT, Group, Processes
from .team import agree

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
NO_LAUNCHER = (
    "--parallel needs a launcher: torchrun --nproc-per-node 4 -m mochi_core generate ...; in ComfyUI use the node "
    "Mochi Parallel."
)
ERROR = "error"
"""Key in the store of the first error of any member."""
LOOK_EVERY = 1.0
"""Seconds between checks whether another member has failed."""
LONGEST_SILENCE = 60.0
"""Seconds without a heartbeat after which a member is presumed dead."""


class MemberError(RuntimeError):
    """A member has failed; the message names it and its error."""


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return dist.is_available() and (dist.is_initialized() or {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= {*os.environ})


def own_device(device: str) -> torch.device:
    """The device of this process: "cuda" means the card assigned by the launcher; ValueError if it does not exist."""
    check_device(device)
    found = torch.device(device)
    if found.type == "cuda" and found.index is None and launched():
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        check_device(found)
    return found


def peers() -> bool:
    """Whether the cards that this process sees can access each other's memory."""
    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return all(torch.cuda.can_device_access_peer(a, b) for a in cards for b in cards if a != b)


def join(device: torch.device | str) -> Group:
    """The group of all the launcher's processes, which exchange tensors on the CPU and on `device`, one per process.

    Raises:
        ValueError: this process was not started by a launcher, or the others run another version.
    """
    if not launched():
        raise ValueError(NO_LAUNCHER)
    if not dist.is_initialized():
        _start(own_device(str(device)))
    world = Processes()
    versions = f"{_version('mochi-nodes')} with PyTorch {torch.__version__}"
    agree(world, {"mochi_core is": versions}, f"on host {socket.gethostname()}")
    return world


def _start(device: torch.device) -> None:
    # NCCL allocates outside PyTorch; the cudaMallocAsync allocator, which ComfyUI requests, would leave it no memory.
    settings = [entry for entry in os.environ.get(ALLOCATOR, "").split(",") if entry and "cudaMallocAsync" not in entry]
    os.environ[ALLOCATOR] = ",".join(settings)
    timeout = timedelta(seconds=MEETING_TIMEOUT)
    if device.type != "cuda":
        with interrupts.handled_by(signal.SIG_DFL):  # a handler in Python would wait for the meeting to end
            dist.init_process_group("gloo", timeout=timeout)
        return
    if not dist.is_nccl_available():
        raise ValueError(
            "This PyTorch has no NCCL, which several processes with GPUs need; on Windows use WSL, or ComfyUI."
        )
    torch.cuda.set_device(device)
    with interrupts.handled_by(signal.SIG_DFL):
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@contextmanager
def together(world: Group, device: torch.device) -> Iterator[None]:
    """Make all members of `world` finish the body, or none.

    When one of them fails, or its process dies, the others end within seconds.

    Raises:
        MemberError: in the member that failed first; the message names it and its error.
        SystemExit: in the others, with status 2.
    """
    place = f"Member {world.rank} ({device}, host {socket.gethostname()})"
    watch = Watch(world.rank, world.size, place)
    with _ended_with_a_sentence(watch):
        try:
            yield
            world.total(torch.zeros(1))  # all have reached this point
        except Exception as error:
            lost = _lost_connection(error)
            said = f"{place} lost another member, whose process died" if lost else f"{place} failed: {error}"
            if not watch.is_first(said, wait=lost):
                raise SystemExit(2) from error
            raise MemberError(f"{said}; all {world.size} have stopped.") from error
        finally:
            watch.stop()
    dist.destroy_process_group()


@contextmanager
def _ended_with_a_sentence(watch: Watch) -> Iterator[None]:
    """Make the first member that is told to end report it: a launcher's own report names only the process that ended by itself.

    Python runs signal handlers between bytecodes of the main thread, which may be waiting for a device or other members. So
    another thread waits for the signal's number, which arrives through a socket at once.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    signals, told = socket.socketpair()
    told.setblocking(False)
    threading.Thread(target=_wait_for_the_end, args=(signals, watch), daemon=True).start()
    told_before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    try:
        with interrupts.handled_by(lambda *_: None):
            yield
    finally:
        signal.set_wakeup_fd(told_before)
        told.close()


def _wait_for_the_end(signals: socket.socket, watch: Watch) -> None:
    """End the process on a termination signal; return once the writing end of `signals` is closed."""
    with signals:
        while number := signals.recv(1):
            if number[0] in interrupts.TERMINATION:
                name = signal.Signals(number[0]).name
                said = f"{watch.place} was told to end ({name}), as launchers do when another member has ended"
                _end(f"{said}; all stop." if watch.is_first(said, wait=False) else "")


def _end(said: str) -> None:
    """End the process at once, after printing an error if there is one; called from a thread, as the main one may be blocked."""
    if said:
        print(f"error: {said}", file=sys.stderr, flush=True)  # noqa: T201 - the caller cannot
    remove_unfinished()
    os._exit(2)


def _lost_connection(error: Exception) -> bool:
    """Whether an exchange failed because another member is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


class Watch:
    """A thread that ends this process when another member has failed or sends no heartbeat.

    An exchange that waits for such a member cannot be interrupted in any other way.
    """

    def __init__(self, rank: int, size: int, place: str) -> None:
        from torch._C._distributed_c10d import PrefixStore, TCPStore  # not in every build of PyTorch

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = TCPStore(address, port, is_master=False, wait_for_workers=False)
        self.store = PrefixStore(f"mochi/{restart}", store)
        self.rank, self.place, self.stopped = rank, place, threading.Event()
        self.others = {other: ("", time.monotonic()) for other in range(size) if other != rank}
        """The last heartbeat of each other member, and when it was seen."""
        threading.Thread(target=self._look, daemon=True).start()

    def stop(self) -> None:
        self.stopped.set()

    def is_first(self, said: str, *, wait: bool) -> bool:
        """Record an error of this member; whether it is the first, after giving others a moment to record theirs if `wait`."""
        end = time.monotonic() + (2 * LOOK_EVERY if wait else 0)
        try:
            while time.monotonic() < end and not self.store.check([ERROR]):
                time.sleep(0.05)
            return self.store.compare_set(ERROR, "", said).decode() == said
        except dist.DistError:  # the member that hosts the store has ended
            return True

    def _look(self) -> None:
        beats = 0
        while not self.stopped.wait(LOOK_EVERY):
            beats += 1
            try:
                self.store.set(str(self.rank), str(beats))
                if self.store.check([ERROR]):
                    self._end_soon("")
                self._look_for_the_silent()
            except dist.DistError:
                self._end_soon("")

    def _look_for_the_silent(self) -> None:
        now = time.monotonic()
        for other, (last, seen) in self.others.items():
            beat = self.store.get(str(other)).decode() if self.store.check([str(other)]) else ""
            if beat != last:
                self.others[other] = beat, now
            elif now - seen > LONGEST_SILENCE:
                said = f"Member {other} has not responded for {LONGEST_SILENCE:.0f} seconds"
                self._end_soon(said if self.is_first(said, wait=False) else "")

    def _end_soon(self, said: str) -> None:
        """End the process, unless it ends by itself within the next seconds."""
        if not self.stopped.wait(2 * LOOK_EVERY):
            _end(f"{said}; all have stopped." if said else "")
