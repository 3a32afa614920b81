"""What a third party answered, cut to what may be stored and shown."""

from runtime.printable import escape_unprintable

EXCERPT_MAX_CHARACTERS = 200


def cut_excerpt(text: str) -> str:
    """
    Up to 200 characters on one line, so that no answer floods a log or a page.

    Lone surrogates stand for bytes that were not UTF-8, and MongoDB does not store them: each
    becomes `?`. Control characters, which can steer a terminal or reverse the direction of
    writing, become escapes such as `\\x1b`.
    """
    line = escape_unprintable(" ".join(text.encode(errors="replace").decode().split()))
    if len(line) <= EXCERPT_MAX_CHARACTERS:
        return line
    return line[: EXCERPT_MAX_CHARACTERS - 1] + "…"
