"""A hook of mkdocs: links from a page to a file of the repository work on the site too.

A page links to `../ablations/quickstart.yaml`, which a view of the repository follows. The site has no such file. Each
file that a page links to becomes a page of the site below `repository/`, with its text as one block of code, and the
link leads there. Links to folders, and to files that do not exist, stay as they are: `mkdocs build --strict` stops.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

LINK = re.compile(r"(?<=\]\()(\.\./[^)#\s]+)(#[^)\s]*)?(?=\))")
"""The target of a link that leads upwards, and its anchor."""
LANGUAGES = {".yaml": "yaml", ".py": "python", ".toml": "toml", ".md": "markdown"}


def _address(link: str, page: str) -> str | None:
    """The file's path in the repository, from a link on a page of `docs/`; None of a link that stays within."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file of the repository that a page links to."""
    root = Path(config["docs_dir"]).parent
    linked = set()
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for link, _ in LINK.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            address = _address(link, page.src_uri)
            if address is not None and (root / address).is_file():
                linked.add(address)
    for address in sorted(linked):
        text = (root / address).read_text(encoding="utf-8")
        language = LANGUAGES.get(posixpath.splitext(address)[1], "text")
        content = f"---\nsearch: {{exclude: true}}\n---\n# {address}\n\n~~~~~~{language}\n{text}\n~~~~~~\n"
        files.append(File.generated(config, f"repository/{address}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Let those links lead to the pages below `repository/`."""
    here = page.file.src_uri
    if here.startswith("repository/"):
        return markdown

    def rewritten(match: re.Match[str]) -> str:
        address = _address(match[1], here)
        target = f"repository/{address}.md"
        if address is None or files.get_file_from_path(target) is None:
            return match[0]
        return posixpath.relpath(target, posixpath.dirname(here) or ".") + (match[2] or "")

    return LINK.sub(rewritten, markdown)
