"""What transformers makes of a checkpoint, and what gsx makes of it: prompt ids, new ids, new text; or a refusal.

The reference needs no part of gsx: `AutoTokenizer`, `AutoModelForCausalLM.generate` (greedy, in float32), and the
difference of two decoded texts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import gsx
from gsx_engines.bundle.bundle import Bundle
from gsx_plugins.errors import GsxError


@dataclass(frozen=True)
class Text:
    """The ids of a prompt, the new ids, the new text."""

    prompt_ids: list[int]
    ids: list[int]
    text: str


@dataclass(frozen=True)
class Refusal:
    """Why there is no text."""

    why: str


Answer = Text | Refusal


@contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers prints and warns of."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()


def by_transformers(
    model: Path,
    prompts: Sequence[str],
    new_tokens: int,
    *,
    settings: bool = True,
    read_tokenizer: Callable[[Path], Any] = AutoTokenizer.from_pretrained,
) -> list[Answer]:
    """An answer for each prompt. Whatever transformers raises is a refusal, and so are weights that it would make up.

    Args:
        settings: whether `generation_config.json` counts beyond its end tokens.
        read_tokenizer: reads the tokenizer of a folder.
    """
    with quiet():
        try:
            tokenizer = read_tokenizer(model)
            loaded, report = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        except Exception as error:  # of any type: it is about the files
            return [Refusal(f"{type(error).__name__}: {error}")] * len(prompts)
        if report["missing_keys"]:
            return [Refusal(f"no weights for {sorted(report['missing_keys'])[:3]}")] * len(prompts)
        if not settings:
            own = loaded.generation_config
            loaded.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
        return [_continued(tokenizer, loaded.eval(), prompt, new_tokens) for prompt in prompts]


def _continued(tokenizer: Any, model: Any, prompt: str, new_tokens: int) -> Answer:
    try:
        ids = tokenizer(prompt)["input_ids"]
        if tokenizer(prompt)["input_ids"] != ids:
            return Refusal("the tokenizer gives other ids each time")
        given = torch.tensor([ids])
        options = {"attention_mask": torch.ones_like(given), "max_new_tokens": new_tokens, "do_sample": False}
        found = model.generate(given, **options)
        every = getattr(found, "sequences", found)[0].tolist()
        before, after = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, every))
    except Exception as error:
        return Refusal(f"{type(error).__name__}: {error}")
    return Text(ids, every[len(ids) :], after[len(before) :])


def by_gsx(model: Path, bundle: Path, prompts: Sequence[str], new_tokens: int) -> list[Answer]:
    """An answer for each prompt: exported once, generated with ONNX Runtime. Only gsx's own errors are refusals."""
    try:
        opened = gsx.export(model, bundle)
    except GsxError as error:
        return [Refusal(error.message)] * len(prompts)
    return [_generated(opened, prompt, new_tokens) for prompt in prompts]


def _generated(bundle: Bundle, prompt: str, new_tokens: int) -> Answer:
    pieces: list[str] = []
    try:
        found = gsx.generate(bundle, prompt, max_new_tokens=new_tokens, threads=1, on_text=pieces.append)
    except GsxError as error:
        return Refusal(error.message)
    assert found.text is not None
    assert "".join(pieces) == found.text
    return Text(found.prompt_ids, found.ids, found.text)
