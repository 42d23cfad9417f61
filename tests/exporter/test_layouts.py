"""Quantized checkpoints are read as the floats that their own libraries make of them.

FP8 in blocks and compressed-tensors are compared with transformers, which loads them with `dequantize=True`; GPTQ and
AWQ, whose libraries need a GPU, with their formulas, one code at a time.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gsx.workflows.export import export
from gsx.workflows.inspect import inspect
from gsx.workflows.verify import verify
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.errors import CheckpointError
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.reference.model import Reference
from tests.exporter.test_checkpoint import IDS, logits, same
from tests.exporter.test_experts import fused, rewritten
from tests.tiny import tiny_checkpoint

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]
FP8 = torch.float8_e4m3fn
GROUP = 16
LINEAR = re.compile(r"(_proj|\.w[123])\.weight$")


def quantize(model: Path, section: dict[str, Any] | None, parts: Callable[[torch.Tensor], Tensors]) -> Path:
    """Store the linear layers of every layer in another way. Args: parts: of a weight [out, in], by their names."""
    found: Tensors = {}
    for name, tensor in load_file(model / WEIGHTS).items():
        if LINEAR.search(name):
            stem = name.removesuffix("weight")
            found |= {stem + part: value.contiguous() for part, value in parts(tensor).items()}
        else:
            found[name] = tensor
    save_file(found, model / WEIGHTS, metadata={"format": "pt"})
    if section is not None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": section}))
    return model


def in_blocks(rows: int, columns: int, scales: str, code: torch.dtype = FP8) -> Callable[[torch.Tensor], Tensors]:
    """Codes of 8 bits with a scale for each of rows x columns blocks; 0 columns for a scale without an axis."""

    def parts(weight: torch.Tensor) -> Tensors:
        out, width = weight.shape
        blocks = weight.reshape(rows or 1, -1, columns or 1, width // (columns or 1))
        most = 448 if code is FP8 else 127
        found = blocks.abs().amax((1, 3), keepdim=True) / most
        codes = blocks / found
        codes = (codes if code is FP8 else codes.round()).to(code).reshape(out, width)
        return {"weight": codes, scales: found.reshape(rows, columns) if columns else found.reshape(())}

    return parts


def compressed(scheme: dict[str, Any], form: str, dtype: torch.dtype) -> tuple[dict[str, Any], Any]:
    """compressed-tensors' own compressor, and the section that it writes."""
    pytest.importorskip("compressed_tensors", reason='pip install "gsx[dev]"')
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    section = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], **scheme}},
    }
    args = QuantizationScheme(targets=["Linear"], **scheme)

    def parts(weight: torch.Tensor) -> Tensors:
        by_group = scheme["weights"]["strategy"] == "group"
        groups = weight.shape[1] // GROUP if by_group else 1
        blocks = weight.reshape(len(weight), groups, -1)
        bits = scheme["weights"]["num_bits"]
        low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
        state = {"weight": weight.to(dtype)}
        if scheme["weights"]["type"] == "float":
            scale = blocks.abs().amax(-1) / 448
        elif scheme["weights"].get("symmetric", True):
            scale = blocks.abs().amax(-1) / (2 ** (bits - 1) - 1)
        else:
            scale = (high - low) / (2**bits - 1)
            zero = (-(2 ** (bits - 1)) - low / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            state["weight_zero_point"] = zero.to(torch.int8)
        if scheme["weights"]["strategy"] == "tensor":
            scale = scale.amax().reshape(1)
        state["weight_scale"] = scale.to(dtype)
        return dict(BaseCompressor.get_value_from_registry(form).compress(state, args))

    return section, parts


def weights(bits: int, strategy: str, kind: str = "int", **more: Any) -> dict[str, Any]:
    group = {"group_size": GROUP} if strategy == "group" else {}
    return {"weights": {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **group, **more}}


ACTIVATIONS = {"input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}}
FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic", "fmt": "e4m3"}
BY_TRANSFORMERS: dict[str, Callable[[], tuple[dict[str, Any], Any]]] = {
    "FP8 in blocks": lambda: (FP8_BLOCKS, in_blocks(2, 4, "weight_scale_inv")),
    "FP8, a scale for the tensor": lambda: (
        {**FP8_BLOCKS, "weight_block_size": None},
        in_blocks(1, 0, "weight_scale_inv"),
    ),
    "compressed FP8 by tensor": lambda: compressed(
        weights(8, "tensor", "float") | ACTIVATIONS, "float-quantized", torch.float32
    ),
    "compressed FP8 by channel, in bfloat16": lambda: compressed(
        weights(8, "channel", "float") | ACTIVATIONS, "float-quantized", torch.bfloat16
    ),
    "compressed INT8": lambda: compressed(weights(8, "channel"), "int-quantized", torch.float32),
    "packed INT8": lambda: compressed(weights(8, "channel"), "pack-quantized", torch.float16),
    "packed INT4": lambda: compressed(weights(4, "group"), "pack-quantized", torch.bfloat16),
    "packed INT4 with zeros": lambda: compressed(weights(4, "group", symmetric=False), "pack-quantized", torch.float32),
}


@pytest.mark.parametrize("case", list(BY_TRANSFORMERS))
def test_read_as_transformers_dequantizes(tmp_path: Path, case: str) -> None:
    section, parts = BY_TRANSFORMERS[case]()
    model = quantize(tiny_checkpoint(tmp_path / "model", layers=2), section, parts)
    checkpoint = open_checkpoint(model)
    for streamed in (False, True):
        assert same(logits(model), Reference.load(checkpoint, streamed=streamed)(torch.from_numpy(IDS)).logits)
    assert any("are quantized already" in note for note in checkpoint.notes)
    assert near_the_original(checkpoint, tmp_path)


def near_the_original(checkpoint: Checkpoint, tmp_path: Path, tolerance: float = 0.25) -> bool:
    """Whether every weight is the one that was quantized, up to the rounding of 4 bits and more."""
    original = open_checkpoint(tiny_checkpoint(tmp_path / "original", layers=2))
    found = [(checkpoint.tensor(name).float(), original.tensor(name)) for name in original.names]
    return all(float((one - other).norm() / other.norm()) < tolerance for one, other in found)


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes [n, w] packed into 32-bit words along the last axis, the first lowest, or in the order given."""
    lanes = 32 // bits
    order = order or tuple(range(lanes))
    packed = np.zeros((len(codes), codes.shape[1] // lanes), np.uint32)
    for word in range(packed.shape[1]):
        for lane in range(lanes):
            packed[:, word] |= codes[:, word * lanes + order[lane]].astype(np.uint32) << np.uint32(bits * lane)
    return torch.from_numpy(packed.view(np.int32))


def affine(weight: torch.Tensor, bits: int, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [in, out], zeros and scales [groups, out] of a weight [out, in] with the group of each input."""
    columns, most = weight.t().numpy(), 2**bits - 1
    groups = int(index.max()) + 1
    low = np.stack([columns[index == g].min(0) for g in range(groups)])
    high = np.stack([columns[index == g].max(0) for g in range(groups)])
    scales = ((high - low) / most).astype(np.float16)
    zeros = np.clip(np.rint(-low / scales.astype(np.float32)), 1, most).astype(np.int64)
    codes = np.clip(np.rint(columns / scales.astype(np.float32)[index]) + zeros[index], 0, most).astype(np.int64)
    return codes, zeros, scales


def by_formula(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, index: np.ndarray) -> torch.Tensor:
    """The weight [out, in], one element at a time, in the type of the scales."""
    out = np.zeros(codes.shape[::-1], np.float16)
    for place, group in enumerate(index):
        for row in range(codes.shape[1]):
            out[row, place] = np.float16(codes[place, row] - zeros[group, row]) * scales[group, row]
    return torch.from_numpy(out)


def gptq(bits: int, *, version: int = 1, shuffled: bool = False) -> tuple[dict[str, Any], Any]:
    def parts(weight: torch.Tensor) -> Tensors:
        index = np.arange(weight.shape[1]) // GROUP
        if shuffled:
            index = np.random.default_rng(0).permutation(index)
        codes, zeros, scales = affine(weight, bits, index)
        WANTED.append(by_formula(codes, zeros, scales, index))
        return {
            "qweight": words(codes.T, bits).t(),
            "qzeros": words(zeros - (2 - version), bits),
            "scales": torch.from_numpy(scales),
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }

    section: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": shuffled}
    return ({**section, "checkpoint_format": "gptq_v2"} if version == 2 else section), parts


def awq() -> tuple[dict[str, Any], Any]:
    # AutoAWQ's packing_utils.py: output `order[n]` of eight is the nth from the lowest bits.
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def parts(weight: torch.Tensor) -> Tensors:
        index = np.arange(weight.shape[1]) // GROUP
        codes, zeros, scales = affine(weight, 4, index)
        WANTED.append(by_formula(codes, zeros, scales, index))
        return {
            "qweight": words(codes, 4, order),
            "qzeros": words(zeros, 4, order),
            "scales": torch.from_numpy(scales),
        }

    return {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}, parts


# Weights by their formula, in the order in which they were packed.
WANTED: list[torch.Tensor] = []
BY_FORMULA: dict[str, Callable[[], tuple[dict[str, Any], Any]]] = {
    "GPTQ in 4 bits": lambda: gptq(4),
    "GPTQ in 8 bits": lambda: gptq(8),
    "GPTQ in 2 bits": lambda: gptq(2),
    "GPTQ in the order of activations": lambda: gptq(4, shuffled=True),
    "GPTQ, version 2": lambda: gptq(4, version=2),
    "AWQ": awq,
}


@pytest.mark.parametrize("case", list(BY_FORMULA))
def test_read_by_the_formula(tmp_path: Path, case: str) -> None:
    section, parts = BY_FORMULA[case]()
    WANTED.clear()
    model = tiny_checkpoint(tmp_path / "model", layers=2)
    names = [name for name in load_file(model / WEIGHTS) if "_proj." in name]
    checkpoint = open_checkpoint(quantize(model, section, parts))
    for name, want in zip(names, WANTED, strict=True):
        assert checkpoint.tensor(name).equal(want), name
        assert checkpoint.shape(name) == tuple(want.shape)
        assert checkpoint.stored_type(name) == "F16"
    assert near_the_original(checkpoint, tmp_path, tolerance=0.6)
    want = Reference.load(checkpoint)(torch.from_numpy(IDS)).logits
    assert same(logits(model), want)


def test_a_bundle_of_a_quantized_checkpoint(tmp_path: Path, tiny_text: Path) -> None:
    """Its weights are floats, its configuration too, and verifying passes: transformers dequantizes the same."""
    model = tiny_checkpoint(tmp_path / "model", layers=2, gate=GateConfig(kind="scalar"), tokenizer=True)
    quantize(model, FP8_BLOCKS, in_blocks(2, 4, "weight_scale_inv"))
    bundle = export(model, tmp_path / "bundle", budget=0.7, calibration=tiny_text, calibration_tokens=512)
    assert "quantization_config" not in json.loads((bundle.directory / "config.json").read_text())
    assert any("quantized already (FP8)" in note for note in bundle.manifest.source.notes)
    assert verify(bundle.directory, tokens=256, greedy_tokens=8, budgets=[0.7]).passed
    assert inspect(model).parameters["dense"] == inspect(tmp_path / "bundle").parameters["dense"]


def test_streamed_weights_stay_in_their_files(tmp_path: Path) -> None:
    """An adapter over FP8: the reference has only the adapter in memory, and gives what it gives whole."""
    peft = pytest.importorskip("peft", reason='pip install "gsx[dev]"')
    base = quantize(
        tiny_checkpoint(tmp_path / "base", "gemma2", layers=2), FP8_BLOCKS, in_blocks(2, 4, "weight_scale_inv")
    )
    plain = AutoModelForCausalLM.from_config(open_checkpoint(base).hf_config)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(plain, settings).save_pretrained(str(tmp_path / "adapter"))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    checkpoint = open_checkpoint(tmp_path / "adapter")
    whole, streamed = (Reference.load(checkpoint, streamed=one) for one in (False, True))
    assert same(*(reference(torch.from_numpy(IDS)).logits for reference in (whole, streamed)))
    held = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in _weights(streamed)}
    assert sum(held.values()) < 0.05 * sum(weight.nbytes for weight in _weights(whole))


def _weights(reference: Reference) -> list[torch.Tensor]:
    return list(reference.model.parameters())


def test_modelopt_s_fp8(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=2)
    quantize(model, None, lambda w: in_blocks(1, 0, "weight_scale")(w) | {"input_scale": torch.tensor(0.5)})
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    checkpoint = open_checkpoint(model)
    assert near_the_original(checkpoint, tmp_path)
    assert same(logits(model), Reference.load(checkpoint)(torch.from_numpy(IDS)).logits)


def section(**keys: Any) -> Callable[[Path], Any]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": keys}))

    return change


def without(part: str) -> Callable[[Path], Any]:
    """FP8 in blocks, with a part missing."""

    def change(model: Path) -> None:
        quantize(model, FP8_BLOCKS, in_blocks(2, 4, "weight_scale_inv"))
        found = load_file(model / WEIGHTS)
        save_file({name: x for name, x in found.items() if part not in name}, model / WEIGHTS)

    return change


GROUPS = {"g": weights(4, "group")}
REFUSED: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "bitsandbytes": (section(quant_method="bitsandbytes", load_in_4bit=True), ["already quantized", "bitsandbytes"]),
    "MXFP4": (section(quant_method="mxfp4"), ["mxfp4", "expected float weights, or FP8"]),
    "no method": (section(bits=4), ["without quant_method"]),
    "GPTQ in 3 bits": (section(quant_method="gptq", bits=3), ["GPTQ in 3 bits"]),
    "GPTQ for Marlin": (section(quant_method="gptq", bits=4, checkpoint_format="marlin"), ["checkpoint_format marlin"]),
    "AWQ for GEMV": (section(quant_method="awq", bits=4, version="gemv"), ["AWQ in 4 bits, version gemv"]),
    "NVFP4": (section(quant_method="modelopt", quant_algo="NVFP4"), ["ModelOpt's NVFP4"]),
    "compressed NVFP4": (
        section(
            quant_method="compressed-tensors",
            format="nvfp4-pack-quantized",
            config_groups={"g": weights(4, "tensor_group", "float")},
        ),
        ["nvfp4-pack-quantized, float in 4 bits"],
    ),
    "compressed in two ways": (
        section(
            quant_method="compressed-tensors",
            format="pack-quantized",
            config_groups={**GROUPS, "h": weights(8, "channel")},
        ),
        ["compressed-tensors in formats ['pack-quantized']", "(8, 'int')"],
    ),
    "compressed with sparsity": (
        section(
            quant_method="compressed-tensors",
            format="pack-quantized",
            config_groups=GROUPS,
            sparsity_config={"format": "sparse-24-bitmask"},
        ),
        ["sparsity, sparse-24-bitmask"],
    ),
    "compressed with transforms": (
        section(
            quant_method="compressed-tensors",
            format="pack-quantized",
            config_groups=GROUPS,
            transform_config={"config_groups": {"R1": {}}},
        ),
        ["with transforms"],
    ),
    "a scale is missing": (without("weight_scale_inv"), ["already quantized", "F8_E4M3"]),
    "FP8 in a configuration that is silent": (
        lambda m: quantize(m, None, in_blocks(2, 4, "weight_scale_inv")),
        ["already quantized", "weight_scale_inv", "FP8 in blocks"],
    ),
    "blocks that do not divide": (
        lambda m: quantize(m, FP8_BLOCKS, lambda w: {"weight": w.to(FP8), "weight_scale_inv": torch.ones(5, 3)}),
        ["with scales [5, 3]"],
    ),
    "scales in one byte": (
        lambda m: quantize(
            m, FP8_BLOCKS, lambda w: {"weight": w.to(FP8), "weight_scale_inv": torch.ones(2, 2, dtype=torch.uint8)}
        ),
        ["already quantized", "q_proj.weight in U8"],
    ),
}


# Widths that every layout here divides.
EXPERTS: dict[str, Any] = {
    "intermediate_size": 144,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "layers": 2,
}
WITH_EXPERTS: dict[str, tuple[str, Callable[[], tuple[dict[str, Any], Any]]]] = {
    "FP8 in blocks": ("qwen3_moe", lambda: (FP8_BLOCKS, in_blocks(2, 4, "weight_scale_inv"))),
    "FP8 in blocks, Mixtral's names": ("mixtral", lambda: (FP8_BLOCKS, in_blocks(2, 4, "weight_scale_inv"))),
    "packed INT4": ("qwen2_moe", lambda: compressed(weights(4, "group"), "pack-quantized", torch.bfloat16)),
    "GPTQ": ("qwen3_moe", lambda: gptq(4)),
    "AWQ": ("mixtral", awq),
}


@pytest.mark.parametrize("case", list(WITH_EXPERTS))
def test_experts_are_read_by_themselves(tmp_path: Path, case: str) -> None:
    family, made = WITH_EXPERTS[case]
    original = tiny_checkpoint(tmp_path / "original", family, **EXPERTS)
    model = quantize(Path(shutil.copytree(original, tmp_path / "model")), *made())
    checkpoint, whole = open_checkpoint(model), open_checkpoint(original)
    experts = [name for name in whole.names if ".experts." in name]
    assert len(experts) > 12
    for name in experts:
        found, want = checkpoint.tensor(name).float(), whole.tensor(name)
        assert 0 < float((found - want).norm() / want.norm()) < 0.3, name
    for streamed in (False, True):
        assert same(logits(model), Reference.load(checkpoint, streamed=streamed)(torch.from_numpy(IDS)).logits)


def test_quantized_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    model = rewritten(tiny_checkpoint(tmp_path / "model", "qwen3_moe", layers=2), fused)
    section(**FP8_BLOCKS)(model)
    with pytest.raises(CheckpointError, match=r"in one quantized tensor for each layer \(FP8\)"):
        open_checkpoint(model)


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_in_words(tmp_path: Path, case: str) -> None:
    change, parts = REFUSED[case]
    model = tiny_checkpoint(tmp_path / "model", layers=2)
    change(model)
    with pytest.raises(CheckpointError) as found:
        open_checkpoint(model)
    assert not [part for part in parts if part not in str(found.value)], str(found.value)
