"""
Check the links of the repository's Markdown pages: `python -m tools.links`, part of `make lint`.

A relative link must lead to a file or folder that git has, or will have with the next commit, and
an anchor to a heading of that page. Links with a scheme (https:, mailto:) are not followed.
Anchors are those of code hosts: lower case, without punctuation, a hyphen for each space.
"""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

REPOSITORY = Path(__file__).parents[1]

FENCED = re.compile(r"^ {0,3}(```+|~~~+).*?^ {0,3}\1", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?:(?: {4}|\t).*\n+)+")
CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
INLINE = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'(][^)]*)?\s*\)")
REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s+<?([^\s>]+)", re.MULTILINE)
HTML = re.compile(r"\b(?:href|src)=[\"']([^\"']+)[\"']")
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
HTML_ANCHOR = re.compile(r"<[^>]+\b(?:id|name)=[\"']([^\"']+)[\"']")


@dataclass(frozen=True)
class Link:
    """`path` is relative to the page that links, and empty for a link within the page."""

    path: str
    anchor: str

    def __str__(self) -> str:
        return f"{self.path}#{self.anchor}" if self.anchor else self.path


def links_of(text: str) -> list[Link]:
    """Give the relative links of a page, except those inside code."""
    text = _without_code(text)
    links = []
    for pattern in (INLINE, REFERENCE, HTML):
        for target in pattern.findall(text):
            path, _, anchor = target.partition("#")
            if not re.match(r"[a-z][a-z0-9+.-]*:|//", path, re.IGNORECASE):
                links.append(Link(unquote(path), unquote(anchor)))
    return links


def anchors_of(text: str) -> set[str]:
    without_code = FENCED.sub("", text)
    anchors = set(HTML_ANCHOR.findall(without_code))
    for heading in HEADING.findall(without_code):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = base = re.sub(r"[^\w -]", "", shown).strip().replace(" ", "-")
        repeated = 0
        while anchor in anchors:
            repeated += 1
            anchor = f"{base}-{repeated}"
        anchors.add(anchor)
    return anchors


def broken_links(root: Path, files: Iterable[Path]) -> Iterator[str]:
    """
    Give a line for each broken link: the page, the link, and what is wrong.

    files: all files of the repository, relative to `root`; those that end in `.md` are the pages.
    """
    known = {root / path for path in files}
    known |= {folder for path in known for folder in path.parents if folder.is_relative_to(root)}
    for page in sorted(path for path in known if path.suffix == ".md" and path.is_file()):
        for link in links_of(page.read_text()):
            target = (page.parent / link.path).resolve() if link.path else page
            place = f"{page.relative_to(root)}: {link}"
            if not target.is_relative_to(root):
                yield f"{place} leads out of the repository"
            elif target not in known or not target.exists():
                yield f"{place} leads to no file or folder of the repository"
            elif link.anchor and target.suffix != ".md":
                yield f"{place} has an anchor, and leads to no Markdown page"
            elif link.anchor and link.anchor not in anchors_of(target.read_text()):
                yield f"{place} leads to a page without this heading"


def files_of_git(root: Path) -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)  # noqa: S603
    return [Path(name) for name in listed.stdout.split("\0") if name]


def _without_code(text: str) -> str:
    return CODE.sub("", INDENTED.sub("", FENCED.sub("", text)))


if __name__ == "__main__":
    problems = list(broken_links(REPOSITORY, files_of_git(REPOSITORY)))
    sys.exit("\n".join(problems) or None)
