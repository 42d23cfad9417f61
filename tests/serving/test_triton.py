"""A real Triton with what `gsx triton` wrote: every token is that of `gsx generate`, and bad requests do no harm."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

import gsx
from examples.triton_server import ENVIRONMENT, Server
from gsx.workflows.generate import GenerateResult
from gsx.workflows.triton import check_server
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.chat import ChatTemplate
from gsx_engines.tokens import BundleTokenizer
from gsx_plugins.errors import GsxError
from tests.serving.conftest import Grpc

REQUESTS: list[dict[str, Any]] = [
    {
        "text_input": "token 7 keeps layer"[n % 5 :] + " ä" * (n % 2),
        "max_tokens": 4 + 3 * (n % 7),
        **({"budget": (0.5, 1.0)[n % 2]} if n % 3 else {}),
        **({"temperature": 1.1, "top_k": 30, "top_p": 0.95, "seed": n} if n % 4 == 1 else {}),
        **({"stop": ["e", "zz"]} if n % 6 == 2 else {}),
        **({"hold": True} if n % 7 == 6 else {}),
        "speculative": n % 5 == 3,
    }
    for n in range(24)
]


@pytest.fixture(scope="module")
def expected(served: Bundle) -> Callable[[int], GenerateResult]:
    """The result of `gsx generate` for a request of `REQUESTS`."""

    @cache
    def generate(number: int) -> GenerateResult:
        request = dict(REQUESTS[number])
        options = {
            key: request[key]
            for key in ("budget", "hold", "temperature", "top_k", "top_p", "seed", "stop")
            if key in request
        }
        return gsx.generate(
            served, request["text_input"], max_new_tokens=request["max_tokens"], speculative=False, threads=1, **options
        )

    return generate


def post(server: Server, body: Any, model: str = "gsx", path: str = "generate") -> tuple[int, str]:
    """Status and answer of an HTTP request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"{server.url}/v2/models/{model}/{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def control(server: Server, model: str, action: str) -> bool:
    """Load or unload a model. Returns: whether the server did so."""
    request = urllib.request.Request(f"{server.url}/v2/repository/models/{model}/{action}", b"{}")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status == 200
    except OSError:  # a server that is busy with a dead process may drop a connection
        return False


def metric(server: Server, name: str, model: str = "gsx") -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port + 2}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f'{name}{{model="{model}"}}')).split()[-1])


def until(holds: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("concurrency", [1, 4, 16])
def test_tokens_are_those_of_generate(grpc: Grpc, expected: Callable[[int], GenerateResult], concurrency: int) -> None:
    answers = grpc(REQUESTS, concurrency)
    for number, answer in enumerate(answers):
        alone = expected(number)
        assert answer["error"] is None
        assert (answer["ids"], answer["text"]) == (alone.ids, alone.text)
        assert answer["finish_reason"] == alone.finish
        assert (answer["prompt_tokens"], answer["new_tokens"]) == (len(alone.prompt_ids), len(alone.ids))
        assert 0 <= answer["cached_tokens"] < answer["prompt_tokens"]
        if not REQUESTS[number]["speculative"]:
            # The share is of the tokens that were read.
            assert answer["kept_share"] == alone.stats.kept_share or answer["cached_tokens"]
            # One for each token, fewer where sending lags, and the statistics.
            assert 1 < answer["responses"] <= len(alone.ids) + 1
        assert 0 <= answer["waited_seconds"] <= answer["first_token_seconds"] <= answer["first_seconds"]


def test_the_check_compares_tokens(server: Server, served: Bundle) -> None:
    assert check_server(served, server.url) == 16
    with pytest.raises(GsxError, match="refused"):
        check_server(served, server.url, name="other")
    with pytest.raises(GsxError, match="no answer"):
        check_server(served, "http://127.0.0.1:1")


def test_ids_in_and_one_response(server: Server, served: Bundle) -> None:
    alone = gsx.generate(served, ids=[70, 80, 90], max_new_tokens=9, speculative=False)
    status, answer = post(server, {"input_ids": [70, 80, 90], "max_tokens": 9})
    assert status == 200
    found = json.loads(answer)
    assert (found["output_ids"], found["text_output"]) == (alone.ids, alone.text)
    assert found["finish_reason"] == alone.finish


def test_outputs_that_a_client_wants(grpc: Grpc, expected: Callable[[int], GenerateResult]) -> None:
    answer = grpc([{**REQUESTS[0], "outputs": ["kept_share"]}])[0]
    assert (answer["ids"], answer["finish_reason"]) == (expected(0).ids, expected(0).finish)
    assert answer["kept_share"] == expected(0).stats.kept_share
    assert answer["text"] == ""
    assert "new_tokens" not in answer


KEEPS: dict[str, list[dict[str, Any]]] = {
    "layers": [{}, {"layers": "0,2"}, {"exit": 2}, {"speedup": 1.5}],
    "calm": [{}, {"exit_threshold": 0.0}, {"exit_threshold": 1.0}],
    "loops": [{}, {"loops": 1}, {"loops": 2}, {"loops": 3}],
    "one-cache": [{}, {"loops": 1}, {"loops": 2}],
}


@pytest.mark.parametrize("model", KEEPS)
def test_what_other_rules_read(grpc: Grpc, server: Server, other_rules: dict[str, Bundle], model: str) -> None:
    request = {"text_input": "token 7 keeps", "max_tokens": 10}
    answers = grpc([{**request, **keep} for keep in KEEPS[model]], 4, model=model)
    for keep, answer in zip(KEEPS[model], answers, strict=True):
        asked = {"exit_layer" if name == "exit" else name: value for name, value in keep.items()}
        alone = gsx.generate(other_rules[model], request["text_input"], max_new_tokens=10, **asked)
        assert (answer["error"], answer["ids"]) == (None, alone.ids)
    assert len({tuple(answer["ids"]) for answer in answers}) > 1, "what is asked matters"
    status, refusal = post(server, {**request, "budget": 0.5}, model=model)
    assert status in (400, 500)
    assert "no budget to choose" in json.loads(refusal)["error"]


def test_server_sent_events(server: Server, expected: Callable[[int], GenerateResult]) -> None:
    status, answer = post(server, {**REQUESTS[5], "stream": True}, path="generate_stream")
    assert status == 200
    events = [json.loads(line.removeprefix("data: ")) for line in answer.splitlines() if line]
    ids = [event["output_ids"] for event in events]
    assert [one for part in ids for one in (part if isinstance(part, list) else [part])] == expected(5).ids
    assert "".join(event["text_output"] for event in events) == expected(5).text
    assert 2 < len(events) <= len(expected(5).ids) + 1
    assert all(event["output_ids"] for event in events[:-1])
    assert events[-1]["finish_reason"] == expected(5).finish


CHAT = [
    {"role": "system", "content": "self"},
    {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "clâss"}]},
]


@pytest.mark.parametrize("speculative", [False, True])
def test_a_chat_by_the_models_own_template(server: Server, grpc: Grpc, chat_bundle: Path, speculative: bool) -> None:
    bundle = open_bundle(chat_bundle)
    template = ChatTemplate(bundle, BundleTokenizer(bundle))
    prompt = template.prompt([CHAT[0], {"role": "user", "content": "the clâss"}])
    alone = gsx.generate(bundle, ids=prompt, max_new_tokens=14, speculative=False, threads=1)
    request = {"messages": json.dumps(CHAT), "max_tokens": 14, "speculative": speculative}
    status, text = post(server, request, model="chat")
    assert status == 200, text
    assert json.loads(text)["text_output"] == alone.text
    answer = grpc([request], model="chat")[0]
    assert (answer["error"], answer["text"], answer["prompt_tokens"]) == (None, alone.text, len(prompt))


BAD_CHATS = {
    "no JSON": ("[", "messages are not a chat"),
    "no list": ('{"role": "user"}', "messages are not a chat"),
    "no messages": ("[]", "at least 1 item"),
    "no role": ('[{"content": "a"}]', "0.role"),
    "an image": ('[{"role": "user", "content": [{"type": "image_url"}]}]', "messages are not a chat"),
    "half a character": (r'[{"role": "user", "content": "\udcff"}]', "messages"),
    "a long chat": (json.dumps([{"role": "user", "content": "the class " * 400}]), "longer than the context"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats(server: Server, name: str) -> None:
    text, words = BAD_CHATS[name]
    status, answer = post(server, {"messages": text}, model="chat")
    assert status in (400, 500), answer
    assert words in json.loads(answer)["error"]


FRONT_CLIENT = Path(__file__).parent / "front_client.py"
# What Triton's OpenAI front end sends -> what `gsx.generate` takes.
FRONT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"stream": True, "max_tokens": 16}, {}),
    ({"stream": False, "max_tokens": 9, "stop": ["e", "zz"], "top_p": 1.0, "temperature": 0.0}, {"stop": ["e", "zz"]}),
    (
        {"stream": True, "max_tokens": 12, "temperature": 1.5, "top_p": 0.75, "seed": 2**63 + 1},
        {"temperature": 1.5, "top_p": 0.75, "seed": 2**63 + 1},
    ),
    (
        {"stream": False, "max_tokens": 12, "frequency_penalty": 0.5, "presence_penalty": -0.25},
        {"frequency_penalty": 0.5, "presence_penalty": -0.25},
    ),
    ({"stream": True, "max_tokens": 8, "echo": True}, {}),
]


def test_requests_of_the_openai_front_end(server: Server, served: Bundle) -> None:
    """The shapes and types of its `_create_trtllm_inference_request`, and the outputs that it reads."""
    command = [ENVIRONMENT / "bin" / "python", FRONT_CLIENT, f"127.0.0.1:{server.port + 1}"]
    requests = [{"prompt": "token 7 keeps ä", **asked} for asked, _ in FRONT]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for (asked, options), request, answer in zip(FRONT, requests, answers, strict=True):
        alone = gsx.generate(
            served, request["prompt"], max_new_tokens=asked["max_tokens"], speculative=False, threads=1, **options
        )
        assert answer["error"] is None
        assert "".join(answer["texts"]) == (request["prompt"] if asked.get("echo") else "") + (alone.text or "")
        assert sum(answer["output_tokens"]) == len(alone.ids)
        assert set(answer["input_tokens"]) == {len(alone.prompt_ids)}
        assert (len(answer["texts"]) > 1) == asked["stream"]
    status, found = post(server, {"text_input": "token", "max_tokens": 3, "budget": 0.5}, model="front")
    assert status == 200, found
    wanted = gsx.generate(served, "token", max_new_tokens=3, budget=0.5, speculative=False).text
    assert json.loads(found)["text_output"] == wanted


def test_a_cancelled_request_ends_and_changes_no_other(
    server: Server, grpc: Grpc, expected: Callable[[int], GenerateResult]
) -> None:
    before = metric(server, "gsx_cancelled")
    long = {"text_input": "token", "max_tokens": 480, "cancel_after": 3}
    answers = grpc([long, REQUESTS[0], {**long, "speculative": True}, REQUESTS[6], long], 5)
    assert [answers[1]["ids"], answers[3]["ids"]] == [expected(0).ids, expected(6).ids]
    assert [answers[n]["error"] for n in (0, 2, 4)] == ["cancelled"] * 3
    # The draft may have finished before the cancellation arrived; the others had hundreds of steps to go.
    assert until(lambda: metric(server, "gsx_cancelled") >= before + 2 and metric(server, "gsx_under_way") == 0)


def test_a_client_that_goes_away_frees_its_slot(server: Server) -> None:
    body = json.dumps({"text_input": "token", "max_tokens": 480, "stream": True}).encode()
    # Where steps are quick, a request may come to its end before the server hears of it.
    ends = ("gsx_cancelled", "gsx_finished")
    before = sum(metric(server, name) for name in ends)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as raw:
            head = f"POST /v2/models/gsx/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            assert b"200 OK" in raw.recv(4096)
    assert until(lambda: sum(metric(server, name) for name in ends) == before + 3)
    assert until(lambda: metric(server, "gsx_under_way") == 0)


BAD = {
    "no prompt": ({"max_tokens": 3}, "none of them"),
    "two prompts": ({"text_input": "a", "input_ids": [70]}, "text_input and input_ids"),
    "no template": ({"messages": '[{"role": "user", "content": "a"}]'}, "no chat template"),
    "unknown field": ({"text_input": "a", "max_new_tokens": 3}, "max_new_tokens"),
    "text for a number": ({"text_input": "a", "max_tokens": "three"}, "Unable to parse"),
    "number for a text": ({"text_input": 5}, "Unable to parse"),
    "two values": ({"text_input": "a", "max_tokens": [3, 4]}, "max_tokens"),
    "no tokens": ({"text_input": "a", "max_tokens": 0}, "at least 1"),
    "negative": ({"text_input": "a", "max_tokens": -(2**63)}, "at least 1"),
    "too large": ({"text_input": "a", "max_tokens": 2**64}, "Unable to parse"),
    "budget 0": ({"text_input": "a", "budget": 0.0}, "budget"),
    "budget 1.01": ({"text_input": "a", "budget": 1.01}, "budget"),
    "long set of layers": ({"text_input": "a", "layers": "0-999," * 20_000 + "0"}, "layers is too long"),
    "no set of layers": ({"text_input": "a", "exit": 2}, "reads a set of layers"),
    "no confidence": ({"text_input": "a", "exit_threshold": 0.5}, "confidence-based exits"),
    "two choices": ({"text_input": "a", "exit": 2, "budget": 0.5}, "only one setting may decide"),
    "temperature": ({"text_input": "a", "temperature": -1.0}, "temperature"),
    "top k": ({"text_input": "a", "top_k": -1}, "top-k"),
    "top p": ({"text_input": "a", "top_p": 0.0}, "top-p"),
    "long text": ({"text_input": "a" * 600}, "context"),
    "very long text": ({"text_input": "a" * 200_000}, "too long"),
    "long ids": ({"input_ids": [70] * 600}, "longer than the context"),
    "foreign id": ({"input_ids": [70, 10**9]}, "outside the vocabulary"),
    "empty stop": ({"text_input": "a", "stop": [""]}, "an empty one"),
    "many stops": ({"text_input": "a", "stop": ["b"] * 17}, "at most 16"),
    "long stop": ({"text_input": "a", "stop": ["b" * 300]}, "256 bytes"),
    "no JSON": (b"{", "JSON"),
    "not UTF-8": (b'{"text_input": "a\xff"}', "UTF-8"),
    "a path": ({"text_input": "a", "model_repository": "/etc"}, "model_repository"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_with_a_message(server: Server, name: str) -> None:
    body, words = BAD[name]
    status, answer = post(server, body)
    assert status in (400, 500), answer
    assert words in json.loads(answer)["error"]
    assert "Traceback" not in answer


def test_numbers_that_json_does_not_have_are_refused(grpc: Grpc) -> None:
    bad = [{name: value} for name in ("budget", "temperature", "top_p") for value in (float("nan"), float("inf"))]
    answers = grpc([{"text_input": "a", **one} for one in bad])
    assert ["expected a number" in answer["error"] for answer in answers] == [True] * len(bad)


def test_a_huge_limit_ends_at_the_context(server: Server) -> None:
    status, answer = post(server, {"input_ids": [70], "max_tokens": 2**62, "temperature": 2.0, "seed": 1})
    assert status == 200
    assert json.loads(answer)["finish_reason"] in ("context", "end-of-text")


def test_a_full_queue_refuses_and_serves_the_rest(grpc: Grpc, served: Bundle) -> None:
    alone = gsx.generate(served, "token", max_new_tokens=150, speculative=False).ids
    answers = grpc([{"text_input": "token", "max_tokens": 150}] * 12, 6, model="small")
    refused = [answer for answer in answers if answer["error"]]
    assert refused
    assert len(refused) < len(answers)
    assert all("more requests than it can handle" in answer["error"] for answer in refused)
    assert all(answer["ids"] == alone for answer in answers if not answer["error"])


def test_a_killed_model_process_is_reported_and_comes_back(server: Server, served: Bundle) -> None:
    """Triton does not start it again by itself: requests fail at once, unload and load bring it back."""
    stubs = [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if "more/small" in " ".join(child.cmdline())
    ]
    assert stubs
    for stub in stubs:
        os.kill(stub.pid, signal.SIGKILL)
    request = {"input_ids": [70, 71], "max_tokens": 4}
    status, answer = post(server, request, model="small")
    assert status != 200
    assert json.loads(answer)["error"]
    assert post(server, request)[0] == 200, "the other model goes on"
    for action in ("unload", "load"):
        assert until(lambda action=action: control(server, "small", action)), f"{action}: {server.process.poll()}"
    assert until(lambda: post(server, request, model="small")[0] == 200)
    found = json.loads(post(server, request, model="small")[1])["output_ids"]
    assert found == gsx.generate(served, ids=[70, 71], max_new_tokens=4, speculative=False).ids
