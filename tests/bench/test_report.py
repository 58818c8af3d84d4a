"""The README and the pages of bench/results say what the JSON in bench/results says."""

import re
from pathlib import Path

import pytest

from bench.report import PAGES, RESULTS, TABLES, main, renewed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text()
    assert renewed(text) == text, "run `python -m bench report`"


def test_every_table_stands_on_one_page() -> None:
    names = [name for page in PAGES for name in re.findall(r"<!-- table (\w+) -->", page.read_text())]
    assert sorted(names) == sorted(TABLES)


def test_pages_name_files_that_exist() -> None:
    for page in PAGES:
        names = re.findall(r"`([a-z]+_[\w-]+\.(?:json|png))`", page.read_text())
        assert [name for name in names if not (RESULTS / name).exists()] == []


def test_the_command_leaves_fresh_pages_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    before = [page.read_text() for page in PAGES]
    main([])
    assert [page.read_text() for page in PAGES] == before
    assert str(PAGES[0]) in capsys.readouterr().out
