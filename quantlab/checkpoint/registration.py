"""Makes `import quantlab` teach transformers the format, without importing transformers.

transformers offers registries, but no entry point through which it would find them filled. So the module that holds
them is registered with at once if it is imported already, and otherwise as soon as it is: a finder in front of the
others recognises the import by its name, lets the other finders do it, and registers behind it. The finder then
takes itself off `sys.meta_path`.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Final

_REGISTRIES: Final = "transformers.quantizers.auto"


def register_when_imported() -> None:
    """Register the format with transformers, now or when transformers is imported; a second call changes nothing."""
    if _REGISTRIES in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from quantlab.checkpoint.huggingface import register

    register()


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRIES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module keeps the loader that it would have had.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()
