"""The test kit of the runner: unit-test a planner against ranks that follow the protocol, and deviate where you say.

- `ScriptedRunner` and `scripted_runners`: real runners whose engine is scripted; they can refuse, fail, hang, ignore, die.
- `ScriptedEngine`: an engine whose every phase the test controls, and that notes what was asked of it.
- `check_engine`: whether an engine of yours does what the runner relies on.
- `ScriptedHost`: the host of one, which can also lose its engine while that has nothing to do.

Together with `barrier.testing` no test needs a server, a process or a pause. Nothing here is a pytest plugin. It needs fakeredis:
``pip install 'rankgate[testing]'``.
"""

from runner.testing.engine_check import EngineMisbehaves, check_engine
from runner.testing.scripted_engine import Phase, ScriptedEngine
from runner.testing.scripted_host import ScriptedHost
from runner.testing.scripted_runner import ScriptedRunner, scripted_runners

__all__ = [
    "EngineMisbehaves",
    "Phase",
    "ScriptedEngine",
    "ScriptedHost",
    "ScriptedRunner",
    "check_engine",
    "scripted_runners",
]
