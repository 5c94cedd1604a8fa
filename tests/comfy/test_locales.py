"""Names and tooltips in the locale files: English equals the nodes' own texts, the other languages are complete.

After changing a node, `python dev.py generate locales` rewrites English, and these tests list what the other languages lack.
"""

import copy
import re

import pytest

from tests.harness.locales import LANGUAGES, english, flat, node_infos, read
from tests.harness.server import PACK, ROOT

TRANSLATED = LANGUAGES[1:]
# What every language keeps: files and folders, types and values, numbers.
IDENTIFIERS = re.compile(
    r"[\w/]+\.safetensors|models/\w+|\b(?:MODEL|LATENT|VAE|CLIP|T5|GiB|PEFT|auto|cpu|mochi|[a-z]+\d+_\w+|fp\d+|bf16|int8)\b"
    r"|\d+(?:\.\d+)?",
    re.ASCII,
)
# The front end would interpret them as its own syntax (lists, plurals, links).
SYNTAX = re.compile(r"[{}|@]")


@pytest.fixture(scope="module")
def said(comfy_server):
    """All texts of the nodes themselves."""
    from tests.harness.client import ComfyClient

    return english(node_infos(ComfyClient(comfy_server.url)))


def problems(expected, texts):
    """How a language's entries differ from the expected ones, one line each."""
    expected, texts = flat(expected), flat(texts)
    missing = [f"lacks {place}" for place in expected if not texts.get(place)]
    return missing + [f"has {place}, which no node has" for place in texts if place not in expected]


def in_all_languages(find):
    """`find` applied to every translation: all problems, as one message."""
    return "\n".join(f"locales/{language}: {problem}" for language in TRANSLATED for problem in find(read(language)))


def test_every_node_input_and_output_has_a_name_and_a_tooltip(said):
    empty = [place for place, text in flat(said).items() if not text]
    assert not empty, f"give these a text in nodes/: {', '.join(empty)}"


def test_english_is_what_the_nodes_say(said):
    assert read("en") == said, "run `python dev.py generate locales`"


def test_the_other_languages_have_every_text_and_no_other(said):
    found = in_all_languages(lambda texts: problems(said, texts))
    assert not found, found


def test_what_is_missing_or_unknown_is_found(said):
    changed = copy.deepcopy(said)
    sampler = changed["Mochi1Sampler"]
    del sampler["inputs"]["width"]["tooltip"], sampler["outputs"]["0"]
    sampler["inputs"]["breadth"] = {"name": "breadth"}
    assert problems(said, changed) == [
        "lacks Mochi1Sampler.inputs.width.tooltip",
        "lacks Mochi1Sampler.outputs.0.tooltip",
        "has Mochi1Sampler.inputs.breadth.name, which no node has",
    ]


def identifiers(text):
    """All identifiers in a text, with a German 0,5 as the English 0.5."""
    return set(IDENTIFIERS.findall(re.sub(r"(?<=\d),(?=\d)", ".", text)))


def test_translations_keep_identifiers_and_numbers(said):
    def lost(texts):
        for place, text in flat(said).items():
            if not place.endswith(".name") and (gone := identifiers(text) - identifiers(flat(texts)[place])):
                yield f"{place} lacks {', '.join(sorted(gone))}"

    found = in_all_languages(lost)
    assert not found, found


def test_translations_call_our_nodes_by_their_translated_names(said):
    names = {texts["display_name"]: node for node, texts in said.items()}

    def misnamed(texts):
        for place, text in flat(said).items():
            for name, node in names.items():
                if name in text and texts[node]["display_name"] not in flat(texts)[place]:
                    yield f"{place} does not say {texts[node]['display_name']}"

    found = in_all_languages(misnamed)
    assert not found, found


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_are_plain_and_names_differ(language):
    texts = read(language)
    special = [place for place, text in flat(texts).items() if SYNTAX.search(text)]
    assert not special, special
    for kind in ("display_name", "description"):
        assert len({node[kind] for node in texts.values()}) == len(texts)
    for node, entry in texts.items():
        names = [one["name"] for one in entry["inputs"].values()]
        assert len(set(names)) == len(names), node


@pytest.mark.parametrize("language", LANGUAGES)
def test_categories_have_names(comfy_client, language):
    main = read(language, "main")
    categories = {part for info in node_infos(comfy_client).values() for part in info["category"].split("/")}
    assert main["nodeCategories"].keys() == categories
    assert main["templateWorkflows"]["category"].keys() == {PACK}
    assert all(flat(main).values())


def test_the_server_hands_them_to_the_front_end(comfy_client):
    served = comfy_client.get("/i18n")
    for language in LANGUAGES:
        extra = {"nodeDefs": read(language), "commands": read(language, "commands")}
        assert served[language] == {**read(language, "main"), **extra}


def test_the_editors_command_has_a_name_in_every_language():
    name = read("en", "commands")["mochinodes_Convert"]["label"]
    assert f'label: "{name}"' in (ROOT / "web" / "convert.js").read_text(encoding="utf-8")
    for language in LANGUAGES:
        label = read(language, "commands")["mochinodes_Convert"]["label"]
        assert label
        assert read(language, "main")["menuLabels"] == {name: label}
