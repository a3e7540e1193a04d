"""Mixers that other distributions bring: who claims which name, and where its files lie. Imports none of their code.

A distribution names its mixers as entry points of the group `mixerbench.mixers`: a mixer's name = its module. The
mixer's yaml is `configs/mixer/<name>.yaml` in the folder of the module. What is wrong with a claim is said when its
name is used and not before, so that one broken distribution does not stop the others.
"""

import importlib.util
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import machinery, metadata
from pathlib import Path

from bench import Refusal

GROUP = "mixerbench.mixers"
SUFFIXES = (".py", *machinery.EXTENSION_SUFFIXES)


@dataclass(frozen=True)
class Claim:
    """An installed distribution's word that it brings the mixer `name`."""

    name: str
    distribution: str
    version: str
    module: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.module})"

    def broken(self, why: str) -> Refusal:
        return Refusal(f"mixer '{self.name}' of {self}: {why}")


@lru_cache(maxsize=1)
def claims() -> dict[str, tuple[Claim, ...]]:
    """Name -> all who claim it, from the metadata of what is installed; read once, as modules are loaded once."""
    found: dict[str, tuple[Claim, ...]] = {}
    for point in metadata.entry_points(group=GROUP):
        claim = Claim(point.name, str(point.dist.name), str(point.dist.version), point.value)
        found[point.name] = (*found.get(point.name, ()), claim)
    return found


def claim_of(name: str, shipped: bool) -> Claim | None:
    """Who brings a mixer, None for a shipped one and for a name that nobody claims.

    Raises Refusal if the name is claimed twice (`shipped` counts as a claim), if no mixer could have it, or if its
    module is not there.
    """
    found = claims().get(name, ())
    every = ["the shipped mixers (configs/mixer)"] * shipped + sorted(map(str, found))
    if len(every) > 1:
        raise Refusal(f"mixer '{name}' is claimed by {' and '.join(every)}; rename or uninstall all but one")
    if not found:
        return None
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise found[0].broken("a mixer's name is made of a-z, 0-9 and _, and starts with a letter")
    if not re.fullmatch(r"\w+(\.\w+)*", found[0].module):
        raise found[0].broken(f"the entry point must be '{name} = package.module', without a class")
    if module_file(found[0].module) is None:
        raise found[0].broken("there is no such module in an installed package")
    return found[0]


def configs_of(claim: Claim) -> Path:
    """The folder of configurations beside the module of a claim from `claim_of`, with the mixer's yaml in it."""
    folder = module_file(claim.module).parent / "configs"
    if not (folder / "mixer" / f"{claim.name}.yaml").is_file():
        raise claim.broken(f"its yaml is missing: {folder / 'mixer' / claim.name}.yaml")
    return folder


def module_file(module: str) -> Path | None:
    """The file of a module inside a package, without importing anything; None if there is none."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # ValueError: a module in memory that came from nowhere
        return None
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        base = Path(folder, *rest)
        files = [base / f"__init__{s}" for s in SUFFIXES] + [base.with_name(base.name + s) for s in SUFFIXES if rest]
        if found := next((file for file in files if file.is_file()), None):
            return found
    return None
