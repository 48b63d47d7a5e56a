"""Typed errors.

Every error cuflash raises derives from `CuflashError` and from the built-in that a caller would
expect, names the argument and its value, and says what it must be.
"""


class CuflashError(Exception):
    """Base of every error raised by cuflash."""


class InvalidValueError(CuflashError, ValueError):
    """An argument has a value outside of what it may be."""


class InvalidShapeError(InvalidValueError):
    """The shape of an array does not fit the problem."""


class InvalidTypeError(CuflashError, TypeError):
    """An argument has the wrong type."""


class InvalidDtypeError(InvalidTypeError):
    """An array has a dtype that the operation or the device cannot take."""


class TraceError(CuflashError, TypeError):
    """A mask's function does what cannot be traced into an expression of the indices."""


class DeviceError(CuflashError, RuntimeError):
    """Arrays lie on different devices, or the device or its software is missing."""


class CompileError(CuflashError, RuntimeError):
    """A kernel does not compile; the message carries the compiler's log and the source's path."""


class ConfigError(InvalidValueError):
    """A kernel configuration contradicts itself, the problem or the architecture."""


class OutOfBlocksError(CuflashError, MemoryError):
    """A pool has fewer free blocks than a step needs; the step changed nothing."""


class UnknownSequenceError(CuflashError, KeyError):
    """A cache has no sequence of this id, or no longer."""

    __str__ = Exception.__str__  # KeyError would quote the message


def type_name(value: object) -> str:
    """How an error names the type of an argument."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
