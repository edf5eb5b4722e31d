"""The simulated cluster against the real engines: the same calls, how many tokens of each were cached.

    python benchmarks/engines.py vllm VENV TRACE -o RUN --scale 0.1 --length 16384 --blocks 1537
    python benchmarks/engines.py dynamo VENV TRACE -o RUN --workers 2 --at-once 4 --concurrent
    python benchmarks/engines.py again RUN
    python benchmarks/engines.py spread RUN [RUN ...] [--draws 200]

VENV is where the real engine is installed. Prompts go as token ids made of the trace's segments, so that two prompts
share exactly the tokens that the trace says they share; --scale makes a shorter trace of it first. The sessions that
run at once take turns with one call in flight, or are --concurrent. With --live later prompts repeat the answers that
were really given: vLLM's own, and Dynamo's mock workers are told to give the recorded ones. RUN keeps the trace and
what was heard, so that ``again`` needs no engine. With --runs N it keeps N runs, of a new engine each, and ``spread``
holds their hit rates against those of --draws simulated runs with lots of their own: where a router draws lots, one
run says little. It also tells each real run to the simulator, its lots or where all its calls went, for a comparison
without that chance.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from functools import cache, partial
from itertools import chain, islice, pairwise
from pathlib import Path
from random import Random
from statistics import fmean
from time import perf_counter_ns
from typing import Any

import httpx
import orjson
import served
from likeness import Asked, Fell, as_it_fell, as_sent, by_lot
from spread import described_mean, fair, held_against

from keepwarm.replayers.arrivals import Arrival
from keepwarm.replayers.endpoint import Piece
from keepwarm.replayers.plan import Planned, Schedule
from keepwarm.replayers.prompts import SessionPrompts, as_pieces
from keepwarm.traces.model import Call
from keepwarm.traces.scaled import scaled
from keepwarm.traces.store import TraceWriter, read_sessions

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from oracles import Pool  # the oracle that the tests hold the cache against

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
    sessions: list[list[Call]],
    engine: served.Engine,
    *,
    kind: str,
    at_once: int,
    concurrent: bool,
    live: bool,
    late_ms: int,
) -> list[Asked]:
    """Every call asked of a real engine, in the order in which they were sent."""
    schedule: Schedule[tuple[Piece, ...]] = Schedule(map(Arrival, sessions), at_once=at_once, gap_cap_ns=0)
    words, asked = Words(), list[Asked]()
    begun, lots = perf_counter_ns(), Random()

    async def one(planned: Asking) -> Asking:
        prompt = words.of(planned.prompt)
        await asyncio.sleep(lots.random() * late_ms / 1000)
        sent_ns = perf_counter_ns() - begun
        heard = await served.ask(client, engine, prompt, planned.output or 1, planned.call.call if live else None)
        if live:
            words.hear(planned.answer, heard.answer)
        times = sent_ns, perf_counter_ns() - begun
        await asyncio.sleep(0 if concurrent else SETTLE_S)
        asked.append(Asked(planned.call.call, heard.prompt, len(heard.answer), heard.cached, heard.worker, *times))
        return planned

    running: set[asyncio.Task[Asking]] = set()
    async with httpx.AsyncClient(timeout=600, headers={"x-engine": kind}) as client:
        if late_ms:  # all that is slow only once; prompts of one token leave no block
            for planned in calls_of(sessions).values():
                words.of(planned.prompt)
            await asyncio.gather(*(served.ask(client, engine, [3], 1) for _ in range(2 * at_once)))
        while True:
            while len(running) < (at_once if concurrent else 1) and schedule.next_due(len(asked)) is not None:
                planned = schedule.pop()
                schedule.started(planned, len(asked))
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
    fell = as_it_fell(sessions, asked, meta)
    print(f"simulated: {len(asked) - len(fell.moved)} of {len(asked)} calls on the same worker")
    compare("simulated", asked, fell.cached)
    if meta["workers"] > 1:
        sent = as_sent(sessions, asked, meta)
        compare("told what went where and when", asked, sent.cached)
        print(f"went to a worker dearer than another: {len(sent.router.apart)} of {len(asked)} calls")
        own = [by_lot(sessions, asked, meta, seed) for seed in range(8)]
        print("lots of its own, eight seeds: hit_rate", ", ".join(f"{rate:.2%}" for rate in sorted(own)))
    of_pool = partial(oracle, asked, calls, block=meta["block"], live=meta["live"])
    if not meta["concurrent"]:
        compare("oracle", asked, of_pool(blocks=meta["blocks"] + (meta["engine"] == "dynamo")))
    compare(
        "endless", asked, of_pool(blocks=1 + sum((each.prompt + each.output) // meta["block"] + 1 for each in asked))
    )


def spread(folders: Iterable[Path], draws: int) -> None:
    """Hold the hit rates of many real runs of one setting against those of as many simulated ones as asked."""
    runs = sorted(path for folder in folders for path in folder.glob("**/run.json"))
    metas = [{"late_ms": 0} | orjson.loads(path.read_bytes()) for path in runs]
    heard = [[Asked(*row) for row in meta.pop("asked")] for meta in metas]
    meta, asked, sessions = metas[0], heard[0], list(read_sessions(str(runs[0].with_name("trace.parquet"))))
    if any(each != meta for each in metas) or len({tuple(sorted(each[:3] for each in run)) for run in heard}) > 1:
        raise SystemExit("the runs are not of one setting and trace")
    print(f"{len(asked)} calls, {meta['at_once']} sessions at once, {meta}")
    real = [sum(each.cached for each in run) / sum(each.prompt for each in run) for run in heard]
    print("real, in turn:", " ".join(f"{rate * 100:.2f}" for rate in real))
    own = [by_lot(sessions, asked, meta, seed) for seed in range(draws)]
    held_against(own, real)
    sent = [as_sent(sessions, run, meta) for run in heard]
    halves(heard, sent)
    if not meta["concurrent"]:
        with_its_lots(sessions, heard, meta, sent, fmean(own) - fmean(real))


def halves(heard: list[list[Asked]], sent: list[Fell]) -> None:
    """Print what each half of the simulator makes of real runs: the workers, told where calls went and when, and the
    router, told what the workers had; and how its lots fell.
    """
    calls, equal = sum(map(len, heard)), sum(each.equal(run) for each, run in zip(sent, heard, strict=True))
    apart = sum(len(each.router.apart) for each in sent)
    off = described_mean([each.off(run) for each, run in zip(sent, heard, strict=True)])
    print(f"workers, told what went where and when: {equal} of {calls} calls equal, hit rates {off}")
    print(f"router, told what workers had: {calls - apart} of {calls} calls went where it would have sent them")
    lots = [each.router.lots for each in sent]
    drawn, again = Counter(chain(*lots)), [one == other for run in lots for one, other in pairwise(run)]
    print(f"lots by worker {sorted(drawn.items())}, p {fair(drawn[0], drawn.total()):.2f};", end=" ")
    print(f"as the one before {sum(again)} of {len(again)}, p {fair(sum(again), len(again)):.2f}")


def with_its_lots(
    sessions: list[list[Call]], heard: list[list[Asked]], meta: dict[str, Any], sent: list[Fell], apart: float
) -> None:
    """Print what differs from each real run if its lots fall in the simulator too, and which calls strayed. Of the
    difference of the means, ``apart``, the rest is the lots'.
    """
    fell = [as_it_fell(sessions, run, meta) for run in heard]
    off = [each.off(run) for each, run in zip(fell, heard, strict=True)]
    equal = [each.equal(run) for each, run in zip(fell, heard, strict=True)]
    print(
        f"told its lots: {sum(equal)} of {sum(map(len, heard))} calls equal, {equal.count(len(heard[0]))} runs wholly;"
    )
    print(f"  simulated - real, run by run: {described_mean(off)}; the lots' part {(apart - fmean(off)) * 100:+.2f}")
    strays = [(number, call) for number, each in enumerate(sent) for call in each.router.apart]
    kept = [one for number, one in enumerate(off) if number not in dict(strays)]
    print(f"  without the {len(off) - len(kept)} runs in which calls strayed: {described_mean(kept)}")
    for number, name in strays:
        at, one = next((at, each) for at, each in enumerate(heard[number]) if each.call == name)
        print(f"  run {number} ({off[number] * 100:+.2f}): call {at} {name}, prompt {one.prompt}, cached {one.cached}")


def reply(planned: Asking) -> bytes:
    """The line by which a mock worker gives a call's recorded answer."""
    output, ids = planned.output or 1, Words().of(planned.answer)
    ids = (ids + [3] * (output - len(ids)))[:output]
    row = {"request_id": planned.call.call, "timestamp": 0, "input_length": 1, "output_length": output, "hash_ids": [0]}
    return orjson.dumps(row | {"output_token_ids": ids}) + b"\n"


def run_engine(args: argparse.Namespace) -> None:
    """Ask the real engine and write RUN."""
    sessions = list(scaled(islice(read_sessions(str(args.trace)), args.sessions), args.scale))
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
        start: Any = partial(served.dynamo, workers=args.workers, speedup=args.speedup, replies=replies, **shape)
    else:
        start = partial(served.vllm, **shape)
    how = {"kind": args.engine, "at_once": args.at_once, "concurrent": args.concurrent, "live": args.live}
    how["late_ms"] = args.late_ms
    with start(args.venv, args.port) as engine:
        asked = asyncio.run(drive(sessions, engine, **how))
    meta = shape | how | {"engine": args.engine, "workers": args.workers, "speedup": args.speedup}
    (args.run / "run.json").write_bytes(orjson.dumps(meta | {"asked": [tuple(each) for each in asked]}))


def main() -> None:
    """Read the options, ask, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=("vllm", "dynamo", "again", "spread"))
    parser.add_argument("paths", nargs="+", type=Path, metavar="VENV TRACE | RUN ...")
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
    parser.add_argument("--late-ms", type=int, default=0, help="send each call so much late at most, by lot")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--draws", type=int, default=200, help="simulated runs of a spread")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--flags", default="", help="more flags for vLLM or Dynamo's frontend")
    args = parser.parse_args()
    args.flags = args.flags.split()
    if args.engine == "again":
        report(args.paths[0])
    elif args.engine == "spread":
        spread(args.paths, args.draws)
    else:
        args.venv, args.trace = args.paths
        run, one = args.run, args.runs == 1
        for number in range(args.runs):
            args.run = run if one else run / f"{number:02}"
            run_engine(args)
        report(run) if one else spread([run], args.draws)


if __name__ == "__main__":
    main()
