"""A gsx bundle as an engine of NVIDIA Dynamo, which routes the requests of an OpenAI front end to many such workers.

    pip install ai-dynamo gsx
    python -m dynamo.frontend --discovery-backend file --http-port 8000
    python examples/dynamo_engine.py out/my-model --discovery-backend file

A thin adapter over Dynamo's Python interface (`dynamo.common.backend.LLMEngine`): Dynamo makes token ids of texts and
chats and texts of ids, and ends at stop texts; the scheduler is the one of `gsx serve`. What a worker leaves out is an
option of the worker (`--budget`), since Dynamo's requests have no field for it: run workers of several budgets under
several names. docs/scaling.md says how it was run.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from dynamo._core import Context
from dynamo.common.backend.engine import EngineConfig, GenerateChunk, GenerateRequest, LLMEngine, LlmRegistration
from dynamo.common.backend.run import run
from dynamo.common.backend.worker import WorkerConfig
from dynamo.common.utils.token_ids import normalize_request_token_ids
from dynamo.llm.exceptions import InvalidArgument, WorkerUnavailable

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.chat import template_in
from gsx_engines.errors import LostGpuError
from gsx_engines.sampling import Sampling
from gsx_engines.serving.request import Finished, NewTokens, OverloadedError, Request
from gsx_engines.serving.scheduler import Scheduler
from gsx_engines.speculation.draft import open_draft_runner
from gsx_plugins.errors import UsageError

_SAMPLING = ("top_p", "top_k", "min_p", "seed", "repetition_penalty", "frequency_penalty", "presence_penalty")
# Why a text ended: gsx's word -> Dynamo's.
_FINISH = {"end-of-text": "stop", "stopped": "stop", "length": "length", "context": "length"}
# None: the request was cancelled.
Event = NewTokens | Finished | Exception | None


class GsxEngine(LLMEngine):
    """One worker. Args: options: of the command line."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._scheduler: Scheduler | None = None
        self._thread: threading.Thread | None = None

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[GsxEngine, WorkerConfig]:
        """See `BaseEngine`."""
        parser = argparse.ArgumentParser(description="Serve a gsx bundle as a worker of NVIDIA Dynamo.")
        parser.add_argument("bundle", type=Path)
        parser.add_argument("--name", help="the model's name in requests; default: the bundle's directory")
        parser.add_argument("--budget", type=float, help="share of (token, branch) pairs kept; as exported")
        parser.add_argument("--speculative", action="store_true", help="draft and verify with the bundle's draft")
        parser.add_argument("--slots", type=int, default=8, help="active requests")
        parser.add_argument("--queue", type=int, default=64, help="requests that may wait")
        parser.add_argument("--backend", default="onnxruntime", help="onnxruntime, tensorrt or tensorrt-rtx")
        parser.add_argument("--threads", type=int, help="of ONNX Runtime")
        parser.add_argument("--namespace", default="dynamo")
        parser.add_argument("--discovery-backend", default="etcd", help="as of dynamo.frontend")
        options = parser.parse_args(argv)
        options.name = options.name or options.bundle.resolve().name
        config = WorkerConfig(
            namespace=options.namespace,
            component="gsx-" + re.sub("[^a-z0-9]+", "-", options.name.lower()),  # workers of one component are replicas
            model_name=str(options.bundle.resolve()),  # where Dynamo finds the tokenizer and the chat template
            served_model_name=options.name,
            endpoint_types="chat,completions" if template_in(options.bundle) else "completions",
            discovery_backend=options.discovery_backend,
            enable_kv_routing=False,
        )
        return cls(options), config

    async def start(self, worker_id: int) -> EngineConfig:
        """See `BaseEngine`."""
        options = self._options
        bundle = open_bundle(options.bundle)
        own = bundle.manifest.draft.draft if bundle.manifest.draft else None
        runner = open_draft_runner(bundle, own, options.threads, options.backend)
        self._scheduler = Scheduler(runner, slots=options.slots, queue=options.queue)
        await asyncio.to_thread(self._scheduler.warm_up)
        self._thread = threading.Thread(target=self._work, args=(self._scheduler,), name="scheduler", daemon=True)
        self._thread.start()
        registration = LlmRegistration(context_length=self._scheduler.context, max_num_seqs=options.slots)
        return EngineConfig(model=str(options.bundle.resolve()), served_model_name=options.name, llm=registration)

    @staticmethod
    def _work(scheduler: Scheduler) -> None:
        """Make all steps. A worker that has lost its GPU ends as it does by a signal."""
        scheduler.run()
        if scheduler.failure is not None:
            os.kill(os.getpid(), signal.SIGTERM)

    async def generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateChunk, None]:
        """See `LLMEngine`."""
        assert self._scheduler is not None
        normalize_request_token_ids(request)
        client = _Client(context)
        try:
            self._scheduler.submit(self._request(request), client)
            while True:
                event = await client.events.get()
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    yield {"token_ids": [], "index": 0, "finish_reason": "cancelled"}
                    return
                if isinstance(event, Finished):
                    yield _last(event)
                    return
                yield {"token_ids": list(event.ids), "index": 0}
        except UsageError as error:
            raise InvalidArgument(error.message) from error
        except (OverloadedError, LostGpuError) as error:
            raise WorkerUnavailable(error.message) from error
        finally:
            client.left = True

    async def cleanup(self) -> None:
        """See `BaseEngine`."""
        if self._scheduler is not None and self._thread is not None:
            self._scheduler.close()
            await asyncio.to_thread(self._thread.join)

    def _request(self, asked: GenerateRequest) -> Request:
        assert self._scheduler is not None
        sampling, stops = asked.get("sampling_options") or {}, asked.get("stop_conditions") or {}
        if sampling.get("n") not in (None, 1):
            raise UsageError("several choices (n) are not supported", expected="1", found=str(sampling["n"]))
        if sampling.get("guided_decoding"):
            raise UsageError("guided decoding is not supported")
        if stops.get("min_tokens"):
            raise UsageError("min_tokens is not supported", expected="0", found=str(stops["min_tokens"]))
        prompt = asked["token_ids"]
        given = {name: sampling[name] for name in _SAMPLING if sampling.get(name) is not None}
        if given.get("top_k", 0) < 0:
            del given["top_k"]  # -1: all
        temperature, most = sampling.get("temperature"), stops.get("max_tokens")
        # The hidden ones are the model's end-of-text tokens; without any, the bundle's own apply.
        ends = () if stops.get("ignore_eos") else stops.get("stop_token_ids_hidden") or ()
        stop_ids = frozenset([*ends, *(stops.get("stop_token_ids") or ())])
        return Request(
            prompt=prompt,
            max_new_tokens=max(1, self._scheduler.context - len(prompt)) if most is None else most,
            keep=KeepSettings(budget=self._options.budget),
            sampling=Sampling(temperature=1.0 if temperature is None else temperature, **given),
            stop_ids=stop_ids if stop_ids or stops.get("ignore_eos") else None,
            speculative=self._options.speculative,
        )


class _Client:
    """Passes events from the scheduler's thread to the event loop. See `gsx_engines.serving.request.Client`."""

    def __init__(self, context: Context) -> None:
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.left = False
        self._context, self._loop = context, asyncio.get_running_loop()

    def tokens(self, new: NewTokens) -> None:
        self._put(new)

    def finished(self, result: Finished) -> None:
        self._put(result)

    def failed(self, error: Exception) -> None:
        self._put(error)

    def is_gone(self) -> bool:
        return self.left or bool(self._context.is_stopped())

    def dropped(self) -> None:
        self._put(None)

    def _put(self, event: Event) -> None:
        self._loop.call_soon_threadsafe(self.events.put_nowait, event)


def _last(result: Finished) -> GenerateChunk:
    stats = result.stats
    usage: dict[str, Any] = {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.new_tokens,
        "total_tokens": stats.prompt_tokens + stats.new_tokens,
        "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
    }
    return {"token_ids": [], "index": 0, "finish_reason": _FINISH[result.finish], "completion_usage": usage}


if __name__ == "__main__":
    run(GsxEngine)
