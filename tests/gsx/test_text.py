"""From a prompt to the new text: the same through every door, and as transformers has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

import gsx
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.runners.select import open_runner
from gsx_engines.serving.request import Request
from gsx_engines.serving.scheduler import Scheduler
from gsx_engines.tokens import BundleTokenizer
from tests.engines.test_serving import Recorder, finish
from tests.tiny import tiny_checkpoint
from tests.tokenizer_kinds import byte_ids, byte_level, number_of, sentencepiece

END = "<|im_end|>"
MAKERS: dict[str, Callable[[], Tokenizer]] = {"byte-level": byte_level, "sentencepiece": sentencepiece}


def written(path: Path, kind: str, rest: list[str | bytes]) -> tuple[Path, list[int]]:
    """A model that writes `a`, then these words and bytes, then an end token whose flag stands in another file.

    Its layers do nothing, and its head knows the next token. Returns: its directory, the ids that it writes.
    """
    tokenizer = MAKERS[kind]()
    tokenizer.enable_truncation(2)
    tokenizer.add_tokens([AddedToken(END, special=False, normalized=False)])
    chain = [number_of(tokenizer, "a" if kind == "byte-level" else "\u2581a")]
    for part in rest:
        chain += byte_ids(tokenizer, part) if isinstance(part, bytes) else [number_of(tokenizer, part)]
    chain.append(number_of(tokenizer, END))
    assert len(set(chain)) == len(chain), "each token follows from the one before"
    tiny_checkpoint(path, hidden=320, layers=1, vocab=320, eos_token_id=chain[-1], pad_token_id=None)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(path / "model.safetensors").items()}
    tensors["model.embed_tokens.weight"] = torch.eye(320)
    tensors["model.norm.weight"] = torch.ones(320)
    for before, after in pairwise(chain):
        tensors["lm_head.weight"][after, before] = 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "generation_config.json").unlink()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": END}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path, chain[1:]


@pytest.mark.parametrize(
    ("kind", "rest", "text"),
    [
        ("byte-level", ["b", b" \xe4\xbd"], "b \ufffd"),
        ("sentencepiece", ["\u2581b", "\u2581the", "."], " b the."),
        ("sentencepiece", [b"\n\xf0\x9f", "\u2581b"], "\ufffd\ufffd\ufffd b"),
    ],
)
def test_the_text_is_the_same_through_every_door(tmp_path: Path, kind: str, rest: list[str | bytes], text: str) -> None:
    model, ids = written(tmp_path / "model", kind, rest)
    reference = AutoTokenizer.from_pretrained(model)
    prompt = "the a"
    prompt_ids = reference(prompt)["input_ids"]
    before, whole = (reference.decode(some, skip_special_tokens=True) for some in (prompt_ids, prompt_ids + ids))
    assert whole[len(before) :] == text
    bundle = open_bundle(gsx.export(model, tmp_path / "bundle").directory)

    pieces: list[str] = []
    result = gsx.generate(bundle, prompt, max_new_tokens=20, on_text=pieces.append)
    assert (result.prompt_ids, result.ids, result.text, result.finish) == (prompt_ids, ids, text, "end-of-text")
    assert "".join(pieces) == text
    assert gsx.generate(bundle, ids=prompt_ids, max_new_tokens=20).text == text
    assert _served(bundle, prompt_ids) == (ids, text)
    own = BundleTokenizer(bundle)
    assert own.decode(prompt_ids + ids) == whole, "what a program gets that has ids only"


def _served(bundle: Bundle, prompt: list[int]) -> tuple[list[int], str]:
    scheduler = Scheduler(open_runner(bundle, 1), BundleTokenizer(bundle), slots=2)
    client = Recorder()
    scheduler.submit(Request(prompt=prompt, max_new_tokens=20), client)
    finish(scheduler)
    assert client.error is None
    return client.ids, client.text


def test_a_bundle_of_an_older_gsx_is_not_cut(tiny_bundle: Path, tmp_path: Path) -> None:
    """It has a copy of the checkpoint's tokenizer.json, with what somebody once asked it to do."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for path in tiny_bundle.iterdir():
        (bundle / path.name).symlink_to(path)
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    wanted = tokenizer.encode("a prompt of more tokens").ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=32)
    (bundle / "tokenizer.json").unlink()
    tokenizer.save(str(bundle / "tokenizer.json"))
    assert BundleTokenizer(open_bundle(bundle)).encode("a prompt of more tokens") == wanted
