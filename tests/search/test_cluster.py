"""Trials on a local Ray cluster."""

import socket
import threading
import time

import psutil
import pytest

import penjing as pj
from penjing.errors import TrainingError, UsageError
from penjing.train import cluster
from tests.raises import raises_case
from tests.search.test_search import GOAL, OPTIONS, network, task

pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def nodes():
    """Two nodes of two processors each, on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    both = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    both.add_node(num_cpus=1)
    ray.init(address=both.address, logging_level="ERROR", log_to_driver=False)
    yield both
    ray.shutdown()
    both.shutdown()


def carries_a_trial(process):
    try:
        return "ray::_carry_out" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def kill_one(killed, seconds=60):
    """Kill the first process that is seen carrying a trial out."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not killed:
        for process in filter(carries_a_trial, psutil.process_iter()):
            process.kill()
            killed.append(process.pid)
            break
        time.sleep(0.02)


def test_two_nodes_share_a_study(nodes, tmp_path):
    done = pj.compress(network(), task(), GOAL, trials=5, out=tmp_path, cluster=nodes.address, **OPTIONS)
    rows = done.record.search.trials
    assert [row.number for row in rows] == list(range(5)) and all(row.measured for row in rows)
    assert done.met and done.record.search.chosen in range(5)
    overlapping = [a for a in rows for b in rows if a.number < b.number and b.began_s < a.began_s + a.seconds - 0.5]
    assert overlapping  # both worked at the same time


def test_a_lost_worker_s_trial_is_tried_again(nodes, tmp_path):
    killed = []

    def kill(event):
        if event["kind"] == "trial" and event["number"] == 2:
            threading.Thread(target=kill_one, args=(killed,), daemon=True).start()

    done = pj.compress(
        network(), task(), GOAL, trials=4, out=tmp_path, cluster=nodes.address, listeners=[kill], **OPTIONS
    )
    assert killed
    assert len(done.record.search.trials) == 4 and not [row for row in done.record.search.trials if row.failure]


def test_an_address_that_does_not_answer_is_told_within_ten_seconds(tmp_path):
    events = []
    with raises_case(TrainingError, "unreachable"):
        pj.compress(
            network(), task(), GOAL, trials=2, out=tmp_path / "run", cluster="127.0.0.1:9",
            listeners=[events.append], **OPTIONS,
        )  # fmt: skip
    assert not events and not (tmp_path / "run").exists()  # before anything was computed


def answers_with(reply):
    """The address of a server that sends this to whoever connects."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with server, server.accept()[0] as connection:
            connection.sendall(reply)
            time.sleep(1)

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_what_is_silent_or_no_cluster_is_told(monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_S", 0.3)
    for reply, word in ((b"", "timed out"), (b"HTTP/1.1 200 OK", "not Ray")):
        with raises_case(TrainingError, "unreachable") as caught:
            cluster.answers(f"ray://{answers_with(reply)}")
        assert word in str(caught.value.got)
    assert cluster.answers(answers_with(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))))  # as gRPC begins


def test_a_cluster_that_runs_answers(nodes):
    assert cluster.answers(nodes.address)
    assert not cluster.answers("auto")  # no address that could be asked


def test_a_cluster_belongs_to_a_search(tmp_path):
    with raises_case(UsageError, "no-budget"):
        pj.compress(network(), task(), GOAL, out=tmp_path / "run", cluster="auto", **OPTIONS)
