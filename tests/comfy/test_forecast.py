"""What the server tells the editor before a run: tokens of a prompt, memory of a video."""

import json
import re
import urllib.error
import urllib.request

import pytest

from tests.harness.graphs import node

TRANSFORMER = "mochi_preview_bf16.safetensors"
LONG = "a red kite over the sea " * 60


@pytest.fixture
def ask(comfy_server):
    """The server's answer, or its error."""

    def ask(route, question, content=None):
        body = json.dumps(question).encode() if content is None else content
        request = urllib.request.Request(
            f"{comfy_server.url}/mochi-nodes/{route}", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            ((_, sentence),) = json.load(answer).items()
        return sentence

    return ask


def test_tokens_are_those_that_the_node_reads(ask, comfy_client, comfy_server):
    assert ask("tokens", {"prompt": "a red star moving to the right"}) == "9 of 256 tokens"
    assert ask("tokens", {"prompt": "(a:1.5)"}) != ask("tokens", {"prompt": "a"})  # brackets are text
    assert ask("tokens", {"prompt": ""}) == "empty: no text at all, as in Genmo's code"
    before = comfy_server.log.stat().st_size
    cut = ask("tokens", {"prompt": LONG})
    assert re.match("The prompt has 481 tokens, but Mochi reads 256; cut off: “.*sea”$", cut)
    assert cut not in comfy_server.log.read_bytes()[before:].decode()  # counting tokens does not encode
    t5 = node("Mochi1LoadT5", t5_name="t5xxl_fp16.safetensors", dtype="auto")
    encoded = node("Mochi1T5Encode", clip=["t5", 0], prompt=LONG)
    comfy_client.run({"t5": t5, "text": encoded, "show": node("PreviewAny", source=["text", 0])})
    assert cut in comfy_server.log.read_bytes()[before:].decode()


def sampled(sentence):
    """Bytes for sampling and for the weights, read from a sentence."""
    numbers = re.match(r"about (\S+) (.)iB to sample, plus (\S+) (.)iB of weights; cpu has \S+ GiB$", sentence)
    assert numbers, sentence
    unit = {"M": 2**20, "G": 2**30}
    return float(numbers[1]) * unit[numbers[2]], float(numbers[3]) * unit[numbers[4]]


def test_memory_is_that_of_the_file_and_the_size(ask):
    def memory(**question):
        return sampled(ask("memory", {"model_name": "mochi_tiny.safetensors", **question}))

    working, weights = memory()
    assert weights == pytest.approx(4.9e6 * 4, rel=0.1)  # in float32 on a CPU
    assert memory(weight_dtype="bf16")[1] == pytest.approx(weights / 2, rel=0.1)
    assert memory(weight_dtype="int8")[1] < 0.7 * weights
    assert memory(num_frames=85)[0] < 0.8 * working
    assert memory(window=15) == memory(num_frames=85)
    assert memory(batch_size=2)[0] > 1.5 * working
    released = ask("memory", {})
    assert re.match(r"about 2\.1 GiB to sample, plus the weights; cpu has \S+ GiB", released)


@pytest.mark.parametrize(
    ("route", "question", "problem"),
    [
        ("tokens", {"prompt": 5}, "The prompt is not text."),
        ("tokens", {"prompt": "a\ud800"}, "The prompt has half of a character, U+D800, at position 2;"),
        ("memory", {"width": 100}, "width is 100, but Mochi needs a multiple of 16; use 96 or 112."),
        ("memory", {"batch_size": "2"}, "batch_size is not a whole number of 0 or more."),
        ("memory", {"model_name": ["a"]}, "model_name and weight_dtype are not text."),
        ("memory", {"model_name": "mochi_vae.safetensors"}, "mochi_vae.safetensors is in none of the model folders"),
        ("memory", {"model_name": "../vae/mochi_vae.safetensors"}, "../vae/mochi_vae.safetensors is in none of the"),
    ],
)
def test_questions_that_have_no_answer(ask, route, question, problem):
    assert ask(route, question).startswith(problem)


NO_OBJECT = "The request is not a JSON object."


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", ""),
        (b"{", ""),
        (b"[" * 50_000, NO_OBJECT),
        (b"\xff", ""),
        (b'["a"]', NO_OBJECT),
        (b'"' + b"a" * 200_000 + b'"', "Requests of more than 200,000 bytes are refused."),
    ],
    ids=["nothing", "cut", "deep", "no text", "list", "long"],
)
def test_what_is_no_json_object_is_no_question(ask, content, problem):
    with pytest.raises(urllib.error.HTTPError) as refusal:
        ask("tokens", None, content)
    assert refusal.value.code == 400
    assert json.load(refusal.value)["error"].startswith(problem)
