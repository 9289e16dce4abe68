"""The guards. Each has the text that takes it out, and the searches of which one must find the breach."""

from __future__ import annotations

from tests.mutants.harness import (
    ATTEMPTS,
    BOUNDS,
    CLAIMS,
    DECIDED,
    DECISIONS,
    EXHAUSTIVE,
    FORGOTTEN,
    JUDGE,
    LIVES,
    MLX,
    PRETENDED,
    PROPERTY,
    RANK,
    RESTORES,
    SECOND_LINE,
    SIMULATION,
    SPOILED,
    SPOILED_STREAMS,
    WRONG_SERVER,
    Edit,
    Mutation,
    Search,
    exhaustive,
)

_PRELUDE = "barrier/lua/prelude.lua"
_OPEN = "barrier/lua/open.lua"
_RESTORE = "barrier/lua/restore.lua"
_DISPATCH = "barrier/lua/dispatch.lua"
_CONCLUDE = "barrier/lua/conclude.lua"
_LEAD = "barrier/lua/lead.lua"
_MEMBER = "barrier/member.py"
_CLAIM = "barrier/claim.py"
_REPORTER = "barrier/reporter.py"
_TASK_LOG = "barrier/task_log.py"
_RANK_STATE = "barrier/protocol/rank_state.py"
_RECORD = "barrier/protocol/record.py"
_CONNECTION = "barrier/store/connection.py"
_STANDING = "barrier/store/standing.py"
_REQUIREMENT = "barrier/protocol/requirement.py"
_BARRIER = "barrier/barrier.py"
_PICTURE = "barrier/store/picture.py"
_ADMISSION = "runner/admission.py"
_RUNNER = "runner/runner.py"
_RUNNER_PROCESS = "runner/process.py"
_RUNNER_LIFECYCLE = "runner/lifecycle.py"
_SESSION = "runner/session.py"
_GENERATIONS = "runner/generations.py"
_ENDPOINTS = "runner/endpoints.py"
_MESSAGES = "runner/messages.py"
_RECOVERY = "planner/recovery.py"
_DECIDE = "planner/decide.py"
_LIFECYCLE = "planner/lifecycle.py"
_LOOP = "planner/loop.py"
_MLX = "runner/engines/mlx.py"
_RING = "runner/engines/ring.py"
_HOST_LIVES = "runner/host/lives.py"
_REFERENCE = "barrier/testing/reference.py"


def _verb_fence(verb: str, file: str) -> Mutation:
    """A verb that anybody may call, whoever leads."""
    return Mutation(
        f"fence-{verb}",
        f"`{verb}` is refused to a planner that does not lead",
        "S2",
        Edit(file, "local refusal = fenced(KEYS[2], term, holder)", "local refusal = nil"),
        (PROPERTY, SIMULATION),
    )


def _begins(wanted: str) -> Edit:
    """What a report has to begin with, as the gate has it, replaced by this Lua expression."""
    check = "\n        if sub(report, 1, #wanted) == wanted then"
    return Edit(_PRELUDE, f"local wanted = statuses[i]{check}", f"local wanted = {wanted}{check}")


def _restore_needs(what: str, old: str, new: str, guard: str, model: Edit | None = None) -> Mutation:
    return Mutation(
        f"restore-{what}",
        f"`restore`: {guard}",
        "S2" if what == "digest" else "S4",
        Edit(_RESTORE, old, new),
        (RESTORES, PROPERTY, EXHAUSTIVE) if model else (RESTORES, PROPERTY),
        model,
    )


SCRIPTS: tuple[Mutation, ...] = (
    Mutation(
        "hint-cap",
        "the planner's hints and history are capped, also where no rank writes any",
        "S10",
        Edit(
            _PRELUDE,
            "local added = redis.pcall('XADD', key, 'MAXLEN', '~', cap, '*', ...)",
            "local added = redis.pcall('XADD', key, '*', ...)",
        ),
        (BOUNDS,),
    ),
    # --- which epoch ------------------------------------------------------------------------------------------------------
    Mutation(
        "epoch-nonce",
        "verbs act in the named epoch: its nonce",
        "S3",
        Edit(_PRELUDE, "if record.number ~= number or record.nonce ~= nonce then", "if record.number ~= number then"),
        (PROPERTY, EXHAUSTIVE),
        Edit(_REFERENCE, "    if record.id != epoch:", "    if record.id.number != epoch.number:"),
    ),
    Mutation(
        "epoch-number",
        "verbs act in the named epoch: its number",
        "S3",
        Edit(_PRELUDE, "if record.number ~= number or record.nonce ~= nonce then", "if record.nonce ~= nonce then"),
        (PROPERTY,),
    ),
    Mutation(
        "epoch-current",
        "verbs act in the current epoch only",
        "S3",
        Edit(
            _PRELUDE,
            "if record.number ~= number or record.nonce ~= nonce then\n    if (tonumber",
            "if false then\n    if (tonumber",
        ),
        (PROPERTY, EXHAUSTIVE),
        Edit(_REFERENCE, "    if record.id != epoch:", "    if False:"),
    ),
    Mutation(
        "record-missing",
        "a record that is missing is Unknown, never a release",
        "S4",
        Edit(_PRELUDE, "if not record.number or not record.nonce or not record.world_size then", "if false then"),
        (PROPERTY,),
    ),
    Mutation(
        "roster-missing",
        "a roster that is not whole is Unknown",
        "S4",
        Edit(
            _PRELUDE,
            "if #roster ~= world_size * INCARNATION_WIDTH then\n    return nil",
            "if false then\n    return nil",
        ),
        (SPOILED,),
    ),
    Mutation(
        "world-size",
        "a record for another world size is Unknown",
        "S4",
        Edit(_PRELUDE, "if tonumber(record.world_size) ~= world_size then", "if false then"),
        (SPOILED,),
    ),
    # --- the gate ---------------------------------------------------------------------------------------------------------
    Mutation(
        "gate",
        "`dispatch` checks every rank's live report at that instant",
        "S1",
        Edit(_DISPATCH, "if #missing > 0 then", "if false then"),
        (PROPERTY, SIMULATION, EXHAUSTIVE),
        Edit(
            _REFERENCE,
            "    missing = _missing(state, now_ms, requirement)\n    if missing:\n        return state, NotReady(missing)\n    if state.log_end",
            "    if state.log_end",
        ),
    ),
    Mutation(
        "gate-live",
        "only a live report arrives",
        "S1",
        Edit(
            _PRELUDE,
            "local report = arrived[i]\n",
            "local report = arrived[i] or right and right .. '|' .. sub(roster, (slice + i - 1) * 28 + 1, (slice + i) * 28)\n",
        ),
        (PROPERTY, SIMULATION),
    ),
    Mutation(
        "gate-status",
        "only the required status arrives",
        "S1",
        _begins("head .. (string.match(sub(report, #head + 1), '^%a%w*|') or '|')"),
        (PROPERTY, SIMULATION, EXHAUSTIVE),
        Edit(_REFERENCE, "                and report.status in rule.statuses\n", ""),
    ),
    Mutation(
        "gate-epoch",
        "only a report of exactly this epoch arrives",
        "S1",
        _begins("(string.match(report, '^2|[^|]*|') or '') .. sub(statuses[i], #head + 1)"),
        (PROPERTY, SIMULATION, EXHAUSTIVE),
        Edit(_REFERENCE, "                and report.epoch == record.id\n", ""),
    ),
    Mutation(
        "gate-nonce",
        "a report of the same number and another nonce does not arrive",
        "S1",
        _begins("(string.match(report, '^2|' .. record.number .. '%-%x*|') or '') .. sub(statuses[i], #head + 1)"),
        (PROPERTY, EXHAUSTIVE),
        Edit(
            _REFERENCE,
            "                and report.epoch == record.id\n",
            "                and report.epoch is not None and report.epoch.number == record.id.number\n",
        ),
    ),
    Mutation(
        "gate-roster",
        "only the incarnation on the roster arrives",
        "S6",
        Edit(
            _PRELUDE,
            "if #expected ~= count * INCARNATION_WIDTH or table.concat(arrived) ~= expected then",
            "if #table.concat(arrived) ~= count * INCARNATION_WIDTH then",
        ),
        (PROPERTY, SIMULATION, EXHAUSTIVE),
        Edit(_REFERENCE, "                and report.incarnation == record.roster[rank]\n", ""),
    ),
    Mutation(
        "gate-roster-each",
        "where the roster and those that arrived differ, each rank is compared",
        "S6",
        Edit(
            _PRELUDE,
            "if arrived[i] == '' or arrived[i] ~= sub(roster, before + 1, before + INCARNATION_WIDTH) then",
            "if arrived[i] == '' then",
        ),
        (PROPERTY, SIMULATION),
    ),
    Mutation(
        "once",
        "`dispatch` appends a step once",
        "S2",
        Edit(_DISPATCH, "if tonumber(attempts) >= tonumber(attempt) then", "if false then"),
        (PROPERTY, SIMULATION, EXHAUSTIVE),
        Edit(_REFERENCE, "    if step in before and before[step][1] >= attempt:", "    if False:"),
    ),
    Mutation(
        "after",
        "a step follows the one before it",
        "S1",
        Edit(_DISPATCH, "if needed and not record[needed] then", "if false then"),
        (PROPERTY, EXHAUSTIVE),
        Edit(_REFERENCE, "    if after and after not in {name for name, _, _ in record.steps}:", "    if False:"),
    ),
    # --- positions in the log ---------------------------------------------------------------------------------------------
    Mutation(
        "log-seen",
        "a new entry stands above what the caller has seen",
        "S2",
        Edit(_DISPATCH, "math.max(written, applied, tonumber(seen_n))", "math.max(written, applied)"),
        (PROPERTY, EXHAUSTIVE),
        Edit(_REFERENCE, "max([written, seen_n, *counted])", "max([written, *counted])"),
    ),
    Mutation(
        "log-applied",
        "a new entry stands above what every rank has read",
        "S2",
        Edit(_DISPATCH, "math.max(written, applied, tonumber(seen_n))", "math.max(written, tonumber(seen_n))"),
        (PROPERTY, EXHAUSTIVE),
        Edit(_REFERENCE, "max([written, seen_n, *counted])", "max([written, seen_n])"),
    ),
    Mutation(
        "log-known",
        "a step that the store forgot gets the position that it had",
        "S2",
        Edit(_DISPATCH, "if not before and tonumber(known_n) > written then", "if false then"),
        (PROPERTY, EXHAUSTIVE),
        Edit(_REFERENCE, "    if step not in before and known_n > written:", "    if False:"),
    ),
    Mutation(
        "log-went-on",
        "no entry below a log that went on to a later epoch",
        "S4",
        Edit(_DISPATCH, "if log_number > tonumber(number) then", "if false then"),
        (SPOILED,),
    ),
    Mutation(
        "conclude-seen",
        "a verdict stands above what the caller has seen",
        "S5",
        Edit(_CONCLUDE, "tonumber(record.last_n) or 0, tonumber(seen_n))", "tonumber(record.last_n) or 0)"),
        (PROPERTY,),
    ),
    # --- verdicts ---------------------------------------------------------------------------------------------------------
    Mutation(
        "verdict-ends",
        "nothing is dispatched in an epoch that has a verdict",
        "S5",
        Edit(_PRELUDE, "if record.verdict then\n    return", "if false then\n    return"),
        (PROPERTY, EXHAUSTIVE),
        Edit(_REFERENCE, "    return None if record.verdict is None else Aborted(record.verdict)", "    return None"),
    ),
    Mutation(
        "verdict-first",
        "the first verdict wins",
        "S5",
        Edit(
            _CONCLUDE,
            "refusal = not_current(record, number, nonce)\nif refusal then",
            "refusal = not_current(record, number, nonce)\nif refusal and refusal[1] ~= 'ABORTED' then",
        ),
        (PROPERTY, EXHAUSTIVE),
        Edit(
            _REFERENCE,
            "    if isinstance(refusal, Aborted):\n        return state, Concluded(refusal.verdict, first=False)\n"
            "    if refusal is not None:",
            "    if refusal is not None and not isinstance(refusal, Aborted):",
        ),
    ),
    # --- leadership -------------------------------------------------------------------------------------------------------
    Mutation(
        "fence-term",
        "a planner is fenced by its term",
        "S2",
        Edit(_PRELUDE, "if leader[1] ~= term or leader[2] ~= holder then", "if leader[2] ~= holder then"),
        (PROPERTY,),
    ),
    Mutation(
        "fence-holder",
        "a planner is fenced by its name, too: a term can be issued twice",
        "S2",
        Edit(_PRELUDE, "if leader[1] ~= term or leader[2] ~= holder then", "if leader[1] ~= term then"),
        (PROPERTY,),
    ),
    _verb_fence("open", _OPEN),
    _verb_fence("restore", _RESTORE),
    _verb_fence("dispatch", _DISPATCH),
    _verb_fence("conclude", _CONCLUDE),
    Mutation(
        "lead-lease",
        "nobody takes over while the leader's lease lasts",
        "L5",
        Edit(_LEAD, "if term and until_ms and not mine and until_ms > now then", "if false then"),
        (PROPERTY,),
    ),
    Mutation(
        "lead-term",
        "a new leader has a higher term than the stored one",
        "S2",
        Edit(
            _LEAD,
            "term = math.max((term or 0) + 1, tonumber(floor) + 1, now)",
            "term = math.max(tonumber(floor) + 1, now)",
        ),
        (PROPERTY,),
    ),
    Mutation(
        "lead-clock",
        "a new leader's term is above the store's clock",
        "S2",
        Edit(
            _LEAD,
            "term = math.max((term or 0) + 1, tonumber(floor) + 1, now)",
            "term = math.max((term or 0) + 1, tonumber(floor) + 1)",
        ),
        (PROPERTY,),
    ),
    # --- open -------------------------------------------------------------------------------------------------------------
    Mutation(
        "open-everyone",
        "`open` wants a live report of every rank",
        "S6",
        Edit(
            _OPEN,
            "if not epoch or math.max(rank_floor, number_of(epoch)) > highest then\n    missing",
            "if not epoch then\n    incarnations[rank + 1] = string.rep('0', 28)\n  elseif false then\n    missing",
        ),
        (PROPERTY, SIMULATION),
    ),
    Mutation(
        "open-roster",
        "`open` fixes the roster",
        "S6",
        Edit(_OPEN, "write_roster(KEYS[1], incarnations)\n", ""),
        (PROPERTY,),
    ),
    Mutation(
        "open-unconcluded",
        "`open` does not replace an epoch that has no verdict",
        "S5",
        Edit(_OPEN, "if readable and not record[3] then", "if false then"),
        (PROPERTY, EXHAUSTIVE),
        Edit(
            _REFERENCE,
            "    if record is not None and record.verdict is None:\n        return state, Unconcluded(record.id)\n",
            "",
        ),
    ),
    Mutation(
        "open-repeated",
        "`open` repeated after a lost reply opens nothing new",
        "S2",
        Edit(_OPEN, "if record[1] and record[2] == nonce then", "if false then"),
        (PROPERTY,),
    ),
    Mutation(
        "open-digest",
        "`open` refuses ranks that were configured for another spec",
        "S8",
        Edit(_OPEN, "if #disagree > 1 then", "if false then"),
        (PROPERTY,),
    ),
    Mutation(
        "floor-record",
        "a new number is above the record's",
        "S4",
        Edit(_OPEN, "math.max((tonumber(record[1]) or 0) + 1, tonumber(floor) + 1,", "math.max(tonumber(floor) + 1,"),
        (PROPERTY, EXHAUSTIVE),
        Edit(_REFERENCE, "record.id.number if record else 0, *(report.floor", "*(report.floor"),
    ),
    Mutation(
        "floor-caller",
        "a new number is above what the caller has seen",
        "S4",
        Edit(_OPEN, "tonumber(floor) + 1, log_number + 1, server_ms())", "log_number + 1, server_ms())"),
        (PROPERTY, EXHAUSTIVE),
        Edit(_REFERENCE, "    seen = [floor, state.log_end.number,", "    seen = [state.log_end.number,"),
    ),
    Mutation(
        "floor-log",
        "a new number is above the log's",
        "S4",
        Edit(_OPEN, "log_number + 1, server_ms())", "server_ms())"),
        (PROPERTY, EXHAUSTIVE),
        Edit(_REFERENCE, "    seen = [floor, state.log_end.number,", "    seen = [floor,"),
    ),
    Mutation(
        "floor-reports",
        "a new number is above every promise",
        "S4",
        Edit(_OPEN, "    number = math.max(number, rank_floor + 1)\n", ""),
        (PROPERTY, EXHAUSTIVE),
        Edit(_REFERENCE, ", *(report.floor for report in present)]", "]"),
    ),
    Mutation(
        "floor-clock",
        "a new number is above the store's clock",
        "S4",
        Edit(_OPEN, "log_number + 1, server_ms())", "log_number + 1)"),
        (PROPERTY,),
    ),
    Mutation(
        "floor-absurd",
        "`open`: a number that nobody can have given is not adopted",
        "S10",
        Edit(_OPEN, "if not epoch or math.max(rank_floor, number_of(epoch)) > highest then", "if not epoch then"),
        (PROPERTY,),
    ),
    Mutation(
        "floor-absurd-picture",
        "a planner does not adopt a number that nobody can have given",
        "S10",
        Edit(_PICTURE, "    if said <= highest:\n", "    if True:\n"),
        (PROPERTY,),
    ),
    # --- restore ----------------------------------------------------------------------------------------------------------
    _restore_needs(
        "given",
        "    and read_all and given and",
        "    and read_all and",
        "the number is one that somebody can have given",
    ),
    _restore_needs(
        "epoch",
        "if epoch == number .. '-' .. nonce and rank_status",
        "if epoch and rank_status",
        "every rank reports exactly this epoch",
        Edit(
            _REFERENCE,
            "(report.epoch, report.status, report.applied, report.floor) != (epoch, status, place, epoch.number)",
            "(report.status, report.applied, report.floor) != (status, place, epoch.number)",
        ),
    ),
    _restore_needs(
        "nonce",
        "if epoch == number .. '-' .. nonce and rank_status",
        "if epoch and string.match(epoch, '^%d+') == number and rank_status",
        "every rank reports this epoch's nonce",
    ),
    _restore_needs(
        "status",
        "and rank_status == status and",
        "and",
        "every rank reports the same status",
        Edit(
            _REFERENCE,
            "(report.epoch, report.status, report.applied, report.floor) != (epoch, status, place, epoch.number)",
            "(report.epoch, report.applied, report.floor) != (epoch, place, epoch.number)",
        ),
    ),
    _restore_needs(
        "applied",
        "and applied == agreed_applied\n",
        "\n",
        "every rank has read as far",
        Edit(
            _REFERENCE,
            "(report.epoch, report.status, report.applied, report.floor) != (epoch, status, place, epoch.number)",
            "(report.epoch, report.status, report.floor) != (epoch, status, epoch.number)",
        ),
    ),
    _restore_needs(
        "read-all",
        "    and read_all and given",
        "    and given",
        "what the log holds has been read",
        Edit(
            _REFERENCE, "        or report.applied < in_log  # something was dispatched that nobody has read yet\n", ""
        ),
    ),
    _restore_needs(
        "floor",
        "floor == tonumber(number) and (rank_digest",
        "(rank_digest",
        "no rank has promised a later epoch",
        Edit(
            _REFERENCE,
            "(report.epoch, report.status, report.applied, report.floor) != (epoch, status, place, epoch.number)",
            "(report.epoch, report.status, report.applied) != (epoch, status, place)",
        ),
    ),
    _restore_needs(
        "digest",
        " and (rank_digest == '-' or rank_digest == digest) then",
        " then",
        "every rank was configured for this spec",
    ),
    _restore_needs(
        "over",
        "if log_number > tonumber(number) or (log_number == tonumber(number) and log_kind == 'verdict') then",
        "if false then",
        "a log that went on proves that the epoch is over",
        Edit(
            _REFERENCE,
            "    if newest is not None and (\n        newest.id.number > epoch.number",
            "    if False and newest and (\n        newest.id.number > epoch.number",
        ),
    ),
    _restore_needs(
        "present",
        "if record[1] then\n",
        "if false then\n",
        "a record that is there is not overwritten",
    ),
    # --- the rest of the scripts ------------------------------------------------------------------------------------------
    *(
        Mutation(
            f"wrong-type-{verb}",
            f"`{verb}` looks at the types of its keys before its first write",
            "S8",
            Edit(file, "if wrong then\n  return wrong\nend", ""),
            (SPOILED,),
        )
        for verb, file in (("open", _OPEN), ("restore", _RESTORE), ("dispatch", _DISPATCH), ("conclude", _CONCLUDE))
    ),
    Mutation(
        "hint-lost",
        "hints and history that cannot be written stop no verb",
        "S10",
        Edit(
            _PRELUDE,
            "  local added = redis.pcall('XADD', key,",
            "  local added = redis.call('XADD', key,",
        ),
        (PROPERTY,),
    ),
    Mutation(
        "hint-heals",
        "a stream of hints or history that takes nothing more is begun anew",
        "S10",
        Edit(
            _PRELUDE,
            "  if string.find(refusal, 'WRONGTYPE') or string.find(refusal, 'exhausted') then",
            "  if false then",
        ),
        (SPOILED_STREAMS,),
    ),
)

RANKS: tuple[Mutation, ...] = (
    Mutation(
        "forget-read",
        "what one rank has not read stays in the task log",
        "S3",
        Edit(
            _REQUIREMENT,
            "return LogId(epoch.id.number, min(read) + 1) if min(read) else None",
            "return LogId(epoch.id.number, max(read) + 1) if max(read) else None",
        ),
        (FORGOTTEN,),
    ),
    Mutation(
        "claim-end",
        "a claim that nobody renews lapses, also one that was written without an end",
        "S10",
        Edit(_CLAIM, "if left > 2 * self._lease_ms or left == _FOR_EVER:", "if left > 2 * self._lease_ms:"),
        (CLAIMS,),
    ),
    Mutation(
        "report-hint",
        "hints and history that cannot be written stop no report",
        "S10",
        Edit(_REPORTER, "self._store.transact(commands, may_fail=told)", "self._store.transact(commands)"),
        (SPOILED_STREAMS,),
    ),
    # --- promises ---------------------------------------------------------------------------------------------------------
    Mutation(
        "promise-one",
        "a rank promises one epoch at a time",
        "S3",
        Edit(
            _RANK_STATE,
            "        if self.promised is not None:\n            return NotPromised",
            "        if False:\n            return NotPromised",
        ),
        (RANK, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "promise-current",
        "a rank promises the current epoch only, number and nonce",
        "S3",
        Edit(_RANK_STATE, "if seen is None or seen.epoch != epoch:", "if seen is None:"),
        (RANK, exhaustive("hearsay"), SIMULATION),
    ),
    Mutation(
        "promise-verdict",
        "a rank promises no epoch that is over",
        "S5",
        Edit(
            _RANK_STATE,
            "        if seen.verdict is not None:\n            return NotPromised",
            "        if False:\n            return NotPromised",
        ),
        (RANK, SIMULATION),
    ),
    Mutation(
        "promise-floor",
        "a rank never promises a lower number, nor a spent promise again",
        "S3",
        Edit(
            _RANK_STATE,
            "        if not self.is_above(epoch):\n            return",
            "        if False:\n            return",
        ),
        (RANK, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "promise-spent",
        "a promise that is spent stays as a floor",
        "S3",
        Edit(
            _RANK_STATE,
            "return self._replace(promised=None, applied=0)",
            "return self._replace(promised=None, applied=0, floor=0)",
        ),
        (RANK, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "promise-roster",
        "a rank promises only an epoch whose roster names its own incarnation",
        "S3",
        Edit(_RANK_STATE, "if seen.named != self.incarnation:", "if False:"),
        (RANK, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "promise-announced",
        "an epoch below a promise is not entered",
        "S3",
        Edit(
            _RUNNER,
            "        if entry.epoch.number <= self._member.report_now.floor:\n            return",
            "        if False:\n            return",
        ),
        (SECOND_LINE, SIMULATION),
    ),
    Mutation(
        "teardown",
        "a rank tears its engine down before it promises the next epoch",
        "S3",
        Edit(
            _RUNNER, "        await self._tear_down()\n        self._member.retire()", "        self._member.retire()"
        ),
        (SECOND_LINE, exhaustive("teardown"), SIMULATION),
    ),
    # --- reading the log --------------------------------------------------------------------------------------------------
    Mutation(
        "applied",
        "an entry that the log says again is not handed out again",
        "S2",
        Edit(
            _RANK_STATE,
            "if entry.id.n <= self.applied:\n            return",
            "if False:\n            return",
        ),
        (RANK, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "rewind",
        "a rank does not wait beyond the end of a log that went back",
        "L6",
        Edit(_RANK_STATE, "if end >= read_to or read_to != self.read_to:", "if True:"),
        (RANK, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "rewind-place",
        "a rank passes over nothing that came while its log had gone back",
        "L6",
        Edit(
            _RANK_STATE,
            "min(end, LogId(self.floor, self.applied if self.promised else MAX_APPLIED))",
            "end",
        ),
        (RANK,),
    ),
    Mutation(
        "missed",
        "a rank that missed an entry fails instead of going on without it",
        "S2",
        Edit(_SESSION, "return entry.missed and self.is_in(entry.epoch)", "return False and self.is_in(entry.epoch)"),
        (SECOND_LINE, exhaustive("missed"), SIMULATION),
    ),
    Mutation(
        "margin",
        "a rank that could not renew accepts nothing until it has read the epoch again",
        "S3",
        Edit(_MEMBER, "        while not self.trusted:", "        while False:"),
        (RANK, SIMULATION),
    ),
    Mutation(
        "claim",
        "a process that lost its rank says nothing any more",
        "S6",
        Edit(
            _REPORTER,
            "        if holder == incarnation.encode():\n            return",
            "        if True:\n            return",
        ),
        (RANK, SIMULATION),
    ),
    Mutation(
        "reread",
        "a rank that was silent looks for a successor before it writes",
        "S6",
        Edit(_REPORTER, "            if self.renewed_at > -inf and", "            if False and"),
        (RANK, SIMULATION),
    ),
    # --- the judge --------------------------------------------------------------------------------------------------------
    Mutation(
        "judge-epoch",
        "a runner acts on no task of another epoch",
        "S3",
        Edit(_ADMISSION, "    if fenced is not None:\n        return fenced", "    if False:\n        return fenced"),
        (SECOND_LINE, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "judge-nonce",
        "a runner acts on no task of the same number and another nonce",
        "S3",
        Edit(
            _ADMISSION,
            "if promise is not None and promise.epoch == epoch:",
            "if promise is not None and promise.epoch.number == epoch.number:",
        ),
        (SECOND_LINE, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "judge-incarnation",
        "a runner acts only as the incarnation on the roster",
        "S3",
        Edit(_ADMISSION, "if promise.incarnation != standing.incarnation:", "if False:"),
        (JUDGE,),
    ),
    Mutation(
        "judge-instance",
        "a runner acts on no task of another instance",
        "S8",
        Edit(_ADMISSION, "if task.instance != standing.instance:", "if False:"),
        (SECOND_LINE,),
    ),
    Mutation(
        "judge-table",
        "a task out of state is refused",
        "S7",
        Edit(_ADMISSION, "    accepted = task.kind in lifecycle.accepts(status, world_size)", "    accepted = True"),
        (SECOND_LINE, EXHAUSTIVE),
    ),
    Mutation(
        "judge-idle-load",
        "an Idle rank among several does not load",
        "S1",
        Edit(
            _ADMISSION,
            "    accepted = task.kind in lifecycle.accepts(status, world_size)",
            "    accepted = task.kind in ACCEPTS[status]",
        ),
        (SECOND_LINE,),
    ),
    Mutation(
        "judge-duplicate",
        "a task that was seen before is not done again",
        "S2",
        Edit(
            _ADMISSION,
            'if known is not None and not (known.result == "rejected" and known.retryable):',
            "if False and known:",
        ),
        (SECOND_LINE, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "judge-two-epochs",
        "a task that names another epoch than its entry is refused",
        "S7",
        Edit(_SESSION, "        if task.epoch != str(epoch):", "        if False:"),
        (SECOND_LINE,),
    ),
    Mutation(
        "size",
        "a message is not read beyond its limit",
        "S7",
        Edit(_MESSAGES, "    if len(payload) > MAX_MESSAGE_BYTES:", "    if False:"),
        (SECOND_LINE,),
    ),
    Mutation(
        "malformed",
        "a message that is not one of ours is refused, and the runner lives",
        "S7",
        Edit(_RUNNER, "        except MalformedMessage as error:", "        except ZeroDivisionError as error:"),
        (SECOND_LINE,),
    ),
    Mutation(
        "finality",
        "work under way does not undo a failure",
        "S6",
        Edit(_RUNNER_LIFECYCLE, "return _FINALITY.get(status, 0) >= _FINALITY.get(before, 0)", "return True"),
        (SECOND_LINE, SIMULATION),
    ),
    Mutation(
        "engine-death",
        "an engine that died is not loaded anew without its group",
        "S1",
        Edit(_RUNNER, "                await self._check_engine()\n", ""),
        (SECOND_LINE, SIMULATION),
    ),
)

PLANNERS: tuple[Mutation, ...] = (
    Mutation(
        "outage-hold",
        "after an outage every rank has one lease to say that it lives",
        "L6",
        Edit(
            _LOOP,
            "                self._memory = hold(self._memory, str(error), self._clock.now(), self._settings)\n",
            "",
        ),
        (BOUNDS,),
    ),
    Mutation(
        "break-failed",
        "a rank that failed ends the attempt for all",
        "S6",
        Edit(
            _REQUIREMENT,
            "    if report.epoch == epoch.id and report.incarnation == mine and report.status in failed:",
            "    if False:",
        ),
        (DECISIONS, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "break-restarted",
        "a rank that was restarted ends the attempt for all",
        "S6",
        Edit(_REQUIREMENT, "    if report.incarnation > mine:", "    if False:"),
        (DECISIONS, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "break-earlier-life",
        "an earlier life that comes back late breaks nothing at once",
        "S6",
        Edit(
            _REQUIREMENT,
            "    if report.incarnation < mine:\n        return None",
            '    if report.incarnation < mine:\n        return 1, Break(f"{who} was restarted", view.rank)',
        ),
        (DECISIONS, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "break-promised",
        "a report that promised a later epoch proves that the store went back",
        "S6",
        Edit(_REQUIREMENT, "    if report.floor > epoch.id.number or (", "    if False and ("),
        (DECISIONS, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "break-log",
        "a log of a later epoch proves that the record went back",
        "S6",
        Edit(_REQUIREMENT, "    if snapshot.log_end.number > epoch.id.number:", "    if False:"),
        (DECISIONS, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "ahead",
        "a report that is ahead of the steps dispatched proves that the store went back",
        "S6",
        Edit(_DECIDE, "    if not ahead:\n        return None", "    if True:\n        return None"),
        (DECISIONS, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "silent",
        "a rank that fell silent ends the attempt for all",
        "L3",
        Edit(
            _DECIDE,
            "    if silent:\n        return _abort",
            "    if False:\n        return _abort",
        ),
        (DECISIONS, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "hold",
        "when most leases lapse at once, the planner holds for one lease",
        "L6",
        Edit(_RECOVERY, "    if len(lapsed) >= 2 and", "    if False and"),
        (DECISIONS, SIMULATION),
    ),
    Mutation(
        "lost-record-hold",
        "a lost record is given one lease for all ranks to agree on it",
        "L6",
        Edit(
            _DECIDE,
            "if memory.epoch_lost_at is not None and now < memory.epoch_lost_at + view.settings.lease:",
            "if False:",
        ),
        (DECISIONS, SIMULATION),
    ),
    Mutation(
        "lost-end",
        "an attempt's end that was seen counts also when its record is lost",
        "L4",
        Edit(_DECIDE, "memory.last_failure is not None and not memory.stopping", "False"),
        (DECISIONS,),
    ),
    Mutation(
        "over",
        "an attempt whose end was seen is not written back",
        "S5",
        Edit(_DECIDE, "epoch.number <= last_over or snapshot", "snapshot"),
        (DECISIONS,),
    ),
    Mutation(
        "over-log",
        "an attempt that the log has gone beyond is not written back",
        "S5",
        Edit(_DECIDE, " or snapshot.log_end.number > epoch.number", ""),
        (DECISIONS,),
    ),
    Mutation(
        "culprit",
        "a failure is charged to its culprit, not to its neighbours",
        "L4",
        Edit(
            _RECOVERY,
            "    culprit = UNATTRIBUTED if epoch.verdict.culprit is None else epoch.verdict.culprit",
            "    culprit = UNATTRIBUTED",
        ),
        (DECISIONS,),
    ),
    Mutation(
        "absence-without-end",
        "ranks that are away are waited for without an end, unless a limit is set",
        "L7",
        Edit(
            _DECIDE,
            "limit = view.policy.absence_limit if view.spec.absence_limit is None else view.spec.absence_limit",
            "limit = view.spec.absence_limit or view.policy.absence_limit or patience",
        ),
        (DECISIONS,),
    ),
    Mutation(
        "absence-limit",
        "a limit for absence that was set ends the instance",
        "L4",
        Edit(
            _DECIDE,
            "    if limit is not None and now >= ends:\n        reason = (",
            "    if False:\n        reason = (",
        ),
        (DECISIONS,),
    ),
    Mutation(
        "absence-free",
        "a rank that went away has not failed",
        "L7",
        Edit(_RECOVERY, "    if epoch.verdict.code in (ABSENT, LOST):", "    if False:"),
        (DECISIONS,),
    ),
    Mutation(
        "lost-process",
        "a rank that comes back as another process after it fell silent has failed",
        "L4",
        Edit(_RECOVERY, "    if sum(back) * 2 <= len(back):", "    if True:"),
        (DECISIONS,),
    ),
    Mutation(
        "lost-link",
        "a rank that comes back as the same process was only cut off",
        "L7",
        Edit(_RECOVERY, "    if sum(back) * 2 <= len(back):", "    if False:"),
        (DECISIONS,),
    ),
    Mutation(
        "charged-once",
        "a verdict is charged once",
        "L4",
        Edit(_RECOVERY, "if epoch.verdict is None or memory.accounted == epoch.id:", "if epoch.verdict is None:"),
        (DECISIONS,),
    ),
    Mutation(
        "launch",
        "an attempt belongs to the launch that it was opened for, whatever the store's clock says",
        "L4",
        Edit(_RECOVERY, "    launch = _launch_of(epoch.notes)\n", "    launch = None\n"),
        (DECISIONS,),
    ),
    Mutation(
        "backoff",
        "the next attempt waits for its backoff",
        "L4",
        Edit(_DECIDE, "        if now < memory.backoff_until:", "        if False:"),
        (DECISIONS,),
    ),
    Mutation(
        "budget",
        "a spent budget ends the instance",
        "L4",
        Edit(_DECIDE, "        if exhausted(memory, view.policy):", "        if False:"),
        (DECISIONS,),
    ),
    Mutation(
        "forgive",
        "a success resets the budget",
        "L4",
        Edit(_RECOVERY, "    if stable or _has_generated(snapshot):", "    if False:"),
        (DECISIONS,),
    ),
    Mutation(
        "stall",
        "an attempt in which nothing moves is ended",
        "L2",
        Edit(_DECIDE, "    if all(now < limit for limit in limits.values()):", "    if True:"),
        (DECISIONS, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "progress",
        "progress renews the deadline: slow is not stalled",
        "L2",
        Edit(_RECOVERY, "    if signature == memory.signature:", "    if memory.signature is not None:"),
        (DECISIONS,),
    ),
    Mutation(
        "stall-own",
        "a rank that stands still has until its stall, whatever others do",
        "L2",
        Edit(
            _DECIDE,
            "    return max(memory.asked_at, memory.moved.get(rank.rank, memory.progress_at))",
            "    return memory.progress_at",
        ),
        (DECISIONS,),
    ),
    Mutation(
        "stall-alike",
        "ranks that fell still together are not told apart by who was seen to move last",
        "L4",
        Edit(_DECIDE, "    near = now + min(2 * view.settings.heartbeat, stall / 4)", "    near = now"),
        (DECIDED, DECISIONS),
    ),
    Mutation(
        "stall-tie",
        "nobody is blamed where several ranks are equally far behind",
        "L4",
        Edit(_DECIDE, "last[0] if len(last) == 1 else None", "last[0]"),
        (DECIDED,),
    ),
    Mutation(
        "stall-preparing",
        "only a rank that prepares has the time for preparing",
        "L2",
        Edit(_DECIDE, "view.policy.prepare_stall if _prepares(rank) else usual", "view.policy.prepare_stall"),
        (DECIDED, DECISIONS),
    ),
    Mutation(
        "stall-asked",
        "a rank's patience begins anew with what is asked of it",
        "L2",
        Edit(
            _DECIDE,
            "    return max(memory.asked_at, memory.moved.get(rank.rank, memory.progress_at))",
            "    return memory.moved.get(rank.rank, memory.progress_at)",
        ),
        (DECISIONS,),
    ),
    Mutation(
        "stall-loaded",
        "a rank that has loaded all of its layers may wait for those that still load",
        "L2",
        Edit(_DECIDE, "report.progress[0] >= report.progress[1]", "False"),
        (DECIDED,),
    ),
    Mutation(
        "stall-silent",
        "a rank that generates and does not answer has no progress of its own: it goes by that of the others",
        "L2",
        Edit(_DECIDE, "report.status == GENERATE.during and report.progress is None and rank.rank > 0", "False"),
        (DECIDED,),
    ),
    Mutation(
        "teardown-gate",
        "`connect` waits until every rank is Idle in exactly this attempt",
        "S3",
        Edit(
            _LIFECYCLE,
            "RankRule(place, world_size - 1, (row.entry,))",
            'RankRule(place, world_size - 1, ("Idle", "Failed", "Connected", "Loaded", "Ready") if row.meets else (row.entry,))',
        ),
        (DECISIONS, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "load-gate",
        "`load` waits until every rank is Connected",
        "S1",
        Edit(
            _LIFECYCLE,
            "RankRule(place, world_size - 1, (row.entry,))",
            'RankRule(place, world_size - 1, (row.entry, "Connecting", "Idle") if row.call == "load" else (row.entry,))',
        ),
        (DECISIONS, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "leader-last",
        "rank 0 warms up after all others",
        "S1",
        Edit(
            _LIFECYCLE,
            "RankRule(first, last, (row.during, row.after))",
            "RankRule(first, last, (row.entry, row.during, row.after))",
        ),
        (DECISIONS, EXHAUSTIVE, SIMULATION),
    ),
    Mutation(
        "spec",
        "an attempt that was opened for another spec is ended",
        "S8",
        Edit(_DECIDE, "    if epoch.digest != view.spec.digest:", "    if False:"),
        (DECISIONS,),
    ),
    Mutation(
        "permanent",
        "a permanent failure is not tried again",
        "L4",
        Edit(_DECIDE, '        if verdict.failure == "permanent":', "        if False:"),
        (DECISIONS,),
    ),
    Mutation(
        "caller-floor",
        "a planner remembers the highest number that it has seen",
        "S4",
        Edit(_BARRIER, "        self._floor = max(self._floor, snapshot.floor)\n", ""),
        (exhaustive("amnesia"), SIMULATION),
    ),
    Mutation(
        "roster-size",
        "a record whose roster does not fit its size counts as missing",
        "S4",
        Edit(
            _PICTURE,
            "        if recorded_size != world_size or len(joined) != recorded_size * INCARNATION_WIDTH:",
            "        if False:",
        ),
        (SPOILED,),
    ),
)

ENGINES: tuple[Mutation, ...] = (
    Mutation(
        "mlx-token",
        "an MLX engine compares the attempt of every rank in its ring",
        "S9",
        Edit(
            _MLX,
            "strangers = [rank for rank, place in enumerate(wanted) if found[rank : rank + 1] != [place]]",
            "strangers: list[int] = []",
        ),
        (MLX,),
    ),
    Mutation(
        "mlx-endpoint",
        "an MLX engine binds another port in every attempt",
        "S9",
        Edit(
            _MLX,
            "        self._place = (rank, world_size)\n        self._give_up_port()\n",
            '        self._place = (rank, world_size)\n        if self._bound is not None:\n            return f":{self._port}"\n',
        ),
        (MLX,),
    ),
    Mutation(
        "mlx-own-port",
        "an MLX engine enters a ring at the port that it has bound for this attempt, and no other",
        "S9",
        Edit(_MLX, "        if port != str(self._port):", "        if False:"),
        (MLX,),
    ),
    Mutation(
        "mlx-port-kept",
        "an MLX engine keeps its port until MLX has bound it",
        "S9",
        Edit(_MLX, "        _share_port(self._bound)\n", "        self._give_up_port()\n"),
        (MLX,),
    ),
    Mutation(
        "mlx-load-alone",
        "an MLX engine that is one of several ranks loads nothing before it is connected",
        "S1",
        Edit(_MLX, "        if self._place[1] > 1 and self._group is None:", "        if False:"),
        (MLX,),
    ),
    Mutation(
        "mlx-place",
        "an MLX engine is not connected as another rank than it was prepared for",
        "S1",
        Edit(_MLX, "        if (group.rank, group.world_size) != self._place:", "        if False:"),
        (MLX,),
    ),
)

COLLECTIVES: tuple[Mutation, ...] = (
    Mutation(
        "ring-token",
        "a simulated engine lets nobody of another attempt into its ring",
        "S9",
        Edit(_RING, "        if token != group.token.hex():", "        if False:"),
        (ATTEMPTS,),
    ),
    Mutation(
        "ring-endpoint",
        "a simulated engine binds another port in every attempt",
        "S9",
        Edit(
            _RING,
            "        if self._bound is not None:\n            self._bound.close()\n        self._bound = bind",
            '        if self._bound is not None:\n            return f":{self._port}"\n        self._bound = bind',
        ),
        (ATTEMPTS,),
    ),
    Mutation(
        "simulated-load-alone",
        "a simulated engine that is one of several ranks loads nothing before it is connected",
        "S1",
        Edit(
            "runner/engines/simulated.py",
            "        if self._world_size > 1 and not self._connected:",
            "        if False:",
        ),
        (ATTEMPTS,),
    ),
    Mutation(
        "simulated-load-untold",
        "a simulated engine that nobody told whether it is alone loads nothing",
        "S1",
        Edit(
            "runner/engines/simulated.py",
            "        if self._place is None:\n            raise",
            "        if False:\n            raise",
        ),
        (PRETENDED,),
    ),
    Mutation(
        "simulated-place",
        "a simulated engine is not connected as another rank than it was prepared for",
        "S1",
        Edit(
            "runner/engines/simulated.py",
            "        if self._prepared_as not in (None, (group.rank, group.world_size)):",
            "        if False:",
        ),
        (PRETENDED,),
    ),
    Mutation(
        "ring-twice",
        "a simulated engine lets nobody into its ring twice",
        "S9",
        Edit(_RING, "        if self._before is None or self._before.done():", "        if False:"),
        (ATTEMPTS,),
    ),
    Mutation(
        "port-alone",
        "a port that was bound for an attempt is nobody else's, also where an earlier attempt had it",
        "S9",
        Edit("runner/engine.py", "        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)\n", ""),
        (ATTEMPTS,),
    ),
    Mutation(
        "endpoints-own",
        "an engine is not connected where the record says that it waits elsewhere",
        "S9",
        Edit(_ENDPOINTS, "    if endpoints[rank] != own:", "    if False:"),
        (ATTEMPTS,),
    ),
    Mutation(
        "endpoints-apart",
        "an engine is not connected where two ranks say that they wait at one place",
        "S9",
        Edit(_ENDPOINTS, "        if endpoint and first.setdefault(endpoint, other) != other:", "        if False:"),
        (ATTEMPTS,),
    ),
    Mutation(
        "endpoints-epoch",
        "a rank reads the endpoints of the promised epoch only",
        "S9",
        Edit(_RECORD, "if promised is None or _read_epoch(number, nonce) != promised:", "if False:"),
        (ATTEMPTS,),
    ),
    Mutation(
        "endpoints-hostile",
        "a rank's report cannot shift the endpoints of others",
        "S10",
        Edit("barrier/lua/prelude.lua", '\'"endpoint":"([%w.:_%-%[%]]*)"\'', '\'"endpoint":"(.-)","pid\''),
        (ATTEMPTS,),
    ),
    Mutation(
        "prepared-first",
        "no rank says Idle in an attempt before its engine is prepared",
        "S9",
        Edit(_RUNNER, "self._member.promise(entry.epoch, status=PREPARING)", "self._member.promise(entry.epoch)"),
        (ATTEMPTS,),
    ),
    Mutation(
        "connect-deadline",
        "an engine that does not connect in time is ended",
        "L2",
        Edit(
            _HOST_LIVES,
            "            async with asyncio.timeout(group.deadline):",
            "            async with asyncio.timeout(5):",
        ),
        (ATTEMPTS,),
    ),
    Mutation(
        "spare-limit",
        "a spare engine that hangs is not waited for without an end",
        "L2",
        Edit(
            _HOST_LIVES,
            "asyncio.timeout(max(self._grace_seconds, 2 * self._longest_preparing)):",
            "asyncio.timeout(None):",
        ),
        (ATTEMPTS,),
    ),
    Mutation(
        "endpoints-loopback",
        "an engine is not connected where one rank says that it waits at its own machine's loopback address",
        "S9",
        Edit(_ENDPOINTS, "    if alone and reachable:", "    if False:"),
        (ATTEMPTS,),
    ),
    Mutation(
        "helpers-end",
        "a helper in a session of its own ends with its engine",
        "S9",
        Edit("runner/host/leftovers.py", "    end_marked(mark)\n    with _lock:", "    with _lock:"),
        (ATTEMPTS,),
    ),
    Mutation(
        "watcher",
        "a helper in a session of its own ends with a runner that is killed",
        "S9",
        Edit("runner/host/leftovers.py", "    end_marked(sys.argv[1])\n", ""),
        (ATTEMPTS,),
    ),
    Mutation(
        "load-sign",
        "a load that moves without another layer renews the planner's patience",
        "L2",
        Edit(
            "planner/recovery.py",
            "view.report.status, view.report.progress, view.report.signs)",
            "view.report.status, view.report.progress)",
        ),
        (ATTEMPTS,),
    ),
)

LIFE: tuple[Mutation, ...] = (
    Mutation(
        "failure-told-first",
        "a failure is told before the engine is killed",
        "L3",
        Edit(
            _RUNNER,
            "        await self._move(*self._session.failed(told, work))\n        await self._host.kill()",
            "        await self._host.kill()\n        await self._move(*self._session.failed(told, work))",
        ),
        (LIVES,),
    ),
    Mutation(
        "failure-first-kept",
        "the first failure of an attempt is its cause",
        "L4",
        Edit(
            _SESSION,
            "        if then.failure is None:\n            then = _become",
            "        if True:\n            then = _become",
        ),
        (LIVES,),
    ),
    Mutation(
        "cancelled-forgotten",
        "what was cancelled in one attempt is generated in the next",
        "S7",
        Edit(
            _SESSION,
            "return Session(self.instance, self.incarnation, lifecycle=self.lifecycle)",
            "return Session(self.instance, self.incarnation, lifecycle=self.lifecycle, cancelled=self.cancelled)",
        ),
        (LIVES,),
    ),
    Mutation(
        "generation-progress",
        "a text that takes long says how far it is",
        "L2",
        Edit(
            _GENERATIONS,
            "                    self._member.note_progress(tokens, task.max_tokens)",
            "                    pass",
        ),
        (LIVES,),
    ),
    Mutation(
        "announcement-repeated",
        "an announcement that found no room is repeated",
        "L6",
        Edit(
            _TASK_LOG,
            "        except asyncio.QueueFull:\n            self._offered = None",
            "        except asyncio.QueueFull:\n            pass",
        ),
        (LIVES,),
    ),
    Mutation(
        "requests-capped",
        "requests are capped, and the oldest give way",
        "S10",
        Edit("planner/requests.py", '"MAXLEN", MAX_WAITING, ', ""),
        (LIVES,),
    ),
    Mutation(
        "heartbeat-heard",
        "a rank whose heartbeat died accepts nothing",
        "S3",
        Edit(_MEMBER, "return self._failed is None and self.clock", "return self.clock"),
        (LIVES,),
    ),
    Mutation(
        "part-heard",
        "a mistake in a part of a runner ends the runner by name",
        "L4",
        Edit(_RUNNER_PROCESS, "            self._leaving.set()\n\n        return end", "\n        return end"),
        (LIVES,),
    ),
)

CONNECTIONS: tuple[Mutation, ...] = (
    Mutation(
        "wrong-server",
        "a reply about the server ends the connections to it",
        "L7",
        Edit(_CONNECTION, "                standing.doubt(self)", "                pass"),
        (WRONG_SERVER,),
    ),
    Mutation(
        "blocked-reader",
        "who waits at the wrong server is told",
        "L7",
        Edit(_STANDING, "            one.hang_up()", "            pass"),
        (WRONG_SERVER,),
    ),
    Mutation(
        "judged-anew",
        "each new connection's server is judged",
        "L7",
        Edit(_CONNECTION, "                standing.judge(facts_of(info), self._host_error())", "                pass"),
        (WRONG_SERVER,),
    ),
    Mutation(
        "idle-connection",
        "a connection that lay idle is not used again",
        "L7",
        Edit(_CONNECTION, " or idle > IDLE_SECONDS", ""),
        (WRONG_SERVER,),
    ),
    Mutation(
        "password-renewed",
        "a password's file is read for each connection",
        "L7",
        Edit(
            _STANDING,
            "            password = self._read()",
            '            password = self.__dict__.setdefault("kept", self._read())',
        ),
        (WRONG_SERVER,),
    ),
    Mutation(
        "certificate-renewed",
        "certificates are read again where their files have changed",
        "L7",
        Edit(_CONNECTION, "            if signature != self._signature:", "            if self._signature is None:"),
        (WRONG_SERVER,),
    ),
)

MUTATIONS: tuple[Mutation, ...] = (*SCRIPTS, *RANKS, *PLANNERS, *ENGINES, *COLLECTIVES, *LIFE, *CONNECTIONS)

QUICK: tuple[str, ...] = ("gate-epoch", "once", "verdict-first", "floor-record")
"""A share that its first searches find in a few seconds each."""


def searches_of(mutations: tuple[Mutation, ...]) -> list[Search]:
    """Every search that these mutations ask for, once, in order."""
    return list(dict.fromkeys(search for mutation in mutations for search in mutation.searches))
