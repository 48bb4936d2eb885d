"""Words that the project's prose does not use, and what to write instead."""

from __future__ import annotations

import re

WORDS = {
    r"go(es)? on|going on|went on|gone on": "resume, continue",
    r"mend(s|ed|ing)?": "fix",
    r"anew|once more": "again",
    r"(in|into) force": "committed, current",
    r"c[ao]mes? to nothing": "fails",
    r"(is|are|was) told|tells? of|says? nothing": "is notified, reports, is silent",
    r"pass(es|ed|ing)? over": "skip",
    r"let(s|ting)? (all \w+ )?go|let(s|ting)? in": "release, admit",
    r"on nobody's line|(on|off) the line": "not in the checkpoint lineage, lineage",
    r"held up by": "stall",
    r"sums of all ranks": "all-reduce",
    r"so (many|much|long) (as|bytes|steps|after)|for so long": "the number or the parameter's name",
}
"""Patterns of words, with the terms to use."""
_PATTERNS = {re.compile(rf"\b({words})\b", re.IGNORECASE): instead for words, instead in WORDS.items()}


def foreign_words(text: str) -> dict[str, str]:
    """Return the words of a text that the project does not use, with what to write instead."""
    return {word[0]: instead for pattern, instead in _PATTERNS.items() for word in pattern.finditer(text)}
