"""`gsx generate`: a bundle continues a text.

Connects the tokenizer, the runner and the decoding loop; text is streamed as soon as it forms whole characters. Needs
neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gsx.backend_names import BackendName, Device
from gsx.backends import open_backend
from gsx.defaults import NEW_TOKENS
from gsx.workflows.hub import open_named
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.bundle.cost import step_bytes
from gsx_engines.bundle.drafts import DraftKind, LayersDraft
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.generation.continuation import FinishReason
from gsx_engines.generation.generate import generate as continue_prompts
from gsx_engines.generation.stats import GenerationStats
from gsx_engines.runners.select import open_runner
from gsx_engines.sampling import Sampling, TokenLogprobs, check_logprobs
from gsx_engines.speculation.adapt import Adaptation, SkipSetSearch, first_set
from gsx_engines.speculation.draft import FullDepthDraft, open_draft
from gsx_engines.speculation.spec import check_draft, check_leaves_out, check_speculation, parse_draft
from gsx_engines.tokens import TOKENIZER, BundleTokenizer, TextWriter, check_text
from gsx_plugins.errors import UsageError

# The draft whose set of layers is searched while generating.
ADAPTIVE = "layers:auto"


@dataclass(frozen=True)
class GenerateResult:
    """The text that a bundle generated.

    Args:
        text: the new text, up to a stop text; None if the bundle has no tokenizer (ids in, ids out).
        ids: the new tokens.
        prompt_ids: the prompt as tokens.
        finish: why it ended; "stopped" for a stop text.
        logprobs: for each new token its log-probability, and the likeliest tokens; None if they were not wanted.
        budget: the budget in use; None if the keep rule has no budget.
        keep: the keep settings, in words.
        draft: the draft in use at the end, e.g. "exit:2"; None for plain decoding.
        adaptation: what the search for a set of layers did while generating; None without such a search.
        stats: counters and times.
    """

    text: str | None
    ids: list[int]
    prompt_ids: list[int]
    finish: FinishReason
    logprobs: list[TokenLogprobs] | None
    budget: float | None
    keep: str
    draft: str | None
    adaptation: Adaptation | None
    stats: GenerationStats

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        stats = self.stats
        return {
            "text": self.text,
            "ids": self.ids,
            "prompt_ids": self.prompt_ids,
            "finish": self.finish,
            "logprobs": None if self.logprobs is None else [asdict(one) for one in self.logprobs],
            "budget": self.budget,
            "keep": self.keep,
            "draft": self.draft,
            "adaptation": asdict(self.adaptation) if self.adaptation else None,
            "stats": {
                "prompt_tokens": stats.prompt_tokens,
                "new_tokens": stats.new_tokens,
                "prefill_seconds": stats.prefill_seconds,
                "decode_seconds": stats.decode_seconds,
                "decode_steps": stats.decode_steps,
                "decode_tokens_per_second": stats.decode_tokens_per_second,
                "draft_seconds": stats.draft_seconds,
                "verify_seconds": stats.verify_seconds,
                "search_seconds": stats.search_seconds,
                "drafted_by_place": list(stats.drafted),
                "accepted_by_place": list(stats.accepted),
                "acceptance": stats.acceptance,
                "tokens_per_verification": stats.tokens_per_verification,
                "kept_share": stats.kept_share,
                "held_share": stats.held_share,
            },
        }


def generate(
    bundle: Bundle | str | Path,
    prompt: str | None = None,
    *,
    ids: Sequence[int] | None = None,
    budget: float | None = None,
    layers: str | None = None,
    exit_layer: int | None = None,
    speedup: float | None = None,
    exit_threshold: float | None = None,
    loops: int | None = None,
    hold: bool = False,
    max_new_tokens: int = NEW_TOKENS,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    logprobs: int | None = None,
    stop: Sequence[str] = (),
    speculative: bool | None = None,
    draft: str | None = None,
    draft_length: int | None = None,
    threads: int | None = None,
    backend: BackendName = "onnxruntime",
    device: Device | None = None,
    on_text: Callable[[str], None] = lambda text: None,
) -> GenerateResult:
    """Continue a text.

    Args:
        bundle: an opened bundle or its directory.
        prompt: the text to continue; exactly one of prompt and ids is given.
        ids: the prompt as token ids.
        budget: share of skippable work to keep; None for the exported one.
        layers: the layers that run, e.g. "0-5,8.attn", where the policy is a set of layers; None for the exported ones.
        exit_layer: how many layers run, instead of `layers`.
        speedup: target of Unified Layer Skipping, instead of `layers`.
        exit_threshold: confidence at which a token exits, with policy calm; None for the exported one.
        loops: how many loops of a looped model run, with policy loops; None for the exported number.
        hold: move the thresholds of new tokens so that these keep the budget's share on this text too.
        max_new_tokens: the largest number of new tokens.
        temperature: 0 is greedy.
        top_k: sample from the k most likely tokens; 0: from all.
        top_p: sample from the most likely tokens that together reach this probability.
        seed: seed of the random numbers; None for a new one each time.
        min_p: only tokens at least this share as likely as the most likely one; 0: all.
        repetition_penalty: divides the logits of tokens of the prompt and the new text (multiplies those below 0).
        frequency_penalty: taken off a token's logit for each time that it is in the new text.
        presence_penalty: taken off a token's logit if it is in the new text.
        logit_bias: added to the logits of tokens, by id.
        logprobs: report each token's log-probability, and those of so many most likely tokens; None: none.
        stop: texts that end the generation; they are left out of the result.
        speculative: whether to draft and verify, which changes the speed and not the text; None: if the bundle has
            a draft.
        draft: another draft than the bundle's: `exit:E`, `budget:B`, `layers:SET`, or `layers:auto` to begin with the
            bundle's set, or an even one, and improve it while generating.
        draft_length: tokens drafted before a verification; 0 for plain decoding; None to find it while generating.
        threads: number of threads of the runtime; None for its own choice.
        backend: the runtime; the TensorRT ones run engines from `gsx build`, PyTorch runs the weights directly.
        device: where PyTorch runs; None for a GPU if PyTorch sees one, else the CPU.
        on_text: called with each piece of new text as it is generated.
    Returns: the new text and tokens, why they ended, and counters and times.
    Raises:
        GsxError: an option, the bundle or the prompt cannot be used.
    Example:
        >>> result = gsx.generate("out/demo", "def main(", budget=0.5, max_new_tokens=8)
        >>> result.stats.new_tokens
        8
    """
    _check_texts(prompt, ids, stop)
    sampling = Sampling(
        temperature,
        top_k,
        top_p,
        seed,
        min_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        logit_bias or {},
    )
    keep = KeepSettings(budget, layers, exit_layer, speedup, exit_threshold, loops, hold)
    needs_text = prompt is not None or bool(stop)
    source = Generator(
        bundle,
        keep,
        sampling,
        logprobs=logprobs,
        speculative=speculative,
        draft=draft,
        draft_length=draft_length,
        threads=threads,
        backend=backend,
        device=device,
        needs_text=needs_text,
    )
    if ids is None:
        assert source.tokenizer is not None
        ids = source.tokenizer.encode_prompt(prompt or "")
    return source.generate(list(ids), max_new_tokens, stop, on_text)


class Generator:
    """A bundle that is open for generating, with all that stays the same from prompt to prompt.

    Args:
        bundle, keep, sampling, logprobs, speculative, draft, draft_length, threads, backend, device: as in `generate`.
        needs_text: whether a bundle without a tokenizer is refused.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        keep: KeepSettings,
        sampling: Sampling,
        *,
        logprobs: int | None = None,
        speculative: bool | None = None,
        draft: str | None = None,
        draft_length: int | None = None,
        threads: int | None = None,
        backend: BackendName = "onnxruntime",
        device: Device | None = None,
        needs_text: bool = True,
    ) -> None:
        if threads is not None and threads < 1:
            raise UsageError("threads", expected="at least 1", found=str(threads))
        check_logprobs(logprobs)
        self.bundle = open_named(bundle)
        manifest = self.bundle.manifest
        sampling.check_ids(manifest.decoder.vocab_size)
        controls_for(manifest, keep)  # refuse bad keep settings before anything is loaded
        drafting = _drafting(manifest, speculative, draft, draft_length)
        self.tokenizer: BundleTokenizer | None = None
        if needs_text or (self.bundle.directory / TOKENIZER).is_file():
            self.tokenizer = BundleTokenizer(self.bundle)
        self._keep, self._sampling, self._logprobs, self._draft_length = keep, sampling, logprobs, draft_length
        runtime = open_backend(backend, device, threads)
        self._draft = open_draft(self.bundle, drafting, threads, runtime) if drafting else None
        self._runner = self._draft.runner if self._draft else open_runner(self.bundle, threads, runtime)
        self._search: SkipSetSearch | None = None
        if draft == ADAPTIVE and self._draft is not None:
            assert isinstance(self._draft, FullDepthDraft)
            self._search = SkipSetSearch(self._draft, step_bytes(self.bundle))

    def generate(
        self,
        prompt_ids: list[int],
        max_new_tokens: int,
        stop: Sequence[str],
        on_text: Callable[[str], None],
        stop_ids: frozenset[int] | None = None,
    ) -> GenerateResult:
        """Continue a prompt.

        Args:
            prompt_ids: the prompt.
            max_new_tokens, stop, on_text: as in `generate`.
            stop_ids: tokens that end the text and are no part of it; None for the model's end-of-text tokens.
        """
        writer = TextWriter(self.tokenizer.stream(prompt_ids), stop, on_text) if self.tokenizer else None

        def write(_sequence: int, token: int) -> bool:
            return writer is not None and token not in (stop_ids or ()) and writer.push(token)

        result = continue_prompts(
            self._runner,
            [prompt_ids],
            max_new_tokens=max_new_tokens,
            keep=self._keep,
            sampling=self._sampling,
            stop_ids=None if stop_ids is None else sorted(stop_ids),
            draft=self._draft,
            draft_length=self._draft_length,
            search=self._search,
            logprobs=self._logprobs,
            on_token=write,
        )
        sequence = result.sequences[0]
        selection, budget = self.bundle.manifest.selection, self._keep.budget
        return GenerateResult(
            text=writer.finish() if writer else None,
            ids=sequence.tokens,
            prompt_ids=prompt_ids,
            finish=sequence.finish,
            logprobs=None if self._logprobs is None else sequence.logprobs,
            budget=(selection.budget if budget is None else budget) if selection else None,
            keep=str(self._keep),
            draft=str(self._draft.kind) if self._draft else None,
            adaptation=self._search.found if self._search else None,
            stats=result.stats,
        )


def _check_texts(prompt: str | None, ids: Sequence[int] | None, stop: Sequence[str]) -> None:
    """Refuse a prompt or a stop text that makes no sense."""
    if (prompt is None) == (ids is None):
        raise UsageError("the prompt is unclear", expected="a text or --ids", found="both" if ids else "neither")
    if "" in stop:
        raise UsageError("a stop text is empty", expected="at least one character")
    for given in (prompt or "", *stop):
        check_text(given)


def _drafting(
    manifest: Manifest, speculative: bool | None, draft: str | None, draft_length: int | None
) -> DraftKind | None:
    """The draft to use; None for plain decoding."""
    own = manifest.draft.draft if manifest.draft else None
    if (speculative is False and (draft is not None or draft_length)) or (speculative and draft_length == 0):
        raise UsageError(
            "both plain decoding and a draft were requested",
            expected="one of them",
            found="--no-speculative with a draft, or --speculative with length 0",
        )
    if draft is not None:
        chosen = _adaptive(manifest) if draft == ADAPTIVE else parse_draft(draft)
        check_draft(chosen, manifest)
        return chosen if draft_length != 0 else None
    if speculative is False or draft_length == 0:
        return None
    if own is None and (speculative or draft_length is not None):
        check_speculation(manifest)
        raise UsageError(
            "this bundle has no draft",
            expected="one that was exported with --draft",
            todo="gsx export MODEL --draft auto, or on a gated bundle --draft budget:B here",
        )
    return own


def _adaptive(manifest: Manifest) -> LayersDraft:
    """The set that a search begins with."""
    own = manifest.draft.draft if manifest.draft else None
    if isinstance(own, LayersDraft):
        return own
    check_speculation(manifest)
    check_leaves_out(ADAPTIVE, manifest)
    return first_set(manifest)
