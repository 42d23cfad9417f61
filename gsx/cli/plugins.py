"""`gsx plugins build` and `gsx plugins list`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gsx.cli.console import ProgressLine, out, print_json, size, table
from gsx.cli.options import JsonOption
from gsx.cli.signals import loading

if TYPE_CHECKING:
    from gsx.workflows.plugins import LibraryFacts


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    group = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
    group.callback(invoke_without_command=True)(plugins)
    group.command("build")(build)
    group.command("list")(list_)
    app.add_typer(group, name="plugins")


def plugins(context: typer.Context) -> None:
    """Build the CUDA kernels and TensorRT plugins of the custom ops, and show them.

    Example: gsx plugins build
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def build(
    arch: Annotated[
        str | None,
        typer.Option(
            help="GPU architectures, comma-separated: 90 (machine code and PTX), 90-real, 90-virtual.",
            show_default="80-real,86-real,89-real,90,120",
        ),
    ] = None,
    kernels_only: Annotated[
        bool, typer.Option("--kernels-only", help="Leave out the TensorRT plugins: needs no TensorRT headers.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build even if the library exists.")] = False,
    jobs: Annotated[
        int | None, typer.Option(help="Compilers that run in parallel.", show_default="one per processor")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Build the plugin library, unless it was already built from these sources.

    Needs nvcc, CMake, a C++ compiler and TensorRT's headers (TENSORRT_ROOT), but no GPU.

    Example: gsx plugins build --arch 90
    """
    with ProgressLine() as line:
        line.update("looking for tools")
        with loading():
            from gsx import plugins
            from gsx.workflows.plugins import library_facts
            from gsx_plugins.build import ARCHITECTURES

        built = plugins.build(
            architectures=tuple(part.strip() for part in arch.split(",")) if arch else ARCHITECTURES,
            kernels_only=kernels_only,
            force=force,
            jobs=jobs,
            on_progress=line.show,
        )
    facts = library_facts(built.path)
    if as_json:
        print_json({**asdict(facts), "path": str(facts.path), "cached": built.cached})
    else:
        out().print("the library was already built" if built.cached else f"built in {built.record.seconds:g} s")
        _print_library(facts)


def list_(as_json: JsonOption = False) -> None:
    """Show the custom ops, and the library that implements them.

    Example: gsx plugins list
    """
    with loading():
        from gsx import plugins

    found = plugins.list()
    if as_json:
        print_json(found.to_dict())
        return
    rows = [
        (op.name, ", ".join(op.inputs), ", ".join(op.outputs), "kernel and plugin" if op.native else "standard ops")
        for op in found.ops
    ]
    out().print(table(None, ("op", "inputs", "outputs", "in TensorRT"), rows))
    if found.library is None:
        out().print("the library is not built: gsx plugins build")
    else:
        _print_library(found.library)


def _print_library(facts: LibraryFacts) -> None:
    lines = [("library", str(facts.path)), ("size", size(facts.bytes)), ("sha256", facts.sha256)]
    record = facts.record
    lines.append(("contains", "kernels and TensorRT plugins" if facts.plugins else "only kernels"))
    if record:
        headers = f", headers of TensorRT {record.tensorrt_headers}" if record.tensorrt_headers else ""
        lines += [("for GPUs", ", ".join(record.architectures)), ("built with", f"CUDA {record.nvcc}{headers}")]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        out().print(f"{name.ljust(width)}  {value}")
