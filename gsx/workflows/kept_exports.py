"""Bundles of one model in a work folder, found again by what they were exported from: `gsx compare`, `gsx tune`."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from gsx.comparison.measure import LEAST_TOKENS
from gsx.comparison.options import ExportOptions
from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.bundle import Bundle, open_bundle, sha256_of
from gsx_engines.errors import BundleError
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.tokenizer import load_tokenizer
from gsx_exporter.errors import TextError
from gsx_exporter.quantization.statistics import default_cache
from gsx_exporter.rules.plan import PolicyOptions
from gsx_exporter.rules.registry import plan_policy
from gsx_exporter.text import MIN_TOKENS, TokenText, tokenize
from gsx_plugins.progress import OnProgress, prefixed

WINDOW_TOKENS = 256


@dataclass(frozen=True)
class CalibrationPart:
    """The part of a text to calibrate on: its first tokens. Args: path: None for the text that ships with gsx."""

    path: Path | None
    text: TokenText
    tokens: int


def halves(checkpoint: Checkpoint, path: Path | None, tokens: int) -> tuple[CalibrationPart, np.ndarray]:
    """A text's first half, to calibrate on, and the windows [M, S] of its second half, to measure on.

    Args: path: None for the text that ships with gsx; tokens: about how many of its tokens to measure.
    Raises:
        TextError: the text is too short.
    """
    text = tokenize(checkpoint, path, max_tokens=2 * tokens, window=WINDOW_TOKENS)
    half = len(text.ids) // 2
    # The tokens that a tokenizer begins every window with are not part of the text.
    start = len(load_tokenizer(checkpoint).encode("").ids)
    calibration_tokens = half * (text.ids.shape[1] - start)
    if calibration_tokens < MIN_TOKENS:
        raise TextError(
            f"{text.name}: the text is too short to calibrate on one half of it and measure the other",
            expected=f"at least {2 * LEAST_TOKENS} tokens",
            found=f"{text.tokens} in whole windows",
        )
    return CalibrationPart(path, text, calibration_tokens), text.ids[half:]


class KeptExports:
    """The bundles.

    Args:
        checkpoint: what is exported.
        folder: where they stay.
        calibration: what they are calibrated on.
    """

    def __init__(
        self, checkpoint: Checkpoint, folder: Path, calibration: CalibrationPart, on_progress: OnProgress
    ) -> None:
        self._checkpoint, self._folder, self._calibration = checkpoint, folder, calibration
        self._on_progress = on_progress
        self._source = source_sha256()
        self._model = [checkpoint.weights_sha256(), *(sha256_of(path) for path in checkpoint.companions())]

    def place(self, options: ExportOptions) -> Path:
        """The folder of a bundle, whether it is there or not. Its name is made from all that the bundle depends on."""
        ingredients = [self._source, vars(options), *self._model]
        if self.reads_text(options):
            ingredients += [self._calibration.text.sha256, str(self._calibration.tokens)]
        key = hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()
        return self._folder / f"{re.sub('[^a-z0-9-]+', '-', options.name)}-{key[:12]}"

    def reads_text(self, options: ExportOptions) -> bool:
        """Whether an export reads calibration text.

        Raises:
            UsageError: the policy does not fit the model.
        """
        plan = plan_policy(PolicyOptions(options.policy, budget=options.budget), self._checkpoint.config)
        searched = options.draft is not None and options.draft.endswith("auto")
        return plan.calibrates or options.scheme is not None or searched

    def kept(self, options: ExportOptions) -> Bundle | None:
        """The bundle, if it is there and whole."""
        try:
            return open_bundle(self.place(options), check_weights=True)
        except BundleError:
            return None

    def bundle(self, options: ExportOptions) -> Bundle:
        """The bundle: the existing one, if it is whole, or a new one.

        Raises:
            GsxError: it cannot be exported.
        """
        return self.kept(options) or export(
            self._checkpoint.source,
            self.place(options),
            policy=options.policy,
            budget=options.budget,
            quantize=Quantize(options.scheme, cache=default_cache()) if options.scheme else None,
            draft=options.draft,
            calibration=self._calibration.path if self.reads_text(options) else None,
            calibration_tokens=self._calibration.tokens,
            overwrite=True,
            on_progress=prefixed(self._on_progress, options.name),
        )


def source_sha256() -> str:
    """Hash of gsx's own Python source: another version of it may export another bundle."""
    digest = hashlib.sha256()
    for package in ("gsx", "gsx_exporter", "gsx_engines", "gsx_plugins"):
        for path in sorted(Path(str(import_module(package).__file__)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
