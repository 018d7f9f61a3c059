"""How many replicas: by the tokens that wait and that come, not by requests. No Ray, no clock, no torch.

    what each replica counted, requests in front of them ─▶ decide ─▶ number of replicas, predicted time to first token

The model is a queue of work. A busy replica computes r tokens a second, prompts and answers together, and takes
requests first come, first served; being busy it takes in as many tokens as it finishes. So a newcomer's wait is

    wait = Q / r             Q: prompt tokens not yet computed, and the answers of those that have no place yet
    time to first token = wait + p / r             p: its own prompt, which no number of replicas shortens
    drain = (Q + answers that run) / r             until all that is here has ended

on the replica with the least Q, since that is where the router sends it; requests in front of the replicas are shared
by all. `r` is measured only where it shows: over an interval at whose start more was queued than was computed in it.

Up at once: `λ / (UP · r)` replicas carry the λ tokens that come in a second; while the wait is above the target, `Q /
(r · catch_up_s)` more work off what waits already. Down slowly: to the most that was needed at any moment of
`downscale_delay_s` (the stabilisation window of Kubernetes' HorizontalPodAutoscaler), where "needed" leaves the margin
DOWN in rate, room and wait, judged as if the emptiest replicas went. Between UP and DOWN nothing moves.

Serve pickles this module whole and runs it in its controller, so it imports nothing of ours.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

UP = 0.75
"""Of what the replicas can compute: more than this is coming, and another one is added before anybody waits."""

DOWN = 0.6
"""Of rate, room and target: fewer replicas must do with this much. Below UP, so that steady traffic moves nothing."""

_log = logging.getLogger("ray.serve")  # the controller's

_ARRIVAL_MEMORY_S = 60.0
_RATE_MEMORY_S = 30.0
_SIZE_MEMORY_REQUESTS = 200.0
_MIN_INTERVAL_S = 0.5
"""Between two samples of a replica. In less, one step more or less is too large a part of what was computed."""


@dataclass(frozen=True)
class Settings:
    """What is aimed at. `max_running` is how many sequences a replica runs at once."""

    target_ttft_s: float
    catch_up_s: float
    downscale_delay_s: float
    max_running: int


@dataclass(frozen=True)
class ReplicaLoad:
    """What one replica says at `time_s` of its own clock: three counters since its start, then what is there now."""

    id: str
    time_s: float
    requests: float = 0.0
    prompt_tokens: float = 0.0  # computed
    generated_tokens: float = 0.0
    running: float = 0.0
    waiting: float = 0.0
    queued_prompt_tokens: float = 0.0  # not computed yet, of the running and the waiting
    waiting_answer_tokens: float = 0.0  # at most to come, by max_tokens
    running_answer_tokens: float = 0.0
    kv_used: float = 0.0  # 0 to 1: the part of its key-value memory that is held


@dataclass(frozen=True)
class Snapshot:
    """The deployment at one moment. Of `num_running` replicas some may not have reported yet: they are empty."""

    now_s: float
    replicas: tuple[ReplicaLoad, ...]
    num_running: int
    target: int  # replicas that were last decided on; more than run while some start
    queued_requests: float  # in front of the replicas
    min_replicas: int
    max_replicas: int


@dataclass(frozen=True)
class Track:
    """What is remembered of one replica."""

    load: ReplicaLoad
    requests_per_s: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """Sums over about the last _SIZE_MEMORY_REQUESTS requests, which give the mean request.

    A running request counts as half answered, as it is on average; counting ended ones alone would overestimate.
    """

    begun: float = 0.0
    prompt_tokens: float = 0.0
    answered: float = 0.0
    answer_tokens: float = 0.0

    @property
    def prompt(self) -> float:
        """Mean tokens of a prompt that had to be computed; 0 while none is known."""
        return self.prompt_tokens / self.begun if self.begun else 0.0

    @property
    def answer(self) -> float | None:
        """Mean tokens of an answer."""
        return self.answer_tokens / self.answered if self.answered else None

    def answers(self, count: float, most: float) -> float:
        """Tokens that `count` answers will have: `most` by max_tokens, but answers end before it as others did."""
        return most if self.answer is None else min(most, count * self.answer)

    def add(self, last: ReplicaLoad, load: ReplicaLoad) -> "Sizes":
        """With what a replica did between two samples."""
        begun = max(0.0, (load.requests - load.waiting) - (last.requests - last.waiting))
        answered = max(0.0, begun - (load.running - last.running) / 2)
        keep = math.exp(-begun / _SIZE_MEMORY_REQUESTS)
        return Sizes(
            self.begun * keep + begun,
            self.prompt_tokens * keep + load.prompt_tokens - last.prompt_tokens,
            self.answered * keep + answered,
            self.answer_tokens * keep + load.generated_tokens - last.generated_tokens,
        )


@dataclass(frozen=True)
class State:
    """What is remembered from one decision to the next."""

    tokens_per_s: float | None = None  # of a busy replica; None until one was seen busy
    tracks: Mapping[str, Track] = field(default_factory=dict)
    sizes: Sizes = Sizes()
    decided: int = 0  # what it was last
    front: tuple[float, float] | None = None  # requests in front of the replicas: when, and how many
    front_per_s: float = 0.0  # how fast they become more; less than 0 while replicas take in what waited
    peaks: tuple[tuple[float, int], ...] = ()  # when, and how many were needed: falling, the first is the most


@dataclass(frozen=True)
class Decision:
    """How many replicas there shall be. The predictions are for those that run now; inf: it cannot be said yet."""

    replicas: int
    ttft_s: float
    drain_s: float


def decide(settings: Settings, state: State, seen: Snapshot) -> tuple[Decision, State]:
    """One decision; call it often. It stays within min and max, and more load never gives fewer replicas."""
    state = observe(state, seen)
    work = _Work(state, seen)
    up, calm = _to_carry(settings, work), _to_keep(settings, work)
    others = seen.target if seen.target > state.decided else 0  # what was there, or raised, without us
    newest = seen.now_s, _bounded(max(up, calm, others), seen)
    peaks = _push(state.peaks, seen.now_s - settings.downscale_delay_s, newest)
    number = seen.target
    if up > seen.target:
        number = up
    elif peaks[0][1] < seen.target:
        number = max(peaks[0][1], 1 if seen.target > 1 else 0)  # the last one goes alone
    number = _bounded(number, seen)
    decision = Decision(number, work.ttft_s(max(1, seen.num_running)), work.drain_s)
    return decision, replace(state, decided=number, peaks=peaks)


def predict_ttft_s(state: State, seen: Snapshot, replicas: int) -> float:
    """Seconds from a request's arrival to its first token with so many replicas, the emptiest of today's gone."""
    return _Work(state, seen).ttft_s(replicas)


class TokenPolicy:
    """That policy behind Serve's autoscaling hook; an instance is made in the controller, and asked ten times a second.

    Serve itself makes it one replica when none runs and a request waits, without asking.
    """

    def __init__(self, **settings: Any) -> None:
        """Settings, by name."""
        self._settings = Settings(**settings)
        self._state = State()
        self._complaint = ""

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        """The number of replicas, and no state: it is in here. What it raised would halt Serve's whole control loop."""
        try:
            decision, self._state = decide(self._settings, self._state, _snapshot(context))
        except Exception as error:  # an edge of the process, see above
            if self._complaint != (complaint := repr(error)):
                _log.exception("luthier autoscaling: no decision, the number of replicas stays")
            self._complaint = complaint
            return context.target_num_replicas, {}
        if decision.replicas != context.target_num_replicas:
            _log.info(
                "luthier autoscaling: %d to %d replicas; time to first token now %.1f s, all work done in %.1f s",
                context.target_num_replicas,
                decision.replicas,
                decision.ttft_s,
                decision.drain_s,
            )
        return decision.replicas, {}


def _snapshot(context: "AutoscalingContext") -> Snapshot:
    """The newest that each replica has said; one that has said nothing yet is left out."""
    said = context.raw_metrics or {}
    names = [each.name for each in fields(ReplicaLoad) if each.name != "id"]
    loads = []
    for replica in context.running_replicas:
        values = {name: said[name][replica][-1].value for name in names if said.get(name, {}).get(replica)}
        if "time_s" in values:
            loads.append(ReplicaLoad(replica.unique_id, **values))
    return Snapshot(
        now_s=context.current_time,
        replicas=tuple(loads),
        num_running=context.current_num_replicas,
        target=context.target_num_replicas,
        queued_requests=context.total_queued_requests,
        min_replicas=context.capacity_adjusted_min_replicas,
        max_replicas=context.capacity_adjusted_max_replicas,
    )


def observe(state: State, seen: Snapshot) -> State:
    """Take in what the replicas have counted since the last time."""
    tracks: dict[str, Track] = {}
    rate, sizes = state.tokens_per_s, state.sizes
    for load in seen.replicas:
        track = state.tracks.get(load.id)
        if track is None:
            tracks[load.id] = Track(load)
            sizes = sizes.add(ReplicaLoad(load.id, load.time_s), load)  # all that it ever did
            continue
        tracks[load.id], last = track, track.load
        interval_s = load.time_s - last.time_s
        if interval_s < _MIN_INTERVAL_S:
            continue
        tokens = load.prompt_tokens + load.generated_tokens - last.prompt_tokens - last.generated_tokens
        is_busy = 0 < tokens <= _queued_tokens(last, state.sizes)
        if is_busy or (rate is not None and tokens / interval_s > rate):
            rate = _toward(rate, tokens / interval_s, interval_s / _RATE_MEMORY_S)
        sizes = sizes.add(last, load)
        arrived_per_s = (load.requests - last.requests) / interval_s
        requests_per_s = _toward(track.requests_per_s, arrived_per_s, interval_s / _ARRIVAL_MEMORY_S)
        tracks[load.id] = Track(load, requests_per_s)
    front, front_per_s = state.front or (seen.now_s, seen.queued_requests), state.front_per_s
    interval_s = seen.now_s - front[0]
    if interval_s >= _MIN_INTERVAL_S:
        more_per_s = (seen.queued_requests - front[1]) / interval_s
        front_per_s = _toward(front_per_s, more_per_s, interval_s / _ARRIVAL_MEMORY_S)
        front = seen.now_s, seen.queued_requests
    return replace(state, tokens_per_s=rate, tracks=tracks, sizes=sizes, front=front, front_per_s=front_per_s)


class _Work:
    """The work that is here and that comes, in tokens."""

    def __init__(self, state: State, seen: Snapshot) -> None:
        sizes = state.sizes
        self.rate = state.tokens_per_s
        self.prompt = sizes.prompt
        request = sizes.prompt + (sizes.answer or 0.0)
        requests_per_s = state.front_per_s + sum(track.requests_per_s for track in state.tracks.values())
        self.arriving_per_s = request * max(0.0, requests_per_s)
        self.in_front = request * seen.queued_requests
        empty = [0.0] * (seen.num_running - len(seen.replicas))
        self.queues = sorted([_queued_tokens(load, sizes) for load in seen.replicas] + empty, reverse=True)
        self.is_idle = not seen.queued_requests and not any(each.running or each.waiting for each in seen.replicas)
        self.is_queued = seen.queued_requests > 0 or any(self.queues)
        self.running_answers = sum(sizes.answers(each.running, each.running_answer_tokens) for each in seen.replicas)
        self.seen = seen

    def wait_s(self, replicas: int) -> float:
        """A newcomer's wait where `replicas` are left, those with the longest queues; further ones are empty."""
        if not self.is_queued:
            return 0.0
        if self.rate is None or replicas == 0:
            return math.inf
        least = self.queues[replicas - 1] if replicas <= len(self.queues) else 0.0
        return (least + self.in_front / replicas) / self.rate

    def ttft_s(self, replicas: int) -> float:
        own_s = self.prompt / self.rate if self.rate else 0.0
        return self.wait_s(replicas) + own_s

    @property
    def drain_s(self) -> float:
        if self.is_idle:
            return 0.0
        if self.rate is None or not self.queues:
            return math.inf
        return (sum(self.queues) + self.in_front + self.running_answers) / (self.rate * len(self.queues))

    def room(self, max_running: int) -> float:
        """How many replicas' places or key-value memory are in use."""
        return sum(max(each.running / max_running, each.kv_used) for each in self.seen.replicas)


def _to_carry(settings: Settings, work: _Work) -> int:
    """How many replicas the load asks for now."""
    if work.is_idle or work.rate is None:
        return 0 if work.is_idle else 1
    needed = work.arriving_per_s / (UP * work.rate)
    if work.wait_s(len(work.queues)) > _longest_wait_s(settings, work):
        needed += (sum(work.queues) + work.in_front) / (work.rate * settings.catch_up_s)
    return max(1, math.ceil(needed))


def _to_keep(settings: Settings, work: _Work) -> int:
    """The fewest replicas, up to today's, that would do with a margin."""
    if work.is_idle:
        return 0
    longest_s = DOWN * _longest_wait_s(settings, work)
    for number in range(1, work.seen.target):
        carries = work.rate is None or work.arriving_per_s <= DOWN * work.rate * number
        if carries and work.room(settings.max_running) <= DOWN * number and work.wait_s(number) <= longest_s:
            return number
    return work.seen.target


def _longest_wait_s(settings: Settings, work: _Work) -> float:
    """What the target leaves to wait beside a mean prompt; at least half of it, since replicas only shorten that."""
    own_s = work.prompt / work.rate if work.rate else 0.0
    return max(settings.target_ttft_s - own_s, settings.target_ttft_s / 2)


def _queued_tokens(load: ReplicaLoad, sizes: Sizes) -> float:
    """Q of one replica."""
    return load.queued_prompt_tokens + sizes.answers(load.waiting, load.waiting_answer_tokens)


def _toward(old: float | None, new: float, weight: float) -> float:
    """Exponential smoothing; `weight` is the interval in units of the memory."""
    return new if old is None else old + (1 - math.exp(-weight)) * (new - old)


def _bounded(number: int, seen: Snapshot) -> int:
    return max(seen.min_replicas, min(seen.max_replicas, number))


def _push(peaks: Iterable[tuple[float, int]], oldest_s: float, new: tuple[float, int]) -> tuple[tuple[float, int], ...]:
    """The maximum over a sliding window: what is older, or not more than the newest, can never be it again."""
    return (*(each for each in peaks if each[0] > oldest_s and each[1] > new[1]), new)
