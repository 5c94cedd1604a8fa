"""A node pack only for the tests: writes tensors where a test can read them, makes memory scarce, counts reads, and has a node
with an old name."""

import ctypes
import itertools
import logging
import resource
import sys
import threading
from pathlib import Path

import folder_paths
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import save_file

MIB = 2**20


class SaveTensor(io.ComfyNode):
    """IMAGE, bit for bit."""

    @classmethod
    def define_schema(cls):
        inputs = [io.Image.Input("images"), io.String.Input("name")]
        return io.Schema(node_id="ProbeSaveTensor", inputs=inputs, is_output_node=True)

    @classmethod
    def execute(cls, images, name):
        path = Path(folder_paths.get_output_directory()) / name
        save_file({"images": images.contiguous()}, path)
        return io.NodeOutput(ui={"path": [str(path)]})


class LimitMemory(io.ComfyNode):
    """Return freed memory to the system; after that, the process gets only this much more, or is unlimited for 0."""

    @classmethod
    def define_schema(cls):
        inputs = [io.AnyType.Input("value"), io.Int.Input("mib", min=0, max=10**6)]
        return io.Schema(node_id="ProbeLimitMemory", inputs=inputs, outputs=[io.AnyType.Output()], not_idempotent=True)

    @classmethod
    def execute(cls, value, mib):
        ctypes.CDLL(None).malloc_trim(0)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + mib * MIB if mib else hard, hard))
        return io.NodeOutput(value)


class CountReads(io.ComfyNode):
    """How often a model folder has been read since the server started."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="ProbeCountReads", inputs=[io.Int.Input("turn")], is_output_node=True)

    @classmethod
    def execute(cls, turn):  # noqa: ARG003 - a new turn is never cached
        return io.NodeOutput(ui={"count": [next(FOLDER_READS)]})


FOLDER_READS = itertools.count()


def count_folder_reads(event, arguments):
    if event in ("os.listdir", "os.scandir") and "/models" in str(arguments[0]):
        next(FOLDER_READS)


sys.addaudithook(count_folder_reads)


def name_the_thread(record):
    """Prefix messages about old workflows with whether they come from the server's main thread, which answers clients."""
    if str(record.msg).startswith("Old Mochi workflow"):
        record.msg = f"[{threading.current_thread().name}] {record.msg}"
    return True


logging.getLogger().addFilter(name_the_thread)


class Unprepared(io.ComfyNode):
    """A MODEL whose runs prepare no conditioning."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="ProbeUnprepared", inputs=[io.Model.Input("model")], outputs=[io.Model.Output()])

    @classmethod
    def execute(cls, model):
        clone = model.clone()
        del clone.wrappers[WrappersMP.SAMPLER_SAMPLE]["mochi_run"]
        return io.NodeOutput(clone)


class OldName(io.ComfyNode):
    """Another pack's node with a name of MochiWrapper's."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="MochiImageEncode", inputs=[io.Image.Input("images")], outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, images):
        return io.NodeOutput(images)


class Probe(ComfyExtension):
    async def get_node_list(self):
        return [SaveTensor, LimitMemory, OldName, Unprepared, CountReads]


async def comfy_entrypoint():
    return Probe()
