"""Text that is safe to print on a terminal and in a log."""


def escape_unprintable(text: str) -> str:
    """
    Untrusted text, unable to move the cursor, change colours, reverse a line or begin another.

    Each such character becomes an escape such as `\\x1b`.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
