"""The test kit of the runner: unit-test a planner against ranks that follow the protocol, and deviate where your test says so.

- `ScriptedRunner` and `scripted_runners`: real runners with a scripted engine. They can refuse, fail, hang, ignore a task, and die.
- `ScriptedEngine`: an engine in which the test controls every phase. It notes the calls.
- `check_engine`: checks that your own engine does what the runner relies on.
- `ScriptedHost`: the host of a `ScriptedEngine`. It can also lose its engine while the engine has nothing to do.

With it and `barrier.testing`, no test needs a server, a process or a pause. Nothing here is a pytest plugin. The kit needs fakeredis:
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
