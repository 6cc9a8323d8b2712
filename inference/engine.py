"""The thread that decodes, for all who ask at the same time. A reader may skip this file.

    engine = Engine([Path("out/full_sft")], [], max_rows=32, cache_bytes=2**30)
    engine.load()  # starts the thread, and waits until it has loaded
    request = Request(rows, event=threading.Event())
    engine.submit("full_sft", request)  # from then on request.event is set whenever there is something new

One thread loads the models and computes everything: OpenMP, which computes for PyTorch on a CPU, is four
times slower where one thread has loaded and another decodes. Other threads only leave requests, and read what
came of them.
"""

import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import RunError, UsageError
from inference.chat_model import ChatModel
from model.batch import Batch, Row

BUNDLE_SECONDS = 0.05  # how long tokens may wait, so that several are told at once


class EngineBusy(Exception):
    """The request can't be taken now."""


@dataclass(eq=False)
class Request:
    """Rows that are asked for together. `event` needs a method `set`; it is called when there is news.

    told: for each row how many of its tokens may be read, and its `finish`. Rows go on in another thread, so
    nothing else of them may be looked at before they have finished.
    """

    rows: list[Row]
    event: object
    told: list[tuple[int, str | None]] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)  # the numbers of rows that nobody waits for any more
    waiting: deque[int] = field(default_factory=deque)  # the numbers of rows that have not begun
    came: float = field(default_factory=time.monotonic)  # seconds


class Lane:
    """One model, the requests that wait for it, and the rows that it decodes."""

    def __init__(self, chat_model: ChatModel, max_rows: int, cache_bytes: int):
        config, weight = chat_model.model.config, chat_model.model.model.norm.weight
        numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim  # of a token
        max_tokens = cache_bytes // (numbers * weight.element_size())
        if max_tokens < min(256, chat_model.max_positions):
            raise UsageError(f"--cache_gb is too small: {chat_model.path} would remember {max_tokens} tokens")
        max_tokens = min(max_tokens, max_rows * chat_model.max_positions)
        self.chat_model = chat_model
        self.batch = Batch(chat_model.model, chat_model.adapters, max_rows, max_tokens, max_tokens // 4)
        self.max_length = min(chat_model.max_positions, max_tokens)  # of a prompt and its answer
        self.grammars = None  # made when they are first asked for
        self.waiting: deque[Request] = deque()
        self.reading: tuple[list[Row], Iterator] | None = None  # whose prompts are on their way: Batch.read
        self.owner: dict[Row, tuple[Request, int]] = {}  # of each row: its request, and its number there


class Engine:
    """names: {name: (lane, adapter)} of all that can be asked. metrics: counts since the start.

    models: their folders or files. adapters: those of the first model. max_rows: that one model decodes at
    once. cache_bytes: for the keys and values of all models. max_waiting: answers that may wait.
    deliver: called in the engine's thread with the requests that have news. options: go to ChatModel.
    """

    def __init__(self, models: list[Path], adapters: list[str], *, max_rows: int, cache_bytes: int,
                 max_waiting: int = 1024, deliver: Callable | None = None, **options):
        self.thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.models, self.adapters, self.options = models, adapters, options
        self.max_rows, self.cache_bytes, self.max_waiting = max_rows, cache_bytes, max_waiting
        self.deliver = deliver or set_events
        self.condition, self.is_ready = threading.Condition(), threading.Event()
        self.lanes: list[Lane] = []
        self.names: dict[str, tuple[Lane, str | None]] = {}
        self.metrics: Counter[str] = Counter()
        self.error: BaseException | None = None  # why loading failed
        self.closes_at: float | None = None  # when the last answers are cut off
        self.untold: set[Request] = set()  # who has news that was not told yet
        self.urgent: set[Request] = set()  # who of them has a first token, or an end
        self.told_at = 0.0

    # --- for other threads --------------------------------------------------------------------------------

    def load(self) -> None:
        """Starts the thread. Raises what loading raised."""
        self.thread.start()
        self.is_ready.wait()
        if self.error:
            raise self.error

    def submit(self, name: str, request: Request) -> None:
        """Raises EngineBusy where too many wait, or the engine is closing."""
        lane, _ = self.names[name]
        with self.condition:
            if self.closes_at is not None or not self.is_alive:
                raise EngineBusy("the server is shutting down")
            # Where nobody waits, a request of any size is taken.
            if self.num_waiting() and self.num_waiting() + len(request.rows) > self.max_waiting:
                raise EngineBusy(f"{self.num_waiting()} answers wait already: try again later")
            request.told = [(0, None)] * len(request.rows)
            request.waiting = deque(range(len(request.rows)))
            lane.waiting.append(request)
            self.condition.notify()

    def cancel(self, request: Request, number: int | None = None) -> None:
        """Nobody waits for the request any more, or for one of its rows."""
        numbers = range(len(request.rows)) if number is None else [number]
        with self.condition:
            request.cancelled.update(numbers)
            self.condition.notify()

    def close(self, grace_seconds: float) -> None:
        """Takes no more requests. Answers that have not ended after that time are cut off there."""
        with self.condition:
            self.closes_at = min(self.closes_at or float("inf"), time.monotonic() + grace_seconds)
            self.condition.notify()

    @property
    def is_alive(self) -> bool:
        return self.thread.is_alive()

    def num_waiting(self) -> int:
        return sum(len(request.waiting) for lane in self.lanes for request in lane.waiting)

    def num_running(self) -> int:
        return sum(len(lane.owner) for lane in self.lanes)

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._load()
        except BaseException as error:
            self.error = error
            return
        finally:
            self.is_ready.set()
        while self._wait_for_work():
            news = set()
            for lane in self.lanes:
                try:
                    news |= self._advance(lane)
                except Exception as error:
                    if not isinstance(error, RunError):
                        traceback.print_exc()
                    news |= self._fail(lane, str(error))
            self._tell(news)

    def _load(self) -> None:
        for place, path in enumerate(self.models):
            adapters = self.adapters if place == 0 else []
            chat_model = ChatModel(path, adapters, **self.options)
            lane = Lane(chat_model, self.max_rows, self.cache_bytes // len(self.models))
            self.lanes.append(lane)
            self._name(name_of(path), lane, None)
            for adapter in adapters:
                found = chat_model.find(adapter)
                self._name(name_of(found), lane, str(found))

    def _name(self, name: str, lane: Lane, adapter: str | None) -> None:
        if name in self.names:
            raise UsageError(f"two of the models and adapters are called {name!r}: rename one of the folders")
        self.names[name] = (lane, adapter)

    def _wait_for_work(self) -> bool:
        """Waits until there is something to do. False when the engine has closed."""
        with self.condition:
            while not self.num_running() and not any(lane.waiting for lane in self.lanes):
                if self.closes_at is not None:
                    return False
                self.condition.wait()
        return True

    def _advance(self, lane: Lane) -> set[Request]:
        """Lets rows go that nobody waits for, lets others join, and writes a token of each."""
        news = set()
        with self.condition:
            is_over = self.closes_at is not None and time.monotonic() >= self.closes_at
            for row in list(lane.batch.rows):
                request, number = lane.owner[row]
                if number in request.cancelled or is_over:
                    lane.batch.remove(row)
                    row.finish = "length"
                    news.add(self._note(lane, row))
                    self.metrics["cancelled"] += number in request.cancelled
            if is_over:
                return news | self._fail(lane, "the server is shutting down")
            news |= self._stop_reading(lane)
            if not lane.reading and (joining := self._who_joins(lane)):
                lane.reading = joining, lane.batch.read(joining)
        if lane.reading:
            self._tell(news | self._read_on(lane))  # a first token does not wait for the second
            news = set()
        if lane.batch.rows:
            for row in lane.batch.step():
                news.add(self._note(lane, row))
        return news

    def _read_on(self, lane: Lane) -> set[Request]:
        """Takes the next part of the prompts that are on their way. With the last part come first tokens."""
        rows, parts = lane.reading
        for _ in parts:
            return set()
        lane.reading, news, now = None, set(), time.monotonic()
        for row in rows:
            request = lane.owner[row][0]
            self.metrics["prompt_tokens"] += len(row.prompt)
            self.metrics["cached_prompt_tokens"] += row.num_cached
            self.metrics["first_tokens"] += 1
            self.metrics["first_token_seconds"] += now - request.came
            news.add(self._note(lane, row))
        self.urgent |= news
        return news

    def _stop_reading(self, lane: Lane) -> set[Request]:
        """Where nobody waits for any of the prompts that are on their way, they are dropped."""
        owners = [lane.owner[row] for row in lane.reading[0]] if lane.reading else []
        if not owners or any(number not in request.cancelled for request, number in owners):
            return set()
        rows, lane.reading = lane.reading[0], None
        self.metrics["cancelled"] += len(rows)
        for row in rows:
            row.finish = "length"
        return {self._note(lane, row) for row in rows}

    def _who_joins(self, lane: Lane) -> list[Row]:
        """The rows that fit in. Each request in turn gives its share, so a large one holds up nobody.

        Rows that join together and have the same prompt share its way through the model.
        """
        free, joining = lane.batch.max_rows - len(lane.batch.rows), []
        share = max(1, free // max(1, len(lane.waiting)))
        while lane.waiting:
            request, end = lane.waiting[0], len(joining) + share
            is_full = False
            while request.waiting and len(joining) < end and not is_full:
                row = request.rows[request.waiting[0]]
                if request.waiting[0] in request.cancelled:
                    request.waiting.popleft()
                elif lane.batch.fits([*joining, row]):
                    lane.owner[row] = (request, request.waiting.popleft())
                    joining.append(row)
                else:
                    is_full = True
            if is_full and len(joining) == end - share:
                break  # this request got no row, so it is the first one the next time
            lane.waiting.popleft()
            if request.waiting:
                lane.waiting.append(request)
            if is_full:
                break
        return joining

    def _note(self, lane: Lane, row: Row) -> Request:
        """The row has a new token, or has ended."""
        request, number = lane.owner[row]
        self.metrics["tokens"] += len(row.tokens) - request.told[number][0]
        request.told[number] = (len(row.tokens), row.finish)
        if row.finish:
            del lane.owner[row]
            self.metrics[f"finished_{row.finish}"] += 1
            self.urgent.add(request)
        return request

    def _fail(self, lane: Lane, message: str) -> set[Request]:
        """All rows of the lane end with an error."""
        with self.condition:
            news = set()
            waiting = [(request, number) for request in lane.waiting for number in request.waiting]
            for row in list(lane.batch.rows):
                lane.batch.remove(row)
            lane.batch.prefixes.texts.clear()  # they may be half-written
            for request, number in [*lane.owner.values(), *waiting]:
                row = request.rows[number]
                row.finish, row.error = "error", message
                request.told[number] = (len(row.tokens), "error")
                news.add(request)
            lane.owner.clear()
            lane.waiting.clear()
            lane.reading = None
        self.urgent |= news
        return news

    def _tell(self, news: set[Request]) -> None:
        """Passes on who has news: a first token or an end at once, other tokens gathered for a moment."""
        self.untold |= news
        now, due = time.monotonic(), self.urgent
        if now - self.told_at >= BUNDLE_SECONDS:
            self.told_at, due = now, self.untold
        self.untold, self.urgent = self.untold - due, set()
        if due:
            self.deliver(list(due))


def set_events(requests: list[Request]) -> None:
    for request in requests:
        request.event.set()


def name_of(path: Path) -> str:
    """What a model or an adapter is called: its folder, or its file without .pth or .gguf."""
    return path.stem if path.suffix in (".pth", ".gguf") else path.resolve().name
