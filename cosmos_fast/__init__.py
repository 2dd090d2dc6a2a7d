"""cosmos-fast: a performance-first inference engine for Cosmos-Transfer2.5-2B.

`from cosmos_fast import Engine, Spec` loads what it names on first use; importing the package alone
loads neither torch nor any media library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {"Engine": "engine", "Result": "engine", "Spec": "spec", "Recipe": "recipe", "Plan": "recipe"}
__all__ = ["Engine", "Plan", "Recipe", "Result", "Spec", "__version__"]

if TYPE_CHECKING:
    from .engine import Engine, Result
    from .recipe import Plan, Recipe
    from .spec import Spec


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cosmos_fast' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
