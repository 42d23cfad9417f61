"""`gsx inspect`, and that the public API is lazy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import gsx
from gsx.cli import run
from gsx.workflows.text_facts import Token, TokenList
from gsx_exporter.checkpoint.opening import open_checkpoint
from tests.tiny import tiny_checkpoint


def test_checkpoint(tiny_gated: Path) -> None:
    report = gsx.inspect(tiny_gated)
    checkpoint = open_checkpoint(tiny_gated)
    config = checkpoint.config
    assert report.kind == "checkpoint"
    assert report.shape["layers"] == config.num_layers
    assert report.gates == {"kind": "vector", "input": "post_norm", "branches": ["attn", "mlp"]}
    assert report.exits == (1, 2)
    H = config.hidden_size
    assert report.parameters["gates"] == config.num_layers * 2 * (H * H + H)
    total = sum(checkpoint.tensor(name).numel() for name in checkpoint.names)
    assert sum(report.parameters.values()) == total
    assert report.types == ("f32",)
    assert "model.safetensors" in report.files


def test_bundle(tiny_bundle: Path, tiny_gated: Path) -> None:
    report = gsx.inspect(tiny_bundle)
    assert report.kind == "bundle"
    assert report.parameters == gsx.inspect(tiny_gated).parameters
    assert report.exits == (1, 2)
    assert report.bundle is not None
    assert report.bundle["budget"] == 0.7
    assert report.bundle["parity"] is None
    assert (report.bundle["draft"], report.bundle["quantization"], report.bundle["engines"]) == (None, None, {})
    for point in report.bundle["grid"]:
        assert abs(point["kept_share"] - point["budget"]) <= 0.02
    json.dumps(report.to_dict())


def test_dense_model(tmp_path: Path) -> None:
    report = gsx.inspect(tiny_checkpoint(tmp_path / "dense", tied=True))
    assert report.gates is None
    assert report.parameters["gates"] == 0


def test_command(tiny_bundle: Path, tiny_gated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tiny_bundle)]) == 0
    out = capsys.readouterr().out
    for part in ("bundle, llama", "vector on attn and mlp", "budget 0.7", "weights.bin", "not verified yet"):
        assert part in out
    assert run(["inspect", str(tiny_gated), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "checkpoint"
    assert run(["inspect", str(tiny_gated / "nothing")]) == 1
    assert "no such directory" in capsys.readouterr().err


def tokens(values: TokenList | None) -> dict[str, int]:
    assert values is not None
    return {token.text: token.id for token in values.first if token.text is not None}


def edit(path: Path, **keys: Any) -> None:
    raw = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(raw | keys))


def test_how_text_is_read(tmp_path: Path) -> None:
    """Each fact with the file that says so."""
    model = tiny_checkpoint(tmp_path / "model", tokenizer=True, layers=1)
    edit(model / "generation_config.json", eos_token_id=[2, 65], bos_token_id=1)
    edit(model / "tokenizer_config.json", chat_template="{{ messages }}")
    text = gsx.inspect(model).text
    assert [(token.id, token.text) for token in text.ends] == [(2, "<|endoftext|>"), (65, "_")]
    assert text.begin == Token(1, "<|begin|>")
    assert text.ids_from == "generation_config.json"
    assert tokens(text.special) == tokens(text.added) == {"<|pad|>": 0, "<|begin|>": 1, "<|endoftext|>": 2}
    assert text.special is not None
    assert text.special.files == {"tokenizer.json": 3}
    assert text.chat_template == "tokenizer_config.json"
    assert (text.context.positions, text.context.file) == (512, "config.json")

    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "generation_config.json").unlink()
    (model / "tokenizer.json").unlink()
    text = gsx.inspect(model).text
    assert (text.ends, text.ids_from) == ((Token(2, None),), "config.json")
    assert (text.special, text.added) == (None, None)
    assert str(text.no_tokenizer).endswith("has no tokenizer")
    assert text.chat_template == "chat_template.jinja"


def test_only_the_first_added_tokens_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_checkpoint(tmp_path / "model", tokenizer=True, layers=1, vocab=300)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([f"<tool {n}>" for n in range(20)])
    tokenizer.save(str(model / "tokenizer.json"))
    added = gsx.inspect(model).text.added
    assert added is not None
    assert (added.count, len(added.first)) == (23, 8)
    assert run(["inspect", str(model)]) == 0
    assert "added tokens    23: 0 '<|pad|>', " in (out := capsys.readouterr().out)
    assert "259 '<tool 0>', 260 '<tool 1>', 261 '<tool 2>', 262 '<tool 3>', 263 '<tool 4>', ... (tokenizer.json)" in out


def test_scaled_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    model = tiny_checkpoint(tmp_path / "model", layers=1, rope_parameters=scaling)
    context = gsx.inspect(model).text.context
    assert (context.positions, context.stored) == (512, 512)
    assert context.rope["factor"] == 4
    assert run(["inspect", str(model)]) == 0
    assert "512 positions, yarn RoPE scaling with factor 4.0 over 128 (config.json)" in capsys.readouterr().out


def test_a_bundle_needs_neither_transformers_nor_pytorch(tiny_bundle: Path) -> None:
    code = (
        "import sys, gsx; report = gsx.inspect(sys.argv[1]);"
        "assert not {'torch', 'transformers'} & set(sys.modules);"
        "text = report.text;"
        "print(text.ids_from, [t.text for t in text.ends], text.begin.text, text.added.count, text.context.positions)"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tiny_bundle)], check=True, capture_output=True, text=True)
    assert found.stdout == "gsx.json ['<|endoftext|>'] <|begin|> 3 512\n"


def test_api_is_lazy_and_its_functions_stay_functions() -> None:
    code = (
        "import sys, gsx; gsx.GsxError; gsx.open_bundle; gsx.__version__;"
        "assert not {'torch', 'transformers'} & set(sys.modules);"
        "import gsx.workflows.inspect; from gsx_plugins.progress import Progress;"
        "assert callable(gsx.inspect) and callable(gsx.export) and callable(gsx.verify);"
        "assert set(gsx.__all__) <= set(dir(gsx));"
        "[getattr(gsx, name) for name in gsx.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gsx.nothing  # type: ignore[attr-defined]  # noqa: B018
