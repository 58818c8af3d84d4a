"""The table of families covers the installed transformers."""

from tests.model.family_table import TABLE, decorated_families


def test_every_family_with_decorated_experts_has_a_row() -> None:
    assert decorated_families() - TABLE.keys() == set()
    assert TABLE.keys() - decorated_families() == set()
