"""Goal: a compute node goes through its states as the table says and in no other way.

Method: every pair of states is tried, from a life led up to the first of them; the table is written
out here a second time, on purpose.
"""

from __future__ import annotations

import itertools

import pytest

from boreal.errors import Internal
from compute_node.life import Life, LifeState

W, C, R = LifeState.WAITING, LifeState.CREATING, LifeState.RESTORING
READER, P, WRITER, Y, S = (
    LifeState.READER,
    LifeState.PROMOTING,
    LifeState.WRITER,
    LifeState.YIELDING,
    LifeState.STOPPING,
)

ALLOWED = {
    *((W, C), (W, R), (C, W), (R, READER), (READER, P), (P, WRITER), (WRITER, Y)),
    *((state, S) for state in LifeState if state is not S),
}
WAY_TO: dict[LifeState, tuple[LifeState, ...]] = {
    W: (),
    C: (C,),
    R: (R,),
    READER: (R, READER),
    P: (R, READER, P),
    WRITER: (R, READER, P, WRITER),
    Y: (R, READER, P, WRITER, Y),
    S: (S,),
}


def life_at(state: LifeState) -> Life:
    life = Life()
    for step in WAY_TO[state]:
        life.become(step, "on the way")
    assert life.state is state
    return life


@pytest.mark.parametrize(
    ("old", "new"),
    list(itertools.product(LifeState, LifeState)),
    ids=lambda state: state.value,
)
def test_every_pair_of_states(old: LifeState, new: LifeState) -> None:
    life = life_at(old)
    if (old, new) in ALLOWED:
        life.become(new, "allowed")
        assert life.state is new
    else:
        with pytest.raises(Internal, match=f"{old.value} compute node cannot become {new.value}"):
            life.become(new, "not allowed")
        assert life.state is old


def test_a_volume_may_be_made_in_several_attempts() -> None:
    life = Life()
    for _ in range(3):
        life.become(C, "first in the cluster")
        life.become(W, "a storage node is missing")
    life.become(R, "another made it")
    assert life.state is R


def test_a_writer_never_becomes_a_reader_again() -> None:
    reached, edge = set[LifeState](), {WRITER}
    while edge:
        reached |= edge
        edge = {new for old, new in ALLOWED if old in edge} - reached
    assert reached == {WRITER, Y, S}


def test_no_two_lives_share_an_identity_and_none_changes_its_own() -> None:
    lives = [Life() for _ in range(100)]
    identities = [life.identity for life in lives]
    assert len(set(identities)) == 100
    for life in lives:
        life.become(S, "over")
    assert [life.identity for life in lives] == identities


def test_each_change_is_told_once_it_is_made() -> None:
    seen: list[LifeState] = []
    life = Life(lambda: seen.append(life.state))
    for step in (R, READER, P, WRITER, Y, S):
        life.become(step, "on the way")
    assert seen == [R, READER, P, WRITER, Y, S]
