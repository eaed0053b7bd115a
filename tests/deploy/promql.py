"""What a PromQL expression asks for: its selectors, and which labels it expects of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import promql_parser as promql


class Wanted(NamedTuple):
    """A metric by the name of its samples, and the labels that an expression reads of it."""

    name: str
    labels: frozenset[str]


def wanted(expression: str) -> set[Wanted]:
    """Return what an expression asks for; raises ValueError for one that is not PromQL."""
    return set(_walk(promql.parse(expression), frozenset()))


def _walk(node: Any, outer: frozenset[str]) -> Iterator[Wanted]:
    """Yield the selectors below a node; `outer` are the labels that an aggregation around it groups by."""
    if isinstance(node, promql.VectorSelector):
        yield Wanted(node.name, outer | {matcher.name for matcher in node.matchers.matchers})
    elif isinstance(node, promql.MatrixSelector):
        yield from _walk(node.vector_selector, outer)
    elif isinstance(node, promql.AggregateExpr):
        grouped = node.modifier
        by = frozenset(grouped.labels) if grouped and grouped.type == promql.AggModifierType.By else frozenset()
        yield from _walk(node.expr, by)
    elif isinstance(node, promql.BinaryExpr):
        matching = node.modifier.matching if node.modifier else None
        matched = matching is not None and matching.type == promql.LabelModifierType.Include
        on = frozenset(matching.labels) if matching and matched else frozenset()
        for side in (node.lhs, node.rhs):
            yield from _walk(side, outer | on)
    elif isinstance(node, promql.Call):
        for argument in node.args:
            yield from _walk(argument, outer)
    elif isinstance(node, promql.ParenExpr | promql.UnaryExpr | promql.SubqueryExpr):
        yield from _walk(node.expr, outer)
