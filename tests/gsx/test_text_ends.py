"""Where a text ends, from the model's files to every door, also inside a draft; and what gsx says about settings that
it does not apply.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gsx as api
from gsx.torch_runtime import TorchRuntime
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.errors import BundleError
from gsx_engines.generation.generate import Generated, generate
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import open_runner
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.serving.request import Request
from gsx_engines.serving.scheduler import Scheduler
from gsx_engines.speculation.draft import open_draft_runner
from tests.engines.test_serving import Recorder, finish
from tests.gsx.command_line import Gsx
from tests.tiny import EOS_ID, tiny_checkpoint

PROMPT = [5, 6, 7]
NEW_TOKENS = 20


@dataclass(frozen=True)
class Model:
    """A model with a bundle, and the tokens that transformers makes: to the limit, and as its files say."""

    path: Path
    bundle: Bundle
    free: list[int]
    ended: list[int]


def by_transformers(path: Path, **options: object) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(path)
    found = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    tokens: list[int] = found[0, len(PROMPT) :].tolist()
    return tokens


def set_files(path: Path, **settings: object) -> None:
    """Let generation_config.json have these settings alone, and config.json name no end token."""
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "eos_token_id"}))
    (path / "generation_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Four layers of which the upper two do nothing, so that every draft of the exit below them is right."""
    folder = tmp_path_factory.mktemp("ends")
    path = tiny_checkpoint(folder / "model", layers=4, hidden=32, vocab=64, seed=1)
    weights = load_file(path / "model.safetensors")
    for name in weights:
        if name.startswith(("model.layers.2.", "model.layers.3.")) and ("o_proj" in name or "down_proj" in name):
            weights[name].zero_()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    set_files(path)
    free = by_transformers(path)
    stop = next(token for n, token in enumerate(free) if n >= 4 and token not in free[:n])
    set_files(path, eos_token_id=[63 if stop != 63 else 62, stop], bos_token_id=1)
    bundle = api.export(path, folder / "bundle", draft="exit:2")
    return Model(path, bundle, free, by_transformers(path))


def test_the_model_goes_on_behind_the_end(made: Model) -> None:
    """Else the other tests show nothing."""
    assert EOS_ID not in made.bundle.manifest.decoder.eos_ids
    assert made.ended == made.free[: len(made.ended)]
    assert 4 < len(made.ended) < NEW_TOKENS


@pytest.mark.parametrize("length", [None, 0, 1, 3, 5, 8])
def test_a_text_ends_there_also_in_the_middle_of_a_draft(made: Model, length: int | None) -> None:
    found = api.generate(made.bundle, ids=PROMPT, max_new_tokens=NEW_TOKENS, draft_length=length)
    assert (found.ids, found.finish) == (made.ended, "end-of-text")


def test_it_ends_in_pytorch_and_beside_other_sequences(made: Model) -> None:
    runner = open_runner(made.bundle, backend=TorchRuntime("cpu"))
    other = made.ended[:3]  # goes on differently
    found = generate(runner, [PROMPT, other], max_new_tokens=NEW_TOKENS)
    assert found.sequences[0] == Generated(made.ended, "end-of-text")


@pytest.mark.parametrize("speculative", [False, True])
def test_it_ends_in_the_server(made: Model, speculative: bool) -> None:
    assert made.bundle.manifest.draft is not None
    scheduler = Scheduler(open_draft_runner(made.bundle, made.bundle.manifest.draft.draft, 1), None, slots=2)
    client = Recorder()
    scheduler.submit(Request(PROMPT, NEW_TOKENS, speculative=speculative), client)
    finish(scheduler)
    assert client.ids == made.ended
    assert client.result is not None
    assert client.result.finish == "end-of-text"


def test_without_an_end_token_only_the_limit_ends_a_text(made: Model, tmp_path: Path) -> None:
    """The family's default, 2, is no end token unless a file says so."""
    path = tiny_checkpoint(tmp_path / "model", layers=1, hidden=32, vocab=8, seed=2)
    (path / "generation_config.json").unlink()
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "eos_token_id"}))
    bundle = api.export(path, tmp_path / "bundle")
    expected = by_transformers(path)
    assert EOS_ID in expected, "choose another seed"
    found = api.generate(bundle, ids=PROMPT, max_new_tokens=NEW_TOKENS)
    assert (found.ids, found.finish) == (expected, "length")
    assert bundle.manifest.source.notes == (
        "config.json names no token that ends a text: a text ends at its limit, as in transformers",
    )


def test_what_is_not_applied_is_said(gsx: Gsx, model: Path, tiny_text: Path, tmp_path: Path) -> None:
    """On stderr, in `--json`, in gsx.json and by `gsx inspect`; and every end token is always kept."""
    set_files(model, eos_token_id=[EOS_ID, 65], repetition_penalty=1.3)
    note = "generation_config.json sets repetition_penalty 1.3, which gsx does not apply: its tokens can differ"
    out = tmp_path / "out"
    found = gsx("export", model, "-o", out, "--calibration", tiny_text, "--calibration-tokens", 1024, "--json")
    assert found.code == 0
    assert f"note: {note}" in found.err
    assert [one.startswith(note) for one in json.loads(found.out)["notes"]] == [True]
    for path in (model, out):
        assert note in gsx("inspect", path).out
        report = json.loads(gsx("inspect", path, "--json").out)
        assert [one.startswith(note) for one in report["notes"]] == [True]
    runner = WholeRunner(PortableStage(open_bundle(out)))
    above = np.full((1, 3, 2), 2.0, np.float32)
    kept = runner.step(runner.new_cache(1, 8), np.array([[5, 65, 9, EOS_ID]]), {"thresholds": above}).kept
    assert kept is not None
    assert kept.tolist() == [[2, 2]] * 3


def test_a_bundle_with_other_ends_is_not_verified(gsx: Gsx, model: Path, bundle: Path) -> None:
    """The model's files were changed, or an earlier version read them otherwise."""
    set_files(model, eos_token_id=[EOS_ID, 65])
    with pytest.raises(BundleError, match=r"ends a text at other tokens than .*\n  expected 2, 65, found 2\n.*export"):
        api.verify(bundle, reference=str(model), tokens=512)
