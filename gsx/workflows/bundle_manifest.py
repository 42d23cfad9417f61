"""The manifest of a bundle that is being exported."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from gsx.workflows.calibrated import Calibrated
from gsx_engines.bundle.manifest import (
    SCHEMA_VERSION,
    ChatTemplateEntry,
    DecoderShape,
    Gates,
    GraphEntry,
    Manifest,
    SourceModel,
    WeightsEntry,
)
from gsx_engines.bundle.words import Precision
from gsx_engines.chat import TemplateText
from gsx_plugins.progress import OnProgress


def manifest_of(
    calibrated: Calibrated,
    precision: Precision,
    graphs: Mapping[str, GraphEntry],
    weights: WeightsEntry,
    notes: Sequence[str],
    template: TemplateText | None,
    on_progress: OnProgress,
) -> Manifest:
    """The manifest, without a draft. The source's weights are hashed, which takes as long as reading them.

    Args: notes: what is unusual about the text that the export read. template: the bundle's chat template.
    """
    checkpoint = calibrated.checkpoint
    config = checkpoint.config
    gate = config.gate
    return Manifest(
        schema_version=SCHEMA_VERSION,
        gsx_version=version("gsx"),
        tools={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")},
        },
        source=SourceModel(
            model=checkpoint.source,
            weights_sha256=checkpoint.weights_sha256(on_progress),
            notes=(*checkpoint.notes, *notes),
        ),
        decoder=DecoderShape(
            family=config.family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_positions=config.max_positions,
            windows=config.windows,
            bos_id=config.bos_id,
            eos_ids=config.eos_ids,
            pad_id=config.pad_id,
            loops=config.loops,
        ),
        gates=Gates(kind=gate.kind, input=gate.input, branches=gate.branches) if gate else None,
        selection=calibrated.selection,
        policy=calibrated.policy,
        kv_policy=calibrated.options.kv_policy,
        precision=precision,
        quantization=calibrated.quantization,
        kv_cache=calibrated.kv_cache,
        graphs=graphs,
        weights=weights,
        chat_template=ChatTemplateEntry(file=template.file, sha256=template.sha256) if template else None,
    )
