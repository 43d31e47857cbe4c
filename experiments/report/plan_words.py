"""What a `merging.Plan` says, in sentences a person can act on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from merging.planning import Group, Plan, mean_residual

MOST = 10  # lines of problems; the rest is counted
TWINS = 0.95  # cosine of two task vectors above which two experts are nearly one
OVERSHOOT = 2.0  # times the base's own distance, seen from the outputs
UNRELATED = 0.7  # relative movement above which an expert was hardly trained from this base
GIB = 2**30


def sentences(plan: Plan) -> list[str]:
    """From what forbids the merge to which method and experts are the safest."""
    if plan.problems:
        count = len(plan.problems)
        return [f"These checkpoints cannot be merged ({count} reasons):", *limited(plan.problems)]
    told = [_cost(plan), _movement(plan), *_odd_experts(plan)]
    if len(plan.tasks) > 1:
        told += [_overlap(plan), *_ranking(plan), *_without(plan)]
    return told


def limited(lines: Sequence[str]) -> list[str]:
    """At most `MOST` lines, the last one a count of what is left out."""
    if len(lines) <= MOST:
        return list(lines)
    return [*lines[: MOST - 1], f"and {len(lines) - MOST + 1} more like these"]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def _cost(plan: Plan) -> str:
    memory = (len(plan.tasks) + 2) * plan.largest
    covered = plan.covered / max(1, plan.matrices)
    left = "" if covered >= 0.9 else " (the rest is averaged: look at the layers before merging)"
    return (
        f"They fit. {plan.bytes / GIB:.2f} GiB are read, about {memory / GIB:.2f} GiB of memory "
        f"are needed beside the program; a method for matrices reaches {percent(covered)} of the "
        f"matrices' weights{left}."
    )


def _movement(plan: Plan) -> str:
    moved = sorted(plan.movement.items(), key=lambda item: -item[1])
    told = ", ".join(f"{task} {percent(share)}" for task, share in moved)
    return f"The experts moved the layers by this share of their norm: {told}."


def _odd_experts(plan: Plan) -> Iterator[str]:
    for task, share in plan.movement.items():
        if share > UNRELATED:
            yield (
                f"{task} differs from the base by {percent(share)} of its norm: it was probably "
                "trained from another base, and no merge with it makes sense."
            )
        if share == 0:
            yield f"{task} is the base itself in every layer: it adds nothing."
    for s, t in itertools.combinations(range(len(plan.tasks)), 2):
        if (cosine := plan.cosine[s, t].item()) > TWINS:
            yield (
                f"{plan.tasks[s]} and {plan.tasks[t]} are nearly the same model (cosine "
                f"{cosine:.2f}): together they count twice."
            )


def _overlap(plan: Plan) -> str:
    """The pair that reads the most alike inputs, and where."""
    pairs = list(itertools.combinations(range(len(plan.tasks)), 2))
    s, t = max(pairs, key=lambda pair: plan.overlap[pair].item())
    where = max(plan.groups, key=lambda group: _pair_overlap(group, s, t))
    conflict = percent(plan.conflict[s, t].item())
    return (
        f"{plan.tasks[s]} and {plan.tasks[t]} overlap most (overlap of the inputs they read "
        f"{plan.overlap[s, t]:.2f}, sign conflict {conflict}), above all in {place(where)} "
        f"({_pair_overlap(where, s, t):.2f})."
    )


def _pair_overlap(group: Group, s: int, t: int) -> float:
    shared = group.diagnosis.shared
    scale = (shared[s, s] * shared[t, t]).sqrt().item()
    return shared[s, t].item() / scale if scale else 0.0


def place(group: Group) -> str:
    """ "mlp 3" of block 3, or "attention outside the blocks"."""
    return f"{group.kind} " + ("outside the blocks" if group.block is None else f"{group.block}")


def _ranking(plan: Plan) -> Iterator[str]:
    ranking = plan.ranking
    told = ", ".join(f"{method} {percent(share)}" for method, share in ranking)
    yield f"What each merge leaves undone of what the experts do to their own inputs: {told}."
    best, worst = ranking[0][0], ranking[-1][0]
    every = tuple(plan.tasks)
    losses = {t: inputs for t, (inputs, _) in plan.residuals[best, every].items()}
    hardest = max(losses, key=lambda task: losses[task])
    other = plan.residuals[worst, every][hardest][0]
    yield (
        f"{hardest} loses most: {percent(losses[hardest])} of it is left undone by {best}, "
        f"{percent(other)} by {worst}."
    )
    far = {m: _seen_from_outputs(plan.residuals[m, every]) for m, _ in ranking}
    if over := {m: times for m, times in far.items() if times > OVERSHOOT}:
        listed = ", ".join(f"{m} {times:.1f} times" for m, times in over.items())
        yield (
            "Seen from the outputs these merges are further from the experts than the base is: "
            f"{listed}. They overshoot; a bounded method is the safer choice."
        )


def _seen_from_outputs(residuals: Mapping[str, tuple[float, float]]) -> float:
    return sum(outputs for _, outputs in residuals.values()) / len(residuals)


def _without(plan: Plan) -> Iterator[str]:
    """Which expert to leave out, if leaving one out helps the others by a tenth or more."""
    best, now = plan.ranking[0]
    smaller = {
        tasks: mean_residual(r)
        for (method, tasks), r in plan.residuals.items()
        if method == best and 1 < len(tasks) == len(plan.tasks) - 1
    }
    if not smaller:
        return
    tasks = min(smaller, key=lambda t: smaller[t])
    (out,) = set(plan.tasks) - set(tasks)
    if smaller[tasks] < 0.9 * now:
        yield (
            f"Without {out} the others keep more: {percent(smaller[tasks])} left undone by {best} "
            f"instead of {percent(now)}."
        )
