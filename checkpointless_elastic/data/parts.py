"""What a loader is made of, and what in it lasts from one pass to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch.utils.data import DataLoader, Sampler

from checkpointless_elastic.data import skipping

__all__ = ["counters_of", "generators_of", "is_accelerates", "is_stateful", "keeps_workers", "parts_of"]

_SAMPLERS = "sampler", "batch_sampler"  # attributes; what stands there need not be a Sampler
_LIGHTNING = ("_num_iter_calls",)
_COUNTERS = {
    "accelerate": ("iteration", "epoch"),
    "lightning": _LIGHTNING,
    "lightning_fabric": _LIGHTNING,
}
"""Where frameworks count the passes of a loader, by package (read in accelerate 1.15 and lightning 2.6). What other
loaders and samplers count is left alone: whether it is of passes, and whether the script sets it, cannot be seen."""


def parts_of(loader: object) -> dict[str, object]:
    """The loader, the loaders and samplers in it, and so on, by place, each once, in a fixed order."""
    found: dict[str, object] = {"": loader}
    waiting = [("", loader)]
    while waiting:
        place, part = waiting.pop(0)
        named = {name: _attribute(part, name) for name in _SAMPLERS}
        for name, inner in {**_attributes(part), **named}.items():
            wanted = issubclass(type(inner), (DataLoader, Sampler)) or name in _SAMPLERS and inner is not None
            if wanted and not any(inner is one for one in found.values()):
                found[f"{place}.{name}"] = inner
                waiting.append((f"{place}.{name}", inner))
    return found


def generators_of(parts: Iterable[object]) -> list[torch.Generator]:
    """The distinct generators that they draw from."""
    found: list[torch.Generator] = []
    for part in parts:
        generator = _attribute(part, "generator")
        if isinstance(generator, torch.Generator) and not any(generator is one for one in found):
            found.append(generator)
    return found


def counters_of(parts: Mapping[str, object]) -> dict[str, int]:
    """What they count of their passes, by place and name."""
    found = {}
    for place, part in parts.items():
        held = _attributes(part)
        for base in type(part).__mro__:
            for name in _COUNTERS.get(base.__module__.partition(".")[0], ()):
                if isinstance(held.get(name), int):
                    found[f"{place}.{name}"] = held[name]
    return found


def keeps_workers(part: object) -> TypeGuard[DataLoader[Any]]:
    """Whether it is a DataLoader with persistent workers, which begin and end as `skipping` has it."""
    if not issubclass(type(part), DataLoader) or is_stateful(part):
        return False
    held = _attributes(part)
    return bool(held.get("persistent_workers")) and "dataset" in held and skipping.has_indices(part)  # type: ignore[arg-type]


def is_accelerates(loader: object) -> bool:
    """Whether it is a loader of Accelerate, which does not go on exactly from its state (1.15), or has none."""
    return any(base.__module__.startswith("accelerate.") for base in type(loader).__mro__)


def is_stateful(one: object) -> bool:
    """Whether it can say and take back its state."""
    return callable(getattr(one, "state_dict", None)) and callable(getattr(one, "load_state_dict", None))


def _attributes(part: object) -> dict[str, Any]:
    held = _attribute(part, "__dict__")
    return held if isinstance(held, dict) else {}


def _attribute(part: object, name: str) -> Any:
    """None where asking for it fails: it is not a sampler's business to have it."""
    try:
        return getattr(part, name, None)
    except Exception:
        return None
