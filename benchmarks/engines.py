"""The simulated cluster against the real engines: the same calls, how many tokens of each were cached.

    python benchmarks/engines.py vllm VENV TRACE -o RUN --scale 0.1 --length 16384 --blocks 1537
    python benchmarks/engines.py dynamo VENV TRACE -o RUN --workers 2 --at-once 4 --concurrent
    python benchmarks/engines.py again RUN

VENV is where the real engine is installed. Prompts go as token ids made of the trace's segments, so that two prompts
share exactly the tokens that the trace says they share; --scale makes a shorter trace of it first. The sessions that
run at once take turns with one call in flight, or are --concurrent. With --live later prompts repeat the answers that
were really given: vLLM's own, and Dynamo's mock workers are told to give the recorded ones. RUN keeps the trace and
what was heard, so that ``again`` needs no engine.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from random import Random
from time import perf_counter_ns
from typing import Any, NamedTuple

import httpx
import orjson
import served
from scaled import scaled

from keepwarm.replayers.cache import BlockCache
from keepwarm.replayers.cluster import Cluster
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.engine import Engine
from keepwarm.replayers.job import DONE, Job, Running
from keepwarm.replayers.plan import Planned, Schedule
from keepwarm.replayers.prompts import SessionPrompts, as_pieces, in_tree
from keepwarm.replayers.router import Router, View
from keepwarm.replayers.times import StepTimes
from keepwarm.replayers.tree import PromptTree
from keepwarm.traces.model import Call
from keepwarm.traces.store import TraceWriter, read_sessions

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from engines import Pool  # the oracle that the tests hold the cache against


class Asked(NamedTuple):
    """A call as the real engine did it. Times are ns since the run began."""

    call: str
    prompt: int
    output: int
    cached: int
    worker: str
    sent_ns: int
    done_ns: int


SETTLE_S = 0.03
"""With one call in flight the next waits so long: Dynamo's router hears of what a worker cached some ms after."""
Asking = Planned[tuple[Piece, ...]]


@cache
def token_ids(ident: int) -> Sequence[int]:
    """The tokens of a whole piece: of no two idents the same."""
    whole = ident & 0xFFFFFFFF
    return [3 + number % 15_900 for number in array("H", Random(ident).randbytes(2 * whole))]


class Words:
    """The token ids of prompts. Answers that were heard take the place of the recorded ones."""

    def __init__(self) -> None:
        self._heard: dict[tuple[str | None, int], list[int]] = {}

    def of(self, prompt: Iterable[Piece]) -> list[int]:
        """A prompt's token ids."""
        heard = self._heard
        pieces = ((heard.get((each.answer_of, each.ident)) or token_ids(each.ident), each.tokens) for each in prompt)
        return list(chain.from_iterable(islice(ids, tokens) for ids, tokens in pieces))

    def hear(self, answer: Iterable[Piece], ids: list[int]) -> None:
        """From now on these tokens, as far as they go, are the pieces that repeat an answer."""
        for piece in answer:
            mine, ids = ids[: piece.tokens], ids[piece.tokens :]
            self._heard[piece.answer_of, piece.ident] = mine + list(token_ids(piece.ident)[len(mine) :])


async def drive(
    sessions: list[list[Call]], engine: served.Engine, *, kind: str, at_once: int, concurrent: bool, live: bool
) -> list[Asked]:
    """Every call asked of a real engine, in the order in which they were sent."""
    schedule, words, asked = Schedule(sessions, at_once=at_once, gap_cap_ns=0), Words(), []
    begun = perf_counter_ns()

    async def one(planned: Asking) -> Call:
        prompt = words.of(planned.prompt)
        sent_ns = perf_counter_ns() - begun
        heard = await served.ask(client, engine, prompt, planned.output or 1, planned.call.call if live else None)
        if live:
            words.hear(planned.answer, heard.answer)
        times = sent_ns, perf_counter_ns() - begun
        await asyncio.sleep(0 if concurrent else SETTLE_S)
        asked.append(Asked(planned.call.call, heard.prompt, len(heard.answer), heard.cached, heard.worker, *times))
        return planned.call

    running: set[asyncio.Task[Call]] = set()
    async with httpx.AsyncClient(timeout=600, headers={"x-engine": kind}) as client:
        while True:
            while len(running) < (at_once if concurrent else 1) and schedule.next_due(len(asked)) is not None:
                planned = schedule.pop()
                schedule.started(planned.call, len(asked))
                running.add(asyncio.create_task(one(planned)))
            if not running:
                return sorted(asked, key=lambda each: each.sent_ns)
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                schedule.ended(task.result(), len(asked))
            print(f"\r{len(asked)} calls", end="", file=sys.stderr, flush=True)


def calls_of(sessions: Iterable[list[Call]]) -> dict[str, Asking]:
    """Every call as it is to be asked, by its name."""
    asking = {}
    for calls in sessions:
        prompts = SessionPrompts(calls, as_pieces)
        for call in calls:
            asking[call.call] = Planned(0, call, prompts.prompt(call), prompts.answer(call), call.output)
    return asking


def oracle(asked: list[Asked], calls: dict[str, Asking], *, block: int, blocks: int, live: bool) -> dict[str, int]:
    """Cached tokens by call, one after the other, of the block pool that the tests hold the cache against."""
    pools = {each.worker: Pool(block, blocks) for each in asked}
    told = {}
    for each in asked:
        prompt, answer = (
            _tokens(pieces) for pieces in (calls[each.call].prompt, calls[each.call].answer if live else ())
        )
        answer += [(each.call, at) for at in range(len(answer), each.output)]
        told[each.call] = pools[each.worker].serve(prompt, answer[: each.output])
    return told


def _tokens(pieces: Iterable[Piece]) -> list[Hashable]:
    """The tokens of pieces: of no two idents the same."""
    return [(piece.ident, at) for piece in pieces for at in range(piece.tokens)]


class Ties(Router):
    """Dynamo's router, which draws lots where workers cost the same; the lots fall as they really fell."""

    really = 0

    def choose(self, job: Job, views: Sequence[View], among: Sequence[int]) -> int:
        """The cheapest worker, of equals the one that was really chosen."""
        less = views[self.really]._replace(decode_blocks=views[self.really].decode_blocks - 1 / 1024)
        return super().choose(job, [less if at == self.really else view for at, view in enumerate(views)], among)


def cluster_of(meta: dict[str, Any], tree: PromptTree, router: Router) -> Cluster:
    """The simulated cluster like the engine of a run. Only vLLM has a block that it never uses; times are fitted."""
    block, capacity = meta["block"], meta["blocks"] - (meta["engine"] == "vllm")
    times = StepTimes(fixed_s=0.003)
    if meta["engine"] == "dynamo":
        fast = meta["speedup"]
        read_s = 0.039 / (block * capacity) / fast
        times = StepTimes(0.0058 / fast, 1.52e-5 / fast, 0.0, read_s, call_s=0.0107 / fast + 0.002)
    caches = [BlockCache(tree, block=block, capacity=capacity) for _ in range(meta["workers"])]
    return Cluster(tree, [Engine(each, times=times, max_seqs=16, max_batched=4096) for each in caches], router)


def simulated(
    sessions: Iterable[list[Call]], asked: list[Asked], meta: dict[str, Any], seed: int | None = None
) -> dict[str, Running]:
    """What becomes of the calls in the simulated cluster, asked as the real engine was; with a seed its own lots are
    drawn.
    """
    tree, now_ns = PromptTree(), 0
    lots = Ties("kv_aware", block=meta["block"])
    router: Router = lots if seed is None else Router("kv_aware", block=meta["block"], seed=seed)
    cluster = cluster_of(meta, tree, router)
    names = list(dict.fromkeys(each.worker for each in asked))
    really = {each.call: each for each in asked}
    schedule = Schedule(sessions, at_once=meta["at_once"], gap_cap_ns=0, grow=in_tree(tree))
    running: dict[Running, Call] = {}
    over: dict[str, Running] = {}
    while len(over) < len(asked):
        while len(running) < (meta["at_once"] if meta["concurrent"] else 1) and schedule.next_due(now_ns) is not None:
            planned = schedule.pop()
            schedule.started(planned.call, now_ns)
            each = really[planned.call.call]
            lots.really = names.index(each.worker)
            answer = planned.answer if meta["live"] else ()
            running[cluster.submit(Job(planned.prompt, each.output, answer), now_ns)] = planned.call
        now_ns = cluster.next_ns() or now_ns
        for event in cluster.advance(now_ns):
            if event.kind == DONE:
                call = running.pop(event.running)
                over[call.call] = event.running
                schedule.ended(call, now_ns)
    if seed is not None:
        return over
    same = sum(names[int(over[each.call].worker or 0)] == each.worker for each in asked)
    print(f"simulated: {same} of {len(asked)} calls on the same worker")
    return over


def compare(name: str, asked: list[Asked], told: dict[str, int]) -> None:
    """Print how often and how much the cached tokens that someone tells differ from those that the engine reported."""
    prompt, real, ours = sum(each.prompt for each in asked), sum(each.cached for each in asked), sum(told.values())
    off = [(at, each, told[each.call] - each.cached) for at, each in enumerate(asked) if told[each.call] != each.cached]
    equal = len(asked) - len(off)
    print(f"{name}: {equal} of {len(asked)} calls equal ({equal / len(asked):.2%}),", end=" ")
    print(f"hit_rate {ours / prompt:.2%}, really {real / prompt:.2%} ({(ours - real) / prompt * 100:+.2f} points)")
    for at, each, more in [] if name == "endless" else off[:12]:
        print(f"  call {at} {each.call}: prompt {each.prompt}, cached {each.cached}, told {more:+}")


def report(run: Path) -> None:
    """Compare what RUN holds."""
    meta = orjson.loads((run / "run.json").read_bytes())
    asked = [Asked(*row) for row in meta["asked"]]
    sessions = list(read_sessions(str(run / "trace.parquet")))
    calls = calls_of(sessions)
    pressed = sum(each.prompt - each.cached for each in asked) // meta["block"]
    print(f"{run}: {meta['engine']}, {meta['workers']} workers of {meta['blocks']} blocks of {meta['block']};", end=" ")
    print(f"blocks computed {pressed:,}; calls per worker {sorted(Counter(each.worker for each in asked).values())}")
    compare("simulated", asked, {call: job.read for call, job in simulated(sessions, asked, meta).items()})
    if meta["workers"] > 1:
        prompt = sum(each.prompt for each in asked)
        own = [sum(job.read for job in simulated(sessions, asked, meta, seed).values()) / prompt for seed in range(8)]
        print("lots of its own, eight seeds: hit_rate", ", ".join(f"{rate:.2%}" for rate in sorted(own)))
    told = partial(oracle, asked, calls, block=meta["block"], live=meta["live"])
    if not meta["concurrent"]:
        compare("oracle", asked, told(blocks=meta["blocks"] + (meta["engine"] == "dynamo")))
    compare("endless", asked, told(blocks=1 + sum((each.prompt + each.output) // meta["block"] + 1 for each in asked)))


def reply(planned: Asking) -> bytes:
    """The line by which a mock worker gives a call's recorded answer."""
    output, ids = planned.output or 1, Words().of(planned.answer)
    ids = (ids + [3] * (output - len(ids)))[:output]
    row = {"request_id": planned.call.call, "timestamp": 0, "input_length": 1, "output_length": output, "hash_ids": [0]}
    return orjson.dumps(row | {"output_token_ids": ids}) + b"\n"


def run_engine(args: argparse.Namespace) -> None:
    """Ask the real engine and write RUN."""
    sessions = scaled(islice(read_sessions(str(args.trace)), args.sessions), args.scale)
    longest = max(each.call.prompt_tokens + (each.output or 1) for each in calls_of(sessions).values())
    if longest > args.length:
        raise SystemExit(f"the longest call has {longest:,} tokens: --scale {args.scale * args.length / longest:.3f}")
    args.run.mkdir(parents=True, exist_ok=True)
    with TraceWriter(str(args.run / "trace.parquet"), producer="benchmark", version="0", tokens="exact") as trace:
        for calls in sessions:
            for call in calls:
                trace.add(call)
    shape: dict[str, Any] = {"block": args.block, "blocks": args.blocks, "length": args.length, "flags": args.flags}
    if args.engine == "dynamo":
        replies = args.run / "replies.jsonl" if args.live else None
        if replies:
            replies.write_bytes(b"".join(map(reply, calls_of(sessions).values())))
        start = partial(served.dynamo, workers=args.workers, speedup=args.speedup, replies=replies, **shape)
    else:
        start = partial(served.vllm, **shape)
    how = {"kind": args.engine, "at_once": args.at_once, "concurrent": args.concurrent, "live": args.live}
    with start(args.venv, args.port) as engine:
        asked = asyncio.run(drive(sessions, engine, **how))
    meta = shape | how | {"engine": args.engine, "workers": args.workers, "speedup": args.speedup}
    (args.run / "run.json").write_bytes(orjson.dumps(meta | {"asked": [tuple(each) for each in asked]}))


def main() -> None:
    """Read the options, ask, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=("vllm", "dynamo", "again"))
    parser.add_argument("paths", nargs="+", type=Path, metavar="VENV TRACE | RUN")
    parser.add_argument("-o", "--run", type=Path)
    parser.add_argument("--sessions", type=int)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=1537)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--concurrent", action="store_true")
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--speedup", type=float, default=1000)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--flags", default="", help="more flags for vLLM or Dynamo's frontend")
    args = parser.parse_args()
    args.flags = args.flags.split()
    if args.engine == "again":
        report(args.paths[0])
    else:
        args.venv, args.trace = args.paths
        run_engine(args)
        report(args.run)


if __name__ == "__main__":
    main()
