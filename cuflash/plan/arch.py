"""Facts about GPU architectures that a plan needs."""

from __future__ import annotations

from dataclasses import dataclass

from cuflash.errors import InvalidValueError

KIB = 1024


@dataclass(frozen=True)
class Arch:
    """One compute capability.

    shared_per_block and shared_per_sm are bytes of shared memory that one block may use and that one
    multiprocessor has; sm_count is that of the architecture's usual datacentre or desktop part, used
    where no device is at hand.
    """

    name: str
    shared_per_block: int
    shared_per_sm: int
    max_warps_per_sm: int
    sm_count: int

    @property
    def capability(self) -> int:
        """Compute capability as an integer, 80 for sm_80."""
        return int(self.name.removeprefix("sm_").rstrip("af"))


ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("sm_80", 163 * KIB, 164 * KIB, 64, 108),
        Arch("sm_86", 99 * KIB, 100 * KIB, 48, 84),
        Arch("sm_89", 99 * KIB, 100 * KIB, 48, 128),
        Arch("sm_90", 227 * KIB, 228 * KIB, 64, 132),
        Arch("sm_100", 227 * KIB, 228 * KIB, 64, 148),
        Arch("sm_120", 99 * KIB, 100 * KIB, 48, 170),
    )
}


def arch_named(name: str) -> Arch:
    """The architecture called `name`; raises InvalidValueError for one that cuflash does not know."""
    try:
        return ARCHS[name]
    except KeyError:
        raise InvalidValueError(f"arch = {name!r}: must be one of {', '.join(ARCHS)}") from None


def arch_of_capability(major: int, minor: int) -> Arch:
    """The newest known architecture whose code runs on compute capability major.minor (same major)."""
    for arch in sorted(ARCHS.values(), key=lambda a: -a.capability):
        if arch.capability // 10 == major and arch.capability % 10 <= minor:
            return arch
    raise InvalidValueError(f"compute capability {major}.{minor}: must be one that runs code for {', '.join(ARCHS)}")
