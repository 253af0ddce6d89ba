"""Goal: a bundle that no life gets past keeps nobody from starting, and a good one is not left.

Method: the rule on values, against a storage with three bundles.
"""

from boreal.types import Lsn
from compute_node.bundle_choice import BundleChoice

BUNDLES = (Lsn(300), Lsn(200), Lsn(100))


def chosen(choice: BundleChoice) -> Lsn:
    """What a life gets: Fleet.latest_bundle, and what Instance does without one."""
    found = [end for end in BUNDLES if not choice.max_end or end <= choice.max_end]
    if not found:
        choice.begin_again()
        return BUNDLES[0]
    return found[0]


def lives(choice: BundleChoice, count: int) -> list[Lsn]:
    """As many lives that come to nothing, and where each began."""
    ends = []
    for _ in range(count):
        ends.append(chosen(choice))
        choice.ended(ends[-1], served=False)
    return ends


def test_every_bundle_is_tried_twice_from_the_newest_on_and_then_again() -> None:
    assert lives(BundleChoice(), 8) == [300, 300, 200, 200, 100, 100, 300, 300]


def test_one_failure_changes_nothing() -> None:
    choice = BundleChoice()
    lives(choice, 1)
    choice.ended(chosen(choice), served=True)
    assert lives(choice, 2) == [300, 300]
    assert chosen(choice) == 200


def test_after_a_life_that_served_the_newest_is_right_again() -> None:
    choice = BundleChoice()
    lives(choice, 3)
    assert chosen(choice) == 200
    choice.ended(Lsn(200), served=True)
    assert chosen(choice) == 300


def test_a_life_that_got_no_bundle_says_nothing_about_any() -> None:
    choice = BundleChoice()
    lives(choice, 1)
    for _ in range(3):
        choice.ended(Lsn(0), served=False)
    assert lives(choice, 2) == [300, 200]
