"""The inputs and outputs of the Triton model: one table for its configuration, its checks and its docs.

The names are those of other generation models on Triton (`text_input`, `max_tokens`, `stream`, `text_output`), so that
existing clients and load generators work. Numbers have 64 bits, so a budget or a temperature has exactly the value that
it has in `gsx generate`.

Triton's OpenAI front end sends what TensorRT-LLM's models take, with other types for some of these names, and each
value in a batch of one. A repository may be written for it (`COMMON_INPUTS`): then names that both have are of its
types, its own are added, and everything else stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

DataType = Literal[
    "TYPE_STRING", "TYPE_INT32", "TYPE_INT64", "TYPE_UINT32", "TYPE_UINT64", "TYPE_FP32", "TYPE_FP64", "TYPE_BOOL"
]


@dataclass(frozen=True)
class Field:
    """An input or output.

    Args:
        name: in requests and responses.
        data_type: of Triton.
        many: whether it is a list [n]; otherwise it is one value, [1].
        about: a description for people.
    """

    name: str
    data_type: DataType
    many: bool
    about: str


INPUTS = (
    Field("text_input", "TYPE_STRING", False, "the text to continue; this, input_ids or messages"),
    Field("input_ids", "TYPE_INT64", True, "the prompt as token ids"),
    Field("messages", "TYPE_STRING", False, "a chat, as the OpenAI API has it: a JSON list with role and content"),
    Field("max_tokens", "TYPE_INT64", False, "maximum number of new tokens; 128"),
    Field("budget", "TYPE_FP64", False, "share of (token, branch) pairs kept, above 0 and at most 1; as exported"),
    Field("layers", "TYPE_STRING", False, "branches that run, e.g. 0-3,6,8.attn; for rules that read a set of layers"),
    Field("exit", "TYPE_INT64", False, "how many layers run; for the same rules"),
    Field("speedup", "TYPE_FP64", False, "target of Unified Layer Skipping; for the same rules"),
    Field("exit_threshold", "TYPE_FP64", False, "confidence at which a token exits; for rules that measure it"),
    Field("loops", "TYPE_INT64", False, "how many loops of a looped model run; as exported"),
    Field("hold", "TYPE_BOOL", False, "move the thresholds of new tokens so that the budget holds; false"),
    Field("temperature", "TYPE_FP64", False, "0 always chooses the likeliest token; 0"),
    Field("top_k", "TYPE_INT64", False, "only the k likeliest tokens, 0 for all; 0"),
    Field("top_p", "TYPE_FP64", False, "only the likeliest tokens that together reach this probability; 1"),
    Field("min_p", "TYPE_FP64", False, "only tokens at least this share as likely as the likeliest; 0"),
    Field("repetition_penalty", "TYPE_FP64", False, "divides logits of tokens in the text, prompt included; 1"),
    Field("frequency_penalty", "TYPE_FP64", False, "off a logit for each time that the token is in the new text; 0"),
    Field("presence_penalty", "TYPE_FP64", False, "off a logit if the token is in the new text; 0"),
    Field("seed", "TYPE_INT64", False, "of the random numbers; a new one each time"),
    Field("stop", "TYPE_STRING", True, "texts that end the generation, left out of the result; none"),
    Field("speculative", "TYPE_BOOL", False, "draft and verify with the bundle's draft; false"),
    Field("stream", "TYPE_BOOL", False, "several responses, as tokens come, in place of one; false"),
)
OUTPUTS = (
    Field("text_output", "TYPE_STRING", False, "new text of this response; missing if the bundle has no tokenizer"),
    Field("output_ids", "TYPE_INT64", True, "new tokens of this response"),
    Field("finish_reason", "TYPE_STRING", False, "end-of-text, length, context or stopped; only in the last response"),
    Field("prompt_tokens", "TYPE_INT64", False, "only in the last response, as all below"),
    Field("cached_tokens", "TYPE_INT64", False, "of the prompt, whose K and V were there already"),
    Field("new_tokens", "TYPE_INT64", False, "in all responses together"),
    Field("decode_steps", "TYPE_INT64", False, "steps, or rounds of draft and verification, after the first token"),
    Field("waited_seconds", "TYPE_FP64", False, "from arrival to prefill"),
    Field("first_token_seconds", "TYPE_FP64", False, "from arrival to the first token"),
    Field("decode_seconds", "TYPE_FP64", False, "from the first token to the last"),
    Field("kept_share", "TYPE_FP64", False, "share of (token, branch) pairs kept; if the model has gates, and counts"),
    Field("held_share", "TYPE_FP64", False, "the same of new tokens alone; if the budget is held"),
    Field("acceptance", "TYPE_FP64", False, "share of drafted tokens that were correct; if any were drafted"),
)

# What Triton's OpenAI front end sends and reads: its types of names that are above, and its own names.
_COMMON_TYPES: dict[str, DataType] = {
    "max_tokens": "TYPE_INT32",
    "temperature": "TYPE_FP32",
    "top_k": "TYPE_INT32",
    "top_p": "TYPE_FP32",
    "frequency_penalty": "TYPE_FP32",
    "presence_penalty": "TYPE_FP32",
    "repetition_penalty": "TYPE_FP32",
    "seed": "TYPE_UINT64",
}
COMMON_INPUTS = (
    *(replace(field, data_type=_COMMON_TYPES.get(field.name, field.data_type)) for field in INPUTS),
    Field("stop_words", "TYPE_STRING", True, "as stop"),
    Field("exclude_input_in_output", "TYPE_BOOL", False, "false: the text begins with the prompt; true"),
    Field("return_num_input_tokens", "TYPE_BOOL", False, "give num_input_tokens; false"),
    Field("return_num_output_tokens", "TYPE_BOOL", False, "give num_output_tokens; false"),
)
COMMON_OUTPUTS = (
    *OUTPUTS,
    Field("num_input_tokens", "TYPE_UINT32", False, "tokens of the prompt, in every response"),
    Field("num_output_tokens", "TYPE_UINT32", False, "new tokens of this response"),
)


@dataclass(frozen=True)
class Form:
    """The form of requests and responses that a repository is written for.

    Args:
        name: in the model's parameters.
        inputs, outputs: the fields.
        batch: Triton's `max_batch_size`; 1: each value is in a batch of one.
    """

    name: str
    inputs: tuple[Field, ...]
    outputs: tuple[Field, ...]
    batch: Literal[0, 1]


FORMS = {
    form.name: form for form in (Form("gsx", INPUTS, OUTPUTS, 0), Form("openai", COMMON_INPUTS, COMMON_OUTPUTS, 1))
}
