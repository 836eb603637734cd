"""One anomalib module class for each recipe, with the recipe's fields as init arguments that command lines can read."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any, get_type_hints

from ganomaly_plugin.hparams import default_hparams
from ganomaly_plugin.recipe import Recipe
from ganomaly_plugin.training.lightning import HIDDEN, RecipeModule


def _signature(recipe_class: type[Recipe]) -> inspect.Signature:
    """The base module's own parameters and, after them, the recipe's fields with their types and defaults."""
    base = inspect.signature(RecipeModule.__init__)
    hints = get_type_hints(RecipeModule.__init__) | get_type_hints(recipe_class)
    own = [p.replace(annotation=hints.get(p.name, p.annotation)) for p in base.parameters.values() if p.kind != p.VAR_KEYWORD]
    keyword = inspect.Parameter.KEYWORD_ONLY
    fields = [
        inspect.Parameter(name, keyword, default=default, annotation=hints[name])
        for name, default in default_hparams(recipe_class).items()
        if name not in HIDDEN
    ]
    self_, size, channels, seed, *components = own
    return inspect.Signature(
        [self_, *(p.replace(kind=keyword) for p in (size, channels, seed)), *fields]
        + [p.replace(kind=keyword) for p in components]
    )


@functools.cache
def module_class(recipe_class: type[Recipe], module: str = "", name: str = "") -> type[RecipeModule]:
    """The anomalib module class of a recipe.

    Args:
        recipe_class: The recipe; its fields become init arguments.
        module: Where the class can be imported from; the recipe's own module by default.
        name: Under which name there; the recipe's without "Recipe" by default.
    """
    name = name or recipe_class.__name__.removesuffix("Recipe")
    signature = _signature(recipe_class)

    def __init__(self: RecipeModule, **kwargs: Any) -> None:
        RecipeModule.__init__(self, **kwargs)

    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__module__, __init__.__qualname__ = module or recipe_class.__module__, f"{name}.__init__"
    summary, _, arguments = inspect.cleandoc(recipe_class.__doc__ or name).partition("Args:\n")
    common = inspect.cleandoc(RecipeModule.__doc__ or "").partition("Args:\n")[2].partition("    **hparams")[0]
    namespace = {
        "__init__": __init__,
        "__module__": module or recipe_class.__module__,
        "__qualname__": name,
        "__doc__": f"{summary.rstrip()}\n\nArgs:\n{common}{arguments}",
        "recipe_class": recipe_class,
    }
    return types.new_class(name, (RecipeModule,), exec_body=lambda body: body.update(namespace))
