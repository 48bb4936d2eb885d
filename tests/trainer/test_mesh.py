"""Positions of ranks, and the world sizes that fit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_api.spec.replicas import workers_per_replica
from pretrain_api.spec.training import Parallelism
from pretrain_trainer.core.errors import InvalidInput
from pretrain_trainer.core.mesh import Mesh

SMALL = st.integers(1, 4)


@settings(deadline=None)
@given(tensor=SMALL, pipeline=SMALL, processes=SMALL, units=SMALL)
def test_every_multiple_of_the_unit_is_a_world_of_whole_replicas(
    tensor: int, pipeline: int, processes: int, units: int
) -> None:
    parallelism = Parallelism(tensor=tensor, pipeline=pipeline)
    world_size = units * workers_per_replica(parallelism, processes) * processes

    mesh = Mesh.of(parallelism, world_size, processes)
    places = [mesh.place(rank) for rank in range(world_size)]

    assert mesh.replicas * tensor * pipeline == world_size
    assert len({(place.replica, place.stage, place.part) for place in places}) == world_size
    assert sum(place.counts for place in places) == mesh.replicas


@settings(deadline=None)
@given(tensor=SMALL, pipeline=SMALL, processes=SMALL, workers=st.integers(1, 20))
def test_no_other_number_of_workers_is_one(tensor: int, pipeline: int, processes: int, workers: int) -> None:
    parallelism = Parallelism(tensor=tensor, pipeline=pipeline)
    if workers % workers_per_replica(parallelism, processes) == 0:
        return

    with pytest.raises(InvalidInput, match="processes for each replica of the model"):
        Mesh.of(parallelism, workers * processes, processes)


def test_ranks_of_a_replica_follow_each_other_and_tensor_ranks_most_closely() -> None:
    mesh = Mesh.of(Parallelism(tensor=2, pipeline=2), 8, 4)

    found = [(place.replica, place.stage, place.part) for place in (mesh.place(rank) for rank in range(6))]

    assert found == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1)]


def test_hybrid_shards_within_a_worker() -> None:
    mesh = Mesh.of(Parallelism(shard="hybrid", tensor=2), 16, 8)

    assert (mesh.replicas, mesh.shards) == (8, 4)
