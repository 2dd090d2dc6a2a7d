"""The JSON reader: equal to the standard library on plain JSON, precise about everything else."""

from __future__ import annotations

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_fast.formats import SpecError
from cosmos_fast.jsonc import JsonError, decode, parse, read_bytes

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(value=VALUES, ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_equals_the_standard_library(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    found = parse(text).value
    assert json.dumps(found) == json.dumps(value)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet='{}[]",:/*\\ \nu0d8-1.eEtrufalsn', max_size=30))
def test_never_looser_than_the_standard_library_without_comments(text):
    """Any text ends in a value or a JsonError; what is accepted without `/` or `,` is JSON."""
    try:
        found = parse(text).value
    except JsonError as error:
        assert error.line >= 1 and error.column >= 1
        return
    if "/" not in text and "," not in text:
        assert json.dumps(json.loads(text)) == json.dumps(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1, // x\n "b": 2, /* , } */ }', {"a": 1, "b": 2}),
        ('// first\n/**/["//", "/*", "*/",]// last', ["//", "/*", "*/"]),
        ("[1,[2,],{},]", [1, [2], {}]),
        ('"\\ud83e\\udd16\\u00e9\\n"', "\N{ROBOT FACE}é\n"),
        ("-0.5e+3", -500.0),
        ("/* * / ** */ 3", 3),
        (str(2**80), 2**80),
    ],
)
def test_accepted(text, expected):
    assert parse(text).value == expected


@pytest.mark.parametrize(
    ("text", "line", "column", "reason"),
    [
        ("", 1, 1, "got the end of the text"),
        ('{"a": 1\n "b": 2}', 2, 2, "expected ',' or '}', got '\"'"),
        ('{"a": 1,\n\n   "a": 2}', 3, 4, "keys must be unique, got 'a' again. It is first set in line 1."),
        ('{\n"x": NaN}', 2, 6, "finite, got NaN"),
        ("-Infinity", 1, 1, "finite, got -Infinity"),
        ("[1e999]", 1, 2, "finite, got 1e999"),
        ("9" * 401, 1, 1, "at most 400 characters, got 401"),
        ("[,]", 1, 2, "expected a value, got ','"),
        ("[1,,2]", 1, 4, "expected a value"),
        ("{,}", 1, 2, "expected a key"),
        ("{a: 1}", 1, 2, "key in double quotes"),
        ("{'a': 1}", 1, 2, "key in double quotes"),
        ('{"a" 1}', 1, 6, "expected ':' after key 'a'"),
        ('{"a": True}', 1, 7, "Write true."),
        ("[None]", 1, 2, "Write null."),
        ("[yes]", 1, 2, "Text needs double quotes."),
        ("['x']", 1, 2, "Text needs double quotes."),
        ('"abc', 1, 1, "must end in its own line"),
        ('"a\nb"', 1, 1, "must end in its own line"),
        ('"a\tb"', 1, 3, "control characters must be escaped"),
        ('"C:\\data"', 1, 4, "unknown escape, got \\d"),
        ('"\\ud800"', 1, 2, "surrogates"),
        ('"\\udc00\\ud800"', 1, 2, "surrogates"),
        ('"\\ud800\\u0041"', 1, 2, "surrogates"),
        ('"\\u12g4"', 1, 2, "four hexadecimal"),
        ("[01]", 1, 2, "plain decimal, got 01"),
        ("[1.]", 1, 2, "plain decimal"),
        ("[0x10]", 1, 2, "plain decimal"),
        ("[+1]", 1, 2, "expected a value, got '+'"),
        ("1 2", 1, 3, "nothing after the value"),
        ("{} /* open", 1, 4, "comment: must end with '*/'"),
        ("prompt: hello\nvideo_path: a.mp4", 1, 1, "expected a value, got prompt."),
        ("[" * 65 + "]" * 65, 1, 65, "at most 64 deep"),
        ('{"a":' * 10_000, 1, 64 * 5 + 1, "at most 64 deep"),
    ],
)
def test_refused_with_line_and_column(text, line, column, reason):
    with pytest.raises(JsonError) as caught:
        parse(text)
    error = caught.value
    assert (error.line, error.column) == (line, column) and reason in error.reason
    assert str(error) == f"line {line}, column {column}: {error.reason}"


def test_depth_64_is_fine():
    assert parse("[" * 64 + "]" * 64).value


def test_where_names_keys_items_and_parents():
    document = parse('{\n "a": [1,\n  2], "b": {"c":\n 3}}', first_line=10)
    assert document.where(("a",)) == (11, 2)
    assert document.where(("a", 1)) == (12, 3)
    assert document.where(("b", "c")) == (12, 13)
    assert document.where(("b", "zzz")) == document.where(("b",)) == (12, 7)
    assert document.where(("none",)) == (10, 1)


def test_bytes():
    assert decode(b"\xef\xbb\xbf{}") == "{}"
    with pytest.raises(JsonError, match="line 2, column 3: text: must be UTF-8, got byte 0xff"):
        decode(b"a\nbc\xff")
    with pytest.raises(JsonError, match="UTF-16"):
        decode("{}".encode("utf-16"))


def test_read_bytes_refuses_what_is_not_a_small_file(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    for path, reason in ((tmp_path / "a", "at most 4"), (tmp_path, "a folder"), (tmp_path / "b", "No such")):
        with pytest.raises(SpecError, match=reason):
            read_bytes(path, 4)
    with pytest.raises(SpecError, match="regular file"):
        read_bytes("/dev/zero")


def test_the_largest_file_parses_in_seconds():
    text = "[" + ",\n".join(['{"key": "value", "n": 1.5}'] * 150_000) + "]"
    assert 3.9 * 2**20 < len(text) < 4.2 * 2**20
    start = time.process_time()
    document = parse(text)
    assert len(document.value) == 150_000 and document.where((149_999, "n"))[0] == 150_000
    assert math.isclose(document.value[-1]["n"], 1.5) and time.process_time() - start < 15
