"""What `pip install gsx` gives: the contents of wheel and sdist, and an installed wheel that runs a bundle beside a
user's own packages `plugins`, `engines` and `exporter`. Nothing is downloaded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import gsx

ROOT = Path(__file__).parent.parent
PACKAGES = {"gsx": ".", "gsx_exporter": "exporter", "gsx_engines": "engines", "gsx_plugins": "plugins"}
# What a package needs at run time beside its Python files.
DATA = (
    "gsx/pages/base.html.j2",
    "gsx_engines/bundle/manifest.schema.json",
    "gsx_exporter/data/calibration.txt",
    "gsx_plugins/CMakeLists.txt",
    "gsx_plugins/native/plugin.cpp",
    "gsx_plugins/topk_gather/README.md",
    "gsx_plugins/topk_gather/kernel.cu",
    "gsx_plugins/topk_gather/kernel.h",
    *(f"{package}/py.typed" for package in PACKAGES),
)
IN_SDIST = {"docs", "engines", "exporter", "gsx", "plugins", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
# What a user's own project may be called.
USERS = ("plugins", "engines", "exporter")
JUNK = re.compile(r"(^|/)(__pycache__|\.\w+_cache|build|dist|out)(/|$)|\.(pyc|so|o|egg-info|log)$")

PROMPT = "token 3 keeps"
SCRIPT = f"""
import sys
import plugins, engines, exporter
assert {{plugins.OWNER, engines.OWNER, exporter.OWNER}} == {{"user"}}
import gsx
result = gsx.generate(sys.argv[1], {PROMPT!r}, max_new_tokens=8)
assert not {{"torch", "transformers"}} & set(sys.modules), "not even tried"
print(gsx.__file__, gsx.__version__, result.text, sep="\\n")
"""


def run(command: Sequence[object], folder: Path) -> str:
    """Standard output of a command that sees nothing of this project's folders."""
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=surroundings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(source: Path, target: str, out: Path) -> Path:
    """Run the build backend in this environment, without setting up another one. Returns: the file that it makes."""
    pytest.importorskip("hatchling", reason='hatchling is not installed: pip install "gsx[dev]"')
    run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out], source)
    (made,) = out.iterdir()
    return made


def files_of(wheel: Path) -> dict[str, bytes]:
    """Contents of a wheel, without its record of itself."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this state."""
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """An environment with the wheel. The dependencies are this environment's, except for PyTorch and transformers."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", "--no-deps", wheel], folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in ("torch", "transformers"):
        (packages / f"{name}.py").write_text(f'raise ImportError("{name} is not installed")\n')
    # Behind the environment's own; .pth files that are there (of an editable install) are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's project with packages of its own."""
    for name in USERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text('OWNER = "user"\n')
    (tmp_path / "main.py").write_text(SCRIPT)
    return tmp_path


def test_the_wheel_has_every_file_of_the_packages_and_no_other(wheel: Path) -> None:
    there = {
        path.relative_to(ROOT / home).as_posix()
        for package, home in PACKAGES.items()
        for path in (ROOT / home / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    found = {name for name in files_of(wheel) if ".dist-info/" not in name}
    assert found == there
    assert not set(DATA) - found
    assert not [name for name in found if JUNK.search(name)]


@pytest.mark.slow
def test_the_sdist_is_enough_to_build_the_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build(ROOT, "sdist", tmp_path / "sdist")) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
        archive.extractall(tmp_path, filter="data")
    assert {name.partition("/")[0] for name in names} - {".gitignore"} == IN_SDIST  # hatchling always takes .gitignore
    assert {"engines/cpp/CMakeLists.txt", "docs/design.md"} <= set(names)
    assert not [name for name in names if JUNK.search(name)]
    (source,) = tmp_path.glob("gsx-*")
    assert files_of(build(source, "wheel", tmp_path / "wheel")) == files_of(wheel)


@pytest.mark.slow
def test_an_installed_wheel_runs_a_bundle_beside_packages_of_these_names(
    environment: Path, project: Path, tiny_bundle: Path
) -> None:
    expected = gsx.generate(tiny_bundle, PROMPT, max_new_tokens=8).text
    home, version, text = run([environment / "bin" / "python", "main.py", tiny_bundle], project).split("\n", 2)
    assert Path(home).is_relative_to(environment)
    assert version == gsx.__version__
    assert text == expected + "\n"
    command = [environment / "bin" / "gsx", "generate", tiny_bundle, PROMPT, "--max-new-tokens", 8, "--json"]
    assert '"text"' in run(command, project)


@pytest.mark.slow
def test_a_static_reader_finds_the_packages_of_an_editable_install(tmp_path: Path) -> None:
    """The install is plain folders on the path: no finder, which only a running Python follows."""
    pytest.importorskip("mypy", reason='mypy is not installed: pip install "gsx[dev]"')
    editable = files_of(build(ROOT, "wheel:editable", tmp_path / "wheel"))
    (paths,) = [content.decode().split() for name, content in editable.items() if name.endswith(".pth")]
    assert sorted(paths) == sorted(str((ROOT / home).resolve()) for home in PACKAGES.values())
    assert not [name for name in editable if name.endswith(".py")]
    folder = tmp_path / "venv"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "_gsx.pth").write_text("\n".join(paths) + "\n")
    asked = tmp_path / "asked.py"
    asked.write_text(
        "from gsx.backend_names import Device\n"
        "from gsx_exporter.errors import CheckpointError\n"
        "from gsx_engines.errors import BundleError\n"
        "from gsx_plugins.progress import Progress\n"
        'device: Device = "cpu"\n'
        'reveal_type((CheckpointError("a"), BundleError("b"), Progress("c", 1, 2).done))\n'
    )
    told = run(
        [sys.executable, "-m", "mypy", "--strict", "--python-executable", folder / "bin" / "python", asked], tmp_path
    )
    assert "tuple[gsx_exporter.errors.CheckpointError, gsx_engines.errors.BundleError, int]" in told
