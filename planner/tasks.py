"""The tasks that the rows of `planner.lifecycle` dispatch."""

from __future__ import annotations

from barrier.protocol.ids import EpochId
from planner.lifecycle import Step
from planner.policy import Policy
from planner.spec import InstanceSpec
from runner.lifecycle import CONNECT, LOAD, WARM_UP
from runner.messages import (
    MAX_DEADLINE_SECONDS,
    ConnectToGroup,
    LoadModel,
    StartWarmup,
    Task,
    TextGeneration,
    derive_task_id,
)

__all__ = ["DEADLINE_SHARE", "generation_task", "task_for"]


DEADLINE_SHARE = 0.8
"""The share of `Policy.connect_stall` that engines have to connect. It is below 1, so that an engine reports first what it waited for."""


def task_for(step: Step, spec: InstanceSpec, epoch: EpochId, term: int, policy: Policy) -> Task:
    """The task of a row for this epoch. Its id is derived, so the same step has the same id again."""
    task_id = derive_task_id(spec.name, str(epoch), step.name)
    if step.dispatches == CONNECT.task:
        deadline = min(policy.connect_stall * DEADLINE_SHARE, MAX_DEADLINE_SECONDS)
        return ConnectToGroup(task_id=task_id, instance=spec.name, epoch=str(epoch), term=term, deadline=deadline)
    if step.dispatches == LOAD.task:
        return LoadModel(task_id=task_id, instance=spec.name, epoch=str(epoch), term=term, model=spec.model)
    if step.dispatches == WARM_UP.task:
        return StartWarmup(task_id=task_id, instance=spec.name, epoch=str(epoch), term=term)
    raise ValueError(
        f"step {step.name} dispatches {step.dispatches}, and this function makes no such task: add it here"
    )


def generation_task(
    request_id: str, prompt: str, max_tokens: int, *, instance: str, epoch: EpochId, term: int
) -> TextGeneration:
    """The task of one generation. Its id is the request's id; the client waits for an answer with this id."""
    return TextGeneration(
        task_id=request_id, instance=instance, epoch=str(epoch), term=term, prompt=prompt, max_tokens=max_tokens
    )
