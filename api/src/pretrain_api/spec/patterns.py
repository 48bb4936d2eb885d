"""Regular expressions of users, in RE2's syntax: the time of a search is linear in the text, whatever the expression.

The operator serves all jobs in one loop. With Python's `re` an expression of ten characters could stop it for seconds.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import re2  # pyright: ignore[reportMissingTypeStubs]

MAX_PATTERN = 1024
MAX_PROGRAM = 1000
"""Instructions of the compiled expression. The worst found takes 15 ms for a text of MAX_SEARCHED characters."""
MAX_MEMORY = 2**20
"""Bytes of the compiled expression with its caches."""
MAX_SEARCHED = 4096
"""Characters of a text that are searched: the first and the last half of a longer one."""
_PYTHON_ONLY = "; RE2 syntax: no lookaround, no backreferences, no possessive or atomic groups, \\z for \\Z"


_re2: Any = re2


class InvalidPattern(ValueError):
    """Invalid or too large expression; the message says what is wrong."""


class Pattern:
    """Compiled expression."""

    def __init__(self, text: str) -> None:
        """Compile it. Raises InvalidPattern."""
        if len(text) > MAX_PATTERN:
            raise InvalidPattern(f"it is longer than {MAX_PATTERN} characters")
        options = _re2.Options()
        options.max_mem = MAX_MEMORY
        options.log_errors = False
        try:
            self._compiled = _re2.compile(text, options)
        except UnicodeEncodeError as error:
            raise InvalidPattern("it is not valid Unicode") from error
        except _re2.error as error:
            (said,) = error.args
            detail = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
            raise InvalidPattern(detail + _PYTHON_ONLY) from error
        if self._compiled.programsize > MAX_PROGRAM:
            raise InvalidPattern(f"it is too large: shorten it, or repeat less than {MAX_PROGRAM} characters in all")

    def found_in(self, text: str) -> bool:
        """Search a text."""
        if len(text) > MAX_SEARCHED:
            text = text[: MAX_SEARCHED // 2] + "\n" + text[-(MAX_SEARCHED // 2) :]
        return self._compiled.search(text.encode(errors="replace")) is not None


@lru_cache(maxsize=512)
def compile_pattern(text: str) -> Pattern:
    """Compile an expression, or return it from the cache. Raises InvalidPattern."""
    return Pattern(text)
