"""Keep rules are values: equal with equal parameters, built once, and told apart in everything that is cached."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import gsx_exporter
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.rule import TracedRule
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.quantization.statistics import key
from gsx_exporter.router_config import RouterConfig
from gsx_exporter.rules.calm.traced import Calm
from gsx_exporter.rules.ffn_skip.traced import FfnSkip
from gsx_exporter.rules.gateskip.traced import GateSkip
from gsx_exporter.rules.layers.traced import Layers
from gsx_exporter.rules.plan import PolicyOptions
from gsx_exporter.rules.registry import RULES, plan_policy, traced_rule
from gsx_exporter.rules.router.traced import Router
from gsx_exporter.text import tokenize
from tests.tiny import tiny_checkpoint

# Pairs of rules with one name and other parameters: their tokens skip other branches, so sizes of inputs differ.
OTHERS: list[tuple[TracedRule, TracedRule]] = [
    (Calm((4,), "softmax"), Calm((2,), "softmax")),
    (Calm((4,), "softmax"), Calm((4,), "state")),
    (Calm((4,), "softmax"), Calm((4,), "softmax", decay=1.0, decay_tokens=8)),
    (FfnSkip(1), FfnSkip(2)),
    (GateSkip(GateConfig(), (2,)), GateSkip(GateConfig(), (2, 3))),
    (GateSkip(GateConfig(), (2,)), GateSkip(GateConfig("scalar"), (2,))),
    (Router(RouterConfig(), 3), Router(RouterConfig(full_first=4), 3)),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_checkpoint(tmp_path_factory.mktemp("values") / "model", layers=5, tokenizer=True))


def key_of(checkpoint: Checkpoint, rule: TracedRule | None, text: str = "a" * 64) -> str:
    ids = np.zeros((1, 8), np.int64)
    return key(checkpoint, ids, text, DecoderOptions(rule), {"full_until": np.zeros(1, np.int64)})


@pytest.mark.parametrize(("one", "other"), OTHERS, ids=lambda rule: repr(rule)[:60])
def test_statistics_are_cached_by_all_that_changes_them(
    checkpoint: Checkpoint, one: TracedRule, other: TracedRule
) -> None:
    """`calm:softmax,exits=4 --int8` and then `exits=2` must not share activation ranges."""
    assert key_of(checkpoint, one) != key_of(checkpoint, other)
    assert key_of(checkpoint, one) == key_of(checkpoint, one)
    assert key_of(checkpoint, one) != key_of(checkpoint, one, text="b" * 64)
    assert key_of(checkpoint, one) != key_of(checkpoint, None)


def test_statistics_are_cached_by_the_configuration(tmp_path: Path) -> None:
    """The same weights with another RoPE base have other activations."""
    made = [tiny_checkpoint(tmp_path / str(base), rope_theta=base) for base in (10_000.0, 50_000.0)]
    first, second = (open_checkpoint(path) for path in made)
    assert first.weights_sha256() == second.weights_sha256()
    assert key_of(first, None) != key_of(second, None)


def test_statistics_are_cached_by_the_context(tmp_path: Path) -> None:
    """With LongRoPE another context has other factors, and so other activations."""
    original = {"original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    model = tiny_checkpoint(tmp_path / "model", "phi3", rope_parameters={**rope, **original}, **original)
    assert key_of(open_checkpoint(model), None) != key_of(open_checkpoint(model, context=512), None)


@pytest.mark.parametrize(("one", "other"), OTHERS, ids=lambda rule: repr(rule)[:60])
def test_rules_are_frozen_values(one: TracedRule, other: TracedRule) -> None:
    assert one != other
    assert hash(one) == hash(one)
    assert len({one, other, one}) == 2
    with pytest.raises(AttributeError):
        one.anything = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("policy", "gate"),
    [
        ("gateskip", GateConfig()),
        ("ffn-skip", None),
        ("layers:0,2-4", None),
        ("unified:1.5", None),
        ("calm:state,threshold=0.9,exits=2+3,decay=1", None),
    ],
)
def test_the_calibrated_rule_is_what_the_manifest_records(
    tmp_path: Path, tiny_text: Path, policy: str, gate: GateConfig | None
) -> None:
    """The rule that an export traces is the one that is made of the finished bundle."""
    found = open_checkpoint(tiny_checkpoint(tmp_path / "model", layers=5, gate=gate, tokenizer=True))
    plan = plan_policy(PolicyOptions(policy), found.config)
    text = tokenize(found, tiny_text, max_tokens=1024) if plan.calibrates else None
    settled = plan.settle(found, text, lambda progress: None)
    assert settled.policy is not None
    assert settled.policy.name == policy.split(":")[0]
    assert settled.rule is not None
    # The graph and the runners find this out separately: `Manifest.hides_skipped`.
    assert settled.rule.hides_skipped == (plan.kv_policy == "none" and settled.selection is not None)
    assert traced_rule(settled.policy, settled.selection, found.config) == settled.rule


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


HOME = Path(gsx_exporter.__file__).parent


def reached_from(start: list[Path]) -> set[str]:
    """The modules of the exporter that files import, directly or through others."""
    files = {
        ".".join(("gsx_exporter", *path.relative_to(HOME).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in HOME.rglob("*.py")
    }
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        for name in imports_of(waiting.pop()) & set(files):
            if name not in found:
                found.add(name)
                waiting.append(files[name])
    return found


# What both sides may read: the model's configuration and weights, and errors. Nothing that computes.
COMMON = {
    "checkpoint",
    "config",
    "errors",
    "experts",
    "families",
    "gate_config",
    "rope_config",
    "router_config",
    "section",
    "sphere",
}


def test_reference_and_traced_decoder_share_no_code() -> None:
    """Parity is meaningful only as long as the two sides are written independently."""
    references = [*(HOME / "reference").glob("*.py"), *HOME.glob("rules/*/reference.py")]
    traced = [*(HOME / "decoder").glob("*.py"), *HOME.glob("rules/*/traced.py")]
    assert len(references) >= 3 + 5
    shared = reached_from(references) & reached_from(traced)
    assert {name.removeprefix("gsx_exporter.").split(".")[0] for name in shared} - COMMON == set()


def test_a_rule_is_named_only_in_its_folder() -> None:
    """No code outside of the folder that owns it compares a policy's or a scheme's name with a word."""
    top = HOME.parents[1]
    owners = ("exporter/gsx_exporter/rules/", "exporter/gsx_exporter/quantization/")
    named = []
    for path in (path for top_folder in ("gsx", "exporter", "engines") for path in (top / top_folder).rglob("*.py")):
        where = path.relative_to(top).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and not where.startswith(owners):
                sides = [node.left, *node.comparators]
                words = any(isinstance(part, ast.Constant) and isinstance(part.value, str) for part in sides)
                if words and re.search(r"policy\.name|\bscheme\b(?! not in)", ast.unparse(node)):
                    named.append(f"{where}:{node.lineno}: {ast.unparse(node)}")
    assert named == []


def test_layers_is_one_rule_under_two_names() -> None:
    assert RULES["layers"].traced is RULES["unified"].traced
    assert Layers() == Layers()
