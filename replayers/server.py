"""Server is what an endpoint is and can do, found out by asking it: who it is, what it takes, how its tokens count."""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import httpx
import orjson

from keepwarm.replayers.address import Address, base_url
from keepwarm.replayers.blocks import Block, label
from keepwarm.replayers.endpoint import Answer
from keepwarm.replayers.http import DIALECTS, HttpEndpoint
from keepwarm.replayers.sse import part, string
from keepwarm.replayers.text import IDS, WORDS, PromptText
from keepwarm.replayers.tokens import Costs, Spelled, calibrate
from keepwarm.traces.errors import InputError

LONG = 2_100
"""Words of a prompt that every cache with a least length of 2,048 tokens or less takes."""
SALTS = ("one", "two", "three", "four", "five")
CONTEXTS = ("max_model_len", "context_window", "max_input_tokens")
TRIES = 3
AGAIN_S = 1.0
PASSING = ("overloaded", "rate_limit")
USER = Block("user", WORDS[0])


class Learned(NamedTuple):
    """What an endpoint takes in one dialect (see HttpEndpoint), what its prompts cost, and whether it tells what was
    read from its cache and written: ``reported``, ``inferred`` or ``absent``.
    """

    accepts: frozenset[str]
    costs: Costs
    reads: str
    writes: str

    def told(self) -> dict[str, Any]:
        """It as run.json has it."""
        return self._asdict() | {"accepts": sorted(self.accepts), "costs": self.costs.told()}


def _long(endpoint: HttpEndpoint, costs: Costs) -> list[Block]:
    """A prompt that nobody has asked yet, marked for caches that keep what is marked."""
    text = PromptText(salt=secrets.token_hex(4), words=costs.words, ids=endpoint.dialect == "completions")
    return [Block("user", text.fragment(1, LONG), ttl_s=300)]


async def isolates(endpoint: HttpEndpoint, costs: Costs) -> bool:
    """Whether another ``cache_salt`` makes an endpoint's cache cold: each of some, for one may reach another worker."""
    long = _long(endpoint, costs)
    answers = [await _ask(endpoint, long, {"cache_salt": salt}) for salt in ("one", *SALTS)]
    return bool(answers[1].cache_read) and all(answer.cache_read == 0 for answer in answers[2:])


async def greet(endpoint: HttpEndpoint) -> Answer:
    """The answer to the smallest prompt; from then on the endpoint's limit on outputs has the name that it takes."""
    answer = await _ask(endpoint, [USER])
    if answer.error == "bad_request" and "max_completion_tokens" in (answer.told or ""):
        endpoint.accepts |= {"max_completion_tokens"}
        answer = await _ask(endpoint, [USER])
    return answer


async def learn(endpoint: HttpEndpoint, *, words: Sequence[bytes] = WORDS) -> Learned:
    """Ask an endpoint small prompts until it is known. InputError where it refuses all, or tells no prompt tokens."""
    first = small = await greet(endpoint)
    if first.error is not None or first.prompt is None:
        raise InputError(f"endpoint {endpoint.dialect}: {refusal(first)}")
    endpoint.accepts |= await _accepted(endpoint)
    costs = Costs(tools=False)
    if endpoint.dialect != "completions":
        costs = await calibrate(partial(_count, endpoint), tools="tools" in endpoint.accepts, words=words)
    long = _long(endpoint, costs)
    first = await _ask(endpoint, long)
    written = sum(each or 0 for each in (first.cache_write_5m, first.cache_write_1h, first.cache_write_other))
    for _ in range(TRIES):  # another of several workers may answer
        again = await _ask(endpoint, long)
        if again.cache_read or again.error is not None:
            break
    again = again if again.error is None else small  # a small context has no room for it
    reads = "absent" if again.cache_read is None else "reported"
    idle = bool(again.cache_read) and not written  # it tells zeros whatever it writes, as Dynamo does
    return Learned(frozenset(endpoint.accepts), costs, reads, "inferred" if idle else again.write_source)


def refusal(answer: Answer) -> str:
    """Why an endpoint could not be asked, in words."""
    if answer.error is None:
        return "answers without telling prompt tokens: nothing of a replay could be checked"
    if answer.error == "reset" and answer.status == 200:
        return "ends its answer before a stream's end: if it does not stream, --no-stream"
    words = {"timeout": "takes a request and gives no answer in time", "reset": "breaks the connection off"}
    words["auth"] = "refuses the API key, or wants one (--key-env NAME or --key-file FILE)"
    status = f"status {answer.status}" if answer.status else "no answer"
    told = " ".join((answer.told or "").split())[:200]
    return words.get(answer.error) or f"refuses a small prompt: {answer.error}, {status}: {told}"


async def _ask(endpoint: HttpEndpoint, blocks: Sequence[Block], fields: Mapping[str, Any] | None = None) -> Answer:
    """The answer to a probe, tried again where the endpoint is busy."""
    if endpoint.dialect == "completions":
        blocks = [block if block.text[:1].isdigit() else block._replace(text=IDS[0]) for block in blocks]
    for _ in range(TRIES):
        answer = await endpoint.ask(blocks, fields=fields)
        if answer.error not in PASSING:
            break
        await asyncio.sleep(AGAIN_S)
    return answer


async def _accepted(endpoint: HttpEndpoint) -> frozenset[str]:
    """What is not refused. That no tool is called is asked for only where the tools stay in the prompt, or where tools
    are refused without it.
    """
    tool, none = Block("tool", WORDS[0], label(0)), DIALECTS[endpoint.dialect].no_tool
    tries: dict[str, tuple[list[Block], dict[str, Any]]] = {
        "exact_output": ([USER], {"min_tokens": 1, "ignore_eos": True}),
        "cache_key": ([USER], {"prompt_cache_key": "keepwarm"}),
    }
    if none is not None:
        tries |= {"tools": ([tool, USER], {}), "no_tool_call": ([tool, USER], {"tool_choice": none})}
    answers = await asyncio.gather(*(_ask(endpoint, blocks, fields) for blocks, fields in tries.values()))
    taken = {name: answer.prompt for name, answer in zip(tries, answers, strict=True) if answer.error is None}
    if "tools" in taken and taken.get("no_tool_call") != taken["tools"]:
        taken.pop("no_tool_call", None)
    return frozenset(taken) | frozenset({"tools"} if "no_tool_call" in taken else ())


async def _count(endpoint: HttpEndpoint, probe: Spelled) -> int:
    """A probe's tokens."""
    blocks, numbers = [], {role: count() for role in ("tool", "use", "result")}
    if "tools" in endpoint.accepts and probe[0][0] != "tool":
        blocks.append(Block("tool", WORDS[0], label(0)))
    for role, words in probe:
        name = label(next(numbers[role])) if role in numbers else ""
        blocks.append(Block(role, b" ".join((WORDS[0], *words)), name))
    answer = await _ask(endpoint, blocks)
    if answer.error is not None or answer.prompt is None:
        shape = " ".join(role for role, _ in probe)
        raise InputError(f"endpoint {endpoint.dialect}: a prompt of {shape}: {refusal(answer)}")
    return answer.prompt


def known_words(tokenizer: str | None) -> Sequence[bytes]:
    """The words that are one token each to a tokenizer's file, all of them without one."""
    if tokenizer is None:
        return WORDS
    try:
        from tokenizers import Tokenizer  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise InputError("--tokenizer needs the package tokenizers: pip install 'keepwarm[tokenizer]'") from error
    try:
        made = Tokenizer.from_file(tokenizer)
    except Exception as error:
        raise InputError(f"{tokenizer}: expected a tokenizer.json: {str(error)[:80]}") from error

    def tokens(*words: bytes) -> int:
        return len(made.encode(b" ".join(words).decode(), add_special_tokens=False).ids)

    good = [word for word in WORDS if tokens(WORDS[0], word) == tokens(WORDS[0]) + 1]
    if len(good) < 64:
        raise InputError(f"{tokenizer}: {len(good)} of {len(WORDS)} common words are one token each, expected 64")
    return good


def client(address: Address, timeout_s: float = 5.0) -> httpx.Client:
    """For what is not hot: requests below an endpoint's base URL."""
    verify: Any = True if address.tls is None else address.tls
    base = base_url(address.url)
    return httpx.Client(base_url=base, headers=address.headers, timeout=timeout_s, trust_env=False, verify=verify)


def identify(address: Address, *, timeout_s: float = 5.0) -> dict[str, Any]:
    """What listens at a URL, None where it does not say: ``server`` and its ``version``, its ``speed``, the cache's
    ``ttl``, ``block``, ``capacity`` and ``rules``, and the ``model`` if it serves a single one, the ``context`` it
    takes. InputError if nothing listens, or what does is no endpoint.
    """
    base = base_url(address.url)
    where = f"endpoint {base.scheme}://{base.netloc.decode()}"
    headers = {name: value for name, value in address.headers.items() if name != "anthropic-version"}
    with client(address._replace(headers=headers), timeout_s) as asking:
        try:
            answers = [asking.get(path) for path in ("health", "v1/models", "version")]
            if answers[1].is_client_error:  # not before: Dynamo tells Anthropic's clients less
                answers[1] = asking.get("v1/models", headers=address.headers)
        except httpx.RequestError as error:
            raise InputError(f"{where}: {_unanswered(error, timeout_s)}") from error
    if answers[1].status_code in (401, 403):
        raise InputError(f"{where}: refuses the API key, or wants one (--key-env NAME or --key-file FILE)")
    faults = [_unusable(answer) for answer in answers]
    if all(faults[:2]):
        raise InputError(f"{where}: is no endpoint: GET /v1/models gave {faults[1]}, GET /health {faults[0]}")
    health, models, version = map(_json, answers)
    listed = models["data"] if isinstance(models.get("data"), list) else []
    served = [model for model in listed if isinstance(model, dict) and string(model.get("id"))]
    ours, cache = string(health.get("server")), part(health, "cache")
    first = served[0] if served else {}
    server = ours or _maker(first, version)
    told = health if ours else _schema(address, timeout_s) if server == "dynamo" else version
    return {
        "server": server,
        "version": string(told.get("version")),
        "speed": health.get("speed") if ours else None,
        **{name: cache.get(name) for name in ("ttl", "block", "capacity", "rules")},
        "model": first.get("id") if len(served) == 1 else None,
        "context": next((first[name] for name in CONTEXTS if first.get(name)), None),
    }


def _maker(model: Mapping[str, Any], version: Mapping[str, Any]) -> str | None:
    """Whose server lists a model so."""
    owner = string(model.get("owned_by"))
    return owner if owner in ("vllm", "sglang") else "dynamo" if owner == "nvidia" else "vllm" if version else None


def _schema(address: Address, timeout_s: float) -> Mapping[str, Any]:
    """What an endpoint's own description says of it, which takes some servers a while to write."""
    with suppress(httpx.RequestError), client(address, timeout_s) as asking:
        return part(_json(asking.get("openapi.json")), "info")
    return {}


def _unanswered(error: httpx.RequestError, timeout_s: float) -> str:
    """Why there was no answer: nobody, nothing in time, no TLS, or something that is no HTTP."""
    if isinstance(error, httpx.TimeoutException):
        return f"no answer within {timeout_s:g} s"
    if isinstance(error, httpx.ConnectError):
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return "its certificate is not trusted: --ca FILE names one that is"
        return "what listens there does not speak TLS as it should" if "SSL" in str(error) else "nothing answers there"
    return "what listens there gave no HTTP answer"


def _unusable(response: httpx.Response) -> str | None:
    """What of an answer no endpoint gives: a server's error, or a page. A path that is unknown or not allowed is."""
    if response.status_code >= 500 and response.status_code != 501:
        return f"status {response.status_code}"
    if response.is_success and not _json(response):
        return f"{response.headers.get('content-type') or 'something'} that is no JSON object"
    return None


def _json(response: httpx.Response) -> dict[str, Any]:
    with suppress(orjson.JSONDecodeError):
        if response.is_success and isinstance(value := orjson.loads(response.content), dict):
            return value
    return {}
