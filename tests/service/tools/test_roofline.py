"""`ottava roofline`, run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import pytest
from typer.testing import CliRunner

from benchmarks.roofline import draw
from quant.analysis.gpus import GPUS
from quant.analysis.roofline import SHAPES, StepShape, predict
from service.cli import app
from service.errors import UnsupportedModel
from service.tools.roofline import find_shape
from tests.support.tiny_models import make_config, save_tiny_model

ROOT = Path(__file__).parents[3]
H100 = "NVIDIA H100 80GB HBM3"


class Roofline(Protocol):
    def __call__(self, *arguments: object) -> tuple[int, str, str]: ...


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> Roofline:
    """Run the command: exit code, stdout, stderr."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments: object) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, ["roofline", *map(str, arguments)], env={"COLUMNS": "100"})
        return done.exit_code, done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny") / "tiny")
    for path in folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    return folder


def result(
    path: Path,
    rows: list[dict[str, Any]],
    device: str = H100,
    command: str = "python -m benchmarks.serving --shape llama-3.1-8b --steps 48",
    num_gpus: int = 1,
) -> Path:
    run = {"device": device, "command": command} | ({"tensor parallel": num_gpus} if num_gpus > 1 else {})
    path.write_text(json.dumps({"run": run, "rows": rows}))
    return path


def test_a_folder_needs_its_config_alone(roofline: Roofline, tiny_folder: Path) -> None:
    code, out, err = roofline(tiny_folder, "--tokens", "1,300")
    assert (code, err) == (0, "")
    assert "1 token: 1 request decoding, 512 tokens in the cache" in out
    assert "300 tokens: 1 prompt of 300 tokens" in out
    assert all(word in out for word in ("qkv", "gate_up", "step", "INT8, FP16 I/O", "op/byte", "memory"))
    assert max(map(len, out.splitlines())) <= 100


def test_its_shape_is_read_as_the_decoder_reads_it(tiny_folder: Path) -> None:
    shape = find_shape(str(tiny_folder))
    config = json.loads((tiny_folder / "config.json").read_text())
    assert shape.num_layers == config["num_hidden_layers"]
    assert shape.linears()["down"] == (config["hidden_size"], config["intermediate_size"])


@pytest.mark.parametrize("name", ["gpt2", "qwen3_moe"])
def test_a_layer_that_it_does_not_count_is_refused(name: str, tmp_path: Path) -> None:
    make_config(name).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"the roofline of family '{name}' is not served"):
        find_shape(str(tmp_path))


def test_the_tables_fit_100_columns_and_say_where_int8_pays(roofline: Roofline) -> None:
    code, out, _ = roofline("llama-3.1-8b", "--gpu", "h100", "--tokens", "1,16,256,4096")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 100
    assert "4096 tokens: 8 prompts of 512 tokens" in out
    said = " ".join(out.split())
    assert "INT8 dataflow against FP16: 1.86x at 1, 1.77x at 16, 1.30x at 256, 1.92x at 4096 tokens" in said
    assert "turn from memory- to compute-bound at" in said


def test_the_json_has_a_row_for_every_part_and_dataflow(roofline: Roofline, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert roofline("llama-3.1-8b", "--tokens", "16,4096", "--bandwidth", "measured", "--json", path)[0] == 0
    found = json.loads(path.read_text())
    assert set(found) == {"model", "gpu", "num_gpus", "steps", "rows"}
    assert (found["model"]["name"], found["gpu"]["bytes_per_s"]) == ("llama-3.1-8b", 3.02e12)
    assert [(step["tokens"], step["num_requests"]) for step in found["steps"]] == [(16, 16), (4096, 8)]
    assert len(found["rows"]) == 2 * 8 * 3
    keys = {"tokens", "part", "n", "k", "calls", "flow", "operations", "bytes", "normalized_operations", "intensity"}
    keys |= {"link_bytes"}
    assert {tuple(sorted(row)) for row in found["rows"]} == {tuple(sorted(keys | {"bound", "us", "speedup"}))}
    gpu = GPUS["h100"].with_bandwidth("measured")
    wanted = predict(SHAPES["llama-3.1-8b"], StepShape(16, 512, False), gpu)
    assert [row["us"] for row in found["rows"][:24]] == pytest.approx([1e6 * row.time_s for row in wanted])


def test_several_gpus_share_the_work_and_the_links_are_counted(roofline: Roofline, tmp_path: Path) -> None:
    decode = {"what": "decode", "variant": "w8a8", "batch": 16, "prompt": 512, "itl_ms_p50": 3.0}
    path, alone = tmp_path / "r.json", result(tmp_path / "alone.json", [decode])
    shared = result(tmp_path / "shared.json", [decode | {"itl_ms_p50": 2.0}], num_gpus=2)
    asked = ("llama-3.1-8b", "--tokens", "16", "--gpus", "2", "--measured", alone, "--measured", shared, "--json", path)
    code, out, _ = roofline(*asked)
    assert code == 0
    assert "16 tokens: 16 requests decoding, 512 tokens in the cache of each; each of 2 GPUs" in out
    assert max(map(len, out.splitlines())) <= 110
    assert "Sums over 2 GPUs, in FP16 at 450 GB/s a direction" in " ".join(out.split())
    found = json.loads(path.read_text())
    sums = [row for row in found["rows"] if row["part"] == "all_reduce"]
    assert [(row["calls"], row["link_bytes"], row["bound"]) for row in sums] == [(65, 2 * 16 * 4096, "link")] * 3
    assert [row["measured_us"] for row in found["rows"] if "measured_us" in row] == [2000.0]
    assert roofline(*asked[:-2], "--link", "64", "--json", path)[0] == 0
    slow = [row for row in json.loads(path.read_text())["rows"] if row["part"] == "all_reduce"]
    assert slow[0]["us"] / sums[0]["us"] == pytest.approx(450 / 64)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--gpus", "3"), "gpus 3 does not divide llama-3.1-8b with 32 heads, 8 key and value heads and 14336 columns"),
        (("--link", "fast"), "link 'fast' is not known; give data-sheet or a number of GB/s in one direction"),
    ],
)
def test_what_several_gpus_cannot_be(roofline: Roofline, asked: tuple[str, str], said: str) -> None:
    code, _, err = roofline("llama-3.1-8b", *asked)
    assert code == 1
    assert said in " ".join(err.split())


def test_the_plot_is_drawn_from_the_json(roofline: Roofline, tmp_path: Path) -> None:
    measured = result(tmp_path / "m.json", [{"what": "linear", "n": 6144, "k": 4096} | W8A8_16])
    path = tmp_path / "r.json"
    assert roofline("llama-3.1-8b", "--json", path, "--measured", measured)[0] == 0
    draw(json.loads(path.read_text()), tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


W8A8_16 = {"tokens": 16, "variant": "w8a8", "us_p50": 10.0}


def test_what_was_measured_stands_beside(roofline: Roofline, tmp_path: Path) -> None:
    """A Linear by its size, a decode step by batch and prompt, a prefill by its rate; anything else is left out."""
    rows: list[dict[str, Any]] = [
        {"what": "linear", "n": 6144, "k": 4096} | W8A8_16,
        {"what": "linear", "n": 6144, "k": 4096} | W8A8_16 | {"variant": "fp16", "us_p50": 25.0},
        {"what": "linear", "n": 6144, "k": 4096} | W8A8_16 | {"variant": "gemlite"},
        {"what": "linear", "n": 4096, "k": 4096, "tokens": 16, "variant": "w8a8", "absent": "no GPU"},
        {"what": "goal", "text": "fp16/int8"},
        {"what": "decode", "variant": "w8a8", "batch": 16, "prompt": 512, "itl_ms_p50": 4.0},
        {"what": "decode", "variant": "fp16", "batch": 16, "prompt": 64, "itl_ms_p50": 5.0},
        {"what": "prefill", "variant": "fp16", "batch": 4, "prompt": 512, "tokens_per_s": 4e4},
        {"what": "prefill", "variant": "w8a8", "batch": 4, "prompt": 512, "tokens_per_s": 8e4},
    ]
    path = tmp_path / "r.json"
    measured = result(tmp_path / "m.json", rows)
    code, out, _ = roofline("llama-3.1-8b", "--tokens", "16,4096", "--json", path, "--measured", measured)
    assert code == 0
    assert "measured us" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 100
    found = {(row["part"], row["tokens"], row["flow"]): row for row in json.loads(path.read_text())["rows"]}
    measured_us = {key: row["measured_us"] for key, row in found.items() if "measured_us" in row}
    assert measured_us == {
        ("qkv", 16, "fp16"): 25.0,
        ("qkv", 16, "dataflow"): 10.0,
        ("step", 16, "dataflow"): 4000.0,
        ("step", 4096, "fp16"): pytest.approx(102400.0),
        ("step", 4096, "dataflow"): pytest.approx(51200.0),
    }
    assert found["qkv", 16, "dataflow"]["measured_speedup"] == 2.5
    assert found["step", 16, "dataflow"]["measured_speedup"] is None
    assert found["step", 4096, "dataflow"]["measured_speedup"] == pytest.approx(2)


def test_a_step_of_another_model_is_not_set_beside(roofline: Roofline, tmp_path: Path) -> None:
    row = {"what": "decode", "variant": "w8a8", "batch": 16, "prompt": 512, "itl_ms_p50": 4.0}
    measured = result(tmp_path / "m.json", [row])
    code, out, _ = roofline("llama-2-13b", "--tokens", "16", "--measured", measured)
    assert (code, "measured" in out) == (0, False)


def test_the_kept_result_of_the_h100_is_read(roofline: Roofline) -> None:
    kept = ROOT / "benchmarks/results/serving-llama-3.1-8b-h100.json"
    (row,) = (
        row
        for row in json.loads(kept.read_text())["rows"]
        if (row["what"], row["variant"], row["batch"]) == ("decode", "w8a8", 1)
    )
    code, out, _ = roofline("llama-3.1-8b", "--tokens", "1", "--bandwidth", "measured", "--measured", kept)
    assert code == 0
    measured = [f"{1000 * row['itl_ms_p50']:.0f}", f"{row['speedup']:.2f}"]
    (step,) = (words for words in map(str.split, out.splitlines()) if words[:3] == ["INT8", "dataflow", "15.29"])
    assert step[-2:] == measured


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("weight=channel,activation=input-channel", "the scale s_k varies with the summed index k and does not leave"),
        ("weight=input-channel,activation=token", "weight=input-channel is not practical"),
        ("weight=channel,activation=float", "never one by the other"),
    ],
)
def test_an_impractical_scheme_exits_with_2_and_the_reason(roofline: Roofline, scheme: str, said: str) -> None:
    code, out, err = roofline("llama-3.1-8b", "--scheme", scheme)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_a_practical_scheme_is_explained_before_the_tables(roofline: Roofline) -> None:
    code, out, err = roofline("llama-3.1-8b", "--tokens", "1", "--scheme", "weight=channel,activation=token")
    assert (code, err) == (0, "")
    assert out.startswith("practical: y_tn = a_t b_n sum_k x_tk w_nk: no scale varies with k, so one int8 GEMM")
    assert "op/byte" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "v100"], "gpu 'v100' is not known; choose one of a100, h100"),
        (["--tokens", "1,,2"], "tokens '1,,2' is not a list of positive numbers"),
        (["--tokens", "0"], "tokens '0' is not a list of positive numbers"),
        (["--tokens", "1.5"], "tokens '1.5'"),
        (["--bandwidth", "fast"], "bandwidth 'fast' is not known"),
        (["--gpu", "l4", "--bandwidth", "measured"], "no copy rate was measured for l4"),
        (["--scheme", "w8a8"], "is not of the form weight=channel,activation=token"),
        (["--scheme", "weight=channel,activation=head"], "activation = 'head' is no granularity"),
        (["--measured", "/no/such/file"], "/no/such/file"),
        (["--json", "/no/such/folder/r.json"], "/no/such/folder/r.json"),
    ],
    ids=str,
)
def test_a_bad_value_is_told_in_one_line(roofline: Roofline, arguments: list[str], said: str) -> None:
    code, out, err = roofline("llama-3.1-8b", *arguments)
    assert (code, out) == (1, "")
    assert said in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"run": 1}', '{"run": {"device": "h100"}, "rows": []}'])
def test_a_file_that_is_no_result(roofline: Roofline, tmp_path: Path, content: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(content)
    code, _, err = roofline("llama-3.1-8b", "--measured", path)
    assert (code, "is not a result of benchmarks.kernels or benchmarks.serving" in err) == (1, True)


def test_a_result_of_another_gpu_is_refused(roofline: Roofline, tmp_path: Path) -> None:
    path = result(tmp_path / "m.json", [], device="NVIDIA L40S")
    code, _, err = roofline("llama-3.1-8b", "--measured", path)
    assert code == 1
    assert "was measured on NVIDIA L40S, and h100 is predicted; name its GPU with --gpu" in err
    assert roofline("llama-3.1-8b", "--gpu", "l40s", "--measured", path)[0] == 0


def test_a_model_that_nobody_knows(roofline: Roofline) -> None:
    code, _, err = roofline("owner/model")
    assert code == 1
    assert "owner/model is neither a folder nor one of smollm2-135m, qwen2.5-7b, llama-3.1-8b" in err
