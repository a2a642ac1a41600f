"""The page about what works is the table of cases, and says nothing that a law does not check."""

import re

from tests.cases import CASES
from tests.cases.what_works import PAGE, PEERS, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "run `python -m tests.cases.what_works`"


def test_every_case_has_one_row():
    rows = re.findall(r"^\| (.*?) \| (fast|dense) \|", page(), re.MULTILINE)
    assert [name for name, _ in rows if name not in ("fast", "dense")] == [c.name for c in CASES]


def test_only_known_libraries_are_named():
    assert {peer for case in CASES for peer in case.peers} <= set(PEERS)


def test_groups_stand_together():
    groups = [case.group for case in CASES]
    heads = re.findall(r"^## (.*)$", page(), re.MULTILINE)
    assert len(heads) == len(set(heads)) == len(set(groups))
