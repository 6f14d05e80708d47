"""Units as tasks and actors of Ray: it schedules, retries and ships; nothing of that is done here.

The only module that imports Ray, which is an optional dependency.
"""

import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before Ray is imported: nothing is reported to its makers, and tasks without a GPU see the devices that there are.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from quantlab.errors import CheckpointError, ModelError, ResumableError, UsageError
from quantlab.executors.inbox import Inbox, Message, PostedProgress, deliver, warnings_posted
from quantlab.executors.nodes import NodeReport, report_node, require_alike
from quantlab.executors.opening import ExecutorOptions
from quantlab.executors.protocol import Link, Resources
from quantlab.executors.unit import Failure, Settings, run_unit
from quantlab.progress import Progress

RETRIES = 5
"""How often a unit that is lost with its machine or process is tried again."""

POLL_S = 0.25
HEAD_CHECK_S = 2.0
HEAD_SILENCE_S = 12.0
"""After this long without an answer the head counts as dead; Ray would end this process after 60 seconds."""

NODE_CHECK_S = 120.0
MESSAGE_LENGTH = 160


class _Seat:
    """An actor: a process that sticky units return to."""

    def run(self, *arguments: Any) -> Any:
        return run_unit(*arguments)


@dataclass(frozen=True, eq=False)
class _RayLink:
    """Reaches the inbox from wherever the unit runs."""

    inbox: Any

    @contextmanager
    def reporting(self, name: str) -> Iterator[Progress]:
        """See Link; warnings of the unit are reported, too."""

        def post(text: str) -> None:
            self.inbox.post.remote((name, text))

        with warnings_posted(post):
            yield PostedProgress(post)

    def stop(self) -> bool:
        """See Link."""
        try:
            return bool(ray.get(self.inbox.stopping.remote(), timeout=HEAD_SILENCE_S))
        except (RayError, GetTimeoutError):  # the driver is gone, and with it the reason to go on
            return True


class RayExecutor:
    """Runs units on a Ray cluster, or on a Ray of its own on this machine; see `Executor`.

    Args:
        options: the cluster, and what a unit occupies.

    Raises:
        UsageError: on entering, if the cluster cannot be reached; later, if no node has what a unit needs.
    """

    def __init__(self, options: ExecutorOptions) -> None:
        self.remote = True
        self._options = options
        self.task = Resources(cpus=options.cpus_per_task, gpus=options.gpus_per_task)
        self._seats: list[Any] = []
        self._waiting: set[Any] = set()
        self._inbox: Any = None
        self._messages: Future[list[Message]] | None = None
        self._from_ray: list[Message] = []
        self._progress: Progress | None = None
        self._asked_to_stop: Callable[[], bool] = lambda: False
        self._stop_passed_on = False
        self._has_room_for: dict[str, float] | None = None

    def __enter__(self) -> "RayExecutor":
        """Connect, or start."""
        # From a thread of its own Ray writes to the terminal, in the middle of the panel.
        self._printed_by_ray = vars(ray._private.worker)["print_to_stdstream"]
        vars(ray._private.worker)["print_to_stdstream"] = self._keep
        _connect(self._options)
        context = ray.get_runtime_context()
        self._head = _Head(context.gcs_address)
        here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
        self._inbox = ray.remote(Inbox).options(num_cpus=0, scheduling_strategy=here).remote()
        return self

    def __exit__(self, *error: object) -> None:
        """Cancel what is not done, and end what was started."""
        self._cancel(self._waiting)
        ray.shutdown()
        vars(ray._private.worker)["print_to_stdstream"] = self._printed_by_ray

    @property
    def slots(self) -> int:
        """See Executor."""
        return _slots(_requested(self.task))

    def require_shared(self, model_folder: Path, folder: Path | None) -> None:
        """See Executor."""
        model_folder = model_folder.absolute()  # a process there may begin in another folder
        with ExitStack() as opened:
            probe = None
            if folder is not None:
                probe = folder.absolute() / f".probe-{uuid.uuid4().hex}"
                probe.write_text(probe.name)
                opened.callback(probe.unlink)
            driver = report_node(model_folder, probe)
            look = ray.remote(report_node)
            reports = {}
            for node in _nodes():
                there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                reference = look.options(num_cpus=0, scheduling_strategy=there).remote(model_folder, probe)
                reports[reference] = node
            for reference, node in reports.items():
                address = node["NodeManagerAddress"]
                report = self._report(reference, node["NodeID"], address)
                if report is not None:
                    require_alike(driver, report, address, model_folder, folder)

    def link(self, progress: Progress, stop: Callable[[], bool]) -> Link:
        """See Executor."""
        self._progress, self._asked_to_stop = progress, stop
        return _RayLink(self._inbox)

    def put(self, value: Any) -> Any:
        """See Executor."""
        with _storage_explained():
            return ray.put(value)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See Executor."""
        return self._submit(function, arguments, self.task)

    def map(
        self,
        function: Callable[..., Any],
        units: Iterable[tuple[Any, ...]],
        *,
        resources: Resources | None = None,
        sticky: bool = False,
        arrived: Callable[[int], None] | None = None,
    ) -> Iterator[Any]:
        """See Executor; all units are handed to Ray at once."""
        if sticky:
            references = [self._send_to_seat(seat, function, unit) for seat, unit in enumerate(units)]
        else:
            references = [self._submit(function, unit, resources or self.task) for unit in units]
        self._waiting.update(references)
        return self._results(references, arrived)

    def _results(self, references: list[Any], arrived: Callable[[int], None] | None) -> Iterator[Any]:
        futures: list[Future[Any]] = [reference.future() for reference in references]
        missing = set(range(len(futures)))

        def attend() -> None:
            self._attend()
            for position in [position for position in missing if futures[position].done()]:
                missing.discard(position)
                self._waiting.discard(references[position])
                if arrived is not None:
                    arrived(position)

        try:
            for future in futures:
                yield self._wait(future, attend)
        finally:
            unfinished = self._waiting.intersection(references)
            self._cancel(unfinished)
            self._waiting -= unfinished

    def _submit(self, function: Callable[..., Any], arguments: tuple[Any, ...], resources: Resources) -> Any:
        requested = _requested(resources)
        self._require_room(requested)
        with _storage_explained():
            # Not where Ray would pack them: units are large, and each should have a machine's memory to itself.
            remote = ray.remote(run_unit).options(max_retries=RETRIES, scheduling_strategy="SPREAD", **requested)
            return remote.remote(Settings.current(), function, *arguments)

    def _send_to_seat(self, seat: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        while len(self._seats) <= seat:
            actor = ray.remote(_Seat).options(max_restarts=-1, max_task_retries=RETRIES, scheduling_strategy="SPREAD")
            self._seats.append(actor.remote())
        with _storage_explained():
            return self._seats[seat].run.remote(Settings.current(), function, *arguments)

    def _require_room(self, requested: dict[str, float]) -> None:
        """Refuse units that Ray would hold back for ever."""
        if requested != self._has_room_for:
            if _slots(requested) == 0:
                raise UsageError(
                    f"no node of the Ray cluster has the {requested['num_cpus']} CPUs and {requested['num_gpus']:g} "
                    "GPUs that one unit occupies; give it fewer with --cpus-per-task and --gpus-per-task "
                    "(engine.deterministic: true computes on one thread)"
                )
            self._has_room_for = requested

    def _wait(self, future: "Future[Any]", attend: Callable[[], None]) -> Any:
        """The result, once it is there; meanwhile messages are shown, and the head is watched."""
        while True:
            try:
                result = future.result(timeout=POLL_S)
            except NotYet:
                attend()
                continue
            except RayTaskError as error:  # before or after the unit itself, whose errors are results
                raise ResumableError(
                    f"a unit cannot run on a node: {str(error).strip().splitlines()[-1]}; install the same packages, "
                    "plugins among them, on every node"
                ) from error
            except RayError as error:
                self._head.require()
                raise ResumableError(
                    f"a unit was lost {RETRIES + 1} times or can no longer run: {_first_line(error)}; look for "
                    "machines that run out of memory, and give units less with engine.rows_per_unit"
                ) from error
            attend()
            if not isinstance(result, Failure):
                return result
            if isinstance(result.error, ModelError | CheckpointError):  # the driver has read what that node cannot
                raise ResumableError(f"on a node of the cluster: {result.error}") from result.error
            raise result.error

    def _attend(self) -> None:
        self._head.require()
        if not self._stop_passed_on and self._asked_to_stop():
            self._inbox.request_stop.remote()
            self._stop_passed_on = True
        messages, self._from_ray = self._from_ray, []
        if self._messages is None:
            self._messages = self._inbox.take.remote().future()
        elif self._messages.done():
            with suppress(RayError):  # messages are a convenience
                messages += self._messages.result()
            self._messages = None
        if self._progress is not None:
            deliver(messages, self._progress)

    def _keep(self, data: dict[str, Any], **_: Any) -> None:
        """Take what Ray would print, such as that a node is lost."""
        self._from_ray += [("ray", _first_line(line)[:MESSAGE_LENGTH]) for line in data["lines"]]

    def _report(self, reference: Any, node: str, address: str) -> NodeReport | None:
        """What a node says about itself; None if it has been lost."""
        try:
            report: NodeReport = ray.get(reference, timeout=NODE_CHECK_S)
        except (RayError, GetTimeoutError) as error:
            if node not in {living["NodeID"] for living in _nodes()}:
                return None
            raise UsageError(
                f"node {address} cannot take part: quantlab does not run there ({_first_line(error)}); install the "
                "same quantlab-ptq on every node"
            ) from error
        return report

    def _cancel(self, references: Iterable[Any]) -> None:
        for reference in list(references):
            with suppress(Exception):  # of a dead cluster there is nothing to cancel
                ray.cancel(reference)


class _Head:
    """The head of the cluster, which is asked from time to time whether it is there.

    Args:
        address: host:port.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._asked = time.monotonic()
        self._silent_since: float | None = None

    def require(self) -> None:
        """Raise ResumableError if the head has been silent for long."""
        now = time.monotonic()
        if now - self._asked < HEAD_CHECK_S:
            return
        try:
            _reach(self._address)
        except OSError as error:
            if self._silent_since is None:
                self._silent_since = now
            if now - self._silent_since > HEAD_SILENCE_S:
                raise ResumableError(
                    f"the head of the Ray cluster at {self._address} does not answer ({error}); start the cluster again"
                ) from error
        else:
            self._silent_since = None
        self._asked = now


@contextmanager
def _storage_explained() -> Iterator[None]:
    """Turns a full object store into an error that says what to do."""
    try:
        yield
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise ResumableError(
            f"Ray's object store is full: {_first_line(error)}; give it more with --object-store (`ray start "
            "--object-store-memory` on a cluster) and room to spill with --spill-dir"
        ) from error


def _reach(address: str) -> None:
    """Raise OSError unless somebody listens at host:port."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=HEAD_CHECK_S).close()


def _connect(options: ExecutorOptions) -> None:
    try:
        if options.address is not None:
            _reach(options.address)  # Ray would ask for half a minute, and complain every second
            ray.init(address=options.address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                num_cpus=os.cpu_count(),
                object_store_memory=options.object_store_bytes,
                object_spilling_directory=options.spill_dir,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (RayError, RuntimeError, ValueError, OSError, AssertionError) as error:
        where = f"the Ray cluster at {options.address}" if options.address else "Ray on this machine"
        raise UsageError(
            f"cannot reach or start {where}: {_first_line(error)}; --address is host:port of a head that `ray start "
            "--head` has started"
        ) from error


def _nodes() -> list[dict[str, Any]]:
    """The living nodes of the cluster."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _requested(resources: Resources) -> dict[str, float]:
    """As Ray calls them."""
    return {"num_cpus": resources.cpus or torch.get_num_threads(), "num_gpus": resources.gpus}


def _slots(requested: dict[str, float]) -> int:
    """The units that fit on all nodes together."""
    return sum(_room(node["Resources"], requested) for node in _nodes())


def _room(offered: dict[str, float], needs: dict[str, float]) -> int:
    """The units that fit on a node."""
    rooms = [int(offered.get("CPU", 0) // needs["num_cpus"])]
    if needs["num_gpus"]:
        rooms.append(int(offered.get("GPU", 0) / needs["num_gpus"]))
    return min(rooms)


def _first_line(message: object) -> str:
    return next(iter(str(message).strip().splitlines()), type(message).__name__)
