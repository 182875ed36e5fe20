"""A run as each tracker keeps it, in local files: skipped where its package is not installed."""

import time

import pytest

from penjing import watch
from penjing.errors import OutputError
from tests.raises import raises_case
from tests.watch.test_log import RUN


def log_run(where, events=RUN):
    with watch.open_log(where) as log:
        for event in events:
            log(event)


class TestMLflow:
    @pytest.fixture
    def store(self, tmp_path, monkeypatch):
        pytest.importorskip("mlflow.tracking")
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes ten seconds to be made
        return f"file:{tmp_path}/mlruns"

    def run(self, store, experiment="penjing"):
        from mlflow.tracking import MlflowClient

        client = MlflowClient(store)
        (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
        return client, run

    def test_a_run_has_its_parameters_curves_figures_and_verdict(self, store, capsys):
        log_run(f"mlflow:{store}")
        client, run = self.run(store)
        assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
        assert run.data.params["2 quantize.Static.weight_bits"] == "4" and run.data.params["seed"] == "3"
        assert run.data.metrics["latency_ms"] == 0.5 and run.data.metrics["openvino-int8/packed_bytes"] == 80
        history = client.get_metric_history(run.info.run_id, "training 1/loss")
        assert [(point.step, point.value) for point in history] == [(1, 0.7), (2, 0.4)]
        assert run.data.tags["met"] == "no" and run.data.tags["artifact"].endswith("/runs/first/artifact")
        assert capsys.readouterr().out == ""

    def test_a_run_that_breaks_off_has_failed_in_the_users_experiment(self, store, monkeypatch):
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
        log_run(f"mlflow:{store}", RUN[:4])
        _, run = self.run(store, "mine")
        assert run.info.status == "FAILED" and run.data.tags["failure"] == "the run did not come to its end"

    def test_a_recipe_of_hundreds_of_settings_and_any_text_is_taken(self, store):
        steps = [{"quantize.Static": {f"a[{i}]: é\n": "x" * 9000}} for i in range(150)]
        log_run(f"mlflow:{store}", [RUN[1] | {"recipe": steps}, RUN[-1]])
        _, run = self.run(store)
        assert len(run.data.params) == 150 + 6 and run.info.status == "FINISHED"

    @pytest.mark.parametrize("place", ["ftp://x", "http://127.0.0.1:9", "http://"])
    def test_a_place_that_is_none_is_told_before_the_run(self, store, place):
        with raises_case(OutputError, "log") as caught:
            watch.open_log(f"mlflow:{place}")
        assert place in caught.value.got and "mlflow server" in caught.value.remedy

    def test_a_store_of_files_needs_mlflows_leave(self, store, monkeypatch):
        monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
        with raises_case(OutputError, "log"):
            watch.open_log(f"mlflow:{store}")


class TestTensorBoard:
    def test_a_run_has_a_folder_with_curves_figures_and_texts(self, tmp_path):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        log_run(f"tensorboard:{tmp_path / 'new' / 'tb'}")
        read = EventAccumulator(str(tmp_path / "new" / "tb" / "first"))
        read.Reload()
        loss = [(event.step, round(event.value, 4)) for event in read.Scalars("training 1/loss")]
        assert loss == [(1, 0.7), (2, 0.4)]
        assert read.Scalars("latency_ms")[0].value == 0.5 and read.Scalars("openvino-int8/drop")
        text = read.Tensors("parameters/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "| 2 quantize.Static.weight_bits | 4 |" in text
        assert read.Tensors("met/text_summary") and read.Scalars("hparam/latency_ms")

    def test_a_folder_that_can_not_be_written_is_told_before_the_run(self, tmp_path):
        pytest.importorskip("tensorboard")
        (tmp_path / "file").write_text("")
        with raises_case(OutputError, "log"):
            watch.open_log(f"tensorboard:{tmp_path / 'file'}")
        with raises_case(OutputError, "unwritable"):
            watch.open_log(f"tensorboard:{tmp_path / 'file' / 'below'}")


class TestWandb:
    @pytest.fixture
    def wandb(self, tmp_path, monkeypatch):
        package = pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_DIR", str(tmp_path))
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        yield package
        package.teardown()

    def test_a_run_is_written_offline_with_parameters_figures_and_verdict(self, wandb, tmp_path, capsys):
        log = watch.open_log("wandb:demo")
        run = log._tracker._run
        for event in RUN[:-1]:
            log(event)
        assert run.name == "first" and run.project == "demo" and run.offline
        assert run.config["2 quantize.Static.weight_bits"] == 4
        assert run.summary["openvino-int8/latency_ms"] == 0.5 and run.summary["training 1/loss"] == 0.4
        log(RUN[-1])
        (folder,) = (tmp_path / "wandb").glob("offline-run-*")
        file, deadline = next(folder.glob("run-*.wandb")), time.monotonic() + 30
        while b"none meets it" not in file.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.1)  # another process writes it
        data = file.read_bytes()
        assert b"training 1/loss" in data and b"none meets it" in data
        assert capsys.readouterr().out == ""

    def test_a_name_that_is_no_project_is_told_before_the_run(self, wandb):
        with raises_case(OutputError, "log"):
            watch.open_log("wandb:a:b%")

    def test_a_server_that_is_not_there_is_told_before_the_run(self, wandb, monkeypatch):
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        wandb.teardown()
        with raises_case(OutputError, "log") as caught:
            watch.open_log("wandb:demo")
        assert "WANDB_MODE=offline" in caught.value.remedy
