"""docs/host_internals.md lists exactly what nodes/ uses of ComfyUI."""

import re

import pytest

from tests.harness.host_internals import NODES, listed, used

LISTED = listed()
BY_PATH = {internal.path: internal for internal in LISTED if internal.key is None}
PUBLIC = "comfy_api."
# Internals that are only wrapped appear in a file by an argument's name at most.
WRAPPED = {"comfy.samplers.KSAMPLER.sample": "extra_args"}


@pytest.mark.parametrize("use", used(), ids=lambda use: f"{use.file}:{use.line} {use.path}")
def test_what_is_used_is_listed_with_its_arguments(use):
    internal = BY_PATH.get(use.path.removesuffix(".post"))  # a method of routes, which is aiohttp's
    assert internal, f"{use.path} is not on the page"
    assert use.file in internal.files, f"{internal.text}: used in {use.file}, too"
    if use.positional is None or internal.path != use.path or use.path.startswith(PUBLIC):
        return
    assert internal.positional is not None, (
        f"{internal.text}: called in {use.file}, so its arguments belong on the page"
    )
    assert use.positional <= len(internal.positional), f"{internal.text}: {use.positional} arguments in order"
    assert {*use.named} <= {*internal.positional, *internal.named}, f"{internal.text}: called with {use.named}"


@pytest.mark.parametrize("internal", LISTED, ids=lambda internal: internal.text)
def test_what_is_listed_is_used_where_it_says(internal):
    for file in internal.files:
        source = (NODES / file).read_text(encoding="utf-8")
        name = WRAPPED.get(internal.path, internal.last)
        name = name.removeprefix("use_")  # attention options are looked up without their prefix
        assert re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", source), (
            f"{internal.text}: not in {file}"
        )


def test_nothing_is_listed_twice():
    texts = [internal.text for internal in LISTED]
    assert sorted(texts) == sorted(set(texts))
    assert len(texts) > 150
