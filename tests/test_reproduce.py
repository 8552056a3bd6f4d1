"""The tables: what is measured stands beside the paper's figure, what is not reads "not run"; rows run by command."""

import json

import pytest
import yaml
from conftest import run
from test_train import small  # noqa: F401  (a fixture)

import reproduce_tables
import train_imagenet
from relabel.settings import load_settings


def finished_run(folder, epochs, top_1, last_epoch):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"optim.epochs": epochs}))
    lines = [{"epoch": epoch, "top_1": top_1} for epoch in range(last_epoch + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_tables_tell_paper_measured_and_difference(tmp_path):
    finished_run(tmp_path / "relabel_rn50", 2, 78.55, 1)
    finished_run(tmp_path / "baseline_rn50", 2, 70.0, 0)  # not finished
    results = [
        {"set": "ImageNet", "measure": "top-1 %", "value": 78.6},
        {"set": "ReaL", "measure": "multi-label %", "value": 85.5},
    ]
    (tmp_path / "relabel_rn50" / "evaluation.json").write_text(json.dumps({"results": results}))
    finished_run(tmp_path / "relabel_rn18", 2, 72.6, 1)
    lines = reproduce_tables.make_tables(tmp_path).splitlines()
    assert "| + ReLabel | 78.9 | 78.6 | -0.3 | 80.5 | not run |  | 85.0 | 85.5 | +0.5 | 86.1 | not run |  |" in lines
    assert "| ResNet-50 | 77.5 | not run |  | 79.0 | not run |  | 83.6 | not run |  | 85.3 | not run |  |" in lines
    architectures = "| 78.9 | 78.6 | -0.3 | 80.5 | not run |  | 85.0 | 85.5 | +0.5 | 86.1 | not run |  |"
    assert f"| ResNet-50 + ReLabel {architectures}" in lines  # the other columns: of the first table
    assert f"| ResNet-18 + ReLabel | 72.5 | 72.6 | +0.1 {'|  | not run |  ' * 3}|" in lines
    assert "| ResNet-18 + ReLabel + CutMix | 73.2 | not run |  |" in lines  # no figure in any other column


def test_a_column_is_shown_where_anything_is_measured(tmp_path):
    finished_run(tmp_path / "relabel_cutmix_rn50", 2, 80.0, 1)
    results = [{"set": "ImageNetV2 top-images", "measure": "top-1 %", "value": 81.5}]
    (tmp_path / "relabel_cutmix_rn50" / "evaluation.json").write_text(json.dumps({"results": results}))
    lines = reproduce_tables.make_tables(tmp_path).splitlines()
    assert "| ResNet-50 + ReLabel + CutMix | 80.2 | 80.0 | -0.2 |  | 81.5 |  |" in lines
    assert "| ResNet-18 + ReLabel + CutMix | 73.2 | not run |  |  | not run |  |" in lines


def test_rows_of_one_config_have_one_published_figure():
    for row in reproduce_tables.ALL_ROWS:
        assert tuple(reproduce_tables.published_of(row.config).values())[: len(row.published)] == row.published, row


def test_the_short_recipes_say_that_their_figures_are_of_averaged_flips(tmp_path):
    finished_run(tmp_path / "rn50_16_epochs_ema", 2, 74.0, 1)
    before, short = reproduce_tables.make_tables(tmp_path).split("### Short recipes")
    assert "ffcv-imagenet's" in short and "flip averaging at test" in short and before.count("one center crop") == 3
    assert "| 16 epochs | 73.8 | not run |  |" in short and "| 16 epochs + EMA |  | 74.0 |  |" in short


def test_every_row_has_a_config_with_its_number_of_the_paper(monkeypatch):
    for rows in reproduce_tables.TABLES.values():
        for row in rows:
            file = reproduce_tables.CONFIGS / f"{row.config}.yaml"
            if row.published:
                assert f"top-1 {row.published[0]} %" in file.read_text(), row
            monkeypatch.setattr("sys.argv", ["train_imagenet.py", "--config-file", str(file)])
            settings = load_settings(train_imagenet.Settings, "")
            assert settings.data.relabel.use == row.config.startswith(("relabel", "rn50_")), row
            assert settings.validation.lr_tta == (rows is reproduce_tables.TABLES[reproduce_tables.SHORT]), row


@pytest.mark.parametrize("cluster", ["here", "local"])
def test_missing_rows_are_trained_and_evaluated(small, tmp_path, cluster):  # noqa: F811
    more = {
        "model": {"arch": "shufflenet_v2_x0_5", "num_classes": 8},
        "data": {"train_dataset": f"{small}/train.beton", "val_dataset": f"{small}/val.beton", "image_size": 32},
        "optim": {"epochs": 1, "batch_size": 64},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(more))
    (tmp_path / "evaluate.yaml").write_text(yaml.safe_dump({"data": {"val": f"{small}/val"}}))
    arguments = [
        "--run", "--rows", "relabel_rn18", f"--runs={tmp_path}/runs", f"--train-settings={tmp_path}/train.yaml",
        f"--evaluate-settings={tmp_path}/evaluate.yaml", f"--cluster={cluster}", "--gpus=0",
    ]  # fmt: skip
    result = run("reproduce_tables.py", *arguments)
    assert result.returncode == 0, result.stderr
    value = reproduce_tables.measured(tmp_path / "runs" / "relabel_rn18")["ImageNet"]
    assert f"| ResNet-18 + ReLabel | 72.5 | {value:.1f} |" in (tmp_path / "runs" / "tables.md").read_text()
    if cluster == "here":
        again = run("reproduce_tables.py", *arguments)
        assert again.returncode == 0 and "$ train_imagenet.py" not in again.stdout  # finished rows are not repeated
        failing = run("reproduce_tables.py", *arguments, "--rows", "relabel_rn50", "--train-settings=nowhere.yaml")
        assert failing.returncode == 1 and "these rows failed: relabel_rn50" in failing.stderr
