"""The hardware presets: held against published throughput, against the claims they repeat, and against common sense."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import orjson
import pytest

from keepwarm.harness.cli import main
from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.engine import Engine
from keepwarm.replayers.hardware import HARDWARE, Hardware, capacity_tokens, step_times
from keepwarm.replayers.job import SECOND, Job
from keepwarm.replayers.router import Router
from keepwarm.replayers.times import StepTimes, read_times
from keepwarm.replayers.tree import PromptTree
from keepwarm.traces.errors import InputError
from keepwarm.traces.shipped import shipped
from keepwarm.traces.store import read_outcome_table

ENTRIES = shipped("keepwarm.replayers", "hardware.toml")["hardware"]
EVERY = pytest.mark.parametrize("hardware", HARDWARE.values(), ids=list(HARDWARE))


@pytest.mark.parametrize("name", HARDWARE)
def test_every_entry_says_where_it_is_from(name: str) -> None:
    """Source and date stand in every entry; whoever has no price of their own says so, or that it is a claim."""
    hardware, entry = HARDWARE[name], ENTRIES[name]
    assert hardware.source and entry["about"] and entry["dated"] <= date.today()
    assert hardware.hour_usd is not None or "no price" in hardware.source
    assert hardware.claimed == ("Rubin" in entry["about"] or "without the claim" in entry["about"])


@EVERY
def test_speeds_are_of_the_right_size(hardware: Hardware) -> None:
    """A lone call gets a hundred to a thousand tokens a second, prompts are read at fifty thousand to five million,
    links beat computing, and many long prompts fit.
    """
    decode = hardware.decode_times or hardware.times
    assert 100 < 1 / (decode.fixed_s + decode.decode_s + 50_000 * decode.kv_s) < 1100
    assert 50_000 < 1 / hardware.times.prefill_s < 5e6
    assert 1 < hardware.host_tps * hardware.times.prefill_s < 200
    assert hardware.handover_tps * hardware.times.prefill_s > 1
    assert hardware.capacity_tokens > 3e6
    assert (hardware.decode_capacity_tokens is None) == (hardware.decode_times is None)


@pytest.mark.parametrize(("hardware", "workers"), [("h100", 2), ("vera-rubin-groq3-lpx", 1), (None, 1)])
def test_a_simulated_run_on_hardware_costs_its_hours(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, hardware: str | None, workers: int
) -> None:
    """Two workers of 8 H100 for as long as the run took in virtual time, over the sessions completed; where no price
    was found, or no hardware was meant, there is none.
    """
    trace, run = str(tmp_path / "t.parquet"), str(tmp_path / "run")
    on = ["--hardware", hardware] if hardware else []
    on += ["--decode-workers", "1"] if hardware == "vera-rubin-groq3-lpx" else []
    for command in (
        ["synth", "demo", "--sessions", "2", "-o", trace],
        ["simulate", trace, "-o", run, "--workers", str(workers), *on],
        ["report", run, "--json"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert not stop.value.code
        out = capsys.readouterr().out
    told = orjson.loads(out)["cost"]
    ends = read_outcome_table(f"{run}/outcomes.parquet", ["done_ns", "due_ns"]).to_pydict()
    hours = (max(ends["done_ns"]) - min(ends["due_ns"])) / 3600 / SECOND
    money = hours * 2 * 49.24 if hardware == "h100" else None
    assert told["gpu_hours"] == (pytest.approx(16 * hours) if money else None)
    assert told["gpu_money"] == (pytest.approx(money) if money else None)
    assert told["gpu_cost_per_completed_task"] == (pytest.approx(money / 2) if money else None)


PUBLISHED = {  # NVIDIA, TensorRT-LLM performance overview, v1.0, Llama 3.3 70B FP8: answer tokens a second, all GPUs
    ("h100", 2): {(1000, 1000): 4205, (2048, 128): 762, (5000, 500): 898, (20000, 2000): 437},
    ("h200", 1): {(1000, 1000): 2909, (2048, 128): 442, (5000, 500): 566, (20000, 2000): 283},
}
GPUS = {"h100": (1.979, 3.35, 80.0), "h200": (1.979, 4.8, 141.0)}


@pytest.mark.parametrize(("gpu", "gpus"), PUBLISHED)
def test_full_batches_come_near_published_throughput(gpu: str, gpus: int) -> None:
    """The derivation, on the GPUs that were measured, gives the measured throughput but for a third of it."""
    pflops, memory_tb_s, memory_gb = GPUS[gpu]
    tokens, times = capacity_tokens(memory_gb, gpus), step_times(pflops, memory_tb_s, gpus=gpus)
    for (prompt, output), published in PUBLISHED[gpu, gpus].items():
        tree = PromptTree()
        engine = Engine(BlockCache(tree, block=64, capacity=tokens // 64), times=times, max_seqs=2048)
        cluster = Cluster(tree, [engine], Router("round_robin", block=64))
        jobs = 3 * tokens // (prompt + output)
        for ident in range(jobs):
            cluster.submit(Job(tree.extend(tree.root, [Piece(ident + 1, prompt, "user")]), output), 0)
        now_ns = 0
        while (next_ns := cluster.next_ns()) is not None:
            cluster.advance(now_ns := next_ns)
        assert 0.65 < jobs * output * SECOND / now_ns / published < 1.2, (prompt, output)


def test_the_claims_hold_as_claimed() -> None:
    """Vera Rubin at full batches: ten times GB200's tokens per watt, each at a tenth of the price, for prompts and for
    answers; the same chips by their datasheet alone stay below that. A lone call is not ten times as fast.
    """
    blackwell, claimed = HARDWARE["gb200-nvl72"], HARDWARE["vera-rubin-nvl72"]
    datasheet = HARDWARE["vera-rubin-nvl72-datasheet"]
    watts = ENTRIES["vera-rubin-nvl72"]["rack_kw"] / ENTRIES["gb200-nvl72"]["rack_kw"]
    assert blackwell.hour_usd and claimed.hour_usd
    for field in ("prefill_s", "decode_s", "kv_s"):
        slow, fast, plain = (getattr(each.times, field) for each in (blackwell, claimed, datasheet))
        assert slow / fast / watts == pytest.approx(10)
        assert claimed.hour_usd * fast / (blackwell.hour_usd * slow) == pytest.approx(0.1)
        assert slow / plain == pytest.approx(22 / 8 if field == "kv_s" else 16.7 / 5)
    assert 1 < blackwell.times.fixed_s / claimed.times.fixed_s < 2


def test_answers_on_sram_read_kv_for_next_to_nothing_and_hold_little() -> None:
    """Rubin prefills and LPX decodes: KV is read 200 times as fast as from Rubin's HBM, and 128 GB less the weights
    holds a few long prompts.
    """
    both, rubin = HARDWARE["vera-rubin-groq3-lpx"], HARDWARE["vera-rubin-nvl72-datasheet"]
    assert both.decode_times is not None and both.decode_capacity_tokens is not None
    assert both.times == rubin.times
    assert rubin.times.kv_s / both.decode_times.kv_s == pytest.approx(256 * 150 / (8 * 22))
    assert 200_000 < both.decode_capacity_tokens < 400_000


def test_times_are_read_back_and_what_is_not_known_is_nothing(tmp_path: Path) -> None:
    """A file of times: null and missing parts are 0."""
    file = tmp_path / "times.json"
    file.write_text('{"format": 1, "fixed_s": 0.01, "prefill_s": 1e-5, "kv_s": null, "fitted": {"calls": 9}}')
    assert read_times(file) == StepTimes(0.01, 1e-5, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[]", '"format": 1'),
        ('{"fixed_s": 1}', '"format": 1'),
        ('{"format": 2, "fixed_s": 1}', '"format": 1'),
        ('{"format": 1, "fixed_s": -1}', "'fixed_s' is -1"),
        ('{"format": 1, "kv_s": "fast"}', "'kv_s' is 'fast'"),
        ('{"format": 1, "kv_s": true}', "'kv_s' is True"),
        ('{"format": 1, "kv_s": 1e999}', "not JSON"),
        ('{"format": 1}', "no times"),
    ],
)
def test_a_wrong_file_of_times_is_told_in_one_line(tmp_path: Path, text: str, told: str) -> None:
    """The line names the file and what is wrong with it."""
    file = tmp_path / "times.json"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        read_times(file)
    assert str(file) in str(error.value) and told in str(error.value) and "\n" not in str(error.value)


def test_times_that_are_not_there_are_told(tmp_path: Path) -> None:
    """A missing file, and a directory in its place."""
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_times(path)


def test_the_table_of_the_docs_is_the_data() -> None:
    """docs/hardware.md shows every entry with the speeds that the data gives."""
    text = (Path(__file__).parents[1] / "docs" / "hardware.md").read_text()
    for name, each in HARDWARE.items():
        decode = each.decode_times or each.times
        price = "none found" if each.hour_usd is None else f"${each.hour_usd:.2f}"
        speeds = f"{1 / each.times.prefill_s:,.0f} | {1 / decode.fixed_s:,.0f} | {each.capacity_tokens / 1e6:.1f}"
        assert f"| `{name}` | {speeds} | {price} |" in text
