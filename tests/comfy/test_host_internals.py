"""ComfyUI has everything that docs/host_internals.md lists; whatever is missing is reported by name."""

import json

import pytest

from tests.harness import trained
from tests.harness.comfy_process import run_in_comfyui
from tests.harness.host_internals import ROOT, listed

LOOKUP = ROOT / "tests" / "harness" / "host_lookup.py"
# What a changed ComfyUI would look like: an internal, and the expected report about it.
CHANGED = [
    (("comfy.sd.VAE.no_such_attribute", None, None, ()), "comfy.sd.VAE.no_such_attribute is gone"),
    (("comfy.no_such_module.function", None, (), ()), "comfy.no_such_module.function is gone"),
    (("no_such_package.function", None, None, ()), "no_such_package.function is gone"),
    (("comfy.sample.sample_custom", None, ("model", "cfg"), ()), "comfy.sample.sample_custom takes (model, noise, cfg"),
    (("comfy.sample.sample_custom", None, ("model",), ("sage",)), "comfy.sample.sample_custom has lost sage"),
    (("comfy.samplers", "no_such_key", None, ()), 'comfy.samplers: "no_such_key" is gone'),
    (
        ("comfy.ops.mixed_precision_ops().Linear.gone", None, None, ()),
        "comfy.ops.mixed_precision_ops().Linear.gone is g",
    ),
]
CODE = """
import json
arguments = [json.loads(argument) for argument in arguments]
found = {"missing": [missing(internal) for internal in arguments[0]]}

from pack.nodes.bridge import vae
from pack.nodes.bridge.quantized import BlockLayout, RowwiseLayout
ours = vae.load_vae([arguments[1]])
found["unset"] = sorted(name for name in always_set(comfy.sd.VAE.__init__) if not hasattr(ours, name))
found["always set"] = sorted(always_set(comfy.sd.VAE.__init__))
found["abstract"] = sorted({*BlockLayout.__abstractmethods__, *RowwiseLayout.__abstractmethods__})

from pack.nodes.bridge.model import load_model
model = load_model(arguments[2]).model
found["names"], found["names with prefix"] = [*model.state_dict()], [*model.state_dict(prefix="a.")]

import folder_paths
from pack.nodes import loaders
before = loaders.files("vae", "checkpoints")
folder_paths.get_filename_list = lambda kind: ["of another pack.safetensors"]
folder_paths.filename_list_cache.clear()
found["listed"] = [before, loaders.files("vae", "checkpoints")]
print("FOUND " + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(comfy_path):
    internals = [(i.path, i.key, i.positional, i.named) for i in listed()]
    asked = json.dumps([*internals, *(internal for internal, _ in CHANGED)])
    code = LOOKUP.read_text(encoding="utf-8") + CODE
    output = run_in_comfyui(
        comfy_path, code, asked, *(json.dumps(str(path)) for path in (trained.VAE, trained.TRANSFORMER))
    ).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith("FOUND "))[len("FOUND ") :])


def test_what_we_rely_on_is_there(found):
    problems = [problem for problem in found["missing"][: -len(CHANGED)] if problem]
    assert not problems, "\n".join(problems)


def test_what_is_gone_is_named(found):
    for (_, expected), problem in zip(CHANGED, found["missing"][-len(CHANGED) :], strict=True):
        assert problem is not None, expected
        assert problem.startswith(expected)


def test_our_vae_has_every_attribute_that_the_hosts_constructor_sets(found):
    assert len(found["always set"]) > 20
    assert found["unset"] == []


def test_our_layouts_have_every_method_that_the_host_wants(found):
    assert found["abstract"] == []


def test_a_prefix_for_the_models_weights(found):
    assert len(found["names"]) > 20
    assert found["names with prefix"] == ["a." + name for name in found["names"]]


def test_files_are_listed_when_another_pack_lists_the_hosts(found):
    before, after = found["listed"]
    assert set(after) - set(before) == {"of another pack.safetensors"}
