"""`gsx inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gsx.cli.build import products_line
from gsx.cli.console import out, print_json, quiet_libraries, size, table
from gsx.cli.export_summary import draft_line
from gsx.cli.options import JsonOption
from gsx.cli.policies import policy_line
from gsx.cli.signals import loading

if TYPE_CHECKING:
    from gsx.workflows.inspect import EnginePlan, InspectReport
    from gsx.workflows.text_facts import Context, TextFacts, Token, TokenList


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(inspect)


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="MODEL|BUNDLE", help="A model, a hub id or a bundle.", show_default=False)
    ],
    plan: Annotated[
        bool, typer.Option("--plan", help="Also count what calls of a bundle's engines do: kernels, waits, copies.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a model or a bundle is: shape, gates, exits, calibrated budgets, end tokens, files.

    Example: gsx inspect examples/model
    """
    quiet_libraries()
    with loading():
        from gsx import inspect as look

    report = look(path, plan=plan)
    if as_json:
        print_json(report.to_dict())
    else:
        _print(report)


def _gates(gates: Mapping[str, Any] | None) -> str:
    if not gates:
        return "none"
    uneven = ", sharing a budget unevenly" if gates.get("skip_weights") else ""
    return f"{gates['kind']} on {' and '.join(gates['branches'])}, reading {gates['input']}{uneven}"


def _print(report: InspectReport) -> None:
    console = out()
    facts = [
        ("kind", f"{report.kind}, {report.family}"),
        *([("adapter", _adapter(report.adapter))] if report.adapter else []),
        ("shape", ", ".join(f"{name} {count}" for name, count in report.shape.items())),
        *_loops(report.loops),
        ("gates", _gates(report.gates)),
        ("routers", _routers(report.router)),
        ("exits", ", ".join(map(str, report.exits)) or "none"),
        ("parameters", f"{report.parameters['dense']:,} and {report.parameters['gates']:,} of gates"),
        ("type", ", ".join(report.types)),
        *_text(report.text),
    ]
    bundle = report.bundle
    if bundle:
        parity = {True: "passed", False: "failed", None: "not verified yet (gsx verify)"}[bundle["parity"]]
        parity = bundle["verdict"] or parity  # which also tells "not decided" from "failed"
        facts += [
            ("source", bundle["source"]),
            ("policy", policy_line(bundle["policy"])),
            ("selection", f"{bundle['select']}, budget {bundle['budget']:g}" if bundle["select"] else "none"),
            ("K/V policy", bundle["kv_policy"]),
            ("8 bits", bundle["quantization"] or "none"),
            ("K/V cache", bundle["kv_cache"] or "as activations"),
            ("draft", draft_line(bundle["draft"], bundle["draft_vocabulary"]) if bundle["draft"] else "none"),
            *(_engines(bundle["engines"]) or [("engines", "none (gsx build)")]),
            ("parity", parity),
        ]
    facts += [("note", note) for note in report.notes]
    console.print(report.path)
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        console.print(f"  {name.ljust(width)}  {value}")
    if bundle and bundle["grid"]:
        rows = [(f"{point['budget']:g}", f"{point['kept_share']:.4f}") for point in bundle["grid"]]
        console.print(table(None, ("budget", "kept"), rows, right=0))
    console.print(table(None, ("file", "size"), [(n, size(s)) for n, s in report.files.items()], right=1))
    for one in report.plans or ():
        console.print(_plan(one))


def _plan(plan: EnginePlan) -> Any:
    """What the calls of one profile of an engine do, by layer."""
    names = [field.name for field in fields(plan.total)]
    head = ("layer", *(name.replace("_", " ") for name in names))
    counts = {**plan.layers, "all": plan.total}
    rows = [(layer, *(str(getattr(one, name)) for name in names)) for layer, one in counts.items()]
    graph = "fits into" if plan.capturable else "does not fit into"
    title = f"{plan.engines}, {plan.graph}, profile {plan.profile}: a call {graph} a CUDA graph"
    return table(title, head, rows, right=1)


def _text(text: TextFacts) -> list[tuple[str, str]]:
    """How text is read, with the file that says so."""
    lists = [(name, _tokens(one)) for name, one in (("special", text.special), ("added", text.added)) if one]
    return [
        ("end tokens", f"{', '.join(map(_token, text.ends)) or 'none'} ({text.ids_from})"),
        ("begin token", f"{_token(text.begin) if text.begin else 'none'} ({text.ids_from})"),
        *([(f"{name} tokens", found) for name, found in lists] or [("tokenizer", f"none: {text.no_tokenizer}")]),
        ("chat template", text.chat_template or "none"),
        ("context", _context(text.context)),
    ]


def _token(token: Token) -> str:
    return str(token.id) if token.text is None else f"{token.id} {token.text!r}"


def _tokens(tokens: TokenList) -> str:
    if not tokens.count:
        return "none"
    more = ", ..." if tokens.count > len(tokens.first) else ""
    files = ", ".join(name if len(tokens.files) == 1 else f"{name} {count}" for name, count in tokens.files.items())
    return f"{tokens.count}: {', '.join(map(_token, tokens.first))}{more} ({files})"


def _context(context: Context) -> str:
    kind = context.rope.get("rope_type", context.rope.get("type", "default"))
    scaled = ""
    if kind != "default":
        original = context.rope.get("original_max_position_embeddings", context.stored)
        factor = context.rope.get("factor")  # LongRoPE's follows from the two contexts
        scaled = f", {kind} RoPE scaling{'' if factor is None else f' with factor {factor}'} over {original}"
    return f"{context.positions} positions{scaled} ({context.file})"


def _engines(engines: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A line for each engine: its matrix products by type."""
    lines = []
    for name, graphs in engines.items():
        for graph, built in graphs.items():
            wide = f"; {len(built['widened'])} quantized ones do not run in 8 bits" if built["widened"] else ""
            lines.append(("engine", f"{name}, {graph}: products {products_line(built['products'])}{wide}"))
    return lines


def _loops(loops: Mapping[str, int | str] | None) -> list[tuple[str, str]]:
    """How the layers of a looped model run, and what its caches hold."""
    if loops is None:
        return []
    parts = (f"{loops['before']} layers once", f"{loops['looped']} in each loop", f"{loops['after']} once")
    most = f"{loops['default']} loops by default, {loops['most']} at most"
    each = f"{loops['visits']}, one for each visit of a layer"
    if loops["caches"] == "last_loop":
        each = "one for each layer, of the last loop"
    return [
        ("loops", f"{', '.join(parts)}; {most}"),
        ("caches", f"{each}: {loops['kv_values']:,} numbers a token"),
    ]


def _adapter(adapter: Mapping[str, Any]) -> str:
    return f"{adapter['kind']} of rank {adapter['rank']}, alpha {adapter['alpha']:g}, over {adapter['base']}"


def _routers(router: Mapping[str, Any] | None) -> str:
    if router is None:
        return "none"
    layers = "all layers" if router["layers"] is None else "layers " + ", ".join(map(str, router["layers"]))
    threshold = "calibrated" if router["threshold"] is None else f"{router['threshold']:g}"
    return f"one for each {router['decides']} of {layers}, {router['output']}, threshold {threshold}"
