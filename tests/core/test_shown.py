"""Untrusted text never reaches a terminal, a log or an error unescaped."""

import json
import logging
import struct
import traceback

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from migrate.__main__ import main as migrate_main
from migrate.shown import sentence as migrate_sentence
from migrate.shown import without_advice as migrate_without_advice
from mochi_core import load_transformer, load_vae
from mochi_core.__main__ import main
from mochi_core.lora import read_lora
from mochi_core.shown import NAME_LENGTH, SENTENCE_LENGTH, sentence, shown, shown_names, without_advice
from tests.harness.bad_files import DIT, SMALL, VALID, with_header

EVIL = "\x1b[31m\r\nrm -rf\x07\u202e\u2028\ud800"
LONG = EVIL + "n" * 400
LAYER = "blocks.0.attn.qkv_x"
ADVICE = ("weights_only", "add_safe_globals")


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(text=st.text(st.characters(), max_size=300) | st.text(st.characters(categories=("Cc", "Cf", "Cs", "Zl", "Zp"))))
def test_whatever_the_text_is(text):
    assert shown(text).isprintable()
    shown(text).encode()
    assert len(shown(text)) <= 10 * NAME_LENGTH + 40
    assert shown(text) == text or not text.isprintable() or len(text) > NAME_LENGTH
    assert sentence(text) == migrate_sentence(text)


def test_it_is_cut_before_it_is_looked_at():
    assert shown("a" * 50_000_000) == "a" * NAME_LENGTH + " ... (50,000,000 characters)"
    assert shown_names(["a\n", *"bcdefgh"]) == "a\\n, b, c, d, e, f, ..."
    assert shown("schön \u2713 \u6f22\u5b57") == "schön \u2713 \u6f22\u5b57"


def test_advice_to_switch_a_limit_off_is_not_passed_on():
    with pytest.raises(ValueError, match=r"sys\.set_int_max_str_digits") as refusal:
        int("9" * 5000)
    kept = without_advice(refusal.value)
    assert kept.startswith("Exceeds the limit")
    assert kept.endswith("digits")
    for error in (refusal.value, ValueError("another; use it"), "text"):
        assert without_advice(error) == migrate_without_advice(error)
    assert without_advice(ValueError("another; use it")) == "another; use it"


def fits(text):
    assert len(text) < SENTENCE_LENGTH + 500
    assert text.replace("\n", "").isprintable(), ascii(text)
    assert not any(advice in text for advice in ADVICE)


def all_of(error):
    """The error as in a host's log, with its causes, but without the lines of our code."""
    return "\n".join(line for line in traceback.format_exception(error) if not line.startswith("  File"))


def gguf(name):
    name = name.encode("utf-8", "surrogatepass")
    described = struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 8, 99, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + described + bytes(64)


def hostile_header(**entry):
    return with_header({EVIL: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}, bytes(4))


def with_name(name, path):
    save_file({**DIT, name: torch.ones(1)}, path)


class Evil:
    def __reduce__(self):
        return logging.getLogger, ("x",)


FILES = {
    "unknown.safetensors": lambda path: path.write_bytes(hostile_header()),
    "dtype.safetensors": lambda path: path.write_bytes(hostile_header(dtype=EVIL)),
    "offsets.safetensors": lambda path: path.write_bytes(hostile_header(data_offsets=[0, 3])),
    "long.safetensors": lambda path: path.write_bytes(with_header({LONG * 100: {}}, b"")),
    "unexpected.safetensors": lambda path: with_name("\x1b[31m\n" + "n" * 400, path),
    "note.safetensors": lambda path: save_file(
        {**DIT, "a.comfy_quant": torch.tensor([*json.dumps({"format": EVIL}).encode()], dtype=torch.uint8)}, path
    ),
    "type.gguf": lambda path: path.write_bytes(gguf(LONG)),
    "names.pt": lambda path: torch.save({LONG: torch.ones(1)}, path),
    "code.pt": lambda path: torch.save({"a": Evil()}, path),
    "old.pt": lambda path: torch.save({"a": Evil()}, path, _use_new_zipfile_serialization=False),
    "shard.safetensors.index.json": lambda path: path.write_text(json.dumps({"weight_map": {"a": EVIL}})),
    "gone.safetensors.index.json": lambda path: path.write_text(json.dumps({"weight_map": {"a": "\x1b[31m.pt"}})),
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_of_strangers(tmp_path, capsys, name):
    path = tmp_path / name
    FILES[name](path)
    for read in (load_transformer, load_vae, lambda path: read_lora(path, SMALL).report()):
        with pytest.raises((ValueError, FileNotFoundError)) as refusal:
            read(path)
        assert "\n" not in str(refusal.value)
        fits(all_of(refusal.value))
    main(["inspect", str(path)])
    for text in capsys.readouterr():
        fits(text)


def test_metadata_and_names_of_files(tmp_path, capsys):
    save_file(DIT, tmp_path / "\x1b[31m\n.safetensors", {"note\x1b[31m": EVIL.replace("\ud800", "") + "m" * 10**6})
    assert main(["inspect", str(tmp_path / "\x1b[31m\n.safetensors")]) == 0
    (tmp_path / "cut\x1b[31m\n.safetensors").write_bytes(VALID[:-1])
    assert main(["inspect", str(tmp_path / "cut\x1b[31m\n.safetensors")]) == 2
    assert main(["inspect", str(tmp_path / "not there\x1b[31m\n.pt")]) == 2
    for text in capsys.readouterr():
        fits(text)


def test_names_that_a_lora_has_too_many_of(tmp_path):
    factors = {f"{LAYER}.lora_A": torch.ones(2, 8), f"{LAYER}.lora_B": torch.ones(24, 2)}
    others = {f"{i}\x1b[31m\n" + "n" * 400: torch.ones(1) for i in range(9)}
    save_file(factors | others, tmp_path / "x.safetensors")
    fits(read_lora(tmp_path / "x.safetensors", SMALL).report())


def test_titles_in_workflows(tmp_path, capsys):
    node = {
        "class_type": "MochiDecode",
        "inputs": {"samples": ["2", 0], "unknown": EVIL},
        "_meta": {"title": EVIL + "t" * 10**5},
    }
    (tmp_path / "old.json").write_text(json.dumps({"1": node, "2": {"class_type": EVIL, "inputs": {}}}))
    migrate_main([str(tmp_path / "old.json")])
    for text in capsys.readouterr():
        for line in text.splitlines():
            fits(line)
