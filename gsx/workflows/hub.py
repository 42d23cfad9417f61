"""Bundles on the Hugging Face hub: `gsx export --push` writes one there, and `gsx generate` takes its name.

Only a bundle's own kinds of files are fetched, and none of them is code; every hash of `gsx.json` is checked, that of
the weights too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gsx.pages.render import render
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.errors import BundleError
from gsx_engines.tokens import TOKENIZER
from gsx_plugins.errors import GsxError
from gsx_plugins.files import cache_folder
from gsx_plugins.progress import OnProgress, Progress, silent

# `organization/name`, which no local path is that begins with `.`, `/` or `~`.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATTERNS = ("*.json", "*.onnx", "weights.bin", "*.jinja")
_CARD = "README.md"


def open_named(bundle: Bundle | str | Path, on_progress: OnProgress = silent) -> Bundle:
    """An opened bundle, one by its directory, or one by its hub id, which is fetched.

    Raises:
        GsxError: it is none, cannot be fetched, or does not match its hashes.
    """
    if isinstance(bundle, Bundle):
        return bundle
    if Path(bundle).exists() or not _HUB_ID.fullmatch(str(bundle)):
        return open_bundle(bundle)
    return open_bundle(_fetched(str(bundle), on_progress), check_weights=True)


def push(bundle: Bundle | str | Path, repo: str, *, private: bool = True, on_progress: OnProgress = silent) -> str:
    """Write a bundle to the Hugging Face hub, with a model card.

    The card says what the bundle is, what it costs in quality as far as that was measured, and how to run it. You must
    be logged in (`hf auth login`), or have a token in `HF_TOKEN`.

    Args:
        bundle: an opened bundle or its directory.
        repo: `name` or `organization/name`; made if it is not there.
        private: whether a new one is; publishing a model is a decision of its own.
        on_progress: called with the progress.
    Returns: the address of the commit.
    Raises:
        GsxError: the hub cannot be reached or refuses it. The bundle stays as it is.
    Example:
        >>> gsx.push("out/demo", "me/demo-gsx")  # doctest: +SKIP
        'https://huggingface.co/me/demo-gsx/commit/...'
    """
    hub = _hub("pushing to the hub")
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, check_weights=True)
    files = sorted(path for path in opened.directory.rglob("*") if path.is_file() and path.name != _CARD)
    operations = [hub.CommitOperationAdd(path.relative_to(opened.directory).as_posix(), path) for path in files]
    operations.append(hub.CommitOperationAdd(_CARD, card(opened, repo).encode()))
    on_progress(Progress(f"pushing {len(files)} files to {repo}"))
    try:
        api = hub.HfApi()
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        found = api.create_commit(name, operations, commit_message="gsx bundle")
    except Exception as error:  # the library raises those of its HTTP client too, which changes between versions
        raise GsxError(
            f"{repo}: the bundle could not be pushed to the hub",
            found=_first_line(error),
            todo="check the name, the connection and the login (hf auth login); "
            f"the bundle stays in {opened.directory}",
        ) from error
    return str(found.commit_url)


def card(bundle: Bundle, repo: str) -> str:
    """The model card, in Markdown."""
    manifest = bundle.manifest
    measured = None if manifest.quantization is None else manifest.quantization.measured
    policy = manifest.policy
    return render(
        "card.md.j2",
        repo=repo,
        manifest=manifest,
        source=manifest.source.model if _HUB_ID.fullmatch(manifest.source.model) else None,
        policy="dense" if policy is None else policy.name,
        measured=measured,
        has_text=(bundle.directory / TOKENIZER).is_file(),
        report=(bundle.directory / "parity.json").is_file(),
        inputs=[] if policy is None else [read.name for read in policy.inputs],
    )


def _fetched(name: str, on_progress: OnProgress) -> Path:
    """The directory of a bundle of the hub, in the user's cache. Its files are real ones: ONNX Runtime does not follow
    links to weights."""
    try:
        hub = _hub(f"fetching {name}")
    except GsxError as error:
        raise BundleError(
            f"{name}: no such directory", expected="a bundle", found=error.found, todo=error.todo
        ) from error
    place = cache_folder() / "hub" / name.replace("/", "--")
    on_progress(Progress(f"fetching {name} from the hub"))
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(_PATTERNS), local_dir=place))
    except Exception as error:  # as in `push`
        raise BundleError(
            f"{name}: neither a local bundle nor one that could be fetched from the hub",
            found=_first_line(error),
            todo="check the spelling and the connection; gsx export MODEL -o OUT makes a local one",
        ) from error


def _hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise GsxError(
            f"{what} needs the package huggingface_hub", found="no such package", todo="pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
