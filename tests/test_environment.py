"""The environment of jobs: places, ports, threads."""

from __future__ import annotations

from pathlib import Path

from cluster import environment
from configs.cluster import Cluster


def before(cluster: Cluster, **given: object) -> dict[str, str]:
    base = {"code": Path("/code"), "cores": 8, "processes": 4, "gpus": 0, "local": True, "commit": "c"}
    return environment.before_python(cluster, **{**base, **given})  # type: ignore[arg-type]


def test_threads_are_cores_over_processes_and_at_least_one() -> None:
    assert before(Cluster())["OMP_NUM_THREADS"] == "2"
    assert before(Cluster(), cores=2)["OMP_NUM_THREADS"] == "1"


def test_own_variables_have_the_last_word() -> None:
    given = before(Cluster(env={"OMP_NUM_THREADS": "7", "X": "y"}))
    assert given["OMP_NUM_THREADS"] == "7"
    assert given["X"] == "y"


def test_the_snapshot_is_searched_before_the_launchers_own_path() -> None:
    assert before(Cluster(), python_path="/mine")["PYTHONPATH"] == "/code:/mine"
    assert before(Cluster())["PYTHONPATH"] == "/code"


def test_the_interface_is_named_to_both_libraries() -> None:
    given = before(Cluster(interface="ib0"))
    assert given["NCCL_SOCKET_IFNAME"] == given["GLOO_SOCKET_IFNAME"] == "ib0"
    assert "GLOO_SOCKET_IFNAME" not in before(Cluster(), local=False)


def test_each_life_of_a_job_has_its_own_port_below_the_ephemeral_ones() -> None:
    ports = [environment.port_at(Cluster(), 123, generation) for generation in range(100)]
    assert len(set(ports)) == 100
    assert all(1024 < port < 32768 for port in ports)
    assert environment.port_at(Cluster(port=4000), 123, 5) == 4000


def test_a_rank_is_told_its_place_as_by_torchrun() -> None:
    place = environment.of_rank(
        rank=3, local_rank=1, world_size=4, processes=2, cores=None, address="n1", port=5, generation=100002
    )
    assert "AKORN_CORES" not in place
    assert place["RANK"] == "3"
    assert place["LOCAL_RANK"] == "1"
    assert place["WORLD_SIZE"] == "4"
    assert (place["MASTER_ADDR"], place["MASTER_PORT"]) == ("n1", "5")
