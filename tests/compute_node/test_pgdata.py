"""Goal: each file of a data directory is taken for what it is: a relation's, a bundle's, neither.

Method: paths by their values; the mapping of paths to forks and back by property; data directories
of empty files, laid out as PostgreSQL lays them out.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boreal.types import RELATION_SEGMENT_BLOCKS, Fork, RelationFork
from compute_node.pgdata import (
    DEFAULT_TABLESPACE,
    GLOBAL_TABLESPACE,
    RelationFile,
    bundle_paths,
    parse_relation_path,
    relation_files,
    relation_path,
    segment_sizes,
)


def lay_out(pgdata: Path, files: Iterable[str], directories: Iterable[str] = ()) -> Path:
    for directory in ("global", "base", *directories):
        (pgdata / directory).mkdir(parents=True, exist_ok=True)
    for file in files:
        (pgdata / file).parent.mkdir(parents=True, exist_ok=True)
        (pgdata / file).touch()
    return pgdata


def bundled_files(pgdata: Path) -> set[str]:
    return {path for path, is_directory in bundle_paths(pgdata) if not is_directory}


# --- paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fork", "segment"),
    [
        ("base/5/16384", RelationFork(DEFAULT_TABLESPACE, 5, 16384, Fork.MAIN), 0),
        ("base/5/16384.1", RelationFork(DEFAULT_TABLESPACE, 5, 16384, Fork.MAIN), 1),
        ("base/5/16384_fsm", RelationFork(DEFAULT_TABLESPACE, 5, 16384, Fork.FSM), 0),
        ("base/5/16384_vm", RelationFork(DEFAULT_TABLESPACE, 5, 16384, Fork.VM), 0),
        ("base/5/16384_vm.12", RelationFork(DEFAULT_TABLESPACE, 5, 16384, Fork.VM), 12),
        ("base/5/16384_init", RelationFork(DEFAULT_TABLESPACE, 5, 16384, Fork.INIT), 0),
        ("global/1262", RelationFork(GLOBAL_TABLESPACE, 0, 1262, Fork.MAIN), 0),
        ("global/1262_fsm", RelationFork(GLOBAL_TABLESPACE, 0, 1262, Fork.FSM), 0),
    ],
)
def test_a_relation_file_is_known_by_its_path(path: str, fork: RelationFork, segment: int) -> None:
    assert parse_relation_path(path) == RelationFile(path=path, fork=fork, segment=segment)
    assert relation_path(fork, segment) == path


@pytest.mark.parametrize(
    "path",
    [
        *("base/5/t3_16384", "base/5/t3_16384_fsm", "base/5/t12_16384.1"),  # temporary
        *("base/5/PG_VERSION", "base/5/pg_filenode.map", "base/5/pg_internal.init"),
        *("global/pg_control", "global/pg_filenode.map"),
        *("base/5/16384_main", "base/5/16384_vm_fsm", "base/5/16384.", "base/5/16384.1.2"),
        *("base/pgsql_tmp/16384", "base/16384", "16384", "global/5/1262", "/base/5/16384"),
        *("pg_xact/0000", "pg_wal/000000010000000000000001", "base/5/16384\n", ""),
    ],
)
def test_anything_else_is_no_relation_file(path: str) -> None:
    assert parse_relation_path(path) is None


_OIDS = st.integers(min_value=1, max_value=2**32 - 1)
_FORKS = st.one_of(
    st.builds(RelationFork, st.just(DEFAULT_TABLESPACE), _OIDS, _OIDS, st.sampled_from(Fork)),
    st.builds(RelationFork, st.just(GLOBAL_TABLESPACE), st.just(0), _OIDS, st.sampled_from(Fork)),
)


@given(fork=_FORKS, segment=st.integers(min_value=0, max_value=32767))
def test_a_path_leads_back_to_its_fork(fork: RelationFork, segment: int) -> None:
    path = relation_path(fork, segment)
    assert parse_relation_path(path) == RelationFile(path=path, fork=fork, segment=segment)


@pytest.mark.parametrize(
    ("blocks", "sizes"),
    [
        (0, [(0, 0)]),
        (1, [(0, 1)]),
        (RELATION_SEGMENT_BLOCKS - 1, [(0, RELATION_SEGMENT_BLOCKS - 1)]),
        (RELATION_SEGMENT_BLOCKS, [(0, RELATION_SEGMENT_BLOCKS)]),
        (RELATION_SEGMENT_BLOCKS + 1, [(0, RELATION_SEGMENT_BLOCKS), (1, 1)]),
        (2 * RELATION_SEGMENT_BLOCKS, [(n, RELATION_SEGMENT_BLOCKS) for n in range(2)]),
    ],
)
def test_a_fork_is_cut_into_full_segments_and_a_rest(
    blocks: int, sizes: list[tuple[int, int]]
) -> None:
    assert list(segment_sizes(blocks)) == sizes


@given(blocks=st.integers(min_value=0, max_value=2**32 - 2))
def test_segments_hold_all_blocks_and_only_the_last_is_not_full(blocks: int) -> None:
    segments, sizes = zip(*segment_sizes(blocks), strict=True)
    assert sum(sizes) == blocks
    assert segments == tuple(range(len(segments)))
    assert all(size == RELATION_SEGMENT_BLOCKS for size in sizes[:-1])
    assert sizes[-1] <= RELATION_SEGMENT_BLOCKS
    assert sizes[-1] or blocks == 0  # a file of no blocks stands for an empty relation alone


# --- directories --------------------------------------------------------------------------------


def test_relation_files_are_those_of_all_databases(tmp_path: Path) -> None:
    relations = ["base/1/1259", "base/5/16384", "base/5/16384.1", "base/5/16384_vm", "global/1262"]
    others = ["base/5/t3_16400", "base/5/PG_VERSION", "base/pgsql_tmp/pgsql_tmp1.0", "PG_VERSION"]
    found = list(relation_files(lay_out(tmp_path, [*relations, *others])))
    assert sorted(file.path for file in found) == relations
    assert found[0].path == "global/1262"


def test_a_bundle_has_all_that_is_neither_page_nor_log(tmp_path: Path) -> None:
    wanted = {
        *("PG_VERSION", "base/5/PG_VERSION", "base/5/pg_filenode.map", "global/pg_control"),
        *("global/pg_filenode.map", "pg_xact/0000", "pg_multixact/members/0000"),
        *("pg_commit_ts/0000", "pg_twophase/000002DA", "pg_logical/replorigin_checkpoint"),
    }
    assert bundled_files(lay_out(tmp_path, wanted)) == wanted


def test_free_space_maps_belong_to_a_bundle_and_other_forks_do_not(tmp_path: Path) -> None:
    maps = {"base/5/16384_fsm", "base/5/16384_fsm.1", "global/1262_fsm"}
    others = ["base/5/16384", "base/5/16384.1", "base/5/16384_vm", "base/5/16384_init"]
    assert bundled_files(lay_out(tmp_path, [*maps, *others, "global/1262"])) == maps


@pytest.mark.parametrize(
    "directory",
    [
        *("pg_wal", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots"),
        *("pg_stat", "pg_stat_tmp", "pg_subtrans", "boreal"),
    ],
)
def test_some_directories_come_empty(tmp_path: Path, directory: str) -> None:
    lay_out(tmp_path, [f"{directory}/0000", f"{directory}/below/state"])
    found = [path for path in bundle_paths(tmp_path) if path[0].startswith(directory)]
    assert found == [(directory, True)]


def test_only_the_top_directory_of_such_a_name_is_emptied(tmp_path: Path) -> None:
    kept = {"pg_logical/pg_stat/0000"}
    assert bundled_files(lay_out(tmp_path, kept)) == kept


@pytest.mark.parametrize(
    "file",
    [
        *("postmaster.pid", "postmaster.opts", "current_logfiles", "base/5/pg_internal.init"),
        *("backup_label", "tablespace_map", "standby.signal", "recovery.signal"),
        *("postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"),
        *("base/5/t3_16384", "base/5/t3_16384_fsm", "base/5/t3_16384.1"),
        "base/pgsql_tmp/pgsql_tmp4711.0",
    ],
)
def test_what_belongs_to_one_run_of_one_postgresql_stays_with_it(tmp_path: Path, file: str) -> None:
    assert bundled_files(lay_out(tmp_path, [file])) == set()


def test_files_that_parallel_workers_share_are_temporary_too(tmp_path: Path) -> None:
    shared = "base/pgsql_tmp/pgsql_tmp4711.0.fileset/i1of2.p0.0"
    assert bundled_files(lay_out(tmp_path, [shared])) == set()


def test_a_relation_cache_being_written_is_left_out(tmp_path: Path) -> None:
    assert bundled_files(lay_out(tmp_path, ["base/5/pg_internal.init.4711"])) == set()


def test_a_directory_comes_before_what_is_in_it(tmp_path: Path) -> None:
    lay_out(tmp_path, ["base/5/PG_VERSION", "pg_multixact/members/0000"], ["pg_tblspc"])
    seen = {"."}
    for path, is_directory in bundle_paths(tmp_path):
        assert str(Path(path).parent) in seen
        if is_directory:
            seen.add(path)
    assert {"base", "base/5", "global", "pg_multixact/members", "pg_tblspc"} <= seen
