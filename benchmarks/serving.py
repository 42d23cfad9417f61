"""Serving with Triton on a CPU: that no token changes, what batching gains, what the server costs, that it lasts.

    python -m benchmarks.serving equal --work DIR    200 requests at 1, 4 and 16 at once: every token compared
    python -m benchmarks.serving speed --work DIR    streams over one; first token, tokens against this process
    python -m benchmarks.serving soak  --work DIR    minutes of mixed requests, some cancelled: tokens and memory
    python -m benchmarks.serving load  --work DIR    perf_analyzer: first token, time between tokens, tokens/s

The example model, or the benchmark model with `--shape`, is exported at budget 0.7 and served by the Triton of
`make triton`. It has a draft where requests draft; without one, server and process run the same graph. Requests come
from the example client over gRPC, in a process of its own, or from Triton's perf_analyzer:

    .venv-triton/bin/python -m pip install --no-deps --target .venv-triton/perf tritonclient==2.51.0
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from benchmarks.bundles import EXAMPLE, Workshop, exported
from benchmarks.measure import Table, parse, parser, print_header
from benchmarks.model import SHAPES
from benchmarks.prompts import held_out_prompts
from examples.triton_server import ENVIRONMENT, Server, running
from gsx.benchmarking.rounds import ratios, repeated, spread
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.generation.generate import Generation, generate
from gsx_engines.generation.stats import GenerationStats
from gsx_engines.runners.select import open_runner
from gsx_engines.sampling import Sampling
from gsx_engines.serving.repository import write_repository
from gsx_engines.tokens import BundleTokenizer, TextWriter

CLIENT = EXAMPLE.parent / "triton_client.py"
PROMPT_TOKENS = 128
BUDGETS = (None, 0.5, 0.85, 1.0)
ANALYZER = ENVIRONMENT / "perf" / "bin" / "perf_analyzer"
# Libraries that perf_analyzer needs, and their names in the server's wheel, which contain a hash.
LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12.*"}


class Clients:
    """Streams over gRPC, in a separate process that keeps running.

    Args:
        server: the server that they query.
        streams: how many.
    """

    def __init__(self, server: Server, streams: int) -> None:
        command: list[str | Path] = [ENVIRONMENT / "bin" / "python", CLIENT, "--json"]
        command += ["--url", f"127.0.0.1:{server.port + 1}"]
        self._process = subprocess.Popen(
            [*command, "--concurrency", str(streams)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answers in the order of the requests."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        for request in requests:
            self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return [json.loads(self._process.stdout.readline()) for _ in requests]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Here:
    """The same model in this process, as `gsx generate` runs it."""

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._runner, self._tokenizer = open_runner(bundle, threads), BundleTokenizer(bundle)

    def ask(self, request: dict[str, Any]) -> tuple[list[int], GenerationStats]:
        """Tokens and statistics of a request, named as the server's outputs; its speculation changes no token."""
        found, _ = self._made(request)
        return found.sequences[0].tokens, found.stats

    def text(self, request: dict[str, Any]) -> str:
        """The text of a request."""
        return self._made(request)[1].finish()

    def _made(self, request: dict[str, Any]) -> tuple[Generation, TextWriter]:
        """What is generated, and the writer that has read it."""
        how = {key: request[key] for key in ("temperature", "top_k", "top_p", "seed") if key in request}
        writer = TextWriter(self._tokenizer.stream(request["input_ids"]), request.get("stop", ()), lambda text: None)
        found = generate(
            self._runner,
            [request["input_ids"]],
            max_new_tokens=request["max_tokens"],
            keep=KeepSettings(budget=request.get("budget")),
            sampling=Sampling(**how),
            on_token=lambda _, token: writer.push(token),
        )
        return found, writer


# More tokens than any request of `mixed` has, prompt and new ones.
LONGEST = 180


def mixed(prompts: Sequence[list[int]], count: int) -> list[dict[str, Any]]:
    """Requests of all kinds: lengths, budgets, greedy and sampled, stop texts, speculative."""
    requests: list[dict[str, Any]] = []
    for n in range(count):
        request: dict[str, Any] = {
            "input_ids": prompts[n % len(prompts)][: 16 + 7 * n % 100],
            "max_tokens": 8 + 11 * n % 57,
            "speculative": n % 7 == 3,
        }
        budget = BUDGETS[n % len(BUDGETS)]
        if budget is not None:
            request["budget"] = budget
        if n % 3 == 1:
            request |= {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": n}
        if n % 5 == 2:
            request["stop"] = ["\n\n", "return"]
        requests.append(request)
    return requests


def filling(prompts: Sequence[list[int]], count: int) -> list[dict[str, Any]]:
    """Requests that are longer than those of `mixed`, half of them speculative.

    A cache takes its memory when its rows are first used. What a server grows by after these requests is a leak.
    """
    return [
        {"input_ids": (prompts[n % len(prompts)] * 2)[:LONGEST], "max_tokens": 64, "speculative": n % 2 == 1}
        for n in range(count)
    ]


def equal(server: Server, here: Here, prompts: Sequence[list[int]], count: int) -> None:
    """Every token of a set of requests, at several concurrencies."""
    requests = mixed(prompts, count)
    expected = [here.ask(request)[0] for request in requests]
    lines = Table("at once", "requests", "tokens", "tokens that differ", "errors")
    for streams in (1, 4, 16):
        clients = Clients(server, streams)
        answers = clients.ask(requests)
        clients.close()
        differ = sum(differing(answer["ids"], alone) for answer, alone in zip(answers, expected, strict=True))
        errors = sum(answer["error"] is not None for answer in answers)
        lines.row(streams, count, sum(map(len, expected)), differ, errors)


def differing(found: Sequence[int], expected: Sequence[int]) -> int:
    """Number of positions at which two sequences differ, including missing and surplus ones."""
    return sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))


def speed(server: Server, here: Here, prompts: Sequence[list[int]], rounds: int) -> None:
    """Throughput by streams; first token and time per token with one stream, against this process, in turn."""
    each = 2
    counts = (1, 2, 4, 8)
    clients = {streams: Clients(server, streams) for streams in counts}
    requests = [{"input_ids": prompt[:64], "max_tokens": 64} for prompt in prompts[: max(counts) * each]]

    def one_round() -> tuple[dict[int, float], dict[str, float], float]:
        """Tokens per second by streams; server over this process; seconds per token in this process."""
        rates = {}
        for streams in reversed(counts):
            began = perf_counter()
            answers = clients[streams].ask(requests[: streams * each])
            rates[streams] = sum(len(answer["ids"]) for answer in answers) / (perf_counter() - began)
        whole = clients[1].ask([{**request, "stream": False} for request in requests[:each]])
        alone = [here.ask(request)[1] for request in requests[:each]]
        prefill = sum(stats.prefill_seconds for stats in alone)
        decode = sum(stats.decode_seconds for stats in alone)
        against = {  # `answers` are those of one stream, the last ones
            "time to first token": sum(one["first_seconds"] for one in answers) / prefill,
            "time of a token after it": sum(one["seconds"] - one["first_seconds"] for one in answers) / decode,
            "the same by the scheduler's count": sum(one["decode_seconds"] for one in answers) / decode,
            "the same where nothing is streamed": sum(one["decode_seconds"] for one in whole) / decode,
        }
        return rates, against, decode / sum(stats.decode_steps for stats in alone)

    found = repeated(one_round, rounds)
    for one in clients.values():
        one.close()
    lines = Table("streams", "tokens/s", "/one stream")
    for streams in counts:
        rates = [one[0][streams] for one in found]
        lines.row(streams, f"{median(rates):.0f}", f"{ratios(rates, [one[0][1] for one in found]):.2f}")
    print()
    print_against([one[1] for one in found])
    print(f"\na token in this process: {1e3 * median(one[2] for one in found):.2f} ms")


def soak(server: Server, here: Here, prompts: Sequence[list[int]], minutes: float) -> None:
    """Mixed requests at 16 streams, every 9th cancelled: tokens, errors, memory of the server and its model process.

    Every row of the cache is used once before.
    """
    requests = mixed(prompts, 90)
    expected = [here.ask(request)[0] for request in requests]
    for number in range(0, len(requests), 9):
        requests[number] |= {"cancel_after": 3}
    processes = [psutil.Process(server.process.pid)]
    processes += processes[0].children(recursive=True)
    clients = Clients(server, 16)
    clients.ask(filling(prompts, 48))
    lines = Table("minute", "requests", "tokens that differ", "errors", "server MB", "model MB")
    ended = began = perf_counter()
    sent = differ = errors = 0
    next_line = 0.0
    while ended - began < minutes * 60:
        for number, answer in enumerate(clients.ask(requests)):
            if number % 9:
                differ += differing(answer["ids"], expected[number])
                errors += answer["error"] is not None
            else:
                differ += differing(answer["ids"], expected[number][: len(answer["ids"])])
        sent += len(requests)
        ended = perf_counter()
        if (ended - began) / 60 >= next_line:
            sizes = [process.memory_info().rss / 1e6 for process in processes]
            minute = f"{(ended - began) / 60:.1f}"
            lines.row(minute, sent, differ, errors, f"{sizes[0]:.1f}", f"{sum(sizes[1:]):.1f}")
            next_line += minutes / 10
    clients.close()


def load(server: Server, here: Here, prompts: Sequence[list[int]], work: Path, rounds: int) -> None:
    """perf_analyzer's streams: its client is C++, so it adds little to the server's times."""
    libraries = work / "libraries"
    libraries.mkdir(exist_ok=True)
    for name, pattern in LIBRARIES.items():
        if not (libraries / name).exists():
            (libraries / name).symlink_to(next(ENVIRONMENT.glob(f"lib/python3.*/site-packages/*.libs/{pattern}")))
    requests = [{"input_ids": prompt[:64], "max_tokens": 64} for prompt in prompts]
    data = [
        {"input_ids": {"content": one["input_ids"], "shape": [64]}, "max_tokens": [64], "stream": [True]}
        for one in requests
    ]
    (work / "load.json").write_text(json.dumps({"data": data}))
    against: list[dict[str, float]] = []
    lines = Table(
        "streams", "requests", "tokens/s", "first token ms, p50 (p99)", "then ms, p50 (p99)", "tokens a response"
    )
    for streams in (1, 2, 4, 8, 16):
        first: list[float] = []
        between: list[float] = []
        tokens, seconds = 0, 0.0
        for _ in range(rounds):
            found = _analyzed(server, work, streams, 4 + 4 * streams)
            # The last response has the statistics.
            times = [np.array([one["timestamp"], *one["response_timestamps"][:-1]]) / 1e6 for one in found]
            waits = [np.diff(one) for one in times]
            first += [one[0] for one in waits]
            between += np.concatenate([one[1:] for one in waits]).tolist()
            tokens += sum(np.size(output["output_ids"]) for one in found for output in one["response_outputs"][:-1])
            seconds += sum(one[-1] - one[0] for one in times) / 1e3
            if streams == 1:
                alone = [here.ask(request)[1] for request in requests[: len(found)]]
                prefill, decode = (
                    sum(getattr(one, f"{part}_seconds") for one in alone) for part in ("prefill", "decode")
                )
                against.append(
                    {
                        "time to first token": sum(one[0] for one in waits) / 1e3 / prefill,
                        "time of a token after it": sum(one[1:].sum() for one in waits) / 1e3 / decode,
                    }
                )
        lines.row(
            streams,
            len(first),
            f"{streams * tokens / seconds:.0f}",
            "{:.1f} ({:.1f})".format(*np.percentile(first, [50, 99])),
            "{:.2f} ({:.2f})".format(*np.percentile(between, [50, 99])),
            f"{tokens / (len(first) + len(between)):.2f}",
        )
    print()
    print_against(against)


def _analyzed(server: Server, work: Path, streams: int, requests: int) -> list[dict[str, Any]]:
    """Requests as perf_analyzer records them: when they were sent, and every response with its time, in ns."""
    profile = work / "profile.json"
    profile.unlink(missing_ok=True)
    command = [ANALYZER, "-m", "gsx", "-i", "grpc", "-u", f"127.0.0.1:{server.port + 1}", "--streaming"]
    command += ["--input-data", work / "load.json", "--concurrency-range", str(streams)]
    command += ["--request-count", str(requests)]
    command += ["--stability-percentage", "999", "--profile-export-file", profile]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(work / "libraries")}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not profile.exists():
        raise RuntimeError(f"perf_analyzer ended with code {done.returncode}\n{done.stdout}\n{done.stderr}")
    found = list(_whole_requests(profile.read_text()))
    if not found:
        raise RuntimeError(f"perf_analyzer wrote no whole request\n{done.stdout}")
    return found


def _whole_requests(profile: str) -> Iterator[dict[str, Any]]:
    """The requests of a profile, up to where it breaks off.

    perf_analyzer reads outputs that a response lacks from foreign memory, and stops writing if that is not a number
    (seen with version 2.51).
    """
    key = '"requests":['
    place, decoder = profile.index(key) + len(key), json.JSONDecoder()
    while profile[place : place + 1] == "{":
        try:
            request, place = decoder.raw_decode(profile, place)
        except json.JSONDecodeError:
            return
        yield request
        place += profile[place : place + 1] == ","


def print_against(rounds: Sequence[Mapping[str, float]]) -> None:
    """Print a table of ratios, server over this process. Args: rounds: name -> ratio, for each round."""
    lines = Table("at one stream, server / this process", "median (least to most)")
    for name in rounds[0]:
        lines.row(name, f"{spread([one[name] for one in rounds]):.3f}")


def served_bundle(work: Path, shape: str | None, draft: str | None) -> tuple[Bundle, list[list[int]]]:
    """The served bundle, made once, and prompts for it: held-out text, or random tokens of the benchmark model."""
    path = work / f"{shape or 'example'}-{'draft' if draft else 'plain'}"
    if shape is None:
        return exported(path, EXAMPLE, budget=0.7, draft=draft), held_out_prompts(EXAMPLE, 24, PROMPT_TOKENS)
    workshop = Workshop.of(work, shape)
    bundle = exported(path, workshop.model("scalar"), budget=0.7, draft=draft, calibration=workshop.text())
    rng = np.random.default_rng(0)
    return bundle, rng.integers(1, workshop.sizes["vocab_size"], (24, PROMPT_TOKENS)).tolist()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve, measure one thing, and print its tables."""
    quick = {"requests": 6, "minutes": 0.05, "threads": 1}
    made = parser("serving", __doc__, work="the bundle", rounds=7, quick=quick)
    made.add_argument("what", choices=("equal", "speed", "soak", "load"))
    made.add_argument("--shape", choices=SHAPES, help="the benchmark model of this shape, not the example model")
    made.add_argument("--requests", type=int, default=200, help="of `equal` (default: 200)")
    made.add_argument("--minutes", type=float, default=5.0, help="of `soak` (default: 5)")
    made.add_argument("--threads", type=int, help="of ONNX Runtime, in the server and here (default: its own choice)")
    made.add_argument("--port", type=int, default=18400, help="the server's first port (default: 18400)")
    args = parse(made, arguments)
    bundle, prompts = served_bundle(args.work, args.shape, "exit:4" if args.what in ("equal", "soak") else None)
    print_header(made, args, arguments)
    here = Here(bundle, args.threads)
    with TemporaryDirectory(dir=args.work) as folder:
        repository = Path(folder) / "models"
        write_repository(bundle, repository, name="gsx", threads=args.threads)
        with running(repository, port=args.port) as server:
            if args.what == "equal":
                equal(server, here, prompts, args.requests)
            elif args.what == "speed":
                speed(server, here, prompts, args.rounds)
            elif args.what == "load":
                load(server, here, prompts, args.work, args.rounds)
            else:
                soak(server, here, prompts, args.minutes)


if __name__ == "__main__":
    main()
