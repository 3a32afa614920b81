"""
Text of a request, made safe for people who read it at a third party.

A description is written by a stranger. As it is, it could steer a terminal, reverse the direction
of a line, or look like a part of the message that we wrote around it.
"""

import re
import unicodedata

#: Invisible, and part of how words and emoji are written.
_JOINERS = "\u200c\u200d"

#: Everything that ends a line somewhere: https://www.unicode.org/reports/tr14/
_LINE_END = re.compile(r"\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")

QUOTE = "> "


def clean_text(text: str) -> str:
    """
    Text without control characters: every end of a line is a newline.

    Control characters and lone surrogates become U+FFFD; invisible format characters, such as those
    that change the direction of writing, are left out.
    """
    return "".join(_clean_character(one) for one in _LINE_END.sub("\n", text))


def one_line(text: str) -> str:
    """Clean text on one line, as a header needs it."""
    return " ".join(clean_text(text).split())


def quoted(text: str) -> str:
    """Clean text with `> ` before each line, so that no line passes for one that we wrote."""
    return "\n".join(QUOTE + line for line in clean_text(text).split("\n"))


def _clean_character(character: str) -> str:
    if character in "\n\t" or character in _JOINERS:
        return character
    match unicodedata.category(character):
        case "Cc" | "Cs":
            return "\ufffd"
        case "Cf":
            return ""
    return character
