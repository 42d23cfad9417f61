"""Two hundred mutations of a checkpoint's files: the tokens and the text of transformers, or a refusal in words.

Never another exception, never other tokens, never another text. What transformers loads and gsx refuses, and what it
refuses and gsx takes: each is a row of a table here, with the reason.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gsx_engines.bundle.bundle import open_bundle
from gsx_exporter.graph import assemble
from gsx_exporter.graph.trace import Input, Part, trace
from tests.answers import Answer, Refusal, Text, by_gsx, by_transformers
from tests.gsx.command_line import snapshot
from tests.mutations import (
    ADDED_TOKENS,
    GENERATION,
    INDEX,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Mutation,
    drawn,
)

SEED = 22
NEW_TOKENS = 12
# Continued by special tokens, by unfinished characters, and by an end of the text.
PROMPTS = {
    "chat llama": ("class Reader:\n    def", "<|im_start|>user ✓ the", " leading <think> the\n"),
    "piece mistral": ("the class of", "a 😀 token", "</s> the  self\n"),
}

# What transformers loads and gsx refuses: a part of the message, and why.
REFUSED = {
    "hidden_act is not supported": "the decoder has one activation",
    "already quantized": "a configuration of quantized weights, beside whole ones: one of them is of another model",
    "longer than the model's context": "gsx keeps to the positions that config.json gives; transformers does not",
    "is not a count": "a model without layers, or without positions",
    "is not readable JSON": "transformers takes a damaged generation_config.json for a missing one",
    "is not a JSON object": "of special_tokens_map.json, which transformers does not read beside added_tokens_decoder",
    "an impossible id": "transformers gives the token another id than the file",
    "cannot be written as one": "two tokens with one id, of which the file can have one",
    "is not a token id": "an id in a list of lists",
    "the id of an added token cannot be kept": "transformers gives the token another id than the file",
    "no finite frequencies": "the positions would be NaN",
    "no token can be chosen": "the logits are NaN, of which transformers takes the first",
    "transformers cannot build a model": "a type of weights that is none, which the reference overrides",
    "'ministral' is not supported": "transformers reads a Mistral with layer_types as another family",
    "gsx is not a section": "a key that is gsx's own",
    "cache forgets": "a window that only transformers' cache knows: it gives other tokens with the cache than without",
}
# What transformers refuses, and changes neither ids nor weights: a part of the mutation's line, and why.
HARMLESS = {
    "keys of an empty quantization_config": "it says nothing",
    "metadata": "of the index, which nothing needs",
    "the first key twice": "metadata of the index, the last of which is null",
    "bad_words_ids is []": "no words",
    "model_max_length": "nothing is cut to it",
}
# Where transformers' own tokenizer gives another text when it has been saved and loaded: a part of the line, and why.
CHANGES_WHEN_SAVED = {"added tokens are normalized": "special tokens with the normalizer's space in front are decoded"}
# Refusals of a prompt, not of a file.
OF_THE_PROMPT = (
    "ids outside the vocabulary",
    "longer than the model's context",
    "no token can be chosen",
    "the tokenizer cannot read this text",
)
# Files that a refusal must name; a mutation of the others shows in sizes and names of tensors.
NAMED = (GENERATION, TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS)


@pytest.mark.parametrize("mutation", drawn(seed=SEED), ids=str)
def test_mutation(mutation: Mutation, base_models: dict[str, Path], tmp_path: Path, traced_once: None) -> None:
    base, model, prompts = base_models[mutation.base], tmp_path / "model", PROMPTS[mutation.base]
    shutil.copytree(base, model)
    mutation.change(model)
    assert snapshot(model) != snapshot(base), "it changes nothing"
    wanted = by_transformers(model, prompts, NEW_TOKENS)
    for asked, found, right in zip(
        prompts, by_gsx(model, tmp_path / "bundle", prompts, NEW_TOKENS), wanted, strict=True
    ):
        if isinstance(found, Refusal):
            _check_words(found.why, mutation, model, right)
        elif found != right:
            _check_difference(found, right, mutation, model, asked)


def _check_words(words: str, mutation: Mutation, model: Path, right: Answer) -> None:
    """A refusal names the file, and there is a reason for it."""
    if isinstance(right, Text):
        assert any(part in words for part in REFUSED), f"transformers gives {right}"
    if any(part in words for part in OF_THE_PROMPT):
        return
    place = mutation.file if mutation.file in NAMED else rf"config\.json|{re.escape(INDEX)}|{re.escape(str(model))}"
    assert re.search(place, words), f"it does not name {place}"


def _check_difference(found: Text, right: Answer, mutation: Mutation, model: Path, prompt: str) -> None:
    """Where gsx does not give what transformers gives, it has said so, or there is a reason for it."""
    notes = " ".join(open_bundle(model.with_name("bundle")).manifest.source.notes)
    if "does not apply" in notes:
        (right,) = by_transformers(model, [prompt], NEW_TOKENS, settings=False)
    elif "tokenizer.json is used as it is" in notes:  # its class would make another tokenizer of it
        (right,) = by_transformers(model, [prompt], NEW_TOKENS, read_tokenizer=PreTrainedTokenizerFast.from_pretrained)
    elif any(part in mutation.line for part in CHANGES_WHEN_SAVED):
        (right,) = by_transformers(model, [prompt], NEW_TOKENS, read_tokenizer=_saved_again)
    elif isinstance(right, Refusal) and any(part in mutation.line for part in HARMLESS):
        return
    elif "max_position_embeddings" in mutation.line and isinstance(right, Text):
        # gsx ends a text at the last position; transformers does not.
        assert found.ids
        right = Text(right.prompt_ids, right.ids[: len(found.ids)], found.text)
    assert found == right


def _saved_again(model: Path) -> Any:
    """The tokenizer, after it has been saved and loaded."""
    folder = model.with_name("again")
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Exports trace equal parts of a decoder once: tracing is nearly all of an export's time, and a part without a keep
    rule depends only on its module (sizes, frequencies, epsilons, ...), its inputs and its outputs.
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
    """Everything that a module is made of, down to the values of its attributes, but for the configuration: a module
    without a rule reads it only when it is made.
    """
    if (options := getattr(module, "options", None)) is not None:
        assert options.rule is None
    own = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in ("config", "training")
    }
    parameters = {name: (tuple(one.shape), one.dtype) for name, one in module.named_parameters(recurse=False)}
    assert not list(module.buffers(recurse=False)), "their values would have to be compared, too"
    parts = {name: _description(part) for name, part in module.named_children()}
    return type(module).__qualname__, own, parameters, parts
