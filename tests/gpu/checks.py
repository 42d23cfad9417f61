"""The kernels against the torch ops: the cases of tests/plugins/kernel_cases.py, on the device at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from gsx_plugins.errors import PluginLibraryError
from tests.gpu.rows import Row, Verdict
from tests.plugins import kernel_cases as cases

Check = Callable[[], None]
# For the memory checker, which makes kernels a hundred times slower: one size for every code path of the kernels.
QUICK_SIZES = (1, 33, 513, 8193, 20_011)


def all_checks(kernels: cases.GuardedKernels, device: str, *, quick: bool) -> Iterator[tuple[str, Check]]:
    """(group, check), in the order of the table."""
    sizes = QUICK_SIZES if quick else (*cases.SIZES, *cases.LARGE_SIZES)
    kinds = ("gate scores", "ties", "NaN") if quick else tuple(cases.SCORES)
    for kind in kinds:
        for n in sizes:
            for k in (n // 2,) if quick else cases.wanted_counts(n):
                yield (
                    "selection of the K best",
                    lambda n=n, kind=kind, k=k: cases.check_topk(kernels, device, n, kind, k),
                )
            yield "selection by threshold", lambda n=n, kind=kind: cases.check_threshold(kernels, device, n, kind)
    for case in cases.ROW_CASES:
        yield "row gather", lambda case=case: cases.check_gather(kernels, device, *case)
        for scalar in (True, False):
            yield (
                "gated scatter-add",
                lambda case=case, scalar=scalar: cases.check_scatter(kernels, device, *case, scalar_gate=scalar),
            )


def run_checks(kernels: cases.GuardedKernels, device: str, *, quick: bool = False) -> list[Row]:
    """Run all checks. Returns: one row per group, with the first failures."""
    passed: dict[str, int] = {}
    failures: dict[str, list[str]] = {}
    for group, check in all_checks(kernels, device, quick=quick):
        try:
            check()
            passed[group] = passed.get(group, 0) + 1
        except (AssertionError, PluginLibraryError) as error:
            failures.setdefault(group, []).append(str(error).splitlines()[0])
        except RuntimeError as error:  # CUDA's: nothing runs after it
            arguments = check.__defaults__  # type: ignore[attr-defined]
            failures.setdefault(group, []).append(f"{arguments}: {str(error).splitlines()[0]}; not gone on")
            break
    rows = []
    for group in dict.fromkeys([*passed, *failures]):
        failed = failures.get(group, [])
        found = f"{passed.get(group, 0)} equal" + (f", {len(failed)} not: {'; '.join(failed[:3])}" if failed else "")
        rows.append(Row(f"{group}, against torch", found, "all, to the bit", "fail" if failed else "pass"))
    return rows


def check_graph(kernels: cases.GuardedKernels) -> Row:
    """Select, gather and scatter captured in a CUDA graph, replayed on other scores, against the torch ops."""
    n, k, width = 20_011, 9_000, 512
    scores = [torch.rand(n, generator=cases.seeded(seed)) for seed in range(3)]
    score = scores[0].cuda()
    x = cases.matrix(n, width, torch.bfloat16, "cuda", 1)
    gate = cases.matrix(k, 1, torch.bfloat16, "cuda", 2)
    limit = torch.tensor([k], device="cuda")

    def chain() -> torch.Tensor:
        index, _ = kernels.topk_select(score, limit)
        return kernels.gated_scatter_add(x, kernels.gather_rows(x, index[:k]), gate, index[:k])

    chain()  # loads the kernels: a capture must not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    equal = 0
    for other in scores:
        score.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        index = torch.sort(other, descending=True, stable=True).indices[:k].sort().values
        expected = x.cpu().index_add(0, index, gate.cpu() * x.cpu()[index])
        equal += int(torch.equal(out.cpu().view(torch.int16), expected.view(torch.int16)))
    verdict: Verdict = "pass" if equal == len(scores) else "fail"
    return Row("a CUDA graph of the chain, replayed", f"{equal} of {len(scores)} equal", "all", verdict)
