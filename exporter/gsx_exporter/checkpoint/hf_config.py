"""`config.json`, read by transformers' own configuration classes, so that their defaults and legacy spellings apply.

Of a multimodal model the text part is read: `text_config`, where its family is a supported one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsx_exporter.checkpoint.json_file import one_line, read_json
from gsx_exporter.checkpoint.kinds import listing
from gsx_exporter.checkpoint.layouts.layout import Layout
from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.checkpoint.near_miss import unknown_traits, way_out
from gsx_exporter.checkpoint.quantized import QUANTIZATION, layout_of
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.errors import CheckpointError
from gsx_exporter.families import FAMILIES

_MOST_LAYERS = 10_000
_TEXT_PART = "text_config"
# Keys that stand beside the text part and are about text. What they say comes first, as in transformers.
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "gsx", QUANTIZATION)


@dataclass(frozen=True)
class ReadConfig:
    """The configuration of a decoder.

    Args:
        hf: the transformers configuration object.
        own: what `config.json` would say of the decoder; None if the file says just that.
        whole: `model_type` of the multimodal model that the decoder is the text part of; None if it is a model itself.
        layout: how its weights are quantized; None if they are floats.
    """

    hf: Any
    own: Mapping[str, Any] | None
    whole: str | None
    layout: Layout | None


def read_config(directory: Path, section: Mapping[str, Any] | None = None) -> ReadConfig:
    """The configuration of a model directory or a bundle.

    Args: section: the section `gsx`, in place of that of the file; None to read the file's.
    Raises:
        CheckpointError: there is no configuration, it is unreadable, its family is not supported, or the weights are
            quantized in a way that is not read.
    """
    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: has no {CONFIG}", expected="a Hugging Face model directory", found=listing(directory)
        )
    raw = read_json(path)
    if "model_type" not in raw:
        raise CheckpointError(f"{path}: has no model_type", todo="is this a Hugging Face model directory?")
    values, whole = raw, None
    if raw["model_type"] not in tuple(FAMILIES):
        values, whole = _text_part(path, raw), str(raw["model_type"])
    if section is not None:
        values = {**values, "gsx": dict(section)}
    layout = layout_of(directory, values)
    if QUANTIZATION in values:
        values = {key: value for key, value in values.items() if key != QUANTIZATION}
    layers = values.get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:  # transformers makes lists of this length
        raise CheckpointError(
            f"{path}: num_hidden_layers is out of range", expected=f"at most {_MOST_LAYERS}", found=str(layers)
        )
    if values is raw:
        return ReadConfig(config_from(directory), None, None, layout)
    return ReadConfig(config_from(directory, values), values, whole, layout)


def config_from(directory: Path, values: Mapping[str, Any] | None = None) -> Any:
    """transformers' configuration object. Args: values: in place of the file's."""
    from transformers import CONFIG_MAPPING, AutoConfig

    from gsx_exporter.checkpoint.ouro import register

    register()
    try:
        with quiet_transformers():
            if values is not None:
                return CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))
            return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types of error here, all about this one file
        raise CheckpointError(f"{directory / CONFIG}: transformers cannot read it", found=one_line(error)) from error


def _text_part(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` would say of a multimodal model's text part.

    Raises:
        CheckpointError: it has none, or one of a family that is not supported.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    part = raw.get(_TEXT_PART)
    family = _text_family(path.parent, part) if isinstance(part, dict) else None
    if not isinstance(part, dict) or family not in FAMILIES:
        what = f"model_type {raw['model_type']!r}" if family is None else f"the text part, of model_type {family!r},"
        traits = unknown_traits(raw if not isinstance(part, dict) else part)
        raise CheckpointError(
            f"{path}: {what} is not supported",
            expected="one of " + ", ".join(FAMILIES),
            found="; ".join(traits) or None,
            todo=way_out(raw),
        )
    values = {**part, **{key: raw[key] for key in _OF_THE_WHOLE if raw.get(key) is not None}}
    return {
        **values,
        "model_type": family,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]],
        "tie_word_embeddings": bool(_whole_ties(path.parent, raw)),
    }


def _text_family(directory: Path, part: Mapping[str, Any]) -> str:
    """`model_type` of the text part, which a file may leave to the default of the whole."""
    named = part.get("model_type")
    return str(named if named is not None else config_from(directory).text_config.model_type)


def _whole_ties(directory: Path, raw: Mapping[str, Any]) -> bool:
    """Whether embedding and head are one table: the whole model says so, with a default of its class."""
    from transformers import CONFIG_MAPPING

    if raw["model_type"] in CONFIG_MAPPING:
        return bool(getattr(config_from(directory), "tie_word_embeddings", False))
    return bool(raw.get("tie_word_embeddings", raw[_TEXT_PART].get("tie_word_embeddings")))
