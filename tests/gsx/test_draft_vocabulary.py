"""Drafts that choose among few tokens: the text stays the model's, in every form and on every runtime."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tokenizers import Tokenizer

from gsx.torch_runtime import TorchRuntime
from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx.workflows.verify import verify
from gsx_engines.building.profiles import default_profiles
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import controls_for
from gsx_engines.generation.generate import generate
from gsx_engines.runners.base import Runner
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import open_runner, open_split_runner
from gsx_engines.runners.split import SplitRunner
from gsx_engines.runners.tensorrt import TensorRTStage
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.sampling import GREEDY, Sampling
from gsx_engines.speculation.draft import Draft, EarlyExitDraft, open_draft
from gsx_plugins.errors import UsageError
from tests.engines.cpu_engine import cpu_engines
from tests.gsx.command_line import Gsx
from tests.tiny import EOS_ID, tiny_checkpoint

TOKENS, CAPACITY = 40, 64
PROMPTS = [[5, 60, 61, 7, 8, 9, 200, 11], [61, 7], [1, 30, 31, 32, 33]]
# All that changes logits or chooses among them: a token that is never drafted must stay so.
SAMPLED = Sampling(
    temperature=1.5,
    top_k=60,
    top_p=0.98,
    min_p=0.001,
    seed=3,
    repetition_penalty=1.2,
    frequency_penalty=0.5,
    presence_penalty=-0.5,
    logit_bias={200: 100.0, 7: -100.0},
)
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "INT8 but the head": {"quantize": Quantize("int8-weights", ("lm_head",))},
    "INT4": {"quantize": Quantize("int4", ("none",))},
}
# Of logits in units of the largest: products of other shapes add in another order; bfloat16 has 8 bits.
CLOSE = {"fp32": 1e-5, "bf16": 3e-2}
# A table in 8 bits that the embedding shares has another product in ONNX Runtime than a head of its own: one that
# rounds its inputs to 8 bits (`lowering/for_onnxruntime/quantized.py`).
ROUNDED = 1e-2


@pytest.fixture(scope="module")
def few(make_tiny_bundle: Callable[..., Path]) -> Path:
    return make_tiny_bundle(draft="exit:1", draft_vocabulary=TOKENS)


def logits_of(runner: SplitRunner) -> np.ndarray:
    """The draft's logits over a prompt, [S, V]."""
    ids = np.array(PROMPTS[:1])
    controls = controls_for(runner.manifest)
    return np.asarray(runner.draft(runner.new_cache(1, 16), ids, controls, logits="all").logits[0])


def check_logits(few: Bundle, whole: Bundle) -> None:
    """The draft's logits are those of the whole head where it chooses, and minus infinity elsewhere."""
    shared = "embed_tokens.dequantized" in {
        node.output[0] for node in onnx.load(whole.graph_path("draft"), load_external_data=False).graph.node
    }
    close = ROUNDED if shared else CLOSE[few.manifest.precision]
    for halves in (open_split_runner, portable):
        have, want = logits_of(halves(few)), logits_of(halves(whole))
        chosen = np.isfinite(have).all(axis=0)
        assert chosen.sum() == TOKENS
        assert np.isneginf(have[:, ~chosen]).all()
        assert chosen[list(few.manifest.decoder.eos_ids)].all()
        np.testing.assert_allclose(have[:, chosen], want[:, chosen], atol=close * np.abs(want).max())


def portable(bundle: Bundle) -> SplitRunner:
    return SplitRunner(PortableStage(bundle, "draft"), PortableStage(bundle, "verify"))


def check_texts(plain: Runner, draft: Draft, *, batches: bool = True) -> None:
    """Drafted text is plain text, of one prompt and of a batch, greedy and sampled with everything that changes logits;
    and drafts are made."""
    drafted = 0
    for sampling in (GREEDY, SAMPLED):
        for prompts, length in ((PROMPTS[:1], None), (PROMPTS, 3))[: 1 + batches]:
            options: dict[str, Any] = {"max_new_tokens": 16, "sampling": sampling, "stop_ids": [], "logprobs": 2}
            want = generate(plain, prompts, **options)
            have = generate(draft.runner, prompts, draft=draft, draft_length=length, **options)
            assert [one.tokens for one in have.sequences] == [one.tokens for one in want.sequences]
            drafted += sum(have.stats.drafted)
    assert drafted > 0


def opened(bundle: Bundle, backend: Any = "onnxruntime") -> tuple[Runner, Draft]:
    """For plain text, and for the bundle's own draft."""
    assert bundle.manifest.draft is not None
    return open_runner(bundle, backend=backend), open_draft(bundle, bundle.manifest.draft.draft, backend=backend)


@pytest.mark.parametrize("form", FORMS)
def test_forms(make_tiny_bundle: Callable[..., Path], form: str) -> None:
    """The rows of the head have the head's own codes, or none where it has none."""
    few, whole = (
        open_bundle(make_tiny_bundle(draft="exit:1", **FORMS[form], **more))
        for more in ({"draft_vocabulary": TOKENS}, {})
    )
    check_logits(few, whole)
    if (
        few.manifest.precision == "fp32" and few.manifest.quantization is None
    ):  # elsewhere a near tie may fall otherwise
        check_texts(*opened(few))


@pytest.mark.parametrize(
    ("family", "tied", "scheme"),
    [("llama", True, "int8-weights"), ("gemma2", False, None), ("granite", True, None)],
)
def test_families(tmp_path: Path, tiny_text: Path, family: str, tied: bool, scheme: Any) -> None:
    """A head that shares the embedding's table, a soft cap of the logits, a factor of them."""
    model = tiny_checkpoint(tmp_path / "model", family, tied=tied, tokenizer=True, layers=4)
    quantize = None if scheme is None else Quantize(scheme, ("none",))
    few, whole = (
        export(
            model, tmp_path / str(count), draft="exit:2", draft_vocabulary=count, calibration=text, quantize=quantize
        )
        for count, text in ((TOKENS, tiny_text), (None, tiny_text if scheme else None))
    )
    check_logits(few, whole)


def test_torch_runs_it(few: Path) -> None:
    bundle, runtime = open_bundle(few), TorchRuntime("cpu")
    have, want = logits_of(open_split_runner(bundle, backend=runtime)), logits_of(portable(bundle))
    np.testing.assert_allclose(have, want, atol=1e-4)
    check_texts(*opened(bundle, runtime))


def test_verify_passes_and_finds_a_wrong_place(few: Path, tiny_text: Path, tmp_path: Path) -> None:
    assert verify(few, text=tiny_text, tokens=256, greedy_tokens=4, budgets=(0.7,)).passed
    bundle = Path(shutil.copytree(few, tmp_path / "bundle"))
    model = onnx.load(bundle / "draft.onnx", load_external_data=False)
    (places,) = (one for one in model.graph.initializer if one.name == "draft.places")
    places.CopyFrom(numpy_helper.from_array(np.roll(numpy_helper.to_array(places), 1), places.name))
    (bundle / "draft.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((bundle / "gsx.json").read_text())
    manifest["graphs"]["draft"]["sha256"] = hashlib.sha256((bundle / "draft.onnx").read_bytes()).hexdigest()
    (bundle / "gsx.json").write_text(json.dumps(manifest))
    report = verify(bundle, text=tiny_text, tokens=256, greedy_tokens=4, budgets=(0.7,))
    failed = {one.name for one in report.checks if one.verdict == "fail"}
    assert {"draft, fast runner: logits", "draft, portable runner: logits"} == failed


def test_the_most_frequent_tokens_are_chosen(few: Path, tiny_text: Path) -> None:
    bundle = open_bundle(few)
    assert bundle.manifest.draft is not None
    vocabulary = bundle.manifest.draft.vocabulary
    assert vocabulary is not None
    ids = Tokenizer.from_file(str(few / "tokenizer.json")).encode(tiny_text.read_text(), add_special_tokens=False).ids
    counts = np.bincount(ids, minlength=bundle.manifest.decoder.vocab_size)
    chosen = np.flatnonzero(np.isfinite(logits_of(portable(bundle))).all(axis=0))
    assert vocabulary.tokens == len(chosen) == TOKENS
    assert EOS_ID in chosen  # although the text does not have it
    assert counts[EOS_ID] == 0
    assert counts[chosen].sum() == np.sort(counts)[::-1][: TOKENS - 1].sum()
    assert vocabulary.covered == pytest.approx(counts[chosen].sum() / counts.sum())
    assert (vocabulary.text.tokens, vocabulary.text.name) == (len(ids), tiny_text.name)


def test_auto_has_it_too(gsx: Gsx, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=4, tokenizer=True, exits=(1, 3))
    text = Path(__file__).parents[2] / "docs" / "design.md"
    options = ("--draft", "auto", "--draft-vocabulary", TOKENS, "--calibration", text, "-o", tmp_path / "out")
    code, out, _ = gsx("export", model, *options)
    assert code == 0
    assert f"choosing among {TOKENS} tokens: " in out
    check_texts(*opened(open_bundle(tmp_path / "out")))
    code, out, _ = gsx("inspect", tmp_path / "out")
    assert f"choosing among {TOKENS} tokens: " in out
    assert f"of {text.name} (" in out


@pytest.mark.parametrize(
    ("draft", "count", "part"),
    [
        ("exit:1", 0, "out of range"),
        ("exit:1", 260, "1 (the tokens that end a text are always in it) to 259"),
        ("auto", -1, "out of range"),
        (None, 40, "only an exit has a head of its own"),
        ("budget:0.5", 40, "only an exit has a head of its own"),
        ("layers:1", 40, "only an exit has a head of its own"),
        ("layers:auto", 40, "only an exit has a head of its own"),
    ],
)
def test_refused(tiny_gated: Path, tmp_path: Path, draft: str | None, count: int, part: str) -> None:
    """Before any work: nothing is written."""
    with pytest.raises(UsageError, match=part.replace("(", r"\(").replace(")", r"\)")):
        export(tiny_gated, tmp_path / "out", budget=0.7, draft=draft, draft_vocabulary=count)
    assert not (tmp_path / "out").exists()


def test_a_looped_model_is_refused(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", "ouro", tokenizer=True)
    for draft, part in (("exit:1", "the model is looped"), ("loops:1", "only an exit has a head of its own")):
        with pytest.raises(UsageError, match=part):
            export(model, tmp_path / "out", policy="loops", draft=draft, draft_vocabulary=40)
    assert not (tmp_path / "out").exists()


def test_the_form_of_engines(few: Path) -> None:
    """Engines for all calls, and for steps: these give the 128 likeliest tokens, most of which are never drafted."""
    bundle = open_bundle(few)
    entry, engines = cpu_engines(bundle, default_profiles(CAPACITY, 1), capacity=CAPACITY)
    own, step = cpu_engines(bundle, (), capacity=CAPACITY, step=(1, 1), rows=8, plugins=())
    stages = {
        name: TensorRTStage(bundle.manifest, entry, name, engine, [(own, step[name])])
        for name, engine in engines.items()
    }
    halves = SplitRunner(stages["draft"], stages["verify"])
    np.testing.assert_allclose(logits_of(halves), logits_of(portable(bundle)), atol=1e-4)
    check_texts(WholeRunner(stages["model"]), EarlyExitDraft(halves), batches=False)
    assert step["draft"].calls
