"""Requests of the OpenAI API as the scheduler takes them: their fields, and what of them is refused.

Fields that would change an answer and that this server does not have are refused, not ignored; those that say something
about the user or the bill are accepted. What only gsx has is in one object, `gsx`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.sampling import MOST_BIAS, MOST_LOGPROBS, MOST_PENALTY, Sampling
from gsx_engines.serving.limits import check_layers, check_stops
from gsx_engines.serving.messages import Message
from gsx_engines.serving.request import Request
from gsx_engines.tokens import check_text
from gsx_plugins.errors import UsageError

# As in the OpenAI API, where a completion is short and a chat's answer is as long as the context allows.
COMPLETION_TOKENS = 16
MAX_CHOICES = 128

Penalty = Annotated[float, Field(ge=-MOST_PENALTY, le=MOST_PENALTY)]
Bias = Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]
Count = Annotated[int, Field(ge=1, le=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Body):
    """`stream_options`."""

    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None


class GsxOptions(_Body):
    """`gsx`: what the model leaves out for this request, and how it drafts.

    Args:
        budget: share of (token, branch) pairs kept.
        layers, exit, speedup: instead of a budget, for policies that read a set of layers.
        exit_threshold: confidence at which a token exits, with policy calm.
        loops: how many loops run, for a looped model with policy loops.
        hold: the thresholds of new tokens move so that the budget holds.
        speculative: draft and verify with the bundle's draft; the text is the same.
        draft_length: tokens drafted before a verification; null: found while generating.
        kept: report which branches each token kept.
    """

    budget: float | None = None
    layers: str | None = None
    exit: int | None = None
    speedup: float | None = None
    exit_threshold: float | None = None
    loops: int | None = None
    hold: bool = False
    speculative: bool = False
    draft_length: int | None = None
    kept: bool = False


class _Generating(_Body):
    """What completions and chats have in common."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1)] | None = 0
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: float | None = 1.0
    frequency_penalty: Penalty | None = 0.0
    presence_penalty: Penalty | None = 0.0
    logit_bias: dict[str, Bias] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    gsx: GsxOptions | None = None
    # About the user or the bill.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def options(self) -> GsxOptions:
        """The object `gsx`, with its defaults if there is none."""
        return self.gsx or GsxOptions()

    def request(
        self,
        prompt: list[int],
        most_new: int,
        *,
        logprobs: int | None,
        stop_ids: frozenset[int] | None,
        prompt_logprobs: bool = False,
    ) -> Request:
        """The request for one prompt.

        Args:
            most_new: new tokens, if the request does not say how many.
            logprobs, stop_ids, prompt_logprobs: as in `Request`.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        for text in stop:
            check_text(text)
        check_stops(stop)
        options = self.options
        check_layers(len((options.layers or "").encode(errors="replace")))
        return Request(
            prompt=prompt,
            max_new_tokens=most_new if self.max_tokens is None else self.max_tokens,
            keep=KeepSettings(**options.model_dump(include={field.name for field in fields(KeepSettings)})),
            sampling=self._sampling(),
            stop=stop,
            stop_ids=frozenset() if self.ignore_eos else stop_ids,
            speculative=options.speculative,
            draft_length=options.draft_length,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            kept=options.kept,
        )

    def _sampling(self) -> Sampling:
        try:
            biases = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        except ValueError as error:
            raise UsageError("logit_bias is not by token", expected="token ids as keys", found=str(error)) from error
        return Sampling(
            temperature=_given(self.temperature, 1.0),
            top_k=max(0, _given(self.top_k, 0)),  # -1, as some clients say it, is all too
            top_p=_given(self.top_p, 1.0),
            seed=self.seed,
            min_p=_given(self.min_p, 0.0),
            repetition_penalty=_given(self.repetition_penalty, 1.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            presence_penalty=_given(self.presence_penalty, 0.0),
            logit_bias=biases,
        )


class CompletionBody(_Generating):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = False
    best_of: None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """All prompts, each a text or token ids.

        Raises:
            UsageError: there is none.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise UsageError("the prompt is empty", expected="a text, token ids, or a list of them")
        return [prompt] if isinstance(prompt[0], int) else prompt


class TextFormat(_Body):
    """`response_format`."""

    type: Literal["text"]


class ChatBody(_Generating):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    def model_post_init(self, context: Any, /) -> None:
        """The newer name of `max_tokens` counts, where both are given."""
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are reported beside each token; None: no log-probabilities at all.

        Raises:
            UsageError: some are wanted without `logprobs`.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError("top_logprobs needs logprobs", expected="logprobs: true", found="no logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value
