"""
A hook of mkdocs: what docs/ links to elsewhere in the repository becomes part of the site.

Its place there is `repository/` and its path in the repository. A link to a folder becomes a link
to the folder's README.md; a link to a folder without a README.md becomes plain text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools.links import REPOSITORY, links_of

DOCS = REPOSITORY / "docs"
OUTSIDE = "repository"

LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add what the pages link to, what those pages link to, and so on."""
    pages = [DOCS / file.src_uri for file in files.documentation_pages()]
    while pages:
        page = pages.pop()
        for link in links_of(page.read_text()):
            target = _target(page, link.path)
            if target is None or files.get_file_from_path(_place(target)):
                continue
            files.append(File.generated(config, _place(target), abs_src_path=str(target)))
            if target.suffix == ".md":
                pages.append(target)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links that lead out of docs/, or to a folder."""
    del config, files
    source = Path(str(page.file.abs_src_path))
    folder = posixpath.dirname(page.file.src_uri)

    def rewrite(found: re.Match[str]) -> str:
        text, path, anchor = found[1], found[2], found[3] or ""
        if ":" in path:
            return found[0]
        target = _target(source, path)
        if target is None:
            return text
        return f"[{text}]({posixpath.relpath(_place(target), folder)}{anchor})"

    return LINK.sub(rewrite, markdown)


def _target(page: Path, link: str) -> Path | None:
    """Give the file that a link leads to; None for a folder that has no README.md."""
    target = (page.parent / link).resolve() if link else page
    if target.is_dir():
        target /= "README.md"
    return target if target.is_file() else None


def _place(target: Path) -> str:
    """Give the path in the site's source."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    return f"{OUTSIDE}/{target.relative_to(REPOSITORY).as_posix()}"
