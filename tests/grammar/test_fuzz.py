"""Schemas by hypothesis: each has an automaton, and that walks beside xgrammar's matcher."""

from __future__ import annotations

import json
from typing import Any

import pytest
from grammar.cases import FORMATS, Case
from grammar.conftest import World
from grammar.walks import Walker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedstep.grammar import Limits, build

LIMITS = Limits(states=400, seconds=60)
NAMES = st.sampled_from(["a", "b", "name", "näme", 'q"', "日本", "x y", "\\", "ab"])
SMALL = st.integers(0, 4)


def _bounded(low: str, high: str) -> st.SearchStrategy[dict[str, Any]]:
    both = st.tuples(SMALL, SMALL).map(lambda pair: {low: min(pair), high: max(pair)})
    return st.one_of(st.just({}), SMALL.map(lambda least: {low: least}), both)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build_object(properties: dict[str, Any], more: Any, picks: list[bool]) -> dict[str, Any]:
        required = [name for name, pick in zip(properties, picks, strict=False) if pick]
        schema = {"type": "object", "properties": properties, "required": required}
        return schema if more is None else schema | {"additionalProperties": more}

    more = st.one_of(st.none(), st.booleans(), inner)
    picks = st.lists(st.booleans(), min_size=4, max_size=4)
    return st.builds(build_object, st.dictionaries(NAMES, inner, max_size=4), more, picks)


def _compound(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.tuples(inner, _bounded("minItems", "maxItems")).map(
        lambda pair: {"type": "array", "items": pair[0], **pair[1]}
    )
    tuples = st.lists(inner, min_size=1, max_size=3).map(
        lambda items: {"type": "array", "prefixItems": items, "items": False}
    )
    choices = st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options})
    return st.one_of(_objects(inner), _objects(inner), arrays, tuples, choices)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text(max_size=4))
LEAVES = st.one_of(
    st.sampled_from(
        [{"type": kind} for kind in ("integer", "number", "boolean", "null", "string")]
    ),
    _bounded("minLength", "maxLength").map(lambda bounds: {"type": "string", **bounds}),
    st.tuples(st.integers(-300, 300), st.integers(0, 500)).map(
        lambda pair: {"type": "integer", "minimum": pair[0], "maximum": sum(pair)}
    ),
    st.sampled_from(FORMATS).map(lambda name: {"type": "string", "format": name}),
    st.sampled_from(["^[a-z]+$", "^(a|bc)*d?$", r"^\d{2,}-\w$"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.lists(VALUES, min_size=1, max_size=4, unique_by=json.dumps).map(lambda v: {"enum": v}),
    VALUES.map(lambda value: {"const": value}),
)
SCHEMAS = st.recursive(LEAVES, _compound, max_leaves=8)


def _fuzz(world: World, schema: Any, compact: bool, seeds: int) -> None:
    case = Case("", "json_compact" if compact else "json", json.dumps(schema))
    try:
        compiled = case.compile(world.compiler)
    except RuntimeError:
        return  # xgrammar refuses the schema
    automaton = build(compiled, [], world.vocabulary, LIMITS)
    walker = Walker(compiled, world.vocabulary, [])
    for seed in range(seeds):
        walker.compare(automaton, seed, 30)


def _settings(examples: int) -> Any:
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=examples < 100,
        suppress_health_check=checks,
    )


@_settings(60)
@given(schema=SCHEMAS, compact=st.booleans())
def test_schemas(fallback: World, schema: Any, compact: bool) -> None:
    _fuzz(fallback, schema, compact, 2)


@_settings(12)
@given(schema=SCHEMAS, compact=st.booleans())
def test_schemas_with_the_bundled_tokenizer(bundled: World, schema: Any, compact: bool) -> None:
    _fuzz(bundled, schema, compact, 1)


@pytest.mark.exhaustive
@_settings(3000)
@given(schema=SCHEMAS, compact=st.booleans())
def test_many_schemas(fallback: World, schema: Any, compact: bool) -> None:
    """Some minutes of schemas, others each time: pytest -m exhaustive tests/grammar."""
    _fuzz(fallback, schema, compact, 6)


@pytest.mark.exhaustive
@_settings(1500)
@given(schema=SCHEMAS, compact=st.booleans())
def test_many_schemas_with_the_bundled_tokenizer(
    bundled: World, schema: Any, compact: bool
) -> None:
    _fuzz(bundled, schema, compact, 3)
