"""Serve models to everybody who speaks OpenAI's API, and a web page to talk to them.

    python scripts/serve_openai_api.py                                     # out/full_sft on http://127.0.0.1:8000
    python scripts/serve_openai_api.py --load_from out/full_sft out/pretrain --lora out/lora_identity
    curl http://127.0.0.1:8000/v1/models

Needs more packages than training does: pip install -r requirements-serve.txt. Adapters belong to the first
model. A model is called as its folder is. Ctrl-C, or SIGTERM, ends open answers properly before it stops.
"""

import argparse
import errno
import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ROOT, Parser, add_rope_scaling, count, positive, run_script
from common.errors import UsageError

PACKAGES = ("fastapi", "uvicorn", "pydantic", "llguidance")
port = count


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("the models").add_argument
    add("--load_from", nargs="+", type=Path, default=[ROOT / "out" / "full_sft"], metavar="DIR",
        help="models: folders, or .pth files")
    add("--lora", nargs="+", default=[], metavar="DIR", help="adapters of the first model: folders or names")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights")
    add("--quantize", choices=("none", "int8"), default="none", help="int8: in 8 bits, faster on a CPU")
    add("--compile", action="store_true",
        help="decode with C++ compiled for this CPU")
    add_rope_scaling(add)
    add = parser.add_argument_group("decoding").add_argument
    add("--max_batch_size", type=count, default=32, metavar="N", help="answers that are decoded together")
    add("--cache_gb", type=positive, default=1.0, metavar="GB",
        help="memory for keys and values of all of them; what does not fit waits. Texts that have ended keep "
             "up to a quarter more, for prompts that begin like them")
    add("--max_waiting", type=count, default=1024, metavar="N",
        help="answers that may wait; others are refused")
    add = parser.add_argument_group("who may ask").add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0: other machines, too")
    add("--port", type=int, default=8000, metavar="N", help="0: any that is free")
    add("--api_key", metavar="KEY", help="every call must bring it: Authorization: Bearer KEY")
    add("--allowed_hosts", nargs="+", default=[], metavar="NAME",
        help="names by which this machine may be called, beside its addresses and localhost")
    add("--allowed_origins", nargs="+", default=[], metavar="URL",
        help="other servers whose pages may call it")
    add("--max_body_mb", type=positive, default=4.0, metavar="MB", help="a longer request is refused")
    add("--body_seconds", type=positive, default=30.0, metavar="S",
        help="in which the head of a request must arrive, and then its body; who reads nothing of an answer "
             "for so long is left")
    add("--max_connections", type=count, default=2048, metavar="N", help="further ones are refused")
    add("--grace_seconds", type=positive, default=5.0, metavar="S", help="for open answers, when it stops")
    add("--log_prompts", action="store_true",
        help="print each request on stderr, which may hold private words")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 65536:
        parser.error(f"--port must be from 0 to 65535, not {args.port}")
    if args.api_key is not None and not args.api_key.strip():
        parser.error("--api_key needs a key, not an empty one")
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        parser.error(f"the server needs {', '.join(missing)}: pip install -r requirements-serve.txt")
    if missing := [path for path in args.load_from if not path.exists()]:
        parser.error(f"--load_from: there is no {missing[0]}; python trainer/train_full_sft.py makes one")
    return args


def main(args: argparse.Namespace) -> None:
    import socket
    from functools import partial

    import uvicorn

    from inference.api import make_app
    from inference.engine import Engine
    from inference.manners import LimitedConnection

    if args.host not in ("127.0.0.1", "::1", "localhost") and args.api_key is None:
        print(f"warning: everybody who reaches {args.host} can use this server: --api_key asks for a key",
              file=sys.stderr)
    engine = Engine(args.load_from, args.lora, max_rows=args.max_batch_size, max_waiting=args.max_waiting,
                    cache_bytes=int(args.cache_gb * 2**30), device=args.device, dtype=args.dtype,
                    quantize=args.quantize, rope_scaling=args.rope_scaling, compile=args.compile)
    app = make_app(engine, api_key=args.api_key, hosts=args.allowed_hosts, origins=args.allowed_origins,
                   max_body_bytes=int(args.max_body_mb * 2**20), body_seconds=args.body_seconds,
                   log_prompts=args.log_prompts)

    class Server(uvicorn.Server):
        def handle_exit(self, number, frame) -> None:
            engine.close(args.grace_seconds)
            super().handle_exit(number, frame)

    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    # With the protocol named, asyncio sends small pieces at once (TCP_NODELAY) and does not gather them.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
        listener.listen()  # now, so that a second server finds the port taken
    except OSError as error:
        advice = "; --port 0 takes any that is free" if error.errno == errno.EADDRINUSE else ""
        place = f"--host {args.host} --port {args.port}"
        raise UsageError(f"{place} can't be used: {error.strerror}{advice}") from None
    allow_open_files(args.max_connections + 100)
    engine.load()
    for lane in engine.lanes:
        for report in lane.chat_model.reports:
            print(report, file=sys.stderr)
    address = f"[{args.host}]" if ":" in args.host else args.host
    print(f"serving {', '.join(engine.names)} at http://{address}:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=int(args.grace_seconds + 5),
                            access_log=False, server_header=False, ws="none",
                            http=partial(LimitedConnection, seconds=args.body_seconds,
                                         max_connections=args.max_connections))
    Server(config).run(sockets=[listener])
    engine.close(0)
    engine.thread.join(args.grace_seconds)


def allow_open_files(wanted: int) -> None:
    """A connection is an open file, of which many systems let a process have few unless it asks for more."""
    try:
        import resource  # there is none on Windows
    except ImportError:
        return
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY or allowed >= wanted:
        return
    if most != resource.RLIM_INFINITY and most < wanted:
        print(f"warning: this system allows {most:,} open files, and so fewer than {wanted - 100:,} "
              "connections: ulimit -n", file=sys.stderr)
        wanted = most
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


if __name__ == "__main__":
    run_script(main, parse_args())
