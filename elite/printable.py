"""Names and texts of others, fit to be shown: nothing in them may steer a terminal, or break a line that is one line."""

import re

# C0 and C1 controls, what turns the direction of writing, line and paragraph separators, and halves of surrogate pairs, which cannot be
# encoded. A tab is harmless.
STEERS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """`text` with each character that could steer a terminal, line breaks too, spelled as Python's `repr` does."""
    return STEERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def lines(text: str) -> str:
    """The same for a text of several lines, which stay lines."""
    return "\n".join(map(one_line, text.replace("\r\n", "\n").split("\n")))
