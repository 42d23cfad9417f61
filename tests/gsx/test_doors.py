"""Python and the command line give the ids and the text of transformers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import gsx
from gsx_engines.bundle.bundle import Bundle
from gsx_plugins.errors import UsageError
from tests.checkpoints import BASES
from tests.doors import NEW_TOKENS, PROMPTS, expected
from tests.gsx.command_line import GSX, SECONDS, Gsx

LIMIT = {"max_new_tokens": NEW_TOKENS, "threads": 1}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PROMPTS)
def test_python(base_models: dict[str, Path], base_bundles: dict[str, Bundle], base: str, name: str) -> None:
    wanted, pieces = expected(base_models[base])[name], list[str]()
    found = gsx.generate(base_bundles[base], PROMPTS[name], on_text=pieces.append, **LIMIT)
    assert (found.prompt_ids, found.ids, found.text) == (wanted.prompt_ids, wanted.ids, wanted.text)
    assert "".join(pieces) == wanted.text
    by_ids = gsx.generate(base_bundles[base], ids=wanted.prompt_ids, **LIMIT)
    assert (by_ids.ids, by_ids.text) == (wanted.ids, wanted.text)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", PROMPTS)
def test_command_line(
    base_models: dict[str, Path], base_bundles: dict[str, Bundle], gsx: Gsx, base: str, name: str
) -> None:
    wanted = expected(base_models[base])[name]
    command = ["generate", base_bundles[base].directory, "--max-new-tokens", NEW_TOKENS, "--threads", 1]
    code, out, err = gsx(*command, "--json", "--", PROMPTS[name])
    assert code == 0, err
    found = json.loads(out)
    assert (found["prompt_ids"], found["ids"], found["text"]) == (wanted.prompt_ids, wanted.ids, wanted.text)
    code, out, err = gsx(*command, "--", PROMPTS[name])
    assert (code, out) == (0, wanted.text + "\n")
    code, out, err = gsx(*command, "--ids", ",".join(map(str, wanted.prompt_ids)))
    assert (code, out) == (0, ",".join(map(str, wanted.ids)) + "\n")


@pytest.mark.parametrize("base", BASES)
def test_bytes_of_a_process(base_models: dict[str, Path], base_bundles: dict[str, Bundle], base: str) -> None:
    """The prompt from stdin and the text on stdout, as bytes, of a process of its own."""
    wanted = expected(base_models[base])["emoji"]
    command = [*GSX, "generate", str(base_bundles[base].directory), "-", "--max-new-tokens", str(NEW_TOKENS)]
    prompt = PROMPTS["emoji"].encode()
    done = subprocess.run(command, input=prompt, capture_output=True, check=False, timeout=SECONDS)
    assert (done.returncode, done.stdout) == (0, wanted.text.encode() + b"\n"), done.stderr


def test_nothing_to_continue(base_bundles: dict[str, Bundle]) -> None:
    """The empty prompt begins with the beginning-of-text token, whether the tokenizer adds it or not."""
    for bundle in base_bundles.values():
        found = gsx.generate(bundle, "", **LIMIT)
        assert found.prompt_ids == [bundle.manifest.decoder.bos_id]
        assert found.ids == gsx.generate(bundle, ids=found.prompt_ids, **LIMIT).ids
    with pytest.raises(UsageError, match="empty"):
        gsx.generate(bundle, ids=[], **LIMIT)
