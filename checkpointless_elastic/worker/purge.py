"""Which modules are the script's own, and what becomes of them before it is run again.

The script's own are imported anew, so that their globals are fresh; installed libraries stay, since loading them takes
time. Extension modules stay too: C code cannot be loaded twice.
"""

from __future__ import annotations

import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES
from types import ModuleType

__all__ = ["Modules"]

_PLACES = ("site-packages", "dist-packages")
_STANDARD = tuple({sysconfig.get_path(name) + "/" for name in ("stdlib", "platstdlib")})
_MAINS = ("__main__", "__mp_main__")


class Modules:
    """Made before the first run: what is loaded then stays, with the packages that it belongs to."""

    def __init__(self) -> None:
        self._packages = {name.partition(".")[0] for name in sys.modules} - {*_MAINS}

    def stays(self, name: str) -> bool:
        """Is the module of this name a library's? Also while it is being imported."""
        module = sys.modules.get(name)
        return name.partition(".")[0] in self._packages or module is None or not self._own(name, module)

    def own(self) -> list[str]:
        """Names of the script's modules that are loaded."""
        return [name for name, module in sys.modules.copy().items() if self._own(name, module)]

    def purge(self) -> list[ModuleType]:
        """Unload the script's modules; these are they. Their objects go when nothing else holds them."""
        return [sys.modules.pop(name) for name in self.own()]

    def _own(self, name: str, module: ModuleType | None) -> bool:
        package = name.partition(".")[0]
        if module is None or package in self._packages:
            return False
        place = place_of(module)
        if not place:
            return package in _MAINS or (name != package and self._own(package, sys.modules.get(package)))
        return not is_library(place)


def place_of(module: ModuleType) -> str:
    """File of a module, or folder of a package without one; empty if there is none."""
    names = getattr(module, "__dict__", {})  # some make attributes up when they are asked for
    file = names.get("__file__")
    return file if isinstance(file, str) else next(iter(names.get("__path__", ())), "")


def is_library(path: str) -> bool:
    """Is this file installed, or part of Python, or an extension module?"""
    standard = path.startswith(_STANDARD) or path.startswith("<frozen")
    installed = any(f"/{place}/" in path or path.endswith(f"/{place}") for place in _PLACES)
    return standard or installed or path.endswith(tuple(EXTENSION_SUFFIXES))
