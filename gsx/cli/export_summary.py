"""A summary of an export: as plain values for `--json`, and as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gsx.cli.console import out, size, table
from gsx.cli.policies import policy_name

if TYPE_CHECKING:
    from gsx_engines.bundle.bundle import Bundle
    from gsx_engines.bundle.drafts import DraftEntry
    from gsx_engines.bundle.policy import Policy


def summary_of(bundle: Bundle, seconds: float) -> dict[str, Any]:
    """What an export wrote, as plain values."""
    manifest = bundle.manifest
    selection, quantization = manifest.selection, manifest.quantization
    kept = None
    if selection is not None and selection.mode == "threshold":
        kept = next(p.kept_share for p in selection.grid if p.budget == selection.budget)
    return {
        "bundle": str(bundle.directory),
        "source": manifest.source.model,
        "family": manifest.decoder.family,
        "layers": manifest.decoder.stored_layers,
        "loops": manifest.decoder.loops.model_dump() if manifest.decoder.loops else None,
        "precision": manifest.precision,
        "policy": manifest.policy.name if manifest.policy else None,
        "select": selection.mode if selection else None,
        "kv_policy": manifest.kv_policy,
        "quantization": quantization.scheme if quantization else None,
        "kv_cache": manifest.kv_cache.type if manifest.kv_cache else None,
        "kept_high": list(quantization.kept_high) if quantization else None,
        "weights_only": list(quantization.weights_only) if quantization else None,
        "measured": quantization.measured.model_dump(mode="json") if quantization and quantization.measured else None,
        "confidence": _confidence_of(manifest.policy) if manifest.policy else None,
        "exits": list(manifest.policy.exits) if manifest.policy else None,
        "parameters": manifest.policy.model_dump(mode="json")["parameters"] if manifest.policy else None,
        "budget": selection.budget if selection else None,
        "kept_share": kept,
        "draft": _draft_of(manifest.draft) if manifest.draft else None,
        "notes": list(manifest.source.notes),
        "files": {path.name: path.stat().st_size for path in sorted(bundle.directory.iterdir())},
        "seconds": round(seconds, 2),
    }


def print_summary(summary: dict[str, Any]) -> None:
    console = out()
    console.print(
        f"{summary['bundle']}: {summary['family']}, {summary['layers']} layers, {summary['precision']}, "
        f"in {summary['seconds']:.1f} s"
    )
    if summary["policy"] is None:
        console.print("a dense model: nothing is skipped")
    elif summary["confidence"] is not None:
        _print_confidence(summary["confidence"], summary["exits"])
    elif summary["policy"] == "loops":
        console.print(f"policy loops: 1 to {summary['loops']['most']} loops, {summary['loops']['default']} by default")
    elif summary["budget"] is None:
        console.print(f"policy {summary['policy']}: layers {summary['parameters']['layers']} run by default")
    elif summary["kept_share"] is None:
        console.print(f"{summary['select']} selection, budget {summary['budget']:g}")
    else:
        how = (
            f"{summary['select']} selection"
            if summary["policy"] == "gateskip"
            else policy_name(summary["policy"], summary["parameters"])
        )
        console.print(
            f"{how}, budget {summary['budget']:g}: "
            f"{summary['kept_share']:.3f} of (token, branch) pairs kept on the calibration text"
        )
    if summary["draft"] is not None:
        _print_draft(summary["draft"])
    if summary["quantization"] is not None:
        _print_quantization(summary)
    if summary["kv_cache"] is not None:
        console.print(f"ONNX Runtime stores K and V in {summary['kv_cache']}")
    rows = [(name, size(count)) for name, count in summary["files"].items()]
    console.print(table(None, ("file", "size"), rows, right=1))
    console.print(f"next: gsx verify {summary['bundle']}")


def _print_quantization(summary: dict[str, Any]) -> None:
    """What is quantized, and what it cost."""
    console = out()
    parts = [f"{summary['quantization']} products"]
    spared = {"with INT8 weights only": summary["weights_only"], "in high precision": summary["kept_high"]}
    parts += [f"{len(names)} {how}" for how, names in spared.items() if names]
    console.print(", ".join(parts))
    measured = summary["measured"]
    if measured is None:
        return
    flipped = "" if measured["flipped"] is None else f", {measured['flipped']:.2%} of decisions flipped"
    divergence, perplexity = measured["divergence"], measured["perplexity_increase"]
    console.print(
        f"on {measured['text']['tokens']:,} tokens, {measured['verdict']}: "
        f"KL divergence {divergence['value']:.4f} nats ({divergence['low']:.4f} to {divergence['high']:.4f}), "
        f"{1 - measured['differing']['value']:.1%} same next token, "
        f"perplexity {perplexity['value']:+.1%} ({perplexity['low']:+.1%} to {perplexity['high']:+.1%}){flipped}"
    )


def _confidence_of(policy: Policy) -> dict[str, Any] | None:
    return policy.confidence.model_dump(mode="json") if policy.confidence else None


def _print_confidence(values: dict[str, Any], exits: list[int]) -> None:
    """When tokens exit, and what is guaranteed about it: the tested thresholds as a table."""
    console = out()
    depths = ", ".join(map(str, exits))
    at = "infinity (no token exits)" if values["threshold"] is None else f"{values['threshold']:g}"
    console.print(
        f"policy calm: a token exits after {depths} layers where its {values['measure']} confidence reaches {at}"
    )
    found = values["guarantee"]
    if found is None:
        console.print("the threshold was given, so nothing is guaranteed about the risk")
        return
    rows = [
        (
            f"{test['threshold']:g}",
            f"{test['mean_risk']:.4f}",
            f"{test['p_value']:.2g}",
            f"{test['kept_share']:.1%}",
            "yes" if test["accepted"] else "no",
        )
        for test in found["tested"]
    ]
    console.print(table(None, ("threshold", f"{found['risk']} risk", "p-value", "kept", "holds"), rows, right=1))
    console.print(
        f"with probability {found['confidence']:g} the mean {found['risk']} risk is at most {found['tolerance']:g} "
        f"on text like the calibration text ({found['prompts']} prompts of {found['prompt_tokens']} tokens)"
    )


def _draft_of(entry: DraftEntry) -> dict[str, Any]:
    values = entry.model_dump(mode="json")
    measured = [row | {"draft": str(one.draft)} for row, one in zip(values["measured"], entry.measured, strict=True)]
    vocabulary = values.get("vocabulary")
    return {"draft": str(entry.draft), "length": values["length"], "measured": measured, "vocabulary": vocabulary}


def _print_draft(entry: dict[str, Any]) -> None:
    """Print the draft and, if drafts were measured, the table that it was chosen from."""
    console = out()
    named = f"draft: {draft_line(entry['draft'], entry['vocabulary'])}"
    if not entry["measured"]:
        console.print(named)
        return
    rows = []
    for one in entry["measured"]:
        speeds = one["tokens_per_second"], one["plain_tokens_per_second"]
        cells = (one["draft"], str(one["length"]), f"{one['acceptance']:.1%}", *(f"{s:.1f}" for s in speeds))
        rows.append((*cells, f"{speeds[0] / speeds[1]:.2f}"))
    heads = ("draft", "length", "right", "tokens/s", "plain", "ratio")
    console.print(table("drafts, measured on the calibration text", heads, rows, right=1))
    best = max(one["tokens_per_second"] / one["plain_tokens_per_second"] for one in entry["measured"])
    note = "" if best > 1 else ": none was faster than plain decoding on this machine"
    console.print(f"{named}{note}")


def draft_line(draft: str, vocabulary: Mapping[str, Any] | None) -> str:
    """A draft, and the tokens that it chooses among. Args: vocabulary: the manifest's entry; None for all."""
    if vocabulary is None:
        return draft
    text = vocabulary["text"]
    return (
        f"{draft}, choosing among {vocabulary['tokens']:,} tokens: {vocabulary['covered']:.1%} of {text['name']} "
        f"({text['tokens']:,} tokens)"
    )
