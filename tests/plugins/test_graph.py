"""The graph kit on graphs of a few nodes: producers and users of values, every edit, branches, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, checker, helper, numpy_helper

from gsx_plugins.graph import Graph, LayoutError, attribute, copy_of, make_node


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None])


def graph_of(
    nodes: list[onnx.NodeProto], inputs: tuple[str, ...] = ("x",), outputs: tuple[str, ...] = ("y",), **constants: float
) -> Graph:
    tensors = [numpy_helper.from_array(np.array([number], np.float32), name) for name, number in constants.items()]
    values = [value(name) for name in inputs]
    return Graph(helper.make_graph(nodes, "g", values, [value(name) for name in outputs], tensors))


def if_node(out: str, then: list[onnx.NodeProto], otherwise: list[onnx.NodeProto]) -> onnx.NodeProto:
    sides = {
        side: helper.make_graph(nodes, side, [], [value(nodes[-1].output[0])])
        for side, nodes in (("then_branch", then), ("else_branch", otherwise))
    }
    return helper.make_node("If", ["asked"], [out], name=out, **sides)


def chain() -> Graph:
    """x -> Neg -> a -> Abs -> b; a, b, c -> Sum -> y; a is read twice."""
    nodes = [make_node("Neg", ["x"], "a"), make_node("Abs", ["a"], "b"), make_node("Sum", ["a", "b", "c"], "y")]
    return graph_of(nodes, c=1.0)


def branching() -> Graph:
    """`a` is read in one branch, `b` in the other and by a later node; `inner` is an `If` in the first branch."""
    inner = if_node("inner", [make_node("Neg", ["a"], "p")], [make_node("Abs", ["x"], "q")])
    nodes = [
        make_node("Neg", ["x"], "a"),
        make_node("Abs", ["x"], "b"),
        if_node("z", [inner, make_node("Exp", ["inner"], "s")], [make_node("Identity", ["b"], "t")]),
        make_node("Add", ["z", "b"], "y"),
    ]
    return graph_of(nodes, ("x", "asked"))


def ops(graph: Graph) -> list[str]:
    return [node.op_type for node in graph.nodes]


def stored(graph: Graph) -> onnx.GraphProto:
    graph.store()
    return graph.proto


def test_producers_and_users() -> None:
    graph = chain()
    neg, absolute, total = graph.nodes
    assert graph.producer("b") is absolute
    assert graph.producer("x") is None
    assert graph.producer("c") is None
    assert list(graph.users("a")) == [absolute, total]
    assert list(graph.users("x")) == [neg]
    assert not graph.users("y")
    assert not graph.users("no such value")
    graph.set_inputs(total, ["b", "b", "c"])
    assert list(graph.users("a")) == [absolute]
    assert list(graph.users("b")) == [total], "each once"


def test_a_branch_reads_what_is_outside() -> None:
    graph = branching()
    neg, absolute, choice, add = graph.nodes
    assert list(graph.users("a")) == [choice]
    assert list(graph.users("b")) == [choice, add]
    assert list(graph.users("x")) == [neg, absolute, choice], "at any depth"
    assert set(graph.reads(choice)) == {"asked", "a", "b", "x"}
    assert [part.proto.name for part in graph.parts()].count("then_branch") == 2
    then = graph.branches(choice)["then_branch"]
    then.remove_constants([])
    then.replace(then.nodes[0], make_node("Abs", ["b"], "inner"))
    assert not graph.users("a"), "an edit inside changes who reads outside"
    assert [node.op_type for node in stored(graph).node[2].attribute[0].g.node][-1:] in (["Exp"], ["Identity"])


def test_edits_keep_the_order() -> None:
    graph = chain()
    absolute = graph.nodes[1]
    graph.insert_before(absolute, make_node("Exp", ["a"], "e"))
    graph.insert_after(absolute, make_node("Log", ["b"], "l"), make_node("Sin", ["l"], "s"))
    graph.prepend(make_node("Cos", ["x"], "first"))
    graph.append(make_node("Tan", ["y"], "last"))
    assert ops(graph) == ["Cos", "Neg", "Exp", "Abs", "Log", "Sin", "Sum", "Tan"]
    graph.replace(absolute, make_node("Relu", ["a"], "b"))
    graph.replace(graph.nodes[-1])
    assert ops(graph) == ["Cos", "Neg", "Exp", "Relu", "Log", "Sin", "Sum"]
    assert graph.expect_producer("b").op_type == "Relu"
    assert [node.op_type for node in stored(graph).node] == ops(graph)
    with pytest.raises(ValueError, match="not in this graph"):
        graph.insert_before(copy_of(graph.nodes[0]), make_node("Exp", ["x"], "n"))


def test_a_rule_is_asked_once_for_each_node_and_counted() -> None:
    graph = chain()

    def twice(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "Abs":
            return None
        assert graph.producer("b") is node, "as before the sweep"
        out = node.output[0]
        node.output[0] = "half"
        return [node, make_node("Abs", ["half"], out)]

    assert graph.rewrite(twice) == 1
    assert ops(graph) == ["Neg", "Abs", "Abs", "Sum"]
    assert [graph.expect_producer(name).input[0] for name in ("half", "b")] == ["a", "half"]
    assert graph.rewrite(lambda node: None) == 0
    assert graph.rewrite(lambda node: [] if node.op_type == "Abs" else None) == 2


def test_renaming_and_rerouting() -> None:
    graph = branching()
    graph.rename({"a": "left", "b": "right"})
    assert graph.producer("a") is None
    assert [node.op_type for node in graph.users("right")] == ["If", "Add"]
    graph.reroute({"left": "x"})
    assert not graph.users("left")
    assert graph.producer("left") is not None, "still made, by a node that nobody reads"
    assert graph.drop_unread() == 1
    proto = stored(graph)
    read = {name for a in proto.node[1].attribute for node in a.g.node for name in node.input}
    assert "right" in read
    assert not {"a", "b"} & read


def test_what_a_branch_gives_can_be_rerouted() -> None:
    """An output of a branch may be a value from the outer graph."""
    made = if_node("z", [make_node("Exp", ["x"], "s")], [make_node("Identity", ["x"], "t")])
    graph = graph_of([make_node("Neg", ["x"], "a"), made, make_node("Abs", ["z"], "y")], ("x", "asked"))
    choice = graph.nodes[1]
    then = graph.branches(choice)["then_branch"]
    then.replace(then.nodes[0])
    graph.reroute({"s": "a"})
    assert then.output_names == {"a"}
    assert list(graph.users("a")) == [choice]


def test_unread_nodes_and_constants_are_dropped() -> None:
    nodes = [
        make_node("Neg", ["x"], "a"),
        make_node("Abs", ["a"], "unread"),
        if_node(
            "y",
            [make_node("Exp", ["a"], "dead"), make_node("Add", ["a", "c"], "s")],
            [make_node("Identity", ["x"], "t")],
        ),
        if_node("dropped", [make_node("Exp", ["d"], "u")], [make_node("Identity", ["x"], "v")]),
    ]
    graph = graph_of(nodes, ("x", "asked"), c=1.0, d=2.0)
    assert graph.drop_unread() == 3, "Abs, the second If, and Exp inside the first"
    assert ops(graph) == ["Neg", "If"]
    assert set(graph.constants) == {"c"}, "read by a branch only"
    assert graph.drop_unread() == 0


def test_an_optional_input_is_no_value() -> None:
    """The empty name of an input or output that is left out connects nothing."""
    nodes = [
        helper.make_node("Dropout", ["x"], ["d", ""], name="d"),
        helper.make_node("Clip", ["x", "", "c"], ["y"], name="y"),
    ]
    graph = graph_of(nodes, c=1.0)
    assert graph.producer("") is None
    assert not graph.users("")
    assert graph.drop_unread() == 1


def test_constants() -> None:
    graph = chain()
    assert graph.number("c") == 1
    assert graph.number("a") is None
    assert graph.add_constant("n", [2, 3]) == "n"
    assert graph.constants["n"].data_type == TensorProto.INT64
    assert graph.number("n") is None, "two numbers"
    graph.add_constant("n", [2, 3])
    with pytest.raises(ValueError, match="two different constants are called 'n'"):
        graph.add_constant("n", [2, 4])
    graph.add_tensor(onnx.TensorProto(name="far", dims=[1], data_location=TensorProto.EXTERNAL))
    assert graph.number("far") is None, "not looked up in another file"
    graph.remove_constants(["far", "n"])
    assert [tensor.name for tensor in stored(graph).initializer] == ["c"]


def test_inputs_outputs_and_defaults() -> None:
    graph = graph_of([make_node("Sum", ["x", "bound"], "y")], ("x", "bound"), bound=0.5)
    assert graph.drop_defaults() == 1
    assert graph.drop_defaults() == 0
    graph.keep_inputs(lambda name: name != "x")
    assert [one.name for one in graph.proto.input] == ["bound"]
    graph.set_outputs([value("bound"), *graph.proto.output])
    assert [one.name for one in graph.proto.output] == ["bound", "y"]


def test_a_fresh_name_is_nobodys() -> None:
    graph = branching()
    assert graph.fresh("new") == "new"
    assert graph.fresh("a") == "a_"
    assert graph.fresh("p") == "p_", "of a branch of a branch"
    assert graph.fresh("a", avoid={"a_"}) == "a__"
    assert graph.fresh("x") == "x_"


def test_a_node_moves_into_a_branch() -> None:
    """With the graphs inside it, which may have been edited before."""
    graph = branching()
    other = if_node("moved", [make_node("Neg", ["x"], "m")], [make_node("Abs", ["x"], "n")])
    graph.insert_before(graph.nodes[2], other)
    graph.branches(other)["then_branch"].append(make_node("Exp", ["m"], "more"))
    graph.replace(other)
    then = graph.branches(graph.nodes[2])["then_branch"]
    then.prepend(other)
    proto = stored(graph)
    inside = next(a.g for a in proto.node[2].attribute if a.name == "then_branch")
    moved = next(a.g for a in inside.node[0].attribute if a.name == "then_branch")
    assert [node.op_type for node in moved.node] == ["Neg", "Exp"]


def test_storing_twice_changes_nothing() -> None:
    graph = branching()
    once = stored(graph).SerializeToString()
    assert stored(graph).SerializeToString() == once
    assert len(graph.nodes) == 4


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (
            lambda g: g.expect_producer("b", "Relu", "Neg"),
            r"pass fold, node 'b' \(Abs\): expected Relu or Neg to make 'b', found Abs",
        ),
        (lambda g: g.expect_producer("x"), r"value 'x': expected a node that makes it, found nothing that does"),
        (lambda g: g.expect_inputs(g.nodes[0], 2), r"node 'a' \(Neg\): expected 2 inputs, found 1"),
        (lambda g: g.expect_output("logits"), r"the outputs of the graph: expected 'logits', found y"),
        (
            lambda g: g.expect(False, "the cache", "a Concat"),
            r"pass fold, the cache: expected a Concat, found some",
        ),
    ],
)
def test_another_layout_is_an_error_that_names_pass_and_node(look: object, message: str) -> None:
    graph = chain()
    graph.in_pass = "fold"
    with pytest.raises(LayoutError, match=message) as caught:
        look(graph)  # type: ignore[operator]
    assert caught.value.in_pass == "fold"
    assert not isinstance(caught.value, AssertionError)


def test_what_is_as_expected() -> None:
    graph = chain()
    assert graph.expect_producer("b", "Abs", "Neg") is graph.producer("b")
    assert graph.expect_inputs(graph.nodes[2], 3) == ["a", "b", "c"]
    assert graph.expect_output("y").name == "y"
    graph.expect(True, "anything", "it to hold")
    assert attribute(make_node("Gather", ["x", "i"], "o", axis=2), "axis") == 2
    assert attribute(make_node("Gather", ["x", "i"], "o"), "axis", 7) == 7


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    kinds = st.sampled_from(["insert_before", "insert_after", "replace", "remove", "set_inputs", "rewrite", "reroute"])
    return draw(st.lists(st.tuples(kinds, st.integers(0, 50), st.integers(0, 50)), max_size=12))


@given(edits(), st.lists(st.integers(0, 9), min_size=2, max_size=8))
@settings(max_examples=60)
def test_links_are_right_after_any_edits(todo: list[tuple[str, int, int]], reads: list[int]) -> None:
    """Between edits, producers, users and order are those of a graph that is made anew from the nodes."""
    nodes = [make_node("Neg", [f"v{min(read, n)}"], f"v{n + 1}") for n, read in enumerate(reads)]
    graph = graph_of(nodes, ("v0",), (f"v{len(reads)}",))
    for fresh, (kind, at, which) in enumerate(todo):
        if not graph.nodes:
            break
        node = graph.nodes[at % len(graph.nodes)]
        new = make_node("Abs", [f"v{which % (len(reads) + 1)}"], f"new{fresh}")
        if kind == "remove":
            graph.replace(node)
        elif kind == "set_inputs":
            graph.set_inputs(node, [*node.input, new.input[0]])
        elif kind == "rewrite":
            graph.rewrite(lambda one, gone=node, new=new: [new] if one is gone else None)
        elif kind == "reroute":
            graph.reroute({node.output[0]: "v0"})
        else:
            getattr(graph, kind)(node, new)
        again = graph_of([copy_of(one) for one in graph.nodes], ("v0",), (f"v{len(reads)}",))
        for name in {name for one in graph.nodes for name in (*one.input, *one.output)}:
            assert graph.producer(name) == again.producer(name)
            assert list(graph.users(name)) == list(again.users(name))
    before = [copy_of(node) for node in graph.nodes]
    assert list(stored(graph).node) == before


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=7), st.integers(1, 7))
@settings(max_examples=60)
def test_what_is_left_is_what_the_output_depends_on(reads: list[tuple[int, int]], end: int) -> None:
    nodes = [make_node("Add", [f"v{min(a, n)}", f"v{min(b, n)}"], f"v{n + 1}") for n, (a, b) in enumerate(reads)]
    out = f"v{min(end, len(reads))}"
    graph = graph_of(nodes, ("v0",), (out,))
    needed, pending = set(), [out]
    while pending:
        name = pending.pop()
        maker = next((node for node in nodes if node.output[0] == name), None)
        if maker is not None and name not in needed:
            needed.add(name)
            pending += maker.input
    assert graph.drop_unread() == len(nodes) - len(needed)
    assert {node.output[0] for node in graph.nodes} == needed
    checker.check_graph(stored(graph), _context())


def _context() -> checker.C.CheckerContext:
    context = checker.C.CheckerContext()
    context.ir_version, context.opset_imports = 11, {"": 23}
    return context
