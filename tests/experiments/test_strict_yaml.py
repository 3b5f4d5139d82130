"""YAML for configs: what no config needs is refused, fast and in few words."""

import time

import pytest

from bagua_jax.experiments.spec import config
from bagua_jax.experiments.spec.messages import ConfigError, quote, shorten
from bagua_jax.experiments.spec.strict_yaml import MAX_BYTES, read_yaml

_NINE = ", ".join(["*{}"] * 10)
_MULTIPLIED = "a: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{i}: &a{i} [{_NINE.format(*[f'a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)

# A document, and the words that must be in the message.
BAD = {
    "an int that is none": ("seed: !!int abc", ["line 1", "'abc' is no int"]),
    "a float that is none": ("x: !!float abc", ["'abc' is no float"]),
    "a truth that is none": ("x: !!bool abc", ["'abc' is no bool"]),
    "a date": ("x: 1\ny: 2001-01-01", ["line 2", "the date '2001-01-01'", "quotes"]),
    "a date that is none": ("x: 2001-99-99", ["'2001-99-99'", "quotes"]),
    "a time that is none": ("x: 2001-01-01 25:61:61", ["25:61:61"]),
    "a timestamp tag": ("x: !!timestamp abc", ["'abc'"]),
    "a map that is a list": ("x: !!map [a]", ["mapping"]),
    "a set": ("x: !!set {a, b}", ["set"]),
    "a python object": ("x: !!python/object/apply:os.getpid []", ["python/object"]),
    "a python name": ("x: !!python/name:os.system ''", ["python/name"]),
    "a tag of its own": ("x: !mine 3", ["'!mine'"]),
    "5000 digits": ("x: " + "9" * 5000, ["longer than 4,096"]),
    "deep lists": ("x: " + "[" * 2000, ["nested"]),
    "deep mappings": ("x: " + "{a: " * 100 + "1" + "}" * 100, ["nested"]),
    "no such character": (r'x: "\U00110000"', ["not valid YAML"]),
    "half a character": (r'x: "\ud800"', ["character '\\ud800'"]),
    "NUL by escape": (r'x: "a\0b"', ["character '\\x00'"]),
    "NUL": ("x: a\0b", ["not valid YAML"]),
    "an escape sequence": (r'x: "\e[2J"', ["character '\\x1b'"]),
    "aliases that multiply": (_MULTIPLIED, ["5,000 values"]),
    "merges that multiply": (
        "a0: &a0 {x: 1, y: 2}\n"
        + "".join(
            f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 30)
        ),
        ["5,000 values"],
    ),
    "an alias of itself": ("x: &a [1, *a]", ["*a stands inside of itself"]),
    "a mapping in itself": ("x: &a {y: {z: *a}}", ["*a stands inside of itself"]),
    "an unknown alias": ("x: *nothing", ["nothing"]),
    "a key twice": ("x: 1\ny: 2\nx: 3", ["line 3", "'x' stands twice"]),
    "a key twice, deep": ("x: [{y: 1, y: 2}]", ["'y' stands twice"]),
    "a list as a key": ("? [a, b]\n: 1", ["key is no name"]),
    "two documents": ("x: 1\n---\ny: 2", ["document"]),
    "many values": ("x: [" + "1," * 6000 + "]", ["5,000 values"]),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(6000)), ["5,000 values"]),
    "a long text": ("x: " + "y" * 5000, ["longer than 4,096"]),
    "a long document": ("# " + "y" * MAX_BYTES, ["longer than 65,536"]),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_config_needs_is_refused(name):
    text, words = BAD[name]
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "c.yaml")
    took = time.process_time() - began
    message = str(caught.value)
    assert message.startswith("c.yaml: ")
    assert len(message.encode()) < 2000
    for word in words:
        assert word in message
    # Not how fast: that it does not grow as the aliases do, to minutes.
    assert took < 30


def test_what_configs_need_is_read():
    text = """
    base: &base {rate: 1e-3, ok: true, none: null}
    own: {<<: *base, rate: .5}
    list: [*base, 'a: b', "é\\n", 0x10, -7]
    date: '2001-01-01'
    tagged: !!str 5
    """
    base = {"rate": 1e-3, "ok": True, "none": None}
    assert read_yaml(text) == {
        "base": base,
        "own": base | {"rate": 0.5},
        "list": [base, "a: b", "é\n", 16, -7],
        "date": "2001-01-01",
        "tagged": "5",
    }
    assert read_yaml("\ufeffx: 1") == {"x": 1}


@pytest.mark.parametrize("name", config.shipped())
def test_shipped_configs_are_far_from_the_bounds(name):
    text = config.shipped()[name].read_text()
    assert len(text) < MAX_BYTES / 10
    assert isinstance(read_yaml(text), dict)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1", "utf-16-le"])
def test_other_encodings_are_named(tmp_path, encoding):
    path = tmp_path / "c.yaml"
    path.write_bytes("experiment: é\n".encode(encoding))
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        config.load(path)


@pytest.mark.parametrize("source", ["/dev/zero", "x" * 5000, "a\0b", "", "/dev/null"])
def test_sources_that_are_no_files(source):
    with pytest.raises(ConfigError) as caught:
        config.load(source)
    assert len(str(caught.value).encode()) < 8000
    assert "\0" not in str(caught.value)


# --- messages ---


def test_long_values_are_shortened():
    million = ["x" * 10**5] * 10**4
    for value in (million, "x" * 10**6, 10**4000, {i: million for i in range(999)}):
        assert len(quote(value)) <= 200
    assert quote({"a": [1, "b"]}) == "{'a': [1, 'b']}"


def test_a_long_message_keeps_its_field_and_its_cure():
    text = shorten("field: got " + "é" * 10**6 + ". Use that.")
    assert text.startswith("field: got é") and text.endswith("é. Use that.")
    assert "bytes left out" in text and len(text.encode()) < 2000
    assert shorten("field: got 3.") == "field: got 3."
