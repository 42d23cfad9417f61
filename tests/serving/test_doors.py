"""Triton gives the ids and the text of transformers, and what it streams is that text in pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gsx
from examples.triton_server import Server
from gsx_engines.bundle.bundle import Bundle
from tests.checkpoints import BASES
from tests.doors import NEW_TOKENS, PROMPTS, expected
from tests.serving.conftest import Grpc, model_of
from tests.serving.test_triton import post


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_streamed(grpc: Grpc, base_models: dict[str, Path], base: str, concurrency: int) -> None:
    requests = [{"text_input": prompt, "max_tokens": NEW_TOKENS} for prompt in PROMPTS.values()]
    answers = grpc(requests, concurrency, model=model_of(base))
    for name, answer in zip(PROMPTS, answers, strict=True):
        wanted = expected(base_models[base])[name]
        assert (name, answer["error"], answer["ids"]) == (name, None, wanted.ids)
        assert (name, answer["text"]) == (name, wanted.text)
        assert answer["prompt_tokens"] == len(wanted.prompt_ids)


@pytest.mark.parametrize("base", BASES)
def test_one_response(server: Server, base_models: dict[str, Path], base: str) -> None:
    for name in ("ASCII", "emoji", "a newline at the end", "special tokens"):
        wanted = expected(base_models[base])[name]
        for prompt in ({"text_input": PROMPTS[name]}, {"input_ids": wanted.prompt_ids}):
            status, answer = post(server, {**prompt, "max_tokens": NEW_TOKENS}, model=model_of(base))
            assert status == 200, answer
            found = json.loads(answer)
            # Triton writes an array of one element as the element.
            ids = found["output_ids"] if isinstance(found["output_ids"], list) else [found["output_ids"]]
            assert (ids, found["text_output"]) == (wanted.ids, wanted.text)


@pytest.mark.parametrize("base", BASES)
def test_pieces_of_events(server: Server, base_models: dict[str, Path], base: str) -> None:
    for name in ("ASCII", "emoji", "Arabic"):
        wanted = expected(base_models[base])[name]
        body = {"text_input": PROMPTS[name], "max_tokens": NEW_TOKENS, "stream": True}
        status, answer = post(server, body, model=model_of(base), path="generate_stream")
        assert status == 200, answer
        events = [json.loads(line.removeprefix("data: ")) for line in answer.splitlines() if line]
        assert "".join(event["text_output"] for event in events) == wanted.text


@pytest.mark.parametrize("base", BASES)
def test_nothing_to_continue(grpc: Grpc, base_bundles: dict[str, Bundle], base: str) -> None:
    alone = gsx.generate(base_bundles[base], "", max_new_tokens=NEW_TOKENS, threads=1)
    (answer,) = grpc([{"text_input": "", "max_tokens": NEW_TOKENS}], model=model_of(base))
    assert (answer["error"], answer["ids"], answer["text"]) == (None, alone.ids, alone.text)
