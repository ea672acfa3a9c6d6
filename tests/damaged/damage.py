"""Damage for files, as strategies of Hypothesis, and what must come of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

from blockpruner.engine.errors import SearchFailed, UserError

WRONG = [
    "null", "true", "false", "-1", "0", "1.5", "3", "1e308", "1e999", "-1e999", "NaN", "Infinity", "1" * 400,
    "1" * 5000, '""', '"x"', '"mha.1"', '"\\ud800"', '"a\\nb"', "[]", "{}", "[[]]", '["mha", 1]', '["mha", -1]',
    '["mha", 1e3]', '["ffn", 1]', '[["mha", 1], ["mha", 1]]', '{"x": 1}', "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
]  # fmt: skip
"""Values of the wrong type or size, as JSON text."""
RAW = [b"", b"{", b"\xff\xfe", b"\xef\xbb\xbf{}", b"\x00" * 64, b"[1, 2]", b"3", b"null", b'"x"', b"{}", b"[]"]
"""Whole files."""
MARK = "the place of the damage"


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container and key of a value parsed from JSON."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


@st.composite
def damaged_json(draw: st.DrawFn, text: str) -> bytes:
    """Return JSON text with one or two changes: a value replaced, dropped or doubled, a key that stands twice, a cut,
    or bytes that are no text."""
    kind = draw(st.sampled_from(["value", "value", "value", "drop", "twice", "cut", "byte", "raw"]))
    if kind == "raw":
        return draw(st.sampled_from(RAW))
    if kind == "cut":
        return text.encode()[: draw(st.integers(0, len(text)))]
    if kind == "byte":
        content = bytearray(text.encode())
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        return bytes(content)
    for _ in range(draw(st.integers(1, 2))):
        value = json.loads(text)
        found = list(places(value))
        if not found:
            break
        container, key = found[draw(st.integers(0, len(found) - 1))]
        if kind == "drop":
            del container[key]
        elif kind == "twice" and isinstance(container, list):
            container.insert(key, container[key])
        elif kind == "twice":
            new = json.dumps(key) + ": " + draw(st.sampled_from(WRONG)) + ", " + json.dumps(key)
            container[MARK] = container.pop(key)
            return json.dumps(value).replace(json.dumps(MARK), new, 1).encode()
        else:
            container[key] = MARK
            return json.dumps(value).replace(json.dumps(MARK), draw(st.sampled_from(WRONG)), 1).encode()
        text = json.dumps(value)
    return text.encode()


def outcome(action: Callable[[], Any]) -> Any:
    """Return the result, or None if the input was refused in one line. Anything else is a bug and is raised."""
    try:
        return action()
    except (UserError, SearchFailed) as error:
        text = str(error)
    assert text.strip()
    assert "\n" not in text
    assert len(text) < 2000
    return None
