"""Measuring a plan's cost without a graph: the eager decoder with rounded weights and inputs.

Weights are the codes that would be written, times their scales; ModelOpt's quantizer rounds inputs. Layers below the
first quantized one are not run again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.words import Branch
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.decoder.ends import Entry, Exit
from gsx_exporter.decoder.layer import DecoderLayer, DecoderOptions, KeyValue
from gsx_exporter.decoder.modules import Linear
from gsx_exporter.decoder.rule import Values
from gsx_exporter.decoder.walk import Stream, Walk
from gsx_exporter.quantization.plan import QuantizationPlan, quantize_weight, scale_value, weight_scales
from gsx_exporter.quantization.scheme import EMBEDDING, HEAD, TABLES, WEIGHTS_ONLY, Scheme
from gsx_exporter.text import TokenText
from gsx_plugins.progress import OnProgress, Progress, silent


@dataclass(frozen=True)
class Cost:
    """What 8 bits cost on a text, against the same model in float32.

    Args:
        nats: increase of the mean loss per token; negative if the loss fell.
        divergence: mean KL divergence of the next-token distribution, in nats.
        flipped: share of keep/skip decisions that flipped; 0 without decisions.
    """

    nats: float
    divergence: float
    flipped: float

    @property
    def perplexity_increase(self) -> float:
        """Relative increase; 0.01 is one percent."""
        return float(torch.expm1(torch.tensor(self.nats, dtype=torch.float64)))


def rounded(weight: Tensor, scheme: Scheme) -> Tensor:
    """A weight [in, out], quantized and dequantized."""
    codes = quantize_weight(weight, scheme, torch.float32)
    return codes.float() * weight_scales(weight, scheme, torch.float32)


class QuantizedLinear(nn.Module):
    """A linear layer as the graph runs it in 8 bits, simulated in float32."""

    def __init__(self, linear: Linear, scheme: Scheme, input_scale: float | None) -> None:
        super().__init__()
        self.weight = rounded(linear.weight, scheme)
        self.bias = linear.bias
        self.quantizer: nn.Module = nn.Identity()
        if input_scale is not None:
            self.quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=scheme.num_bits, axis=None))
            self.quantizer.amax = torch.tensor(scale_value(input_scale, torch.float32) * scheme.largest)

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]."""
        y = torch.matmul(self.quantizer(x) if len(x) else x, self.weight)
        return y if self.bias is None else y + self.bias


class Simulation:
    """Compares plans with the float32 model on a text, at one selection. The float32 model is run once.

    Args:
        checkpoint: the model, unquantized.
        text: the text to measure on.
        controls: run-time inputs of the keep rule.
        options: keep rule and K/V policy.
        on_progress: called after each layer of the float32 model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: TokenText,
        controls: RuntimeValues,
        options: DecoderOptions,
        on_progress: OnProgress = silent,
    ) -> None:
        self._options, self._ids = options, text.ids
        self._layers = checkpoint.config.num_layers
        self._controls = controls
        self._states: list[tuple[Values, Tensor, KeyValue | None]] = []
        self._keep: list[dict[Branch, Tensor]] = []
        with torch.inference_mode():
            walk = Walk(checkpoint, text.ids, options)
            stream = walk.stream(controls)
            for number, layer in walk.layers():
                self._states.append((stream.entered, stream.hidden, stream.below))
                self._keep.append(walk.through(number, layer, stream))
                on_progress(Progress("measuring in full precision", number + 1, self._layers))
            self._states.append((stream.entered, stream.hidden, stream.below))  # for plans that quantize only the head
            # Half precision is exact enough to compare 8 bits with, and half as large.
            self._logits = [F.log_softmax(logits, dim=-1).half() for _, logits in walk.logits(stream)]

    def cost(self, plan: QuantizationPlan, only: Collection[str] | None = None) -> Cost:
        """The plan's cost. Args: only: quantize only these of its matrices; None for all."""
        quantized = set(plan.input_scales) if only is None else set(only)
        if not quantized:
            return Cost(0.0, 0.0, 0.0)
        layers = [int(name.split(".")[1]) for name in quantized if name not in TABLES]
        first = 0 if EMBEDDING in quantized else min(layers, default=self._layers)

        def quantize_table(end: Entry | Exit) -> None:
            if isinstance(end, Entry) and EMBEDDING in quantized:
                end.embed_tokens.data = rounded(end.embed_tokens.t(), WEIGHTS_ONLY).t()
            elif isinstance(end, Exit) and HEAD in quantized:
                end.lm_head.weight.data = rounded(end.lm_head.weight, WEIGHTS_ONLY)

        different = decisions = 0
        with torch.inference_mode():
            walk = Walk(plan.checkpoint, self._ids, self._options, quantize_table)
            stream = walk.stream(self._controls)
            if first:
                stream = Stream(stream.inputs, *self._states[first])
            for number, layer in walk.layers(first):
                _quantize_layer(layer, number, plan, quantized)
                for branch, keep in walk.through(number, layer, stream).items():
                    different += int((keep != self._keep[number][branch]).sum())
            decisions = sum(keep.numel() for row in self._keep for keep in row.values())
            nats = divergence = 0.0
            tokens = 0
            for (ids, logits), stored in zip(walk.logits(stream), self._logits, strict=True):
                found, wanted = F.log_softmax(logits, dim=-1), stored.float()
                divergence += float((wanted.exp() * (wanted - found)).sum())
                targets = ids[:, 1:, None]
                nats += float((wanted - found)[:, :-1].gather(-1, targets).sum())
                tokens += targets.numel()
        return Cost(nats / tokens, divergence / self._ids.size, different / decisions if decisions else 0.0)


def _quantize_layer(layer: DecoderLayer, number: int, plan: QuantizationPlan, names: Collection[str]) -> None:
    prefix = f"layers.{number}."
    for name in [name for name in names if name.startswith(prefix)]:
        path = name.removeprefix(prefix)
        owner, _, attribute = path.rpartition(".")
        linear = layer.get_submodule(path)
        assert isinstance(linear, Linear)
        quantized = QuantizedLinear(linear, plan.scheme_of(name), plan.input_scales[name])
        setattr(layer.get_submodule(owner), attribute, quantized)
