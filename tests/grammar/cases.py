"""Grammars of all kinds that vLLM's xgrammar backend takes, and how it compiles them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import xgrammar


@dataclass(frozen=True)
class Case:
    """A grammar: ``kind`` is one of vLLM's, or json_compact (``disable_any_whitespace``)."""

    name: str
    kind: str
    spec: str

    def compile(self, compiler: xgrammar.GrammarCompiler) -> xgrammar.CompiledGrammar:
        """As vllm/v1/structured_output/backend_xgrammar.py does it."""
        if self.kind == "json":
            return compiler.compile_json_schema(self.spec, any_whitespace=True)
        if self.kind == "json_compact":
            return compiler.compile_json_schema(
                self.spec, any_whitespace=False, separators=(",", ":")
            )
        if self.kind == "regex":
            return compiler.compile_regex(self.spec)
        if self.kind == "ebnf":
            return compiler.compile_grammar(self.spec)
        if self.kind == "lark":
            return compiler.compile_lark(self.spec)
        if self.kind == "tag":
            return compiler.compile_structural_tag(self.spec)
        tags = json.loads(self.spec)
        return compiler.compile_structural_tag(
            [xgrammar.StructuralTagItem(**tag) for tag in tags["structures"]], tags["triggers"]
        )


def _object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names}


STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
BOOLEAN, NULL = {"type": "boolean"}, {"type": "null"}

TEN_FIELDS = _object(
    name=STRING,
    age=INTEGER,
    email=STRING,
    score=NUMBER,
    active=BOOLEAN,
    tags={"type": "array", "items": STRING},
    kind={"enum": ["a", "b", "c"]},
    city=STRING,
    zip={"type": "string", "pattern": "^[0-9]{5}$"},
    note={"type": ["string", "null"]},
)
WEATHER = _object(
    ["location"],
    location=STRING,
    unit={"type": "string", "enum": ["celsius", "fahrenheit"]},
    days={"type": "integer", "minimum": 1, "maximum": 14},
)
FORMATS = (
    *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid"),
    *("uri", "uri-reference", "uri-template", "json-pointer", "relative-json-pointer"),
)
SCHEMAS: dict[str, Any] = {
    "string": STRING,
    "integer": INTEGER,
    "number": NUMBER,
    "boolean": BOOLEAN,
    "null": NULL,
    "string or null": {"type": ["string", "null"]},
    "ten fields": TEN_FIELDS,
    "ten optional fields": TEN_FIELDS | {"required": []},
    "weather": WEATHER,
    "nested": _object(a=_object(b=_object(c=STRING), d=INTEGER), e=_object(f=BOOLEAN)),
    "length": _object(s={"type": "string", "minLength": 2, "maxLength": 6}),
    "long": _object(s={"type": "string", "maxLength": 120}),
    "least length": _object(s={"type": "string", "minLength": 3}),
    "pattern": _object(s={"type": "string", "pattern": r"^[A-Z]{2}-\d{3,}( \w+)?$"}),
    "range": _object(i={"type": "integer", "minimum": -17, "maximum": 204}),
    "open range": _object(i={"type": "integer", "exclusiveMinimum": 10}),
    "number range": _object(x={"type": "number", "minimum": 0.5, "maximum": 22}),
    "enum": _object(e={"enum": ["one", 2, None, True, {"a": 1}, "ünï", 'qu"ote', "tab\t"]}),
    "const": _object(c={"const": "fixed / value"}),
    "const object": {"const": {"x": [1, 2.5, None], "y": "é"}},
    "any of": {"anyOf": [STRING, INTEGER, _object(a=BOOLEAN)]},
    "one of": _object(o={"oneOf": [{"const": "x"}, {"type": "array", "items": INTEGER}]}),
    "all of": _object(a={"allOf": [STRING]}),
    "references": {
        "$defs": {"point": _object(x=NUMBER, y=NUMBER)},
        **_object(a={"$ref": "#/$defs/point"}, b={"$ref": "#/$defs/point"}),
    },
    "array": {"type": "array", "items": {"type": "array", "items": INTEGER}},
    "array bounds": {"type": "array", "items": BOOLEAN, "minItems": 2, "maxItems": 5},
    "array least": {"type": "array", "items": STRING, "minItems": 3},
    "tuple": {"type": "array", "prefixItems": [STRING, INTEGER], "items": False},
    "tuple and more": {"type": "array", "prefixItems": [STRING], "items": INTEGER},
    "additional": _object(a=INTEGER) | {"additionalProperties": INTEGER},
    "no additional": _object(a=INTEGER) | {"additionalProperties": False},
    "map": {"type": "object", "additionalProperties": {"type": "array", "items": STRING}},
    "pattern properties": {"type": "object", "patternProperties": {"^x_[a-z]+$": INTEGER}},
    "property names": {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,3}$"}},
    "least properties": {
        "type": "object",
        "properties": {"a": INTEGER, "b": INTEGER, "c": INTEGER},
        "minProperties": 2,
        "additionalProperties": False,
    },
    "unicode": _object(**{"naïve": STRING, "日本語": {"enum": ["東京", "大阪"]}, "🙂": BOOLEAN}),
    "escapes": _object(**{'a"b': STRING, "c\\d": INTEGER, "e\nf": NULL}),
    "union of objects": {
        "anyOf": [_object(kind={"const": "a"}, v=INTEGER), _object(kind={"const": "b"}, v=STRING)]
    },
    **{f"format {name}": _object(s={"type": "string", "format": name}) for name in FORMATS},
}
UNBOUNDED: dict[str, Any] = {
    "json object": {"type": "object"},
    "anything": {},
    "tree": {
        "$defs": {
            "node": _object(
                ["v"], v=INTEGER, kids={"type": "array", "items": {"$ref": "#/$defs/node"}}
            )
        },
        "$ref": "#/$defs/node",
    },
}
REGEXES = {
    "date": r"\d{4}-\d{2}-\d{2}",
    "address": r"[a-z0-9.]{1,20}@[a-z]{1,10}\.(com|org)",
    "alternatives": r"(yes|no|may ?be)(, (yes|no))*",
    "counted": r"([ab]{2,4}c){3,70}",
    "any": r".*",
    "negated": r"[^a-zé\]\\'\"-]{0,300}!",
    "unicode": r"[äöüÀ-ÿ一-龥]+[🙂-🙏]?",
    "nullable": r"(a?b?)*c",
    "hex": r"0x[0-9a-fA-F]{1,8}",
}
CHOICES = {
    "sentiment": ["positive", "negative", "neutral"],
    "prefixes": ["a", "ab", "abc", "b"],
    "unicode": ["ja", "nein", "später", "日本", 'say "hi"\\'],
}
EBNF = {
    "sql": """root ::= select_statement
select_statement ::= "SELECT " column " from " table " where " condition
column ::= "col_1 " | "col_2 "
table ::= "table_1 " | "table_2 "
condition ::= column "= " number
number ::= "1 " | "2 "
""",
    "nested": 'root ::= "(" root ")" | [a-z]+',
    "arithmetic": """root ::= term ([-+] term)*
term ::= factor ([*/] factor)*
factor ::= [0-9]+ | "(" root ")"
""",
    "repeats": 'root ::= ("ab" | "c" item{2,3}){5,130} "x"\nitem ::= [0-9] | "[" item "]"',
    "right": 'root ::= "a" root | "b"',
    "bytes": r'root ::= [\x00-\x1f]* "end" [^\x20-\x7e]?',
}
LARK = {
    "greeting": 'start: "Hello, " NAME ("!" | "?")\nNAME: /[A-Z][a-z]{1,8}/\n',
    "list": 'start: "[" [item ("," item)*] "]"\nitem: NUMBER | start\nNUMBER: /[0-9]+/\n',
    "left recursion": """start: sum
sum: sum "+" product | sum "-" product | product
product: product "*" NUMBER | NUMBER
NUMBER: /[0-9]+/
""",
    "optional left": 'start: "<" a ">"\na: a "x" a "y" | "z" |\n',
    "capture": 'start: "x=" value\nvalue[capture="v"]: /[a-z]+/\n',
}


def _tags(*formats: dict[str, Any], **more: Any) -> str:
    content = formats[0] if len(formats) == 1 else {"type": "sequence", "elements": formats}
    return json.dumps({"type": "structural_tag", "format": content, **more})


def _tag(begin: str, schema: Any, end: str) -> dict[str, Any]:
    content = {"type": "json_schema", "json_schema": schema}
    return {"type": "tag", "begin": begin, "content": content, "end": end}


_CALLS = [
    _tag('<tool_call>\n{"name": "weather", "arguments": ', WEATHER, "}\n</tool_call>"),
    _tag(
        '<tool_call>\n{"name": "add", "arguments": ',
        _object(a=INTEGER, b=INTEGER),
        "}\n</tool_call>",
    ),
]
TAGS = {
    "auto": _tags({"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": _CALLS}),
    "required": _tags(
        {"type": "tags_with_separator", "tags": _CALLS, "separator": "\n", "at_least_one": True}
    ),
    "named": _tags(
        {
            "type": "tags_with_separator",
            "tags": _CALLS[:1],
            "separator": "",
            "at_least_one": True,
            "stop_after_first": True,
        }
    ),
    "one call": _tags(
        {
            "type": "triggered_tags",
            "triggers": ["<tool_call>"],
            "tags": _CALLS,
            "at_least_one": True,
            "stop_after_first": True,
        }
    ),
    "any arguments": _tags(_tag("<call>f<arguments>", True, "<end>")),
    "any text": _tags({"type": "any_text"}),
    "thinking": _tags(
        {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": "</think>"},
        {"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": _CALLS},
    ),
    "parameters": _tags(
        {
            "type": "tag",
            "begin": "<function=add>",
            "content": {
                "type": "json_schema",
                "json_schema": _object(a=INTEGER, s=STRING),
                "style": "qwen_xml",
            },
            "end": "</function>",
        }
    ),
    "or": _tags(
        {
            "type": "or",
            "elements": [
                {"type": "const_string", "value": "nothing"},
                {"type": "regex", "pattern": "[0-9]{2}"},
                {"type": "grammar", "grammar": 'root ::= "x" | "y" root'},
            ],
        }
    ),
}
OLD_TAGS = {
    "old tags": json.dumps(
        {
            "structures": [
                {"begin": "<function=add>", "schema": json.dumps(WEATHER), "end": "</function>"},
                {"begin": "<function=sub>", "schema": '{"type": "integer"}', "end": "</function>"},
            ],
            "triggers": ["<function="],
        }
    )
}


def _choice(texts: list[str]) -> str:
    """As vLLM's choice_as_grammar."""
    escaped = (text.replace("\\", "\\\\").replace('"', '\\"') for text in texts)
    return "root ::= " + " | ".join(f'"{text}"' for text in escaped)


CASES = [
    *(Case(name, "json", json.dumps(schema)) for name, schema in SCHEMAS.items()),
    *(Case(name, "json", json.dumps(schema)) for name, schema in UNBOUNDED.items()),
    *(
        Case(f"compact {name}", "json_compact", json.dumps({**SCHEMAS, **UNBOUNDED}[name]))
        for name in ("ten fields", "nested", "array bounds", "json object")
    ),
    *(Case(f"regex {name}", "regex", pattern) for name, pattern in REGEXES.items()),
    *(Case(f"choice {name}", "ebnf", _choice(texts)) for name, texts in CHOICES.items()),
    *(Case(f"ebnf {name}", "ebnf", text) for name, text in EBNF.items()),
    *(Case(f"lark {name}", "lark", text) for name, text in LARK.items()),
    *(Case(f"tag {name}", "tag", text) for name, text in TAGS.items()),
    *(Case(name, "old_tag", text) for name, text in OLD_TAGS.items()),
]
