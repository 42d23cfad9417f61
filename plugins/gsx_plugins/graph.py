"""A graph under change: which node makes a value, which nodes read it, and edits that keep both right.

Every rewrite of an ONNX graph in gsx goes through `Graph`: assembling and quantizing in the exporter, lowering in the
engines. It knows ONNX only and nothing of our models.

    graph = Graph(model.graph)
    graph.rewrite(lambda node: [] if node.op_type == "Identity" else None)
    graph.drop_unread()
    graph.store()

Nodes are held in a list until `store` writes them back, so that an edit costs no copy of the whole graph. The graphs
inside a node (the branches of an `If`) are `Graph`s too: `branches` gives them, and `store` writes them as well.

A pass that does not find what it looks for raises `LayoutError` by `expect` and its relatives. That is no assertion: a
graph from another version of gsx is input, and whoever loads it turns the error into a message to the user.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class LayoutError(Exception):
    """A graph does not look as a pass expects.

    Args:
        where: the node or value at which this was seen.
        expected: what the pass looks for.
        found: what is there instead.
        in_pass: the pass that looked; empty outside of any.
    """

    def __init__(self, where: str, *, expected: str, found: str, in_pass: str = "") -> None:
        self.where, self.expected, self.found, self.in_pass = where, expected, found, in_pass
        looking = f"pass {in_pass}, " if in_pass else ""
        super().__init__(f"{looking}{where}: expected {expected}, found {found}")


@dataclass
class _Shared:
    """What a graph and the graphs inside its nodes share.

    Args:
        inside: the graphs inside nodes, by the node's id; with the node, so that its id stays its own. They are in one
            place, since a node may move from one graph to another.
        edits: how many there were, since the readers of a value also change by edits inside a node.
    """

    inside: dict[int, tuple[onnx.NodeProto, dict[str, Graph]]] = field(default_factory=dict)
    edits: int = 0


class Graph:
    """Nodes, constants, inputs and outputs of an ONNX graph, to be changed.

    Connections are changed by the methods here, so that `producer` and `users` stay right; within `rewrite` a rule may
    also edit the nodes it is given.

    Args:
        proto: the graph. Its inputs and outputs are changed in place at once, its nodes and constants by `store`.
    """

    def __init__(self, proto: onnx.GraphProto, _shared: _Shared | None = None) -> None:
        self.proto = proto
        self.in_pass = ""  # the pass that is at work, for errors
        self._nodes: list[onnx.NodeProto] = list(proto.node)
        self._constants: dict[str, onnx.TensorProto] = {tensor.name: tensor for tensor in proto.initializer}
        self._shared = _shared or _Shared()
        self._producers: dict[str, onnx.NodeProto] | None = None
        self._users: dict[str, list[onnx.NodeProto]] = {}
        self._users_at = -1  # the edit after which `_users` was made

    # -- looking -----------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        """The nodes, in topological order."""
        return self._nodes

    @property
    def constants(self) -> Mapping[str, onnx.TensorProto]:
        """The initializers, by name; weights whose data is in another file too."""
        return self._constants

    @property
    def output_names(self) -> set[str]:
        """Names of the graph's outputs."""
        return {value.name for value in self.proto.output}

    def producer(self, value: str) -> onnx.NodeProto | None:
        """The node that makes a value; None for an input, a constant, or a value of the graph around this one."""
        if self._producers is None:
            self._producers = {name: node for node in self._nodes for name in node.output if name}
        return self._producers.get(value)

    def users(self, value: str) -> Sequence[onnx.NodeProto]:
        """The nodes that read a value, in order, each once; also those with a branch inside that reads it."""
        if self._users_at != self._shared.edits:
            self._users, self._users_at = {}, self._shared.edits
            for node in self._nodes:
                for name in dict.fromkeys(self.reads(node)):
                    self._users.setdefault(name, []).append(node)
        return self._users.get(value, [])

    def reads(self, node: onnx.NodeProto) -> list[str]:
        """What a node reads, in order: its inputs, and what the graphs inside it read from around them."""
        names = [name for name in node.input if name]
        if inside := self.branches(node):
            for branch in inside.values():
                names += branch.outer_reads()
        return names

    def outer_reads(self) -> list[str]:
        """The values from around that a graph inside a node reads, each once."""
        made = {name for node in self._nodes for name in node.output} | self._constants.keys()
        made |= {value.name for value in self.proto.input}
        read = [name for node in self._nodes for name in self.reads(node)]
        read += [value.name for value in self.proto.output]
        return [name for name in dict.fromkeys(read) if name not in made]

    def branches(self, node: onnx.NodeProto) -> Mapping[str, Graph]:
        """The graphs inside a node, by attribute: `then_branch` and `else_branch` of an `If`."""
        known = self._shared.inside.get(id(node))
        if known is None:
            graphs = {a.name: Graph(a.g, self._shared) for a in node.attribute if a.type == onnx.AttributeProto.GRAPH}
            known = self._shared.inside[id(node)] = (node, graphs)
        return known[1]

    def parts(self) -> Iterator[Graph]:
        """This graph and all graphs inside its nodes, at any depth."""
        yield self
        for node in self._nodes:
            for branch in self.branches(node).values():
                yield from branch.parts()

    def number(self, value: str) -> float | None:
        """The one number that a constant here consists of; None if it is not such a constant."""
        tensor = self._constants.get(value)
        if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL or int(np.prod(tensor.dims)) != 1:
            return None
        return float(numpy_helper.to_array(tensor).item())

    def fresh(self, name: str, avoid: Collection[str] = ()) -> str:
        """A name that no value here has: this one, or with as many underscores behind it as it takes."""
        taken = {value.name for value in self.proto.input}
        for part in self.parts():
            taken |= part.constants.keys()
            taken.update(made for node in part.nodes for made in node.output)
        while name in taken or name in avoid:
            name += "_"
        return name

    # -- expecting ---------------------------------------------------------------------------------------------

    def error(self, where: onnx.NodeProto | str, expected: str, found: str) -> LayoutError:
        """The error of a graph that does not look as expected, to be raised."""
        place = where if isinstance(where, str) else f"node {where.name or where.output[0]!r} ({where.op_type})"
        return LayoutError(place, expected=expected, found=found, in_pass=self.in_pass)

    def expect(self, holds: object, where: onnx.NodeProto | str, expected: str, found: str = "something else") -> None:
        """Raise LayoutError unless something holds.

        Args:
            where: the node or value that is looked at.
            expected, found: for the error.
        """
        if not holds:
            raise self.error(where, expected, found)

    def expect_producer(self, value: str, *op_types: str) -> onnx.NodeProto:
        """The node that makes a value, which must be of one of these types (of any, if none is given).

        Raises: LayoutError otherwise.
        """
        node, wanted = self.producer(value), " or ".join(op_types) or "a node"
        if node is None:
            raise self.error(f"value {value!r}", f"{wanted} that makes it", "nothing that does")
        self.expect(not op_types or node.op_type in op_types, node, f"{wanted} to make {value!r}", node.op_type)
        return node

    def expect_inputs(self, node: onnx.NodeProto, count: int) -> list[str]:
        """The inputs of a node, which must have so many. Raises: LayoutError otherwise."""
        self.expect(len(node.input) == count, node, f"{count} inputs", str(len(node.input)))
        return list(node.input)

    def expect_output(self, name: str) -> onnx.ValueInfoProto:
        """An output of the graph. Raises: LayoutError if there is none of this name."""
        for value in self.proto.output:
            if value.name == name:
                return value
        raise self.error("the outputs of the graph", repr(name), ", ".join(sorted(self.output_names)))

    # -- changing ----------------------------------------------------------------------------------------------

    def rewrite(self, rule: Callable[[onnx.NodeProto], Sequence[onnx.NodeProto] | None]) -> int:
        """Go over all nodes once and put others in their places. Returns: how many nodes the rule changed.

        Until the sweep is over `producer` gives what it gave before. A rule must not ask for `users`, nor, if it edits
        outputs of nodes, for `producer`.

        Args:
            rule: node -> the nodes that take its place, which may include it, edited or not; None to leave it.
        """
        nodes: list[onnx.NodeProto] = []
        count = 0
        for node in self._nodes:
            made = rule(node)
            if made is None:
                nodes.append(node)
            else:
                nodes += made
                count += 1
        if count:
            self._become(nodes)
        return count

    def prepend(self, *nodes: onnx.NodeProto) -> None:
        """Put nodes before all others."""
        self._become([*nodes, *self._nodes])

    def append(self, *nodes: onnx.NodeProto) -> None:
        """Put nodes behind all others."""
        self._nodes.extend(nodes)
        self._edited()

    def insert_before(self, node: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
        """Put nodes before one of the graph."""
        self.replace(node, *nodes, node)

    def insert_after(self, node: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
        """Put nodes behind one of the graph."""
        self.replace(node, node, *nodes)

    def replace(self, node: onnx.NodeProto, *nodes: onnx.NodeProto) -> None:
        """Put nodes in the place of one of the graph; without any, it goes."""
        at = next((place for place, one in enumerate(self._nodes) if one is node), None)
        if at is None:
            raise ValueError(f"node {node.name!r} is not in this graph")
        self._become([*self._nodes[:at], *nodes, *self._nodes[at + 1 :]])

    def set_inputs(self, node: onnx.NodeProto, values: Iterable[str]) -> None:
        """Let a node read these values."""
        node.input[:] = list(values)
        self._edited()

    def rename(self, names: Mapping[str, str]) -> None:
        """Give values other names, where nodes make them and where nodes read them, inside branches too."""
        for part in self.parts():
            for node in part.nodes:
                _put(node.output, names)
            part._edited()
        self.reroute(names)

    def reroute(self, names: Mapping[str, str]) -> None:
        """Whoever reads a value that is a key here, inside branches too, reads the other one in its place."""
        for part in self.parts():
            for node in part.nodes:
                _put(node.input, names)
            if part is not self:
                for value in part.proto.output:
                    value.name = names.get(value.name, value.name)
        self._edited()

    def add_constant(self, name: str, value: Any) -> str:
        """Add an initializer; Python's whole numbers become int64. Returns: its name.

        Raises: ValueError if another one has this name.
        """
        self.add_tensor(numpy_helper.from_array(np.asarray(value), name))
        return name

    def add_tensor(self, tensor: onnx.TensorProto) -> None:
        """Add an initializer. Raises: ValueError if another one has its name."""
        self._shared.edits += 1  # a branch that has a constant of its own does not read the one outside
        known = self._constants.setdefault(tensor.name, tensor)
        if known is not tensor and known != tensor:
            raise ValueError(f"two different constants are called {tensor.name!r}")

    def remove_constants(self, names: Iterable[str]) -> None:
        """Take initializers out."""
        self._shared.edits += 1
        for name in list(names):
            del self._constants[name]

    def keep_inputs(self, wanted: Callable[[str], bool]) -> None:
        """Take out the inputs of the graph whose names are not wanted."""
        _set_values(self.proto.input, [value for value in self.proto.input if wanted(value.name)])

    def set_outputs(self, values: Iterable[onnx.ValueInfoProto]) -> None:
        """Make these the outputs of the graph."""
        _set_values(self.proto.output, values)

    # -- leaving out -------------------------------------------------------------------------------------------

    def drop_unread(self) -> int:
        """Take out nodes and constants on which no output depends, inside branches too. Returns: how many nodes."""
        count = 0
        read = self.output_names
        kept: list[onnx.NodeProto] = []
        for node in reversed(self._nodes):
            if not read.isdisjoint(node.output):
                kept.append(node)
                count += sum(branch.drop_unread() for branch in self.branches(node).values())
                read.update(self.reads(node))
        count += len(self._nodes) - len(kept)
        if len(kept) < len(self._nodes):
            self._become(kept[::-1])
        self._constants = {name: tensor for name, tensor in self._constants.items() if name in read}
        return count

    def drop_defaults(self) -> int:
        """Take out the default values of inputs: constants of an input's name. Returns: how many."""
        defaults = [value.name for value in self.proto.input if value.name in self._constants]
        self.remove_constants(defaults)
        return len(defaults)

    def store(self) -> None:
        """Write nodes and constants into `proto`, and so for the graphs inside nodes. What was held is let go."""
        for node in self._nodes:
            for branch in self.branches(node).values():
                branch.store()
        nodes, constants = self._nodes, list(self._constants.values())
        del self.proto.node[:]
        self.proto.node.extend(nodes)
        del self.proto.initializer[:]
        self.proto.initializer.extend(constants)
        self._become(list(self.proto.node))
        self._constants = {tensor.name: tensor for tensor in self.proto.initializer}

    def _become(self, nodes: list[onnx.NodeProto]) -> None:
        self._nodes = nodes
        self._edited()

    def _edited(self) -> None:
        self._producers = None
        self._shared.edits += 1


def copy_of(node: onnx.NodeProto) -> onnx.NodeProto:
    """The same node once more."""
    out = onnx.NodeProto()
    out.CopyFrom(node)
    return out


def make_node(op: str, inputs: Sequence[str], out: str, **attributes: Any) -> onnx.NodeProto:
    """A node that has its only output's name, of a standard op unless `domain` is given."""
    return helper.make_node(op, list(inputs), [out], name=out, **attributes)


def attribute(node: onnx.NodeProto, name: str, default: int = 0) -> int:
    """An int attribute of a node."""
    return next((one.i for one in node.attribute if one.name == name), default)


def number(node: onnx.NodeProto, name: str) -> float:
    """A float attribute of a node; 0 if it has none of this name."""
    return next((one.f for one in node.attribute if one.name == name), 0.0)


def _put(field: Any, names: Mapping[str, str]) -> None:
    """Rename what a node makes or reads; fields that no name concerns are left, since writing them is slow."""
    if not names.keys().isdisjoint(field):
        field[:] = [names.get(name, name) for name in field]


def _set_values(field: Any, values: Iterable[onnx.ValueInfoProto]) -> None:
    kept = list(values)
    del field[:]
    field.extend(kept)
