"""A GPU that no call of this process can use any more: whoever serves ends, and says so; nobody goes on with it."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from starlette.routing import Route

from gsx.torch_runtime import TorchRuntime
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import controls_for
from gsx_engines.errors import EngineError, LostGpuError
from gsx_engines.generation.generate import generate
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.serving import http_server
from gsx_engines.serving.request import Request
from gsx_engines.serving.scheduler import Scheduler
from gsx_engines.tensorrt.cuda import ENDS_PROCESS
from gsx_engines.tokens import BundleTokenizer
from tests.engines.conftest import Make
from tests.engines.standin_gpu import CAPACITY
from tests.engines.test_serving import Recorder
from tests.plugins.emulation import cuda_include

PROMPT = [60, 61, 7]


def test_the_codes_are_those_that_cuda_names() -> None:
    folder = cuda_include()
    header = folder / "driver_types.h" if folder is not None else Path("/nonexistent")
    if not header.is_file():
        pytest.skip("needs CUDA's headers")
    described = re.findall(r"/\*\*((?:(?!\*/).)*?)\*/\s*cudaError\w+\s*=\s*(\d+)", header.read_text(), re.DOTALL)
    named = {int(code) for text, code in described if "must be terminated" in " ".join(text.replace("*", " ").split())}
    assert named
    assert named <= ENDS_PROCESS


def test_every_call_after_it_says_so(make_tiny_bundle: Callable[..., Path], make: Make) -> None:
    """Wherever it happens: in a call of CUDA, or as a refusal of TensorRT that gives no reason."""
    bundle = open_bundle(make_tiny_bundle())
    made = make(bundle, "tensorrt")["model"]
    gpu, stage, controls = made.gpu, made.stage, controls_for(bundle.manifest)
    cache = WholeRunner(stage).new_cache(1, CAPACITY)
    number, reached, said = 0, True, ""
    while reached:  # each call of the first step, which makes a context
        number, stage._plan.engine._contexts = number + 1, {}  # type: ignore[attr-defined]
        gpu.dies_at = gpu.calls + number
        try:
            WholeRunner(stage).step(cache, np.array([PROMPT[:1]]), controls)
        except LostGpuError as error:
            said = str(error)
        assert re.search(r"(?s)cannot use the GPU any more.*start the process again", said)
        reached = gpu.is_dead
        gpu.dies_at = 0
        gpu.cudaGetLastError()
    assert number > 30


@pytest.fixture
def serving(make_tiny_bundle: Callable[..., Path], make: Make) -> tuple[Scheduler, Any]:
    """A scheduler on the stand-in, warmed up, and its GPU."""
    made = make(open_bundle(make_tiny_bundle()), "tensorrt", batch=2)["model"]
    scheduler = Scheduler(WholeRunner(made.stage), slots=2, context=CAPACITY)
    scheduler.warm_up()
    return scheduler, made.gpu


def test_the_scheduler_ends(serving: tuple[Scheduler, Any]) -> None:
    """All requests fail with the reason: those that run, those that wait, and those that come later."""
    scheduler, gpu = serving
    clients = [Recorder() for _ in range(4)]
    for client in clients:
        scheduler.submit(Request(PROMPT, 20, stop_ids=frozenset()), client)
    for _ in range(4):
        scheduler.work()
    gpu.dies_at = gpu.calls + 1
    scheduler.run()
    assert all(isinstance(client.error, LostGpuError) for client in clients)
    assert scheduler.failure is clients[0].error
    with pytest.raises(LostGpuError):
        scheduler.submit(Request(PROMPT, 2), Recorder())


def test_a_failure_that_is_not_the_end_is_none(serving: tuple[Scheduler, Any]) -> None:
    scheduler, gpu = serving
    first, second = Recorder(), Recorder()
    scheduler.submit(Request(PROMPT, 4, stop_ids=frozenset()), first)
    gpu.fail_at = gpu.calls + 1
    scheduler.work()
    scheduler.submit(Request(PROMPT, 4, stop_ids=frozenset()), second)
    while scheduler.under_way or scheduler.waiting:
        scheduler.work()
    assert first.error is not None
    assert second.result is not None
    assert scheduler.failure is None


def test_the_http_server_ends(serving: tuple[Scheduler, Any], make_tiny_bundle: Callable[..., Path]) -> None:
    """A request gets the reason, readiness turns, and `serve` raises what the command line prints, with status 1."""
    scheduler, gpu = serving
    tokenizer = BundleTokenizer(open_bundle(make_tiny_bundle()))
    served = http_server.Served("tiny", "0", scheduler._manifest, scheduler, tokenizer, None, None, 60)
    listening, ended, started = http_server.bind("127.0.0.1", 0), [], threading.Event()

    def serve() -> None:
        with pytest.raises(LostGpuError) as raised:
            http_server.serve(served, listening, 5, started.set)
        ended.append(raised.value)

    thread = threading.Thread(target=serve)
    thread.start()
    assert started.wait(60)
    gpu.dies_at = gpu.calls + 20
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 100}).encode()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1/completions"
    with pytest.raises(urllib.error.HTTPError) as answer:
        urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"}), timeout=60)
    assert (answer.value.code, json.loads(answer.value.read())["error"]["code"]) == (503, "gpu_lost")
    thread.join(60)
    assert ended == [scheduler.failure]
    routes = [one for one in http_server.make_app(served).routes if isinstance(one, Route)]
    ready = asyncio.run(next(one for one in routes if one.path == "/health/ready").endpoint())
    assert (ready.status_code, json.loads(ready.body)) == (503, {"status": "the GPU is lost"})


STUB = """
import json, sys, types
from pathlib import Path

def made(name):  # as much of the module that Triton gives its models as this one touches
    return type(name, (), {"__init__": lambda self, *a, **k: self.__dict__.update(k, given=a)})

utils = types.ModuleType("triton_python_backend_utils")
family = type("MetricFamily", (), {"COUNTER": 0, "GAUGE": 1, "__init__": lambda self, **k: None})
family.Metric = lambda self, labels: types.SimpleNamespace(increment=lambda n: None, set=lambda n: None)
utils.MetricFamily, utils.Tensor, utils.InferenceResponse = family, made("Tensor"), made("InferenceResponse")
utils.TritonModelException = type("TritonModelException", (Exception,), {})
utils.TritonError = lambda text, code: f"{code}: {text}"
for code in ("UNAVAILABLE", "INVALID_ARG", "INTERNAL"):
    setattr(utils.TritonError, code, code)
utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
sys.modules[utils.__name__] = utils

from gsx_engines.errors import LostGpuError
from gsx_engines.serving import triton_model
from gsx_engines.serving.request import Request

repository = Path(sys.argv[1])
parameters = dict(form="gsx", backend="onnxruntime", slots="2", queue="4", threads="1")
config = {"name": "gsx", "parameters": {name: {"string_value": value} for name, value in parameters.items()}}
model = triton_model.TritonPythonModel()
model.initialize({"model_repository": str(repository), "model_version": "1", "model_config": json.dumps(config)})
runner, step = model._scheduler._runner, model._scheduler._runner.step
steps = []
print("warm" if runner is not None else "", flush=True)

def dying(*given, **named):
    steps.append(1)
    if len(steps) > 3:
        raise LostGpuError("the GPU is lost", todo="start again")
    return step(*given, **named)

runner.step = dying
send = types.SimpleNamespace(send=lambda response=None, flags=0: print(response.error, flush=True) if flags else None)
send.is_cancelled = lambda: False
responses = triton_model._Responses(send, model._form, frozenset(), 2, "")
client = triton_model._Client(responses, model._outbox, False, model._metrics)
model._scheduler.submit(Request([60, 61], 50, stop_ids=frozenset()), client)
model._thread.join()
print("it lives on", flush=True)
"""


def test_triton_s_process_of_the_model_ends(make_tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """After its last answers, with a status that is none of success. (Triton itself is in tests/serving.)"""
    (tmp_path / "1").mkdir()
    (tmp_path / "1/bundle").symlink_to(make_tiny_bundle())
    done = subprocess.run(
        [sys.executable, "-c", STUB, tmp_path], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.splitlines() == ["warm", "UNAVAILABLE: the GPU is lost", "  start again"], done.stderr
    assert done.returncode == 1
    assert "the model's process ends: the GPU is lost" in done.stderr


@pytest.mark.parametrize(("code", "kind"), [(700, LostGpuError), (2, torch.AcceleratorError)])
def test_pytorch(
    make_tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    """Its own error becomes ours where nothing works any more, and only there."""
    stage = TorchRuntime("cpu").stage(open_bundle(make_tiny_bundle()), "model")
    error = torch.AcceleratorError("CUDA error: made up\nmore")
    error.error_code = code

    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(stage, "_enter", fails)
    with pytest.raises(kind, match="CUDA error: made up"):
        generate(WholeRunner(stage), [PROMPT], max_new_tokens=2)


def test_warming_up_makes_every_kind_of_call(serving: tuple[Scheduler, Any]) -> None:
    """So that the first request finds its contexts, memory and recordings."""
    scheduler, gpu = serving
    assert gpu.launches > 0, "steps were recorded and replayed"
    held, client = gpu.held, Recorder()
    scheduler.submit(Request(PROMPT * 5, 8, stop_ids=frozenset()), client)
    while scheduler.under_way or scheduler.waiting:
        scheduler.work()
    assert client.result is not None
    assert gpu.held <= held + 1, "no new context, and no memory but for a longer prompt"


def test_a_server_that_cannot_make_its_calls_does_not_begin(make_tiny_bundle: Callable[..., Path], make: Make) -> None:
    made = make(open_bundle(make_tiny_bundle()), "tensorrt", batch=2)["model"]
    scheduler = Scheduler(WholeRunner(made.stage), slots=2, context=CAPACITY)
    made.gpu.fail_at = made.gpu.calls + 1
    with pytest.raises(EngineError, match="not enough memory for an execution context"):
        scheduler.warm_up()
