"""Downloads data sets and weights that others publish. Data becomes JSONL, as all our scripts read it.

    python scripts/get_data.py --list                                    # names, licences, what they are for
    python scripts/get_data.py minimind-sft-mini                         # out/data/minimind-sft-mini.jsonl
    python scripts/get_data.py minimind-sft-mini --mirror modelscope     # the same from another host
    python scripts/get_data.py tinystories --max_records 100000 --yes    # a part, and no question
    python scripts/get_data.py smollm2-135m-instruct                     # a folder for --load_from

Size and licence are shown before anything is downloaded, and a terminal is asked. A download that was cut off
goes on where it stopped when the same command runs again. Every file is checked by the size and the hash that
the host itself states. The result appears whole or not at all.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import DISK_IS_FULL, ROOT, Parser, count, run_script
from common.errors import DataError, RunError, UsageError
from common.files import json_text, one_line, publish, remove, write_whole, writing

MIRRORS = {"hf-mirror": "https://hf-mirror.com", "modelscope": "https://www.modelscope.cn"}
TIMEOUT = 20  # seconds without a byte, after which a connection counts as broken
ATTEMPTS = 6  # in a row that bring no new byte
WAIT = 1.0  # seconds before the second of them; twice as long before each further one
LONGEST_WAIT = 60  # seconds, where a host itself says how long to wait (Retry-After)
PARQUET_GROWS = 3  # a guess at how much larger the text of a .parquet file is, to ask for disk space
SAFE_NAME = re.compile(r"(?!.*\.\.)[\w.-]+(/[\w.-]+)*")  # no name may lead out of our folder
HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # of a file in git, and the sha256 of a large file
OTHER = "try later, or another host (--mirror hf-mirror, --mirror modelscope)"
REFUSED = "accept its terms on the host's page, log in with `hf auth login`, and name no --mirror"
ANSWERS = {401: REFUSED, 403: REFUSED,
           404: "it was moved, or this host does not have it; look at its page, or name another --mirror"}
NO_DATA = ("{} sends something else than was asked for, perhaps the web page of a proxy or of a login: open "
           "it in a browser, or name another --mirror")


class Source(NamedTuple):
    """An entry of data_sources.json. No size and no hash is in that file: the host states them."""

    kind: str  # text, chats, pairs, prompts or weights
    use: str
    repository: str
    modelscope: str  # the repository there; "" where none is known
    licence: str
    files: list[str]  # patterns; a name without * must be there
    tried: bool  # whether somebody of this project has downloaded it


class RemoteFile(NamedTuple):
    """A file as the host describes it. hash: "" where the host states none."""

    name: str
    url: str
    size: int
    hash: str


SOURCES = {name: Source(**entry) for name, entry in
           json.loads((ROOT / "scripts" / "data_sources.json").read_text("utf-8")).items()}


def main(args):
    if args.list or args.name is None:
        for name, source in SOURCES.items():
            print(f"{name:24}{source.use}\n{'':24}{source.repository}: {', '.join(source.files)}\n{'':24}"
                  f"licence: {source.licence}; {'tried' if source.tried else 'not tried'}")
        return
    source = SOURCES[args.name]
    part = f"-{args.max_records}" if args.max_records else ""
    target = args.out_dir / (args.name if source.kind == "weights" else f"{args.name}{part}.jsonl")
    if (target / "config.json" if source.kind == "weights" else target).exists():
        print(f"{target} is there already: delete it to download it again")
        return
    if any(pattern.endswith(".parquet") for pattern in source.files) and not find_spec("pyarrow"):
        raise UsageError(f"{args.name} is published as .parquet: `pip install pyarrow` first")
    with explained(urlsplit(args.endpoint).hostname, source.repository):
        get(args, source, target)


def get(args, source: Source, target: Path) -> None:
    """Everything that needs the network or the disk. Raises what `explained` explains."""
    from huggingface_hub.utils import build_hf_headers

    token = False if args.mirror else None  # the token that somebody has for the hub goes to no mirror
    try:
        revision, licence, files = (from_modelscope(source, args.endpoint) if args.mirror == "modelscope"
                                    else from_hub(source, args.endpoint, token))
    except (ValueError, TypeError, KeyError, AttributeError):  # the answer describes no repository
        raise RunError(NO_DATA.format(urlsplit(args.endpoint).hostname)) from None
    # A compressed answer has another length than the file, and could not be resumed.
    headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}
    print(f"{args.name}: {source.use}\n"
          f"  from     {args.endpoint}, {source.repository}, revision {revision[:12]}\n"
          f"  size     {tqdm.format_sizeof(sum(file.size for file in files), 'B')}, files: {len(files)}\n"
          f"  licence  {licence}\n  becomes  {target}")
    if not args.yes and sys.stdin.isatty():
        print("Download it? [y/N] ", end="", flush=True)
        if not sys.stdin.readline().strip().lower().startswith("y"):
            print("nothing was downloaded")
            return
    staging = args.out_dir / f".{args.name}.download"
    check_disk(staging, files, source.kind)
    paths = [download(file, staging, headers) for file in files]
    counts = {} if source.kind == "weights" else convert(paths, target, source.kind, args.max_records)
    if source.kind == "weights":
        for left in set(staging.iterdir()) - set(paths):  # of files that the host has replaced since
            remove(left)
        publish(staging, target, last=("config.json",))
    stated = {file.name: {"bytes": file.size, "hash": file.hash} for file in files}
    write_whole(args.out_dir / f"{args.name}.source.json", json_text(
        {"host": args.endpoint, "repository": source.repository, "revision": revision, "licence": licence,
         "files": stated} | counts))
    remove(staging)
    print(f"wrote {target}" + "".join(f"; {what}: {number:,}" for what, number in counts.items()))


def check_disk(staging: Path, files: list[RemoteFile], kind: str) -> None:
    """Makes the folder. Raises UsageError where it cannot be made, RunError where the disk lacks room."""
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{staging.parent}: {error.strerror}: name another --out_dir") from None
    needed = sum(file.size for file in files) - sum(path.stat().st_size for path in staging.iterdir())
    if kind != "weights":
        needed += sum(file.size * (PARQUET_GROWS if file.name.endswith(".parquet") else 1) for file in files)
    free = shutil.disk_usage(staging).free
    if needed > free:
        needed, free = (tqdm.format_sizeof(size, "B") for size in (needed, free))
        raise RunError(f"{staging.parent}: {needed} are needed, {free} are free: make room, or name another "
                       "--out_dir")


def from_hub(source: Source, endpoint: str, token: bool | None) -> tuple[str, str, list[RemoteFile]]:
    """(revision, licence, files) from a host that speaks the protocol of huggingface.co."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    where = {"repo_type": "model" if source.kind == "weights" else "dataset"}
    api = HfApi(endpoint=endpoint, token=token)
    info = api.repo_info(source.repository, revision="main", timeout=TIMEOUT, **where)
    files = []
    for name in matching(source, [file.rfilename for file in info.siblings]):
        url = hf_hub_url(source.repository, name, revision=info.sha, endpoint=endpoint, **where)
        stated = get_hf_file_metadata(url, token=token, timeout=TIMEOUT, endpoint=endpoint)
        files.append(RemoteFile(name, url, int(stated.size), known_hash(stated.etag)))
    licence = getattr(info.card_data, "license", None) or f"{source.licence} (the host states none)"
    return info.sha, ", ".join(licence) if isinstance(licence, list) else licence, files


def from_modelscope(source: Source, endpoint: str) -> tuple[str, str, list[RemoteFile]]:
    """(revision, licence, files) from ModelScope, which states the sha256 of every file."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    kind, listing = ("models", "files") if source.kind == "weights" else ("datasets", "tree")
    repository, found = f"{endpoint}/api/v1/{kind}/{source.modelscope}/repo", {}
    for page in range(1, 100):
        asked = {"Revision": "master", "Recursive": "True", "PageNumber": page, "PageSize": 200}
        response = get_session().get(f"{repository}/{listing}", params=asked, timeout=TIMEOUT)
        hf_raise_for_status(response)
        answer = response.json()["Data"]["Files"]
        found |= {file["Path"]: file for file in answer if file.get("Type") != "tree"}
        if kind == "models" or len(answer) < 200:  # a list of a model's files has one page
            break
    files = [RemoteFile(name, f"{repository}?{urlencode({'Revision': 'master', 'FilePath': name})}",
                        int(found[name]["Size"]), known_hash(found[name].get("Sha256")))
             for name in matching(source, list(found))]
    return "master", f"{source.licence} (as on huggingface.co)", files


def known_hash(stated: str | None) -> str:
    return stated if stated and HASH.fullmatch(stated) else ""


def matching(source: Source, names: list[str]) -> list[str]:
    """The names of the files that the source consists of. Raises RunError where one is missing."""
    found = [name for name in names if SAFE_NAME.fullmatch(name)
             and any(fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
                     for pattern in source.files)]
    missing = [pattern for pattern in source.files if "*" not in pattern and pattern not in found]
    if missing or not found:
        raise RunError(f"{source.repository} has no file {(missing or source.files)[0]}: look at its "
                       "page, and correct scripts/data_sources.json")
    if len({PurePosixPath(name).name for name in found}) < len(found):  # they would replace each other here
        raise RunError(f"{source.repository} has two files of the same name in different folders: correct "
                       "scripts/data_sources.json")
    return sorted(found)


@contextmanager
def explained(host: str, repository: str):
    """Turns whatever the host, the network or a full disk raises into one RunError that says what to do."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
        return
    except OfflineModeIsEnabled:
        reason = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, which forbids every connection: unset it"
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"{host} answers {status} when asked for {repository}: {ANSWERS.get(status, OTHER)}"
    except httpx.HTTPError as error:  # no connection, no answer in time, a circle of redirects
        reason = f"{host}: {one_line(error).rstrip('.')}: is this machine on the network? If so, {OTHER}"
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        reason = "the disk is full: make room and run the same command again; what has arrived is kept"
    raise RunError(reason)


def download(remote: RemoteFile, staging: Path, headers: dict[str, str]) -> Path:
    """The path of the whole, checked file in `staging`.

    hf_hub_download does less: it begins a file again after each cut, and computes no hash.
    """
    path, host = staging / PurePosixPath(remote.name).name, urlsplit(remote.url).hostname
    if path.exists() and is_whole(path, remote):
        return path
    part = path.with_name(f"{path.name}.{remote.hash[:16]}.part")  # of another version: another name
    receive(remote, part, headers, host)
    if not is_whole(part, remote):
        remove(part)
        raise RunError(f"{remote.name}: its size or hash is not what {host} states. It was damaged on the way"
                       " and is deleted: run the same command again, or name another --mirror")
    os.replace(part, path)
    checked = "size and hash are" if remote.hash else "no hash is stated, the size is"
    print(f"{remote.name}: {tqdm.format_sizeof(remote.size, 'B')}; {checked} as {host} states")
    return path


def is_whole(path: Path, remote: RemoteFile) -> bool:
    """Whether a file has the size and the hash that the host states."""
    begun = hashlib.sha256 if len(remote.hash) == 64 else lambda: hashlib.sha1(b"blob %d\0" % remote.size)
    with path.open("rb") as file:
        return path.stat().st_size == remote.size and remote.hash in (
            "", hashlib.file_digest(file, begun).hexdigest())


def receive(remote: RemoteFile, part: Path, headers: dict[str, str], host: str) -> None:
    """Appends to `part` what is missing of it. A broken connection is made again a few times."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    failures, pause = 0, 0
    with part.open("ab") as file, tqdm(total=remote.size, initial=file.tell(), unit="B", unit_scale=True,
                                       desc=PurePosixPath(remote.name).name, disable=None) as bar:
        while (before := file.tell()) < remote.size:
            try:
                receive_once(remote, file, bar, headers, host)
                reason, pause = "it ended early", 0
            except HfHubHTTPError as error:
                if error.response.status_code not in (429, 500, 502, 503, 504):  # these may pass
                    raise
                told = error.response.headers.get("Retry-After", "")
                pause = int(told) if told.isdecimal() and len(told) < 9 else 0
                reason = f"it answers {error.response.status_code}"
                reason += f", and asks for a pause of {pause:,} seconds" if pause else ""
            except httpx.TransportError as error:
                reason = one_line(error)
            failures = 0 if file.tell() > before else failures + 1
            if failures == ATTEMPTS:
                raise RunError(f"{remote.name}: {file.tell():,} of {remote.size:,} bytes are here. {host} "
                               f"failed {failures} times ({reason}): the same command goes on from there")
            if failures:
                time.sleep(max(WAIT * 2 ** (failures - 1), min(pause, LONGEST_WAIT)))


def receive_once(remote: RemoteFile, file, bar, headers: dict[str, str], host: str) -> None:
    from huggingface_hub.utils import get_session, hf_raise_for_status

    start = file.tell()
    asked = headers | ({"Range": f"bytes={start}-"} if start else {})
    with get_session().stream("GET", remote.url, headers=asked, timeout=TIMEOUT) as response:
        is_rest, told = start and response.status_code == 206, response.headers
        begins = re.match(r"bytes (\d+)-", told.get("Content-Range", ""))
        if start and (response.status_code == 416 or (is_rest and begins and int(begins[1]) != start)):
            file.truncate(0)  # It sends no rest, or another one. The next request asks for the whole file.
            file.seek(0)
            bar.reset()
            return
        hf_raise_for_status(response)
        length = told.get("Content-Length") if "Content-Encoding" not in told else None
        rest = remote.size - start if is_rest else remote.size
        if told.get("Content-Type", "").startswith("text/html") or length not in (None, str(rest)):
            raise RunError(NO_DATA.format(host))
        if start and not is_rest:  # The host sends the whole file again.
            file.truncate(0)
            file.seek(0)
            bar.reset()
        for block in response.iter_bytes():
            bar.update(file.write(block))
            if file.tell() > remote.size:  # This may never end. The check of the size complains about it.
                break


def convert(paths: list[Path], target: Path, kind: str, max_records: int | None) -> dict[str, int]:
    """Writes the records of `paths` as one JSONL file. Returns how many there are, and what was skipped.

    Of a text only the text is kept: tables of web pages hold addresses and scores beside it.
    """
    from dataset.records import Report, read_records

    report, number = Report(), 0
    with writing(target) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for path, line, record in read_records(paths, report=report):
            if kind == "text" and not (isinstance(record.get("text"), str) and record["text"].strip()):
                report.add(path, line, "there is no text in it")
                continue
            kept = {"text": record["text"]} if kind == "text" else record
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
            report.usable[path] += 1
            number += 1
            if number == max_records:
                break
        for refusal in filter(None, map(report.refusal, map(str, paths))):
            raise DataError(f"{refusal}: its form has changed, and nothing was written")
    return {"records": number} | report.counts


def parse_args(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="what to download: a name of --list")
    parser.add_argument("--list", action="store_true", help="show what there is, without a connection")
    parser.add_argument("--mirror", metavar="HOST", help="another host than huggingface.co: hf-mirror, "
                        "modelscope, or the address of any host that speaks the hub's protocol")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out" / "data", metavar="DIR")
    parser.add_argument("--max_records", type=count, metavar="N",
                        help="write the first N records alone; the files are downloaded whole")
    parser.add_argument("--yes", action="store_true", help="do not ask before the download")
    args = parser.parse_args(argv)
    if args.name is not None and args.name not in SOURCES:
        parser.error(f"there is no {args.name!r}: --list shows the names")
    source = SOURCES.get(args.name)
    if source and source.kind == "weights" and args.max_records:
        parser.error("--max_records is for data, and these are weights")
    if source and args.mirror == "modelscope" and not source.modelscope:
        parser.error(f"no name of {args.name} on ModelScope is known: use --mirror hf-mirror")
    address = args.mirror or os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    args.endpoint = MIRRORS.get(args.mirror, address).rstrip("/")
    if not re.fullmatch(r"https?://[\w.-]+(:\d+)?(/[\w./-]*)?", args.endpoint):
        parser.error(f"--mirror must be {', '.join(MIRRORS)} or like https://..., not {args.endpoint}")
    return args


if __name__ == "__main__":
    run_script(main, parse_args())
