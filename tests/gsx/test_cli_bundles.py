"""Commands that read a bundle or make a checkpoint: generate, verify, convert, train; and damaged bundles."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from gsx.workflows.generate import generate
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.chat import ChatTemplate
from gsx_engines.tokens import BundleTokenizer
from tests.gsx.command_line import GSX, Gsx, Spoil, edit_json, edit_weights, snapshot
from tests.tiny import tiny_checkpoint

# Bundles


BAD_BUNDLES: dict[str, tuple[Spoil, list[str]]] = {
    "missing": (shutil.rmtree, ["is not a bundle", "no such directory"]),
    "no manifest": (lambda b: (b / "gsx.json").unlink(), ["is not a bundle", "expected gsx.json"]),
    "manifest not JSON": (lambda b: (b / "gsx.json").write_text("no"), ["gsx.json: is not readable JSON"]),
    "manifest edited": (
        lambda b: edit_json(b / "gsx.json", lambda v: v["decoder"].__setitem__("num_layers", "three")),
        ["not a valid manifest", "decoder.num_layers", "run `gsx export` again"],
    ),
    "unknown key": (
        lambda b: edit_json(b / "gsx.json", lambda v: v.__setitem__("colour", "red")),
        ["not a valid manifest", "colour"],
    ),
    "later version": (
        lambda b: edit_json(b / "gsx.json", lambda v: v.__setitem__("schema_version", 99)),
        ["another format", "found schema_version 99"],
    ),
    "graph changed": (
        lambda b: (b / "model.onnx").write_bytes((b / "model.onnx").read_bytes() + b"\0"),
        ["model.onnx does not match gsx.json", "expected sha256", "the file changed after export"],
    ),
    "graph missing": (lambda b: (b / "model.onnx").unlink(), ["model.onnx is missing"]),
    "weights cut": (
        lambda b: (b / "weights.bin").write_bytes((b / "weights.bin").read_bytes()[:-1]),
        ["weights.bin does not match gsx.json", "bytes"],
    ),
    "no tokenizer": (lambda b: (b / "tokenizer.json").unlink(), ["has no tokenizer", "token ids"]),
}


@pytest.mark.parametrize("case", list(BAD_BUNDLES))
def test_bad_bundle(gsx: Gsx, bundle: Path, tmp_path: Path, case: str) -> None:
    spoil, parts = BAD_BUNDLES[case]
    spoil(bundle)
    before = snapshot(tmp_path)
    found = gsx("generate", bundle, "hello")
    assert found.code == 1
    assert found.out == ""
    for part in parts:
        assert part in found.err
    assert snapshot(tmp_path) == before


# Generate


def test_generate(gsx: Gsx, tiny_bundle: Path) -> None:
    found = gsx("generate", tiny_bundle, "token 1", "--max-new-tokens", "8", "--threads", "1", "--json")
    assert found.code == 0, found.err
    result = json.loads(found.out)
    assert result["stats"]["new_tokens"] == len(result["ids"])
    assert result["budget"] == 0.7
    assert 0 < result["stats"]["kept_share"] <= 1
    ids = ",".join(map(str, result["prompt_ids"]))
    by_ids = gsx("generate", tiny_bundle, "--ids", ids, "--max-new-tokens", "8")
    assert by_ids.out.strip() == ",".join(map(str, result["ids"]))
    assert "tokens/s" in by_ids.err
    streamed = gsx("generate", tiny_bundle, "token 1", "--max-new-tokens", "8")
    whole = gsx("generate", tiny_bundle, "token 1", "--max-new-tokens", "8", "--no-stream")
    assert streamed.out == whole.out == result["text"] + "\n"


def test_generate_with_changed_logits(gsx: Gsx, tiny_bundle: Path) -> None:
    options = {"--min-p": 0.1, "--repetition-penalty": 1.3, "--frequency-penalty": 0.5, "--presence-penalty": -0.25}
    given = [str(part) for pair in options.items() for part in pair]
    found = gsx(
        "generate", tiny_bundle, "--ids", "5,6", "--max-new-tokens", "9", *given, "--logit-bias", "7:-100,8:1.5",
        "--logprobs", "2", "--temperature", "1", "--seed", "3", "--json",
    )  # fmt: skip
    assert found.code == 0, found.err
    result = json.loads(found.out)
    alone = generate(
        tiny_bundle,
        ids=[5, 6],
        max_new_tokens=9,
        temperature=1,
        seed=3,
        min_p=0.1,
        repetition_penalty=1.3,
        frequency_penalty=0.5,
        presence_penalty=-0.25,
        logit_bias={7: -100, 8: 1.5},
        logprobs=2,
    )
    assert result["ids"] == alone.ids
    assert alone.logprobs is not None
    assert [one["logprob"] for one in result["logprobs"]] == [one.logprob for one in alone.logprobs]
    assert [len(one["top"]) for one in result["logprobs"]] == [2] * len(alone.ids)


def test_generate_is_seeded(gsx: Gsx, tiny_bundle: Path) -> None:
    def sample(seed: int) -> str:
        options = ("--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--seed", seed)
        return gsx("generate", tiny_bundle, "--ids", "5,6", "--max-new-tokens", "12", *options).out

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["the prompt is unclear", "neither"]),
        (["hello", "--ids", "1"], ["the prompt is unclear", "both"]),
        (["--ids", "one"], ["--ids", "1,2,3"]),
        (["--ids", "999999"], ["outside the vocabulary"]),
        (["hello", "--budget", "0.01"], ["below the calibrated grid", "with budget 0.01"]),
        (["hello", "--budget", "2"], ["the budget is out of range"]),
        (["hello", "--max-new-tokens", "0"], ["the number of new tokens is out of range"]),
        (["hello", "--temperature=-1"], ["temperature"]),
        (["hello", "--top-p", "0"], ["top-p is out of range"]),
        (["hello", "--min-p", "2"], ["min-p is out of range"]),
        (["hello", "--repetition-penalty", "0"], ["repetition penalty is out of range", "1 for none"]),
        (["hello", "--frequency-penalty", "3"], ["frequency penalty is out of range", "-2 to 2"]),
        (["hello", "--presence-penalty", "nan"], ["presence penalty is out of range"]),
        (["hello", "--logit-bias", "7:1000"], ["bias of token 7 is out of range"]),
        (["hello", "--logit-bias", "99999999:1"], ["outside the vocabulary"]),
        (["hello", "--logit-bias", "seven"], ["not a list of biases"]),
        (["hello", "--logprobs", "99"], ["log-probabilities", "0 to 20"]),
        (["hello", "--threads", "0"], ["threads"]),
        (["hello", "--stop", ""], ["stop text is empty"]),
        (["bad \udcff byte"], ["not UTF-8"]),
        (["x" * 600], ["longer than the model's context"]),
    ],
)
def test_generate_wrong_use(gsx: Gsx, tiny_bundle: Path, arguments: list[str], parts: list[str]) -> None:
    found = gsx("generate", tiny_bundle, *arguments)
    assert found.code == 2
    assert found.out == ""
    for part in parts:
        assert part in found.err


def test_a_chat(gsx: Gsx, chat_bundle: Path, tiny_bundle: Path) -> None:
    """Each line is a message, behind all that was said before; what is refused does not end the chat."""
    command = [*GSX, "generate", str(chat_bundle), "the class", "--chat", "--max-new-tokens", "9", "--no-speculative"]
    told = "\nself\n" + "x" * 900 + "\nreturn\n"
    done = subprocess.run(command, input=told, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "longer than the model's context" in done.stderr
    assert done.stderr.count("first token after") == 3
    bundle = open_bundle(chat_bundle)
    template = ChatTemplate(bundle, BundleTokenizer(bundle))
    messages: list[dict[str, str]] = []
    wanted = ""
    for message in ("the class", "self", "return"):
        messages.append({"role": "user", "content": message})
        answer = generate(bundle, ids=template.prompt(messages), max_new_tokens=9, speculative=False)
        messages.append({"role": "assistant", "content": answer.text or ""})
        wanted += f"{answer.text}\n"
    assert done.stdout == wanted
    assert "no chat template" in gsx("generate", tiny_bundle, "--chat").err
    assert "--chat is for people" in gsx("generate", chat_bundle, "--chat", "--json").err


def test_ctrl_c_ends_an_answer_and_not_the_chat(chat_bundle: Path) -> None:
    command = [*GSX, "generate", str(chat_bundle), "--chat", "--max-new-tokens", "230", "--temperature", "3"]
    with subprocess.Popen(
        [*command, "--logit-bias", "0:-100,258:-100"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, bufsize=0,
    ) as chat:  # fmt: skip
        assert chat.stdin is not None
        assert chat.stdout is not None
        assert chat.stderr is not None
        chat.stdin.write(b"the class\n")
        chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        assert chat.stderr.readline() == b"(interrupted)\n"
        chat.stdin.write(b"self\n")
        chat.stdout.read(1)
        chat.send_signal(signal.SIGTERM)
        assert chat.wait(60) == 128 + signal.SIGTERM
        assert b"Traceback" not in chat.stderr.read()


def test_generate_from_stdin(tiny_bundle: Path) -> None:
    command = [*GSX, "generate", str(tiny_bundle), "-", "--max-new-tokens", "3"]
    good = subprocess.run(command, input="token ä".encode(), capture_output=True, check=False)
    assert good.returncode == 0, good.stderr
    bad = subprocess.run(command, input=b"token \xff", capture_output=True, check=False)
    assert bad.returncode == 2
    assert b"not UTF-8" in bad.stderr
    assert b"0xff at 6" in bad.stderr
    assert b"Traceback" not in bad.stderr


def test_stop_texts() -> None:
    """A stop text that comes in pieces is never shown, and what only looked like one is."""
    from gsx_engines.tokens import TextWriter

    class Pieces:
        def __init__(self, pieces: list[str], rest: str) -> None:
            self.pieces, self.rest = pieces, rest

        def push(self, token: int) -> str:
            return self.pieces[token]

        def finish(self) -> str:
            return self.rest

    def write(pieces: list[str], stops: list[str], rest: str = "") -> tuple[str, list[bool]]:
        shown: list[str] = []
        stream: Any = Pieces(pieces, rest)
        writer = TextWriter(stream, stops, shown.append)
        stopped = [writer.push(token) for token in range(len(pieces))]
        assert writer.finish() == "".join(shown)
        return "".join(shown), stopped

    assert write(["ab", "c", "d"], []) == ("abcd", [False] * 3)
    assert write(["a", "EN", "D!"], ["END"]) == ("a", [False, False, True])
    assert write(["a", "EN", "C"], ["END"]) == ("aENC", [False] * 3)
    assert write(["a", "EN"], ["END"]) == ("aEN", [False] * 2)
    assert write(["x;y.z"], [".", ";"]) == ("x", [True])
    assert write(["a", "EN"], ["END"], rest="C") == ("aENC", [False] * 2), "what the decoder held until the end"
    assert write(["a", "EN"], ["END"], rest="D!") == ("a", [False] * 2)


# Verify, inspect, convert, train


def test_verify(gsx: Gsx, bundle: Path, tiny_gated: Path, tiny_text: Path) -> None:
    options = ("--reference", tiny_gated, "--text", tiny_text, "--tokens", "300", "--greedy-tokens", "16")
    found = gsx("verify", bundle, *options, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["passed"] is True
    assert (bundle / "parity.json").is_file()
    assert (bundle / "parity.html").is_file()
    assert json.loads(gsx("inspect", bundle, "--json").out)["bundle"]["parity"] is True
    table = gsx("verify", bundle, *options)
    assert table.code == 0
    assert "passed" in table.out


def test_verify_fails_where_weights_differ(gsx: Gsx, bundle: Path, model: Path, tiny_text: Path) -> None:
    edit_weights(model, lambda t: t["model.norm.weight"].mul_(1.5))
    found = gsx("verify", bundle, "--reference", model, "--text", tiny_text, "--tokens", "300")
    assert found.code == 1
    assert found.err


def test_convert(gsx: Gsx, tmp_path: Path) -> None:
    from tests.tiny import tiny_checkpoint

    base = tiny_checkpoint(tmp_path / "base", tokenizer=True, hidden=48, layers=2)
    gates = {
        f"{branch}_{layer}": {"gate.weight": torch.zeros(1, 48), "gate.bias": torch.zeros(1)}
        for branch in ("attn", "mlp")
        for layer in range(2)
    }
    torch.save(gates, tmp_path / "gates.pt")
    found = gsx("convert", tmp_path / "gates.pt", "-o", tmp_path / "out", "--base", base, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["gate"]["kind"] == "scalar"
    assert gsx("inspect", tmp_path / "out").code == 0
    again = gsx("convert", tmp_path / "gates.pt", "-o", tmp_path / "out", "--base", base)
    assert again.code == 2
    assert "exists and is not empty" in again.err


@pytest.mark.slow
def test_train(gsx: Gsx, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", tokenizer=True)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"paragraph {n} has a few words" for n in range(60)))
    out = tmp_path / "out"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(gsx("train", "--print-recipe").out)
    small = ("--set", "data.length=32", "--set", "trainer.gradient_accumulation_steps=1", "--set", "evaluation.rows=2")
    small += ("--set", "data.held_out=0.2")
    arguments = (
        "train",
        "--recipe",
        recipe,
        "--model",
        model,
        "--data",
        text,
        "--lora",
        "4",
        "--max-steps",
        "3",
        *small,
        "-o",
        out,
    )
    planned = gsx(*arguments, "--dry-run", "--json")
    assert json.loads(planned.out)["steps"] == 3
    assert not out.exists()
    found = gsx(*arguments, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["steps"] == 3
    assert "rank: 4" in found.err
    assert "training" in found.err
    shown = gsx("inspect", out)
    assert shown.code == 0
    assert "LoRA" in shown.out
    again = gsx(*arguments)
    assert again.code == 2
    assert "not empty" in again.err
    other = gsx(*arguments, "--resume", "--overwrite", "--set", "trainer.learning_rate=1e-3")
    assert other.code == 2
    assert "other settings" in other.err
