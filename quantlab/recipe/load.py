"""Finding a recipe, reading it, and laying command-line overrides over it."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import quantlab
from quantlab.errors import RecipeError, did_you_mean
from quantlab.recipe.build import RecipeBuilder
from quantlab.recipe.document import DocumentError, Node, read_document
from quantlab.recipe.dump import dump_recipe
from quantlab.recipe.problems import Problem, recipe_error
from quantlab.recipe.schema import Recipe

MAX_BYTES = 1_000_000

_ASSIGNMENT = re.compile(r"\s*([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*)\s*=(.*)", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class LoadedRecipe:
    """A recipe and where it came from.

    Attributes:
        recipe: the recipe, overrides applied.
        origins: where each value came from, by its path such as "method.bits": "ganq_w4.yaml:7", "default",
            "--set" or "--model".
        text: the file as written.
        path: the file.
    """

    recipe: Recipe
    origins: Mapping[str, str]
    text: str
    path: Path


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, model: str | None = None) -> LoadedRecipe:
    """Read a recipe.

    Args:
        source: a file, or the name of a built-in recipe such as "ganq_w4" or "paper/ganq_w4_opt".
        overrides: assignments such as "method.bits=3", applied in order; the value is read as YAML.
        model: replaces model.path.

    Raises:
        RecipeError: the file does not exist or is not a recipe; all problems of its text and of the overrides
            are in one message.
    """
    path = _find(source)
    return _build(path, _read(path), lambda line: f"{path.name}:{line}", overrides, model)


def lay_over(recipe: Recipe, overrides: Sequence[str], name: str) -> LoadedRecipe:
    """Lay overrides over a recipe that a program has made.

    Args:
        recipe: what the program has made.
        overrides: as for `load_recipe`.
        name: stands for the file, which does not exist; the text is that of the recipe with the overrides in it.

    Raises:
        RecipeError: as for `load_recipe`.
    """
    loaded = _build(Path(name), dump_recipe(recipe), lambda line: name, overrides, None)
    return replace(loaded, text=dump_recipe(loaded.recipe))


def _build(
    path: Path, text: str, origin: Callable[[int], str], overrides: Sequence[str], model: str | None
) -> LoadedRecipe:
    try:
        root = read_document(text, origin)
    except DocumentError as error:
        raise recipe_error(path, error.problems) from error
    problems = _apply(root, overrides)
    if model is not None:
        problems += _set(root, ["model", "path"], Node(model, "--model"))
    builder = RecipeBuilder()
    recipe = builder.build(root)
    problems += builder.problems
    if recipe is None or problems:
        raise recipe_error(path, problems)
    return LoadedRecipe(recipe=recipe, origins=builder.origins, text=text, path=path)


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with quantlab, by name: "ganq_w4", or "paper/ganq_w4_opt" for one in a folder.

    Their files state the code width in their names, which tells them from other YAML files.
    """
    package = Path(quantlab.__file__).parent
    in_source_tree = (package.parent / "pyproject.toml").is_file()
    folder = package.parent / "recipes" if in_source_tree else package / "_recipes"
    paths = sorted(folder.rglob("*_w[2-8]*.yaml"), key=lambda path: (len(path.parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in paths}


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    builtin = builtin_recipes()
    if (named := str(source).removesuffix(".yaml")) in builtin:
        return builtin[named]
    if path.is_dir():
        raise RecipeError(f"{source} is a folder, not a recipe; name a .yaml file inside it")
    name = path.name.removesuffix(".yaml")
    if name in builtin:
        raise RecipeError(f"no file {source}; for the built-in recipe of that name, write just {name}")
    hint = did_you_mean(name, builtin)
    raise RecipeError(f"no file and no built-in recipe {source}{hint} (`quantlab ls recipes` lists the built-in ones)")


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path} is larger than {MAX_BYTES:,} bytes; that is not a recipe")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _apply(root: Node, overrides: Sequence[str]) -> list[Problem]:
    problems = []
    for override in overrides:
        match = _ASSIGNMENT.fullmatch(override)
        if match is None or not match[2].strip():
            example = "for example --set method.bits=3, or --set method.group_size=null to clear a value"
            problems.append(Problem("--set", f"{override!r} is not of the form section.key=value; {example}"))
            continue
        try:
            value = read_document(match[2].strip(), lambda line: "--set")
        except DocumentError as error:
            problems += [Problem("--set", f"{override!r}: {problem.message}") for problem in error.problems]
            continue
        problems += _set(root, match[1].replace("-", "_").split("."), value)
    return problems


def _set(root: Node, keys: list[str], value: Node) -> list[Problem]:
    """Put a value into the document; returns what is wrong with the place."""
    node = root
    for index, key in enumerate(keys[:-1]):
        if not isinstance(node.value, dict):
            return [Problem(value.origin, f"{'.'.join(keys)}: {'.'.join(keys[:index])} is not a section")]
        node = node.value.setdefault(key, Node({}, value.origin))
    if not isinstance(node.value, dict):
        return [Problem(value.origin, f"{'.'.join(keys)}: {'.'.join(keys[:-1])} is not a section")]
    node.value[keys[-1]] = value
    return []
