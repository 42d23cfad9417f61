"""What is timed next to each other: bundles with their keep settings and drafts, and the prompts that they get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings, controls_for
from gsx_engines.tokens import TOKENIZER, BundleTokenizer
from gsx_plugins.errors import GsxError, UsageError

if TYPE_CHECKING:
    from gsx_engines.bundle.manifest import Manifest

SETTINGS = tuple(field.name for field in fields(KeepSettings))


@dataclass(frozen=True)
class Form:
    """A bundle at a setting.

    Args:
        name: unlike those of the other forms.
        bundle: its number among the bundles.
        keep: the keep settings of its requests.
        draft: the bundle's own draft, if it drafts.
    """

    name: str
    bundle: int
    keep: KeepSettings
    draft: str | None = None

    @property
    def process(self) -> tuple[int, bool]:
        """Forms with the same value share a process: a draft needs a runner of its own."""
        return self.bundle, self.draft is not None


def parse_setting(text: str) -> KeepSettings:
    """A keep setting as text: `budget:0.7`, `layers:0-5,8.attn`, `exit:4`, `speedup:2`, `exit-threshold:0.5` or
    `loops:2`.

    Raises:
        UsageError: another name, or a value that is no number.
    """
    name, _, value = text.partition(":")
    field = name.replace("-", "_")
    kinds: dict[str, Callable[[str], Any]] = {"layers": str, "exit": int, "loops": int}
    try:
        if field not in SETTINGS or not value:
            raise ValueError
        return KeepSettings(**{field: kinds.get(field, float)(value)})
    except ValueError:
        raise UsageError(
            f"{text!r} is not a setting",
            expected="budget:B, layers:SET, exit:E, speedup:R, exit-threshold:T or loops:N",
            found=repr(text),
        ) from None


def forms_of(bundles: Sequence[Bundle], names: Sequence[str], asked: Sequence[KeepSettings]) -> list[Form]:
    """The forms of some bundles; all others are compared with the first one.

    Args:
        names: of the bundles, all different.
        asked: the settings; each is for the bundles that can read it. None: those that `gsx verify` verifies.
    Raises:
        UsageError: no bundle can read a setting.
    """
    refused: dict[KeepSettings, UsageError] = {}
    found = []
    for number, (bundle, name) in enumerate(zip(bundles, names, strict=True)):
        prefix = f"{name}, " if len(bundles) > 1 else ""
        readable = []
        for keep in asked:
            try:
                controls_for(bundle.manifest, keep)
                readable.append((str(keep), keep))
            except UsageError as error:
                refused.setdefault(keep, error)
        for title, keep in readable or ([(str(AS_EXPORTED), AS_EXPORTED)] if asked else _usual(bundle.manifest)):
            dense = bundle.manifest.policy is None
            found.append(Form(f"{prefix}dense" if dense else f"{prefix}{title}", number, keep))
        if bundle.manifest.draft is not None:
            draft = str(bundle.manifest.draft.draft)
            found.append(Form(f"{prefix}draft {draft}", number, AS_EXPORTED, draft))
    for keep, refusal in refused.items():
        if all(form.keep != keep for form in found):
            raise refusal
    return found


def _usual(manifest: Manifest) -> list[tuple[str, KeepSettings]]:
    """The settings of `gsx verify`."""
    if manifest.policy is None:
        return [("dense", AS_EXPORTED)]
    if find_spec("torch") is None:
        raise GsxError(
            "which settings a keep rule has is known where bundles are exported",
            expected='pip install "gsx[export]"',
            found="no package torch",
            todo="or give the settings: gsx bench BUNDLE --setting budget:0.7",
        )
    from gsx.parity.settings import settings_of

    settings = settings_of(manifest, None, [])
    return list({str(one.keep): (_title(one.name, one.keep), one.keep) for one in settings}.values())


def _title(name: str, keep: KeepSettings) -> str:
    """A setting's name; a bare number is a budget."""
    return name if keep.budget is None else str(keep)


def prompts_of(bundle: Bundle, text: str, batch: int, tokens: int) -> list[list[int]]:
    """Prompts from places spread over a text, `tokens` long. Without a tokenizer: random tokens, always the same."""
    if not (bundle.directory / TOKENIZER).is_file():
        rng = np.random.default_rng(0)
        drawn: list[list[int]] = rng.integers(0, bundle.manifest.decoder.vocab_size, (batch, tokens)).tolist()
        return drawn
    tokenizer = BundleTokenizer(bundle)
    start = tokenizer.encode("")[:tokens]
    ids = tokenizer.encode(text)[len(start) :]
    if not ids:
        raise UsageError("the text to take prompts from is empty", expected="at least one token")
    body = tokens - len(start)
    ids = np.resize(ids, max(len(ids), body)).tolist()
    places = np.linspace(0, len(ids) - body, batch).astype(int)
    return [start + ids[place : place + body] for place in places]
