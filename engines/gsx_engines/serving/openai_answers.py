"""Answers of the OpenAI API: completions and chats, whole or in chunks, with the figures that load generators read.

`metrics.speculative_decoding` has the names and the form of vLLM's per-request metrics, which AIPerf reads. What only
gsx knows is in `gsx`.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.words import BRANCHES
from gsx_engines.generation.continuation import FinishReason
from gsx_engines.sampling import TokenLogprobs
from gsx_engines.serving.request import Finished, NewTokens, Request
from gsx_engines.tokens import BundleTokenizer

# JSON has no infinity; this is less than any log-probability that a float32 can have.
_LEAST_LOGPROB = -9999.0
_FINISH: dict[FinishReason, str] = {
    "end-of-text": "stop",
    "stopped": "stop",
    "length": "length",
    "context": "length",
}

Kind = Literal["completion", "chat"]
_OBJECTS: dict[Kind, tuple[str, str, str]] = {  # of a whole answer, of a chunk, the beginning of an id
    "completion": ("text_completion", "text_completion", "cmpl-"),
    "chat": ("chat.completion", "chat.completion.chunk", "chatcmpl-"),
}


class Answer:
    """Shapes the answers to one HTTP request.

    Args:
        kind: what was asked for.
        model: its name, as requests name it.
        requests: one for each prompt.
        choices: of each prompt.
        echo: texts that come before the new ones, one for each prompt; empty for none.
        tokenizer: for the texts of tokens.
        manifest: of the model.
    """

    def __init__(
        self,
        kind: Kind,
        model: str,
        requests: Sequence[Request],
        choices: int,
        echo: Sequence[str],
        tokenizer: BundleTokenizer,
        manifest: Manifest,
    ) -> None:
        self.requests, self.choices = requests, choices
        self._kind, self._echo, self._tokenizer, self._manifest = kind, echo, tokenizer, manifest
        whole, chunk, prefix = _OBJECTS[kind]
        self._head = {"id": prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}
        self._whole, self._chunk = whole, chunk
        # Of each choice: the length of its text so far, for offsets of log-probabilities.
        self._lengths = [0] * (len(requests) * choices)

    def request_of(self, index: int) -> Request:
        """The request of a choice."""
        return self.requests[index // self.choices]

    def whole(self, news: Sequence[Sequence[NewTokens]], results: Sequence[Finished]) -> dict[str, Any]:
        """The answer in one piece: what each choice got, and how it ended."""
        choices = []
        for index, (pieces, result) in enumerate(zip(news, results, strict=True)):
            new = NewTokens(
                tuple(token for one in pieces for token in one.ids),
                "".join(one.text for one in pieces),
                tuple(one for piece in pieces for one in piece.logprobs),
            )
            text = (self._echo[index // self.choices] if self._echo else "") + new.text
            logprobs = self._logprobs(index, new, result)
            body: dict[str, Any] = {"text": text}
            if self._kind == "chat":
                body = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": index, **body, "logprobs": logprobs, "finish_reason": _FINISH[result.finish]})
        kept = [[row.tolist() for piece in pieces for row in piece.kept] for pieces in news]
        return {
            **self._head,
            "object": self._whole,
            "choices": choices,
            "usage": self.usage(results),
            **self.figures(results),
            **({"kept": kept} if any(kept) else {}),
        }

    def first_chunks(self) -> list[dict[str, Any]]:
        """The chunks before any token: a chat's role, a completion's echo."""
        if self._kind == "chat":
            roles = range(len(self._lengths))
            return [self._chunk_of(index, {"delta": {"role": "assistant", "content": ""}}) for index in roles]
        echoed = [(index, self._echo[index // self.choices]) for index in range(len(self._lengths)) if self._echo]
        return [self._chunk_of(index, {"text": text}) for index, text in echoed]

    def chunk(self, index: int, new: NewTokens) -> dict[str, Any]:
        """A chunk with new tokens of a choice."""
        body: dict[str, Any] = {"text": new.text}
        if self._kind == "chat":
            body = {"delta": {"content": new.text}}
        made = self._chunk_of(index, body, self._logprobs(index, new, None))
        if new.kept:
            made["kept"] = [row.tolist() for row in new.kept]
        return made

    def last_chunk(self, index: int, result: Finished) -> dict[str, Any]:
        """The chunk that ends a choice."""
        body: dict[str, Any] = {"delta": {}} if self._kind == "chat" else {"text": ""}
        return self._chunk_of(index, body, None, _FINISH[result.finish])

    def usage_chunk(self, results: Sequence[Finished]) -> dict[str, Any]:
        """The chunk behind all others, with the usage and the figures."""
        return {
            **self._head,
            "object": self._chunk,
            "choices": [],
            "usage": self.usage(results),
            **self.figures(results),
        }

    def usage(self, results: Sequence[Finished]) -> dict[str, Any]:
        """Counts of tokens; a prompt counts once, however many choices it has."""
        prompt = sum(len(request.prompt) for request in self.requests)
        new = sum(result.stats.new_tokens for result in results)
        cached = sum(result.cached_tokens for result in results[:: self.choices])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def figures(self, results: Sequence[Finished]) -> dict[str, Any]:
        """What drafts and keep rules did, over all choices."""
        found: dict[str, Any] = {"gsx": self._gsx(results)}
        if any(request.speculative for request in self.requests):
            found["metrics"] = {"speculative_decoding": speculative_figures(results)}
        return found

    def _gsx(self, results: Sequence[Finished]) -> dict[str, Any]:
        manifest, keep = self._manifest, self.requests[0].keep
        kept = sum(result.stats.kept_rows for result in results)
        gated = sum(result.stats.gated_rows for result in results)
        share = kept / gated if gated else None
        held = sum(result.stats.held_gated_rows for result in results)
        branches = manifest.decoder.num_layers * len(BRANCHES)
        left_out = len(manifest.skippable_places) * (1 - share) if share is not None else 0.0
        budget = keep.budget
        if budget is None and manifest.selection is not None and not keep.given:
            budget = manifest.selection.budget
        return {
            "budget": budget,
            "keep": str(keep),
            "kept_share": share,
            "held_share": sum(result.stats.held_kept_rows for result in results) / held if held else None,
            "layers_per_token": None if share is None and manifest.policy else (branches - left_out) / len(BRANCHES),
            "layers": manifest.decoder.num_layers,
            "waited_seconds": max(result.waited_seconds for result in results),
            "first_token_seconds": max(result.first_token_seconds for result in results),
            "decode_seconds": max(result.stats.decode_seconds for result in results),
        }

    def _chunk_of(
        self, index: int, body: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, **body, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "object": self._chunk, "choices": [choice]}

    def _logprobs(self, index: int, new: NewTokens, result: Finished | None) -> dict[str, Any] | None:
        """Log-probabilities of new tokens, and of an echoed prompt's in a whole answer."""
        request = self.request_of(index)
        if request.logprobs is None:
            return None
        if self._kind == "chat":
            return {"content": [self._chat_token(*one) for one in zip(new.ids, new.logprobs, strict=True)]}
        tokens: list[tuple[int, TokenLogprobs | None]] = list(zip(new.ids, new.logprobs, strict=True))
        if request.prompt_logprobs and result is not None:
            tokens = [*zip(request.prompt, (None, *result.prompt_logprobs), strict=True), *tokens]
        texts = [self._tokenizer.token_text(token) for token, _ in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._lengths[index])
            self._lengths[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if one is None else _finite(one.logprob) for _, one in tokens],
            "top_logprobs": [None if one is None else self._by_text(one) for _, one in tokens],
            "text_offset": offsets,
        }

    def _by_text(self, found: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens by their texts; of several that are parts of characters, the likeliest."""
        named = [(self._tokenizer.token_text(token), _finite(logprob)) for token, logprob in found.top]
        return dict(reversed(named))

    def _chat_token(self, token: int, found: TokenLogprobs) -> dict[str, Any]:
        top = [self._named(other, logprob) for other, logprob in found.top]
        return {**self._named(token, found.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.token_text(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


def speculative_figures(results: Sequence[Finished]) -> dict[str, Any]:
    """How drafts fared; a step is a verification of drafted tokens."""
    rounds = [one for result in results for one in result.stats.draft_rounds]
    drafted, accepted = sum(one for one, _ in rounds), sum(right for _, right in rounds)
    longest = max((one for one, _ in rounds), default=0)
    counts = Counter(right for _, right in rounds)
    return {
        "num_spec_tokens": longest,
        "num_spec_steps": len(rounds),
        "num_draft_tokens": drafted,
        "num_accepted_draft_tokens": accepted,
        "draft_acceptance_rate": accepted / drafted if drafted else 0.0,
        "mean_acceptance_length": 1 + accepted / len(rounds) if rounds else 1.0,
        "acceptance_histogram": [counts[number] for number in range(longest + 1)],
        "per_step_accepted": [right for _, right in rounds],
        "per_step_drafted": [one for one, _ in rounds],
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
