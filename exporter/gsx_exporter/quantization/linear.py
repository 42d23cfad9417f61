"""Linear layers as the graph runs them quantized, in float32: for measuring without a graph."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import Tensor, nn

from gsx_exporter.decoder.experts import RoutedMlp, StoredExperts
from gsx_exporter.decoder.layer import DecoderLayer
from gsx_exporter.decoder.modules import Linear
from gsx_exporter.quantization.codes import Encoded
from gsx_exporter.quantization.layers import is_stack, prefix_of
from gsx_exporter.quantization.plan import QuantizationPlan, scale_value
from gsx_exporter.quantization.scheme import Scheme


class QuantizedLinear(nn.Module):
    """A linear layer with rounded weights and inputs: the codes times their scales; ModelOpt's quantizer rounds inputs.

    Args: input_scale: None if inputs are not rounded.
    """

    def __init__(self, linear: Linear, codes: Encoded, input_scale: float | None, scheme: Scheme) -> None:
        super().__init__()
        self.weight: Tensor
        self.register_buffer("weight", codes.decoded())
        self.bias = linear.bias
        self.quantizer: nn.Module = nn.Identity()
        if input_scale is not None:
            self.quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=scheme.num_bits, axis=None))
            self.quantizer.amax = torch.tensor(scale_value(input_scale, torch.float32) * scheme.weights.largest)

    def product(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out], without the bias."""
        return torch.matmul(self.quantizer(x) if len(x) else x, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias


def quantize_layer(layer: DecoderLayer, number: int, plan: QuantizationPlan) -> None:
    """Put quantized linear layers into a layer, and rounded weights of experts, as the plan says."""
    prefix = prefix_of(layer.config, number)
    for name, matrix in plan.matrices.items():
        if name.startswith(prefix):
            path = name.removeprefix(prefix)
            owner, _, attribute = path.rpartition(".")
            if is_stack(path):
                _experts_of(layer).round_weights(attribute, partial(_rounded, plan, name))
                continue
            linear = linear_of(layer, path)
            codes = plan.encoded(name, linear.weight, torch.float32)
            quantized = QuantizedLinear(linear, codes, matrix.input_scale, plan.scheme)
            setattr(layer.get_submodule(owner), attribute, quantized)


def _rounded(plan: QuantizationPlan, name: str, weight: Tensor) -> Tensor:
    return plan.encoded(name, weight, torch.float32).decoded()


def weights_of(layer: DecoderLayer, name: str) -> Iterable[Tensor]:
    """The weights of one of a layer's products, [in, out] each: one, or one of each expert."""
    if not is_stack(name):
        return [linear_of(layer, name).weight]
    return _experts_of(layer).weights(name.rpartition(".")[2])


def _experts_of(layer: DecoderLayer) -> StoredExperts:
    assert isinstance(layer.mlp, RoutedMlp)
    assert isinstance(layer.mlp.experts, StoredExperts)
    return layer.mlp.experts


def linear_of(layer: DecoderLayer, name: str) -> Linear:
    """One of a layer's linear layers."""
    linear = layer.get_submodule(name)
    assert isinstance(linear, Linear)
    return linear
