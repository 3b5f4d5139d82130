"""YAML for configs: numbers, texts, lists and mappings, of bounded size; nothing else.

A document is refused, quickly, whose aliases multiply, whose nesting is deep, or that
holds what no config needs: dates, tags of other types, a repeated key, two documents.
"""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from bagua_jax.experiments.spec.messages import UNWRITABLE, ConfigError, quote

__all__ = ["MAX_BYTES", "read_yaml"]

MAX_BYTES = 65_536
"""Of a document; the longest config that is shipped has 2,000."""
_MAX_VALUES = 5_000  # an alias counts as everything that it stands for
_MAX_TEXT = 4_096
_MAX_DEPTH = 20

_KNOWN = {"str", "int", "float", "bool", "null", "seq", "map"}
_PREFIX = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Bounds a document while its tree is made, before any value is."""

    def __init__(self, text: str):
        super().__init__(text)
        self._depth = 0
        self._values = 0  # so far, aliases written out
        self._sizes: dict[str, int] = {}  # of what an anchor names, once it is complete

    def compose_node(self, parent, index):
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                self._refuse(f"the alias *{event.anchor} stands inside of itself")
            self._count(self._sizes.get(event.anchor, 1))
            return super().compose_node(parent, index)
        before = self._values
        self._count(1)
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._refuse(f"values are nested more than {_MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._values - before
        return node

    def _count(self, more: int) -> None:
        self._values += more
        if self._values > _MAX_VALUES:
            self._refuse(f"more than {_MAX_VALUES:,} values, with aliases written out")

    def _refuse(self, problem: str) -> None:
        raise ComposerError(None, None, problem, self.peek_event().start_mark)

    def construct_object(self, node, deep=False):
        kind = node.tag.removeprefix(_PREFIX)
        if kind == "timestamp":
            raise _error(node, f"the date {quote(node.value)} must stand in quotes")
        if kind not in _KNOWN or kind == node.tag:
            raise _error(node, f"the tag {quote(node.tag)} is none of a config's")
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        if len(node.value) > _MAX_TEXT:
            problem = f"is longer than {_MAX_TEXT:,} characters"
            raise _error(node, f"{quote(node.value)} {problem}")
        if found := UNWRITABLE.search(node.value):
            raise _error(node, f"{quote(node.value)} holds the character {found[0]!a}")
        try:
            return super().construct_object(node)
        except yaml.YAMLError:
            raise
        except Exception:  # of int(), float(), a table of truths
            raise _error(node, f"{quote(node.value)} is no {kind}") from None

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise _error(key, "a key is no name")
            name = (
                key.value if key.tag.endswith(":merge") else self.construct_object(key)
            )
            if name in seen:
                raise _error(key, f"the key {quote(name)} stands twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _error(node: yaml.Node, problem: str) -> ConstructorError:
    return ConstructorError(None, None, problem, node.start_mark)


_Loader.add_implicit_resolver(
    _PREFIX + "float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(text: str, source: str = "config") -> Any:
    """Read YAML in which 1e-3 is a number and a repeated key an error.

    Args:
        text: one document.
        source: where it comes from, for errors.

    Raises:
        ConfigError: if the text is not YAML, or none that a config needs: it is longer
            than ``MAX_BYTES``, has more than 5,000 values with its aliases written out,
            is nested more than 20 deep, or holds a date, a tag, an alias of itself, a
            control character, or a second document.
    """
    if len(text) > MAX_BYTES:
        raise ConfigError(
            f"{source}: is longer than {MAX_BYTES:,} characters; a config is short."
        )
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" in line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}: not valid YAML{at}: {error.problem}.") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML lets an escape such as "\U00110000" end in chr()'s own ValueError.
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source}: not valid YAML: {reason}.") from None
