"""The packages beside btx_jax, against the versions that it was tested with: the ranges of its own
metadata, which are those of pyproject.toml. A checkout that was never installed has no metadata;
then nothing is compared."""

from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

from packaging.requirements import Requirement

from btx_jax import terminal
from btx_jax.errors import UserError

BREAKS_BELOW_ITS_RANGE = "jax"  # tests are known to fail; of others nothing older was tried


class _Unmet(NamedTuple):
    """A requirement that is not met. installed: the version that is installed, "" for none."""

    requirement: Requirement
    installed: str

    @property
    def asked(self) -> str:
        return f"{self.requirement.name}{self.requirement.specifier}"


def require(extra: str, what: str) -> None:
    """Raises UserError, with the command that fixes it, when a package of the extra is missing or
    has a version outside its range. what: the key or the command that needs it."""
    if unmet := list(_unmet(extra)):
        listed = ", ".join(f"{u.asked} ({u.installed or 'none'} is installed)" for u in unmet)
        raise UserError(f"{what} needs {listed}: pip install 'btx_jax[{extra}]'")


def check() -> None:
    """At the start of a command, warn about versions outside the ranges, in one line each, on
    stderr. Raises UserError for those that are known to fail."""
    for unmet in _unmet():
        if not unmet.installed:
            continue  # the import that needs it tells
        told = (
            f"{unmet.requirement.name} {unmet.installed} is installed; btx_jax was tested with"
            f" {unmet.requirement.specifier}: pip install '{unmet.asked}'"
        )
        if unmet.requirement.name == BREAKS_BELOW_ITS_RANGE and _is_older(unmet):
            raise UserError(told)
        terminal.warn(told)


def _is_older(unmet: _Unmet) -> bool:
    return not all(
        bound.contains(unmet.installed, prereleases=True)
        for bound in unmet.requirement.specifier
        if bound.operator.startswith(">")
    )


def _unmet(extra: str = "") -> Iterator[_Unmet]:
    """Unmet requirements of an extra; "" for those of every installation."""
    try:
        asked = metadata.requires("btx_jax") or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, asked):
        marker = requirement.marker
        if extra and (marker is None or marker.evaluate({"extra": ""})):
            continue  # everybody's
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = ""
        if not installed or not requirement.specifier.contains(installed, prereleases=True):
            yield _Unmet(requirement, installed)
