"""numba's compiler, with a cache on the disk where there is a place for one."""

from collections.abc import Callable

from numba import njit


def compiled(**options) -> Callable[[Callable], Callable]:
    """The decorator njit(**options) with a cache, or without one where none can be written.

    numba asks for a place when it decorates: beside the source, then in the user's home, or where
    NUMBA_CACHE_DIR says. Without any, each process compiles anew.
    """

    def decorate(function: Callable) -> Callable:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError as problem:
            if "cannot cache function" not in str(problem):
                raise
            return njit(**options)(function)

    return decorate
