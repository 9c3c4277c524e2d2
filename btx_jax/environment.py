"""Compare installed packages with the tested versions: the ranges in btx_jax's own metadata, which
are those of pyproject.toml. A checkout that was never installed has no metadata, and nothing is
compared."""

from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

from packaging.requirements import Requirement

from btx_jax import terminal
from btx_jax.errors import UserError

# Older versions of it fail the tests; older versions of other packages were not tried.
BREAKS_BELOW_ITS_RANGE = "jax"


class _Unmet(NamedTuple):
    """An unmet requirement. installed: the installed version, "" for none."""

    requirement: Requirement
    installed: str

    @property
    def asked(self) -> str:
        return f"{self.requirement.name}{self.requirement.specifier}"


def require(extra: str, what: str) -> None:
    """Raise UserError, with the command that fixes it, when a package of the extra is missing or
    its version is out of range. what: the key or command that needs it."""
    if unmet := list(_unmet(extra)):
        listed = ", ".join(f"{u.asked} ({u.installed or 'none'} is installed)" for u in unmet)
        raise UserError(f"{what} needs {listed}: pip install 'btx_jax[{extra}]'")


def check() -> None:
    """Warn about versions out of range, one line each on stderr, at the start of a command. Raises
    UserError for those known to fail."""
    for unmet in _unmet():
        if not unmet.installed:
            continue  # reported by the import that needs it
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
            continue  # required by every installation
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            installed = ""
        if not installed or not requirement.specifier.contains(installed, prereleases=True):
            yield _Unmet(requirement, installed)
