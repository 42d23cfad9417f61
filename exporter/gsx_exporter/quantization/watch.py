"""Measuring the statistics: text is run through the model, and the inputs of every linear layer are recorded.

A branch that keeps half of the tokens gets other values than one that keeps all of them. So the text is run with the
exported selection, and what a skipped token would have given is not counted. ModelOpt's calibrator finds the maximum of
each input channel: smoothing needs channels, and the range of the whole tensor follows from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from modelopt.torch.quantization.calib import MaxCalibrator
from torch import Tensor, nn

from gsx_engines.bundle.controls import RuntimeValues
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.layer import DecoderLayer, DecoderOptions
from gsx_exporter.decoder.walk import Stream, Walk
from gsx_exporter.errors import CheckpointError
from gsx_exporter.quantization.layers import linears_in, prefix_of
from gsx_exporter.quantization.linear import linear_of
from gsx_exporter.quantization.statistics import Statistics, key, load, save
from gsx_plugins.progress import OnProgress, Progress, silent


def statistics(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    points: Sequence[RuntimeValues],
    options: DecoderOptions,
    *,
    text_sha256: str,
    cache: Path | None = None,
    on_progress: OnProgress = silent,
) -> list[Statistics]:
    """Statistics for each selection; those that an earlier export found on the same text are taken from the cache.

    Args:
        checkpoint: the model.
        ids: [M, S] int64, calibration text.
        points: run-time inputs of the keep rule, one set per selection; one empty set without a rule.
        options: keep rule and K/V policy.
        text_sha256: hash of the text.
        cache: directory; None for no cache.
        on_progress: called after each layer.
    Returns: one value per selection, in their order.
    Raises:
        CheckpointError: an input of some layer is not finite.
    """
    found: list[Statistics | None] = [None] * len(points)
    paths: list[Path | None] = [None] * len(points)
    if cache is not None:
        paths = [cache / f"{key(checkpoint, ids, text_sha256, options, point)}.npz" for point in points]
        found = [load(path) for path in paths if path is not None]
    missing = [n for n, one in enumerate(found) if one is None]
    if missing:
        for n, one in zip(
            missing, _watch(checkpoint, ids, [points[n] for n in missing], options, on_progress), strict=True
        ):
            found[n] = one
            path = paths[n]
            if path is not None:
                save(path, one)
    return [one for one in found if one is not None]


def _watch(
    checkpoint: Checkpoint,
    ids: np.ndarray,
    points: Sequence[RuntimeValues],
    options: DecoderOptions,
    on_progress: OnProgress,
) -> list[Statistics]:
    inputs: list[dict[str, np.ndarray]] = [{} for _ in points]
    weights: dict[str, np.ndarray] = {}
    with torch.inference_mode():
        walk = Walk(checkpoint, ids, options)
        streams = [walk.stream(point) for point in points]
        for number, layer in walk.layers():
            names = linears_in(checkpoint.config, number)
            prefix = prefix_of(checkpoint.config, number)
            weights |= {f"{prefix}{name}": _weight_sizes(layer, name) for name in names}
            for stream, sizes in zip(streams, inputs, strict=True):
                for name, found in _watch_layer(walk, number, layer, stream).items():
                    # Every visit of a looped layer has inputs of its own.
                    sizes[name] = np.maximum(found, sizes.get(name, found))
            on_progress(Progress("measuring activations", number + 1, checkpoint.config.num_layers))
    return [Statistics(sizes, weights) for sizes in inputs]


def _watch_layer(walk: Walk, number: int, layer: DecoderLayer, stream: Stream) -> dict[str, np.ndarray]:
    names = linears_in(walk.checkpoint.config, number)
    calibrators = {name: MaxCalibrator(num_bits=8, axis=-1) for name in names}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0]
            if not bool(rows.isfinite().all()):
                raise CheckpointError(
                    f"{walk.checkpoint.source}: an input of layers.{number}.{name} is not finite on this text",
                    found="NaN" if bool(rows.isnan().any()) else "infinity",
                    todo="the model diverges there in full precision too: repair the model first",
                )
            if len(rows):
                calibrators[name].collect(rows)

        return collect

    hooks = [layer.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        walk.through(number, layer, stream)
    finally:
        for hook in hooks:
            hook.remove()
    sizes = {}
    for name, calibrator in calibrators.items():
        amax = calibrator.compute_amax()
        width = linear_of(layer, name).weight.shape[0]
        seen = np.zeros(width, np.float32) if amax is None else amax.reshape(-1).numpy()
        sizes[prefix_of(walk.checkpoint.config, number) + name] = seen
    return sizes


def _weight_sizes(layer: DecoderLayer, name: str) -> np.ndarray:
    sizes: np.ndarray = linear_of(layer, name).weight.abs().amax(dim=1).numpy()
    return sizes
