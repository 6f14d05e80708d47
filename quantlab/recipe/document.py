"""YAML text to plain values that remember where they were written, by stricter rules than YAML 1.1.

Only what a recipe needs: mappings, lists and scalars. Anchors, aliases and tags are refused (they make a file
that is short to write large to read), as are duplicate keys. Plain scalars follow YAML 1.2: `yes`, `no`, `on`,
`off`, `1:30`, `0x10` and `010` are text, and `1e-3` is a number.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import yaml

from quantlab.recipe.problems import Problem

MAX_DEPTH = 16

Scalar = str | int | float | bool | None

_CONSTANTS: dict[str, Scalar] = {"": None, "~": None, "null": None, "true": True, "false": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?([0-9]{1,18}\.[0-9]*|\.[0-9]+|[0-9]{1,18})([eE][-+]?[0-9]{1,2})?")


@dataclass(frozen=True)
class Node:
    """A value and the place where it was written, such as "ganq_w4.yaml:7" or "--set"."""

    value: "Scalar | dict[str, Node] | list[Node]"
    origin: str


class DocumentError(Exception):
    """The text is not a document; `problems` says why, completely as far as YAML itself can be read."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(problems)
        self.problems = problems


def resolve_scalar(text: str) -> Scalar:
    """The value of an unquoted scalar by the rules above."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    # A leading zero marks octal numbers in YAML 1.1 and nothing in 1.2: too ambiguous to be a number here.
    if _FLOAT.fullmatch(text) and not re.match(r"[-+]?0[0-9]", text):
        return float(text)
    return text


def read_document(text: str, origin: Callable[[int], str]) -> Node:
    """Read one YAML document.

    Args:
        text: the document.
        origin: names the place of a line, counted from 1.

    Returns:
        The root; its values are dicts, lists and scalars of nodes, each with the origin of its key.

    Raises:
        DocumentError: not YAML, or YAML with features that recipes do not have.
    """
    try:
        problems = list(_forbidden_features(text, origin))
        root = None if problems else yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = origin(mark.line + 1 if mark else 1)
        raise DocumentError([Problem(where, f"not valid YAML: {error.problem or error.context}")]) from error
    except yaml.YAMLError as error:  # characters that YAML does not allow
        raise DocumentError([Problem(origin(1), f"not valid YAML: {error}")]) from error
    node = Node(None, origin(1)) if root is None else _convert(root, origin(1), origin, problems)
    if problems:
        raise DocumentError(problems)
    return node


def _forbidden_features(text: str, origin: Callable[[int], str]) -> Iterator[Problem]:
    """Walks the flat stream of events, so that no nesting and no alias is ever expanded."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = _place(event, origin)
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent):
            yield Problem(where, f"the alias *{anchor} is not allowed in recipes; write the value out")
        elif anchor is not None:
            yield Problem(where, f"the anchor &{anchor} is not allowed in recipes; remove it")
        if tag is not None:
            yield Problem(where, f"the tag {tag} is not allowed in recipes; remove it")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            yield Problem(where, f"nested deeper than {MAX_DEPTH} levels; a recipe needs two")
            return


def _place(element: yaml.Event | yaml.Node, origin: Callable[[int], str]) -> str:
    mark = element.start_mark
    return origin(mark.line + 1 if mark else 1)


def _convert(node: yaml.Node, where: str, origin: Callable[[int], str], problems: list[Problem]) -> Node:
    if isinstance(node, yaml.MappingNode):
        return Node(_convert_mapping(node, origin, problems), where)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(item, _place(item, origin), origin, problems) for item in node.value]
        return Node(items, where)
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
    return Node(resolve_scalar(node.value) if is_plain else node.value, where)


def _convert_mapping(node: yaml.MappingNode, origin: Callable[[int], str], problems: list[Problem]) -> dict[str, Node]:
    children: dict[str, Node] = {}
    for key, value in node.value:
        where = _place(key, origin)
        if not isinstance(key, yaml.ScalarNode):
            problems.append(Problem(where, "a key must be a word, not a list or a mapping"))
        elif key.value in children:
            first = children[key.value].origin
            problems.append(Problem(where, f"the key {key.value} appears twice, first at {first}; remove one"))
        else:
            children[key.value] = _convert(value, where, origin, problems)
    return children
