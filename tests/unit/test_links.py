"""The check of links in `make lint` finds what is broken, and nothing else."""

from pathlib import Path

import pytest

from tools.links import anchors_of, broken_links, links_of

PAGE = """\
# Orders & returns

## `orders list`

## Again

## Again
"""


def check(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "docs" / "parts").mkdir(parents=True)
    files = {"docs/page.md": PAGE, "docs/parts/code.py": "", "README.md": text}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "docs" / "ignored.md").write_text("git does not have this one")
    return list(broken_links(tmp_path.resolve(), map(Path, files)))


@pytest.mark.parametrize(
    "link",
    [
        "[x](docs/page.md)",
        "[x](docs/page.md#orders--returns)",
        "[x](docs/page.md#orders-list)",
        "[x](docs/page.md#again-1)",
        '[x](docs/page.md "a title")',
        "[x](docs)",
        "[x](docs/parts/code.py)",
        "[x](#top)",
        "![x](docs/parts/../page.md)",
        "[x](https://example.com/missing.md#x)",
        "[x](mailto:a@example.com)",
        "`[x](missing.md)`",
        "```\n[x](missing.md)\n```",
        "text\n\n    [x](missing.md)\n",
    ],
)
def test_a_link_that_leads_somewhere_is_accepted(tmp_path: Path, link: str) -> None:
    assert check(tmp_path, f"# Top\n\n{link}\n") == []


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("[x](docs/missing.md)", "leads to no file or folder"),
        ("[x](docs/ignored.md)", "leads to no file or folder"),
        ('[x](missing.md "a title")', "leads to no file or folder"),
        ("[x]\n\n[x]: missing.md", "leads to no file or folder"),
        ('<a href="missing.md">x</a>', "leads to no file or folder"),
        ("![x](missing.png)", "leads to no file or folder"),
        ("- a list\n  with `code` and [x](missing.md)", "leads to no file or folder"),
        ("[x](docs/page.md#order)", "leads to a page without this heading"),
        ("[x](#bottom)", "leads to a page without this heading"),
        ("[x](docs/parts/code.py#L1)", "leads to no Markdown page"),
        ("[x](../outside.md)", "leads out of the repository"),
    ],
)
def test_a_broken_link_is_found(tmp_path: Path, link: str, problem: str) -> None:
    (found,) = check(tmp_path, f"# Top\n\n{link}\n")
    assert found.startswith("README.md: ")
    assert problem in found


def test_a_heading_in_a_fenced_block_is_not_an_anchor() -> None:
    assert anchors_of("# One\n\n```\n# two\n```\n") == {"one"}


def test_each_link_of_a_table_row_is_found() -> None:
    assert [link.path for link in links_of("| [a](a.md) | [b](b.md), [c](c.md#d) |")] == [
        "a.md",
        "b.md",
        "c.md",
    ]
