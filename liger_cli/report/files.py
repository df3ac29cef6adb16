"""A report as files: a page, markdown, pictures."""

from __future__ import annotations

from pathlib import Path

from liger_cli.common.outputs import check_files, write_file
from liger_cli.report.html import write_html
from liger_cli.report.markdown import markdown as as_markdown
from liger_cli.report.pictures import write_pictures
from liger_cli.report.summary import SavedReport

__all__ = ["write_files"]


def write_files(
    saved: SavedReport, *, page: Path | None, markdown: Path | None, pictures: Path | None
) -> list[Path]:
    """Write what is asked for and return the files.

    Raises:
        ConfigError: A directory is in the place of a file.
        EnvironmentProblem: A file cannot be written.
    """
    check_files({"--html": page, "--markdown": markdown})
    written = [path for path in (page, markdown) if path is not None]
    if page is not None:
        write_html(saved, page)
    if markdown is not None:
        write_file(markdown, as_markdown(saved))
    if pictures is not None:
        written += write_pictures(saved, pictures)
    return written
