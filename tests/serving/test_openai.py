"""A real `gsx serve`: the official client's calls give the tokens of `gsx generate`, and bad requests do no harm."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

import gsx
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.chat import ChatTemplate
from gsx_engines.tokens import BundleTokenizer
from tests.gsx.command_line import GSX
from tests.serving.openai_server import HttpServer, serving, until

PROMPT = "token 7 keeps ä"


@pytest.fixture(scope="module")
def gated(make_tiny_bundle: Callable[..., Path]) -> Bundle:
    """Gates, a tokenizer, a draft."""
    return open_bundle(make_tiny_bundle(draft="exit:2"))


@pytest.fixture(scope="module")
def server(gated: Bundle) -> Iterator[HttpServer]:
    with serving(gated.directory, "--slots", 4, "--queue", 8) as found:
        yield found


@pytest.fixture(scope="module")
def chatting(chat_bundle: Path) -> Iterator[HttpServer]:
    """A chat model of another policy, behind a key."""
    with serving(chat_bundle, key="secret") as found:
        yield found


# What a request asks for -> what `gsx.generate` takes.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({"temperature": 0}, {}),
    "sampled": (
        {"temperature": 1.1, "top_p": 0.95, "seed": 3, "extra_body": {"top_k": 30, "min_p": 0.01}},
        {"temperature": 1.1, "top_p": 0.95, "seed": 3, "top_k": 30, "min_p": 0.01},
    ),
    "penalties": (
        {"temperature": 0, "frequency_penalty": 0.5, "presence_penalty": 0.3, "logit_bias": {"101": -100}},
        {"frequency_penalty": 0.5, "presence_penalty": 0.3, "logit_bias": {101: -100}},
    ),
    "repetition": (
        {"temperature": 0, "extra_body": {"repetition_penalty": 1.3}},
        {"repetition_penalty": 1.3},
    ),
    "budget": ({"temperature": 0, "extra_body": {"gsx": {"budget": 0.5}}}, {"budget": 0.5}),
    "held": (
        {"temperature": 0, "extra_body": {"gsx": {"budget": 0.6, "hold": True}}},
        {"budget": 0.6, "hold": True},
    ),
    "stop": ({"temperature": 0, "stop": ["e", "zz"]}, {"stop": ["e", "zz"]}),
    "speculative": ({"temperature": 0, "extra_body": {"gsx": {"speculative": True, "draft_length": 3}}}, {}),
}
# Tokens of a long prompt, and of the one that others continue: more than the scheduler reads between two steps.
LONG = 400
FINISH = {"length": "length", "end-of-text": "stop", "stopped": "stop", "context": "length"}


def extra(answer: BaseModel) -> dict[str, Any]:
    """What an answer has beside OpenAI's own fields."""
    assert answer.model_extra is not None
    return answer.model_extra


@pytest.mark.parametrize("way", WAYS)
def test_completions(server: HttpServer, gated: Bundle, way: str) -> None:
    asked, options = WAYS[way]
    alone = gsx.generate(gated, PROMPT, max_new_tokens=20, speculative=False, threads=1, **options)
    found = server.client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, **asked)
    assert found.choices[0].text == alone.text
    assert found.choices[0].finish_reason == FINISH[alone.finish]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(alone.prompt_ids), len(alone.ids))
    figures = extra(found)["gsx"]
    if way == "speculative":
        return
    assert figures["kept_share"] == alone.stats.kept_share
    assert figures["layers"] == gated.manifest.decoder.num_layers
    assert figures["layers_per_token"] == pytest.approx(figures["layers"] * figures["kept_share"])
    assert figures["budget"] == options.get("budget", 0.7)
    assert figures["held_share"] == alone.stats.held_share
    assert (figures["held_share"] is not None) == (way == "held")


@pytest.mark.parametrize("way", WAYS)
def test_streams(server: HttpServer, gated: Bundle, way: str) -> None:
    asked, options = WAYS[way]
    alone = gsx.generate(gated, PROMPT, max_new_tokens=20, speculative=False, threads=1, **options)
    stream = server.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=20, stream=True, stream_options={"include_usage": True}, **asked
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == alone.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == [
        FINISH[alone.finish]
    ]
    assert not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == len(alone.ids)
    assert len(chunks) > 3


def test_speculative_figures_are_those_that_load_generators_read(server: HttpServer) -> None:
    """The identities that AIPerf's record of vLLM's metrics checks."""
    found = server.client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, extra_body={"gsx": {"speculative": True}}
    )
    figures = extra(found)["metrics"]["speculative_decoding"]
    histogram, steps = figures["acceptance_histogram"], figures["num_spec_steps"]
    assert len(histogram) == figures["num_spec_tokens"] + 1
    assert sum(histogram) == steps == len(figures["per_step_accepted"]) == len(figures["per_step_drafted"]) > 0
    accepted = figures["num_accepted_draft_tokens"]
    assert accepted == sum(n * count for n, count in enumerate(histogram)) == sum(figures["per_step_accepted"])
    assert figures["num_draft_tokens"] == sum(figures["per_step_drafted"]) >= accepted
    assert figures["draft_acceptance_rate"] == accepted / figures["num_draft_tokens"]
    assert figures["mean_acceptance_length"] == 1 + accepted / steps


def test_several_prompts_and_choices(server: HttpServer, gated: Bundle) -> None:
    """Texts and ids; continuations of one prompt differ, and are the same again with the same seed."""
    prompts = [[70, 80, 90], [75, 76]]
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "n": 2, "temperature": 1.3, "seed": 5}
    found = server.client.completions.create(prompt=prompts, **asked)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    for number, ids in enumerate(prompts):
        alone = gsx.generate(gated, ids=ids, max_new_tokens=8, temperature=1.3, seed=5, speculative=False, threads=1)
        assert found.choices[2 * number].text == alone.text
        assert found.choices[2 * number + 1].text != alone.text
    again = server.client.completions.create(prompt=prompts, stream=True, **asked)
    texts = ["", "", "", ""]
    for chunk in again:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in found.choices]


def test_log_probabilities_and_echo(server: HttpServer, gated: Bundle) -> None:
    """Those of `gsx generate`; a prompt is scored like a new text, as lm-eval asks for it."""
    alone = gsx.generate(gated, PROMPT, max_new_tokens=6, logprobs=2, speculative=False, threads=1)
    assert alone.logprobs is not None
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "logprobs": 2}
    found = server.client.completions.create(max_tokens=6, **asked).choices[0].logprobs
    assert found is not None
    assert found.token_logprobs == pytest.approx([one.logprob for one in alone.logprobs], abs=1e-4)
    # By text, so that two tokens which are parts of characters may share a key.
    assert {len(top) for top in found.top_logprobs or ()} <= {1, 2}
    echoed = server.client.completions.create(max_tokens=1, echo=True, **asked).choices[0]
    assert echoed.text == PROMPT + server.client.completions.create(max_tokens=1, **asked).choices[0].text
    scored = echoed.logprobs
    assert scored is not None
    assert scored.token_logprobs is not None
    assert scored.token_logprobs[0] is None
    assert len(scored.token_logprobs) == len(alone.prompt_ids) + 1
    # The logits behind a prefix are those of a prompt that ends there.
    prefix = gsx.generate(gated, ids=alone.prompt_ids[:5], max_new_tokens=1, logprobs=20, speculative=False)
    assert prefix.logprobs is not None
    top = dict(prefix.logprobs[0].top)
    assert scored.top_logprobs is not None
    assert scored.top_logprobs[5] is not None
    best = max(scored.top_logprobs[5].values())
    assert best == pytest.approx(max(top.values()), abs=1e-4)


@pytest.fixture(scope="module")
def template(chat_bundle: Path) -> ChatTemplate:
    bundle = open_bundle(chat_bundle)
    return ChatTemplate(bundle, BundleTokenizer(bundle))


MESSAGES = [
    {"role": "system", "content": "self"},
    {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "class"}]},
]
TOLD = [MESSAGES[0], {"role": "user", "content": "the class"}]


def test_chats(chatting: HttpServer, chat_bundle: Path, template: ChatTemplate) -> None:
    alone = gsx.generate(chat_bundle, ids=template.prompt(TOLD), max_new_tokens=14, logprobs=1, speculative=False)
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 14}
    found = chatting.client.chat.completions.create(logprobs=True, top_logprobs=1, **asked)
    choice = found.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", alone.text)
    assert choice.finish_reason == FINISH[alone.finish]
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(alone.prompt_ids)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert alone.logprobs is not None
    logprobs = [one.logprob for one in choice.logprobs.content]
    assert logprobs == pytest.approx([one.logprob for one in alone.logprobs], abs=1e-4)
    assert all(bytes(one.bytes or ()).decode() == one.token for one in choice.logprobs.content)
    stream = list(chatting.client.chat.completions.create(stream=True, **asked))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == alone.text
    assert stream[-1].choices[0].finish_reason == FINISH[alone.finish]
    assert extra(stream[-1])["gsx"]["layers"] == 2


def test_what_a_request_leaves_out(chatting: HttpServer, chat_bundle: Path, template: ChatTemplate) -> None:
    """A set of layers, an exit; and which branches each token kept."""
    for gsx_options, options in (
        ({"layers": "0"}, {"layers": "0"}),
        ({"exit": 1}, {"exit_layer": 1}),
    ):
        alone = gsx.generate(
            chat_bundle, ids=template.prompt(TOLD), max_new_tokens=6, speculative=False, threads=1, **options
        )
        found = chatting.client.chat.completions.create(
            model="tiny", messages=TOLD, temperature=0, max_tokens=6, extra_body={"gsx": {**gsx_options, "kept": True}}
        )
        assert found.choices[0].message.content == alone.text
        kept = extra(found)["kept"][0]
        assert kept == [[[1, 1], [0, 0]]] * (len(alone.ids) - 1)


def test_models_health_version_and_the_page(server: HttpServer, chatting: HttpServer) -> None:
    assert [model.id for model in server.client.models.list()] == ["tiny"]
    assert extra(server.client.models.retrieve("tiny"))["gsx"]["draft"] == "exit:2"
    for path, words in (("/health", "ok"), ("/health/ready", "ready"), ("/version", gsx.__version__), ("/", "<html")):
        status, text, _ = chatting.ask(path, headers={"Authorization": ""})
        assert status == 200
        assert words in text
    metrics = server.ask("/metrics")[1]
    for name in ("gsx_finished_total", "gsx_waiting ", "gsx_first_token_seconds_bucket", "gsx_accepted_tokens_total"):
        assert name in metrics


def test_the_key(chatting: HttpServer) -> None:
    for header in ("", "Bearer wrong", "Basic secret", "Bearer"):
        status, text, headers = chatting.ask("/v1/models", headers={"Authorization": header})
        assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")
        assert headers["WWW-Authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{chatting.url}/v1", api_key="no", max_retries=0).models.list()


GOOD: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
# What is changed in a good request -> status, and a part of the message.
BAD: dict[str, tuple[dict[str, Any] | bytes, int, str]] = {
    "another model": ({"model": "gpt"}, 404, "expected tiny"),
    "no model": ({"model": None}, 400, "model"),
    "an unknown field": ({"max_new_tokens": 2}, 400, "max_new_tokens"),
    "no prompt": ({"prompt": []}, 400, "the prompt is empty"),
    "an empty prompt": ({"prompt": [[]]}, 400, "the prompt is empty"),
    "a number as prompt": ({"prompt": 3}, 400, "prompt"),
    "mixed prompts": ({"prompt": ["a", 3]}, 400, "prompt"),
    "a foreign id": ({"prompt": [10**9]}, 400, "outside the vocabulary"),
    "a negative id": ({"prompt": [-1]}, 400, "prompt"),
    "a long prompt": ({"prompt": "a" * 600}, 400, "context"),
    "a very long prompt": ({"prompt": "a" * 300_000}, 400, "too long"),
    "many ids": ({"prompt": [70] * 600}, 400, "longer than the context"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "tokens as a text": ({"max_tokens": "2"}, 400, "max_tokens"),
    "a temperature below 0": ({"temperature": -1}, 400, "temperature"),
    "a top p of 0": ({"top_p": 0}, 400, "top_p"),
    "a penalty": ({"frequency_penalty": 2.5}, 400, "frequency_penalty"),
    "a repetition": ({"repetition_penalty": 0}, 400, "repetition penalty"),
    "a bias": ({"logit_bias": {"5": 200}}, 400, "logit_bias"),
    "a bias of no token": ({"logit_bias": {"five": 1}}, 400, "logit_bias"),
    "a bias of a foreign token": ({"logit_bias": {"99999999": 1}}, 400, "outside the vocabulary"),
    "too many choices": ({"n": 1000}, 400, "n:"),
    "more choices than may wait": ({"n": 20}, 400, "more continuations than may wait"),
    "too many logprobs": ({"logprobs": 21}, 400, "logprobs"),
    "an empty stop": ({"stop": ""}, 400, "an empty one"),
    "many stops": ({"stop": ["b"] * 17}, 400, "at most 16"),
    "budget 0": ({"gsx": {"budget": 0}}, 400, "budget"),
    "budget 2": ({"gsx": {"budget": 2.0}}, 400, "budget"),
    "a set of layers": ({"gsx": {"layers": "0"}}, 400, "reads a set of layers"),
    "a long set of layers": ({"gsx": {"layers": "0," * 4000}}, 400, "layers is too long"),
    "two settings": ({"gsx": {"budget": 0.5, "exit": 2}}, 400, "only one setting may decide"),
    "a draft length": ({"gsx": {"speculative": True, "draft_length": -1}}, 400, "draft length"),
    "an unknown option": ({"gsx": {"colour": "red"}}, 400, "colour"),
    "best of": ({"best_of": 3}, 400, "best_of"),
    "half a character": ({"prompt": "a\ud800"}, 400, "not UTF-8"),
    "a model of half a character": ({"model": "\ud800"}, 404, "is not here"),
    "a scored stream": ({"stream": True, "echo": True, "logprobs": 1}, 400, "stream"),
    "no JSON": (b"{", 400, "JSON"),
    "not UTF-8": (b'{"model": "tiny", "prompt": "a\xff"}', 400, "parsing the body"),
    "no object": (b"[]", 400, "the body"),
    "deep": (b"[" * 100_000, 400, ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(server: HttpServer, name: str) -> None:
    change, status, words = BAD[name]
    body = change if isinstance(change, bytes) else GOOD | change
    found, text, _ = server.ask("/v1/completions", body)
    error = json.loads(text)["error"]
    assert (found, set(error)) == (status, {"message", "type", "param", "code"})
    assert words in error["message"]
    assert "Traceback" not in text


def test_a_large_body_is_refused_before_it_is_read(server: HttpServer) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    chunk = b"80000\r\n" + b" " * 0x80000 + b"\r\n"
    for length, sent in (("Content-Length: 99999999", b" "), ("Transfer-Encoding: chunked", chunk * 17)):
        with socket.create_connection((host, int(port)), timeout=30) as raw:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n"
            raw.sendall(head.encode() + sent)
            answer = raw.recv(4096).decode() + raw.recv(4096).decode()
        assert "413" in answer.splitlines()[0]
        assert "the body is too large" in answer


BAD_CHATS: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages"),
    "no role": ({"messages": [{"content": "a"}]}, "role"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
    "half a character": ({"messages": [{"role": "user", "content": "\udcff"}]}, "not UTF-8"),
    "a long chat": ({"messages": [{"role": "user", "content": "the class " * 400}]}, "longer than the context"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "JSON": ({"response_format": {"type": "json_object"}}, "response_format"),
    "top logprobs alone": ({"top_logprobs": 2}, "needs logprobs"),
    "a budget": ({"gsx": {"budget": 0.5}}, "no budget to choose"),
    "an exit too deep": ({"gsx": {"exit": 9}}, "exit"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_bad_chats(chatting: HttpServer, name: str) -> None:
    change, words = BAD_CHATS[name]
    found, text, _ = chatting.ask("/v1/chat/completions", CHAT | change)
    assert found == 400
    assert words in json.loads(text)["error"]["message"]


def test_a_model_without_a_template(server: HttpServer) -> None:
    found, text, _ = server.ask("/v1/chat/completions", CHAT)
    assert found == 400
    assert "no chat template" in json.loads(text)["error"]["message"]
    assert server.ask("/v1/nothing")[0] == 404
    assert server.ask("/v1/models", b"{}")[0] == 405


def test_a_full_queue_refuses_and_serves_the_rest(server: HttpServer, gated: Bundle) -> None:
    alone = gsx.generate(gated, "token", max_new_tokens=150, speculative=False, threads=1).text
    body = {"model": "tiny", "prompt": "token", "max_tokens": 150, "temperature": 0, "n": 2}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: server.ask("/v1/completions", body), range(16)))
    refused = [headers for status, _, headers in answers if status == 429]
    assert refused
    assert all(headers["Retry-After"] == "1" for headers in refused)
    served = [json.loads(text) for status, text, _ in answers if status == 200]
    assert len(served) + len(refused) == 16
    assert all(choice["text"] == alone for one in served for choice in one["choices"])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_request(server: HttpServer, stream: bool) -> None:
    before = server.metric("gsx_cancelled_total")
    body = json.dumps({"model": "tiny", "prompt": "token", "max_tokens": 480, "stream": stream, "ignore_eos": True})
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        raw.sendall(f"{head}\r\n\r\n{body}".encode())
        assert until(lambda: server.metric("gsx_under_way") > 0)
    assert until(lambda: server.metric("gsx_cancelled_total") == before + 1)
    assert server.metric("gsx_under_way") == 0


def test_sigterm_lets_requests_end(gated: Bundle) -> None:
    """And the port is taken before anything is loaded."""
    alone = gsx.generate(gated, "token", max_new_tokens=200, speculative=False, threads=1)
    with serving(gated.directory, "--slots", 2) as server:
        port = server.url.rpartition(":")[2]
        taken = subprocess.run(
            [*GSX, "serve", gated.directory, "--port", port], capture_output=True, text=True, check=False
        )
        assert taken.returncode == 2
        assert "the port is in use" in taken.stderr
        pieces: list[str] = []
        begun = threading.Event()

        def read() -> None:
            for chunk in server.client.completions.create(
                model="tiny", prompt="token", max_tokens=200, temperature=0, stream=True
            ):
                pieces.append(chunk.choices[0].text)
                begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert begun.wait(60)
        server.process.send_signal(signal.SIGTERM)
        reader.join(60)
        assert "".join(pieces) == alone.text
        assert server.process.wait(60) == 0


def test_a_request_that_takes_too_long(gated: Bundle) -> None:
    with serving(gated.directory, "--request-seconds", 0.001) as server:
        status, text, _ = server.ask("/v1/completions", GOOD | {"max_tokens": 400})
        assert (status, json.loads(text)["error"]["code"]) == (504, "timeout")
        status, text, _ = server.ask("/v1/completions", GOOD | {"max_tokens": 400, "stream": True})
        assert json.loads(text.splitlines()[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert until(lambda: server.metric("gsx_cancelled_total") == 2)


def test_without_its_packages(monkeypatch: pytest.MonkeyPatch, gated: Bundle) -> None:
    from gsx.workflows import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    with pytest.raises(gsx.GsxError, match=r"needs more packages(.|\n)*gsx\[serve\]"):
        gsx.serve(gated)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slots": 0}, "slots is out of range"),
        ({"queue": 0}, "queue is out of range"),
        ({"context": 10**6}, "context is out of range"),
        ({"threads": 0}, "threads is out of range"),
        ({"seconds": 0.0}, "above 0 seconds"),
        ({"drain": -1}, "drain is out of range"),
        ({"api_key": ""}, "printable"),
        ({"port": 10**6}, "cannot be used"),
        ({"host": "256.1.1.1"}, "cannot be used"),
    ],
)
def test_bad_options(gated: Bundle, options: dict[str, Any], words: str) -> None:
    with pytest.raises(gsx.GsxError, match=words):
        gsx.serve(gated, **options)


@pytest.mark.parametrize("caches", ["per_loop", "last_loop"])
def test_requests_with_numbers_of_loops(make_looped_bundle: Callable[[str], Bundle], caches: str) -> None:
    """At the same time, of different numbers and lengths; the second half begins as the first did."""
    bundle = make_looped_bundle(caches)
    prompts = ["token " * (LONG // 6), PROMPT, "def main(", "token " * 30]
    asked = [(prompt, loops) for prompt in prompts for loops in (1, 3)] + [(prompts[0] + "keeps", 2), (prompts[3], 3)]
    with serving(bundle.directory, "--slots", 3) as server, ThreadPoolExecutor(5) as pool:

        def answer(prompt: str, loops: int) -> str:
            keep = {"gsx": {"loops": loops}}
            found = server.client.completions.create(
                model="tiny", prompt=prompt, max_tokens=12, temperature=0, extra_body=keep
            )
            return found.choices[0].text

        texts = list(pool.map(lambda one: answer(*one), asked))
        status, refusal, _ = server.ask("/v1/completions", {"model": "tiny", "prompt": PROMPT, "gsx": {"loops": 4}})
    assert (status, "number of loops is out of range" in refusal) == (400, True)
    for (prompt, loops), text in zip(asked, texts, strict=True):
        assert text == gsx.generate(bundle, prompt, max_new_tokens=12, threads=1, loops=loops).text
