"""`gsx serve` under mixed requests for a long time: that no text changes, none is lost, and memory stays flat.

    python -m benchmarks.openai_soak --work DIR [--minutes 30]

16 clients ask again and again for the requests of `serving.mixed`: other lengths, budgets, seeds and stop texts, with
and without the draft, streamed and whole. Every 9th client goes away after three events, and every 13th request is a
bad one. Every text is compared with what `gsx generate` writes, in this process. Before that, longer requests use every
row of the cache once, since rows take their memory when they are first used.
"""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Any

import psutil

from benchmarks.measure import Table, parse, parser, print_header
from benchmarks.openai_serving import serving
from benchmarks.serving import Here, filling, mixed, served_bundle
from gsx_engines.serving.memory import SECONDS

CLIENTS = 16
KINDS = 90
# Fields that are wrong, each in its own way; what the server answers.
BAD: Sequence[dict[str, Any]] = (
    {"max_tokens": -1},
    {"temperature": "hot"},
    {"gsx": {"budget": 7}},
    {"model": "nobody"},
    {"prompt": []},
    {"unknown": 1},
)
_BAD_STATUS = {400, 404, 422}
# How a request may end; everything else is an error.
KNOWN = ("right", "left", "refused", "wrong")


@dataclass(frozen=True)
class Asked:
    """A request's body, the text that it must get, and whether the client goes away or the request is bad."""

    body: dict[str, Any]
    text: str
    leaves: bool = False
    bad: bool = False


def bodies(here: Here, prompts: Sequence[list[int]]) -> list[Asked]:
    """The requests, with the texts that this process writes for them."""
    made = []
    for number, request in enumerate(mixed(prompts, KINDS)):
        body = _body(request) | {"stream": number % 2 == 0}
        body |= {key: request[key] for key in ("temperature", "top_k", "top_p", "seed", "stop") if key in request}
        if "budget" in request:
            body["gsx"]["budget"] = request["budget"]
        leaves = number % 9 == 0
        made.append(Asked(body | ({"stream": True} if leaves else {}), here.text(request), leaves))
        if number % 13 == 0:
            made.append(Asked(body | BAD[number // 13 % len(BAD)], "", bad=True))
    return made


def _body(request: dict[str, Any]) -> dict[str, Any]:
    """A greedy request for the API."""
    body = {"model": "model", "prompt": request["input_ids"], "max_tokens": request["max_tokens"], "temperature": 0.0}
    return body | {"stream": False, "gsx": {"speculative": request["speculative"]}}


def fill(port: int, prompts: Sequence[list[int]]) -> None:
    """Use every row of the cache once."""
    longest = [Asked(_body(one), "") for one in filling(prompts, 3 * CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        ends = Counter(pool.map(lambda one: outcome(port, one), longest))
    assert ends.keys() <= {"right", "wrong"}, ends  # whatever the text


def outcome(port: int, asked: Asked) -> str:
    """How a request ended: `right`, `wrong`, `left`, `refused`, or an error in words."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", "/v1/completions", json.dumps(asked.body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if asked.bad:
            refused = response.status in _BAD_STATUS and "error" in json.loads(response.read())
            return "refused" if refused else f"status {response.status} for a bad request"
        if response.status != http.client.OK:
            return f"status {response.status}"
        text = ""
        for number, piece in enumerate(_texts(response, streamed=asked.body["stream"])):
            text += piece
            if asked.leaves and number == 2:
                return "left" if asked.text.startswith(text) else "wrong"
        return "right" if text == asked.text else "wrong"
    except OSError as error:
        return type(error).__name__
    finally:
        connection.close()


def _texts(response: http.client.HTTPResponse, *, streamed: bool) -> Iterator[str]:
    """The pieces of an answer's text."""
    if not streamed:
        yield json.loads(response.read())["choices"][0]["text"]
        return
    while line := response.readline():
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:])["choices"]:
                yield choice["text"]


def soak(port: int, server: psutil.Process, asked: Sequence[Asked], minutes: float) -> None:
    """Ask until the time is over, and print how it went so far, ten times."""
    lines = Table("minute", "requests", *KNOWN, "errors", "server MB")
    ends: Counter[str] = Counter()
    ended = began = perf_counter()
    next_line = 0.0
    with ThreadPoolExecutor(CLIENTS) as pool:
        while ended - began < minutes * 60:
            ends.update(pool.map(lambda one: outcome(port, one), asked))
            ended = perf_counter()
            if (ended - began) / 60 >= min(next_line, minutes):
                known = [ends[name] for name in KNOWN]
                sleep(1.1 * SECONDS)  # until an idle server has given back what requests used
                size = f"{server.memory_info().rss / 1e6:.1f}"
                lines.row(f"{(ended - began) / 60:.1f}", ends.total(), *known, ends.total() - sum(known), size)
                next_line += minutes / 10
    for name in sorted(ends.keys() - set(KNOWN)):
        print(f"{ends[name]} x {name}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the example model with its draft, and soak it."""
    made = parser("openai_soak", __doc__, work="the bundle", quick={"minutes": 0.05, "threads": 1})
    made.add_argument("--minutes", type=float, default=5.0, help="how long (default: 5)")
    made.add_argument("--threads", type=int, default=1, help="of ONNX Runtime, in the server and here (default: 1)")
    args = parse(made, arguments)
    bundle, prompts = served_bundle(args.work, None, "exit:4")
    print_header(made, args, arguments)
    asked = bodies(Here(bundle, args.threads), prompts)
    with serving(bundle.directory, args.threads) as (port, server):
        fill(port, prompts)
        soak(port, server, asked, args.minutes)


if __name__ == "__main__":
    main()
