"""Which method, with which budget, quantizes which layer: the `method` section and the layer rules together."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from quantlab.api import CodebookSpec, LayerQuantizer
from quantlab.recipe.load import LoadedRecipe
from quantlab.recipe.method import configure_method
from quantlab.recipe.problems import Problem, recipe_error
from quantlab.recipe.schema import LayerRule, MethodSection


@dataclass(frozen=True, kw_only=True)
class LayerMethod:
    """How one layer is quantized.

    Attributes:
        quantizer: the configured method.
        spec: the storage budget.
    """

    quantizer: LayerQuantizer
    spec: CodebookSpec


@dataclass(frozen=True, kw_only=True)
class MethodAssignment:
    """The methods of a recipe.

    Attributes:
        loaded: the recipe.
        default: for layers that no rule matches.
        by_rule: for the layers of each rule, in the order of the recipe; None keeps them in floating point.
    """

    loaded: LoadedRecipe
    default: LayerMethod
    by_rule: tuple[LayerMethod | None, ...]

    @property
    def methods(self) -> list[LayerMethod]:
        """Every method that is in use."""
        return [self.default, *(method for method in self.by_rule if method is not None)]

    def of(self, layer: str) -> LayerMethod | None:
        """How a layer is quantized, by its full name; None keeps it in floating point."""
        rule = self._last_match(layer)
        return self.default if rule is None else self.by_rule[rule]

    def require_use(self, layers: Iterable[str]) -> None:
        """Check that every rule applies to a layer of the model.

        Raises:
            RecipeError: naming the rules that do not.
        """
        names = list(layers)
        applied = {self._last_match(name) for name in names}
        problems = []
        for index, rule in enumerate(self.loaded.recipe.layers):
            if index in applied:
                continue
            if any(fnmatchcase(name, rule.match) for name in names):
                reason = "is overruled everywhere by later rules, of which the last match applies; remove or move it"
            else:
                reason = f"matches no layer; the layers have names such as {names[0]}"
            origin = self.loaded.origins[f"layers[{index}].match"]
            problems.append(Problem(origin, f"layers[{index}].match {rule.match!r} {reason}"))
        if problems:
            raise recipe_error(self.loaded.path, problems)

    def _last_match(self, layer: str) -> int | None:
        rules = self.loaded.recipe.layers
        return max((index for index, rule in enumerate(rules) if fnmatchcase(layer, rule.match)), default=None)


def assign_methods(loaded: LoadedRecipe) -> MethodAssignment:
    """Import the recipe's method and configure it for every rule.

    Raises:
        RecipeError: the method cannot be loaded, or does not accept what the recipe asks; or a rule contradicts
            itself.
    """
    method = loaded.recipe.method
    problems = [
        Problem(loaded.origins[f"layers[{index}].match"], f"layers[{index}] {contradiction}")
        for index, rule in enumerate(loaded.recipe.layers)
        if (contradiction := _contradiction(rule)) is not None
    ]
    if problems:
        raise recipe_error(loaded.path, problems)
    return MethodAssignment(
        loaded=loaded,
        default=_layer_method(loaded, method, "method"),
        by_rule=tuple(
            None if rule.skip else _layer_method(loaded, _changed(method, rule), f"layers[{index}]")
            for index, rule in enumerate(loaded.recipe.layers)
        ),
    )


def _contradiction(rule: LayerRule) -> str | None:
    changes = rule.bits is not None or rule.group_size is not None or bool(rule.options)
    if rule.skip and changes:
        return "keeps its layers in floating point (skip: true), so its other keys mean nothing; remove them"
    if not rule.skip and not changes:
        return "changes nothing; give it bits, group_size, an option of the method, or skip: true"
    return None


def _changed(method: MethodSection, rule: LayerRule) -> MethodSection:
    return dataclasses.replace(
        method,
        bits=rule.bits or method.bits,
        group_size=rule.group_size or method.group_size,
        options={**method.options, **rule.options},
    )


def _layer_method(loaded: LoadedRecipe, method: MethodSection, path: str) -> LayerMethod:
    return LayerMethod(
        quantizer=configure_method(loaded, method, path),
        spec=CodebookSpec(bits=method.bits, group_size=method.group_size),
    )
