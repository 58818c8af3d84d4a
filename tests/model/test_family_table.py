"""The table of families covers the installed transformers, and the page is written from it."""

from tests.model.family_page import PAGE, page
from tests.model.family_table import TABLE, decorated_families


def test_every_family_with_decorated_experts_has_a_row() -> None:
    assert decorated_families() - TABLE.keys() == set()
    assert TABLE.keys() - decorated_families() == set()


def test_the_page_of_families_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.model.family_page"
