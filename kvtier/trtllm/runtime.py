"""Where the leader and the workers of one engine meet: in this process, or at the agent."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from kvtier._logging import log_once
from kvtier.config import Config, load_config
from kvtier.connector.shared import SharedStore, attach_store, share_store
from kvtier.errors import ConfigError
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.store.base import StoreClient
from kvtier.trtllm.fields import dig
from kvtier.trtllm.identity import EngineFacts
from kvtier.trtllm.meta import Save, decode_saves, encode_saves
from kvtier.trtllm.pool import PageGroup, Pool

_log = logging.getLogger(__name__)

TAIL_SECONDS = 60.0
"""What a worker did not ask for by then it is not given any more: the engine has dropped the request."""

LEADER = -1
"""The leader's place among the members; workers have their rank."""


@dataclass(frozen=True, slots=True)
class Ready:
    """What the leader works with once its rank has a store: with an agent, or with all ranks in this process.

    Attributes:
        store: The store, whose layout has all shards.
        namespace: Id of what its blocks are blocks of.
        groups: The spaces of page ids.
        on_gpu: Whether copies go on behind the engine's back.
    """

    store: StoreClient
    namespace: bytes
    groups: tuple[PageGroup, ...]
    on_gpu: bool = False


@dataclass(slots=True)
class _Tail:
    """The last blocks of a finished request.

    Attributes:
        saves: What is to be saved.
        waiting: The ranks of this process that have not asked for it.
        since: When it was left.
    """

    saves: tuple[Save, ...]
    waiting: set[int]
    since: float


class Runtime:
    """One engine: its configuration and facts, its leader's session, pools registered so far, their stores.

    Leader and workers hold it, and it does not hold them: when the last of them goes, or has closed, the
    store is let go of.
    """

    def __init__(
        self, config: Config, engine: EngineFacts, llm_args: object, clock: Callable[[], float]
    ) -> None:
        self.config = config
        self.engine = engine
        self.llm_args = llm_args
        self.session: int | None = None
        self.ready: Ready | None = None
        self._clock = clock
        self._lock = threading.Lock()
        self._joined: set[int] = set()
        self._left: set[int] = set()
        self._pools: dict[int, Pool] = {}
        self._stores: dict[int, SharedStore] = {}
        self._tails: dict[int, _Tail] = {}

    def lacks(self, member: int) -> bool:
        """Say whether this place was never taken, and the engine is still alive."""
        if member == LEADER and self.session is not None:
            return False
        return member not in self._joined and not self._left

    @property
    def _by_agent(self) -> bool:
        return self.config.agent.mode != "inprocess"

    def take_place(self, member: int, session: int | None) -> None:
        """Enter the leader (with its session) or a worker."""
        self._joined.add(member)
        if member == LEADER:
            self.session = session

    def register(self, rank: int, pool: Pool) -> None:
        """Enter a rank's pool; one of another geometry than before starts the registration anew.

        Raises:
            ConfigError: The store cannot be opened as configured.
        """
        with self._lock:
            if any(
                (known.layout, known.signature) != (pool.layout, pool.signature)
                for known in self._pools.values()
            ):
                self._pools.clear()
                self._stores.clear()
            self._pools[rank] = pool
        self.complete()

    def complete(self) -> None:
        """Open the stores of the ranks that are here, as soon as enough of the engine is known.

        Raises:
            ConfigError: A store cannot be opened as configured.
        """
        with self._lock:
            self.ready = None
            if not self.engine.plain_ranks or self._left:
                return
            if self._by_agent:
                self._attach()
            else:
                self._share()
            first = self._stores.get(0)
            if LEADER in self._joined and first is not None:
                pool = self._pools[0]
                self.ready = Ready(first.store, first.namespace.id, pool.groups, pool.device.type == "cuda")

    def follow(self, session: int) -> None:
        """Take orders from a leader in another process: its session names the engine to the agent.

        Raises:
            ConfigError: A store cannot be opened as configured.
        """
        if LEADER in self._joined or not self._by_agent or self.session == session:
            return
        self.session = session
        self._stores.clear()
        self.complete()

    def store_of(self, rank: int) -> StoreClient | None:
        """Return the store that a rank's worker uses, None as long as there is none."""
        shared = self._stores.get(rank)
        return shared.store if shared is not None else None

    def add_tail(self, request_id: int, saves: Sequence[Save]) -> bool:
        """Leave blocks of a finished request to the workers, which ask for them by its id.

        Returns:
            False if workers in other processes cannot be told; then nobody will ask.
        """
        with self._lock:
            ranks = set(range(self.engine.ranks))
            here = ranks & set(self._pools) if self._by_agent else ranks
            first, pool = self._stores.get(0), self._pools.get(0)
            if pool is not None and self.replicated(pool):
                ranks = here = {0}
        elsewhere = sorted(ranks - here)
        if elsewhere:
            mailbox = first.mailbox if first is not None else None
            tickets = [save.ticket for save in saves]
            if mailbox is None or not mailbox.leave(request_id, encode_saves(saves), elsewhere, tickets):
                return False
        with self._lock:
            self._tails[request_id] = _Tail(tuple(saves), here, self._clock())
        return True

    def take_tail(self, request_id: int, rank: int) -> tuple[Save, ...]:
        """Return what one rank has to save of a finished request; once."""
        with self._lock:
            shared = self._stores.get(rank)
            if LEADER not in self._joined and shared is not None and shared.mailbox is not None:
                mailbox = shared.mailbox
            else:
                return self._take_own(request_id, rank)
        data = mailbox.fetch(request_id)
        try:
            return decode_saves(data) if data else ()
        except ValueError as error:
            log_once(_log, "tail", "the leader's orders for a finished request make no sense: %s", error)
            return ()

    def _take_own(self, request_id: int, rank: int) -> tuple[Save, ...]:
        tail = self._tails.get(request_id)
        if tail is None or rank not in tail.waiting:
            return ()
        tail.waiting.discard(rank)
        if not tail.waiting:
            del self._tails[request_id]
        return tail.saves

    def drop_old_tails(self) -> None:
        """Give up the tails that were not asked for in a minute, for the ranks that did not ask."""
        if not self._tails:
            return
        with self._lock:
            oldest = self._clock() - TAIL_SECONDS
            old = [request_id for request_id, tail in self._tails.items() if tail.since < oldest]
            tails = [self._tails.pop(request_id) for request_id in old]
        for tail in tails:
            for rank in tail.waiting:
                store = self.store_of(rank)
                if store is not None:
                    store.abort([save.ticket for save in tail.saves], rank)

    def leave(self, member: int) -> None:
        """Go; the last member to go closes the store, unless another engine of the process uses it."""
        with self._lock:
            self._left.add(member)
            self._pools.pop(member, None)
            self.ready = None
            if self._left >= self._joined:
                self._stores.clear()

    def _share(self) -> None:
        """Open this process's store for all ranks, once they and the leader are here."""
        ranks = self.engine.ranks
        shared = None
        if LEADER in self._joined and set(self._pools) == set(range(ranks)):
            pool = self._pools[0]
            namespace, layout = self._identify(pool)
            shared = self._open(partial(share_store, self.config, namespace, layout, pool.device))
        self._stores = {} if shared is None else dict.fromkeys(range(ranks), shared)

    def _attach(self) -> None:
        """Make the ranks that are here clients of the agent, once the leader's session is known."""
        for rank, pool in self._pools.items():
            if self.session is None or rank in self._stores:
                continue
            namespace, layout = self._identify(pool)
            arguments = (self.config, namespace, layout, pool.device, self.session, rank, self.engine.ranks)
            shared = self._open(partial(attach_store, *arguments))
            if shared is not None:
                self._stores[rank] = shared

    def _identify(self, pool: Pool) -> tuple[Namespace, BlockLayout]:
        layout = replace(pool.layout, shards=1 if self.replicated(pool) else self.engine.ranks)
        engine = self.engine
        if self._by_agent and self.session is not None and "private" in engine.model:
            # What is private to a process is so to the leader's: ranks elsewhere hold parts of the same.
            engine = replace(engine, model={**engine.model, "private": f"{self.session >> 64:x}"})
        return engine.namespace(layout, pool.signature), layout

    def replicated(self, pool: Pool) -> bool:
        """Say whether one rank saves for all. A store in the process knows only shards."""
        return self._by_agent and pool.replicated

    def _open(self, opening: Callable[[], SharedStore]) -> SharedStore | None:
        try:
            return opening()
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - without its store the engine still serves
            log_once(_log, "open", "the store cannot be opened, nothing is cached: %r", error)
            return None


_lock = threading.Lock()
_serial = itertools.count()
_PROCESS = secrets.randbits(64)
_runtimes: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()


def new_session() -> int:
    """Return a leader's name for itself, which no other has: 64 bits of its process, 64 of its own."""
    return _PROCESS << 64 | secrets.randbits(64)


def join(
    llm_args: object, member: int, session: int | None = None, clock: Callable[[], float] = time.monotonic
) -> Runtime:
    """Enter the engine that has these arguments and lacks this member, or found it.

    The engine constructs its leader and workers at the same time, in any order, with the same arguments.
    Several engines of equal arguments may follow each other in a process, or live side by side.

    Args:
        llm_args: The engine's arguments.
        member: `LEADER`, or a worker's rank.
        session: The leader's name for itself.
        clock: Monotonic seconds.

    Raises:
        ConfigError: There is no configuration, or it is wrong.
    """
    config = load_config(_config_path(llm_args))
    engine = EngineFacts.read(llm_args)
    key = (config, engine.canonical())
    with _lock:
        waiting = [known for _, known in sorted(_runtimes.items(), reverse=True) if known.lacks(member)]
        equal = [known for known in waiting if (known.config, known.engine.canonical()) == key]
        same = [known for known in equal if known.llm_args is llm_args]
        found = next(iter(same or equal), None)
        if found is None:
            found = _runtimes[next(_serial)] = Runtime(config, engine, llm_args, clock)
        found.take_place(member, session)
    if member == LEADER:
        # An engine that registers its pool before it has a leader.
        found.complete()
    return found


def runtime_of(session: int) -> Runtime | None:
    """Return the engine whose leader has this session, None if it is not in this process."""
    with _lock:
        return next((known for known in _runtimes.values() if known.session == session), None)


def _config_path(llm_args: object) -> str | None:
    """Return the file that the engine's options name; None leaves it to KVTIER_CONFIG."""
    place = dig(llm_args, "kv_connector_config", "server_url")
    if not isinstance(place, str) or not place:
        return None
    return place.removeprefix("kvtier:").removeprefix("file://")
