"""The options of a cluster and what its processes are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.cluster.options import (
    OF_THE_GATEWAY,
    cluster_options,
    gateway_settings,
    max_ongoing_requests,
    polling_of_replicas,
    replica_settings,
)
from service.errors import InvalidSettings
from service.settings import Settings, load_settings


def test_a_replica_gets_every_setting_but_secrets() -> None:
    given = Settings(model="m", variants=("w8a8",), max_waiting=7, api_keys="a:12345678", host="0.0.0.0")
    told = json.loads(json.dumps(replica_settings(given)))
    assert "12345678" not in json.dumps(told)
    assert load_settings(**told).model_copy(update={"api_keys": given.api_keys}) == given


def test_a_file_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "ottava.toml"
    path.write_text("max_waiting = 9\n")
    told = replica_settings(load_settings(config=path))
    assert told["max_waiting"] == 9
    assert "config" not in told


def test_another_model_does_not_change_what_the_gateway_gets() -> None:
    one, two = Settings(model="a", scheme="rtn", max_num_requests=8, max_waiting=5), Settings(model="b", seed=3)
    assert gateway_settings(one) == gateway_settings(two)
    assert gateway_settings(one) != gateway_settings(Settings(port=9000))
    assert set(gateway_settings(one)) == set(OF_THE_GATEWAY)
    assert load_settings(**gateway_settings(one)).port == one.port


@pytest.mark.parametrize(
    ("given", "polls_ms"),
    [
        ({}, 0.0),
        ({"busy_poll_ms": 5.0}, 5.0),
        ({"tensor_parallel": 2}, None),
        ({"tensor_parallel": 2, "busy_poll_ms": 0}, 0.0),
    ],
)
def test_replicas_of_one_rank_do_not_poll_by_themselves(given: dict[str, Any], polls_ms: float | None) -> None:
    assert polling_of_replicas(Settings(**given)).busy_poll_ms == polls_ms


def test_a_replica_takes_what_its_engine_takes() -> None:
    assert max_ongoing_requests(Settings(max_num_requests=4, max_waiting=10)) == 14


def test_defaults_follow_the_engines_limits() -> None:
    settings = Settings(max_num_requests=16)
    options = cluster_options()
    assert (options.bound(settings), options.target(settings)) == (4, 12.0)
    assert cluster_options(affinity_bound=0).bound(settings) == 0
    assert cluster_options(target_requests=2).target(settings) == 2.0
    assert (options.bound(Settings(max_num_requests=1)), options.target(Settings(max_num_requests=1))) == (1, 1.0)


def test_a_replica_takes_a_gpu_where_there_are_any() -> None:
    assert cluster_options().gpus(Settings(), 4.0) == 1.0
    assert cluster_options().gpus(Settings(), 0.0) == 0.0
    assert cluster_options().gpus(Settings(device="cpu"), 4.0) == 0.0
    assert cluster_options(gpus_per_replica=2).gpus(Settings(), 4.0) == 2.0
    with pytest.raises(InvalidSettings, match="no machine of the cluster has a GPU"):
        cluster_options().gpus(Settings(device="cuda"), 0.0)


def test_a_replica_takes_a_gpu_for_each_rank_of_one_machine() -> None:
    four = Settings(tensor_parallel=4)
    assert cluster_options().gpus(four, 8.0) == 4.0
    assert cluster_options(gpus_per_replica=6).gpus(four, 8.0) == 6.0
    assert cluster_options().gpus(four, 0.0) == 0.0
    assert cluster_options().gpus(Settings(tensor_parallel=4, device="cpu"), 8.0) == 0.0
    # Machines with GPUs may come later, as autoscaling adds them.
    assert cluster_options(gpus_per_replica=4).gpus(four, 0.0) == 4.0


@pytest.mark.parametrize(
    ("options", "most_gpus", "said"),
    [
        ({}, 2.0, r"a replica takes 4 GPUs of one machine .*tensor_parallel 4\), and no machine .* more than 2; lower"),
        ({"gpus_per_replica": 3}, 2.0, r"a replica takes 3 GPUs of one machine .* no machine .* more than 2; lower"),
        (
            {"gpus_per_replica": 2},
            8.0,
            r"gpus_per_replica is 2, and tensor_parallel 4 takes .* raise the first to 4",
        ),
    ],
)
def test_ranks_that_no_machine_has_room_for_are_refused(options: dict[str, float], most_gpus: float, said: str) -> None:
    with pytest.raises(InvalidSettings, match=said):
        cluster_options(**options).gpus(Settings(tensor_parallel=4), most_gpus)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"replicas": 0}, r"replicas = 0: .*greater than or equal to 1"),
        ({"replicas": 4, "max_replicas": 2}, "max_replicas is 2, below replicas 4: raise the first or lower"),
        ({"replica": 2}, "replica = 2: Extra inputs are not permitted"),
    ],
)
def test_an_impossible_option_is_told_in_one_line(given: dict[str, int], said: str) -> None:
    with pytest.raises(InvalidSettings, match=said) as told:
        cluster_options(**given)
    assert "\n" not in str(told.value)


def test_unset_options_are_the_defaults() -> None:
    assert cluster_options(replicas=None, max_replicas=None) == cluster_options()


def test_the_settings_of_a_configuration_are_checked() -> None:
    with pytest.raises(InvalidSettings, match="max_waiting"):
        cluster_options(settings={"max_waiting": 0}).loaded()
