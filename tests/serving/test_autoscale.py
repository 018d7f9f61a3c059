"""The autoscaling policy: alone, and on made traffic beside Serve's own policy.

The replicas of the simulation are the fluid limit of our engine's steps: a step takes STEP_S, and TOKEN_S for each
token in it; every sequence that decodes gets one, prompts get the rest, first come, first served; a place and memory
for prompt and max_tokens are taken at admission. A replica does about four mean requests a second.
"""

import json
import math
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve import autoscaling_policy as serves
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from serving.autoscale import ReplicaLoad, Settings, Snapshot, State, TokenPolicy, decide, predict_ttft_s

STEP_S, TOKEN_S, STEP_TOKENS = 0.02, 0.0005, 512
PLACES, KV_TOKENS, MAX_ONGOING = 64, 60_000, 96
MAX_TOKENS = 512  # what every request asks for; the answers are shorter, and only the replica's books know the limit
START_S = 20.0  # a replica's
MAX_REPLICAS = 8
DELAY_S = 120.0


@dataclass(eq=False)
class Request:
    at: float
    prompt: float
    answer: float
    first_token: float = math.inf
    prompt_left: float = field(init=False)
    answer_left: float = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_left, self.answer_left = self.prompt, self.answer

    @property
    def tokens(self) -> float:
        return self.prompt_left + self.answer_left


class Replica:
    """One engine."""

    def __init__(self, id_: int, now: float) -> None:
        self.id, self.ready_at = id_, now + START_S
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.requests = self.prompt_tokens = self.generated_tokens = 0.0

    @property
    def ongoing(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def tokens(self) -> float:
        return sum(each.tokens for each in (*self.waiting, *self.running))

    @property
    def kv_held(self) -> float:
        return sum(each.prompt + MAX_TOKENS for each in self.running)

    def run(self, now: float, until: float) -> None:
        while now < until:
            while self.waiting and len(self.running) < PLACES:
                if self.kv_held + self.waiting[0].prompt + MAX_TOKENS > KV_TOKENS:
                    break
                self.running.append(self.waiting.popleft())
            if not self.running:
                return
            decoding = [each for each in self.running if each.prompt_left <= 0]
            reading = [each for each in self.running if each.prompt_left > 0]
            prompts = sum(each.prompt_left for each in reading)
            share = min(prompts, STEP_TOKENS - len(decoding))
            step_s = STEP_S + TOKEN_S * (share + len(decoding))
            steps = (until - now) / step_s
            if reading:
                steps = min(steps, reading[0].prompt_left / share)
            steps = min([steps, *(each.answer_left for each in decoding)])
            now += steps * step_s
            for each in decoding:
                each.answer_left -= steps
            self.generated_tokens += steps * len(decoding)
            if reading:
                reading[0].prompt_left -= steps * share
                self.prompt_tokens += steps * share
                if reading[0].prompt_left < 1e-6:
                    reading[0].prompt_left, reading[0].first_token = 0.0, now
            self.running = [each for each in self.running if each.answer_left > 1e-6]

    def load(self, now: float) -> ReplicaLoad:
        return ReplicaLoad(
            str(self.id),
            now,
            self.requests,
            self.prompt_tokens,
            self.generated_tokens,
            len(self.running),
            len(self.waiting),
            sum(each.prompt_left for each in (*self.running, *self.waiting)),
            MAX_TOKENS * len(self.waiting),
            sum(MAX_TOKENS - each.answer + each.answer_left for each in self.running),
            self.kv_held / KV_TOKENS,
        )


Policy = Callable[[float, list[Replica], int, int], int]  # now, running, target, in front → replicas


def ours(min_replicas: int, target_ttft_s: float = 2.0) -> Policy:
    settings, state = Settings(target_ttft_s, START_S, DELAY_S, PLACES), State()

    def policy(now: float, running: list[Replica], target: int, in_front: int) -> int:
        nonlocal state
        if in_front and not running:
            return max(1, min_replicas, target)  # Serve does not ask before one runs
        loads = tuple(each.load(now) for each in running)
        seen = Snapshot(now, loads, len(running), target, in_front, min_replicas, MAX_REPLICAS)
        decision, state = decide(settings, state, seen)
        return decision.replicas

    return policy


def serves_own(min_replicas: int, target_ongoing: float) -> Policy:
    """Ray Serve's own code, with its mean over 30 s; instead of 30 s it waits 10 s upwards, and downwards as we do."""
    config = AutoscalingConfig(
        min_replicas=min_replicas,
        max_replicas=MAX_REPLICAS,
        target_ongoing_requests=target_ongoing,
        upscale_delay_s=10.0,
        downscale_delay_s=DELAY_S,
    )
    window: deque[int] = deque(maxlen=30)
    state: dict[str, Any] = {}

    def policy(now: float, running: list[Replica], target: int, in_front: int) -> int:
        nonlocal state
        window.append(in_front + sum(each.ongoing for each in running))
        total = sum(window) / len(window)
        context: Any = SimpleNamespace(
            current_num_replicas=len(running),
            target_num_replicas=target,
            total_num_requests=total,
            config=config,
            policy_state=state,
        )
        wanted, _ = serves.replica_queue_length_autoscaling_policy(context)
        if not running and total > 0:
            return max(min_replicas, min(MAX_REPLICAS, int(wanted)))
        scaled = serves._apply_scaling_factors(wanted, len(running), config)
        number, state = serves._apply_delay_logic(max(0, scaled), target, config, dict(state), now)
        return max(min_replicas, min(MAX_REPLICAS, number))

    return policy


@dataclass(frozen=True)
class Outcome:
    p95_ttft_s: float
    replica_s: float
    changes: int
    most: int


def simulate(policy: Policy, trace: list[Request], duration_s: float, min_replicas: int) -> Outcome:
    requests = [replace(each) for each in trace]
    coming, front = deque(requests), deque[Request]()
    replicas = [Replica(number, -START_S) for number in range(min_replicas)]
    leaving: list[Replica] = []
    target, made, changes, replica_s, most = min_replicas, min_replicas, 0, 0.0, min_replicas
    tick_s = 0.25
    for tick in range(int(duration_s / tick_s)):
        now = tick * tick_s
        running = [each for each in replicas if each.ready_at <= now]
        while coming and coming[0].at <= now:
            front.append(coming.popleft())
        while front and running:
            best = min(running, key=lambda each: each.tokens)
            if best.ongoing >= MAX_ONGOING:
                break
            best.requests += 1
            best.waiting.append(front.popleft())
        for each in (*running, *leaving):
            each.run(now, now + tick_s)
        leaving = [each for each in leaving if each.ongoing]
        replica_s += tick_s * (len(replicas) + len(leaving))
        if tick % 4 == 3:
            wanted = policy(now + tick_s, running, target, len(front))
            assert min_replicas <= wanted <= MAX_REPLICAS
            changes += wanted != target
            target, most = wanted, max(most, wanted)
            while len(replicas) < target:
                replicas.append(Replica(made, now))
                made += 1
            while len(replicas) > target:
                gone = replicas.pop()  # Serve, too, takes the newest
                if gone.ready_at <= now:
                    leaving.append(gone)
    waits = sorted(each.first_token - each.at for each in requests)
    return Outcome(waits[int(len(waits) * 0.95)], replica_s, changes, most)


def arrivals(
    rate: Callable[[float], float], until_s: float, size: Callable[[random.Random], tuple[int, int]], seed: int = 1
) -> list[Request]:
    """A Poisson process whose rate changes, by thinning."""
    draw, now, found = random.Random(seed), 0.0, []
    top = max(rate(second) for second in range(int(until_s)))
    while (now := now + draw.expovariate(top)) < until_s:
        if draw.random() * top < rate(now):
            found.append(Request(now, *size(draw)))
    return found


def chat(draw: random.Random) -> tuple[int, int]:
    return draw.randint(100, 500), draw.randint(50, 250)


def long_contexts(draw: random.Random) -> tuple[int, int]:
    return (draw.randint(6000, 12_000), draw.randint(50, 150)) if draw.random() < 0.5 else chat(draw)


TRACES: dict[str, tuple[list[Request], float, int]] = {
    "burst": (arrivals(lambda t: 30.0 if 10 <= t < 20 else 0.05, 600, chat), 900, 0),
    "ramp": (arrivals(lambda t: min(12.0, 0.5 + t / 50), 900, chat), 1200, 1),
    "day": (arrivals(lambda t: 6.0 * (1 - math.cos(2 * math.pi * t / 1800)), 1800, chat), 2000, 1),
    "long": (arrivals(lambda t: 0.2 if t < 300 else 0.7, 900, long_contexts), 1200, 1),
    "flapping": (arrivals(lambda t: 8.0 if t % 60 < 30 else 0.2, 900, chat), 1200, 1),
}


@pytest.mark.parametrize("name", TRACES)
def test_no_setting_of_serves_own_policy_is_both_as_cheap_and_as_fast(name: str) -> None:
    """Ours has one setting for all traffic; Serve's may have any for each, and pays in replicas or in time."""
    trace, duration_s, least = TRACES[name]
    mine = simulate(ours(least), trace, duration_s, least)
    assert mine.changes <= 2 * mine.most, "it goes up once and down once, however the traffic flaps"
    for target_ongoing in (4, 8, 16, 32, 48):
        theirs = simulate(serves_own(least, target_ongoing), trace, duration_s, least)
        dearer, slower = theirs.replica_s / mine.replica_s, theirs.p95_ttft_s / mine.p95_ttft_s
        assert dearer >= 1.1 or slower >= 1.5, f"at {target_ongoing}: {theirs} beside {mine}"


@pytest.mark.parametrize("name", ["ramp", "day"])
def test_the_target_is_kept_where_traffic_grows_slower_than_replicas_start(name: str) -> None:
    trace, duration_s, least = TRACES[name]
    assert simulate(ours(least, target_ttft_s=2.0), trace, duration_s, least).p95_ttft_s <= 2.0


SETTINGS = Settings(target_ttft_s=2.0, catch_up_s=20.0, downscale_delay_s=30.0, max_running=32)
tokens = st.integers(0, 50_000)


@st.composite
def loads_after(draw: st.DrawFn, last: ReplicaLoad, now: float) -> ReplicaLoad:
    running, waiting = draw(st.integers(0, 32)), draw(st.sampled_from([0, 0, 3, 100]))
    return ReplicaLoad(
        last.id,
        now,
        last.requests + draw(st.integers(0, 100)),
        last.prompt_tokens + draw(tokens),
        last.generated_tokens + draw(tokens),
        running,
        waiting,
        draw(st.sampled_from([0, 0, 500, 50_000])) if running or waiting else 0,
        512 * waiting,
        256 * running,
        draw(st.floats(0, 1)),
    )


@st.composite
def histories(draw: st.DrawFn) -> list[Snapshot]:
    """What the policy is shown: replicas that come and go, count on, and are idle or full at will.

    A target that is not 0 is one that somebody else has set: Serve, from zero, or an update.
    """
    last: dict[str, ReplicaLoad] = {}
    now, seen = 0.0, []
    least = draw(st.integers(0, 3))
    most = draw(st.integers(max(1, least), 5))
    for _ in range(draw(st.integers(1, 12))):
        now += draw(st.sampled_from([0.1, 1.0, 5.0, 40.0]))
        for id_ in draw(st.lists(st.sampled_from("abcd"), unique=True)):
            last[id_] = draw(loads_after(last.get(id_, ReplicaLoad(id_, now)), now))
        loads = tuple(load for load in last.values() if load.time_s == now)
        queued = draw(st.sampled_from([0, 0, 1, 200]))
        raised = draw(st.sampled_from([0, 0, 0, most]))
        seen.append(Snapshot(now, loads, len(loads) + draw(st.integers(0, 1)), raised, queued, least, most))
    return seen


@pytest.mark.parametrize(
    ("load", "kept"),
    [
        ({}, 0),
        ({"running": 1}, 1),
        ({"running": 5}, 1),
        ({"running": 12}, 2),  # three times 12 of 32 places are more than DOWN of one replica's
        ({"running": 20}, 3),
        ({"running": 1, "kv_used": 0.35}, 2),
        ({"running": 1, "queued_prompt_tokens": 1300}, 3),  # 1.3 s of work, and DOWN of the target is 1.2 s
        ({"running": 1, "queued_prompt_tokens": 1100}, 1),
        ({"running": 1, "waiting": 9, "waiting_answer_tokens": 1300}, 3),
    ],
)
def test_what_keeps_three_replicas_and_for_how_long(load: dict[str, float], kept: int) -> None:
    state, target = State(tokens_per_s=1000.0), 3
    for second in range(200):
        replicas = tuple(ReplicaLoad(each, second, **load) for each in "abc"[:target])
        seen = Snapshot(second, replicas, len(replicas), target, 0, 0, 3)
        decision, state = decide(SETTINGS, state, seen)
        assert decision.replicas == target or second >= SETTINGS.downscale_delay_s
        target = decision.replicas
        if second == SETTINGS.downscale_delay_s:
            assert target == max(kept, 1), "the last one goes alone"
    assert target <= kept


@given(histories(), st.integers(0, 3))
def test_decisions_are_within_bounds_and_go_down_slowly_and_only_where_the_target_is_kept(
    seen: list[Snapshot], above: int
) -> None:
    state, raised_at = State(), seen[0].now_s
    target = min(seen[0].max_replicas, seen[0].min_replicas + above)
    for each in seen:
        if each.target > target:
            target, raised_at = each.target, each.now_s
        shown = replace(each, target=target)
        decision, state = decide(SETTINGS, state, shown)
        assert each.min_replicas <= decision.replicas <= each.max_replicas
        if shown.queued_requests or any(load.running or load.waiting for load in shown.replicas):
            assert decision.replicas >= 1
        if decision.replicas < target:
            assert each.now_s - raised_at >= SETTINGS.downscale_delay_s
            own_s = state.sizes.prompt / (state.tokens_per_s or math.inf)
            longest_s = max(SETTINGS.target_ttft_s, own_s + SETTINGS.target_ttft_s / 2)
            assert predict_ttft_s(state, shown, decision.replicas) <= longest_s
        if decision.replicas > target:
            raised_at = each.now_s
        target = decision.replicas


@given(histories(), st.integers(0, 5), st.data())
def test_more_load_never_gives_fewer_replicas(seen: list[Snapshot], target: int, data: st.DataObject) -> None:
    """What was learnt being the same."""
    state = learnt(seen)
    last = replace(seen[-1], target=max(seen[-1].min_replicas, min(seen[-1].max_replicas, target)))
    more = replace(
        last,
        queued_requests=last.queued_requests + data.draw(st.integers(0, 100)),
        replicas=tuple(
            replace(
                load,
                running=load.running + data.draw(st.integers(0, 32)),
                waiting=load.waiting + data.draw(st.integers(0, 32)),
                queued_prompt_tokens=load.queued_prompt_tokens + data.draw(tokens),
                waiting_answer_tokens=load.waiting_answer_tokens + data.draw(tokens),
                kv_used=min(1.0, load.kv_used + data.draw(st.floats(0, 1))),
            )
            for load in last.replicas
        ),
    )
    assert decide(SETTINGS, state, more)[0].replicas >= decide(SETTINGS, state, last)[0].replicas


@given(histories(), st.integers(1, 1000))
def test_from_none_to_one_at_once(seen: list[Snapshot], queued: int) -> None:
    shown = Snapshot(seen[-1].now_s + 1.0, (), 0, 0, queued, 0, 4)
    assert decide(SETTINGS, learnt(seen), shown)[0].replicas >= 1


def learnt(seen: list[Snapshot]) -> State:
    state = State()
    for each in seen:
        _, state = decide(SETTINGS, state, replace(each, target=each.min_replicas))
    return state


def test_the_controller_needs_none_of_our_packages_and_an_error_changes_nothing(tmp_path: Path) -> None:
    """Serve pickles the policy on the deploying side; here it is taken out where nothing of ours can be imported."""
    policy = AutoscalingPolicy(policy_function=TokenPolicy, policy_kwargs=asdict(SETTINGS))
    (tmp_path / "policy").write_bytes(policy.get_serialized_policy_def() or b"")
    (tmp_path / "kwargs").write_text(json.dumps(policy.policy_kwargs))
    code = """
import json, sys, types
from pathlib import Path
from ray import cloudpickle

folder = Path(sys.argv[1])
policy = cloudpickle.loads((folder / "policy").read_bytes())(**json.loads((folder / "kwargs").read_text()))
assert not {"torch", "serving", "cluster"} & set(sys.modules), "the controller would import these"
context = types.SimpleNamespace(
    running_replicas=[], raw_metrics={}, current_time=1.0, current_num_replicas=0, target_num_replicas=0,
    total_queued_requests=3.0, capacity_adjusted_min_replicas=0, capacity_adjusted_max_replicas=2,
)
assert policy(context) == (1, {}), policy(context)
context.current_time, context.target_num_replicas = None, 2
assert policy(context) == (2, {}), policy(context)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code, tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
