"""Fixtures that are expensive to make (an export traces the model for seconds), and are therefore made once per run.

All processes of a run (`pytest --numprocesses`) share them. What a test changes, it copies first.
"""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from hypothesis import settings

from gsx_engines.tensorrt.preload import preload_tensorrt_rtx
from gsx_exporter.gate_config import GateConfig

if TYPE_CHECKING:
    from gsx_engines.bundle.bundle import Bundle

# A busy machine is no failure.
settings.register_profile("gsx", deadline=None)
settings.load_profile("gsx")

# Before any test imports it, so that plugins work whatever test runs first.
preload_tensorrt_rtx()


def pytest_collection_finish() -> None:
    """Keep what was imported out of every search for garbage, which would walk half a million objects each time."""
    gc.collect()
    gc.freeze()


# Enough for a calibration window of the tiny model, whose tokenizer makes a token of every byte.
TEXT_BYTES = 6000

# Makes a file or directory at a path of its own, under a name, by the first process that asks for it.
MakeOnce = Callable[[str, Callable[[Path], Any]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Makes what the whole run shares: `make_once(name, make)` calls `make(path)` once, and returns the path."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "shared"
    folder.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], Any]) -> Path:
        path = folder / name
        with FileLock(f"{path}.lock"):
            if not path.exists():
                partial = folder / f"{name}.partial"
                make(partial)
                partial.rename(path)
        return path

    return once


@pytest.fixture(scope="session")
def tiny_text(make_once: MakeOnce) -> Path:
    """A UTF-8 text of a few thousand bytes."""
    words = [f"token {n} keeps layer {n * 7 % 13} and skips {n * 5 % 11};" for n in range(400)]
    text = "\n".join(words)[:TEXT_BYTES]
    return make_once("text.txt", lambda path: path.write_text(text, encoding="utf-8"))


@pytest.fixture(scope="session")
def tiny_gated(make_once: MakeOnce) -> Path:
    """A tiny Llama with vector gates on both branches, and a tokenizer."""
    from tests.tiny import tiny_checkpoint

    return make_once("gated", lambda path: tiny_checkpoint(path, gate=GateConfig(), tokenizer=True, exits=(1, 2)))


@pytest.fixture(scope="session")
def tiny_bundle(make_tiny_bundle: Callable[..., Path]) -> Path:
    """`tiny_gated`, exported at budget 0.7."""
    return make_tiny_bundle()


@pytest.fixture(scope="session")
def make_tiny_bundle(make_once: MakeOnce, tiny_gated: Path, tiny_text: Path) -> Callable[..., Path]:
    """Exports `tiny_gated` with options of one's own; each set of options once."""
    from gsx.workflows.export import export

    def make(**options: Any) -> Path:
        text = None if options.get("select") == "rank" else tiny_text  # ranks need no text
        values = {"budget": 0.7, "calibration_tokens": 1024, "calibration": text, **options}
        name = hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:16]
        return make_once(f"bundle-{name}", lambda path: export(tiny_gated, path, **values))

    return make


@pytest.fixture(scope="session")
def make_looped_bundle(make_once: MakeOnce) -> Callable[[str], Bundle]:
    """Exports a tiny looped model, up to 3 loops, whose caches are of each loop (`per_loop`) or one (`last_loop`)."""
    from gsx.workflows.export import export
    from gsx_engines.bundle.bundle import open_bundle
    from tests.tiny import tiny_checkpoint

    def make(caches: str) -> Bundle:
        def write(path: Path) -> None:
            keys = {
                "layers": 4,
                "n_output_layers": 1,
                "recurrent_kv_cache_mode": caches,
                "max_position_embeddings": 1024,
            }
            export(tiny_checkpoint(path.with_suffix(".model"), "dory", tokenizer=True, **keys), path)

        return open_bundle(make_once(f"bundle-looped-{caches}", write))

    return make


# Families whose graphs have what no other test of the runtimes has: soft caps, windows of some layers and norms around
# branches; routed experts.
OTHER_FAMILIES = ("gemma2", "qwen3_moe")


@pytest.fixture(scope="session", params=OTHER_FAMILIES)
def family_bundle(request: pytest.FixtureRequest, make_once: MakeOnce, tiny_text: Path) -> Bundle:
    """A tiny model of each of `OTHER_FAMILIES`, with scalar gates, exported at budget 0.7."""
    from gsx.workflows.export import export
    from gsx_engines.bundle.bundle import open_bundle
    from tests.tiny import tiny_checkpoint

    def make(path: Path) -> None:
        model = path.with_suffix(".model")
        tiny_checkpoint(model, request.param, gate=GateConfig("scalar", "pre_norm"), tokenizer=True)
        export(model, path, budget=0.7, calibration_tokens=1024, calibration=tiny_text)

    return open_bundle(make_once(f"bundle-{request.param}", make))


@pytest.fixture(scope="session")
def base_models(make_once: MakeOnce) -> dict[str, Path]:
    """Checkpoints that look like downloaded ones, by name."""
    from tests.checkpoints import BASES

    return {name: make_once(f"model-{name.replace(' ', '-')}", make) for name, make in BASES.items()}


@pytest.fixture(scope="session")
def chat_bundle(make_once: MakeOnce, base_models: dict[str, Path]) -> Path:
    """`chat llama` with a chat template and gates of sets of layers, exported with a draft."""
    from gsx.workflows.export import export
    from tests.checkpoints import CHAT_TEMPLATE, copy

    def make(path: Path) -> None:
        model = copy(base_models["chat llama"], path.with_name("chat-model"))
        (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        export(model, path, policy="layers", draft="exit:1")

    return make_once("bundle-with-a-template", make)


@pytest.fixture(scope="session")
def base_bundles(make_once: MakeOnce, base_models: dict[str, Path]) -> dict[str, Bundle]:
    """`base_models`, exported."""
    from gsx.workflows.export import export
    from gsx_engines.bundle.bundle import open_bundle

    return {
        name: open_bundle(make_once(f"bundle-{name.replace(' ', '-')}", partial(export, model)))
        for name, model in base_models.items()
    }


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, by Playwright: what shows a page."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page needs a browser: pip install playwright")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("the page needs a browser: apt-get install chromium")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()
