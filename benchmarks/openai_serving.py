"""`gsx serve` on a CPU against `gsx generate`: first token, time of a token, what eight streams gain over one, what it
costs that they have different budgets, and what a prompt costs that was read before.

    python -m benchmarks.openai_serving --work DIR [--bundle BUNDLE]

Server and this process run the same graph with as many threads, in turn. The client reads server-sent events in this
process, which does nothing else meanwhile. Without `--bundle` the example model is served, exported at budget 0.7.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from threading import Thread
from time import perf_counter
from typing import Any

import psutil

from benchmarks.measure import Table, parse, parser, print_header
from benchmarks.serving import Here, print_against, served_bundle
from gsx.benchmarking.rounds import ratios, repeated
from gsx_engines.bundle.bundle import open_bundle

STREAMS = (1, 2, 4, 8)
PROMPT, NEW = 64, 64
BUDGETS = (1.0, 0.85, 0.7, 0.5)
# Tokens of a prompt that is asked twice.
LONG = 512


@dataclass(frozen=True)
class Times:
    """Of one streamed request, in seconds: until its first event with text, and from there to its last token."""

    first: float
    rest: float
    tokens: int


@contextmanager
def serving(bundle: Path, threads: int) -> Iterator[tuple[int, psutil.Process]]:
    """A server on a free port. Yields: the port, and its process."""
    command = [sys.executable, "-m", "gsx", "serve", str(bundle), "--port", "0", "--name", "model"]
    with subprocess.Popen([*command, "--threads", str(threads)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
        try:
            yield int(line.split("http://")[1].split("/")[0].rpartition(":")[2]), psutil.Process(process.pid)
        finally:
            process.terminate()


def ask(port: int, request: dict[str, Any]) -> Times:
    """Stream one request; every token that completes a text is an event."""
    body = {"model": "model", "prompt": request["input_ids"], "max_tokens": request["max_tokens"], "temperature": 0}
    body |= {"gsx": {"budget": request.get("budget")}}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", port)
    began = perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    first = last = 0.0
    usage: dict[str, int] = {}
    while line := response.readline():
        if not line.startswith(b"data: {"):
            continue
        if b'"usage"' in line:
            usage = json.loads(line[6:])["usage"]
        else:
            last = perf_counter()
            first = first or last
    connection.close()
    return Times(first - began, last - first, usage["completion_tokens"])


def processor_seconds(process: psutil.Process) -> float:
    """What a process has used so far, in all its threads."""
    times = process.cpu_times()
    return float(times.user + times.system)


def unread(prompts: Sequence[list[int]], tokens: int) -> Iterator[list[int]]:
    """Prompts that begin differently, so that the server has read none of them: windows of the joined ones."""
    text = [token for prompt in prompts for token in prompt]
    for number in count():
        start = 17 * number % (len(text) - tokens)
        yield text[start : start + tokens]


def speed(port: int, server: psutil.Process, here: Here, prompts: Sequence[list[int]], rounds: int) -> None:
    """Throughput by streams; first token, time and processor time with one stream, against this process, in turn.

    Processor time says what the server adds, even where other programs take turns on the processors.
    """
    own = psutil.Process()
    each = 2
    new = unread(prompts, PROMPT)

    def one_round() -> tuple[dict[int, float], dict[str, float], float]:
        """Tokens per second by streams; server over this process; seconds per token in this process."""
        rates = {}
        for streams in reversed(STREAMS):
            requests = [{"input_ids": next(new), "max_tokens": NEW} for _ in range(streams * each)]
            used = processor_seconds(server)
            began = perf_counter()
            with ThreadPoolExecutor(streams) as pool:
                found = list(pool.map(lambda one: ask(port, one), requests))
            rates[streams] = sum(one.tokens for one in found) / (perf_counter() - began)
        used = processor_seconds(server) - used
        used_here = processor_seconds(own)
        alone = [here.ask(request)[1] for request in requests]  # those of one stream, which was the last
        used_here = processor_seconds(own) - used_here
        step = sum(one.decode_seconds for one in alone) / sum(one.decode_steps for one in alone)
        against = {
            "time to first token": sum(one.first for one in found) / sum(one.prefill_seconds for one in alone),
            "time of a token after it": sum(one.rest for one in found) / sum(one.tokens - 1 for one in found) / step,
            "processor time of a request": used / used_here,
        }
        return rates, against, step

    one_round()  # graphs that a batch needs are loaded on first use
    found = repeated(one_round, rounds)
    lines = Table("streams", "tokens/s", "/one stream")
    for streams in STREAMS:
        rates = [one[0][streams] for one in found]
        lines.row(streams, f"{median(rates):.1f}", f"{ratios(rates, [one[0][1] for one in found]):.2f}")
    print()
    print_against([one[1] for one in found])
    print(f"\na token in this process: {1e3 * median(one[2] for one in found):.2f} ms")


def mixed(port: int, prompts: Sequence[list[int]], rounds: int) -> None:
    """Time of eight streams with different budgets, over the mean of their times with one budget for all."""
    most, new = max(STREAMS), unread(prompts, PROMPT)

    def seconds(budgets: Sequence[float]) -> float:
        asked = [{"input_ids": next(new), "max_tokens": NEW, "budget": budgets[n % len(budgets)]} for n in range(most)]
        began = perf_counter()
        with ThreadPoolExecutor(most) as pool:
            list(pool.map(lambda one: ask(port, one), asked))
        return perf_counter() - began

    def one_round() -> tuple[float, float]:
        return seconds(BUDGETS), sum(seconds([budget]) for budget in BUDGETS) / len(BUDGETS)

    one_round()
    found = repeated(one_round, rounds)
    apart = ratios([one[0] for one in found], [one[1] for one in found])
    print(f"\n{most} streams with budgets {', '.join(map(str, BUDGETS))}: {apart:.3f} of the time with one budget")


def again(port: int, prompts: Sequence[list[int]], rounds: int) -> None:
    """First token of a prompt whose first tokens were read before, over that of one that is new."""
    new = unread(prompts, LONG)

    def one_round() -> tuple[float, float]:
        prompt = next(new)
        first = ask(port, {"input_ids": prompt, "max_tokens": 2}).first
        return ask(port, {"input_ids": [*prompt, *prompts[0][:8]], "max_tokens": 2}).first, first

    one_round()
    found = repeated(one_round, rounds)
    share = ratios([one[0] for one in found], [one[1] for one in found])
    print(f"first token of a prompt of {LONG} tokens that was read before: {share:.3f} of its time when it was new")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve, measure, and print the tables."""
    made = parser("openai_serving", __doc__, work="the bundle", rounds=5, quick={"threads": 1})
    made.add_argument("--bundle", type=Path, help="serve this one, not the example model")
    made.add_argument("--threads", type=int, default=1, help="of ONNX Runtime, in the server and here (default: 1)")
    args = parse(made, arguments)
    bundle, prompts = served_bundle(args.work, None, None)
    if args.bundle is not None:
        # The same texts, whose ids are in any vocabulary that is as large.
        bundle = open_bundle(args.bundle)
    print_header(made, args, arguments)
    with serving(bundle.directory, args.threads) as (port, server):
        speed(port, server, Here(bundle, args.threads), prompts, args.rounds)
        if bundle.manifest.selection is not None:
            mixed(port, prompts, args.rounds)
        again(port, prompts, args.rounds)


if __name__ == "__main__":
    main()
