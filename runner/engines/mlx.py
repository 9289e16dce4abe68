"""A real engine: one rank's share of a language model on MLX (github.com/ml-explore/mlx-lm), on Apple silicon or a Linux processor.

A single rank loads the whole model. Several ranks form a ring over TCP and share every layer (tensor parallelism, as mlx-lm's own
``sharded_load`` does it). So the model's architecture must know how to share its layers, and its attention heads must divide
evenly among the ranks.

What to know before you run it:

- MLX's ring neither encrypts nor authenticates. The ranks' ports belong on a trusted network.
- A ring has no identity: MLX takes any process that connects to its port for a neighbour. So every attempt binds other ports, and the
  ranks first compare `EngineGroup.token`, which names the attempt.
- A process can enter one ring in its life, and leaves it only when it ends. While it waits for the other ranks, MLX holds the
  interpreter, for ever if they do not come. So use a `runner.host.ProcessHost`, which kills the process at the group's deadline.
- A model that is not on this machine is downloaded during the load. While its files grow, the load counts as moving. A download that
  stands still for longer than the planner's ``load_stall`` ends the attempt. The downloaded files stay.
- Decoding is greedy (temperature 0): the same prompt gives the same text.

The first call that needs MLX imports it. This module needs nothing but the runner's own dependencies.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import queue
import socket
import tempfile
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from runner.engine import EngineFailure, EngineGroup, GenerationRequest, bind_endpoint, valid_ports
from runner.model import ModelSpec

__all__ = ["MlxConfig", "MlxEngine", "T", "listening_address", "mlx_engine", "ring_addresses", "scaled_progress"]


_WARM_UP_TOKENS = 2
_LOOK_SECONDS = 1.0
"""Seconds between two checks whether a load moves that has completed no further layer."""

_HEAD_START_SECONDS = 0.1
"""Seconds by which the last rank begins later than the others. It calls first, and the others listen first. If nobody listens yet, MLX
tries again only after a second. Only that second depends on this value."""

_HEAD_COUNTS = ("n_heads", "n_kv_heads", "num_heads", "num_kv_heads", "num_attention_heads", "num_key_value_heads")

T = TypeVar("T")


class MlxConfig(BaseModel):
    """How an MLX engine runs; the same for every rank. Reads JSON with ``model_validate_json``.

    Attributes:
        model: a directory or a Hugging Face id to load instead of the model that the instance names, for machines that keep their
            models in different places.
        ports: the first and the last port on which the ring may listen, for machines behind a firewall. Each rank takes a free one;
            ``None`` takes any free port of the machine. Allow three for each rank of the machine: the engine has one, its spare has
            another, and each attempt takes another one than the last. Prefer ports that the machine does not use for outgoing
            connections: those below 32768 on Linux.
        use_chat_template: put a prompt into the model's own chat template, if it has one.
        prefill_step_size: how many tokens of a prompt are read at a time. A generation can be stopped only between two such parts. If
            that takes longer than the host's grace, the engine is killed with the loaded model. mlx-lm's own default is 2,048.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str | None = Field(default=None, min_length=1)
    ports: tuple[int, int] | None = None
    use_chat_template: bool = True
    prefill_step_size: int = Field(default=512, ge=1)

    @field_validator("ports")
    @classmethod
    def _ports(cls, ports: tuple[int, int] | None) -> tuple[int, int] | None:
        return None if ports is None else valid_ports(*ports)


def mlx_engine(config: dict[str, JsonValue]) -> MlxEngine:
    """The factory for an `EngineSpec`: ``EngineSpec(factory="runner.engines.mlx:mlx_engine", config={...})``.

    Args:
        config: the fields of `MlxConfig`.

    Raises:
        EngineFailure: permanent, if the configuration is wrong.
    """
    try:
        return MlxEngine(MlxConfig.model_validate_json(json.dumps(config)))
    except ValueError as error:
        raise EngineFailure(f"wrong configuration of an MLX engine: {error}", permanent=True) from error


class MlxEngine:
    """One rank's share of a model on MLX. An `Engine`; see the module for what it can and cannot do.

    Args:
        config: where the model is, and which ports may be used.
    """

    def __init__(self, config: MlxConfig | None = None) -> None:
        self._config = config or MlxConfig()
        self._thread = _OneThread()
        self._share = _Share(
            use_chat_template=self._config.use_chat_template, prefill_step_size=self._config.prefill_step_size
        )
        self._bound: socket.socket | None = None
        self._port = 0
        self._place: tuple[int, int] | None = None
        self._group: EngineGroup | None = None
        self._loaded = False
        self._warm = False
        self._closed = False

    async def prepare(self, rank: int, world_size: int) -> str | None:
        """Import MLX, which takes seconds, and bind the port at which this rank's ring will listen.

        Raises:
            EngineFailure: permanent: MLX is not installed. Otherwise: no port of the range is free, or the call is out of order.
        """
        self._check_open("prepare")
        if self._group is not None:
            raise EngineFailure("prepare is out of order: this engine is in a group already")
        await self._thread.run(self._share.import_mlx)
        self._place = (rank, world_size)
        self._give_up_port()
        if world_size == 1:
            return None
        self._bound = bind_endpoint(self._config.ports, avoid=self._port)
        self._port = int(self._bound.getsockname()[1])
        return f":{self._port}"

    async def connect(self, group: EngineGroup) -> None:
        """Enter the ring, and compare the attempt with all ranks.

        MLX takes any process that connects to the port for a neighbour. So each attempt binds another port, and the first collective
        compares `EngineGroup.token`.

        Raises:
            EngineFailure: permanent: MLX cannot use an endpoint. Otherwise: a neighbour did not come or is in another attempt, a
                port is taken, or the call is out of order.
        """
        self._check_open("connect")
        if self._group is not None:
            raise EngineFailure("connect is out of order: this engine is in a group already")
        if self._place is None:
            raise EngineFailure("connect is out of order: prepare has bound no port for this attempt")
        rank, world_size = self._place
        if (group.rank, group.world_size) != self._place:
            raise EngineFailure(
                f"connect is out of order: it names rank {group.rank} of {group.world_size}, and prepare named rank {rank} of {world_size}"
            )
        if world_size == 1:
            self._group = group
            return
        if self._bound is None:
            raise EngineFailure("connect is out of order: prepare has bound no port for this attempt")
        addresses = ring_addresses(group)
        port = addresses[group.rank].rpartition(":")[2]
        if port != str(self._port):
            raise EngineFailure(
                f"connect names the port {port} for rank {group.rank}, which has bound {self._port} for this attempt"
            )
        if group.rank == group.world_size - 1:
            await asyncio.sleep(_HEAD_START_SECONDS)
        _share_port(self._bound)
        try:
            await self._thread.run(lambda: self._share.join_ring(addresses, group.rank))
        finally:
            self._give_up_port()
        await self._thread.run(lambda: self._share.compare_tokens(group))
        self._group = group

    async def load(self, model: ModelSpec) -> AsyncGenerator[int, None]:
        """Load this rank's share, layer by layer.

        A layer counts as loaded when its weights are in memory. Most of the time goes into reading them, and MLX reads them only when they
        are needed. If the model has more or fewer layers than ``model.total_layers``, the count is scaled, so that it ends there.

        Raises:
            EngineFailure: permanent: MLX is not installed, there is no such model, its files are damaged, or its architecture is
                unknown or cannot be shared among so many ranks. Otherwise: there is not enough memory, the hub cannot be reached, or
                the call is out of order.
        """
        self._check_open("load")
        if self._place is None:
            raise EngineFailure(
                "load is out of order: prepare has not been done, and only prepare says whether this engine is alone"
            )
        if self._place[1] > 1 and self._group is None:
            raise EngineFailure(
                f"load is out of order: connect has not been done, and this is one of {self._place[1]} ranks, which load together"
            )
        if self._loaded:
            raise EngineFailure("load is out of order: a model is loaded already")
        name = self._config.model or model.model_id
        steps = self._share.load(name)
        said = 0
        seen = await asyncio.to_thread(self._share.footprint, name)
        while True:
            step = asyncio.create_task(self._thread.run(partial(next, steps, None)))
            try:
                while not (await asyncio.wait({step}, timeout=_LOOK_SECONDS))[0]:
                    now = await asyncio.to_thread(self._share.footprint, name)
                    if now != seen:
                        seen = now
                        yield said
                loaded = await step
            finally:
                step.cancel()
            if loaded is None:
                break
            reached = scaled_progress(*loaded, model.total_layers)
            if reached > said:
                said = reached
                yield reached
        self._loaded = True

    async def warm_up(self) -> None:
        """Meet the other ranks, then generate a few tokens together: what MLX makes at the first use, it makes now.

        Raises:
            EngineFailure: no model is loaded, or another rank was lost.
        """
        self._check_open("warm_up")
        if not self._loaded:
            raise EngineFailure("warm_up is out of order: no model is loaded")
        await self._thread.run(self._share.warm_up)
        self._warm = True

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[str, None]:
        """Generate; yields text on rank 0 and nothing on the others.

        A caller that leaves early stops the generation between two tokens, or between two parts of a long prompt. All ranks stop at
        the same place, whichever of them was asked. So no rank is left alone in the collective.

        Raises:
            EngineFailure: the engine is not warmed up.
            RuntimeError: from MLX, if another rank was lost.
        """
        self._check_open("generate")
        if not self._warm:
            raise EngineFailure("generate is out of order: warm_up has not been done")
        stop = threading.Event()
        pieces = self._share.generate(request.prompt, request.max_tokens, stop)
        try:
            while (piece := await self._thread.run(partial(next, pieces, None))) is not None:
                if piece and self._share.rank == 0:
                    yield piece
        finally:
            # The collective goes on until all ranks have agreed to stop. This rank takes part until then.
            stop.set()
            await self._thread.run(lambda: deque(pieces, maxlen=0))

    async def close(self) -> None:
        """Give up the model and its memory; idempotent. The engine leaves the ring when its process ends; MLX has no other way."""
        if not self._closed:
            self._closed = True
            self._give_up_port()
            await self._thread.run(self._share.release)
            self._thread.end()

    def _give_up_port(self) -> None:
        if self._bound is not None:
            self._bound.close()
            self._bound = None

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise EngineFailure(f"{call} is out of order: the engine is closed")


def _share_port(bound: socket.socket) -> None:
    """Let MLX bind the port that this socket still holds, so that the port is never free.

    MLX sets SO_REUSEADDR and SO_REUSEPORT before it binds. If both sides have set them, and one side does not listen, the second bind
    succeeds (tried on Linux). From now on another program could bind the port too, if it named this port and set the same options.
    Then MLX may meet a stranger, and the attempt ends. The next attempt binds another port.
    """
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def listening_address(endpoint: str) -> str:
    """The address at which a rank listens, from the endpoint at which the other ranks reach it.

    It is the same address, if this machine has it. Otherwise it is the port on all addresses of this machine: a host name may resolve to
    loopback here and to the right address elsewhere, and a machine does not know its address behind a router or a container's host.
    """
    host, _, port = endpoint.rpartition(":")
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        socket.inet_aton(host)
        trial.bind((host, 0))
        return endpoint
    return f"0.0.0.0:{port}"


def ring_addresses(group: EngineGroup) -> list[str]:
    """The endpoint of every rank, as ``host:port`` in rank order.

    Raises:
        EngineFailure: permanent: a rank has no endpoint, or has one with an IPv6 address.
    """
    for rank, endpoint in enumerate(group.endpoints):
        if not endpoint or endpoint.startswith("["):
            raise EngineFailure(
                f"rank {rank} has {f'the endpoint {endpoint}' if endpoint else 'no endpoint'}; MLX's ring takes a host name or an IPv4 "
                "address, so start its runner with such an --address",
                permanent=True,
            )
    return list(group.endpoints)


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


def scaled_progress(done: int, layers: int, total: int) -> int:
    """How many of `total` layers to report when `done` of the model's `layers` layers are loaded; `total` at the end."""
    return done * total // layers


class _OneThread:
    """One thread that does one job after the other, because MLX's streams belong to the thread that made them.

    It is a daemon thread, so that a collective that waits for a lost rank does not keep the process alive. concurrent.futures has none.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def run(self, job: Callable[[], T]) -> T:
        """Do the job and return its result. A job whose caller is cancelled is still done, before the next one."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def settle(value: T | None, error: BaseException | None) -> None:
            if result.done():
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(value)  # pyright: ignore[reportArgumentType] - None only if the job returned it

        def work() -> None:
            value, error = None, None
            try:
                value = job()
            except BaseException as caught:  # noqa: BLE001 - the caller gets every error; this thread goes on
                error = caught
            with suppress(RuntimeError):  # if the loop is closed, nobody waits
                loop.call_soon_threadsafe(settle, value, error)

        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mlx", daemon=True)
            self._thread.start()
        self._jobs.put(work)
        return await result

    def end(self) -> None:
        """Let the thread end after the jobs that wait."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class _Stopped(Exception):
    """All ranks have agreed to stop in the middle of a prompt."""


class _Share:
    """This rank's share of the model: all code that touches MLX. One thread runs every method and every step of a generator.

    MLX's modules have the type Any, because MLX is not installed where the types are checked.
    """

    def __init__(self, *, use_chat_template: bool, prefill_step_size: int) -> None:
        self.rank = 0
        self._use_chat_template = use_chat_template
        self._prefill_step_size = prefill_step_size
        self._world_size = 1
        self._group: Any = None
        self._mx: Any = None
        self._mlx_lm: Any = None
        self._model: Any = None
        self._tokenizer: Any = None

    def import_mlx(self) -> None:
        """Import MLX, which takes seconds; once."""
        try:
            self._mx = importlib.import_module("mlx.core")
            self._mlx_lm = importlib.import_module("mlx_lm")
        except ImportError as error:
            raise EngineFailure(
                f"the MLX engine needs MLX, which cannot be imported here ({error}): pip install 'rankgate[mlx]', which has it for "
                "macOS on Apple silicon and for Linux",
                permanent=True,
            ) from error

    def join_ring(self, addresses: list[str], rank: int) -> None:
        """Enter the ring as one rank. MLX reads its arguments from the environment and from a file."""
        names = ("MLX_HOSTFILE", "MLX_RANK")
        before = {name: os.environ.get(name) for name in names}
        own = listening_address(addresses[rank])
        with tempfile.TemporaryFile(
            "w+", encoding="utf-8"
        ) as hosts:  # it has no name, so nothing is left when this process is killed
            json.dump([[own if place == rank else address] for place, address in enumerate(addresses)], hosts)
            hosts.seek(0)
            os.environ.update(MLX_HOSTFILE=f"/dev/fd/{hosts.fileno()}", MLX_RANK=str(rank))
            try:
                group = self._mx.distributed.init(strict=True, backend="ring")
            except (RuntimeError, ValueError) as error:
                raise EngineFailure(
                    f"rank {rank} could not enter the ring {', '.join(addresses)}: {error}; each rank must be able to listen at its "
                    "own address and to reach the next one's"
                ) from error
            finally:
                for name, value in before.items():
                    if value is None:
                        del os.environ[name]
                    else:
                        os.environ[name] = value
        if (group.rank(), group.size()) != (rank, len(addresses)):
            raise EngineFailure(
                f"this process is rank {group.rank()} of {group.size()} of another ring already, and MLX allows one in the life of a "
                "process: keep each engine in a process of its own (ProcessHost)",
                permanent=True,
            )
        self.rank, self._world_size, self._group = rank, len(addresses), group

    def compare_tokens(self, group: EngineGroup) -> None:
        """The first collective: every rank gets the token and the rank number of all ranks, and compares them with the expected ones.

        MLX does not notice that two ranks belong to rings of different sizes. Then one of them waits for numbers that never come, and the
        host kills it at the group's deadline.
        """
        mx = self._mx
        wanted = [[*group.token, *rank.to_bytes(4, "big")] for rank in range(group.world_size)]
        try:
            gathered: list[int] = mx.distributed.all_gather(
                mx.array(wanted[group.rank], dtype=mx.uint8), group=self._group, stream=mx.cpu
            ).tolist()
        except RuntimeError as error:
            raise EngineFailure(f"rank {group.rank} lost a neighbour while the ring came together: {error}") from error
        size = len(wanted[group.rank])
        found = [gathered[place : place + size] for place in range(0, len(gathered), size)]
        strangers = [rank for rank, place in enumerate(wanted) if found[rank : rank + 1] != [place]]
        if strangers or len(found) != group.world_size:
            raise EngineFailure(
                f"rank {group.rank} met engines of another attempt in its ring, or in each other's places, where ranks "
                f"{_listed(strangers)} should be; this attempt is {group.epoch} of {group.instance}"
            )

    def footprint(self, name: str) -> tuple[int, ...]:
        """What grows while a load moves: number and bytes of the downloaded files, and MLX's memory in bytes. Any thread may call it."""
        sizes: list[int] = []
        with suppress(Exception):  # an error in this check must not end a load
            if not Path(name).expanduser().exists():
                cache = Path(importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE)
                for folder, _, files in os.walk(cache / f"models--{name.replace('/', '--')}"):
                    for file in files:
                        # A download may first make a file of the full size and then fill it, so the blocks count too.
                        with suppress(OSError):  # the file was renamed, because it is complete
                            status = os.lstat(os.path.join(folder, file))
                            sizes += (status.st_size, status.st_blocks)
        held = 0 if self._mx is None else int(self._mx.get_active_memory())
        return len(sizes), sum(sizes), held

    def load(self, name: str) -> Generator[tuple[int, int], None, None]:
        """Load; yields how many layers are in memory, and how many there are."""
        self.import_mlx()
        try:
            model, tokenizer = self._mlx_lm.load(_located(name), lazy=True)
            if self._group is not None:
                self._shard(model, name)
            layers = list(model.layers)
            for done, layer in enumerate(layers[:-1], start=1):
                self._mx.eval(layer.parameters())
                yield done, len(layers)
            # The last layer comes together with the parts outside of all layers: embeddings, norm, head.
            self._mx.eval(model.parameters())
        except Exception as error:  # loading runs code of many libraries; `_classed` names each error
            raise _classed(error, name) from error
        self._model, self._tokenizer = model, tokenizer
        yield len(layers), len(layers)

    def _shard(self, model: Any, name: str) -> None:  # noqa: ANN401 - MLX has no types here
        if not hasattr(model, "shard"):
            raise EngineFailure(
                f"mlx-lm cannot share the layers of {name} (architecture {getattr(model, 'model_type', 'unknown')}) among ranks; "
                "launch it with world_size 1, or choose an architecture that has tensor parallelism",
                permanent=True,
            )
        before = _head_counts(model)
        model.shard(self._group)
        after = _head_counts(model)
        for place, count in before.items():
            # mlx-lm divides and drops the remainder, which gives a wrong model and no error. Some architectures repeat heads
            # until there are enough. So the check looks at the result.
            if after.get(place, count) * self._world_size < count:
                raise EngineFailure(
                    f"{name} has {place.rpartition('.')[2]} = {count}, which cannot be shared evenly among {self._world_size} ranks; "
                    f"choose a world_size that divides {count}",
                    permanent=True,
                )

    def warm_up(self) -> None:
        """Meet the other ranks, then generate a few tokens."""
        if self._group is not None:
            # On the CPU's stream, as in mlx-lm: a GPU must not wait, because it has a watchdog.
            met = self._mx.distributed.all_sum(self._mx.array(1), group=self._group, stream=self._mx.cpu).item()
            if met != self._world_size:
                raise EngineFailure(f"{met} ranks met in the warm-up of {self._world_size}")
        deque(self._tokens([0, 0], _WARM_UP_TOKENS, threading.Event()), maxlen=0)

    def generate(self, prompt: str, max_tokens: int, stop: threading.Event) -> Generator[str, None, None]:
        """Generate until the end of the text, until `max_tokens`, or until `stop` is set on any rank; yields once per token."""
        yield from self._tokens(self._prompt_ids(prompt), max_tokens, stop)

    def _prompt_ids(self, prompt: str) -> list[int]:
        tokenizer = self._tokenizer
        if self._use_chat_template and tokenizer.has_chat_template:
            messages = [{"role": "user", "content": prompt}]
            return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        # As in stream_generate: a prompt that has the first token already gets no second one.
        special = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        # An empty prompt of a model without a first token would have no token at all.
        return list(tokenizer.encode(prompt, add_special_tokens=special)) or [tokenizer.eos_token_id or 0]

    def _tokens(self, ids: list[int], max_tokens: int, stop: threading.Event) -> Generator[str, None, None]:
        """Yield the text of each token. With several ranks, all take rank 0's choice, and all stop together.

        All ranks compute the same numbers, except for rounding, which may differ between kinds of machines. A rank that chose
        another token, or stopped at another one, would hang the rest. So the ranks exchange choices and wishes to stop at every token.
        """
        mx = self._mx
        ballots: deque[Any] = deque()

        # From an array of shape (1, vocabulary) to one of shape (1,).
        def choose(log_probabilities: Any) -> Any:  # noqa: ANN401 - MLX has no types here
            token = mx.argmax(log_probabilities, axis=-1)
            if self._group is None:
                return token
            mine = token if self.rank == 0 else mx.zeros_like(token)
            wish = mx.array([int(stop.is_set())], dtype=token.dtype)
            ballot = mx.distributed.all_sum(mx.concatenate([mine, wish]), group=self._group)
            ballots.append(ballot)
            return ballot[:1]

        def between_parts(done: int, total: int) -> None:
            if 0 < done < total and self._any_wants(stop):
                raise _Stopped

        try:
            for response in self._mlx_lm.stream_generate(
                self._model,
                self._tokenizer,
                ids,
                max_tokens=max_tokens,
                sampler=choose,
                prefill_step_size=self._prefill_step_size,
                prompt_progress_callback=between_parts,
            ):
                yield response.text
                # Use the agreement of this token, and not a later wish: all ranks must read the same value.
                if ballots.popleft()[1].item() if self._group is not None else stop.is_set():
                    return
        except _Stopped:
            return

    def _any_wants(self, stop: threading.Event) -> bool:
        if self._group is None:
            return stop.is_set()
        wishes = self._mx.array(int(stop.is_set()))
        return bool(self._mx.distributed.all_sum(wishes, group=self._group).item())

    def release(self) -> None:
        """Drop the model, and give the memory that MLX keeps for reuse back to the system."""
        self._model = self._tokenizer = self._group = None
        if self._mx is not None:
            self._mx.clear_cache()


def _head_counts(model: Any) -> dict[str, int]:  # noqa: ANN401 - MLX has no types here
    """The number of attention heads that each part of a model names, by the path of that attribute."""
    return {
        f"{index}.{path}.{name}": count
        for index, layer in enumerate(model.layers)
        for path, module in layer.named_modules()
        for name in _HEAD_COUNTS
        if isinstance(count := getattr(module, name, None), int)
    }


def _located(name: str) -> str:
    """A model's directory, or its id on the hub. A name that can only be a path is never looked up in the network."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise EngineFailure(f"the model {name} is a file; name the directory that has its config.json", permanent=True)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise EngineFailure(
            f"there is no model directory {name} on this machine; put it there, or set model in the engine's configuration",
            permanent=True,
        )
    return name


def _classed(error: Exception, name: str) -> EngineFailure:
    """Turn an error of a load into an `EngineFailure`, permanent if another attempt would fail too."""
    if isinstance(error, EngineFailure):
        return error
    hub: Any = importlib.import_module("huggingface_hub.errors")  # mlx-lm depends on it
    text = " ".join(str(error).split()) or type(error).__name__
    said = f"the model {name} could not be loaded: {type(error).__name__}: {text}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _about_memory(text)):
        return EngineFailure(f"{said}; free memory on this machine, or share the model among more ranks")
    if isinstance(error, hub.LocalEntryNotFoundError):  # a subclass of FileNotFoundError, so it comes first
        return EngineFailure(f"{said}; it is not on this machine, and the hub cannot be reached")
    if isinstance(error, (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError)):
        return EngineFailure(
            f"{said}; name a directory with the model, or an id that exists on the hub", permanent=True
        )
    if isinstance(error, (FileNotFoundError, LookupError, TypeError, ValueError)):
        # A file is missing, or this version of mlx-lm does not understand it. Every attempt would fail.
        return EngineFailure(said, permanent=True)
    if isinstance(error, RuntimeError) and "safetensors" in text:
        return EngineFailure(f"{said}; fetch its files again", permanent=True)
    return EngineFailure(said)


def _about_memory(text: str) -> bool:
    return any(
        word in text.lower() for word in ("malloc", "out of memory", "insufficient memory", "unable to allocate")
    )
