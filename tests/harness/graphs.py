"""Prompts for a server: the shipped workflow, shrunk, and the changes that tests make."""

from itertools import count

from tests.harness.demo import small_prompt

MODEL, T5, VAE, POSITIVE, NEGATIVE, SAMPLER, DECODE = "1234567"
SIZE = {"width": 96, "height": 64, "num_frames": 13, "steps": 4}
FRESH_SEEDS = count(1000)


def prompt(**inputs):
    """The shipped workflow, shrunk, with a seed for which no result is cached."""
    return small_prompt(**{**SIZE, "seed": next(FRESH_SEEDS), **inputs})


def upto_sampler(**inputs):
    graph = prompt(**inputs)
    for node in ("7", "8", "9"):
        del graph[node]
    return graph


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def assert_healthy(client):
    assert client.run(prompt()).outcome == "execution_success"


def give_back_memory(client):
    """Make a server return freed memory to the system; otherwise the next model would hide in it."""
    client.post("/free", {"unload_models": True, "free_memory": True})
    image = {"image": node("EmptyImage", width=16, height=16, batch_size=1, color=0)}
    for _ in range(2):  # the server frees between two runs
        trim = node("ProbeLimitMemory", value=["image", 0], mib=0)
        assert client.run({**image, "trim": trim, "show": node("PreviewImage", images=["trim", 0])}).files


PATCHES = {
    "EasyCache": {"reuse_threshold": 3.0},
    "SkipLayerGuidanceDiT": {"double_layers": "1", "single_layers": "", "start_percent": 0.0, "end_percent": 1.0},
    "ContextWindowsManual": {"context_length": 2, "context_overlap": 1, "dim": 2},
    "LoraLoaderModelOnly": {"lora_name": "genmo.safetensors"},
}


def with_defaults(client, class_type, **inputs):
    """A stock node with its schema's defaults for all other inputs."""
    required = client.get(f"/object_info/{class_type}")[class_type]["input"]["required"]
    defaults = {}
    for name, (kind, *options) in required.items():
        choices = options[0].get("options", []) if options else []
        choices = kind if isinstance(kind, list) else choices
        defaults[name] = options[0]["default"] if options and "default" in options[0] else next(iter(choices), None)
    return node(class_type, **{**defaults, **inputs})
