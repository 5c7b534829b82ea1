"""Two X-ray views in, a CT volume out: `load`, `read_ct`, `read_films`, `render`, `reconstruct`, `uncertainty`, `view`, `show`, `save`, `score`, `phantom`, `card`."""

import sys
from types import ModuleType

__version__ = "0.4.0"

VERBS = (
    "CT card load phantom read_ct read_films reconstruct render save score show uncertainty view".split()
)  # of chapter 05b, loaded when one is first used


class Package(ModuleType):
    "A chapter of a verb's name, such as `diffx2ct.phantom`, does not take the verb's place."

    def __setattr__(self, name, value):
        if not (name in VERBS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = Package


def __getattr__(name: str):
    if name in VERBS:
        from . import verbs

        return getattr(verbs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *VERBS])
