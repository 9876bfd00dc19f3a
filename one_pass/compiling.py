"""numba's compiler, with a cache on disk if one can be written."""

from collections.abc import Callable

from numba import njit


def compiled(**options) -> Callable[[Callable], Callable]:
    """The decorator njit(**options), with a cache on disk if one can be written.

    When it decorates, numba looks for a place: NUMBA_CACHE_DIR, beside the source, or in the user's
    home. If it can write to none of them, each process compiles the function anew.
    """

    def decorate(function: Callable) -> Callable:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError as problem:
            if "cannot cache function" not in str(problem):
                raise
            return njit(**options)(function)

    return decorate
