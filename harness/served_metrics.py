"""What the simulated cluster tells a Prometheus: vLLM's names, one ``engine`` a worker, so that its dashboards work."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from operator import attrgetter

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from keepwarm.replayers.cluster import Member
from keepwarm.replayers.job import SECOND, Running
from keepwarm.traces.shipped import shipped

LABELS = ("model_name", "engine")
REASONS = {"end": "stop", "tool": "stop", "limit": "length", "window": "length", "abort": "abort"}
TIMES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600, 1800)
TOKENS = tuple(digit * 10**power for power in range(7) for digit in (1, 2, 5))
NAMES = shipped("keepwarm.harness", "served_metrics.toml")
HISTOGRAMS = NAMES["histograms"] | {name: text for name, (_, _, text) in NAMES["spans"].items()}
_Family = type[CounterMetricFamily] | type[GaugeMetricFamily]
STATES: dict[str, _Family] = {"gauges": GaugeMetricFamily, "counters": CounterMetricFamily}


def _bounds(name: str) -> Sequence[float]:
    return TIMES if name.endswith("_seconds") else TOKENS


class Metrics(Collector):
    """What is told of one served model; times are the wall clock's, ``speed`` times as short as the cluster's. The
    workers are the cluster's ``members``.
    """

    def __init__(self, model: str, speed: float, members: Sequence[Member]) -> None:
        self._model = model
        self._second = SECOND * speed
        self._members = members
        self._counts: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
        self._sums: dict[tuple[str, str], float] = defaultdict(float)
        self._ended: Counter[tuple[str, ...]] = Counter()

    def over(self, running: Running, stop: str) -> None:
        """A call is over: the model's end, or ``abort`` by its client."""
        engine = running.worker or ""
        self._ended[engine, REASONS[stop]] += 1
        first_ns, done_ns = running.first_token_ns, running.done_ns
        if stop == "abort" or first_ns is None or done_ns is None:
            return
        output, prompt = running.job.output, running.job.prompt.end
        between = (done_ns - first_ns) / max(output - 1, 1) / self._second
        for name, (begin, end, _) in NAMES["spans"].items():
            self._add(name, engine, (getattr(running, end) - getattr(running, begin)) / self._second)
        self._add("inter_token_latency_seconds", engine, between, output - 1)
        self._add("request_time_per_output_token_seconds", engine, between)
        self._add("request_prompt_tokens", engine, prompt)
        self._add("request_generation_tokens", engine, output)
        self._add("request_prefill_kv_computed_tokens", engine, prompt - running.read)

    def _add(self, name: str, engine: str, value: float, times: int = 1) -> None:
        """Count a value, or so many equal ones, by the first bound that is not below it."""
        self._counts[name, engine][bisect_left(_bounds(name), value)] += times
        self._sums[name, engine] += value * times

    def collect(self) -> Iterator[Metric]:
        """The workers' state now, then what calls have added up to."""
        workers = [(str(one.index), one) for one in self._members]
        for kind in STATES:
            for figure, (field, text) in NAMES[kind].items():
                yield self._family(kind, figure, text, {(name,): attrgetter(field)(one) for name, one in workers})
        sources: dict[tuple[str, ...], int] = {(name, "local_cache_hit"): one.cached_tokens for name, one in workers}
        sources |= {(name, "local_compute"): one.prompt_tokens - one.cached_tokens for name, one in workers}
        yield self._family("counters", "prompt_tokens_by_source", "Prompt tokens.", sources, "source")
        yield self._family("counters", "request_success", "Requests ended.", self._ended, "finished_reason")
        for name, text in HISTOGRAMS.items():
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=LABELS)
            bounds = [*(str(float(bound)) for bound in _bounds(name)), "+Inf"]
            for engine, counts in ((engine, counts) for (of, engine), counts in self._counts.items() if of == name):
                upto = accumulate(float(counts[index]) for index in range(len(bounds)))
                buckets = list(zip(bounds, upto, strict=True))
                family.add_metric((self._model, engine), buckets=buckets, sum_value=self._sums[name, engine])
            yield family

    def _family(
        self, kind: str, name: str, text: str, told: Mapping[tuple[str, ...], float | None], *labels: str
    ) -> Metric:
        family = STATES[kind](f"vllm:{name}", text, labels=(*LABELS, *labels))
        for values, number in told.items():
            if number is not None:
                family.add_metric((self._model, *values), number)
        return family
