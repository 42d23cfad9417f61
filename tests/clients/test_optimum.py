"""A bundle's folder, as it is, in a client that this project did not write: Optimum's `ORTModelForCausalLM`.

Optimum wants an older transformers, and so an environment of its own.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.generation.generate import generate
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.whole import WholeRunner

PYTHON = Path(__file__).parent.parent.parent / ".venv-optimum" / "bin" / "python"
TOKENS = 24
PROGRAM = f"""
import json, sys, torch
from optimum.onnxruntime import ORTModelForCausalLM
model = ORTModelForCausalLM.from_pretrained(sys.argv[1], use_io_binding=False)
ids = torch.tensor([json.loads(sys.argv[2])])
found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens={TOKENS}, do_sample=False)
print(json.dumps(found[0, ids.shape[1]:].tolist()))
"""

pytestmark = pytest.mark.skipif(
    not PYTHON.is_file(),
    reason="no Optimum: python -m venv .venv-optimum; .venv-optimum/bin/pip install 'optimum-onnx[onnxruntime]'",
)


def test_optimum_writes_the_same_tokens(tiny_bundle: Path) -> None:
    """At the exported budget: Optimum feeds no thresholds, so the default in the file applies."""
    prompt = [5, 60, 61, 7, 8]
    bundle = open_bundle(tiny_bundle)
    ours = generate(WholeRunner(PortableStage(bundle)), [prompt], max_new_tokens=TOKENS).sequences[0].tokens
    command = [str(PYTHON), "-c", PROGRAM, str(tiny_bundle), json.dumps(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs[: len(ours)] == ours
    assert len(set(ours)) > 3, "a constant output would prove nothing"
