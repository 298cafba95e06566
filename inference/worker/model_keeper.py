"""Who loads and unloads a worker's models, and when: looks at all of them, plans (residency.py), acts.

One thread looks whenever something may have changed, and at least every few seconds; another loads and unloads, one
model at a time, so that neither task threads nor the engines of other models wait for it. A ticket stays in Redis until
its model is loaded: it can be cancelled, runs out of time, or goes to another worker, as if it waited for a slot.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import redis
from django.db import connection

from inference import metrics
from inference.engine.types import EngineError
from inference.transport.queue import Mark, TicketQueue, Waiting
from inference.worker import residency
from inference.worker.hosted import TOO_LARGE, HostedModel, State
from inference.worker.memory import budget_of_machine, release_memory
from inference.worker.residency import Place, Plan, Resident, Want

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
"""Without any news the keeper looks this often."""
WAITING_LOOK_SECONDS = 0.2
PAST_LOOK_SECONDS = 0.5
ELSEWHERE_SECONDS = 1.0
"""A worker that would have to end others' work for a model leaves its tickets to other workers for so long."""
STOP_SECONDS = 5.0


class ModelKeeper:
    """models: all of the worker, of which `lock` guards num_busy and retirements. on_loaded is called after each load,
    on the loading thread. refuse: end all tickets that wait for a model, with its error_code."""

    def __init__(
        self,
        pool: str,
        worker_id: str,
        queue: TicketQueue,
        *,
        models: Callable[[], Sequence[HostedModel]],
        lock: threading.Lock,
        on_loaded: Callable[[HostedModel], None],
        refuse: Callable[[HostedModel], None],
        budget_bytes: float | None = None,
    ) -> None:
        self._pool, self._worker_id, self._queue = pool, worker_id, queue
        self._models, self._lock = models, lock
        self._on_loaded, self._refuse = on_loaded, refuse
        self.budget_bytes = budget_of_machine() if budget_bytes is None else budget_bytes
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._num_asked = self._num_answered = 0
        self._ordered: dict[int, tuple[Want, float]] = {}
        self._dismissed: set[int] = set()
        self._is_stopping = False
        self._job: Future[None] | None = None  # the looking thread's alone
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="models")
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self.waiting: dict[int, Waiting] = {}
        """What waited for each model at the latest look. Any thread reads it."""

    # Asked from any thread

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """Load nothing more; a load that goes on is given up. Waits so long at most, for a look that goes on."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        for model in self._models():
            model.give_up_loading()
        if self._thread.ident is not None:
            self._thread.join(min(seconds, STOP_SECONDS))
        self._loader.shutdown(wait=False, cancel_futures=True)

    def look(self) -> None:
        """Something may have changed."""
        with self._changed:
            self._num_asked += 1
            self._changed.notify_all()

    def order(self, model: HostedModel, *, by_operator: bool = True) -> None:
        """Load it, whether anybody waits for it or not; what failed before is tried again. Eager models take the place
        of no other."""
        model.forgive()
        with self._changed:
            self._dismissed.discard(model.served.id)
            self._ordered[model.served.id] = (Want.ORDER if by_operator else Want.EAGER, time.monotonic())
        self.look()

    def dismiss(self, model: HostedModel) -> None:
        """Unload it as soon as it is idle; until then it takes no more requests."""
        with self._changed:
            self._ordered.pop(model.served.id, None)
            self._dismissed.add(model.served.id)
        self.look()

    def wait_until_settled(self, seconds: float = 600.0) -> bool:
        """Wait until everything that can be loaded and unloaded now is; whether it came to that."""
        with self._changed:
            self._num_asked += 1
            asked = self._num_asked
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._num_answered >= asked or self._is_stopping, timeout=seconds)

    @property
    def used_bytes(self) -> int:
        return sum(model.served.memory.total_bytes for model in self._models() if model.is_in_memory)

    # The looking thread

    def _run(self) -> None:
        answered = -1
        while (asked := self._wait(answered, self._pause())) is not None:
            try:
                is_settled = self._look()
            except Exception:  # a thread's border: models must go on being loaded
                logger.exception("the models could not be looked at")
                is_settled = True
            answered = asked
            if is_settled:
                with self._changed:
                    self._num_answered = max(self._num_answered, asked)
                    self._changed.notify_all()

    def _wait(self, answered: int, seconds: float) -> int | None:
        """Until somebody asks, or so long; what is asked for by then, None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or self._num_asked > answered, timeout=seconds)
            return None if self._is_stopping else self._num_asked

    def _pause(self) -> float:
        """Until a model has been idle for long enough, or the patience of those that wait may be over."""
        models, now = self._models(), time.monotonic()
        if any(model.is_waiting for model in models):
            return WAITING_LOOK_SECONDS
        ends = [model.unload_at - now for model in models if model.state is State.READY and model.is_idle()]
        soonest = min(ends, default=LOOK_SECONDS)
        # What is over already, and is still here, waits for something else.
        return min(LOOK_SECONDS, soonest) if soonest > 0 else PAST_LOOK_SECONDS

    def _look(self) -> bool:
        """One look. Whether nothing is being loaded or unloaded."""
        now = time.monotonic()
        models = {model.served.id: model for model in self._models()}
        plain = [self._view(model, self.waiting.get(model_id), now) for model_id, model in models.items()]
        obstacles = {each.id: residency.obstacle(each, plain, self.budget_bytes) for each in plain}
        self.waiting = waiting = self._ask(models, plain, obstacles)
        self._turn_away(models, obstacles, waiting)
        views = [self._view(model, waiting.get(model_id), now) for model_id, model in models.items()]
        plan = residency.plan(views, self.budget_bytes, now)
        for model_id in plan.left_out:
            self._leave_out(models[model_id])
        for model_id in plan.retire:
            self._retire(models[model_id])
        for model_id, model in models.items():
            model.is_waiting = model_id in plan.waiting
        with self._changed:
            self._dismissed -= {each.id for each in views if each.place is Place.OUT}
        if self._job is not None and not self._job.done():
            return False
        return not self._act(models, plan)

    def _act(self, models: dict[int, HostedModel], plan: Plan) -> bool:
        """Begin what comes next, unloads first. Whether there is something."""
        for model_id, why in plan.unload:
            if self._retire(models[model_id], only_idle=True):
                self._submit(self._unload, models[model_id], why)
                return True
        if plan.load is not None:
            self._submit(self._load, models[plan.load])
            return True
        return False

    def _submit(self, job: Callable[..., None], *arguments: Any) -> None:
        self._job = self._loader.submit(job, *arguments)
        self._job.add_done_callback(lambda _: self.look())

    def _ask(
        self, models: dict[int, HostedModel], plain: Sequence[Resident], obstacles: dict[int, str | None]
    ) -> dict[int, Waiting]:
        """What waits for each model; of those that nobody holds, what this worker is to load. Without Redis none."""
        marks = {each.id: self._mark(models[each.id], each, plain, obstacles[each.id]) for each in plain}
        try:
            return self._queue.waiting(self._pool, self._worker_id, marks)
        except redis.RedisError as error:
            logger.warning("no model is loaded for those who wait until Redis is back: %s", error)
            return {}

    def _mark(self, model: HostedModel, view: Resident, views: Sequence[Resident], obstacle: str | None) -> Mark:
        if view.place is not Place.OUT:
            return Mark.HELD
        if obstacle or (model.state is State.FAILED and not model.may_retry()):
            return Mark.UNABLE
        known = self.waiting.get(view.id)
        if residency.has_room(view, views, self.budget_bytes) or (known and known.seconds > ELSEWHERE_SECONDS):
            return Mark.ABLE
        return Mark.LATER

    def _view(self, model: HostedModel, waiting: Waiting | None, now: float) -> Resident:
        model_id = model.served.id
        want, since = self._want(model, waiting, now)
        return Resident(
            id=model_id,
            num_bytes=model.served.memory.total_bytes,
            place=_place_of(model),
            is_busy=not model.is_idle(),
            # What nobody could ask for is not known to be idle.
            num_waiting=waiting.number if waiting else int(not self.waiting),
            used_at=model.used_at,
            loaded_at=model.loaded_at,
            unload_at=model.unload_at,
            is_pinned=model.served.is_pinned,
            is_dismissed=model_id in self._dismissed,
            want=want,
            wanted_at=since,
            patience=residency.patience(model.expected_load_seconds()),
        )

    def _want(self, model: HostedModel, waiting: Waiting | None, now: float) -> tuple[Want | None, float]:
        if model.state is State.FAILED and not model.may_retry():
            return None, math.inf
        with self._changed:
            ordered = self._ordered.get(model.served.id)
        if waiting and waiting.is_mine and waiting.number:
            return Want.TICKET, now - waiting.seconds
        return ordered or (None, math.inf)

    def _turn_away(
        self, models: dict[int, HostedModel], obstacles: dict[int, str | None], waiting: dict[int, Waiting]
    ) -> None:
        """End what waits for models that no worker can load, and say why."""
        for model_id, model in models.items():
            obstacle, known = obstacles[model_id], waiting.get(model_id)
            with self._changed:
                is_ordered = model_id in self._ordered
            if obstacle and _place_of(model) is Place.OUT and (is_ordered or (known and known.number)):
                with self._changed:
                    self._ordered.pop(model_id, None)
                text = f"{model.served.name} cannot be loaded: {obstacle}"
                if model.error != text or model.state is not State.FAILED:
                    model.fail(text, TOO_LARGE)
                    metrics.MODEL_LOADS.labels(model.served.name, "does_not_fit").inc()
            elif not obstacle and model.state is State.FAILED and model.error_code == TOO_LARGE:
                model.forgive()
            if known and known.is_hopeless and known.number:
                self._refuse(model)

    def _leave_out(self, model: HostedModel) -> None:
        logger.warning("%s is loaded by its first request: others fill the memory", model.served.name)
        model.comes_on_demand = True
        with self._changed:
            self._ordered.pop(model.served.id, None)

    def _retire(self, model: HostedModel, *, only_idle: bool = False) -> bool:
        """It takes no more requests. only_idle: unless somebody uses it at this moment."""
        with self._lock:
            if only_idle and not model.is_idle():
                return False
            if model.state in (State.READY, State.RETIRING):
                model.retire()
                return True
            return False

    # The loading thread

    def _load(self, model: HostedModel) -> None:
        name = model.served.name
        with self._changed:
            ordered = self._ordered.get(model.served.id)
            if _was_replaced(model):
                return  # what is ordered since the look is its successor
            self._dismissed.discard(model.served.id)
        try:
            model.load()
        except EngineError:
            if _was_replaced(model):
                return
            metrics.MODEL_LOADS.labels(name, "failed").inc()
            logger.warning("the worker goes on without %s", name)
        else:
            metrics.MODEL_LOADS.labels(name, "loaded").inc()
            metrics.MODEL_LOAD_SECONDS.labels(name).observe(model.load_seconds or 0.0)
            if ordered:
                model.use()  # whoever ordered it wants it to be there for a while
            self._on_loaded(model)
        finally:
            with self._changed:
                if self._ordered.get(model.served.id) is ordered:
                    self._ordered.pop(model.served.id, None)
            connection.close()

    def _unload(self, model: HostedModel, why: str) -> None:
        logger.info("unloading %s: %s", model.served.name, why)
        try:
            model.unload()
        except EngineError:
            why = "failed"
        finally:
            with self._changed:
                self._dismissed.discard(model.served.id)
        metrics.MODEL_UNLOADS.labels(model.served.name, why).inc()
        release_memory()


def _was_replaced(model: HostedModel) -> bool:
    """Another thread does that, between two questions too."""
    return model.is_replaced


def _place_of(model: HostedModel) -> Place:
    if model.state is State.LOADING:
        return Place.COMING
    if not model.is_in_memory:
        return Place.OUT
    return Place.GOING if model.state is State.RETIRING else Place.IN
