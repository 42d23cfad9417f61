"""Opening ONNX Runtime sessions: with which settings, and with the weights where they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnxruntime as ort

from gsx_engines.bundle.manifest import Manifest
from gsx_engines.errors import BundleError
from gsx_engines.lowering.for_onnxruntime.probe import products_saturate


def session_config(manifest: Manifest, *, lowered: bool = False, layers: bool = True) -> Mapping[str, str]:
    """Session configuration that a bundle's graphs need on ONNX Runtime, or run faster with.

    FP8: ONNX Runtime's rewriting of Q/DQ picks kernels that have no FP8, and the session does not load. INT8 weights
    whose inputs are not quantized (the head's never are) become MatMulNBits; blocks of 128 were the fastest of those
    tried, in decoding and in prefill (docs/quantization.md). Where ONNX Runtime's 8-bit products saturate, the portable
    graph is computed as it is written, in float32; the lowered graph has products that do not saturate.

    In a looped model many products read one weight. ONNX Runtime would pack it for each of them, a copy for every loop,
    and Python's interface has nothing to share it by. So floats are read as they are, which costs a step nothing and a
    prompt a sixth of its time. Codes are packed: in 4 bits, a step without that took 37 times as long, since each
    product dequantizes its weights anew (benchmarks/RESULTS.md).

    Args:
        lowered: the graph was lowered for ONNX Runtime.
        layers: the graph has layers; else only the head, or tables, which nothing reads twice.
    """
    loops = manifest.decoder.loops
    if manifest.quantization is None:
        shared = layers and loops is not None and loops.most > 1
        return {"session.disable_prepacking": "1"} if shared else {}
    if manifest.quantization.is_float8:
        return {"session.disable_quant_qdq": "1"}
    if manifest.quantization.quantizes_activations and not lowered and products_saturate():
        return {"session.disable_quant_qdq": "1"}
    return {"session.qdq_matmulnbits_block_size": "128"}


def open_session(
    model: bytes,
    directory: Path,
    threads: int | None,
    config: Mapping[str, str] | None = None,
    *,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """Open an ONNX Runtime session of a model.

    Args:
        model: the serialized model.
        directory: where its external data is.
        threads: threads within an op; None for ONNX Runtime's own choice.
        config: entries of the session's configuration (`session_config`).
        profile: prefix of the names of the profile files; None to write no profile.
    Raises:
        BundleError: ONNX Runtime refuses the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings are about the defaults of our run-time inputs, which are intended
    # The sessions of one step run in turn: threads of one that still spin would slow down the next (measured on two
    # cores: a step took 1.9 times as long).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    for name, value in (config or {}).items():
        options.add_session_config_entry(name, value)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the bindings raise many types, all about this model
        raise BundleError(
            f"bundle {directory}: ONNX Runtime {ort.__version__} does not load the graph",
            found=str(error).strip().splitlines()[0],
            todo="gsx doctor says what works on this machine",
        ) from error
