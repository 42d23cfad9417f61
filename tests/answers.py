"""What transformers makes of a checkpoint, and what gsx makes of it: prompt ids, new ids, new text; or a refusal.

A reference needs no part of gsx: `AutoTokenizer`, `AutoModelForCausalLM.generate`, and the difference of two decoded
texts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import gsx
from gsx_exporter.graph import assemble
from gsx_exporter.graph.trace import Input, Part, trace
from gsx_plugins.errors import GsxError

NEW_TOKENS = 12


@dataclass(frozen=True)
class Text:
    """The ids of a prompt, the new ids, the new text."""

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finish: str = ""


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


def by_transformers(model: Path, prompts: Sequence[str], new_tokens: int = NEW_TOKENS) -> list[Answer]:
    """Greedy, in float32. Weights that it would make up are none of the checkpoint's: a refusal."""
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(model)
            loaded, report = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, output_loading_info=True)
        except Exception as error:  # anything: it is about the files
            return [Refusal(f"{type(error).__name__}: {error}")] * len(prompts)
        if report["missing_keys"]:
            return [Refusal(f"no weights for {sorted(report['missing_keys'])[:3]}")] * len(prompts)
        return [_continued(tokenizer, loaded.eval(), prompt, new_tokens) for prompt in prompts]


def _continued(tokenizer: Any, model: Any, prompt: str, new_tokens: int) -> Answer:
    try:
        ids = tokenizer(prompt)["input_ids"]
        given = torch.tensor([ids])
        mask = torch.ones_like(given)
        found = model.generate(given, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        every = getattr(found, "sequences", found)[0].tolist()
        before, after = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, every))
    except Exception as error:
        return Refusal(f"{type(error).__name__}: {error}")
    return Text(ids, every[len(ids) :], after[len(before) :])


def by_gsx(model: Path, bundle: Path, prompts: Sequence[str], new_tokens: int = NEW_TOKENS) -> list[Answer]:
    """Exported and generated. Only gsx's own errors are refusals."""
    try:
        opened = gsx.export(model, bundle)
    except GsxError as error:
        return [Refusal(error.message)] * len(prompts)
    return [_generated(opened, prompt, new_tokens) for prompt in prompts]


def _generated(bundle: gsx.Bundle, prompt: str, new_tokens: int) -> Answer:
    pieces: list[str] = []
    try:
        found = gsx.generate(bundle, prompt, max_new_tokens=new_tokens, threads=1, on_text=pieces.append)
    except GsxError as error:
        return Refusal(error.message)
    assert found.text == "".join(pieces)
    return Text(found.prompt_ids, found.ids, found.text, found.finish)


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Exports of this module trace equal parts of a decoder once: tracing is nearly all of an export's time.

    A part without a keep rule is decided by its module (sizes, frequencies, epsilons, ...), and by its inputs and
    outputs. `ModelConfig` is left out of the comparison: a module without a rule reads it only when it is made.
    """
    known: dict[str, Part] = {}

    def remembered(module: nn.Module, inputs: dict[str, Input], outputs: Sequence[str]) -> Part:
        key = repr((_description(module), inputs, outputs))
        if key not in known:
            known[key] = trace(module, inputs, outputs)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "trace", remembered)
        yield


def _description(module: nn.Module) -> Any:
    """Everything that a module is made of, down to the values of its attributes."""
    if (options := getattr(module, "options", None)) is not None:
        assert options.rule is None
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in ("config", "training")
    }
    parameters = {name: (tuple(one.shape), one.dtype) for name, one in module.named_parameters(recurse=False)}
    assert not list(module.buffers(recurse=False)), "values of buffers would have to be compared, too"
    parts = {name: _description(part) for name, part in module.named_children()}
    return type(module).__qualname__, own, parameters, parts
