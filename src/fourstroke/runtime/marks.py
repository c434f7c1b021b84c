"""Marks on OpenVINO's operations: which stay float32, and which constants stay as small as they are.

Only what is read from XML can be marked. So a few operations are written as XML, marked there, read back, and put into
the graph.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from openvino import Model as Graph
from openvino import Node, PartialShape, Type, serialize
from openvino import opset15 as ops

from .openvino import core

DECOMPRESSION = b'<rt_info><attribute name="decompression" version="0" /></rt_info>'


def precise(results: Sequence[Node], parameters: Sequence[Node]) -> Graph:
    """The graph from ``parameters`` to ``results``, whose operations stay float32 wherever it is inserted."""
    graph = Graph([ops.result(node) for node in results], [*parameters])  # pyright: ignore[reportGeneralTypeIssues]
    for node in graph.get_ops():
        if node.get_type_name() not in ("Parameter", "Constant", "Result"):
            node.get_rt_info()["precise_0"] = ""
    return read_back(graph)


def read_back(graph: Graph, change: Callable[[bytes], bytes] = bytes) -> Graph:
    """``graph``, written as XML, of which ``change`` is read."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.xml"
        serialize(graph, path)
        return core().read_model(change(path.read_bytes()), path.with_suffix(".bin").read_bytes())


def insert(graph: Graph, given: Sequence[Node]) -> list[Node]:
    """The results of a copy of ``graph``, with ``given`` in the place of its parameters."""
    part = graph.clone()
    for parameter, value in zip(part.get_parameters(), given, strict=True):
        for target in parameter.output(0).get_target_inputs():
            target.replace_source_output(value.output(0))
    return [result.input_value(0).get_node() for result in part.get_results()]


def widened(constant: Node) -> Node:
    """``constant`` as float32; what is compiled keeps it as it is, where it would keep a float32 copy of it as well."""
    return insert(_widening(constant.get_element_type()), [constant])[0]


@functools.cache
def _widening(kind: Type) -> Graph:
    parameter = ops.parameter(PartialShape.dynamic(), kind)
    graph = Graph([ops.result(ops.convert(parameter, "f32"))], [parameter])  # pyright: ignore[reportGeneralTypeIssues]
    conversion = b'<data destination_type="f32" />'
    return read_back(graph, lambda xml: xml.replace(conversion, conversion + DECOMPRESSION))
