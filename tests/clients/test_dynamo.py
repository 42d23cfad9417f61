"""`examples/dynamo_engine.py` in NVIDIA Dynamo's own interface: its requests, its context, its errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.generation.generate import generate
from gsx_engines.runners.select import open_runner

_REASON = "Dynamo is not installed: pip install --no-deps ai-dynamo ai-dynamo-runtime uvloop"
pytest.importorskip("dynamo.common.backend.run", reason=_REASON)
dynamo = pytest.importorskip("dynamo._core", reason=_REASON)

PROMPT = [5, 60, 61, 7, 8]


def in_worker(bundle: Path, use: Callable[[Any], Awaitable[Any]], *options: str) -> Any:
    """Start a worker, use it, and end it."""
    from examples.dynamo_engine import GsxEngine

    async def run() -> Any:
        engine, _ = await GsxEngine.from_args([str(bundle), *options])
        await engine.start(0)
        try:
            return await asyncio.wait_for(use(engine), 60)
        finally:
            await engine.cleanup()

    return asyncio.run(run())


def ask(engine: Any, context: Any, most: int, **sampling: Any) -> AsyncGenerator[dict[str, Any], None]:
    request = {
        "token_ids": PROMPT,
        "sampling_options": {"temperature": 0.0, **sampling},
        "stop_conditions": {"max_tokens": most, "ignore_eos": True},
    }
    found: AsyncGenerator[dict[str, Any], None] = engine.generate(request, context)
    return found


async def answer(engine: Any, most: int, **sampling: Any) -> tuple[list[int], dict[str, Any]]:
    """The tokens of an answer, and its last chunk."""
    chunks = [chunk async for chunk in ask(engine, dynamo.Context(), most, **sampling)]
    return [token for chunk in chunks for token in chunk["token_ids"]], chunks[-1]


def test_tokens_are_those_of_generate(tiny_bundle: Path) -> None:
    runner = open_runner(open_bundle(tiny_bundle))
    expected = generate(runner, [PROMPT], max_new_tokens=12, stop_ids=()).sequences[0].tokens
    tokens, last = in_worker(tiny_bundle, lambda engine: answer(engine, 12))
    assert tokens == expected
    assert last["finish_reason"] == "length"
    assert last["completion_usage"]["completion_tokens"] == 12


def test_a_cancelled_answer_ends_and_the_next_one_is_whole(tiny_bundle: Path) -> None:
    """With one slot: what was cancelled must leave it."""

    async def use(engine: Any) -> tuple[list[dict[str, Any]], list[int]]:
        context = dynamo.Context()
        chunks = []
        async for chunk in ask(engine, context, 400):
            chunks.append(chunk)
            context.stop_generating()
        return chunks, (await answer(engine, 4))[0]

    chunks, tokens = in_worker(tiny_bundle, use, "--slots", "1")
    assert chunks[-1]["finish_reason"] == "cancelled"
    assert sum(len(chunk["token_ids"]) for chunk in chunks) < 400
    assert len(tokens) == 4


def test_what_it_cannot_do_is_refused(tiny_bundle: Path) -> None:
    from dynamo.llm.exceptions import InvalidArgument

    async def use(engine: Any) -> str:
        with pytest.raises(InvalidArgument) as caught:
            await answer(engine, 4, n=2)
        assert len((await answer(engine, 4))[0]) == 4
        return str(caught.value)

    assert "several choices" in in_worker(tiny_bundle, use)
