"""How fast a configuration trains here: views/s, step time by part, share of the arithmetic's peak, peak memory.

python pretrain/bench.py quickstart.yaml
python pretrain/bench.py quickstart.yaml --against plain compute.precision=fp32
python pretrain/bench.py quickstart.yaml --processes 1,2,4 --json
python pretrain/bench.py data quickstart.yaml

Images are random and already in memory: the loader is measured by `bench.py data`. `--against plain` needs a checkout:
it runs the tests' transcription, which works as the published code does, in turn with ours.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import os
import socket
import statistics
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from configs.errors import UserError, run

if TYPE_CHECKING:
    from configs.schema import PretrainConfig


def measure(config: PretrainConfig, *, against: str | None, rounds: int) -> dict[str, Any]:
    """All figures of one rank (collective); see docs/benchmarks.md for what they mean."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the launcher does, before torch reads it
    import torch

    from pretrain import distributed, timing, workloads

    ranks = distributed.join()
    distributed.check_divides(config.batch_size, ranks.world_size)
    dtype = torch.bfloat16 if config.compute.precision == "bf16" else torch.float32
    ours = workloads.Ours(config, ranks)
    steps: dict[str, timing.Step] = {"ours": ours.step}
    if against == "plain":
        plain = workloads.Plain(config, ranks, ours)
        steps |= {"plain fp32": plain.step_in(torch.float32), "plain bf16": plain.step_in(torch.bfloat16)}
    peaks: list[float] = []
    beside = timing.beside_peaks(ours.step, ranks.device, dtype, peaks)
    measured = timing.interleaved({**steps, "ours": beside}, ranks.device, rounds=rounds)
    del peaks[0]  # of the step that warmed up
    views = ours.num_views * config.batch_size
    flops = 3 * ours.flops_per_view() * views / ranks.world_size
    speeds = [flops / seconds for seconds in measured["ours"].steps_s]
    share = statistics.median(speed / peak for speed, peak in zip(speeds, peaks, strict=True))
    result: dict[str, Any] = {
        "config": config.name, "model": config.model.name, "batch_size": config.batch_size,
        "precision": config.compute.precision, "processes": ranks.world_size, "threads": torch.get_num_threads(),
        "device": str(ranks.device), "torch": torch.__version__, "kernels": ours.kernels, "rounds": rounds,
        "gflops": round(statistics.median(speeds) / 1e9, 2), "peak_gflops": round(statistics.median(peaks) / 1e9, 2),
        "best_peak_gflops": round(max(peaks) / 1e9, 2), "share_of_peak": round(share, 4),
    }  # fmt: skip
    for name, values in measured.items():
        result[name] = values.as_dict(views) | {
            "peak_mib": round(timing.peak_bytes(steps[name], ranks.device) / 2**20, 1)
        }
    if against == "plain":
        best = min(measured["plain fp32"].step_s, measured["plain bf16"].step_s)
        reference = measured["plain fp32"].step_s if config.compute.precision == "fp32" else best
        result["times_faster"] = round(reference / measured["ours"].step_s, 2)
        result["share_of_memory"] = round(result["ours"]["peak_mib"] / result["plain fp32"]["peak_mib"], 3)
        result["features_times_faster"] = round(plain.features_s(rounds) / ours.features_s(rounds), 2)
    distributed.leave()
    return result


def scaling(arguments: Sequence[str], counts: Sequence[int]) -> list[dict[str, Any]]:
    """The same configuration on 1, 2, ... processes of this machine, the cores shared among them."""
    results = []
    for count in counts:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        threads = str(max(1, len(os.sched_getaffinity(0)) // count))
        place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
        command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--json"]
        processes = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, text=True,
                env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]  # fmt: skip
        outputs = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            raise UserError(f"a benchmark process of {count} failed; its message is above")
        results.append(json.loads(outputs[0].splitlines()[-1]))
    return results


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        f"{result['model']}, batch {result['batch_size']}, {result['precision']}, {result['processes']} process(es) of "
        f"{result['threads']} thread(s) on {result['device']}; kernels: {', '.join(result['kernels']) or 'no choice'}"
    ]
    for name in ("ours", "plain fp32", "plain bf16"):
        if name in result:
            row = result[name]
            parts = "  ".join(f"{part} {ms:.1f}" for part, ms in row["parts_ms"].items() if ms >= 0.05)
            speed = f"{row['views_per_s']:9.1f} views/s {row['step_ms']:9.1f} ms"
            lines.append(f"{name:11s}{speed}: {parts}; {row['peak_mib']:.0f} MiB")
    lines.append(
        f"{result['gflops']:.0f} GFLOP/s per process, {result['share_of_peak']:.0%} of the product peak in the same "
        f"type beside each step (median {result['peak_gflops']:.0f}, best {result['best_peak_gflops']:.0f})"
    )
    if "times_faster" in result:
        lines.append(
            f"{result['times_faster']:.1f} times faster than plain, features {result['features_times_faster']:.1f} "
            f"times; {result['share_of_memory']:.0%} of its memory"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["data"]:
        from pretrain.data import bench as loader_bench

        return loader_bench.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="bench.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", help="YAML of a pretraining run, or its name in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--against", choices=["plain"], help="run the published way of working in turn with ours")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each kind (default 5)")
    parser.add_argument("--processes", help="scaling over processes of this machine, such as 1,2,4")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    args = parser.parse_intermixed_args(arguments)
    from configs.loader import load
    from configs.schema import PretrainConfig

    config = load(args.config, args.overrides)
    if not isinstance(config, PretrainConfig) or config.views is None:
        raise UserError(f"{args.config} trains on no images (job: {config.job}): bench measures pretraining")
    if args.against and config.task.name != "simclr":
        raise UserError(f"--against {args.against} is for task simclr, which {args.config} is not")
    if args.rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {args.rounds}")
    if args.processes:
        keep = [args.config, *args.overrides, "--rounds", str(args.rounds)]
        counts = [int(count) if count.isdecimal() else 0 for count in args.processes.split(",")]
        if 0 in counts:
            raise UserError(f"--processes takes numbers from 1 on, such as 1,2,4, not {args.processes}")
        results = scaling(keep, counts)
    else:
        results = [measure(config, against=args.against, rounds=args.rounds)]
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(results if args.processes else results[0]) if args.json else "\n\n".join(map(table, results)))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
