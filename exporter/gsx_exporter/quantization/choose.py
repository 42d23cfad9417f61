"""Choosing the codes of weights on a text, and measuring what each product loses by itself.

The text goes through the model once more, layer by layer. In each layer, the inputs that its linear layers get are
recorded (on the rows that a branch keeps), GPTQ chooses the codes, and the text goes on through the quantized layer, so
that later layers make up for what earlier ones changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gsx_engines.bundle.controls import RuntimeValues
from gsx_exporter.decoder.layer import DecoderLayer, DecoderOptions
from gsx_exporter.decoder.modules import Linear
from gsx_exporter.decoder.walk import Stream, Walk
from gsx_exporter.quantization.codes import Encoded, round_to_nearest
from gsx_exporter.quantization.gptq import gptq
from gsx_exporter.quantization.layers import is_routed, linears_in, prefix_of, products_in
from gsx_exporter.quantization.linear import QuantizedLinear, linear_of, quantize_layer, weights_of
from gsx_exporter.quantization.plan import QuantizationPlan
from gsx_exporter.quantization.scheme import GROUPS
from gsx_plugins.progress import OnProgress, Progress, silent

_CHOOSING = "choosing the codes of weights"
# Rows of the text on which a product's loss is measured.
_SAMPLE_ROWS = 256
# A linear layer -> the one that gets the same rows. (Q may get fewer than K and V: skipped tokens have K and V.)
_SAME_ROWS = {name: linears[0] for linears in GROUPS.values() for name in linears}
_SAME_ROWS |= {"self_attn.k_proj": "self_attn.k_proj", "self_attn.v_proj": "self_attn.k_proj"}
_SAME_ROWS["self_attn.gate_proj"] = "self_attn.q_proj"


class _Inputs:
    """What a linear layer got on a text of some tokens.

    Attributes: hessian: [in, in] float32, the sum over rows; count: rows; rows: a sample of them, [R, in].
    """

    def __init__(self, width: int, tokens: int) -> None:
        self.hessian, self.count = torch.zeros(width, width), 0
        self.rows = torch.empty(0, width)
        self._step = -(-tokens // _SAMPLE_ROWS)

    def add_rows(self, other: _Inputs) -> None:
        """Add the rows that the layer got in other visits."""
        self.rows, self.count = torch.cat((self.rows, other.rows)), self.count + other.count

    def take_hessian(self) -> Tensor:
        """The Hessian, which is not kept here any longer: it may be as large as the layer."""
        taken, self.hessian = self.hessian, torch.empty(0)
        return taken

    def collect(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """As a hook before the layer's forward pass."""
        rows = args[0]
        if len(rows):
            # Every row counts the same, as in the losses: real models have a few tokens whose activations are a
            # thousand times as large as the others', which would count a million times as much. (For INT4 of SmolLM2
            # it made no difference: benchmarks/RESULTS.md.)
            equal = torch.nn.functional.normalize(rows, dim=1)
            self.hessian.addmm_(equal.t(), equal)
            self.rows = torch.cat((self.rows, rows[-self.count % self._step :: self._step]))
            self.count += len(rows)


def choose_codes(
    plan: QuantizationPlan,
    ids: np.ndarray,
    controls: RuntimeValues,
    options: DecoderOptions,
    on_progress: OnProgress = silent,
) -> Mapping[str, float]:
    """Choose the codes of all products of the layers; `plan.chosen` has them then.

    Args:
        ids: [M, S] int64, calibration text.
        controls: run-time inputs of the keep rule.
        options: keep rule, K/V policy and the graph's type, in which scales are stored.
        on_progress: called after each layer.
    Returns: what each product loses ("layers.0.mlp.up_proj"): the mean over rows of |y - y'|^2 / |y|^2, where y' has
        rounded weights and inputs. Products that no row but zeros went through are missing, and rounded to nearest.
        Experts are rounded to nearest too, and lose what inputs of any direction would.
    """
    losses: dict[str, float] = {}
    with torch.inference_mode():
        walk = Walk(plan.checkpoint, ids, options)
        later = _LaterVisits(plan, walk, controls, on_progress)
        stream = walk.stream(controls)
        for number, layer in walk.layers():
            if not later.is_one(number):
                inputs = _inputs_of(walk, number, layer, stream)
                losses |= _losses_of_experts(plan, number, layer)
                while inputs:  # a Hessian is gone when its products are done: the next one may be as large as the layer
                    first = next(iter(inputs))
                    seen = inputs.pop(first)
                    later.add_to(seen, number, first)
                    # One product may take minutes, so each is shown.
                    note = f"{prefix_of(plan.checkpoint.config, number)}{first}"
                    on_progress(Progress(_CHOOSING, number, plan.checkpoint.config.num_layers, note))
                    losses |= _choose(plan, number, layer, first, seen, options.dtype)
            quantize_layer(layer, number, plan)
            walk.through(number, layer, stream)
            on_progress(Progress(_CHOOSING, number + 1, plan.checkpoint.config.num_layers))
    return losses


def _choose(
    plan: QuantizationPlan, number: int, layer: DecoderLayer, first: str, seen: _Inputs, dtype: torch.dtype
) -> dict[str, float]:
    """Choose the codes of the products that get the same rows as `first`. Returns: their losses."""
    losses: dict[str, float] = {}
    chosen: dict[str, Encoded] = {}
    prefix = prefix_of(plan.checkpoint.config, number)
    paths = {prefix + path: path for path in linears_in(plan.checkpoint.config, number)}
    products = [name for name, path in paths.items() if _SAME_ROWS[path] == first and name in plan.matrices]
    for name in products if bool(seen.hessian.any()) else ():
        linear, matrix = linear_of(layer, paths[name]), plan.matrices[name]
        # The last product may overwrite the Hessian, and nothing else keeps it.
        found = chosen[name] = gptq(
            linear.weight,
            seen.take_hessian() if name == products[-1] else seen.hessian.clone(),
            matrix.format,
            dtype,
        )
        losses[name] = _loss(linear, QuantizedLinear(linear, found, matrix.input_scale, plan.scheme), seen.rows)
    plan.chosen.store(prefix + first, chosen)
    return losses


def _inputs_of(walk: Walk, number: int, layer: DecoderLayer, stream: Stream) -> dict[str, _Inputs]:
    """What the linear layers of a layer get; the stream stays where it is."""
    names = dict.fromkeys(_SAME_ROWS[name] for name in linears_in(walk.checkpoint.config, number))
    inputs = {name: _Inputs(linear_of(layer, name).weight.shape[0], walk.ids.numel()) for name in names}
    hooks = [layer.get_submodule(name).register_forward_pre_hook(one.collect) for name, one in inputs.items()]
    try:
        walk.through(number, layer, dataclasses.replace(stream, below=dict(stream.below)))
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


class _LaterVisits:
    """What looped layers get in all loops but the first, of the model in full precision.

    The codes of a looped layer are chosen at its first visit, and serve all of them. So the text goes through the whole
    model once before. Hessians of many layers may be larger than the memory: they wait in files beside the codes.
    """

    def __init__(self, plan: QuantizationPlan, walk: Walk, controls: RuntimeValues, on_progress: OnProgress) -> None:
        self._config, self._folder = walk.checkpoint.config, plan.chosen.folder
        self._seen: dict[Path, _Inputs] = {}
        if not any(map(self.is_one, range(self._config.num_layers))):
            return
        stream = walk.stream(controls)
        for number, layer in walk.layers():
            for first, seen in (_inputs_of(walk, number, layer, stream) if self.is_one(number) else {}).items():
                path = self._path(number, first)
                if path in self._seen:
                    seen.hessian += torch.from_numpy(np.load(path, allow_pickle=False))
                    seen.add_rows(self._seen[path])
                np.save(path, seen.take_hessian().numpy())
                self._seen[path] = seen
            walk.through(number, layer, stream)
            on_progress(Progress("measuring inputs of all loops", number + 1, self._config.num_layers))

    def is_one(self, number: int) -> bool:
        """Whether a visit is in another loop than the first."""
        return self._config.loops is not None and bool(self._config.loops.loop_of(number))

    def add_to(self, seen: _Inputs, number: int, first: str) -> None:
        """Add what the later visits of a layer got to what its first visit got."""
        path = self._path(number, first)
        if path in self._seen:
            seen.hessian += torch.from_numpy(np.load(path, allow_pickle=False))
            seen.add_rows(self._seen.pop(path))
            path.unlink()

    def _path(self, number: int, first: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{prefix_of(self._config, number)}{first}.later.npy"


def _losses_of_experts(plan: QuantizationPlan, number: int, layer: DecoderLayer) -> dict[str, float]:
    """What the weights of a routed MLP lose: |W - W'|^2 / |W|^2, of all experts together."""
    losses = {}
    for name in filter(is_routed, products_in(plan.checkpoint.config, number)):
        matrix = plan.matrices.get(prefix_of(plan.checkpoint.config, number) + name)
        if matrix is not None and plan.can_spare(prefix_of(plan.checkpoint.config, number) + name):
            lost = size = 0.0
            for weight in weights_of(layer, name):
                lost += float(
                    (round_to_nearest(weight, matrix.format, torch.float32).decoded() - weight).square().sum()
                )
                size += float(weight.square().sum())
            losses[prefix_of(plan.checkpoint.config, number) + name] = lost / max(size, 1e-30)
    return losses


def _loss(linear: Linear, rounded: QuantizedLinear, rows: Tensor) -> float:
    """See `choose_codes`. Without the biases, which are not rounded."""
    exact = torch.matmul(rows, linear.weight)
    lost = (rounded.product(rows) - exact).square().sum(dim=1) / exact.square().sum(dim=1).clamp(min=1e-30)
    return float(lost.mean())
